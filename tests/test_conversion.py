"""Conversion, calibration and distillation, judged by softmax itself."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt import kernels
from keras_kt.conversion import balance, change, descent
from keras_kt.conversion.capture import capture
from tests.helpers import cases, reference

WIDTH, HEADS, KEY_DIM, LENGTH = 6, 3, 5, 11
UNBIASED = {
    "spectral_prior": keras_kt.NormalPrior(use_mean=True, radius="chi"),
    "num_features": 2 * KEY_DIM,
}


class Block(keras.layers.Layer):
    """Makes its own attention, keeps it in a list too, is not registered."""

    def __init__(self, is_causal=False, dropout=0.0, use_bias=True, **kwargs):
        super().__init__(**kwargs)
        self.is_causal = is_causal
        self.dropout = dropout
        self.use_bias = use_bias
        self.attention = keras.layers.MultiHeadAttention(
            HEADS, KEY_DIM, dropout=dropout, use_bias=use_bias, name="attention"
        )
        self.parts = [self.attention, keras.layers.LayerNormalization()]

    def call(self, x):
        attention, norm = self.parts
        return norm(x + attention(x, x, use_causal_mask=self.is_causal))

    def get_config(self):
        return {
            **super().get_config(),
            "is_causal": self.is_causal,
            "dropout": self.dropout,
            "use_bias": self.use_bias,
        }


class Outer(keras.layers.Layer):
    """Holds a block that Keras names, anew in each copy."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Block()

    def call(self, x):
        return self.block(x)


class Subclassed(keras.Model):
    """A model without a graph."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = keras.layers.Embedding(30, WIDTH)
        self.block = Block(is_causal=True)

    def call(self, tokens):
        return self.block(self.embedding(tokens))


class Rotated(keras.layers.MultiHeadAttention):
    """Not softmax of q·k: its weights mean something else."""

    def _compute_attention(self, query, key, *args, **kwargs):
        return super()._compute_attention(query[::1], -key, *args, **kwargs)


class WithoutConfig(keras.layers.Layer):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def call(self, x):
        return self.attention(x, x)

    def get_config(self):
        raise NotImplementedError("not today")


def functional():
    """Direct, nested, shared and causal attention."""
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(30, WIDTH)(tokens)
    shared = attention("shared")
    add = keras.layers.Add()
    x = keras.layers.LayerNormalization()(add([x, shared(x, x)]))
    x = add([x, shared(x, x, use_causal_mask=True)])
    inside = keras.Input((None, WIDTH))
    nested = keras.Model(
        inside, attention("deep", value_dim=7)(inside, inside), name="nested"
    )
    x = Block()(add([x, nested(x)]))
    return perturbed(keras.Model(tokens, keras.layers.Dense(2)(x)))


def sequential():
    return perturbed(
        keras.Sequential(
            [keras.Input((None, WIDTH)), Block(), Block(is_causal=True)]
        )
    )


def subclassed():
    model = Subclassed()
    model(tokens())
    return perturbed(model)


def one_layer(scale=0.5, **kwargs):
    """A model that is one attention layer."""
    x = keras.Input((None, WIDTH))
    layer = attention("attention", **kwargs)
    return perturbed(keras.Model(x, layer(x, x)), scale)


def attention(name, **kwargs):
    return keras.layers.MultiHeadAttention(HEADS, KEY_DIM, name=name, **kwargs)


def perturbed(model, scale=0.3):
    """Weights as of training: biases and scales are not zeros and ones."""
    rng = np.random.default_rng(3)
    for weight in model.weights:
        noise = scale * rng.normal(size=weight.shape)
        weight.assign(weight + noise.astype("float32"))
    return model


def tokens(seed=0, end=LENGTH):
    ids = np.random.default_rng(seed).integers(1, 30, size=(2, LENGTH))
    ids[1, end:] = 0
    return ids.astype("int32")


def floats(length=LENGTH, batch=2, seed=0):
    """Anisotropic inputs with a mean, as those of trained layers are."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, length, WIDTH)) * np.linspace(0.2, 1.2, WIDTH)
    return (x + 1.5).astype("float32")


def softmax_scores(layer, x):
    """Weights of MultiHeadAttention in float64, written out."""
    x = x.astype("float64")
    q, k = (
        np.einsum("btx,xhd->bhtd", x, np.asarray(dense.kernel, "float64"))
        + (0.0 if dense.bias is None else np.asarray(dense.bias)[:, None])
        for dense in (layer.query_dense, layer.key_dense)
    )
    logits = np.einsum("bhtd,bhsd->bhts", q, k) * KEY_DIM**-0.5
    prior = getattr(layer, "spectral_prior", None)
    if prior is not None:
        tilt = np.einsum("hd,bhsd->bhs", prior.mean.numpy()[:, 0], k)
        logits += KEY_DIM**-0.25 * tilt[:, :, None]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "make, inputs, count",
    [(functional, tokens, 3), (sequential, floats, 2), (subclassed, tokens, 1)],
)
def test_closed_form_of_a_converted_model_is_the_original(make, inputs, count):
    model = make()
    x = inputs()
    expected, weights = model(x), [w.numpy() for w in model.weights]
    converted, report = keras_kt.convert_attention(model, **UNBIASED)
    assert type(converted) is type(model)
    assert len(report.converted) == count and not report.kept
    with keras_kt.conversion.closed_form_attention(converted):
        np.testing.assert_allclose(converted(x), expected, atol=1e-5)
    estimate = converted(x)
    assert 1e-4 < np.abs(estimate - expected).max() < 3.0
    # The copy owns its weights, and the original still has its own.
    for weight in converted.weights:
        weight.assign(tf.zeros_like(weight))
    np.testing.assert_array_equal(model(x), expected)
    for weight, before in zip(model.weights, weights, strict=True):
        np.testing.assert_array_equal(weight, before)


def test_padded_keys_stay_masked():
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(30, WIDTH, mask_zero=True)(ids)
    for name in ("first", "second"):
        y = attention(name)(x, x, use_causal_mask=name == "second")
        x = keras.layers.Add()([x, y])
    model, inputs = perturbed(keras.Model(ids, x)), tokens(end=8)
    converted, _ = keras_kt.convert_attention(model, **UNBIASED)
    with keras_kt.conversion.closed_form_attention(converted):
        output = converted(inputs)
    real = inputs != 0
    np.testing.assert_allclose(
        output.numpy()[real], model(inputs).numpy()[real], atol=1e-5
    )


def test_report_names_every_layer_and_its_features():
    converted, report = keras_kt.convert_attention(
        functional(), num_features={"nested/deep": 20}
    )
    assert report.converted["nested/deep"] == 20
    assert report.converted["shared"] == 2 * KEY_DIM
    assert "nested/deep: linear, 20 features" in str(report)
    assert converted.get_layer("nested").get_layer("deep").num_features == 20


def test_layers_chooses_by_path_or_name():
    model = functional()
    _, report = keras_kt.convert_attention(model, layers=["deep"])
    assert list(report.converted) == ["nested/deep"]
    assert set(report.kept.values()) == {"not asked for"}
    with pytest.raises(ValueError, match="which are not|none of them"):
        keras_kt.convert_attention(model, layers=["deep", "missing"])
    with pytest.raises(ValueError, match="paths of converted layers"):
        keras_kt.convert_attention(model, num_features={"missing": 4})


def test_other_state_and_trainability_are_copied():
    x = keras.Input((None, WIDTH))
    normalize = keras.layers.Normalization()
    normalize.adapt(floats())
    y = keras.layers.BatchNormalization(name="batch")(normalize(x))
    y = attention("attention", use_gate=True)(y, y)
    model = perturbed(keras.Model(x, y))
    normalize.finalize_state()
    model.get_layer("batch").trainable = False
    model.get_layer("attention").query_dense.trainable = False
    converted, _ = keras_kt.convert_attention(model, **UNBIASED)
    with keras_kt.conversion.closed_form_attention(converted):
        np.testing.assert_allclose(
            converted(floats()), model(floats()), atol=1e-5
        )
    layer = converted.get_layer("attention")
    assert not converted.get_layer("batch").trainable
    assert not layer.query_dense.trainable and layer.key_dense.trainable


def test_converted_functional_model_trains_saves_and_loads(tmp_path):
    x = keras.Input((None, WIDTH))
    model = keras.Model(x, attention("attention")(x, x))
    model.compile("adam", "mse")
    converted, _ = keras_kt.convert_attention(model)
    assert not converted.compiled
    converted.compile("adam", "mse")
    converted.fit(floats(), np.ones_like(floats()), verbose=0)
    converted.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(floats()), converted(floats()))


def test_converted_blocks_travel_as_weights_and_refuse_a_config(tmp_path):
    model = sequential()
    converted, _ = keras_kt.convert_attention(model)
    path = tmp_path / "model.weights.h5"
    converted.save_weights(path)
    again, _ = keras_kt.convert_attention(model, seed=5)
    assert np.abs(again(floats()) - converted(floats())).max() > 1e-3
    again.load_weights(path)
    np.testing.assert_array_equal(again(floats()), converted(floats()))
    with pytest.raises(NotImplementedError, match="Use `save_weights`"):
        converted.save(tmp_path / "model.keras")


@pytest.mark.parametrize(
    "kwargs, mask, reason",
    [
        ({"dropout": 0.2}, False, "drops attention weights"),
        ({}, True, "takes a dense mask"),
    ],
)
def test_what_linear_attention_cannot_honour_is_a_choice(kwargs, mask, reason):
    x = keras.Input((LENGTH, WIDTH))
    call = {}
    inputs = [x]
    if mask:
        inputs.append(keras.Input((LENGTH, LENGTH), dtype="bool"))
        call["attention_mask"] = inputs[1]
    y = attention("plain")(x, x)
    y = attention("asked", **kwargs)(y, y, **call)
    model = keras.Model(inputs, y)
    _, report = keras_kt.convert_attention(model)
    assert list(report.converted) == ["plain"]
    assert reason in report.kept["asked"]
    with pytest.raises(ValueError, match=f"cannot honour.*{reason}"):
        keras_kt.convert_attention(model, on_unsupported="error")
    converted, report = keras_kt.convert_attention(
        model, on_unsupported="quadratic", **UNBIASED
    )
    assert [layer.status for layer in report.layers] == ["linear", "quadratic"]
    arrays = [floats()]
    if mask:
        arrays.append(np.random.default_rng(1).random((2, 11, 11)) < 0.5)
        arrays[1] |= np.eye(LENGTH, dtype=bool)
    with keras_kt.conversion.closed_form_attention(converted):
        np.testing.assert_allclose(converted(arrays), model(arrays), atol=1e-5)
    if "dropout" in kwargs:
        converted, report = keras_kt.convert_attention(model, dropout=0.1)
        assert len(report.converted) == 2
        assert "moved from weights" in str(report)


def windowed(*, window=3, causal=True):
    """Attention to a window, of tokens that may be padded."""
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(30, WIDTH, mask_zero=True)(tokens)
    layer = attention("windowed", sliding_window=window)
    y = layer(x, x, use_causal_mask=causal)
    return perturbed(keras.Model(tokens, y))


@pytest.mark.parametrize("causal", (True, False), ids=("causal", "both"))
@pytest.mark.parametrize("padded", (None, "left", "right"))
def test_a_sliding_window_is_converted_exactly(causal, padded):
    model = windowed(causal=causal)
    converted, report = keras_kt.convert_attention(model)
    assert "in closed form inside its window" in str(report)
    assert list(report.converted) == ["windowed"]
    batch = 1 + np.asarray(tokens()) % 29
    keep = np.ones(batch.shape, "bool")
    if padded:
        side = slice(4) if padded == "left" else slice(-4, None)
        keep[:, side] = False
    batch = np.where(keep, batch, 0)
    # Where a query is masked softmax gives an average, ours nothing.
    np.testing.assert_allclose(
        converted(batch)[keep], model(batch)[keep], atol=1e-5
    )
    assert converted.get_layer("windowed").sliding_window == 3
    errors = keras_kt.conversion.attention_error(converted, batch)
    assert max(head.matrix for head in errors.heads) < 1e-5


def test_a_window_on_another_sequence_is_kept():
    query, value = keras.Input((5, WIDTH)), keras.Input((7, WIDTH))
    y = attention("plain")(query, value)
    y = attention("across", sliding_window=2)(y, value)
    model = keras.Model([query, value], y)
    _, report = keras_kt.convert_attention(model)
    assert list(report.converted) == ["plain"]
    assert "over another sequence" in report.kept["across"]


def test_attention_of_another_kind_is_kept_with_the_reason():
    x = keras.Input((None, WIDTH))
    y = Rotated(HEADS, KEY_DIM, name="rotated")(x, x)
    y = keras.layers.GroupQueryAttention(4, 4, 2, name="grouped")(y, y)
    y = attention("plain")(y, y)
    model = keras.Model(x, y)
    converted, report = keras_kt.convert_attention(model)
    assert list(report.converted) == ["plain"]
    assert "`_compute_attention` of its own" in report.kept["rotated"]
    assert "is not a MultiHeadAttention" in report.kept["grouped"]
    with pytest.raises(ValueError, match="No attention layer of the model can"):
        keras_kt.convert_attention(model, layers=["rotated", "grouped"])
    y = attention("new")(*converted.outputs * 2)
    heads = keras.layers.Reshape((-1, 1, WIDTH))(y)
    core = keras_kt.LinearAttention(1, WIDTH, name="core")
    y = core(heads, heads, heads)
    _, report = keras_kt.convert_attention(keras.Model(converted.inputs, y))
    assert report.kept["plain"] == "is linear already"
    assert report.kept["core"] == "is linear already"


def test_bad_models_are_refused():
    with pytest.raises(ValueError, match="must be a keras.Model"):
        keras_kt.convert_attention(attention("alone"))
    with pytest.raises(ValueError, match="must be built"):
        keras_kt.convert_attention(Subclassed())
    x = keras.Input((3,))
    with pytest.raises(ValueError, match="No attention layer was found"):
        keras_kt.convert_attention(keras.Model(x, keras.layers.Dense(2)(x)))
    x = keras.Input((None, WIDTH))
    model = keras.Model(x, WithoutConfig(attention("a"))(x))
    with pytest.raises(ValueError, match="Implement `get_config`"):
        keras_kt.convert_attention(model)
    with pytest.raises(ValueError, match="`on_unsupported` must be one of"):
        keras_kt.convert_attention(model, on_unsupported="ignore")


def test_a_mask_that_all_queries_share_is_a_key_mask():
    """KerasHub's encoders pass padding as `(batch, 1, length)`."""
    layer = keras_kt.KernelizedAttention(
        HEADS, KEY_DIM, implementation="linear", seed=1
    )
    x = floats()
    padding = np.arange(LENGTH) < np.array([[LENGTH], [7]])
    expected = layer(x, x, value_mask=padding)
    for shape in ((2, 1, LENGTH), (2, 1, 1, LENGTH)):
        mask = padding.astype("int32").reshape(shape)
        np.testing.assert_array_equal(
            layer(x, x, attention_mask=mask), expected
        )


def test_tilted_prefactor_weighs_keys_by_the_mean():
    """exp(qᵀΣk + μ·k), against features and the kernel written out."""
    prior = keras_kt.NormalPrior(use_mean=True, radius="chi", seed=2)
    feature_map = keras_kt.PositiveFeatures("tilted")
    prior.build((cases.HEADS, cases.FREQUENCIES, cases.DIM))
    feature_map.build(cases.HEADS)
    rng = np.random.default_rng(5)
    for weight in prior.trainable_weights:
        weight.assign(weight + 0.3 * rng.normal(size=weight.shape))
    query, key, _ = cases.inputs(scale=0.4)
    weights = cases.weights_of(prior)
    frequencies = cases.reference_frequencies(
        prior, weights, cases.reference_noise(prior)
    )
    kind = cases.reference_kind(feature_map, {})
    bound = feature_map.bind(prior())
    np.testing.assert_allclose(
        np.exp(bound.keys(tf.constant(query))),
        reference.features(query, frequencies, kind),
        rtol=1e-4,
    )
    mean, scale = prior.mean.numpy(), prior.scale.numpy()
    q, k = query[0].astype("float64"), key[0].astype("float64")
    logits = np.einsum("htd,hd,hsd->hts", q, scale[:, 0] ** 2, k)
    logits += np.einsum("htd,hd->ht", q, mean[:, 0])[:, :, None]
    logits += np.einsum("hsd,hd->hs", k, mean[:, 0])[:, None]
    np.testing.assert_allclose(
        kernels.closed_form(prior, feature_map, q, k),
        np.exp(logits),
        rtol=1e-5,
    )


@pytest.mark.parametrize("use_bias", [True, False])
def test_calibration_leaves_softmax_as_it_was(use_bias):
    model = one_layer(use_bias=use_bias)
    converted, _ = keras_kt.convert_attention(model, **UNBIASED)
    report = keras_kt.conversion.calibrate(converted, floats(61))
    layer, x = converted.get_layer("attention"), floats(seed=1)
    expected = softmax_scores(model.get_layer("attention"), x)
    np.testing.assert_allclose(softmax_scores(layer, x), expected, atol=1e-6)
    with keras_kt.conversion.closed_form_attention(converted):
        np.testing.assert_allclose(converted(x), model(x), atol=1e-5)
    assert bool(report.notes) is not use_bias
    tilt = np.abs(layer.spectral_prior.mean.numpy()).max()
    assert tilt > 0.1 if use_bias else tilt == 0.0


def test_least_variance_balances_and_decorrelates():
    converted, _ = keras_kt.convert_attention(one_layer())
    layer, x = converted.get_layer("attention"), floats(61)
    (item,) = capture(converted, x, 1)
    change.fold(item, balance.least_variance(item, None))
    q, k = (
        np.reshape(dense(x), (-1, HEADS, KEY_DIM))
        for dense in (layer.query_dense, layer.key_dense)
    )
    np.testing.assert_allclose(q.mean(0), 0.0, atol=1e-3)
    np.testing.assert_allclose(k.mean(0), 0.0, atol=1e-3)
    for head in range(HEADS):
        of_q, of_k = np.cov(q[:, head].T), np.cov(k[:, head].T)
        level = np.trace(of_q) / KEY_DIM
        np.testing.assert_allclose(of_q, of_k, atol=0.01 * level)
        off_diagonal = of_q - np.diag(np.diag(of_q))
        np.testing.assert_allclose(off_diagonal, 0.0, atol=0.01 * level)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_calibration_makes_no_head_worse(scale):
    """On what it was calibrated on; descent helps on other inputs too."""
    model, x = one_layer(scale), floats(61, seed=9)
    errors = []
    for steps in (0, 100):
        converted, _ = keras_kt.convert_attention(model, num_features=20)
        report = keras_kt.conversion.calibrate(
            converted, floats(61), steps=steps
        )
        for before, after in zip(
            report.before.heads, report.after.heads, strict=True
        ):
            was, now = (
                head.matrix**2 + head.output**2 for head in (before, after)
            )
            assert now <= was * (1 + 1e-5)
        errors.append(keras_kt.conversion.attention_error(converted, x))
    with_none, with_descent = (e.layers["attention"] for e in errors)
    assert with_descent < with_none if scale < 1 else with_descent <= with_none


def test_coordinates_that_are_not_finite_lose():
    converted, _ = keras_kt.convert_attention(one_layer())
    (item,) = capture(converted, floats(), 1)
    start = change.unchanged(item.layer)
    broken = start._replace(shift_q=start.shift_q + np.nan)
    best = change.best_of(item, [broken, start])
    np.testing.assert_array_equal(best.shift_q, start.shift_q)


def test_a_descent_that_diverges_is_left(monkeypatch):
    converted, _ = keras_kt.convert_attention(one_layer())
    monkeypatch.setattr(descent, "_REFINING_RATE", 1e30)
    report = keras_kt.conversion.calibrate(converted, floats(31))
    for head in report.after.heads:
        assert np.isfinite(head.matrix) and np.isfinite(head.output)
    assert np.isfinite(converted(floats())).all()


def test_calibration_halves_the_error_of_plain_orthogonal_features():
    """On inputs that were not calibrated on, at equal D."""
    model, x = one_layer(0.3), floats(61, seed=9)
    plain, _ = keras_kt.convert_attention(
        model,
        spectral_prior=keras_kt.NormalPrior(radius="chi"),
        feature_map=keras_kt.PositiveFeatures(two_sided=False),
        num_features=20,
    )
    converted, _ = keras_kt.convert_attention(model, num_features=20)
    keras_kt.conversion.calibrate(converted, floats(61))
    before = keras_kt.conversion.attention_error(plain, x).layers["attention"]
    after = keras_kt.conversion.attention_error(converted, x).layers[
        "attention"
    ]
    assert after < 0.5 * before


def test_errors_are_those_of_the_scores():
    model, x = one_layer(), floats()
    converted, _ = keras_kt.convert_attention(model)
    layer = converted.get_layer("attention")
    exact = softmax_scores(model.get_layer("attention"), x)
    estimate = layer(x, x, return_attention_scores=True)[1].numpy()
    axes = (0, 2, 3)
    norm = (exact**2).sum(axes)
    expected = np.sqrt(((estimate - exact) ** 2).sum(axes) / norm)
    uniform = np.sqrt(((1 / LENGTH - exact) ** 2).sum(axes) / norm)
    for teacher in (None, model):
        errors = keras_kt.conversion.attention_error(
            converted, x, teacher=teacher
        )
        got = [(h.matrix, h.uniform) for h in errors.heads]
        np.testing.assert_allclose(
            got, np.stack([expected, uniform], -1), rtol=1e-3
        )


@pytest.mark.slow
@pytest.mark.parametrize("make, inputs", [(functional, tokens)])
def test_a_near_field_of_the_whole_length_is_the_original(make, inputs):
    """Calibrated too, with the queries' mean in the kernel: no closed form is
    estimated then, and the errors are measured with the near field."""
    model, x = make(), inputs()
    converted, _ = keras_kt.convert_attention(model, near_field=LENGTH)
    report = keras_kt.conversion.calibrate(converted, x, budget=4 * KEY_DIM)
    for errors in (report.before, report.after):
        assert max(head.matrix for head in errors.heads) < 1e-4
    np.testing.assert_allclose(converted(x), model(x), atol=1e-4)
    short, _ = keras_kt.convert_attention(model, near_field=2)
    errors = keras_kt.conversion.attention_error(short, x)
    assert min(head.matrix for head in errors.heads) > 1e-2


def test_what_forgets_stands_for_no_softmax():
    converted, _ = keras_kt.convert_attention(one_layer(), decay="constant")
    with pytest.raises(ValueError, match="forgets stands for no softmax"):
        keras_kt.conversion.calibrate(converted, floats())


def test_teachers_layers_are_found_whatever_keras_names_them():
    x = keras.Input((None, WIDTH))
    model = perturbed(keras.Model(x, Outer()(x)))
    converted, _ = keras_kt.convert_attention(model)
    errors = keras_kt.conversion.attention_error(
        converted, floats(), teacher=model
    )
    assert len(errors.layers) == 1


def test_sharp_attention_is_called_hopeless():
    model = one_layer()
    dense = model.get_layer("attention").query_dense
    dense.kernel.assign(30.0 * dense.kernel)
    converted, _ = keras_kt.convert_attention(model)
    report = keras_kt.conversion.calibrate(converted, floats(61))
    assert any("hopeless" in head.verdict for head in report.before.heads)
    assert max(head.predicted for head in report.after.heads) > 10.0
    assert "hopeless" in str(report.before)
    # Calibration cannot make such heads good.
    assert not any("follows" in head.verdict for head in report.after.heads)


@pytest.mark.slow
def test_padding_takes_no_part_in_calibration():
    x = keras.Input((None, WIDTH))
    y = keras.layers.Masking()(x)
    model = perturbed(keras.Model(x, attention("attention")(y, y)))
    short, long = floats(7), np.zeros((2, LENGTH, WIDTH), "float32")
    long[:, :7] = short
    reports = []
    for inputs in (short, long):
        converted, _ = keras_kt.convert_attention(model)
        reports.append(keras_kt.conversion.calibrate(converted, inputs))
    for one, other in zip(*(r.after.heads for r in reports), strict=True):
        np.testing.assert_allclose(one[2:], other[2:], rtol=1e-3)


@pytest.mark.slow
def test_budget_goes_where_the_error_is(tmp_path):
    x = keras.Input((None, WIDTH))
    y = attention("mild")(x, x)
    y = attention("sharp")(x + y, x + y)
    model = perturbed(keras.Model(x, y), 0.5)
    for weight in model.get_layer("mild").query_dense.weights:
        weight.assign(0.01 * weight)
    converted, _ = keras_kt.convert_attention(model)
    converted.predict(floats(), verbose=0)
    report = keras_kt.conversion.calibrate(converted, floats(31), budget=50)
    # What was traced for the prior of before is not used again.
    np.testing.assert_allclose(
        converted.predict(floats(), verbose=0), converted(floats()), rtol=1e-4
    )
    counts = {h.path: h.num_features for h in report.after.heads}
    assert counts["mild"] < counts["sharp"] and sum(counts.values()) <= 100
    assert converted.get_layer("sharp").num_features == counts["sharp"]
    assert report.after.layers["sharp"] < report.before.layers["sharp"]
    converted.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(floats()), converted(floats()))
    with pytest.raises(ValueError, match="at least one block"):
        keras_kt.conversion.calibrate(converted, floats(), budget=3)


@pytest.mark.parametrize(
    "data, match",
    [
        (np.full((1, 4, WIDTH), np.nan, "float32"), "must be finite"),
        (np.zeros((0, 4, WIDTH), "float32"), "not empty"),
        (iter([]), "not empty"),
    ],
)
def test_bad_data_is_refused(data, match):
    converted, _ = keras_kt.convert_attention(one_layer())
    with pytest.raises(ValueError, match=match):
        keras_kt.conversion.calibrate(converted, data)


def test_what_cannot_be_calibrated_says_so():
    model = one_layer()
    with pytest.raises(ValueError, match="must have KernelizedAttention"):
        keras_kt.conversion.calibrate(model, floats())
    converted, _ = keras_kt.convert_attention(
        model, spectral_prior="mixture", feature_map="positive"
    )
    report = keras_kt.conversion.calibrate(converted, floats())
    assert "not softmax's" in report.notes["attention"]
    converted, _ = keras_kt.convert_attention(model)
    prior = converted.get_layer("attention").spectral_prior
    prior.trainable_weights[1].assign(prior.trainable_weights[1] + 1.0)
    report = keras_kt.conversion.calibrate(converted, floats())
    assert "no longer N(μ, I)" in report.notes["attention"]


@pytest.mark.parametrize("prefactor", ("softmax", "self"))
def test_the_default_prior_has_no_mean_that_the_map_cancels(prefactor):
    """It failed where Keras made the layer again, in a TypeError."""
    model = one_layer()
    converted, _ = keras_kt.convert_attention(
        model,
        feature_map=keras_kt.PositiveFeatures(prefactor),
        num_features=512,
    )
    assert not converted.get_layer("attention").spectral_prior.use_mean
    x, expected = 0.3 * floats(), model(0.3 * floats())
    error = np.linalg.norm(converted(x) - expected)
    assert error < 0.05 * np.linalg.norm(expected)


def test_normalised_queries_stand_for_no_softmax():
    converted, _ = keras_kt.convert_attention(one_layer(), qk_norm="l2")
    with pytest.raises(ValueError, match="stands for no softmax"):
        keras_kt.conversion.calibrate(converted, floats())


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, train_projections", [("output", False), ("matrix", True)]
)
def test_distillation_brings_attention_closer(target, train_projections):
    teacher, x = one_layer(), floats(31, batch=4)
    before = [w.numpy() for w in teacher.weights]
    student, _ = keras_kt.convert_attention(teacher)
    keras_kt.conversion.calibrate(student, x)
    data = tf.data.Dataset.from_tensor_slices((x, x)).batch(2)
    start = keras_kt.conversion.attention_error(student, x, teacher=teacher)
    history = keras_kt.conversion.distill(
        student,
        teacher,
        data,
        steps=40,
        target=target,
        train_projections=train_projections,
    )
    end = keras_kt.conversion.attention_error(student, x, teacher=teacher)
    assert len(history) == 40
    losses = [step["attention"] for step in history]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    column = target
    errors = [
        np.mean([getattr(head, column) for head in e.heads])
        for e in (start, end)
    ]
    assert errors[1] < 0.95 * errors[0]
    for weight, value in zip(teacher.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_distillation_refuses_what_it_cannot_train():
    teacher = one_layer()
    student, _ = keras_kt.convert_attention(
        teacher, spectral_prior=keras_kt.NormalPrior()
    )
    student.get_layer("attention").spectral_prior.trainable = False
    with pytest.raises(ValueError, match="needs something to train"):
        keras_kt.conversion.distill(student, teacher, floats())
    with pytest.raises(ValueError, match="`teacher` must be the model"):
        keras_kt.conversion.distill(student, sequential(), floats())
    with pytest.raises(ValueError, match="`target` must be one of"):
        keras_kt.conversion.distill(student, teacher, floats(), target="scores")
