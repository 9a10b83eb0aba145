"""Functions that a graph traces once, wherever in it they are called.

Layers of equal shapes trace the same operations again and again. Here the
outermost graph, such as a whole training step, keeps what it has traced, and
every further call is one operation. Nothing outlives that graph, so that what
is traced may depend on TensorFlow's settings.

For loops and branches: where a tape watches the tensors that are passed,
TensorFlow makes a second function at once, whose intermediate results are
outputs.
"""

from typing import Any, NamedTuple

import tensorflow as tf

# Of a graph's collection; no string, so that nothing tries to write it.
_TRACES = object()
# Where a tensor stood in a nest.
OPENING = object()


def shared_trace(function, fixed, tensors):
    """`function(fixed, tensors)`, traced once for equal arguments.

    Args:
        function: of a module or class, to a nest of tensors. It may depend on
            nothing that its arguments do not say.
        fixed: what tells one such function from another, with no tensor in it.
            It is called as it is where that has no hash.
        tensors: a nest of tensors and `None`.

    Returns:
        What the function gives.
    """
    if not tf.inside_function():
        return function(fixed, tensors)
    leaves = [x for x in tf.nest.flatten(tensors) if x is not None]
    key = (
        function,
        _typed(fixed),
        _typed(without_tensors(tensors)),
        tuple(tf.TensorSpec(x.shape, x.dtype) for x in leaves),
    )
    try:
        hash(key)
    except TypeError:
        return function(fixed, tensors)
    traces = _traces_of_graph()
    if key not in traces:
        traces[key] = _trace(function, fixed, tensors)
    if traces[key] is None:
        return function(fixed, tensors)
    return traces[key].call(leaves)


def without_tensors(nest):
    """A nest with `OPENING` in place of each tensor."""
    return tf.nest.map_structure(
        lambda x: OPENING if tf.is_tensor(x) else x, nest
    )


def _typed(nest):
    """What is equal for nests of equal types and parts alone.

    Named tuples of two types, and 1 and `True`, are equal to Python.
    """
    if isinstance(nest, (tuple, list)):
        return type(nest), *map(_typed, nest)
    return type(nest), nest


class _Trace(NamedTuple):
    """A function of tensors, and the nest of its outputs."""

    function: Any
    structure: Any

    def call(self, leaves):
        return tf.nest.pack_sequence_as(
            self.structure, tf.nest.flatten(self.function(*leaves))
        )


def _trace(function, fixed, tensors):
    """The `_Trace`, or `None` where it has effects or needs other tensors."""
    structure = None

    def of_leaves(*leaves):
        nonlocal structure
        rest = iter(leaves)
        structure = function(
            fixed,
            tf.nest.map_structure(
                lambda x: None if x is None else next(rest), tensors
            ),
        )
        return tf.nest.flatten(structure)

    specs = [
        tf.TensorSpec(x.shape, x.dtype)
        for x in tf.nest.flatten(tensors)
        if x is not None
    ]
    # On the device of each call. (`tf.init_scope` would do so as well, but it
    # stops tapes in branches of the function, which then give no gradient.)
    with tf.device(None):
        traced = tf.function(of_leaves, autograph=False)
        traced = traced.get_concrete_function(*specs)
    has_effects = traced.function_def.signature.is_stateful
    if traced.captured_inputs or has_effects or not traced.outputs:
        return None
    return _Trace(traced, without_tensors(structure))


def _traces_of_graph():
    """The outermost graph's traces by their keys."""
    graph = tf.compat.v1.get_default_graph()
    # The last one of a function: it lies in TensorFlow's global graph.
    while hasattr(getattr(graph, "outer_graph", None), "outer_graph"):
        graph = graph.outer_graph
    kept = graph.get_collection_ref(_TRACES)
    if not kept:
        kept.append({})
    return kept[0]
