"""Scores, kernels and memory of a model."""

import resource
import sys
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_kt
from experiments.data import batches, map_split
from experiments.strategies import uses_xla

# Of a query from a key, at which kernels are recorded.
DISTANCES = tuple(0.25 * step for step in range(41))


def attention_layers(model):
    """The `KernelizedAttention` layers of a model."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras_kt.KernelizedAttention)
    ]


def cross_entropy(y, outputs):
    return keras.losses.sparse_categorical_crossentropy(
        y, outputs, from_logits=True
    )


def accuracy(y, outputs):
    """1 for each example whose likeliest class is right, else 0."""
    return tf.cast(
        tf.equal(tf.cast(y, tf.int64), tf.argmax(outputs, -1)), tf.float32
    )


class Scores(NamedTuple):
    """Scores of the test examples, which most figures of a run come from.

    Attributes:
        stored: `(examples,)`, with the stored draw of the frequencies.
        fresh: `(draws, examples)`, with fresh draws; of the first examples, or
            of all. Empty where nothing is drawn.
    """

    stored: np.ndarray
    fresh: np.ndarray

    def means_of_draws(self, examples, own=slice(None)):
        """Mean score of each fresh draw on the first of some examples."""
        # In double precision, as the mean of Python's numbers.
        return [
            float(np.mean(x[own][:examples], dtype=float)) for x in self.fresh
        ]


def example_scores(model, score):
    """A function of `(x, y)` to the score of each example, a mean of its own.

    Args:
        model: a built model.
        score: function of `(y, outputs)` to scores.
    """

    def scores(x, y):
        result = score(y, tf.cast(model(x, training=False), tf.float32))
        return tf.reduce_mean(tf.reshape(result, (tf.shape(y)[0], -1)), 1)

    return scores


def make_evaluation(args, model, score):
    """A function of `(x, y)` to an array of scores, one for each example."""
    scores = tf.function(
        example_scores(model, score), jit_compile=uses_xla(args)
    )

    def evaluate(split):
        count = len(split[1])
        return np.concatenate(
            [
                scores(*map_split(lambda a: a[index], split)).numpy()  # noqa: B023
                for index in batches(count, args.preset.batch_size)
            ]
        )[:count]

    return evaluate


def drawn_layers(model):
    """The `KernelizedAttention` layers whose frequencies are drawn."""
    return [
        layer
        for layer in attention_layers(model)
        if layer.spectral_prior.has_draw
    ]


def fresh_draws(model, count):
    """Iterates over fresh draws of the frequencies; the stored one is kept."""
    layers = drawn_layers(model)
    stored = [layer.spectral_prior.base_noise.numpy() for layer in layers]
    for draw in range(count if layers else 0):
        for number, layer in enumerate(layers):
            layer.spectral_prior.resample(1000 * (draw + 1) + number)
        yield draw
    for layer, noise in zip(layers, stored, strict=True):
        layer.spectral_prior.base_noise.assign(noise)


def kernel_profiles(model):
    """`KernelProfile.kernel` of all layers, `(layers, heads, distances)`."""
    profiles = [
        keras_kt.diagnostics.kernel_profile(layer, DISTANCES).kernel
        for layer in attention_layers(model)
    ]
    # More digits would not show.
    return np.array(profiles).round(4)


def peak_memory():
    """The most resident memory this process has had so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def linear_floor(train, test, penalty=1e-3):
    """Accuracy of a linear classifier, as a floor to compare with.

    Ridge regression of the one-hot labels on standardised features.

    Args:
        train: features `(examples, features)` and labels `(examples,)`.
        test: the same, to score.
        penalty: share of a feature's variance that is added to it.
    """
    x, y = np.asarray(train[0], "float32"), np.asarray(train[1])
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / scale
    targets = np.eye(y.max() + 1, dtype="float32")[y]
    offset = targets.mean(0)
    gram = x.T @ x / len(x) + penalty * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (targets - offset) / len(x))
    outputs = (np.asarray(test[0], "float32") - mean) / scale @ weights
    return np.mean((outputs + offset).argmax(1) == test[1])
