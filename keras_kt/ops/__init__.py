"""Attention algorithms: the third of the three axes, prior × map × algorithm.

Pure functions of heads and bound feature maps. `attend` is the one way in;
`attend_with_matrix` gives the same and the attention weights.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_kt.ops import linear, quadratic, window


class NearField(NamedTuple):
    """Keys that are weighed by a kernel in closed form.

    Attributes:
        kernel: an `ExactKernel`.
        window: for keys less than so many visible tokens from the query.
    """

    kernel: NamedTuple
    window: int


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
    state=None,
):
    """Attention of heads, by the algorithm that the arguments call for.

    O(length · feature_dim · value_dim) time, without `attention_mask`.

    Args:
        query: `(batch, query_length, heads, head_dim)`, float32.
        key: `(batch, key_length, key_value_heads, head_dim)`. Fewer heads than
            those of the query serve as many consecutive ones each.
        value: `(batch, key_length, key_value_heads, value_dim)`.
        feature_map: a bound feature map, of key_value_heads.
        causal: whether query t sees keys 0 … t only, and those that `state` has
            seen; lengths are equal then.
        key_mask: `(batch, key_length)` boolean, True keeps; or `None`.
        attention_mask: boolean, broadcast to
            `(batch, heads, query_length, key_length)`, or `None`. Costs
            O(query_length · key_length) time and memory.
        decay: `(batch, key_length, key_value_heads, 1)`, λ ≥ 0: token u
            multiplies the weights of all keys before it by exp(−λ_u), masked
            tokens by 1; a key after the query fades by the tokens from there
            to itself. Signed features are causal then, or form the matrix.
        near: a `NearField` of positive features, or `None`.
        state: `AttentionState` or `NearFieldState` of a causal stream to
            resume; `None` starts anew.

    Returns:
        `(batch, query_length, heads, value_dim)`, zeros where no key is seen,
        and the state after the last token; `None` where there is none.
    """
    options = {"key_mask": key_mask, "decay": decay}
    if attention_mask is not None:
        output, _ = attend_with_matrix(
            query,
            key,
            value,
            feature_map,
            causal=causal,
            attention_mask=attention_mask,
            near=near,
            **options,
        )
        return output, None
    repeats = query.shape[2] // key.shape[2]
    if repeats > 1:
        grouped = _grouped(repeats, query, key, value, key_mask, decay)
        if state is not None:
            state = tf.nest.map_structure(
                lambda x: tf.repeat(x, repeats, axis=0), state
            )
        *tokens, key_mask, decay = grouped
        output, state = attend(
            *tokens,
            feature_map,
            causal=causal,
            key_mask=key_mask,
            decay=decay,
            near=near,
            state=state,
        )
        if state is not None:
            state = tf.nest.map_structure(lambda x: x[::repeats], state)
        return _ungrouped(repeats, output), state
    tokens = query, key, value, feature_map
    if near is not None:
        return window.near_field(
            *tokens, *near, use_causal_mask=causal, state=state, **options
        )
    if state is not None:
        return linear.step(*tokens, state, **options)
    if causal:
        return linear.causal(*tokens, **options)
    if decay is not None:
        return window.fading(*tokens, decay, key_mask=key_mask), None
    return linear.bidirectional(*tokens, key_mask=key_mask), None


def attend_with_matrix(
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
    """`attend` by the attention matrix: the same estimate, and its weights.

    Args:
        query, key, value, feature_map, causal, key_mask, attention_mask, decay,
            near: as in `attend`; lengths may differ.

    Returns:
        Outputs as in `attend`, and the attention weights
        `(batch, heads, query_length, key_length)`.
    """
    repeats = query.shape[2] // key.shape[2]
    query, key, value, key_mask, decay = _grouped(
        repeats, query, key, value, key_mask, decay
    )
    if repeats > 1 and attention_mask is not None:
        batch = tf.shape(query)[0] // repeats
        attention_mask = _grouped_mask(
            repeats, attention_mask, batch, key.shape[2]
        )
    kernel, size = near or (None, 0)
    output, weights = quadratic.quadratic(
        query,
        key,
        value,
        feature_map,
        key_mask=key_mask,
        attention_mask=attention_mask,
        use_causal_mask=causal,
        decay=decay,
        kernel=kernel,
        window=size,
    )
    if repeats > 1:
        weights = tf.transpose(weights, (0, 2, 1, 3))
        weights = tf.transpose(_ungrouped(repeats, weights), (0, 2, 1, 3))
    return _ungrouped(repeats, output), weights


# Query heads that share a key-value head, one beside the other in the batch.


def _grouped(repeats, query, key, value, key_mask, decay):
    if repeats == 1:
        return query, key, value, key_mask, decay
    shape = tf.shape(query)
    query = tf.reshape(
        query, (shape[0], shape[1], key.shape[2], repeats, query.shape[3])
    )
    query = tf.reshape(
        tf.transpose(query, (0, 3, 1, 2, 4)),
        (-1, shape[1], key.shape[2], query.shape[4]),
    )
    rest = [
        None if x is None else tf.repeat(x, repeats, axis=0)
        for x in (key, value, key_mask, decay)
    ]
    return query, *rest


def _ungrouped(repeats, x):
    if repeats == 1:
        return x
    shape = tf.shape(x)
    x = tf.reshape(x, (-1, repeats, shape[1], x.shape[2], x.shape[3]))
    x = tf.transpose(x, (0, 2, 3, 1, 4))
    return tf.reshape(x, (-1, shape[1], x.shape[2] * repeats, shape[3]))


def _grouped_mask(repeats, mask, batch, heads):
    shape = tf.shape(mask)
    # One mask may serve the whole batch.
    mask = tf.broadcast_to(
        tf.cast(mask, "bool"), (batch, mask.shape[1], shape[2], shape[3])
    )
    if mask.shape[1] == 1:
        return tf.repeat(mask, repeats, axis=0)
    mask = tf.reshape(mask, (batch, heads, repeats, shape[2], shape[3]))
    mask = tf.transpose(mask, (0, 2, 1, 3, 4))
    return tf.reshape(mask, (-1, heads, shape[2], shape[3]))
