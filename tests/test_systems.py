import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt import systems

pytestmark = pytest.mark.filterwarnings("ignore:FastFoodPrior needs a power")

COUNTS = {
    # Features per head at key_dim 64 and 32 (notes of the released code, with
    # Generator-PRF at the 256 and 128 that were meant).
    "GMM-RKS": (1024, 512),
    "GMM-PRF": (256, 128),
    "FastFood-RKS": (128, 64),
    "FastFood-PRF": (64, 32),
    "Generator-RKS": (512, 256),
    "Generator-PRF": (256, 128),
    "Performer": (128, 64),
    "RBF-RKS": (512, 256),
    "RBF-PRF": (128, 64),
}


@pytest.mark.parametrize("mended", (False, True))
@pytest.mark.parametrize("name", keras_kt.PAPER_SYSTEMS)
def test_every_system_trains(name, mended):
    layer = keras_kt.KernelizedAttention(
        2, 8, **keras_kt.paper_system(name, key_dim=8, mended=mended)
    )
    x = tf.constant(
        np.random.default_rng(0).normal(size=(2, 11, 5)), tf.float32
    )
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(layer(x, x)))
    weights = layer.trainable_weights
    gradients = tape.gradient(loss, [w.value for w in weights])
    for weight, gradient in zip(weights, gradients, strict=True):
        assert gradient is not None, weight.path
        # The key bias moves all keys alike, which softmax kernels ignore.
        assert np.isfinite(gradient).all(), weight.path
    learned = [w for w in weights if "spectral_prior" in w.path]
    is_baseline = name in ("Performer", "RBF-RKS", "RBF-PRF")
    assert bool(learned) != is_baseline
    for weight in learned:
        gradient = gradients[[w.path for w in weights].index(weight.path)]
        assert np.abs(gradient).max() > 0, weight.path


@pytest.mark.parametrize("name", keras_kt.PAPER_SYSTEMS)
def test_feature_counts_are_the_papers(name):
    for key_dim, expected in zip((64, 32), COUNTS[name], strict=True):
        assert keras_kt.paper_system(name, key_dim)["num_features"] == expected


@pytest.mark.parametrize("name", keras_kt.PAPER_SYSTEMS)
def test_mended_systems_keep_their_prior(name):
    """Their family and coupling; what kept them from training is changed."""
    published, mended = (
        keras_kt.paper_system(name, 8, mended=is_mended)
        for is_mended in (False, True)
    )
    priors = [options["spectral_prior"] for options in (published, mended)]
    configs = [prior.get_config() for prior in priors]
    for config in configs:
        for changed in ("name", "initial_scale", "use_mean", "activation"):
            config.pop(changed, None)
    assert type(priors[0]) is type(priors[1]) and configs[0] == configs[1]
    assert published["spectral_pace"] == 1.0 and published["qk_norm"] is None
    assert mended["num_features"] == 32
    layer = keras_kt.KernelizedAttention(2, 8, **mended)
    layer(np.ones((1, 3, 4)), np.ones((1, 3, 4)))
    is_trigonometric = name.endswith("RKS")
    assert (layer.temperature is not None) == is_trigonometric
    assert layer.feature_map.trainable


def test_every_system_says_what_differs():
    assert set(systems._BUILDERS) == set(keras_kt.PAPER_SYSTEMS)
    for build in systems._BUILDERS.values():
        assert build.__doc__


def test_unknown_system_lists_the_known():
    with pytest.raises(ValueError, match="GMM-RKS"):
        keras_kt.paper_system("GMM")


def test_dictionaries_can_be_reused_for_many_layers():
    system = keras_kt.paper_system("GMM-PRF", key_dim=4)
    x = np.ones((1, 3, 4), "float32")
    layers = [keras_kt.KernelizedAttention(2, 4, **system) for _ in range(2)]
    for layer in layers:
        layer(x, x)
    assert layers[0].spectral_prior is not layers[1].spectral_prior
