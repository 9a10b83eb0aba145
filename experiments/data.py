"""The examples of a task: arrays, or how to make them. NumPy only."""

import functools
import importlib
import json
from typing import NamedTuple

import numpy as np


class Data(NamedTuple):
    """Arrays `(x, y)` of each split; x may be a tuple of arrays."""

    train: tuple
    validation: tuple
    test: tuple


class Synthetic(NamedTuple):
    """Examples that are made, not read: small to send, and made where needed.

    Attributes:
        function: `"module:name"` of a function that returns `Data`; its module
            imports NumPy only, so that a machine without TensorFlow can call
            it.
        arguments: its keyword arguments, of what JSON can hold.
    """

    function: str
    arguments: dict

    def make(self):
        """`Data`; the last ones made are kept, so nobody may write to them."""
        return _make(self.function, json.dumps(self.arguments, sort_keys=True))


@functools.lru_cache(maxsize=2)
def _make(function, arguments):
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(
        **json.loads(arguments)
    )


def map_split(function, split):
    """`(x, y)` with a function of each array."""
    x, y = split
    several = isinstance(x, tuple)
    return tuple(map(function, x)) if several else function(x), function(y)


def first(split, count):
    """The first examples of arrays, all of them if `count` is `None`."""
    return map_split(lambda array: array[:count], split)


def training_order(count, batch, steps, seed):
    """Examples of each step, `(steps, batch)`: whole epochs in random order."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch // count)
    order = np.concatenate([rng.permutation(count) for _ in range(epochs)])
    return order[: steps * batch].reshape(-1, batch)


def batches(count, batch):
    """Examples of each batch in order; the last one is filled up.

    All have one size, for the sake of one compilation.
    """
    for start in range(0, count, batch):
        yield np.minimum(np.arange(start, start + batch), count - 1)


def is_point(number, steps, validations):
    """Whether the curve has a point after this step."""
    return number % max(1, steps // validations) == 0 or number == steps
