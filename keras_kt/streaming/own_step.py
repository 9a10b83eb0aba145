"""Calls of layers that stream by themselves: `initial_state` and `step`."""

import inspect

import keras
import tensorflow as tf

from keras_kt.layers.axes import both, mask_of
from keras_kt.streaming import protocol
from keras_kt.streaming.call import (
    Refusal,
    TokenwiseCall,
    carry_mask,
    parameters,
)

# What `step` decides by itself.
_SETTLED = "training", "use_causal_mask", "state"


class OwnStep(TokenwiseCall):
    """A call of a layer with `initial_state` and `step`.

    The call's arguments go to the arguments of `step` of the same names, the
    first one to the first.
    """

    shapes = None

    def __init__(self, layer, args, kwargs):
        super().__init__(layer)
        self._names = list(parameters(layer))
        step = inspect.signature(layer.step).parameters
        self._first, self._taken = next(iter(step)), set(step)
        self._state_by_name = "state" in step
        self._mask = protocol.mask_argument(layer)
        self.takes_mask = self._mask is not None
        given = self._by_name(args, kwargs)
        if "use_causal_mask" in self._names and not _is_true(
            given.get("use_causal_mask")
        ):
            raise Refusal(
                "is called without `use_causal_mask=True`, so that tokens see "
                "later ones",
                "Call it with `use_causal_mask=True`, and train it so.",
            )
        for name, value in self._arguments(given).items():
            default = parameters(layer)[name].default
            is_set = value is not None and value is not default
            if is_set and name not in (*self._taken, self._names[0]):
                raise Refusal(
                    f"is called with `{name}`, which its `step` does not take",
                    "Leave it out; padding is a vector mask.",
                )

    def _by_name(self, args, kwargs):
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def _arguments(self, given):
        return {k: v for k, v in given.items() if k not in _SETTLED}

    def initial_state(self, batch_size):
        """The layer's."""
        return self.operation.initial_state(batch_size)

    def step(self, stretch, state, args, kwargs):
        """The layer's, as its call would get the tokens."""
        arguments = self._arguments(self._by_name(args, kwargs))
        arguments = {
            name: self._as_called(x)
            for name, x in arguments.items()
            if name in self._taken or name == self._names[0]
        }
        x = arguments.pop(self._names[0])
        if stretch.keep is not None:
            # Of the tensor that it is named after, or else of the first one.
            of = arguments.get(self._mask.removesuffix("_mask"))
            mask = mask_of(x if of is None else of, arguments.get(self._mask))
            arguments[self._mask] = both(mask, stretch.keep)
        if self._state_by_name:
            output, state = self.operation.step(x, state=state, **arguments)
        else:
            output, state = self.operation.step(x, state, **arguments)
        return carry_mask(self.operation, x, output), state

    def _as_called(self, x):
        """A tensor in the layer's compute dtype, as Keras hands it on."""
        layer = self.operation
        if not isinstance(layer, keras.Layer) or not layer.autocast:
            return x
        if not tf.is_tensor(x) or not x.dtype.is_floating:
            return x
        mask, x = mask_of(x), tf.cast(x, layer.compute_dtype)
        if mask is not None and mask_of(x) is None:
            x._keras_mask = mask
        return x


def _is_true(value):
    return isinstance(value, bool) and value
