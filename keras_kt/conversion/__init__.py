"""Trained softmax models with linear attention: converted and improved.

`keras_kt.convert_attention` makes one; `attention_error` says how far it is
from softmax, `calibrate` and `distill` bring it closer,
`distill_outputs` the whole model.
"""

from keras_kt.conversion.calibration import CalibrationReport, calibrate
from keras_kt.conversion.closed_form import closed_form_attention
from keras_kt.conversion.distillation import distill
from keras_kt.conversion.errors import (
    AttentionErrors,
    HeadError,
    attention_error,
)
from keras_kt.conversion.far_field import without_far_field
from keras_kt.conversion.keras_hub import CachedKernelizedAttention
from keras_kt.conversion.outputs import distill_outputs
from keras_kt.conversion.report import ConversionReport, ConvertedLayer

__all__ = [
    "AttentionErrors",
    "CachedKernelizedAttention",
    "CalibrationReport",
    "ConversionReport",
    "ConvertedLayer",
    "HeadError",
    "attention_error",
    "calibrate",
    "closed_form_attention",
    "distill",
    "distill_outputs",
    "without_far_field",
]
