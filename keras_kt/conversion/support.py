"""What stands in the way of a conversion, layer by layer.

A layer of another kind, or with a computation of its own, is refused: its
weights would mean something else. A layer that uses what linear attention
cannot honour has a problem, with which `convert_attention` deals as asked. What
calls ask for is seen by tracing a functional model without running it.
"""

import warnings

import keras
import tensorflow as tf

from keras_kt.conversion import keras_hub
from keras_kt.conversion.probe import kept_losses, recorded_calls
from keras_kt.conversion.surgery import projections
from keras_kt.layers.attention import KernelizedAttention
from keras_kt.layers.linear_attention import LinearAttention

# What a subclass of MultiHeadAttention may not change if its weights are to
# mean the same in KernelizedAttention.
_COMPUTATION = ("call", "_compute_attention", "_masked_softmax")


def refusal(layer):
    """Why a layer cannot stand for its weights in KernelizedAttention."""
    name = type(layer).__name__
    if isinstance(layer, (KernelizedAttention, LinearAttention)):
        return "is linear already"
    if not isinstance(layer, keras.layers.MultiHeadAttention):
        return f"{name} is not a MultiHeadAttention"
    base = keras.layers.MultiHeadAttention
    if keras_hub.is_cached(layer):
        base = keras_hub.cached_class()
    for method in _COMPUTATION:
        if getattr(type(layer), method) is not getattr(base, method):
            return f"{name} has a `{method}` of its own"
    if not layer.built:
        return "is not built: it was never called"
    if any(dense.quantization_mode for dense in projections(layer).values()):
        return "its projections are quantized"
    return None


def problems_of(model, chosen, dropout):
    """What linear attention cannot honour, by path; "" where nothing."""
    supported = {p: layer for p, layer in chosen.items() if not refusal(layer)}
    calls = _traced_calls(model, list(supported.values()))
    causal = {
        id(attention) for _, attention in keras_hub.causal_attention(model)
    }
    problems = {}
    for path, layer in supported.items():
        needs = {
            need
            for called, arguments, _ in calls
            if called is layer
            for need in _needs(layer, arguments, id(layer) in causal)
        }
        if layer.dropout and dropout is None:
            needs.add("drops attention weights")
        problems[path] = " and ".join(sorted(needs))
    return problems


def _needs(layer, arguments, is_causal_block):
    """What a call needs the attention matrix for, or cannot have at all."""
    if layer.get_config().get("sliding_window"):
        lengths = {arguments[name].shape[1] for name in ("query", "value")}
        if len(lengths - {None}) > 1:
            yield "has a sliding window over another sequence"
    if arguments.get("return_attention_scores"):
        yield "returns its scores"
    mask = arguments.get("attention_mask")
    # A mask that all queries share is a key mask.
    if mask is not None and not is_causal_block and mask.shape[-2] != 1:
        yield "takes a dense mask"


def _traced_calls(model, layers):
    """The calls of layers when a functional model runs, without running it."""
    inputs = getattr(model, "inputs", None)
    if not inputs:
        return []
    if not isinstance(model, keras.Sequential):
        inputs = model.input
    elif len(inputs) == 1:
        (inputs,) = inputs
    spec = keras.tree.map_structure(
        lambda x: tf.TensorSpec(x.shape, x.dtype), inputs
    )
    with (
        kept_losses(model),
        recorded_calls(layers) as calls,
        # The original says at every call of its own what it has to say.
        warnings.catch_warnings(action="ignore"),
    ):
        tf.function(
            lambda x: model(x, training=False), autograph=False
        ).get_concrete_function(spec)
    return calls
