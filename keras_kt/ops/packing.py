"""States in one tensor, for loops that carry tensors and no structures.

The tensors of a state stand side by side in rows of numbers, one row for each
stream, in the order of the state's fields.
"""

import math
from typing import Any

import tensorflow as tf


def packed_size(shapes: Any) -> int:
    """How many numbers a state of these shapes has for each stream."""
    return sum(math.prod(shape[1:]) for shape in _leaves(shapes))


def pack(state: Any) -> tf.Tensor:
    """A state as `(batch, packed_size)`, float32."""
    parts = [
        tf.reshape(x, (tf.shape(x)[0], math.prod(x.shape[1:])))
        for x in _leaves(state)
    ]
    return tf.concat([tf.cast(x, tf.float32) for x in parts], axis=1)


def unpack(packed: tf.Tensor, shapes: Any) -> Any:
    """The inverse of `pack`.

    Args:
        packed: `(batch, at least packed_size)`; further columns are left.
        shapes: of the state's tensors, as a state; `None` for the batch.
    """
    sizes = [math.prod(shape[1:]) for shape in _leaves(shapes)]
    if packed.shape.rank != 2 or packed.shape[1] < sum(sizes):
        raise ValueError(
            f"`packed` must be (batch, {sum(sizes)}), or wider: a row for each "
            f"stream. Received: shape {tuple(packed.shape)}"
        )
    parts = iter(tf.split(packed[:, : sum(sizes)], sizes, axis=1))
    return _nest(shapes, parts)


def _leaves(state):
    """The tensors, or the shapes, of a nest of NamedTuples."""
    if not hasattr(state, "_fields"):
        yield state
        return
    for part in state:
        yield from _leaves(part)


def _nest(shapes, parts):
    if not hasattr(shapes, "_fields"):
        return tf.reshape(next(parts), (-1, *shapes[1:]))
    return type(shapes)(*(_nest(part, parts) for part in shapes))
