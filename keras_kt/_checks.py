"""Checks of arguments, which also turn them into plain Python values.

NumPy's and TensorFlow's numbers are taken wherever Python's are, and leave as
Python's: whatever can be constructed can then be saved as JSON.
"""

import math
import numbers
import operator

import numpy as np


def choice(name, value, choices):
    """`value`, one of `choices`."""
    value = str(value) if isinstance(value, str) else _plain(value)
    # What a string tensor holds.
    value = value.decode() if isinstance(value, bytes) else value
    # Not `in`, which compares arrays element by element.
    if not any(type(value) is type(c) and value == c for c in choices):
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {name}={value!r}"
        )
    return value


def boolean(name, value):
    """A `bool`."""
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise ValueError(
            f"`{name}` must be True or False. Received: {name}={value!r}"
        )
    return plain


def integer(name, value, *, minimum=1, optional=False):
    """An `int` of at least `minimum`, or `None` if that is allowed."""
    if optional and value is None:
        return None
    plain = _plain(value)
    try:
        if isinstance(plain, bool):
            raise TypeError
        plain = operator.index(plain)
    except TypeError:
        plain = None
    if plain is None or (minimum is not None and plain < minimum):
        raise ValueError(
            f"Received an invalid value for argument `{name}`, expected "
            f"{_an_integer(minimum)}{' or `None`' if optional else ''}. "
            f"Received: {name}={value!r}"
        )
    return plain


def number(
    name, value, *, minimum=0.0, below=math.inf, is_open=False, optional=False
):
    """A `float` in [minimum, below), or in (minimum, below) if `is_open`."""
    if optional and value is None:
        return None
    plain = _plain(value)
    is_number = isinstance(plain, numbers.Real) and not isinstance(plain, bool)
    if (
        not is_number
        or not minimum <= plain < below
        or (is_open and plain == minimum)
    ):
        raise ValueError(
            f"`{name}` must be {_a_number(minimum, below, is_open)}"
            f"{' or `None`' if optional else ''}. Received: {name}={value!r}"
        )
    return float(plain)


def integers(name, value, *, minimum=1):
    """A tuple of `int`s."""
    return tuple(
        integer(name, item, minimum=minimum) for item in _items(name, value)
    )


def is_sequence(value):
    """Whether a value is several: a list, a tuple, or an array of some rank."""
    return (
        isinstance(value, (list, tuple)) or len(getattr(value, "shape", ())) > 0
    )


def floats(name, value):
    """A tuple of finite `float`s, from a number or a sequence of numbers."""
    try:
        array = np.asarray(value, "float64")
    except (TypeError, ValueError):
        array = np.array(math.nan)
    if array.ndim > 1 or not np.isfinite(array).all():
        raise ValueError(
            f"`{name}` must be a number or a sequence of numbers. Received: "
            f"{name}={value!r}"
        )
    return tuple(float(x) for x in np.ravel(array))


def plain(checks, /, **arguments):
    """Arguments by name as plain Python values, each by its check.

    Those without one (instances, names that are looked up) stay as they are.
    """
    return {
        name: checks[name](name, value) if name in checks else value
        for name, value in arguments.items()
    }


def keywords(arguments):
    """What goes on to a Keras layer (name, trainable, …), as plain values."""
    return {
        name: str(value) if isinstance(value, str) else _plain(value)
        for name, value in arguments.items()
    }


def _items(name, value):
    if hasattr(value, "numpy"):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"`{name}` must be a list or tuple. Received: {name}={value!r}"
        )
    return value


def _plain(value):
    """A scalar array or eager tensor as a Python number; else as it came."""
    if hasattr(value, "numpy"):
        value = value.numpy()
    if isinstance(value, (np.ndarray, np.generic)) and np.ndim(value) == 0:
        return value.item()
    return value


def _an_integer(minimum):
    if minimum is None:
        return "an integer"
    return "a positive integer" if minimum == 1 else f"an integer ≥ {minimum}"


def _a_number(minimum, below, is_open):
    if below < math.inf:
        return f"a number in {'(' if is_open else '['}{minimum:g}, {below:g})"
    if is_open and minimum == 0.0:
        return "a positive number"
    return f"a number {'>' if is_open else '≥'} {minimum:g}"
