"""A functional model's `initial_state` and `step`, from its program."""

import weakref

import keras
import numpy as np
import tensorflow as tf

from keras_kt.layers.axes import mask_of, without_mask
from keras_kt.ops import visible_tokens
from keras_kt.streaming import graph, protocol
from keras_kt.streaming.call import fill
from keras_kt.streaming.stretch import Stretch, move_back

# Streams of functional models, with the layers that they were made of. They
# hold layers and not the model.
_STREAMS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# What counts the tokens in a state; no layer has such a name.
_POSITION = "/position"


def stream_of(model):
    """What streams a model: itself if it can, else its graph as a `Stream`."""
    if not protocol.missing_methods(model):
        return model
    if not graph.is_graph(model):
        raise ValueError(
            "`model` must be causal: functional or Sequential, or with the "
            "methods `initial_state(batch_size)` and `step(tokens, state)`. "
            f"Received: a {type(model).__name__} without "
            f"{protocol.missing_methods(model)}. A class of its own has them "
            "call those of its KernelizedAttention or "
            "KernelizedTransformerDecoder layers."
        )
    if not model.built:
        raise ValueError(
            "`model` must be built, so that its layers are known. Received: "
            f"{model.name!r}, which is not. Call it once."
        )
    layers, stream = _STREAMS.get(model, ((), None))
    if stream is None or list(map(id, layers)) != list(map(id, model.layers)):
        # Tried on eager tensors, wherever it is asked for.
        with tf.init_scope():
            stream = Stream(graph.read(model))
        _STREAMS[model] = model.layers, stream
    return stream


class Stream:
    """`initial_state` and `step` of a program."""

    def __init__(self, program):
        self._program = program
        calls = {x.place: x.call for x in program.instructions}
        self._stateful = {
            place: call for place, call in calls.items() if call.shapes != ()
        }
        self._unmasked = [
            place for place, call in calls.items() if not call.takes_mask
        ]
        self._counts = any(call.needs_position for call in calls.values())

    @property
    def takes_mask(self):
        """Whether `step` takes a mask of the new tokens."""
        return not self._unmasked

    def initial_state(self, batch_size):
        """The state of streams that have seen nothing: a dict by layer."""
        state = {
            place: call.initial_state(batch_size)
            for place, call in self._stateful.items()
        }
        if self._counts:
            state[_POSITION] = tf.zeros((batch_size,), tf.int32)
        return state

    def step(self, tokens, state, mask=None):
        """What the model gives for the next tokens of its streams."""
        tokens = self._tokens(tokens)
        state = self._restore(state, tokens)
        start = state.get(_POSITION)
        length = tokens.shape[1] or tf.shape(tokens)[1]
        order = None
        if mask is not None and self._unmasked:
            raise ValueError(
                "`mask` must be None for a model of which some layers' `step` "
                f"takes none. Received: a mask, and the layers {self._unmasked}"
                ". Give their `step` an argument `mask`, (batch, new_tokens)."
            )
        if mask is None:
            stretch = Stretch(start, None, length)
        else:
            order = visible_tokens.visible_order(_mask(mask, tokens))
            tokens = _together(order, tokens)
            keep = tf.range(length) < order.count[:, -1:]
            stretch = Stretch(start, keep, length)
        outputs, state = self._run(stretch, tokens, state)
        if self._counts:
            count = stretch.count
            count = count if order is None else count[:, 0]
            state[_POSITION] = start + count
        if order is not None:
            outputs = keras.tree.map_structure(
                lambda x: move_back(order, x), outputs
            )
        return outputs, state

    def _run(self, stretch, tokens, state):
        values, after = {id(self._program.tokens): tokens}, {}
        for place, call, args, kwargs, outputs in self._program.instructions:
            args, kwargs = fill(values, args, kwargs)
            before = state.get(place, ())
            found, new = call.step(stretch, before, args, kwargs)
            if place in self._stateful:
                after[place] = new
            found = keras.tree.flatten(found)
            for symbol, x in zip(outputs, found, strict=True):
                values[id(symbol)] = x
        outputs = keras.tree.map_structure(
            lambda x: values[id(x)], self._program.outputs
        )
        return outputs, after

    def _tokens(self, tokens):
        expected = self._program.tokens
        mask = mask_of(tokens)
        tokens = tf.convert_to_tensor(tokens)
        fits = len(tokens.shape) == len(expected.shape) and all(
            None in (got, size) or got == size
            for got, size in zip(
                tokens.shape[2:], expected.shape[2:], strict=True
            )
        )
        if not fits or tokens.shape[1] == 0:
            sizes = ("batch", "new_tokens", *map(str, expected.shape[2:]))
            raise ValueError(
                f"`tokens` must be of shape ({', '.join(sizes)}), at least one "
                f"new token. Received: shape {tuple(tokens.shape)}"
            )
        tokens = tf.cast(tokens, expected.dtype)
        if mask is not None and mask_of(tokens) is None:
            tokens._keras_mask = mask
        return tokens

    def _restore(self, state, tokens):
        """The state with its plain tensors checked, or what is wrong."""
        names = {*self._stateful, *([_POSITION] if self._counts else [])}
        if not isinstance(state, dict) or set(state) != names:
            got = list(state) if isinstance(state, dict) else type(state)
            raise ValueError(
                "`state` must be a dict from `initial_state` or an earlier "
                f"`step` of the same model, with {sorted(names)}. Received: "
                f"{got}"
            )
        restored = dict(state)
        for place, call in self._stateful.items():
            if call.shapes is not None:
                restored[place] = _tensors(
                    place, state[place], call.shapes, tokens, tf.float32
                )
        if self._counts:
            (restored[_POSITION],) = _tensors(
                _POSITION, [state[_POSITION]], ((),), tokens, tf.int32
            )
        return restored


def _tensors(place, state, shapes, tokens, dtype):
    """A tuple of tensors of these shapes behind the batch of the tokens."""
    shapes = [(tokens.shape[0], *shape) for shape in shapes]
    try:
        state = [tf.cast(tf.convert_to_tensor(x), dtype) for x in state]
    except (TypeError, ValueError):
        state = [np.zeros(())]
    if len(state) != len(shapes) or not all(
        tf.TensorShape(shape).is_compatible_with(x.shape)
        for x, shape in zip(state, shapes, strict=True)
    ):
        got = [tuple(x.shape) for x in state]
        raise ValueError(
            f"`state` must have tensors of the shapes {shapes} at {place!r}, "
            f"for these tokens. Received: {got}. Take the state of the same "
            "model and as many streams."
        )
    return tuple(state)


def _mask(mask, tokens):
    mask = tf.cast(tf.convert_to_tensor(mask), "bool")
    if not mask.shape.is_compatible_with(tokens.shape[:2]):
        raise ValueError(
            "`mask` must be of shape (batch, new_tokens), True for tokens. "
            f"Received: shape {tuple(mask.shape)} for tokens of shape "
            f"{tuple(tokens.shape)}"
        )
    return mask


def _together(order, tokens):
    """Tokens that count first, with the Keras mask of each."""
    moved = order.move_together(without_mask(tokens))
    if mask_of(tokens) is not None:
        moved._keras_mask = order.move_together(mask_of(tokens))
    return moved
