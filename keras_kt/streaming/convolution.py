"""Calls of `Conv1D(padding="causal")`: the last tokens of its reach travel."""

import tensorflow as tf

from keras_kt.layers.axes import without_mask
from keras_kt.streaming.call import Refusal, TokenwiseCall, carry_mask


class Convolution(TokenwiseCall):
    """A call of a causal convolution; its state is the tokens it looks back.

    Padding of the past is zeros, as `Conv1D` pads.
    """

    def __init__(self, layer, args, kwargs):
        super().__init__(layer)
        for name, expected in (
            ("padding", "causal"),
            ("strides", (1,)),
            ("data_format", "channels_last"),
        ):
            value = getattr(layer, name)
            if value != expected:
                raise Refusal(
                    f"has {name}={value!r}",
                    'Make it `Conv1D(padding="causal")` with one stride and '
                    "the channels last, and train it so.",
                )
        (self._size,), (rate,) = layer.kernel_size, layer.dilation_rate
        self._reach = (self._size - 1) * rate
        self.shapes = ((self._reach, args[0].shape[-1]),)

    def step(self, stretch, state, args, kwargs):
        """Convolves the last tokens and the new; keeps outputs of the new."""
        x, (context,) = args[0], state
        context = tf.cast(context, x.dtype)
        line = tf.concat([context, without_mask(x)], axis=1)
        output = self.call([line], {})[:, self._reach :]
        last = tf.ensure_shape(
            stretch.last(line, self._reach), (None, *self.shapes[0])
        )
        output = carry_mask(self.operation, x, output)
        return output, (tf.cast(last, tf.float32),)
