"""Linear-time attention with learned kernels, for Keras 3 on TensorFlow."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_kt needs the TensorFlow backend of Keras. Received: backend "
        f"{keras.backend.backend()!r}. Set the environment variable "
        "KERAS_BACKEND=tensorflow before Keras is imported."
    )

from keras_kt import conversion, diagnostics, kernels
from keras_kt.conversion.convert import convert_attention
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
from keras_kt.ops.states import AttentionState, NearFieldState, WindowState
from keras_kt.priors import (
    DistributionPrior,
    EmpiricalPrior,
    FastFoodPrior,
    Frequencies,
    GeneratorPrior,
    MixturePrior,
    NormalPrior,
    SpectralPrior,
)
from keras_kt.serving import export_saved_model
from keras_kt.systems import PAPER_SYSTEMS, paper_system

__version__ = "0.2.0.dev0"

__all__ = [
    "PAPER_SYSTEMS",
    "AttentionState",
    "DecoderState",
    "DistributionPrior",
    "EmpiricalPrior",
    "FastFoodPrior",
    "FeatureMap",
    "Frequencies",
    "GeneratorPrior",
    "KernelizedAttention",
    "KernelizedTransformerDecoder",
    "KernelizedTransformerEncoder",
    "LinearAttention",
    "MixturePrior",
    "NearFieldState",
    "NormalPrior",
    "PositiveFeatures",
    "SpectralPrior",
    "TrigonometricFeatures",
    "WindowState",
    "conversion",
    "convert_attention",
    "diagnostics",
    "export_saved_model",
    "generate",
    "kernels",
    "paper_system",
]
