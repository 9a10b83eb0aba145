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
# Of a key of length zero, lest a sequence of such keys weigh nothing.
_LEAST_WEIGHT = 1e-4


class TrigonometricMap(NamedTuple):
    """Signed features of x, with one constant feature for the smoothing.

    Attributes:
        projection: `(heads, head_dim, num_frequencies)`.
        amplitudes: `(heads, 1, num_frequencies)`.
        smoothing: `(heads, 1, 1)`, the constant that the kernel gains.
        key_projection: like `projection`, where that of keys is another.
        temperature: `(heads, 1, 1)`, where keys weigh by their length; else
            `None`.
    """

    projection: tf.Tensor
    amplitudes: tf.Tensor
    smoothing: tf.Tensor
    key_projection: tf.Tensor | None = None
    temperature: tf.Tensor | None = None

    def weighing_keys(self, temperature: tf.Tensor) -> "TrigonometricMap":
        """The map that takes the length of a key for its weight.

        A key k weighs as √τ k/|k| does, (|k|²/τ)² times.

        Args:
            temperature: τ of each head, `(heads, 1)`.
        """
        return self._replace(temperature=temperature[..., tf.newaxis])

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
        projection = self.key_projection
        if projection is None:
            projection = self.projection
        if self.temperature is None:
            return self._features(x, projection)
        x, weights = self.directions(x)
        return self._features(x, projection) * weights

    def directions(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Keys of length √τ, and what they weigh by their own, `(…, 1)`."""
        square = tf.reduce_sum(tf.square(x), axis=-1, keepdims=True)
        square /= self.temperature
        # No square root of zero, whose gradient is infinite.
        scale = tf.math.rsqrt(tf.maximum(square, 1e-12))
        return x * scale, tf.square(square) + _LEAST_WEIGHT

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
    can_weigh_keys = True

    def __init__(
        self, smoothing: float = 0.1, *, trainable: bool = True, **kwargs: Any
    ):
        super().__init__(trainable=trainable, **kwargs)
        self.smoothing = _checks.number("smoothing", smoothing, is_open=True)

    def initial_temperature(
        self, head_dim: int, *, weighs_keys: bool = False
    ) -> float:
        # Cosines of random directions deviate by head_dim^(-1/2), so that
        # logits deviate by 8^(-1/2) at any width: 2 at 32, 0.7 at 4.
        start = math.sqrt(head_dim / 8.0)
        # Lengths tell keys apart already (better than 1 in a trial on images,
        # one seed).
        return 0.3 * start if weighs_keys else start

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
