"""Query heads that share a key-value head: rows of it, one beside the other.

Query head i is served by key-value head i // repeats. Outside they stand side
by side in `(batch, length, heads, dim)`, in the scan in the last axis of
`(batch, length, key_value_heads, repeats · dim)`, and in a block, heads first,
as `repeats` rows for each token. All three are the same numbers in a row.
"""

import tensorflow as tf


def size_of(x, axis):
    """The length of an axis: an integer if static, else a tensor."""
    static = x.shape[axis]
    return tf.shape(x)[axis] if static is None else static


def part(x, axis, begin=0, size=None):
    """`x[…, begin : begin + size, …]`; to the end by default.

    By `tf.split` where sizes are static: the gradient of a range in brackets
    takes ten times as long, and that of `tf.slice` is many operations.

    Args:
        x: a tensor.
        axis: which one, from the front.
        begin: an integer, from the end if negative, or a scalar tensor.
        size: an integer, less than the axis by so many if negative, or a
            scalar tensor.
    """
    length = size_of(x, axis)
    if isinstance(begin, int) and begin < 0:
        begin += length
    if size is None:
        size = length - begin
    elif isinstance(size, int) and size < 0:
        size += length
    if not (isinstance(begin, int) and isinstance(size, int)):
        return x[(slice(None),) * axis + (slice(begin, begin + size),)]
    sizes = [begin, size, length - begin - size]
    wanted = 1 if begin else 0
    return tf.split(x, [n for n in sizes if n], axis=axis)[wanted]


def swap_heads(x):
    """Swaps tokens and heads."""
    return tf.transpose(x, (0, 2, 1, 3))


def share(x, repeats):
    """`(batch, length, heads, dim)` to one head for `repeats` of them."""
    if repeats == 1:
        return x
    heads, dim = x.shape[2] // repeats, x.shape[3] * repeats
    return tf.reshape(x, (size_of(x, 0), size_of(x, 1), heads, dim))


def unshare(x, repeats):
    """The inverse of `share`."""
    if repeats == 1:
        return x
    heads, dim = x.shape[2] * repeats, x.shape[3] // repeats
    return tf.reshape(x, (size_of(x, 0), size_of(x, 1), heads, dim))


def split_rows(x, repeats):
    """Shared heads of a block to `repeats` rows for each token."""
    if repeats == 1:
        return x
    rows, dim = size_of(x, 2) * repeats, x.shape[3] // repeats
    return tf.reshape(x, (size_of(x, 0), x.shape[1], rows, dim))


def join_rows(x, repeats):
    """The inverse of `split_rows`."""
    if repeats == 1:
        return x
    rows, dim = size_of(x, 2) // repeats, x.shape[3] * repeats
    return tf.reshape(x, (size_of(x, 0), x.shape[1], rows, dim))


def repeat_rows(x, repeats, axis):
    """What all rows of a token share."""
    return x if repeats == 1 else tf.repeat(x, repeats, axis=axis)


def to_rows(x, repeats):
    """`(batch, length, heads, dim)` to `repeats` tokens for each, in a row."""
    if repeats == 1:
        return x
    batch, length, heads, dim = (size_of(x, axis) for axis in range(4))
    x = tf.reshape(x, (batch, length, heads // repeats, repeats, dim))
    x = tf.transpose(x, (0, 1, 3, 2, 4))
    return tf.reshape(x, (batch, length * repeats, heads // repeats, dim))


def from_rows(x, repeats):
    """The inverse of `to_rows`."""
    if repeats == 1:
        return x
    batch, rows, heads, dim = (size_of(x, axis) for axis in range(4))
    x = tf.reshape(x, (batch, rows // repeats, repeats, heads, dim))
    x = tf.transpose(x, (0, 1, 3, 2, 4))
    return tf.reshape(x, (batch, rows // repeats, heads * repeats, dim))


def to_batch(x, repeats):
    """`(batch, length, heads, dim)` to `repeats` sequences for each."""
    batch, length, heads, dim = (size_of(x, axis) for axis in range(4))
    x = tf.reshape(x, (batch, length, heads // repeats, repeats, dim))
    x = tf.transpose(x, (0, 3, 1, 2, 4))
    return tf.reshape(x, (batch * repeats, length, heads // repeats, dim))


def from_batch(x, repeats):
    """The inverse of `to_batch`."""
    batch, length, heads, dim = (size_of(x, axis) for axis in range(4))
    x = tf.reshape(x, (batch // repeats, repeats, length, heads, dim))
    x = tf.transpose(x, (0, 2, 3, 1, 4))
    return tf.reshape(x, (batch // repeats, length, heads * repeats, dim))
