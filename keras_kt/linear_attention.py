"""Linear attention: features and values in, heads' outputs out.

    out_t = φ(q_t)·Σ_s φ(k_s) v_sᵀ / φ(q_t)·Σ_s φ(k_s)

in four forms with one contract: `bidirectional`, `causal` (chunked), `step` (one
or more new tokens on a state) and `quadratic` (the same estimate as an explicit
matrix). Tensors are `(batch, heads, length, dim)`, float32; `feature_map` maps a
query or key to features (log-features where `feature_map.positive`).

Positive features are exponentiated relative to the maximum of each feature over
the keys and the maximum of each query over its features. Both cancel in the
ratio, all exponents are ≤ 0, and some feature of some key reaches 1, so the
normaliser is at least one in the bidirectional form and needs no epsilon. Where
a mask hides the key that set the maximum the normaliser can be small; it is
its own certificate: as long as it stays above e⁻⁶⁰ nothing was lost to
underflow, and below that an exact, slower form takes over at run time.

Values carry a column of ones, so that one product gives numerator and
normaliser. Masked keys have a zero row there, which removes them from both.
"""

import math
from typing import NamedTuple

import tensorflow as tf

# Stands for log 0; finite, since ∞ − ∞ hides in fully padded prefixes.
FLOOR = -1e30
_UNDERFLOW = math.exp(-60.0)
# Signed normalisers are kept away from zero by this share of the key count.
_SIGNED_LIMIT = 1e-2
CHUNK_SIZE = 64


class AttentionState(NamedTuple):
    """All that causal attention remembers of the past; its size is fixed.

    Attributes:
        maximum: `(batch, heads, feature_dim)`, running maximum of each
            log-feature (unused for signed features).
        sums: `(batch, heads, feature_dim, value_dim + 1)`, Σ φ(k) vᵀ relative
            to `maximum`, and Σ φ(k) in the last column.
        count: `(batch,)`, keys seen so far.
    """

    maximum: tf.Tensor
    sums: tf.Tensor
    count: tf.Tensor


def initial_state(
    batch_size, num_heads: int, feature_dim: int, value_dim: int
) -> AttentionState:
    """The state that has seen nothing."""
    return AttentionState(
        tf.fill((batch_size, num_heads, feature_dim), FLOOR),
        tf.zeros((batch_size, num_heads, feature_dim, value_dim + 1)),
        tf.zeros((batch_size,)),
    )


def bidirectional(query, key, value, feature_map, *, key_mask=None):
    """Every query sees every key.

    O(length · feature_dim · value_dim) time, O(length · feature_dim) memory.

    Args:
        query: `(batch, heads, query_length, head_dim)`.
        key: `(batch, heads, key_length, head_dim)`.
        value: `(batch, heads, key_length, value_dim)`.
        feature_map: a bound feature map.
        key_mask: `(batch, key_length)` boolean, True keeps; or `None`.

    Returns:
        `(batch, heads, query_length, value_dim)`; zeros where no key is seen.
    """
    query, key, value = _featurise(query, key, value, feature_map, key_mask)
    if feature_map.positive:
        query, key, _ = _exponentiate(query, key)
    sums = tf.matmul(query, tf.matmul(key, value, transpose_a=True))
    count = None
    if not feature_map.positive:
        count = _count(key, key_mask)[:, tf.newaxis, tf.newaxis, tf.newaxis]
    return _divide(sums, count)


def causal(
    query,
    key,
    value,
    feature_map,
    *,
    key_mask=None,
    state=None,
    chunk_size=CHUNK_SIZE,
):
    """Query t sees keys 0 … t, and those that `state` has seen.

    Chunks of `chunk_size` tokens attend within themselves by an explicit
    matrix and to earlier chunks through their sums. O(length · feature_dim ·
    value_dim) time, one chunk's sums and scores a chunk in memory. Exact at any
    range of the features: no future key touches the past.

    Args:
        query, key, value, feature_map, key_mask: as in `bidirectional`, of
            equal length.
        state: `AttentionState` to resume from; `None` starts anew.
        chunk_size: a power of two.

    Returns:
        `(batch, heads, length, value_dim)` and the `AttentionState` after the
        last token.
    """
    positive = feature_map.positive
    length = _size(query, 2)
    batch = _size(query, 0)
    chunk_size = _fitting_chunk(query.shape[2], chunk_size)
    query, key, value, key_mask = _pad(query, key, value, key_mask, chunk_size)
    query, key, value = _featurise(query, key, value, feature_map, key_mask)
    if state is None:
        state = initial_state(
            batch, key.shape[1], key.shape[3], value.shape[3] - 1
        )
    log_query, log_key = query, key
    maximum, past = state.maximum, state.sums
    if positive:
        query, key, maximum = _exponentiate(query, key, state.maximum)
        past *= tf.exp(state.maximum - maximum)[..., tf.newaxis]
    chunked_value = _chunk(value, chunk_size)
    chunked_key, chunked_query = _chunk(key, chunk_size), _chunk(query, chunk_size)
    chunk_sums = tf.matmul(chunked_key, chunked_value, transpose_a=True)
    before = tf.cumsum(chunk_sums, axis=2, exclusive=True)
    before += past[:, :, tf.newaxis]
    scores = tf.matmul(chunked_query, chunked_key, transpose_b=True)
    scores = tf.linalg.band_part(scores, -1, 0)
    sums = tf.matmul(chunked_query, before) + tf.matmul(scores, chunked_value)
    sums = _unchunk(sums)
    count = None
    if positive:
        sees = _sees_a_key(key_mask, state.count, _size(sums, 2))
        sums = tf.cond(
            _is_exact(sums, sees),
            lambda: sums,
            lambda: _strict_causal(log_query, log_key, value, state, chunk_size),
        )
    else:
        count = _running_count(key_mask, state.count, _size(sums, 2), chunk_size)
        count = count[:, tf.newaxis, :, tf.newaxis]
    new_state = AttentionState(
        maximum,
        past + tf.reduce_sum(chunk_sums, axis=2),
        state.count + _count(value, key_mask),
    )
    if key_mask is None:
        return _divide(sums, count), new_state
    return _divide(sums, count)[:, :, :length], new_state


def step(query, key, value, feature_map, state, *, key_mask=None):
    """One or more new tokens on a state: prefill, resume and decode.

    Args:
        query, key, value, feature_map, key_mask: as in `causal`; the new
            tokens only.
        state: `AttentionState` of the tokens before.

    Returns:
        Outputs of the new tokens and the state after them, equal to what
        `causal` gives for the whole sequence. One token costs
        O(feature_dim · value_dim), wherever it stands.
    """
    if query.shape[2] != 1:
        return causal(
            query, key, value, feature_map, key_mask=key_mask, state=state
        )
    query, key, value = _featurise(query, key, value, feature_map, key_mask)
    maximum, sums = state.maximum, state.sums
    if feature_map.positive:
        query, key, maximum = _exponentiate(query, key, state.maximum)
        sums *= tf.exp(state.maximum - maximum)[..., tf.newaxis]
    sums += tf.matmul(key, value, transpose_a=True)
    count = state.count + _count(value, key_mask)
    state = AttentionState(maximum, sums, count)
    if feature_map.positive:
        count = None
    else:
        count = count[:, tf.newaxis, tf.newaxis, tf.newaxis]
    return _divide(tf.matmul(query, sums), count), state


def quadratic(
    query,
    key,
    value,
    feature_map,
    *,
    key_mask=None,
    attention_mask=None,
    use_causal_mask=False,
):
    """The same estimate with the attention matrix formed; takes any mask.

    O(query_length · key_length) time and memory.

    Args:
        query, key, value, feature_map, key_mask: as in `bidirectional`.
        attention_mask: boolean, broadcast to
            `(batch, heads, query_length, key_length)`; or `None`.
        use_causal_mask: whether query t sees keys 0 … t only.

    Returns:
        Outputs as in `bidirectional`, and the attention weights
        `(batch, heads, query_length, key_length)`.
    """
    positive = feature_map.positive
    plain_value = value
    query, key, value = _featurise(query, key, value, feature_map, key_mask)
    log_query, log_key = query, key
    if positive:
        query, key, _ = _exponentiate(query, key)
    scores = tf.matmul(query, key, transpose_b=True)
    visible = tf.ones(tf.shape(scores)[2:], "bool")[tf.newaxis, tf.newaxis]
    if use_causal_mask:
        visible = tf.linalg.band_part(visible, -1, 0)
    if attention_mask is not None:
        visible = tf.logical_and(visible, tf.cast(attention_mask, "bool"))
    if key_mask is not None:
        seen = tf.cast(key_mask, "bool")[:, tf.newaxis, tf.newaxis]
        visible = tf.logical_and(visible, seen)
    scores = tf.where(visible, scores, 0.0)
    total = tf.reduce_sum(scores, axis=-1, keepdims=True)
    if positive:
        sees = tf.reduce_any(visible, axis=-1, keepdims=True)
        weights = tf.cond(
            _is_exact(total, sees),
            lambda: _safe_ratio(scores, total),
            lambda: _exact_weights(log_query, log_key, visible, scores),
        )
    else:
        count = tf.reduce_sum(tf.cast(visible, "float32"), -1, keepdims=True)
        weights = _signed_ratio(scores, total, count)
    if key_mask is not None:
        plain_value = value[..., :-1]
    return tf.matmul(weights, plain_value), weights


def _featurise(query, key, value, feature_map, key_mask):
    """Features of queries and keys; values with their column of ones."""
    query, key = feature_map(query), feature_map(key)
    value = tf.concat([value, tf.ones_like(value[..., :1])], axis=-1)
    if key_mask is not None:
        keep = tf.cast(key_mask, "bool")[:, tf.newaxis, :, tf.newaxis]
        # Selected, not multiplied: a padded row may hold anything, NaN too.
        key = tf.where(keep, key, FLOOR if feature_map.positive else 0.0)
        value = tf.where(keep, value, 0.0)
    return query, key, value


def _exponentiate(query, key, past_maximum=None):
    """exp of log-features, scaled per feature and per query.

    Returns features ≤ 1 and the per-feature maximum
    `(batch, heads, feature_dim)`.
    """
    maximum = tf.reduce_max(key, axis=2)
    if past_maximum is not None:
        maximum = tf.maximum(maximum, past_maximum)
    # The scales cancel in the ratio, so the gradient may treat them as
    # constants and is exact.
    maximum = tf.stop_gradient(maximum)
    shift = maximum[:, :, tf.newaxis]
    query += shift
    query -= tf.stop_gradient(tf.reduce_max(query, axis=-1, keepdims=True))
    return tf.exp(query), tf.exp(key - shift), maximum


def _divide(sums, count=None):
    """Numerator over normaliser; `count` marks signed features."""
    numerator, normalizer = sums[..., :-1], sums[..., -1:]
    if count is None:
        return _safe_ratio(numerator, normalizer)
    return _signed_ratio(numerator, normalizer, count)


def _safe_ratio(numerator, normalizer):
    visible = normalizer > 0.0
    ratio = numerator / tf.where(visible, normalizer, 1.0)
    return tf.where(visible, ratio, 0.0)


def _signed_ratio(numerator, normalizer, count):
    visible = count > 0.0
    limit = _SIGNED_LIMIT * tf.where(visible, count, 1.0)
    magnitude = tf.maximum(tf.abs(normalizer), limit)
    ratio = numerator / tf.where(normalizer < 0.0, -magnitude, magnitude)
    return tf.where(visible, ratio, 0.0)


def _is_exact(sums, sees):
    """Whether no row that sees a key came near underflow."""
    normalizer = tf.stop_gradient(sums[..., -1:])
    return tf.reduce_all((normalizer > _UNDERFLOW) | tf.logical_not(sees))


def _strict_causal(query, key, value, state, chunk_size):
    """`causal` for log-features of any range: sums relative to each row.

    Within a chunk, halves attend to the halves before them, down to single
    tokens, so that every reference is a maximum over visible keys only.
    """
    query, key = _chunk(query, chunk_size), _chunk(key, chunk_size)
    value = _chunk(value, chunk_size)
    maxima = tf.stop_gradient(tf.reduce_max(key, axis=3))
    chunk_sums = tf.matmul(
        tf.exp(key - maxima[:, :, :, tf.newaxis]), value, transpose_a=True
    )
    before = _running_sums(maxima, chunk_sums, state)
    shifted = query + before.maximum[:, :, :, tf.newaxis]
    past_scale = tf.stop_gradient(tf.reduce_max(shifted, -1, keepdims=True))
    past = tf.matmul(tf.exp(shifted - past_scale), before.sums)
    sums, scale = _halving(query, key, value)
    return _unchunk(_merge(sums, scale, past, past_scale)[0])


def _running_sums(maxima, chunk_sums, state):
    """State before each chunk, chunks on axis 2."""

    def advance(carry, chunk):
        maximum = tf.maximum(carry[0], chunk[0])
        sums = (
            carry[1] * tf.exp(carry[0] - maximum)[..., tf.newaxis]
            + chunk[1] * tf.exp(chunk[0] - maximum)[..., tf.newaxis]
        )
        return maximum, sums

    first = (tf.stop_gradient(state.maximum), state.sums)
    chunks = (
        tf.transpose(maxima, (2, 0, 1, 3)),
        tf.transpose(chunk_sums, (2, 0, 1, 3, 4)),
    )
    after = tf.scan(advance, chunks, first)
    maximum, sums = (
        tf.concat([a[tf.newaxis], b[:-1]], axis=0)
        for a, b in zip(first, after, strict=True)
    )
    return AttentionState(
        tf.transpose(maximum, (1, 2, 0, 3)),
        tf.transpose(sums, (1, 2, 0, 3, 4)),
        state.count,
    )


def _halving(query, key, value):
    """Causal sums within the second-last axis, with each row's log-scale."""
    pair = query + key
    scale = tf.stop_gradient(tf.reduce_max(pair, axis=-1, keepdims=True))
    own = tf.reduce_sum(tf.exp(pair - scale), axis=-1, keepdims=True)
    sums = own * value
    length, half = query.shape[-2], 1
    while half < length:
        _, late_query = _halves(query, half)
        early_key, _ = _halves(key, half)
        early_value, _ = _halves(value, half)
        maximum = tf.reduce_max(early_key, axis=-2, keepdims=True)
        maximum = tf.stop_gradient(maximum)
        late_query += maximum
        late_scale = tf.stop_gradient(
            tf.reduce_max(late_query, axis=-1, keepdims=True)
        )
        scores = tf.matmul(
            tf.exp(late_query - late_scale),
            tf.exp(early_key - maximum),
            transpose_b=True,
        )
        late = tf.matmul(scores, early_value)
        late = _join(tf.zeros_like(late), late, sums)
        late_scale = _join(tf.fill(tf.shape(late_scale), FLOOR), late_scale, scale)
        sums, scale = _merge(sums, scale, late, late_scale)
        half *= 2
    return sums, scale


def _halves(x, half):
    """Blocks of 2·half tokens, split: two `(…, blocks, half, dim)`."""
    shape = tf.concat([tf.shape(x)[:-2], (-1, 2, half, x.shape[-1])], axis=0)
    x = tf.reshape(x, shape)
    return x[..., 0, :, :], x[..., 1, :, :]


def _join(early, late, like):
    return tf.reshape(tf.stack([early, late], axis=-3), tf.shape(like))


def _merge(sums, scale, other_sums, other_scale):
    joint = tf.maximum(scale, other_scale)
    sums = sums * tf.exp(scale - joint) + other_sums * tf.exp(
        other_scale - joint
    )
    return sums, joint


def _exact_weights(query, key, visible, scores):
    """Attention weights from logits formed pair by pair, at any range."""
    logits = tf.where(visible, _pairwise_logits(query, key), FLOOR)
    logits -= tf.stop_gradient(tf.reduce_max(logits, axis=-1, keepdims=True))
    weights = tf.where(visible, tf.exp(logits), 0.0)
    weights = _safe_ratio(weights, tf.reduce_sum(weights, -1, keepdims=True))
    return tf.ensure_shape(weights, scores.shape)


@tf.custom_gradient
def _pairwise_logits(query, key):
    """log Σ_f exp(query_tf + key_sf), one feature at a time."""
    features = (
        tf.transpose(query, (3, 0, 1, 2))[..., tf.newaxis],
        tf.transpose(key, (3, 0, 1, 2))[..., tf.newaxis, :],
    )

    def accumulate(carry, feature):
        pair = feature[0] + feature[1]
        scale = tf.maximum(carry[0], pair)
        total = carry[1] * tf.exp(carry[0] - scale) + tf.exp(pair - scale)
        return scale, total

    zeros = tf.zeros_like(features[0][0] + features[1][0])
    scale, total = tf.foldl(accumulate, features, (zeros + FLOOR, zeros))
    logits = scale + tf.math.log(total)

    def gradient(upstream):
        def one(feature):
            share = upstream * tf.exp(feature[0] + feature[1] - logits)
            return tf.reduce_sum(share, axis=-1), tf.reduce_sum(share, axis=-2)

        of_query, of_key = tf.map_fn(
            one, features, fn_output_signature=(tf.float32, tf.float32)
        )
        back = (1, 2, 3, 0)
        return tf.transpose(of_query, back), tf.transpose(of_key, back)

    return logits, gradient


def _size(x, axis):
    static = x.shape[axis]
    return tf.shape(x)[axis] if static is None else static


def _fitting_chunk(length, chunk_size):
    if length is None or length >= chunk_size:
        return chunk_size
    return 1 << max(0, length - 1).bit_length()


def _pad(query, key, value, key_mask, chunk_size):
    """Pads to whole chunks; what is padded is masked."""
    length = _size(query, 2)
    if isinstance(length, int) and length % chunk_size == 0 and length:
        return query, key, value, key_mask
    if isinstance(length, int):
        extra = -length % chunk_size or (0 if length else chunk_size)
    else:
        # At least one chunk, so that an empty sequence has a shape too.
        chunks = tf.maximum(-(-length // chunk_size), 1)
        extra = chunks * chunk_size - length
    if key_mask is None:
        key_mask = tf.ones((_size(query, 0), length), "bool")
    key_mask = tf.pad(tf.cast(key_mask, "bool"), ((0, 0), (0, extra)))
    padding = ((0, 0), (0, 0), (0, extra), (0, 0))
    query, key, value = (tf.pad(x, padding) for x in (query, key, value))
    return query, key, value, key_mask


def _chunk(x, chunk_size):
    shape = (_size(x, 0), x.shape[1], -1, chunk_size, x.shape[3])
    return tf.reshape(x, shape)


def _unchunk(x):
    return tf.reshape(x, (_size(x, 0), x.shape[1], -1, x.shape[4]))


def _count(key, key_mask):
    """Visible keys, `(batch,)`."""
    if key_mask is None:
        return tf.fill((_size(key, 0),), tf.cast(_size(key, 2), tf.float32))
    return tf.reduce_sum(tf.cast(key_mask, tf.float32), axis=1)


def _running_count(key_mask, past, length, chunk_size):
    """Visible keys up to each position, `(batch, length)`."""
    if key_mask is None:
        positions = tf.range(1, length + 1)
        return past[:, tf.newaxis] + tf.cast(positions, tf.float32)
    ones = tf.reshape(
        tf.cast(key_mask, tf.float32), (_size(key_mask, 0), -1, chunk_size)
    )
    before = tf.cumsum(tf.reduce_sum(ones, -1), axis=1, exclusive=True)
    triangle = tf.linalg.band_part(tf.ones((chunk_size, chunk_size)), 0, -1)
    inside = tf.einsum("bns,st->bnt", ones, triangle)
    counts = inside + (before + past[:, tf.newaxis])[..., tf.newaxis]
    return tf.reshape(counts, (_size(key_mask, 0), -1))


def _sees_a_key(key_mask, past, length):
    """Which rows see a key under causality, `(batch, 1, length, 1)`."""
    if key_mask is None:
        return tf.ones((1, 1, 1, 1), "bool")
    # The index of the first visible key: no running sum over the length.
    keep = tf.cast(key_mask, tf.int32)
    first = tf.argmax(keep, axis=1, output_type=tf.int32)
    late = tf.range(length)[tf.newaxis] >= first[:, tf.newaxis]
    sees = (late & tf.reduce_any(keep > 0, 1, keepdims=True)) | (
        past[:, tf.newaxis] > 0
    )
    return sees[:, tf.newaxis, :, tf.newaxis]
