"""Several replicas compute what one device computes.

Devices are configured before TensorFlow starts, so runs are processes of their
own: this module's `main`, or `python -m experiments distributed`.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt

ROOT = Path(__file__).parent.parent
STEPS = 20
TOLERANCE = 1e-5
BATCH, LENGTH, WIDTH = 6, 37, 12
SECONDS = 300


def make_model(redraw):
    keras.utils.set_random_seed(3)
    x = keras.Input((LENGTH, WIDTH))
    layer = keras_kt.KernelizedAttention(3, 5, redraw=redraw)
    y = keras.layers.LayerNormalization()(x + layer(x, x))
    y = keras.layers.GlobalAveragePooling1D()(y)
    model = keras.Model(x, keras.layers.Dense(1)(y))
    # Under a strategy Keras never compiles, and XLA draws other numbers.
    model.compile(keras.optimizers.Adam(1e-2), "mse", jit_compile=False)
    return model, layer


def fit(strategy, redraw):
    """Loss curve, weights, and what each replica made of the same inputs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * BATCH, LENGTH, WIDTH)).astype("float32")
    y = x[:, :, :1].max(axis=1)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    keras.utils.clear_session()  # so that names start over
    with strategy.scope():
        model, layer = make_model(redraw)
    history = model.fit(
        dataset.repeat(), epochs=STEPS, steps_per_epoch=1, verbose=0
    )

    @tf.function
    def draw():
        inputs = tf.constant(x[:1])
        return strategy.run(lambda: layer(inputs, inputs, training=True))

    draws = [
        [one.numpy().ravel().tolist() for one in results]
        for results in (
            strategy.experimental_local_results(draw()) for _ in range(3)
        )
    ]
    weights = {w.path: w.numpy().ravel().tolist() for w in model.weights}
    return {
        "losses": history.history["loss"],
        "weights": weights,
        "draws": draws,
    }


def main():
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategies = {
        "one": tf.distribute.get_strategy(),
        "two": tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]),
    }
    results = {
        redraw: {name: fit(s, redraw) for name, s in strategies.items()}
        for redraw in ("never", "step")
    }
    Path(sys.argv[1]).write_text(json.dumps(results))


def environment(**variables):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **variables}


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    path = tmp_path_factory.mktemp("mirrored") / "results.json"
    subprocess.run(
        [sys.executable, "-m", "tests.test_distribution", path],
        cwd=ROOT,
        env=environment(),
        check=True,
        timeout=SECONDS,
    )
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("redraw", ["never", "step"])
def test_two_replicas_fit_what_one_device_fits(mirrored, redraw):
    one, two = mirrored[redraw]["one"], mirrored[redraw]["two"]
    assert len(one["losses"]) == STEPS and len(set(one["losses"])) == STEPS
    np.testing.assert_allclose(two["losses"], one["losses"], atol=TOLERANCE)
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        np.testing.assert_allclose(
            two["weights"][name], weight, atol=TOLERANCE, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("redraw", ["never", "step"])
def test_replicas_hold_the_same_draw(mirrored, redraw):
    draws = mirrored[redraw]["two"]["draws"]
    for first, second in draws:
        assert first == second
    distinct = {tuple(first) for first, _ in draws}
    assert len(distinct) == (len(draws) if redraw == "step" else 1)
    (noise,) = [
        name for name in mirrored[redraw]["one"]["weights"] if "noise" in name
    ]
    stored = [mirrored[redraw][n]["weights"][noise] for n in ("one", "two")]
    assert stored[0] == stored[1]
    alone = [draw for (draw,) in mirrored[redraw]["one"]["draws"]]
    together = [first for first, _ in draws]
    np.testing.assert_allclose(together, alone, atol=1e-4)


def run_experiment(*arguments, **variables):
    words = ("-m", "experiments", "distributed", "--steps", STEPS, *arguments)
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_workers(*arguments):
    """Chief and worker of a cluster on this machine."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    return [
        run_experiment(
            *("--strategy", "multiworker", *arguments),
            TF_CONFIG=json.dumps(
                {
                    "cluster": {"worker": [f"127.0.0.1:{p}" for p in ports]},
                    "task": {"type": "worker", "index": index},
                }
            ),
        )
        for index in range(2)
    ]


def finish(process):
    """The curve that a process printed, once it is done."""
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors[-2000:]
    return curve(output)


def curve(output):
    found = re.findall(r"^step (\d+) loss (\S+)$", output, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


def assert_same(got, expected):
    assert list(got) == list(range(1, STEPS + 1)) == list(expected)
    np.testing.assert_allclose(
        list(got.values()), list(expected.values()), atol=TOLERANCE
    )


@pytest.fixture(scope="module")
def one_device():
    return finish(run_experiment())


@pytest.mark.slow
def test_two_workers_train_what_one_device_trains(one_device):
    chief, worker = start_workers()
    assert_same(finish(chief), one_device)
    assert finish(worker) == {}


@pytest.mark.slow
def test_killed_worker_resumes_on_the_same_curve(one_device, tmp_path):
    arguments = ("--checkpoints", tmp_path, "--save-every", 3)
    chief, worker = start_workers(*arguments)
    printed = ""
    # Between two checkpoints: the steps after the last one are made again.
    while "step 8 " not in printed:
        line = chief.stdout.readline()
        assert line, chief.stderr.read()[-2000:]
        printed += line
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    # Its peers wait for it or fail; whoever runs them ends them all.
    chief.kill()
    chief.communicate()
    before = curve(printed)
    chief, worker = start_workers(*arguments)
    after = finish(chief)
    finish(worker)
    assert 1 < min(after) <= 9
    for step in after.keys() & before.keys():
        assert abs(after[step] - before[step]) < TOLERANCE
    assert_same({**before, **after}, one_device)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--strategy", "tpu"), r"expects a TPU at --tpu 'local'.*mirrored"),
        (("--strategy", "multiworker"), r"expects the cluster in TF_CONFIG"),
        (
            ("--strategy", "mirrored", "--cpus", 2, "--batch-size", 7),
            r"--batch-size 7 with 2 replicas. Try 8",
        ),
    ],
)
def test_experiment_says_what_is_missing(arguments, words):
    process = run_experiment(*arguments)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert re.search(words, errors), errors[-2000:]
    assert "Traceback" not in errors


if __name__ == "__main__":
    main()
