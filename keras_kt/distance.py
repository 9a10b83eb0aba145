"""Weights that depend on the distance: an exact near field, and fading.

Attention to disjoint sets of keys is merged by the logarithms of its
normalisers: keys of a window by their exact kernel, those before it by features
that a decay may fade, and those after by the same in reverse order.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_kt import feature_maps, linear_attention
from keras_kt.block_grid import shares, size_of, swap_heads
from keras_kt.linear_attention import FLOOR, AttentionState
from keras_kt.written_gradients import pullback, written_gradient


class NearFieldState(NamedTuple):
    """`AttentionState` of attention whose near field is exact.

    Attributes:
        maximum, sums, count: of the tokens that have left the window.
        key, value, decay: `(batch, window, heads, dim)`, the last tokens.
        keep: `(batch, window)`, 1 where one of them is seen.
    """

    maximum: tf.Tensor
    sums: tf.Tensor
    count: tf.Tensor
    key: tf.Tensor
    value: tf.Tensor
    decay: tf.Tensor
    keep: tf.Tensor


def initial_near_field_state(
    batch_size,
    num_heads: int,
    feature_dim: int,
    value_dim: int,
    head_dim: int,
    window: int,
) -> NearFieldState:
    """The state that has seen nothing, with a window of tokens."""
    return NearFieldState(
        *linear_attention.initial_state(
            batch_size, num_heads, feature_dim, value_dim
        ),
        *(
            tf.zeros((batch_size, window, num_heads, dim))
            for dim in (head_dim, value_dim, 1)
        ),
        tf.zeros((batch_size, window)),
    )


def near_field(
    query,
    key,
    value,
    feature_map,
    kernel,
    window,
    *,
    key_mask=None,
    decay=None,
    use_causal_mask=False,
    state=None,
):
    """Exact weights of near keys, features beyond, one normaliser.

    For positive features. Time and memory are those of `causal`, twice if not
    causal, and O(length · window) more.

    Args:
        query, key, value, feature_map, key_mask, decay: as in `causal`; a key
            after the query fades as in `quadratic`.
        kernel: an `ExactKernel`, for keys less than `window` tokens away.
        window: number of tokens, the query's own included.
        use_causal_mask: whether query t sees keys 0 … t only.
        state: `NearFieldState` of a causal stream to resume.

    Returns:
        Outputs as in `causal`, and the `NearFieldState` after the last token;
        `None` where attention is not causal.
    """
    tokens = _stream(key, value, decay, key_mask)
    if state is None:
        past = _before(tokens, window)
    else:
        past = state[3:]
        state = AttentionState(*state[:3])
    extended = [tf.concat(x, 1) for x in zip(past, tokens, strict=True)]
    near = _band(query, extended, kernel, window, use_causal_mask)
    far, state = _beyond(query, extended, feature_map, window, state)
    if use_causal_mask:
        length = size_of(query, 1)
        last = (x[:, length:] for x in extended)
        return _merge(near, far), NearFieldState(*state, *last)
    future = _future(query, tokens, feature_map, window)
    return _merge(near, far, future), None


def fading(query, key, value, feature_map, decay, *, key_mask=None):
    """`bidirectional` with a decay, for positive features.

    Args:
        query, key, value, feature_map, key_mask: as in `causal`.
        decay: as in `quadratic`.

    Returns:
        Outputs as in `bidirectional`.
    """
    tokens = _stream(key, value, decay, key_mask)
    past, _ = _beyond(query, tokens, feature_map, 0, None)
    return _merge(past, _future(query, tokens, feature_map, 1))


def _stream(key, value, decay, key_mask):
    """Key, value, decay, and 1 where they are seen, for each token."""
    if decay is None:
        decay = tf.zeros_like(key[..., :1])
    if key_mask is None:
        key_mask = tf.ones(tf.shape(key)[:2], "bool")
    keep = tf.cast(key_mask, tf.float32)
    seen = keep[..., tf.newaxis, tf.newaxis] > 0.0
    key, value, decay = (tf.where(seen, x, 0.0) for x in (key, value, decay))
    return [key, value, decay, keep]


def _before(tokens, count):
    """Tokens that are not there, before the first."""
    return [tf.zeros((size_of(x, 0), count, *x.shape[2:])) for x in tokens]


def _beyond(query, tokens, feature_map, distance, state):
    """Attention to keys at least `distance` tokens before the query.

    Args:
        tokens: as from `_stream`, preceded by `distance` earlier ones.

    Returns:
        Outputs with the logarithms of their normalisers, and the state.
    """
    length = size_of(query, 1)
    *delayed, keep = (x[:, :length] for x in tokens)
    output, log_normalizer, state = linear_attention.causal_walk(
        linear_attention.fading_block,
        [query, *delayed],
        feature_map,
        keep > 0.0,
        state,
    )
    if distance:
        # Keys have faded to where they left the window; this is the rest.
        log_normalizer -= _moving_sum(tokens[2], distance)
    return (output, log_normalizer), state


def _future(query, tokens, feature_map, distance):
    """Attention to keys at least `distance` tokens after the query."""
    key, value, decay, keep = tokens
    # In reverse order a token is reached by the decay of the one after it.
    decay = tf.concat([decay[:, 1:], tf.zeros_like(decay[:, :1])], axis=1)
    tokens = [x[:, ::-1] for x in (key, value, decay, keep)]
    past = _before(tokens, distance)
    tokens = [tf.concat(x, 1) for x in zip(past, tokens, strict=True)]
    part, _ = _beyond(query[:, ::-1], tokens, feature_map, distance, None)
    return [x[:, ::-1] for x in part]


def _band(query, tokens, kernel, window, use_causal_mask):
    """Attention by the exact kernel to keys less than `window` tokens away.

    Args:
        tokens: as from `_stream`, preceded by `window` earlier ones.

    Returns:
        Outputs with the logarithms of their normalisers.
    """
    length = size_of(query, 1)
    chunks = shares(length, window)
    missing = chunks * window - length
    sides = 1 if use_causal_mask else 2

    def split(x, after):
        x = tf.pad(x, [(0, 0), (0, after)] + [(0, 0)] * (x.shape.rank - 2))
        return tf.reshape(x, (size_of(x, 0), -1, window, *x.shape[2:]))

    def around(x):
        """The chunks before, of and, if seen, after each."""
        x = split(x, missing + (sides - 1) * window)
        return tf.concat([x[:, i : i + chunks] for i in range(sides + 1)], 2)

    key, value, decay, keep = tokens
    elapsed = tf.cumsum(split(decay, missing + (sides - 1) * window), axis=2)
    ends = elapsed[:, :, -1:]
    # Relative to the start of the query's chunk.
    relative = [elapsed[:, :chunks] - ends[:, :chunks]]
    relative.append(elapsed[:, 1 : chunks + 1])
    if sides == 2:
        relative.append(elapsed[:, 2:] + ends[:, 1 : chunks + 1])
    key = around(tf.transpose(kernel.keys(swap_heads(key)), (0, 2, 1, 3, 4)))
    query = kernel.queries(swap_heads(query))
    query = split(tf.transpose(query, (0, 2, 1, 3, 4)), missing)
    parts = _recomputed(
        lambda *x: _near_weights(*x, use_causal_mask),
        query,
        key,
        around(value),
        tf.concat(relative, 2),
        around(keep),
    )
    parts = (
        tf.reshape(x, (size_of(x, 0), chunks * window, *x.shape[3:]))
        for x in parts
    )
    return [x[:, :length] for x in parts]


def _near_weights(query, key, value, elapsed, keep, use_causal_mask):
    """`_band` within chunks `(batch, chunk, token, heads, …)`."""
    window = query.shape[2]
    if query.shape[4] > 1:
        logits = feature_maps.precise_product(
            tf.einsum("bnthcd->bnhctd", query),
            tf.einsum("bnshcd->bnhcds", key),
        )
        logits = tf.reduce_logsumexp(logits, axis=3)
    else:
        # LiteRT multiplies up to rank 5.
        logits = feature_maps.precise_product(
            tf.einsum("bnthd->bnhtd", query[:, :, :, :, 0]),
            tf.einsum("bnshd->bnhds", key[:, :, :, :, 0]),
        )
    elapsed = tf.transpose(elapsed, (0, 1, 3, 2, 4))
    of_query = elapsed[:, :, :, window : 2 * window]
    difference = of_query - tf.linalg.matrix_transpose(elapsed)
    positions = tf.range(key.shape[2]) - window
    distance = tf.range(window)[:, tf.newaxis] - positions
    is_past = distance >= 0
    logits -= tf.where(is_past, difference, -difference)
    near = is_past if use_causal_mask else distance > -window
    near &= distance < window
    visible = near & (keep > 0.0)[:, :, tf.newaxis, tf.newaxis]
    logits = tf.where(visible, logits, FLOOR)
    scale = linear_attention.row_maximum(logits)
    weights = tf.where(visible, tf.exp(logits - scale), 0.0)
    normalizer = tf.reduce_sum(weights, axis=-1, keepdims=True)
    weights = linear_attention.safe_ratio(weights, normalizer)
    output = tf.einsum("bnhts,bnshe->bnthe", weights, value)
    log_normalizer = linear_attention.absolute_log(normalizer, scale)
    return output, tf.transpose(log_normalizer, (0, 1, 3, 2, 4))


def _moving_sum(x, count):
    """Sums of the last `count` tokens, where `count` earlier ones lead."""
    length = size_of(x, 1) - count
    missing = shares(length, count) * count - length
    x = tf.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)])
    x = tf.reshape(x, (size_of(x, 0), -1, count, *x.shape[2:]))
    sums = tf.cumsum(x, axis=2)
    # The rest of the chunk before, without subtracting from a total.
    rest = tf.cumsum(x, axis=2, reverse=True, exclusive=True)
    sums = sums[:, 1:] + rest[:, :-1]
    sums = tf.reshape(sums, (size_of(x, 0), length + missing, *x.shape[3:]))
    return sums[:, :length]


def _merge(*parts):
    """Attention to disjoint keys as one: outputs by their normalisers."""
    # Not `add_n`, which sums three parts in an order that changes from call to
    # call: it begins with whichever buffer happens to be free.
    outputs, logarithms = (tf.stack(x) for x in zip(*parts, strict=True))
    weights = tf.nn.softmax(logarithms, axis=0)
    return tf.reduce_sum(outputs * weights, axis=0)


def _recomputed(function, *tensors):
    """`function(*tensors)`, of which only the tensors are kept."""

    @written_gradient
    def call(*tensors):
        def gradient(*upstream):
            return pullback(lambda: function(*tensors), tensors, upstream)

        return function(*tensors), gradient

    return call(*tensors)
