"""States of streams: what causal attention remembers of the past.

They may come from any nest of arrays: saved, sent, or made elsewhere.

A state's shapes are the same NamedTuple with a tuple of sizes for each tensor,
`None` for the batch. They are all that is needed to take one apart or to put
one together.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_kt.ops.scaling import FLOOR


class AttentionState(NamedTuple):
    """All that causal attention remembers of the past; its size is fixed.

    Attributes:
        maximum: `(batch, heads, feature_dim)`, running maximum of each
            log-feature (unused for signed features).
        sums: `(batch, heads, value_dim + 1, feature_dim)`, Σ v φ(k)ᵀ relative
            to `maximum`, and Σ φ(k) in the last row.

    Examples:
        >>> state = keras_kt.KernelizedAttention(4, 8).initial_state(2)
        >>> type(state).__name__, state.sums.shape
        ('AttentionState', TensorShape([2, 4, 9, 16]))
    """

    maximum: tf.Tensor
    sums: tf.Tensor


class NearFieldState(NamedTuple):
    """State of a causal stream whose near field is exact.

    Attributes:
        far: the `AttentionState` of the tokens that have left the window.
        key, value, decay: `(batch, window, heads, dim)`, the last tokens.
        keep: `(batch, window)`, 1 where one of them is seen.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(4, 8, near_field=64)
        >>> state = layer.initial_state(batch_size=2)
        >>> type(state).__name__, state.key.shape
        ('NearFieldState', TensorShape([2, 64, 4, 8]))
    """

    far: AttentionState
    key: tf.Tensor
    value: tf.Tensor
    decay: tf.Tensor
    keep: tf.Tensor


class WindowState(NamedTuple):
    """State of a causal stream that sees a window of tokens, and no more.

    Attributes:
        key, value, decay: `(batch, window, heads, dim)`, the last tokens.
        keep: `(batch, window)`, 1 where one of them is seen.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(4, 8, sliding_window=64)
        >>> state = layer.initial_state(batch_size=2)
        >>> type(state).__name__, state.key.shape
        ('WindowState', TensorShape([2, 64, 4, 8]))
    """

    key: tf.Tensor
    value: tf.Tensor
    decay: tf.Tensor
    keep: tf.Tensor


class RotaryState(NamedTuple):
    """State of a causal stream whose tokens have rotary positions.

    Attributes:
        attention: the state of its attention.
        position: `(batch,)`, the place of the next token: how many were seen.
            Float32, as all of a state; it counts up to 2²⁴ of them.

    Examples:
        >>> x = np.random.normal(size=(2, 3, 32)).astype("float32")
        >>> layer = keras_kt.KernelizedAttention(
        ...     4, 8, rotary_max_wavelength=10_000)
        >>> _, state = layer.step(x, layer.initial_state(batch_size=2))
        >>> type(state).__name__, state.position.numpy().tolist()
        ('RotaryState', [3.0, 3.0])
    """

    attention: AttentionState | NearFieldState | WindowState
    position: tf.Tensor


def initial_state(
    batch_size, num_heads: int, feature_dim: int, value_dim: int
) -> AttentionState:
    """The state that has seen nothing."""
    return initial(state_shapes(num_heads, feature_dim, value_dim), batch_size)


def initial(shapes, batch_size):
    """The state of these shapes that has seen nothing."""
    state = zeros(shapes, batch_size)
    if isinstance(state, RotaryState):
        attention = initial(shapes.attention, batch_size)
        return state._replace(attention=attention)
    if isinstance(state, NearFieldState):
        return state._replace(far=initial(shapes.far, batch_size))
    if isinstance(state, AttentionState):
        return state._replace(maximum=state.maximum + FLOOR)
    return state


def shapes(
    num_heads: int,
    feature_dim: int,
    value_dim: int,
    head_dim: int,
    near_field: int | None = None,
    sliding_window: int | None = None,
):
    """Shapes of the state's tensors of any attention, `None` for the batch."""
    if sliding_window:
        return window_state_shapes(
            num_heads, value_dim, head_dim, sliding_window
        )
    sizes = num_heads, feature_dim, value_dim
    if near_field:
        return near_field_state_shapes(*sizes, head_dim, near_field)
    return state_shapes(*sizes)


def state_shapes(
    num_heads: int, feature_dim: int, value_dim: int
) -> AttentionState:
    """Shapes of the state's tensors, `None` for the batch."""
    return AttentionState(
        (None, num_heads, feature_dim),
        (None, num_heads, value_dim + 1, feature_dim),
    )


def near_field_state_shapes(
    num_heads: int, feature_dim: int, value_dim: int, head_dim: int, window: int
) -> NearFieldState:
    """Shapes of the state's tensors, `None` for the batch."""
    return NearFieldState(
        state_shapes(num_heads, feature_dim, value_dim),
        *window_state_shapes(num_heads, value_dim, head_dim, window),
    )


def window_state_shapes(
    num_heads: int, value_dim: int, head_dim: int, window: int
) -> WindowState:
    """Shapes of the state's tensors, `None` for the batch."""
    key, value, decay = (
        (None, window, num_heads, dim) for dim in (head_dim, value_dim, 1)
    )
    return WindowState(key, value, decay, (None, window))


def zeros(shapes, batch_size):
    """The state of these shapes that holds zeros."""
    return _each(shapes, lambda shape: tf.zeros((batch_size, *shape[1:])))


def restore(state, shapes):
    """A state of float32 tensors from arrays, or what is wrong with them.

    Args:
        state: NumPy arrays or tensors in the structure of `shapes`, where a
            tuple, a list or a dict by field names stands for a NamedTuple.
        shapes: the shapes of the state.

    Returns:
        A state of `shapes`' type.
    """
    batches = set()
    try:
        restored = _fit(state, shapes, batches)
        if len(batches - {None}) > 1:
            raise _Misfit
    except _Misfit:
        name = type(shapes).__name__
        article = "an" if name[0] in "AEIOU" else "a"
        raise ValueError(
            f"`state` must be {article} {name}, from `initial_state` or an "
            "earlier `step`, or arrays of its shapes in a tuple, a list or a "
            f"dict of the same structure: {_expected(shapes)}, of one batch "
            f"size. Received: {_received(state)}"
        ) from None
    return restored


class _Misfit(Exception):
    """Arrays that are no such state."""


def _each(shapes, function):
    if not hasattr(shapes, "_fields"):
        return function(shapes)
    return type(shapes)(*(_each(part, function) for part in shapes))


def _fit(state, shapes, batches):
    """`state` in the structure of `shapes`; its batch sizes are collected."""
    if not hasattr(shapes, "_fields"):
        return _tensor(state, shapes, batches)
    fields = shapes._fields
    if isinstance(state, dict):
        if set(state) != set(fields):
            raise _Misfit
        state = [state[field] for field in fields]
    is_nest = isinstance(state, (tuple, list)) and len(state) == len(fields)
    if not is_nest or getattr(state, "_fields", fields) != fields:
        raise _Misfit
    pairs = zip(state, shapes, strict=True)
    return type(shapes)(*(_fit(x, part, batches) for x, part in pairs))


def _tensor(x, shape, batches):
    try:
        x = tf.cast(tf.convert_to_tensor(x), tf.float32)
    except (TypeError, ValueError, tf.errors.OpError):
        raise _Misfit from None
    if not x.shape.is_compatible_with(shape):
        raise _Misfit
    if x.shape.rank is None or None in x.shape[1:]:
        x = tf.ensure_shape(x, shape)
    batches.add(x.shape[0])
    return x


def _expected(shapes):
    if not hasattr(shapes, "_fields"):
        sizes = ", ".join(["batch", *map(str, shapes[1:])])
        return f"({sizes},)" if len(shapes) == 1 else f"({sizes})"
    return _call(type(shapes), zip(shapes._fields, shapes, strict=True))


def _call(kind, parts, describe=None):
    describe = describe or _expected
    parts = (f"{name}={describe(part)}" for name, part in parts)
    return f"{kind.__name__}({', '.join(parts)})"


def _received(state):
    """The structure and the shapes of what came."""
    if isinstance(state, dict):
        return _call(type(state), state.items(), _received)
    if hasattr(state, "_fields"):
        fields = zip(state._fields, state, strict=True)
        return _call(type(state), fields, _received)
    if isinstance(state, (tuple, list)):
        parts = ", ".join(map(_received, state))
        return f"{type(state).__name__}({parts})"
    if tf.is_tensor(state) or isinstance(state, (np.ndarray, np.generic)):
        return str(state.shape)
    return f"a {type(state).__name__}"
