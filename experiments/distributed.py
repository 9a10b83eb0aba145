"""Trains a small classifier on one device, on several, or on TPUs.

A sequence of symbols is labelled with the symbol that it holds most often. The
model, the loop and the data are the same under every strategy, and so is the
loss curve:

    python -m experiments distributed
    python -m experiments distributed --strategy mirrored --cpus 2
    python -m experiments distributed --strategy tpu

With --checkpoints a killed run goes on where it was.
"""

import argparse
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_kt
from experiments.help import Help
from experiments.strategies import (
    add_strategy_arguments,
    is_chief,
    make_strategy,
    train,
)

LENGTH = 128
SYMBOLS = 8
WIDTH = 32
EXAMPLES = 1024


def main(argv):
    args = parse_args(argv)
    # Before the strategy, which may start from another process's seeds.
    keras.utils.set_random_seed(args.seed)
    strategy = make_strategy(args)
    replicas = strategy.num_replicas_in_sync
    if args.batch_size % replicas:
        raise SystemExit(
            "--batch-size must be a multiple of the number of replicas. "
            f"Received: --batch-size {args.batch_size} with {replicas} "
            f"replicas. Try {replicas * (args.batch_size // replicas + 1)}."
        )
    with strategy.scope():
        model = build_model(args.redraw, args.seed)
        optimizer = make_optimizer(args.learning_rate)
    losses = train(
        strategy,
        model,
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="none"
        ),
        make_dataset(args.batch_size, args.seed),
        steps=args.steps,
        checkpoints=args.checkpoints,
        save_every=args.save_every,
    )
    if is_chief(strategy):
        print(f"{replicas} replicas, loss {list(losses.values())[-1]:.4f}")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m experiments distributed",
        description=__doc__.split("\n\n")[0],
        formatter_class=Help,
    )
    add = parser.add_argument
    add("--steps", type=int, default=100, help="default: %(default)s")
    add("--batch-size", type=int, default=32, help="of all replicas together")
    add("--learning-rate", type=float, default=5e-3, help="of AdamW")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--redraw", choices=("never", "step"), default="step", help="when")
    add("--checkpoints", type=Path, help="a folder that all workers see")
    add("--save-every", type=int, default=10, help="steps")
    add_strategy_arguments(parser)
    return parser.parse_args(argv)


def build_model(redraw, seed):
    symbols = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(SYMBOLS, WIDTH)(symbols)
    normed = keras.layers.LayerNormalization()(x)
    x += keras_kt.KernelizedAttention(2, 16, redraw=redraw, seed=seed)(
        normed, normed
    )
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(symbols, keras.layers.Dense(SYMBOLS, dtype="float32")(x))


def make_optimizer(learning_rate):
    optimizer = keras.optimizers.AdamW(learning_rate)
    if keras.config.dtype_policy().name == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def make_dataset(batch_size, seed):
    """Endless batches, the same in every run."""
    symbols = np.random.default_rng(seed).integers(
        SYMBOLS, size=(EXAMPLES, LENGTH), dtype="int32"
    )
    labels = [np.bincount(row, minlength=SYMBOLS).argmax() for row in symbols]
    dataset = tf.data.Dataset.from_tensor_slices((symbols, labels))
    # A TPU compiles for one shape: no smaller batch at the end.
    return dataset.repeat().batch(batch_size, drop_remainder=True)
