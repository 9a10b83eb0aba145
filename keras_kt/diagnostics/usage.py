"""How many of its features a layer makes use of on a batch.

By the eigenvalues of the second moments of the keys' features: many features
that all say the same count as one. O(length · D²).
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kt.diagnostics.record import recorded, scaled_tokens


def effective_features(model: keras.Model, data: Any) -> dict:
    """How many features a batch's keys make use of, by layer and head.

    (Σλ)²/Σλ² of the eigenvalues λ of the second moments of the keys' features,
    each of length one: 1 if all keys look alike, at most D.

    Args:
        model: a model with `KernelizedAttention` layers.
        data: one batch of its inputs.

    Returns:
        Dictionary from paths to `(heads,)` arrays.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> attention = keras_kt.KernelizedAttention(2, 4, name="attention")
        >>> model = keras.Model(x, attention(x, x))
        >>> batch = np.random.normal(size=(1, 50, 8))
        >>> counts = keras_kt.diagnostics.effective_features(model, batch)
        >>> counts["attention"].shape
        (2,)
    """
    counts = {}
    for path, layer, record in recorded(model, data):
        features = _key_features(layer, record.call)
        moment = np.einsum("hnf,hng->hfg", features, features)
        trace = np.trace(moment, axis1=1, axis2=2)
        counts[path] = trace**2 / np.square(moment).sum(axis=(1, 2))
    return counts


def _key_features(layer, call):
    """Features of the keys, `(heads, tokens, D)`.

    Positive ones are scaled to length one, which attention does not notice.
    """
    _, key = scaled_tokens(layer, call)
    bound = layer.bound()
    phi = bound.keys(tf.constant(key[np.newaxis]))[0].numpy()
    phi = phi.astype("float64")
    if bound.positive:
        phi = np.exp(phi - phi.max(axis=-1, keepdims=True))
        phi /= np.linalg.norm(phi, axis=-1, keepdims=True)
    return phi
