"""The softmax attention that a layer stands for, formed explicitly.

Logits of a converted layer's own queries and keys, or of its teacher's, and the
one place where masks of all kinds become one. O(length²).
"""

import contextlib

import tensorflow as tf

from keras_kt.conversion.probe import replaced_attention
from keras_kt.layers.attention import KernelizedAttention
from keras_kt.ops import visible_tokens


def visible_pairs(layer, call):
    """All masks of a call as one, for attention over one axis.

    Args:
        layer: the layer that is called, of `KernelizedAttention` or
            `MultiHeadAttention`, whose masks hold its window already.
        call: arguments by name, as in `probe.replaced_attention`.

    Returns:
        `(batch, 1 or heads, query_length, key_length)`, boolean.
    """
    query, key = call["query"], call["key"]
    batch, length = tf.shape(query)[0], tf.shape(query)[1]
    visible = tf.ones((batch, 1, length, tf.shape(key)[1]), "bool")
    if call.get("use_causal_mask"):
        visible = tf.linalg.band_part(visible, -1, 0)
    mask = call.get("attention_mask")
    if mask is not None:
        mask = tf.cast(tf.convert_to_tensor(mask), "bool")
        if mask.shape.rank == 3:
            mask = mask[:, tf.newaxis]
        visible = tf.logical_and(visible, mask)
    query_mask, key_mask = call.get("query_mask"), call.get("key_mask")
    window = getattr(layer, "sliding_window", None)
    if window is not None:
        lengths = length, tf.shape(key)[1]
        near = visible_tokens.within(lengths, key_mask, window)
        visible = tf.logical_and(visible, near)
    if query_mask is not None:
        visible = tf.logical_and(visible, query_mask[:, None, :, None])
    if key_mask is not None:
        visible = tf.logical_and(visible, key_mask[:, None, None, :])
    return visible


@contextlib.contextmanager
def attending(layers, attend):
    """Lets layers attend in another way, until the context ends.

    Args:
        layers: of `KernelizedAttention` or `MultiHeadAttention`, over one axis.
        attend: function of a layer, queries, keys, values (float32, projected)
            and the visible pairs; it returns heads.
    """

    def compute(layer, _, call):
        query = call["query"]
        # Keras's own layers forget nothing.
        if getattr(layer, "decay", None):
            raise ValueError(
                "A layer that forgets stands for no softmax attention. "
                f"Received: layer {layer.name!r} with decay={layer.decay!r}. "
                "Convert without it."
            )
        if getattr(layer, "rotary_max_wavelength", None):
            raise ValueError(
                "Heads that the layer turns by their places cannot be measured "
                "or calibrated apart from these. Received: layer "
                f"{layer.name!r} with rotary_max_wavelength="
                f"{layer.rotary_max_wavelength}."
            )
        if len(query.shape) != 4:
            raise ValueError(
                "Only attention over one axis can be measured or calibrated. "
                f"Received: layer {layer.name!r} with queries of shape "
                f"{tuple(query.shape)}"
            )
        q, k, v = (
            tf.cast(call[name], tf.float32)
            for name in ("query", "key", "value")
        )
        heads = attend(layer, q, k, v, visible_pairs(layer, call))
        return tf.cast(heads, query.dtype), None

    with replaced_attention(layers, compute):
        yield


def masked_softmax(logits, visible):
    """Softmax over the keys that a query sees; zero in rows that see none."""
    logits = tf.where(visible, logits, logits.dtype.min)
    return tf.where(visible, tf.nn.softmax(logits), 0.0)


def nominal_logits(layer, query, key, key_mask=None):
    """Logits of the softmax that a layer stands for; a teacher's own.

    Args:
        layer: a `KernelizedAttention`, or a `MultiHeadAttention`.
        query, key: `(batch, length, heads, key_dim)`, as projected.
        key_mask: `(batch, key_length)` boolean, by which a layer's rotary
            positions count; or `None`.

    Returns:
        `(batch, heads, query_length, key_length)`.
    """
    if not isinstance(layer, KernelizedAttention):
        logits = tf.einsum("bthd,bshd->bhts", query, key)
        return logits * layer.key_dense.kernel.shape[-1] ** -0.5
    if layer.temperature is not None:
        raise ValueError(
            "A layer that normalizes queries and keys stands for no softmax "
            f"attention. Received: layer {layer.name!r} with qk_norm="
            f"{layer.qk_norm!r}. Convert without it."
        )
    scaled = layer.scaled(query, key, key_mask)
    return layer.feature_map.logits(layer.spectral_prior, *scaled)
