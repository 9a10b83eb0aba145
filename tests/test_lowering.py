"""What TensorFlow lowers for XLA: precision of products, no costly ops."""

import re

import keras
import pytest
import tensorflow as tf

import keras_kt

# Long enough for several causal blocks.
LENGTH, WIDTH = 4096, 12


@pytest.fixture
def full_precision():
    tf.config.experimental.enable_tensor_float_32_execution(False)
    yield
    tf.config.experimental.enable_tensor_float_32_execution(True)


def training_step(feature_map, is_causal):
    """Forward and backward of a masked layer that redraws."""
    layer = keras_kt.KernelizedAttention(
        3,
        4,
        spectral_prior=keras_kt.NormalPrior(radius="chi"),
        feature_map=feature_map,
        redraw="step",
        seed=0,
    )
    layer.build((1, LENGTH, WIDTH), (1, LENGTH, WIDTH))

    @tf.function(
        jit_compile=True,
        autograph=False,
        input_signature=[
            tf.TensorSpec((1, LENGTH, WIDTH)),
            tf.TensorSpec((1, LENGTH), "bool"),
        ],
    )
    def step(x, mask):
        with tf.GradientTape() as tape:
            output = layer(
                x,
                x,
                value_mask=mask,
                training=True,
                use_causal_mask=is_causal,
            )
            loss = tf.reduce_sum(tf.square(output))
        return tape.gradient(loss, layer.trainable_variables)

    return step


def lower(step):
    return step.experimental_get_compiler_ir(*step.input_signature)("hlo")


@pytest.mark.parametrize("feature_map", ["positive", "trigonometric"])
def test_full_precision_reaches_every_product(feature_map, full_precision):
    """On a TPU, float32 products are bfloat16 passes unless asked."""
    x = keras.random.normal((2, 50, WIDTH), seed=0)
    layer = keras_kt.KernelizedAttention(3, 4, feature_map=feature_map)
    layer(x, x)

    def products():
        function = tf.function(
            lambda x: layer(x, x), jit_compile=True, autograph=False
        )
        text = function.experimental_get_compiler_ir(x)("hlo")
        return re.findall(r"^.* dot\(.*$", text, re.MULTILINE)

    asked = "operand_precision={highest,highest}"
    # Four projections, frequencies of queries and keys, sums and read-out.
    assert len(products()) >= 8
    assert all(asked in line for line in products())
    tf.config.experimental.enable_tensor_float_32_execution(True)
    assert not any(asked in line for line in products())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("feature_map", ["positive", "trigonometric"])
def test_no_running_sum_is_as_long_as_the_sequence(feature_map, is_causal):
    """XLA sums a running sum anew at every position: O(length²)."""
    text = lower(training_step(feature_map, is_causal))
    windows = re.findall(r"window=\{size=([\dx]+)", text)
    longest = max([int(n) for w in windows for n in w.split("x")], default=0)
    # Trigonometric causal counts are summed over chunks, some of them padding,
    # then within them.
    assert longest <= LENGTH // 32


def test_training_draws_without_gamma_or_stateful_ops():
    """Gamma draws have no TPU kernel, stateful ones no fixed seed."""
    step = training_step("positive", True)
    graph = step.get_concrete_function().graph.as_graph_def()
    functions = graph.library.function
    ops = {node.op for node in graph.node}
    ops |= {node.op for f in functions for node in f.node_def}
    drawing = {op for op in ops if "Random" in op or "Gamma" in op}
    assert drawing == {"StatelessRandomUniformFullIntV2"}
