"""Trains a causal model of the bytes of a text, and streams from it.

Trained on windows of `--length` bytes, it then writes one byte at a time, each
at the same cost, from a state of fixed size: `keras_kt.generate` does it here,
and `--export` writes a SavedModel whose signatures do it in TensorFlow Serving.
Any text will do; Shakespeare's works are 5 MB:

    curl -o shakespeare.txt https://www.gutenberg.org/cache/epub/100/pg100.txt
    python examples/language_model.py --text shakespeare.txt
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

WIDTH, HEADS, BLOCKS = 128, 4, 2
HELD_OUT = 0.05  # of the text, at its end


def main():
    args = parse_args()
    text = read(args)
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
    verbose = 1 if sys.stdout.isatty() else 2
    model.fit(x, y, args.batch_size, args.epochs, verbose)
    bits = model.evaluate(*windows(test, args.length), verbose=0) / np.log(2.0)
    if args.export:
        tokens = tf.TensorSpec((None, None), "int32", name="tokens")
        folder = keras_kt.export_saved_model(
            model, args.export, input_signature=[tokens], streaming=True
        )
        print(f"SavedModel that streams: {folder}")
    write_sample(model, args)
    print(f"Test: {bits:.3f} bits per byte after {steps} steps.")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--text", type=Path, default="shakespeare.txt", help="a file")
    add("--length", type=int, default=512, help="bytes; default: %(default)s")
    add("--batch-size", type=int, default=16, help="default: %(default)s")
    add("--epochs", type=int, default=1, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--prompt", default="ROMEO.\n", help="what a sample goes on from")
    add("--sample", type=int, default=300, help="bytes; default: %(default)s")
    add("--export", type=Path, help="a folder for a SavedModel")
    return parser.parse_args()


def read(args):
    """The bytes of the text."""
    if not args.text.is_file():
        sys.exit(
            f"--text must be a text file. Received: {args.text}, which is "
            "none. Take any, or https://www.gutenberg.org/cache/epub/100/"
            "pg100.txt: Shakespeare's works."
        )
    text = np.fromfile(args.text, "uint8")
    if HELD_OUT * len(text) <= args.length + 1:
        sys.exit(
            f"{HELD_OUT:.0%} of the text must be longer than a window. "
            f"Received: {len(text)} bytes, --length {args.length}. Lower it."
        )
    return text


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
                decay="constant",
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
    tokens = keras_kt.generate(
        model, prompt, args.sample, temperature=0.8, seed=args.seed
    )
    print(bytes(tokens[0].numpy().tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
