"""The priors and feature maps that the equivalence tests run over."""

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

import keras_kt
from tests.helpers import reference

tfd = tfp.distributions

BATCH, HEADS, DIM, VALUE_DIM = 2, 3, 5, 7
LENGTH, KEYS = 11, 13
FREQUENCIES = 40


@keras.saving.register_keras_serializable("keras_kt_tests")
def independent_normal(parameters):
    return tfd.Independent(
        tfd.Normal(parameters["loc"], tf.nn.softplus(parameters["scale"])), 1
    )


@keras.saving.register_keras_serializable("keras_kt_tests")
def independent_cauchy(parameters):
    return tfd.Independent(
        tfd.Cauchy(parameters["loc"], tf.nn.softplus(parameters["scale"])), 1
    )


def normal_distribution(**kwargs):
    small = keras.initializers.RandomNormal(stddev=0.2, seed=3)
    return keras_kt.DistributionPrior(
        independent_normal, {"loc": small, "scale": "zeros"}, **kwargs
    )


def cauchy_distribution(**kwargs):
    return keras_kt.DistributionPrior(
        independent_cauchy, {"loc": "zeros", "scale": "zeros"}, **kwargs
    )


_MEANS = keras.initializers.RandomNormal(stddev=0.3, seed=5)

PRIORS = {
    "normal": lambda: keras_kt.NormalPrior(),
    "normal-isotropic": lambda: keras_kt.NormalPrior(covariance="isotropic"),
    "normal-full": lambda: keras_kt.NormalPrior(covariance="full"),
    "normal-mean": lambda: keras_kt.NormalPrior(
        use_mean=True, mean_initializer=_MEANS, radius="chi", coupling="iid"
    ),
    "mixture": lambda: keras_kt.MixturePrior(num_components=2),
    "mixture-mean": lambda: keras_kt.MixturePrior(
        num_components=2,
        use_mean=True,
        mean_initializer=_MEANS,
        covariance="full",
        coupling="sobol",
        radius="chi",
    ),
    "fastfood": lambda: keras_kt.FastFoodPrior(),
    "generator": lambda: keras_kt.GeneratorPrior(hidden_units=(6,)),
    "empirical": lambda: keras_kt.EmpiricalPrior(),
    "distribution": normal_distribution,
}
MAPS = {
    "positive": lambda: keras_kt.PositiveFeatures(),
    "positive-gaussian": lambda: keras_kt.PositiveFeatures("gaussian"),
    "positive-self": lambda: keras_kt.PositiveFeatures("self"),
    "positive-isotropic-one-sided": lambda: keras_kt.PositiveFeatures(
        "isotropic", two_sided=False
    ),
    "trigonometric": lambda: keras_kt.TrigonometricFeatures(),
}
PAIRS = [
    (prior, feature_map)
    for prior in PRIORS
    for feature_map in MAPS
    # These prefactors refuse a trained mean, which they cancel.
    if not (prior.endswith("mean") and feature_map == "positive")
    and (prior, feature_map) != ("normal-mean", "positive-self")
]


def build(prior_name, map_name, frequencies=FREQUENCIES, heads=HEADS, dim=DIM):
    """A built prior with perturbed weights, and a built feature map."""
    keras.utils.set_random_seed(21)
    prior, feature_map = PRIORS[prior_name](), MAPS[map_name]()
    prior.build((heads, frequencies, dim))
    feature_map.build(heads)
    # Away from the symmetric start, so that nothing cancels by accident.
    rng = np.random.default_rng(11)
    for weight in (*prior.trainable_weights, *feature_map.trainable_weights):
        noise = 0.2 * rng.normal(size=weight.shape)
        weight.assign(weight + noise.astype("float32"))
    return prior, feature_map


def inputs(length=LENGTH, keys=KEYS, scale=1.0, seed=0):
    """Query, key and value in the core's layout, float32."""
    rng = np.random.default_rng(seed)
    shapes = (
        (BATCH, HEADS, length, DIM),
        (BATCH, HEADS, keys, DIM),
        (BATCH, HEADS, keys, VALUE_DIM),
    )
    return [
        (scale * rng.normal(size=shape)).astype("float32") for shape in shapes
    ]


def key_mask(keys=KEYS):
    """Right padding in one sequence; gaps and left padding in the other."""
    mask = np.ones((BATCH, keys), "bool")
    mask[0, keys - keys // 3 :] = False
    mask[1, [0, 1, keys // 2]] = False
    return mask


def name_of(weight):
    """What the oracle calls a weight."""
    return weight.name.removeprefix("spectral_")


def weights_of(layer):
    """What trainable weights stand for, float64 by name."""
    paces = getattr(layer, "spectral_pace", None), getattr(layer, "pace", None)
    pace = next((pace for pace in paces if pace), 1.0)
    return {
        name_of(weight): weight.numpy().astype("float64")
        * (pace if _is_paced(weight.name) else 1.0)
        for weight in layer.trainable_weights
    }


def _is_paced(name):
    # All of the kernel's but a generator's network.
    network = "spectral_weight_", "spectral_bias_"
    return name.startswith("spectral_") and not name.startswith(network)


def reference_frequencies(prior, weights, noise):
    """Frequencies of a prior in NumPy, from its raw weights and noise."""
    if isinstance(prior, keras_kt.FastFoodPrior):
        return reference.fastfood_frequencies(
            weights, noise, prior.num_frequencies, prior.head_dim
        )
    if isinstance(prior, keras_kt.EmpiricalPrior):
        return reference.atoms(weights["points"])
    if isinstance(prior, keras_kt.GeneratorPrior):
        return reference.generator_frequencies(weights, noise, prior.activation)
    if isinstance(prior, keras_kt.DistributionPrior):
        scale = reference.softplus(weights["scale"])
        return (
            (noise * scale[:, None])[:, None],
            weights["loc"][:, None],
            np.ones((len(scale), 1)),
            reference.matrix(scale)[:, None],
        )
    return reference.gaussian_frequencies(weights, noise, prior.num_components)


def reference_noise(prior):
    """The stored draw; standard normal numbers where it is uniform."""
    if not prior.has_draw:
        return None
    noise = prior.base_noise.numpy()
    if isinstance(prior, keras_kt.DistributionPrior):
        return reference.normal_quantile(noise[:, 0].astype("float64"))
    return noise if noise.dtype == "int32" else noise.astype("float64")


def reference_kind(feature_map, weights):
    if isinstance(feature_map, keras_kt.TrigonometricFeatures):
        smoothing = reference.softplus(weights["smoothing"])
        return {"map": "trigonometric", "smoothing": smoothing}
    return {
        "map": "positive",
        "prefactor": feature_map.prefactor,
        "two_sided": feature_map.two_sided,
    }
