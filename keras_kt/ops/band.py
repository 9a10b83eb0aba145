"""The band of the attention matrix near its diagonal, by an exact kernel.

Chunks of `window` queries attend to the keys of their own chunk and of those
beside it by an explicit matrix. O(length · window) time; for the gradient only
what goes in is kept.
"""

import tensorflow as tf

from keras_kt.numerics import precise_product
from keras_kt.ops import scaling, visible_tokens
from keras_kt.ops.blocks import shares
from keras_kt.ops.heads import (
    from_rows,
    repeat_rows,
    size_of,
    swap_heads,
    to_rows,
)
from keras_kt.written_gradients import pullback, written_gradient


def attend(query, line, decay, order, kernel, window, *, both_sides):
    """Attention by the exact kernel to keys less than `window` tokens away.

    Args:
        query: as in `ops.attend`.
        line: key, value, decay and keep, as in `window`, preceded by `window`
            earlier tokens.
        decay: of each query's token, 0 if masked.
        order: the `VisibleOrder`, or `None`.
        kernel, window: of the `NearField`.
        both_sides: whether keys after the query are seen, too.

    Returns:
        Outputs with the logarithms of their normalizers.
    """
    batch, length = size_of(query, 0), size_of(query, 1)
    sides, repeats = 1 + both_sides, query.shape[2] // line[0].shape[2]
    chunks = shares(length, window)
    missing = chunks * window - length

    def split(x, rows=1):
        after = [(0, 0), (0, missing * rows)]
        x = tf.pad(x, after + [(0, 0)] * (x.shape.rank - 2))
        count = size_of(x, 1) // (window * rows)
        return tf.reshape(x, (batch, count, window * rows, *x.shape[2:]))

    if order is None:
        reach = tf.range(1, window + 1)[tf.newaxis, tf.newaxis]

        def around(x):
            """The chunks before, of and, if seen, after each."""
            x = split(x[:, : length + sides * window])
            return tf.concat(
                [x[:, i : i + chunks] for i in range(sides + 1)], 2
            )

    else:
        counts = split(order.count)
        # Visible tokens before each chunk, and from there to each query.
        start = (
            counts[:, :, :1] - split(tf.cast(order.mask, tf.int32))[:, :, :1]
        )
        reach = tf.maximum(counts - start, 0)
        index = start + tf.range((sides + 1) * window)

        def around(x):
            """What the queries of each chunk may see."""
            flat = tf.reshape(index, (batch, chunks * index.shape[2]))
            x = visible_tokens.take(x, flat)
            return tf.reshape(x, (batch, chunks, index.shape[2], *x.shape[2:]))

    key, value, of_keys, keep = line
    key = around(tf.transpose(kernel.keys(swap_heads(key)), (0, 2, 1, 3, 4)))
    query = kernel.queries(swap_heads(to_rows(query, repeats)))
    query = split(tf.transpose(query, (0, 2, 1, 3, 4)), repeats)
    parts = _recomputed(
        lambda *x: _near_weights(*x, sides),
        query,
        key,
        around(value),
        split(decay),
        around(of_keys),
        around(keep),
        tf.cast(reach, tf.float32),
    )
    rows = chunks * window * repeats
    parts = (tf.reshape(x, (batch, rows, *x.shape[3:])) for x in parts)
    return [from_rows(x, repeats)[:, :length] for x in parts]


def _near_weights(query, key, value, decay, of_keys, keep, reach, sides):
    """`attend` within chunks `(batch, chunk, token, heads, …)`.

    Args:
        query: with as many rows for each token as share a key.
        decay: of the queries' tokens.
        of_keys: decay of the keys, `window` of which are before the chunk.
        reach: `(batch, chunk, token)`, keys of the chunk up to each query.
    """
    window = decay.shape[2]
    repeats = query.shape[2] // window
    if query.shape[4] > 1:
        logits = precise_product(
            tf.einsum("bnthcd->bnhctd", query),
            tf.einsum("bnshcd->bnhcds", key),
        )
        logits = tf.reduce_logsumexp(logits, axis=3)
    else:
        # LiteRT multiplies up to rank 5.
        logits = precise_product(
            tf.einsum("bnthd->bnhtd", query[:, :, :, :, 0]),
            tf.einsum("bnshd->bnhds", key[:, :, :, :, 0]),
        )
    reach = repeat_rows(reach, repeats, axis=2)
    reach = reach[:, :, tf.newaxis, :, tf.newaxis]
    # Keys' slots, counted from the query's own.
    distance = reach - 1.0 - tf.range(-window, sides * window, dtype=tf.float32)
    is_past = distance >= 0.0
    # Both since the chunk's start, so that no sum grows with the length.
    elapsed = repeat_rows(tf.cumsum(decay, axis=2), repeats, axis=2)
    early, late = of_keys[:, :, :window], of_keys[:, :, window:]
    early = -tf.cumsum(early, axis=2, exclusive=True, reverse=True)
    of_keys = tf.concat([early, tf.cumsum(late, axis=2)], axis=2)
    difference = tf.transpose(elapsed, (0, 1, 3, 2, 4)) - tf.transpose(
        of_keys, (0, 1, 3, 4, 2)
    )
    logits -= tf.where(is_past, difference, -difference)
    near = is_past if sides == 1 else distance > -window
    near &= distance < window
    visible = near & (keep > 0.0)[:, :, tf.newaxis, tf.newaxis]
    logits = tf.where(visible, logits, scaling.FLOOR)
    scale = scaling.row_maximum(logits)
    weights = tf.where(visible, tf.exp(logits - scale), 0.0)
    normalizer = tf.reduce_sum(weights, axis=-1, keepdims=True)
    weights = scaling.safe_ratio(weights, normalizer)
    output = tf.einsum("bnhts,bnshe->bnthe", weights, value)
    log_normalizer = scaling.absolute_log(normalizer, scale)
    return output, tf.transpose(log_normalizer, (0, 1, 3, 2, 4))


def _recomputed(function, *tensors):
    """`function(*tensors)`, of which only the tensors are kept."""

    @written_gradient
    def call(*tensors):
        def gradient(*upstream):
            return pullback(lambda: function(*tensors), tensors, upstream)

        return function(*tensors), gradient

    return call(*tensors)
