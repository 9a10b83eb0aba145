"""Calibration and distillation of a converted model.

How far a converted layer is from softmax is measured on a model's own queries
and keys (`attention_error`). `calibrate` then moves them to where positive
features have little variance, which leaves every weight q·k of softmax as it
is: for each head

    q' = T (q − a),  k' = T⁻ᵀ (k − b),  a·k kept as the prior's mean μ = T a

with means a, b, and T such that q' and k' have the same second moments, which
are diagonal and of the least possible trace (the matrix form of the balancing
in SADERF, arXiv 2302.00787). T, a and b are folded into the projections, so the
layer is as fast as before. `distil` trains the spectral prior on a teacher's
attention, layer by layer.
"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kt import attention_errors, feature_maps, spectral_priors
from keras_kt.conversion import replace_layer

TARGETS = ("output", "matrix")
# Second moments are regularised by this share of their mean eigenvalue.
_SHRINKAGE = 1e-4
# Blocks of features that a layer may get within a budget.
_BLOCKS = (1, 2, 4, 8, 16)


class CalibrationReport(NamedTuple):
    """What calibration changed.

    Attributes:
        before: `AttentionErrors` of the model as it was.
        after: `AttentionErrors` of the calibrated model.
        notes: what could not be done, by layer.
    """

    before: attention_errors.AttentionErrors
    after: attention_errors.AttentionErrors
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


def calibrate(model, data, *, budget=None, batches=1):
    """Moves queries and keys of a converted model to where features are good.

    Changes the model in place: weights of the query and key projections, the
    prior's mean, and with a budget the number of features. What softmax would
    compute does not change. Call it after `convert_attention` and before any
    training. Means are moved only where projections have biases, and the
    queries' only with the prior and map that `convert_attention` chooses.

    Args:
        model: a model from `convert_attention`.
        data: one batch of inputs, or an iterator or `tf.data.Dataset` of them
            (see `attention_error`). A few thousand tokens are enough.
        budget: mean of D over the layers. Features go where they reduce the
            error most, in whole blocks of 2 · key_dim. Defaults to `None`,
            which leaves D as it is. The model must be compiled again.
        batches: how many batches to take of a dataset or iterator.

    Returns:
        `CalibrationReport`: errors of each head before and after.
    """
    captured = attention_errors.capture(model, data, batches)
    if budget is not None:
        least = max(2 * item.layer.key_dim for item in captured)
        if budget < least:
            raise ValueError(
                "`budget` must be at least one block of features, 2 · key_dim. "
                f"Received: budget={budget}, and a layer needs {least}."
            )
    before = attention_errors.errors_of(captured)
    notes, moved = {}, []
    for item in captured:
        reason = _cannot_move(item.layer)
        if reason:
            notes[item.path] = reason
            moved.append(item)
            continue
        if item.layer.key_dense.bias is None:
            notes[item.path] = "not centred: its projections have no biases"
        moved.append(_move(item))
    if budget is not None:
        _spend(moved, budget)
        model.compiled = False
    after = attention_errors.errors_of(moved)
    return CalibrationReport(before, after, notes)


def distil(
    student,
    teacher,
    data,
    *,
    steps=100,
    learning_rate=1e-2,
    target="output",
    train_projections=False,
):
    """Trains converted layers to attend as the teacher's do.

    Each layer is given the inputs that the teacher's has, so layers learn in
    parallel and errors do not accumulate. Only spectral priors and feature maps
    are trained, and the query and key projections if asked for: fine-tune the
    whole with `fit` afterwards. O(length²).

    Args:
        student: a model from `convert_attention`, changed in place.
        teacher: the model that was converted.
        data: as in `attention_error`; batches are repeated as needed.
        steps: number of batches to train on.
        learning_rate: of Adam.
        target: `"output"` (default): relative squared error of the heads'
            outputs. `"matrix"`: cross-entropy of the attention weights.
        train_projections: whether query and key projections are trained too.

    Returns:
        The loss of each step, a list of dictionaries by layer.
    """
    spectral_priors.check_choice("target", target, TARGETS)
    pairs = attention_errors.pairs_of_layers(student, teacher)
    variables = []
    for _, layer, _ in pairs:
        variables += layer.spectral_prior.trainable_variables
        variables += layer.feature_map.trainable_variables
        if train_projections:
            variables += layer.query_dense.trainable_variables
            variables += layer.key_dense.trainable_variables
    if not variables:
        raise ValueError(
            "`distil` needs something to train. Received: layers whose priors "
            "have no trainable weights. Use train_projections=True, or convert "
            "with another `spectral_prior`."
        )
    optimizer = keras.optimizers.Adam(learning_rate)
    optimizer.build(variables)

    @tf.function(reduce_retracing=True)
    def step(inputs):
        with tf.GradientTape() as tape:
            losses = {
                path: _loss(item, target)
                for path, item in attention_errors.teach(pairs, teacher, inputs)
            }
            total = tf.add_n(list(losses.values()))
        gradients = tape.gradient(
            total, variables, unconnected_gradients="zero"
        )
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return losses

    history = []
    for inputs in _repeated(data, steps):
        losses = step(keras.tree.map_structure(tf.convert_to_tensor, inputs))
        history.append({path: float(loss) for path, loss in losses.items()})
    return history


def _cannot_move(layer):
    """Why the kernel would not survive a change of coordinates, or `None`."""
    prior, feature_map = layer.spectral_prior, layer.feature_map
    is_softmax = isinstance(feature_map, feature_maps.PositiveFeatures) and (
        feature_map.prefactor in ("softmax", "tilted")
    )
    if not is_softmax or not isinstance(prior, spectral_priors.NormalPrior):
        return "left as it is: its kernel is not softmax's"
    scale = prior.scale.numpy()
    identity = np.eye(layer.key_dim) if scale.ndim == 4 else 1.0
    if not np.allclose(scale, identity, atol=1e-5):
        return "left as it is: its prior is no longer N(μ, I)"
    return None


def _move(item):
    """Centres and balances one layer; returns what it attends to now."""
    layer, scale = item.layer, item.layer.key_dim**-0.25
    query, key = attention_errors.visible_tokens(item)
    dense_q, dense_k = layer.query_dense, layer.key_dense
    has_bias = dense_k.bias is not None
    shift_q = np.zeros((layer.num_heads, layer.key_dim))
    shift_k = shift_q.copy()
    if has_bias:
        shift_k = key.mean(axis=1)
        if attention_errors.has_tilt(layer) and layer.spectral_prior.per_head:
            shift_q = query.mean(axis=1)
    maps = np.stack(
        [
            _balancing(scale * (q - a), scale * (k - b))
            for q, k, a, b in zip(query, key, shift_q, shift_k, strict=True)
        ]
    )
    # k·q is unchanged by T on queries and its inverse transpose on keys.
    inverse = np.swapaxes(np.linalg.inv(maps), -1, -2)
    for dense, shift, change in (
        (dense_q, shift_q, maps),
        (dense_k, shift_k, inverse),
    ):
        kernel = np.asarray(dense.kernel, "float64")
        dense.kernel.assign(np.einsum("xhd,hed->xhe", kernel, change))
        if has_bias:
            bias = np.asarray(dense.bias, "float64") - shift
            dense.bias.assign(np.einsum("hd,hed->he", bias, change))
    if attention_errors.has_tilt(layer) and layer.spectral_prior.per_head:
        mean = layer.spectral_prior.mean.numpy()[:, 0] + scale * shift_q
        mean = np.einsum("hd,hed->he", mean, maps)
        layer.spectral_prior._mean.assign(mean[:, np.newaxis])
    moved = [
        tuple(
            np.einsum("bthd,hed->bthe", x - shift, change).astype("float32")
            for x in parts
        )
        for parts, shift, change in (
            (item.query, shift_q, maps),
            (item.key, shift_k, inverse),
        )
    ]
    return item._replace(query=moved[0], key=moved[1])


def _balancing(query, key):
    """T that gives T q and T⁻ᵀ k the same diagonal second moments.

    Of all T it has the least E|T q|² + E|T⁻ᵀ k|²: TᵀT is the geometric mean of
    the inverse moments of q and the moments of k.
    """
    moments = []
    for x in (query, key):
        moment = x.T @ x / len(x)
        level = np.trace(moment) / len(moment)
        moments.append(
            moment + (_SHRINKAGE * level + 1e-12) * np.eye(len(moment))
        )
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
        priors = {}
        for blocks in _BLOCKS:
            count = 2 * item.layer.key_dim * blocks
            if count <= budget * len(items):
                prior = _prior_with(item.layer, count)
                errors = [
                    h.matrix for h in attention_errors.head_errors(item, prior)
                ]
                priors[count] = prior, float(np.mean(errors))
        choices.append(priors)
    spent = [min(priors) for priors in choices]
    while True:
        gains = []
        for number, priors in enumerate(choices):
            more = 2 * spent[number]
            added = more - spent[number]
            if more in priors and sum(spent) + added <= budget * len(items):
                gain = priors[spent[number]][1] - priors[more][1]
                gains.append((gain / added, number))
        if not gains or max(gains)[0] <= 0.0:
            break
        spent[max(gains)[1]] *= 2
    for item, priors, count in zip(items, choices, spent, strict=True):
        layer = item.layer
        layer.num_features = count
        replace_layer(layer, layer.spectral_prior, priors[count][0])


def _prior_with(layer, num_features):
    """A built copy of a layer's prior, with another number of features."""
    count = layer.feature_map.num_frequencies(num_features)
    prior = layer._recipes.prior_copy(
        None if layer.seed is None else layer.seed + 1
    )
    prior.build((layer.num_heads, count, layer.key_dim))
    for ours, theirs in zip(
        prior.trainable_variables,
        layer.spectral_prior.trainable_variables,
        strict=True,
    ):
        ours.assign(theirs)
    return prior


def _loss(item, target):
    output, weights = attention_errors.estimate(item.layer, *item[2:6])
    if target == "matrix":
        log_weights = tf.math.log(tf.maximum(weights, 1e-9))
        rows = tf.reduce_any(item.visible, axis=-1)
        count = tf.reduce_sum(
            tf.cast(rows, tf.float32) * tf.ones_like(weights[..., 0])
        )
        return -tf.reduce_sum(item.weights * log_weights) / count
    exact = tf.einsum("bhts,bshe->bthe", item.weights, item.value)
    axes = (0, 1, 3)
    error = tf.reduce_sum(tf.square(output - exact), axes)
    return tf.reduce_mean(error / (tf.reduce_sum(exact**2, axes) + 1e-9))


def _repeated(data, steps):
    """`steps` batches, from the start again when data end."""
    if isinstance(data, tf.data.Dataset):
        yield from attention_errors.input_batches(data.repeat(), steps)
        return
    batches = attention_errors.input_batches(data, steps)
    for number in range(steps):
        yield batches[number % len(batches)]
