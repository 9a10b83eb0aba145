"""Gradients that are written out, one inside another.

`tf.custom_gradient` marks an operation with the name of its gradient. In a
SavedModel TensorFlow keeps such gradients, but not those inside the gradients
of others, of which it warns that they "will likely fail", and those in loops
and branches do fail. So only the outermost is left to `tf.custom_gradient`: the
computation that it covers needs none inside, and `pullback` applies the inner
ones by hand.

It also registers each gradient that it traces for good, and with it the graph
whose tensors that uses. Here the graph owns the gradient, and what is
registered finds it there.
"""

import contextlib
import contextvars
import functools
import weakref

import tensorflow as tf

# What a written gradient does: `None` is what `tf.custom_gradient` does.
_MODE = contextvars.ContextVar("keras_kt_written_gradients", default=None)
_PLAIN = object()
# Of a graph's collection; no string, so that nothing tries to write it.
_GRADIENTS = object()


def written_gradient(function):
    """`tf.custom_gradient`, which may contain others of its kind.

    Args:
        function: of tensors, to its results and the function of their
            gradients that gives those of the arguments, all of them tensors.
    """

    def outermost(*tensors):
        with plain():
            return function(*tensors)

    @functools.wraps(function)
    def call(*tensors):
        mode = _MODE.get()
        if mode is None and tf.executing_eagerly():
            return tf.custom_gradient(outermost)(*tensors)
        if mode is None:
            return _traced(outermost, tensors)
        if mode is _PLAIN:
            return function(*tensors)[0]
        return mode.apply(outermost, tensors)

    return call


@contextlib.contextmanager
def plain():
    """Within, gradients are those of the operations, written ones unused.

    For what is traced to be served, or whose gradient is written elsewhere.
    """
    with _as_mode(_PLAIN):
        yield


def pullback(function, wanted, upstream):
    """Gradients of what a function computes again.

    Args:
        function: without arguments, to a structure of tensors.
        wanted: list of the tensors to differentiate by.
        upstream: gradients to the results, of their structure.

    Returns:
        List of the gradients to `wanted`, zeros where nothing depends. Not all
        of them: that would be a tape that was stopped.
    """
    # Persistent, since it is asked once for each written gradient inside.
    with tf.GradientTape(
        persistent=True, watch_accessed_variables=False
    ) as tape:
        tape.watch(wanted)
        inner = _Inner(tape)
        with _as_mode(inner):
            results = function()
    sources = [*wanted, *inner.results()]
    total = tape.gradient(results, sources, upstream)
    while inner.calls:
        arguments, outputs, gradient = inner.calls.pop()
        size = len(sources) - len(outputs)
        of_outputs = [
            tf.zeros_like(x) if g is None else g
            for x, g in zip(outputs, total[size:], strict=True)
        ]
        sources, total = sources[:size], total[:size]
        of_arguments = tf.nest.flatten(gradient(*of_outputs))
        more = tape.gradient(arguments, sources, of_arguments)
        total = [_sum(*pair) for pair in zip(total, more, strict=True)]
    if all(g is None for g in total):
        raise RuntimeError(
            "No gradient was recorded. Gradients must not be asked for where "
            "tapes are stopped, as in `tf.init_scope`."
        )
    return [
        tf.zeros_like(x) if g is None else g
        for x, g in zip(wanted, total, strict=True)
    ]


def unless(is_good, results, function, tensors):
    """Results where they are good, and else what a function makes of tensors.

    The function runs again for its gradient. What it computes inside would else
    leave the branch for the sake of the gradient, and XLA fills that with zeros
    where the branch is not taken: arrays for nothing.

    Args:
        is_good: boolean scalar tensor.
        results: list of tensors.
        function: of the tensors, to a list like `results`.
        tensors: list of all that it has gradients to.

    Returns:
        List of tensors.
    """
    count = len(results)

    @written_gradient
    def choose(*given):
        results, tensors = list(given[:count]), list(given[count:])

        def gradient(*upstream):
            of_results = [tf.where(is_good, g, 0.0) for g in upstream]
            of_tensors = tf.cond(
                is_good,
                lambda: [tf.zeros_like(x) for x in tensors],
                lambda: pullback(
                    lambda: function(*tensors), tensors, list(upstream)
                ),
            )
            return [*of_results, *of_tensors]

        chosen = tf.cond(is_good, lambda: results, lambda: function(*tensors))
        return list(chosen), gradient

    return choose(*results, *tensors)


def _traced(function, tensors):
    """`tf.custom_gradient` in a graph, which dies with its last user."""
    structure = None
    # TensorFlow keeps this list, of which it then needs the length alone.
    registered = []

    @tf.custom_gradient
    def flat(*tensors):
        nonlocal structure
        structure, gradient = function(*tensors)
        registered.extend(tf.nest.flatten(structure))
        registered[0].graph.add_to_collection(_GRADIENTS, gradient)
        find = weakref.ref(gradient)
        return registered, lambda *upstream: find()(*upstream)

    results = flat(*tensors)
    registered[:] = [None] * len(results)
    return tf.nest.pack_sequence_as(structure, results)


class _Inner:
    """Calls of written gradients while a tape records what is around them.

    To the tape their results are new variables.
    """

    def __init__(self, tape):
        self.tape = tape
        self.calls = []

    def apply(self, function, tensors):
        with self.tape.stop_recording():
            results, gradient = function(*tensors)
            # What is returned as it came is watched already.
            given = {id(x) for x in tensors}
            results = tf.nest.map_structure(
                lambda x: tf.identity(x) if id(x) in given else x, results
            )
        outputs = tf.nest.flatten(results)
        self.tape.watch(outputs)
        self.calls.append((list(tensors), outputs, gradient))
        return results

    def results(self):
        return [x for _, outputs, _ in self.calls for x in outputs]


@contextlib.contextmanager
def _as_mode(mode):
    token = _MODE.set(mode)
    try:
        yield
    finally:
        _MODE.reset(token)


def _sum(a, b):
    if a is None or b is None:
        return b if a is None else a
    return a + b
