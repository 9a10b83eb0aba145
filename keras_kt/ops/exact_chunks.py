"""A block of tokens in order, for log-features of any range: slow, and exact.

Chunks are small, each has a scale of its own, and logits within are formed pair
by pair.
"""

import numpy as np
import tensorflow as tf

from keras_kt.ops import blocks, scaling
from keras_kt.ops.heads import part, repeat_rows, size_of

# So many tokens attend pair by pair.
_SIZE = 16


def attend(
    feature_map,
    query,
    key,
    value,
    decay=None,
    *,
    keep,
    state,
    future=(),
    repeats=1,
):
    """As `chunks.attend`.

    Each row is scaled by the largest exponent that it sees, so that its
    normalizer is at least one.
    """
    maximum, past = state
    query = feature_map.queries(query)
    key = scaling.key_features(feature_map, key, keep)
    value = scaling.with_ones(value, keep)
    batch, length = size_of(key, 0), size_of(key, 2)
    chunk = blocks.chunk_of(length, _SIZE)

    def split(x, size=chunk):
        return tf.reshape(x, (batch, x.shape[1], -1, size, x.shape[3]))

    query, key, value = split(query, chunk * repeats), split(key), split(value)
    earlier, log_last, ends = query, key, None
    pairs = tf.expand_dims(query, -2) + tf.expand_dims(key, -3)
    visible = np.repeat(np.tril(np.ones((chunk, chunk), "bool")), repeats, 0)
    if decay is not None:
        elapsed = tf.cumsum(split(decay), axis=3)
        rows = repeat_rows(elapsed, repeats, axis=3)
        between = rows - tf.linalg.matrix_transpose(elapsed)
        between = tf.where(visible, between, -between)
        pairs -= tf.expand_dims(between, -1)
        earlier -= rows
        log_last -= elapsed[..., -1:, :] - elapsed
        ends = tf.cumsum(elapsed[..., -1, :], axis=2)
    # The past and the chunks, each on its own scale, as they are at their ends.
    top, sums = _states(maximum, past, log_last, value, ends)
    read = [(earlier + top[:, :, :-1, tf.newaxis], part(sums, 2, 0, -1))]
    if future:
        # Likewise what is behind, in reverse order.
        totals = tf.reverse(elapsed[..., -1, :], [2])
        tops, states = _states(
            *future,
            *(tf.reverse(x, [2]) for x in (key - elapsed, value)),
            tf.cumsum(totals, axis=2),
        )
        later = query - (elapsed[..., -1:, :] - rows)
        later += tf.reverse(tops[:, :, :-1, tf.newaxis], [2])
        read.append((later, tf.reverse(part(states, 2, 0, -1), [2])))
        visible = np.ones_like(visible)
    pairs = tf.where(visible[..., np.newaxis], pairs, scaling.FLOOR)
    scale = scaling.row_maximum(tf.reduce_max(pairs, axis=-1))
    for log_query, _ in read:
        scale = tf.maximum(scale, scaling.row_maximum(log_query))
    weights = tf.reduce_sum(tf.exp(pairs - tf.expand_dims(scale, -1)), axis=-1)
    values = tf.matmul(tf.where(visible, weights, 0.0), value)
    for log_query, states in read:
        values += tf.matmul(tf.exp(log_query - scale), states, transpose_b=True)
    rows = [
        tf.reshape(x, (batch, x.shape[1], length * repeats, x.shape[4]))
        for x in (values, scale)
    ]
    return scaling.Sums(*rows), (top[:, :, -1], sums[:, :, -1]), True


def _states(maximum, past, log_key, value, ends):
    """Scales and sums of the states at the start and after each chunk.

    Args:
        maximum, past: of the state at the start.
        log_key: `(batch, heads, chunks, tokens, feature_dim)`, as faded at the
            ends of the chunks.
        value: likewise, with ones.
        ends: `(batch, heads, chunks, 1)`, the decay up to each end; or `None`.
    """
    top = scaling.maximum_of(log_key)
    sums = tf.matmul(
        value, tf.exp(log_key - tf.expand_dims(top, -2)), transpose_a=True
    )
    tops = tf.concat([tf.expand_dims(maximum, 2), top], axis=2)
    sums = tf.concat([tf.expand_dims(past, 2), sums], axis=2)
    count = size_of(tops, 2)
    seen = tf.linalg.band_part(tf.ones((count, count), "bool"), -1, 0)
    seen = tf.expand_dims(seen, -1)
    parts = tf.expand_dims(tops, 2)
    if ends is not None:
        ends = tf.pad(ends, [(0, 0), (0, 0), (1, 0), (0, 0)])
        parts += tf.expand_dims(ends, 2) - tf.expand_dims(ends, 3)
    parts = tf.where(seen, parts, scaling.FLOOR)
    tops = tf.stop_gradient(tf.reduce_max(parts, axis=3))
    weights = tf.exp(parts - tf.expand_dims(tops, 3))
    weights = tf.where(seen, weights, 0.0)
    return tops, tf.einsum("bhmnf,bhnef->bhmef", weights, sums)
