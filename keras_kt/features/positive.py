"""Positive random features (PRF): φ_ω(x) = h(x) exp(ω·x).

Kept as logarithms until the attention algorithm exponentiates them, so that
nothing overflows.
"""

import math
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kt import _checks
from keras_kt.features.base import FeatureMap, per_feature
from keras_kt.numerics import precise_product
from keras_kt.priors import Frequencies, SpectralPrior

PREFACTORS = ("softmax", "tilted", "gaussian", "isotropic", "self")


class PositiveMap(NamedTuple):
    """Log-features of x; `C` components share the frequencies evenly.

    Attributes:
        projection: `(heads, head_dim, num_frequencies)`.
        linear: `(heads, head_dim, components)` or `None`.
        quadratic: `(heads, head_dim, components)` for Σ_d q_d x_d², or
            `(heads, components, head_dim, head_dim)` for |qᵀx|². `None` for
            features that are normalized by themselves.
        log_amplitudes: `(heads, 1, components)`.
        two_sided: whether each frequency gives exp(+ω·x) and exp(−ω·x).
        key_projection: like `projection`, where that of keys is another.
        is_absolute: whether queries keep factors that attention cancels.
    """

    projection: tf.Tensor
    linear: tf.Tensor | None
    quadratic: tf.Tensor | None
    log_amplitudes: tf.Tensor
    two_sided: bool
    key_projection: tf.Tensor | None = None
    is_absolute: bool = False

    @property
    def positive(self) -> bool:
        return True

    @property
    def width(self) -> int:
        """Size of the feature axis."""
        return self.projection.shape[-1] * (2 if self.two_sided else 1)

    @property
    def is_self_normalized(self) -> bool:
        return self.quadratic is None

    def keys(self, x: tf.Tensor) -> tf.Tensor:
        """Log-features of keys."""
        projection = self.projection
        if self.key_projection is not None:
            projection = self.key_projection
        return self._complete(x, projection)

    def queries(self, x: tf.Tensor) -> tf.Tensor:
        """Log-features of queries, up to a factor of each unless absolute."""
        if self.is_absolute:
            return self._complete(x, self.projection)
        exponent = tf.zeros_like(self.log_amplitudes)
        if self.log_amplitudes.shape[-1] > 1:
            exponent = self.exponent(x)
        return self._sides(x, self.projection, exponent)

    def exponent(self, x: tf.Tensor) -> tf.Tensor:
        """What the log-features of a component share.

        Self-normalized ones share one more term, `log_mass` of all.
        """
        exponent = self.log_amplitudes
        if not self.is_self_normalized:
            exponent -= self._quadratic_form(x)
        if self.linear is not None:
            exponent += precise_product(x, self.linear)
        return exponent

    def log_mass(self, log_features: tf.Tensor) -> tf.Tensor:
        """log Σ_m π_m exp(ω_m·x), from log-features without that factor.

        Args:
            log_features: `(…, features)`, or what features of a component have
                in common, `(…, components)`.
        """
        terms = log_features
        if terms.shape[-1] == self.width:
            terms += self._per_feature(self.log_amplitudes)
        else:
            terms += self.log_amplitudes
        return tf.reduce_logsumexp(terms, axis=-1, keepdims=True)

    def _complete(self, x, projection):
        features = self._sides(x, projection, self.exponent(x))
        if self.is_self_normalized:
            features -= self.log_mass(features)
        return features

    def _sides(self, x, projection, exponent):
        projected = precise_product(x, projection)
        if self.two_sided:
            projected = tf.concat([projected, -projected], -1)
        return projected + self._per_feature(exponent)

    def _per_feature(self, components):
        each = per_feature(components, self.projection.shape[-1])
        is_mirrored = self.two_sided and each.shape[-1] > 1
        return tf.concat([each, each], -1) if is_mirrored else each

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
    `queries` leave out, where q̃_c and k̃_c are x under a factor of Σ_c with two
    more coordinates.

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
        if self.factors.shape[1] > 1 or self.feature_map.is_absolute:
            exponent = self._complete(x, exponent)
        return self._join(mapped, exponent, tf.ones_like(exponent))

    def keys(self, x: tf.Tensor) -> tf.Tensor:
        """k̃, like q̃."""
        mapped, exponent = self._mapped(x)
        exponent = self._complete(x, exponent) + self._log_terms()
        return self._join(mapped, tf.ones_like(exponent), exponent)

    def _complete(self, x, exponent):
        exponent += self.feature_map.exponent(x)
        if self.feature_map.is_self_normalized:
            exponent -= self.feature_map.log_mass(exponent) + self._log_terms()
        return exponent

    def _log_terms(self):
        # Features are a sum over frequencies and sides.
        return math.log(self.feature_map.width // self.factors.shape[1])

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
            paper's released form. `"self"`: −log Σ_m π_m exp(ω_m·x) of the
            frequencies at hand, where the others have its limit for many: the
            features of each key sum to one, so that none weighs more or less by
            the luck of the draw.
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

    def __init__(
        self, prefactor: str = "softmax", two_sided: bool = True, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.prefactor = _checks.choice("prefactor", prefactor, PREFACTORS)
        self.two_sided = _checks.boolean("two_sided", two_sided)

    @property
    def sides(self) -> int:  # type: ignore[override]
        return 2 if self.two_sided else 1

    @property
    def is_softmax(self) -> bool:  # type: ignore[override]
        return self.prefactor in ("softmax", "tilted", "self")

    def cancels_mean(self, prior: SpectralPrior) -> bool:
        is_shared = prior.num_components == 1
        return self.prefactor == "softmax" or (
            self.prefactor == "self" and is_shared
        )

    def is_tilted(self, prior: SpectralPrior) -> bool:
        is_normal = prior.is_gaussian and prior.num_components == 1
        return self.prefactor == "tilted" and is_normal and prior.has_mean

    def default_num_features(self, prior: SpectralPrior, head_dim: int) -> int:
        # Both kinds need whole blocks; one-sided features need the width too.
        return 2 * prior.block_size(head_dim)

    def validate(self, prior: SpectralPrior) -> None:
        if not prior.has_moment_generating_function:
            raise ValueError(
                "Positive features need a prior with a moment generating "
                "function: E exp(ω·z) must be finite for every z. Received: "
                f"{prior.describe()}, whose tails are too heavy (or not known "
                'to be light). Use feature_map="trigonometric", which takes '
                "any distribution, or has_moment_generating_function=True if "
                "you know that it exists."
            )
        if prior.has_mean and self.cancels_mean(prior):
            raise ValueError(
                f"The {self.prefactor} prefactor cancels the mean of the "
                "prior, so that it would never be trained. Received: prefactor="
                f"{self.prefactor!r} with "
                f"use_mean=True in {type(prior).__name__}. Use "
                'PositiveFeatures(prefactor="tilted"), which keeps it, '
                'prefactor="gaussian", trigonometric features, or '
                "use_mean=False."
            )

    def bind(
        self,
        frequencies: Frequencies,
        scale: float = 1.0,
        *,
        is_absolute: bool = False,
    ) -> Any:
        def projection(offsets):
            return scale * tf.linalg.matrix_transpose(offsets)

        linear = None
        if self.prefactor != "softmax" and frequencies.means is not None:
            linear = projection(frequencies.means)
        of_keys = frequencies.key_offsets
        return PositiveMap(
            projection=projection(frequencies.offsets),
            linear=linear,
            quadratic=self._quadratic(frequencies, scale),
            log_amplitudes=0.5
            * (frequencies.log_weights - math.log(self.sides))[:, tf.newaxis],
            two_sided=self.two_sided,
            key_projection=None if of_keys is None else projection(of_keys),
            # Closed forms leave out of both fields what queries may.
            is_absolute=is_absolute and self.prefactor == "self",
        )

    def _quadratic(self, frequencies, scale):
        if self.prefactor == "self":
            return None
        is_half = self.prefactor in ("softmax", "tilted")
        share = scale**2 * (0.5 if is_half else 1.0)
        if self.prefactor == "isotropic":
            ones = tf.ones_like(frequencies.offsets[:, :1])
            return share * tf.linalg.matrix_transpose(ones)
        covariances = frequencies.covariances
        if covariances.shape.rank == 3:
            return share * tf.linalg.matrix_transpose(covariances)
        return math.sqrt(share) * covariances

    def has_exact_kernel(self, prior: SpectralPrior) -> bool:
        return prior.is_gaussian

    def exact_kernel(self, prior: SpectralPrior, scale: float = 1.0) -> Any:
        # Frequencies of fixed radius estimate it with a small bias.
        if not self.has_exact_kernel(prior):
            return None
        frequencies = prior.stored_frequencies()
        factors = frequencies.covariances
        if factors.shape.rank == 3:
            factors = tf.sqrt(factors)
        bound = self.bind(frequencies, scale, is_absolute=True)
        return ExactKernel(bound, scale * factors)

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
