"""Calibration and distillation of a converted model.

How far a converted layer is from softmax is measured on a model's own queries
and keys (`attention_error`). `calibrate` then moves them to where positive
features have little variance, which leaves every weight q·k of softmax as it
is: for each head

    q' = T (q − a),  k' = T⁻ᵀ (k − b),  a·k kept as the prior's mean μ = T a

with means a, b, and T such that q' and k' have the same second moments, which
are diagonal and of the least possible trace (the matrix form of the balancing
in SADERF, arXiv 2302.00787), and from there by descent of the measured errors.
T, a and b are folded into the projections, so the layer is as fast as before.
"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kt import _checks, priors
from keras_kt.conversion import errors
from keras_kt.features import PositiveFeatures

# Second moments are regularised by this share of their mean eigenvalue.
_SHRINKAGE = 1e-4
# Of the gradient descent, in units of T and of a token's deviation.
_REFINING_RATE = 2e-2
# Blocks of features that a layer may get within a budget.
_BLOCKS = (1, 2, 4, 8, 16)


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


def calibrate(model, data, *, budget=None, batches=1, steps=300):
    """Moves queries and keys of a converted model to where features are good.

    Changes the model in place: weights of the query and key projections, the
    prior's mean, and with a budget the number of features. What softmax would
    compute does not change. Call it after `convert_attention` and before any
    training. Means are moved only where projections have biases, and the
    queries' only with the prior and map that `convert_attention` chooses.

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
    >>> report = keras_kt.calibrate(model, batch)
    >>> len(report.before.heads), len(report.after.heads)
    (2, 2)
    """
    budget = _checks.number("budget", budget, optional=True)
    steps = _checks.integer("steps", steps, minimum=0)
    captured = errors.capture(model, data, batches)
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
        moved.append(_balance(item))
    if budget is not None:
        _spend(moved, budget)
        _forget_compilation(model)
    if steps:
        # Last, since it is for the draw that the layer has.
        moved = [
            item if item.path in unmoved else _descend(item, steps)
            for item in moved
        ]
    after = errors.errors_of(moved)
    return CalibrationReport(before, after, notes)


def _cannot_move(layer):
    """Why the kernel would not survive a change of coordinates, or `None`."""
    prior, feature_map = layer.spectral_prior, layer.feature_map
    is_softmax = isinstance(feature_map, PositiveFeatures) and (
        feature_map.prefactor in ("softmax", "tilted")
    )
    if not is_softmax or not isinstance(prior, priors.NormalPrior):
        return "left as it is: its kernel is not softmax's"
    scale = prior.scale.numpy()
    identity = np.eye(layer.key_dim) if scale.ndim == 4 else 1.0
    if not np.allclose(scale, identity, atol=1e-5):
        return "left as it is: its prior is no longer N(μ, I)"
    return None


class _Change(NamedTuple):
    """New coordinates of a layer's queries and keys, for each head.

    Attributes:
        shift_q, shift_k: `(heads, key_dim)`, a and b.
        maps: `(heads, key_dim, key_dim)`, T.
    """

    shift_q: np.ndarray
    shift_k: np.ndarray
    maps: np.ndarray


def _balance(item):
    """Gives one layer coordinates of little variance.

    The best of three, by the measured errors of each head: those it has, and
    those of the theory, with tokens weighed alike or by their squared attention
    weights, which is how the error of the matrix weighs them.
    """
    candidates = [_unchanged(item.layer)]
    for weights in (None, _squared_weights(item)):
        candidates.append(_least_variance(item, weights))
    return _fold(item, _best_of(item, candidates))


def _descend(item, steps):
    """Gives one layer what gradient descent finds, where that is better.

    Every other example is for the descent and the rest decide.
    """
    rest = _part(item, 1)
    start = _unchanged(item.layer)
    try:
        found = _refined(_part(item, 0), start, steps)
        best = _best_of(rest, [start, found])
    except tf.errors.InvalidArgumentError:
        # T has become singular, or NaN.
        return item
    return _fold(item, best)


def _part(item, offset):
    """Every other example, if there are as many."""
    examples = [tuple(x) for x in zip(*_examples(item), strict=True)]
    if len(examples[0]) > 1:
        examples = [x[offset::2] for x in examples]
    return item._replace(**dict(zip(item._fields[2:], examples, strict=True)))


def _unchanged(layer):
    shape = layer.num_heads, layer.key_dim
    maps = np.broadcast_to(np.eye(layer.key_dim), (*shape, layer.key_dim))
    return _Change(np.zeros(shape), np.zeros(shape), maps)


def _can_shift(layer):
    """Whether queries and keys can be shifted without a change of weights."""
    keys = layer.key_dense.bias is not None
    tilted = errors.has_tilt(layer) and layer.spectral_prior.per_head
    return keys and tilted, keys


def _squared_weights(item):
    """Squared attention weights of each visible query and of each key."""
    sums = []
    for axis, seen in ((-1, -1), (-2, -2)):
        rows = []
        for weights, visible in zip(item.weights, item.visible, strict=True):
            # Heads may share a mask.
            total = np.sum(np.square(weights, dtype="float64"), axis=axis)
            taken = np.any(visible, axis=(1, seen))
            rows.append(np.swapaxes(total, 1, 2)[taken])
        sums.append(np.swapaxes(np.concatenate(rows), 0, 1))
    return sums


def _least_variance(item, weights):
    """Means a, b and the map T of least variance, of weighed tokens."""
    layer, scale = item.layer, item.layer.key_dim**-0.25
    tokens = errors.visible_tokens(item)
    if weights is None:
        weights = [np.ones(x.shape[:2]) for x in tokens]
    weights = [w / np.sum(w, axis=1, keepdims=True) for w in weights]
    change = _unchanged(layer)
    shifts = [
        np.einsum("ht,htd->hd", w, x) if possible else zero
        for w, x, possible, zero in zip(
            weights, tokens, _can_shift(layer), change, strict=False
        )
    ]
    moments = [
        np.einsum("ht,htd,hte->hde", w, x - shift, x - shift)
        for w, x, shift in zip(
            weights, tokens, (s[:, np.newaxis] for s in shifts), strict=True
        )
    ]
    maps = [
        _balancing(scale**2 * q, scale**2 * k)
        for q, k in zip(*moments, strict=True)
    ]
    return _Change(*shifts, np.stack(maps))


def _best_of(item, candidates):
    """The change with the least measured error, for each head."""
    errors = np.stack([_errors(item, x) for x in candidates])
    # Else a candidate that is not finite would be the least.
    winners = np.where(np.isfinite(errors), errors, np.inf).argmin(axis=0)
    heads = np.arange(len(winners))
    return _Change(
        *(
            np.stack(parts)[winners, heads]
            for parts in zip(*candidates, strict=True)
        )
    )


def _errors(item, change):
    """Each head's squared relative errors, of its matrix plus its output."""
    sums = sum(
        np.stack(_sums_of_squares(item.layer, change, *one))
        for one in _examples(item)
    )
    return np.sum(sums[:2] / np.maximum(sums[2:], 1e-30), axis=0)


def _examples(item):
    """Queries, keys, values, masks and weights, one example after another."""
    for batch in zip(*item[2:], strict=True):
        for one in range(batch[0].shape[0]):
            yield [x[one : one + 1] for x in batch]


def _sums_of_squares(layer, change, query, key, value, visible, weights):
    """By head: errors of the matrix and of the output, then both's norms."""
    change = _Change(*(tf.cast(x, tf.float32) for x in change))
    inverse = tf.linalg.matrix_transpose(tf.linalg.inv(change.maps))
    output, estimated = errors.estimate(
        layer,
        tf.einsum("bthd,hed->bthe", query - change.shift_q, change.maps),
        tf.einsum("bthd,hed->bthe", key - change.shift_k, inverse),
        value,
        visible,
        lambda: _shifted_prior(layer, change),
    )
    exact = tf.einsum("bhts,bshe->bthe", weights, value)
    of_matrix, of_output = (0, 2, 3), (0, 1, 3)
    return (
        tf.reduce_sum(tf.square(estimated - weights), of_matrix),
        tf.reduce_sum(tf.square(output - exact), of_output),
        tf.reduce_sum(tf.square(weights), of_matrix),
        tf.reduce_sum(tf.square(exact), of_output),
    )


def _shifted_prior(layer, change):
    """The layer's frequencies with the mean that a change of it needs."""
    frequencies = layer.spectral_prior()
    if not _can_shift(layer)[0]:
        return frequencies
    return frequencies._replace(means=_new_mean(layer, change)[:, tf.newaxis])


def _new_mean(layer, change):
    """`(heads, key_dim)`, the prior's mean in the new coordinates."""
    mean = layer.spectral_prior.mean[:, 0]
    shifted = mean + layer.key_dim**-0.25 * change.shift_q
    return tf.einsum("hd,hed->he", shifted, change.maps)


def _refined(item, change, steps):
    """Gradient descent of the error from a change of coordinates."""
    layer = item.layer
    scales = [np.std(x, axis=1) + 1e-6 for x in errors.visible_tokens(item)]
    corrections = [tf.Variable(tf.zeros(x.shape)) for x in change]
    start = [tf.constant(x, tf.float32) for x in change]
    scales = [tf.constant(x, tf.float32) for x in scales]
    can_shift = _can_shift(layer)

    def corrected():
        shifts = [
            a + float(possible) * scale * correction
            for a, possible, scale, correction in zip(
                start, can_shift, scales, corrections, strict=False
            )
        ]
        identity = tf.eye(layer.key_dim)
        return _Change(*shifts, (identity + corrections[2]) @ start[2])

    optimizer = keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(_REFINING_RATE, steps)
    )
    optimizer.build(corrections)

    @tf.function(reduce_retracing=True)
    def step(*example):
        with tf.GradientTape() as tape:
            sums = tf.stack(_sums_of_squares(layer, corrected(), *example))
            loss = tf.reduce_sum(sums[:2] / (sums[2:] + 1e-9))
        gradients = tape.gradient(
            loss, corrections, unconnected_gradients="zero"
        )
        optimizer.apply_gradients(zip(gradients, corrections, strict=True))

    examples = [
        [tf.convert_to_tensor(x) for x in example]
        for example in _examples(item)
    ]
    for number in range(steps):
        step(*examples[number % len(examples)])
    return _Change(*(x.numpy().astype("float64") for x in corrected()))


def _fold(item, change):
    """Writes a change into the projections and the prior's mean.

    Returns:
        What the layer attends to then.
    """
    layer = item.layer
    # k·q is unchanged by T on queries and its inverse transpose on keys.
    inverse = np.swapaxes(np.linalg.inv(change.maps), -1, -2)
    if _can_shift(layer)[0]:
        mean = _new_mean(
            layer, _Change(*(tf.cast(x, tf.float32) for x in change))
        )
        layer.spectral_prior._mean.assign(mean[:, tf.newaxis])
    for dense, shift, maps in (
        (layer.query_dense, change.shift_q, change.maps),
        (layer.key_dense, change.shift_k, inverse),
    ):
        kernel = np.asarray(dense.kernel, "float64")
        dense.kernel.assign(np.einsum("xhd,hed->xhe", kernel, maps))
        if dense.bias is not None:
            bias = np.asarray(dense.bias, "float64") - shift
            dense.bias.assign(np.einsum("hd,hed->he", bias, maps))
    query, key = (
        tuple(
            np.einsum("bthd,hed->bthe", x - shift, maps).astype("float32")
            for x in parts
        )
        for parts, shift, maps in (
            (item.query, change.shift_q, change.maps),
            (item.key, change.shift_k, inverse),
        )
    )
    return item._replace(query=query, key=key)


def _balancing(*moments):
    """T that gives T q and T⁻ᵀ k the same diagonal second moments.

    Of all T it has the least E|T q|² + E|T⁻ᵀ k|²: TᵀT is the geometric mean of
    the inverse moments of q and the moments of k.
    """
    moments = [
        m + (_SHRINKAGE * np.trace(m) / len(m) + 1e-12) * np.eye(len(m))
        for m in moments
    ]
    root, inverse_root = _power(moments[0], 0.5), _power(moments[0], -0.5)
    middle = _power(root @ moments[1] @ root, 0.5)
    balance = _power(inverse_root @ middle @ inverse_root, 0.5)
    _, basis = np.linalg.eigh(balance @ moments[0] @ balance)
    return basis.T @ balance


def _power(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 1e-30) ** exponent) @ vectors.T


def _spend(items, budget):
    """Gives each layer features while the mean is within the budget."""
    choices = []
    for item in items:
        by_count = {}
        for blocks in _BLOCKS:
            count = 2 * item.layer.key_dim * blocks
            if count <= budget * len(items):
                prior = _prior_with(item.layer, count)
                found = errors.head_errors(item, prior)
                found = [head.matrix for head in found]
                by_count[count] = prior, float(np.mean(found))
        choices.append(by_count)
    spent = [min(by_count) for by_count in choices]
    while True:
        gains = []
        for number, by_count in enumerate(choices):
            more = 2 * spent[number]
            added = more - spent[number]
            if more in by_count and sum(spent) + added <= budget * len(items):
                gain = by_count[spent[number]][1] - by_count[more][1]
                gains.append((gain / added, number))
        if not gains or max(gains)[0] <= 0.0:
            break
        spent[max(gains)[1]] *= 2
    for item, by_count, count in zip(items, choices, spent, strict=True):
        layer = item.layer
        layer.replace_prior(by_count[count][0])


def _forget_compilation(model):
    """What Keras traced before would go on with the priors of that time."""
    model.compiled = False
    for part in model._flatten_layers():
        for kind in ("train", "test", "predict"):
            if getattr(part, f"{kind}_function", None) is not None:
                setattr(part, f"{kind}_function", None)


def _prior_with(layer, num_features):
    """A built copy of a layer's prior, with another number of features."""
    count = layer.feature_map.num_frequencies(num_features)
    prior = layer.spectral_prior.copy()
    prior.build((layer.num_heads, count, layer.key_dim))
    for ours, theirs in zip(
        prior.trainable_variables,
        layer.spectral_prior.trainable_variables,
        strict=True,
    ):
        ours.assign(theirs)
    return prior
