"""Linear attention: features and values in, heads' outputs out.

    out_t = φ(q_t)·Σ_s φ(k_s) v_sᵀ / φ(q_t)·Σ_s φ(k_s)

in three forms with one contract: `bidirectional`, `causal` and `step` (one or
more new tokens on a state); `quadratic` is the same estimate as an explicit
matrix. Tensors are `(batch, length, heads, dim)`, float32; `feature_map` maps
a query or key to features (log-features where `feature_map.positive`).

Sequences are walked in blocks that stay in cache. The gradient is written out:
it keeps inputs, outputs and one state a block, and forms the features again.
"""

import tensorflow as tf

from keras_kt.ops import block_grid
from keras_kt.ops.block_grid import (
    Grid,
    at_least,
    chunk_of,
    grids,
    restart,
    size_of,
    swap_heads,
    walk,
)
from keras_kt.ops.scaling import (
    FLOOR,
    MOST_EXCESS,
    absolute_log,
    count_visible,
    divide,
    divide_gradient,
    exp_key,
    exp_query,
    is_exact,
    key_features,
    maximum_of,
    query_features,
    row_maximum,
    visible_decay,
    with_log_gradient,
    with_ones,
)
from keras_kt.ops.states import AttentionState, initial_state
from keras_kt.written_gradients import pullback, written_gradient

# Where features lose rows to underflow, so many tokens attend pair by pair.
_STRICT_SIZE = 16


def bidirectional(query, key, value, feature_map, *, key_mask=None):
    """Every query sees every key.

    O(length · feature_dim · value_dim) time; memory beyond inputs and output
    does not grow with the length.

    Args:
        query: `(batch, query_length, heads, head_dim)`.
        key: `(batch, key_length, heads, head_dim)`.
        value: `(batch, key_length, heads, value_dim)`.
        feature_map: a bound feature map.
        key_mask: `(batch, key_length)` boolean, True keeps; or `None`.

    Returns:
        `(batch, query_length, heads, value_dim)`; zeros where no key is seen.
    """
    queries, keys = grids(query, key, key_mask)
    tensors, rebuild = _unbind(feature_map)
    count = None
    if not feature_map.positive:
        count = keys.split_batch(count_visible(key, key_mask))

    @written_gradient
    def attend(query, key, value, *tensors):
        bound = rebuild(tensors)
        query, key, value = (
            queries.pad(query),
            keys.pad(key),
            keys.pad(value),
        )
        nothing = _nothing(keys, value, bound)

        def key_block(*at):
            return keys.pick(key, *at), keys.pick(value, *at), keys.keep(*at)

        def absorb(group, block, state):
            state = restart(block == 0, nothing, state)
            state = _absorb(bound, *state, *key_block(group, block))
            return (), state, state

        _, states, _ = walk(absorb, keys.sizes, nothing, kept=2)

        def read(group, block, _):
            state = [x[group] for x in states]
            sums = _read(bound, queries.pick(query, group, block), *state)
            return divide(sums, _at(count, group)), (), ()

        results, _, _ = walk(read, queries.sizes, (), results=2)
        output, normalizer = map(queries.join, results)

        def gradient(upstream):
            ratio = [queries.pad(x) for x in (upstream, output, normalizer)]

            def unread(group, block, carry):
                maximum, sums = (x[group] for x in states)
                wanted = [queries.pick(query, group, block), sums, *tensors]
                of_results = divide_gradient(
                    *(queries.pick(x, group, block) for x in ratio),
                    _at(count, group),
                )

                def again():
                    query, sums, *_ = wanted
                    return _read(rebuild(tensors), query, maximum, sums)

                of_query, *others = pullback(again, wanted, of_results)
                past = restart(block == 0, [tf.zeros_like(sums)], carry[:1])
                carry = _add([*past, *carry[1:]], others)
                return [of_query], carry[:1], carry

            def unabsorb(group, block, of_tensors):
                key, value, keep = key_block(group, block)
                wanted = [key, value, *tensors]

                def again():
                    bound, maximum = rebuild(tensors), states[0][group]
                    return _sums(bound, key, value, keep, maximum)

                of_key, of_value, *others = pullback(
                    again, wanted, of_sums[group]
                )
                return (of_key, of_value), (), _add(of_tensors, others)

            zeros = [tf.zeros_like(x) for x in (nothing[1], *tensors)]
            (of_query,), (of_sums,), (_, *of_tensors) = walk(
                unread, queries.sizes, zeros, results=1, kept=1
            )
            of_keys, _, of_tensors = walk(
                unabsorb, keys.sizes, of_tensors, results=2
            )
            return (
                queries.join(of_query),
                *map(keys.join, of_keys),
                *of_tensors,
            )

        return output, gradient

    return attend(query, key, value, *tensors)


def causal(
    query,
    key,
    value,
    feature_map,
    *,
    key_mask=None,
    decay=None,
    state=None,
):
    """Query t sees keys 0 … t, and those that `state` has seen.

    Chunks attend within themselves by an explicit matrix and to earlier ones
    through their sums. O(length · feature_dim · value_dim) time; memory beyond
    inputs and output is one state a block. Exact at any range of the features:
    no future key touches the past.

    Args:
        query, key, value, feature_map, key_mask: as in `bidirectional`, of
            equal length.
        decay: `(batch, length, heads, 1)`, λ ≥ 0: token u multiplies the
            weights of all keys before it by exp(−λ_u), masked tokens by 1.
            Signed features must end in a constant one then. Defaults to
            `None`, which means that nothing is forgotten.
        state: `AttentionState` to resume from; `None` starts anew.

    Returns:
        `(batch, length, heads, value_dim)` and the `AttentionState` after the
        last token.
    """
    inputs = [query, key, value]
    attend_block = _causal_block
    if decay is not None:
        inputs.append(visible_decay(decay, key_mask))
        attend_block = fading_block
    output, _, state = causal_walk(
        attend_block, inputs, feature_map, key_mask, state
    )
    return output, state


def causal_walk(
    attend_block, inputs, feature_map, key_mask, state, blocks=None
):
    """`causal` by a function for one block.

    Args:
        attend_block: `_causal_block` or one with the same contract.
        inputs: query, key, value and, of blocks that fade, the decay.
        feature_map, key_mask, state: as in `causal`.
        blocks: the grid of the blocks; `None` for the usual one.

    Returns:
        Outputs, the logarithms of their normalizers (absolute and with a
        gradient only where blocks tell their scale), and the state after.
    """
    query, key, value = inputs[:3]
    if blocks is None:
        _, blocks = grids(query, key, key_mask, is_causal=True)
    if state is None:
        state = initial_state(
            size_of(key, 0), key.shape[2], feature_map.width, value.shape[3]
        )
    tensors, rebuild = _unbind(feature_map)
    arity, width = len(inputs), value.shape[3] + 1
    is_plain = attend_block is _causal_block
    may_underflow = feature_map.positive and attend_block is not _exact_block
    counts = None
    if not feature_map.positive:
        counts = blocks.running_count(state.count)
        if not is_plain:
            # Such blocks divide by their own, faded count.
            counts = tf.minimum(counts, 1.0)
    sees = blocks.sees_a_key(state.count)

    def strict_block(*arguments):
        results, after = _strict_block(*arguments)
        return (results[..., :width] if is_plain else results), after

    @written_gradient
    def attend(maximum, sums, *differentiable):
        inputs, tensors = differentiable[:arity], differentiable[arity:]
        bound = rebuild(tensors)
        inputs = [blocks.pad(x) for x in inputs]
        initial = [blocks.split_batch(x) for x in (maximum, sums)]
        last = blocks.count - 1

        def forward(group, block, state):
            at = group, block
            start = [x[group] for x in initial]
            state = restart(block == 0, start, state)
            tokens = [blocks.pick(x, *at) for x in inputs]
            rest = blocks.keep(*at), *state
            results, after = attend_block(bound, tokens, *rest)
            exact = True
            if may_underflow:
                sums = results[..., :width]
                exact = is_exact(sums, _optional(blocks.pick, sees, *at))
                # What fades may have been lost to the state too.
                kept = () if is_plain else after

                def strict():
                    results, after = strict_block(bound, tokens, *rest)
                    return results, *after[: len(kept)]

                # The state is chosen outside: Grappler moves what only one
                # branch reads into it, and tf2onnx reads no shapes there.
                results, *slow = tf.cond(
                    exact,
                    lambda: (results, *(tf.zeros_like(x) for x in kept)),
                    strict,
                )
                if slow:
                    after = restart(exact, kept, slow)
            output, _ = divide(
                results[..., :width], _optional(blocks.pick, counts, *at)
            )
            normalizer = results[..., width - 1 :]
            exact = tf.cast(exact, tf.float32)
            return (output, normalizer, *state, exact), after, after

        (*ratio, maxima, sums, exact), after, _ = walk(
            forward, blocks.sizes, [x[0] for x in initial], results=5, kept=2
        )
        output, normalizer = map(blocks.join, ratio)
        normalizer, scale = normalizer[..., :1], normalizer[..., 1:]

        def gradient(upstream, of_log, _, of_sums):
            of_after = blocks.split_batch(of_sums)
            ratio = [blocks.pad(x) for x in (upstream, output, normalizer)]
            of_log = blocks.pad(of_log)

            def backward(group, block, carry):
                at = group, block
                index = group * blocks.count + block
                wanted = [blocks.pick(x, *at) for x in inputs]
                wanted += [sums[index], *tensors]
                of_results = divide_gradient(
                    *(blocks.pick(x, *at) for x in ratio),
                    _optional(blocks.pick, counts, *at),
                )
                if not is_plain:
                    of_results = with_log_gradient(
                        of_results,
                        blocks.pick(of_log, *at),
                        blocks.pick(ratio[2], *at),
                    )
                (of_sums,) = restart(
                    block == last, [of_after[group]], carry[:1]
                )

                def through(function):
                    def again():
                        results, (_, after) = function(
                            rebuild(wanted[arity + 1 :]),
                            wanted[:arity],
                            blocks.keep(*at),
                            maxima[index],
                            wanted[arity],
                        )
                        return [results, after]

                    return pullback(again, wanted, [of_results, of_sums])

                if may_underflow:
                    gradients = tf.cond(
                        exact[index] > 0.0,
                        lambda: through(attend_block),
                        lambda: through(strict_block),
                    )
                else:
                    gradients = through(attend_block)
                of_inputs, of_sums = gradients[:arity], gradients[arity]
                of_tensors = _add(carry[1:], gradients[arity + 1 :])
                return of_inputs, [of_sums], [of_sums, *of_tensors]

            zeros = [tf.zeros_like(x) for x in (of_after[0], *tensors)]
            of_inputs, (of_sums,), (_, *of_tensors) = walk(
                backward,
                blocks.sizes,
                zeros,
                results=arity,
                kept=1,
                reverse=True,
            )
            return (
                tf.zeros_like(maximum),
                blocks.join_batch(of_sums),
                *map(blocks.join, of_inputs),
                *of_tensors,
            )

        after = map(blocks.join_batch, after)
        log_normalizer = (
            normalizer if is_plain else absolute_log(normalizer, scale)
        )
        return (output, log_normalizer, *after), gradient

    output, log_normalizer, maximum, sums = attend(
        state.maximum, state.sums, *inputs, *tensors
    )
    count = state.count + count_visible(key, key_mask)
    state = AttentionState(tf.stop_gradient(maximum), sums, count)
    return output, log_normalizer, state


def step(query, key, value, feature_map, state, *, key_mask=None, decay=None):
    """One or more new tokens on a state: prefill, resume and decode.

    Args:
        query, key, value, feature_map, key_mask, decay: as in `causal`; the
            new tokens only.
        state: `AttentionState` of the tokens before.

    Returns:
        Outputs of the new tokens and the state after them, equal to what
        `causal` gives for the whole sequence. One token costs
        O(feature_dim · value_dim), wherever it stands.
    """
    if query.shape[1] != 1:
        return causal(
            query,
            key,
            value,
            feature_map,
            key_mask=key_mask,
            decay=decay,
            state=state,
        )
    maximum, sums = state.maximum, state.sums
    if decay is not None:
        decay = visible_decay(decay, key_mask)[:, 0]
        if feature_map.positive:
            maximum -= decay
        else:
            sums *= tf.exp(-decay)[..., tf.newaxis]
    query, key, value = (
        tf.transpose(x, (0, 2, 1, 3)) for x in (query, key, value)
    )
    keep = None
    if key_mask is not None:
        keep = tf.cast(key_mask, "bool")[:, tf.newaxis, :, tf.newaxis]
    after = _absorb(feature_map, maximum, sums, key, value, keep)
    state = AttentionState(
        *after, state.count + count_visible(key[:, 0], key_mask)
    )
    count = None
    if not feature_map.positive:
        count = state.count[:, tf.newaxis, tf.newaxis, tf.newaxis]
        if decay is not None:
            # As in `_chunked_fading`.
            count = after[1][..., -1:, -1:] / feature_map(query)[..., -1:]
    output, _ = divide(_read(feature_map, query, *after), count)
    return tf.transpose(output, (0, 2, 1, 3)), state


def _optional(function, x, *arguments):
    return None if x is None else function(x, *arguments)


def _at(count, group):
    """Counts of a group against `(group, heads, block, dim)`."""
    if count is None:
        return None
    return count[group][:, tf.newaxis, tf.newaxis, tf.newaxis]


def _absorb(feature_map, maximum, sums, key, value, keep):
    """Maximum and sums after a block of keys."""
    features = key_features(feature_map, key, keep)
    if feature_map.positive:
        after = maximum_of(features, maximum)
        sums *= tf.exp(maximum - after)[..., tf.newaxis, :]
        features, maximum = exp_key(features, after), after
    value = with_ones(value, keep)
    return maximum, sums + tf.matmul(value, features, transpose_a=True)


def _sums(feature_map, key, value, keep, maximum):
    """What a block of keys adds to sums relative to the final maximum."""
    features = key_features(feature_map, key, keep)
    if feature_map.positive:
        features = exp_key(features, maximum)
    return tf.matmul(with_ones(value, keep), features, transpose_a=True)


def _read(feature_map, query, maximum, sums):
    """Numerators and normalizer of a block of queries."""
    features = query_features(feature_map, query)
    if feature_map.positive:
        features = exp_query(features, maximum)
    return tf.matmul(features, sums, transpose_b=True)


def _causal_block(feature_map, inputs, keep, maximum, sums):
    """Numerators and normalizers of a block, and the carry after it."""
    query, key, value = inputs
    query = query_features(feature_map, query)
    key = key_features(feature_map, key, keep)
    if feature_map.positive:
        after = maximum_of(key, maximum)
        query, key = exp_query(query, after), exp_key(key, after)
        sums *= tf.exp(maximum - after)[..., tf.newaxis, :]
        maximum = after
    results, sums = _chunked(query, key, with_ones(value, keep), sums)
    return results, (maximum, sums)


def fading_block(feature_map, inputs, keep, maximum, sums):
    """`_causal_block` with a decay, and with the scale of each row.

    All exponents are differences of elapsed decay, at most zero and taken
    within a chunk or a block, so that no running sum grows with the length.
    """
    query, key, value, decay = inputs
    query = query_features(feature_map, query)
    key = key_features(feature_map, key, keep)
    scale = tf.zeros_like(query[..., :1])
    if feature_map.positive:
        top = maximum_of(key, maximum)
        scale = row_maximum(query + top[..., tf.newaxis, :])
        query, log_key = exp_query(query, top), key
        key = exp_key(key, top)
        sums *= tf.exp(maximum - top)[..., tf.newaxis, :]
    value = with_ones(value, keep)
    results, sums, rest, total = _chunked_fading(
        query, key, value, decay, sums, not feature_map.positive
    )
    if feature_map.positive:
        # The state's scale fades with it, lest an old key hide later ones.
        maximum = maximum_of(log_key - rest, maximum - total[..., 0])
        excess = top - maximum
        sums *= tf.exp(tf.minimum(excess, MOST_EXCESS))[..., tf.newaxis, :]
        # Where keys below the block's scale were lost, no row counts as exact.
        is_kept = tf.reduce_all(excess < MOST_EXCESS)
        results *= tf.cast(is_kept, tf.float32)
    return tf.concat([results, scale], axis=-1), (maximum, sums)


def _strict_block(feature_map, inputs, keep, maximum, sums):
    """A block of log-features of any range, a few tokens at a time.

    Gives outputs, normalizers of one, and the logarithms of what they were.
    """
    inputs = [swap_heads(x) for x in inputs]
    mask = None if keep is None else keep[:, 0, :, 0]
    batch = size_of(inputs[1], 0)
    blocks = Grid(inputs[1], mask, at_least(batch, 1), _STRICT_SIZE, 1)
    # No count is needed: a row that sees nothing has nothing in its sums.
    state = AttentionState(maximum, sums, tf.zeros((batch,)))
    output, log_normalizer, after = causal_walk(
        _exact_block, inputs, feature_map, mask, state, blocks
    )
    results = [with_ones(swap_heads(output), None), swap_heads(log_normalizer)]
    return tf.concat(results, axis=-1), (after.maximum, after.sums)


def _exact_block(feature_map, inputs, keep, maximum, sums):
    """A block with logits formed pair by pair, for few tokens.

    Each row is scaled by the largest exponent that it sees, so that its
    normalizer is at least one.
    """
    query, key, value, *decay = inputs
    query = query_features(feature_map, query)
    key = key_features(feature_map, key, keep)
    value = with_ones(value, keep)
    elapsed = tf.cumsum(decay[0] if decay else 0.0 * query[..., :1], axis=2)
    query -= elapsed
    past = query + maximum[:, :, tf.newaxis]
    key += elapsed
    pairs = query[:, :, :, tf.newaxis] + key[:, :, tf.newaxis]
    length = size_of(key, 2)
    visible = tf.linalg.band_part(tf.ones((length, length), "bool"), -1, 0)
    pairs = tf.where(visible[..., tf.newaxis], pairs, FLOOR)
    scale = tf.reduce_max(tf.reduce_max(pairs, axis=-1), axis=-1, keepdims=True)
    scale = tf.stop_gradient(tf.maximum(scale, row_maximum(past)))
    weights = tf.reduce_sum(tf.exp(pairs - scale[..., tf.newaxis]), axis=-1)
    weights = tf.where(visible, weights, 0.0)
    results = tf.matmul(tf.exp(past - scale), sums, transpose_b=True)
    results += tf.matmul(weights, value)
    total = elapsed[:, :, -1]
    key -= total[:, :, tf.newaxis]
    after = maximum_of(key, maximum - total)
    sums *= tf.exp(maximum - total - after)[..., tf.newaxis, :]
    sums += tf.matmul(value, exp_key(key, after), transpose_a=True)
    return tf.concat([results, scale], axis=-1), (after, sums)


def _chunked(query, key, value, past):
    """Causal sums of features on one scale, and the sums after the last."""
    batch, length = size_of(key, 0), size_of(key, 2)
    chunk = chunk_of(length, block_grid.CHUNK_SIZE)

    def split(x):
        shape = (batch, x.shape[1], -1, chunk, x.shape[3])
        return tf.reshape(x, shape)

    shape = tf.shape(value)
    query, key, value = split(query), split(key), split(value)
    sums = tf.matmul(value, key, transpose_a=True)
    before = tf.cumsum(sums, axis=2, exclusive=True) + past[:, :, tf.newaxis]
    scores = tf.matmul(query, key, transpose_b=True)
    scores = tf.linalg.band_part(scores, -1, 0)
    results = tf.matmul(query, before, transpose_b=True)
    results += tf.matmul(scores, value)
    return tf.reshape(results, shape), past + tf.reduce_sum(sums, axis=2)


def _chunked_fading(query, key, value, decay, past, is_signed):
    """`_chunked` with a decay.

    Returns:
        Sums, for signed features divided by what is left of the count, the
        sums after the last token, and the decay that each token and `past`
        have still to go through.
    """
    batch, length = size_of(key, 0), size_of(key, 2)
    chunk = chunk_of(length, block_grid.CHUNK_SIZE)

    def split(x):
        return tf.reshape(x, (batch, x.shape[1], -1, chunk, x.shape[3]))

    shape = tf.shape(value)
    query, key, value, decay = map(split, (query, key, value, decay))
    elapsed = tf.cumsum(decay, axis=3)
    of_chunks = elapsed[..., -1, :]
    rest = of_chunks[..., tf.newaxis, :] - elapsed
    sums = tf.matmul(value * tf.exp(-rest), key, transpose_a=True)
    # The state at the start of each chunk, and after the last one.
    ends = tf.pad(tf.cumsum(of_chunks, axis=2), [(0, 0)] * 2 + [(1, 0), (0, 0)])
    states = tf.concat([past[:, :, tf.newaxis], sums], axis=2)
    flat = (batch, past.shape[1], -1, past.shape[2] * past.shape[3])
    states = tf.matmul(_fading(ends), tf.reshape(states, flat))
    # Not to a `tf.shape`, from which tf2onnx learns no rank.
    states = tf.reshape(states, (batch, past.shape[1], -1, *past.shape[2:]))
    before, after = states[:, :, :-1], states[:, :, -1]
    fading, kept = _fading(elapsed), tf.exp(-elapsed)
    scores = tf.matmul(query, key, transpose_b=True) * fading
    results = kept * tf.matmul(query, before, transpose_b=True)
    results += tf.matmul(scores, value)
    if is_signed:
        # The sum of the constant feature counts the keys.
        count = kept * before[..., -1:, -1:] + tf.matmul(fading, key[..., -1:])
        count /= query[..., -1:]
        results /= tf.where(count > 0.0, count, 1.0)
    total = ends[:, :, -1:]
    rest += (total - ends[:, :, 1:])[..., tf.newaxis, :]
    rest = tf.reshape(rest, (batch, rest.shape[1], length, 1))
    return tf.reshape(results, shape), after, rest, total


def _fading(elapsed):
    """What the decay leaves of each token s for t ≥ s: `(…, t, s)`."""
    decay = elapsed - tf.linalg.matrix_transpose(elapsed)
    length = size_of(elapsed, -2)
    visible = tf.linalg.band_part(tf.ones((length, length), "bool"), -1, 0)
    return tf.where(visible, tf.exp(-tf.where(visible, decay, 0.0)), 0.0)


def _unbind(feature_map):
    """A bound map's tensors, and the map again from such tensors."""
    fields = tuple(getattr(feature_map, "_fields", ()))
    values = [getattr(feature_map, field) for field in fields]
    tensors = [x for x in values if tf.is_tensor(x)]

    def rebuild(tensors):
        if not tensors:
            return feature_map
        rest = iter(tensors)
        return type(feature_map)(
            *(next(rest) if tf.is_tensor(x) else x for x in values)
        )

    return tensors, rebuild


def _nothing(keys, value, feature_map):
    """Maximum and sums that have seen no key, for one group."""
    shape = keys.group, value.shape[-2], feature_map.width, value.shape[-1]
    return initial_state(*shape)[:2]


def _add(carry, others):
    return [a + b for a, b in zip(carry, others, strict=True)]
