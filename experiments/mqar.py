"""Trains on multi-query associative recall: many keys, each asked for once.

A sequence begins with `pairs` keys, each before its value; then come the keys
again, in random order at random places, and each must be answered with its
value, by a model that sees only what came before. Between them stand keys that
have no value there. Nothing is asked of other tokens. It is the task of
"Zoology" (arXiv 2312.04927), where what a model can recall is bound by the size
of its state: here num_features × key_dim numbers a head.

    python -m experiments mqar --attention softmax
    python -m experiments mqar --pairs 128 --attention Performer --blocks 1

A sequence has 4 · pairs tokens unless --length says otherwise, the densest case
of the paper: half of it are the pairs, a quarter queries. With a local context
a value's token also sees its key, and one block can recall; without it
(--context 0) the tokens get learned positions, and it takes two blocks, of
which the first one must learn to bring keys to their values. Softmax had not
learned that in 3,000 steps of 8 pairs (seed 0: accuracy 0.167).
"""

import dataclasses

import keras
import tensorflow as tf

from experiments import body, measure, mqar_data, recipe
from experiments.data import Synthetic
from experiments.flags import Preset, parse_args

KEYS = 1024
VALUES = 64
PAIRS = 64
# Of a sequence, for each pair.
TOKENS = 4
# Sequences of the validation and of the test set.
HELD_OUT = 1000
PRESETS = {
    "cpu": Preset(
        length=TOKENS * PAIRS,
        blocks=2,
        width=64,
        heads=2,
        key_dim=16,
        hidden=128,
        batch_size=32,
        steps=800,
        learning_rate=3e-3,
        context=2,
        dropout=0.0,
        examples=24_000,
    ),
}


def main(argv, task):
    args = parse_args(__doc__, PRESETS, argv, task, add_arguments)
    if args.length is None:
        length = TOKENS * args.pairs
        args.preset = dataclasses.replace(args.preset, length=length)
    data = Synthetic(
        "experiments.mqar_data:make_data",
        {
            "pairs": args.pairs,
            "length": args.preset.length,
            "keys": KEYS,
            "values": VALUES,
            "examples": args.preset.examples,
            "held_out": HELD_OUT,
            "seed": args.seed,
        },
    )
    recipe.run(
        args,
        f"MQAR, {args.pairs} pairs among {args.preset.length} tokens",
        data,
        build_model,
        loss=loss,
        score=accuracy,
        tabulate=lambda test, scores: ({"pairs": args.pairs}, {}),
    )


def add_arguments(parser):
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help="default: %(default)s"
    )


def build_model(args):
    tokens = keras.Input((args.preset.length,), dtype="int32")
    x = keras.layers.Embedding(KEYS + VALUES, args.preset.width)(tokens)
    if not args.preset.context:
        x = body.Positions()(x)
    for _ in range(args.preset.blocks):
        x = body.make_block(args, causal=True)(x)
    x = keras.layers.LayerNormalization()(x)
    return keras.Model(tokens, keras.layers.Dense(VALUES)(x))


def loss(y, outputs):
    """Mean cross entropy of each sequence's queries."""
    y, is_query = _labels(y)
    return _mean(measure.cross_entropy(y, outputs), is_query)


def accuracy(y, outputs):
    """The share of each sequence's queries that are answered right."""
    y, is_query = _labels(y)
    return _mean(measure.accuracy(y, outputs), is_query)


def _labels(y):
    is_query = tf.not_equal(y, mqar_data.NO_QUERY)
    # A label that exists: what comes of it is left out of the mean.
    return tf.where(is_query, y, tf.zeros_like(y)), is_query


def _mean(values, is_query):
    total = tf.reduce_sum(tf.where(is_query, values, tf.zeros_like(values)), -1)
    return total / tf.reduce_sum(tf.cast(is_query, values.dtype), -1)
