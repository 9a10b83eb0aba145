"""Normalized queries and keys: `qk_norm="auto"`, and rows at the start."""

import math
import warnings

import keras
import numpy as np
import pytest

import keras_kt
from tests.helpers.tensors import array


def make(**options):
    layer = keras_kt.KernelizedAttention(2, 8, **options)
    x = array((2, 5, 16))
    layer(x, x)
    return layer


def test_trigonometric_features_are_normalized_and_positive_ones_not():
    assert make().qk_norm == "auto"
    assert make().temperature is None
    assert make(feature_map="trigonometric", qk_norm=None).temperature is None
    for options, start in (
        # Its head_dim is 8.
        ({"feature_map": "trigonometric"}, 1.0),
        ({"feature_map": "trigonometric", "qk_norm": "l2"}, 1.0),
        ({"feature_map": "trigonometric", "qk_norm": "weighted"}, 0.3),
        ({"qk_norm": "l2"}, 1.0),
    ):
        temperature = make(**options).temperature
        np.testing.assert_allclose(temperature, start, rtol=1e-6)


def test_what_is_configured_is_kept():
    for qk_norm in ("auto", None, "l2"):
        config = keras_kt.KernelizedAttention(2, 8, qk_norm=qk_norm)
        config = config.get_config()
        assert config["qk_norm"] == qk_norm


def test_training_without_a_norm_warns_once():
    layer = make(feature_map="trigonometric", qk_norm=None)
    x = array((2, 5, 16))
    with pytest.warns(UserWarning, match="qk_norm"):
        layer(x, x, training=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, x, training=True)
        make(feature_map="trigonometric")(x, x, training=True)
        make()(x, x, training=True)
        make(feature_map="trigonometric", qk_norm=None)(x, x)


def kernel_of(
    key_dim, num_features, seed, temperature=None, length=64, qk_norm="auto"
):
    """k̂ of queries and keys of a layer, `(1, heads, length, length)`.

    Over the mean weight of keys, where they weigh by their length.
    """
    keras.utils.set_random_seed(seed)
    layer = keras_kt.LinearAttention(
        4,
        key_dim,
        num_features=num_features,
        feature_map="trigonometric",
        qk_norm=qk_norm,
        seed=seed,
    )
    q, k = (array((1, length, 4, key_dim), seed=2 * seed + i) for i in (0, 1))
    layer.build(q.shape, k.shape, k.shape)
    if temperature is not None:
        weight = layer.unit_norm.raw_temperature
        raw = math.log(math.expm1(temperature))
        layer.unit_norm.assign_value(weight, np.full(weight.shape, raw))
    bound = layer.bound()
    q, k = (np.swapaxes(x, 1, 2) for x in layer.scaled(q, k))
    q, k = bound.queries(q), bound.keys(k)
    # The last feature is a constant, times the key's weight.
    weight = k[..., -1:] / q[..., -1:]
    return np.matmul(
        q, np.swapaxes(k / np.mean(weight, 2, keepdims=True), 2, 3)
    )


@pytest.mark.parametrize("qk_norm", ("l2", "weighted"))
@pytest.mark.parametrize("key_dim, blocks", [(2, 4), (8, 2), (64, 1)])
def test_rows_sum_to_one_at_the_start(key_dim, blocks, qk_norm):
    """None of 20 seeds has a normalizer that is guarded."""
    for seed in range(20):
        kernel = kernel_of(key_dim, 2 * key_dim * blocks, seed, qk_norm=qk_norm)
        # The guard acts below a hundredth of the number of keys.
        assert kernel.mean(-1).min() > 1e-2


@pytest.mark.parametrize("key_dim", (2, 3, 8))
def test_whole_blocks_of_one_radius_bound_the_kernel_from_below(key_dim):
    """Σ_m cos(ω_m·z)/M ≥ cos|z| for |z| ≤ π (docs/priors.md).

    So no weight is negative below the temperature where cos 2√τ = −s.
    """
    smoothing = 0.1
    limit = (math.acos(-smoothing) / 2) ** 2
    for seed in range(5):
        kernel = kernel_of(key_dim, 4 * key_dim, seed, limit - 1e-3)
        assert kernel.min() > 0.0
        for temperature in (0.3, 1.0, 2.0):
            kernel = kernel_of(key_dim, 4 * key_dim, seed, temperature)
            least = math.cos(min(2 * math.sqrt(temperature), math.pi))
            assert kernel.min() > least + smoothing - 1e-5
