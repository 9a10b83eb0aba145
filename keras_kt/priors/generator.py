"""Frequencies from a learned generator network."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kt import _checks
from keras_kt.priors import base_noise
from keras_kt.priors.base import (
    Frequencies,
    SpectralPrior,
    each_head,
    no_density,
)

ACTIVATIONS = {
    "leaky_relu": lambda x: tf.nn.leaky_relu(x, 0.01),
    "tanh": tf.tanh,
}


@keras.saving.register_keras_serializable(package="keras_kt")
class GeneratorPrior(SpectralPrior):
    """Frequencies from a learned generator network: ω = g(ε), ε ~ N(0, I).

    g is a stack of dense layers, each followed by a root mean square
    normalization of the one sample (never over samples, so that frequencies
    stay independent and inference needs no running statistics), then a ·
    tanh(·) with a learned scale a per coordinate. At the start coordinates have
    unit second moments, as those of N(0, I). Two-sided features estimate the
    kernel of the symmetrised law, (g(ε), −g(ε)).

    Args:
        hidden_units: widths of the hidden layers. Defaults to `None`, which
            means one layer of 4 · head_dim.
        activation: of the hidden layers. `"tanh"` (default) is odd, so that the
            law starts with a mean of zero. `"leaky_relu"` does not: of no
            matter to two-sided features, but a kernel of trigonometric ones
            oscillates then and trains badly.
        noise_dim: size of ε. Defaults to `None`, which means head_dim.
        coupling: coupling of ε: `"iid"` (default), `"orthogonal"`, `"sobol"`.
        kernel_initializer: initializer of the dense kernels.
        kernel_regularizer: regularizer of the dense kernels.
        **kwargs: as in `SpectralPrior`; `per_head=False` is the paper's form.

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
        hidden_units: Sequence[int] | None = None,
        *,
        activation: Any = "tanh",
        noise_dim: int | None = None,
        coupling: str = "iid",
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if self.kl_weight:
            raise ValueError(no_density("kl_weight", "GeneratorPrior"))
        if hidden_units is not None:
            hidden_units = _checks.integers("hidden_units", hidden_units)
        self.hidden_units = hidden_units
        self.activation = _checks.choice(
            "activation", activation, tuple(ACTIVATIONS)
        )
        self.noise_dim = _checks.integer("noise_dim", noise_dim, optional=True)
        self.coupling = _checks.choice(
            "coupling", coupling, base_noise.COUPLINGS
        )
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def build_parameters(self) -> None:
        # The network's weights are many and small, as a projection's are, and
        # learn at the pace of those; the scale learns at the kernel's.
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
                    f"weight_{index}",
                    (inputs, outputs),
                    each_head(self.kernel_initializer),
                    self.kernel_regularizer,
                )
            )
            self._biases.append(
                self.add_parameter(f"bias_{index}", (outputs,), "zeros")
            )
        # E tanh(n)² = 0.394 for a standard normal n.
        start = 0.39429**-0.5 * self.head_scales()[:, None]
        self._scale = self.add_parameter(
            "scale",
            (self.head_dim,),
            lambda shape, dtype: np.broadcast_to(start, shape).astype(dtype),
            is_paced=True,
        )

    def draw(self, seed: tf.Tensor) -> tf.Tensor:
        shape = (
            self.num_heads,
            self.num_frequencies,
            self.noise_dim or self.head_dim,
        )
        return base_noise.draw(shape, seed, coupling=self.coupling)

    def generate(self, noise: tf.Tensor) -> tf.Tensor:
        """g(ε): `(heads, rows, noise_dim)` to `(heads, rows, head_dim)`."""
        self.require_built()
        hidden = noise
        last = len(self._kernels) - 1
        for index in range(last + 1):
            kernel = self.for_heads(self._kernels[index])
            bias = self.for_heads(self._biases[index])
            hidden = tf.linalg.matmul(hidden, kernel) + bias[:, tf.newaxis]
            if index < last:
                hidden = ACTIVATIONS[self.activation](hidden)
            power = tf.reduce_mean(tf.square(hidden), axis=-1, keepdims=True)
            hidden *= tf.math.rsqrt(power + 1e-6)
        return self.for_heads(self._scale)[:, tf.newaxis] * tf.tanh(hidden)

    def frequencies(self, noise: tf.Tensor) -> Frequencies:
        return Frequencies.of_samples(self.generate(noise))

    def distribution(self) -> Any:
        """A distribution that samples; its density has no closed form."""
        self.require_built()
        from keras_kt.priors.generator_law import GeneratorLaw

        return GeneratorLaw(self)

    @classmethod
    def from_config(cls, config):
        # Of version 0.1, which had no other.
        return cls(**{"activation": "leaky_relu", **config})

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_units": self.hidden_units,
            "activation": self.activation,
            "noise_dim": self.noise_dim,
            "coupling": self.coupling,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "kernel_regularizer": keras.regularizers.serialize(
                self.kernel_regularizer
            ),
        }
