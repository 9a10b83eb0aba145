"""Attention layers of a model by path, those of any kind and our own.

A path is the names of the layers that lead to a layer, joined by "/". Reports,
errors and diagnostics name layers by it, and a student's layers find their
teacher's by it.
"""

import keras

from keras_kt.conversion.surgery import children
from keras_kt.layers.attention import KernelizedAttention


def attention_layers(model) -> dict:
    """The attention layers of a model by path, those of any kind."""
    found = {}

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
    """The `KernelizedAttention` layers of a model by path."""
    found = {
        path: layer
        for path, layer in attention_layers(model).items()
        if isinstance(layer, KernelizedAttention)
    }
    if not found:
        raise ValueError(
            "The model must have KernelizedAttention layers. Received: "
            f"{model.name!r}, which has none. Make it with `convert_attention`."
        )
    return found


def pairs_of_layers(student, teacher):
    """`(path, student's layer, teacher's layer)` of converted layers."""
    kernelized_layers(student)
    ours, theirs = attention_layers(student), attention_layers(teacher)
    # Names that Keras chose differ where a class makes its own layers.
    by_position = theirs.values()
    if len(ours) != len(theirs):
        by_position = [None] * len(ours)
    pairs = [
        (path, layer, theirs.get(path, original))
        for (path, layer), original in zip(
            ours.items(), by_position, strict=True
        )
        if isinstance(layer, KernelizedAttention)
    ]
    for path, _, original in pairs:
        if not isinstance(original, keras.layers.MultiHeadAttention):
            raise ValueError(
                "`teacher` must be the model that the student was converted "
                f"from. Received: one without a MultiHeadAttention at {path!r};"
                f" it has {tuple(theirs)}."
            )
    return pairs


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
