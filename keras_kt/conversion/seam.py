"""The seam: where attention layers of other classes attend on heads.

Most of KerasHub's layers project, normalize and rotate, and then call
`_compute_attention(query, key, value, attention_mask, …)`, softmax. `put_in`
gives a layer a `LinearAttention` for that, as `layer.linear_attention`, and
lets its block pass causality and padding apart. What a layer's softmax is, its
`Seam`, is measured (`measured_seam`).
"""

import dataclasses
import inspect

import keras
import tensorflow as tf

from keras_kt.conversion.inline import METHOD, attend_inline
from keras_kt.conversion.probe import give_method, heads_of, replace_method
from keras_kt.layers.axes import mask_of

# Of blocks: what makes the dense mask.
MASK_METHODS = ("_compute_self_attention_mask", "_compute_attention_mask")


@dataclasses.dataclass(frozen=True)
class Seam:
    """What the softmax attention of a layer is.

    Attributes:
        num_heads, num_key_value_heads, key_dim, value_dim: as in
            `LinearAttention`.
        scale: softmax's factor of q·k.
        is_causal: whether its block masks the future.
        mask_method: name of the block's method for that; `None` without one.
        weights_dropout: rate of dropout on attention weights.
        slopes: how much the logits of each head fall with the distance, or
            `None`: they do not.
        window: a query sees that many keys, itself the last; or `None`.
        is_inline: whether its call attends without a method for that.
    """

    num_heads: int
    num_key_value_heads: int
    key_dim: int
    value_dim: int
    scale: float
    is_causal: bool = False
    mask_method: str | None = None
    weights_dropout: float = 0.0
    slopes: tuple | None = None
    window: int | None = None
    is_inline: bool = False

    def heads(self, query, key, value):
        """Heads as the layer passes them, to what `LinearAttention` takes."""
        # Which scales by key_dim^(-1/4) on both sides.
        factor = self.scale * self.key_dim**0.5
        if abs(factor - 1.0) > 1e-6:
            query = query * tf.cast(factor, query.dtype)
        # Most layers repeat them; the features are of one.
        repeats = key.shape[2] // self.num_key_value_heads
        return query, key[:, :, ::repeats], value[:, :, ::repeats]


def kernel_within(layer):
    """The `LinearAttention` that `put_in` gave a layer, or `None`."""
    return getattr(layer, "linear_attention", None)


def put_in(layer, block, seam, linear_attention, dropout=0.0):
    """Lets a built layer attend by a `LinearAttention`, which it tracks then.

    Args:
        layer: the attention layer, of a copy.
        block: the layer that has it.
        seam: its `Seam`.
        linear_attention: an unbuilt layer.
        dropout: rate of dropout on the heads' outputs.
    """
    few, size = seam.num_key_value_heads, seam.key_dim
    linear_attention.build(
        (None, None, seam.num_heads, size),
        (None, None, few, size),
        (None, None, few, seam.value_dim),
    )
    if seam.slopes:
        linear_attention.decay_rates.fix(seam.slopes)
    layer._tracker.unlock()
    layer.seam = seam
    layer.linear_attention = linear_attention
    layer.heads_dropout = keras.layers.Dropout(dropout) if dropout else None
    layer._tracker.lock()
    if seam.is_inline:
        give_method(layer, METHOD, _attend_heads)
        replace_method(layer, "call", attend_inline)
    else:
        replace_method(layer, METHOD, _attend)
    if seam.mask_method:
        replace_method(block, seam.mask_method, _vector_mask)


def _attend(layer, softmax, *args, **kwargs):
    """`_attend_heads` with the arguments of the method that it replaces."""
    call = heads_of(softmax, args, kwargs)
    names = "query", "key", "value", "attention_mask", "training"
    return _attend_heads(layer, **{n: call[n] for n in names if n in call})


def _attend_heads(layer, query, key, value, attention_mask=None, training=None):
    """Attention of heads; `_compute_attention` of a layer that was converted.

    A mask `(batch, 1, key_length)` for many queries is `_vector_mask`'s:
    causality is apart from it. Others are dense and say it all.
    """
    inner, seam = kernel_within(layer), layer.seam
    query, key, value = seam.heads(query, key, value)
    options, mask = {}, attention_mask
    is_vector = mask is not None and mask.shape[1] == 1
    if is_vector:
        options["key_mask"] = tf.cast(mask[:, 0], "bool")
        options["use_causal_mask"] = seam.is_causal and query.shape[1] != 1
    elif mask is not None:
        options["attention_mask"] = tf.cast(mask[:, tf.newaxis], "bool")
    lengths = query.shape[1], key.shape[1]
    is_cached = mask is not None and lengths[0] != lengths[1]
    by_distance = inner.decay or inner.near_field or inner.sliding_window
    if by_distance and is_cached:
        raise ValueError(
            "A key-value cache does not tell how far its keys are, which "
            "`decay`, `near_field` and `sliding_window` go by. Received: a "
            f"cache for {layer.name!r} with decay={inner.decay!r}, near_field="
            f"{inner.near_field}, sliding_window={inner.sliding_window}. "
            "Convert without them."
        )
    heads = inner(query, key, value, **options)
    heads = tf.cast(heads, layer.compute_dtype)
    if layer.heads_dropout is not None:
        heads = layer.heads_dropout(heads, training=training)
    return heads


def _vector_mask(block, dense_mask, *args, **kwargs):
    """A block's mask as `(batch, 1, key_length)`, of the padding alone.

    Dense as before where a caller's mask or a cache is to be merged.
    """
    call = inspect.signature(dense_mask).bind(*args, **kwargs).arguments
    x, padding, *others = call.values()
    if any(len(getattr(x, "shape", ())) for x in tf.nest.flatten(others)):
        return dense_mask(*args, **kwargs)
    if not call.get("use_causal_mask", True):
        mask = dense_mask(*args, **kwargs)
        shape = tf.shape(x)[0], tf.shape(x)[1], tf.shape(x)[1]
        return None if mask is None else tf.broadcast_to(mask, shape)
    padding = mask_of(x, padding)
    if padding is None:
        padding = tf.ones(tf.shape(x)[:2], "int32")
    return tf.cast(tf.convert_to_tensor(padding), "int32")[:, tf.newaxis]
