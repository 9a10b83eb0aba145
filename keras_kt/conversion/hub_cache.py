"""KerasHub's cache as rows of integers, which hold states of streams.

KerasHub's language models hand a cache from token to token, which samplers
repeat and gather along the batch and nothing else looks into. Each row holds,
bit by bit, what a layer remembers of a stream: as integers, since layers of
lower precision cast all floats that they are given. Before it stands how many
positions the layer takes in: what comes after is not part of every prompt.
"""

import math

import tensorflow as tf

from keras_kt.ops import packing

# More positions than there are.
ALL = 2**62


def is_packed(cache) -> bool:
    """Whether a cache, or KerasHub's, holds rows of integers."""
    return tf.is_tensor(cache) and cache.dtype == tf.int64


def write(x, columns=None):
    """`(batch, …)` numbers as a cache `(batch, columns)` that takes all in.

    Args:
        x: a tensor with static shape, but for the batch.
        columns: how many there should be. Defaults to what is needed.
    """
    size, in_one = math.prod(x.shape[1:]), _numbers_in_one(x.dtype)
    columns = columns or 1 + -(-size // in_one)
    x = tf.reshape(x, (-1, size))
    x = tf.pad(x, [(0, 0), (0, (columns - 1) * in_one - size)])
    if in_one > 1:
        x = tf.reshape(x, (-1, columns - 1, in_one))
    return _with_limit(tf.bitcast(x, tf.int64), ALL)


def read(cache, dtype=tf.float32):
    """The numbers of a cache, `(batch, size)`; zeros may follow."""
    size = (cache.shape[1] - 1) * _numbers_in_one(tf.as_dtype(dtype))
    return tf.reshape(tf.bitcast(cache[:, 1:], dtype), (-1, size))


def write_state(state, columns=None):
    """A state as a cache that takes all in."""
    return write(packing.pack(state), columns)


def read_state(cache, shapes):
    """The state of these shapes that a cache holds."""
    return packing.unpack(read(cache), shapes)


def widened(cache, columns):
    """A cache with so many columns; new ones hold zeros."""
    missing = columns - cache.shape[1]
    zeros = tf.zeros((tf.shape(cache)[0], missing), tf.int64)
    return tf.concat([cache, zeros], axis=1)


def limited(cache, limit):
    """A cache that takes in the positions before `limit` only."""
    return _with_limit(cache[:, 1:], limit)


def taken(cache, start, tokens):
    """Which of new tokens a layer takes in, `(batch, length)`, or `None`: all.

    Args:
        cache: the cache; a single token is always taken in.
        start: position of the first token.
        tokens: `(batch, length, …)`.
    """
    if tokens.shape[1] == 1:
        return None
    length = tf.shape(tokens)[1]
    positions = tf.cast(start, tf.int64) + tf.range(tf.cast(length, tf.int64))
    return positions[tf.newaxis] < cache[:, :1]


def _numbers_in_one(dtype):
    return tf.int64.size // dtype.size


def _with_limit(bits, limit):
    limits = tf.fill((tf.shape(bits)[0], 1), tf.cast(limit, tf.int64))
    return tf.concat([limits, bits], axis=1)
