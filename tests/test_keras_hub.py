"""Conversion of KerasHub's models, built from configurations."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt

keras_hub = pytest.importorskip(
    "keras_hub", reason="keras-hub is an optional package: pip install it"
)

SIZES = {
    "vocabulary_size": 31,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 10,
    "intermediate_dim": 14,
    "max_sequence_length": 19,
}
UNBIASED = {"spectral_prior": keras_kt.NormalPrior(use_mean=True, radius="chi")}


def bert():
    backbone = keras_hub.models.BertBackbone(**SIZES, dropout=0.1)
    return louder(keras_hub.models.BertTextClassifier(backbone, num_classes=3))


def gpt2():
    backbone = keras_hub.models.GPT2Backbone(**SIZES, dropout=0.1)
    return louder(keras_hub.models.GPT2CausalLM(backbone))


def louder(model):
    """KerasHub's initial weights are so small that attention is uniform."""
    rng = np.random.default_rng(3)
    for weight in model.weights:
        noise = 0.3 * rng.normal(size=weight.shape)
        weight.assign(weight + noise.astype("float32"))
    return model


def inputs(model, seed=0):
    ids = np.random.default_rng(seed).integers(1, 31, size=(2, 11))
    padding = np.arange(11) < np.array([[11], [7]])
    batch = {"token_ids": ids, "padding_mask": padding}
    if "segment_ids" in model.input:
        batch["segment_ids"] = np.zeros_like(ids)
    return {name: x.astype("int32") for name, x in batch.items()}


@pytest.mark.parametrize("make", [bert, gpt2])
def test_closed_form_is_the_original(make):
    model = make()
    x = inputs(model)
    expected = model(x).numpy()
    converted, report = keras_kt.convert_attention(
        model, dropout=0.1, **UNBIASED
    )
    assert type(converted) is type(model)
    assert len(report.converted) == 2 and not report.kept
    with keras_kt.conversion.closed_form_attention(converted):
        output = converted(x).numpy()
    # The last queries of the second sequence are padding.
    rows = x["padding_mask"] if output.ndim == 3 else np.ones(2)
    rows = rows.astype(bool)
    np.testing.assert_allclose(output[rows], expected[rows], atol=1e-5)
    np.testing.assert_array_equal(model(x), expected)


@pytest.mark.parametrize("make", [bert, gpt2])
def test_padding_and_causality_stay_linear(make):
    """`implementation="linear"` refuses whatever needs the matrix."""
    model = make()
    converted, _ = keras_kt.convert_attention(
        model, dropout=0.0, implementation="linear"
    )
    automatic, _ = keras_kt.convert_attention(
        model, dropout=0.0, implementation="quadratic"
    )
    x = inputs(model)
    np.testing.assert_allclose(converted(x), automatic(x), atol=1e-4)


def test_decoder_sees_no_future():
    converted, _ = keras_kt.convert_attention(gpt2(), dropout=0.0)
    x = inputs(converted)
    before = converted(x)
    x["token_ids"][:, 5:] = 1
    np.testing.assert_allclose(converted(x)[:, :5], before[:, :5], atol=1e-5)


def test_attention_dropout_is_kept_unless_asked():
    with pytest.raises(ValueError, match="drops attention weights"):
        keras_kt.convert_attention(bert())


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [bert, pytest.param(gpt2, marks=pytest.mark.slow)]
)
def test_calibration_distillation_and_fine_tuning_run(make, tmp_path):
    model = make()
    x = inputs(model)
    converted, _ = keras_kt.convert_attention(model, dropout=0.0)
    report = keras_kt.conversion.calibrate(converted, x)
    assert report.after.layers.keys() == report.before.layers.keys()
    assert np.mean([h.matrix for h in report.after.heads]) < np.mean(
        [h.matrix for h in report.before.heads]
    )
    history = keras_kt.conversion.distill(converted, model, x, steps=10)
    assert sum(history[-1].values()) < sum(history[0].values())
    converted.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    y = x["token_ids"] if make is gpt2 else np.array([0, 2])
    losses = [converted.train_on_batch(x, y) for _ in range(5)]
    assert losses[-1] < losses[0]
    path = tmp_path / "model.weights.h5"
    converted.save_weights(path)
    again, _ = keras_kt.convert_attention(model, dropout=0.0)
    again.load_weights(path)
    np.testing.assert_array_equal(again(x), converted(x))
    with pytest.raises(NotImplementedError, match="Use `save_weights`"):
        converted.save(tmp_path / "model.keras")


@pytest.mark.filterwarnings("ignore:a dense mask")
def test_generation_with_a_cache_is_generation_without():
    """Greedy, token by token, against calls on the whole prefix."""
    converted, _ = keras_kt.convert_attention(gpt2(), dropout=0.0)
    converted.compile(sampler="greedy")
    converted.preprocessor = None
    ids = np.random.default_rng(4).integers(1, 31, size=(2, 11)).astype("int32")
    given = np.broadcast_to(np.arange(11) < 4, ids.shape).astype("int32")
    produced = converted.generate(
        {"token_ids": ids, "padding_mask": given}, stop_token_ids=None
    )["token_ids"]
    for end in range(4, 11):
        ids[:, end:] = 0
        logits = converted(
            {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        )
        ids[:, end] = tf.argmax(logits[:, end - 1], axis=-1)
    np.testing.assert_array_equal(produced, ids)


@pytest.mark.parametrize("option", [{"near_field": 3}, {"decay": "gated"}])
def test_a_cache_does_not_go_with_distances(option):
    converted, _ = keras_kt.convert_attention(gpt2(), dropout=0.0, **option)
    layers = [
        layer
        for layer in converted._flatten_layers()
        if isinstance(layer, keras_kt.conversion.CachedKernelizedAttention)
    ]
    x = np.zeros((1, 1, 8), "float32")
    cache = np.zeros((1, 2, 11, 2, 4), "float32")
    with pytest.raises(ValueError, match="cache does not tell how far"):
        layers[0](x, x, cache=cache, cache_update_index=0)
