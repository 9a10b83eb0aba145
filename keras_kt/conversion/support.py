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
from keras_kt.conversion.measured_seam import has_seam, measured
from keras_kt.conversion.probe import kept_losses, recorded_calls
from keras_kt.conversion.seam import Seam, kernel_within
from keras_kt.conversion.surgery import children, projections
from keras_kt.layers.attention import KernelizedAttention
from keras_kt.layers.linear_attention import LinearAttention

# What a subclass of MultiHeadAttention may not change if its weights are to
# mean the same in KernelizedAttention.
_COMPUTATION = ("call", "_compute_attention", "_masked_softmax")


def seams_of(model, chosen):
    """The `Seam` of each layer of another class that has one, by path.

    In its place the reason, where what happens there is no softmax attention.
    """
    parents = {
        id(child): layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.Layer)
        for child in children(layer)
    }
    return {
        path: measured(layer, parents[id(layer)])
        for path, layer in chosen.items()
        if layer.built and kernel_within(layer) is None and has_seam(layer)
    }


def refusal(layer, seam=None):
    """Why a layer cannot become linear with the weights that it has.

    Args:
        layer: the layer.
        seam: of `seams_of`.
    """
    name = type(layer).__name__
    is_linear = isinstance(layer, (KernelizedAttention, LinearAttention))
    if is_linear or kernel_within(layer) is not None:
        return "is linear already"
    if isinstance(seam, Seam):
        return None
    if not isinstance(layer, keras.layers.MultiHeadAttention):
        more = f", and {seam}" if seam else ""
        return f"{name} is not a MultiHeadAttention{more}"
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


def problems_of(model, chosen, dropout, seams):
    """What linear attention cannot honour, by path; "" where nothing."""
    supported = {
        path: layer
        for path, layer in chosen.items()
        if not refusal(layer, seams.get(path))
    }
    apart = {
        id(attention) for _, attention in keras_hub.causal_attention(model)
    }
    apart |= {
        id(layer)
        for path, layer in supported.items()
        if path in seams and seams[path].mask_method
    }
    # Layers with a seam have scores for nobody.
    traced = [
        layer
        for path, layer in supported.items()
        if path not in seams or id(layer) not in apart
    ]
    calls = _traced_calls(model, traced)
    problems = {}
    for path, layer in supported.items():
        needs = {
            need
            for called, arguments, _ in calls
            if called is layer
            for need in _needs(layer, arguments, id(layer) in apart)
        }
        if _drops_weights(layer, seams.get(path)) and dropout is None:
            needs.add("drops attention weights")
        problems[path] = " and ".join(sorted(needs))
    return problems


def _drops_weights(layer, seam):
    return layer.dropout if seam is None else seam.weights_dropout


def _needs(layer, arguments, is_mask_apart):
    """What a call needs the attention matrix for, or cannot have at all."""
    if layer.get_config().get("sliding_window"):
        lengths = {arguments[name].shape[1] for name in ("query", "value")}
        if len(lengths - {None}) > 1:
            yield "has a sliding window over another sequence"
    if arguments.get("return_attention_scores"):
        yield "returns its scores"
    mask = arguments.get("attention_mask")
    # A mask that all queries share is a key mask.
    if mask is not None and not is_mask_apart and mask.shape[-2] != 1:
        yield "takes a dense mask"


def _traced_calls(model, layers):
    """The calls of layers when a functional model runs, without running it."""
    inputs = getattr(model, "inputs", None)
    if not inputs or not layers:
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
