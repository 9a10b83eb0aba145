"""How far a converted model's attention is from softmax, on real data.

Errors are relative Frobenius norms by head, of the attention matrix and of the
output, beside that of uniform attention and what theory predicts for the number
of features. All of this forms attention matrices: O(length²).
"""

import math
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kt.conversion.capture import capture
from keras_kt.conversion.estimate import (
    estimate,
    matrix_squares,
    squared_errors,
)


class HeadError(NamedTuple):
    """How far one head is from softmax, as relative Frobenius errors.

    Attributes:
        path: the layer, as in `ConversionReport`.
        head: number of the head.
        num_features: D of the layer.
        matrix: error of the attention matrix.
        output: error of the head's output.
        uniform: error of the matrix if every key weighed the same.
        predicted: relative standard deviation of one kernel value that theory
            predicts for independent frequencies, sqrt((exp(E|q+k|²) − 1)/M).
    """

    path: str
    head: int
    num_features: int
    matrix: float
    output: float
    uniform: float
    predicted: float

    @property
    def verdict(self) -> str:
        """What the errors mean."""
        if self.matrix <= max(0.5 * self.uniform, 0.05):
            return "follows softmax"
        if self.matrix < 0.9 * self.uniform:
            return "rough: distill or fine-tune"
        return (
            "hopeless: hardly better than uniform attention, if at all; keep "
            "softmax or retrain"
        )


class AttentionErrors(NamedTuple):
    """Errors of all heads of a converted model.

    Attributes:
        heads: tuple of `HeadError`.
    """

    heads: tuple

    @property
    def layers(self) -> dict:
        """Mean error of the attention matrix by layer."""
        paths = dict.fromkeys(head.path for head in self.heads)
        return {
            path: float(
                np.mean([h.matrix for h in self.heads if h.path == path])
            )
            for path in paths
        }

    def __str__(self):
        return "\n".join(
            f"{h.path} head {h.head} (D={h.num_features}): matrix "
            f"{h.matrix:.3f}, output {h.output:.3f}, uniform {h.uniform:.3f}, "
            f"predicted {h.predicted:.2g}: {h.verdict}"
            for h in self.heads
        )


def attention_error(
    model: keras.Model,
    data: Any,
    *,
    teacher: keras.Model | None = None,
    batches: int = 1,
) -> AttentionErrors:
    """Measures converted layers against softmax, on real queries and keys.

    Without a teacher, layers are compared with the softmax that their prior
    stands for, and each sees what it would see if all attended exactly. With
    one they are given the inputs of the teacher's layers and compared with its
    attention. O(length²).

    Args:
        model: a model from `convert_attention`.
        data: one batch of the model's inputs, or an iterator or
            `tf.data.Dataset` of batches `inputs` or `(inputs, …)`.
        teacher: the model that was converted. Defaults to `None`.
        batches: how many batches to take of a dataset or iterator.

    Returns:
        `AttentionErrors`.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> y = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
        >>> model, _ = keras_kt.convert_attention(keras.Model(x, y))
        >>> batch = np.random.normal(size=(1, 9, 8)).astype("float32")
        >>> errors = keras_kt.conversion.attention_error(model, batch)
        >>> len(errors.heads), list(errors.layers)
        (2, ['attention'])
    """
    captured = capture(model, data, batches, teacher)
    return errors_of(captured)


def errors_of(items) -> AttentionErrors:
    """The errors of captured layers."""
    return AttentionErrors(
        tuple(h for item in items for h in head_errors(item))
    )


def head_errors(item, prior=None):
    """`HeadError` of each head of one layer.

    Args:
        item: a `Captured`.
        prior: another prior than the layer's. Defaults to `None`.
    """
    layer = item.layer
    sums = _sums_of_squares(item, prior)
    matrix, output, uniform = (
        np.sqrt(sums[i] / np.maximum(sums[j], 1e-30))
        for i, j in ((0, 2), (1, 3), (4, 2))
    )
    query, key = item.scaled_tokens()
    prior = layer.spectral_prior if prior is None else prior
    count, identity = prior.num_frequencies, np.eye(layer.key_dim)
    repeats = len(query) // len(key)
    for head in range(layer.num_heads):
        yield HeadError(
            item.path,
            head,
            count * layer.feature_map.sides,
            float(matrix[head]),
            float(output[head]),
            float(uniform[head]),
            predicted_deviation(
                query[head], key[head // repeats], identity, count
            ),
        )


def predicted_deviation(query, key, covariance, count) -> float:
    """Relative standard deviation of one kernel value, as theory predicts it.

    sqrt((exp(E (q+k)ᵀΣ(q+k)) − 1)/M), for M independent frequencies of N(μ, Σ)
    and positive features.

    Args:
        query, key: `(tokens, dim)`, scaled.
        covariance: `(dim, dim)`, Σ.
        count: M.
    """
    moments = [x.T @ x / len(x) for x in (query, key)]
    exponent = np.sum(covariance * (moments[0] + moments[1]))
    exponent += 2.0 * query.mean(0) @ covariance @ key.mean(0)
    return math.sqrt(math.expm1(min(exponent, 700.0)) / count)


def _sums_of_squares(item, prior):
    """`squared_errors` and that of uniform attention, of all examples."""
    sums = 0.0
    for heads in item.examples():
        found = estimate(item.layer, *heads[:4], prior)
        seen = tf.cast(heads.visible, tf.float32)
        count = tf.reduce_sum(seen, axis=-1, keepdims=True)
        uniform = tf.math.divide_no_nan(seen, count)
        sums += np.stack(
            [
                *squared_errors(*found, heads),
                matrix_squares(uniform - heads.weights),
            ]
        )
    return sums
