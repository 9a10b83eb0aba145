"""Functions that are traced once in a graph."""

import gc
import weakref
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt.shared_traces import shared_trace


class One(NamedTuple):
    size: object


class Other(NamedTuple):
    size: object


def counting(effect=lambda tensors: None):
    """A function whose calls are counted, and the list of their arguments."""
    calls = []

    def double(fixed, tensors):
        calls.append(fixed)
        effect(tensors)
        x, rest = tensors
        return [2.0 * x, [tf.reduce_sum(x)] if rest is None else []]

    return double, calls


def test_equal_calls_are_traced_once_in_loops_and_branches_too():
    double, calls = counting()

    def call(x):
        (twice, (total,)) = shared_trace(double, One(1), [x, None])
        return twice + total

    @tf.function(autograph=False)
    def whole(x):
        y = call(x)
        y = tf.while_loop(
            lambda i, y: i < 3, lambda i, y: (i + 1, call(y)), (0, y)
        )[1]
        return tf.cond(y[0] > 0.0, lambda: call(y), lambda: y)

    x = np.float32([1.0, 2.0])
    expected = x
    for _ in range(5):
        expected = 2.0 * expected + np.sum(expected)
    np.testing.assert_allclose(whole(x), expected)
    assert len(calls) == 1


def test_static_shapes_are_those_of_the_function():
    @tf.function(input_signature=[tf.TensorSpec((None, 3))])
    def whole(x):
        twice, (total,) = shared_trace(counting()[0], 1, [x, None])
        assert twice.shape.as_list() == [None, 3] and total.shape == ()
        return twice

    assert whole(np.ones((2, 3), "float32")).shape == (2, 3)


@pytest.mark.parametrize(
    "fixed",
    [(One(1), Other(1)), (1, True), (1, 1.0), ([1], (1,)), (1, 2)],
    ids=str,
)
def test_what_differs_is_traced_apart(fixed):
    double, calls = counting()

    @tf.function
    def whole(x):
        for one in fixed:
            shared_trace(double, one, [x, None])
        return x

    whole(tf.ones(2))
    assert calls == list(fixed)
    assert list(map(type, calls)) == list(map(type, fixed))


def test_shapes_types_and_what_is_missing_tell_calls_apart():
    double, calls = counting()

    @tf.function
    def whole(x):
        for tensors in (
            [x, None],
            [x, x],
            [x[:1], None],
            [tf.cast(x, tf.float64), None],
            [x, None],
        ):
            shared_trace(double, 1, tensors)
        return x

    whole(tf.ones(2))
    assert len(calls) == 4


class Tables(NamedTuple):
    rows: dict


@pytest.mark.parametrize("fixed", [{"a": 1}, Tables({"a": 1})], ids=str)
def test_what_has_no_hash_is_called_as_it_is(fixed):
    double, calls = counting()

    @tf.function
    def whole(x):
        once, _ = shared_trace(double, fixed, [x, None])
        return shared_trace(double, fixed, [once, None])[0]

    np.testing.assert_array_equal(whole(tf.ones(2)), [4.0, 4.0])
    assert len(calls) == 2


def test_a_function_with_effects_keeps_all_of_them():
    count = tf.Variable(0.0)
    double, _ = counting(lambda tensors: count.assign_add(1.0))

    @tf.function
    def whole(x):
        for _ in range(3):
            x = shared_trace(double, 1, [x, None])[0]
        return x

    np.testing.assert_array_equal(whole(tf.ones(2)), [8.0, 8.0])
    # The trace that was dropped never ran.
    assert count.numpy() == 3.0


def test_a_function_that_needs_other_tensors_gets_them():
    @tf.function
    def whole(x):
        results = []
        for factor in (x, 3.0 * x):

            def scaled(_, tensors, factor=factor):
                return [tensors[0] * factor]

            results += shared_trace(scaled, 1, [x])
        return results

    one, three = whole(tf.constant([1.0, 2.0]))
    np.testing.assert_array_equal(one, [1.0, 4.0])
    np.testing.assert_array_equal(three, [3.0, 12.0])


def test_eager_calls_are_direct():
    double, calls = counting()
    for _ in range(2):
        twice, _ = shared_trace(double, 1, [tf.ones(2), None])
    np.testing.assert_array_equal(twice, [2.0, 2.0])
    assert len(calls) == 2


def test_nothing_outlives_the_graph():
    double, calls = counting()
    dead = []
    for _ in range(2):

        @tf.function
        def whole(x):
            return shared_trace(double, 1, [x, None])[0]

        whole(tf.ones(2))
        dead.append(weakref.ref(whole.get_concrete_function(tf.ones(2)).graph))
        del whole
    gc.collect()
    assert [graph() for graph in dead] == [None, None]
    assert len(calls) == 2


def test_a_trace_is_of_no_device():
    double, calls = counting()

    @tf.function
    def whole(x):
        results = []
        for device in "CPU:0", "CPU:1":
            with tf.device(device):
                results.append(shared_trace(double, 1, [x, None])[0])
        return results

    graph = whole.get_concrete_function(tf.TensorSpec((2,))).graph
    called = [op for op in graph.get_operations() if "Partitioned" in op.type]
    assert [op.device[-5:] for op in called] == ["CPU:0", "CPU:1"]
    (function,) = graph.as_graph_def().library.function
    assert {node.device for node in function.node_def} == {""}


LAYERS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_map": "trigonometric"},
        pytest.param({"decay": "constant"}, marks=pytest.mark.slow),
        pytest.param({"near_field": 8}, marks=pytest.mark.slow),
        {"sliding_window": 8},
    ],
    ids=str,
)


def gradients_of(layers, **call):
    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for layer in layers:
                y += layer(y, y, **call)
            loss = tf.reduce_sum(tf.sin(y))
        weights = [w for layer in layers for w in layer.trainable_weights]
        return tape.gradient(loss, [x, *weights])

    return gradients


@LAYERS
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_many_blocks_are_those_of_eager_calls(options, causal):
    keras.utils.set_random_seed(0)
    layers = [keras_kt.KernelizedAttention(2, 8, **options) for _ in range(2)]
    # Blocks of a band are shorter.
    length = 200 if {"near_field", "sliding_window"} & set(options) else 2048
    x = tf.random.stateless_normal((2, length, 16), (1, 2))
    gradients = gradients_of(layers, use_causal_mask=causal)
    expected = gradients(x)
    scale = max(np.max(np.abs(g)) for g in expected)
    for got, one in zip(tf.function(gradients)(x), expected, strict=True):
        np.testing.assert_allclose(got, one, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [64, 2048], ids=["matrix", "linear"])
def test_gradients_of_gradients_are_those_of_eager_calls(length, causal):
    keras.utils.set_random_seed(0)
    gradients = gradients_of(
        [keras_kt.KernelizedAttention(2, 4)], use_causal_mask=causal
    )

    def penalty(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(tf.square(gradients(x)[0]))
        return tape.gradient(total, x)

    x = tf.random.stateless_normal((2, length, 8), (1, 2))
    expected = penalty(x)
    scale = np.max(np.abs(expected))
    assert scale > 0.0
    np.testing.assert_allclose(
        tf.function(penalty)(x), expected, rtol=0, atol=1e-5 * scale
    )


@LAYERS
def test_layers_of_one_kind_share_gradients_of_blocks(options):
    """A further layer has no such gradient of its own."""

    def operations(count):
        layers = [
            keras_kt.KernelizedAttention(2, 8, **options) for _ in range(count)
        ]
        shape = (2, 4096, 16)
        for layer in layers:
            layer.build(shape, shape)
        gradients = tf.function(gradients_of(layers, use_causal_mask=True))
        traced = gradients.get_concrete_function(tf.TensorSpec(shape))
        graph = traced.graph.as_graph_def()
        return len(graph.node) + sum(
            len(function.node_def) for function in graph.library.function
        )

    one, two = map(operations, (1, 2))
    assert two - one < 0.75 * one
