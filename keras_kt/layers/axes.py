"""Attention axes and masks: to and from `(batch, length, heads, dim)`."""

import numpy as np
import tensorflow as tf

from keras_kt import _checks


class Folding:
    """To and from `(batch, length, heads, dim)` for any attention axes.

    Attention axes are flattened to the length; the other axes join the batch.
    """

    def __init__(self, query, value, axes):
        # Projected tensors end in heads and dim, inputs in features.
        self.ndim = len(query.shape) - (2 if len(query.shape) > 3 else 1)
        self.ndim = max(max(axes) + 1, self.ndim)
        self.axes = axes
        self.free = [a for a in range(1, self.ndim) if a not in axes]
        self.order = (0, *self.free, *axes)
        self.simple = self.ndim == 2
        self.query_sizes = _sizes(query, self.ndim)
        self.key_sizes = _sizes(value, self.ndim)

    def fold(self, x):
        """`(batch, …, heads, dim)` to `(batch, length, heads, dim)`."""
        if self.simple:
            return x
        sizes, n = _sizes(x, self.ndim), self.ndim
        x = tf.transpose(x, (*self.order, n, n + 1))
        batch = _product(sizes[a] for a in (0, *self.free))
        length = _product(sizes[a] for a in self.axes)
        return tf.reshape(x, (batch, length, x.shape[n], x.shape[n + 1]))

    def unfold(self, x):
        """The inverse of `fold`, for queries' outputs."""
        if self.simple:
            return x
        n = self.ndim
        sizes = [self.query_sizes[a] for a in self.order]
        x = tf.reshape(x, (*sizes, x.shape[2], x.shape[3]))
        back = [self.order.index(a) for a in range(n)]
        return tf.transpose(x, (*back, n, n + 1))

    def unfold_scores(self, scores):
        if self.simple:
            return scores
        lead = [self.query_sizes[a] for a in (0, *self.free)]
        queries = [self.query_sizes[a] for a in self.axes]
        keys = [self.key_sizes[a] for a in self.axes]
        return tf.reshape(scores, (*lead, scores.shape[1], *queries, *keys))

    def fold_mask(self, mask, sizes):
        """A mask of positions to `(batch, length)` boolean."""
        if mask is None:
            return None
        mask = tf.broadcast_to(tf.cast(mask, "bool"), sizes)
        if self.simple:
            return mask
        mask = tf.transpose(mask, self.order)
        batch = _product(sizes[a] for a in (0, *self.free))
        return tf.reshape(mask, (batch, _product(sizes[a] for a in self.axes)))

    def fold_dense_mask(self, mask):
        """MultiHeadAttention's ranks of mask to `(batch, heads, T, S)`."""
        mask = tf.cast(tf.convert_to_tensor(mask), "bool")
        queries = [self.query_sizes[a] for a in self.axes]
        keys = [self.key_sizes[a] for a in self.axes]
        pairs = [*queries, *keys]
        rank = 2 + len(self.free) + len(pairs)
        got = mask.shape[-len(pairs) :]
        known = [
            (g, p) for g, p in zip(got, pairs, strict=False) if _is_known(g, p)
        ]
        if not len(pairs) <= mask.shape.rank <= rank or any(
            g not in (1, p) for g, p in known
        ):
            raise ValueError(
                "`attention_mask` must broadcast to (batch, heads, "
                "query_length, key_length), its last axes being "
                f"{tuple(pairs)}. Received: a mask of shape "
                f"{tuple(mask.shape)}. A (batch, key_length) padding mask is "
                "`value_mask`."
            )
        # Missing axes stand before the pairs of positions, as in Keras.
        while mask.shape.rank < rank:
            mask = tf.expand_dims(mask, -len(pairs) - 1)
        if self.simple:
            return mask
        lead = [self.query_sizes[a] for a in (0, *self.free)]
        heads = mask.shape[1 + len(self.free)]
        mask = tf.broadcast_to(mask, (*lead, heads, *pairs))
        return tf.reshape(
            mask,
            (_product(lead), heads, _product(queries), _product(keys)),
        )


def _sizes(x, ndim):
    dynamic = None
    sizes = []
    for axis in range(ndim):
        size = x.shape[axis]
        if size is None:
            dynamic = tf.shape(x) if dynamic is None else dynamic
            size = dynamic[axis]
        sizes.append(size)
    return sizes


def _product(sizes):
    result = 1
    for size in sizes:
        result = result * size
    return result


def _is_known(*sizes):
    return all(isinstance(size, int) for size in sizes)


def match_length(query, key_mask, *of_keys):
    """Keys cut or padded to the queries' length: causal from the start."""
    key, length = of_keys[0], query.shape[1]
    if length is not None and length == key.shape[1]:
        return key_mask, *of_keys
    if key_mask is None:
        key_mask = tf.ones(tf.shape(key)[:2], "bool")
    if length is None:
        length = tf.shape(query)[1]
    missing = tf.maximum(length - tf.shape(key)[1], 0)

    def match(x):
        if x is None:
            return None
        rest = [(0, 0)] * (x.shape.rank - 2)
        x = tf.pad(x[:, :length], [(0, 0), (0, missing), *rest])
        return tf.ensure_shape(x, (None, query.shape[1], *x.shape[2:]))

    return tuple(map(match, (key_mask, *of_keys)))


def select_rows(x, mask):
    """x where the mask keeps, zeros elsewhere, whatever x holds there."""
    return tf.where(mask[..., tf.newaxis], x, tf.zeros((), x.dtype))


def shared_mask(mask):
    """Parts a mask that all queries and heads are known to share from others.

    Returns:
        A `(batch, key_length)` mask and what remains; one of them is `None`.
    """
    if mask is None:
        return None, None
    tensor = tf.convert_to_tensor(mask)
    shared = list(range(1, len(tensor.shape) - 1))
    if not shared or any(tensor.shape[axis] != 1 for axis in shared):
        return None, mask
    return tf.cast(tf.squeeze(tensor, shared), "bool"), None


def position_mask(name, mask, positions, axes):
    """A boolean mask that broadcasts to positions, or `None`.

    Args:
        name: of the argument.
        mask: the argument.
        positions: sizes of a tensor's axes but the last ones, batch first.
        axes: those that are attended over.
    """
    if mask is None:
        return None
    mask = tf.cast(mask, "bool")
    # A `(batch, length)` mask holds for every index of the free axes.
    if mask.shape.rank == 2 and len(axes) == 1:
        for axis in range(1, len(positions)):
            if axis not in axes:
                mask = tf.expand_dims(mask, axis)
    fits = mask.shape.rank == len(positions) and all(
        None in (got, size) or got in (1, size)
        for got, size in zip(mask.shape, positions, strict=True)
    )
    if not fits:
        raise ValueError(
            f"`{name}` must have the shape of the tensor's positions, "
            f"{tuple(positions)}. Received: a mask of shape "
            f"{tuple(mask.shape)}. Use `attention_mask` for a mask of pairs of "
            "positions."
        )
    return mask


def select_heads(name, mask, *heads):
    """A `(batch, length)` mask, and heads with zeros where it hides them."""
    if mask is None:
        return None, *heads
    positions = heads[0].shape[:2]
    mask = position_mask(name, mask, positions, (1,))
    mask = tf.broadcast_to(mask, tf.shape(heads[0])[:2])
    mask = tf.ensure_shape(mask, positions)
    return mask, *(select_rows(x, mask[:, :, tf.newaxis]) for x in heads)


def both(mask, other):
    """Two masks as one; `None` hides nothing."""
    if mask is None or other is None:
        return other if mask is None else mask
    return tf.logical_and(tf.cast(mask, "bool"), tf.cast(other, "bool"))


def mask_of(x, mask=None):
    """`mask`, or the Keras mask of a tensor if that is `None`."""
    return getattr(x, "_keras_mask", None) if mask is None else mask


def without_mask(x):
    """A tensor as it is, but for its Keras mask; the argument keeps that."""
    return x if mask_of(x) is None else tf.identity(x)


def as_axes(attention_axes):
    """The argument as a tuple of integers, or `None`."""
    if attention_axes is None:
        return None
    if np.ndim(attention_axes) == 0:
        attention_axes = [attention_axes]
    try:
        return _checks.integers("attention_axes", attention_axes, minimum=None)
    except ValueError as error:
        raise ValueError(
            "`attention_axes` must be an int, list, or tuple. "
            f"Received: attention_axes={attention_axes}"
        ) from error


def resolve_axes(attention_axes, rank):
    """The attended axes of inputs of a rank, each a different position."""
    valid = tuple(range(1, rank - 1))
    axes = valid if attention_axes is None else attention_axes
    resolved = tuple(axis + rank if axis < 0 else axis for axis in axes)
    repeats = len(set(resolved)) < len(resolved)
    if not resolved or repeats or not set(resolved) <= set(valid):
        negative = tuple(axis - rank for axis in valid)
        raise ValueError(
            "`attention_axes` must name different axes between those of the "
            f"batch and of the features: for inputs of rank {rank}, any of "
            f"{valid}, or {negative} from the end. Received: attention_axes="
            f"{attention_axes}. Leave it out to attend over all of them."
        )
    return resolved


def scores_shape(query_shape, key_shape, axes, num_heads):
    """Shape of the attention weights, as `MultiHeadAttention` gives them."""
    free = [a for a in range(len(query_shape) - 1) if a not in axes]
    return (
        *(query_shape[axis] for axis in free),
        num_heads,
        *(query_shape[axis] for axis in axes),
        *(key_shape[axis] for axis in axes),
    )


def check_one_axis(name, value, axes):
    """Raises a `ValueError` if positions have no order."""
    if len(axes) > 1:
        raise ValueError(
            f"`{name}` needs an order of positions, so a single attention "
            f"axis. Received: {name}={value!r}, attention_axes={axes}. Flatten "
            f"the axes, or leave `{name}` out."
        )


def check_shapes(query_shape, value_shape, key_shape):
    """Raises a `ValueError` unless keys and values stand in pairs."""
    if len(value_shape) != len(query_shape):
        raise ValueError(
            "`query` and `value` must have the same rank. Received: "
            f"query_shape={tuple(query_shape)} and "
            f"value_shape={tuple(value_shape)}"
        )
    if tuple(value_shape[1:-1]) != tuple(key_shape[1:-1]):
        raise ValueError(
            "All dimensions of `value` and `key`, except the last one, must be "
            f"equal. Received: value_shape={tuple(value_shape)} and "
            f"key_shape={tuple(key_shape)}"
        )


def check_tensors(query, value, key):
    """Raises a `ValueError` if tensors do not belong together."""
    sizes = {x.shape[0] for x in (query, value, key)} - {None}
    if len(sizes) > 1:
        raise ValueError(
            "`query`, `value` and `key` must have the same batch size. "
            f"Received: query of shape {tuple(query.shape)}, value of shape "
            f"{tuple(value.shape)} and key of shape {tuple(key.shape)}"
        )
    for one, other in zip(value.shape[1:-1], key.shape[1:-1], strict=False):
        if None not in (one, other) and one != other:
            check_shapes(query.shape, value.shape, key.shape)


def check_heads(shapes, heads, dims):
    """Raises a `ValueError` unless shapes are heads that belong together.

    Args:
        shapes: of query, key and value.
        heads: how many heads each should have.
        dims: the size of these.
    """
    fits = all(
        len(shape) == 4 and tuple(shape[2:]) == (count, dim)
        for shape, count, dim in zip(shapes, heads, dims, strict=True)
    )
    batches, lengths = ({shape[i] for shape in shapes[i:]} for i in (0, 1))
    if fits and len(batches - {None}) < 2 and len(lengths - {None}) < 2:
        return
    names, of = ("query", "key", "value"), ("query", "key", "key")
    expected = ", ".join(
        "`{}` (batch, {}_length, {}, {})".format(*parts)
        for parts in zip(names, of, heads, dims, strict=True)
    )
    received = ", ".join(
        f"{name} of shape {tuple(shape)}"
        for name, shape in zip(names, shapes, strict=True)
    )
    raise ValueError(
        f"Heads must be {expected}, of one batch size. Received: {received}"
    )
