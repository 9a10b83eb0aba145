"""Diagnostics: what a learned kernel looks like, and when it went wrong.

Arrays first; `plots` draws them, and `SpectralMonitor` writes them to
TensorBoard while a model trains.
"""

from keras_kt.diagnostics import plots
from keras_kt.diagnostics.inspect import (
    AttentionMap,
    Finding,
    KernelProfile,
    RowSums,
    Spectrum,
    attention_maps,
    effective_features,
    health,
    kernel_errors,
    kernel_profile,
    layers_of,
    row_sums,
    spectrum,
)

__all__ = [
    "AttentionMap",
    "Finding",
    "KernelProfile",
    "RowSums",
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
