"""Spectral priors: trainable distributions p(ω) of a kernel's frequencies.

By Bochner's theorem (and its Laplace twin for positive features) a distribution
of frequencies *is* a kernel, so learning the distribution learns the kernel
(sections 3.1-3.3 of "On Learning the Transformer Kernel", arXiv 2110.08323). A
prior owns the trainable weights and one stored draw of base noise, and maps the
noise to `Frequencies` by a differentiable function. `distribution()` shows the
same law as a `tensorflow_probability` object.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kt import _checks
from keras_kt._recipe import Recipe


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
            factors `(heads, components, head_dim, head_dim)`. One for all
            components will do.
        key_offsets: like `offsets`, where keys have frequencies of their own,
            whose covariances are then given; else `None`.

    Examples:
        >>> omega = tf.random.normal((4, 16, 8))
        >>> frequencies = keras_kt.Frequencies.of_samples(omega)
        >>> frequencies.offsets.shape, frequencies.log_weights.shape
        (TensorShape([4, 16, 8]), TensorShape([4, 1]))
    """

    offsets: tf.Tensor
    means: tf.Tensor | None
    log_weights: tf.Tensor
    covariances: tf.Tensor
    key_offsets: tf.Tensor | None = None

    @classmethod
    def of_samples(
        cls, omega: tf.Tensor, of_keys: tf.Tensor | None = None
    ) -> "Frequencies":
        """Equally likely frequencies, whose moments are those of the draw.

        Their center is zero. For laws whose own moments are not known: the
        kernel is then that of the draw.

        Args:
            omega: `(heads, num_frequencies, head_dim)`.
            of_keys: likewise, those of keys where they are others.
        """
        heads, count, _ = omega.shape
        second = tf.square(omega if of_keys is None else of_keys)
        return cls(
            omega,
            None,
            tf.fill((heads, 1), -math.log(count)),
            tf.reduce_mean(second, axis=1, keepdims=True),
            of_keys,
        )


class SpectralPrior(Recipe):
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
        scale_spread: ratio of the widest head's scale at the start to the
            narrowest's; those between lie evenly in the logarithm, around 1.
            Defaults to 1: all heads start alike.
        seed: integer seed of the stored draw. Defaults to `None`, which means
            the seed of the layer that owns the prior.
        **kwargs: `pace`, as in the layer's `spectral_pace`; `name`.

    Examples:
        >>> class Lengths(keras_kt.SpectralPrior):
        ...     def build_parameters(self):
        ...         self.length = self.add_parameter("length", (1,), "ones")
        ...     def draw(self, seed):
        ...         shape = self.num_heads, self.num_frequencies, self.head_dim
        ...         return tf.random.stateless_normal(shape, seed)
        ...     def frequencies(self, noise):
        ...         length = self.for_heads(self.length)[..., tf.newaxis]
        ...         return keras_kt.Frequencies.of_samples(length * noise)
        >>> layer = keras_kt.KernelizedAttention(2, 8, spectral_prior=Lengths())
        >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
        TensorShape([1, 4, 3])
    """

    inherited: tuple[str, ...] = (
        *Recipe.inherited,
        "per_head",
        "kl_weight",
        "scale_spread",
        "seed",
    )
    has_mean = False
    # Frequencies are a function of base noise, which can be drawn anew.
    has_draw = True
    # E exp(ω·z) exists for every z, which positive features need.
    has_moment_generating_function = True
    # Gaussian, or a mixture of such: the kernel has a closed form.
    is_gaussian = False
    # `distribution()` is the law of the frequencies itself, so that a closed
    # form of it is the kernel's.
    has_known_law = False

    def __init__(
        self,
        *,
        per_head: bool = True,
        kl_weight: float = 0.0,
        scale_spread: float = 1.0,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.per_head = _checks.boolean("per_head", per_head)
        self.kl_weight = _checks.number("kl_weight", kl_weight)
        self.scale_spread = _checks.number(
            "scale_spread", scale_spread, minimum=1.0
        )
        if self.scale_spread > 1.0 and not self.per_head:
            raise ValueError(
                "`scale_spread` gives every head a scale of its own, which "
                "heads that share their parameters cannot have. Received: "
                f"scale_spread={scale_spread}, per_head=False. Use "
                "per_head=True, or leave `scale_spread` out."
            )
        self.seed = _checks.integer("seed", seed, minimum=None, optional=True)

    @property
    def num_components(self) -> int:
        return 1

    def describe(self) -> str:
        """What errors call the prior."""
        return type(self).__name__

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
        self.built = True
        if not self.has_draw:
            return
        noise = self._initial_noise(self._draw_seed)
        self.base_noise = self.add_weight(
            name="spectral_noise",
            shape=noise.shape,
            dtype=keras.backend.standardize_dtype(noise.dtype),
            initializer=lambda shape, dtype: noise,
            trainable=False,
            autocast=False,
        )

    def _initial_noise(self, seed: int) -> np.ndarray:
        with tf.init_scope():
            return self.draw(_seed_pair(seed)).numpy()

    def resample(self, seed: Any = None) -> None:
        """Replaces the stored draw of base noise.

        Args:
            seed: integer. Defaults to `None`, which means a fresh seed from
                Keras's global generator.
        """
        self.require_built()
        if not self.has_draw:
            raise ValueError(
                f"{self.describe()} has no draw that could be replaced: its "
                "frequencies are weights. Set those, or use another prior."
            )
        self.base_noise.assign(
            self._initial_noise(_new_seed() if seed is None else seed)
        )

    def call(self, seed: tf.Tensor | None = None) -> tf.Tensor:
        """Returns `Frequencies` from the stored draw, or a fresh one.

        Args:
            seed: `(2,)` integer tensor for fresh noise, or `None` for the
                stored draw.
        """
        if self.kl_weight:
            self.add_loss(self.kl_weight * tf.reduce_mean(self.kl_divergence()))
        if seed is None or not self.has_draw:
            return self.stored_frequencies()
        return self.frequencies(self.draw(seed))

    def stored_frequencies(self) -> Frequencies:
        """`Frequencies` of the stored draw, without a call's loss."""
        self.require_built()
        noise = tf.convert_to_tensor(self.base_noise) if self.has_draw else None
        return self.frequencies(noise)

    def build_parameters(self) -> None:
        """Creates the trainable weights with `add_parameter`."""
        raise NotImplementedError

    def draw(self, seed: tf.Tensor) -> tf.Tensor:
        """Draws base noise from a `(2,)` integer seed."""
        raise NotImplementedError

    def frequencies(self, noise: tf.Tensor) -> Frequencies:
        """Maps base noise to frequencies, differentiably."""
        raise NotImplementedError

    def distribution(self) -> Any:
        """The prior as a live TFP distribution of the current weights.

        Batch shape `(heads,)`, event shape `(head_dim,)`.
        """
        raise NotImplementedError

    def kl_divergence(self) -> tf.Tensor:
        """KL(prior ‖ N(0, I)) of each head, `(heads,)`."""
        raise NotImplementedError

    def add_parameter(
        self,
        name: str,
        shape: Sequence[int],
        initializer: Any,
        regularizer: Any = None,
        *,
        is_paced: bool = False,
    ) -> keras.Variable:
        """A weight with a leading axis of heads (1 if heads share).

        Its name is `spectral_` and `name`, by which an optimizer can tell it
        from the projections' weights. With `is_paced` it learns `pace` times as
        fast: the variable is the parameter divided by that then, so read the
        parameter by `for_heads` and not from the variable.
        """
        return self.paced_weight(
            f"spectral_{name}",
            (self.num_heads if self.per_head else 1, *shape),
            initializer,
            regularizer,
            is_paced=is_paced,
        )

    def for_heads(self, weight: keras.Variable) -> tf.Tensor:
        """A parameter of every head, `(heads, …)`, shared or not."""
        value = self.value_of(weight)
        if self.per_head:
            return value
        return tf.repeat(value, self.num_heads, axis=0)

    def head_scales(self) -> np.ndarray:
        """The scale of each head at the start, `(heads,)`; 1 if they share."""
        if self.scale_spread == 1.0 or self.num_heads == 1:
            return np.ones(self.num_heads if self.per_head else 1, "float32")
        places = np.linspace(-0.5, 0.5, self.num_heads)
        return (self.scale_spread**places).astype("float32")

    def require_built(self) -> None:
        """Raises a `ValueError` that tells where the built prior is."""
        if not self.built:
            raise ValueError(
                f"This {type(self).__name__} has no weights yet. A prior given "
                "to a layer is a recipe; the built one is "
                "`layer.spectral_prior`, after the layer is called or built."
            )

    def get_config(self):
        return {
            **super().get_config(),
            "per_head": self.per_head,
            "kl_weight": self.kl_weight,
            "scale_spread": self.scale_spread,
            "seed": self.seed,
        }


def no_density(what: str, name: str) -> str:
    """The text of an error about a law without a density."""
    return (
        f"{name} has no tractable density, so it has no `{what}`. Use "
        "NormalPrior, MixturePrior or DistributionPrior where a density is "
        "needed."
    )


def each_head(initializer):
    """Applies an initializer to each head's weight, as if it stood alone."""

    def initialize(shape, dtype):
        values = []
        for head in range(shape[0]):
            fresh = initializer
            if isinstance(initializer, keras.initializers.Initializer):
                config = initializer.get_config()
                if isinstance(config.get("seed"), int):
                    config["seed"] += head
                fresh = type(initializer).from_config(config)
            values.append(tf.convert_to_tensor(fresh(shape[1:], dtype)))
        return tf.stack(values)

    return initialize


def _new_seed() -> int:
    # Python's generator is the one that `keras.utils.set_random_seed` seeds.
    return random.randint(1, 10**9)


def _seed_pair(seed: int) -> tf.Tensor:
    # Two words, so that seeds that differ anywhere give unrelated draws.
    seed = int(seed)
    words = np.random.SeedSequence(seed & (2**64 - 1)).generate_state(2)
    return tf.constant(words.astype("int32", casting="unsafe"))
