"""One call of a layer or operation in a model's graph, and how it streams.

A kind of call is a class: `TokenwiseCall` here, those with a state in files of
their own. Each is made of the operation and of its arguments in the graph,
where symbolic tensors stand for tokens; one that cannot stream raises a
`Refusal`.
"""

import inspect

import keras
import tensorflow as tf

from keras_kt.layers.axes import mask_of


class Refusal(Exception):
    """Why a call cannot stream, and what can be done."""

    def __init__(self, reason, way_out):
        super().__init__(reason)
        self.reason, self.way_out = reason, way_out


class TokenwiseCall:
    """A call that acts on each token alone, and has no state."""

    # Whether `Stretch.start` must be known.
    needs_position = False
    # Shapes of the state's tensors without the batch. Empty: no state. `None`:
    # the layer's own, which it checks itself.
    shapes: tuple | None = ()
    # Whether some of the new tokens can be padding.
    takes_mask = True

    def __init__(self, operation, args=(), kwargs=None):
        self.operation = operation
        self.has_training = "training" in parameters(operation)

    def initial_state(self, batch_size):
        """The state before the first token."""
        return tuple(tf.zeros((batch_size, *shape)) for shape in self.shapes)

    def step(self, stretch, state, args, kwargs):
        """Outputs at the new tokens, and the new state.

        Args:
            stretch: `Stretch` of the new tokens.
            state: what `initial_state` or the last step gave.
            args, kwargs: the call's arguments in the graph, new tokens in the
                place of symbolic tensors.
        """
        return self.call(args, kwargs), state

    def call(self, args, kwargs):
        """The call at inference, of any tokens."""
        if self.has_training:
            kwargs = {**kwargs, "training": False}
        return self.operation(*args, **kwargs)


class MaskedCall(TokenwiseCall):
    """A tensor that gets a Keras mask: of a model called with one."""

    def __init__(self):
        self.operation = None

    def call(self, args, kwargs):
        """The first argument with the second as its mask."""
        x = tf.identity(args[0])
        x._keras_mask = args[1]
        return x


def parameters(operation):
    """The parameters of an operation's call, by name."""
    return inspect.signature(operation.call).parameters


def is_symbolic(x):
    """Whether an argument of a call in the graph stands for tokens."""
    return isinstance(x, keras.KerasTensor)


def tokens_of(args, kwargs):
    """The tensors among arguments that stand for tokens, each once."""
    leaves = keras.tree.flatten((args, kwargs))
    return list({id(x): x for x in leaves if is_symbolic(x)}.values())


def fill(values, args, kwargs):
    """Arguments with tensors, by `id`, in the place of symbolic ones."""
    return keras.tree.map_structure(
        lambda x: values[id(x)] if is_symbolic(x) else x, (args, kwargs)
    )


def carry_mask(layer, x, output):
    """An output with the Keras mask that a call of the layer gives it."""
    mask = mask_of(x)
    if mask is None or not getattr(layer, "supports_masking", False):
        return output
    if tf.is_tensor(output) and mask_of(output) is None:
        output = tf.identity(output)
        output._keras_mask = mask
    return output
