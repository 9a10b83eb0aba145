"""Diagnostics: what a learned kernel looks like, and when it went wrong.

Arrays first; `plots` draws them, and `SpectralMonitor` writes them to
TensorBoard while a model trains.
"""

from keras_kt.diagnostics import plots
from keras_kt.diagnostics.findings import Finding, health
from keras_kt.diagnostics.matrices import (
    AttentionMap,
    attention_maps,
    kernel_errors,
)
from keras_kt.diagnostics.monitor import SpectralMonitor
from keras_kt.diagnostics.profile import (
    KernelProfile,
    Spectrum,
    kernel_profile,
    spectrum,
)
from keras_kt.diagnostics.record import layers_of
from keras_kt.diagnostics.rows import RowSums, row_sums
from keras_kt.diagnostics.usage import effective_features

__all__ = [
    "AttentionMap",
    "Finding",
    "KernelProfile",
    "RowSums",
    "SpectralMonitor",
    "Spectrum",
    "attention_maps",
    "effective_features",
    "health",
    "kernel_errors",
    "kernel_profile",
    "layers_of",
    "plots",
    "row_sums",
    "spectrum",
]
