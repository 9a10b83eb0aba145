"""Sequences of the sparsity task, which `sparsity` explains. NumPy only."""

import numpy as np

from experiments.data import Data

QUERIES = 32
KEY_SIZE = 32
VALUES = 8
WRONG = 0.25
# Sequences of the validation and of the test set, at each density.
HELD_OUT = 200


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


def make_data(densities, length, examples, seed):
    """Every split has all densities, in turn; the test set is of seed 0."""

    def draw(count, *seeds):
        levels = [densities[i % len(densities)] for i in range(count)]
        return generate(levels, length, np.random.default_rng(seeds))

    held_out = HELD_OUT * len(densities)
    return Data(
        train=draw(examples, seed, 0),
        validation=draw(held_out, seed, 1),
        test=draw(held_out, 0, 2),
    )
