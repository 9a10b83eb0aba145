"""Hooks on layers and models, all of which are gone when a context ends."""

import contextlib
import functools
import inspect

import keras


@contextlib.contextmanager
def recorded_calls(layers):
    """Records the calls of layers, in a graph or eagerly.

    Args:
        layers: the layers; they are as before when the context ends.

    Yields:
        A list that fills with `(layer, bound_arguments, output)`.
    """
    calls = []

    def record(layer, call, *args, **kwargs):
        output = call(*args, **kwargs)
        bound = inspect.signature(call).bind(*args, **kwargs)
        calls.append((layer, bound.arguments, output))
        return output

    with replaced_methods(layers, "call", record):
        yield calls


@contextlib.contextmanager
def replaced_methods(layers, name, replacement):
    """Gives layers another method, until the context ends. Contexts nest.

    Args:
        layers: the layers; they are as before when the context ends.
        name: of the method.
        replacement: function of a layer, the method it had, and the method's
            arguments.
    """
    with contextlib.ExitStack() as stack:
        for layer in layers:
            method = getattr(layer, name)
            # A replacement of someone else's is put back, too.
            before = {name: method} if name in vars(layer) else {}
            stack.callback(vars(layer).update, before)
            stack.callback(vars(layer).pop, name)
            setattr(layer, name, functools.partial(replacement, layer, method))
        yield


@contextlib.contextmanager
def kept_losses(*models):
    """Puts the losses of models back: a graph's are dead outside of it.

    Args:
        models: the models, which are called within the context.
    """
    layers = [
        layer
        for model in models
        for layer in model._flatten_layers()
        if isinstance(layer, keras.Layer)
    ]
    before = [list(layer._losses) for layer in layers]
    try:
        yield
    finally:
        for layer, losses in zip(layers, before, strict=True):
            layer._losses[:] = losses
