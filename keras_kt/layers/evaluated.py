"""What layers make of their weights alone, once for all steps of a loop.

TensorFlow runs all that stands in a loop at every step, and a kernel's
frequencies are the same at each. So the loop of a generation says that it is
one, and layers read there what the prompt's step has evaluated outside.
"""

import contextlib
import contextvars

import tensorflow as tf

_VALUES = contextvars.ContextVar("keras_kt_evaluated", default=None)


@contextlib.contextmanager
def once():
    """Within, what `of` evaluates in this graph is kept for its loops.

    Weights must not change within. Gives a context for the body of a loop.
    """
    values = _Values(_graph())
    token = _VALUES.set(values)
    try:
        yield values.in_loop
    finally:
        _VALUES.reset(token)


def of(layer, evaluate):
    """`evaluate()`, a function of the layer's weights; or what it gave before.

    Args:
        layer: whose it is; it has one such function.
        evaluate: without arguments, to a nest that holds tensors.
    """
    values = _VALUES.get()
    return evaluate() if values is None else values.of(layer, evaluate)


class _Values:
    """Values of layers in one graph, which its loops may read.

    Other graphs within, such as a function that is traced once and called from
    many, must hold no tensor of this one.
    """

    def __init__(self, graph):
        self._graph, self._loop = graph, None
        # With the layers, so that no other gets the number of one.
        self._values = {}

    @contextlib.contextmanager
    def in_loop(self):
        outer, self._loop = self._loop, _graph()
        try:
            yield
        finally:
            self._loop = outer

    def of(self, layer, evaluate):
        graph = _graph()
        if graph is self._graph and id(layer) not in self._values:
            self._values[id(layer)] = layer, evaluate()
        may_read = graph is self._graph or graph is self._loop
        if not may_read or id(layer) not in self._values:
            return evaluate()
        return self._values[id(layer)][1]


def _graph():
    return tf.compat.v1.get_default_graph()
