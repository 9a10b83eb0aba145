"""A functional model as a list of instructions, each call with how it streams.

Models within models are taken apart, and a layer that is called twice is two
calls, each with a state of its own. The list holds the layers and not the
model.
"""

from typing import NamedTuple

import keras

from keras_kt.streaming import dependence, protocol
from keras_kt.streaming.call import (
    MaskedCall,
    Refusal,
    TokenwiseCall,
    parameters,
    tokens_of,
)
from keras_kt.streaming.convolution import Convolution
from keras_kt.streaming.own_step import OwnStep
from keras_kt.streaming.placement import Placed, Positioned
from keras_kt.streaming.recurrence import Recurrence


class Instruction(NamedTuple):
    """A call of the graph.

    Attributes:
        place: names that lead to the layer or operation, joined by "/".
        call: how it streams, a `TokenwiseCall` or a kind of it.
        args, kwargs: its arguments, symbolic where they are tokens.
        outputs: symbolic outputs, flat.
    """

    place: str
    call: TokenwiseCall
    args: tuple
    kwargs: dict
    outputs: list


class Program(NamedTuple):
    """What a model computes, from its one input to its outputs.

    Attributes:
        tokens: the symbolic input.
        instructions: a list of `Instruction`.
        outputs: the structure of the symbolic outputs.
    """

    tokens: keras.KerasTensor
    instructions: list
    outputs: object


def is_graph(model):
    """Whether a model computes what its graph says: functional, Sequential."""
    if not isinstance(model, keras.Model):
        return False
    definers = [cls for cls in type(model).__mro__ if "call" in vars(cls)]
    # A class with a call of its own may do anything else.
    is_keras = definers[0].__module__.split(".")[0] == "keras"
    is_functional = hasattr(model, "_run_through_graph")
    return is_keras and (is_functional or isinstance(model, keras.Sequential))


def read(model) -> Program:
    """The program of a model; a `ValueError` names what cannot stream."""
    if len(model.inputs) != 1:
        names = [x.name for x in model.inputs]
        raise ValueError(
            "`model` must have one input, the tokens. Received: "
            f"{model.name!r} with the inputs {names}. Make one of them "
            "(`Concatenate`), or give a class `initial_state` and `step`."
        )
    (x,) = model.inputs
    if len(x.shape) < 2:
        raise ValueError(
            "`model` must have an input of shape (batch, length, …). Received: "
            f"{model.name!r} with an input of shape {tuple(x.shape)}."
        )
    tokens = keras.KerasTensor((None, *x.shape[1:]), x.dtype)
    reader = _Reader(model.name)
    reader.made_by[id(tokens)] = "the input"
    outputs = reader.run(model, [tokens], "")
    return Program(tokens, reader.instructions, outputs)


class _Reader:
    """Follows a model's graph and takes its calls down."""

    def __init__(self, name):
        self.name, self.instructions = name, []
        # Of each symbolic tensor by `id`, for errors.
        self.made_by = {}

    def run(self, model, inputs, path):
        """Symbolic outputs of a graph for symbolic inputs."""

        def call(operation, *args, **kwargs):
            return self._visit(operation, path, args, kwargs)

        if isinstance(model, keras.Sequential):
            (x,) = inputs
            for layer in model.layers:
                x = call(layer, x)
            return x
        # Keras 3.8 has no default for the second.
        outputs = model._run_through_graph(inputs, lambda x: x, call_fn=call)
        if isinstance(outputs, (list, tuple)) and len(outputs) == 1:
            return outputs[0]
        return outputs

    def _visit(self, operation, path, args, kwargs):
        place = f"{path}{operation.name}"
        streams = not protocol.missing_methods(operation)
        if is_graph(operation) and not streams:
            return self._visit_graph(operation, place, args, kwargs)
        try:
            call, outputs = _call(operation, args, kwargs)
        except Refusal as refusal:
            raise self._error(operation, place, args, kwargs, refusal) from None
        place = self._unused(place)
        for x in keras.tree.flatten(outputs):
            self.made_by[id(x)] = repr(place)
        flat = keras.tree.flatten(outputs)
        self.instructions.append(Instruction(place, call, args, kwargs, flat))
        return outputs

    def _visit_graph(self, model, place, args, kwargs):
        inputs = keras.tree.flatten(args[0] if args else kwargs["inputs"])
        given = args[2] if len(args) > 2 else kwargs.get("mask")
        masks = [None] * len(inputs)
        masks = masks if given is None else keras.tree.flatten(given)
        pairs = zip(inputs, masks, strict=True)
        inputs = [self._masked(x, mask, place) for x, mask in pairs]
        return self.run(model, inputs, f"{place}/")

    def _masked(self, x, mask, place):
        """A symbolic tensor that carries a mask, as Keras hands it on."""
        if mask is None:
            return x
        output = keras.KerasTensor(x.shape, x.dtype)
        self.made_by[id(output)] = self.made_by[id(x)]
        place = self._unused(f"{place}/mask")
        self.instructions.append(
            Instruction(place, MaskedCall(), (x, mask), {}, [output])
        )
        return output

    def _unused(self, place):
        taken = {instruction.place for instruction in self.instructions}
        number, name = 1, place
        while name in taken:
            number += 1
            name = f"{place}#{number}"
        return name

    def _error(self, operation, place, args, kwargs, refusal):
        tokens = tokens_of(args, kwargs)
        sources = " and ".join(self.made_by[id(x)] for x in tokens)
        return ValueError(
            "`model` must be causal, each token's output made of that token "
            f"and earlier ones of its row. Received: {self.name!r}, in which "
            f"{place!r}, a {type(operation).__name__} called on {sources}, "
            f"{refusal.reason}. {refusal.way_out}"
        )


def _call(operation, args, kwargs):
    """How a call streams, and its symbolic outputs."""
    kind = _kind(operation, kwargs)
    if kind is None:
        call, outputs = _stateless(operation, args, kwargs)
    else:
        call = kind(operation, args, kwargs)
        problem, outputs = dependence.cutting(call, args, kwargs)
        if problem:
            raise Refusal(problem, _way_out(operation))
    # The lengths that were tried stand for any.
    length = tokens_of(args, kwargs)[0].shape[1]
    return call, keras.tree.map_structure(
        lambda x: keras.KerasTensor((None, length, *x.shape[2:]), x.dtype.name),
        outputs,
    )


def _kind(operation, kwargs):
    """What a call with a state or a position is, or `None`."""
    if not protocol.missing_methods(operation):
        return OwnStep
    if isinstance(operation, keras.layers.RNN):
        return Recurrence
    if isinstance(operation, keras.layers.Conv1D):
        return Convolution
    if "positions" in parameters(operation) and "positions" not in kwargs:
        return Positioned
    return None


def _stateless(operation, args, kwargs):
    """A call that acts on each token alone, its position aside."""
    found = dependence.mixing(operation, args, kwargs)
    if not found.problem:
        return TokenwiseCall(operation), found.outputs
    lengths = {x.shape[1] for x in tokens_of(args, kwargs)}
    if len(lengths) == 1 and None not in lengths:
        (length,) = lengths
        placed = dependence.mixing(operation, args, kwargs, length)
        if not placed.problem:
            return Placed(operation, args, kwargs, length), placed.outputs
        found = placed
    raise Refusal(found.problem, _way_out(operation))


_WAYS_OUT = {
    "Transformer": "Take KernelizedTransformerDecoder.",
    "Attention": "Take KernelizedAttention with `use_causal_mask=True`; "
    "`keras_kt.convert_attention` converts a trained model.",
    "Conv": 'Make it `Conv1D(padding="causal")`, and train it so.',
    "Pooling": "End the streaming model before it, and pool outside: "
    "`keras.Model(model.input, model.get_layer(…).output)`.",
    "Flatten": "End the streaming model before it: "
    "`keras.Model(model.input, model.get_layer(…).output)`.",
    "Bidirectional": "Take a recurrent layer of one direction, with "
    "`return_sequences=True`.",
    "Normalization": "Normalize the last axis alone.",
}


def _way_out(operation):
    for part, way_out in _WAYS_OUT.items():
        if part in type(operation).__name__:
            return way_out
    return (
        "Leave it out, give its class `initial_state(batch_size)` and "
        "`step(x, state)`, or, if it looks a position up, an argument "
        "`positions` of its call, (batch, length)."
    )
