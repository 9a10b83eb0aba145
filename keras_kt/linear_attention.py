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
# Tokens times heads times batch in a block, so that its features fit a cache
# of a few MiB, and the longest block. Chosen by that estimate, not tuned.
_BLOCK_ROWS = 4096
_MAX_BLOCK = 512


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

    O(length · feature_dim · value_dim) time; memory beyond copies of inputs
    and output does not grow with the length.

    Args:
        query: `(batch, query_length, heads, head_dim)`.
        key: `(batch, key_length, heads, head_dim)`.
        value: `(batch, key_length, heads, value_dim)`.
        feature_map: a bound feature map.
        key_mask: `(batch, key_length)` boolean, True keeps; or `None`.

    Returns:
        `(batch, query_length, heads, value_dim)`; zeros where no key is seen.
    """
    query_blocks = _Blocks(query)
    key_blocks = _Blocks(key, key_mask)
    tensors, rebuild = _unbind(feature_map)
    count = None
    if not feature_map.positive:
        count = _count(key, key_mask)[:, tf.newaxis, tf.newaxis, tf.newaxis]

    @tf.custom_gradient
    def attend(query, key, value, *tensors):
        bound = rebuild(tensors)
        keys = key_blocks.split(key), key_blocks.split(value), key_blocks.keep
        queries = (query_blocks.split(query),)
        state = _walk(_absorb(bound), keys, _nothing(key, value, bound))[1]

        def read(state, block):
            return _divide(_read(bound, block[0], *state), count), state

        (output, normalizer), _ = _walk(read, queries, state, results=2)

        def gradient(upstream):
            upstream = query_blocks.split(upstream)
            saved = (*queries, upstream, output, normalizer)
            zeros = [tf.zeros_like(x) for x in (state[1], *tensors)]

            def unread(carry, block):
                query, *ratio = block
                wanted = [query, state[1], *tensors]
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(wanted)
                    sums = _read(rebuild(tensors), query, state[0], state[1])
                of_query, *others = tape.gradient(
                    sums, wanted, _divide_gradient(*ratio, count)
                )
                return (of_query,), _add(carry, others)

            (of_query,), (of_sums, *of_tensors) = _walk(
                unread, saved, zeros, results=1
            )

            def unabsorb(carry, block):
                key, value, keep = block
                wanted = [key, value, *tensors]
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(wanted)
                    bound = rebuild(tensors)
                    sums = _sums(bound, key, value, keep, state[0])
                of_key, of_value, *others = tape.gradient(sums, wanted, of_sums)
                return (of_key, of_value), _add(carry, others)

            (of_key, of_value), of_tensors = _walk(
                unabsorb, keys, of_tensors, results=2
            )
            return (
                query_blocks.join(of_query),
                key_blocks.join(of_key),
                key_blocks.join(of_value),
                *of_tensors,
            )

        return query_blocks.join(output), gradient

    return attend(query, key, value, *tensors)


def causal(query, key, value, feature_map, *, key_mask=None, state=None):
    """Query t sees keys 0 … t, and those that `state` has seen.

    Chunks attend within themselves by an explicit matrix and to earlier ones
    through their sums. O(length · feature_dim · value_dim) time; memory beyond
    copies of inputs and output is one state a block. Exact at any range of the
    features: no future key touches the past.

    Args:
        query, key, value, feature_map, key_mask: as in `bidirectional`, of
            equal length.
        state: `AttentionState` to resume from; `None` starts anew.

    Returns:
        `(batch, length, heads, value_dim)` and the `AttentionState` after the
        last token.
    """
    blocks = _Blocks(key, key_mask, multiple=CHUNK_SIZE)
    tensors, rebuild = _unbind(feature_map)
    if state is None:
        nothing = _nothing(key, value, feature_map)
        state = AttentionState(*nothing, tf.zeros((_size(key, 0),)))
    counts = None
    if not feature_map.positive:
        counts = blocks.running_count(state.count)
    sees = blocks.sees_a_key(state.count)

    @tf.custom_gradient
    def attend(query, key, value, maximum, sums, *tensors):
        bound = rebuild(tensors)
        inputs = [blocks.split(x) for x in (query, key, value)]
        inputs += [blocks.keep, sees]

        def forward(state, block):
            *block, count = block
            sums, after = _causal_block(bound, *block, *state)
            return (*_divide(sums, count), *state), after

        (output, normalizer, *states), after = _walk(
            forward,
            [*inputs, counts],
            (tf.stop_gradient(maximum), sums),
            results=4,
        )

        def gradient(upstream, _, of_sums):
            saved = [blocks.split(upstream), output, normalizer, counts]
            zeros = [tf.zeros_like(x) for x in tensors]

            def backward(carry, block):
                query, key, value, keep, sees = block[:5]
                maximum, sums = block[5:7]
                wanted = [query, key, value, sums, *tensors]
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(wanted)
                    results, (_, after) = _causal_block(
                        rebuild(tensors), *wanted[:3], keep, sees, maximum, sums
                    )
                of_results = _divide_gradient(*block[7:])
                of_query, of_key, of_value, of_sums, *others = tape.gradient(
                    [results, after], wanted, [of_results, carry[0]]
                )
                return (of_query, of_key, of_value), (
                    of_sums,
                    *_add(carry[1:], others),
                )

            of_inputs, (of_sums, *of_tensors) = _walk(
                backward,
                [*inputs, *states, *saved],
                (of_sums, *zeros),
                results=3,
                reverse=True,
            )
            of_inputs = [blocks.join(x) for x in of_inputs]
            return *of_inputs, tf.zeros_like(maximum), of_sums, *of_tensors

        return (blocks.join(output), *after), gradient

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
    after = _absorb(feature_map)(
        (state.maximum, state.sums), (key, value, keep)
    )[1]
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


class _Blocks:
    """Cuts `(batch, length, heads, dim)` into a walk over blocks, and back.

    Blocks stand first, `(blocks, batch, heads, block, dim)`: one transposition
    brings heads before tokens and blocks before all. What is padded is masked.

    Attributes:
        keep: `(blocks, batch, 1, block, 1)` boolean, or `None` for all.
    """

    def __init__(self, x, mask=None, multiple=1):
        self.batch, self.length, heads = (_size(x, axis) for axis in range(3))
        rows = self.batch * heads
        limit = _clip(_BLOCK_ROWS // _least(rows, 1), CHUNK_SIZE, _MAX_BLOCK)
        self.count = _least(-(-self.length // limit), 1)
        size = _least(-(-self.length // self.count), 1)
        self.multiple = _chunk_of(size, multiple)
        self.size = -(-size // self.multiple) * self.multiple
        self.padding = self.count * self.size - self.length
        self.is_padded = not (
            isinstance(self.padding, int) and self.padding == 0
        )
        self.mask = None if mask is None else tf.cast(mask, "bool")
        if self.is_padded:
            if mask is None:
                self.mask = tf.ones((self.batch, self.length), "bool")
            self.mask = tf.pad(self.mask, ((0, 0), (0, self.padding)))
        self.keep = self._split_rows(self.mask)

    def _split_rows(self, rows):
        """`(batch, padded_length)` to `(blocks, batch, 1, block, 1)`."""
        if rows is None:
            return None
        rows = tf.reshape(rows, (self.batch, self.count, 1, self.size, 1))
        return tf.transpose(rows, (1, 0, 2, 3, 4))

    def split(self, x):
        if self.is_padded:
            x = tf.pad(x, ((0, 0), (0, self.padding), (0, 0), (0, 0)))
        shape = (self.batch, self.count, self.size, x.shape[2], x.shape[3])
        return tf.transpose(tf.reshape(x, shape), (1, 0, 3, 2, 4))

    def join(self, x):
        x = tf.transpose(x, (1, 0, 3, 2, 4))
        length = self.count * self.size
        x = tf.reshape(x, (self.batch, length, x.shape[3], x.shape[4]))
        return x[:, : self.length] if self.is_padded else x

    def running_count(self, past):
        """Visible keys up to each position, split into blocks."""
        length = self.count * self.size
        if self.mask is None:
            counts = tf.range(1, length + 1, dtype=tf.float32)[tf.newaxis]
            counts += past[:, tf.newaxis]
        else:
            # Two levels, since XLA sums a running sum anew at every position.
            ones = tf.cast(self.mask, tf.float32)
            ones = tf.reshape(ones, (self.batch, -1, self.multiple))
            before = tf.cumsum(tf.reduce_sum(ones, 2), axis=1, exclusive=True)
            before += past[:, tf.newaxis]
            counts = before[..., tf.newaxis] + tf.cumsum(ones, axis=2)
        return self._split_rows(counts)

    def sees_a_key(self, past):
        """Which causal rows see a key, split into blocks; `None` for all."""
        if self.mask is None:
            return None
        # By the first visible key: no running sum over the length.
        first = tf.argmax(self.mask, axis=1, output_type=tf.int32)
        rows = tf.range(self.count * self.size)[tf.newaxis]
        sees = rows >= first[:, tf.newaxis]
        sees &= tf.reduce_any(self.mask, axis=1, keepdims=True)
        return self._split_rows(sees | (past[:, tf.newaxis] > 0))


def _walk(body, blocks, carry, results=0, reverse=False):
    """Runs `body(carry, block) -> (results, carry)` over the leading axis.

    Returns a tuple of `results` float32 tensors, stacked, and the last carry.
    `None` among the blocks is passed on. A loop of constant size in the graph,
    whatever the length.
    """
    count = _size(next(x for x in blocks if x is not None), 0)

    def pick(index):
        return [None if x is None else x[index] for x in blocks]

    if isinstance(count, int) and count == 1:
        outputs, carry = body(carry, pick(0))
        return tuple(x[tf.newaxis] for x in outputs), carry

    def advance(index, carry, arrays):
        position = count - 1 - index if reverse else index
        outputs, carry = body(carry, pick(position))
        arrays = [
            array.write(position, x)
            for array, x in zip(arrays, outputs, strict=True)
        ]
        return index + 1, tuple(carry), arrays

    arrays = [tf.TensorArray(tf.float32, size=count) for _ in range(results)]
    _, carry, arrays = tf.while_loop(
        lambda index, *_: index < count,
        advance,
        (tf.constant(0), tuple(carry), arrays),
        parallel_iterations=1,
        maximum_iterations=count,
    )
    return tuple(array.stack() for array in arrays), carry


def _absorb(feature_map):
    """State after a block of keys: `(carry, block) -> ((), carry)`."""

    def absorb(carry, block):
        maximum, sums = carry
        key, value, keep = block
        logs = _key_features(feature_map, key, keep)
        if feature_map.positive:
            after = _maximum(logs, maximum)
            sums *= tf.exp(maximum - after)[..., tf.newaxis]
            logs, maximum = _exp_key(logs, after), after
        sums += tf.matmul(logs, _with_ones(value, keep), transpose_a=True)
        return (), (maximum, sums)

    return absorb


def _sums(feature_map, key, value, keep, maximum):
    """What a block of keys adds to sums relative to the final maximum."""
    features = _key_features(feature_map, key, keep)
    if feature_map.positive:
        features = _exp_key(features, maximum)
    return tf.matmul(features, _with_ones(value, keep), transpose_a=True)


def _read(feature_map, query, maximum, sums):
    """Numerators and normaliser of a block of queries."""
    features = feature_map(query)
    if feature_map.positive:
        features = _exp_query(features, maximum)
    return tf.matmul(features, sums)


def _causal_block(feature_map, query, key, value, keep, sees, maximum, sums):
    """Numerators and normalisers of a block, and the carry after it."""
    log_query = feature_map(query)
    log_key = _key_features(feature_map, key, keep)
    value = _with_ones(value, keep)
    if not feature_map.positive:
        results, after = _chunked(log_query, log_key, value, sums)
        return results, (maximum, after)
    after = _maximum(log_key, maximum)
    results, sums_after = _chunked(
        _exp_query(log_query, after),
        _exp_key(log_key, after),
        value,
        sums * tf.exp(maximum - after)[..., tf.newaxis],
    )
    results = tf.cond(
        _is_exact(results, sees),
        lambda: results,
        lambda: _strict(log_query, log_key, value, maximum, sums),
    )
    return results, (after, sums_after)


def _chunked(query, key, value, past):
    """Causal sums of features on one scale, and the sums after the last."""
    batch, length = _size(key, 0), _size(key, 2)
    chunk = _chunk_of(length, CHUNK_SIZE)

    def split(x):
        shape = (batch, x.shape[1], -1, chunk, x.shape[3])
        return tf.reshape(x, shape)

    chunked_query, chunked_key = split(query), split(key)
    chunked_value = split(value)
    sums = tf.matmul(chunked_key, chunked_value, transpose_a=True)
    before = tf.cumsum(sums, axis=2, exclusive=True) + past[:, :, tf.newaxis]
    scores = tf.matmul(chunked_query, chunked_key, transpose_b=True)
    scores = tf.linalg.band_part(scores, -1, 0)
    results = tf.matmul(chunked_query, before) + tf.matmul(
        scores, chunked_value
    )
    results = tf.reshape(results, tf.shape(value))
    return results, past + tf.reduce_sum(sums, axis=2)


def _strict(query, key, value, maximum, sums):
    """Causal sums for log-features of any range, each row on its own scale.

    The past is read relative to its own maximum. Within the block, halves
    attend to the halves before them, down to single tokens, so that every
    reference is a maximum over visible keys only.
    """
    length = query.shape[2]
    target = _MAX_BLOCK if length is None else 1 << (length - 1).bit_length()
    shape = tf.shape(value)
    extra = target - _size(query, 2)
    padding = ((0, 0), (0, 0), (0, extra), (0, 0))
    query, value = tf.pad(query, padding), tf.pad(value, padding)
    key = tf.pad(key, padding, constant_values=FLOOR)
    shifted = query + maximum[:, :, tf.newaxis]
    past_scale = _row_maximum(shifted)
    past = tf.matmul(tf.exp(shifted - past_scale), sums)
    pair = query + key
    scale = _row_maximum(pair)
    results = tf.reduce_sum(tf.exp(pair - scale), -1, keepdims=True) * value
    results, scale = _merge(results, scale, past, past_scale)
    half = 1
    while half < target:
        late_query = _halves(query, half, target)[1]
        early_key = _halves(key, half, target)[0]
        early_value = _halves(value, half, target)[0]
        reference = _maximum(early_key)
        late_query += reference[..., tf.newaxis, :]
        late_scale = _row_maximum(late_query)
        scores = tf.matmul(
            tf.exp(late_query - late_scale),
            _exp_key(early_key, reference),
            transpose_b=True,
        )
        late = tf.matmul(scores, early_value)
        early = tf.zeros_like(late), tf.fill(tf.shape(late_scale), FLOOR)
        results, scale = _merge(
            results,
            scale,
            tf.reshape(tf.stack([early[0], late], 3), tf.shape(results)),
            tf.reshape(tf.stack([early[1], late_scale], 3), tf.shape(scale)),
        )
        half *= 2
    return tf.reshape(results[:, :, : shape[2]], shape)


def _halves(x, half, length):
    """Pairs of `half` tokens: two `(batch, heads, pairs, half, dim)`."""
    shape = (_size(x, 0), x.shape[1], length // (2 * half), 2, half, x.shape[3])
    x = tf.reshape(x, shape)
    return x[:, :, :, 0], x[:, :, :, 1]


def _merge(sums, scale, other_sums, other_scale):
    joint = tf.maximum(scale, other_scale)
    sums = sums * tf.exp(scale - joint) + other_sums * tf.exp(
        other_scale - joint
    )
    return sums, joint


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
    zeros = tf.zeros_like(features[0][0] + features[1][0])

    def accumulate(carry, feature):
        pair = feature[0] + feature[1]
        scale = tf.maximum(carry[0], pair)
        total = carry[1] * tf.exp(carry[0] - scale) + tf.exp(pair - scale)
        return (), (scale, total)

    _, (scale, total) = _walk(accumulate, features, (zeros + FLOOR, zeros))
    logits = scale + tf.math.log(total)

    def gradient(upstream):
        def one(carry, feature):
            share = upstream * tf.exp(feature[0] + feature[1] - logits)
            return (tf.reduce_sum(share, -1), tf.reduce_sum(share, -2)), carry

        (of_query, of_key), _ = _walk(one, features, (), results=2)
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


def _nothing(key, value, feature_map):
    """Maximum and sums that have seen no key."""
    return initial_state(
        _size(key, 0), key.shape[2], feature_map.width, value.shape[3]
    )[:2]


def _add(carry, others):
    return [
        a if b is None else a + b for a, b in zip(carry, others, strict=True)
    ]


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
    if isinstance(size, int):
        return max(size, least)
    return tf.maximum(size, least)


def _clip(size, low, high):
    if isinstance(size, int):
        return min(max(size, low), high)
    return tf.clip_by_value(size, low, high)
