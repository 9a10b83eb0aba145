"""The same estimate with the attention matrix formed; takes any mask.

O(query_length · key_length) time and memory.
"""

import tensorflow as tf

from keras_kt.ops import heads, logits, scaling, visible_tokens
from keras_kt.ops.heads import size_of, swap_heads
from keras_kt.ops.scaling import FLOOR
from keras_kt.written_gradients import unless


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
    needs_weights=True,
):
    """As `ops.attend_with_matrix`, with a decay of zero where masked.

    Args:
        needs_weights: whether weights are wanted; else they are `None`.
    """
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
    lengths = size_of(query, 2), size_of(key, 2)
    visible = _visible(lengths, causal, keep, attention_mask)
    log_fading = None
    if decay is not None:
        decay = swap_heads(decay)
        log_fading = _log_fading(decay, lengths[0])
    exact = is_near = None
    if near is not None:
        is_near = visible_tokens.within(lengths, key_mask, near.window)
        if not near.has_far:
            visible = _both(visible, is_near)
    if near is not None and near.kernel is not None:
        kept_key = key if keep is None else tf.where(keep, key, 0.0)
        exact = logits.of_kernel(
            near.kernel.queries(query), near.kernel.keys(kept_key)
        )
        exact = _faded(exact, log_fading)
        exact = tf.where(_both(visible, is_near), exact, FLOOR)
    # The kernel of a near field leaves out the same factor of each query.
    features = (
        feature_map.queries(query),
        scaling.key_features(feature_map, key, keep),
    )
    value = scaling.with_ones(value, keep)
    count = None
    if exact is not None and not near.has_far:
        scores = _exponentials(exact, visible)
        sums = tf.matmul(scores, value)
    elif feature_map.positive:
        sums, scores = _by_features(
            *features, value, visible, log_fading, is_near, exact, needs_weights
        )
    else:
        scores, count = _signed_scores(*features, visible, log_fading)
        sums = tf.matmul(scores, value)
    sums = scaling.Sums(sums, count)
    output, normalizer = scaling.divide(sums, not feature_map.positive)
    weights = None
    if needs_weights:
        if not feature_map.positive:
            normalizer = scaling.guarded(normalizer, sums.scale)
        weights = tf.math.divide_no_nan(scores, normalizer)
    output = swap_heads(output)
    if repeats > 1:
        output = heads.from_batch(output, repeats)
    if repeats > 1 and needs_weights:
        weights = swap_heads(heads.from_batch(swap_heads(weights), repeats))
    return output, weights


def _visible(lengths, causal, keep, attention_mask):
    """Which `(batch, heads, t, s)` are seen; `None` if all are."""
    visible = None
    if causal:
        ones = tf.ones(lengths, "bool")[tf.newaxis, tf.newaxis]
        visible = tf.linalg.band_part(ones, -1, 0)
    if attention_mask is not None:
        visible = _both(visible, tf.cast(attention_mask, "bool"))
    if keep is not None:
        visible = _both(visible, tf.linalg.matrix_transpose(keep))
    return visible


def _both(visible, mask):
    return mask if visible is None else visible & mask


def _seen(x, visible, other=0.0):
    """What is seen, and a number elsewhere."""
    return x if visible is None else tf.where(visible, x, other)


def _faded(x, log_fading):
    return x if log_fading is None else x + log_fading


def _by_features(
    log_query, log_key, value, visible, log_fading, is_near, exact, needs_scores
):
    """What positive features read of values, and scores, or `None`."""
    maximum = scaling.maximum_of(log_key)
    query, scale = scaling.exp_query(log_query, maximum)
    key = scaling.exp_key(log_key, maximum)
    scores = tf.matmul(query, key, transpose_b=True)
    if log_fading is not None:
        scores *= tf.exp(log_fading)
    if exact is not None:
        # One scale for both, the larger of theirs.
        top = tf.maximum(scale, scaling.row_maximum(exact))
        scores *= tf.exp(scale - top)
        scores = tf.where(is_near, tf.exp(exact - top), scores)
    scores = _seen(scores, visible)
    sums = tf.matmul(scores, value)
    sees = None
    if visible is not None:
        sees = tf.reduce_any(visible, -1, keepdims=True)

    def pair_by_pair(log_query, log_key, value, *rest):
        rest = list(rest)
        pairs = logits.of_features(log_query, log_key)
        if log_fading is not None:
            pairs += rest.pop(0)
        if exact is not None:
            pairs = tf.where(is_near, rest.pop(0), pairs)
        pairs = _seen(pairs, visible, FLOOR)
        again = _exponentials(pairs, visible)
        both = tf.matmul(again, value), again
        # As many as there are results.
        return [
            tf.ensure_shape(x, y.shape)
            for x, y in zip(both, results, strict=False)
        ]

    results = [sums, scores] if needs_scores else [sums]
    rest = [x for x in (log_fading, exact) if x is not None]
    tensors = [log_query, log_key, value, *rest]
    is_exact = scaling.is_exact(sums, sees)
    sums, *scores = unless(is_exact, results, pair_by_pair, tensors)
    return sums, scores[0] if needs_scores else None


def _exponentials(pairs, visible):
    """Of logits, relative to the largest of each row."""
    return _seen(tf.exp(pairs - scaling.row_maximum(pairs)), visible)


def _signed_scores(query, key, visible, log_fading):
    """Scores of signed features, and the number of keys that rows see."""
    scores = tf.matmul(query, key, transpose_b=True)
    shares = tf.ones_like(scores[:1, :1])
    if log_fading is not None:
        shares = tf.exp(log_fading)
    shares = _seen(shares, visible)
    # Of keys that weigh one; the last feature is a constant.
    count = tf.reduce_sum(
        shares * tf.linalg.matrix_transpose(key[..., -1:]), -1, keepdims=True
    )
    return scores * shares, count / query[..., -1:]


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
