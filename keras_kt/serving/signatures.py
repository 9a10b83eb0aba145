"""Signatures of endpoints: named specs of the tensors that they take.

Names are those given to `keras.Input`, the keys of a dict, or `input_0`, …
where there are none: what Keras makes up depends on what was made before.
"""

import re

import keras
import tensorflow as tf

# Names that Keras makes up; their numbers depend on what was made before.
_MADE_UP = re.compile(r"(keras_tensor|input_layer)(_\d+)?")


def signature_of(model, input_signature):
    """A signature as given, or that of the model's inputs."""
    if input_signature is not None:
        return input_signature
    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise ValueError(
            f"`input_signature` is needed for {model.name!r}, a "
            f"{type(model).__name__} whose inputs are not known. Received: "
            "None. Pass a list of a `tf.TensorSpec` for each argument of its "
            "call, with None for the batch and for a dynamic length."
        )
    if isinstance(model, keras.Sequential):
        return inputs
    return [model.input]


def named_specs(signature):
    """The structure of a signature, and its flat specs, all with a name."""
    if not isinstance(signature, (list, tuple)):
        signature = [signature]
    specs = []
    for position, (path, x) in enumerate(
        keras.tree.flatten_with_path(list(signature))
    ):
        name = path[-1] if isinstance(path[-1], str) else x.name
        if name is None or _MADE_UP.fullmatch(name):
            name = f"input_{position}"
        shape = tuple(x.shape)
        if isinstance(x, keras.KerasTensor):
            shape = (None, *shape[1:])
        specs.append(tf.TensorSpec(shape, x.dtype, name))
    return list(signature), specs
