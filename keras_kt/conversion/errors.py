"""How far a converted model's attention is from softmax, on real data.

Layers are intercepted at `_compute_attention`, where queries, keys and values
are projected, and attend exactly while they are measured. All of this forms
attention matrices: O(length²).
"""

import contextlib
import functools
import math
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kt import _checks, kernels, priors
from keras_kt.conversion.convert import attention_layers
from keras_kt.conversion.probe import (
    kept_losses,
    recorded_calls,
    replaced_methods,
)
from keras_kt.layers.attention import KernelizedAttention
from keras_kt.ops.quadratic import quadratic
from keras_kt.ops.scaling import FLOOR


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
        if self.matrix < 0.9 * self.uniform:
            return "rough: distill or fine-tune"
        return (
            "hopeless: hardly better than uniform attention, if at all; keep "
            "softmax or retrain"
        )


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

    Examples:

    >>> x = keras.Input((None, 8))
    >>> y = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    >>> model, _ = keras_kt.convert_attention(keras.Model(x, y))
    >>> batch = np.random.normal(size=(1, 9, 8)).astype("float32")
    >>> errors = keras_kt.attention_error(model, batch)
    >>> len(errors.heads), list(errors.layers)
    (2, ['attention'])
    """
    captured = capture(model, data, batches, teacher)
    return errors_of(captured)


@contextlib.contextmanager
def closed_form_attention(model):
    """Within it, layers attend by their kernel's closed form, in float64.

    A diagnosis of what is computed, apart from how well features estimate it:
    with `NormalPrior(radius="chi")` and the softmax prefactor a converted model
    gives the original's outputs. Fixed radii have a closed form of their own,
    which shows their bias. Slow; O(length²).

    Args:
        model: a model with `KernelizedAttention` layers.

    Examples:

    >>> x = keras.Input((None, 8))
    >>> y = keras.layers.MultiHeadAttention(2, 4)(x, x)
    >>> softmax = keras.Model(x, y)
    >>> linear, _ = keras_kt.convert_attention(
    ...     softmax,
    ...     spectral_prior=keras_kt.NormalPrior(use_mean=True, radius="chi"))
    >>> batch = np.random.normal(size=(1, 9, 8)).astype("float32")
    >>> with keras_kt.closed_form_attention(linear):
    ...     np.testing.assert_allclose(
    ...         linear(batch), softmax(batch), atol=1e-5)
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

    with _intercepted(list(kernelized_layers(model).values()), attend):
        yield


class Captured(NamedTuple):
    """What one layer attended to: arrays or tensors.

    Attributes:
        path, layer: the converted layer.
        query, key: `(batch, length, heads, key_dim)`, the layer's. A tuple of
            one a batch in what `capture` returns, as all that follow.
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


def kernelized_layers(model) -> dict:
    """The `KernelizedAttention` layers of a model by path."""
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


def pairs_of_layers(student, teacher):
    """`(path, student's layer, teacher's layer)` of converted layers."""
    kernelized_layers(student)
    ours, theirs = attention_layers(student), attention_layers(teacher)
    # Names that Keras chose differ where a class makes its own layers.
    by_position = theirs.values()
    if len(ours) != len(theirs):
        by_position = [None] * len(ours)
    pairs = [
        (path, layer, theirs.get(path, original))
        for (path, layer), original in zip(
            ours.items(), by_position, strict=True
        )
        if isinstance(layer, KernelizedAttention)
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
        _,
        query,
        key,
        value,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
        use_causal_mask=False,
        query_mask=None,
        key_mask=None,
        decay=None,
        same_length=False,
    ):
        if layer.decay:
            raise ValueError(
                "A layer that forgets stands for no softmax attention. "
                f"Received: layer {layer.name!r} with decay={layer.decay!r}. "
                "Convert without it."
            )
        if len(query.shape) != 4:
            raise ValueError(
                "Only attention over one axis can be measured or calibrated. "
                f"Received: layer {layer.name!r} with queries of shape "
                f"{tuple(query.shape)}"
            )
        visible = visible_pairs(
            query, key, attention_mask, use_causal_mask, query_mask, key_mask
        )
        q, k, v = (tf.cast(x, tf.float32) for x in (query, key, value))
        heads = attend(layer, q, k, v, visible)
        return tf.cast(heads, query.dtype), None

    with replaced_methods(layers, "_compute_attention", compute):
        yield


def visible_pairs(query, key, attention_mask, is_causal, query_mask, key_mask):
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


def masked_softmax(logits, visible):
    """Softmax over the keys that a query sees; zero in rows that see none."""
    logits = tf.where(visible, logits, FLOOR)
    return tf.where(visible, tf.nn.softmax(logits), 0.0)


def nominal_logits(layer, query, key):
    """Logits of the softmax that a layer stands for; a teacher's own."""
    logits = tf.einsum("bthd,bshd->bhts", query, key)
    if isinstance(layer, KernelizedAttention):
        if layer.qk_norm:
            raise ValueError(
                "A layer that normalizes queries and keys stands for no softmax"
                f" attention. Received: layer {layer.name!r} with qk_norm="
                f"{layer.qk_norm!r}. Convert without it."
            )
        logits *= layer.key_dim**-0.5
        if has_tilt(layer):
            mean = layer.key_dim**-0.25 * layer.spectral_prior.mean[:, 0]
            logits += tf.einsum("hd,bshd->bhs", mean, key)[:, :, tf.newaxis]
        return logits
    return logits * layer.key_dense.kernel.shape[-1] ** -0.5


def has_tilt(layer) -> bool:
    """Whether the layer's kernel is exp(q·k + μ·k) with a mean μ to set."""
    prior = layer.spectral_prior
    return (
        isinstance(prior, priors.NormalPrior)
        and prior.use_mean
        and getattr(layer.feature_map, "prefactor", None) == "tilted"
    )


def _attend_softmax(sink, layer, query, key, value, visible):
    weights = masked_softmax(nominal_logits(layer, query, key), visible)
    # A layer called twice is measured on its last call.
    sink[id(layer)] = (query, key, value, visible, weights)
    return tf.einsum("bhts,bshe->bthe", weights, value)


def capture(model, data, batches, teacher=None):
    """What converted layers attend to; a list of `Captured`."""
    batches = _checks.integer("batches", batches)
    found = kernelized_layers(model)
    pairs = None if teacher is None else pairs_of_layers(model, teacher)
    items = []
    for inputs in input_batches(data, batches):
        if teacher is not None:
            items += [item for _, item in teach(pairs, teacher, inputs)]
            continue
        sink = {}
        attend = functools.partial(_attend_softmax, sink)
        with (
            kept_losses(model),
            _intercepted(list(found.values()), attend),
        ):
            model(inputs, training=False)
        items += [
            Captured(path, layer, *sink[id(layer)])
            for path, layer in found.items()
            if id(layer) in sink
        ]
    for item in items:
        if not all(np.isfinite(x).all() for x in (item.query, item.key)):
            raise ValueError(
                "`data` must give finite queries and keys. Received: inputs "
                f"for which those of {item.path!r} are NaN or infinite."
            )
    return [
        Captured(path, layer, *zip(*tensors, strict=True))
        for path, layer in found.items()
        for tensors in [[item[2:] for item in items if item.path == path]]
        if tensors
    ]


def teach(pairs, teacher, inputs):
    """Each student layer on what its teacher's layer was given."""
    originals = [original for _, _, original in pairs]
    sink = {}
    with (
        kept_losses(teacher),
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
            Captured(
                path,
                layer,
                layer.query_dense(arguments["query"]),
                layer.key_dense(key),
                value,
                visible,
                weights,
            ),
        )


def estimate(layer, query, key, value, visible, prior=None):
    """The layer's outputs and weights, by features and near field."""
    query, key = layer.scaled(query, key)
    prior = layer.spectral_prior if prior is None else prior
    bound = layer.feature_map.bind(prior.stored_frequencies())
    kernel = None
    if layer.near_field:
        kernel = layer.feature_map.exact_kernel(prior)
    return quadratic(
        query,
        key,
        value,
        bound,
        attention_mask=visible,
        kernel=kernel,
        window=layer.near_field,
    )


def _sums_of_squares(item, prior=None):
    """Sums over batch and positions, by head, one example at a time."""
    sums = 0.0
    for batch in zip(*item[2:], strict=True):
        for one in range(batch[0].shape[0]):
            query, key, value, visible, weights = (
                x[one : one + 1] for x in batch
            )
            output, estimated = estimate(
                item.layer, query, key, value, visible, prior
            )
            exact = tf.einsum("bhts,bshe->bthe", weights, value)
            seen = tf.cast(visible, tf.float32)
            count = tf.reduce_sum(seen, axis=-1, keepdims=True)
            uniform = tf.math.divide_no_nan(seen, count)
            differences = (
                (estimated - weights, (0, 2, 3)),
                (weights, (0, 2, 3)),
                (uniform - weights, (0, 2, 3)),
                (output - exact, (0, 1, 3)),
                (exact, (0, 1, 3)),
            )
            sums += np.array(
                [tf.reduce_sum(tf.square(x), axes) for x, axes in differences]
            )
    return sums


def errors_of(items) -> AttentionErrors:
    """The errors of captured layers."""
    return AttentionErrors(
        tuple(h for item in items for h in head_errors(item))
    )


def head_errors(item, prior=None):
    """`HeadError` of each head of one layer."""
    layer = item.layer
    sums = _sums_of_squares(item, prior)
    matrix, output, uniform = (
        np.sqrt(sums[i] / np.maximum(sums[j], 1e-30))
        for i, j in ((0, 1), (3, 4), (2, 1))
    )
    query, key = visible_tokens(item)
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


def visible_tokens(item):
    """Queries and keys that take part, per head: `(heads, tokens, dim)`."""
    tokens = []
    for parts, axis in ((item.query, -1), (item.key, -2)):
        rows = [
            np.asarray(x, "float64")[np.any(visible, axis=(1, axis))]
            for x, visible in zip(parts, item.visible, strict=True)
        ]
        tokens.append(np.swapaxes(np.concatenate(rows), 0, 1))
    return tokens


def input_batches(data, count):
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
