"""Cuts sequences into blocks that stay in cache, and walks over them."""

import tensorflow as tf

# Causal tokens attend within a chunk by an explicit matrix.
CHUNK_SIZE = 64
# Tokens times heads times batch in a block. On a CPU features stay in cache,
# where causal blocks also hold a state for each chunk (the fastest of 512 to
# 8,192 at 8 heads of 64 on 2 cores).
CPU_BLOCK_ROWS = 8192
CPU_CAUSAL_BLOCK_ROWS = 2048
# Elsewhere a block fills the device (an estimate, not measured).
ACCELERATOR_BLOCK_ROWS = 65536
MAX_BLOCK = 8192


def grids(query, key, mask, is_causal=False):
    """Grids of the queries and of the keys, with the same groups."""
    sizes = [size_of(x, 1) for x in (query, key)]
    limit = _block_limit(key.shape[2], is_causal)
    longest = at_least(sizes[0], sizes[1])
    per_group = at_least(limit // at_least(longest, 1), 1)
    arguments = per_group, limit, CHUNK_SIZE if is_causal else 1
    return Grid(query, None, *arguments), Grid(key, mask, *arguments)


def _block_limit(heads, is_causal):
    """Most tokens in a block."""
    if any(tf.config.list_logical_devices(x) for x in ("GPU", "TPU")):
        rows = ACCELERATOR_BLOCK_ROWS
    else:
        rows = CPU_CAUSAL_BLOCK_ROWS if is_causal else CPU_BLOCK_ROWS
    return min(max(rows // heads, CHUNK_SIZE), MAX_BLOCK)


class Grid:
    """Cuts `(batch, length, heads, dim)` into groups of sequences and blocks.

    Long sequences are cut into blocks of tokens, one sequence at a time; short
    ones are grouped. Only what is read is copied, heads before tokens. What is
    padded is masked.

    Attributes:
        groups, count: numbers of groups, and of blocks in each.
        sizes: both.
    """

    def __init__(self, x, mask, per_group, limit, multiple):
        self.batch, self.length = size_of(x, 0), size_of(x, 1)
        self.groups = at_least(shares(self.batch, per_group), 1)
        self.group = shares(self.batch, self.groups)
        self.count = at_least(shares(self.length, limit), 1)
        self.sizes = self.groups, self.count
        size = at_least(shares(self.length, self.count), 1)
        self.multiple = chunk_of(size, multiple)
        self.size = shares(size, self.multiple) * self.multiple
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
        return swap_heads(tf.slice(x, begin, size))

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


def shares(total, size):
    """How many of a size make up a total, the last one smaller."""
    # Of positive numbers: ONNX rounds quotients of negative ones towards zero.
    return (total + size - 1) // size


def swap_heads(x):
    """Swaps tokens and heads."""
    return tf.transpose(x, (0, 2, 1, 3))


def walk(body, sizes, carry, results=0, kept=0, reverse=False):
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


def restart(is_first, start, carry):
    """`start` at the first block of a group, else what was carried."""
    if isinstance(is_first, bool):
        return list(start if is_first else carry)
    return [tf.where(is_first, a, b) for a, b in zip(start, carry, strict=True)]


def chunk_of(length, largest):
    """The chunk size for a length: at most the next power of two."""
    if isinstance(length, int) and length < largest:
        return 1 << max(0, length - 1).bit_length()
    return largest


def size_of(x, axis):
    """The length of an axis: an integer if static, else a tensor."""
    static = x.shape[axis]
    return tf.shape(x)[axis] if static is None else static


def at_least(size, least):
    """The larger of two sizes, static if both are."""
    if isinstance(size, int) and isinstance(least, int):
        return max(size, least)
    return tf.maximum(size, least)
