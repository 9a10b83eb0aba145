"""Sequences of multi-query associative recall, drawn with NumPy alone.

The rules are those of "Zoology: Measuring and Improving Recall in Efficient
Language Models" (arXiv 2312.04927): first all pairs, each a key and its value,
then every key once more, each at a place of its own. Places are drawn without
replacement, by a power law of their distance from the last pair.

Keys of a sequence are distinct, and values are drawn anew for each sequence, so
that a query by itself says nothing of its answer. Where nothing is asked stand
keys of other sequences: tokens like a query, that were not seen before.
"""

import numpy as np

from experiments.data import Data

# Of the power law, p(gap) ∝ gap^(POWER − 1).
POWER = 0.01
# Label of a token that asks nothing.
NO_QUERY = -1


def make_data(*, pairs, length, keys, values, examples, held_out, seed):
    """Training, validation and test set of one number of pairs.

    Args:
        pairs: number of keys of a sequence.
        length: tokens of a sequence, at least 3 · pairs.
        keys: size of the vocabulary of keys, more than `pairs`.
        values: size of the vocabulary of values.
        examples: number of training sequences.
        held_out: number of sequences of the validation and of the test set.
        seed: of training and validation set; the test set is always the same.

    Returns:
        `Data` of tokens `(sequences, length)` and labels of the same shape,
        both int32, as in `draw`.
    """
    sizes = {"pairs": pairs, "length": length, "keys": keys, "values": values}
    return Data(
        train=draw(examples, **sizes, seed=(seed, 0)),
        validation=draw(held_out, **sizes, seed=(seed, 1)),
        test=draw(held_out, **sizes, seed=(0, 2)),
    )


def draw(count, *, pairs, length, keys, values, seed, batch=1024):
    """Draws sequences.

    Args:
        count: number of sequences.
        pairs: as in `make_data`; as are length, keys and values.
        seed: integers. The first sequences do not depend on `count`.
        batch: number of sequences that are drawn together.

    Returns:
        Tokens `(count, length)`: keys are 0 … keys − 1, and the values follow.
        Labels `(count, length)`: the value's number from 0 where a key is asked
        for, else `NO_QUERY`.
    """
    if not 1 <= 3 * pairs <= length or keys <= pairs:
        raise ValueError(
            "Sequences must hold each pair and each query, and the vocabulary "
            "more keys than one sequence has. Received: "
            f"pairs={pairs}, length={length}, keys={keys}. Let length be at "
            f"least {3 * pairs} and keys more than {pairs}."
        )
    rng = np.random.default_rng(seed)
    drawn = [
        _batch(rng, batch, pairs, length, keys, values)
        for _ in range(-(-count // batch))
    ]
    tokens, labels = (
        np.concatenate(parts)[:count] for parts in zip(*drawn, strict=True)
    )
    return tokens, labels


def _batch(rng, count, pairs, length, keys, values):
    # All keys of the vocabulary in random order: the first ones have values.
    order = rng.random((count, keys), "float32").argsort(1).astype("int32")
    answers = rng.integers(values, size=(count, pairs), dtype="int32")
    shape = count, length - 2 * pairs
    others = rng.integers(pairs, keys, size=shape)
    tail = np.take_along_axis(order, others, 1)
    labels = np.full(shape, NO_QUERY, "int32")
    places = _places(rng, *shape, pairs)
    # The power law must not tell which pair is asked for first.
    asked = rng.random((count, pairs), "float32").argsort(1)
    for array, content in ((tail, order), (labels, answers)):
        content = np.take_along_axis(content, asked, 1)
        np.put_along_axis(array, places, content, 1)
    head = np.stack([order[:, :pairs], keys + answers], -1)
    head = head.reshape(count, 2 * pairs)
    nothing = np.full_like(head, NO_QUERY)
    return np.hstack([head, tail]), np.hstack([nothing, labels])


def _places(rng, count, space, pairs):
    """`(count, pairs)` distinct places of each, likelier the earlier."""
    # The largest of log p plus Gumbel noise are draws without replacement.
    logits = (POWER - 1) * np.log(np.arange(1, space + 1))
    noise = rng.gumbel(size=(count, space))
    return (-logits - noise).argsort(1)[:, :pairs]
