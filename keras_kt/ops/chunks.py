"""A block of tokens in order: chunks attend within, to their past and future.

Exponents of the decay are differences of elapsed decay, at most zero and taken
within a chunk or a block, so that no running sum grows with the length.
"""

import numpy as np
import tensorflow as tf

from keras_kt.numerics import precise_product
from keras_kt.ops import blocks, scaling
from keras_kt.ops.heads import part, repeat_rows, size_of


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
    """What the queries of a block read, and the state after it.

    Log-features are exponentiated on one scale for the whole block.

    Args:
        feature_map: a bound feature map.
        query: `(batch, heads, tokens · repeats, head_dim)`.
        key, value, decay: `(batch, heads, tokens, dim)`.
        keep: `(batch, 1, tokens, 1)`, which tokens are seen; or `None`.
        state: maximum and sums of the `AttentionState` before.
        future: those of what comes behind the block, as faded at its end, if
            keys after a query are seen.
        repeats: rows of the query for each token.

    Returns:
        `Sums` of the rows, the state after, and whether nothing was lost to
        underflow.
    """
    maximum, past = state
    if future:
        ahead, behind = future
    query = feature_map.queries(query)
    key = log_key = scaling.key_features(feature_map, key, keep)
    value = scaling.with_ones(value, keep)
    if feature_map.positive:
        top = scaling.maximum_of(log_key, maximum)
        if future:
            top = tf.maximum(top, ahead)
        query, scale = scaling.exp_query(query, top)
        key = scaling.exp_key(log_key, top)
        past *= tf.expand_dims(tf.exp(maximum - top), -2)
        if future:
            behind = behind * tf.expand_dims(tf.exp(ahead - top), -2)
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
        fading = _fading(elapsed, bool(future))
        new = value * tf.exp(-rest)
        kept = repeat_rows(tf.exp(-elapsed), repeats, axis=3)
    fading = repeat_rows(fading, repeats, axis=-2)
    sums = tf.matmul(new, key, transpose_a=True)
    before, after = _states(past, sums, ends)
    values = tf.matmul(query, before, transpose_b=True)
    if decay is not None:
        values *= kept
    if future:
        sums = tf.matmul(value * tf.exp(-elapsed), key, transpose_a=True)
        behind = _states_behind(behind, sums, ends)
        left = repeat_rows(tf.exp(-rest), repeats, axis=3)
        values += tf.matmul(query, behind, transpose_b=True) * left
    scores = tf.matmul(query, key, transpose_b=True) * fading
    values = join(values + tf.matmul(scores, value))
    if not feature_map.positive:
        # The sum of the constant feature counts the keys.
        count = before[..., -1:, -1:]
        if decay is not None:
            count *= kept
        if future:
            count += behind[..., -1:, -1:] * left
        count += tf.matmul(fading, key[..., -1:])
        sums = scaling.Sums(values, join(count / query[..., -1:]))
        return sums, (maximum, after), True
    sees = _sees(keep, maximum, repeats)
    if future and sees is not None:
        some = tf.reduce_any(keep, axis=2, keepdims=True)
        sees |= some | _is_any(ahead)
    exact = scaling.is_exact(values, sees)
    if decay is not None:
        # The state's scale fades with it, lest an old key hide later ones.
        rest = join(rest + tf.expand_dims(ends[:, :, -1:] - ends, -2), 1)
        faded = scaling.maximum_of(log_key - rest, maximum - ends[:, :, -1])
        # Where keys below the block's scale were lost, nothing is exact.
        excess = top - faded
        if future:
            # Where no key was, none was lost.
            excess = tf.where(faded > 0.5 * scaling.FLOOR, excess, 0.0)
        exact &= tf.reduce_all(excess < scaling.MOST_EXCESS)
        excess = tf.minimum(excess, scaling.MOST_EXCESS)
        after *= tf.expand_dims(tf.exp(excess), -2)
        top = faded
    return scaling.Sums(values, scale), (top, after), exact


def _states(past, sums, ends):
    """The states before each chunk, and the one after the last.

    Args:
        past: `(batch, heads, value_dim + 1, feature_dim)`.
        sums: `(batch, heads, chunks, …)`, what each chunk adds at its end.
        ends: `(batch, heads, chunks, 1)`, the decay up to each end; or `None`.
    """
    batch, heads, chunks = (size_of(sums, i) for i in range(3))
    if ends is None:
        before = tf.expand_dims(past, 2)
        if not (isinstance(chunks, int) and chunks == 1):
            # TensorFlow's running sum takes half of the whole block's time.
            places = tf.range(chunks)
            earlier = tf.cast(places[:, tf.newaxis] > places, tf.float32)
            earlier *= tf.ones((batch, heads, 1, 1))
            before += _weighted(earlier, sums)
        return before, past + tf.reduce_sum(sums, 2)
    fading = _fading(tf.pad(ends, [(0, 0), (0, 0), (1, 0), (0, 0)]))
    states = tf.concat([tf.expand_dims(past, 2), sums], axis=2)
    # Apart, since to take a large product apart costs as much as to make it.
    before = _weighted(part(fading, 2, 0, -1), states)
    after = _weighted(part(fading, 2, -1), states)
    return before, tf.squeeze(after, 2)


def _states_behind(future, sums, ends):
    """The states behind each chunk.

    Args:
        future: that behind the last, `(batch, heads, value_dim + 1,
            feature_dim)`.
        sums: `(batch, heads, chunks, …)`, what each chunk adds at its start.
        ends: as in `_states`.
    """
    states = tf.expand_dims(future, 2)
    if isinstance(sums.shape[2], int) and sums.shape[2] == 1:
        return states
    states = tf.concat([part(sums, 2, 1), states], axis=2)
    return _weighted(tf.linalg.matrix_transpose(_fading(ends)), states)


def _weighted(weights, states):
    """Sums of states, by the rows of a matrix."""
    batch, heads, _, width, dim = (size_of(states, i) for i in range(5))
    states = tf.reshape(states, (batch, heads, -1, width * dim))
    states = precise_product(weights, states)
    return tf.reshape(states, (batch, heads, -1, width, dim))


def _fading(elapsed, both_ways=False):
    """What the decay leaves of each token s at t, for t ≥ s: `(…, t, s)`."""
    decay = elapsed - tf.linalg.matrix_transpose(elapsed)
    length = size_of(elapsed, -2)
    visible = tf.linalg.band_part(tf.ones((length, length), "bool"), -1, 0)
    if both_ways:
        # No absolute value, which has no gradient where nothing fades.
        return tf.exp(tf.where(visible, -decay, decay))
    return tf.where(visible, tf.exp(-tf.where(visible, decay, 0.0)), 0.0)


def _sees(keep, maximum, repeats):
    """Which rows see a key, themselves or in the past; `None` for all."""
    if keep is None:
        return None
    # By the first visible key: XLA sums a running sum anew at every position.
    first = tf.argmax(tf.cast(keep, tf.int32), axis=2, output_type=tf.int32)
    places = tf.expand_dims(tf.range(size_of(keep, 2)), -1)
    seen = places >= tf.expand_dims(first, -1)
    seen &= tf.reduce_any(keep, axis=2, keepdims=True)
    return repeat_rows(seen | _is_any(maximum), repeats, axis=2)


def _is_any(maximum):
    """Whether a state has seen a key: `(batch, heads, 1, 1)`."""
    seen = tf.reduce_max(maximum, axis=-1) > 0.5 * scaling.FLOOR
    return seen[..., tf.newaxis, tf.newaxis]
