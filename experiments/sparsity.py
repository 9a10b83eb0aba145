"""Trains on a task whose attention must be as sparse as is asked for.

A sequence has `length` tokens, each a random key and a value, and 32 queries,
each a key without a value. At density d the tokens fall into 1/d groups that
share a key, and a query must answer with the value that most tokens of its
group have: it attends to a share d of the tokens, all alike. A quarter of a
group's values, rounded down, are wrong, so it takes the whole group. Density 1
needs an average over all tokens and 1/length the look-up of one. Softmax can
solve all of them; a kernel must weigh its own group about 1/d times higher.

    python -m experiments sparsity --attention softmax
    python -m experiments sparsity --attention GMM-PRF --density 0.25

One model learns all densities at once, or those of --density, and is tested at
each.
"""

import sys

import keras
import numpy as np

from experiments import body, recipe
from experiments.data import Synthetic
from experiments.flags import Preset, parse_args
from experiments.sparsity_data import KEY_SIZE, QUERIES, VALUES

# Columns of a table over densities.
DENSITY = ("density", "accuracy", "uniform")
PRESETS = {
    "cpu": Preset(
        length=256,
        blocks=1,
        width=64,
        heads=2,
        key_dim=32,
        hidden=128,
        batch_size=32,
        steps=800,
        learning_rate=3e-3,
        context=1,
        dropout=0.0,
        examples=12_000,
    ),
    "paper": Preset(
        length=4096,
        blocks=1,
        width=256,
        heads=4,
        key_dim=64,
        hidden=512,
        batch_size=32,
        steps=10_000,
        learning_rate=1e-3,
        context=1,
        dropout=0.0,
        examples=4_000,
    ),
}


def main(argv, task):
    args = parse_args(__doc__, PRESETS, argv, task, add_arguments)
    densities = check_densities(args.density, args.preset.length)
    data = Synthetic(
        "experiments.sparsity_data:make_data",
        {
            "densities": densities,
            "length": args.preset.length,
            "examples": args.preset.examples,
            "seed": args.seed,
        },
    )
    title = f"Sparsity, {args.preset.length} tokens"
    if args.density:
        title += f", density {' '.join(map(str, densities))}"
    recipe.run(
        args,
        title,
        data,
        build_model,
        draw_all=True,
        tabulate=lambda test, scores: (
            {},
            tabulate(densities, test, scores, args.draw_examples),
        ),
    )


def add_arguments(parser):
    parser.add_argument(
        "--density",
        type=float,
        nargs="+",
        help="shares of the tokens that a query attends to, powers of 1/2; "
        "default: 1, 1/2, 1/4, … 1/length",
    )


def check_densities(densities, length):
    """The densities, densest first; all there are if none are given."""
    possible = [1.0]
    while length * possible[-1] % 2 == 0:
        possible.append(possible[-1] / 2)
    densities = sorted(set(densities or possible), reverse=True)
    if not set(densities) <= set(possible):
        sys.exit(
            "`--density` must be powers of 1/2 that divide the tokens into "
            f"groups of one size. Received: --density {densities}, length="
            f"{length}. Possible are {possible}."
        )
    return densities


def build_model(args):
    shape = args.preset.length + QUERIES, KEY_SIZE + VALUES
    tokens = keras.Input(shape, dtype="int8")
    x = keras.ops.cast(tokens, keras.config.floatx())
    x = keras.layers.Dense(args.preset.width)(x)
    # Nothing depends on the order, so there are no positions.
    for _ in range(args.preset.blocks):
        x = body.make_block(args)(x)
    x = keras.layers.LayerNormalization()(x)[:, -QUERIES:]
    return keras.Model(tokens, keras.layers.Dense(VALUES)(x))


def tabulate(densities, test, scores, draw_examples):
    """Accuracy at each density, printed and returned as arrays.

    Beside it stands that of the most common value of the whole sequence, which
    is what attention to all tokens alike can give.

    Args:
        densities: of the test sequences, in turn.
        test: the test set, `(x, y)`.
        scores: its `Scores`.
        draw_examples: sequences of each density that fresh draws are scored on,
            at most.

    Returns:
        `densities`, rows of `DENSITY`, and `density_draws`, scores of fresh
        draws at each.
    """
    print("density      accuracy  fresh draws      uniform")
    rows, all_draws = [], []
    for number, density in enumerate(densities):
        own = slice(number, None, len(densities))
        x, y = (part[own] for part in test)
        common_value = x[:, :-QUERIES, KEY_SIZE:].sum(1, dtype=int).argmax(1)
        draws = scores.means_of_draws(draw_examples, own)
        accuracy = float(np.mean(scores.stored[own]))
        uniform = float(np.mean(y == common_value[:, np.newaxis]))
        spread = f"{np.mean(draws):.3f} ± {np.std(draws):.3f}" if draws else ""
        print(
            f"1/{round(1 / density):<10,} {accuracy:.3f}  "
            f"{spread:>13}  {uniform:>10.3f}"
        )
        rows.append((density, accuracy, uniform))
        all_draws.append(draws)
    return {"densities": rows, "density_draws": all_draws}
