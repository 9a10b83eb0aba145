"""What a user's typed program does with each public name; mypy reads it.

It is checked and never run: `tests/test_typing.py`.
"""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

import keras_kt
from keras_kt import conversion, diagnostics, kernels


def layers() -> list[keras.layers.Layer]:
    """The layers, with arguments of each type that they take."""
    return [
        keras_kt.KernelizedAttention(num_heads=4, key_dim=8),
        keras_kt.KernelizedAttention(
            4,
            8,
            value_dim=6,
            dropout=0.1,
            output_shape=(3, 4),
            attention_axes=[1, 2],
            kernel_initializer=keras.initializers.HeNormal(),
            kernel_regularizer="l2",
            seed=3,
            spectral_prior=keras_kt.MixturePrior(num_components=2),
            feature_map=keras_kt.PositiveFeatures("gaussian"),
            num_features=64,
            qk_norm=None,
            redraw="step",
            decay="gated",
            rotary_max_wavelength=10000,
            name="attention",
        ),
        keras_kt.KernelizedGroupedQueryAttention(8, 4, 2, near_field=16),
        keras_kt.LinearAttention(4, 8, num_key_value_heads=2),
        keras_kt.KernelizedTransformerEncoder(32, 4, activation=tf.nn.gelu),
        keras_kt.KernelizedTransformerDecoder(
            intermediate_dim=32, num_heads=4, local_context=3
        ),
    ]


def laplace(parameters: dict[str, tf.Tensor]) -> tfp.distributions.Distribution:
    """A law of one's own."""
    loc, scale = parameters["loc"], tf.nn.softplus(parameters["scale"])
    return tfp.distributions.Independent(
        tfp.distributions.Laplace(loc, scale), 1
    )


def priors() -> list[keras_kt.SpectralPrior]:
    """Priors, which are recipes."""
    prior = keras_kt.NormalPrior(initial_scale=[0.5, 1.0], seed=1)
    return [
        prior,
        prior.copy(covariance="full"),
        keras_kt.FastFoodPrior(kl_weight=0.1),
        keras_kt.GeneratorPrior(hidden_units=(16, 16)),
        keras_kt.EmpiricalPrior(1.0, tied=False),
        keras_kt.DistributionPrior(laplace, {"loc": "zeros", "scale": "ones"}),
    ]


def maps() -> list[keras_kt.FeatureMap]:
    """Feature maps."""
    return [
        keras_kt.PositiveFeatures(two_sided=False),
        keras_kt.TrigonometricFeatures(smoothing=0.1, trainable=False),
    ]


def frequencies(prior: keras_kt.SpectralPrior) -> tf.Tensor:
    """What a prior gives, and takes."""
    drawn: keras_kt.Frequencies = prior.stored_frequencies()
    prior.resample()
    if drawn.means is None:
        return drawn.offsets
    return drawn.offsets + drawn.means


def systems() -> list[keras_kt.KernelizedAttention]:
    """The paper's systems."""
    return [
        keras_kt.KernelizedAttention(4, 8, **keras_kt.paper_system(name, 8))
        for name in keras_kt.PAPER_SYSTEMS
    ]


def stream(layer: keras_kt.KernelizedAttention, x: np.ndarray) -> tf.Tensor:
    """A stream, its state forked, joined and split."""
    state = layer.initial_state(batch_size=2)
    output, state = layer.step(x, state)
    forked = keras_kt.gather_state(state, [0, 0, 1])
    joined = keras_kt.stack_states([state, forked])
    one, *others = keras_kt.unstack_states(joined, sizes=[2, 3])
    output, state = layer.step(x, one, value_mask=np.ones((2, 1), bool))
    return output


def states(
    one: keras_kt.AttentionState,
    near: keras_kt.NearFieldState,
    window: keras_kt.WindowState,
    rotary: keras_kt.RotaryState,
    block: keras_kt.DecoderState,
) -> list[tf.Tensor]:
    """The fields of states."""
    far: keras_kt.AttentionState = near.far
    position: tf.Tensor = rotary.position
    return [one.sums, far.maximum, window.keep, position, block.context]


def whole(model: keras.Model, x: np.ndarray, folder: Path) -> str:
    """A model that is converted, streamed, sampled, looked at, exported."""
    converted, report = keras_kt.convert_attention(
        model, layers=["attention"], num_features=64, dropout=0.0
    )
    notes: list[str] = [layer.note for layer in report.layers]
    errors = conversion.attention_error(converted, x, teacher=model, batches=2)
    head: conversion.HeadError = errors.heads[0]
    calibrated = conversion.calibrate(converted, x, steps=10)
    before: conversion.AttentionErrors = calibrated.before
    conversion.distill(converted, model, x, learning_rate=0.01)
    findings: list[diagnostics.Finding] = diagnostics.health(converted, x)
    profile = diagnostics.kernel_profile(converted.layers[1], [0.5, 1.0])
    distances: Any = profile.distances
    monitor = diagnostics.SpectralMonitor(folder / "logs", every=2)
    diagnostics.plots.plot_errors(errors).savefig("errors.png")
    diagnostics.plots.plot_history(monitor)
    layer = converted.layers[1]
    kernel = kernels.closed_form(layer.spectral_prior, layer.feature_map, x, x)
    outputs, weights = kernels.kernel_attention(kernel, x)
    print(outputs.shape, weights.shape)
    streaming = keras_kt.streaming_model(converted)
    logits, state = streaming.step(x, streaming.initial_state(2))
    print(notes, head.output, before, findings, distances, logits, state)
    tokens = keras_kt.generate(
        converted, [[1, 2]], 5, temperature=0.5, end_token=[0, 3]
    )
    print(tokens.shape)
    return keras_kt.export_saved_model(converted, folder, streaming=True)
