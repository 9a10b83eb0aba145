"""Conversion of KerasHub's families whose attention is their own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt.conversion.find import kernelized_layers

keras_hub = pytest.importorskip(
    "keras_hub", reason="keras-hub is an optional package: pip install it"
)
models = keras_hub.models

LENGTH = 11
# Two query heads for each key-value head.
GROUPED = {
    "vocabulary_size": 31,
    "num_layers": 1,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 24,
    "intermediate_dim": 14,
}
PLAIN = {
    "vocabulary_size": 31,
    "num_layers": 1,
    "num_heads": 3,
    "hidden_dim": 24,
    "intermediate_dim": 14,
}
SHORT = {**PLAIN, "max_sequence_length": 19, "dropout": 0.0}
EXPERTS = {"num_experts": 3, "top_k": 2, "moe_intermediate_dim": 6}
UNBIASED = {"spectral_prior": keras_kt.NormalPrior(use_mean=True, radius="chi")}


def gemma3():
    """Five layers with a window, and one without; a scale of its own."""
    backbone = models.Gemma3Backbone(
        **{**GROUPED, "num_layers": 6},
        image_size=16,
        head_dim=10,
        query_head_dim_normalize=False,
        use_sliding_window_attention=True,
        sliding_window_size=3,
    )
    return models.Gemma3CausalLM(preprocessor=None, backbone=backbone)


FAMILIES = {
    "llama": lambda: models.LlamaCausalLM(
        models.LlamaBackbone(**{**GROUPED, "num_layers": 2})
    ),
    "gemma": lambda: models.GemmaCausalLM(
        models.GemmaBackbone(**GROUPED, head_dim=10)
    ),
    "bloom": lambda: models.BloomCausalLM(models.BloomBackbone(**PLAIN)),
    "llama3": lambda: models.Llama3CausalLM(
        models.Llama3Backbone(
            **GROUPED,
            rope_max_wavelength=500_000,
            rope_frequency_adjustment_factor=8.0,
            rope_low_freq_factor=1.0,
            rope_high_freq_factor=4.0,
            rope_pretraining_sequence_length=8192,
        )
    ),
    "mistral": lambda: models.MistralCausalLM(
        models.MistralBackbone(**GROUPED, sliding_window=None)
    ),
    "mistral_window": lambda: models.MistralCausalLM(
        models.MistralBackbone(**GROUPED, sliding_window=3)
    ),
    "qwen_window": lambda: models.QwenCausalLM(
        models.QwenBackbone(
            **GROUPED, use_sliding_window_attention=True, sliding_window_size=3
        )
    ),
    "mixtral": lambda: models.MixtralCausalLM(
        models.MixtralBackbone(**GROUPED, num_experts=3, sliding_window=None)
    ),
    "gemma3": gemma3,
    "qwen": lambda: models.QwenCausalLM(models.QwenBackbone(**GROUPED)),
    "qwen_moe": lambda: models.QwenMoeCausalLM(
        models.QwenMoeBackbone(
            **GROUPED, **EXPERTS, shared_expert_intermediate_dim=5
        )
    ),
    "qwen3": lambda: models.Qwen3CausalLM(
        models.Qwen3Backbone(**GROUPED, head_dim=10, sliding_window_size=None)
    ),
    "qwen3_moe": lambda: models.Qwen3MoeCausalLM(
        models.Qwen3MoeBackbone(
            **GROUPED,
            **EXPERTS,
            head_dim=10,
            norm_top_k_prob=True,
            sliding_window_size=None,
        )
    ),
    "phi3": lambda: models.Phi3CausalLM(
        models.Phi3Backbone(
            **GROUPED,
            rope_scaling_type="su",
            rope_scaling_short_factor=[1.1, 1.2, 1.3],
            rope_scaling_long_factor=[2.0, 3.0, 4.0],
        )
    ),
    "gpt_neo_x": lambda: models.GPTNeoXCausalLM(
        models.GPTNeoXBackbone(**PLAIN, rotary_percentage=0.5)
    ),
    "falcon": lambda: models.FalconCausalLM(
        models.FalconBackbone(
            vocabulary_size=31,
            num_layers=2,
            num_attention_heads=3,
            hidden_dim=24,
            intermediate_dim=14,
        )
    ),
    "smollm3": lambda: models.SmolLM3CausalLM(
        models.SmolLM3Backbone(
            vocabulary_size=31,
            hidden_dim=24,
            intermediate_dim=14,
            num_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=False,
            attention_dropout=0.0,
            rope_layer_enabled_list=[True, False],
            layer_types=["full_attention"] * 2,
            mlp_bias=False,
            layer_norm_epsilon=1e-6,
            max_position_embeddings=32,
            rope_theta=10_000.0,
            partial_rotary_factor=1.0,
        )
    ),
    "opt": lambda: models.OPTCausalLM(models.OPTBackbone(**SHORT)),
    "roberta": lambda: models.RobertaBackbone(**SHORT),
    "distil_bert": lambda: models.DistilBertBackbone(**SHORT),
    "albert": lambda: models.AlbertBackbone(**SHORT, embedding_dim=7),
    "electra": lambda: models.ElectraBackbone(
        **{k: v for k, v in SHORT.items() if k != "vocabulary_size"},
        vocab_size=31,
        embedding_dim=7,
    ),
    "vit": lambda: models.ViTBackbone((12, 12, 3), 4, 2, 3, 24, 14),
    "whisper": lambda: models.WhisperBackbone(
        **PLAIN,
        num_mels=5,
        max_encoder_sequence_length=2 * LENGTH,
        max_decoder_sequence_length=LENGTH,
    ),
}
FAST = ("llama", "bloom", "mistral_window")
SEAMS = ("llama", "gemma", "bloom", "falcon", "gpt_neo_x", "qwen3")


def families(names=FAMILIES):
    return [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in names
    ]


def louder(model):
    """KerasHub's initial weights are so small that attention is uniform."""
    rng = np.random.default_rng(3)
    for weight in model.weights:
        if "float" in weight.dtype:
            noise = 0.3 * rng.normal(size=weight.shape)
            weight.assign(weight + noise.astype("float32"))
    return model


def made(name):
    return louder(FAMILIES[name]())


def inputs(model, length=LENGTH):
    """Random inputs, the second sequence padded, and which rows are real."""
    rng = np.random.default_rng(0)
    if not isinstance(model.input, dict):
        shape = (2, *model.input.shape[1:])
        return rng.normal(size=shape).astype("float32"), np.ones(2, bool)
    padding = np.arange(length) < np.array([[length], [length - 4]])
    batch = {}
    for name in model.input:
        if "padding" in name:
            batch[name] = padding.astype("int32")
        elif "features" in name:
            batch[name] = rng.normal(size=(2, 2 * length, 5)).astype("float32")
        elif "segment" in name:
            batch[name] = np.zeros((2, length), "int32")
        else:
            ids = rng.integers(2, 31, size=(2, length))
            batch[name] = ids.astype("int32")
    return batch, padding


def real_rows(outputs, rows):
    outputs = keras.tree.flatten(outputs)
    # Pooled outputs have no rows, and images no padding.
    return [
        np.asarray(x)[rows] if x.shape[:2] == rows.shape else np.asarray(x)
        for x in outputs
    ]


def assert_close(outputs, expected, rows, **kwargs):
    pairs = zip(
        real_rows(outputs, rows), real_rows(expected, rows), strict=True
    )
    for output, other in pairs:
        np.testing.assert_allclose(output, other, **kwargs)


@pytest.mark.parametrize("name", families())
def test_closed_form_is_the_original(name):
    model = made(name)
    x, rows = inputs(model)
    expected = model(x)
    before = [weight.numpy() for weight in model.weights]
    converted, report = keras_kt.convert_attention(
        model, implementation="linear", **UNBIASED
    )
    assert type(converted) is type(model)
    assert report.converted and not report.kept
    with keras_kt.conversion.closed_form_attention(converted):
        output = converted(x)
    assert_close(output, expected, rows, atol=1e-5)
    if "window" in name:
        assert_close(converted(x), expected, rows, atol=1e-4)
        assert "in closed form inside its window" in str(report)
        return
    # The test tells: features of few frequencies are not exact.
    assert not np.allclose(
        real_rows(converted(x), rows)[0],
        real_rows(expected, rows)[0],
        atol=1e-3,
    )
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert_close(model(x), expected, rows, rtol=0)


@pytest.mark.parametrize("name", families(SEAMS))
def test_a_near_field_of_the_whole_length_is_the_original(name):
    """The linear route itself, of rotated, grouped, scaled, fading heads."""
    model = made(name)
    x, rows = inputs(model)
    converted, _ = keras_kt.convert_attention(
        model, implementation="linear", near_field=LENGTH
    )
    assert_close(converted(x), model(x), rows, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEAMS)
def test_linear_is_quadratic_and_forms_no_matrix(name):
    model = made(name)
    length = 131
    x, rows = inputs(model, length)
    linear, quadratic = (
        keras_kt.convert_attention(model, implementation=route)[0]
        for route in ("linear", "quadratic")
    )
    assert_close(linear(x), quadratic(x), rows, atol=1e-4)
    assert not squares(linear, x, length)
    assert squares(model, x, length)


def squares(model, x, length):
    """Tensors of a traced model with two axes of the sequence's length."""
    graph = tf.function(model).get_concrete_function(x).graph
    return [
        tensor.name
        for op in graph.get_operations()
        for tensor in op.outputs
        if tensor.shape.rank and list(tensor.shape).count(length) > 1
    ]


@pytest.mark.parametrize("name", families(SEAMS[1:]))
def test_weights_are_saved_and_loaded(name, tmp_path):
    model = made(name)
    x, _ = inputs(model)
    converted, _ = keras_kt.convert_attention(model, seed=1)
    converted.save_weights(tmp_path / "model.weights.h5")
    again, _ = keras_kt.convert_attention(FAMILIES[name](), seed=2)
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(again(x), converted(x))
    with pytest.raises(NotImplementedError, match="Use `save_weights`"):
        converted.save(tmp_path / "model.keras")


def test_state_and_features_are_of_key_value_heads():
    converted, report = keras_kt.convert_attention(made("llama"))
    for layer in kernelized_layers(converted).values():
        assert (layer.num_heads, layer.num_key_value_heads) == (4, 2)
        assert layer.spectral_prior.mean.shape[0] == 2
        assert all(shape[1] == 2 for shape in layer.state_shapes)
    assert kernelized_layers(converted).keys() == report.converted.keys()


def test_a_converted_model_is_not_converted_again():
    converted, _ = keras_kt.convert_attention(made("llama"))
    with pytest.raises(ValueError, match="is linear already"):
        keras_kt.convert_attention(converted)


@pytest.mark.parametrize(
    "make, reason",
    [
        (
            lambda: models.GemmaBackbone(
                **GROUPED, head_dim=10, attention_logit_soft_cap=50.0
            ),
            "caps its logits",
        ),
        pytest.param(
            lambda: models.T5Backbone(**PLAIN, dropout=0.0),
            "adds a learned bias",
            marks=[
                pytest.mark.slow,
                pytest.mark.filterwarnings("ignore:Layer.*does not support"),
            ],
        ),
        pytest.param(
            lambda: models.GptOssBackbone(**GROUPED, num_experts=3),
            "has sinks",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: models.DebertaV3Backbone(**SHORT, bucket_size=4),
            "is not a MultiHeadAttention",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_no_softmax_is_named(make, reason):
    with pytest.raises(ValueError, match=reason):
        keras_kt.convert_attention(make())


class OwnAttention(keras.layers.Layer):
    """An attention of nobody's family, with the seam."""

    def __init__(self, flaw=None, **kwargs):
        super().__init__(**kwargs)
        self.flaw = flaw

    def build(self, shape):
        self.dense = keras.layers.EinsumDense(
            "btw,wnhd->btnhd", (None, 3, 2, 4)
        )
        self.dense.build(shape)
        self.out = keras.layers.EinsumDense("bthd,hdw->btw", (None, shape[-1]))
        self.out.build((None, None, 2, 4))
        self.built = True

    def call(self, x, attention_mask=None):
        query, key, value = keras.ops.unstack(self.dense(x), axis=2)
        return self.out(
            self._compute_attention(
                query, key, value, attention_mask=attention_mask
            )
        )

    def _compute_attention(self, q, k, v, attention_mask=None):
        logits = 0.3 * keras.ops.einsum("bthd,bshd->bhts", q, k)
        if self.flaw == "bias":
            logits += keras.ops.arange(logits.shape[-1], dtype="float32")
        if attention_mask is not None:
            mask = keras.ops.cast(attention_mask[:, None], "bool")
            logits = keras.ops.where(mask, logits, -1e9)
        weights = keras.ops.softmax(logits)
        if self.flaw == "error":
            raise RuntimeError("not today")
        return keras.ops.einsum("bhts,bshd->bthd", weights, v)


class OwnBlock(keras.layers.Layer):
    def __init__(self, flaw=None, **kwargs):
        super().__init__(**kwargs)
        self.flaw = flaw
        self.attention = OwnAttention(flaw, name="own_attention")

    def build(self, shape):
        self.attention.build(shape)
        self.built = True

    def call(self, x):
        if self.flaw == "error" and not isinstance(x, keras.KerasTensor):
            return x
        mask = self._compute_self_attention_mask(x, None)
        return x + self.attention(x, attention_mask=mask)

    def compute_output_shape(self, shape):
        return shape

    def _compute_self_attention_mask(self, x, padding_mask):
        length = keras.ops.shape(x)[1]
        mask = keras.ops.tri(length, dtype="bool")[None]
        if self.flaw == "mask":
            mask = keras.ops.tri(length, k=1, dtype="bool")[None]
        if padding_mask is None:
            return mask
        return keras.ops.logical_and(mask, padding_mask[:, None])

    def get_config(self):
        return {**super().get_config(), "flaw": self.flaw}


def own_model(flaw=None):
    x = keras.Input((LENGTH, 12))
    block = OwnBlock(flaw, name="block")
    return louder(keras.Model(x, block(x)))


def test_an_unknown_family_is_tried_and_converted():
    model = own_model()
    x = np.random.default_rng(1).normal(size=(2, LENGTH, 12)).astype("float32")
    converted, report = keras_kt.convert_attention(
        model, implementation="linear", near_field=LENGTH
    )
    assert list(report.converted) == ["block/own_attention"]
    np.testing.assert_allclose(converted(x), model(x), atol=1e-4)


def test_an_unknown_family_that_differs_is_refused_with_the_error():
    with pytest.raises(ValueError, match=r"differs from softmax by \d\.\d+"):
        keras_kt.convert_attention(own_model("bias"))


def test_a_mask_of_another_kind_stays_dense():
    """What is neither causal nor all is for the matrix."""
    with pytest.raises(ValueError, match="takes a dense mask"):
        keras_kt.convert_attention(own_model("mask"), on_unsupported="error")


@pytest.mark.parametrize("name", families(("llama", "bloom", "falcon")))
def test_errors_are_measured_and_calibration_says_why_it_moves_nothing(name):
    model = made(name)
    x, _ = inputs(model)
    converted, report = keras_kt.convert_attention(model)
    before = [weight.numpy() for weight in converted.weights]
    calibration = keras_kt.conversion.calibrate(converted, x)
    assert calibration.notes.keys() == report.converted.keys()
    assert "forbids a change" in str(calibration)
    for weight, value in zip(converted.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)
    own = keras_kt.conversion.attention_error(converted, x)
    taught = keras_kt.conversion.attention_error(converted, x, teacher=model)
    # Captured with exact attention, both see the same queries and keys.
    for a, b in zip(own.heads, taught.heads, strict=True):
        np.testing.assert_allclose(a[3:6], b[3:6], rtol=1e-3)
    with pytest.raises(ValueError, match="`teacher` must be the model"):
        keras_kt.conversion.attention_error(converted, x, teacher=converted)


@pytest.mark.parametrize(
    "name", families(("llama", "bloom", "mistral_window", "qwen_window"))
)
def test_an_exact_kernel_has_no_error(name):
    """A near field of all tokens: the measure sees rotation, groups, ALiBi."""
    model = made(name)
    x, _ = inputs(model)
    converted, _ = keras_kt.convert_attention(model, near_field=LENGTH)
    for teacher in (None, model):
        errors = keras_kt.conversion.attention_error(
            converted, x, teacher=teacher
        )
        assert max(head.matrix for head in errors.heads) < 1e-4
        assert max(head.output for head in errors.heads) < 1e-4


@pytest.mark.slow
def test_a_budget_gives_features_to_layers():
    model = made("llama")
    x, _ = inputs(model)
    converted, _ = keras_kt.convert_attention(model)
    report = keras_kt.conversion.calibrate(converted, x, budget=48, steps=0)
    counts = [head.num_features for head in report.after.heads]
    assert max(counts) > 12 and np.mean(counts) <= 48
    assert np.isfinite(converted(x)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma", "falcon"])
def test_distillation_brings_it_closer(name):
    model = made(name)
    x, _ = inputs(model)
    converted, _ = keras_kt.convert_attention(model)
    history = keras_kt.conversion.distill(converted, model, x, steps=30)
    assert sum(history[-1].values()) < 0.9 * sum(history[0].values())
    for layer in kernelized_layers(converted).values():
        if layer.decay:
            assert not layer.decay_rates.trainable_weights


@pytest.mark.slow
def test_dropout_of_weights_moves_to_outputs():
    model = louder(
        models.GPTNeoXCausalLM(models.GPTNeoXBackbone(**PLAIN, dropout=0.5))
    )
    with pytest.raises(ValueError, match="drops attention weights"):
        keras_kt.convert_attention(model)
    converted, report = keras_kt.convert_attention(model, dropout=0.5)
    assert "moved from weights" in str(report)
    layer = converted.backbone.transformer_layers[0]._self_attention_layer
    x = np.random.default_rng(0).normal(size=(2, LENGTH, 24)).astype("float32")
    first, second = (layer(x, training=True)[0] for _ in range(2))
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(layer(x)[0], layer(x)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt_neo_x"])
def test_half_precision_keeps_the_scale(name):
    """The scale is measured, from what half precision leaves of weights."""
    config = FAMILIES[name]().backbone.get_config()
    kind = type(FAMILIES[name]().backbone)
    config |= {"dtype": "bfloat16", "name": "backbone"}
    backbone = louder(kind.from_config(config))
    converted, _ = keras_kt.convert_attention(backbone, near_field=LENGTH)
    for layer in converted._flatten_layers():
        if hasattr(layer, "seam"):
            assert layer.seam.scale == layer.seam.key_dim**-0.5
            assert layer.linear_attention.variable_dtype == "float32"
    x, rows = inputs(backbone)
    output, expected = (
        np.asarray(keras.ops.cast(model(x), "float32"))[rows]
        for model in (converted, backbone)
    )
    assert np.mean(np.abs(output - expected)) < 0.05 * np.std(expected)


@pytest.mark.slow
def test_fine_tuning_reaches_the_kernel():
    converted, _ = keras_kt.convert_attention(made("llama"))
    x, _ = inputs(converted)
    converted.compile(
        "sgd",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    before = [
        [w.numpy() for w in layer.spectral_weights]
        for layer in kernelized_layers(converted).values()
    ]
    losses = [converted.train_on_batch(x, x["token_ids"]) for _ in range(3)]
    assert losses[-1] < losses[0]
    after = kernelized_layers(converted).values()
    for values, layer in zip(before, after, strict=True):
        for value, weight in zip(values, layer.spectral_weights, strict=True):
            assert not np.array_equal(weight, value), weight.path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a dense mask")
@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3"])
def test_generation_with_a_cache_is_generation_without(name):
    """Greedy, token by token, against calls on the whole prefix."""
    converted, _ = keras_kt.convert_attention(made(name))
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


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_cache_does_not_go_with_distances(name):
    option = {} if name == "bloom" else {"near_field": 3}
    converted, _ = keras_kt.convert_attention(made(name), **option)
    block = converted.backbone.transformer_layers[0]
    layer = block._self_attention_layer
    heads = 3 if name == "bloom" else 2
    size = 24 // (3 if name == "bloom" else 4)
    cache = np.zeros((1, 2, LENGTH, heads, size), "float32")
    with pytest.raises(ValueError, match="cache does not tell how far"):
        layer(
            np.zeros((1, 1, 24), "float32"),
            attention_mask=np.ones((1, 1, LENGTH), bool),
            cache=cache,
            cache_update_index=0,
        )


def test_rates_of_alibi_take_no_other_decay():
    with pytest.raises(ValueError, match="fall with the distance already"):
        keras_kt.convert_attention(made("bloom"), decay="constant")
