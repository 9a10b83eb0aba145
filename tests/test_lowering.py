"""What TensorFlow lowers for XLA: precision of products, no costly ops."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt import numerics

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


@pytest.mark.parametrize(
    "feature_map",
    ["positive", pytest.param("trigonometric", marks=pytest.mark.slow)],
)
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


def test_projection_survives_rounded_products(monkeypatch):
    """The layer's own doing: nothing asks TensorFlow for full precision."""
    monkeypatch.setattr(numerics, "_rounds_products", lambda: True)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 3, 11, 64)).astype("float32")
    projection = generator.normal(size=(3, 64, 17)).astype("float32")
    exact = x.astype("float64") @ projection.astype("float64")
    matmul = tf.matmul

    def rounded(a, b):
        # What a TPU does: bfloat16 operands, float32 sums.
        return matmul(
            *(tf.cast(tf.cast(x, "bfloat16"), x.dtype) for x in (a, b))
        )

    monkeypatch.setattr(tf, "matmul", rounded)
    x, projection = tf.constant(x), tf.constant(projection)
    with tf.GradientTape() as tape:
        tape.watch([x, projection])
        result = numerics.precise_product(x, projection)
        loss = tf.reduce_sum(tf.square(result)) / 2
    # 64 terms of size 1 whose parts err by 2**-17 and 2**-16.
    assert np.abs(rounded(x, projection) - exact).max() > 1e-2
    np.testing.assert_allclose(result, exact, atol=2e-4)
    gradients = tape.gradient(loss, [x, projection])
    monkeypatch.undo()
    with tf.GradientTape() as tape:
        tape.watch([x, projection])
        result = numerics.precise_product(x, projection)
        loss = tf.reduce_sum(tf.square(result)) / 2
    expected = tape.gradient(loss, [x, projection])
    for actual, wanted in zip(gradients, expected, strict=True):
        error = np.abs(actual - wanted).max() / np.abs(wanted).max()
        assert error < 2**-7


# Queries and keys are projected once, with positive features once more in the
# exact form that stands by. A mixture's exponents take a product each too, and
# a near field one for its logits.
@pytest.mark.parametrize(
    "options, split",
    [
        ({"feature_map": "positive"}, 4),
        *(
            pytest.param(options, split, marks=pytest.mark.slow)
            for options, split in (
                ({"feature_map": "trigonometric"}, 2),
                ({"spectral_prior": "mixture"}, 8),
                ({"near_field": 3}, 5),
                ({"sliding_window": 3}, 1),
            )
        ),
    ],
)
def test_split_products_are_lowered(options, split, monkeypatch):
    """XLA keeps all three products, and the layer's outputs its values."""
    x = keras.random.normal((2, 50, WIDTH), seed=0)
    layer = keras_kt.KernelizedAttention(3, 4, **options)
    plain = layer(x, x, use_causal_mask=True)

    def products():
        function = tf.function(
            lambda x: layer(x, x, use_causal_mask=True),
            jit_compile=True,
            autograph=False,
        )
        # The part left out, enlarged by signed normalizers.
        np.testing.assert_allclose(function(x), plain, atol=5e-4)
        text = function.experimental_get_compiler_ir(x)("optimized_hlo")
        return len(re.findall(r" dot\(|custom-call\(", text))

    before = products()
    monkeypatch.setattr(numerics, "_rounds_products", lambda: True)
    # Three products instead of one.
    assert products() == before + 2 * split


@pytest.mark.parametrize(
    "feature_map, is_causal",
    [
        # Its counts are the running sums that there are.
        ("trigonometric", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("trigonometric", False),
                ("positive", True),
                ("positive", False),
            )
        ),
    ],
)
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
