"""Classifies film reviews by their bytes, and exports a model of raw strings.

A review is up to `--length` bytes, one token each: no vocabulary, nothing that
serving would have to prepare. The data are the archive that
https://ai.stanford.edu/~amaas/data/sentiment/ offers, unpacked:

    tar -xzf aclImdb_v1.tar.gz
    python examples/text_classification.py --data-dir aclImdb
    python examples/text_classification.py --data-dir aclImdb --length 4000
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import keras_kt

WIDTH, HEADS, BLOCKS = 64, 4, 2
LABELS = ("neg", "pos")


def main():
    args = parse_args()
    train, test = (load(args.data_dir / s, args) for s in ("train", "test"))
    keras.utils.set_random_seed(args.seed)
    model = build_model(args.length)
    x, y = tokens(train[0], args.length), train[1]
    steps = args.epochs * -(-len(x) // args.batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=3e-3, warmup_steps=steps // 10
    )
    model.compile(
        keras.optimizers.AdamW(schedule, global_clipnorm=1.0),
        keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy("accuracy", threshold=0.0)],
    )
    verbose = 1 if sys.stdout.isatty() else 2
    model.fit(x, y, args.batch_size, args.epochs, verbose)
    x, y = tokens(test[0], args.length), test[1]
    accuracy = model.evaluate(x, y, verbose=0)[1]
    folder, difference = export(model, test[0][:8], args)
    print(
        f"{folder} takes raw strings; its answers differ by {difference:.1e} "
        "from the live model's.\n"
        f"Test accuracy {accuracy:.3f} after {steps} steps."
    )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data-dir", type=Path, default="aclImdb", help="default: %(default)s")
    add("--length", type=int, default=1000, help="bytes; default: %(default)s")
    add("--examples", type=int, help="reviews of each split; default: all")
    add("--epochs", type=int, default=2, help="default: %(default)s")
    add("--batch-size", type=int, default=32, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--output", type=Path, default="text_output", help="a folder")
    return parser.parse_args()


def load(folder, args):
    """Texts `(reviews,)` in random order, and labels `(reviews, 1)`."""
    paths = [
        (path, label)
        for label, name in enumerate(LABELS)
        for path in sorted((folder / name).glob("*.txt"))
    ]
    if {label for _, label in paths} != {0, 1}:
        sys.exit(
            f"{folder} must hold reviews in {' and '.join(LABELS)}, one .txt "
            "file each. Download aclImdb_v1.tar.gz from "
            "https://ai.stanford.edu/~amaas/data/sentiment/, unpack it and "
            "give the folder aclImdb with --data-dir."
        )
    # The same order for every seed of the training.
    order = np.random.default_rng(0).permutation(len(paths))[: args.examples]
    texts = np.array([paths[i][0].read_bytes() for i in order], object)
    return texts, np.array([[paths[i][1]] for i in order], "float32")


def tokens(texts, length):
    """`(texts, length)`, made in parts for the sake of memory."""
    parts = [texts[i : i + 1000] for i in range(0, len(texts), 1000)]
    return np.concatenate([Bytes(length)(part) for part in parts])


@keras.saving.register_keras_serializable(package="text_classification")
class Bytes(keras.layers.Layer):
    """The first bytes of strings, `(batch, length)`; 0 pads."""

    def __init__(self, length, **kwargs):
        super().__init__(**kwargs)
        self.length = length

    def call(self, text):
        # An empty text has a token too, which is seen.
        text = tf.strings.join([text, "\n"])
        return tf.io.decode_raw(text, "uint8", fixed_length=self.length)

    def compute_output_spec(self, text):
        return keras.KerasTensor((text.shape[0], self.length), "uint8")

    def get_config(self):
        return {**super().get_config(), "length": self.length}


def build_model(length):
    tokens = keras.Input((length,), dtype="uint8", name="tokens")
    # The mask of padding goes with x to the last layer but one.
    x = keras.layers.Embedding(256, WIDTH, mask_zero=True)(tokens)
    for _ in range(BLOCKS):
        x = keras_kt.KernelizedTransformerEncoder(
            intermediate_dim=2 * WIDTH,
            num_heads=HEADS,
            activation="gelu",
            normalize_first=True,
            # A learned sum of neighbors: attention alone knows no order.
            local_context=5,
        )(x)
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, keras.layers.Dense(1)(x))


def export(model, texts, args):
    """Writes a SavedModel of strings; returns how far off it is, reloaded."""
    text = keras.Input((), dtype="string", name="text")
    probability = keras.ops.sigmoid(model(Bytes(args.length)(text)))
    reader = keras.Model(text, {"positive": probability})
    folder = keras_kt.export_saved_model(reader, args.output)
    texts = tf.constant([*texts, b"", "Überraschend gut.".encode()])
    # A signature does not keep its variables alive; the artifact does.
    artifact = tf.saved_model.load(folder)
    served = artifact.signatures["serve"](text=texts)["positive"]
    return folder, np.abs(served - reader(texts)["positive"]).max()


if __name__ == "__main__":
    main()
