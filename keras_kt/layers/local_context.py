"""A learned sum over the tokens around each, channel by channel."""

import keras
import tensorflow as tf

from keras_kt.ops import visible_tokens


class LocalContext(keras.layers.Layer):
    """x plus a learned sum over the tokens around it, channel by channel."""

    def __init__(self, size, is_causal, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.size = size
        # Tokens before and after.
        self.before = size - 1 if is_causal else (size - 1) // 2
        self.after = size - 1 - self.before

    def build(self, input_shape):
        bound = 1.0 / self.size
        self.kernel = self.add_weight(
            (self.size, input_shape[-1]),
            keras.initializers.RandomUniform(-bound, bound),
            name="kernel",
        )

    def call(self, x, mask=None):
        before = tf.zeros((tf.shape(x)[0], self.before, x.shape[-1]), x.dtype)
        return self._sum_around(x, before, mask)[0]

    def step(self, x, context, mask=None):
        x, tail = self._sum_around(x, tf.cast(context, x.dtype), mask)
        tail = tf.ensure_shape(tail, (None, self.before, x.shape[-1]))
        return x, tf.cast(tail, tf.float32)

    def _sum_around(self, x, before, mask):
        """Sums where masked tokens take no place, and the last ones seen."""
        order = None
        if mask is not None:
            mask = tf.broadcast_to(tf.cast(mask, "bool"), tf.shape(x)[:2])
            order = visible_tokens.visible_order(mask)
            x = tf.where(mask[..., tf.newaxis], x, tf.zeros((), x.dtype))
            x = order.move_together(x)
        line = tf.concat([before, x], axis=1)
        if order is None:
            tail = line[:, tf.shape(line)[1] - self.before :]
        else:
            tail = order.last(line, self.before)
        x = self._sum(x, tf.pad(line, [(0, 0), (0, self.after), (0, 0)]))
        if order is not None:
            x = order.move_back(x)
        return x, tail

    def _sum(self, x, padded):
        # A sum of slices: XLA's convolution of single channels is slow.
        length = x.shape[1] or tf.shape(x)[1]
        kernel = tf.cast(self.kernel, x.dtype)
        for i in range(self.size):
            x += padded[:, i : i + length] * kernel[i]
        return x
