"""What every public layer promises, as one check."""

import keras
import numpy as np
import pytest
import tensorflow as tf


def exhaustive(*case, id=None):
    """A case that combines what others cover one by one: before a release."""
    marks = pytest.mark.slow, pytest.mark.exhaustive
    return pytest.param(*case, marks=marks, id=id)


def one_quick(cases):
    """Cases of a contract: the first in the quick suite, the rest slow.

    A contract compiles, fits and exports: 10 s and more.
    """
    first, *rest = cases
    slow = [case if isinstance(case, tuple) else (case,) for case in rest]
    return [first, *(pytest.param(*x, marks=pytest.mark.slow) for x in slow)]


def one_in(every, cases):
    """Cases, one in so many in the quick suite, the rest slow."""
    params = []
    for place, case in enumerate(cases):
        if not hasattr(case, "marks"):
            case = pytest.param(*(case if isinstance(case, tuple) else [case]))
        marks = [*case.marks, *([pytest.mark.slow] if place % every else [])]
        params.append(pytest.param(*case.values, id=case.id, marks=marks))
    return params


def layer_contract(
    make,
    shapes,
    tmp_path,
    *,
    call=None,
    exact_jit=1e-5,
    half=0.1,
    jit_fit=False,
    known=1,
):
    """Checks a layer as Keras users use layers.

    Args:
        make: function that makes the layer, unbuilt.
        shapes: shapes of the call's tensors, batch first.
        tmp_path: folder for files.
        call: keyword arguments of every call.
        exact_jit: tolerance between XLA, graphs and eager.
        half: tolerance between half precision and float32.
        jit_fit: whether to compile the training step with XLA too.
        known: how many of the last axes a model's inputs have to know.
    """
    call = call or {}
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype("float32") for shape in shapes]
    layer = make()
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert keras.saving.serialize_keras_object(again) == config
    assert dir(again) == dir(layer)

    # Symbolic with dynamic batch and length, then eager.
    inputs = [
        keras.Input(
            (*[None] * (len(s) - 1 - known), *s[-known:]), dtype="float32"
        )
        for s in shapes
    ]
    model = keras.Model(inputs, layer(*inputs, **call))
    eager = layer(*arrays, **call)
    assert model.output.shape[-1] == eager.shape[-1]
    np.testing.assert_allclose(model(arrays), eager, atol=exact_jit)
    static = keras.Model(
        fixed := [keras.Input(batch_shape=s) for s in shapes],
        layer(*fixed, **call),
    )
    assert tuple(static.output.shape) == tuple(eager.shape)

    compiled = tf.function(model, jit_compile=True)(arrays)
    np.testing.assert_allclose(compiled, eager, atol=exact_jit)

    model.compile("adam", "mse", jit_compile=jit_fit)
    # Else Keras traces the step twice; other tests leave it to `fit`.
    model.optimizer.build(model.trainable_variables)
    before = [w.numpy() for w in layer.trainable_weights]
    model.fit(arrays, np.ones_like(eager), batch_size=1, verbose=0)
    after = [w.numpy() for w in layer.trainable_weights]
    assert all(np.isfinite(w).all() for w in after)
    moved = [
        np.abs(a - b).max() > 0 for a, b in zip(before, after, strict=True)
    ]
    assert sum(moved) >= len(moved) - 1  # a key bias may cancel

    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    expected = model.predict(arrays, verbose=0)
    np.testing.assert_array_equal(loaded.predict(arrays, verbose=0), expected)

    model.export(tmp_path / "saved_model", verbose=False)
    served = tf.saved_model.load(tmp_path / "saved_model")
    tensors = [tf.constant(a) for a in arrays]
    # The same graph, of dynamic shapes, is equal bit for bit; static shapes cut
    # into other blocks, which round differently.
    spec = [tf.TensorSpec(x.shape, "float32") for x in inputs]
    dynamic = tf.function(model, input_signature=[spec])
    np.testing.assert_array_equal(served.serve(tensors), dynamic(tensors))
    np.testing.assert_allclose(dynamic(tensors), model(arrays), atol=exact_jit)

    for policy in ("mixed_bfloat16", "mixed_float16"):
        mixed = make()
        mixed.dtype_policy = policy
        half_arrays = [tf.cast(a, mixed.compute_dtype) for a in arrays]
        half_output = mixed(*half_arrays, **call)
        assert half_output.dtype == mixed.compute_dtype
        assert np.isfinite(tf.cast(half_output, "float32")).all()
        for mine, weight in zip(mixed.weights, layer.weights, strict=True):
            mine.assign(weight)
        half_output = mixed(*half_arrays, **call)
        np.testing.assert_allclose(
            tf.cast(half_output, "float32"),
            layer(*arrays, **call),
            atol=half,
        )
