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

from experiments import body, measure, recipe
from experiments.flags import Preset, parse_args
from experiments.recipe import Data

QUERIES = 32
KEY_SIZE = 32
VALUES = 8
WRONG = 0.25
# Columns of a table over densities.
DENSITY = ("density", "accuracy", "uniform")
# Sequences of the validation and of the test set, at each density.
HELD_OUT = 200
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
    data = make_data(densities, args)
    title = f"Sparsity, {args.preset.length} tokens"
    if args.density:
        title += f", density {' '.join(map(str, densities))}"
    recipe.run(
        args,
        title,
        data,
        build_model,
        more=lambda model: ({}, score_each(densities, data.test, model, args)),
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


def generate(densities, length, rng):
    """Sequences and their answers, one for each of `densities`.

    Returns:
        x: `(examples, length + QUERIES, KEY_SIZE + VALUES)`, each token's key
            beside its value, one-hot; queries come last, with no value.
        y: `(examples, QUERIES)`, the most common value of each query's group.
    """
    shape = len(densities), length + QUERIES, KEY_SIZE + VALUES
    x = np.zeros(shape, "int8")
    y = np.zeros(shape[:1] + (QUERIES,), "int32")
    for i, density in enumerate(densities):
        keys, values, groups = draw_groups(density, length, rng)
        order = rng.permutation(length)
        asked = rng.integers(len(keys), size=QUERIES)
        x[i, :, :KEY_SIZE] = keys[np.append(groups[order], asked)]
        x[i, np.arange(length), KEY_SIZE + values.ravel()[order]] = 1
        # No wrong value comes first, and none is as common as the right one.
        y[i] = values[asked, 0]
    return x, y


def draw_groups(density, length, rng):
    """Keys `(groups, KEY_SIZE)`, values `(groups, size)`, group of each token.

    The first values of a group are right and the last ones wrong.
    """
    size = round(density * length)
    groups = length // size
    # Signs at random: of 2**32 such keys no two of a sequence come close.
    keys = rng.choice((-1, 1), size=(groups, KEY_SIZE))
    values = np.repeat(rng.integers(VALUES, size=(groups, 1)), size, axis=1)
    wrong = int(WRONG * size)
    if wrong:
        shifts = rng.integers(1, VALUES, size=(groups, wrong))
        values[:, -wrong:] = (values[:, -wrong:] + shifts) % VALUES
    return keys, values, np.repeat(np.arange(groups), size)


def make_data(densities, args):
    """Every split has all densities, in turn; the test set is of seed 0."""

    def draw(examples, *seed):
        levels = [densities[i % len(densities)] for i in range(examples)]
        return generate(levels, args.preset.length, np.random.default_rng(seed))

    held_out = HELD_OUT * len(densities)
    return Data(
        train=draw(args.preset.examples, args.seed, 0),
        validation=draw(held_out, args.seed, 1),
        test=draw(held_out, 0, 2),
    )


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


def score_each(densities, test, model, args):
    """Accuracy at each density, printed and returned as arrays.

    Beside it stands that of the most common value of the whole sequence, which
    is what attention to all tokens alike can give.

    Returns:
        `densities`, rows of `DENSITY`, and `density_draws`, scores of fresh
        draws at each.
    """
    evaluate = measure.make_evaluation(args, model, measure.accuracy)
    print("density      accuracy  fresh draws      uniform")
    rows, all_draws = [], []
    for number, density in enumerate(densities):
        x, y = (part[number :: len(densities)] for part in test)
        common_value = x[:, :-QUERIES, KEY_SIZE:].sum(1, dtype=int).argmax(1)
        draws = measure.fresh_draws(args, model, (x, y), evaluate)
        accuracy = evaluate((x, y))
        uniform = float(np.mean(y == common_value[:, np.newaxis]))
        spread = f"{np.mean(draws):.3f} ± {np.std(draws):.3f}" if draws else ""
        print(
            f"1/{round(1 / density):<10,} {accuracy:.3f}  "
            f"{spread:>13}  {uniform:>10.3f}"
        )
        rows.append((density, accuracy, uniform))
        all_draws.append(draws)
    return {"densities": rows, "density_draws": all_draws}
