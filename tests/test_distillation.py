"""Distillation of outputs, and what a model is without its far field."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt.conversion import distill_outputs, without_far_field

WIDTH, HEADS, KEY_DIM, LENGTH, CLASSES = 6, 3, 5, 11, 7


def teacher(classes=CLASSES, causal=False, masked=False):
    x = keras.Input((None, WIDTH))
    y = keras.layers.Masking()(x) if masked else x
    attention = keras.layers.MultiHeadAttention(
        HEADS, KEY_DIM, kernel_initializer=keras.initializers.Orthogonal(2.0)
    )
    y = attention(y, y, use_causal_mask=causal)
    return keras.Model(x, keras.layers.Dense(classes)(y))


def student_of(model, **kwargs):
    return keras_kt.convert_attention(model, num_features=20, **kwargs)[0]


def floats(seed=0):
    x = np.random.default_rng(seed).normal(size=(2, LENGTH, WIDTH))
    return x.astype("float32")


def divergence(expected, outputs):
    """Of softmaxes, in float64."""
    if expected.shape[-1] == 1:
        expected, outputs = (
            np.concatenate([x, 0.0 * x], -1) for x in (expected, outputs)
        )
    p, q = (
        np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        for x in (np.asarray(x, "float64") for x in (expected, outputs))
    )
    return (p * np.log(p / q)).sum(-1)


@pytest.mark.parametrize("classes", [1, CLASSES])
def test_loss_is_the_divergence_from_the_teacher(classes):
    softmax = teacher(classes)
    linear = student_of(softmax)
    x = floats()
    expected = divergence(softmax(x), linear(x)).mean()
    losses = distill_outputs(linear, softmax, x, steps=30, learning_rate=1e-2)
    np.testing.assert_allclose(losses[0], expected, rtol=1e-4)
    assert losses[-1] < 0.5 * losses[0]


def test_padding_does_not_count():
    softmax = teacher(masked=True)
    linear = student_of(softmax)
    x = floats()
    x[1, 4:] = 0.0
    each = divergence(softmax(x), linear(x))
    each = np.concatenate([each[0], each[1, :4]])
    (loss,) = distill_outputs(linear, softmax, x, steps=1)
    np.testing.assert_allclose(loss, each.mean(), rtol=1e-4)


def test_sample_weights_count_as_in_fit():
    softmax = teacher()
    linear = student_of(softmax)
    x = floats()
    weights = np.random.default_rng(1).uniform(size=(2, LENGTH))
    each = divergence(softmax(x), linear(x))
    data = tf.data.Dataset.from_tensors((x, np.zeros(2), weights))
    (loss,) = distill_outputs(linear, softmax, data, steps=1)
    expected = (each * weights).sum() / weights.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_a_loss_of_ones_own_gets_teacher_then_student():
    softmax = teacher()
    linear = student_of(softmax)
    x = floats()
    expected = np.square(softmax(x) - linear(x)).mean()
    loss = keras.losses.mean_squared_error
    (found,) = distill_outputs(linear, softmax, x, steps=1, loss=loss)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_teacher_stays_as_it_is():
    softmax = teacher()
    before = [np.array(w) for w in softmax.weights]
    distill_outputs(student_of(softmax), softmax, floats(), steps=2)
    for old, new in zip(before, softmax.weights, strict=True):
        np.testing.assert_array_equal(old, new)


def test_what_has_no_logits_needs_a_loss():
    x = keras.Input((None, WIDTH))
    y = keras.layers.MultiHeadAttention(HEADS, KEY_DIM)(x, x)
    softmax = keras.Model(x, {"a": y, "b": y})
    with pytest.raises(ValueError, match="`loss` is needed"):
        distill_outputs(student_of(softmax), softmax, floats(), steps=1)
    with pytest.raises(ValueError, match="`loss` must be a function"):
        distill_outputs(softmax, softmax, floats(), loss="mse")
    softmax.trainable = False
    with pytest.raises(ValueError, match="needs something to train"):
        distill_outputs(softmax, softmax, floats())


def test_untied_points_learn_the_teachers_attention():
    softmax = teacher(causal=True)
    linear = student_of(
        softmax,
        spectral_prior=keras_kt.EmpiricalPrior(tied=False),
        feature_map=keras_kt.PositiveFeatures("self"),
    )
    x = floats()
    before = keras_kt.conversion.attention_error(linear, x, teacher=softmax)
    history = keras_kt.conversion.distill(linear, softmax, x, steps=60)
    after = keras_kt.conversion.attention_error(linear, x, teacher=softmax)
    assert sum(history[-1].values()) < sum(history[0].values())
    for old, new in zip(before.heads, after.heads, strict=True):
        assert new.output < 0.9 * old.output
    layer = linear.layers[-2]
    frequencies = layer.spectral_prior.stored_frequencies()
    assert not np.allclose(frequencies.offsets, frequencies.key_offsets)


@pytest.mark.parametrize("causal", [False, True])
def test_without_the_far_field_keys_beyond_weigh_nothing(causal):
    """Masked tokens take no place, as in the near field itself."""
    softmax = teacher(causal=causal, masked=True)
    x = floats()
    x[0, 3:5] = x[1, 9:] = 0.0
    linear = student_of(softmax, near_field=3)
    with without_far_field(linear):
        found = np.array(linear(x))
    seen = np.any(x != 0.0, axis=-1)
    count = np.cumsum(seen, axis=-1)
    distance = count[:, :, np.newaxis] - count[:, np.newaxis]
    band = np.abs(distance) < 3
    if causal:
        band &= np.tri(LENGTH, dtype=bool)
    attention, dense = softmax.layers[-2:]
    mask = band & seen[:, np.newaxis]
    expected = dense(attention(x, x, attention_mask=mask))
    np.testing.assert_allclose(found[seen], expected[seen], atol=1e-5)
    assert np.abs(found - linear(x))[seen].max() > 1e-2


def test_without_a_near_field_nothing_is_left():
    softmax = teacher()
    linear = student_of(softmax)
    before = np.array(linear(floats()))
    attention, dense = linear.layers[-2:]
    with without_far_field(linear):
        found = linear(floats())
    bias = attention.output_dense.bias
    expected = tf.zeros((2, LENGTH, 1)) + dense(bias[np.newaxis])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(linear(floats()), before)


def test_errors_know_distances_between_padding():
    """They went by places, the layer itself by visible tokens."""
    softmax = teacher(causal=True, masked=True)
    linear = student_of(softmax, near_field=LENGTH)
    x = floats()
    x[:, 2:8] = 0.0
    linear_of_five = student_of(softmax, near_field=5)
    for model in (linear, linear_of_five):
        found = keras_kt.conversion.attention_error(model, x, teacher=softmax)
        for head in found.heads:
            assert head.matrix < 1e-5 and head.output < 1e-5
