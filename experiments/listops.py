"""Trains a classifier on ListOps: nested list operations, one digit each.

`[MAX 4 [SM 7 9 ] 2 ]` is 6, for SM is the sum modulo 10. The trees are made
here, from a seed, with the rules of Long Range Arena:

    python -m experiments listops                   # 100 to 500 tokens
    python -m experiments listops --preset paper    # 500 to 2,000 tokens
    python -m experiments listops --attention softmax
    python -m experiments listops --floor           # the first operator alone
"""

import hashlib
import itertools

import keras
import numpy as np

from examples.progress import working
from experiments import body, recipe
from experiments.data import Data
from experiments.flags import Preset, parse_args

PRESETS = {
    "cpu": Preset(
        length=500,
        blocks=2,
        width=64,
        heads=4,
        key_dim=16,
        hidden=128,
        batch_size=32,
        steps=800,
        learning_rate=3e-3,
        dropout=0.0,
        examples=48_000,
    ),
    "paper": Preset(
        length=2000,
        blocks=6,
        width=512,
        heads=8,
        key_dim=64,
        hidden=2048,
        batch_size=32,
        steps=12_000,
        learning_rate=1.58e-4,
        context=0,
        weight_decay=0.1,
        examples=96_000,
    ),
}
MIN_LENGTH = {"cpu": 100, "paper": 501}
HELD_OUT = 2000
MAX_DEPTH = 10
MAX_ARGS = 10
LEAF_SHARE = 0.75
# Tokens: 0 pads, 1 … 10 are digits, then the operators, then the bracket.
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
FIRST_OPERATOR = 11
CLOSE = 15
VOCABULARY = 16


def main(argv, task):
    args = parse_args(__doc__, PRESETS, argv, task, add_arguments)
    if args.min_length is None:
        args.min_length = MIN_LENGTH[args.preset_name]
    title = f"ListOps, {args.min_length}-{args.preset.length} tokens"
    with working("Drawing trees"):
        data = load_data(args)
    if args.floor:
        print(f"{title}: the first operator alone {first_operator(data):.4f}")
        return
    recipe.run(args, title, data, build_model)


def add_arguments(parser):
    add = parser.add_argument
    add("--min-length", type=int, help="tokens; None: 100, paper 501")
    add("--data-seed", type=int, default=0, help="of the trees")
    add("--floor", action="store_true", help="score the first operator, leave")


def load_data(args):
    """Distinct trees; how many are trained on does not change the others."""
    count = args.preset.examples
    x, y = make_trees(
        2 * HELD_OUT + count,
        min_length=args.min_length,
        max_length=args.preset.length,
        seed=args.data_seed,
    )
    test, validation, train = np.split(
        np.arange(len(y)), (HELD_OUT, 2 * HELD_OUT)
    )
    return Data(*((x[i], y[i]) for i in (train, validation, test)))


def make_trees(count, *, min_length, max_length, seed, batch=4096):
    """Draws distinct trees.

    Args:
        count: number of trees.
        min_length: of a tree in tokens.
        max_length: of a tree in tokens.
        seed: of the draws. The first trees do not depend on `count`.
        batch: number of trees that are drawn together.

    Returns:
        Tokens `(count, max_length)`, uint8, zeros after the end; and values
        `(count,)`, int32.
    """
    if not 1 <= min_length <= max_length:
        raise ValueError(
            "Trees must have between `min_length` and `max_length` tokens, at "
            f"least 1. Received: min_length={min_length}, "
            f"max_length={max_length}."
        )
    rng = np.random.default_rng(seed)
    seen, tokens, values = set(), [], []
    for number in itertools.count():
        if number == 1000 and len(values) < count / 100:
            raise ValueError(
                "Hardly any distinct tree has such a length. Received: "
                f"min_length={min_length}, max_length={max_length}. Widen the "
                "range."
            )
        for row, value in zip(
            *_draw(rng, batch, min_length, max_length), strict=True
        ):
            key = hashlib.blake2b(row, digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                tokens.append(row)
                values.append(value)
        if len(values) >= count:
            return np.stack(tokens[:count]), np.array(values[:count], "int32")


def _draw(rng, batch, min_length, max_length):
    """Trees of one batch that have such a length, as tokens and values."""
    levels = draw_levels(rng, batch)
    measure(levels)
    lengths, values = levels[0]["length"], levels[0]["value"]
    keep = (lengths >= min_length) & (lengths <= max_length)
    return write(levels, keep, max_length), values[keep]


def draw_levels(rng, batch):
    """Draws trees, all of them one level at a time.

    Returns:
        A list of levels. A level is a dictionary of arrays over its elements,
        which stand in the order of their parents: `tree`, `operator` (-1 for a
        digit), `digit`, and `children`, their number.
    """
    levels, tree = [], np.arange(batch)
    for depth in range(1, MAX_DEPTH + 1):
        size = len(tree)
        is_leaf = rng.random(size) < LEAF_SHARE
        if depth == MAX_DEPTH:
            is_leaf[:] = True
        children = rng.integers(2, MAX_ARGS, size, endpoint=True)
        operator = rng.integers(0, len(OPERATORS), size)
        level = {
            "tree": tree,
            "digit": rng.integers(0, 10, size),
            "operator": np.where(is_leaf, -1, operator),
            "children": np.where(is_leaf, 0, children),
        }
        levels.append(level)
        tree = np.repeat(tree, level["children"])
        if not len(tree):
            break
    return levels


def measure(levels):
    """Adds `length` and `value` to the elements, from the leaves up."""
    below = None
    for level in reversed(levels):
        level["length"] = np.ones(len(level["tree"]), "int64")
        level["value"] = level["digit"].copy()
        nodes = np.flatnonzero(level["children"])
        if len(nodes):
            counts = level["children"][nodes]
            starts = np.cumsum(counts) - counts
            inner = np.add.reduceat(below["length"], starts)
            level["length"][nodes] = 2 + inner
            level["value"][nodes] = evaluate(
                level["operator"][nodes], below["value"], starts, counts
            )
        below = level


def evaluate(operators, values, starts, counts):
    """Values of nodes whose children stand one after another.

    Args:
        operators: `(nodes,)`, numbers in `OPERATORS`.
        values: `(children,)` of all nodes.
        starts: `(nodes,)`, where the children of each begin.
        counts: `(nodes,)`, how many they are.

    Returns:
        `(nodes,)` digits.
    """
    places = np.arange(MAX_ARGS)
    index = np.minimum(starts[:, np.newaxis] + places, len(values) - 1)
    real = places < counts[:, np.newaxis]
    # No digit is 10, so that what is no child sorts to the end.
    table = np.sort(np.where(real, values[index], 10), axis=1)
    rows = np.arange(len(starts))
    middle = table[rows, (counts - 1) // 2] + table[rows, counts // 2]
    results = (
        table[:, 0],
        table[rows, counts - 1],
        middle // 2,
        np.add.reduceat(values, starts) % 10,
    )
    return np.choose(operators, results)


def write(levels, keep, max_length):
    """Tokens `(kept trees, max_length)` of the trees that `keep` chooses."""
    tokens = np.zeros((keep.sum(), max_length), "uint8")
    rows = np.cumsum(keep) - 1
    start = np.zeros(len(keep), "int64")
    for level in levels:
        chosen = keep[level["tree"]]
        row = rows[level["tree"][chosen]]
        operator, position = level["operator"][chosen], start[chosen]
        tokens[row, position] = np.where(
            operator < 0, 1 + level["digit"][chosen], FIRST_OPERATOR + operator
        )
        is_node = operator >= 0
        last = (position + level["length"][chosen] - 1)[is_node]
        tokens[row[is_node], last] = CLOSE
        start = _starts_of_children(levels, level, start)
    return tokens


def _starts_of_children(levels, level, start):
    counts = level["children"]
    if not counts.any():
        return np.zeros(0, "int64")
    below = next(b for a, b in itertools.pairwise(levels) if a is level)
    before = np.cumsum(below["length"]) - below["length"]
    first = (np.cumsum(counts) - counts)[counts > 0]
    # A child starts after its parent's operator and its elder siblings.
    offset = before - np.repeat(before[first], counts[counts > 0])
    return np.repeat(start, counts) + 1 + offset


def first_operator(data):
    """Accuracy of the best digit for each first token."""
    (x, y), (test_x, test_y) = data.train, data.test
    counts = np.zeros((VOCABULARY, 10), int)
    np.add.at(counts, (x[:, 0], y), 1)
    return np.mean(counts.argmax(1)[test_x[:, 0]] == test_y)


def build_model(args):
    tokens = keras.Input((args.preset.length,), dtype="uint8", name="tokens")
    x = keras.layers.Embedding(VOCABULARY, args.preset.width, mask_zero=True)(
        tokens
    )
    x = body.pool(body.encode(x, args))
    return keras.Model(tokens, keras.layers.Dense(10, dtype="float32")(x))
