"""Training and scoring as HLO modules, by TensorFlow's XLA bridge.

No accelerator is needed: what TensorFlow lowers for a CPU holds for all.
"""

import contextlib

import tensorflow as tf

from experiments import measure
from experiments.data import map_split
from experiments.strategies import training_step
from keras_kt.ops import blocks


def lower(sizes, data, model, optimizer, loss, score):
    """Modules that train and score.

    `train` makes `chunk` steps: of `(order, x, y, values)`, the examples of
    each step, the training set and the values of all variables, it makes the
    losses and the new values. `evaluate` makes scores of `(x, y, values)`, one
    batch and the values of the model's variables. All are flat lists of arrays.

    Captured variables follow as further parameters, whose values do not matter,
    and whose updates follow the results: as values go in and come out, nobody
    needs to know in which order XLA updates variables.

    Args:
        sizes: dictionary with `chunk`, `batch` and `scored_batch`.
        data: `Data`.
        model: a built model.
        optimizer: its optimizer, built.
        loss, score: functions of `(y, outputs)`, one number for each example.

    Returns:
        By name, a serialized module and the numbers of the variables that it
        captures, in the order of the values.
    """
    variables = [*model.variables, *optimizer.variables]
    step = training_step(model, optimizer, loss)
    scores = measure.example_scores(model, score)
    chunk = sizes["chunk"]

    def train(order, x, y, values):
        _assign(variables, values)

        def body(number, losses):
            batch = tf.nest.map_structure(
                lambda array: tf.gather(array, order[number]), (x, y)
            )
            return number + 1, losses.write(number, step(*batch))

        _, losses = tf.while_loop(
            lambda number, _: number < chunk,
            body,
            (0, tf.TensorArray(tf.float32, chunk)),
        )
        return losses.stack(), *map(tf.convert_to_tensor, variables)

    def evaluate(x, y, values):
        _assign(model.variables, values)
        return scores(x, y)

    def batch_spec(array):
        return tf.TensorSpec(
            (sizes["scored_batch"], *array.shape[1:]), array.dtype
        )

    order = tf.TensorSpec((chunk, sizes["batch"]), "int32")
    values = [tf.TensorSpec(v.shape, v.dtype) for v in variables]
    of_model = values[: len(model.variables)]
    with _accelerator():
        return {
            "train": _module(
                train,
                (order, *map_split(_spec, data.train), values),
                variables,
            ),
            "evaluate": _module(
                evaluate,
                (*map_split(batch_spec, data.test), of_model),
                variables,
            ),
        }


def _spec(array):
    return tf.TensorSpec(array.shape, array.dtype)


def _assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _module(function, specs, variables):
    @tf.function(jit_compile=True, autograph=False)
    def flat_function(*arrays):
        return function(*tf.nest.pack_sequence_as(specs, arrays))

    flat = tf.nest.flatten(specs)
    captures = flat_function.get_concrete_function(*flat).captured_inputs
    places = {id(v.value.handle): i for i, v in enumerate(variables)}
    lower_to = flat_function.experimental_get_compiler_ir(*flat)
    return lower_to(stage="hlo_serialized"), [places[id(x)] for x in captures]


@contextlib.contextmanager
def _accelerator():
    """Lowers as where an accelerator is visible, in full precision."""
    rows = blocks.CPU_BLOCK_ROWS, blocks.CPU_CAUSAL_BLOCK_ROWS
    rounds = tf.config.experimental.tensor_float_32_execution_enabled()
    blocks.CPU_BLOCK_ROWS = blocks.ACCELERATOR_BLOCK_ROWS
    blocks.CPU_CAUSAL_BLOCK_ROWS = blocks.ACCELERATOR_CAUSAL_BLOCK_ROWS
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        blocks.CPU_BLOCK_ROWS, blocks.CPU_CAUSAL_BLOCK_ROWS = rows
        tf.config.experimental.enable_tensor_float_32_execution(rounds)
