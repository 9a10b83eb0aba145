"""Positive random features (PRF): φ_ω(x) = h(x) exp(ω·x).

Kept as logarithms until the attention algorithm exponentiates them, so that
nothing overflows.
"""

import math
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_kt import _checks
from keras_kt.features.base import FeatureMap, per_frequency
from keras_kt.numerics import precise_product

PREFACTORS = ("softmax", "tilted", "gaussian", "isotropic")


class PositiveMap(NamedTuple):
    """Log-features of x; `C` components share the frequencies evenly.

    Attributes:
        projection: `(heads, head_dim, num_frequencies)`.
        linear: `(heads, head_dim, components)` or `None`.
        quadratic: `(heads, head_dim, components)` for Σ_d q_d x_d², or
            `(heads, components, head_dim, head_dim)` for |qᵀx|².
        log_amplitudes: `(heads, 1, components)`.
        two_sided: whether each frequency gives exp(+ω·x) and exp(−ω·x).
    """

    projection: tf.Tensor
    linear: tf.Tensor | None
    quadratic: tf.Tensor
    log_amplitudes: tf.Tensor
    two_sided: bool

    positive = True

    @property
    def width(self) -> int:
        """Size of the feature axis."""
        return self.projection.shape[-1] * (2 if self.two_sided else 1)

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return self._sides(x, self.exponent(x))

    def exponent(self, x: tf.Tensor) -> tf.Tensor:
        """What the log-features of a component share."""
        exponent = self.log_amplitudes - self._quadratic_form(x)
        if self.linear is not None:
            exponent += precise_product(x, self.linear)
        return exponent

    def relative(self, x: tf.Tensor) -> tf.Tensor:
        """Log-features up to a constant of each x, which attention cancels."""
        if self.log_amplitudes.shape[-1] > 1:
            return self(x)
        return self._sides(x, tf.zeros_like(self.log_amplitudes))

    def _sides(self, x, exponent):
        projected = precise_product(x, self.projection)
        exponent = per_frequency(exponent, projected)
        if self.two_sided:
            projected = tf.concat([projected, -projected], -1)
            if exponent.shape[-1] > 1:
                exponent = tf.concat([exponent, exponent], -1)
        return projected + exponent

    def _quadratic_form(self, x):
        if self.quadratic.shape.rank == 3 and self.quadratic.shape[-1] == 1:
            diagonal = tf.linalg.matrix_transpose(self.quadratic)
            return tf.reduce_sum(tf.square(x) * diagonal, -1, keepdims=True)
        if self.quadratic.shape.rank == 3:
            return precise_product(tf.square(x), self.quadratic)
        rotated = _by_component(x, self.quadratic)
        return tf.reduce_sum(tf.square(rotated), axis=-1)


class ExactKernel(NamedTuple):
    """The kernel that a `PositiveMap` of Gaussian frequencies estimates.

    It is Σ_c exp(q̃_c·k̃_c), up to the factor of the query that the map's
    `relative` leaves out, where q̃_c and k̃_c are x under a factor of Σ_c with
    two more coordinates.

    Attributes:
        feature_map: the `PositiveMap`.
        factors: `(heads, components, head_dim)` standard deviations, or
            Cholesky factors `(heads, components, head_dim, head_dim)`.
    """

    feature_map: PositiveMap
    factors: tf.Tensor

    def queries(self, x: tf.Tensor) -> tf.Tensor:
        """q̃, `(batch, heads, length, components, head_dim + 2)`."""
        mapped, exponent = self._mapped(x)
        if self.factors.shape[1] > 1:
            exponent += self.feature_map.exponent(x)
        return self._join(mapped, exponent, tf.ones_like(exponent))

    def keys(self, x: tf.Tensor) -> tf.Tensor:
        """k̃, like q̃."""
        mapped, exponent = self._mapped(x)
        # Features are a sum over frequencies and sides.
        terms = self.feature_map.width // self.factors.shape[1]
        exponent += self.feature_map.exponent(x) + math.log(terms)
        return self._join(mapped, tf.ones_like(exponent), exponent)

    def _mapped(self, x):
        if self.factors.shape.rank == 3:
            factors = self.factors[:, tf.newaxis]
            mapped = x[:, :, :, tf.newaxis] * factors
        else:
            mapped = _by_component(x, self.factors)
        return mapped, 0.5 * tf.reduce_sum(tf.square(mapped), axis=-1)

    def _join(self, mapped, *coordinates):
        more = tf.stack(coordinates, axis=-1)
        return tf.concat([mapped, more], axis=-1)


@keras.saving.register_keras_serializable(package="keras_kt")
class PositiveFeatures(FeatureMap):
    """Positive random features (PRF): φ_ω(x) = h(x) exp(ω·x).

    k(x, y) = E[φ_ω(x)·φ_ω(y)] = h(x) h(y) E exp(ω·(x + y)): always positive, so
    attention weights are a convex combination and the normalizer is at least
    one, without any epsilon.

    Args:
        prefactor: log h(x), with Σ and μ those of the prior (of each component
            of a mixture). `"softmax"` (default): −½xᵀΣx − μ·x, so that keys
            weigh exp(qᵀΣk). `"tilted"`: −½xᵀΣx, so that they weigh
            exp(qᵀΣk + μ·k): softmax of queries whose mean, moved into μ, costs
            no variance. `"gaussian"`: −xᵀΣx, so that they weigh
            exp(μ·k − ½(q−k)ᵀΣ(q−k)). `"isotropic"`: −|x|² whatever Σ is, the
            paper's released form.
        two_sided: whether every frequency ω = μ + δ is used with its mirror
            image μ − δ. Half the projections for a given number of features,
            and a smaller error. Defaults to `True`.

    References:
        arXiv 2110.08323, equation 8; Choromanski et al., arXiv 2009.14794.

    Examples:

    >>> layer = keras_kt.KernelizedAttention(
    ...     2, 8, feature_map=keras_kt.PositiveFeatures("gaussian"))
    >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
    TensorShape([1, 4, 3])
    """

    def __init__(self, prefactor="softmax", two_sided=True, **kwargs):
        super().__init__(**kwargs)
        self.prefactor = _checks.choice("prefactor", prefactor, PREFACTORS)
        self.two_sided = _checks.boolean("two_sided", two_sided)

    @property
    def sides(self):
        return 2 if self.two_sided else 1

    @property
    def is_softmax(self):
        return self.prefactor in ("softmax", "tilted")

    def is_tilted(self, prior):
        is_normal = prior.is_gaussian and prior.num_components == 1
        return self.prefactor == "tilted" and is_normal and prior.has_mean

    def default_num_features(self, prior, head_dim):
        # Both kinds need whole blocks; one-sided features need the width too.
        return 2 * prior.block_size(head_dim)

    def validate(self, prior):
        if not prior.has_moment_generating_function:
            raise ValueError(
                "Positive features need a prior with a moment generating "
                "function: E exp(ω·z) must be finite for every z. Received: "
                f"{prior.describe()}, whose tails are too heavy (or not known "
                'to be light). Use feature_map="trigonometric", which takes '
                "any distribution, or has_moment_generating_function=True if "
                "you know that it exists."
            )
        if prior.has_mean and self.prefactor == "softmax":
            raise ValueError(
                "The softmax prefactor cancels the mean of the prior, so that "
                "it would never be trained. Received: prefactor='softmax' with "
                f"use_mean=True in {type(prior).__name__}. Use "
                'PositiveFeatures(prefactor="tilted"), which keeps it, '
                'prefactor="gaussian", trigonometric features, or '
                "use_mean=False."
            )

    def bind(self, frequencies, scale=1.0):
        linear = None
        if self.prefactor != "softmax" and frequencies.means is not None:
            linear = scale * tf.linalg.matrix_transpose(frequencies.means)
        covariances = frequencies.covariances
        is_half = self.prefactor in ("softmax", "tilted")
        share = scale**2 * (0.5 if is_half else 1.0)
        if self.prefactor == "isotropic":
            quadratic = share * tf.ones_like(frequencies.offsets[:, :1])
            quadratic = tf.linalg.matrix_transpose(quadratic)
        elif covariances.shape.rank == 3:
            quadratic = share * tf.linalg.matrix_transpose(covariances)
        else:
            quadratic = math.sqrt(share) * covariances
        return PositiveMap(
            projection=scale * tf.linalg.matrix_transpose(frequencies.offsets),
            linear=linear,
            quadratic=quadratic,
            log_amplitudes=0.5
            * (frequencies.log_weights - math.log(self.sides))[:, tf.newaxis],
            two_sided=self.two_sided,
        )

    def has_exact_kernel(self, prior):
        return prior.is_gaussian

    def exact_kernel(self, prior, scale=1.0):
        # Frequencies of fixed radius estimate it with a small bias.
        if not self.has_exact_kernel(prior):
            return None
        frequencies = prior.stored_frequencies()
        factors = frequencies.covariances
        if factors.shape.rank == 3:
            factors = tf.sqrt(factors)
        return ExactKernel(self.bind(frequencies, scale), scale * factors)

    def get_config(self):
        return {
            **super().get_config(),
            "prefactor": self.prefactor,
            "two_sided": self.two_sided,
        }


def _by_component(x, factors):
    """x under each component's factor, `(batch, heads, t, c, e)`."""
    mapped = precise_product(x[:, :, tf.newaxis], factors)
    return tf.einsum("bhcte->bhtce", mapped)
