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

# Stands for log 0; finite, since ∞ − ∞ hides in fully padded prefixes.
FLOOR = -1e30
_UNDERFLOW = math.exp(-60.0)
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


def causal(query, key, value, feature_map, *, key_mask=None, state=None):
    """Query t sees keys 0 … t, and those that `state` has seen.

    Chunks attend within themselves by an explicit matrix and to earlier ones
    through their sums. O(length · feature_dim · value_dim) time; memory beyond
    inputs and output is one state a block. Exact at any range of the features:
    no future key touches the past.

    Args:
        query, key, value, feature_map, key_mask: as in `bidirectional`, of
            equal length.
        state: `AttentionState` to resume from; `None` starts anew.

    Returns:
        `(batch, length, heads, value_dim)` and the `AttentionState` after the
        last token.
    """
    _, blocks = _grids(query, key, key_mask, is_causal=True)
    if state is None:
        state = initial_state(
            _size(key, 0), key.shape[2], feature_map.width, value.shape[3]
        )
    return _causal(
        _causal_block, blocks, query, key, value, feature_map, key_mask, state
    )


def _causal(
    attend_block, blocks, query, key, value, feature_map, key_mask, state
):
    """`causal` by a function for one block."""
    tensors, rebuild = _unbind(feature_map)
    may_underflow = feature_map.positive and attend_block is _causal_block
    counts = None
    if not feature_map.positive:
        counts = blocks.running_count(state.count)
    sees = blocks.sees_a_key(state.count)

    @tf.custom_gradient
    def attend(query, key, value, maximum, sums, *tensors):
        bound = rebuild(tensors)
        inputs = [blocks.pad(x) for x in (query, key, value)]
        initial = [blocks.split_batch(x) for x in (maximum, sums)]
        last = blocks.count - 1

        def forward(group, block, state):
            at = group, block
            start = [x[group] for x in initial]
            state = _restart(block == 0, start, state)
            tokens = [blocks.pick(x, *at) for x in inputs]
            tokens.append(blocks.keep(*at))
            results, after = attend_block(bound, *tokens, *state)
            exact = True
            if may_underflow:
                exact = _is_exact(results, _optional(blocks.pick, sees, *at))
                results = tf.cond(
                    exact,
                    lambda: results,
                    lambda: _strict_block(bound, *tokens, *state)[0],
                )
            ratio = _divide(results, _optional(blocks.pick, counts, *at))
            exact = tf.cast(exact, tf.float32)
            return (*ratio, *state, exact), after, after

        (*ratio, maxima, sums, exact), after, _ = _walk(
            forward, blocks.sizes, [x[0] for x in initial], results=5, kept=2
        )
        output, normalizer = map(blocks.join, ratio)

        def gradient(upstream, _, of_sums):
            of_after = blocks.split_batch(of_sums)
            ratio = [blocks.pad(x) for x in (upstream, output, normalizer)]

            def backward(group, block, carry):
                at = group, block
                index = group * blocks.count + block
                wanted = [blocks.pick(x, *at) for x in inputs]
                wanted += [sums[index], *tensors]
                of_results = _divide_gradient(
                    *(blocks.pick(x, *at) for x in ratio),
                    _optional(blocks.pick, counts, *at),
                )
                (of_sums,) = _restart(
                    block == last, [of_after[group]], carry[:1]
                )

                def through(function):
                    with tf.GradientTape(watch_accessed_variables=False) as t:
                        t.watch(wanted)
                        results, (_, after) = function(
                            rebuild(wanted[4:]),
                            *wanted[:3],
                            blocks.keep(*at),
                            maxima[index],
                            wanted[3],
                        )
                    return _gradients(
                        t, [results, after], wanted, [of_results, of_sums]
                    )

                if may_underflow:
                    gradients = tf.cond(
                        exact[index] > 0.0,
                        lambda: through(attend_block),
                        lambda: through(_strict_block),
                    )
                else:
                    gradients = through(attend_block)
                of_sums = gradients[3:4]
                of_tensors = _add(carry[1:], gradients[4:])
                return gradients[:3], of_sums, [*of_sums, *of_tensors]

            zeros = [tf.zeros_like(x) for x in (of_after[0], *tensors)]
            of_inputs, (of_sums,), (_, *of_tensors) = _walk(
                backward, blocks.sizes, zeros, results=3, kept=1, reverse=True
            )
            return (
                *map(blocks.join, of_inputs),
                tf.zeros_like(maximum),
                blocks.join_batch(of_sums),
                *of_tensors,
            )

        return (output, *map(blocks.join_batch, after)), gradient

    output, maximum, sums = attend(
        query, key, value, state.maximum, state.sums, *tensors
    )
    count = state.count + _count(key, key_mask)
    return output, AttentionState(tf.stop_gradient(maximum), sums, count)


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
    if query.shape[1] != 1:
        return causal(
            query, key, value, feature_map, key_mask=key_mask, state=state
        )
    query, key, value = (
        tf.transpose(x, (0, 2, 1, 3)) for x in (query, key, value)
    )
    keep = None
    if key_mask is not None:
        keep = tf.cast(key_mask, "bool")[:, tf.newaxis, :, tf.newaxis]
    after = _absorb(feature_map, state.maximum, state.sums, key, value, keep)
    state = AttentionState(*after, state.count + _count(key[:, 0], key_mask))
    count = None
    if not feature_map.positive:
        count = state.count[:, tf.newaxis, tf.newaxis, tf.newaxis]
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
    log_query, log_key = (
        feature_map(query),
        _key_features(feature_map, key, keep),
    )
    query, key = log_query, log_key
    if feature_map.positive:
        maximum = _maximum(log_key)
        query = _exp_query(log_query, maximum)
        key = _exp_key(log_key, maximum)
    scores = tf.where(visible, tf.matmul(query, key, transpose_b=True), 0.0)
    total = tf.reduce_sum(scores, axis=-1, keepdims=True)
    if feature_map.positive:
        sees = tf.reduce_any(visible, axis=-1, keepdims=True)
        weights = tf.cond(
            _is_exact(total, sees),
            lambda: _safe_ratio(scores, total),
            lambda: _exact_weights(log_query, log_key, visible, scores),
        )
    else:
        count = tf.reduce_sum(tf.cast(visible, "float32"), -1, keepdims=True)
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


def _causal_block(feature_map, query, key, value, keep, maximum, sums):
    """Numerators and normalisers of a block, and the carry after it."""
    query = _query_features(feature_map, query)
    key = _key_features(feature_map, key, keep)
    if feature_map.positive:
        after = _maximum(key, maximum)
        query, key = _exp_query(query, after), _exp_key(key, after)
        sums *= tf.exp(maximum - after)[..., tf.newaxis, :]
        maximum = after
    results, sums = _chunked(query, key, _with_ones(value, keep), sums)
    return results, (maximum, sums)


def _strict_block(feature_map, query, key, value, keep, maximum, sums):
    """`_causal_block` for log-features of any range, a few tokens at a time.

    Gives outputs, with normalisers of one.
    """
    query, key, value = map(_tokens, (query, key, value))
    mask = None if keep is None else keep[:, 0, :, 0]
    batch = _size(key, 0)
    blocks = _Grid(key, mask, _least(batch, 1), _STRICT_SIZE, 1)
    # No count is needed: a row that sees nothing has nothing in its sums.
    state = AttentionState(maximum, sums, tf.zeros((batch,)))
    output, after = _causal(
        _exact_block, blocks, query, key, value, feature_map, mask, state
    )
    return _with_ones(_tokens(output), None), (after.maximum, after.sums)


def _exact_block(feature_map, query, key, value, keep, maximum, sums):
    """`_causal_block` with logits formed pair by pair, for few tokens.

    Each row is scaled by the largest exponent that it sees, so that its
    normaliser is at least one.
    """
    query = _query_features(feature_map, query)
    key = _key_features(feature_map, key, keep)
    value = _with_ones(value, keep)
    past = query + maximum[:, :, tf.newaxis]
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
    after = _maximum(key, maximum)
    sums *= tf.exp(maximum - after)[..., tf.newaxis, :]
    sums += tf.matmul(value, _exp_key(key, after), transpose_a=True)
    return results, (after, sums)


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


def _query_features(feature_map, query):
    """Features up to a factor of each query, which the ratio cancels."""
    relative = getattr(feature_map, "relative", feature_map)
    return relative(query)


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


def _exact_weights(query, key, visible, scores):
    """Attention weights from logits formed pair by pair, at any range."""
    logits = tf.where(visible, _pairwise_logits(query, key), FLOOR)
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
