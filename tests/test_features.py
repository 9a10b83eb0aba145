"""Every feature map, from frequencies to features; no prior but arrays."""

import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers import cases, reference

COMPONENTS, ROWS = 2, 13
# What `Frequencies` may hold: components, means, and kinds of covariance.
DRAWS = {
    "diagonal": (1, False, 3),
    "diagonal-mean": (1, True, 3),
    "full-mean": (1, True, 4),
    "mixture": (COMPONENTS, False, 3),
    "mixture-full-mean": (COMPONENTS, True, 4),
}
MAPS = {
    **cases.MAPS,
    "positive-tilted": lambda: keras_kt.PositiveFeatures("tilted"),
    "positive-one-sided": lambda: keras_kt.PositiveFeatures(two_sided=False),
}
SCALE = 0.7


def draw_of(kind):
    """Arrays of a draw: offsets, means, probabilities, factors."""
    components, has_mean, rank = DRAWS[kind]
    rng = np.random.default_rng(3)
    heads, dim = cases.HEADS, cases.DIM
    offsets = 0.6 * rng.normal(size=(heads, components * ROWS, dim))
    means = 0.3 * rng.normal(size=(heads, components, dim))
    logits = rng.normal(size=(heads, components))
    scale = np.exp(0.3 * rng.normal(size=(heads, components, dim)))
    if rank == 4:
        lower = 0.3 * rng.normal(size=(heads, components, dim, dim))
        scale = reference.matrix(scale) + np.tril(lower, -1)
    arrays = {"offsets": offsets, "logits": logits, "scale": scale}
    if has_mean:
        arrays["means"] = means
    return arrays


def frequencies_of(tensors):
    """`Frequencies` of a draw's tensors."""
    log_weights = tf.nn.log_softmax(tensors["logits"]) - np.log(ROWS)
    scale = tensors["scale"]
    covariances = scale if scale.shape.rank == 4 else tf.square(scale)
    return keras_kt.Frequencies(
        tensors["offsets"], tensors.get("means"), log_weights, covariances
    )


def reference_features(feature_map, arrays):
    heads, components = arrays["logits"].shape
    dim = arrays["offsets"].shape[-1]
    probabilities = np.exp(arrays["logits"])
    probabilities = probabilities / probabilities.sum(-1, keepdims=True)
    scale = arrays["scale"]
    frequencies = (
        arrays["offsets"].reshape(heads, components, ROWS, dim),
        arrays.get("means", np.zeros((heads, components, dim))),
        probabilities,
        scale if scale.ndim == 4 else reference.matrix(scale),
    )
    kind = cases.reference_kind(feature_map, arrays)
    return reference.features(SCALE * arrays["x"], frequencies, kind)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("name", MAPS)
def test_features_and_gradients_match_float64_numpy(name, kind):
    feature_map = MAPS[name]()
    feature_map.build(cases.HEADS)
    arrays = {"x": 0.5 * cases.inputs()[0].astype("float64"), **draw_of(kind)}
    if getattr(feature_map, "prefactor", "") == "softmax":
        arrays.pop("means", None)  # it cancels them, and refuses such priors
    arrays |= cases.weights_of(feature_map)
    expected = reference_features(feature_map, arrays)
    upstream = np.random.default_rng(7).normal(size=expected.shape)
    upstream /= expected.size**0.5
    weights = {cases.name_of(w): w for w in feature_map.trainable_weights}
    tensors = {
        name: tf.constant(x, tf.float32)
        for name, x in arrays.items()
        if name not in weights
    }
    with tf.GradientTape() as tape:
        tape.watch(list(tensors.values()))
        bound = feature_map.bind(frequencies_of(tensors), SCALE)
        features = bound.keys(tensors["x"])
        if bound.positive:
            features = tf.exp(features)
        loss = tf.reduce_sum(features * tf.cast(upstream, tf.float32))
    assert features.shape[-1] == bound.width
    np.testing.assert_allclose(features, expected, atol=1e-5, rtol=1e-5)
    wanted = tensors | {name: w.value for name, w in weights.items()}
    # The isotropic prefactor leaves covariances out.
    gradients = tape.gradient(loss, wanted, unconnected_gradients="zero")
    assert gradients.keys() == arrays.keys()
    for array, gradient in gradients.items():
        axes = 2 if array == "x" else arrays[array].ndim - 1
        keep = (0, 1) if array == "x" else (1,)

        def losses(x, array=array, keep=keep):
            phi = reference_features(feature_map, {**arrays, array: x})
            others = tuple(axis for axis in range(4) if axis not in keep)
            return (phi * upstream).sum(others)

        step = reference.complex_step(losses, arrays[array], axes)
        if array == "scale" and arrays[array].ndim == 4:
            step = np.tril(step)
            gradient = np.tril(gradient)
        np.testing.assert_allclose(
            gradient, step, atol=1e-5, rtol=1e-5, err_msg=array
        )


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("name", MAPS)
def test_features_of_queries_lack_a_factor_of_each_token(name, kind):
    """Attention cancels it; an absolute map has it, as trigonometric ones."""
    feature_map = MAPS[name]()
    feature_map.build(cases.HEADS)
    tensors = {k: tf.constant(x, tf.float32) for k, x in draw_of(kind).items()}
    if getattr(feature_map, "prefactor", "") == "softmax":
        tensors.pop("means", None)
    bound = feature_map.bind(frequencies_of(tensors))
    x = tf.constant(cases.inputs()[0])
    if not bound.positive:
        np.testing.assert_array_equal(bound.keys(x), bound.queries(x))
        return
    factor = bound.keys(x) - bound.queries(x)
    np.testing.assert_allclose(
        factor, factor[..., :1] + tf.zeros_like(factor), atol=1e-5
    )
