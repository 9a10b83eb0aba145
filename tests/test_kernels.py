"""Random features against closed forms: bias, rate and prior gradients."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

import keras_kt
from keras_kt import kernels, numerics
from keras_kt.priors import base_noise
from tests.helpers import cases
from tests.helpers.contract import one_in

tfd = tfp.distributions

pytestmark = pytest.mark.filterwarnings("ignore:FastFoodPrior needs a power")

DIM, POINTS = 5, 3
DRAWS = 2000


@keras.saving.register_keras_serializable("keras_kt_tests")
def laplace(parameters):
    scale = tf.nn.softplus(parameters["scale"])
    return tfd.Independent(tfd.Laplace(parameters["loc"], scale), 1)


@keras.saving.register_keras_serializable("keras_kt_tests")
def box(parameters):
    half = tf.nn.softplus(parameters["half"])
    return tfd.Independent(tfd.Uniform(-half, half), 1)


@keras.saving.register_keras_serializable("keras_kt_tests")
def multivariate_normal(parameters):
    return tfd.MultivariateNormalTriL(
        parameters["loc"],
        tfp.bijectors.FillScaleTriL()(parameters["scale"]),
    )


_SMALL = keras.initializers.RandomNormal(stddev=0.3, seed=2)
CLOSED = {
    "normal": lambda: keras_kt.NormalPrior(radius="chi"),
    "normal-iid": lambda: keras_kt.NormalPrior(radius="chi", coupling="iid"),
    "normal-sobol": lambda: keras_kt.NormalPrior(
        radius="chi", coupling="sobol"
    ),
    "normal-fixed-radius": lambda: keras_kt.NormalPrior(),
    "normal-full": lambda: keras_kt.NormalPrior(
        radius="chi", covariance="full"
    ),
    "normal-mean": lambda: keras_kt.NormalPrior(
        use_mean=True, mean_initializer=_SMALL, radius="chi"
    ),
    "mixture": lambda: keras_kt.MixturePrior(radius="chi"),
    "mixture-mean": lambda: keras_kt.MixturePrior(
        num_components=3,
        use_mean=True,
        mean_initializer=_SMALL,
        radius="chi",
        initial_scale=0.8,
    ),
    "box": lambda: keras_kt.DistributionPrior(box, {"half": "ones"}),
    "multivariate": lambda: keras_kt.DistributionPrior(
        multivariate_normal,
        {"loc": _SMALL, "scale": ((DIM * (DIM + 1) // 2,), _SMALL)},
    ),
    "laplace": lambda: keras_kt.DistributionPrior(
        laplace, {"loc": "zeros", "scale": "zeros"}
    ),
    "cauchy": cases.cauchy_distribution,
}
HEAVY = ("laplace", "cauchy")
PAIRS = [
    (prior, feature_map)
    for prior in CLOSED
    for feature_map in cases.MAPS
    if not (prior in HEAVY and feature_map != "trigonometric")
    and not (prior.endswith("mean") and feature_map == "positive")
    # Biased by the draw's own normalizers; see below.
    and feature_map != "positive-self"
]


def points(heads):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, heads, POINTS, DIM))
    scale = 0.45 / math.sqrt(DIM) * 2
    return (scale * x).astype("float32"), (scale * y).astype("float32")


def build(prior_name, map_name, heads=1, frequencies=None, seed=0):
    prior, feature_map = CLOSED[prior_name](), cases.MAPS[map_name]()
    prior.seed = seed
    frequencies = frequencies or 2 * DIM * prior.num_components
    prior.build((heads, frequencies, DIM))
    feature_map.build(heads)
    return prior, feature_map


def estimates(prior, feature_map, x, y, draws):
    """k̂ of many draws, `(draws, heads, n, m)`; features in log space."""

    @tf.function
    def one(seed):
        bound = feature_map.bind(prior(seed=seed))
        phi_x, phi_y = bound.keys(x[tf.newaxis]), bound.keys(y[tf.newaxis])
        if bound.positive:
            phi_x, phi_y = tf.exp(phi_x), tf.exp(phi_y)
        return tf.matmul(phi_x, phi_y, transpose_b=True)[0]

    seeds = [tf.constant([17, i], tf.int32) for i in range(draws)]
    return np.stack([one(seed) for seed in seeds])


@pytest.mark.parametrize("prior_name, map_name", one_in(3, PAIRS))
def test_estimates_are_unbiased(prior_name, map_name):
    # Heads draw independently, so each is a further draw.
    heads = 8
    prior, feature_map = build(prior_name, map_name, heads)
    x, y = (np.tile(p, (heads, 1, 1)) for p in points(1))
    got = estimates(prior, feature_map, x, y, DRAWS // heads)
    expected = kernels.closed_form(prior, feature_map, x, y)
    deviations = (got - expected).reshape(DRAWS, POINTS, POINTS)
    error = deviations.std(axis=0) / DRAWS**0.5
    # Float32 rounding bounds the error where the estimate has no variance.
    assert (np.abs(deviations.mean(axis=0)) < 4.5 * error + 1e-6).all()


@pytest.mark.parametrize(
    "prior_name", [name for name in CLOSED if name != "normal-fixed-radius"]
)
def test_characteristic_functions_are_means_of_cosines(prior_name):
    """Of samples of the live view, which share no code with the formulas.

    The view of a fixed radius is a Gaussian of the same covariance.
    """
    prior, _ = build(prior_name, "trigonometric")
    z = points(1)[0]
    count = 20_000
    samples = prior.distribution().sample(count, seed=3).numpy()
    cosines = np.cos(np.einsum("nhd,hpd->nhp", samples, z))
    got = kernels.characteristic_function(prior, z)
    assert got.shape == (1, POINTS)
    error = cosines.std(axis=0) / count**0.5
    assert (np.abs(got - cosines.mean(axis=0)) < 4.5 * error).all()


def test_a_law_that_is_not_known_says_so():
    prior = keras_kt.GeneratorPrior()
    prior.build((1, DIM, DIM))
    with pytest.raises(ValueError, match="GeneratorPrior has no closed-form"):
        kernels.characteristic_function(prior, np.zeros((1, DIM)))


@pytest.mark.parametrize("prior_name", ("normal-iid", "mixture", "box"))
@pytest.mark.parametrize("map_name", ("positive", "trigonometric"))
def test_error_falls_with_the_root_of_the_number_of_features(
    prior_name, map_name
):
    sizes = np.array([16, 64, 256, 1024])
    errors = []
    # Near the origin, where the fourth moments of the estimate are small.
    x, y = (0.5 * p for p in points(16))
    for size in sizes:
        prior, feature_map = build(prior_name, map_name, 16, int(size))
        got = estimates(prior, feature_map, x, y, 24)
        expected = kernels.closed_form(prior, feature_map, x, y)
        errors.append(np.sqrt(np.mean((got - expected) ** 2)))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert -0.6 < slope < -0.4, slope


def test_two_sided_features_have_the_variance_that_theory_gives():
    """Relative to one-sided at equal width: 1 − exp(−|x + y|²)."""
    x, y = points(1)
    x, y = x[:, :1], y[:, :1]
    heads, variances = 64, []
    for two_sided in (False, True):
        prior = keras_kt.NormalPrior(coupling="iid", radius="chi", seed=1)
        feature_map = keras_kt.PositiveFeatures(two_sided=two_sided)
        prior.build((heads, feature_map.num_frequencies(8), DIM))
        feature_map.build(heads)
        tile = (heads, 1, 1)
        got = estimates(
            prior, feature_map, np.tile(x, tile), np.tile(y, tile), 200
        )
        variances.append(got.var())
    v = np.sum((x + y) ** 2)
    kernel = np.exp(np.sum(x * y))
    np.testing.assert_allclose(
        variances[0], kernel**2 * np.expm1(v) / 8, rtol=0.1
    )
    np.testing.assert_allclose(
        variances[1] / variances[0], 1 - np.exp(-v), rtol=0.1
    )


def test_trigonometric_features_have_the_variance_that_theory_gives():
    x, y = points(1)
    x, y = x[:, :1], y[:, :1]
    heads = 64
    prior = keras_kt.NormalPrior(coupling="iid", radius="chi", seed=1)
    feature_map = keras_kt.TrigonometricFeatures()
    prior.build((heads, 8, DIM))
    feature_map.build(heads)
    tile = (heads, 1, 1)
    got = estimates(prior, feature_map, np.tile(x, tile), np.tile(y, tile), 200)
    square = np.sum((x - y) ** 2)
    k, k_double = np.exp(-0.5 * square), np.exp(-2.0 * square)
    expected = (1 + k_double - 2 * k**2) / 2 / 8
    np.testing.assert_allclose(got.var(), expected, rtol=0.1)


@pytest.mark.parametrize("prior_name", ("normal", "mixture-mean"))
def test_self_normalized_features_tend_to_their_closed_form(prior_name):
    """A ratio of estimates: its bias falls as fast as the variance."""
    heads, errors = 8, []
    for frequencies in (24, 384):
        prior, feature_map = build(
            prior_name, "positive-self", heads, frequencies
        )
        x, y = (np.tile(p, (heads, 1, 1)) for p in points(1))
        got = estimates(prior, feature_map, x, y, 400)
        expected = kernels.closed_form(prior, feature_map, x, y)
        errors.append(np.abs(got.mean(0) / expected - 1).max())
    assert errors[0] < 0.3 and errors[1] < 0.2 * errors[0] + 0.003


@pytest.mark.parametrize("prior_name, map_name", one_in(3, PAIRS))
def test_prior_gradients_match_differences_of_the_closed_form(
    prior_name, map_name
):
    """The mean reparameterised gradient over draws, by z-score."""
    prior, feature_map = build(prior_name, map_name)
    x, y = points(1)
    weights = prior.trainable_weights

    @tf.function
    def gradient(seed):
        with tf.GradientTape() as tape:
            bound = feature_map.bind(prior(seed=seed))
            phi_x, phi_y = bound.keys(x[tf.newaxis]), bound.keys(y[tf.newaxis])
            if bound.positive:
                phi_x, phi_y = tf.exp(phi_x), tf.exp(phi_y)
            loss = tf.reduce_sum(phi_x * phi_y)
        return tape.gradient(loss, [w.value for w in weights])

    def closed():
        kernel = kernels.closed_form(prior, feature_map, x, y)
        return np.trace(kernel[0])

    draws = [
        [np.asarray(g) for g in gradient(tf.constant([5, i], tf.int32))]
        for i in range(600)
    ]
    for index, weight in enumerate(weights):
        samples = np.stack([draw[index] for draw in draws])
        start = weight.numpy()
        for place in np.ndindex(start.shape):
            values = []
            for step in (1e-2, -1e-2):
                moved = start.copy()
                moved[place] += step
                weight.assign(moved)
                values.append(closed())
            weight.assign(start)
            slope = (values[0] - values[1]) / 2e-2
            column = samples[(slice(None), *place)]
            error = column.std() / len(column) ** 0.5
            assert abs(column.mean() - slope) < 4.5 * error + 2e-3, (
                weight.name,
                place,
                column.mean(),
                slope,
                error,
            )


def test_fastfood_rows_start_as_standard_normal_vectors():
    prior = keras_kt.FastFoodPrior(seed=4)
    prior.build((400, 16, 16))
    rows = prior().offsets.numpy()
    norms = (rows**2).sum(-1)
    assert abs(norms.mean() - 16) < 4 * (32 / norms.size) ** 0.5
    direction = np.random.default_rng(0).normal(size=16)
    direction /= np.linalg.norm(direction)
    # One row of each head: rows of a head are not independent.
    projections = np.sort(rows[:, 3] @ direction)
    quantiles = 0.5 * (1.0 + tf.math.erf(projections / 2**0.5).numpy())
    distance = np.abs(quantiles - (np.arange(400) + 0.5) / 400).max()
    assert distance < 1.95 / 400**0.5  # Kolmogorov-Smirnov, one in a thousand


@pytest.mark.parametrize("map_name", ("positive", "trigonometric"))
def test_fastfood_and_generator_features_equal_their_own_atoms(map_name):
    for name in ("fastfood", "generator"):
        prior, feature_map = cases.build(name, map_name, dim=8)
        x = 0.3 * np.random.default_rng(0).normal(size=(cases.HEADS, 3, 8))
        bound = feature_map.bind(prior())
        phi = bound.keys(tf.constant(x[np.newaxis], tf.float32))
        if bound.positive:
            phi = tf.exp(phi)
        got = tf.matmul(phi, phi, transpose_b=True)[0]
        atoms = prior().offsets.numpy()
        expected = kernels.from_frequencies(atoms, feature_map, x, x)
        np.testing.assert_allclose(got, expected, rtol=1e-4)
        if name == "fastfood":
            closed = kernels.closed_form(prior, feature_map, x, x)
            np.testing.assert_allclose(closed, expected, rtol=1e-6)
        else:
            with pytest.raises(ValueError, match="from_frequencies"):
                kernels.closed_form(prior, feature_map, x, x)


def test_softmax_kernel_is_what_the_default_estimates():
    prior, feature_map = build("normal", "positive")
    x, y = points(1)
    expected = np.exp(x.astype("float64") @ y.transpose(0, 2, 1))
    got = kernels.closed_form(prior, feature_map, x, y)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_sphere_moment_matches_sampling_and_the_gaussian_limit():
    rows = base_noise.draw(
        (4000, 5, 5), tf.constant([1, 2]), radius="fixed"
    ).numpy()
    z = np.array([0.5, -0.3, 0.2, 0.1, 0.4])
    values = np.exp(rows.reshape(-1, 5) @ z)
    expected = kernels.sphere_moment(np.sum(z**2), 5)
    assert abs(values.mean() - expected) < 4 * values.std() / len(values) ** 0.5
    wide = kernels.sphere_moment(np.array([1.0, -1.0]), 10**6)
    np.testing.assert_allclose(wide, np.exp([0.5, -0.5]), rtol=1e-5)


def test_softmax_attention_of_a_hand_computed_case():
    query = np.array([[0.0], [np.log(2.0)]])
    key = np.array([[0.0], [1.0]])
    value = np.array([[3.0], [6.0]])
    output, weights = kernels.softmax_attention(query, key, value)
    np.testing.assert_allclose(weights, [[1 / 2, 1 / 2], [1 / 3, 2 / 3]])
    np.testing.assert_allclose(output, [[4.5], [5.0]])
    mask = np.array([[True, False], [False, False]])
    output, _ = kernels.softmax_attention(query, key, value, mask)
    np.testing.assert_allclose(output, [[3.0], [0.0]])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_sine_and_cosine(jit_compile):
    """Against NumPy's in float64; angles without meaning stay finite."""
    function = tf.function(numerics.sine_and_cosine, jit_compile=jit_compile)
    x = np.linspace(-3000.0, 3000.0, 200_001, dtype="float32")
    exact = np.sin(x.astype("float64")), np.cos(x.astype("float64"))
    for got, expected in zip(function(x), exact, strict=True):
        np.testing.assert_allclose(got, expected, atol=3e-7)
    with tf.GradientTape() as tape:
        x = tf.constant(x)
        tape.watch(x)
        sine, cosine = function(x)
        total = 2.0 * sine + 3.0 * cosine
    np.testing.assert_allclose(
        tape.gradient(total, x), 2 * exact[1] - 3 * exact[0], atol=2e-6
    )
    for got in function(tf.constant([1e30, -np.inf])):
        assert np.all(np.abs(got) <= 1.0)
    assert np.isnan(function(tf.constant([np.nan]))).all()
