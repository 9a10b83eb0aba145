"""What the far field contributes: models whose layers lose it for a while.

A hybrid can bypass its linear part: its near field does the work, and nobody
notices. Quality without the far field tells. O(length²).
"""

import contextlib

import keras
import tensorflow as tf

from keras_kt.conversion.estimate import estimate
from keras_kt.conversion.find import kernelized_layers
from keras_kt.conversion.softmax import attending


@contextlib.contextmanager
def without_far_field(model: keras.Model) -> keras.Model:
    """Within it, layers attend to their near field alone.

    A diagnosis of what features contribute: keys beyond the near field weigh
    nothing, and layers without one give zeros. Score the model within it and
    outside of it, and report both.

    Args:
        model: a model with `KernelizedAttention` layers.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> y = keras.layers.MultiHeadAttention(2, 4)(x, x)
        >>> softmax = keras.Model(x, y)
        >>> linear, _ = keras_kt.convert_attention(softmax, near_field=3)
        >>> batch = np.random.normal(size=(1, 9, 8)).astype("float32")
        >>> with keras_kt.conversion.without_far_field(linear):
        ...     near = linear(batch)
        >>> near.shape
        TensorShape([1, 9, 8])
    """

    def attend(layer, query, key, value, visible):
        if not layer.near_field:
            return tf.zeros((*tf.shape(query)[:3], value.shape[3]))
        near = visible & _is_near(visible, layer.near_field)
        return estimate(layer, query, key, value, near)[0]

    with attending(list(kernelized_layers(model).values()), attend):
        yield


def _is_near(visible, window):
    """Pairs less than `window` visible tokens apart, as near fields count."""
    seen = tf.cast(tf.reduce_any(visible, axis=(1, 2)), tf.int32)
    count = tf.cumsum(seen, axis=-1)
    distance = tf.abs(count[:, :, tf.newaxis] - count[:, tf.newaxis])
    return (distance < window)[:, tf.newaxis]
