"""One token of a stream: its projections, and what XLA makes of them."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt.layers.projections import of_step
from tests.helpers.tensors import array


def untouched(layer):
    pass


def with_lora(layer):
    for dense in (layer.query_dense, layer.output_dense):
        dense.enable_lora(2)
        dense.lora_kernel_b.assign(array(dense.lora_kernel_b.shape, 8))


def with_int8(layer):
    layer.key_dense.quantize("int8")
    layer.output_dense.quantize("int8")


class Doubled(keras.layers.EinsumDense):
    def call(self, inputs):
        return 2 * super().call(inputs)


def with_another_layer(layer):
    layer.value_dense.__class__ = Doubled


@pytest.mark.parametrize("batch", (None, 1, 3))
@pytest.mark.parametrize(
    "change",
    (
        untouched,
        with_lora,
        with_another_layer,
        pytest.param(with_int8, marks=pytest.mark.slow),
    ),
)
@pytest.mark.parametrize(
    "kwargs",
    (
        {"use_gate": True, "output_shape": (3, 4)},
        {"use_bias": False, "value_dim": 7, "dtype": "mixed_float16"},
        {"dropout": 0.5, "dtype": "mixed_bfloat16", "decay": "gated"},
        {"activity_regularizer": "l2"},
    ),
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_steps_of_a_token_equal_the_call(kwargs, change, batch):
    x = tf.constant(array((batch or 2, 4, 12), 1))
    layer = keras_kt.KernelizedAttention(2, 6, seed=0, **kwargs)
    layer.build((None, None, 12), (None, None, 12))
    for weight in layer.trainable_weights:
        weight.assign_add(0.1 * array(weight.shape, 7))
    if change is with_int8 and layer.compute_dtype == "float16":
        pytest.skip("not in Keras")
    change(layer)
    token = tf.TensorSpec((batch, 1, 12))
    shapes = [tf.TensorSpec(shape) for shape in layer.state_shapes]

    @tf.function(input_signature=[token, type(layer.state_shapes)(*shapes)])
    def step(token, state):
        return layer.step(token, state)

    state, outputs = layer.initial_state(x.shape[0]), []
    for t in range(x.shape[1]):
        output, state = step(x[:, t : t + 1], state)
        outputs.append(output)
    expected = layer(x, x, use_causal_mask=True)
    assert outputs[0].dtype == expected.dtype
    is_coarse = layer.compute_dtype != "float32" or change is with_int8
    np.testing.assert_allclose(
        tf.cast(tf.concat(outputs, 1), tf.float32),
        tf.cast(expected, tf.float32),
        atol=5e-2 if is_coarse else 1e-5,
    )


@pytest.mark.parametrize("batch", (1, 2))
def test_xla_keeps_the_products_of_a_step(batch):
    """Its CPU compiler fuses a row's product with what reshapes the weight,
    and runs that as a loop, twenty times as slow."""
    layer = keras_kt.KernelizedAttention(4, 16, use_gate=True)
    x = tf.constant(array((batch, 1, 64)))
    layer.build(x.shape, x.shape)

    @tf.function(jit_compile=True)
    def stream(x):
        def step(x, state):
            y, state = layer.step(x, state)
            return tf.tanh(y), state

        state = layer.initial_state(batch)
        return tf.while_loop(
            lambda *_: True, step, (x, state), maximum_iterations=9
        )

    program = stream.experimental_get_compiler_ir(x)(stage="optimized_hlo")
    assert not fused_products(program), fused_products(program)

    @tf.function(jit_compile=True)
    def einsum(x):
        return tf.while_loop(
            lambda _: True,
            lambda x: [layer.output_dense(layer.query_dense(x))],
            [x],
            maximum_iterations=9,
        )

    if batch == 1:  # What would be found: else the test could not fail.
        program = einsum.experimental_get_compiler_ir(x)(stage="optimized_hlo")
        assert fused_products(program)


def fused_products(program):
    """Products of rows with weights that stand in a fusion."""
    parts = re.findall(r"^%?fused_computation\S* .*?^}", program, re.M | re.S)
    return [
        line.strip()
        for part in parts
        for line in part.splitlines()
        if re.search(r" dot\(", line)
    ]


@pytest.mark.parametrize(
    "equation, output_shape",
    (
        ("btd,ndh->btnh", (None, 5, 5)),  # Gemma's
        ("btd,dnh->btnh", (None, 5, 5)),
        ("btnh,nhd->btd", (None, 5)),
        ("btnh,hnd->btd", (None, 5)),
        ("btd,dh->tbh", (1, 5)),
        ("...d,dh->...h", (5,)),
    ),
)
def test_projections_of_any_equation_equal_the_layer(equation, output_shape):
    rank = 4 if equation.startswith("btnh") else 3
    x = tf.constant(array((1, 1, 5, 5)[:rank], 3))
    dense = keras.layers.EinsumDense(equation, output_shape, activation="tanh")
    expected = dense(x)
    np.testing.assert_allclose(of_step(dense, x), expected, atol=1e-6)
