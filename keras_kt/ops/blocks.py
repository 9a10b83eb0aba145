"""How sequences are cut into blocks that stay in cache."""

import tensorflow as tf

from keras_kt.ops.heads import size_of, swap_heads

# Causal tokens attend within a chunk by an explicit matrix.
CHUNK_SIZE = 64
# Tokens times heads times batch in a block. On a CPU features stay in cache,
# where causal blocks also hold a state for each chunk (the fastest of 512 to
# 8,192 at 8 heads of 64 on 2 cores).
CPU_BLOCK_ROWS = 8192
CPU_CAUSAL_BLOCK_ROWS = 2048
# Elsewhere a block fills the device (an estimate, not measured). The memory of
# the exact form of a causal block grows with the square of its tokens.
ACCELERATOR_BLOCK_ROWS = 65536
ACCELERATOR_CAUSAL_BLOCK_ROWS = 16384
MAX_BLOCK = 8192
# Entries of the matrices of a band in a block.
CPU_BAND_ENTRIES = 2**18
ACCELERATOR_BAND_ENTRIES = 2**24


class Blocks:
    """Cuts `(batch, length, heads, dim)` into groups of sequences and blocks.

    Long sequences are cut into blocks of tokens, one sequence at a time; short
    ones are grouped. Only what is read is copied, heads before tokens. What is
    padded is masked.

    Args:
        batch, length: sizes, integers or scalar tensors.
        mask: `(batch, length)` boolean, True keeps; or `None`.
        per_group: sequences in a group.
        limit: most tokens in a block.
        multiple: blocks are a multiple of so many tokens, or of the power of
            two that holds a shorter sequence.

    Attributes:
        groups, count: numbers of groups, and of blocks in each.
    """

    def __init__(self, batch, length, mask, per_group, limit, multiple):
        self.batch, self.length = batch, length
        self.groups = at_least(shares(batch, per_group), 1)
        self.group = shares(batch, self.groups)
        self.count = at_least(shares(length, limit), 1)
        size = at_least(shares(length, self.count), 1)
        multiple = chunk_of(size, multiple)
        self.size = shares(size, multiple) * multiple
        self._padding = [
            self.groups * self.group - batch,
            self.count * self.size - length,
        ]
        self._is_padded = any(
            not isinstance(n, int) or n > 0 for n in self._padding
        )
        if mask is None and self._is_padded:
            mask = tf.ones((batch, length), "bool")
        self._mask = None if mask is None else self.pad(tf.cast(mask, "bool"))

    @property
    def are_one(self):
        """Whether there is one block only, as far as sizes are known."""
        total = self.groups * self.count
        return isinstance(total, int) and total == 1

    def pad(self, x):
        """Whole groups and blocks."""
        if not self._is_padded:
            return x
        rest = [(0, 0)] * (x.shape.rank - 2)
        return tf.pad(x, [(0, n) for n in self._padding] + rest)

    def pick(self, x, group, block):
        """One block of what was padded, heads before tokens."""
        # Sliced as it lies: XLA copies a whole array that is reshaped before
        # a loop.
        begin = group * self.group, block * self.size, 0, 0
        size = self.group, self.size, size_of(x, 2), size_of(x, 3)
        return swap_heads(tf.slice(x, begin, size))

    def keep(self, group, block):
        """Which keys of a block are seen, `(group, 1, block, 1)`, or `None`."""
        if self._mask is None:
            return None
        begin = group * self.group, block * self.size
        rows = tf.slice(self._mask, begin, (self.group, self.size))
        return rows[:, tf.newaxis, :, tf.newaxis]

    def join(self, x):
        """Stacked blocks, heads first, to `(batch, length, heads, dim)`."""
        batch, length = self.groups * self.group, self.count * self.size
        shape = self.groups, self.count, self.group, *x.shape[2:3], self.size
        dim = size_of(x, 4)
        x = tf.reshape(x, (*shape, dim))
        x = tf.transpose(x, (0, 2, 1, 4, 3, 5))
        x = tf.reshape(x, (batch, length, x.shape[4], dim))
        return x[: self.batch, : self.length] if self._is_padded else x

    def split_batch(self, x):
        """`(batch, …)` to `(groups, group, …)`."""
        if self._is_padded:
            rest = [(0, 0)] * (x.shape.rank - 1)
            x = tf.pad(x, [(0, self._padding[0])] + rest)
        sizes = (size_of(x, axis) for axis in range(1, x.shape.rank))
        return tf.reshape(x, (self.groups, self.group, *sizes))

    def join_batch(self, x):
        """The inverse of `split_batch`."""
        sizes = (size_of(x, axis) for axis in range(2, x.shape.rank))
        x = tf.reshape(x, (self.groups * self.group, *sizes))
        return x[: self.batch] if self._is_padded else x


def of_queries_and_keys(query, key, mask, *, causal=False):
    """`Blocks` of the queries and of the keys, with the same groups."""
    batch = size_of(key, 0)
    lengths = [size_of(x, 1) for x in (query, key)]
    limit = _limit(key.shape[2], causal)
    longest = at_least(at_least(*lengths), 1)
    per_group = at_least(limit // longest, 1)
    rest = per_group, limit, CHUNK_SIZE if causal else 1
    return (
        Blocks(batch, lengths[0], None, *rest),
        Blocks(batch, lengths[1], mask, *rest),
    )


def of_band(query, window, mask):
    """`Blocks` of queries that see so many keys before them.

    Args:
        query: `(batch, length, key_value_heads, dim)`.
        window: number of keys.
        mask: of the keys, as in `Blocks`.
    """
    # Half of a block's queries see none of its keys, so it is shorter than the
    # window.
    if _on_accelerator():
        entries, limit = ACCELERATOR_BAND_ENTRIES, max(window, 256)
        limit = min(limit, 1024)
    else:
        entries, limit = CPU_BAND_ENTRIES, max(window // 2, CHUNK_SIZE)
        limit = min(limit, 256)
    batch, length = size_of(query, 0), size_of(query, 1)
    longest = limit
    if isinstance(length, int):
        longest = min(max(length, 1), limit)
    of_one = query.shape[2] * longest * (window + longest)
    return Blocks(batch, length, mask, max(1, entries // of_one), limit, 1)


def _on_accelerator():
    return any(tf.config.list_logical_devices(x) for x in ("GPU", "TPU"))


def _limit(heads, causal):
    """Most tokens in a block."""
    if _on_accelerator():
        rows = (ACCELERATOR_BLOCK_ROWS, ACCELERATOR_CAUSAL_BLOCK_ROWS)[causal]
    else:
        rows = (CPU_BLOCK_ROWS, CPU_CAUSAL_BLOCK_ROWS)[causal]
    return min(max(rows // heads, CHUNK_SIZE), MAX_BLOCK)


def shares(total, size):
    """How many of a size make up a total, the last one smaller."""
    # Of positive numbers: ONNX rounds quotients of negative ones towards zero.
    return (total + size - 1) // size


def chunk_of(length, largest):
    """The chunk size for a length: at most the next power of two."""
    if isinstance(length, int) and length < largest:
        return 1 << max(0, length - 1).bit_length()
    return largest


def at_least(size, least):
    """The larger of two sizes, static if both are."""
    if isinstance(size, int) and isinstance(least, int):
        return max(size, least)
    return tf.maximum(size, least)
