"""Written gradients in loops and branches, in SavedModels, and forgotten.

Here the gradient of a sum of 2x is written as 3, which nothing else gives.
"""

import gc
import json
import subprocess
import sys
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt.written_gradients import (
    plain,
    pullback,
    unless,
    written_gradient,
)

# Loads exports without this package, and asks one for its gradient.
LOADER = """
import json, logging, sys, warnings

import numpy as np
import tensorflow as tf

said = []


class Handler(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


for name in (None, "absl", "tensorflow"):
    logging.getLogger(name).addHandler(Handler(logging.WARNING))
folders, arrays = json.loads(sys.argv[1]), np.load(sys.argv[2])
gradients = []
for folder in folders:
    artifact = tf.saved_model.load(folder)
    x = tf.constant(arrays["x"])
    with tf.GradientTape() as tape:
        tape.watch(x)
        (y,) = artifact.signatures["serving_default"](x=x).values()
        loss = tf.reduce_sum(tf.sin(y))
    gradients.append(tape.gradient(loss, x))
    np.testing.assert_allclose(gradients[-1], arrays["gradient"], atol=1e-4)
assert not any(name.startswith("keras_kt") for name in sys.modules)
assert not said, said
print("quiet", len(gradients))
"""


@written_gradient
def doubled(x):
    return 2.0 * x, lambda upstream: 3.0 * upstream


def in_map(x):
    return tf.map_fn(doubled, x)


def in_branch(x):
    return tf.cond(tf.size(x) > 1, lambda: doubled(x), lambda: x)


def in_branch_of_map(x):
    return tf.map_fn(
        lambda y: tf.cond(y > 0.0, lambda: doubled(y), lambda: y), x
    )


@pytest.mark.parametrize(
    "function", [doubled, in_map, in_branch, in_branch_of_map]
)
@pytest.mark.parametrize("asked", ["inside", "outside"])
def test_gradient_is_found_in_loops_and_branches(function, asked):
    """After a collection, since the graph alone keeps it."""
    x = tf.constant([1.0, 2.0, 3.0])

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        gc.collect()
        return tape.gradient(y, x)

    if asked == "inside":
        gradient = tf.function(gradient, autograph=False)
    else:
        function = tf.function(function, autograph=False)
    np.testing.assert_array_equal(gradient(x), [3.0, 3.0, 3.0])


def of_results_or_not(x, y):
    """3x where x is small, else y² doubled, or as its gradient has it."""
    (chosen,) = unless(
        tf.reduce_max(x) < 10.0,
        [3.0 * x],
        lambda y: [doubled(y * y)],
        [y],
    )
    return chosen


@pytest.mark.parametrize("compiled", [None, False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["outermost", "inside"])
@pytest.mark.parametrize(
    ("largest", "output", "gradients"),
    [
        (2.0, [3.0, 6.0], ([3.0, 3.0], [0.0, 0.0])),
        (20.0, [32.0, 50.0], ([0.0, 0.0], [24.0, 30.0])),
    ],
)
def test_what_is_good_is_kept_and_else_found_again(
    largest, output, gradients, inside, compiled
):
    tensors = [tf.constant([1.0, largest]), tf.constant([4.0, 5.0])]

    def run(*tensors):
        if inside:
            upstream = tf.ones_like(tensors[0])
            again = pullback(
                lambda: of_results_or_not(*tensors), tensors, upstream
            )
            return of_results_or_not(*tensors), again
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            chosen = of_results_or_not(*tensors)
        return chosen, tape.gradient(chosen, tensors)

    if compiled is not None:
        run = tf.function(run, jit_compile=compiled, autograph=False)
    chosen, found = run(*tensors)
    np.testing.assert_array_equal(chosen, output)
    np.testing.assert_array_equal(found, gradients)
    with plain():
        np.testing.assert_array_equal(of_results_or_not(*tensors), output)


def test_gradient_is_saved(tmp_path):
    module = tf.Module()
    spec = tf.TensorSpec((None,), tf.float32)
    module.call = tf.function(doubled, input_signature=[spec])
    tf.saved_model.save(module, tmp_path)
    x = tf.constant([1.0, 2.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.saved_model.load(tmp_path).call(x)
    np.testing.assert_array_equal(tape.gradient(y, x), [3.0, 3.0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"implementation": "linear"},
        pytest.param(
            {"feature_map": "trigonometric", "decay": "gated"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"near_field": 3}, marks=pytest.mark.slow),
    ],
)
def test_a_traced_graph_dies_with_its_function(arguments):
    """It did not: TensorFlow's table of gradients held each."""
    layer = keras_kt.KernelizedAttention(2, 3, **arguments)
    function = tf.function(lambda x: layer(x, x, use_causal_mask=True))
    x = tf.ones((2, 7, 6))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    assert np.isfinite(tape.gradient(y, x)).all()
    graph = weakref.ref(function.get_concrete_function(x).graph)
    del function, tape, y
    gc.collect()
    assert graph() is None


@pytest.mark.slow
def test_exports_load_quietly_and_have_gradients(tmp_path):
    """They logged "ops with unsaved custom gradients"; a process of its own."""
    x = keras.Input((None, 6), name="x")
    # Its sines have written gradients, inside that of the scan.
    attention = keras_kt.KernelizedAttention(2, 5, feature_map="trigonometric")
    model = keras.Model(x, attention(x, x, use_causal_mask=True))
    batch = np.random.default_rng(0).normal(size=(2, 11, 6)).astype("float32")
    model.compile("sgd", "mse")
    model.train_on_batch(batch, batch)
    folders = [
        keras_kt.export_saved_model(model, tmp_path / "served", streaming=True),
        str(tmp_path / "exported"),
        str(tmp_path / "again"),
    ]
    model.export(folders[1], verbose=False)
    artifact = tf.saved_model.load(folders[1])
    tf.saved_model.save(artifact, folders[2], artifact.signatures)
    inputs = tf.constant(batch)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(tf.sin(model(inputs)))
    arrays = {"x": batch, "gradient": tape.gradient(loss, inputs)}
    np.savez(tmp_path / "arrays.npz", **arrays)
    done = subprocess.run(
        [
            *(sys.executable, "-c", LOADER),
            *(json.dumps(folders), tmp_path / "arrays.npz"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "quiet 3"


def test_a_tape_that_recorded_nothing_is_an_error():
    """Zeros in place of a gradient would be trained on."""
    x = tf.ones(2)
    with pytest.raises(RuntimeError, match="No gradient was recorded"):
        pullback(lambda: [tf.ones(2)], [x], [x])
    (gradient, unused) = pullback(lambda: [2.0 * x], [x, tf.ones(3)], [x])
    np.testing.assert_array_equal(gradient, [2.0, 2.0])
    np.testing.assert_array_equal(unused, [0.0, 0.0, 0.0])
