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

import contextlib
import functools
import math
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kt import feature_maps, kernels, linear_attention, spectral_priors
from keras_kt.attention import KernelizedAttention
from keras_kt.conversion import attention_layers, recorded_calls, replace_layer

TARGETS = ("output", "matrix")
# Second moments are regularised by this share of their mean eigenvalue.
_SHRINKAGE = 1e-4
# Blocks of features that a layer may get within a budget.
_BLOCKS = (1, 2, 4, 8, 16)


class HeadError(NamedTuple):
    """How far one head is from softmax, as relative Frobenius errors.

    Attributes:
        path: the layer, as in `ConversionReport`.
        head: number of the head.
        num_features: D of the layer.
        matrix: error of the attention matrix.
        output: error of the head's output.
        uniform: error of the matrix if every key weighed the same.
        predicted: relative standard deviation of one kernel value that theory
            predicts for independent frequencies, sqrt((exp(E|q+k|²) − 1)/M).
    """

    path: str
    head: int
    num_features: int
    matrix: float
    output: float
    uniform: float
    predicted: float

    @property
    def verdict(self) -> str:
        """What the errors mean."""
        if self.matrix <= max(0.5 * self.uniform, 0.05):
            return "follows softmax"
        if self.matrix < self.uniform:
            return "rough: distil or fine-tune"
        return "hopeless: worse than uniform attention; keep softmax or retrain"


class AttentionErrors(NamedTuple):
    """Errors of all heads of a converted model.

    Attributes:
        heads: tuple of `HeadError`.
    """

    heads: tuple

    @property
    def layers(self) -> dict:
        """Mean error of the attention matrix by layer."""
        paths = dict.fromkeys(head.path for head in self.heads)
        return {
            path: float(
                np.mean([h.matrix for h in self.heads if h.path == path])
            )
            for path in paths
        }

    def __str__(self):
        return "\n".join(
            f"{h.path} head {h.head} (D={h.num_features}): matrix "
            f"{h.matrix:.3f}, output {h.output:.3f}, uniform {h.uniform:.3f}, "
            f"predicted {h.predicted:.2g}: {h.verdict}"
            for h in self.heads
        )


class CalibrationReport(NamedTuple):
    """What calibration changed.

    Attributes:
        before: `AttentionErrors` of the model as it was.
        after: `AttentionErrors` of the calibrated model.
        notes: what could not be done, by layer.
    """

    before: AttentionErrors
    after: AttentionErrors
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


def attention_error(model, data, *, teacher=None, batches=1):
    """Measures converted layers against softmax, on real queries and keys.

    Without a teacher, layers are compared with the softmax that their prior
    stands for, and each sees what it would see if all attended exactly. With
    one they are given the inputs of the teacher's layers and compared with its
    attention. O(length²).

    Args:
        model: a model from `convert_attention`.
        data: one batch of the model's inputs, or an iterator or
            `tf.data.Dataset` of batches `inputs` or `(inputs, …)`.
        teacher: the model that was converted. Defaults to `None`.
        batches: how many batches to take of a dataset or iterator.

    Returns:
        `AttentionErrors`.
    """
    captured = _capture(model, data, batches, teacher)
    return AttentionErrors(
        tuple(head for item in captured for head in _errors(item))
    )


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
    captured = _capture(model, data, batches)
    if budget is not None:
        least = max(2 * item.layer.key_dim for item in captured)
        if budget < least:
            raise ValueError(
                "`budget` must be at least one block of features, 2 · key_dim. "
                f"Received: budget={budget}, and a layer needs {least}."
            )
    before = AttentionErrors(tuple(h for c in captured for h in _errors(c)))
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
    after = AttentionErrors(tuple(h for c in moved for h in _errors(c)))
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
    pairs = _pairs(student, teacher)
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
                for path, item in _teach(pairs, teacher, inputs)
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


@contextlib.contextmanager
def closed_form_attention(model):
    """Within it, layers attend by their kernel's closed form, in float64.

    A diagnosis of what is computed, apart from how well features estimate it:
    with `NormalPrior(radius="chi")` and the softmax prefactor a converted model
    gives the original's outputs. Fixed radii have a closed form of their own,
    which shows their bias. Slow; O(length²).

    Args:
        model: a model with `KernelizedAttention` layers.
    """

    def attend(layer, q, k, v, visible):
        def oracle(q, k, v, visible):
            scale = 1.0 if layer.qk_norm else layer.key_dim**-0.25
            heads = []
            for one in range(len(q)):
                kernel = kernels.closed_form(
                    layer.spectral_prior,
                    layer.feature_map,
                    scale * np.swapaxes(q[one], 0, 1).astype("float64"),
                    scale * np.swapaxes(k[one], 0, 1).astype("float64"),
                )
                each, _ = kernels.kernel_attention(
                    kernel, np.swapaxes(v[one], 0, 1), visible[one]
                )
                heads.append(np.swapaxes(each, 0, 1))
            return np.stack(heads).astype("float32")

        if layer.qk_norm:
            q, k = layer._qk_norm(q), layer._qk_norm(k)
        heads = tf.numpy_function(oracle, [q, k, v, visible], tf.float32)
        return tf.ensure_shape(heads, (*q.shape[:3], v.shape[3]))

    with _intercepted(list(_kernelized(model).values()), attend):
        yield


class _Captured(NamedTuple):
    """What one layer attended to: arrays or tensors.

    Attributes:
        path, layer: the converted layer.
        query, key: `(batch, length, heads, key_dim)`, the layer's. A tuple of
            one a batch in what `_capture` returns, as all that follow.
        value: `(batch, key_length, heads, value_dim)`.
        visible: `(batch, 1 or heads, query_length, key_length)`, boolean.
        weights: softmax's weights, `(batch, heads, query_length, key_length)`.
    """

    path: str
    layer: KernelizedAttention
    query: tf.Tensor
    key: tf.Tensor
    value: tf.Tensor
    visible: tf.Tensor
    weights: tf.Tensor


def _kernelized(model):
    found = {
        path: layer
        for path, layer in attention_layers(model).items()
        if isinstance(layer, KernelizedAttention)
    }
    if not found:
        raise ValueError(
            "The model must have KernelizedAttention layers. Received: "
            f"{model.name!r}, which has none. Make it with `convert_attention`."
        )
    return found


def _pairs(student, teacher):
    """`(path, student's layer, teacher's layer)` of converted layers."""
    theirs = attention_layers(teacher)
    pairs = [
        (path, layer, theirs.get(path))
        for path, layer in _kernelized(student).items()
    ]
    for path, _, original in pairs:
        if not isinstance(original, keras.layers.MultiHeadAttention):
            raise ValueError(
                "`teacher` must be the model that the student was converted "
                f"from. Received: one without a MultiHeadAttention at {path!r};"
                f" it has {tuple(theirs)}."
            )
    return pairs


@contextlib.contextmanager
def _intercepted(layers, attend):
    """Gives layers another `_compute_attention`, until the context ends."""

    def compute(
        layer,
        query,
        key,
        value,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
        use_causal_mask=False,
        query_mask=None,
        key_mask=None,
    ):
        if len(query.shape) != 4:
            raise ValueError(
                "Only attention over one axis can be measured or calibrated. "
                f"Received: layer {layer.name!r} with queries of shape "
                f"{tuple(query.shape)}"
            )
        visible = _visible(
            query, key, attention_mask, use_causal_mask, query_mask, key_mask
        )
        q, k, v = (tf.cast(x, tf.float32) for x in (query, key, value))
        heads = attend(layer, q, k, v, visible)
        return tf.cast(heads, query.dtype), None

    try:
        for layer in layers:
            layer._compute_attention = functools.partial(compute, layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("_compute_attention", None)


def _visible(query, key, attention_mask, is_causal, query_mask, key_mask):
    """All masks as one, `(batch, 1 or heads, query_length, key_length)`."""
    batch, length = tf.shape(query)[0], tf.shape(query)[1]
    visible = tf.ones((batch, 1, length, tf.shape(key)[1]), "bool")
    if is_causal:
        visible = tf.linalg.band_part(visible, -1, 0)
    if attention_mask is not None:
        mask = tf.cast(tf.convert_to_tensor(attention_mask), "bool")
        if mask.shape.rank == 3:
            mask = mask[:, tf.newaxis]
        visible = tf.logical_and(visible, mask)
    if query_mask is not None:
        visible = tf.logical_and(visible, query_mask[:, None, :, None])
    if key_mask is not None:
        visible = tf.logical_and(visible, key_mask[:, None, None, :])
    return visible


def _softmax(logits, visible):
    logits = tf.where(visible, logits, linear_attention.FLOOR)
    return tf.where(visible, tf.nn.softmax(logits), 0.0)


def _nominal_logits(layer, query, key):
    """Logits of the softmax that a layer stands for; a teacher's own."""
    logits = tf.einsum("bthd,bshd->bhts", query, key)
    if isinstance(layer, KernelizedAttention):
        if layer.qk_norm:
            raise ValueError(
                "A layer that normalises queries and keys stands for no softmax"
                f" attention. Received: layer {layer.name!r} with qk_norm="
                f"{layer.qk_norm!r}. Convert without it."
            )
        logits *= layer.key_dim**-0.5
        if _has_tilt(layer):
            mean = layer.key_dim**-0.25 * layer.spectral_prior.mean[:, 0]
            logits += tf.einsum("hd,bshd->bhs", mean, key)[:, :, tf.newaxis]
        return logits
    return logits * layer.key_dense.kernel.shape[-1] ** -0.5


def _has_tilt(layer):
    prior = layer.spectral_prior
    return (
        isinstance(prior, spectral_priors.NormalPrior)
        and prior.use_mean
        and getattr(layer.feature_map, "prefactor", None) == "tilted"
    )


def _attend_softmax(sink, layer, query, key, value, visible):
    weights = _softmax(_nominal_logits(layer, query, key), visible)
    # A layer called twice is measured on its last call.
    sink[id(layer)] = (query, key, value, visible, weights)
    return tf.einsum("bhts,bshe->bthe", weights, value)


def _capture(model, data, batches, teacher=None):
    """What converted layers attend to; a list of `_Captured`."""
    found = _kernelized(model)
    pairs = None if teacher is None else _pairs(model, teacher)
    items = []
    for inputs in _batches(data, batches):
        if teacher is not None:
            items += [item for _, item in _teach(pairs, teacher, inputs)]
            continue
        sink = {}
        attend = functools.partial(_attend_softmax, sink)
        with _intercepted(list(found.values()), attend):
            model(inputs, training=False)
        items += [
            _Captured(path, layer, *sink[id(layer)])
            for path, layer in found.items()
        ]
    for item in items:
        if not all(np.isfinite(x).all() for x in (item.query, item.key)):
            raise ValueError(
                "`data` must give finite queries and keys. Received: inputs "
                f"for which those of {item.path!r} are NaN or infinite."
            )
    return [
        _Captured(path, layer, *zip(*tensors, strict=True))
        for path, layer in found.items()
        for tensors in [[item[2:] for item in items if item.path == path]]
    ]


def _teach(pairs, teacher, inputs):
    """Each student layer on what its teacher's layer was given."""
    originals = [original for _, _, original in pairs]
    sink = {}
    with (
        recorded_calls(originals) as calls,
        _intercepted(originals, functools.partial(_attend_softmax, sink)),
    ):
        teacher(inputs, training=False)
    given = {id(layer): arguments for layer, arguments, _ in calls}
    for path, layer, original in pairs:
        _, _, value, visible, weights = sink[id(original)]
        arguments = given[id(original)]
        key = arguments.get("key")
        key = arguments["value"] if key is None else key
        yield (
            path,
            _Captured(
                path,
                layer,
                layer.query_dense(arguments["query"]),
                layer.key_dense(key),
                value,
                visible,
                weights,
            ),
        )


def _estimate(layer, query, key, value, visible, prior=None):
    """The layer's outputs and weights, by features."""
    query, key, bound, _ = layer._kernel_inputs(query, key)
    if prior is not None:
        scale = layer.key_dim**-0.25
        bound = layer.feature_map.bind(prior(), scale)
    return linear_attention.quadratic(
        query, key, value, bound, attention_mask=visible
    )


def _loss(item, target):
    output, weights = _estimate(item.layer, *item[2:6])
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


def _sums_of_squares(item, prior=None):
    """Sums over batch and positions, by head, one example at a time."""
    sums = 0.0
    for batch in zip(*item[2:], strict=True):
        for one in range(batch[0].shape[0]):
            query, key, value, visible, weights = (
                x[one : one + 1] for x in batch
            )
            output, estimate = _estimate(
                item.layer, query, key, value, visible, prior
            )
            exact = tf.einsum("bhts,bshe->bthe", weights, value)
            seen = tf.cast(visible, tf.float32)
            count = tf.reduce_sum(seen, axis=-1, keepdims=True)
            uniform = tf.math.divide_no_nan(seen, count)
            differences = (
                (estimate - weights, (0, 2, 3)),
                (weights, (0, 2, 3)),
                (uniform - weights, (0, 2, 3)),
                (output - exact, (0, 1, 3)),
                (exact, (0, 1, 3)),
            )
            sums += np.array(
                [tf.reduce_sum(tf.square(x), axes) for x, axes in differences]
            )
    return sums


def _errors(item, prior=None):
    """`HeadError` of each head of one layer."""
    layer = item.layer
    sums = _sums_of_squares(item, prior)
    matrix, output, uniform = (
        np.sqrt(sums[i] / np.maximum(sums[j], 1e-30))
        for i, j in ((0, 1), (3, 4), (2, 1))
    )
    query, key = _tokens(item)
    scale = layer.key_dim**-0.25
    prior = layer.spectral_prior if prior is None else prior
    for head in range(layer.num_heads):
        q, k = scale * query[head], scale * key[head]
        v = np.mean(np.sum(q**2, -1)) + np.mean(np.sum(k**2, -1))
        v += 2.0 * q.mean(0) @ k.mean(0)
        deviation = math.sqrt(math.expm1(min(v, 700.0)) / prior.num_frequencies)
        yield HeadError(
            item.path,
            head,
            prior.num_frequencies * layer.feature_map.sides,
            float(matrix[head]),
            float(output[head]),
            float(uniform[head]),
            deviation,
        )


def _tokens(item):
    """Queries and keys that take part, per head: `(heads, tokens, dim)`."""
    tokens = []
    for parts, axis in ((item.query, -1), (item.key, -2)):
        rows = [
            np.asarray(x, "float64")[np.any(visible, axis=(1, axis))]
            for x, visible in zip(parts, item.visible, strict=True)
        ]
        tokens.append(np.swapaxes(np.concatenate(rows), 0, 1))
    return tokens


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
    query, key = _tokens(item)
    dense_q, dense_k = layer.query_dense, layer.key_dense
    has_bias = dense_k.bias is not None
    shift_q = np.zeros((layer.num_heads, layer.key_dim))
    shift_k = shift_q.copy()
    if has_bias:
        shift_k = key.mean(axis=1)
        if _has_tilt(layer) and layer.spectral_prior.per_head:
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
    if _has_tilt(layer) and layer.spectral_prior.per_head:
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
                errors = [h.matrix for h in _errors(item, prior)]
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


def _batches(data, count):
    """Up to `count` batches of inputs."""
    is_dataset = isinstance(data, (tf.data.Dataset, keras.utils.PyDataset))
    if is_dataset or hasattr(data, "__next__"):
        batches = []
        for batch in data:
            if len(batches) == count:
                break
            if isinstance(batch, tuple):
                batch = keras.utils.unpack_x_y_sample_weight(batch)[0]
            batches.append(batch)
    else:
        batches = [data]
    leaves = [
        np.asarray(x) for batch in batches for x in keras.tree.flatten(batch)
    ]
    if not leaves or any(x.size == 0 for x in leaves):
        raise ValueError(
            "`data` must hold at least one batch that is not empty. Received: "
            f"{len(batches)} batches, of shapes {[x.shape for x in leaves]}."
        )
    for x in leaves:
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            raise ValueError(
                "`data` must be finite. Received: an array of shape "
                f"{x.shape} with NaN or infinite values."
            )
    return batches


def _repeated(data, steps):
    """`steps` batches, from the start again when data end."""
    if isinstance(data, tf.data.Dataset):
        yield from _batches(data.repeat(), steps)
        return
    batches = _batches(data, steps)
    for number in range(steps):
        yield batches[number % len(batches)]
