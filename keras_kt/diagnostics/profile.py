"""What a layer's spectral prior makes of its kernel: profile and spectrum.

Functions of a built layer, which look at its frequencies alone. By Bochner's
theorem the spectrum is the kernel; the profile is the kernel by distance.
"""

from typing import NamedTuple

import keras
import numpy as np
from numpy.typing import ArrayLike

from keras_kt import _checks, kernels
from keras_kt.diagnostics.record import check_layer


class KernelProfile(NamedTuple):
    """The shift-invariant kernel E cos ω·(q − k) that a prior stands for.

    Attributes:
        distances: `(points,)`, |q − k| before the layer scales queries and
            keys, or after qk_norm, where lengths are its learned √τ.
        kernel: `(heads, points)`, of the frequencies that are drawn, a mean
            over directions of q − k.
        closed_form: the same of the prior's own law, or `None` for a prior
            that has no closed form.
    """

    distances: np.ndarray
    kernel: np.ndarray
    closed_form: np.ndarray | None


class Spectrum(NamedTuple):
    """The frequencies of a layer: its kernel, by Bochner's theorem.

    Attributes:
        frequencies: `(heads, num_frequencies, key_dim)`.
        weights: `(heads, num_frequencies)`; those of a head sum to one.
    """

    frequencies: np.ndarray
    weights: np.ndarray


def kernel_profile(
    layer: keras.Layer,
    distances: ArrayLike | None = None,
    *,
    directions: int = 64,
    seed: int = 0,
) -> KernelProfile:
    """How similar a layer finds a query and a key, by their distance.

    The kernel of trigonometric features without their smoothing. Positive
    features weigh keys by the same prior's moment generating function, which
    grows with length and has no profile of its own.

    Args:
        layer: a built `KernelizedAttention`.
        distances: `(points,)`. Defaults to `None`: 41 from 0 to 10.
        directions: how many directions of q − k are averaged.
        seed: integer, of the directions.

    Returns:
        `KernelProfile`.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(2, 4)
        >>> _ = layer(np.ones((1, 3, 5)), np.ones((1, 3, 5)))
        >>> keras_kt.diagnostics.kernel_profile(layer, [0.0, 1.0]).kernel.shape
        (2, 2)
    """
    check_layer(layer)
    if distances is None:
        distances = np.linspace(0.0, 10.0, 41)
    distances = np.array(_checks.floats("distances", distances))
    directions = _checks.integer("directions", directions)
    seed = _checks.integer("seed", seed, minimum=0)
    unit = np.random.default_rng(seed).normal(size=(directions, layer.key_dim))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    omega, weights = spectrum(layer)
    if layer.temperature is None:
        # Distances are after a norm; without one all heads are scaled alike.
        unit, _ = layer.scaled(*2 * [unit[np.newaxis, :, np.newaxis]])
        unit = np.asarray(unit[0, :, 0], "float64")
    angles = np.einsum("hmd,nd->hmn", omega, unit)
    profile = np.stack(
        [
            np.einsum("hm,hmn->h", weights, np.cos(distance * angles))
            for distance in distances
        ],
        axis=1,
    )
    return KernelProfile(
        distances,
        profile / directions,
        _closed_form(layer.spectral_prior, distances, unit),
    )


def spectrum(layer: keras.Layer) -> Spectrum:
    """The frequencies that a layer has drawn.

    Args:
        layer: a built `KernelizedAttention`.

    Returns:
        `Spectrum`.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(2, 4, num_features=16)
        >>> _ = layer(np.ones((1, 3, 5)), np.ones((1, 3, 5)))
        >>> keras_kt.diagnostics.spectrum(layer).frequencies.shape
        (2, 8, 4)
    """
    check_layer(layer)
    draw = layer.spectral_prior.stored_frequencies()
    omega = np.asarray(draw.offsets, "float64")
    probabilities = np.exp(np.asarray(draw.log_weights, "float64"))
    count = omega.shape[1] // probabilities.shape[1]
    if draw.means is not None:
        omega = omega + np.repeat(np.asarray(draw.means), count, axis=1)
    return Spectrum(omega, np.repeat(probabilities, count, axis=1))


def component_shares(layer):
    """Probabilities of a mixture's components, `(heads, components)`."""
    count = layer.spectral_prior.num_components
    weights = spectrum(layer).weights
    return weights.reshape(len(weights), count, -1).sum(axis=-1)


def _closed_form(prior, distances, unit):
    """`(heads, points)` of the prior's characteristic function, or `None`."""
    points = np.einsum("p,nd->pnd", distances, unit)
    flat = points.reshape(-1, points.shape[-1])
    try:
        values = kernels.characteristic_function(prior, flat)
    except ValueError:
        return None
    return values.reshape(len(values), *points.shape[:2]).mean(axis=-1)
