"""Spectral priors: trainable distributions p(ω) of a kernel's frequencies.

By Bochner's theorem (and its Laplace twin for positive features) a distribution
of frequencies *is* a kernel, so learning the distribution learns the kernel
(sections 3.1-3.3 of "On Learning the Transformer Kernel", arXiv 2110.08323). A
prior owns the trainable weights and one stored draw of base noise, and maps the
noise to `Frequencies` by a differentiable function. `distribution()` shows the
same law as a `tensorflow_probability` object. This is the only module that
imports tensorflow-probability.
"""

import math
import random
import warnings
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow_probability.python.internal import samplers

from keras_kt import base_noise

tfd = tfp.distributions


class Frequencies(NamedTuple):
    """One draw ω_m = μ_c + offset_m of a prior, with the moments of its law.

    Frequencies lie in `components` contiguous groups of equal size.

    Attributes:
        offsets: `(heads, num_frequencies, head_dim)`, ω minus its component's
            mean.
        means: `(heads, components, head_dim)`, or `None` where all are zero.
        log_weights: `(heads, components)`, log of the probability that one
            frequency of the component stands for; they sum to one over all.
        covariances: `(heads, components, head_dim)` if diagonal, or Cholesky
            factors `(heads, components, head_dim, head_dim)`.
    """

    offsets: tf.Tensor
    means: tf.Tensor | None
    log_weights: tf.Tensor
    covariances: tf.Tensor

    @classmethod
    def of_samples(cls, omega: tf.Tensor) -> "Frequencies":
        """Equally likely frequencies, whose moments are those of the draw.

        Their centre is zero. For laws whose own moments are not known: the
        kernel is then that of the draw.

        Args:
            omega: `(heads, num_frequencies, head_dim)`.
        """
        return cls(
            omega,
            None,
            _equal_log_weights(omega),
            tf.reduce_mean(tf.square(omega), axis=1, keepdims=True),
        )


class SpectralPrior(keras.layers.Layer):
    """Base class of the spectral priors; the place to write your own.

    A prior given to a layer is a recipe: each layer builds its own copy, found
    as `layer.spectral_prior`, so one instance may be given to many layers. A
    subclass implements `build_parameters`, `draw` and `frequencies`, and
    `distribution` if its law has a name.

    Args:
        per_head: whether every head learns its own parameters. With `False`
            heads share them (as the paper's FastFood and Generator do) and
            still draw their own noise. Defaults to `True`.
        kl_weight: weight of KL(prior ‖ N(0, I)), averaged over heads and added
            to the model's losses. Defaults to 0.
        seed: integer seed of the stored draw. Defaults to `None`, which means
            the seed of the layer that owns the prior.
    """

    has_mean = False
    # E exp(ω·z) exists for every z, which positive features need.
    has_moment_generating_function = True
    # Gaussian, or a mixture of such: the kernel has a closed form.
    is_gaussian = False

    def __init__(self, *, per_head=True, kl_weight=0.0, seed=None, **kwargs):
        # Spectral parameters stay float32 under any policy: an error in ω·x is
        # a relative error of the kernel.
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        if not (isinstance(kl_weight, (int, float)) and kl_weight >= 0):
            raise ValueError(
                "`kl_weight` must be a number ≥ 0. "
                f"Received: kl_weight={kl_weight}"
            )
        self.per_head = per_head
        self.kl_weight = kl_weight
        self.seed = seed

    @property
    def num_components(self):
        return 1

    def block_size(self, head_dim: int) -> int:
        """Number of frequencies that make one whole block of the coupling."""
        return head_dim * self.num_components

    def validate(self, num_frequencies: int, num_features: int) -> None:
        """Raises a `ValueError` if the prior cannot fill the frequencies."""
        components = self.num_components
        if num_frequencies < components:
            raise ValueError(
                "`num_features` must be at least the number of mixture "
                "components (times two for two-sided and trigonometric "
                "features), so that each gets a frequency. Received: "
                f"num_features={num_features}, num_components={components}. "
                "Raise `num_features` or lower `num_components`."
            )
        if num_frequencies % components:
            raise ValueError(
                "`num_features` must give every mixture component the same "
                f"number of frequencies. Received: num_features={num_features},"
                f" which is {num_frequencies} frequencies for num_components="
                f"{components}. Choose a multiple of "
                f"{components * (num_features // num_frequencies)}."
            )

    def build(self, frequencies_shape):
        """Creates the weights and the stored draw.

        Args:
            frequencies_shape: `(heads, num_frequencies, head_dim)`.
        """
        self.num_heads, self.num_frequencies, self.head_dim = (
            int(size) for size in frequencies_shape
        )
        self._draw_seed = _new_seed() if self.seed is None else self.seed
        self.build_parameters()
        noise = self._initial_noise(self._draw_seed)
        self.base_noise = self.add_weight(
            name="base_noise",
            shape=noise.shape,
            dtype=keras.backend.standardize_dtype(noise.dtype),
            initializer=lambda shape, dtype: noise,
            trainable=False,
            autocast=False,
        )
        self.built = True

    def _initial_noise(self, seed: int) -> np.ndarray:
        with tf.init_scope():
            return self.draw(_seed_pair(seed)).numpy()

    def resample(self, seed=None) -> None:
        """Replaces the stored draw of base noise.

        Args:
            seed: integer. Defaults to `None`, which means a fresh seed from
                Keras's global generator.
        """
        self._require_built()
        self.base_noise.assign(
            self._initial_noise(_new_seed() if seed is None else seed)
        )

    def call(self, seed=None):
        """Returns `Frequencies` from the stored draw, or a fresh one.

        Args:
            seed: `(2,)` integer tensor for fresh noise, or `None` for the
                stored draw.
        """
        if self.kl_weight:
            self.add_loss(self.kl_weight * tf.reduce_mean(self.kl_divergence()))
        noise = self.base_noise if seed is None else self.draw(seed)
        return self.frequencies(tf.convert_to_tensor(noise))

    def copy(self, **changes) -> "SpectralPrior":
        """An unbuilt prior like this one, but for some arguments."""
        return type(self).from_config({**self.get_config(), **changes})

    def build_parameters(self) -> None:
        """Creates the trainable weights with `add_parameter`."""
        raise NotImplementedError

    def draw(self, seed: tf.Tensor) -> tf.Tensor:
        """Draws base noise from a `(2,)` integer seed."""
        raise NotImplementedError

    def frequencies(self, noise: tf.Tensor) -> Frequencies:
        """Maps base noise to frequencies, differentiably."""
        raise NotImplementedError

    def distribution(self) -> tfd.Distribution:
        """The prior as a live TFP distribution of the current weights.

        Batch shape `(heads,)`, event shape `(head_dim,)`.
        """
        raise NotImplementedError

    def kl_divergence(self) -> tf.Tensor:
        """KL(prior ‖ N(0, I)) of each head, `(heads,)`."""
        raise NotImplementedError

    def add_parameter(self, name, shape, initializer, regularizer=None):
        """`add_weight` with a leading axis of heads (1 if heads share)."""
        return self.add_weight(
            name=name,
            shape=(self.num_heads if self.per_head else 1, *shape),
            initializer=initializer,
            regularizer=regularizer,
            autocast=False,
        )

    def _for_heads(self, weight) -> tf.Tensor:
        weight = tf.convert_to_tensor(weight)
        if self.per_head:
            return weight
        return tf.repeat(weight, self.num_heads, axis=0)

    def _reference(self) -> tfd.Distribution:
        return tfd.MultivariateNormalDiag(
            loc=tf.zeros((self.num_heads, self.head_dim))
        )

    def _require_built(self):
        if not self.built:
            raise ValueError(
                f"This {type(self).__name__} has no weights yet. A prior given "
                "to a layer is a recipe; the built one is "
                "`layer.spectral_prior`, after the layer is called or built."
            )

    def get_config(self):
        config = super().get_config()
        config.pop("dtype", None)
        return {
            **config,
            "per_head": self.per_head,
            "kl_weight": self.kl_weight,
            "seed": self.seed,
        }


class _GaussianPrior(SpectralPrior):
    """What one Gaussian per head and a mixture of them have in common.

    Components are stratified: each owns a fixed share of whole blocks of
    frequencies and its probability is a weight, so the kernel and the gradient
    to the probabilities are exact (no discrete sampling).
    """

    is_gaussian = True

    def __init__(
        self,
        initial_scale,
        covariance,
        use_mean,
        coupling,
        radius,
        mean_initializer,
        mean_regularizer,
        scale_regularizer,
        kwargs,
    ):
        super().__init__(**kwargs)
        check_choice("covariance", covariance, _COVARIANCES)
        check_choice("coupling", coupling, base_noise.COUPLINGS)
        check_choice("radius", radius, base_noise.RADII)
        scales = np.ravel(np.asarray(initial_scale, "float32"))
        if scales.size not in (1, self.num_components) or scales.min() <= 0:
            raise ValueError(
                "`initial_scale` must be a positive number, or one for each "
                f"mixture component. Received: initial_scale={initial_scale}, "
                f"num_components={self.num_components}"
            )
        self.initial_scale = initial_scale
        self.covariance = covariance
        self.use_mean = use_mean
        self.has_mean = use_mean
        self.coupling = coupling
        self.radius = radius
        self.mean_initializer = keras.initializers.get(mean_initializer)
        self.mean_regularizer = keras.regularizers.get(mean_regularizer)
        self.scale_regularizer = keras.regularizers.get(scale_regularizer)

    def build_parameters(self):
        components, dim = self.num_components, self.head_dim
        if self.use_mean:
            self._mean = self.add_parameter(
                "mean",
                (components, dim),
                self.mean_initializer,
                self.mean_regularizer,
            )
        shape = (components, 1 if self.covariance == "isotropic" else dim)
        start = np.ravel(np.asarray(self.initial_scale, "float32"))
        start = np.broadcast_to(start[:, None], shape)
        # Raw weights go through softplus, so that scales stay positive.
        raw = start + np.log(-np.expm1(-start))
        self._raw_scale = self.add_parameter(
            "scale",
            shape,
            lambda shape, dtype: np.broadcast_to(raw, shape).astype(dtype),
            self.scale_regularizer,
        )
        if self.covariance == "full":
            self._raw_lower = self.add_parameter(
                "scale_lower", (components, dim, dim), "zeros"
            )

    @property
    def mean(self) -> tf.Tensor:
        """Component means, `(heads, components, head_dim)`."""
        self._require_built()
        if not self.use_mean:
            return tf.zeros(
                (self.num_heads, self.num_components, self.head_dim)
            )
        return self._for_heads(self._mean)

    @property
    def scale(self) -> tf.Tensor:
        """Standard deviations `(heads, components, head_dim)`, or Cholesky
        factors `(heads, components, head_dim, head_dim)` if `"full"`."""
        self._require_built()
        diagonal = tf.nn.softplus(self._for_heads(self._raw_scale))
        if self.covariance == "isotropic":
            return tf.repeat(diagonal, self.head_dim, axis=-1)
        if self.covariance == "diagonal":
            return diagonal
        lower = self._for_heads(self._raw_lower)
        lower = tf.linalg.band_part(lower, -1, 0)
        return tf.linalg.set_diag(lower, diagonal)

    @property
    def log_probabilities(self) -> tf.Tensor:
        """Log mixture weights, `(heads, components)`."""
        self._require_built()
        return tf.zeros((self.num_heads, 1))

    def draw(self, seed):
        components, dim = self.num_components, self.head_dim
        per_component = self.num_frequencies // components
        noise = base_noise.draw(
            (self.num_heads * components, per_component, dim),
            seed,
            coupling=self.coupling,
            radius=self.radius,
        )
        return tf.reshape(noise, (self.num_heads, self.num_frequencies, dim))

    def frequencies(self, noise):
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
        if self.covariance == "full":
            return tfd.MultivariateNormalTriL(self.mean, scale_tril=self.scale)
        return tfd.MultivariateNormalDiag(self.mean, scale_diag=self.scale)

    def kl_divergence(self):
        """KL(prior ‖ N(0, I)) of each head, `(heads,)`.

        For a mixture this is the upper bound Σ π_c KL(component c ‖ N(0, I)),
        which has a closed form and is exact for one component.
        """
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
class NormalPrior(_GaussianPrior):
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
        **kwargs: `per_head`, `kl_weight`, `seed`, `name`.

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
        initial_scale=1.0,
        covariance="diagonal",
        *,
        use_mean=False,
        coupling="orthogonal",
        radius="fixed",
        mean_initializer="zeros",
        mean_regularizer=None,
        scale_regularizer=None,
        **kwargs,
    ):
        super().__init__(
            initial_scale,
            covariance,
            use_mean,
            coupling,
            radius,
            mean_initializer,
            mean_regularizer,
            scale_regularizer,
            kwargs,
        )

    def distribution(self):
        components = self._components()
        return components[:, 0]


@keras.saving.register_keras_serializable(package="keras_kt")
class MixturePrior(_GaussianPrior):
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
        **kwargs: `per_head`, `kl_weight`, `seed`, `name`.

    Examples:

    >>> prior = keras_kt.MixturePrior(num_components=2)
    >>> layer = keras_kt.KernelizedAttention(2, 8, spectral_prior=prior)
    >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
    TensorShape([1, 4, 3])
    """

    def __init__(
        self,
        num_components=2,
        initial_scale=None,
        covariance="diagonal",
        *,
        use_mean=False,
        coupling="orthogonal",
        radius="fixed",
        mean_initializer="zeros",
        mean_regularizer=None,
        scale_regularizer=None,
        logits_regularizer=None,
        **kwargs,
    ):
        if not isinstance(num_components, int) or num_components < 1:
            raise ValueError(
                "`num_components` must be a positive integer. "
                f"Received: num_components={num_components}"
            )
        self._num_components = num_components
        if initial_scale is None:
            octaves = np.arange(num_components) - (num_components - 1) / 2
            initial_scale = [float(2.0**octave) for octave in octaves]
        super().__init__(
            initial_scale,
            covariance,
            use_mean,
            coupling,
            radius,
            mean_initializer,
            mean_regularizer,
            scale_regularizer,
            kwargs,
        )
        self.logits_regularizer = keras.regularizers.get(logits_regularizer)

    @property
    def num_components(self):
        return self._num_components

    def build_parameters(self):
        super().build_parameters()
        self._logits = self.add_parameter(
            "logits", (self.num_components,), "zeros", self.logits_regularizer
        )

    @property
    def log_probabilities(self):
        self._require_built()
        return tf.nn.log_softmax(self._for_heads(self._logits))

    def distribution(self):
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


@keras.saving.register_keras_serializable(package="keras_kt")
class FastFoodPrior(SpectralPrior):
    """Learned FastFood frequencies: the rows of V = S H G Π H B / √d.

    H is the Hadamard matrix, Π a permutation (the stored draw), and the
    diagonals S, G, B are trained: three numbers per frequency. Rows start as
    exact N(0, I) vectors, S holding their norms. A device for few parameters,
    not for speed: V is formed once per call, at a cost that does not depend on
    the length. Frequencies beyond one block come from further blocks.

    `head_dim` is padded to the next power of two inside V, with a warning; the
    law of the rows does not change.

    Args:
        diagonal_regularizer: regularizer of the three diagonals.
        **kwargs: `per_head` (`False` is the paper's form), `seed`, `name`.

    References:
        Le, Sarlós, Smola, "Fastfood", ICML 2013; arXiv 2110.08323, section 3.2.

    Examples:

    >>> layer = keras_kt.KernelizedAttention(
    ...     2, 8, spectral_prior=keras_kt.FastFoodPrior())
    >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
    TensorShape([1, 4, 3])
    """

    def __init__(self, *, diagonal_regularizer=None, **kwargs):
        super().__init__(**kwargs)
        if self.kl_weight:
            raise ValueError(_no_density("kl_weight", "FastFoodPrior"))
        self.diagonal_regularizer = keras.regularizers.get(diagonal_regularizer)

    @staticmethod
    def padded_dim(head_dim: int) -> int:
        """The power of two that `head_dim` is padded to."""
        return 1 << (head_dim - 1).bit_length()

    def block_size(self, head_dim):
        return self.padded_dim(head_dim)

    def build_parameters(self):
        size = self.padded_dim(self.head_dim)
        if size != self.head_dim:
            warnings.warn(
                f"FastFoodPrior needs a power of two: head_dim={self.head_dim} "
                f"is padded to {size} inside the Hadamard transforms. The "
                "kernel is not affected; a `key_dim` that is a power of two "
                "gives whole blocks of frequencies.",
                stacklevel=2,
            )
        self._blocks = -(-self.num_frequencies // size)
        shape = (self._blocks, size)
        seed = self._draw_seed
        normal = keras.initializers.RandomNormal(stddev=1.0, seed=seed)
        signs = keras.initializers.RandomUniform(-1.0, 1.0, seed=seed + 1)
        row_norms = keras.initializers.RandomNormal(stddev=1.0, seed=seed + 2)

        def chi(shape, dtype):
            return tf.norm(row_norms((*shape, size), dtype), axis=-1)

        def plus_minus_one(shape, dtype):
            return tf.where(signs(shape, dtype) < 0.0, -1.0, 1.0)

        self._s = self.add_parameter("s", shape, chi, self.diagonal_regularizer)
        self._g = self.add_parameter(
            "g", shape, normal, self.diagonal_regularizer
        )
        self._b = self.add_parameter(
            "b", shape, plus_minus_one, self.diagonal_regularizer
        )

    def draw(self, seed):
        size = self.padded_dim(self.head_dim)
        # Heads that share the diagonals still have permutations of their own.
        keys = base_noise.uniform((self.num_heads, self._blocks, size), seed)
        return tf.argsort(keys, axis=-1)

    def frequencies(self, noise):
        size = self.padded_dim(self.head_dim)
        hadamard = tf.constant(_hadamard(size))
        s, g, b = (self._for_heads(w) for w in (self._s, self._g, self._b))
        # The permutation picks rows of H B; rows of H G Π H B all have norm
        # √size ‖G‖, so dividing by ‖G‖ leaves S as the row norms.
        rows = hadamard * b[:, :, tf.newaxis, :]
        rows = tf.gather(rows, noise, batch_dims=2)
        mixed = tf.linalg.matmul(hadamard, g[..., tf.newaxis] * rows)
        norms = tf.norm(g, axis=-1, keepdims=True) * math.sqrt(size)
        matrix = mixed * (s / norms)[..., tf.newaxis]
        matrix = tf.reshape(matrix, (self.num_heads, self._blocks * size, size))
        return Frequencies.of_samples(
            matrix[:, : self.num_frequencies, : self.head_dim]
        )

    def distribution(self):
        """The uniform distribution over the frequencies themselves."""
        self._require_built()
        return _empirical(self.frequencies(self.base_noise).offsets)

    def get_config(self):
        return {
            **super().get_config(),
            "diagonal_regularizer": keras.regularizers.serialize(
                self.diagonal_regularizer
            ),
        }


@keras.saving.register_keras_serializable(package="keras_kt")
class GeneratorPrior(SpectralPrior):
    """Frequencies from a learned generator network: ω = g(ε), ε ~ N(0, I).

    g is a stack of dense layers with a leaky ReLU, each followed by a root mean
    square normalisation of the one sample (never over samples, so that
    frequencies stay independent and inference needs no running statistics),
    then a · tanh(·) with a learned scale a per coordinate. Its start has unit
    variance per coordinate, as N(0, I) has. Two-sided features estimate the
    kernel of the symmetrised law, (g(ε), −g(ε)).

    Args:
        hidden_units: widths of the hidden layers. Defaults to `None`, which
            means one layer of 4 · head_dim.
        noise_dim: size of ε. Defaults to `None`, which means head_dim.
        coupling: coupling of ε: `"iid"` (default), `"orthogonal"`, `"sobol"`.
        kernel_initializer: initializer of the dense kernels.
        kernel_regularizer: regularizer of the dense kernels.
        **kwargs: `per_head` (`False` is the paper's form), `seed`, `name`.

    References:
        arXiv 2110.08323, section 3.3; Li et al., "Implicit kernel learning".

    Examples:

    >>> prior = keras_kt.GeneratorPrior(hidden_units=(32,))
    >>> layer = keras_kt.KernelizedAttention(2, 8, spectral_prior=prior)
    >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
    TensorShape([1, 4, 3])
    """

    def __init__(
        self,
        hidden_units=None,
        *,
        noise_dim=None,
        coupling="iid",
        kernel_initializer="glorot_uniform",
        kernel_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if self.kl_weight:
            raise ValueError(_no_density("kl_weight", "GeneratorPrior"))
        check_choice("coupling", coupling, base_noise.COUPLINGS)
        for size in hidden_units or ():
            if not isinstance(size, int) or size < 1:
                raise ValueError(
                    "`hidden_units` must hold positive integers. "
                    f"Received: hidden_units={hidden_units}"
                )
        self.hidden_units = None if hidden_units is None else list(hidden_units)
        self.noise_dim = noise_dim
        self.coupling = coupling
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def build_parameters(self):
        hidden = self.hidden_units
        if hidden is None:
            hidden = [4 * self.head_dim]
        sizes = [self.noise_dim or self.head_dim, *hidden, self.head_dim]
        self._kernels, self._biases = [], []
        for index, (inputs, outputs) in enumerate(
            zip(sizes[:-1], sizes[1:], strict=True)
        ):
            self._kernels.append(
                self.add_parameter(
                    f"kernel_{index}",
                    (inputs, outputs),
                    _each_head(self.kernel_initializer),
                    self.kernel_regularizer,
                )
            )
            self._biases.append(
                self.add_parameter(f"bias_{index}", (outputs,), "zeros")
            )
        # E tanh(n)² = 0.394 for a standard normal n.
        self._scale = self.add_parameter(
            "scale",
            (self.head_dim,),
            keras.initializers.Constant(0.39429**-0.5),
        )

    def draw(self, seed):
        shape = (
            self.num_heads,
            self.num_frequencies,
            self.noise_dim or self.head_dim,
        )
        return base_noise.draw(shape, seed, coupling=self.coupling)

    def generate(self, noise: tf.Tensor) -> tf.Tensor:
        """g(ε): `(heads, rows, noise_dim)` to `(heads, rows, head_dim)`."""
        self._require_built()
        hidden = noise
        last = len(self._kernels) - 1
        for index in range(last + 1):
            kernel = self._for_heads(self._kernels[index])
            bias = self._for_heads(self._biases[index])
            hidden = tf.linalg.matmul(hidden, kernel) + bias[:, tf.newaxis]
            if index < last:
                hidden = tf.nn.leaky_relu(hidden, 0.01)
            power = tf.reduce_mean(tf.square(hidden), axis=-1, keepdims=True)
            hidden *= tf.math.rsqrt(power + 1e-6)
        return self._for_heads(self._scale)[:, tf.newaxis] * tf.tanh(hidden)

    def frequencies(self, noise):
        return Frequencies.of_samples(self.generate(noise))

    def distribution(self):
        """A distribution that samples; its density has no closed form."""
        self._require_built()
        return _GeneratorDistribution(self)

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_units": self.hidden_units,
            "noise_dim": self.noise_dim,
            "coupling": self.coupling,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "kernel_regularizer": keras.regularizers.serialize(
                self.kernel_regularizer
            ),
        }


@keras.saving.register_keras_serializable(package="keras_kt")
class DistributionPrior(SpectralPrior):
    """Any fully reparameterised TFP distribution that you write.

    Args:
        distribution_fn: a function from a dict of tensors to a
            `tfd.Distribution` with batch shape `(heads,)` and event shape
            `(head_dim,)`. Register it with
            `keras.saving.register_keras_serializable` to save the model.
        parameters: dict from a parameter's name to its initializer, or to
            `(shape, initializer)`. The shape may hold the word `"head_dim"` and
            defaults to `("head_dim",)`; a leading axis of heads is added.
        has_moment_generating_function: whether E exp(ω·z) is finite for all z,
            which positive features need. Defaults to `None`: known for TFP's
            normal, truncated, bounded and mixture families; for any other
            family positive features ask you to say so.
        parameter_regularizer: regularizer of every parameter.
        **kwargs: `per_head`, `kl_weight` (closed form where TFP registers one,
            else estimated from the draw), `seed`, `name`.

    Two-sided features reflect frequencies about the mean, so for a skewed law
    they estimate the kernel of the symmetrised one.

    The stored draw is a seed. Sampling under XLA and without gives the same
    numbers for families built on normal and uniform draws; TFP samples gamma
    draws (Student-t among others) by another algorithm under XLA.

    Examples:

    >>> @keras.saving.register_keras_serializable("my_project")
    ... def laplace(parameters):
    ...     scale = tf.nn.softplus(parameters["scale"])
    ...     return tfd.Independent(tfd.Laplace(parameters["loc"], scale), 1)
    >>> prior = keras_kt.DistributionPrior(
    ...     laplace, {"loc": "zeros", "scale": "ones"})
    >>> layer = keras_kt.KernelizedAttention(
    ...     2, 4, spectral_prior=prior, feature_map="trigonometric")
    >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
    TensorShape([1, 4, 3])
    """

    def __init__(
        self,
        distribution_fn,
        parameters,
        *,
        has_moment_generating_function=None,
        parameter_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not callable(distribution_fn):
            raise ValueError(
                "`distribution_fn` must be a function from a dict of tensors "
                "to a tfd.Distribution. Received: "
                f"distribution_fn={distribution_fn}"
            )
        self.distribution_fn = distribution_fn
        self.parameters = {}
        for name, value in parameters.items():
            shape, initializer = ("head_dim",), value
            if isinstance(value, (tuple, list)):
                shape, initializer = value
            self.parameters[name] = (
                tuple(shape),
                keras.initializers.get(initializer),
            )
        self._declared_mgf = has_moment_generating_function
        self.parameter_regularizer = keras.regularizers.get(
            parameter_regularizer
        )

    def copy(self, **changes):
        # The function itself, which need not be registered until it is saved.
        return super().copy(
            **{"distribution_fn": self.distribution_fn, **changes}
        )

    @property
    def has_moment_generating_function(self):
        if self._declared_mgf is not None:
            return self._declared_mgf
        if not self.built:
            return True  # judged again once built
        return _entire_mgf(self.distribution())

    def build_parameters(self):
        self._parameter_weights = {}
        for name, (shape, initializer) in self.parameters.items():
            sizes = [self.head_dim if s == "head_dim" else s for s in shape]
            self._parameter_weights[name] = self.add_parameter(
                name,
                sizes,
                _each_head(initializer),
                self.parameter_regularizer,
            )
        self._check_distribution(self.distribution())

    def _check_distribution(self, distribution):
        if not isinstance(distribution, tfd.Distribution):
            raise ValueError(
                "`distribution_fn` must return a tfd.Distribution. "
                f"Received: {distribution}"
            )
        if distribution.reparameterization_type != tfd.FULLY_REPARAMETERIZED:
            raise ValueError(
                "A spectral prior is trained through its samples, so its "
                "distribution must be fully reparameterised. Received: "
                f"{distribution.name}, which is "
                f"{distribution.reparameterization_type}. Use a "
                "reparameterised family, `MixturePrior` for a mixture, or "
                "`GeneratorPrior`."
            )
        batch = tuple(distribution.batch_shape)
        event = tuple(distribution.event_shape)
        if batch != (self.num_heads,) or event != (self.head_dim,):
            raise ValueError(
                "`distribution_fn` must return batch shape (heads,) and event "
                f"shape (head_dim,), here {(self.num_heads,)} and "
                f"{(self.head_dim,)}. Received: batch shape {batch}, event "
                f"shape {event}. `tfd.Independent(..., 1)` turns the last "
                "batch axis into the event."
            )

    def draw(self, seed):
        return tf.cast(tf.reshape(seed, (2,)), tf.int32)

    def frequencies(self, noise):
        distribution = self.distribution()
        with _portable_samplers():
            sample = distribution.sample(self.num_frequencies, seed=noise)
        shape = (self.num_heads, self.num_frequencies, self.head_dim)
        # TFP loses static shapes in graphs.
        omega = tf.ensure_shape(tf.transpose(sample, (1, 0, 2)), shape)
        moments = None
        if self.has_moment_generating_function:
            moments = _moments(distribution)
        if moments is None:
            return Frequencies.of_samples(omega)
        mean, covariance = moments
        return Frequencies(
            omega - mean[:, tf.newaxis],
            mean[:, tf.newaxis],
            _equal_log_weights(omega),
            covariance[:, tf.newaxis],
        )

    def distribution(self):
        if not hasattr(self, "_parameter_weights"):
            self._require_built()
        return self.distribution_fn(
            {
                name: self._for_heads(weight)
                for name, weight in self._parameter_weights.items()
            }
        )

    def kl_divergence(self):
        distribution, reference = self.distribution(), self._reference()
        try:
            return tfd.kl_divergence(distribution, reference)
        except NotImplementedError:
            with _portable_samplers():
                omega = distribution.sample(
                    self.num_frequencies,
                    seed=tf.convert_to_tensor(self.base_noise),
                )
            ratio = distribution.log_prob(omega) - reference.log_prob(omega)
            return tf.reduce_mean(ratio, axis=0)

    def get_config(self):
        return {
            **super().get_config(),
            "distribution_fn": keras.saving.serialize_keras_object(
                self.distribution_fn
            ),
            "parameters": {
                name: [list(shape), keras.initializers.serialize(initializer)]
                for name, (shape, initializer) in self.parameters.items()
            },
            "has_moment_generating_function": self._declared_mgf,
            "parameter_regularizer": keras.regularizers.serialize(
                self.parameter_regularizer
            ),
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        if isinstance(config["distribution_fn"], dict):
            config["distribution_fn"] = keras.saving.deserialize_keras_object(
                config["distribution_fn"]
            )
        return cls(**config)


class _GeneratorDistribution(tfd.Distribution):
    """The law of g(ε), for sampling."""

    def __init__(self, prior):
        self._prior = prior
        super().__init__(
            dtype=tf.float32,
            reparameterization_type=tfd.FULLY_REPARAMETERIZED,
            validate_args=False,
            allow_nan_stats=True,
            name="Generator",
        )

    def _batch_shape(self):
        return tf.TensorShape([self._prior.num_heads])

    def _event_shape(self):
        return tf.TensorShape([self._prior.head_dim])

    def _sample_n(self, n, seed=None):
        prior = self._prior
        size = prior.noise_dim or prior.head_dim
        noise = samplers.normal((prior.num_heads, n, size), seed=seed)
        return tf.transpose(prior.generate(noise), (1, 0, 2))

    def _log_prob(self, value):
        raise NotImplementedError(_no_density("log_prob", "GeneratorPrior"))


def get(identifier) -> SpectralPrior:
    """Resolves a name or an instance to a `SpectralPrior`."""
    if isinstance(identifier, SpectralPrior):
        return identifier
    if isinstance(identifier, dict):
        return get(keras.saving.deserialize_keras_object(identifier))
    if isinstance(identifier, str) and identifier in _FAMILIES:
        return _FAMILIES[identifier]()
    raise ValueError(
        f"`spectral_prior` must be one of {sorted(_FAMILIES)} or an instance "
        "of keras_kt.SpectralPrior (DistributionPrior takes a TFP "
        f"distribution). Received: spectral_prior={identifier}"
    )


_FAMILIES = {
    "normal": NormalPrior,
    "mixture": MixturePrior,
    "fastfood": FastFoodPrior,
    "generator": GeneratorPrior,
}
_COVARIANCES = ("diagonal", "isotropic", "full")


def check_choice(name, value, choices):
    """Raises a `ValueError` that lists the choices."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {name}={value!r}"
        )


def _no_density(what, name):
    return (
        f"{name} has no tractable density, so it has no `{what}`. Use "
        "NormalPrior, MixturePrior or DistributionPrior where a density is "
        "needed."
    )


def _new_seed() -> int:
    # Python's generator is the one that `keras.utils.set_random_seed` seeds.
    return random.randint(1, 10**9)


def _seed_pair(seed: int) -> tf.Tensor:
    # Two words, so that seeds that differ anywhere give unrelated draws.
    seed = int(seed)
    words = np.random.SeedSequence(seed & (2**64 - 1)).generate_state(2)
    return tf.constant(words.astype("int32", casting="unsafe"))


def _each_head(initializer):
    """Applies an initializer to each head's weight, as if it stood alone."""

    def initialize(shape, dtype):
        values = []
        for head in range(shape[0]):
            config = initializer.get_config()
            if isinstance(config.get("seed"), int):
                config["seed"] += head
            fresh = type(initializer).from_config(config)
            values.append(tf.convert_to_tensor(fresh(shape[1:], dtype)))
        return tf.stack(values)

    return initialize


def _equal_log_weights(omega):
    heads, count, _ = omega.shape
    return tf.fill((heads, 1), -math.log(count))


def _empirical(omega: tf.Tensor) -> tfd.Distribution:
    return tfd.Empirical(omega, event_ndims=1)


def _hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1), "float32")
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _moments(distribution):
    """Mean `(heads, dim)`, and variances or a Cholesky factor; or `None`."""
    try:
        mean = distribution.mean()
    except NotImplementedError:
        return None
    if isinstance(distribution, tfd.Independent | tfd.MultivariateNormalDiag):
        return mean, distribution.variance()
    try:
        return mean, tf.linalg.cholesky(distribution.covariance())
    except NotImplementedError:
        pass
    try:
        return mean, distribution.variance()
    except NotImplementedError:
        return None


def _entire_mgf(distribution) -> bool:
    """Whether E exp(ω·z) is known to be finite for every z."""
    if isinstance(distribution, tfd.Independent | tfd.Sample):
        return _entire_mgf(distribution.distribution)
    if isinstance(distribution, tfd.MixtureSameFamily):
        return _entire_mgf(distribution.components_distribution)
    return isinstance(
        distribution,
        (
            tfd.Normal,
            tfd.MultivariateNormalDiag,
            tfd.MultivariateNormalTriL,
            tfd.MultivariateNormalFullCovariance,
            tfd.MultivariateNormalLinearOperator,
            tfd.MultivariateNormalDiagPlusLowRank,
            tfd.TruncatedNormal,
            tfd.Uniform,
            tfd.Triangular,
            tfd.Beta,
            tfd.Kumaraswamy,
            tfd.Deterministic,
            tfd.VectorDeterministic,
            tfd.SphericalUniform,
            tfd.VonMisesFisher,
            tfd.PowerSpherical,
        ),
    )


@contextmanager
def _portable_samplers():
    """Makes TFP's normal and uniform draws equal with and without XLA."""

    def normal(
        shape, mean=0.0, stddev=1.0, dtype=tf.float32, seed=None, name=None
    ):
        seed = samplers.sanitize_seed(seed)
        numbers = base_noise.normal(shape, seed)
        return tf.cast(numbers, dtype) * stddev + mean

    def uniform(
        shape, minval=0, maxval=None, dtype=tf.float32, seed=None, name=None
    ):
        if tf.as_dtype(dtype).is_integer:
            return plain_uniform(shape, minval, maxval, dtype, seed, name)
        low = tf.cast(minval, dtype)
        high = tf.cast(1.0 if maxval is None else maxval, dtype)
        seed = samplers.sanitize_seed(seed)
        numbers = base_noise.uniform(shape, seed)
        return low + (high - low) * tf.cast(numbers, dtype)

    plain_uniform = samplers.uniform
    with (
        mock.patch.object(samplers, "normal", normal),
        mock.patch.object(samplers, "uniform", uniform),
    ):
        yield
