"""Linear-time attention with learned kernels, for Keras 3 on TensorFlow."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_kt needs the TensorFlow backend of Keras. Received: backend "
        f"{keras.backend.backend()!r}. Set the environment variable "
        "KERAS_BACKEND=tensorflow before Keras is imported."
    )

from keras_kt import diagnostics, kernels
from keras_kt.conversion.calibrate import CalibrationReport, calibrate
from keras_kt.conversion.convert import (
    ConversionReport,
    ConvertedLayer,
    convert_attention,
)
from keras_kt.conversion.distill import distill
from keras_kt.conversion.errors import (
    AttentionErrors,
    HeadError,
    attention_error,
    closed_form_attention,
)
from keras_kt.conversion.keras_hub import CachedKernelizedAttention
from keras_kt.diagnostics import plots
from keras_kt.diagnostics.monitor import SpectralMonitor
from keras_kt.features import (
    FeatureMap,
    PositiveFeatures,
    TrigonometricFeatures,
)
from keras_kt.generation import generate
from keras_kt.layers.attention import KernelizedAttention
from keras_kt.layers.linear_attention import LinearAttention
from keras_kt.layers.transformer import (
    DecoderState,
    KernelizedTransformerDecoder,
    KernelizedTransformerEncoder,
)
from keras_kt.ops.states import AttentionState
from keras_kt.ops.window import NearFieldState
from keras_kt.priors import (
    DistributionPrior,
    FastFoodPrior,
    Frequencies,
    GeneratorPrior,
    MixturePrior,
    NormalPrior,
    SpectralPrior,
)
from keras_kt.serving import export_saved_model
from keras_kt.systems import PAPER_SYSTEMS, paper_system

__version__ = "0.1.0"

__all__ = [
    "PAPER_SYSTEMS",
    "AttentionErrors",
    "AttentionState",
    "DecoderState",
    "CalibrationReport",
    "CachedKernelizedAttention",
    "ConversionReport",
    "ConvertedLayer",
    "DistributionPrior",
    "FastFoodPrior",
    "FeatureMap",
    "Frequencies",
    "GeneratorPrior",
    "HeadError",
    "KernelizedAttention",
    "KernelizedTransformerDecoder",
    "KernelizedTransformerEncoder",
    "LinearAttention",
    "MixturePrior",
    "NearFieldState",
    "NormalPrior",
    "PositiveFeatures",
    "SpectralMonitor",
    "SpectralPrior",
    "TrigonometricFeatures",
    "attention_error",
    "calibrate",
    "closed_form_attention",
    "convert_attention",
    "diagnostics",
    "distill",
    "export_saved_model",
    "generate",
    "kernels",
    "paper_system",
    "plots",
]
