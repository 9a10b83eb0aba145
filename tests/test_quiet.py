"""Nothing that users do with a layer logs or warns.

In a process of its own, so that what is said once is said here, with handlers
on the loggers, and with Python's warnings as errors.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import json, logging, sys, tempfile, warnings

import keras
import numpy as np
import tensorflow as tf

import keras_kt
from tests.helpers import cases

said = []


class Handler(logging.Handler):
    def emit(self, record):
        said.append(f"{record.name}: {record.getMessage()}")


for name in (None, "absl", "tensorflow", "keras"):
    logging.getLogger(name).addHandler(Handler(logging.WARNING))
warnings.simplefilter("error")
# Raised inside TensorFlow and its dependencies, not by this package.
for module in ("tensorflow", "tensorflow_probability", "tf_keras"):
    warnings.filterwarnings("ignore", "", DeprecationWarning, module)
warnings.filterwarnings("ignore", ".*copy keyword.*", DeprecationWarning)
warnings.filterwarnings("ignore", ".*np.object.*", FutureWarning)
# Inside Keras's EinsumDense where the length is dynamic.
warnings.filterwarnings("ignore", ".*jit_compile.*")
warnings.filterwarnings("ignore", "FastFoodPrior needs a power")


def exercise(is_causal, **arguments):
    arguments = {
        key: cases.PRIORS[value]() if key == "spectral_prior"
        else cases.MAPS[value]() if key == "feature_map" else value
        for key, value in arguments.items()
    }
    x = keras.Input((None, 6), name="x")
    layer = keras_kt.KernelizedAttention(
        2, 5, implementation="linear", **arguments
    )
    model = keras.Model(x, layer(x, x, use_causal_mask=is_causal))
    batch = np.random.default_rng(0).normal(size=(2, 11, 6)).astype("float32")
    model(batch)
    tf.function(model)(batch)
    tf.function(model, jit_compile=True)(batch)
    model.compile("sgd", "mse")
    model.train_on_batch(batch, batch)
    folder = tempfile.mkdtemp()
    model.save(folder + "/model.keras")
    keras.saving.load_model(folder + "/model.keras")(batch)
    model.export(folder + "/export", verbose=False)
    artifact = tf.saved_model.load(folder + "/export")
    inputs = tf.constant(batch)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(tf.sin(artifact.serve(inputs)))
    gradient = tape.gradient(loss, inputs)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(tf.sin(model(inputs)))
    expected = tape.gradient(loss, inputs)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
    tf.saved_model.load(keras_kt.export_saved_model(model, folder + "/served"))
    if is_causal:
        # With AutoGraph, as a user's function has it.
        state = tf.function(lambda size: layer.initial_state(size))(2)
        step = tf.function(lambda x, state: layer.step(x, state))
        for token in (batch[:, :3], batch[:, 3:4]):
            _, state = step(token, state)


for case in json.loads(sys.argv[1]):
    exercise(**case)
    assert not said, (case, said)
print("quiet")
"""
QUICK = [
    {"is_causal": True, "feature_map": "trigonometric"},
    {"is_causal": False, "feature_map": "positive"},
]
# Every prior; each map, decay and near field both causal and not.
ALL = [
    {"is_causal": causal, "spectral_prior": prior, "feature_map": name, **more}
    for prior, causal, name, more in (
        ("mixture", True, "positive", {"near_field": 3}),
        ("fastfood", False, "trigonometric", {}),
        ("generator", True, "positive", {"decay": "gated"}),
        ("normal", False, "positive", {"near_field": 3}),
        ("distribution", False, "positive", {"decay": "gated"}),
        ("distribution", True, "trigonometric", {"decay": "constant"}),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(QUICK[:1], id="trigonometric, causal"),
        *(
            pytest.param(
                [case],
                marks=pytest.mark.slow,
                id=", ".join(f"{key}={value}" for key, value in case.items()),
            )
            for case in QUICK[1:] + ALL
        ),
    ],
)
def test_nothing_is_logged_or_warned(chosen):
    """Two did: AutoGraph "could not transform" `validate` of a feature map in
    `initial_state`, and exports had "ops with unsaved custom gradients".
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(chosen)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "quiet"
