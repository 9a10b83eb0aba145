"""Diagnostics: what a learned kernel looks like, and when it went wrong.

Arrays first. Functions of a layer look at its spectral prior alone; functions
of a model run it on a batch, look at the queries and keys of each
`KernelizedAttention` and leave the model as it was. `plots` draws the results.
"""

import inspect
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kt import _checks, kernels
from keras_kt.conversion import errors as attention_errors
from keras_kt.conversion.probe import kept_losses, replaced_methods
from keras_kt.features import TrigonometricFeatures
from keras_kt.layers.attention import KernelizedAttention

# A component with less than this share of an even one has died.
_DEAD = 0.05
# A kernel that is above this everywhere tells no keys apart.
_CONSTANT = 0.99
# Kernel estimates whose relative standard deviation is above this are noise.
_NOISY = 1.0
# A row of weights that sums to less than this was scaled by the guard.
_WHOLE = 0.99


class KernelProfile(NamedTuple):
    """The shift-invariant kernel E cos ω·(q − k) that a prior stands for.

    Attributes:
        distances: `(points,)`, |q − k| before the layer scales queries and
            keys, or after qk_norm, where lengths are its learned √τ.
        kernel: `(heads, points)`, of the frequencies that are drawn, a mean
            over directions of q − k.
        closed_form: the same of the prior's own law, or `None` for a prior
            that has no closed form.
    """

    distances: np.ndarray
    kernel: np.ndarray
    closed_form: np.ndarray | None


class Spectrum(NamedTuple):
    """The frequencies of a layer: its kernel, by Bochner's theorem.

    Attributes:
        frequencies: `(heads, num_frequencies, key_dim)`.
        weights: `(heads, num_frequencies)`; those of a head sum to one.
    """

    frequencies: np.ndarray
    weights: np.ndarray


class AttentionMap(NamedTuple):
    """What one layer attends to on a batch.

    Attributes:
        path: the layer, as in `ConversionReport`.
        weights: `(batch, heads, query_length, key_length)`, implied by the
            features; rows sum to one.
        softmax: softmax's weights for the same queries and keys, or `None` for
            a layer that normalizes them.
    """

    path: str
    weights: np.ndarray
    softmax: np.ndarray | None


class RowSums(NamedTuple):
    """What a layer's attention weights sum to, where that is not always one.

    Signed features can give a query a normalizer near zero or below it, which
    is then guarded: the row of weights is scaled, and sums to less than one.

    Attributes:
        guarded: `(heads,)`, the share of rows that sum to less than 0.99, among
            those that see a key.
        least: `(heads,)`, the least sum of a row.
    """

    guarded: np.ndarray
    least: np.ndarray


class Finding(NamedTuple):
    """Something that is wrong with one head.

    Attributes:
        path: the layer; its name if a layer was examined.
        head: number of the head.
        problem: what was seen.
        advice: what to do about it.
    """

    path: str
    head: int
    problem: str
    advice: str

    def __str__(self):
        return f"{self.path}, head {self.head}: {self.problem}. {self.advice}"


def kernel_profile(layer, distances=None, *, directions=64, seed=0):
    """How similar a layer finds a query and a key, by their distance.

    The kernel of trigonometric features without their smoothing. Positive
    features weigh keys by the same prior's moment generating function, which
    grows with length and has no profile of its own.

    Args:
        layer: a built `KernelizedAttention`.
        distances: `(points,)`. Defaults to `None`: 41 from 0 to 10.
        directions: how many directions of q − k are averaged.
        seed: integer, of the directions.

    Returns:
        `KernelProfile`.

    Examples:

    >>> layer = keras_kt.KernelizedAttention(2, 4)
    >>> _ = layer(np.ones((1, 3, 5)), np.ones((1, 3, 5)))
    >>> keras_kt.diagnostics.kernel_profile(layer, [0.0, 1.0]).kernel.shape
    (2, 2)
    """
    _check_layer(layer)
    if distances is None:
        distances = np.linspace(0.0, 10.0, 41)
    distances = np.array(_checks.floats("distances", distances))
    directions = _checks.integer("directions", directions)
    seed = _checks.integer("seed", seed, minimum=0)
    unit = np.random.default_rng(seed).normal(size=(directions, layer.key_dim))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    omega, weights = spectrum(layer)
    scale = 1.0 if layer.qk_norm else layer.key_dim**-0.25
    angles = scale * np.einsum("hmd,nd->hmn", omega, unit)
    profile = np.stack(
        [
            np.einsum("hm,hmn->h", weights, np.cos(distance * angles))
            for distance in distances
        ],
        axis=1,
    )
    return KernelProfile(
        distances,
        profile / directions,
        _closed_form(layer, scale * distances, unit),
    )


def _closed_form(layer, distances, unit):
    """`(heads, points)` of the prior's characteristic function, or `None`."""
    feature_map = TrigonometricFeatures()
    feature_map.build(layer.num_heads)
    points = np.einsum("p,nd->pnd", distances, unit)
    try:
        values = kernels.closed_form(
            layer.spectral_prior,
            feature_map,
            points.reshape(-1, layer.key_dim),
            np.zeros((1, layer.key_dim)),
        )
    except ValueError:
        return None
    smoothing = np.asarray(feature_map.smoothing_weights, "float64")
    values = (values - smoothing).reshape(layer.num_heads, *points.shape[:2])
    return values.mean(axis=-1)


def spectrum(layer):
    """The frequencies that a layer has drawn.

    Args:
        layer: a built `KernelizedAttention`.

    Returns:
        `Spectrum`.

    Examples:

    >>> layer = keras_kt.KernelizedAttention(2, 4, num_features=16)
    >>> _ = layer(np.ones((1, 3, 5)), np.ones((1, 3, 5)))
    >>> keras_kt.diagnostics.spectrum(layer).frequencies.shape
    (2, 8, 4)
    """
    _check_layer(layer)
    draw = layer.spectral_prior()
    omega = np.asarray(draw.offsets, "float64")
    probabilities = np.exp(np.asarray(draw.log_weights, "float64"))
    count = omega.shape[1] // probabilities.shape[1]
    if draw.means is not None:
        omega = omega + np.repeat(np.asarray(draw.means), count, axis=1)
    return Spectrum(omega, np.repeat(probabilities, count, axis=1))


def attention_maps(model, data):
    """What each layer of a model attends to. O(length²).

    Args:
        model: a model with `KernelizedAttention` layers.
        data: one batch of its inputs.

    Returns:
        List of `AttentionMap`, in the order of the model's layers.

    Examples:

    >>> x = keras.Input((None, 8))
    >>> model = keras.Model(x, keras_kt.KernelizedAttention(2, 4)(x, x))
    >>> maps = keras_kt.diagnostics.attention_maps(model, np.ones((1, 5, 8)))
    >>> maps[0].weights.shape
    (1, 2, 5, 5)
    """
    return [
        AttentionMap(path, record.weights, _softmax_map(layer, record.call))
        for path, layer, record in _recorded(model, data, weights=True)
    ]


def _softmax_map(layer, call):
    if layer.qk_norm or call["query"].shape.rank != 4:
        return None
    logits = attention_errors.nominal_logits(layer, call["query"], call["key"])
    return attention_errors.masked_softmax(logits, _visible(call)).numpy()


def _visible(call):
    return attention_errors.visible_pairs(
        call["query"],
        call["key"],
        call.get("attention_mask"),
        call.get("use_causal_mask"),
        call.get("query_mask"),
        call.get("key_mask"),
    )


def kernel_errors(model, data):
    """How far features are from the kernel that they estimate. O(length²).

    It is the Monte Carlo error, apart from what was learned: against softmax
    see `attention_error`. More features make it smaller.

    Args:
        model: a model with `KernelizedAttention` layers.
        data: one batch of its inputs.

    Returns:
        Dictionary from paths to `(heads,)` arrays, relative Frobenius errors of
        the attention matrix; `None` for a prior without a closed form, and for
        a layer that forgets or has a near field.

    Examples:

    >>> x = keras.Input((None, 8))
    >>> attention = keras_kt.KernelizedAttention(2, 4, name="attention")
    >>> model = keras.Model(x, attention(x, x))
    >>> batch = np.random.normal(size=(1, 9, 8))
    >>> errors = keras_kt.diagnostics.kernel_errors(model, batch)
    >>> errors["attention"].shape
    (2,)
    """
    errors = {}
    for path, layer, record in _recorded(model, data, weights=True):
        exact = _closed_form_map(layer, record.call)
        errors[path] = None
        if exact is not None:
            axes = (0, 2, 3)
            error = np.square(record.weights - exact).sum(axes)
            errors[path] = np.sqrt(error / np.square(exact).sum(axes))
    return errors


def _closed_form_map(layer, call):
    """Attention weights of the prior's own kernel, or `None`."""
    if layer.decay or layer.near_field or call["query"].shape.rank != 4:
        return None
    query, key, scale = call["query"], call["key"], layer.key_dim**-0.25
    if layer.qk_norm:
        query, key, scale = layer._qk_norm(query), layer._qk_norm(key), 1.0
    visible = _visible(call).numpy()
    maps = []
    for q, k, seen in zip(query, key, visible, strict=True):
        q, k = (scale * np.moveaxis(np.asarray(x), 1, 0) for x in (q, k))
        try:
            kernel = kernels.closed_form(
                layer.spectral_prior, layer.feature_map, q, k
            )
        except ValueError:
            return None
        values = np.zeros((layer.num_heads, k.shape[1], 1))
        maps.append(kernels.kernel_attention(kernel, values, seen)[1])
    return np.stack(maps)


def effective_features(model, data):
    """How many features a batch's keys make use of, by layer and head.

    (Σλ)²/Σλ² of the eigenvalues λ of the second moments of the keys' features,
    each of length one: 1 if all keys look alike, at most D.

    Args:
        model: a model with `KernelizedAttention` layers.
        data: one batch of its inputs.

    Returns:
        Dictionary from paths to `(heads,)` arrays.

    Examples:

    >>> x = keras.Input((None, 8))
    >>> attention = keras_kt.KernelizedAttention(2, 4, name="attention")
    >>> model = keras.Model(x, attention(x, x))
    >>> batch = np.random.normal(size=(1, 50, 8))
    >>> counts = keras_kt.diagnostics.effective_features(model, batch)
    >>> counts["attention"].shape
    (2,)
    """
    counts = {}
    for path, layer, record in _recorded(model, data):
        _, features = _features_of(layer, record.call)
        moment = np.einsum("hnf,hng->hfg", features, features)
        trace = np.trace(moment, axis1=1, axis2=2)
        counts[path] = trace**2 / np.square(moment).sum(axis=(1, 2))
    return counts


def row_sums(model, data):
    """Whether the weights of each query sum to one, for signed features.

    Layers with positive features are left out: theirs always do. Sums are the
    outputs of the recorded calls for values of one, so they have its masks,
    causality and route, at the cost of that attention once more: linear in
    length where the call is.

    Args:
        model: a model with `KernelizedAttention` layers.
        data: one batch of its inputs.

    Returns:
        Dictionary from paths to `RowSums`; empty, without a forward pass, for a
        model of positive features only.

    Examples:

    >>> x = keras.Input((None, 8))
    >>> attention = keras_kt.KernelizedAttention(
    ...     2, 4, feature_map="trigonometric", name="attention")
    >>> model = keras.Model(x, attention(x, x))
    >>> batch = np.random.normal(size=(1, 50, 8))
    >>> keras_kt.diagnostics.row_sums(model, batch)["attention"].least.shape
    (2,)
    """
    if not any(_is_signed(layer) for layer in layers_of(model).values()):
        return {}
    return {
        path: _summarised(layer, record.sums)
        for path, layer, record in _recorded(model, data, sums=True)
        if record.sums is not None
    }


def health(model, data=None):
    """What is wrong with the kernels of a model or a layer.

    Looks for parameters that are not finite, components of a mixture that have
    died and kernels that tell no keys apart; on a batch also for queries and
    keys too long for the number of features, and for rows of attention weights
    that do not sum to one (see `row_sums`).

    Args:
        model: a model with `KernelizedAttention` layers, or one such layer.
        data: one batch of the model's inputs. Defaults to `None`, which looks
            at weights only, the one choice for a layer.

    Returns:
        List of `Finding`; empty if nothing was found.

    Examples:

    >>> layer = keras_kt.KernelizedAttention(2, 4)
    >>> _ = layer(np.ones((1, 3, 5)), np.ones((1, 3, 5)))
    >>> keras_kt.diagnostics.health(layer)
    []
    """
    if isinstance(model, KernelizedAttention):
        if data is not None:
            raise ValueError(
                "`data` needs a model, which gives the layer its inputs. "
                f"Received: the layer {model.name!r} and data. Pass the model."
            )
        _check_layer(model)
        return list(_weights_findings(model.name, model))
    findings = []
    for path, layer in layers_of(model).items():
        findings += _weights_findings(path, layer)
    if data is not None:
        for path, layer, record in _recorded(model, data, sums=True):
            findings += _data_findings(path, layer, record)
    return findings


def _weights_findings(path, layer):
    prior = layer.spectral_prior
    omega, _ = spectrum(layer)
    profile = kernel_profile(layer).kernel
    if hasattr(prior, "log_probabilities"):
        shares = np.exp(np.asarray(prior.log_probabilities, "float64"))
    else:
        shares = np.ones((layer.num_heads, 1))
    for head in range(layer.num_heads):
        if not np.isfinite(omega[head]).all():
            yield Finding(
                path,
                head,
                "its frequencies are not finite",
                "Training diverged: lower the learning rate or clip gradients, "
                "and go back to a checkpoint",
            )
            continue
        dead = np.flatnonzero(shares[head] < _DEAD / shares.shape[1])
        if dead.size:
            yield Finding(
                path,
                head,
                f"components {dead.tolist()} have died, with probabilities "
                f"{shares[head][dead].round(4).tolist()}",
                "Lower `num_components`: their features are wasted",
            )
        if profile[head].min() > _CONSTANT:
            yield Finding(
                path,
                head,
                "its kernel is the same for all keys within distance 10, "
                f"at least {profile[head].min():.3f} of that at 0",
                "It averages all tokens: raise the prior's `scale`, or see "
                "whether the head is needed",
            )


def _data_findings(path, layer, record):
    if record.sums is not None:
        yield from _sums_findings(path, _summarised(layer, record.sums))
        return
    queries, keys = (
        np.moveaxis(_tokens(record.call, name), 1, 0)
        for name in ("query", "key")
    )
    omega, weights = spectrum(layer)
    if layer.qk_norm:
        scale = np.sqrt(np.reshape(layer._qk_norm.temperature, (-1, 1, 1)))
        queries, keys = (
            scale * x / np.linalg.norm(x, axis=-1, keepdims=True)
            for x in (queries, keys)
        )
    else:
        scale = layer.key_dim**-0.25
        queries, keys = scale * queries, scale * keys
    for head in range(layer.num_heads):
        deviation = _deviation(
            queries[head], keys[head], omega[head], weights[head]
        )
        if deviation > _NOISY:
            yield Finding(
                path,
                head,
                "queries and keys are too long for the number of features: an "
                f"estimate of a kernel value deviates by {deviation:.2g} of it",
                "What the head learns is its own draw and not the kernel, so "
                "keep redraw='never'; raise `num_features`, use qk_norm='l2', "
                "or, after `convert_attention`, `calibrate`",
            )


def _sums_findings(path, sums):
    for head, (guarded, least) in enumerate(zip(*sums, strict=True)):
        if guarded > 0.0:
            yield Finding(
                path,
                head,
                f"{100 * guarded:.2g} % of its rows of attention weights sum "
                f"to less than one, the least to {least:.2g}: their signed "
                "normalizers are near zero or negative, and guarded",
                "Outputs of these queries are scaled down: raise `smoothing` "
                "or `num_features`, use qk_norm='l2', or positive features",
            )


def _summarised(layer, sums):
    """`RowSums` of `(…, heads, 1)` sums."""
    sums = np.reshape(sums, (-1, layer.num_heads)).astype("float64")
    # A row that sees a key sums to exactly zero with probability zero.
    guarded, least = np.zeros(layer.num_heads), np.ones(layer.num_heads)
    for head, rows in enumerate(sums.T):
        rows = rows[rows != 0.0]
        if rows.size:
            # NaN is not above the limit either.
            guarded[head] = np.mean(~(rows >= _WHOLE))
            least[head] = rows.min()
    return RowSums(guarded, least)


def _is_signed(layer):
    return not layer.feature_map.bind(layer.spectral_prior()).positive


def _deviation(query, key, omega, weights):
    """Predicted relative standard deviation of k(q, k), theory's fact 5."""
    center = weights @ omega
    second = np.einsum("m,md,me->de", weights, omega - center, omega - center)
    moments = [x.T @ x / len(x) for x in (query, key)]
    v = np.sum(second * (moments[0] + moments[1]))
    v += 2.0 * query.mean(0) @ second @ key.mean(0)
    return float(np.sqrt(np.expm1(min(v, 700.0)) / len(omega)))


def _features_of(layer, call):
    """Features of queries and of keys, `(heads, tokens, D)`.

    Positive ones are scaled to length one, which attention does not notice.
    """
    query, key = layer.scaled(
        *(tf.constant(_tokens(call, name)) for name in ("query", "key"))
    )
    bound, features = layer.bound(), []
    for x in (query, key):
        x = tf.transpose(x, (1, 0, 2))[tf.newaxis]
        phi = bound(x)[0].numpy().astype("float64")
        if bound.positive:
            phi = np.exp(phi - phi.max(axis=-1, keepdims=True))
            phi /= np.linalg.norm(phi, axis=-1, keepdims=True)
        features.append(phi)
    return features


def _tokens(call, name):
    """`(tokens, heads, dim)` of all examples together, without padding."""
    x = np.asarray(call[name], "float32")
    x = x.reshape(-1, *x.shape[-2:])
    mask = call.get(f"{name}_mask")
    return x if mask is None else x[np.reshape(mask, -1).astype(bool)]


class _Record(NamedTuple):
    """A layer's last call.

    Attributes:
        call: arguments of `_compute_attention` by name.
        weights: attention weights, or `None` if not asked for.
        sums: `(…, heads, 1)`, their sums over keys, or `None` if not asked for
            or always one.
    """

    call: dict
    weights: np.ndarray | None
    sums: np.ndarray | None


def _recorded(model, data, *, weights=False, sums=False):
    """`(path, layer, record)` of the layers that a forward pass calls."""
    layers = layers_of(model)
    sink = {}

    def compute(layer, attend, *args, **kwargs):
        call = inspect.signature(attend).bind(*args, **kwargs).arguments
        record = _Record(call, None, None)
        if weights:
            asking = {**call, "return_attention_scores": True}
            record = record._replace(weights=attend(**asking)[1].numpy())
        if sums and _is_signed(layer):
            ones = tf.ones_like(call["value"][..., :1])
            totals, _ = attend(**{**call, "value": ones})
            totals = tf.cast(totals, tf.float32).numpy()
            record = record._replace(sums=totals)
        sink[id(layer)] = record
        return attend(**call)

    with (
        kept_losses(model),
        replaced_methods(layers.values(), "_compute_attention", compute),
    ):
        inputs = keras.tree.map_structure(tf.convert_to_tensor, data)
        model(inputs, training=False)
    return [
        (path, layer, sink[id(layer)])
        for path, layer in layers.items()
        if id(layer) in sink
    ]


def layers_of(model):
    """The `KernelizedAttention` layers of a model by path, all built."""
    found = attention_errors.kernelized_layers(model)
    for layer in found.values():
        _check_layer(layer)
    return found


def _check_layer(layer):
    if not isinstance(layer, KernelizedAttention):
        raise ValueError(
            "`layer` must be a KernelizedAttention. Received: a "
            f"{type(layer).__name__}."
        )
    if not layer.built:
        raise ValueError(
            "`layer` must be built: its kernel is a weight. Received: "
            f"{layer.name!r}, which is not. Call it once."
        )
