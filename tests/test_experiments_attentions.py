"""Attentions of experiments by name, and what their flags become."""

import argparse

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers.scripts import script


def options(text, key_dim=8):
    attentions = script("attentions")
    args = attentions.parse(text)
    return attentions.layer_arguments(args.name, args, key_dim)


def test_an_attention_without_flags_has_the_layer_s_defaults():
    made = options("normal:trigonometric")
    assert set(made) == {"spectral_prior", "feature_map"}
    assert options("softmax") is None
    assert options("GMM-PRF").keys() == keras_kt.paper_system("GMM-PRF").keys()


def test_flags_reach_prior_map_and_layer():
    made = options(
        "normal:self --initial-scale 0.5 --scale-spread 2 --qk-norm none "
        "--spectral-pace 3 --num-features 16 --redraw step"
    )
    assert made["spectral_prior"].initial_scale == 0.5
    assert made["spectral_prior"].scale_spread == 2.0
    assert made["feature_map"].prefactor == "self"
    rest = {k: v for k, v in made.items() if not isinstance(v, keras.Layer)}
    assert rest == {
        "qk_norm": None,
        "spectral_pace": 3.0,
        "num_features": 16,
        "redraw": "step",
    }
    keras_kt.KernelizedAttention(2, 8, **made)
    assert options("normal:positive --qk-norm l2")["qk_norm"] == "l2"
    assert options("normal:trigonometric --qk-norm auto")["qk_norm"] == "auto"
    for name in ("normal:trigonometric", "mended:GMM-RKS"):
        assert options(f"{name} --qk-norm weighted")["qk_norm"] == "weighted"
        assert options(f"{name} --qk-norm none")["qk_norm"] is None


def test_empirical_priors_are_tied_or_not():
    assert options("empirical:self")["spectral_prior"].tied
    assert not options("empirical:self --untied")["spectral_prior"].tied
    split = script("attentions").split
    assert split("empirical:self --untied") == ("empirical:self", "--untied")


def test_one_number_scales_the_spread_of_a_mixture():
    plain = options("mixture:positive --components 4")["spectral_prior"]
    scaled = options("mixture:positive --components 4 --initial-scale 0.5")
    np.testing.assert_allclose(
        scaled["spectral_prior"].initial_scale,
        0.5 * np.array(plain.initial_scale),
    )


def test_systems_come_as_published_and_mended_and_take_a_d():
    for name in keras_kt.PAPER_SYSTEMS:
        mended = options(f"mended:{name} --num-features 64")
        keras_kt.KernelizedAttention(2, 8, **mended)
        assert mended["num_features"] == 64
    assert options("GMM-RKS")["num_features"] == 64
    assert options("GMM-RKS --num-features 32")["num_features"] == 32


@pytest.mark.parametrize(
    "text",
    [
        "softmax --spectral-pace 3",
        "generator:positive --initial-scale 2",
        "GMM-PRF --scale-spread 2",
        "normal:self --untied",
        "normal:self --prefactor self",
        "mended:GMM-RKS --redraw step",
        "normal:positive --smoothing 0.1",
    ],
)
def test_flags_of_other_attentions_are_refused(text):
    with pytest.raises(ValueError, match="does not apply to the --attention"):
        options(text)


@pytest.mark.parametrize("name", ["normal", "mended:softmax", "old:GMM-RKS"])
def test_unknown_attentions_are_refused(name):
    with pytest.raises(ValueError, match="must be softmax, one of GMM-RKS"):
        options(name)


def test_the_number_of_features_is_the_layer_s_own():
    attentions = script("attentions")
    for name, flags in (
        ("normal:positive", ""),
        ("mixture:positive", "--components 4"),
        ("fixed:trigonometric", "--num-features 32"),
        ("GMM-RKS", ""),
        ("FastFood-PRF", ""),
    ):
        layer = keras_kt.LinearAttention(2, 8, **options(f"{name} {flags}"))
        layer.build(*[(None, 5, 2, 8)] * 3)
        prior, of_map = layer.spectral_prior, layer.feature_map
        count = prior.num_frequencies * of_map.sides
        assert attentions.num_features(name, flags, 8) == count
    assert attentions.num_features("softmax", "", 8) is None


def test_learned_laws_are_told_from_fixed_ones():
    is_learned = script("attentions").is_learned
    learned = ["GMM-RKS", "mended:GMM-RKS", "normal:self", "empirical:positive"]
    fixed = ["softmax", "fixed:self", "Performer", "mended:RBF-RKS"]
    assert all(map(is_learned, learned)) and not any(map(is_learned, fixed))


def test_arguments_of_a_layer_come_from_a_run_s_flags():
    flags = script("flags")
    args = script("attentions").parse("fixed:positive --num-features 8")
    args.attention, args.preset = args.name, argparse.Namespace(key_dim=4)
    assert flags.attention_options(args)["num_features"] == 8


def test_weight_decay_spares_all_that_a_kernel_learns():
    """Temperatures and smoothings are matrices, and were not spared."""
    x = keras.Input((5, 6))
    made = options("normal:trigonometric --qk-norm l2 --num-features 8")
    layer = keras_kt.KernelizedAttention(2, 8, **made)
    model = keras.Model(x, layer(x, x))
    preset = script("mqar").PRESETS["cpu"]
    args = argparse.Namespace(preset=preset)
    optimizer = script("recipe").make_optimizer(args, model)
    weights = model.trainable_variables
    for weight in weights:
        weight.assign(tf.ones_like(weight))
    for _ in range(2):
        # The first step has a rate of zero.
        optimizer.apply(
            [np.zeros(w.shape, "float32") for w in weights], weights
        )
    kernel = {id(weight) for weight in layer.spectral_weights}
    assert len(kernel) == 3
    for weight in weights:
        is_spared = id(weight) in kernel or len(weight.shape) < 2
        is_same = (weight.numpy() == 1.0).all()
        assert is_same == is_spared, weight.path
