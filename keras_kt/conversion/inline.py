"""Attention layers that attend within their call: KerasHub's with ALiBi.

Falcon's and Bloom's project, attend with biases that are linear in the distance
and project again, all in `call`. `attend_inline` is that call around a function
of heads, which takes the place of softmax.
"""

import inspect
import math

import keras

PROJECTIONS = ("query_dense", "key_dense", "value_dense", "output_dense")
METHOD = "_compute_attention"


def parts_of(layer):
    """The layers within one that attends inline, by name; or `None`."""
    if isinstance(layer, keras.layers.MultiHeadAttention):
        return None
    children = layer._flatten_layers(include_self=False, recursive=False)
    parts = {child.name: child for child in children}
    has_all = all(name in parts for name in PROJECTIONS)
    return parts if has_all and not hasattr(layer, METHOD) else None


def attend_inline(layer, method, *args, attend=None, **kwargs):
    """The call of a layer that attends inline.

    Args:
        layer: the layer.
        method: its own call.
        *args: of its call, as are `kwargs`.
        attend: function of queries, keys, values (projected) and the mask; it
            returns heads. Defaults to the layer's `_compute_attention`.
    """
    call = inspect.signature(method).bind(*args, **kwargs).arguments
    attend = getattr(layer, METHOD) if attend is None else attend
    children = layer._flatten_layers(include_self=False, recursive=False)
    parts = {child.name: child for child in children}
    x, cache = next(iter(call.values())), call.get("cache")
    query, key, value = (parts[name](x) for name in PROJECTIONS[:3])
    index = call.get("cache_update_index")
    if cache is not None:
        keys, values = cache[:, 0], cache[:, 1]
        if index is not None:
            start = [0, index, 0, 0]
            keys = keras.ops.slice_update(keys, start, key)
            values = keras.ops.slice_update(values, start, value)
            cache = keras.ops.stack((keys, values), axis=1)
        key, value = keys, values
    heads = attend(query, key, value, call.get("attention_mask"))
    shape = keras.ops.shape(x)
    size = heads.shape[2] * heads.shape[3]
    output = parts["output_dense"](
        keras.ops.reshape(heads, (shape[0], shape[1], size))
    )
    if "dropout" in parts:
        output = parts["dropout"](output)
    return output if cache is None else (output, cache)


def alibi_slopes(num_heads):
    """How much the logits of each head fall with the distance, as published.

    A geometric sequence from 2^(−8/n) for a power of two; else that of the next
    lower power, then every other one of the next higher.

    References:
        "Train Short, Test Long", arXiv 2108.12409.
    """
    lower = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / lower) for i in range(lower)]
    if lower < num_heads:
        slopes += alibi_slopes(2 * lower)[::2][: num_heads - lower]
    return slopes
