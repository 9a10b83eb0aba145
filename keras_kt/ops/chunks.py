"""A block of causal tokens at once: chunks attend within and to their past.

Exponents of the decay are differences of elapsed decay, at most zero and taken
within a chunk or a block, so that no running sum grows with the length.
"""

import numpy as np
import tensorflow as tf

from keras_kt.numerics import precise_product
from keras_kt.ops import blocks, scaling
from keras_kt.ops.heads import part, repeat_rows, size_of

# Where features are of any range, so many tokens attend pair by pair.
_EXACT_SIZE = 16


def attend(
    feature_map, query, key, value, decay=None, *, keep, state, repeats=1
):
    """What the queries of a block read, and the state after it.

    Log-features are exponentiated on one scale for the whole block.

    Args:
        feature_map: a bound feature map.
        query: `(batch, heads, tokens · repeats, head_dim)`.
        key, value, decay: `(batch, heads, tokens, dim)`.
        keep: `(batch, 1, tokens, 1)`, which tokens are seen; or `None`.
        state: maximum and sums of the `AttentionState` before.
        repeats: rows of the query for each token.

    Returns:
        `Sums` of the rows, the state after, and whether nothing was lost to
        underflow.
    """
    maximum, past = state
    query = feature_map.queries(query)
    key = log_key = scaling.key_features(feature_map, key, keep)
    value = scaling.with_ones(value, keep)
    if feature_map.positive:
        top = scaling.maximum_of(log_key, maximum)
        query, scale = scaling.exp_query(query, top)
        key = scaling.exp_key(log_key, top)
        past *= tf.expand_dims(tf.exp(maximum - top), -2)
    batch, length = size_of(key, 0), size_of(key, 2)
    chunk = blocks.chunk_of(length, blocks.CHUNK_SIZE)

    def split(x, size=chunk):
        return tf.reshape(x, (batch, x.shape[1], -1, size, x.shape[3]))

    def join(x, rows=repeats):
        # Not to a `tf.shape`, from which tf2onnx learns no rank.
        return tf.reshape(x, (batch, x.shape[1], length * rows, x.shape[4]))

    query, key, value = split(query, chunk * repeats), split(key), split(value)
    # What is left of token s at token t.
    fading, new, ends = np.tril(np.ones((chunk, chunk), "float32")), value, None
    if decay is not None:
        elapsed = tf.cumsum(split(decay), axis=3)
        rest = elapsed[..., -1:, :] - elapsed
        ends = tf.cumsum(elapsed[..., -1, :], axis=2)
        fading, new = _fading(elapsed), value * tf.exp(-rest)
        kept = repeat_rows(tf.exp(-elapsed), repeats, axis=3)
    fading = repeat_rows(fading, repeats, axis=-2)
    sums = tf.matmul(new, key, transpose_a=True)
    before, after = _states(past, sums, ends)
    values = tf.matmul(query, before, transpose_b=True)
    if decay is not None:
        values *= kept
    scores = tf.matmul(query, key, transpose_b=True) * fading
    values = join(values + tf.matmul(scores, value))
    if not feature_map.positive:
        # The sum of the constant feature counts the keys.
        count = before[..., -1:, -1:]
        if decay is not None:
            count *= kept
        count += tf.matmul(fading, key[..., -1:])
        sums = scaling.Sums(values, join(count / query[..., -1:]))
        return sums, (maximum, after), True
    exact = scaling.is_exact(values, _sees(keep, maximum, repeats))
    if decay is not None:
        # The state's scale fades with it, lest an old key hide later ones.
        rest = join(rest + tf.expand_dims(ends[:, :, -1:] - ends, -2), 1)
        faded = scaling.maximum_of(log_key - rest, maximum - ends[:, :, -1])
        # Where keys below the block's scale were lost, nothing is exact.
        excess = top - faded
        exact &= tf.reduce_all(excess < scaling.MOST_EXCESS)
        excess = tf.minimum(excess, scaling.MOST_EXCESS)
        after *= tf.expand_dims(tf.exp(excess), -2)
        top = faded
    return scaling.Sums(values, scale), (top, after), exact


def attend_exactly(
    feature_map, query, key, value, decay=None, *, keep, state, repeats=1
):
    """`attend` for log-features of any range.

    Chunks are small, each has a scale of its own, and logits within are formed
    pair by pair. Each row is scaled by the largest exponent that it sees, so
    that its normalizer is at least one.
    """
    maximum, past = state
    query = feature_map.queries(query)
    key = scaling.key_features(feature_map, key, keep)
    value = scaling.with_ones(value, keep)
    batch, length = size_of(key, 0), size_of(key, 2)
    chunk = blocks.chunk_of(length, _EXACT_SIZE)

    def split(x, size=chunk):
        return tf.reshape(x, (batch, x.shape[1], -1, size, x.shape[3]))

    query, key, value = split(query, chunk * repeats), split(key), split(value)
    log_last, ends = key, None
    if decay is not None:
        elapsed = tf.cumsum(split(decay), axis=3)
        query -= repeat_rows(elapsed, repeats, axis=3)
        key += elapsed
        log_last = key - elapsed[..., -1:, :]
        ends = tf.cumsum(elapsed[..., -1, :], axis=2)
    # The past and the chunks, each on its own scale, as they are at their ends.
    top = scaling.maximum_of(log_last)
    sums = tf.matmul(
        value, tf.exp(log_last - tf.expand_dims(top, -2)), transpose_a=True
    )
    top, sums = _states_exactly(
        tf.concat([tf.expand_dims(maximum, 2), top], axis=2),
        tf.concat([tf.expand_dims(past, 2), sums], axis=2),
        ends,
    )
    earlier = query + top[:, :, :-1, tf.newaxis]
    pairs = tf.expand_dims(query, -2) + tf.expand_dims(key, -3)
    visible = np.repeat(np.tril(np.ones((chunk, chunk), "bool")), repeats, 0)
    pairs = tf.where(visible[..., np.newaxis], pairs, scaling.FLOOR)
    scale = scaling.row_maximum(tf.reduce_max(pairs, axis=-1))
    scale = tf.maximum(scale, scaling.row_maximum(earlier))
    weights = tf.reduce_sum(tf.exp(pairs - tf.expand_dims(scale, -1)), axis=-1)
    values = tf.matmul(tf.where(visible, weights, 0.0), value)
    values += tf.matmul(
        tf.exp(earlier - scale), part(sums, 2, 0, -1), transpose_b=True
    )
    rows = [
        tf.reshape(x, (batch, x.shape[1], length * repeats, x.shape[4]))
        for x in (values, scale)
    ]
    return scaling.Sums(*rows), (top[:, :, -1], sums[:, :, -1]), True


def _states_exactly(tops, sums, ends):
    """Scales and sums of the states, from those of the parts.

    Args:
        tops: `(batch, heads, 1 + chunks, feature_dim)`, of the past and of what
            each chunk adds at its end.
        sums: `(batch, heads, 1 + chunks, value_dim + 1, feature_dim)`.
        ends: as in `_states`.

    Returns:
        Those of the states at the start and after each chunk.
    """
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


def _states(past, sums, ends):
    """The states before each chunk, and the one after the last.

    Args:
        past: `(batch, heads, value_dim + 1, feature_dim)`.
        sums: `(batch, heads, chunks, …)`, what each chunk adds at its end.
        ends: `(batch, heads, chunks, 1)`, the decay up to each end; or `None`.
    """
    batch, heads, chunks, width, dim = (size_of(sums, i) for i in range(5))

    def weighted(weights, states):
        """Sums of states, by the rows of a matrix."""
        states = tf.reshape(states, (batch, heads, -1, width * dim))
        states = precise_product(weights, states)
        return tf.reshape(states, (batch, heads, -1, width, dim))

    if ends is None:
        before = tf.expand_dims(past, 2)
        if not (isinstance(chunks, int) and chunks == 1):
            # TensorFlow's running sum takes half of the whole block's time.
            places = tf.range(chunks)
            earlier = tf.cast(places[:, tf.newaxis] > places, tf.float32)
            earlier *= tf.ones((batch, heads, 1, 1))
            before += weighted(earlier, sums)
        return before, past + tf.reduce_sum(sums, 2)
    fading = _fading(tf.pad(ends, [(0, 0), (0, 0), (1, 0), (0, 0)]))
    states = tf.concat([tf.expand_dims(past, 2), sums], axis=2)
    # Apart, since to take a large product apart costs as much as to make it.
    before = weighted(part(fading, 2, 0, -1), states)
    after = weighted(part(fading, 2, -1), states)
    return before, tf.squeeze(after, 2)


def _fading(elapsed):
    """What the decay leaves of each token s for t ≥ s: `(…, t, s)`."""
    decay = elapsed - tf.linalg.matrix_transpose(elapsed)
    length = size_of(elapsed, -2)
    visible = tf.linalg.band_part(tf.ones((length, length), "bool"), -1, 0)
    return tf.where(visible, tf.exp(-tf.where(visible, decay, 0.0)), 0.0)


def _sees(keep, maximum, repeats):
    """Which rows see a key, themselves or in the past; `None` for all."""
    if keep is None:
        return None
    past = tf.reduce_max(maximum, axis=-1) > 0.5 * scaling.FLOOR
    # By the first visible key: XLA sums a running sum anew at every position.
    first = tf.argmax(tf.cast(keep, tf.int32), axis=2, output_type=tf.int32)
    places = tf.expand_dims(tf.range(size_of(keep, 2)), -1)
    seen = places >= tf.expand_dims(first, -1)
    seen &= tf.reduce_any(keep, axis=2, keepdims=True)
    seen |= past[..., tf.newaxis, tf.newaxis]
    return repeat_rows(seen, repeats, axis=2)
