"""Learned temperature and decay of a layer's heads."""

import math

import keras
import numpy as np
import tensorflow as tf

from keras_kt._pace import PacedLayer


class UnitNorm(PacedLayer):
    """√τ x/|x| with a learned temperature τ per head."""

    def __init__(self, initial_temperature, pace, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.initial_temperature = initial_temperature
        self.pace = pace

    def build(self, num_heads):
        start = math.log(math.expm1(self.initial_temperature))
        self.raw_temperature = self.paced_weight(
            "spectral_temperature",
            (int(num_heads), 1),
            keras.initializers.Constant(start),
        )
        self.built = True

    @property
    def temperature(self):
        return tf.nn.softplus(self.value_of(self.raw_temperature))

    def call(self, x):
        """`(batch, length, heads, dim)`, or a multiple of as many heads."""
        scale, heads = tf.sqrt(self.temperature), x.shape[2]
        if heads > scale.shape[0]:
            scale = tf.repeat(scale, heads // scale.shape[0], axis=0)
        return tf.math.l2_normalize(x, axis=-1) * scale

    def keys_with_length(self, x):
        """√(τ/dim) x: keys whose length is their weight, by one on average."""
        return x * tf.sqrt(self.temperature / x.shape[-1])


class Decay(keras.layers.Layer):
    """λ = softplus(w·x + b) per head, with w = 0 if the decay is constant.

    A constant one belongs to `LinearAttention`, a gated one to the layer around
    it, which has the tokens that the gate reads.
    """

    def __init__(self, is_gated, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.is_gated = is_gated

    def build(self, shape):
        num_heads, features = shape
        # Heads forget at speeds of their own from the start.
        rates = 2.0 ** -np.linspace(5.0, 12.0, num_heads)
        self.raw_rate = self.add_weight(
            name="decay_rate",
            shape=(num_heads,),
            initializer=lambda shape, dtype: np.log(np.expm1(rates)),
            autocast=False,
        )
        if self.is_gated:
            self.gate = self.add_weight(
                name="decay_gate",
                shape=(features, num_heads),
                initializer="zeros",
                autocast=False,
            )
        self.built = True

    def fix(self, rates):
        """Sets a rate > 0 for each head, which is trained no more."""
        self.raw_rate.assign(np.log(np.expm1(np.asarray(rates, "float64"))))
        self.trainable = False

    def call(self, x):
        """`(batch, …, features)` to `(batch, …, heads, 1)`."""
        raw = tf.zeros_like(x[..., :1]) + self.raw_rate
        if self.is_gated:
            raw += tf.tensordot(x, tf.convert_to_tensor(self.gate), 1)
        return tf.nn.softplus(raw)[..., tf.newaxis]


def checked_rates(decay, key):
    """The rate of each token and head, float32, or what is wrong with it."""
    decay = tf.cast(decay, tf.float32)
    expected = (*key.shape[:3], 1)
    if not decay.shape.is_compatible_with(expected):
        raise ValueError(
            "`decay` must be (batch, key_length, num_key_value_heads, 1), "
            f"{expected} for this key. Received: {tuple(decay.shape)}"
        )
    return decay
