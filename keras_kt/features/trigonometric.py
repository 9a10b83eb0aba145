"""Trigonometric random features (RKS): φ_ω(x) = (cos ω·x, sin ω·x)."""

import math
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kt import _checks
from keras_kt.features.base import FeatureMap, per_feature
from keras_kt.numerics import precise_product, sine_and_cosine
from keras_kt.priors import Frequencies

# Lost in the rounding of any smoothing that matters.
_LEAST_SMOOTHING = 1e-12


class TrigonometricMap(NamedTuple):
    """Signed features of x, with one constant feature for the smoothing.

    Attributes:
        projection: `(heads, head_dim, num_frequencies)`.
        amplitudes: `(heads, 1, num_frequencies)`.
        smoothing: `(heads, 1, 1)`, the constant that the kernel gains.
        key_projection: like `projection`, where that of keys is another.
    """

    projection: tf.Tensor
    amplitudes: tf.Tensor
    smoothing: tf.Tensor
    key_projection: tf.Tensor | None = None

    @property
    def positive(self) -> bool:
        return False

    @property
    def width(self) -> int:
        """Size of the feature axis."""
        return 2 * self.projection.shape[-1] + 1

    def queries(self, x: tf.Tensor) -> tf.Tensor:
        """Features of queries."""
        return self._features(x, self.projection)

    def keys(self, x: tf.Tensor) -> tf.Tensor:
        """Features of keys."""
        if self.key_projection is not None:
            return self._features(x, self.key_projection)
        return self._features(x, self.projection)

    def _features(self, x, projection):
        angles = precise_product(x, projection)
        constant = tf.sqrt(self.smoothing) * tf.ones_like(angles[..., :1])
        sine, cosine = sine_and_cosine(angles)
        return tf.concat(
            [self.amplitudes * cosine, self.amplitudes * sine, constant],
            axis=-1,
        )


@keras.saving.register_keras_serializable(package="keras_kt")
class TrigonometricFeatures(FeatureMap):
    """Random kitchen sinks (RKS): φ_ω(x) = (cos ω·x, sin ω·x).

    k(x, y) = E cos(ω·(x − y)) + s: shift-invariant, defined for every prior,
    heavy tails included, and bounded. The estimate may be negative, so weights
    need not be a convex combination; the smoothing s (an atom of the prior at
    ω = 0) keeps the normalizer away from zero and is learned per head.

    Args:
        smoothing: s at the start. Defaults to 0.1.
        trainable: whether s is trained. Defaults to `True`.

    References:
        arXiv 2110.08323, equation 6; Rahimi and Recht, NeurIPS 2007.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(
        ...     2, 8, feature_map=keras_kt.TrigonometricFeatures(smoothing=0.5))
        >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
        TensorShape([1, 4, 3])
    """

    sides = 2
    is_shift_invariant = True
    needs_unit_norm = True

    def __init__(
        self, smoothing: float = 0.1, *, trainable: bool = True, **kwargs: Any
    ):
        super().__init__(trainable=trainable, **kwargs)
        self.smoothing = _checks.number("smoothing", smoothing, is_open=True)

    def initial_temperature(self, head_dim: int) -> float:
        # Cosines of random directions deviate by head_dim^(-1/2), so that
        # logits deviate by 8^(-1/2) at any width: 2 at 32, 0.7 at 4.
        return math.sqrt(head_dim / 8.0)

    def build(self, num_heads):
        raw = self.smoothing + math.log(-math.expm1(-self.smoothing))
        self._raw_smoothing = self.paced_weight(
            "spectral_smoothing",
            (int(num_heads), 1, 1),
            keras.initializers.Constant(raw),
        )
        self.built = True

    def feature_dim(self, num_features: int) -> int:
        # The constant feature of the smoothing.
        return num_features + 1

    @property
    def smoothing_weights(self) -> tf.Tensor:
        """s of each head, `(heads, 1, 1)`."""
        raw = self.value_of(self._raw_smoothing)
        # Never zero: the constant feature counts the keys.
        return tf.nn.softplus(raw) + _LEAST_SMOOTHING

    def bind(
        self,
        frequencies: Frequencies,
        scale: float = 1.0,
        *,
        is_absolute: bool = False,
    ) -> Any:
        # Features of queries are always absolute.
        projection = tf.linalg.matrix_transpose(frequencies.offsets)
        of_keys = frequencies.key_offsets
        if frequencies.means is not None:
            means = tf.linalg.matrix_transpose(frequencies.means)
            projection += per_feature(means, projection.shape[-1])
        amplitudes = tf.exp(0.5 * frequencies.log_weights)[:, tf.newaxis]
        if of_keys is not None:
            of_keys = scale * tf.linalg.matrix_transpose(of_keys)
        return TrigonometricMap(
            scale * projection,
            per_feature(amplitudes, projection.shape[-1]),
            self.smoothing_weights,
            of_keys,
        )

    def get_config(self):
        return {**super().get_config(), "smoothing": self.smoothing}
