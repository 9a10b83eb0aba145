"""Attention matrices of a model's layers, and how far they are off.

What features imply on a batch, beside softmax for the same queries and keys and
beside the prior's own kernel. O(length²).
"""

from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kt import kernels
from keras_kt.conversion.softmax import (
    masked_softmax,
    nominal_logits,
    visible_pairs,
)
from keras_kt.diagnostics.record import recorded


class AttentionMap(NamedTuple):
    """What one layer attends to on a batch.

    Attributes:
        path: the layer, as in `ConversionReport`.
        weights: `(batch, heads, query_length, key_length)`, implied by the
            features; rows sum to one.
        softmax: softmax's weights for the same queries and keys, or `None` for
            a layer that normalizes them.
    """

    path: str
    weights: np.ndarray
    softmax: np.ndarray | None


def attention_maps(model: keras.Model, data: Any) -> list[AttentionMap]:
    """What each layer of a model attends to. O(length²).

    Args:
        model: a model with `KernelizedAttention` layers.
        data: one batch of its inputs.

    Returns:
        List of `AttentionMap`, in the order of the model's layers.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> model = keras.Model(x, keras_kt.KernelizedAttention(2, 4)(x, x))
        >>> x = np.ones((1, 5, 8))
        >>> maps = keras_kt.diagnostics.attention_maps(model, x)
        >>> maps[0].weights.shape
        (1, 2, 5, 5)
    """
    return [
        AttentionMap(path, record.weights, _softmax_map(layer, record.call))
        for path, layer, record in recorded(model, data, weights=True)
    ]


def kernel_errors(model: keras.Model, data: Any) -> dict:
    """How far features are from the kernel that they estimate. O(length²).

    It is the Monte Carlo error, apart from what was learned: against softmax
    see `attention_error`. More features make it smaller.

    Args:
        model: a model with `KernelizedAttention` layers.
        data: one batch of its inputs.

    Returns:
        Dictionary from paths to `(heads,)` arrays, relative Frobenius errors of
        the attention matrix; `None` for a prior without a closed form, and for
        a layer that forgets or has a near field.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> attention = keras_kt.KernelizedAttention(2, 4, name="attention")
        >>> model = keras.Model(x, attention(x, x))
        >>> batch = np.random.normal(size=(1, 9, 8))
        >>> errors = keras_kt.diagnostics.kernel_errors(model, batch)
        >>> errors["attention"].shape
        (2,)
    """
    errors: dict = {}
    for path, layer, record in recorded(model, data, weights=True):
        exact = _closed_form_map(layer, record.call)
        errors[path] = None
        if exact is not None:
            axes = (0, 2, 3)
            error = np.square(record.weights - exact).sum(axes)
            errors[path] = np.sqrt(error / np.square(exact).sum(axes))
    return errors


def _softmax_map(layer, call):
    if layer.temperature is not None or call["query"].shape.rank != 4:
        return None
    logits = nominal_logits(
        layer, call["query"], call["key"], call.get("key_mask")
    )
    return masked_softmax(logits, visible_pairs(layer, call)).numpy()


def _closed_form_map(layer, call):
    """Attention weights of the prior's own kernel, or `None`."""
    if layer.decay or layer.near_field or call["query"].shape.rank != 4:
        return None
    query, key = layer.scaled(call["query"], call["key"], call.get("key_mask"))
    visible = visible_pairs(layer, call).numpy()
    maps, bound = [], layer.bound()
    for q, k, seen in zip(query, key, visible, strict=True):
        q, k = (np.swapaxes(x, 0, 1) for x in (q, k))
        weights = 1.0
        if layer.weighs_keys:
            k, weights = (x.numpy() for x in bound.directions(k))
            weights = np.swapaxes(weights, 1, 2)
        try:
            kernel = kernels.closed_form(
                layer.spectral_prior, layer.feature_map, q, k
            )
        except ValueError:
            return None
        values = np.zeros((layer.num_heads, k.shape[1], 1))
        kernel *= weights
        maps.append(kernels.kernel_attention(kernel, values, seen)[1])
    return np.stack(maps)
