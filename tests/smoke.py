"""The installed package, briefly: what each cell of `make matrix` runs.

Each of the paper's systems is fitted, saved, loaded, streamed and exported, and
every way gives the same outputs. A script that needs nothing but the package;
run it from another folder than the repository's to judge what is installed.
"""

import importlib.metadata
import sys
import tempfile
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_kt

START = time.perf_counter()
LENGTH, FEATURES, KEY_DIM = 11, 6, 4


def model_of(systems):
    """A model of causal attention, an output for each system."""
    x = keras.Input((None, FEATURES), name="x")
    outputs = {}
    for system in systems:
        arguments = keras_kt.paper_system(system, key_dim=KEY_DIM)
        layer = keras_kt.KernelizedAttention(2, KEY_DIM, seed=1, **arguments)
        y = keras.layers.Add()([x, layer(x, x, use_causal_mask=True)])
        outputs[system] = keras.layers.Dense(3, name=system)(y)
    model = keras.Model(x, outputs)
    model.compile("sgd", {system: "mse" for system in systems})
    return model


def check(systems, folder):
    """Fits, saves, loads, streams and exports a model of the systems."""
    noise = np.random.default_rng(0)
    x = noise.normal(size=(2, LENGTH, FEATURES)).astype("float32")
    y = {system: np.ones((2, LENGTH, 3), "float32") for system in systems}
    model = model_of(systems)
    before = [weight.numpy() for weight in model.trainable_weights]
    history = model.fit(x, y, epochs=2, verbose=0).history
    losses = np.concatenate(list(history.values()))
    require(len(losses) > len(systems), "a loss for each system")
    require(np.isfinite(losses).all(), "finite losses")
    for weight, old in zip(model.trainable_weights, before, strict=True):
        require((weight.numpy() != old).any(), f"{weight.path} to move")
    expected = model(x)
    say("fitted")

    model.save(folder / "model.keras")
    loaded = keras.models.load_model(folder / "model.keras")
    compare(loaded(x), expected)
    say("saved and loaded")

    stream = keras_kt.streaming_model(model)
    state = stream.initial_state(batch_size=2)
    parts = []
    for some in np.split(x, [7], axis=1):
        part, state = stream.step(some, state)
        parts.append(part)
    compare(
        {name: tf.concat([p[name] for p in parts], 1) for name in expected},
        expected,
    )
    say("streamed")

    serve = exported(model, folder / "served")["serve"]
    compare(serve(x=tf.constant(x)), expected)
    say("exported")


def check_steps(system, folder):
    """Exports one system with its endpoints for streams."""
    x = np.random.default_rng(0).normal(size=(2, LENGTH, FEATURES))
    x = x.astype("float32")
    model = model_of([system])
    served = exported(model, folder / "steps", streaming=True)
    state = served["initial_state"](batch_size=tf.constant(2))
    compare(served["prefill"](x=tf.constant(x), **state), model(x))
    say("exported with streams")


def exported(model, folder, **options):
    path = keras_kt.export_saved_model(model, folder, **options)
    return tf.saved_model.load(path).signatures


def compare(outputs, expected):
    """Whether outputs of each system are what the call gave."""
    for name, x in expected.items():
        error = np.abs(outputs[name] - x).max() / np.abs(x).max()
        require(error <= 1e-4, f"{name}: the same outputs, off by {error:.1e},")


def require(holds, what):
    if not holds:
        raise RuntimeError(f"smoke test: {what} expected")


def say(what):
    print(f"{what} after {time.perf_counter() - START:.0f} s", flush=True)


def main():
    """Prints the versions, and a line for each thing done."""
    if "--installed" in sys.argv[1:]:
        source = Path(__file__).resolve().parents[1]
        is_source = source in Path(keras_kt.__file__).resolve().parents
        require(not is_source, "an installed package")
    names = "keras_kt tensorflow keras tensorflow-probability tf-keras numpy"
    versions = [f"{x} {importlib.metadata.version(x)}" for x in names.split()]
    print(f"python {sys.version.split()[0]}", *versions, sep=", ", flush=True)
    # That trigonometric systems of the paper train badly is said elsewhere.
    warnings.simplefilter("ignore", category=UserWarning)
    with tempfile.TemporaryDirectory() as folder:
        check(keras_kt.PAPER_SYSTEMS, Path(folder))
        check_steps("GMM-PRF", Path(folder))


if __name__ == "__main__":
    main()
