"""What attention of another class computes at its seam, found by trying it.

Sizes, grouping, softmax's scale and masks are measured on random inputs, and
the whole is compared with softmax in float64: a family that is not known is
converted if it is softmax, and refused with the difference if it is not.
"""

import inspect
import math

import keras
import numpy as np

from keras_kt import kernels
from keras_kt.conversion.probe import heads_of, replaced_methods
from keras_kt.conversion.seam import MASK_METHODS, METHOD, Seam
from keras_kt.conversion.surgery import children

# How far attention may be from softmax, of values of size one, and its scale.
_TOLERANCE = {"float32": 1e-4, "float64": 1e-4}
_HALF_TOLERANCE = 0.05
# What is known to be no softmax, by the names that KerasHub gives it.
_NO_SOFTMAX = {
    "logit_soft_cap": "caps its logits",
    "sinks": "has sinks, which take weight from keys",
}


def has_seam(layer):
    """Whether a layer attends on heads in a method of its own for that."""
    method = getattr(layer, METHOD, None)
    if method is None or isinstance(layer, keras.layers.MultiHeadAttention):
        return False
    names = list(inspect.signature(method).parameters)
    return "attention_mask" in names[3:]


def measured(layer, block):
    """The `Seam` of a built layer, or why its attention is no softmax.

    Args:
        layer: a layer that `has_seam`.
        block: the layer that has it.
    """
    window = _window(layer, block)
    if window:
        return f"has a sliding window of {window}"
    for name, what in _NO_SOFTMAX.items():
        if getattr(layer, name, None) is not None:
            return f"{what}, which no kernel does"
    try:
        return _measured(layer, block)
    # Code of another package, on inputs that it may not be made for.
    except Exception as error:
        return f"could not be tried: {(str(error).splitlines() or [''])[0]}"


def _measured(layer, block):
    passed = _heads_passed(layer)
    query, key, value = (passed[name] for name in ("query", "key", "value"))
    few = _key_value_heads(layer, key)
    repeats = key.shape[2] // few
    for x in (key, value):
        # Else heads are not repeated, but different.
        if not np.array_equal(x, np.repeat(x[:, :, ::repeats], repeats, 2)):
            few, repeats = key.shape[2], 1
    size = key.shape[-1]
    seam = Seam(query.shape[2], few, size, value.shape[-1])
    scale = _scale(layer, seam, repeats)
    error = _distance_from_softmax(layer, seam, repeats, scale)
    if not error < _tolerance(layer):
        return (
            f"differs from softmax by {error:.2g} on random heads: with a "
            "bias, a cap or a norm of its logits?"
        )
    method, is_causal = _mask_method(block, layer)
    return Seam(
        seam.num_heads,
        few,
        size,
        seam.value_dim,
        scale * math.sqrt(size),
        is_causal,
        method,
        bool(getattr(layer, "dropout", 0)) and "training" in passed["options"],
    )


def _heads_passed(layer):
    """The arguments of the seam when the layer attends on random inputs."""
    width = layer.get_build_config()["input_shape"][-1]
    found = {}

    def record(layer, softmax, *args, **kwargs):
        found.update(heads_of(softmax, args, kwargs))
        found["options"] = inspect.signature(softmax).parameters
        return softmax(*args, **kwargs)

    with replaced_methods([layer], METHOD, record):
        layer(_normal(layer, 1, 3, width), attention_mask=_visible(1, 3))
    return {
        name: np.asarray(keras.ops.cast(x, "float32"))
        if keras.ops.is_tensor(x)
        else x
        for name, x in found.items()
    }


def _key_value_heads(layer, key):
    """Heads of keys before they are repeated, by what projects them."""
    for child in children(layer):
        if child.name == "key":
            width = layer.get_build_config()["input_shape"][-1]
            return math.prod(child.kernel.shape) // (width * key.shape[-1])
    return key.shape[2]


def _scale(layer, seam, repeats):
    """Softmax's factor of q·k, from the weights of two keys for each query."""
    length = 256
    query, key, _ = _random_heads(layer, seam, 1, length)
    value = np.zeros((1, length, seam.num_key_value_heads, seam.value_dim))
    value[:, 1::2] = 1.0
    visible = np.eye(length, dtype=bool) | np.eye(length, k=-1, dtype=bool)
    output = _attended(layer, query, key, value, visible[np.newaxis], repeats)
    share = np.clip(output[0, 1:, :, 0], 1e-6, 1.0 - 1e-6)
    # Of the odd one of keys t and t - 1.
    sign = np.where(np.arange(1, length) % 2, 1.0, -1.0)
    difference = key[0, 1:] - key[0, :-1]
    difference = np.repeat(difference, query.shape[2] // key.shape[2], axis=1)
    logits = sign[:, np.newaxis] * np.sum(query[0, 1:] * difference, axis=-1)
    found = np.log(share) - np.log1p(-share)
    weight = (share * (1.0 - share)) ** 2
    scale = np.sum(weight * found * logits) / np.sum(weight * logits**2)
    # One over the root of an integer, in all that is known.
    squared = round(scale**-2) if 0.0 < scale <= 1.0 else 0
    for candidate in (seam.key_dim, squared):
        if candidate:
            rounded = candidate**-0.5
            if abs(scale / rounded - 1.0) < _tolerance(layer) / 20.0:
                return rounded
    return float(scale)


def _distance_from_softmax(layer, seam, repeats, scale):
    """The largest difference, causal and padded, of loud heads."""
    query, key, value = _random_heads(layer, seam, 2, 13)
    query = 3.0 * query
    visible = _visible(2, 13) & np.tri(13, dtype=bool)
    visible[1, :, 9:] = False
    output = _attended(layer, query, key, value, visible, repeats)
    heads = (np.swapaxes(x, 1, 2) for x in (query * scale, key, value))
    query, key, value = heads
    groups = seam.num_heads // seam.num_key_value_heads
    exact, _ = kernels.softmax_attention(
        query,
        np.repeat(key, groups, axis=1),
        np.repeat(value, groups, axis=1),
        visible[:, np.newaxis],
    )
    return np.max(np.abs(output - np.swapaxes(exact, 1, 2)))


def _attended(layer, query, key, value, visible, repeats):
    heads = (query, *(np.repeat(x, repeats, axis=2) for x in (key, value)))
    heads = [keras.ops.cast(x, layer.compute_dtype) for x in heads]
    output = getattr(layer, METHOD)(
        *heads, attention_mask=keras.ops.convert_to_tensor(visible)
    )
    return np.asarray(keras.ops.cast(output, "float32"), "float64")


def _random_heads(layer, seam, batch, length):
    """Queries, keys and values, before these are repeated."""
    few = seam.num_key_value_heads
    return [
        # What half precision has, so that the layer has the same.
        np.asarray(
            keras.ops.cast(_normal(layer, batch, length, *rest), "float32")
        )
        for rest in (
            (seam.num_heads, seam.key_dim),
            (few, seam.key_dim),
            (few, seam.value_dim),
        )
    ]


def _mask_method(block, layer):
    """The name of a block's method that makes the mask, and if it is causal.

    `None` where the block has none, or masks in a way of its own.
    """
    width = layer.get_build_config()["input_shape"][-1]
    x = _normal(layer, 2, 5, width)
    padding = np.arange(5) < np.array([[5], [3]])
    for name in MASK_METHODS:
        method = getattr(block, name, None)
        if method is None:
            continue
        first, second, *others = inspect.signature(method).parameters
        call = dict.fromkeys(others) | {first: x, second: padding}
        for other in others:
            if other.endswith("index"):
                call[other] = 0
            if other == "use_causal_mask":
                call[other] = True
        mask = np.asarray(method(**call)).astype(bool)
        keys = np.broadcast_to(padding[:, np.newaxis], (2, 5, 5))
        if np.array_equal(mask, keys & np.tri(5, dtype=bool)):
            return name, True
        both = keys & padding[:, :, np.newaxis]
        if np.array_equal(mask, both) or np.array_equal(mask, keys):
            return name, False
    return None, False


def _window(layer, block):
    """The sliding window of a layer or its block, or `None`."""
    for owner in (layer, block):
        names = {name: x for name, x in vars(owner).items() if "slid" in name}
        is_off = any(x is False for x in names.values())
        sizes = [x for x in names.values() if x and x is not True]
        if sizes and not is_off:
            return sizes[0]
    return None


def _tolerance(layer):
    return _TOLERANCE.get(layer.compute_dtype, _HALF_TOLERANCE)


def _normal(layer, *shape):
    x = np.random.default_rng(len(shape)).normal(size=shape)
    return keras.ops.cast(x, layer.compute_dtype)


def _visible(batch, length):
    return np.ones((batch, length, length), bool)
