"""Many streams in one batch: their states gathered, stacked and split.

A state is any nest of tensors, the batch their first axis: that of a layer, of
a model, or a dict of named tensors as a server sends it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf


def gather_state(state: Any, indices: Any) -> Any:
    """The streams of a state at `indices`, in that order.

    A state is a value: what is gathered forks it, and the one before is there
    to go back to. Beams are such a choice among rows.

    Args:
        state: any nest (tuples, NamedTuples, lists, dicts) of tensors or arrays
            `(batch, …)`.
        indices: `(new_batch,)` integers from 0 to batch − 1; one may come
            often, or never.

    Returns:
        The same nest of tensors `(new_batch, …)`.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(num_heads=4, key_dim=8)
        >>> state = layer.initial_state(batch_size=2)
        >>> keras_kt.gather_state(state, [0, 0, 1]).maximum.shape[0]
        3
    """
    state = _tensors(state)
    batch = _batch(state)
    received = f"indices={indices!r}"
    try:
        indices = tf.convert_to_tensor(indices)
    except (TypeError, ValueError):
        indices = None
    if indices is not None and indices.shape == (0,):
        indices = tf.zeros((0,), tf.int32)
    if (
        indices is None
        or not indices.dtype.is_integer
        or indices.shape.rank != 1
    ):
        raise ValueError(
            "`indices` must be integers of shape (new_batch,). Received: "
            f"{received}"
        )
    known = tf.get_static_value(indices)
    is_checked = known is not None and batch is not None
    if is_checked and ((known < 0) | (known >= batch)).any():
        raise ValueError(
            f"`indices` must be from 0 to {batch - 1}, for a state of {batch} "
            f"streams. Received: {received}"
        )
    return tf.nest.map_structure(lambda x: tf.gather(x, indices), state)


def stack_states(states: Sequence) -> Any:
    """One state of all streams of several, in their order.

    Args:
        states: a sequence of states of one structure, each of any number of
            streams: nests of tensors or arrays `(batch, …)`.

    Returns:
        The same nest of tensors, joined along the batch.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(num_heads=4, key_dim=8)
        >>> states = [layer.initial_state(2), layer.initial_state(3)]
        >>> keras_kt.stack_states(states).maximum.shape[0]
        5
    """
    if not isinstance(states, (list, tuple)) or hasattr(states, "_fields"):
        raise ValueError(
            "`states` must be a list or tuple of states. Received: a "
            f"{type(states).__name__}"
        )
    if not states:
        raise ValueError(
            "`states` must be at least one state. Received: none. An empty "
            "batch is `initial_state(0)`."
        )
    states = [_tensors(x, f"states[{i}]") for i, x in enumerate(states)]
    for i, state in enumerate(states):
        _batch(state, f"states[{i}]")
        if not _are_alike(states[0], state):
            raise ValueError(
                "`states` must be states of one model: nests of one structure, "
                "with tensors of the same shapes but for the batch. Received: "
                f"states[0] of {_shapes(states[0])}, and states[{i}] of "
                f"{_shapes(state)}"
            )
    return tf.nest.map_structure(lambda *x: tf.concat(x, 0), *states)


def unstack_states(state: Any, sizes: Sequence[int] | None = None) -> list:
    """The states of the streams of one, apart: what `stack_states` joined.

    Args:
        state: any nest of tensors or arrays `(batch, …)`.
        sizes: numbers of streams of the parts, a sequence of integers that add
            up to the batch. Defaults to `None`, which means one each; the batch
            must be known then where a graph is traced.

    Returns:
        A list of such nests.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(num_heads=4, key_dim=8)
        >>> state = layer.initial_state(5)
        >>> len(keras_kt.unstack_states(state))
        5
        >>> first, rest = keras_kt.unstack_states(state, [2, 3])
        >>> rest.maximum.shape[0]
        3
    """
    state = _tensors(state)
    batch = _batch(state)
    if sizes is None and batch is None:
        raise ValueError(
            "`sizes` is needed where the number of streams is not known until "
            "the graph runs. Received: None. Give those of the parts."
        )
    given = np.ones(batch, "int64") if sizes is None else _sizes(sizes)
    if given is None or (batch is not None and given.sum() != batch):
        raise ValueError(
            "`sizes` must be integers ≥ 0 that add up to the batch of the "
            f"state{'' if batch is None else f', {batch}'}. Received: "
            f"sizes={sizes!r}"
        )
    if not len(given):
        return []
    parts = [
        tf.split(x, given.tolist(), axis=0) for x in tf.nest.flatten(state)
    ]
    return [
        tf.nest.pack_sequence_as(state, part)
        for part in zip(*parts, strict=True)
    ]


def _are_alike(one, other):
    """Whether two states differ in values and the batch alone."""
    try:
        tf.nest.assert_same_structure(one, other)
    except (TypeError, ValueError):
        return False
    pairs = zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True)
    return all(
        x.dtype == y.dtype and x.shape[1:].is_compatible_with(y.shape[1:])
        for x, y in pairs
    )


def _sizes(sizes):
    try:
        sizes = np.asarray(sizes)
    except (TypeError, ValueError, NotImplementedError):
        return None
    sizes = sizes.astype("int64") if sizes.shape == (0,) else sizes
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or (sizes < 0).any():
        return None
    return sizes


def _tensors(state, name="state"):
    """The nest with tensors, all of which have a batch."""

    def tensor(path, x):
        try:
            x = tf.convert_to_tensor(x)
        except (TypeError, ValueError):
            raise _wrong(name, path, f"a {type(x).__name__}") from None
        if x.shape.rank == 0:
            raise _wrong(name, path, "a scalar")
        return x

    flat = [tensor(path, x) for path, x in _leaves(state)]
    if not flat:
        raise _wrong(name, (), "no tensor at all")
    return tf.nest.pack_sequence_as(state, flat)


def _leaves(state, path=()):
    """Paths and leaves, in the order of `tf.nest.flatten`."""
    if isinstance(state, dict):
        for key in sorted(state):
            yield from _leaves(state[key], (*path, repr(key)))
    elif isinstance(state, (tuple, list)):
        fields = getattr(state, "_fields", None)
        for i, x in enumerate(state):
            yield from _leaves(x, (*path, f".{fields[i]}" if fields else i))
    else:
        yield path, state


def _wrong(name, path, received):
    place = "".join(
        x if str(x).startswith(".") else f"[{x}]" for x in map(str, path)
    )
    return ValueError(
        f"`{name.split('[')[0]}` must be a nest of tensors whose first axis is "
        f"the batch. Received: {received} at {name}{place}. What streams share "
        "goes elsewhere; what each has gets an axis (batch, …)."
    )


def _batch(state, name="state"):
    """The number of streams, `None` where it is not known."""
    sizes = {x.shape[0] for x in tf.nest.flatten(state)} - {None}
    if len(sizes) > 1:
        raise ValueError(
            f"`{name}` must have one batch size in all its tensors. Received: "
            f"{_shapes(state)}"
        )
    return sizes.pop() if sizes else None


def _shapes(state):
    return str(tf.nest.map_structure(lambda x: x.shape.as_list(), state))
