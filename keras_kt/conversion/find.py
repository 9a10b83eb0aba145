"""Attention layers of a model by path, those of any kind and our own.

A path is the names of the layers that lead to a layer, joined by "/". Reports,
errors and diagnostics name layers by it, and a student's layers find their
teacher's by it.
"""

from typing import NamedTuple

import keras

from keras_kt.conversion.seam import kernel_within
from keras_kt.conversion.surgery import children
from keras_kt.layers.attention import KernelizedAttention


def attention_layers(model) -> dict:
    """The attention layers of a model by path, those of any kind."""
    found: dict = {}

    def visit(layer, path):
        for child in children(layer):
            place = f"{path}/{child.name}" if path else child.name
            if _is_attention(child):
                if not any(child is other for other in found.values()):
                    found[_unused(place, found)] = child
            else:
                visit(child, place)

    visit(model, "")
    return found


def kernelized_layers(model) -> dict:
    """The layers of a model that attend by a kernel, by path.

    `KernelizedAttention`; and the `LinearAttention` within each layer of
    another class that was given one.
    """
    found = {
        path: _kernelized(layer)
        for path, layer in attention_layers(model).items()
        if _kernelized(layer) is not None
    }
    if not found:
        raise ValueError(
            "The model must have KernelizedAttention layers. Received: "
            f"{model.name!r}, which has none. Make it with `convert_attention`."
        )
    return found


class Pair(NamedTuple):
    """A converted layer beside the one that it was.

    Attributes:
        path: the student's layer.
        layer: of `kernelized_layers`.
        holder: what is called: the layer, or the one that it is within.
        original: the teacher's layer.
    """

    path: str
    layer: keras.Layer
    holder: keras.Layer
    original: keras.Layer


def pairs_of_layers(student, teacher):
    """Converted layers of a student with those of its teacher: `Pair`s."""
    kernelized_layers(student)
    ours, theirs = attention_layers(student), attention_layers(teacher)
    # Names that Keras chose differ where a class makes its own layers.
    by_position = theirs.values()
    if len(ours) != len(theirs):
        by_position = [None] * len(ours)
    pairs = [
        Pair(path, _kernelized(layer), layer, theirs.get(path, original))
        for (path, layer), original in zip(
            ours.items(), by_position, strict=True
        )
        if _kernelized(layer) is not None
    ]
    for path, layer, holder, original in pairs:
        kind = keras.layers.MultiHeadAttention
        if layer is not holder:
            kind = type(holder)
        if not isinstance(original, kind) or _kernelized(original):
            raise ValueError(
                "`teacher` must be the model that the student was converted "
                f"from. Received: one without a {kind.__name__} at {path!r};"
                f" it has {tuple(theirs)}."
            )
    return pairs


def _kernelized(layer):
    """What attends by a kernel in a layer, or `None`."""
    if isinstance(layer, KernelizedAttention):
        return layer
    return kernel_within(layer)


def _is_attention(layer):
    return "Attention" in type(layer).__name__ or isinstance(
        layer, keras.layers.MultiHeadAttention
    )


def _unused(path, found):
    number, name = 1, path
    while name in found:
        number += 1
        name = f"{path}#{number}"
    return name
