"""How a layer's call is computed: by the matrix or not; resuming a stream."""

import tensorflow as tf

from keras_kt import ops
from keras_kt.layers.axes import match_length, select_rows
from keras_kt.ops import states
from keras_kt.ops.heads import part

IMPLEMENTATIONS = ("auto", "linear", "quadratic")
# Up to about these lengths training by the matrix is faster, with XLA and
# without, on an Intel Xeon; on an AMD EPYC less far under XLA:
# python -m benchmarks.ratios --sections routes
SHORT_LENGTH = 64
SHORT_CAUSAL_LENGTH = 128
_DENSE_MASK = "a dense mask (`attention_mask`)"
_ALTERNATIVES = (
    "Padding masks (`query_mask`, `value_mask`, `key_mask`, or the Keras masks "
    "of the inputs) and `use_causal_mask=True` stay linear."
)
DENSE_MASK_WARNING = (
    f"{_DENSE_MASK} costs O(length²) time and memory, which linear attention "
    f"avoids. {_ALTERNATIVES}"
)


def needs_matrix(implementation, has_dense_mask, needs_scores):
    """Whether a call needs the matrix, or what is wrong with that."""
    reasons = []
    if has_dense_mask:
        reasons.append(_DENSE_MASK)
    if needs_scores:
        reasons.append("`return_attention_scores=True`")
    if reasons and implementation == "linear":
        raise ValueError(
            f"{' and '.join(reasons)} needs the attention matrix, which "
            'implementation="linear" never forms. Use implementation="auto" to '
            f"allow O(length²) for such calls. {_ALTERNATIVES}"
        )
    return bool(reasons)


def is_short(query, key, causal):
    """Whether sequences are known to be so short that the matrix is faster."""
    lengths = query.shape[1], key.shape[1]
    limit = SHORT_CAUSAL_LENGTH if causal else SHORT_LENGTH
    return None not in lengths and max(lengths) <= limit


def attend(
    query,
    key,
    value,
    feature_map,
    *,
    forms_matrix,
    needs_weights,
    query_mask,
    attention_mask,
    same_length,
    **options,
):
    """`ops.attend` of queries and keys of any lengths, by the matrix or not.

    Args:
        query, key, value, feature_map, attention_mask, options: as there.
        forms_matrix: whether to form it.
        needs_weights: whether weights are wanted, of which it is formed then.
        query_mask: `(batch, query_length)` boolean, or `None`.
        same_length: whether lengths are known to be equal, which dynamic shapes
            do not tell.

    Returns:
        Outputs, and the attention weights or `None`.
    """
    tokens, weights = (query, key, value, feature_map), None
    if forms_matrix:
        output, weights = ops.attend_with_matrix(
            *tokens,
            attention_mask=attention_mask,
            needs_weights=needs_weights,
            **options,
        )
    else:
        output = _attend_linearly(*tokens, same_length=same_length, **options)
    if query_mask is not None:
        output = select_rows(output, query_mask[:, :, tf.newaxis])
        if weights is not None:
            weights = select_rows(weights, query_mask[:, tf.newaxis])
    return output, weights


def _attend_linearly(
    query, key, value, feature_map, *, same_length, causal, near, **options
):
    by_distance = options["decay"] is not None or near is not None
    length = query.shape[1]
    is_static = length is not None
    same_length = same_length or (is_static and length == key.shape[1])
    needs_match = (causal or by_distance) and not same_length
    if needs_match:
        length = length if is_static else tf.shape(query)[1]
        if not causal:
            missing = tf.maximum(tf.shape(key)[1] - length, 0)
            query = tf.pad(query, [(0, 0), (0, missing), (0, 0), (0, 0)])
        options["key_mask"], key, value, options["decay"] = match_length(
            query, options["key_mask"], key, value, options["decay"]
        )
    output, _ = ops.attend(
        query, key, value, feature_map, causal=causal, near=near, **options
    )
    return part(output, 1, 0, length) if needs_match else output


def check_window(query, key, window):
    """Raises a `ValueError` unless queries and keys stand side by side."""
    if len({query.shape[1], key.shape[1]} - {None}) > 1:
        raise ValueError(
            "`sliding_window` needs queries that stand beside keys, so as many "
            "of both: in cross-attention nothing is near. Received: "
            f"sliding_window={window}, queries of shape {tuple(query.shape)} "
            f"and keys of shape {tuple(key.shape)}. Leave it out there."
        )


def check_step(query, key, value):
    """Raises a `ValueError` unless new tokens stand in threes."""
    lengths = {x.shape[1] for x in (query, key, value)} - {None}
    if len(lengths) > 1:
        raise ValueError(
            "`step` is causal: every new query comes with its own new key and "
            "value, so their lengths must be equal. Received: query of shape "
            f"{tuple(query.shape)}, value of shape {tuple(value.shape)} and "
            f"key of shape {tuple(key.shape)}. For attention without causality "
            "(to an encoder's output, say) call the layer itself."
        )


def restore(state, shapes, query):
    """The state as tensors, or what is wrong with it."""
    state = states.restore(state, shapes)
    batch = tf.nest.flatten(state)[0].shape[0]
    if len({query.shape[0], batch} - {None}) > 1:
        raise ValueError(
            "`state` must have the batch size of the new tokens. Received: a "
            f"state of batch size {batch} and query of shape "
            f"{tuple(query.shape)}. Start a stream of another batch size with "
            "`initial_state(batch_size)`."
        )
    return state
