"""Trains a causal model of the bytes of a text, and streams from it.

Trained on windows of `--length` bytes, it then writes one byte at a time, each
at the same cost, from a state of fixed size: `keras_kt.generate` does it here,
and `--export` writes a SavedModel whose signatures do it in TensorFlow Serving.
Any text will do; Shakespeare's works are 5 MB:

    curl -o shakespeare.txt https://www.gutenberg.org/cache/epub/100/pg100.txt
    python examples/language_model.py --text shakespeare.txt
"""

from pathlib import Path

from common import flags, read_text


def parse_args():
    parser = flags(__doc__)
    add = parser.add_argument
    add("--text", type=Path, default="shakespeare.txt", help="a text file")
    add("--length", type=int, default=512, help="of a window, in bytes")
    add("--batch-size", type=int, default=16, help="windows of a step")
    add("--epochs", type=int, default=1, help="passes over the text")
    add("--seed", type=int, default=0, help="of weights and of the sample")
    add("--prompt", default="ROMEO.\n", help="where a sample starts")
    add("--sample", type=int, default=300, help="bytes to write")
    add("--export", type=Path, help="folder for a SavedModel, if any")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import keras
import numpy as np
import tensorflow as tf
from progress import progress, working

import keras_kt

WIDTH, HEADS, BLOCKS = 128, 4, 2
HELD_OUT = 0.05  # of the text, at its end


def main():
    args = parse_args()
    # The part that is held out must be longer than a window.
    text = read_text(args.text, round((args.length + 2) / HELD_OUT))
    keras.utils.set_random_seed(args.seed)
    model = ByteModel()
    train, test = np.split(text, [round((1.0 - HELD_OUT) * len(text))])
    x, y = windows(train, args.length)
    steps = args.epochs * -(-len(x) // args.batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - steps // 10, warmup_target=3e-3, warmup_steps=steps // 10
    )
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    print(f"{len(x):,} windows of {args.length} bytes, {steps:,} steps.")
    model.fit(x, y, args.batch_size, args.epochs, **progress())
    with working("Testing"):
        loss = model.evaluate(*windows(test, args.length), verbose=0)
    if args.export:
        tokens = tf.TensorSpec((None, None), "int32", name="tokens")
        with working("Exporting"):
            folder = keras_kt.export_saved_model(
                model, args.export, input_signature=[tokens], streaming=True
            )
        print(f"SavedModel that streams: {folder}")
    write_sample(model, args)
    bits = loss / np.log(2.0)
    print(f"Test: {bits:.3f} bits per byte after {steps:,} steps.")


def windows(text, length):
    """What the model sees, and the byte after each: `(windows, length)`."""
    starts = np.arange(0, len(text) - length, length // 2)
    bytes_ = text[starts[:, np.newaxis] + np.arange(length + 1)]
    return bytes_[:, :-1], bytes_[:, 1:]


class ByteModel(keras.Model):
    """Causal blocks between an embedding and logits.

    `call` is for training; `initial_state` and `step` are what `generate` and
    `export_saved_model` stream with. There are no positions to run out of:
    order comes from causality, the local context, and forgetting.
    """

    def __init__(self):
        super().__init__()
        self.embedding = keras.layers.Embedding(256, WIDTH)
        self.blocks = [
            keras_kt.KernelizedTransformerDecoder(
                intermediate_dim=2 * WIDTH,
                num_heads=HEADS,
                activation="gelu",
                normalize_first=True,
                local_context=5,
                decay="gated",
            )
            for _ in range(BLOCKS)
        ]
        self.norm = keras.layers.LayerNormalization()
        self.logits = keras.layers.Dense(256)

    def call(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))

    def initial_state(self, batch_size):
        return [block.initial_state(batch_size) for block in self.blocks]

    def step(self, tokens, state):
        x, new_state = self.embedding(tokens), []
        for block, old in zip(self.blocks, state, strict=True):
            x, new = block.step(x, old)
            new_state.append(new)
        return self.logits(self.norm(x)), new_state


def write_sample(model, args):
    prompt = [list(args.prompt.encode())]
    with working(f"Writing {args.sample} bytes"):
        tokens = keras_kt.generate(
            model, prompt, args.sample, temperature=0.8, seed=args.seed
        )
    print(bytes(tokens[0].numpy().tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
