"""Calls that depend on where a token stands in the sequence."""

import keras
import tensorflow as tf

from keras_kt.layers.axes import mask_of, without_mask
from keras_kt.ops import visible_tokens
from keras_kt.streaming.call import Refusal, TokenwiseCall, is_symbolic
from keras_kt.streaming.stretch import select


class Positioned(TokenwiseCall):
    """A call of a layer that takes `positions`, `(batch, length)`.

    As KerasHub's `PositionEmbedding`, `RotaryEmbedding` and others do.
    """

    needs_position = True

    def __init__(self, layer, args, kwargs):
        super().__init__(layer)
        if "start_index" in kwargs or len(args) > 1:
            raise Refusal(
                "is told where its tokens start",
                "Leave `start_index` out: a stream counts its tokens itself.",
            )
        self._limit = getattr(layer, "sequence_length", None)

    def step(self, stretch, state, args, kwargs):
        """The call, told where the new tokens stand."""
        _check_limit(stretch, self._limit, self.operation)
        positions = stretch.positions
        if self._limit is not None:
            positions = tf.minimum(positions, self._limit - 1)
        output = self.call(args, {**kwargs, "positions": positions})
        return _nan_beyond(stretch, self._limit, output), state


class Placed(TokenwiseCall):
    """A call for one length of input, alone on each token and its position.

    New tokens are put to their places in a sequence of that length, whose other
    tokens are zeros. Each step costs a call on the whole length.
    """

    needs_position = True

    def __init__(self, operation, args, kwargs, length):
        super().__init__(operation)
        leaves = keras.tree.flatten((args, kwargs))
        self._are_tokens = [is_symbolic(x) for x in leaves]
        self._limit = length

    def step(self, stretch, state, args, kwargs):
        """The call on a sequence with the new tokens in their places."""
        _check_limit(stretch, self._limit, self.operation)
        index = tf.range(self._limit) - stretch.start[:, tf.newaxis]
        is_new = (index >= 0) & (index < stretch.length)

        def place(x):
            placed = select(is_new, visible_tokens.take(without_mask(x), index))
            placed = tf.ensure_shape(placed, (None, self._limit, *x.shape[2:]))
            if mask_of(x) is not None:
                mask = visible_tokens.take(tf.cast(mask_of(x), "bool"), index)
                placed._keras_mask = mask & is_new
            return placed

        def cut(x):
            taken = visible_tokens.take(without_mask(x), stretch.positions)
            if mask_of(x) is not None:
                mask = visible_tokens.take(mask_of(x), stretch.positions)
                taken._keras_mask = mask
            return taken

        leaves = [
            place(x) if is_tokens else x
            for x, is_tokens in zip(
                keras.tree.flatten((args, kwargs)),
                self._are_tokens,
                strict=True,
            )
        ]
        args, kwargs = keras.tree.pack_sequence_as((args, kwargs), leaves)
        output = keras.tree.map_structure(cut, self.call(args, kwargs))
        return _nan_beyond(stretch, self._limit, output), state


def _check_limit(stretch, limit, operation):
    """Raises a `ValueError` if tokens stand past the last position."""
    if limit is None or not tf.executing_eagerly():
        return
    end = int(tf.reduce_max(stretch.start[:, tf.newaxis] + stretch.count))
    if end > limit:
        raise ValueError(
            f"`tokens` must end within the {limit} positions that "
            f"{operation.name!r} knows. Received: tokens up to position {end}. "
            "Start another stream, or train with more positions."
        )


def _nan_beyond(stretch, limit, output):
    """Outputs, NaN past the last position: a compiled step cannot raise."""
    if limit is None or tf.executing_eagerly():
        return output

    def poison(x):
        if not x.dtype.is_floating:
            return x
        nan = tf.constant(float("nan"), x.dtype)
        result = select(stretch.positions < limit, x, nan)
        if mask_of(x) is not None:
            result._keras_mask = mask_of(x)
        return result

    return keras.tree.map_structure(poison, output)
