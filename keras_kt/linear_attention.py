"""Linear attention: features and values in, heads' outputs out.

    out_t = φ(q_t)·Σ_s φ(k_s) v_sᵀ / φ(q_t)·Σ_s φ(k_s)

in four forms with one contract: `bidirectional`, `causal`, `step` (one or
more new tokens on a state) and `quadratic` (the same estimate as an explicit
matrix). Tensors are `(batch, length, heads, dim)`, float32; `feature_map` maps
a query or key to features (log-features where `feature_map.positive`).

Positive features are exponentiated relative to the maximum of each feature over
the keys and the maximum of each query over its features. Both cancel in the
ratio, all exponents are ≤ 0, and some feature of some key reaches 1, so the
normaliser is at least one in the bidirectional form and needs no epsilon. Where
a mask hides the key that set the maximum the normaliser can be small; it is
its own certificate: as long as it stays above e⁻⁶⁰ nothing was lost to
underflow, and below that an exact, slower form takes over at run time.

Values carry a column of ones, so that one product gives numerator and
normaliser. Masked keys have a zero row there, which removes them from both.

Sequences are walked in blocks that stay in cache. The gradient is written out:
it keeps inputs, outputs and one state a block, and forms the features again.
"""

import math
from typing import NamedTuple

import tensorflow as tf

from keras_kt import feature_maps

# Stands for log 0; finite, since ∞ − ∞ hides in fully padded prefixes.
FLOOR = -1e30
_MOST_EXCESS = 60.0
_UNDERFLOW = math.exp(-_MOST_EXCESS)
# Signed normalisers are kept away from zero by this share of the key count.
_SIGNED_LIMIT = 1e-2
# Causal tokens attend within a chunk by an explicit matrix.
CHUNK_SIZE = 64
# Where features lose rows to underflow, so many tokens attend pair by pair.
_STRICT_SIZE = 16
# Tokens times heads times batch in a block. On a CPU features stay in cache,
# where causal blocks also hold a state for each chunk (the fastest of 512 to
# 8,192 at 8 heads of 64 on 2 cores).
_CPU_BLOCK_ROWS = 8192
_CPU_CAUSAL_BLOCK_ROWS = 2048
# Elsewhere a block fills the device (an estimate, not measured).
_ACCELERATOR_BLOCK_ROWS = 65536
_MAX_BLOCK = 8192


class AttentionState(NamedTuple):
    """All that causal attention remembers of the past; its size is fixed.

    Attributes:
        maximum: `(batch, heads, feature_dim)`, running maximum of each
            log-feature (unused for signed features).
        sums: `(batch, heads, value_dim + 1, feature_dim)`, Σ v φ(k)ᵀ relative
            to `maximum`, and Σ φ(k) in the last row.
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
        tf.zeros((batch_size, num_heads, value_dim + 1, feature_dim)),
        tf.zeros((batch_size,)),
    )


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
    queries, keys = _grids(query, key, key_mask)
    tensors, rebuild = _unbind(feature_map)
    count = None
    if not feature_map.positive:
        count = keys.split_batch(_count(key, key_mask))

    @tf.custom_gradient
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
            state = _restart(block == 0, nothing, state)
            state = _absorb(bound, *state, *key_block(group, block))
            return (), state, state

        _, states, _ = _walk(absorb, keys.sizes, nothing, kept=2)

        def read(group, block, _):
            state = [x[group] for x in states]
            sums = _read(bound, queries.pick(query, group, block), *state)
            return _divide(sums, _at(count, group)), (), ()

        results, _, _ = _walk(read, queries.sizes, (), results=2)
        output, normalizer = map(queries.join, results)

        def gradient(upstream):
            ratio = [queries.pad(x) for x in (upstream, output, normalizer)]

            def unread(group, block, carry):
                maximum, sums = (x[group] for x in states)
                wanted = [queries.pick(query, group, block), sums, *tensors]
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(wanted)
                    results = _read(
                        rebuild(tensors), wanted[0], maximum, wanted[1]
                    )
                of_results = _divide_gradient(
                    *(queries.pick(x, group, block) for x in ratio),
                    _at(count, group),
                )
                of_query, *others = _gradients(
                    tape, results, wanted, of_results
                )
                past = _restart(block == 0, [tf.zeros_like(sums)], carry[:1])
                carry = _add([*past, *carry[1:]], others)
                return [of_query], carry[:1], carry

            def unabsorb(group, block, of_tensors):
                key, value, keep = key_block(group, block)
                wanted = [key, value, *tensors]
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(wanted)
                    sums = _sums(
                        rebuild(tensors), key, value, keep, states[0][group]
                    )
                of_key, of_value, *others = _gradients(
                    tape, sums, wanted, of_sums[group]
                )
                return (of_key, of_value), (), _add(of_tensors, others)

            zeros = [tf.zeros_like(x) for x in (nothing[1], *tensors)]
            (of_query,), (of_sums,), (_, *of_tensors) = _walk(
                unread, queries.sizes, zeros, results=1, kept=1
            )
            of_keys, _, of_tensors = _walk(
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
        inputs.append(_visible_decay(decay, key_mask))
        attend_block = _fading_block
    output, _, state = _causal(
        attend_block, inputs, feature_map, key_mask, state
    )
    return output, state


def _causal(attend_block, inputs, feature_map, key_mask, state, blocks=None):
    """`causal` by a function for one block.

    Args:
        attend_block: `_causal_block` or one with the same contract.
        inputs: query, key, value and, of blocks that fade, the decay.
        feature_map, key_mask, state: as in `causal`.
        blocks: the grid of the blocks; `None` for the usual one.

    Returns:
        Outputs, the logarithms of their normalisers (absolute and with a
        gradient only where blocks tell their scale), and the state after.
    """
    query, key, value = inputs[:3]
    if blocks is None:
        _, blocks = _grids(query, key, key_mask, is_causal=True)
    if state is None:
        state = initial_state(
            _size(key, 0), key.shape[2], feature_map.width, value.shape[3]
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

    @tf.custom_gradient
    def attend(maximum, sums, *differentiable):
        inputs, tensors = differentiable[:arity], differentiable[arity:]
        bound = rebuild(tensors)
        inputs = [blocks.pad(x) for x in inputs]
        initial = [blocks.split_batch(x) for x in (maximum, sums)]
        last = blocks.count - 1

        def forward(group, block, state):
            at = group, block
            start = [x[group] for x in initial]
            state = _restart(block == 0, start, state)
            tokens = [blocks.pick(x, *at) for x in inputs]
            rest = blocks.keep(*at), *state
            results, after = attend_block(bound, tokens, *rest)
            exact = True
            if may_underflow:
                sums = results[..., :width]
                exact = _is_exact(sums, _optional(blocks.pick, sees, *at))
                # What fades may have been lost to the state too.
                kept = () if is_plain else after

                def strict():
                    results, after = strict_block(bound, tokens, *rest)
                    return results, *after[: len(kept)]

                results, *kept = tf.cond(
                    exact, lambda: (results, *kept), strict
                )
                after = after if is_plain else kept
            output, _ = _divide(
                results[..., :width], _optional(blocks.pick, counts, *at)
            )
            normalizer = results[..., width - 1 :]
            exact = tf.cast(exact, tf.float32)
            return (output, normalizer, *state, exact), after, after

        (*ratio, maxima, sums, exact), after, _ = _walk(
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
                of_results = _divide_gradient(
                    *(blocks.pick(x, *at) for x in ratio),
                    _optional(blocks.pick, counts, *at),
                )
                if not is_plain:
                    of_results = _with_log_gradient(
                        of_results,
                        blocks.pick(of_log, *at),
                        blocks.pick(ratio[2], *at),
                    )
                (of_sums,) = _restart(
                    block == last, [of_after[group]], carry[:1]
                )

                def through(function):
                    with tf.GradientTape(watch_accessed_variables=False) as t:
                        t.watch(wanted)
                        results, (_, after) = function(
                            rebuild(wanted[arity + 1 :]),
                            wanted[:arity],
                            blocks.keep(*at),
                            maxima[index],
                            wanted[arity],
                        )
                    return _gradients(
                        t, [results, after], wanted, [of_results, of_sums]
                    )

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
            of_inputs, (of_sums,), (_, *of_tensors) = _walk(
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
        log_normalizer = normalizer if is_plain else _log(normalizer, scale)
        return (output, log_normalizer, *after), gradient

    output, log_normalizer, maximum, sums = attend(
        state.maximum, state.sums, *inputs, *tensors
    )
    count = state.count + _count(key, key_mask)
    state = AttentionState(tf.stop_gradient(maximum), sums, count)
    return output, log_normalizer, state


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
        *initial_state(batch_size, num_heads, feature_dim, value_dim),
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
        length = _size(query, 1)
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
    return [tf.zeros((_size(x, 0), count, *x.shape[2:])) for x in tokens]


def _beyond(query, tokens, feature_map, distance, state):
    """Attention to keys at least `distance` tokens before the query.

    Args:
        tokens: as from `_stream`, preceded by `distance` earlier ones.

    Returns:
        Outputs with the logarithms of their normalisers, and the state.
    """
    length = _size(query, 1)
    *delayed, keep = (x[:, :length] for x in tokens)
    output, log_normalizer, state = _causal(
        _fading_block, [query, *delayed], feature_map, keep > 0.0, state
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
    length = _size(query, 1)
    chunks = _shares(length, window)
    missing = chunks * window - length
    sides = 1 if use_causal_mask else 2

    def split(x, after):
        x = tf.pad(x, [(0, 0), (0, after)] + [(0, 0)] * (x.shape.rank - 2))
        return tf.reshape(x, (_size(x, 0), -1, window, *x.shape[2:]))

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
    key = around(tf.transpose(kernel.keys(_tokens(key)), (0, 2, 1, 3, 4)))
    query = kernel.queries(_tokens(query))
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
        tf.reshape(x, (_size(x, 0), chunks * window, *x.shape[3:]))
        for x in parts
    )
    return [x[:, :length] for x in parts]


def _near_weights(query, key, value, elapsed, keep, use_causal_mask):
    """`_band` within chunks `(batch, chunk, token, heads, …)`."""
    window = query.shape[2]
    logits = feature_maps.precise_product(
        tf.einsum("bnthcd->bnhctd", query), tf.einsum("bnshcd->bnhcds", key)
    )
    if logits.shape[3] > 1:
        logits = tf.reduce_logsumexp(logits, axis=3)
    else:
        logits = logits[:, :, :, 0]
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
    scale = _row_maximum(logits)
    weights = tf.where(visible, tf.exp(logits - scale), 0.0)
    normalizer = tf.reduce_sum(weights, axis=-1, keepdims=True)
    weights = _safe_ratio(weights, normalizer)
    output = tf.einsum("bnhts,bnshe->bnthe", weights, value)
    log_normalizer = _log(normalizer, scale)
    return output, tf.transpose(log_normalizer, (0, 1, 3, 2, 4))


def _moving_sum(x, count):
    """Sums of the last `count` tokens, where `count` earlier ones lead."""
    length = _size(x, 1) - count
    missing = -length % count
    x = tf.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)])
    x = tf.reshape(x, (_size(x, 0), -1, count, *x.shape[2:]))
    sums = tf.cumsum(x, axis=2)
    # The rest of the chunk before, without subtracting from a total.
    rest = tf.cumsum(x, axis=2, reverse=True, exclusive=True)
    sums = sums[:, 1:] + rest[:, :-1]
    sums = tf.reshape(sums, (_size(x, 0), length + missing, *x.shape[3:]))
    return sums[:, :length]


def _merge(*parts):
    """Attention to disjoint keys as one: outputs by their normalisers."""
    # Not `add_n`, which sums three parts in an order that changes from call to
    # call: it begins with whichever buffer happens to be free.
    outputs, logarithms = (tf.stack(x) for x in zip(*parts, strict=True))
    shares = tf.nn.softmax(logarithms, axis=0)
    return tf.reduce_sum(outputs * shares, axis=0)


def _recomputed(function, *tensors):
    """`function(*tensors)`, of which only the tensors are kept."""

    @tf.custom_gradient
    def call(*tensors):
        def gradient(*upstream):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(tensors)
                results = function(*tensors)
            return _gradients(tape, results, tensors, upstream)

        return function(*tensors), gradient

    return call(*tensors)


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
        decay = _visible_decay(decay, key_mask)[:, 0]
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
    state = AttentionState(*after, state.count + _count(key[:, 0], key_mask))
    count = None
    if not feature_map.positive:
        count = state.count[:, tf.newaxis, tf.newaxis, tf.newaxis]
        if decay is not None:
            # As in `_chunked_fading`.
            count = after[1][..., -1:, -1:] / feature_map(query)[..., -1:]
    output, _ = _divide(_read(feature_map, query, *after), count)
    return tf.transpose(output, (0, 2, 1, 3)), state


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
        kernel, window: as in `near_field`, or `None`.

    Returns:
        Outputs as in `bidirectional`, and the attention weights
        `(batch, heads, query_length, key_length)`.
    """
    query, key, value = (
        tf.transpose(x, (0, 2, 1, 3)) for x in (query, key, value)
    )
    visible = tf.ones((_size(query, 2), _size(key, 2)), "bool")
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
        decay = _tokens(_visible_decay(decay, key_mask))
        log_fading = _log_fading(decay, _size(query, 2))
    if kernel is not None:
        near = _near(_size(query, 2), _size(key, 2), window)
        kept_key = key if keep is None else tf.where(keep, key, 0.0)
        exact = _exact_logits(kernel, query, kept_key) + log_fading
        # The kernel leaves out the same factor of each query.
        log_query = _query_features(feature_map, query)
    else:
        log_query = feature_map(query)
    log_key = _key_features(feature_map, key, keep)
    query, key = log_query, log_key
    if feature_map.positive:
        maximum = _maximum(log_key)
        query = _exp_query(log_query, maximum)
        key = _exp_key(log_key, maximum)
    scores = tf.matmul(query, key, transpose_b=True)
    if decay is not None:
        scores *= tf.exp(log_fading)
    if near is not None:
        # One scale for both, the larger of theirs.
        scale = _row_maximum(log_query + maximum[..., tf.newaxis, :])
        exact = tf.where(near & visible, exact, FLOOR)
        top = tf.maximum(scale, _row_maximum(exact))
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
            _is_exact(total, sees),
            lambda: _safe_ratio(scores, total),
            exact_weights,
        )
    else:
        shares = tf.where(visible, tf.exp(log_fading), 0.0)
        count = tf.reduce_sum(shares, -1, keepdims=True)
        weights = scores / _guarded(total, count)
    output = tf.matmul(weights, value)
    return tf.transpose(output, (0, 2, 1, 3)), weights


def _grids(query, key, mask, is_causal=False):
    """Grids of the queries and of the keys, with the same groups."""
    sizes = [_size(x, 1) for x in (query, key)]
    limit = _block_limit(key.shape[2], is_causal)
    longest = _least(sizes[0], sizes[1])
    per_group = _least(limit // _least(longest, 1), 1)
    arguments = per_group, limit, CHUNK_SIZE if is_causal else 1
    return _Grid(query, None, *arguments), _Grid(key, mask, *arguments)


def _block_limit(heads, is_causal):
    """Most tokens in a block."""
    if any(tf.config.list_logical_devices(x) for x in ("GPU", "TPU")):
        rows = _ACCELERATOR_BLOCK_ROWS
    else:
        rows = _CPU_CAUSAL_BLOCK_ROWS if is_causal else _CPU_BLOCK_ROWS
    return min(max(rows // heads, CHUNK_SIZE), _MAX_BLOCK)


class _Grid:
    """Cuts `(batch, length, heads, dim)` into groups of sequences and blocks.

    Long sequences are cut into blocks of tokens, one sequence at a time; short
    ones are grouped. Only what is read is copied, heads before tokens. What is
    padded is masked.

    Attributes:
        groups, count: numbers of groups, and of blocks in each.
        sizes: both.
    """

    def __init__(self, x, mask, per_group, limit, multiple):
        self.batch, self.length = _size(x, 0), _size(x, 1)
        self.groups = _least(_shares(self.batch, per_group), 1)
        self.group = _shares(self.batch, self.groups)
        self.count = _least(_shares(self.length, limit), 1)
        self.sizes = self.groups, self.count
        size = _least(_shares(self.length, self.count), 1)
        self.multiple = _chunk_of(size, multiple)
        self.size = _shares(size, self.multiple) * self.multiple
        self.padding = [
            self.groups * self.group - self.batch,
            self.count * self.size - self.length,
        ]
        self.is_padded = any(
            not isinstance(n, int) or n > 0 for n in self.padding
        )
        self.mask = None if mask is None else tf.cast(mask, "bool")
        if self.is_padded and mask is None:
            self.mask = tf.ones((self.batch, self.length), "bool")
        self.mask = self.pad(self.mask)

    def pad(self, x):
        """Whole groups and blocks; `None` stays `None`."""
        if x is None or not self.is_padded:
            return x
        rest = [(0, 0)] * (x.shape.rank - 2)
        return tf.pad(x, [(0, n) for n in self.padding] + rest)

    def split_batch(self, x):
        if self.is_padded:
            rest = [(0, 0)] * (x.shape.rank - 1)
            x = tf.pad(x, [(0, self.padding[0])] + rest)
        return tf.reshape(x, (self.groups, self.group, *x.shape[1:]))

    def pick(self, x, group, block):
        """One block of what was padded, heads before tokens."""
        # Sliced as it lies: XLA copies a whole array that is reshaped before
        # a loop.
        begin = group * self.group, block * self.size
        size = self.group, self.size
        if x.shape.rank == 2:
            rows = tf.slice(x, begin, size)
            return rows[:, tf.newaxis, :, tf.newaxis]
        begin, size = (*begin, 0, 0), (*size, *x.shape[2:])
        return _tokens(tf.slice(x, begin, size))

    def keep(self, group, block):
        """Which keys of a block are seen, `(group, 1, block, 1)`."""
        if self.mask is None:
            return None
        return self.pick(self.mask, group, block)

    def join(self, x):
        """Stacked blocks, heads first, to `(batch, length, heads, dim)`."""
        batch, length = self.groups * self.group, self.count * self.size
        shape = self.groups, self.count, self.group, *x.shape[2:3], self.size
        x = tf.reshape(x, (*shape, x.shape[4]))
        x = tf.transpose(x, (0, 2, 1, 4, 3, 5))
        x = tf.reshape(x, (batch, length, *x.shape[4:]))
        return x[: self.batch, : self.length] if self.is_padded else x

    def join_batch(self, x):
        x = tf.reshape(x, (self.groups * self.group, *x.shape[2:]))
        return x[: self.batch] if self.is_padded else x

    def running_count(self, past):
        """Visible keys up to each position, padded."""
        if self.mask is None:
            counts = tf.range(1, self.length + 1, dtype=tf.float32)[tf.newaxis]
            return counts + past[:, tf.newaxis]
        # Two levels, since XLA sums a running sum anew at every position.
        ones = tf.cast(self.mask, tf.float32)
        shape = (self.groups * self.group, -1, self.multiple)
        ones = tf.reshape(ones, shape)
        before = tf.cumsum(tf.reduce_sum(ones, 2), axis=1, exclusive=True)
        past = tf.reshape(self.split_batch(past), (-1, 1, 1))
        counts = before[..., tf.newaxis] + past + tf.cumsum(ones, axis=2)
        return tf.reshape(counts, tf.shape(self.mask))

    def sees_a_key(self, past):
        """Which causal rows see a key, padded; `None` for all."""
        if self.mask is None:
            return None
        # By the first visible key: no running sum over the length.
        seen = tf.cast(self.mask, tf.int32)
        first = tf.argmax(seen, axis=1, output_type=tf.int32)
        length = self.count * self.size
        sees = tf.range(length) >= first[:, tf.newaxis]
        sees &= tf.reduce_any(self.mask, axis=1, keepdims=True)
        past = tf.reshape(self.split_batch(past), (-1, 1))
        return sees | (past > 0)


def _shares(total, size):
    """How many of a size make up a total, the last one smaller."""
    # Of positive numbers: ONNX rounds quotients of negative ones towards zero.
    return (total + size - 1) // size


def _tokens(x):
    """Swaps tokens and heads."""
    return tf.transpose(x, (0, 2, 1, 3))


def _optional(function, x, *arguments):
    return None if x is None else function(x, *arguments)


def _at(count, group):
    """Counts of a group against `(group, heads, block, dim)`."""
    if count is None:
        return None
    return count[group][:, tf.newaxis, tf.newaxis, tf.newaxis]


def _walk(body, sizes, carry, results=0, kept=0, reverse=False):
    """Walks all blocks of all groups.

    Args:
        body: `(group, block, carry) -> (results, kept, carry)`.
        sizes: number of groups, and of blocks in each.
        carry: tensors of the first call.
        results: number of float32 tensors that each block gives.
        kept: number of float32 tensors of which a group keeps the last.

    Returns:
        The results stacked over blocks, the kept stacked over groups, and the
        last carry. A loop of constant size in the graph, whatever the length.
    """
    groups, count = sizes
    total = groups * count
    if isinstance(total, int) and total == 1:
        outputs, ends, carry = body(0, 0, carry)
        return (
            [x[tf.newaxis] for x in outputs],
            [x[tf.newaxis] for x in ends],
            carry,
        )

    def advance(index, carry, arrays):
        position = total - 1 - index if reverse else index
        group, block = position // count, position % count
        if isinstance(count, int) and count == 1:
            group, block = position, 0
        elif isinstance(groups, int) and groups == 1:
            group, block = 0, position
        outputs, ends, carry = body(group, block, carry)
        arrays = [
            array.write(at, x)
            for array, at, x in zip(
                arrays,
                [position] * results + [group] * kept,
                [*outputs, *ends],
                strict=True,
            )
        ]
        return index + 1, tuple(carry), arrays

    _, carry, arrays = tf.while_loop(
        lambda index, *_: index < total,
        advance,
        (
            tf.constant(0),
            tuple(carry),
            [
                tf.TensorArray(tf.float32, size=size)
                for size in [total] * results + [groups] * kept
            ],
        ),
        parallel_iterations=1,
        maximum_iterations=total,
    )
    stacked = [array.stack() for array in arrays]
    return stacked[:results], stacked[results:], carry


def _restart(is_first, start, carry):
    """`start` at the first block of a group, else what was carried."""
    if isinstance(is_first, bool):
        return list(start if is_first else carry)
    return [tf.where(is_first, a, b) for a, b in zip(start, carry, strict=True)]


def _gradients(tape, results, wanted, upstream):
    return tape.gradient(
        results,
        wanted,
        upstream,
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )


def _absorb(feature_map, maximum, sums, key, value, keep):
    """Maximum and sums after a block of keys."""
    features = _key_features(feature_map, key, keep)
    if feature_map.positive:
        after = _maximum(features, maximum)
        sums *= tf.exp(maximum - after)[..., tf.newaxis, :]
        features, maximum = _exp_key(features, after), after
    value = _with_ones(value, keep)
    return maximum, sums + tf.matmul(value, features, transpose_a=True)


def _sums(feature_map, key, value, keep, maximum):
    """What a block of keys adds to sums relative to the final maximum."""
    features = _key_features(feature_map, key, keep)
    if feature_map.positive:
        features = _exp_key(features, maximum)
    return tf.matmul(_with_ones(value, keep), features, transpose_a=True)


def _read(feature_map, query, maximum, sums):
    """Numerators and normaliser of a block of queries."""
    features = _query_features(feature_map, query)
    if feature_map.positive:
        features = _exp_query(features, maximum)
    return tf.matmul(features, sums, transpose_b=True)


def _causal_block(feature_map, inputs, keep, maximum, sums):
    """Numerators and normalisers of a block, and the carry after it."""
    query, key, value = inputs
    query = _query_features(feature_map, query)
    key = _key_features(feature_map, key, keep)
    if feature_map.positive:
        after = _maximum(key, maximum)
        query, key = _exp_query(query, after), _exp_key(key, after)
        sums *= tf.exp(maximum - after)[..., tf.newaxis, :]
        maximum = after
    results, sums = _chunked(query, key, _with_ones(value, keep), sums)
    return results, (maximum, sums)


def _fading_block(feature_map, inputs, keep, maximum, sums):
    """`_causal_block` with a decay, and with the scale of each row.

    All exponents are differences of elapsed decay, at most zero and taken
    within a chunk or a block, so that no running sum grows with the length.
    """
    query, key, value, decay = inputs
    query = _query_features(feature_map, query)
    key = _key_features(feature_map, key, keep)
    scale = tf.zeros_like(query[..., :1])
    if feature_map.positive:
        top = _maximum(key, maximum)
        scale = _row_maximum(query + top[..., tf.newaxis, :])
        query, log_key = _exp_query(query, top), key
        key = _exp_key(key, top)
        sums *= tf.exp(maximum - top)[..., tf.newaxis, :]
    value = _with_ones(value, keep)
    results, sums, rest, total = _chunked_fading(
        query, key, value, decay, sums, not feature_map.positive
    )
    if feature_map.positive:
        # The state's scale fades with it, lest an old key hide later ones.
        maximum = _maximum(log_key - rest, maximum - total[..., 0])
        excess = top - maximum
        sums *= tf.exp(tf.minimum(excess, _MOST_EXCESS))[..., tf.newaxis, :]
        # Where keys below the block's scale were lost, no row counts as exact.
        is_kept = tf.reduce_all(excess < _MOST_EXCESS)
        results *= tf.cast(is_kept, tf.float32)
    return tf.concat([results, scale], axis=-1), (maximum, sums)


def _strict_block(feature_map, inputs, keep, maximum, sums):
    """A block of log-features of any range, a few tokens at a time.

    Gives outputs, normalisers of one, and the logarithms of what they were.
    """
    inputs = [_tokens(x) for x in inputs]
    mask = None if keep is None else keep[:, 0, :, 0]
    batch = _size(inputs[1], 0)
    blocks = _Grid(inputs[1], mask, _least(batch, 1), _STRICT_SIZE, 1)
    # No count is needed: a row that sees nothing has nothing in its sums.
    state = AttentionState(maximum, sums, tf.zeros((batch,)))
    output, log_normalizer, after = _causal(
        _exact_block, inputs, feature_map, mask, state, blocks
    )
    results = [_with_ones(_tokens(output), None), _tokens(log_normalizer)]
    return tf.concat(results, axis=-1), (after.maximum, after.sums)


def _exact_block(feature_map, inputs, keep, maximum, sums):
    """A block with logits formed pair by pair, for few tokens.

    Each row is scaled by the largest exponent that it sees, so that its
    normaliser is at least one.
    """
    query, key, value, *decay = inputs
    query = _query_features(feature_map, query)
    key = _key_features(feature_map, key, keep)
    value = _with_ones(value, keep)
    elapsed = tf.cumsum(decay[0] if decay else 0.0 * query[..., :1], axis=2)
    query -= elapsed
    past = query + maximum[:, :, tf.newaxis]
    key += elapsed
    pairs = query[:, :, :, tf.newaxis] + key[:, :, tf.newaxis]
    length = _size(key, 2)
    visible = tf.linalg.band_part(tf.ones((length, length), "bool"), -1, 0)
    pairs = tf.where(visible[..., tf.newaxis], pairs, FLOOR)
    scale = tf.reduce_max(tf.reduce_max(pairs, axis=-1), axis=-1, keepdims=True)
    scale = tf.stop_gradient(tf.maximum(scale, _row_maximum(past)))
    weights = tf.reduce_sum(tf.exp(pairs - scale[..., tf.newaxis]), axis=-1)
    weights = tf.where(visible, weights, 0.0)
    results = tf.matmul(tf.exp(past - scale), sums, transpose_b=True)
    results += tf.matmul(weights, value)
    total = elapsed[:, :, -1]
    key -= total[:, :, tf.newaxis]
    after = _maximum(key, maximum - total)
    sums *= tf.exp(maximum - total - after)[..., tf.newaxis, :]
    sums += tf.matmul(value, _exp_key(key, after), transpose_a=True)
    return tf.concat([results, scale], axis=-1), (after, sums)


def _chunked(query, key, value, past):
    """Causal sums of features on one scale, and the sums after the last."""
    batch, length = _size(key, 0), _size(key, 2)
    chunk = _chunk_of(length, CHUNK_SIZE)

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
    batch, length = _size(key, 0), _size(key, 2)
    chunk = _chunk_of(length, CHUNK_SIZE)

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
    sizes = tf.shape(states)
    flat = (batch, past.shape[1], -1, past.shape[2] * past.shape[3])
    states = tf.matmul(_fading(ends), tf.reshape(states, flat))
    states = tf.reshape(states, sizes)
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
    length = _size(elapsed, -2)
    visible = tf.linalg.band_part(tf.ones((length, length), "bool"), -1, 0)
    return tf.where(visible, tf.exp(-tf.where(visible, decay, 0.0)), 0.0)


def _near(queries, keys, window):
    """Which of `(queries, keys)` are less than `window` tokens apart."""
    distance = tf.range(queries)[:, tf.newaxis] - tf.range(keys)
    return tf.abs(distance) < window


def _exact_logits(kernel, query, key):
    """Logarithms of an `ExactKernel`, `(batch, heads, t, s)`."""
    query = tf.einsum("bhtcd->bhctd", kernel.queries(query))
    key = tf.einsum("bhscd->bhcds", kernel.keys(key))
    return tf.reduce_logsumexp(feature_maps.precise_product(query, key), axis=2)


def _log_fading(decay, query_length):
    """`(batch, heads, t, s)`: minus the decay between query t and key s."""
    # One running sum here, so in float64.
    elapsed = tf.cumsum(tf.cast(decay, tf.float64), axis=2)
    elapsed = tf.pad(elapsed, [(0, 0), (0, 0), (1, 0), (0, 0)])
    keys, queries = tf.range(_size(decay, 2)), tf.range(query_length)
    last = tf.minimum(queries + 1, _size(decay, 2))
    difference = tf.gather(elapsed, last, axis=2)
    difference -= tf.linalg.matrix_transpose(elapsed[:, :, 1:])
    is_past = queries[:, tf.newaxis] >= keys
    difference = tf.where(is_past, -difference, difference)
    return tf.cast(difference, tf.float32)


def _visible_decay(decay, key_mask):
    """The decay of tokens that are seen; a padded one may hold anything."""
    if key_mask is None:
        return decay
    keep = tf.cast(key_mask, "bool")[:, :, tf.newaxis, tf.newaxis]
    return tf.where(keep, decay, 0.0)


def _log(normalizer, scale):
    """Logarithm of a normaliser that was divided by exp(scale)."""
    visible = normalizer > 0.0
    logarithm = tf.math.log(tf.where(visible, normalizer, 1.0)) + scale
    return tf.where(visible, logarithm, FLOOR)


def _with_log_gradient(of_sums, of_log, normalizer):
    """Gradient to sums and scale, the logarithm's part added."""
    visible = normalizer > 0.0
    of_log = tf.where(visible, of_log, 0.0)
    of_normalizer = of_log / tf.where(visible, normalizer, 1.0)
    return tf.concat(
        [of_sums[..., :-1], of_sums[..., -1:] + of_normalizer, of_log], axis=-1
    )


def _query_features(feature_map, query):
    """Features up to a factor of each query, which the ratio cancels."""
    return getattr(feature_map, "relative", feature_map)(query)


def _key_features(feature_map, key, keep):
    features = feature_map(key)
    if keep is None:
        return features
    # Selected, not multiplied: a padded row may hold anything, NaN too.
    return tf.where(keep, features, FLOOR if feature_map.positive else 0.0)


def _with_ones(value, keep):
    value = tf.concat([value, tf.ones_like(value[..., :1])], axis=-1)
    return value if keep is None else tf.where(keep, value, 0.0)


# The scales cancel in the ratio, so gradients treat them as constants and are
# exact.


def _maximum(log_key, past=None):
    """Maximum of each log-feature over the keys and the past."""
    maximum = tf.reduce_max(log_key, axis=-2)
    if past is not None:
        maximum = tf.maximum(maximum, past)
    return tf.stop_gradient(maximum)


def _row_maximum(log_query):
    return tf.stop_gradient(tf.reduce_max(log_query, axis=-1, keepdims=True))


def _exp_key(log_key, maximum):
    return tf.exp(log_key - maximum[..., tf.newaxis, :])


def _exp_query(log_query, maximum):
    log_query += maximum[..., tf.newaxis, :]
    return tf.exp(log_query - _row_maximum(log_query))


def _divide(sums, count=None):
    """Numerator over normaliser, and the normaliser.

    `count`, the number of visible keys, marks signed features.
    """
    numerator, normalizer = sums[..., :-1], sums[..., -1:]
    return numerator * _inverse(normalizer, count), normalizer


def _divide_gradient(upstream, output, normalizer, count):
    """Gradient to sums, from the saved results of `_divide`."""
    inverse = _inverse(normalizer, count)
    of_normalizer = -inverse * tf.reduce_sum(
        upstream * output, axis=-1, keepdims=True
    )
    if count is not None:
        moves = tf.abs(normalizer) >= _SIGNED_LIMIT * count
        of_normalizer = tf.where(moves, of_normalizer, 0.0)
    return tf.concat([upstream * inverse, of_normalizer], axis=-1)


def _inverse(normalizer, count):
    if count is not None:
        return tf.where(count > 0.0, 1.0 / _guarded(normalizer, count), 0.0)
    visible = normalizer > 0.0
    return tf.where(visible, 1.0 / tf.where(visible, normalizer, 1.0), 0.0)


def _safe_ratio(numerator, normalizer):
    visible = normalizer > 0.0
    ratio = numerator / tf.where(visible, normalizer, 1.0)
    return tf.where(visible, ratio, 0.0)


def _guarded(normalizer, count):
    """A signed normaliser kept away from zero; 1 where nothing is seen."""
    limit = _SIGNED_LIMIT * tf.where(count > 0.0, count, 1.0 / _SIGNED_LIMIT)
    magnitude = tf.maximum(tf.abs(normalizer), limit)
    return tf.where(normalizer < 0.0, -magnitude, magnitude)


def _is_exact(sums, sees):
    """Whether no row that sees a key came near underflow."""
    exact = tf.stop_gradient(sums[..., -1:]) > _UNDERFLOW
    if sees is not None:
        exact |= tf.logical_not(sees)
    return tf.reduce_all(exact)


def _exact_weights(logits, visible, scores):
    """Attention weights of the shape of scores, from logits of any range."""
    logits = tf.where(visible, logits, FLOOR)
    logits -= _row_maximum(logits)
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
    sizes = query.shape[-1], 1
    zeros = tf.zeros_like(features[0][0] + features[1][0])

    def accumulate(index, _, carry):
        pair = features[0][index] + features[1][index]
        scale = tf.maximum(carry[0], pair)
        total = carry[1] * tf.exp(carry[0] - scale) + tf.exp(pair - scale)
        return (), (), (scale, total)

    start = zeros + FLOOR, zeros
    _, _, (scale, total) = _walk(accumulate, sizes, start)
    logits = scale + tf.math.log(total)

    def gradient(upstream):
        def one(index, *_):
            pair = features[0][index] + features[1][index]
            share = upstream * tf.exp(pair - logits)
            sums = tf.reduce_sum(share, -1), tf.reduce_sum(share, -2)
            return sums, (), ()

        (of_query, of_key), _, _ = _walk(one, sizes, (), results=2)
        back = (1, 2, 3, 0)
        return tf.transpose(of_query, back), tf.transpose(of_key, back)

    return logits, gradient


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


def _chunk_of(length, largest):
    """The chunk size for a length: at most the next power of two."""
    if isinstance(length, int) and length < largest:
        return 1 << max(0, length - 1).bit_length()
    return largest


def _count(key, key_mask):
    """Visible keys, `(batch,)`."""
    if key_mask is None:
        return tf.fill((_size(key, 0),), tf.cast(_size(key, 1), tf.float32))
    return tf.reduce_sum(tf.cast(key_mask, tf.float32), axis=1)


def _size(x, axis):
    static = x.shape[axis]
    return tf.shape(x)[axis] if static is None else static


def _least(size, least):
    if isinstance(size, int) and isinstance(least, int):
        return max(size, least)
    return tf.maximum(size, least)
