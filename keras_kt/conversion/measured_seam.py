"""What attention of another class computes at its seam, found by trying it.

Sizes, grouping, softmax's scale and masks are measured on random inputs, and
the whole is compared with softmax in float64: a family that is not known is
converted if it is softmax, and refused with the difference if it is not.
"""

import dataclasses
import inspect

import keras
import numpy as np

from keras_kt import kernels
from keras_kt.conversion.inline import (
    METHOD,
    PROJECTIONS,
    alibi_slopes,
    parts_of,
)
from keras_kt.conversion.probe import (
    heads_of,
    recorded_calls,
    replaced_methods,
)
from keras_kt.conversion.seam import MASK_METHODS, Seam

# How far attention may be from softmax, of values of size one, and its scale.
_TOLERANCE = {"float32": 1e-4, "float64": 1e-4}
_HALF_TOLERANCE = 0.05
# What is known to be no softmax, by the names that KerasHub gives it.
_NO_SOFTMAX = {
    "logit_soft_cap": "caps its logits, which no kernel does",
    "sinks": "has sinks, which take weight from keys",
    "use_relative_attention_bias": "adds a learned bias to its logits",
}


def has_seam(layer):
    """Whether a layer has a method for heads, or is known to attend inline."""
    if any(getattr(layer, name, None) is not None for name in _NO_SOFTMAX):
        return True
    if parts_of(layer):
        return True
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
    for name, what in _NO_SOFTMAX.items():
        if getattr(layer, name, None) is not None:
            return what
    try:
        if parts_of(layer):
            return _measured_inline(layer, block)
        return _measured(layer, block)
    # Code of another package, on inputs that it may not be made for.
    except Exception as error:
        return f"could not be tried: {(str(error).splitlines() or [''])[0]}"


def _measured(layer, block):
    passed = _heads_passed(layer)
    query, key, value = (passed[name] for name in ("query", "key", "value"))
    repeats = _repeats(key, value)
    few = key.shape[2] // repeats
    size = key.shape[-1]
    window = _window(layer, block)
    seam = Seam(
        query.shape[2],
        few,
        size,
        value.shape[-1],
        size**-0.5,
        window=window,
    )
    scale = _scale(layer, seam, repeats)
    error = _distance_from_softmax(layer, seam, repeats, scale)
    if not error < _tolerance(layer):
        return (
            f"differs from softmax by {error:.2g} on random heads: with a "
            "bias, a cap or a norm of its logits?"
        )
    method, is_causal = _mask_method(block, layer, window)
    if window and not is_causal:
        return f"has a sliding window of {window} that is not causal"
    drops_weights = "training" in passed["options"]
    return dataclasses.replace(
        seam,
        scale=scale,
        is_causal=is_causal,
        mask_method=method,
        weights_dropout=getattr(layer, "dropout", 0.0) if drops_weights else 0,
    )


def _measured_inline(layer, block):
    width = _width(layer)
    method, is_causal = _mask_method(block, layer, None)
    if not is_causal:
        return "its block is not causal"
    padding = np.arange(13) < np.array([[13], [9]])
    with recorded_calls([layer]) as calls:
        block(_normal(layer, 2, 13, width), keras.ops.cast(padding, "int32"))
    ((_, arguments, output),) = calls
    parts = parts_of(layer)
    heads = [
        np.asarray(keras.ops.cast(dense(next(iter(arguments.values()))), float))
        for dense in (parts[name] for name in PROJECTIONS[:3])
    ]
    _, length, count, size = heads[0].shape
    query, key, value = (np.swapaxes(x, 1, 2) for x in heads)
    distance = np.arange(length)[:, np.newaxis] - np.arange(length)
    visible = padding[:, np.newaxis, np.newaxis] & (distance >= 0)
    errors = []
    # Falcon scales the biases too.
    candidates = [
        tuple(slope * factor for slope in alibi_slopes(count))
        for factor in (1.0, size**-0.5)
    ]
    for slopes in candidates:
        bias = np.multiply.outer(slopes, -np.maximum(distance, 0))
        logits = query @ np.swapaxes(key, -1, -2) * size**-0.5 + bias
        logits = np.where(visible, logits, -np.inf)
        kernel = np.exp(logits - logits.max(axis=-1, keepdims=True))
        exact, _ = kernels.kernel_attention(kernel, value)
        exact = np.swapaxes(exact, 1, 2).reshape(2, length, -1)
        exact = parts["output_dense"](keras.ops.cast(exact, output.dtype))
        error = keras.ops.cast(output - exact, "float32")
        size_of_output = np.abs(keras.ops.cast(output, "float32")).max()
        errors.append(np.abs(error)[padding].max() / size_of_output)
    if not min(errors) < _tolerance(layer):
        return (
            f"differs from softmax with ALiBi by {min(errors):.2g} on random "
            "inputs"
        )
    rates = [x.rate for x in parts.values() if hasattr(x, "rate")]
    return Seam(
        count,
        count,
        size,
        value.shape[-1],
        size**-0.5,
        is_causal=True,
        mask_method=method,
        weights_dropout=max(rates, default=0.0),
        slopes=candidates[int(np.argmin(errors))],
        is_inline=True,
    )


def _heads_passed(layer):
    """The arguments of the seam when the layer attends on random inputs."""
    width = _width(layer)
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


def _repeats(*projected):
    """How many heads in a row are one that the layer has repeated."""
    count = projected[0].shape[2]
    for repeats in range(count, 1, -1):
        if count % repeats == 0 and all(
            # Zeros do not tell heads apart.
            x.any() and np.array_equal(x, _repeated(x, repeats))
            for x in projected
        ):
            return repeats
    return 1


def _repeated(x, repeats):
    return np.repeat(x[:, :, ::repeats], repeats, axis=2)


def _width(layer):
    """The size of the tokens that a layer was built for."""
    shape = layer.get_build_config()["input_shape"]
    while not isinstance(shape[0], int | None):
        shape = shape[0]
    return shape[-1]


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
    # One over the root of an integer, in all that is known: nearly always of
    # key_dim. TensorFlow's products in bfloat16 round towards zero on CPUs
    # without such instructions: 0.3 % of each logit.
    squared = round(scale**-2) if 0.0 < scale <= 1.0 else 0
    for candidate, part in ((seam.key_dim, 5.0), (squared, 20.0)):
        if candidate:
            rounded = candidate**-0.5
            if abs(scale / rounded - 1.0) < _tolerance(layer) / part:
                return rounded
    return float(scale)


def _distance_from_softmax(layer, seam, repeats, scale):
    """The largest difference, causal and padded, of loud heads."""
    query, key, value = _random_heads(layer, seam, 2, 13)
    query = 3.0 * query
    visible = _visible(2, 13) & _band(13, seam.window)
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


def _mask_method(block, layer, window):
    """The name of a block's method that makes the mask, and if it is causal.

    `None` where the block has none, or masks in a way of its own.
    """
    width = _width(layer)
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
        # The window is the block's, or left to the layer.
        for band in (None, window):
            if np.array_equal(mask, keys & _band(5, band)):
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


def _band(length, window):
    """Which keys a query sees, causally."""
    seen = np.tri(length, dtype=bool)
    return seen & ~np.tri(length, k=-window, dtype=bool) if window else seen


def _tolerance(layer):
    return _TOLERANCE.get(layer.compute_dtype, _HALF_TOLERANCE)


def _normal(layer, *shape):
    x = np.random.default_rng(len(shape)).normal(size=shape)
    return keras.ops.cast(x, layer.compute_dtype)


def _visible(batch, length):
    return np.ones((batch, length, length), bool)
