"""Frequencies that are weights: `EmpiricalPrior`, tied and untied."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt import kernels
from tests.helpers.tensors import array, wrong

HEADS, DIM = 2, 3
MAPS = {
    "softmax": lambda: keras_kt.PositiveFeatures(),
    "self": lambda: keras_kt.PositiveFeatures("self"),
    "one-sided": lambda: keras_kt.PositiveFeatures("self", two_sided=False),
    # Enough for rows that are not near zero, which are guarded.
    "trigonometric": lambda: keras_kt.TrigonometricFeatures(smoothing=0.5),
}


def make(feature_map="self", **options):
    prior = keras_kt.EmpiricalPrior(**options)
    layer = keras_kt.LinearAttention(
        HEADS,
        DIM,
        spectral_prior=prior,
        feature_map=MAPS[feature_map](),
        num_features=12,
        seed=1,
    )
    heads = [array((2, 7, HEADS, DIM), seed=seed) for seed in range(3)]
    layer(*heads)
    return layer, heads


def moved(layer):
    for number, weight in enumerate(layer.spectral_prior.trainable_weights):
        weight.assign_add(0.05 * array(weight.shape, seed=number))


@pytest.mark.parametrize("feature_map", MAPS)
def test_the_kernel_is_exactly_that_of_the_points(feature_map):
    layer, heads = make(feature_map)
    moved(layer)
    _, weights = layer(*heads, return_attention_scores=True)
    scaled = [np.swapaxes(x, 1, 2) for x in layer.scaled(*heads[:2])]
    for x, y, got in zip(*scaled, weights, strict=True):
        kernel = kernels.closed_form(
            layer.spectral_prior, layer.feature_map, x, y
        )
        expected = kernel / kernel.sum(-1, keepdims=True)
        np.testing.assert_allclose(got, expected, atol=2e-6)
        again = kernels.from_frequencies(
            layer.spectral_prior.points, layer.feature_map, x, y
        )
        np.testing.assert_allclose(kernel, again, rtol=1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
def test_untied_points_weigh_keys_by_their_own(feature_map):
    """Against features written out in NumPy, with no kernel between."""
    layer, heads = make(feature_map, tied=False)
    start = layer(*heads)
    tied, _ = make(feature_map)
    np.testing.assert_allclose(start, tied(*heads), atol=1e-6)
    moved(layer)
    output, weights = layer(*heads, return_attention_scores=True)
    pace = layer.spectral_pace
    of_queries, of_keys = (
        pace * w.numpy() for w in layer.spectral_prior.trainable_weights
    )
    q, k = (np.swapaxes(x, 1, 2) for x in layer.scaled(*heads[:2]))
    angles = [
        np.einsum("bhtd,hmd->bhtm", x.astype("float64"), points)
        for x, points in ((q, of_queries), (k, of_keys))
    ]
    if feature_map == "trigonometric":
        phi = [
            np.concatenate([np.cos(x), np.sin(x)], -1) / x.shape[-1] ** 0.5
            for x in angles
        ]
        matrix = np.einsum("bhtf,bhsf->bhts", *phi)
        smoothing = layer.feature_map.smoothing_weights.numpy()
        matrix = matrix + smoothing
    else:
        sides = 1 if feature_map == "one-sided" else 2
        phi = [
            np.concatenate([np.exp(x), np.exp(-x)][:sides], -1) for x in angles
        ]
        if feature_map == "softmax":
            second = np.square(of_keys).mean(1)
            half = 0.5 * np.einsum("bhsd,hd->bhs", k**2, second)
            phi[1] *= np.exp(-half)[..., None]
        else:
            phi[1] /= phi[1].sum(-1, keepdims=True)
        matrix = np.einsum("bhtf,bhsf->bhts", *phi)
    expected = matrix / matrix.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, expected, atol=2e-5)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(*heads) * array(output.shape, seed=9))
    for gradient in tape.gradient(loss, layer.spectral_weights):
        assert np.abs(gradient).max() > 0
    wrong("no distribution", layer.spectral_prior.distribution)


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("feature_map", MAPS)
def test_streams_equal_the_causal_call(feature_map, tied):
    layer, heads = make(feature_map, tied=tied)
    moved(layer)
    expected = layer(*heads, use_causal_mask=True)
    state, outputs = layer.initial_state(2), []
    for cut in (slice(0, 4), slice(4, 5), slice(5, 7)):
        output, state = layer.step(*(x[:, cut] for x in heads), state)
        outputs.append(output)
    np.testing.assert_allclose(
        tf.concat(outputs, 1), expected, atol=2e-6, rtol=1e-4
    )


def test_it_starts_at_whole_orthogonal_blocks():
    prior = keras_kt.EmpiricalPrior(2.0, scale_spread=4, seed=0)
    prior.build((3, 2 * DIM, DIM))
    for points, scale in zip(prior.points, (1.0, 2.0, 4.0), strict=True):
        for block in np.split(points.numpy(), 2):
            np.testing.assert_allclose(
                block @ block.T, DIM * scale**2 * np.eye(DIM), atol=1e-4
            )


def test_nothing_is_drawn():
    layer, heads = make()
    prior = layer.spectral_prior
    assert not prior.has_draw and not prior.non_trainable_weights
    wrong("no draw that could be replaced", prior.resample)
    wrong(
        "whose frequencies are weights",
        lambda: keras_kt.KernelizedAttention(
            2, 4, spectral_prior="empirical", redraw="step"
        ),
    )
    wrong("`kl_weight`", lambda: keras_kt.EmpiricalPrior(kl_weight=1.0))
    same = prior(seed=tf.constant([1, 2]))
    np.testing.assert_array_equal(same.offsets, prior().offsets)


def test_models_with_it_are_saved(tmp_path):
    x = keras.Input((7, 6))
    layer = keras_kt.KernelizedAttention(
        2,
        4,
        spectral_prior=keras_kt.EmpiricalPrior(tied=False, regularizer="l2"),
        feature_map=keras_kt.PositiveFeatures("self"),
        num_features=16,
    )
    model = keras.Model(x, layer(x, x))
    model.compile("adam", "mse")
    data = array((4, 7, 6))
    model.fit(data, data, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(data), model(data))
    assert not loaded.layers[1].spectral_prior.tied
