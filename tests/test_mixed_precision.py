"""Training in half precision: as accurate as in float32, and finite."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt

LENGTH, SYMBOLS, WIDTH = 23, 5, 16
POLICIES = ("mixed_bfloat16", "mixed_float16")


@pytest.fixture(autouse=True)
def _policy():
    yield
    keras.config.set_dtype_policy("float32")


def marked_symbols(examples, seed):
    """Sequences of symbols, labelled with the only one that is marked."""
    rng = np.random.default_rng(seed)
    symbols = rng.integers(SYMBOLS, size=(examples, LENGTH))
    marked = rng.integers(LENGTH, size=examples)
    mark = np.eye(LENGTH)[marked][..., np.newaxis]
    x = np.concatenate([np.eye(SYMBOLS)[symbols], mark], axis=-1)
    return x.astype("float32"), symbols[np.arange(examples), marked]


def accuracy(policy):
    """Test accuracy after training under a policy."""
    keras.utils.set_random_seed(7)
    keras.config.set_dtype_policy(policy)
    x = keras.Input((LENGTH, SYMBOLS + 1))
    y = keras.layers.Dense(WIDTH)(x)
    normed = keras.layers.LayerNormalization()(y)
    y += keras_kt.KernelizedAttention(2, 8, seed=7)(normed, normed)
    y = keras.layers.Dense(WIDTH, activation="gelu")(y)
    y = keras.layers.GlobalAveragePooling1D()(y)
    model = keras.Model(x, keras.layers.Dense(SYMBOLS, dtype="float32")(y))
    optimizer = keras.optimizers.Adam(1e-2)
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    model.fit(*marked_symbols(2048, seed=0), epochs=8, verbose=0)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    return model.evaluate(*marked_symbols(512, seed=1), verbose=0)[1]


@pytest.mark.slow
def test_half_precision_trains_to_the_accuracy_of_float32():
    expected = accuracy("float32")
    # Far from chance, which is 1 / SYMBOLS.
    assert expected > 0.9
    for policy in POLICIES:
        assert abs(accuracy(policy) - expected) < 0.05, policy


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_long_sequences_stay_finite(policy):
    keras.config.set_dtype_policy(policy)
    layer = keras_kt.KernelizedAttention(2, 8, seed=0)
    x = keras.random.normal((1, 2**17, WIDTH), seed=0)
    x = tf.cast(x, layer.compute_dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        output = layer(x, x, use_causal_mask=True)
        # A mean, since a sum of this length overflows float16 in itself.
        # Scaled as a loss is, since shares of a mean this long underflow.
        loss = 2.0**15 * tf.reduce_mean(tf.square(tf.cast(output, tf.float32)))
    gradients = tape.gradient(loss, [x, *layer.trainable_variables])
    for tensor in (output, *gradients):
        assert np.isfinite(tf.cast(tensor, tf.float32)).all()
    assert np.abs(tf.cast(gradients[0], tf.float32)).max() > 0
