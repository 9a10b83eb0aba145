"""Trains a sentiment classifier on the bytes of IMDb reviews, and exports it.

The tokeniser is a tensorflow-text graph, so the SavedModel takes raw strings;
TensorFlow Serving has its ops. The data are the archive that
https://ai.stanford.edu/~amaas/data/sentiment/ offers, unpacked:

    pip install 'keras_kt[text]'
    tar -xzf aclImdb_v1.tar.gz
    python -m experiments text --data-dir .
    python -m experiments text --data-dir . --length 4000
    python -m experiments text --data-dir . --preset paper
    python -m experiments text --data-dir . --floor   # byte counts

A convolution merges `--stride` bytes into one token, the same for every
attention; a stride of 1, as in the preset `paper`, leaves it out.
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import tensorflow_text

import keras_kt
from examples.progress import working
from experiments import body, recipe, reviews
from experiments.data import Data
from experiments.flags import Preset, parse_args
from experiments.measure import linear_floor

PRESETS = {
    "cpu": Preset(
        length=1000,
        stride=4,
        blocks=2,
        width=64,
        heads=4,
        key_dim=16,
        hidden=128,
        batch_size=32,
        steps=1200,
        learning_rate=3e-3,
        dropout=0.0,
    ),
    "paper": Preset(
        length=4000,
        blocks=4,
        width=256,
        heads=4,
        key_dim=64,
        hidden=1024,
        batch_size=8,
        steps=81_250,
        learning_rate=5.6e-4,
        context=0,
        weight_decay=0.1,
    ),
}
VALIDATION_SHARE = 0.1
VOCABULARY = 257
# Float32 models that agree differ by rounding only.
TOLERANCE = 1e-5


def main(argv, task):
    args = parse_args(__doc__, PRESETS, argv, task, add_arguments)
    preset = args.preset
    title = f"IMDb, {preset.length:,} bytes"
    with working("Reading reviews"):
        train, test = reviews.labelled(args.data_dir)
        data = split(
            *((tokenise(x, preset.length), y) for x, y in (train, test)),
            preset.examples,
        )
    if args.floor:
        parts = [(count_bytes(x), y) for x, y in (data.train, data.test)]
        score = linear_floor(*parts)
        print(f"{title}: linear in byte counts {score:.4f}")
        return
    if preset.stride > 1:
        title += f", stem of stride {preset.stride}"
    model, row = recipe.run(args, title, data, build_model)
    if args.export is None:
        return
    folder, difference = export(model, test[0][:8], args)
    print(
        f"Test accuracy {row['score']:.3f} after {preset.steps} steps.\n"
        f"{folder} takes raw strings; its answers differ by {difference:.1e} "
        "from the live model's."
    )


def add_arguments(parser):
    add = parser.add_argument
    add("--export", type=Path, help="a folder for a SavedModel of strings")
    add("--floor", action="store_true", help="score byte counts, leave")


@keras.saving.register_keras_serializable(package="experiments")
class Bytes(keras.layers.Layer):
    """Strings to the numbers 1 … 256 of their first bytes; 0 pads.

    A zero byte ends each text, so that an empty one has a token too.
    """

    def __init__(self, length, **kwargs):
        super().__init__(**kwargs)
        self.length = length

    def call(self, text):
        ended = tf.strings.join([text, b"\0"])
        parts = tensorflow_text.ByteSplitter().split(ended)
        parts = tf.cast(parts[:, : self.length], "int32") + 1
        return parts.to_tensor(shape=(None, self.length))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.length)

    def get_config(self):
        return {**super().get_config(), "length": self.length}


def tokenise(texts, length, batch=1000):
    """Tokens `(texts, length)`, int16."""
    to_tokens = Bytes(length)
    parts = [
        to_tokens(tf.constant(texts[start : start + batch])).numpy()
        for start in range(0, len(texts), batch)
    ]
    return np.concatenate([part.astype("int16") for part in parts])


def split(train, test, examples=None):
    """Takes the validation examples from the training examples' end."""
    x, y = train
    cut = len(y) - round(VALIDATION_SHARE * len(y))
    return Data(
        (x[:cut][:examples], y[:cut][:examples]), (x[cut:], y[cut:]), test
    )


def count_bytes(tokens):
    """Square roots of the shares of the bytes: `(texts, 257)`."""
    counts = np.stack(
        [np.bincount(row, minlength=VOCABULARY) for row in tokens]
    )
    counts[:, 0] = 0
    return np.sqrt(counts / counts.sum(1, keepdims=True))


def build_model(args):
    preset = args.preset
    tokens = keras.Input((preset.length,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(VOCABULARY, preset.width, mask_zero=True)(tokens)
    if preset.stride > 1:
        x = body.Stem(preset.width, preset.stride)(x)
    x = body.pool(body.encode(x, args))
    return keras.Model(tokens, keras.layers.Dense(2, dtype="float32")(x))


def export(model, texts, args):
    """Writes a SavedModel of strings; returns how far off it is, reloaded."""
    text = keras.Input((), dtype="string", name="text")
    logits = model(Bytes(args.preset.length)(text))
    probability = keras.layers.Softmax(dtype="float32")(logits)[:, 1:]
    reader = keras.Model(text, {"positive": probability})
    folder = keras_kt.export_saved_model(reader, args.export / "reviews")
    texts = tf.constant([*texts, b"", "Überraschend gut.".encode()])
    live = reader(texts)["positive"].numpy()
    # A signature does not keep its variables alive; the artifact does.
    artifact = tf.saved_model.load(folder)
    served = artifact.signatures["serve"](text=texts)["positive"].numpy()
    difference = float(np.abs(served - live).max())
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{folder} must agree to {TOLERANCE:g}. Received: {difference:g}"
        )
    return folder, difference
