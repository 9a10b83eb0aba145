"""Diagnostics against closed forms and constructed faults; plots; monitor."""

import logging
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt import diagnostics
from keras_kt.diagnostics import plots

HEADS, DIM, WIDTH, LENGTH = 2, 4, 6, 9


def built(**kwargs):
    layer = keras_kt.KernelizedAttention(HEADS, DIM, seed=1, **kwargs)
    layer(*2 * [np.ones((1, 3, WIDTH), "float32")])
    return layer


def model_of(**kwargs):
    x = keras.Input((None, WIDTH))
    layer = keras_kt.KernelizedAttention(
        HEADS, DIM, name="attention", seed=1, **kwargs
    )
    return keras.Model(x, layer(x, x))


def batch(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(2, LENGTH, WIDTH))).astype("float32")


def test_profile_of_a_normal_prior_is_a_gaussian():
    prior = keras_kt.NormalPrior(1.5, radius="chi")
    layer = built(spectral_prior=prior, num_features=8192)
    profile = diagnostics.kernel_profile(layer, [0.0, 1.0, 2.0, 8.0])
    expected = np.exp(-0.5 * (1.5 * profile.distances) ** 2 / DIM**0.5)
    np.testing.assert_allclose(
        profile.closed_form, [expected] * HEADS, atol=1e-6
    )
    np.testing.assert_allclose(profile.kernel, [expected] * HEADS, atol=0.02)
    np.testing.assert_allclose(profile.kernel[:, 0], 1.0, atol=1e-6)


def test_normalised_queries_are_not_scaled_again():
    prior = keras_kt.NormalPrior(radius="chi")
    layer = built(spectral_prior=prior, num_features=8192, qk_norm="l2")
    profile = diagnostics.kernel_profile(layer, [1.0, 2.0])
    expected = np.exp(-0.5 * profile.distances**2)
    np.testing.assert_allclose(
        profile.closed_form, [expected] * HEADS, rtol=1e-5
    )
    np.testing.assert_allclose(profile.kernel, [expected] * HEADS, atol=0.02)


def test_profile_without_a_closed_form():
    layer = built(spectral_prior="generator", feature_map="trigonometric")
    assert diagnostics.kernel_profile(layer).closed_form is None


def test_spectrum_is_what_the_layer_uses():
    layer = built(
        spectral_prior=keras_kt.MixturePrior(2, use_mean=True),
        feature_map="trigonometric",
        num_features=32,
    )
    prior = layer.spectral_prior
    prior._mean.assign(np.random.default_rng(0).normal(size=prior._mean.shape))
    spectrum = diagnostics.spectrum(layer)
    draw = prior()
    np.testing.assert_allclose(spectrum.weights.sum(axis=1), 1.0, rtol=1e-6)
    count = draw.offsets.shape[1] // 2
    for component in range(2):
        part = slice(component * count, (component + 1) * count)
        np.testing.assert_allclose(
            spectrum.frequencies[:, part],
            draw.offsets[:, part] + draw.means[:, component, None],
            rtol=1e-6,
        )


@pytest.mark.parametrize("options", [{}, {"decay": "constant"}])
def test_attention_maps_are_the_layers_weights(options):
    model, x = model_of(**options), batch()
    layer = model.get_layer("attention")
    before = model(x)
    (found,) = diagnostics.attention_maps(model, x)
    np.testing.assert_array_equal(model(x), before)
    assert "_compute_attention" not in vars(layer)
    _, scores = layer(x, x, return_attention_scores=True)
    assert found.path == "attention"
    np.testing.assert_allclose(found.weights, scores, atol=1e-6)
    original = keras.layers.MultiHeadAttention(HEADS, DIM)
    original.build(x.shape, x.shape)
    original.set_weights([w.numpy() for w in layer.weights[:8]])
    _, expected = original(x, x, return_attention_scores=True)
    np.testing.assert_allclose(found.softmax, expected, atol=1e-6)


def test_masks_reach_the_maps():
    x = keras.Input((None, WIDTH))
    y = keras.layers.Masking()(x)
    attention = keras_kt.KernelizedAttention(HEADS, DIM)
    model = keras.Model(x, attention(y, y, use_causal_mask=True))
    inputs = batch()
    inputs[:, 6:] = 0.0
    (found,) = diagnostics.attention_maps(model, inputs)
    for weights in (found.weights, found.softmax):
        assert np.all(weights[..., 6:] == 0.0)
        assert np.all(np.triu(weights[0, 0], 1) == 0.0)
        np.testing.assert_allclose(weights[:, :, :6].sum(-1), 1.0, atol=1e-5)


def test_no_softmax_of_normalised_queries():
    (found,) = diagnostics.attention_maps(model_of(qk_norm="l2"), batch())
    assert found.softmax is None


@pytest.mark.parametrize("qk_norm", [None, "l2"])
@pytest.mark.parametrize("feature_map", ["positive", "trigonometric"])
def test_kernel_errors_fall_with_features(feature_map, qk_norm):
    """As 1/sqrt(D); masked keys and what has no closed form take no part."""
    x = keras.Input((None, WIDTH))
    y = keras.layers.Masking()(x)
    inputs = batch(0.5)
    inputs[:, 6:] = 0.0
    errors = []
    for count in (64, 4096):
        attention = keras_kt.KernelizedAttention(
            HEADS,
            DIM,
            spectral_prior=keras_kt.NormalPrior(coupling="iid", radius="chi"),
            feature_map=feature_map,
            num_features=count,
            qk_norm=qk_norm,
            name="attention",
            seed=3,
        )
        model = keras.Model(x, attention(y, y, use_causal_mask=True))
        found = diagnostics.kernel_errors(model, inputs)
        errors.append(found["attention"].mean())
    assert 0.0 < errors[1] < 0.3 * errors[0] < 0.2
    for options in ({"decay": "constant"}, {"spectral_prior": "generator"}):
        found = diagnostics.kernel_errors(model_of(**options), inputs)
        assert found["attention"] is None


@pytest.mark.parametrize("feature_map", ["positive", "trigonometric"])
def test_effective_features(feature_map):
    # Where inputs' lengths count.
    model = model_of(feature_map=feature_map, num_features=16, qk_norm=None)
    same = np.ones((1, 50, WIDTH), "float32")
    one = diagnostics.effective_features(model, same)["attention"]
    np.testing.assert_allclose(one, 1.0, rtol=1e-5)
    few, many = (
        diagnostics.effective_features(model, batch(s))["attention"]
        for s in (0.1, 3.0)
    )
    assert np.all(few < many) and np.all(many <= 17)


@pytest.mark.parametrize("feature_map", ["positive", "trigonometric"])
def test_a_new_layer_is_healthy(feature_map):
    model = model_of(feature_map=feature_map, spectral_prior="mixture")
    assert diagnostics.health(model, batch(0.3)) == []


def problems(findings, head=None):
    return [x.problem for x in findings if head in (None, x.head)]


def test_dead_components_are_found():
    layer = built(spectral_prior="mixture")
    logits = layer.spectral_prior._logits
    logits.assign(tf.tensor_scatter_nd_update(logits, [[1, 0]], [-9.0]))
    assert problems(diagnostics.health(layer), 0) == []
    (problem,) = problems(diagnostics.health(layer), 1)
    assert "components [0] have died" in problem


def test_constant_kernels_and_lost_parameters_are_found():
    layer = built(spectral_prior=keras_kt.NormalPrior(1e-3))
    found = problems(diagnostics.health(layer))
    assert len(found) == HEADS
    assert all("the same for all keys" in problem for problem in found)
    layer.spectral_prior.weights[0].assign(
        np.nan * np.ones(layer.spectral_prior.weights[0].shape)
    )
    found = problems(diagnostics.health(layer))
    assert len(found) == HEADS
    assert all("not finite" in problem for problem in found)


@pytest.mark.parametrize("qk_norm", [None, "l2"])
def test_long_queries_are_found(qk_norm):
    model = model_of(qk_norm=qk_norm)
    found = problems(diagnostics.health(model, batch(30.0)))
    assert bool(found) == (qk_norm is None)
    assert all("too long" in problem for problem in found)
    # Points are the kernel: they estimate nothing.
    model = model_of(qk_norm=qk_norm, spectral_prior="empirical")
    assert not problems(diagnostics.health(model, batch(30.0)))
    # Padding does not count.
    x = keras.Input((None, WIDTH))
    y = keras.layers.Masking(mask_value=99.0)(x)
    model = keras.Model(x, keras_kt.KernelizedAttention(HEADS, DIM)(y, y))
    inputs = batch(0.1)
    inputs[:, 5:] = 99.0
    assert diagnostics.health(model, inputs) == []


@pytest.mark.parametrize("decay", [None, "constant"])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_row_sums_are_those_of_the_weights(is_causal, is_masked, decay):
    """Rows summed to 0.05 at ordinary inputs, and nothing told."""
    if decay and not is_causal:
        pytest.skip("decay with trigonometric features is causal")
    layer = keras_kt.KernelizedAttention(
        HEADS,
        16,
        feature_map="rks",
        seed=5,
        name="attention",
        decay=decay,
        # With a norm no row is guarded here.
        qk_norm=None,
    )
    x = keras.Input((None, WIDTH))
    y = keras.layers.Masking(mask_value=99.0)(x) if is_masked else x
    model = keras.Model(x, layer(y, y, use_causal_mask=is_causal))
    inputs = np.random.default_rng(0).normal(size=(4, 33, WIDTH))
    # Queries and keys that are not aligned make normalizers small.
    inputs = 2.0 * inputs.astype("float32")
    if is_masked:
        inputs[::2, 20:] = 99.0
    sums = diagnostics.row_sums(model, inputs)["attention"]
    (found,) = diagnostics.attention_maps(model, inputs)
    rows = found.weights.sum(-1)
    if is_masked:
        rows[::2, :, 20:] = 1.0
    count = np.size(rows[:, 0]) - (2 * 13 if is_masked else 0)
    guarded = (rows < 0.99).sum((0, 2))
    assert guarded.any()
    np.testing.assert_allclose(sums.guarded, guarded / count)
    np.testing.assert_allclose(sums.least, rows.min((0, 2)), atol=1e-4)
    findings = diagnostics.health(model, inputs)
    assert [x.head for x in findings] == list(np.flatnonzero(guarded))
    for finding in findings:
        share = f"{100 * sums.guarded[finding.head]:.2g} % of its rows"
        assert share in finding.problem
        assert f"least to {sums.least[finding.head]:.2g}" in finding.problem
        assert "`smoothing`" in finding.advice


def test_rows_of_positive_features_sum_to_one():
    model = model_of()
    assert diagnostics.row_sums(model, batch()) == {}


def test_rows_that_see_no_key_do_not_count():
    model = model_of(feature_map="trigonometric")
    layer = model.get_layer("attention")
    x = keras.Input((None, WIDTH))
    y = keras.layers.Masking(mask_value=99.0)(x)
    model = keras.Model(x, layer(y, y))
    (sums,) = diagnostics.row_sums(model, batch() * 0.0 + 99.0).values()
    np.testing.assert_array_equal(sums, [[0.0] * HEADS, [1.0] * HEADS])


def test_monitor_keeps_what_rows_sum_to(tmp_path):
    model = model_of(feature_map="trigonometric")
    model.compile("sgd", "mse")
    x = batch()
    monitor = keras_kt.diagnostics.SpectralMonitor(tmp_path, data=x, pictures=0)
    y = np.zeros((2, LENGTH, WIDTH))
    model.fit(x, y, verbose=0, callbacks=[monitor])
    past = monitor.history["attention"]
    sums = diagnostics.row_sums(model, x)["attention"]
    np.testing.assert_allclose(past["guarded_rows"][-1][:, 0], sums.guarded)
    np.testing.assert_allclose(past["least_row_sum"][-1][:, 0], sums.least)
    (file,) = tmp_path.glob("events*")
    tags = {
        value.tag
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
    }
    assert {
        "attention/head_0/guarded_rows",
        "attention/head_1/least_row_sum",
    } <= tags


def test_what_is_not_ours_is_refused():
    layer = keras_kt.KernelizedAttention(HEADS, DIM)
    for function in (
        diagnostics.kernel_profile,
        diagnostics.spectrum,
        diagnostics.health,
        plots.plot_kernels,
    ):
        with pytest.raises(ValueError, match="must be built"):
            function(layer)
    with pytest.raises(ValueError, match="must be a KernelizedAttention"):
        diagnostics.spectrum(keras.layers.Dense(1))
    x = keras.Input((3,))
    with pytest.raises(ValueError, match="must have KernelizedAttention"):
        diagnostics.attention_maps(keras.Model(x, x), np.ones((1, 3)))
    with pytest.raises(ValueError, match="`data` needs a model"):
        diagnostics.health(built(), batch())


def test_plots_show_the_arrays():
    layer, model = built(), model_of()
    profile = diagnostics.kernel_profile(layer)
    figure = plots.plot_kernels(layer, before=profile)
    lines = figure.axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), profile.kernel[0])
    assert len(lines) == 2 * HEADS + 1
    (dots,) = plots.plot_spectrum(layer, head=1).axes[0].collections
    assert (
        len(dots.get_offsets()) == diagnostics.spectrum(layer).weights.shape[1]
    )
    (found,) = diagnostics.attention_maps(model, batch())
    figure = plots.plot_attention(found, head=1, example=1)
    np.testing.assert_allclose(
        figure.axes[0].images[0].get_array(), np.sqrt(found.weights[1, 1])
    )
    for arguments, match in (
        ({"head": HEADS}, "`head` must be"),
        ({"example": 2}, "`example` must be"),
    ):
        with pytest.raises(ValueError, match=match):
            plots.plot_attention(found, **arguments)
    with pytest.raises(ValueError, match="`head` must be"):
        plots.plot_spectrum(layer, head=-1)


def test_plots_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plots.plot_kernels(built())


def test_monitor_writes_and_warns_once(tmp_path, caplog):
    model = model_of(
        spectral_prior=keras_kt.MixturePrior(2, 1e-3), qk_norm="l2"
    )
    model.compile("sgd", "mse")
    monitor = keras_kt.diagnostics.SpectralMonitor(tmp_path, every=2)
    x = batch()
    with caplog.at_level(logging.WARNING, "keras_kt"):
        model.fit(
            x,
            np.zeros((2, LENGTH, WIDTH)),
            epochs=4,
            verbose=0,
            callbacks=[monitor],
        )
    warnings = [r for r in caplog.records if r.name == "keras_kt"]
    assert len(warnings) == HEADS
    (file,) = tmp_path.glob("events*")
    steps = {}
    for event in tf.compat.v1.train.summary_iterator(str(file)):
        for value in event.summary.value:
            steps.setdefault(value.tag, []).append(event.step)
    assert steps["attention/head_0/frequency_norm"] == [1, 3]
    assert steps["attention/kernels"] == [1]
    for tag in (
        "attention/kernels",
        "attention/head_1/kernel_at_2",
        "attention/head_0/probability_of_component_1",
        "attention/head_1/temperature",
    ):
        assert tag in steps, sorted(steps)
    assert monitor.epoch == [1, 3]
    past = monitor.history["attention"]
    layer = model.get_layer("attention")
    np.testing.assert_allclose(
        past["kernel"][-1],
        diagnostics.kernel_profile(layer, monitor.distances).kernel,
    )
    np.testing.assert_allclose(
        past["probability"][-1], np.exp(layer.spectral_prior.log_probabilities)
    )
    figure = plots.plot_history(monitor)
    titles = [panel.get_title().split(": ")[1] for panel in figure.axes]
    assert titles == ["kernel", "probability", "temperature"]
    lines = figure.axes[1].lines
    assert len(lines) == 2 * HEADS
    np.testing.assert_allclose(lines[0].get_xdata(), monitor.epoch)
    np.testing.assert_allclose(
        lines[1].get_ydata(), [record[0, 1] for record in past["probability"]]
    )
    with pytest.raises(ValueError, match="`path` must be one of"):
        plots.plot_history(monitor, "other")
    for unwatched in (
        keras_kt.diagnostics.SpectralMonitor(tmp_path),
        model.history,
    ):
        with pytest.raises(ValueError, match="watched at least one epoch"):
            plots.plot_history(unwatched)


def test_monitor_refuses():
    with pytest.raises(ValueError, match="argument `every`"):
        keras_kt.diagnostics.SpectralMonitor("logs", every=0)
    x = keras.Input((3,))
    model = keras.Model(x, keras.layers.Dense(1)(x))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="must have KernelizedAttention"):
        model.fit(
            np.ones((2, 3)),
            np.ones((2, 1)),
            callbacks=[keras_kt.diagnostics.SpectralMonitor("logs")],
            verbose=0,
        )
