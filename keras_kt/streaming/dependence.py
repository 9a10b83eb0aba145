"""What the outputs of a call depend on, found by trying.

Of layers and operations that nobody listed, too: the call is run on random
tokens, with other tokens and other rows hidden, and on one token alone. NaN is
what hides numbers, as it passes through weights that are zero; the weights are
shifted, so that one that starts at zero counts.
"""

import contextlib
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kt.streaming.call import TokenwiseCall, fill, tokens_of
from keras_kt.streaming.stretch import Stretch

_BATCH = 3
# Longer than a layer that mixes tokens far from each other is likely to reach.
_LENGTH = 131
# Those that are known to act on the last axis, and may be large.
_NEAR = keras.layers.Dense, keras.layers.EinsumDense
_TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2}


class Finding(NamedTuple):
    """What trying a call has shown.

    Attributes:
        problem: how the call fails what is asked of it, or "".
        outputs: on the tokens that were tried; `None` if it does not run.
    """

    problem: str
    outputs: object = None


def mixing(operation, args, kwargs, length=None) -> Finding:
    """Whether a call mixes tokens, or acts on each alone.

    Args:
        operation: the layer or operation.
        args, kwargs: the call's arguments in the graph.
        length: the only length of sequence to try, where outputs may depend on
            the position. Defaults to `None`: any, and they may not.
    """
    with _shifted_weights(operation):
        trial = _first_that_runs(operation, args, kwargs, length, hides=True)
        if isinstance(trial, Finding):
            return trial
        problem = trial.mixing(is_placed=length is not None)
        return Finding(problem, trial.whole)


def cutting(call, args, kwargs, length=5, cut=2) -> Finding:
    """Whether a call differs from its own steps."""
    with _shifted_weights(call.operation):
        trial = _first_that_runs(call.operation, args, kwargs, length)
        if isinstance(trial, Finding):
            return trial
        try:
            parts = trial.steps(call, ((0, cut), (cut, length)))
        except Exception as error:
            return Finding(f"fails when it is cut: {_first_line(error)}")
        same = trial.agrees(parts, _flat(trial.whole))
        problem = "" if same else "gives other outputs when it is cut"
        return Finding(problem, trial.whole)


def _first_that_runs(operation, args, kwargs, length, hides=False):
    """A trial with the first kind of numbers that a call takes."""
    length = length or _length(operation)
    trials, errors = [], []
    for draw, hide in (
        (lambda rng, shape: rng.normal(size=shape), _nan),
        (lambda rng, shape: rng.uniform(0.1, 1.0, shape), _nan),
        # What is read as an index, or a symbol.
        (lambda rng, shape: rng.integers(2, size=shape), _other),
    ):
        rng = np.random.default_rng(0)
        tokens = tokens_of(args, kwargs)
        values = {id(x): _draw(x, length, draw, rng) for x in tokens}
        try:
            trial = _Trial(operation, args, kwargs, values, hide)
            if hides:
                trial.hide(slice(0, 1), slice(0, 1))
        except Exception as error:
            errors.append(error)
            continue
        if trial.is_finite():
            return trial
        trials.append(trial)
    if trials:
        return trials[0]
    return Finding(f"fails on tokens to try: {_first_line(errors[0])}")


class _Trial:
    """A call on one draw of tokens, and its outputs."""

    def __init__(self, operation, args, kwargs, values, hide):
        self._call, self._arguments = TokenwiseCall(operation), (args, kwargs)
        self._values, self._hide = values, hide
        self.whole = self._run(values)

    def _run(self, values):
        return self._call.call(*fill(values, *self._arguments))

    def steps(self, call, stretches):
        """Outputs of steps from one end of a stretch to the other, joined."""
        state, parts = call.initial_state(_BATCH), []
        for begin, end in stretches:
            stretch = Stretch(tf.fill([_BATCH], begin), None, end - begin)
            values = self.cut(slice(None), slice(begin, end))
            some = fill(values, *self._arguments)
            part, state = call.step(stretch, state, *some)
            parts.append(_flat(part))
        return [tf.concat(pair, axis=1) for pair in zip(*parts, strict=True)]

    def is_finite(self):
        """Whether all outputs are."""
        return all(
            np.isfinite(_array(x)).all()
            for x in _flat(self.whole)
            if tf.is_tensor(x) and x.dtype.is_floating
        )

    def cut(self, rows, tokens):
        """Some rows and tokens of each tensor."""
        return {key: x[rows, tokens] for key, x in self._values.items()}

    def hide(self, rows, tokens):
        """Outputs for other tokens, but for some rows and tokens."""
        hidden = {}
        for key, x in self._values.items():
            mask = np.zeros(x.shape[:2] + (1,) * (len(x.shape) - 2), "bool")
            mask[rows, tokens] = True
            hidden[key] = tf.where(mask, x, self._hide(x))
        return _flat(self._run(hidden))

    def mixing(self, is_placed):
        """How outputs depend on more than their token, or ""."""
        whole, all_ = _flat(self.whole), slice(None)
        (length,) = {x.shape[1] for x in self._values.values()}
        for x in whole:
            if not tf.is_tensor(x) or x.shape[:2] != (_BATCH, length):
                before = next(iter(self._values.values())).shape
                shape = tuple(getattr(x, "shape", ()))
                return (
                    f"turns tokens of shape {tuple(before)} into {shape}, "
                    "without them on its second axis"
                )
        for row, token in enumerate((0, length // 2, length - 1)):
            rows, tokens = slice(row, row + 1), slice(token, token + 1)
            expected = [x[rows, tokens] for x in whole]
            for kept, reason in (
                ((rows, all_), "mixes the rows of a batch"),
                ((all_, tokens), "mixes tokens"),
            ):
                found = self.hide(*kept)
                if not self.agrees([x[rows, tokens] for x in found], expected):
                    return reason
            if is_placed:
                continue
            try:
                alone = _flat(self._run(self.cut(rows, tokens)))
            except Exception as error:
                return f"takes no part of a sequence: {_first_line(error)}"
            if not self.agrees(alone, expected):
                return "depends on the length or the position"
        return ""

    def agrees(self, found, expected):
        """Whether outputs are the same but for rounding."""
        dtype = getattr(self._call.operation, "compute_dtype", "float32")
        return len(found) == len(expected) and all(
            _is_close(a, b, _TOLERANCE.get(dtype, 1e-4))
            for a, b in zip(found, expected, strict=True)
        )


def _is_close(found, expected, tolerance):
    if found.shape != expected.shape:
        return False
    tolerance = max(tolerance, _TOLERANCE.get(expected.dtype.name, 0.0))
    found, expected = _array(found), _array(expected)
    if not np.issubdtype(expected.dtype, np.floating):
        return np.array_equal(found, expected)
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    return np.allclose(
        found, expected, tolerance, tolerance * scale, equal_nan=True
    )


def _array(x):
    return tf.cast(x, "float32").numpy() if x.dtype.is_floating else x.numpy()


def _length(operation):
    """How many tokens to try an operation on."""
    if type(operation) in _NEAR:
        return 7
    rates = getattr(operation, "dilation_rate", 0)
    return _LENGTH + 2 * max(keras.tree.flatten(rates))


def _draw(x, length, draw, rng):
    """Random tokens in the place of a symbolic tensor."""
    shape = _BATCH, length, *(size or 2 for size in x.shape[2:])
    if keras.backend.is_float_dtype(x.dtype):
        return tf.cast(draw(rng, shape), x.dtype)
    if x.dtype == "string":
        return tf.constant(rng.choice(["a", "b"], shape))
    return tf.cast(rng.integers(2, size=shape), x.dtype)


def _nan(x):
    if x.dtype.is_floating:
        return tf.constant(float("nan"), x.dtype)
    return _other(x)


def _other(x):
    if x.dtype in (tf.bool, tf.string):
        return tf.reverse(x, [0, 1])
    return tf.ones((), x.dtype) - x


def _shifted_weights(operation):
    """A scope in which an operation's weights are others."""
    rng = np.random.default_rng(1)
    pairs = []
    for variable in getattr(operation, "variables", ()):
        if keras.backend.is_float_dtype(variable.dtype):
            value = tf.convert_to_tensor(variable.value)
            value += tf.cast(rng.uniform(0.05, 0.1), value.dtype)
            for axis, size in enumerate(value.shape):
                shape = [1] * len(value.shape)
                shape[axis] = size
                noise = rng.uniform(0.0, 0.1, shape)
                value += tf.cast(noise, value.dtype)
            pairs.append((variable, value))
    if not pairs:
        return contextlib.nullcontext()
    return keras.StatelessScope(state_mapping=pairs)


def _flat(outputs):
    return keras.tree.flatten(outputs)


def _first_line(error):
    """What an error says, without where Keras caught it."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [x for x in lines if x and not x.startswith("Exception encounter")]
    return (lines or [type(error).__name__])[0]
