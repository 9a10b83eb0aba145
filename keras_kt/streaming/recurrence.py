"""Calls of recurrent layers: their own states travel, and the last output."""

import keras
import tensorflow as tf

from keras_kt.layers.axes import both, mask_of, without_mask
from keras_kt.ops import visible_tokens
from keras_kt.streaming.call import Refusal, TokenwiseCall, carry_mask

_MUST_BE = {
    "return_sequences": True,
    "return_state": False,
    "go_backwards": False,
    "stateful": False,
}


class Recurrence(TokenwiseCall):
    """A call of a recurrent layer (GRU, LSTM, SimpleRNN, RNN of a cell).

    A masked token has the output of the last one before it, which the state
    therefore holds beside the cell's.
    """

    def __init__(self, layer, args, kwargs):
        super().__init__(layer)
        for name, expected in _MUST_BE.items():
            if getattr(layer, name) != expected:
                raise Refusal(
                    f"has {name}={not expected}",
                    f"Make it with `{name}={expected}`, and train it so.",
                )
        if len(args) > 1 or kwargs.get("initial_state") is not None:
            raise Refusal(
                "is called with an initial state",
                "Let it start from its own.",
            )
        # The same cell, whose weights it has, in a layer that gives its state.
        self._layer = keras.layers.RNN(
            layer.cell,
            return_sequences=True,
            return_state=True,
            zero_output_for_mask=layer.zero_output_for_mask,
            dtype=layer.dtype_policy,
        )
        states = self._layer.get_initial_state(1)
        self._structure = tf.nest.map_structure(lambda x: None, states)
        states = tf.nest.flatten(states)
        width = layer.compute_output_shape(args[0].shape)[-1]
        self.shapes = ((width,), *(tuple(x.shape[1:]) for x in states))

    def initial_state(self, batch_size):
        """Zeros for the output, and the cell's initial states."""
        states = tf.nest.flatten(self._layer.get_initial_state(batch_size))
        states = [tf.cast(x, tf.float32) for x in states]
        return tf.zeros((batch_size, *self.shapes[0])), *states

    def step(self, stretch, state, args, kwargs):
        """Runs the cell on from its states."""
        x, (before, *states) = args[0], state
        mask = both(mask_of(x, kwargs.get("mask")), stretch.keep)
        states = tf.nest.pack_sequence_as(self._structure, states)
        output, *states = self._layer(
            without_mask(x), initial_state=states, mask=mask, training=False
        )
        if mask is not None and not self._layer.zero_output_for_mask:
            has_begun = visible_tokens.running_count(mask) > 0
            before = tf.cast(before, output.dtype)[:, tf.newaxis]
            output = tf.where(has_begun[..., tf.newaxis], output, before)
        states = [output[:, -1], *tf.nest.flatten(states)]
        output = carry_mask(self.operation, x, output)
        return output, tuple(tf.cast(x, tf.float32) for x in states)
