"""Scores, kernels and memory of a model."""

import resource
import sys

import keras
import numpy as np
import tensorflow as tf

import keras_kt
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


def make_evaluation(args, model, score):
    """A function of `(x, y)` to the mean score."""

    @tf.function(jit_compile=uses_xla(args))
    def scores(x, y):
        result = score(y, tf.cast(model(x, training=False), tf.float32))
        return tf.reduce_mean(tf.reshape(result, (tf.shape(y)[0], -1)), 1)

    def evaluate(split):
        count, batch = len(split[1]), args.preset.batch_size
        total = 0.0
        for start in range(0, count, batch):
            # The last batch is filled up, for the sake of one compilation.
            index = np.minimum(np.arange(start, start + batch), count - 1)
            x, y = tf.nest.map_structure(lambda a: a[index], split)  # noqa: B023
            total += float(tf.reduce_sum(scores(x, y)[: count - start]))
        return total / count

    return evaluate


def first(split, count):
    """The first examples of arrays, all of them if `count` is `None`."""
    return tf.nest.map_structure(lambda array: array[:count], split)


def fresh_draws(args, model, split, evaluate):
    """Scores with other draws of the frequencies; the stored one is kept."""
    layers = attention_layers(model)
    if not layers:
        return []
    stored = [layer.spectral_prior.base_noise.numpy() for layer in layers]
    part = first(split, args.draw_examples)
    results = []
    for draw in range(args.draws):
        for number, layer in enumerate(layers):
            layer.spectral_prior.resample(1000 * (draw + 1) + number)
        results.append(evaluate(part))
    for layer, noise in zip(layers, stored, strict=True):
        layer.spectral_prior.base_noise.assign(noise)
    return results


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
