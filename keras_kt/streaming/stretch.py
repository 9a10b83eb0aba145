"""The new tokens of a step: where they stand, and which of them count."""

from typing import NamedTuple

import tensorflow as tf

from keras_kt.ops import visible_tokens


class Stretch(NamedTuple):
    """What a step knows of its new tokens.

    Attributes:
        start: `(batch,)` int32, how many tokens each stream had before; `None`
            where no call of the model asks.
        keep: `(batch, new_tokens)` boolean, the first tokens of each row, those
            that count; `None` if all do.
        length: number of new tokens, an integer or a scalar tensor.
    """

    start: tf.Tensor | None
    keep: tf.Tensor | None
    length: int | tf.Tensor

    @property
    def count(self):
        """How many tokens count: `(batch, 1)` int32, or `length`."""
        if self.keep is None:
            return self.length
        return tf.reduce_sum(tf.cast(self.keep, tf.int32), 1, keepdims=True)

    @property
    def positions(self):
        """`(batch, new_tokens)` int32, from the start of each stream."""
        return self.start[:, tf.newaxis] + tf.range(self.length)

    def last(self, line, width):
        """The last tokens that count, of `width` earlier ones and the new."""
        if self.keep is None:
            return line[:, tf.shape(line)[1] - width :]
        return visible_tokens.take(line, self.count + tf.range(width))


def select(mask, x, other=None):
    """`(batch, length, …)` where a `(batch, length)` mask is True.

    Zeros elsewhere, or the scalar `other`.
    """
    shape = [*tf.unstack(tf.shape(mask)), *[1] * (len(x.shape) - 2)]
    other = tf.zeros((), x.dtype) if other is None else other
    return tf.where(tf.reshape(mask, shape), x, other)


def move_back(order, x):
    """Tokens back to their places, zeros where they are masked.

    Args:
        order: the `VisibleOrder` by which they were moved together.
        x: `(batch, length, …)` of any dtype.
    """
    return select(order.mask, visible_tokens.take(x, order.count - 1))
