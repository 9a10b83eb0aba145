"""Priors of TFP distributions: one stored draw, the same wherever it runs."""

import functools
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

import keras_kt
from tests.helpers.contract import exhaustive

tfd, tfb = tfp.distributions, tfp.bijectors

HEADS, DIM, ROWS = 2, 3, 40


def positive(x):
    return tf.nn.softplus(x)


def independent(family):
    """A law of coordinates that are alike in kind."""

    def law(p):
        return tfd.Independent(family(p), 1)

    return law


# Scalar laws that TFP gives a quantile or a rule of ours covers, by name.
SCALARS = {
    "Normal": lambda p: tfd.Normal(p["a"], positive(p["b"])),
    "Laplace": lambda p: tfd.Laplace(p["a"], positive(p["b"])),
    "Logistic": lambda p: tfd.Logistic(p["a"], positive(p["b"])),
    "Cauchy": lambda p: tfd.Cauchy(p["a"], positive(p["b"])),
    "StudentT": lambda p: tfd.StudentT(
        3.0 + positive(p["a"]), p["a"], positive(p["b"])
    ),
    "Gumbel": lambda p: tfd.Gumbel(p["a"], positive(p["b"])),
    "Uniform": lambda p: tfd.Uniform(p["a"] - positive(p["b"]), p["a"] + 1.0),
    "Triangular": lambda p: tfd.Triangular(
        p["a"] - positive(p["b"]), p["a"] + 2.0, p["a"]
    ),
    "Beta": lambda p: tfd.Beta(1.0 + positive(p["a"]), positive(p["b"])),
    "Kumaraswamy": lambda p: tfd.Kumaraswamy(
        1.0 + positive(p["a"]), positive(p["b"])
    ),
    "Gamma": lambda p: tfd.Gamma(positive(p["a"]), positive(p["b"])),
    "Chi2": lambda p: tfd.Chi2(positive(p["a"] + p["b"])),
    "InverseGamma": lambda p: tfd.InverseGamma(
        3.0 + positive(p["a"]), positive(p["b"])
    ),
    "Exponential": lambda p: tfd.Exponential(positive(p["a"] + p["b"])),
    "HalfNormal": lambda p: tfd.HalfNormal(positive(p["a"] + p["b"])),
    "Weibull": lambda p: tfd.Weibull(1.0 + positive(p["a"]), positive(p["b"])),
    "Moyal": lambda p: tfd.Moyal(p["a"], positive(p["b"])),
    "Pareto": lambda p: tfd.Pareto(3.0 + positive(p["a"]), positive(p["b"])),
    "GeneralizedNormal": lambda p: tfd.GeneralizedNormal(
        p["a"], positive(p["b"]), 1.5 + positive(p["a"])
    ),
    "GeneralizedPareto": lambda p: tfd.GeneralizedPareto(
        p["a"], positive(p["b"]), 0.1
    ),
    "TruncatedNormal": lambda p: tfd.TruncatedNormal(
        p["a"], positive(p["b"]), -3.0, 3.0
    ),
    "TruncatedCauchy": lambda p: tfd.TruncatedCauchy(
        p["a"], positive(p["b"]), -3.0, 3.0
    ),
    "TwoPieceNormal": lambda p: tfd.TwoPieceNormal(p["a"], positive(p["b"]), 2),
    "TwoPieceStudentT": lambda p: tfd.TwoPieceStudentT(
        5.0, p["a"], positive(p["b"]), 2.0
    ),
    "JohnsonSU": lambda p: tfd.JohnsonSU(p["a"], 2.0, 0.0, positive(p["b"])),
    "SinhArcsinh": lambda p: tfd.SinhArcsinh(p["a"], positive(p["b"]), 0.2),
    "LambertWNormal": lambda p: tfd.LambertWNormal(
        p["a"], positive(p["b"]), 0.1
    ),
    "LogNormal": lambda p: tfd.LogNormal(p["a"], 0.3 * positive(p["b"])),
    "LogitNormal": lambda p: tfd.LogitNormal(p["a"], positive(p["b"])),
    "scalar mixture": lambda p: tfd.MixtureSameFamily(
        tfd.Categorical(logits=tf.stack([p["a"], p["b"]], -1)),
        tfd.Normal(tf.stack([p["a"] - 2.0, p["b"]], -1), 1.0),
        reparameterize=True,
    ),
}


def full_covariance(p):
    factor = tfb.FillScaleTriL()(p["f"])
    return tfd.MultivariateNormalTriL(p["a"], factor)


def low_rank(p):
    return tfd.MultivariateNormalDiagPlusLowRankCovariance(
        p["a"], positive(p["b"]), p["f"]
    )


def centred_low_rank(p):
    return tfd.MultivariateNormalDiagPlusLowRankCovariance(
        cov_diag_factor=positive(p["b"]), cov_perturb_factor=p["f"]
    )


def vector_mixture(p, reparameterize=False):
    components = tfd.MultivariateNormalDiag(p["m"], positive(p["s"]))
    return tfd.MixtureSameFamily(
        tfd.Categorical(logits=p["w"]), components, reparameterize
    )


def factorised_mixture(p):
    components = tfd.Independent(tfd.Normal(p["m"], positive(p["s"])), 1)
    return tfd.MixtureSameFamily(
        tfd.Categorical(logits=p["w"]), components, reparameterize=True
    )


def student(p):
    scale = tf.linalg.LinearOperatorLowerTriangular(tfb.FillScaleTriL()(p["f"]))
    return tfd.MultivariateStudentTLinearOperator(
        5.0 + positive(p["a"][:, 0]), p["a"], scale
    )


def blockwise(p):
    return tfd.Blockwise(
        [
            tfd.Independent(tfd.Laplace(p["a"][:, :1], 1.0), 1),
            tfd.MultivariateNormalDiag(p["a"][:, 1:], positive(p["b"][:, 1:])),
        ]
    )


def power_spherical(p):
    direction = tf.math.l2_normalize(p["a"] + [1.0, 0.0, 0.0], axis=-1)
    return tfd.PowerSpherical(direction, positive(p["b"][:, 0]))


def flow(p):
    base = tfd.MultivariateNormalDiag(p["a"], positive(p["b"]))
    return tfd.TransformedDistribution(base, tfb.SoftClip(low=-4.0, high=4.0))


def repeated(p):
    return tfd.Sample(tfd.Normal(p["a"][:, 0], positive(p["b"][:, 0])), [DIM])


def sphere(p):
    """Uniform directions at a learned distance from a learned center."""
    return tfd.TransformedDistribution(
        tfd.SphericalUniform(DIM, batch_shape=[HEADS]),
        tfb.Chain([tfb.Shift(p["a"]), tfb.Scale(positive(p["b"][:, :1]))]),
    )


_SMALL = keras.initializers.RandomNormal(stddev=0.3, seed=4)
_AB = {"a": _SMALL, "b": "zeros"}
_F = {"f": ((DIM * (DIM + 1) // 2,), _SMALL)}
_MIXED = {"w": ((3,), _SMALL), "m": ((3, "head_dim"), _SMALL)}
_MIXED["s"] = ((3, "head_dim"), "zeros")
VECTORS = {
    "full covariance": (full_covariance, {"a": _SMALL, **_F}),
    "low rank": (low_rank, {**_AB, "f": (("head_dim", 2), _SMALL)}),
    "centered low rank": (
        centred_low_rank,
        {"b": "zeros", "f": (("head_dim", 2), _SMALL)},
    ),
    "vector mixture": (vector_mixture, _MIXED),
    "factorised mixture": (factorised_mixture, _MIXED),
    "multivariate Student-t": (student, {"a": _SMALL, **_F}),
    "blockwise": (blockwise, _AB),
    "power spherical": (power_spherical, _AB),
    "flow": (flow, _AB),
    "sample": (repeated, _AB),
    "sphere": (sphere, _AB),
}
LAWS = {
    **{name: (independent(law), _AB) for name, law in SCALARS.items()},
    **VECTORS,
}
for _name, (_law, _) in LAWS.items():
    keras.saving.register_keras_serializable("laws", _name)(_law)

# One for each rule, for the tests of every day.
FEW = (
    "Laplace",
    "GeneralizedNormal",
    "TruncatedNormal",
    "Triangular",
    "scalar mixture",
    "full covariance",
    "vector mixture",
    "blockwise",
    "power spherical",
    "sample",
)
EACH = [
    name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
    for name in LAWS
]


def prior_of(name, **kwargs):
    function, parameters = LAWS[name]
    return keras_kt.DistributionPrior(function, parameters, seed=3, **kwargs)


def weighted(draw):
    """Frequencies `(heads, rows, dim)` of a draw and their weights."""
    omega, log_weights = draw.offsets.numpy(), draw.log_weights.numpy()
    rows = omega.shape[1] // log_weights.shape[1]
    if draw.means is not None:
        means = draw.means.numpy()
        omega = omega + np.repeat(means, omega.shape[1] // means.shape[1], 1)
    weights = np.repeat(np.exp(log_weights), rows, 1)
    return omega, weights


def statistic(draw):
    """A smooth number of a draw, which hangs on all of it."""
    omega = draw.offsets
    if draw.means is not None:
        omega += tf.repeat(draw.means, ROWS // draw.means.shape[1], axis=1)
    count = ROWS // draw.log_weights.shape[1]
    weights = tf.repeat(tf.exp(draw.log_weights), count, axis=1)
    values = tf.tanh(0.5 * omega) * [1.0, -2.0, 0.5] + tf.cos(omega)
    return tf.reduce_sum(weights[..., tf.newaxis] * values)


@pytest.mark.parametrize(
    "name",
    [
        # Of the gradients of Gamma and Student-t, which XLA takes long for.
        exhaustive(name)
        if name in ("Chi2", "InverseGamma", "TwoPieceStudentT")
        # XLA compiles what they are made of for 8 s and more.
        else name
        if name in FEW and name not in ("GeneralizedNormal", "power spherical")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in LAWS
    ],
)
def test_draws_and_gradients_are_the_same_eagerly_in_graphs_and_under_xla(name):
    prior = prior_of(name)
    prior.build((HEADS, ROWS, DIM))

    def draw_and_gradients():
        with tf.GradientTape() as tape:
            draw = prior()
            value = statistic(draw)
        return draw.offsets, *tape.gradient(value, prior.trainable_variables)

    # Gamma-based laws drew others under a tape.
    eager = draw_and_gradients()
    np.testing.assert_array_equal(prior().offsets, eager[0])
    for jit_compile in (False, True):
        compiled = tf.function(draw_and_gradients, jit_compile=jit_compile)
        for got, expected in zip(compiled(), eager, strict=True):
            scale = float(tf.reduce_max(tf.abs(expected)))
            np.testing.assert_allclose(
                got, expected, rtol=1e-4, atol=1e-5 * scale
            )


@pytest.mark.parametrize("name", EACH)
def test_frequencies_have_the_law(name):
    """Against TFP's own sampler: moments that exist for heavy tails too."""
    prior = prior_of(name)
    prior.build((HEADS, 3000, DIM))
    omega, weights = weighted(prior())
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
    samples = prior.distribution().sample(30000, seed=7).numpy()
    samples = samples.transpose(1, 0, 2)
    for moment in (
        np.tanh,
        np.cos,
        lambda x: np.sin(x) * np.cos(np.roll(x, 1, axis=-1)),
    ):
        ours = np.einsum("hm,hmd->hd", weights, moment(omega))
        theirs = moment(samples)
        error = theirs.std(1) * (1 / 3000 + 1 / 30000) ** 0.5
        # Weights of a mixture make the effective count smaller.
        error *= (3000 * np.square(weights).sum(1).max()) ** 0.5
        np.testing.assert_array_less(
            np.abs(ours - theirs.mean(1)), 5 * error + 1e-4
        )


@pytest.mark.parametrize("name", EACH)
def test_gradients_are_those_of_finite_differences(name):
    """Of a smooth statistic of one stored draw, for every parameter."""
    prior = prior_of(name)
    prior.build((HEADS, ROWS, DIM))

    with tf.GradientTape() as tape:
        value = statistic(prior())
    gradients = tape.gradient(value, prior.trainable_variables)
    rng = np.random.default_rng(0)
    for weight, gradient in zip(
        prior.trainable_variables, gradients, strict=True
    ):
        direction = rng.normal(size=weight.shape).astype("float32")
        direction /= np.linalg.norm(direction)
        start, sides = weight.numpy(), []
        for step in (0.02, -0.02):
            weight.assign(start + step * direction)
            sides.append(float(statistic(prior())))
        weight.assign(start)
        expected = (sides[0] - sides[1]) / 0.04
        got = float(np.sum(direction * gradient.numpy()))
        if name == "scalar mixture":
            # A sample that changes its component jumps; the gradient is that
            # of the expectation, not of the draw.
            assert np.isfinite(got)
            continue
        np.testing.assert_allclose(got, expected, rtol=0.02, atol=3e-3)


def test_the_implicit_gradient_of_a_mixture_is_that_of_its_expectation():
    start = np.array([0.3, -0.5, 0.2])

    def law(p):
        logits = tf.stack([p[0], 0.0])
        means = tf.stack([p[1] - 2.0, p[2] + 1.0])
        mixture = tfd.MixtureSameFamily(
            tfd.Categorical(logits=logits), tfd.Normal(means, [1.0, 0.5])
        )
        return tfd.Independent(mixture, 0)

    from keras_kt.priors import reparameterization

    uniform = np.random.default_rng(0).uniform(size=(200_000, 2))
    parameters = tf.constant(start, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(parameters)
        sampler = reparameterization.sampler(law(parameters))
        x = sampler.sample(tf.constant(uniform, tf.float32))
        value = tf.reduce_mean(tf.tanh(x))
    got = tape.gradient(value, parameters).numpy()

    def expectation(p):
        share = 1.0 / (1.0 + np.exp(-p[0]))

        def normal(x, mean, scale):
            z = (x - mean) / scale
            return np.exp(-0.5 * z * z) / (scale * np.sqrt(2 * np.pi))

        def integrand(x):
            return np.tanh(x) * (
                share * normal(x, p[1] - 2.0, 1.0)
                + (1.0 - share) * normal(x, p[2] + 1.0, 0.5)
            )

        # The rule of rectangles is exact to rounding for smooth tails.
        grid = np.linspace(-12.0, 12.0, 4801)
        return np.sum(integrand(grid)) * (grid[1] - grid[0])

    expected = [
        (expectation(start + e) - expectation(start - e)) / 2e-4
        for e in 1e-4 * np.eye(3)
    ]
    np.testing.assert_allclose(got, expected, atol=0.01)


@keras.saving.register_keras_serializable("laws")
class Waves(keras.layers.Layer):
    """The mean of cos ω·x over the frequencies of one prior."""

    def __init__(self, prior, **kwargs):
        super().__init__(**kwargs)
        self.recipe = prior

    def build(self, input_shape):
        self.prior = self.recipe.copy(name="prior")
        self.prior.build((HEADS, ROWS, input_shape[-1]))

    def call(self, x):
        draw = self.prior()
        omega, log_weights = draw.offsets, draw.log_weights
        if draw.means is not None:
            count = ROWS // draw.means.shape[1]
            omega += tf.repeat(draw.means, count, axis=1)
        weights = tf.repeat(
            tf.exp(log_weights), ROWS // log_weights.shape[1], axis=1
        )
        waves = tf.cos(tf.einsum("bd,hmd->bhm", x, omega))
        return tf.einsum("bhm,hm->bh", waves, weights)

    def get_config(self):
        recipe = keras.saving.serialize_keras_object(self.recipe)
        return {**super().get_config(), "prior": recipe}

    @classmethod
    def from_config(cls, config):
        prior = keras.saving.deserialize_keras_object(config.pop("prior"))
        return cls(prior, **config)


OTHERS = [name for name in LAWS if name not in FEW]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(FEW, marks=pytest.mark.slow, id="few"),
        *(exhaustive(OTHERS[part::3], id=str(part)) for part in range(3)),
    ],
)
def test_trained_loaded_and_served_models_agree(names, tmp_path):
    """A training step, then a file and a server."""
    x = keras.Input((DIM,), name="x")
    model = keras.Model(x, [Waves(prior_of(name))(x) for name in names])
    data = np.random.default_rng(0).normal(size=(8, DIM)).astype("float32")
    model.compile("adam", ["mse"] * len(names), jit_compile=False)
    model.optimizer.build(model.trainable_variables)  # Else traced twice.
    before = model.get_weights()
    model.fit(data, [np.zeros((8, HEADS))] * len(names), verbose=0)
    for weight, start in zip(model.weights, before, strict=True):
        assert np.isfinite(weight).all(), weight.path
        moved = (weight.numpy() != start).any()
        assert moved == weight.trainable, weight.path
    expected = model.predict(data, verbose=0)
    eager = model(data)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded = loaded.predict(data, verbose=0)
    served = tf.saved_model.load(
        keras_kt.export_saved_model(model, tmp_path / "served")
    ).signatures["serve"](x=data)
    for index, (name, answer) in enumerate(zip(names, expected, strict=True)):
        others = (
            eager[index],
            loaded[index],
            served[f"output_{index}"],
        )
        for other in others:
            np.testing.assert_allclose(other, answer, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_the_reported_mixture_is_the_same_under_xla_and_served(tmp_path):
    """Drew other frequencies by 7.8 under XLA than in the export."""
    prior = keras_kt.DistributionPrior(factorised_mixture, _MIXED)
    x = keras.Input((None, 16), name="x")
    layer = keras_kt.KernelizedAttention(
        2, 8, spectral_prior=prior, feature_map="rks", seed=0
    )
    model = keras.Model(x, layer(x, x))
    model.compile("adam", "mse", jit_compile=True)
    data = np.random.RandomState(0).normal(size=(2, 64, 16)).astype("float32")
    served = tf.saved_model.load(keras_kt.export_saved_model(model, tmp_path))
    output = served.signatures["serve"](x=data)["output_0"]
    np.testing.assert_allclose(
        model.predict(data, verbose=0), output, atol=1e-4
    )
    # Three components in eight frequencies.
    draw = layer.spectral_prior()
    assert draw.log_weights.shape == (2, 8)
    np.testing.assert_allclose(np.exp(draw.log_weights).sum(1), 1.0, rtol=1e-5)


@pytest.mark.slow
def test_threads_leave_tfp_and_each_other_alone():
    """A patch of TFP's samplers changed what other threads drew."""

    def sample():
        return tfd.Normal(0.0, 1.0).sample(3, seed=(1, 2)).numpy()

    expected = sample()
    prior = prior_of("Laplace")
    layer = keras_kt.KernelizedAttention(
        2, DIM, spectral_prior=prior, feature_map="rks", seed=1
    )
    x = np.random.default_rng(0).normal(size=(1, 5, 4)).astype("float32")
    output = layer(x, x).numpy()
    wrong = []

    def work():
        for _ in range(20):
            if not np.array_equal(layer(x, x), output):
                wrong.append("layer")
            if not np.array_equal(sample(), expected):
                wrong.append("sample")

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    np.testing.assert_array_equal(sample(), expected)


def test_a_symmetric_truncated_law_trains_with_positive_features():
    """TFP's moments of it have NaN gradients."""

    def truncated(p):
        scale = tf.nn.softplus(p["s"])
        return tfd.Independent(tfd.TruncatedNormal(0.0, scale, -3.0, 3.0), 1)

    prior = keras_kt.DistributionPrior(truncated, {"s": "zeros"})
    x = keras.Input((None, 6))
    layer = keras_kt.KernelizedAttention(2, 4, spectral_prior=prior)
    model = keras.Model(x, layer(x, x))
    model.compile("adam", "mse")
    data = np.random.default_rng(0).normal(size=(2, 7, 6)).astype("float32")
    before = layer.spectral_weights[0].numpy()
    model.fit(data, data, verbose=0)
    after = layer.spectral_weights[0].numpy()
    assert np.isfinite(after).all() and (after != before).any()


@pytest.mark.parametrize("name", EACH)
def test_positive_features_of_every_light_law_have_finite_gradients(name):
    prior = prior_of(name)
    prior.build((HEADS, ROWS, DIM))
    if not prior.has_moment_generating_function:
        pytest.skip("positive features refuse its tails")
    feature_map = keras_kt.PositiveFeatures()
    feature_map.build(HEADS)
    x = np.random.default_rng(0).normal(size=(1, HEADS, 5, DIM))
    with tf.GradientTape() as tape:
        bound = feature_map.bind(prior(), 0.7)
        total = tf.reduce_sum(tf.exp(bound.keys(tf.constant(x, tf.float32))))
    for gradient in tape.gradient(total, prior.trainable_variables):
        assert gradient is not None and np.isfinite(gradient).all()


def test_moments_are_those_of_the_law_or_of_the_draw():
    for name in ("Normal", "full covariance", "Uniform"):
        prior = prior_of(name)
        prior.build((HEADS, ROWS, DIM))
        mean = prior().means[:, 0]
        np.testing.assert_allclose(mean, prior.distribution().mean(), rtol=1e-5)
    prior = prior_of("TruncatedNormal")
    prior.build((HEADS, ROWS, DIM))
    draw = prior()
    np.testing.assert_allclose(draw.offsets.numpy().mean(1), 0.0, atol=1e-5)
    variance = np.square(draw.offsets).mean(1)
    np.testing.assert_allclose(draw.covariances[:, 0], variance, rtol=1e-4)


class Stray:
    """A law that reads a variable of its own."""

    def __init__(self, trainable):
        self.variable = tf.Variable(tf.ones(DIM), trainable=trainable)

    def __call__(self, p):
        return tfd.Independent(tfd.Normal(p["a"], self.variable), 1)


@pytest.mark.parametrize("trainable", [True, False])
def test_variables_of_ones_own_are_refused_by_name(trainable):
    """They were neither trained nor saved."""
    prior = keras_kt.DistributionPrior(Stray(trainable), {"a": "zeros"})
    with pytest.raises(ValueError, match=r"also reads the variables.*\(3,\)"):
        prior.build((HEADS, ROWS, DIM))


def test_networks_made_in_the_function_are_refused():
    def fresh(p):
        shift = keras.layers.Dense(DIM)(p["a"])
        return tfd.MultivariateNormalDiag(shift, tf.ones_like(p["a"]))

    prior = keras_kt.DistributionPrior(fresh, {"a": "ones"})
    with pytest.raises(ValueError, match="an entry of `parameters`"):
        prior.build((HEADS, ROWS, DIM))


def test_parameters_that_move_nothing_are_refused():
    prior = keras_kt.DistributionPrior(
        lambda p: tfd.Independent(tfd.Normal(p["a"], 1.0), 1),
        {"a": "zeros", "idle": "zeros"},
    )
    with pytest.raises(ValueError, match="Received: 'idle', on which"):
        prior.build((HEADS, ROWS, DIM))


@pytest.mark.parametrize(
    ("law", "words"),
    [
        (
            lambda p: tfd.Independent(
                tfd.Normal(tf.cast(p["a"], tf.float64), np.float64(1.0)), 1
            ),
            "must return a float32 distribution.*float64",
        ),
        (
            lambda p: tfd.Independent(tfd.VonMises(p["a"], 1.0), 1),
            "for whose part VonMises none is known",
        ),
        (
            lambda p: tfd.Independent(
                tfd.NormalInverseGaussian(p["a"], 2.0, 0.5, 1.0), 1
            ),
            "NormalInverseGaussian none is known",
        ),
        (
            lambda p: tfd.VonMisesFisher(
                tf.math.l2_normalize(p["a"] + 1.0, -1), tf.ones(HEADS)
            ),
            "VonMisesFisher",
        ),
    ],
)
def test_laws_that_cannot_promise_it_are_refused_at_build(law, words):
    prior = keras_kt.DistributionPrior(law, {"a": "zeros"})
    layer = keras_kt.KernelizedAttention(
        HEADS, DIM, spectral_prior=prior, feature_map="trigonometric"
    )
    with pytest.raises(ValueError, match=words):
        layer.build((None, None, 4), (None, None, 4))


def test_more_components_than_frequencies_are_refused():
    with pytest.raises(ValueError, match="2 frequencies for 3 components"):
        prior_of("vector mixture").build((HEADS, 2, DIM))


@pytest.mark.parametrize("rows", [3, 8, 9])
def test_shares_of_a_mixture_may_differ_by_one(rows):
    prior = prior_of("vector mixture")
    prior.build((HEADS, rows, DIM))
    omega, weights = weighted(prior())
    assert omega.shape == (HEADS, rows, DIM)
    mixture = prior.distribution().mixture_distribution
    counts = [rows // 3 + (c < rows % 3) for c in range(3)]
    expected = np.repeat(mixture.probs_parameter() / counts, counts, axis=1)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


class Scaled:
    """A callable that Keras cannot serialise."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, p):
        return tfd.Independent(tfd.Normal(p["a"], self.scale), 1)


def normal_of(scale, p):
    return tfd.Independent(tfd.Normal(p["a"], scale), 1)


@pytest.mark.parametrize(
    "function",
    [functools.partial(normal_of, 0.5), Scaled(0.5)],
    ids=["partial", "callable object"],
)
def test_what_cannot_be_saved_can_be_built_and_copied(function, tmp_path):
    """A recipe was copied by serialising it."""
    prior = keras_kt.DistributionPrior(
        function, {"a": lambda shape, dtype: tf.ones(shape, dtype)}
    )
    block = keras_kt.KernelizedTransformerEncoder(
        8, 2, key_dim=DIM, spectral_prior=prior
    )
    x = keras.Input((None, 4))
    model = keras.Model(x, block(x))
    assert model(np.ones((1, 5, 4))).shape == (1, 5, 4)
    with pytest.raises(ValueError, match="register_keras_serializable"):
        model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    folder = keras_kt.export_saved_model(model, tmp_path / "export")
    assert tf.saved_model.load(folder)


def test_frozen_recipes_are_copied_frozen():
    prior = keras_kt.NormalPrior()
    prior.trainable = False
    layer = keras_kt.KernelizedAttention(2, 4, spectral_prior=prior)
    layer.build((None, None, 3), (None, None, 3))
    assert not layer.spectral_prior.trainable
    assert layer.spectral_weights == []
