"""Attention algorithms: the third of the three axes, prior × map × algorithm.

Pure functions of heads and bound feature maps. `attend` is the one way in;
`attend_with_matrix` gives the same and the attention weights.
"""

from typing import NamedTuple

from keras_kt.ops import linear, quadratic, scaling, window


class NearField(NamedTuple):
    """Keys less than so many visible tokens from the query.

    Attributes:
        kernel: an `ExactKernel`, by which they are weighed; `None`, only
            without a far field, for features.
        window: number of tokens, the query's own included.
        has_far: whether keys beyond weigh by features, or nothing.
    """

    kernel: tuple | None
    window: int
    has_far: bool = True


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
            to itself.
        near: a `NearField`, of positive features if it has a far field, or
            `None`.
        state: `AttentionState`, `NearFieldState` or `WindowState` of a causal
            stream to resume; `None` starts anew.

    Returns:
        `(batch, query_length, heads, value_dim)`, zeros where no key is seen,
        and the state after the last token; `None` where there is none.
    """
    tokens = query, key, value, feature_map
    if decay is not None:
        decay = scaling.visible_decay(decay, key_mask)
    options = {"key_mask": key_mask, "decay": decay}
    if attention_mask is not None:
        options |= {"attention_mask": attention_mask, "near": near}
        return quadratic.attend(
            *tokens, causal=causal, needs_weights=False, **options
        )
    if near is not None:
        options |= {"causal": causal, "state": state}
        *near, has_far = near
        attend_near = window.attend if has_far else window.sliding
        return attend_near(*tokens, *near, **options)
    if not causal:
        sums = linear.bidirectional(*tokens, **options)
    elif state is not None and query.shape[1] == 1:
        sums, state = linear.step(*tokens, state=state, **options)
    else:
        sums, state = linear.causal(*tokens, state=state, **options)
    output, _ = scaling.divide(sums, not feature_map.positive)
    return output, state


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
    needs_weights=True,
):
    """`attend` by the attention matrix: the same estimate, and its weights.

    Args:
        query, key, value, feature_map, causal, key_mask, attention_mask, decay,
            near: as in `attend`; lengths may differ.
        needs_weights: whether weights are wanted, which take time.

    Returns:
        Outputs as in `attend`, and the attention weights
        `(batch, heads, query_length, key_length)` or `None`.
    """
    if decay is not None:
        decay = scaling.visible_decay(decay, key_mask)
    return quadratic.attend(
        query,
        key,
        value,
        feature_map,
        causal=causal,
        key_mask=key_mask,
        attention_mask=attention_mask,
        decay=decay,
        near=near,
        needs_weights=needs_weights,
    )
