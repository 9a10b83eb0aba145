"""FastFood: frequencies from learned diagonals and Hadamard transforms."""

import math
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kt.priors import base_noise
from keras_kt.priors.base import Frequencies, SpectralPrior, no_density


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
        **kwargs: as in `SpectralPrior`; `per_head=False` is the paper's form.

    References:
        Le, Sarlós, Smola, "Fastfood", ICML 2013; arXiv 2110.08323, section 3.2.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(
        ...     2, 8, spectral_prior=keras_kt.FastFoodPrior())
        >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
        TensorShape([1, 4, 3])
    """

    has_known_law = True

    def __init__(self, *, diagonal_regularizer: Any = None, **kwargs: Any):
        super().__init__(**kwargs)
        if self.kl_weight:
            raise ValueError(no_density("kl_weight", "FastFoodPrior"))
        self.diagonal_regularizer = keras.regularizers.get(diagonal_regularizer)

    @staticmethod
    def padded_dim(head_dim: int) -> int:
        """The power of two that `head_dim` is padded to."""
        return 1 << (head_dim - 1).bit_length()

    def block_size(self, head_dim: int) -> int:
        return self.padded_dim(head_dim)

    def build_parameters(self) -> None:
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
            norms = tf.norm(row_norms((*shape, size), dtype), axis=-1)
            return norms * self.head_scales()[:, None, None]

        def plus_minus_one(shape, dtype):
            return tf.where(signs(shape, dtype) < 0.0, -1.0, 1.0)

        self._s, self._g, self._b = (
            self.add_parameter(
                name, shape, start, self.diagonal_regularizer, is_paced=True
            )
            for name, start in (
                ("s", chi),
                ("g", normal),
                ("b", plus_minus_one),
            )
        )

    def draw(self, seed: tf.Tensor) -> tf.Tensor:
        size = self.padded_dim(self.head_dim)
        # Heads that share the diagonals still have permutations of their own.
        keys = base_noise.uniform((self.num_heads, self._blocks, size), seed)
        return tf.argsort(keys, axis=-1)

    def frequencies(self, noise: tf.Tensor) -> Frequencies:
        size = self.padded_dim(self.head_dim)
        hadamard = tf.constant(_hadamard(size))
        s, g, b = (self.for_heads(w) for w in (self._s, self._g, self._b))
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

    def distribution(self) -> Any:
        """The uniform distribution over the frequencies themselves."""
        self.require_built()
        from tensorflow_probability import distributions as tfd

        omega = self.frequencies(self.base_noise).offsets
        return tfd.Empirical(omega, event_ndims=1)

    def get_config(self):
        return {
            **super().get_config(),
            "diagonal_regularizer": keras.regularizers.serialize(
                self.diagonal_regularizer
            ),
        }


def _hadamard(size: int) -> np.ndarray:
    matrix: np.ndarray = np.ones((1, 1), "float32")
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
