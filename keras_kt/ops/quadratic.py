"""The same estimate with the attention matrix formed; takes any mask.

O(query_length · key_length) time and memory.
"""

import tensorflow as tf

from keras_kt.ops import heads, logits, scaling, visible_tokens
from keras_kt.ops.heads import size_of, swap_heads
from keras_kt.ops.scaling import FLOOR


def attend(
    query,
    key,
    value,
    feature_map,
    *,
    causal=False,
    key_mask=None,
    attention_mask=None,
    decay=None,
    near=None,
):
    """As `ops.attend_with_matrix`, with a decay of zero where masked."""
    repeats = query.shape[2] // key.shape[2]
    if repeats > 1:
        attention_mask = _mask_to_batch(
            attention_mask, size_of(query, 0), repeats
        )
        query = heads.to_batch(query, repeats)
        key, value, key_mask, decay = (
            None if x is None else tf.repeat(x, repeats, axis=0)
            for x in (key, value, key_mask, decay)
        )
    query, key, value = map(swap_heads, (query, key, value))
    keep = None
    if key_mask is not None:
        keep = tf.cast(key_mask, "bool")[:, tf.newaxis, :, tf.newaxis]
        value = tf.where(keep, value, 0.0)
    lengths = size_of(query, 2), size_of(key, 2)
    visible = _visible(lengths, causal, keep, attention_mask)
    log_fading = 0.0
    if decay is not None:
        decay = swap_heads(decay)
        log_fading = _log_fading(decay, lengths[0])
    exact = is_near = None
    if near is not None:
        is_near = visible_tokens.within(lengths, key_mask, near.window)
        if not near.has_far:
            visible &= is_near
    if near is not None and near.kernel is not None:
        kept_key = key if keep is None else tf.where(keep, key, 0.0)
        exact = logits.of_kernel(
            near.kernel.queries(query), near.kernel.keys(kept_key)
        )
        exact += log_fading
        exact = tf.where(is_near & visible, exact, FLOOR)
    # The kernel of a near field leaves out the same factor of each query.
    features = (
        feature_map.queries(query),
        scaling.key_features(feature_map, key, keep),
    )
    if exact is not None and not near.has_far:
        weights = _softmax(exact, visible)
    elif feature_map.positive:
        weights = _weights(*features, visible, log_fading, is_near, exact)
    else:
        weights = _signed_weights(*features, visible, log_fading)
    output = swap_heads(tf.matmul(weights, value))
    if repeats > 1:
        output = heads.from_batch(output, repeats)
        weights = swap_heads(heads.from_batch(swap_heads(weights), repeats))
    return output, weights


def _visible(lengths, causal, keep, attention_mask):
    """Which `(batch, heads, t, s)` are seen."""
    visible = tf.ones(lengths, "bool")[tf.newaxis, tf.newaxis]
    if causal:
        visible = tf.linalg.band_part(visible, -1, 0)
    if attention_mask is not None:
        visible &= tf.cast(attention_mask, "bool")
    if keep is not None:
        visible &= tf.linalg.matrix_transpose(keep)
    return visible


def _weights(log_query, log_key, visible, log_fading, is_near, exact):
    """Attention weights of positive features, `(batch, heads, t, s)`."""
    maximum = scaling.maximum_of(log_key)
    query, scale = scaling.exp_query(log_query, maximum)
    key = scaling.exp_key(log_key, maximum)
    scores = tf.matmul(query, key, transpose_b=True) * tf.exp(log_fading)
    if exact is not None:
        # One scale for both, the larger of theirs.
        top = tf.maximum(scale, scaling.row_maximum(exact))
        scores *= tf.exp(scale - top)
        scores = tf.where(is_near, tf.exp(exact - top), scores)
    scores = tf.where(visible, scores, 0.0)
    total = tf.reduce_sum(scores, axis=-1, keepdims=True)

    def pair_by_pair():
        pairs = logits.of_features(log_query, log_key) + log_fading
        if exact is not None:
            pairs = tf.where(is_near, exact, pairs)
        pairs = tf.where(visible, pairs, FLOOR)
        return tf.ensure_shape(_softmax(pairs, visible), scores.shape)

    return tf.cond(
        scaling.is_exact(total, tf.reduce_any(visible, -1, keepdims=True)),
        lambda: scaling.safe_ratio(scores, total),
        pair_by_pair,
    )


def _softmax(pairs, visible):
    """Of logits, those of pairs that are not seen at the floor."""
    weights = tf.exp(pairs - scaling.row_maximum(pairs))
    weights = tf.where(visible, weights, 0.0)
    total = tf.reduce_sum(weights, axis=-1, keepdims=True)
    return scaling.safe_ratio(weights, total)


def _signed_weights(query, key, visible, log_fading):
    """Attention weights of signed features, `(batch, heads, t, s)`."""
    shares = tf.where(visible, tf.exp(log_fading), 0.0)
    scores = tf.matmul(query, key, transpose_b=True) * shares
    total = tf.reduce_sum(scores, axis=-1, keepdims=True)
    count = tf.reduce_sum(shares, axis=-1, keepdims=True)
    return tf.math.divide_no_nan(scores, scaling.guarded(total, count))


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


def _mask_to_batch(mask, batch, repeats):
    """A dense mask of query heads, for heads that went to the batch."""
    if mask is None:
        return None
    sizes = (size_of(mask, axis) for axis in (1, 2, 3))
    mask = tf.broadcast_to(tf.cast(mask, "bool"), (batch, *sizes))
    if mask.shape[1] == 1:
        return tf.repeat(mask, repeats, axis=0)
    return swap_heads(heads.to_batch(swap_heads(mask), repeats))
