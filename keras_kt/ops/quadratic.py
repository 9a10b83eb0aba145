"""The same estimate with the attention matrix formed; takes any mask."""

import tensorflow as tf

from keras_kt.numerics import precise_product
from keras_kt.ops import visible_tokens
from keras_kt.ops.block_grid import size_of, swap_heads, walk
from keras_kt.ops.scaling import (
    FLOOR,
    exp_key,
    exp_query,
    guarded,
    is_exact,
    key_features,
    maximum_of,
    query_features,
    row_maximum,
    safe_ratio,
    visible_decay,
)
from keras_kt.written_gradients import written_gradient


def quadratic(
    query,
    key,
    value,
    feature_map,
    *,
    key_mask=None,
    attention_mask=None,
    use_causal_mask=False,
    decay=None,
    kernel=None,
    window=0,
):
    """The same estimate with the attention matrix formed; takes any mask.

    O(query_length · key_length) time and memory.

    Args:
        query, key, value, feature_map, key_mask: as in `bidirectional`.
        attention_mask: boolean, broadcast to
            `(batch, heads, query_length, key_length)`; or `None`.
        use_causal_mask: whether query t sees keys 0 … t only.
        decay: `(batch, key_length, heads, 1)` as in `causal`; a key after the
            query fades by the decay of the tokens from there to itself.
        kernel, window: as in `distance.near_field`, or `None`.

    Returns:
        Outputs as in `bidirectional`, and the attention weights
        `(batch, heads, query_length, key_length)`.
    """
    query, key, value = (
        tf.transpose(x, (0, 2, 1, 3)) for x in (query, key, value)
    )
    visible = tf.ones((size_of(query, 2), size_of(key, 2)), "bool")
    visible = visible[tf.newaxis, tf.newaxis]
    keep = None
    if use_causal_mask:
        visible = tf.linalg.band_part(visible, -1, 0)
    if attention_mask is not None:
        visible = tf.logical_and(visible, tf.cast(attention_mask, "bool"))
    if key_mask is not None:
        seen = tf.cast(key_mask, "bool")[:, tf.newaxis, tf.newaxis]
        visible = tf.logical_and(visible, seen)
        keep = tf.linalg.matrix_transpose(seen)
        value = tf.where(keep, value, 0.0)
    log_fading, near = 0.0, None
    if decay is not None:
        decay = swap_heads(visible_decay(decay, key_mask))
        log_fading = _log_fading(decay, size_of(query, 2))
    if kernel is not None:
        near = _near(query, key, key_mask, window)
        kept_key = key if keep is None else tf.where(keep, key, 0.0)
        exact = _exact_logits(kernel, query, kept_key) + log_fading
        # The kernel leaves out the same factor of each query.
        log_query = query_features(feature_map, query)
    else:
        log_query = feature_map(query)
    log_key = key_features(feature_map, key, keep)
    query, key = log_query, log_key
    if feature_map.positive:
        maximum = maximum_of(log_key)
        query = exp_query(log_query, maximum)
        key = exp_key(log_key, maximum)
    scores = tf.matmul(query, key, transpose_b=True)
    if decay is not None:
        scores *= tf.exp(log_fading)
    if near is not None:
        # One scale for both, the larger of theirs.
        scale = row_maximum(log_query + maximum[..., tf.newaxis, :])
        exact = tf.where(near & visible, exact, FLOOR)
        top = tf.maximum(scale, row_maximum(exact))
        scores = tf.where(
            near, tf.exp(exact - top), scores * tf.exp(scale - top)
        )
    scores = tf.where(visible, scores, 0.0)
    total = tf.reduce_sum(scores, axis=-1, keepdims=True)
    if feature_map.positive:
        sees = tf.reduce_any(visible, axis=-1, keepdims=True)

        def exact_weights():
            logits = _pairwise_logits(log_query, log_key) + log_fading
            if near is not None:
                logits = tf.where(near, exact, logits)
            return _exact_weights(logits, visible, scores)

        weights = tf.cond(
            is_exact(total, sees),
            lambda: safe_ratio(scores, total),
            exact_weights,
        )
    else:
        shares = tf.where(visible, tf.exp(log_fading), 0.0)
        count = tf.reduce_sum(shares, -1, keepdims=True)
        weights = scores / guarded(total, count)
    output = tf.matmul(weights, value)
    return tf.transpose(output, (0, 2, 1, 3)), weights


def _near(query, key, key_mask, window):
    """Which `(batch, 1, t, s)` are less than `window` visible keys apart."""
    queries, keys = size_of(query, 2), size_of(key, 2)
    if key_mask is None:
        counts = tf.range(keys)[tf.newaxis]
    else:
        counts = visible_tokens.running_count(key_mask)
    of_query = tf.gather(
        counts, tf.minimum(tf.range(queries), keys - 1), axis=1
    )
    distance = of_query[..., tf.newaxis] - counts[:, tf.newaxis]
    return (tf.abs(distance) < window)[:, tf.newaxis]


def _exact_logits(kernel, query, key):
    """Logarithms of an `ExactKernel`, `(batch, heads, t, s)`."""
    query = tf.einsum("bhtcd->bhctd", kernel.queries(query))
    key = tf.einsum("bhscd->bhcds", kernel.keys(key))
    return tf.reduce_logsumexp(precise_product(query, key), axis=2)


def _log_fading(decay, query_length):
    """`(batch, heads, t, s)`: minus the decay between query t and key s."""
    # One running sum here, so in float64.
    elapsed = tf.cumsum(tf.cast(decay, tf.float64), axis=2)
    elapsed = tf.pad(elapsed, [(0, 0), (0, 0), (1, 0), (0, 0)])
    keys, queries = tf.range(size_of(decay, 2)), tf.range(query_length)
    last = tf.minimum(queries + 1, size_of(decay, 2))
    difference = tf.gather(elapsed, last, axis=2)
    difference -= tf.linalg.matrix_transpose(elapsed[:, :, 1:])
    is_past = queries[:, tf.newaxis] >= keys
    difference = tf.where(is_past, -difference, difference)
    return tf.cast(difference, tf.float32)


def _exact_weights(logits, visible, scores):
    """Attention weights of the shape of scores, from logits of any range."""
    logits = tf.where(visible, logits, FLOOR)
    logits -= row_maximum(logits)
    weights = tf.where(visible, tf.exp(logits), 0.0)
    weights = safe_ratio(weights, tf.reduce_sum(weights, -1, keepdims=True))
    return tf.ensure_shape(weights, scores.shape)


@written_gradient
def _pairwise_logits(query, key):
    """log Σ_f exp(query_tf + key_sf), one feature at a time."""
    features = (
        tf.transpose(query, (3, 0, 1, 2))[..., tf.newaxis],
        tf.transpose(key, (3, 0, 1, 2))[..., tf.newaxis, :],
    )
    sizes = query.shape[-1], 1
    zeros = tf.zeros_like(features[0][0] + features[1][0])

    def accumulate(index, _, carry):
        pair = features[0][index] + features[1][index]
        scale = tf.maximum(carry[0], pair)
        total = carry[1] * tf.exp(carry[0] - scale) + tf.exp(pair - scale)
        return (), (), (scale, total)

    start = zeros + FLOOR, zeros
    _, _, (scale, total) = walk(accumulate, sizes, start)
    logits = scale + tf.math.log(total)

    def gradient(upstream):
        def one(index, *_):
            pair = features[0][index] + features[1][index]
            share = upstream * tf.exp(pair - logits)
            sums = tf.reduce_sum(share, -1), tf.reduce_sum(share, -2)
            return sums, (), ()

        (of_query, of_key), _, _ = walk(one, sizes, (), results=2)
        back = (1, 2, 3, 0)
        return tf.transpose(of_query, back), tf.transpose(of_key, back)

    return logits, gradient
