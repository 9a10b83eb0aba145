"""What is wrong with the kernels of a model, in words, with advice.

Of weights alone: parameters that are not finite, dead components, constant
kernels. On a batch: queries and keys too long for the number of features, rows
that do not sum to one.
"""

from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kt.conversion.errors import predicted_deviation
from keras_kt.diagnostics.profile import (
    component_shares,
    kernel_profile,
    spectrum,
)
from keras_kt.diagnostics.record import (
    check_layer,
    layers_of,
    recorded,
    scaled_tokens,
)
from keras_kt.diagnostics.rows import summarized
from keras_kt.layers.attention import KernelizedAttention

# A component with less than this share of an even one has died.
_DEAD = 0.05
# A kernel that is above this everywhere tells no keys apart.
_CONSTANT = 0.99
# Kernel estimates whose relative standard deviation is above this are noise.
_NOISY = 1.0


class Finding(NamedTuple):
    """Something that is wrong with one head.

    Attributes:
        path: the layer; its name if a layer was examined.
        head: number of the head.
        problem: what was seen.
        advice: what to do about it.
    """

    path: str
    head: int
    problem: str
    advice: str

    def __str__(self):
        return f"{self.path}, head {self.head}: {self.problem}. {self.advice}"


def health(model: keras.Model, data: Any = None) -> list[Finding]:
    """What is wrong with the kernels of a model or a layer.

    Looks for parameters that are not finite, components of a mixture that have
    died and kernels that tell no keys apart; on a batch also for queries and
    keys too long for the number of features, and for rows of attention weights
    that do not sum to one (see `row_sums`).

    Args:
        model: a model with `KernelizedAttention` layers, or one such layer.
        data: one batch of the model's inputs. Defaults to `None`, which looks
            at weights only, the one choice for a layer.

    Returns:
        List of `Finding`; empty if nothing was found.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(2, 4)
        >>> _ = layer(np.ones((1, 3, 5)), np.ones((1, 3, 5)))
        >>> keras_kt.diagnostics.health(layer)
        []
    """
    if isinstance(model, KernelizedAttention):
        if data is not None:
            raise ValueError(
                "`data` needs a model, which gives the layer its inputs. "
                f"Received: the layer {model.name!r} and data. Pass the model."
            )
        check_layer(model)
        return list(_weights_findings(model.name, model))
    findings = []
    for path, layer in layers_of(model).items():
        findings += _weights_findings(path, layer)
    if data is not None:
        for path, layer, record in recorded(model, data, sums=True):
            findings += _data_findings(path, layer, record)
    return findings


def _weights_findings(path, layer):
    omega = spectrum(layer).frequencies
    profile = kernel_profile(layer).kernel
    shares = component_shares(layer)
    for head in range(layer.num_heads):
        if not np.isfinite(omega[head]).all():
            yield Finding(
                path,
                head,
                "its frequencies are not finite",
                "Training diverged: lower the learning rate or clip gradients, "
                "and go back to a checkpoint",
            )
            continue
        dead = np.flatnonzero(shares[head] < _DEAD / shares.shape[1])
        if dead.size:
            yield Finding(
                path,
                head,
                f"components {dead.tolist()} have died, with probabilities "
                f"{shares[head][dead].round(4).tolist()}",
                "Lower `num_components`: their features are wasted",
            )
        if profile[head].min() > _CONSTANT:
            yield Finding(
                path,
                head,
                "its kernel is the same for all keys within distance 10, "
                f"at least {profile[head].min():.3f} of that at 0",
                "It averages all tokens: raise the prior's `scale`, or see "
                "whether the head is needed",
            )


def _data_findings(path, layer, record):
    if record.sums is not None:
        yield from _sums_findings(path, summarized(layer, record.sums))
        return
    if not layer.spectral_prior.has_draw:
        # Its frequencies estimate nothing: they are the kernel.
        return
    queries, keys = scaled_tokens(layer, record.call)
    omega, weights = spectrum(layer)
    for head in range(layer.num_heads):
        deviation = predicted_deviation(
            queries[head],
            keys[head],
            _covariance(omega[head], weights[head]),
            len(omega[head]),
        )
        if deviation > _NOISY:
            yield Finding(
                path,
                head,
                "queries and keys are too long for the number of features: an "
                f"estimate of a kernel value deviates by {deviation:.2g} of it",
                "What the head learns is its own draw and not the kernel, so "
                "keep redraw='never'; raise `num_features`, use qk_norm='l2', "
                "or, after `convert_attention`, `calibrate`",
            )


def _sums_findings(path, sums):
    for head, (guarded, least) in enumerate(zip(*sums, strict=True)):
        if guarded > 0.0:
            yield Finding(
                path,
                head,
                f"{100 * guarded:.2g} % of its rows of attention weights sum "
                f"to less than one, the least to {least:.2g}: their signed "
                "normalizers are near zero or negative, and guarded",
                "Outputs of these queries are scaled down: raise `smoothing` "
                "or `num_features`, leave qk_norm at 'auto', or use positive "
                "features",
            )


def _covariance(omega, weights):
    centered = omega - weights @ omega
    return np.einsum("m,md,me->de", weights, centered, centered)
