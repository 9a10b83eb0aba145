"""Turns a trained softmax transformer into a linear one, step by step.

Trains a classifier of film reviews with `keras.layers.MultiHeadAttention`, as a
model that you have, and converts it: `convert_attention` keeps the weights,
`calibrate` fits kernels and draw to one batch, `distill` trains the attention
of each layer on that of the original, `fit` does the rest. Accuracy and the
error of attention are printed after each; stop where they are good.

    tar -xzf aclImdb_v1.tar.gz   # https://ai.stanford.edu/~amaas/data/sentiment
    python examples/convert_pretrained.py --data-dir aclImdb
"""

from pathlib import Path

from common import flags, read_reviews


def parse_args():
    parser = flags(__doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, default="aclImdb", help="else downloaded")
    add("--examples", type=int, help="reviews of a split, None: all")
    add("--length", type=int, default=256, help="words of a review")
    add("--epochs", type=int, default=2, help="of the softmax model")
    add("--fine-tune-epochs", type=int, default=1, help="of the linear one")
    add("--batch-size", type=int, default=32, help="reviews of a step")
    add("--features", type=int, default=64, help="mean D of layers")
    add("--distill-steps", type=int, default=60, help="of 8 reviews")
    add("--seed", type=int, default=0, help="of weights and order")
    add("--output", type=Path, default="convert_output", help="a folder")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import keras
import numpy as np
import tensorflow as tf
from progress import progress, working

import keras_kt
from keras_kt import conversion

WORDS, WIDTH, HEADS, KEY_DIM, BLOCKS = 8192, 64, 4, 16, 2


def main():
    args = parse_args()
    with working("Reading reviews"):
        train, test = read_reviews(args.data_dir, args.examples)
    keras.utils.set_random_seed(args.seed)
    words = keras.layers.TextVectorization(
        WORDS, output_sequence_length=args.length
    )
    with working("Counting words"):
        words.adapt(tf.data.Dataset.from_tensor_slices(train[0]).batch(500))
        train, test = ((words(texts).numpy(), y) for texts, y in (train, test))

    teacher = build_model()
    fit(teacher, *train, args, args.epochs, learning_rate=2e-3)
    report("softmax", teacher, test)

    options = {"num_features": args.features}
    student, changes = keras_kt.convert_attention(teacher, **options)
    print(changes)
    report("converted", student, test, teacher)

    with working("Calibrating"):
        changes = conversion.calibrate(
            student, train[0][:32], budget=args.features
        )
    print(changes)
    report("calibrated", student, test, teacher)

    with working(f"Distilling, {args.distill_steps} steps"):
        conversion.distill(
            student,
            teacher,
            tf.data.Dataset.from_tensor_slices(train[0]).batch(8),
            steps=args.distill_steps,
            learning_rate=3e-3,
            train_projections=True,
        )
    report("distilled", student, test, teacher)

    fit(student, *train, args, args.fine_tune_epochs, learning_rate=5e-4)
    accuracy = report("fine-tuned", student, test, teacher)

    with working("Exporting"):
        folder = keras_kt.export_saved_model(student, args.output)
    served = tf.saved_model.load(folder).signatures["serve"]
    (answer,) = served(tokens=tf.constant(test[0][:8])).values()
    difference = np.abs(answer - student(test[0][:8])).max()
    print(
        f"{folder}: linear, accuracy {accuracy:.4f}; its answers differ by "
        f"{difference:.1e} from the live model's."
    )


def build_model():
    """A classifier as anybody writes it."""
    tokens = keras.Input((None,), dtype="int64", name="tokens")
    x = keras.layers.Embedding(WORDS, WIDTH, mask_zero=True)(tokens)
    for _ in range(BLOCKS):
        normed = keras.layers.LayerNormalization()(x)
        attention = keras.layers.MultiHeadAttention(HEADS, KEY_DIM)
        x = keras.layers.Add()([x, attention(normed, normed)])
        hidden = keras.layers.LayerNormalization()(x)
        hidden = keras.layers.Dense(2 * WIDTH, activation="gelu")(hidden)
        x = keras.layers.Add()([x, keras.layers.Dense(WIDTH)(hidden)])
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, keras.layers.Dense(1)(x))


def fit(model, x, y, args, epochs, learning_rate):
    model.compile(
        keras.optimizers.AdamW(learning_rate, weight_decay=1e-3),
        keras.losses.BinaryCrossentropy(from_logits=True),
    )
    model.fit(x, y, args.batch_size, epochs, **progress())


def report(stage, model, test, teacher=None):
    """Prints accuracy, and by layer how far attention is from softmax's."""
    x, y = test
    with working(f"Testing on {len(x):,} reviews"):
        outputs = model.predict(x, verbose=0)
    accuracy = np.mean((outputs > 0.0) == (y > 0.5))
    line = f"{stage}: accuracy {accuracy:.4f}"
    if teacher is not None:
        errors = conversion.attention_error(model, x[:8], teacher=teacher)
        errors = [f"{error:.3f}" for error in errors.layers.values()]
        line += f", relative error of attention by layer {', '.join(errors)}"
    print(line, flush=True)
    return accuracy


if __name__ == "__main__":
    main()
