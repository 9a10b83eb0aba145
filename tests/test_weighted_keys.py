"""`qk_norm="weighted"`: trigonometric kernels in which keys weigh by length."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers.tensors import array

BATCH, LENGTH, HEADS, DIM, VALUE_DIM = 2, 80, 2, 4, 3
CALLS = {
    "bidirectional": ({}, {}),
    "causal": ({}, {"use_causal_mask": True}),
    "matrix": ({"implementation": "quadratic"}, {}),
    "window": ({"sliding_window": 9}, {"use_causal_mask": True}),
    "decay": ({"decay": "constant"}, {"use_causal_mask": True}),
    "own keys": ({"spectral_prior": keras_kt.EmpiricalPrior(tied=False)}, {}),
}


def make(**options):
    options = {"implementation": "linear", "num_features": 16} | options
    layer = keras_kt.LinearAttention(
        HEADS,
        DIM,
        VALUE_DIM,
        feature_map="trigonometric",
        qk_norm="weighted",
        seed=1,
        **options,
    )
    query, key, value = heads()
    layer.build(query.shape, key.shape, value.shape)
    return layer


def heads(seed=0):
    query, key, value = (
        array((BATCH, LENGTH, HEADS, size), seed=seed + i)
        for i, size in enumerate((DIM, DIM, VALUE_DIM))
    )
    # Lengths that tell keys apart.
    lengths = np.exp(array((BATCH, LENGTH, HEADS, 1), seed=seed + 3))
    return query, key * lengths.astype("float32"), value


def by_hand(layer, query, key, value, seen):
    """Outputs in float64, from the frequencies, pair by pair."""
    query, key, value = (np.asarray(x, "float64") for x in (query, key, value))
    drawn = layer.spectral_prior.stored_frequencies()
    omega = np.asarray(drawn.offsets, "float64")
    of_keys = omega
    if drawn.key_offsets is not None:
        of_keys = np.asarray(drawn.key_offsets, "float64")
    tau = np.asarray(layer.temperature, "float64")
    q, k = (
        np.sqrt(tau) * x / np.linalg.norm(x, axis=-1, keepdims=True)
        for x in (query, key)
    )
    q = np.einsum("hmd,bthd->bhtm", omega, q)
    k = np.einsum("hmd,bshd->bhsm", of_keys, k)
    angles = q[:, :, :, np.newaxis] - k[:, :, np.newaxis]
    smoothing = np.asarray(layer.feature_map.smoothing_weights, "float64")
    kernel = np.cos(angles).mean(-1) + smoothing
    weights = np.swapaxes(weight_of(key), 1, 2)[:, :, np.newaxis] * kernel
    weights = np.where(seen, weights, 0.0)
    if layer.decay:
        rate = np.asarray(layer.decay_rates(np.ones((1, 1))), "float64")
        t = np.arange(LENGTH)
        elapsed = rate.reshape(-1, 1, 1) * (t[:, np.newaxis] - t)
        weights *= np.exp(-np.maximum(elapsed, 0.0))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshe->bthe", weights, value)


def weight_of(key):
    """`(batch, length, heads)`: of keys by their length."""
    return np.square(key).mean(-1) ** 2 + 1e-4


@pytest.mark.parametrize(
    "name, masked",
    [
        *((name, False) for name in CALLS),
        *((n, True) for n in ("bidirectional", "causal", "matrix", "own keys")),
    ],
)
def test_weights_are_the_kernel_of_directions_times_a_power_of_lengths(
    name, masked
):
    options, call = CALLS[name]
    layer = make(**options)
    tensors = heads()
    t = np.arange(LENGTH)
    apart = t[:, np.newaxis] - t
    seen = np.ones((1, 1, LENGTH, LENGTH), bool)
    if call:
        seen = seen & (apart >= 0)
    if name == "window":
        seen &= apart < 9
    if masked:
        mask = np.random.default_rng(7).random((BATCH, LENGTH)) < 0.6
        mask[:, 0] = True
        call = call | {"key_mask": mask}
        seen = seen & mask[:, np.newaxis, np.newaxis]
    expected = by_hand(layer, *tensors, seen)
    found = layer(*tensors, **call)
    # Rows of causal attention that see few keys have small normalizers.
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=1e-3)
    compiled = tf.function(layer, jit_compile=True)(*tensors, **call)
    np.testing.assert_allclose(found, compiled, atol=1e-4)


@pytest.mark.parametrize("causal", (False, True))
def test_gradients_are_those_of_the_matrix(causal):
    found = []
    for implementation in ("linear", "quadratic"):
        layer = make(implementation=implementation)
        tensors = [tf.constant(x) for x in heads()]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = layer(*tensors, use_causal_mask=causal)
            # Where a causal row sees few keys, its sum is often near zero.
            loss = tf.reduce_sum(output[:, 40:] * array(output.shape)[:, 40:])
        variables = [*tensors, *layer.trainable_weights]
        found.append(tape.gradient(loss, variables))
    for one, other in zip(*found, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=2e-4 * scale)


def test_a_long_key_takes_the_weight_of_every_query_and_a_short_one_none():
    layer = make()
    query, key, value = heads()
    key[:, 7] *= 1e4
    np.testing.assert_allclose(
        layer(query, key, value),
        np.broadcast_to(value[:, 7:8], value.shape),
        atol=1e-2,
    )
    key[:, 7] = 0.0
    others = np.delete(np.arange(LENGTH), 7)
    without = layer(query, key[:, others], value[:, others])
    np.testing.assert_allclose(layer(query, key, value), without, atol=1e-3)


def test_keys_of_length_zero_weigh_alike_and_have_gradients():
    layer = make()
    query, key, value = (tf.constant(x) for x in heads())
    key = tf.zeros_like(key)
    with tf.GradientTape() as tape:
        tape.watch([query, key, value])
        output = layer(query, key, value)
    mean = tf.reduce_mean(value, axis=1, keepdims=True)
    np.testing.assert_allclose(output, mean + tf.zeros_like(value), atol=1e-5)
    for gradient in tape.gradient(output, [query, key, value]):
        assert np.isfinite(gradient).all()


def test_lengths_of_queries_do_not_matter_and_one_factor_of_all_keys_not():
    layer = make()
    query, key, value = heads()
    expected = layer(query, key, value)
    np.testing.assert_allclose(
        layer(5 * query, key, value), expected, atol=1e-5
    )
    np.testing.assert_allclose(
        layer(query, 50 * key, value), expected, atol=1e-3
    )


def test_positive_features_refuse_it():
    with pytest.raises(ValueError, match='`qk_norm="weighted"` needs trig'):
        keras_kt.KernelizedAttention(2, 4, qk_norm="weighted")


def test_what_is_configured_is_kept():
    layer = make()
    assert layer.weighs_keys and layer.get_config()["qk_norm"] == "weighted"
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    assert again.weighs_keys


def test_the_closed_form_has_the_weights_too():
    x = keras.Input((None, 8))
    attention = keras_kt.KernelizedAttention(
        2,
        4,
        feature_map="trigonometric",
        qk_norm="weighted",
        num_features=8192,
        seed=1,
        name="attention",
    )
    model = keras.Model(x, attention(x, x))
    errors = keras_kt.diagnostics.kernel_errors(model, array((2, 30, 8)))
    assert errors["attention"].max() < 0.05
