"""Kernel parameters move at a pace of their own, and files do not show it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers.tensors import array, wrong

MAPS = ("positive", "trigonometric")
PRIORS = {
    "normal": lambda **kwargs: keras_kt.NormalPrior(**kwargs),
    "mixture-mean": lambda **kwargs: keras_kt.MixturePrior(
        use_mean=True, mean_initializer="glorot_normal", **kwargs
    ),
    "fastfood": lambda **kwargs: keras_kt.FastFoodPrior(**kwargs),
    "generator": lambda **kwargs: keras_kt.GeneratorPrior(**kwargs),
    "empirical": lambda **kwargs: keras_kt.EmpiricalPrior(**kwargs),
    "untied": lambda **kwargs: keras_kt.EmpiricalPrior(tied=False, **kwargs),
}
# The others are slow: they show the same of other weights.
QUICK = {
    ("mixture-mean", "positive"),
    ("normal", "trigonometric"),
    ("untied", "trigonometric"),
}
PAIRS = [
    pytest.param(
        prior,
        feature_map,
        marks=() if (prior, feature_map) in QUICK else pytest.mark.slow,
    )
    for prior in PRIORS
    for feature_map in MAPS
]


def make(prior="normal", feature_map="trigonometric", **options):
    keras.utils.set_random_seed(3)
    if feature_map == "positive":
        feature_map = keras_kt.PositiveFeatures("gaussian")
    layer = keras_kt.KernelizedAttention(
        2,
        4,
        spectral_prior=PRIORS[prior](),
        feature_map=feature_map,
        seed=5,
        **options,
    )
    x = array((2, 6, 3))
    layer(x, x)
    return layer


def step(layer, optimizer):
    """One training step; the gradients of the kernel's weights."""
    x, upstream = array((2, 6, 3)), array((2, 6, 3), seed=1)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, x) * upstream)
    gradients = tape.gradient(loss, layer.trainable_variables)
    optimizer.apply(gradients, layer.trainable_variables)
    kernel = {id(weight) for weight in layer.spectral_weights}
    return [
        tf.convert_to_tensor(gradient)
        for weight, gradient in zip(
            layer.trainable_variables, gradients, strict=True
        )
        if id(weight) in kernel
    ]


def values(layer):
    """Those of all that is paced: not of a generator's network."""
    pace = layer.spectral_pace
    return [
        pace * weight.numpy()
        for weight in layer.spectral_weights
        if not weight.name.startswith(("spectral_weight_", "spectral_bias_"))
    ]


@pytest.mark.parametrize("prior, feature_map", PAIRS)
def test_pace_changes_no_output_and_no_gradient(prior, feature_map):
    slow, fast = (
        make(prior, feature_map, spectral_pace=pace) for pace in (1.0, 8)
    )
    x = array((2, 6, 3))
    np.testing.assert_array_equal(slow(x, x), fast(x, x))
    gradients = [
        step(layer, keras.optimizers.SGD(0.0)) for layer in (slow, fast)
    ]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("prior, feature_map", PAIRS)
@pytest.mark.parametrize(
    "optimizer", (keras.optimizers.SGD, keras.optimizers.Adam)
)
def test_a_learning_rate_counts_as_often_as_the_pace(
    optimizer, prior, feature_map
):
    moves = {}
    for pace in (1, 8):
        layer = make(prior, feature_map, spectral_pace=pace)
        before = values(layer)
        step(layer, optimizer(1e-3))
        moves[pace] = [
            now - then for now, then in zip(values(layer), before, strict=True)
        ]
    assert any(np.abs(move).max() > 0 for move in moves[1])
    for slow, fast in zip(moves[1], moves[8], strict=True):
        # Values are of size one, so a difference of two loses six digits.
        np.testing.assert_allclose(8 * slow, fast, atol=4e-6, rtol=1e-3)


@pytest.mark.parametrize("prior", PRIORS)
def test_files_hold_values_whatever_the_pace(prior, tmp_path):
    layer = make(prior, spectral_pace=8.0)
    step(layer, keras.optimizers.Adam(0.1))
    x = keras.Input((6, 3))
    model = keras.Model(x, layer(x, x))
    expected = model(array((2, 6, 3)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(array((2, 6, 3))), expected)
    model.save_weights(tmp_path / "model.weights.h5")
    other = make(prior, spectral_pace=1.0)
    other = keras.Model(x, other(x, x))
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other(array((2, 6, 3))), expected)


def test_weights_that_do_not_fit_are_named(tmp_path):
    x = keras.Input((6, 3))
    layer = make("normal")
    keras.Model(x, layer(x, x)).save_weights(tmp_path / "one.weights.h5")
    other = make("mixture-mean")
    with pytest.raises(ValueError, match="expected|shape"):
        keras.Model(x, other(x, x)).load_weights(tmp_path / "one.weights.h5")


def test_regularizers_are_of_values():
    losses = []
    for pace in (1, 8):
        prior = keras_kt.NormalPrior(scale_regularizer="l2")
        layer = keras_kt.KernelizedAttention(
            2, 4, spectral_prior=prior, spectral_pace=pace
        )
        layer(array((1, 3, 5)), array((1, 3, 5)))
        losses.append(float(sum(layer.losses)))
    assert losses[0] > 0.0
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_a_recipe_may_have_a_pace_of_its_own():
    layer = make("normal")
    assert layer.spectral_prior.pace == layer.feature_map.pace == 4.0
    prior = keras_kt.NormalPrior(pace=2)
    layer = keras_kt.KernelizedAttention(2, 4, spectral_prior=prior)
    layer(array((1, 3, 5)), array((1, 3, 5)))
    assert layer.spectral_prior.pace == 2.0
    assert layer.feature_map.pace == 4.0
    assert prior.copy().pace == 2.0


def test_means_are_assigned_as_values():
    layer = make("mixture-mean")
    mean = array((2, 2, 4), seed=4)
    layer.spectral_prior.assign_mean(mean)
    np.testing.assert_allclose(layer.spectral_prior.mean, mean, rtol=1e-6)


def test_what_is_no_pace_is_refused():
    for pace in (0, -1.0, "fast", None):
        wrong(
            "`spectral_pace` must be a positive number",
            lambda pace=pace: keras_kt.LinearAttention(
                2, 4, spectral_pace=pace
            ),
        )
    wrong("`pace` must be", lambda: keras_kt.NormalPrior(pace=0))


def test_only_variables_have_values():
    """`for_heads` of an expression would be off by the pace."""
    prior = make("normal").spectral_prior
    weight = prior.trainable_weights[0]
    np.testing.assert_allclose(prior.for_heads(weight), 4.0 * weight.numpy())
    wrong("`for_heads", lambda: prior.for_heads(2.0 * weight))


@keras.saving.register_keras_serializable("keras_kt_tests")
class Written(keras_kt.SpectralPrior):
    """A prior as users of 0.1 wrote theirs: it reads the variable."""

    def build_parameters(self):
        self.scale = self.add_parameter("scale", (1,), "ones")

    def draw(self, seed):
        shape = self.num_heads, self.num_frequencies, self.head_dim
        return tf.random.stateless_normal(shape, seed)

    def frequencies(self, noise):
        scale = tf.convert_to_tensor(self.scale)
        scale = self.for_heads(tf.abs(scale))
        return keras_kt.Frequencies.of_samples(noise * scale[:, None])


def test_priors_that_read_their_variables_stay_right():
    layer = keras_kt.KernelizedAttention(2, 4, spectral_prior=Written())
    layer(array((1, 3, 5)), array((1, 3, 5)))
    prior = layer.spectral_prior
    np.testing.assert_array_equal(prior().offsets, prior.base_noise)
