"""Arrays of an experiment; imports NumPy at most, so that any machine can."""

from typing import NamedTuple


class Data(NamedTuple):
    """Arrays `(x, y)` of each split; x may be a tuple of arrays."""

    train: tuple
    validation: tuple
    test: tuple
