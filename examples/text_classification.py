"""Classifies film reviews by their bytes, and exports a model of raw strings.

A review is up to `--length` bytes, one token each: no vocabulary, nothing that
serving would have to prepare. The data are the archive that
https://ai.stanford.edu/~amaas/data/sentiment/ offers, unpacked:

    tar -xzf aclImdb_v1.tar.gz
    python examples/text_classification.py --data-dir aclImdb
    python examples/text_classification.py --data-dir aclImdb --length 4000
"""

from pathlib import Path

from common import flags, read_reviews


def parse_args():
    parser = flags(__doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, default="aclImdb", help="else downloaded")
    add("--length", type=int, default=1000, help="bytes of a review")
    add("--examples", type=int, help="reviews of a split, None: all")
    add("--epochs", type=int, default=2, help="passes over the reviews")
    add("--batch-size", type=int, default=32, help="reviews of a step")
    add("--seed", type=int, default=0, help="of weights and order")
    add("--output", type=Path, default="text_output", help="a folder")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import keras
import numpy as np
import tensorflow as tf
from progress import progress, working

import keras_kt

WIDTH, HEADS, BLOCKS = 64, 4, 2


def main():
    args = parse_args()
    with working("Reading reviews"):
        train, test = read_reviews(args.data_dir, args.examples)
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
    print(f"{len(x):,} reviews of {args.length} bytes, {steps:,} steps.")
    model.fit(x, y, args.batch_size, args.epochs, **progress())
    x, y = tokens(test[0], args.length), test[1]
    with working(f"Testing on {len(x):,} reviews"):
        accuracy = model.evaluate(x, y, verbose=0)[1]
    with working("Exporting"):
        folder, difference = export(model, test[0][:8], args)
    print(
        f"{folder} takes raw strings; its answers differ by {difference:.1e} "
        "from the live model's.\n"
        f"Test accuracy {accuracy:.3f} after {steps} steps."
    )


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
