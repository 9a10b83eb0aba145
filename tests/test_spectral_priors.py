import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

import keras_kt
from keras_kt import priors
from tests.helpers import cases

tfd = tfp.distributions

pytestmark = pytest.mark.filterwarnings("ignore:FastFoodPrior needs a power")


@keras.saving.register_keras_serializable("keras_kt_tests")
def student(parameters):
    scale = tf.nn.softplus(parameters["scale"])
    return tfd.Independent(tfd.StudentT(4.0, parameters["loc"], scale), 1)


@keras.saving.register_keras_serializable("keras_kt_tests")
def poisson(parameters):
    return tfd.Independent(tfd.Poisson(tf.exp(parameters["rate"])), 1)


@pytest.mark.parametrize("name", cases.PRIORS)
def test_distribution_has_the_law_of_the_frequencies(name):
    heads, dim = 3, 4
    prior = cases.PRIORS[name]()
    prior.radius = "chi"  # the law that `distribution` names
    prior.build((heads, 8, dim))
    for weight in prior.trainable_weights:
        noise = 0.3 * np.random.default_rng(5).normal(size=weight.shape)
        weight.assign(weight + noise.astype("float32"))
    drawn = []
    redraws = 1 if name == "fastfood" else 1500
    draw = tf.function(lambda seed: prior(seed=seed))
    for index in range(redraws):
        frequencies = draw(tf.constant([index, 9], tf.int32))
        if name == "fastfood":  # its law is that of the stored permutation
            frequencies = prior()
        omega = frequencies.offsets.numpy()
        if frequencies.means is not None:
            count = omega.shape[1] // frequencies.means.shape[1]
            omega = omega + np.repeat(frequencies.means.numpy(), count, 1)
        weights = np.exp(frequencies.log_weights.numpy())
        count = omega.shape[1] // weights.shape[1]
        drawn.append((omega, np.repeat(weights, count, axis=1)))
    omega = np.concatenate([d[0] for d in drawn], axis=1)
    weights = np.concatenate([d[1] for d in drawn], axis=1)
    weights /= weights.sum(1, keepdims=True)
    distribution = prior.distribution()
    assert distribution.batch_shape == (heads,)
    assert distribution.event_shape == (dim,)
    samples = distribution.sample(20000, seed=3).numpy().transpose(1, 0, 2)
    for moment in (
        lambda x: x,
        lambda x: x * np.roll(x, 1, axis=-1),
        lambda x: np.abs(x),
        lambda x: x**2,
    ):
        ours = np.einsum("hm,hmd->hd", weights, moment(omega))
        theirs = moment(samples).mean(1)
        spread = moment(samples).std(1)
        error = spread * (1 / 20000 + 2 / omega.shape[1]) ** 0.5
        if name == "fastfood":
            error = spread / 20000**0.5
        np.testing.assert_array_less(np.abs(ours - theirs), 5 * error + 1e-5)


@pytest.mark.parametrize("name", cases.PRIORS)
def test_config_round_trip_keeps_everything(name):
    prior = cases.PRIORS[name]()
    config = keras.saving.serialize_keras_object(prior)
    again = keras.saving.deserialize_keras_object(config)
    assert keras.saving.serialize_keras_object(again) == config


def test_every_argument_survives_the_config():
    priors = [
        keras_kt.MixturePrior(
            num_components=3,
            initial_scale=[0.5, 1.0, 2.0],
            covariance="full",
            use_mean=True,
            coupling="sobol",
            radius="chi",
            mean_initializer="ones",
            mean_regularizer="l1",
            scale_regularizer="l2",
            logits_regularizer="l1l2",
            per_head=False,
            kl_weight=0.5,
            seed=3,
            name="mine",
            trainable=False,
        ),
        keras_kt.FastFoodPrior(diagonal_regularizer="l2", per_head=False),
        keras_kt.GeneratorPrior(
            (3, 4),
            noise_dim=2,
            coupling="orthogonal",
            kernel_initializer="he_normal",
            kernel_regularizer="l2",
        ),
        cases.normal_distribution(
            has_moment_generating_function=True, parameter_regularizer="l2"
        ),
    ]
    for prior in priors:
        config = prior.get_config()
        again = type(prior).from_config(config)
        assert again.get_config() == config
        frequencies = 12
        again.build((2, frequencies, 4))
        assert again().offsets.shape == (2, frequencies, 4)
        assert bool(again.losses) or not again.trainable


def test_shared_parameters_draw_noise_for_each_head():
    for name in ("normal", "mixture", "fastfood", "generator", "distribution"):
        prior = cases.PRIORS[name]()
        prior.per_head = False
        prior.build((3, 8, 4))
        assert all(w.shape[0] == 1 for w in prior.trainable_weights)
        offsets = prior().offsets.numpy()
        assert np.abs(offsets[0] - offsets[1]).max() > 0.1


def test_seeds_reproduce_and_differ():
    def offsets(seed):
        prior = keras_kt.NormalPrior(seed=seed)
        prior.build((2, 8, 4))
        return prior().offsets.numpy()

    np.testing.assert_array_equal(offsets(1), offsets(1))
    assert np.abs(offsets(1) - offsets(2)).max() > 0.1
    assert np.abs(offsets(None) - offsets(None)).max() > 0.1


def test_resample_replaces_norms_and_directions():
    prior = keras_kt.NormalPrior(radius="chi", seed=1)
    prior.build((2, 8, 4))
    before = prior().offsets.numpy()
    prior.resample(5)
    after = prior().offsets.numpy()
    norms = [np.linalg.norm(x, axis=-1) for x in (before, after)]
    assert np.abs(norms[0] - norms[1]).max() > 0.1
    prior.resample(1)
    np.testing.assert_array_equal(prior().offsets, before)


def test_kl_to_the_standard_normal_is_exact_for_one_gaussian():
    prior = keras_kt.NormalPrior(
        initial_scale=0.5, use_mean=True, mean_initializer="ones", kl_weight=2.0
    )
    prior.build((3, 8, 4))
    expected = 4 * (0.5 * (0.25 + 1.0 - 1.0) - np.log(0.5))
    np.testing.assert_allclose(prior.kl_divergence(), expected, rtol=1e-5)
    prior()
    np.testing.assert_allclose(prior.losses[0], 2.0 * expected, rtol=1e-5)


def test_kl_of_a_mixture_bounds_the_true_one():
    prior = keras_kt.MixturePrior(initial_scale=[0.5, 2.0], kl_weight=1.0)
    prior.build((2, 8, 4))
    distribution = prior.distribution()
    samples = distribution.sample(20000, seed=1)
    reference = tfd.MultivariateNormalDiag(loc=tf.zeros(4))
    true = tf.reduce_mean(
        distribution.log_prob(samples) - reference.log_prob(samples), axis=0
    )
    assert (prior.kl_divergence().numpy() > true.numpy() - 0.05).all()


@keras.saving.register_keras_serializable("keras_kt_tests")
def diagonal_normal(parameters):
    return tfd.MultivariateNormalDiag(
        parameters["loc"], tf.nn.softplus(parameters["scale"])
    )


def test_kl_of_a_registered_distribution_is_exact():
    prior = keras_kt.DistributionPrior(
        diagonal_normal, {"loc": "ones", "scale": "zeros"}, kl_weight=1.0
    )
    prior.build((2, 8, 4))
    scale = np.log(2.0)
    expected = 4 * (0.5 * (scale**2 + 1.0 - 1.0) - np.log(scale))
    np.testing.assert_allclose(prior.kl_divergence(), expected, rtol=1e-5)


def test_kl_of_a_written_distribution_is_estimated_from_the_draw():
    prior = cases.normal_distribution(kl_weight=1.0)
    prior.build((2, 20000, 4))
    law = prior.distribution().distribution
    expected = tf.reduce_sum(
        tfd.kl_divergence(law, tfd.Normal(0.0, 1.0)), axis=-1
    )
    np.testing.assert_allclose(prior.kl_divergence(), expected, rtol=0.05)
    prior()
    assert len(prior.losses) == 1


@pytest.mark.parametrize(
    "distribution_fn",
    (cases.independent_normal, cases.independent_cauchy),
)
def test_written_distributions_draw_alike_with_and_without_xla(
    distribution_fn,
):
    """TFP's own samplers give unrelated draws for one seed."""
    prior = keras_kt.DistributionPrior(
        distribution_fn, {"loc": "zeros", "scale": "ones"}, seed=3
    )
    prior.build((2, 8, 4))
    plain = prior().offsets
    compiled = tf.function(lambda: prior().offsets, jit_compile=True)()
    np.testing.assert_allclose(plain, compiled, rtol=2e-4, atol=1e-4)


def test_wrong_arguments_name_what_is_expected():
    with pytest.raises(ValueError, match="`num_components`, expected a"):
        keras_kt.MixturePrior(num_components=0)
    with pytest.raises(ValueError, match="`covariance` must be one of"):
        keras_kt.NormalPrior(covariance="round")
    with pytest.raises(ValueError, match="`coupling` must be one of"):
        keras_kt.NormalPrior(coupling="halton")
    with pytest.raises(ValueError, match="`radius` must be one of"):
        keras_kt.NormalPrior(radius="any")
    with pytest.raises(ValueError, match="`initial_scale` must be a positive"):
        keras_kt.NormalPrior(initial_scale=-1.0)
    with pytest.raises(ValueError, match="one for each mixture component"):
        keras_kt.MixturePrior(num_components=3, initial_scale=[1.0, 2.0])
    with pytest.raises(ValueError, match="`kl_weight` must be a number"):
        keras_kt.NormalPrior(kl_weight=-1.0)
    with pytest.raises(ValueError, match="no tractable density"):
        keras_kt.GeneratorPrior(kl_weight=1.0)
    with pytest.raises(ValueError, match="no tractable density"):
        keras_kt.FastFoodPrior(kl_weight=1.0)
    with pytest.raises(ValueError, match="`hidden_units`, expected a positive"):
        keras_kt.GeneratorPrior(hidden_units=(3, 0))
    with pytest.raises(ValueError, match="`spectral_prior` must be one of"):
        priors.get("gaussian")
    with pytest.raises(
        ValueError, match="`distribution_fn` must be a function"
    ):
        keras_kt.DistributionPrior("normal", {})


def test_unbuilt_prior_says_where_the_built_one_is():
    for name in cases.PRIORS:
        with pytest.raises(ValueError, match="layer.spectral_prior"):
            cases.PRIORS[name]().distribution()


def test_generator_has_no_density_and_says_so():
    prior = keras_kt.GeneratorPrior()
    prior.build((2, 8, 4))
    distribution = prior.distribution()
    with pytest.raises(NotImplementedError, match="no tractable density"):
        distribution.log_prob(tf.zeros((2, 4)))


def test_distribution_that_is_not_reparameterised_is_refused():
    prior = keras_kt.DistributionPrior(poisson, {"rate": "zeros"})
    with pytest.raises(ValueError, match="must be fully reparameterised"):
        prior.build((2, 8, 4))


def test_distribution_of_another_shape_is_refused():
    prior = keras_kt.DistributionPrior(
        lambda p: tfd.Normal(p["loc"], 1.0), {"loc": "zeros"}
    )
    with pytest.raises(ValueError, match="must return batch shape"):
        prior.build((2, 8, 4))
    prior = keras_kt.DistributionPrior(lambda p: p["loc"], {"loc": "zeros"})
    with pytest.raises(ValueError, match="must return a tfd.Distribution"):
        prior.build((2, 8, 4))


@pytest.mark.parametrize("distribution_fn", (student, cases.independent_cauchy))
def test_heavy_tails_need_the_trigonometric_map(distribution_fn):
    prior = keras_kt.DistributionPrior(
        distribution_fn, {"loc": "zeros", "scale": "zeros"}
    )
    layer = keras_kt.KernelizedAttention(2, 4, spectral_prior=prior)
    with pytest.raises(ValueError, match='feature_map="trigonometric"'):
        layer.build((1, 3, 5), (1, 3, 5))
    layer = keras_kt.KernelizedAttention(
        2, 4, spectral_prior=prior, feature_map="trigonometric"
    )
    x = np.random.default_rng(0).normal(size=(1, 6, 5)).astype("float32")
    assert np.isfinite(layer(x, x)).all()


def test_fastfood_says_that_it_pads():
    prior = keras_kt.FastFoodPrior()
    with pytest.warns(UserWarning, match="head_dim=5 is padded to 8"):
        prior.build((2, 8, 5))
    assert prior().offsets.shape == (2, 8, 5)


def test_moments_of_samples():
    omega = np.random.default_rng(0).normal(size=(2, 7, 3)).astype("float32")
    found = keras_kt.Frequencies.of_samples(tf.constant(omega))
    assert found.means is None
    np.testing.assert_array_equal(found.offsets, omega)
    np.testing.assert_allclose(
        np.exp(found.log_weights), 1 / 7 * np.ones((2, 1))
    )
    np.testing.assert_allclose(
        found.covariances, (omega**2).mean(1, keepdims=True), rtol=1e-6
    )


def test_a_distribution_need_be_registered_only_to_be_saved(tmp_path):
    def narrow(parameters):
        scale = 0.5 * tf.nn.softplus(parameters["scale"])
        return tfd.MultivariateNormalDiag(scale_diag=scale)

    prior = keras_kt.DistributionPrior(narrow, {"scale": "ones"}, seed=3)
    layers = [
        keras_kt.KernelizedAttention(2, 3, seed=seed, spectral_prior=prior)
        for seed in (0, 1)
    ]
    x = np.random.default_rng(0).normal(size=(1, 6, 5)).astype("float32")
    for layer in layers:
        layer(x, x)
        assert layer.spectral_prior is not prior
        assert layer.spectral_prior.distribution_fn is narrow
    first, second = (layer.spectral_prior for layer in layers)
    assert first._parameter_weights is not second._parameter_weights
    np.testing.assert_array_equal(first.base_noise, second.base_noise)


def test_a_prior_that_a_user_writes_needs_three_methods():
    @keras.saving.register_keras_serializable("keras_kt_tests")
    class Lattice(keras_kt.SpectralPrior):
        """Frequencies on a trained multiple of fixed signs."""

        def build_parameters(self):
            self.scale = self.add_parameter("scale", (1,), "ones")

        def draw(self, seed):
            shape = (self.num_heads, self.num_frequencies, self.head_dim)
            return tf.sign(tf.random.stateless_normal(shape, seed))

        def frequencies(self, noise):
            omega = noise * tf.convert_to_tensor(self.scale)[:, tf.newaxis]
            return keras_kt.Frequencies.of_samples(omega)

    x = np.random.default_rng(0).normal(size=(1, 6, 5)).astype("float32")
    for feature_map in ("positive", "trigonometric"):
        layer = keras_kt.KernelizedAttention(
            2, 4, spectral_prior=Lattice(), feature_map=feature_map
        )
        assert layer(x, x).shape == (1, 6, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.PRIORS)
def test_an_optimizer_tells_kernels_from_projections_by_name(name):
    """No variable's name said what it was: `scale`, `mean`, `kernel_0`."""
    layer = keras_kt.KernelizedAttention(
        2,
        4,
        spectral_prior=cases.PRIORS[name](),
        feature_map="trigonometric",
        qk_norm="l2",
        decay="gated",
        num_features=16,
    )
    x = keras.Input((None, 5))
    model = keras.Model(x, layer(x, x, use_causal_mask=True))
    optimizer = keras.optimizers.AdamW(0.0, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["spectral_", "decay_"])
    model.compile(optimizer, "mse")
    before = {w.path: w.numpy() for w in model.trainable_weights}
    data = np.random.default_rng(0).normal(size=(2, 6, 5)).astype("float32")
    model.fit(data, data, verbose=0)
    spectral = {w.path for w in layer.spectral_weights}
    assert {w.path.split("/")[-2] for w in layer.spectral_weights} == {
        "spectral_prior",
        "feature_map",
        "qk_norm",
    }
    for weight in model.trainable_weights:
        kept = optimizer._use_weight_decay(weight)
        is_projection = weight.path.split("/")[-2] in (
            "query",
            "key",
            "value",
            "attention_output",
        )
        assert kept == is_projection, weight.path
        if not is_projection:
            np.testing.assert_array_equal(weight, before[weight.path])
        if weight.path in spectral:
            assert weight.name.startswith("spectral_")
            assert "kernel" not in weight.name
