"""Hooks on layers and models: the only code that replaces their methods.

All but `replace_method` are gone when a context ends. Calls are seen with their
arguments by name; attention is replaced where queries, keys and values are
projected, between the projections, in layers of our kind and Keras's.
"""

import contextlib
import functools
import inspect

import keras

from keras_kt.conversion.inline import METHOD, attend_inline, parts_of


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
            # A replacement of someone else's is put back, too.
            before = {k: v for k, v in vars(layer).items() if k == name}
            stack.callback(vars(layer).update, before)
            stack.callback(vars(layer).pop, name)
            replace_method(layer, name, replacement)
        yield


def replace_method(layer, name, replacement):
    """Gives a layer another method, for good; arguments as above."""
    method = getattr(layer, name)
    new = functools.partial(replacement, layer, method)
    # So that the arguments of nested replacements have names.
    new.__signature__ = inspect.signature(method)
    setattr(layer, name, new)


def give_method(layer, name, function):
    """Gives a layer a method that it lacks, for good: a function of it."""
    setattr(layer, name, functools.partial(function, layer))


@contextlib.contextmanager
def replaced_attention(layers, compute):
    """Gives layers another attention of heads, until the context ends.

    Args:
        layers: of `KernelizedAttention`, `MultiHeadAttention` or
            `LinearAttention`; or of another class that has a method
            `_compute_attention` for it, or attends inline.
        compute: function of a layer, the attention it had, and the arguments of
            a call by name: the projected `query`, `key` and `value`, and those
            that are given of `attention_mask`, `use_causal_mask`, `query_mask`,
            `key_mask` and others. It returns heads
            `(batch, query_length, heads, value_dim)` and weights, or `None`.
    """

    def replacement(layer, attend, *args, **kwargs):
        return compute(layer, attend, heads_of(attend, args, kwargs))

    def of_heads_only(layer, attend, *args, **kwargs):
        return replacement(layer, attend, *args, **kwargs)[0]

    def inline(layer, attend, *args, **kwargs):
        def heads(*projected):
            names = "query", "key", "value", "attention_mask"
            call = dict(zip(names, projected, strict=True))
            return compute(layer, None, call)[0]

        return attend_inline(layer, attend, *args, attend=heads, **kwargs)

    with contextlib.ExitStack() as stack:
        for layer in layers:
            name, hook = METHOD, of_heads_only
            if isinstance(layer, keras.layers.MultiHeadAttention):
                hook = replacement
            elif hasattr(layer, "scaled"):
                # A layer of heads has no projections around it.
                name = "attend" if hasattr(layer, "attend") else METHOD
                hook = replacement
            elif parts_of(layer):
                name, hook = "call", inline
            stack.enter_context(replaced_methods([layer], name, hook))
        yield


def heads_of(method, args, kwargs):
    """What a method that attends was called with: arguments by name.

    Whatever the method calls them, the first are `query`, `key` and `value`.
    """
    call = inspect.signature(method).bind(*args, **kwargs).arguments
    names = ["query", "key", "value", *list(call)[3:]]
    return dict(zip(names, call.values(), strict=True))


@contextlib.contextmanager
def kept_losses(*models):
    """Puts the losses of models back: a graph's are dead outside of it.

    Args:
        models: models or layers, which are called within the context.
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
