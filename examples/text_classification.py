"""Trains a sentiment classifier on the bytes of IMDb reviews, and exports it.

The tokeniser is a tensorflow-text graph, so the SavedModel takes raw strings;
TensorFlow Serving has its ops. The data are the archive that
https://ai.stanford.edu/~amaas/data/sentiment/ offers, unpacked:

    pip install 'keras_kt[text]'
    tar -xzf aclImdb_v1.tar.gz
    python examples/text_classification.py --data-dir .
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
import tensorflow_text

import keras_kt

WIDTH = 48
HEADS = 3
KEY_DIM = 16
CONTEXT = 9
LEARNING_RATE = 2e-3
SPLITS = ("train", "test")
# Float32 models that agree differ by rounding only.
TOLERANCE = 1e-5


def main():
    args = parse_args()
    keras.utils.set_random_seed(args.seed)
    train, test = load_reviews(args.data_dir, args.examples, args.seed)
    print(
        f"Data: {len(train[0])} reviews to learn from, {len(test[0])} to test"
    )
    model = build_model()
    fit(model, train, args)
    accuracy = model.evaluate(
        batches(*test, args).prefetch(2), verbose=0, return_dict=True
    )["accuracy"]
    folder, difference = export(model, test[0][:8], args)
    print(
        f"Test accuracy {accuracy:.3f} after {args.steps} steps.\n"
        f"{folder} takes raw strings; its answers differ by {difference:.1e} "
        "from the live model's."
    )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data-dir", type=Path, default=".", help="folder with aclImdb/")
    add("--examples", type=int, help="reviews of each split; default: all")
    add("--steps", type=int, default=4000, help="default: %(default)s")
    add("--batch-size", type=int, default=16, help="default: %(default)s")
    add("--length", type=int, default=1024, help="bytes; default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--output", type=Path, default="text_output", help="a folder")
    return parser.parse_args()


def load_reviews(data_dir, examples, seed):
    """Returns `(texts, labels)` for training and for the test, shuffled."""
    if (data_dir / "aclImdb").is_dir():
        splits = [read_folder(data_dir / "aclImdb" / s) for s in SPLITS]
    elif (data_dir / "imdb_labelled.npz").exists():
        splits = read_packed(data_dir / "imdb_labelled.npz")
    else:
        sys.exit(
            f"No IMDb reviews in {data_dir.resolve()}. Download "
            "aclImdb_v1.tar.gz from "
            "https://ai.stanford.edu/~amaas/data/sentiment/, unpack it and "
            "give the folder that holds aclImdb/ with --data-dir."
        )
    shuffled = []
    for texts, labels in splits:
        order = np.random.default_rng(seed).permutation(len(texts))[:examples]
        texts = [texts[i] for i in order]
        shuffled.append((texts, np.asarray(labels, "float32")[order]))
    return shuffled


def read_folder(folder):
    texts, labels = [], []
    for label, name in enumerate(("neg", "pos")):
        for path in sorted((folder / name).glob("*.txt")):
            texts.append(path.read_bytes())
            labels.append(label)
    return texts, labels


def read_packed(path):
    """The same reviews in one file of bytes and offsets."""
    with np.load(path) as packed:
        data, offsets = packed["data"].tobytes(), packed["offsets"]
        is_test, labels = packed["is_test"].astype(bool), packed["label"]
    splits = []
    for chosen in (~is_test, is_test):
        index = np.flatnonzero(chosen)
        texts = [data[offsets[i] : offsets[i + 1]] for i in index]
        splits.append((texts, labels[index]))
    return splits


@keras.saving.register_keras_serializable(package="text_classification")
class Bytes(keras.layers.Layer):
    """Strings to the numbers 1 … 256 of their bytes; 0 pads.

    A zero byte ends each text, so that an empty one has a token too.
    """

    def __init__(self, length, **kwargs):
        super().__init__(**kwargs)
        self.length = length

    def call(self, text):
        ended = tf.strings.join([text, b"\0"])
        parts = tensorflow_text.ByteSplitter().split(ended)
        parts = tf.cast(parts[:, : self.length], "int32") + 1
        return parts.to_tensor()

    def compute_output_shape(self, input_shape):
        return (input_shape[0], None)

    def get_config(self):
        return {**super().get_config(), "length": self.length}


@keras.saving.register_keras_serializable(package="text_classification")
class ByteEmbedding(keras.layers.Layer):
    """A vector for each byte and its neighbours.

    Padding is zeroed before the convolution, so that a text's logit does not
    depend on what it is batched with.
    """

    def build(self, input_shape):
        self.embedding = keras.layers.Embedding(257, WIDTH)
        self.context = keras.layers.Conv1D(WIDTH, CONTEXT, padding="same")
        self.embedding.build(input_shape)
        self.context.build((*input_shape, WIDTH))

    def call(self, tokens):
        real = keras.ops.cast(keras.ops.not_equal(tokens, 0), "float32")
        return self.context(self.embedding(tokens) * real[..., None])

    def compute_mask(self, tokens, mask=None):
        return keras.ops.not_equal(tokens, 0)


def build_model():
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = ByteEmbedding()(tokens)
    normed = keras.layers.LayerNormalization()(x)
    attention = keras_kt.KernelizedAttention(HEADS, KEY_DIM)
    x = keras.layers.Add()([x, attention(normed, normed)])
    hidden = keras.layers.LayerNormalization()(x)
    hidden = keras.layers.Dense(2 * WIDTH, activation="gelu")(hidden)
    x = keras.layers.Add()([x, keras.layers.Dense(WIDTH)(hidden)])
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, keras.layers.Dense(1)(x))


def batches(texts, labels, args):
    """Batches of tokens, padded to one length so that XLA compiles once."""
    tokenise = Bytes(args.length)

    def prepare(text, label):
        tokens = tokenise(text)
        missing = args.length - tf.shape(tokens)[1]
        tokens = tf.pad(tokens, ((0, 0), (0, missing)))
        return tf.ensure_shape(tokens, (None, args.length)), label

    data = tf.data.Dataset.from_tensor_slices((texts, labels))
    data = data.shuffle(len(texts), seed=args.seed)
    return data.batch(args.batch_size).map(prepare)


def fit(model, train, args):
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        args.steps - args.steps // 10,
        warmup_target=LEARNING_RATE,
        warmup_steps=args.steps // 10,
    )
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=1e-3),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy("accuracy", threshold=0.0)],
    )
    # Whole batches only: another size would compile again.
    whole = len(train[0]) // args.batch_size * args.batch_size
    texts, labels = train[0][:whole], train[1][:whole]
    reports = next(n for n in range(10, 0, -1) if args.steps % n == 0)
    model.fit(
        batches(texts, labels, args).repeat().prefetch(2),
        steps_per_epoch=args.steps // reports,
        epochs=reports,
        # A bar needs a terminal; a log gets a line an epoch.
        verbose=1 if sys.stdout.isatty() else 2,
    )


def export(model, texts, args):
    """Writes a SavedModel of strings; returns how far off it is, reloaded."""
    text = keras.Input((), dtype="string", name="text")
    logit = model(Bytes(args.length)(text))
    probability = keras.layers.Activation("sigmoid")(logit)
    reader = keras.Model(text, {"positive": probability})
    folder = keras_kt.export_saved_model(reader, args.output / "reviews")
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


if __name__ == "__main__":
    main()
