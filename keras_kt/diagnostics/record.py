"""What the layers of a model are called with on a batch of its inputs.

Functions of a model run it once with this, look at the queries, keys and values
of each `KernelizedAttention`, and leave the model as it was.
"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kt.conversion.find import kernelized_layers
from keras_kt.conversion.probe import kept_losses, replaced_attention
from keras_kt.layers.attention import KernelizedAttention


class Record(NamedTuple):
    """A layer's last call.

    Attributes:
        call: arguments by name, as in `conversion.probe.replaced_attention`.
        weights: attention weights, or `None` if not asked for.
        sums: `(…, heads, 1)`, their sums over keys, or `None` if not asked for
            or always one.
    """

    call: dict
    weights: np.ndarray | None
    sums: np.ndarray | None


def recorded(model, data, *, weights=False, sums=False):
    """`(path, layer, record)` of the layers that a forward pass calls."""
    layers = layers_of(model)
    sink = {}

    def compute(layer, attend, call):
        record = Record(call, None, None)
        if weights:
            asking = {**call, "return_attention_scores": True}
            record = record._replace(weights=attend(**asking)[1].numpy())
        if sums and is_signed(layer):
            ones = tf.ones_like(call["value"][..., :1])
            totals, _ = attend(**{**call, "value": ones})
            totals = tf.cast(totals, tf.float32).numpy()
            record = record._replace(sums=totals)
        sink[id(layer)] = record
        return attend(**call)

    with kept_losses(model), replaced_attention(layers.values(), compute):
        inputs = keras.tree.map_structure(tf.convert_to_tensor, data)
        model(inputs, training=False)
    return [
        (path, layer, sink[id(layer)])
        for path, layer in layers.items()
        if id(layer) in sink
    ]


def layers_of(model: keras.Model) -> dict:
    """The `KernelizedAttention` layers of a model by path, all built.

    Args:
        model: a model with such layers, at any depth.

    Returns:
        Dictionary from paths to layers.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> y = keras_kt.KernelizedAttention(2, 4, name="attention")(x, x)
        >>> list(keras_kt.diagnostics.layers_of(keras.Model(x, y)))
        ['attention']
    """
    found = kernelized_layers(model)
    for layer in found.values():
        check_layer(layer)
    return found


def check_layer(layer):
    """Raises a `ValueError` unless it is a built `KernelizedAttention`."""
    if not isinstance(layer, KernelizedAttention):
        raise ValueError(
            "`layer` must be a KernelizedAttention. Received: a "
            f"{type(layer).__name__}."
        )
    if not layer.built:
        raise ValueError(
            "`layer` must be built: its kernel is a weight. Received: "
            f"{layer.name!r}, which is not. Call it once."
        )


def scaled_tokens(layer, call):
    """Queries and keys of all examples together, without padding.

    Returns:
        Two of `(heads, tokens, key_dim)`, as the kernel takes them.
    """
    # Other axes than the attended one join the batch.
    query, key = (
        tf.reshape(call[name], (-1, *call[name].shape[-3:]))
        for name in ("query", "key")
    )
    masks = [
        None if mask is None else np.reshape(mask, (-1, x.shape[1]))
        for x, mask in (
            (query, call.get("query_mask")),
            (key, call.get("key_mask")),
        )
    ]
    found = []
    for x, mask in zip(layer.scaled(query, key, masks[1]), masks, strict=True):
        x = np.reshape(x, (-1, *x.shape[-2:]))
        if mask is not None:
            x = x[np.reshape(mask, -1).astype(bool)]
        found.append(np.swapaxes(x, 0, 1))
    return found


def is_signed(layer):
    """Whether features may be negative, so that rows need not sum to one."""
    return not layer.bound().positive
