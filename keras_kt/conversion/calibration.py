"""Calibration: queries and keys move to where features have little variance.

How far a converted layer is from softmax is measured on a model's own queries
and keys (`attention_error`). `calibrate` moves them in a way that leaves every
weight q·k of softmax as it is (`change`): first to where theory says that the
variance is least (`balance`), from there by descent of the measured errors
(`descent`). With a budget it also gives features to the layers (`budget`).
"""

from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kt import _checks
from keras_kt.conversion import errors
from keras_kt.conversion.balance import balanced
from keras_kt.conversion.budget import forget_compilation, spend
from keras_kt.conversion.capture import capture
from keras_kt.conversion.descent import descended


class CalibrationReport(NamedTuple):
    """What calibration changed.

    Attributes:
        before: `AttentionErrors` of the model as it was.
        after: `AttentionErrors` of the calibrated model.
        notes: what could not be done, by layer.
    """

    before: errors.AttentionErrors
    after: errors.AttentionErrors
    notes: dict

    def __str__(self):
        lines = [
            f"{b.path} head {b.head}: matrix {b.matrix:.3f} -> {a.matrix:.3f}, "
            f"output {b.output:.3f} -> {a.output:.3f} (D={a.num_features}, "
            f"uniform {a.uniform:.3f}, predicted {a.predicted:.2g}): "
            f"{a.verdict}"
            for b, a in zip(self.before.heads, self.after.heads, strict=True)
        ]
        lines += [f"{path}: {note}" for path, note in self.notes.items()]
        return "\n".join(lines)


def calibrate(
    model: keras.Model,
    data: Any,
    *,
    budget: Any = None,
    batches: int = 1,
    steps: int = 300,
) -> CalibrationReport:
    """Moves queries and keys of a converted model to where features are good.

    Changes the model in place: weights of the query and key projections, the
    prior's mean, and with a budget the number of features. What softmax would
    compute does not change. Call it after `convert_attention` and before any
    training. Means are moved only where projections have biases, and the
    queries' only with the prior and map that `convert_attention` chooses.
    Layers of other classes, which have something between projections and
    heads, are left as they are, but for a budget.

    Args:
        model: a model from `convert_attention`.
        data: one batch of inputs, or an iterator or `tf.data.Dataset` of them
            (see `attention_error`). Some thousand tokens, of a few dozen
            sequences: half of them decide whether the descent was of use.
        budget: mean of D over the layers. Features go where they reduce the
            error most, in whole blocks of 2 · key_dim. Defaults to `None`,
            which leaves D as it is. The model must be compiled again, and a
            `tf.function` of yours that has called it must be made again.
        batches: how many batches to take of a dataset or iterator.
        steps: of gradient descent on a, b and T, one example each. 0 for none.

    Returns:
        `CalibrationReport`: errors of each head before and after, on the data
        that it was calibrated on.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> y = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
        >>> model, _ = keras_kt.convert_attention(keras.Model(x, y))
        >>> batch = np.random.normal(size=(1, 50, 8)).astype("float32")
        >>> report = keras_kt.conversion.calibrate(model, batch)
        >>> len(report.before.heads), len(report.after.heads)
        (2, 2)
    """
    budget = _checks.number("budget", budget, optional=True)
    steps = _checks.integer("steps", steps, minimum=0)
    captured = capture(model, data, batches)
    if budget is not None:
        least = max(2 * item.layer.key_dim for item in captured)
        if budget < least:
            raise ValueError(
                "`budget` must be at least one block of features, 2 · key_dim. "
                f"Received: budget={budget:g}, and a layer needs {least}."
            )
    before = errors.errors_of(captured)
    notes, moved, unmoved = {}, [], set()
    for item in captured:
        reason = _cannot_move(item.layer)
        if reason:
            notes[item.path] = reason
            unmoved.add(item.path)
            moved.append(item)
            continue
        if item.layer.key_dense.bias is None:
            notes[item.path] = "not centered: its projections have no biases"
        moved.append(balanced(item))
    if budget is not None:
        spend(moved, budget)
        forget_compilation(model)
    if steps:
        # Last, since it is for the draw that the layer has.
        moved = [
            item if item.path in unmoved else descended(item, steps)
            for item in moved
        ]
    after = errors.errors_of(moved)
    return CalibrationReport(before, after, notes)


def _cannot_move(layer):
    """Why coordinates cannot be changed, or why the kernel would not survive
    it; `None` if they can."""
    if not hasattr(layer, "query_dense"):
        return (
            "left as it is: what comes between its projections and its heads "
            "(a rotation, say) forbids a change of coordinates"
        )
    prior = layer.spectral_prior
    is_normal = prior.is_gaussian and prior.num_components == 1
    if not (is_normal and layer.feature_map.is_softmax):
        return "left as it is: its kernel is not softmax's"
    scale = prior.scale.numpy()
    identity = np.eye(layer.key_dim) if scale.ndim == 4 else 1.0
    if not np.allclose(scale, identity, atol=1e-5):
        return "left as it is: its prior is no longer N(μ, I)"
    return None
