"""Gaussian priors: one Gaussian per head, and a mixture of them."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from keras_kt import _checks
from keras_kt.priors import base_noise
from keras_kt.priors.base import Frequencies, SpectralPrior

COVARIANCES = ("diagonal", "isotropic", "full")


class GaussianPrior(SpectralPrior):
    """What one Gaussian per head and a mixture of them have in common.

    Components are stratified: each owns a fixed share of whole blocks of
    frequencies and its probability is a weight, so the kernel and the gradient
    to the probabilities are exact (no discrete sampling).
    """

    is_gaussian = True

    def __init__(
        self,
        *,
        initial_scale: float | Sequence[float],
        covariance: str,
        use_mean: bool,
        coupling: str,
        radius: str,
        mean_initializer: Any,
        mean_regularizer: Any,
        scale_regularizer: Any,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        scales = _checks.floats("initial_scale", initial_scale)
        if len(scales) not in (1, self.num_components) or min(scales) <= 0:
            raise ValueError(
                "`initial_scale` must be a positive number, or one for each "
                f"mixture component. Received: initial_scale={initial_scale}, "
                f"num_components={self.num_components}"
            )
        self.initial_scale = scales[0] if len(scales) == 1 else scales
        self.covariance = _checks.choice("covariance", covariance, COVARIANCES)
        self.use_mean = self.has_mean = _checks.boolean("use_mean", use_mean)
        self.coupling = _checks.choice(
            "coupling", coupling, base_noise.COUPLINGS
        )
        self.radius = _checks.choice("radius", radius, base_noise.RADII)
        self.mean_initializer = keras.initializers.get(mean_initializer)
        self.mean_regularizer = keras.regularizers.get(mean_regularizer)
        self.scale_regularizer = keras.regularizers.get(scale_regularizer)

    def build_parameters(self) -> None:
        components, dim = self.num_components, self.head_dim
        if self.use_mean:
            self._mean = self.add_parameter(
                "mean",
                (components, dim),
                self.mean_initializer,
                self.mean_regularizer,
                is_paced=True,
            )
        shape = (components, 1 if self.covariance == "isotropic" else dim)
        start = np.ravel(np.asarray(self.initial_scale, "float32"))
        start = start[:, None] * self.head_scales()[:, None, None]
        # Raw weights go through softplus, so that scales stay positive.
        raw = start + np.log(-np.expm1(-start))
        self._raw_scale = self.add_parameter(
            "scale",
            shape,
            lambda shape, dtype: np.broadcast_to(raw, shape).astype(dtype),
            self.scale_regularizer,
            is_paced=True,
        )
        if self.covariance == "full":
            self._raw_lower = self.add_parameter(
                "scale_lower",
                (components, dim, dim),
                "zeros",
                is_paced=True,
            )

    @property
    def mean(self) -> tf.Tensor:
        """Component means, `(heads, components, head_dim)`."""
        self.require_built()
        if not self.use_mean:
            return tf.zeros(
                (self.num_heads, self.num_components, self.head_dim)
            )
        return self.for_heads(self._mean)

    def assign_mean(self, mean: ArrayLike) -> None:
        """Sets the component means, for a prior with `use_mean`.

        Args:
            mean: `(heads, components, head_dim)`; one head's where heads share.
        """
        self.assign_value(self._mean, mean)

    @property
    def scale(self) -> tf.Tensor:
        """Standard deviations `(heads, components, head_dim)`, or Cholesky
        factors `(heads, components, head_dim, head_dim)` if `"full"`."""
        self.require_built()
        diagonal = tf.nn.softplus(self.for_heads(self._raw_scale))
        if self.covariance == "isotropic":
            return tf.repeat(diagonal, self.head_dim, axis=-1)
        if self.covariance == "diagonal":
            return diagonal
        lower = self.for_heads(self._raw_lower)
        lower = tf.linalg.band_part(lower, -1, 0)
        return tf.linalg.set_diag(lower, diagonal)

    @property
    def log_probabilities(self) -> tf.Tensor:
        """Log mixture weights, `(heads, components)`."""
        self.require_built()
        return tf.zeros((self.num_heads, 1))

    def draw(self, seed: tf.Tensor) -> tf.Tensor:
        components, dim = self.num_components, self.head_dim
        per_component = self.num_frequencies // components
        noise = base_noise.draw(
            (self.num_heads * components, per_component, dim),
            seed,
            coupling=self.coupling,
            radius=self.radius,
        )
        return tf.reshape(noise, (self.num_heads, self.num_frequencies, dim))

    def frequencies(self, noise: tf.Tensor) -> Frequencies:
        components, dim = self.num_components, self.head_dim
        per_component = self.num_frequencies // components
        scale = self.scale
        noise = tf.reshape(
            noise, (self.num_heads, components, per_component, dim)
        )
        if self.covariance == "full":
            offsets = tf.linalg.matmul(noise, scale, transpose_b=True)
            covariances = scale
        else:
            offsets = noise * scale[:, :, tf.newaxis, :]
            covariances = tf.square(scale)
        return Frequencies(
            tf.reshape(offsets, (self.num_heads, self.num_frequencies, dim)),
            self.mean if self.use_mean else None,
            self.log_probabilities - math.log(per_component),
            covariances,
        )

    def _components(self):
        from tensorflow_probability import distributions as tfd

        if self.covariance == "full":
            return tfd.MultivariateNormalTriL(self.mean, scale_tril=self.scale)
        return tfd.MultivariateNormalDiag(self.mean, scale_diag=self.scale)

    def kl_divergence(self) -> tf.Tensor:
        """KL(prior ‖ N(0, I)) of each head, `(heads,)`.

        For a mixture this is the upper bound Σ π_c KL(component c ‖ N(0, I)),
        which has a closed form and is exact for one component.
        """
        from tensorflow_probability import distributions as tfd

        reference = tfd.MultivariateNormalDiag(loc=tf.zeros(self.head_dim))
        each = tfd.kl_divergence(self._components(), reference)
        return tf.reduce_sum(tf.exp(self.log_probabilities) * each, axis=-1)

    def get_config(self):
        return {
            **super().get_config(),
            "initial_scale": self.initial_scale,
            "covariance": self.covariance,
            "use_mean": self.use_mean,
            "coupling": self.coupling,
            "radius": self.radius,
            "mean_initializer": keras.initializers.serialize(
                self.mean_initializer
            ),
            "mean_regularizer": keras.regularizers.serialize(
                self.mean_regularizer
            ),
            "scale_regularizer": keras.regularizers.serialize(
                self.scale_regularizer
            ),
        }


@keras.saving.register_keras_serializable(package="keras_kt")
class NormalPrior(GaussianPrior):
    """One Gaussian per head: ω ~ N(μ, Σ).

    With Σ = I it starts as the softmax kernel (positive features) or the
    Gaussian kernel (trigonometric features). One Gaussian adds little that the
    query and key projections could not express; it is the safe default, the
    cheapest, and the one that approximates softmax.

    Args:
        initial_scale: standard deviation at the start. Defaults to 1.
        covariance: `"diagonal"` (default), `"isotropic"` or `"full"`.
        use_mean: whether the mean is trained. It makes a trigonometric kernel
            oscillate, is a linear gate on keys for positive features with a
            tilted, Gaussian or isotropic prefactor, and cancels for the
            softmax prefactor, which refuses it. Defaults to `False`.
        coupling: `"orthogonal"` (default), `"iid"` or `"sobol"`; see
            `base_noise.draw`.
        radius: `"fixed"` (default) or `"chi"` for exactly unbiased estimates.
        mean_initializer: initializer of the mean.
        mean_regularizer: regularizer of the mean.
        scale_regularizer: regularizer of the raw scale (before softplus).
        **kwargs: as in `SpectralPrior`.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(
        ...     2, 8, spectral_prior=keras_kt.NormalPrior(covariance="full"))
        >>> x = np.random.normal(size=(1, 16, 32))
        >>> layer(x, x).shape
        TensorShape([1, 16, 32])
        >>> layer.spectral_prior.distribution().event_shape
        TensorShape([8])
    """

    def __init__(
        self,
        initial_scale: float | Sequence[float] = 1.0,
        covariance: str = "diagonal",
        *,
        use_mean: bool = False,
        coupling: str = "orthogonal",
        radius: str = "fixed",
        mean_initializer: Any = "zeros",
        mean_regularizer: Any = None,
        scale_regularizer: Any = None,
        **kwargs: Any,
    ):
        super().__init__(
            initial_scale=initial_scale,
            covariance=covariance,
            use_mean=use_mean,
            coupling=coupling,
            radius=radius,
            mean_initializer=mean_initializer,
            mean_regularizer=mean_regularizer,
            scale_regularizer=scale_regularizer,
            **kwargs,
        )

    def distribution(self) -> Any:
        components = self._components()
        return components[:, 0]


@keras.saving.register_keras_serializable(package="keras_kt")
class MixturePrior(GaussianPrior):
    """A Gaussian mixture per head: ω ~ Σ_c π_c N(μ_c, Σ_c).

    The kernel is the same mixture of the components' kernels: several length
    scales (and, with means, several frequencies) at once, which no choice of
    query and key projections imitates. Each component needs whole blocks of
    frequencies: two to four components are plenty.

    Args:
        num_components: number of Gaussians. Defaults to 2.
        initial_scale: standard deviations at the start, a number or one for
            each component. Defaults to `None`, which means a factor of two
            apart around 1 (0.71, 1.41 for two components).
        covariance: as in `NormalPrior`; as are use_mean, coupling, radius,
            mean_initializer, mean_regularizer and scale_regularizer.
        logits_regularizer: regularizer of the logits of π.
        **kwargs: as in `SpectralPrior`.

    Examples:
        >>> prior = keras_kt.MixturePrior(num_components=2)
        >>> layer = keras_kt.KernelizedAttention(2, 8, spectral_prior=prior)
        >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
        TensorShape([1, 4, 3])
    """

    def __init__(
        self,
        num_components: int = 2,
        initial_scale: float | Sequence[float] | None = None,
        covariance: str = "diagonal",
        *,
        use_mean: bool = False,
        coupling: str = "orthogonal",
        radius: str = "fixed",
        mean_initializer: Any = "zeros",
        mean_regularizer: Any = None,
        scale_regularizer: Any = None,
        logits_regularizer: Any = None,
        **kwargs: Any,
    ):
        count = _checks.integer("num_components", num_components)
        self._num_components = count
        if initial_scale is None:
            octaves = np.arange(count) - (count - 1) / 2
            initial_scale = [float(2.0**octave) for octave in octaves]
        super().__init__(
            initial_scale=initial_scale,
            covariance=covariance,
            use_mean=use_mean,
            coupling=coupling,
            radius=radius,
            mean_initializer=mean_initializer,
            mean_regularizer=mean_regularizer,
            scale_regularizer=scale_regularizer,
            **kwargs,
        )
        self.logits_regularizer = keras.regularizers.get(logits_regularizer)

    @property
    def num_components(self) -> int:
        return self._num_components

    def build_parameters(self) -> None:
        super().build_parameters()
        self._logits = self.add_parameter(
            "logits",
            (self.num_components,),
            "zeros",
            self.logits_regularizer,
            is_paced=True,
        )

    @property
    def log_probabilities(self) -> tf.Tensor:
        self.require_built()
        return tf.nn.log_softmax(self.for_heads(self._logits))

    def distribution(self) -> Any:
        from tensorflow_probability import distributions as tfd

        return tfd.MixtureSameFamily(
            tfd.Categorical(logits=self.log_probabilities), self._components()
        )

    def get_config(self):
        return {
            **super().get_config(),
            "num_components": self.num_components,
            "logits_regularizer": keras.regularizers.serialize(
                self.logits_regularizer
            ),
        }
