"""Masked tokens take no place: visible ones in order, by their running count.

Where distance is counted in tokens (an exact near field, a local context), a
stream with padding anywhere in it is the stream without. Visible tokens are
moved together, what depends on the distance is computed there, and each query
finds its place by the number of visible tokens up to it.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_kt.ops import blocks
from keras_kt.ops.heads import size_of


class VisibleOrder(NamedTuple):
    """Where visible tokens stand without the masked ones.

    Attributes:
        mask: `(batch, length)` boolean.
        count: `(batch, length)` int32, visible tokens up to each, itself
            included.
        order: `(batch, length)` int32, positions: of the visible tokens, then
            of the masked ones.
    """

    mask: tf.Tensor
    count: tf.Tensor
    order: tf.Tensor

    def move_together(self, x):
        """Visible tokens first, in their order, then masked ones."""
        return take(x, self.order)

    def move_back(self, x):
        """`(batch, length, dim)` back to its places, zeros where masked."""
        x = take(x, self.count - 1)
        return tf.where(self.mask[..., tf.newaxis], x, tf.zeros((), x.dtype))

    def last(self, line, width):
        """The last `width` visible tokens.

        Args:
            line: `width` earlier tokens, then as from `move_together`.
            width: number of tokens.
        """
        return take(line, self.count[:, -1:] + tf.range(width))


def visible_order(mask) -> VisibleOrder:
    """The order of a `(batch, length)` mask, O(length · log(length))."""
    mask = tf.cast(mask, "bool")
    length = size_of(mask, 1)
    positions = tf.range(length)
    # Keys without ties, so that no sort need be stable.
    order = tf.argsort(tf.where(mask, positions, positions + length), axis=1)
    return VisibleOrder(mask, running_count(mask), order)


def running_count(mask):
    """Visible tokens up to each, itself included: `(batch, length)` int32."""
    # Two levels, since XLA sums a running sum anew at every position.
    batch, length = (size_of(mask, axis) for axis in (0, 1))
    size = blocks.CHUNK_SIZE
    chunks = blocks.shares(length, size)
    ones = tf.cast(mask, tf.int32)
    ones = tf.pad(ones, [(0, 0), (0, chunks * size - length)])
    ones = tf.reshape(ones, (batch, chunks, size))
    before = tf.cumsum(tf.reduce_sum(ones, 2), axis=1, exclusive=True)
    counts = before[..., tf.newaxis] + tf.cumsum(ones, axis=2)
    return tf.reshape(counts, (batch, chunks * size))[:, :length]


def within(lengths, key_mask, window):
    """Which pairs are less than `window` visible keys apart.

    Args:
        lengths: numbers of queries and of keys.
        key_mask: `(batch, key_length)` boolean, or `None`.
        window: number of keys.

    Returns:
        `(batch or 1, 1, query_length, key_length)`, boolean.
    """
    queries, keys = lengths
    if key_mask is None:
        counts = tf.range(keys)[tf.newaxis]
    else:
        counts = running_count(key_mask)
    of_query = tf.gather(
        counts, tf.minimum(tf.range(queries), keys - 1), axis=1
    )
    distance = of_query[..., tf.newaxis] - counts[:, tf.newaxis]
    return (tf.abs(distance) < window)[:, tf.newaxis]


def take(x, index):
    """Tokens of each sequence by their positions, the nearest if outside."""
    last = size_of(x, 1) - 1
    index = tf.clip_by_value(index, 0, last)
    return tf.gather(x, index, axis=1, batch_dims=1)
