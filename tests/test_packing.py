"""States in one tensor."""

import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt.ops import packing

RNG = np.random.default_rng(5)


def layers():
    return {
        "far": keras_kt.LinearAttention(6, 5, 7, 3, num_features=14, seed=0),
        "near": keras_kt.LinearAttention(
            6, 5, 7, 3, num_features=14, near_field=4, seed=0
        ),
        "window": keras_kt.LinearAttention(
            6, 5, 7, 3, num_features=14, sliding_window=4, seed=0
        ),
    }


def louder(state):
    return tf.nest.map_structure(
        lambda x: tf.constant(RNG.normal(size=x.shape), tf.float32), state
    )


@pytest.mark.parametrize("name", ["far", "near", "window"])
@pytest.mark.parametrize("batch", [1, 13])
def test_a_state_survives_packing_bit_by_bit(name, batch):
    layer = layers()[name]
    state = louder(layer.initial_state(batch))
    packed = packing.pack(state)
    size = sum(np.prod(x.shape[1:]) for x in tf.nest.flatten(state))
    assert packed.shape == (batch, size)
    assert packing.packed_size(layer.state_shapes) == size
    wider = tf.pad(packed, [(0, 0), (0, 2)], constant_values=9.0)
    for form in (packed, wider):
        again = packing.unpack(form, layer.state_shapes)
        assert type(again) is type(state)
        tf.nest.map_structure(np.testing.assert_array_equal, again, state)


def test_streams_are_rows():
    """So that samplers may gather, repeat and cut them."""
    layer = layers()["near"]
    state = louder(layer.initial_state(3))
    order = [2, 0, 2, 1]
    picked = packing.unpack(
        tf.gather(packing.pack(state), order), layer.state_shapes
    )
    tf.nest.map_structure(
        lambda x, y: np.testing.assert_array_equal(x, tf.gather(y, order)),
        picked,
        state,
    )


def test_packing_has_gradients_and_unknown_batches_under_xla():
    shapes = layers()["near"].state_shapes
    size = packing.packed_size(shapes)

    @tf.function(
        jit_compile=True, input_signature=[tf.TensorSpec((None, size))]
    )
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            again = packing.pack(packing.unpack(x, shapes))
            loss = tf.reduce_sum(again**2)
        return tape.gradient(loss, x)

    x = RNG.normal(size=(3, size)).astype("float32")
    np.testing.assert_allclose(gradient(x), 2 * x)


def test_too_few_columns_are_an_error():
    shapes = layers()["far"].state_shapes
    size = packing.packed_size(shapes)
    with pytest.raises(ValueError, match=rf"must be \(batch, {size}\)"):
        packing.unpack(tf.zeros((2, size - 1)), shapes)
