"""Linear attention: features and values in, weighted sums of values out.

    out_t = φ(q_t)·Σ_s φ(k_s) v_sᵀ / φ(q_t)·Σ_s φ(k_s)

in three forms: `bidirectional`, `causal`, and `step` for one token. Each is a
scan whose blocks absorb keys into a state and read it by queries. A decay is
that of `ops.attend`, zero where masked.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_kt.ops import chunks, exact_chunks, heads, scaling
from keras_kt.ops.blocks import of_queries_and_keys
from keras_kt.ops.heads import part, size_of, swap_heads
from keras_kt.ops.scan import scan
from keras_kt.ops.states import AttentionState, initial_state


def bidirectional(query, key, value, feature_map, *, key_mask=None, decay=None):
    """Every query sees every key.

    Args:
        query, key, value, feature_map, key_mask, decay: as in `ops.attend`.

    Returns:
        `Sums` of `(batch, query_length, heads, dim)`.
    """
    if decay is not None:
        return _fading(query, key, value, feature_map, key_mask, decay)
    repeats = query.shape[2] // key.shape[2]
    queries, keys = of_queries_and_keys(query, key, key_mask)

    _, state = scan(
        _take,
        [key, value],
        keys,
        results=0,
        carry=_nothing(key, value, feature_map),
        constants=feature_map,
    )
    sums, _ = scan(
        _Give(repeats),
        [heads.share(query, repeats)],
        queries,
        results=_results(feature_map),
        memory=state,
        constants=feature_map,
    )
    return scaling.Sums(*(heads.unshare(x, repeats) for x in sums))


def _fading(query, key, value, feature_map, key_mask, decay):
    """`bidirectional` with a decay, of as many queries as keys."""
    repeats = query.shape[2] // key.shape[2]
    nothing = _nothing(key, value, feature_map)
    _, blocks = of_queries_and_keys(query, key, key_mask, causal=True)
    # Of all that comes after it each block sees a state.
    _, future = scan(
        _take_back,
        [key, value, decay],
        blocks,
        results=0,
        carry=nothing,
        constants=feature_map,
        reverse=True,
        records=True,
    )
    sums, _ = scan(
        _Block(chunks.attend, repeats),
        [heads.share(query, repeats), key, value, decay],
        blocks,
        results=_results(feature_map),
        carry=nothing,
        each=_constant_scale(*future),
        constants=feature_map,
        otherwise=_exactly(feature_map, repeats),
    )
    return scaling.Sums(*(heads.unshare(x, repeats) for x in sums))


def causal(
    query,
    key,
    value,
    feature_map,
    *,
    key_mask=None,
    decay=None,
    state=None,
    with_scale=False,
):
    """Query t sees keys 0 … t, and those that `state` has seen.

    Exact at any range of the features: where a block loses a row to underflow,
    it is formed again in a slower way.

    Args:
        query, key, value, feature_map, key_mask, decay: as in `ops.attend`.
        state: `AttentionState` to resume from; `None` starts anew.
        with_scale: whether to return the scale of positive features, too.

    Returns:
        `Sums` as in `bidirectional`, and the `AttentionState` after the last
        token.
    """
    repeats = query.shape[2] // key.shape[2]
    if state is None:
        state = _nothing(key, value, feature_map)
    _, blocks = of_queries_and_keys(query, key, key_mask, causal=True)

    inputs = [heads.share(query, repeats), key, value]
    if decay is not None:
        inputs.append(decay)
    sums, state = scan(
        _Block(chunks.attend, repeats),
        inputs,
        blocks,
        results=2 if with_scale else _results(feature_map),
        carry=_constant_scale(*state),
        constants=feature_map,
        otherwise=_exactly(feature_map, repeats),
    )
    sums = (heads.unshare(x, repeats) for x in sums)
    return scaling.Sums(*sums), _constant_scale(*state)


def step(query, key, value, feature_map, *, key_mask=None, decay=None, state):
    """`causal` of one token, at O(feature_dim · value_dim)."""
    repeats = query.shape[2] // key.shape[2]
    keep = None
    if key_mask is not None:
        keep = tf.cast(key_mask, "bool")[:, tf.newaxis, :, tf.newaxis]
    query, key, value = map(
        swap_heads, (heads.share(query, repeats), key, value)
    )
    if decay is not None:
        state = _faded(feature_map, state, swap_heads(decay))
    features = scaling.key_features(feature_map, key, keep)
    state = _absorb(feature_map, features, value, keep, state)
    query = heads.split_rows(query, repeats)
    sums = scaling.read(feature_map, query, *state)
    sums = (swap_heads(heads.join_rows(x, repeats)) for x in sums)
    sums = scaling.Sums(*(heads.unshare(x, repeats) for x in sums))
    return sums, AttentionState(*state)


# Bodies of the scans.


def _take(tokens, keep, state, _, feature_map):
    key, value = tokens
    features = scaling.key_features(feature_map, key, keep)
    return [], _absorb(feature_map, features, value, keep, state), True


def _take_back(tokens, keep, state, _, feature_map):
    """The state of a block and all behind it, as faded at its start."""
    key, value, decay = tokens
    features = scaling.key_features(feature_map, key, keep)
    elapsed = tf.cumsum(decay, axis=2)
    if feature_map.positive:
        features -= elapsed
    else:
        features *= tf.exp(-elapsed)
    state = _faded(feature_map, state, part(elapsed, 2, -1))
    return [], _absorb(feature_map, features, value, keep, state), True


class _Give(NamedTuple):
    repeats: int

    def __call__(self, tokens, _, __, state, feature_map):
        query = heads.split_rows(*tokens, self.repeats)
        sums = scaling.read(feature_map, query, *state)
        return [heads.join_rows(x, self.repeats) for x in sums], [], True


class _Block(NamedTuple):
    attend: Callable
    repeats: int

    def __call__(self, tokens, keep, state, future, feature_map):
        query, *tokens = tokens
        sums, state, exact = self.attend(
            feature_map,
            heads.split_rows(query, self.repeats),
            *tokens,
            keep=keep,
            state=state,
            future=future,
            repeats=self.repeats,
        )
        sums = [heads.join_rows(x, self.repeats) for x in sums]
        return sums, [*state], exact


def _exactly(feature_map, repeats):
    """What runs where a block loses a row to underflow."""
    if feature_map.positive:
        return _Block(exact_chunks.attend, repeats)
    return None


def _faded(feature_map, state, decay):
    """A state after a decay `(batch, heads, 1, 1)`."""
    maximum, sums = state
    if feature_map.positive:
        return maximum - decay[..., 0], sums
    return maximum, sums * tf.exp(-decay)


def _absorb(feature_map, features, value, keep, state):
    """The state after a block of keys, heads first."""
    maximum, sums = state
    if feature_map.positive:
        after = scaling.maximum_of(features, maximum)
        sums *= tf.expand_dims(tf.exp(maximum - after), -2)
        features, maximum = scaling.exp_key(features, after), after
    value = scaling.with_ones(value, keep)
    return [maximum, sums + tf.matmul(value, features, transpose_a=True)]


def _results(feature_map):
    """Without the scale, which only signed features need to divide."""
    return 1 if feature_map.positive else 2


def _nothing(key, value, feature_map):
    sizes = key.shape[2], feature_map.width, value.shape[3]
    return initial_state(size_of(key, 0), *sizes)


def _constant_scale(maximum, sums):
    """A state whose gradient is that of its sums alone."""
    return AttentionState(tf.stop_gradient(maximum), sums)
