"""Models whose layers attend by their kernel's closed form.

`kernels`, the float64 oracle, takes the place of features: what a model
computes, apart from how well features estimate it. O(length²).
"""

import contextlib
import functools

import keras
import numpy as np
import tensorflow as tf

from keras_kt import kernels
from keras_kt.conversion.find import kernelized_layers
from keras_kt.conversion.softmax import attending, fading, fixed_rates


@contextlib.contextmanager
def closed_form_attention(model: keras.Model) -> keras.Model:
    """Within it, layers attend by their kernel's closed form, in float64.

    A diagnosis of what is computed, apart from how well features estimate it:
    with `NormalPrior(radius="chi")` and the softmax prefactor a converted model
    gives the original's outputs. Fixed radii have a closed form of their own,
    which shows their bias. Slow; O(length²).

    Args:
        model: a model with `KernelizedAttention` layers.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> y = keras.layers.MultiHeadAttention(2, 4)(x, x)
        >>> softmax = keras.Model(x, y)
        >>> linear, _ = keras_kt.convert_attention(
        ...     softmax,
        ...     spectral_prior=keras_kt.NormalPrior(
        ...         use_mean=True, radius="chi"))
        >>> batch = np.random.normal(size=(1, 9, 8)).astype("float32")
        >>> with keras_kt.conversion.closed_form_attention(linear):
        ...     np.testing.assert_allclose(
        ...         linear(batch), softmax(batch), atol=1e-5)
    """

    def attend(layer, query, key, value, visible):
        query, key = layer.scaled(query, key)
        heads = tf.numpy_function(
            functools.partial(_oracle, layer),
            [query, key, value, visible, _fading(layer, visible)],
            tf.float32,
        )
        return tf.ensure_shape(heads, (*query.shape[:3], value.shape[3]))

    with attending(list(kernelized_layers(model).values()), attend):
        yield


def _fading(layer, visible):
    """What the distance adds to logits, `(heads or 1, t, s)`."""
    rates = fixed_rates(layer)
    return fading(tf.zeros((1,)) if rates is None else rates, visible)


def _oracle(layer, query, key, value, visible, log_fading):
    """Heads of scaled queries and keys, one example at a time."""
    outputs = []
    for q, k, v, seen in zip(query, key, value, visible, strict=True):
        q, k, v = (np.swapaxes(x, 0, 1) for x in (q, k, v))
        # Query heads that share a head of keys are rows beside each other.
        kernel = kernels.closed_form(
            layer.spectral_prior,
            layer.feature_map,
            q.reshape(len(k), -1, q.shape[-1]),
            k,
        )
        kernel = kernel.reshape(len(q), q.shape[1], -1) * np.exp(log_fading)
        v = np.repeat(v, len(q) // len(v), axis=0)
        output, _ = kernels.kernel_attention(kernel, v, seen)
        outputs.append(np.swapaxes(output, 0, 1))
    return np.stack(outputs).astype("float32")
