"""Distillation of a whole model: it learns to answer as its teacher does.

After `distill`, whose layers learn apart, this lets them correct each other.
"""

from typing import Any

import keras
import tensorflow as tf

from keras_kt import _checks
from keras_kt.conversion.batches import repeated_weighted_batches
from keras_kt.conversion.distillation import checked_rate
from keras_kt.conversion.probe import kept_losses


def distill_outputs(
    student: keras.Model,
    teacher: keras.Model,
    data: Any,
    *,
    steps: int = 100,
    learning_rate: float = 1e-3,
    loss: Any = None,
) -> list[float]:
    """Trains a converted model to give its teacher's outputs.

    All trainable weights are trained, at the cost of training: the student runs
    by its own algorithm, so in linear time, and the teacher by softmax. Labels
    are not needed.

    Args:
        student: a model, changed in place.
        teacher: the model that it was converted from.
        data: as in `attention_error`; batches are repeated as needed. Where
            batches are `(x, y, sample_weight)`, weights count as in `fit`.
        steps: number of batches to train on.
        learning_rate: of Adam, a number or a schedule.
        loss: function of the teacher's and the student's outputs, which gives
            a loss for each position or example, as Keras's loss functions do.
            The default is for logits: Kullback-Leibler divergence of the
            student's softmax over the last axis from the teacher's, or of its
            sigmoid where that axis has size 1. Positions that the Keras mask
            of the student's output hides do not count.

    Returns:
        The loss of each step, a list of numbers.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> y = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
        >>> softmax = keras.Model(x, keras.layers.Dense(3)(y))
        >>> linear, _ = keras_kt.convert_attention(softmax)
        >>> batch = np.random.normal(size=(1, 50, 8)).astype("float32")
        >>> losses = keras_kt.conversion.distill_outputs(
        ...     linear, softmax, batch, steps=3)
        >>> len(losses)
        3
    """
    steps = _checks.integer("steps", steps, minimum=0)
    if loss is not None and not callable(loss):
        raise ValueError(
            "`loss` must be a function of the teacher's and the student's "
            f"outputs. Received: loss={loss}"
        )
    variables = student.trainable_variables
    if not variables:
        raise ValueError(
            "`distill_outputs` needs something to train. Received: "
            f"{student.name!r}, whose weights are all frozen. Set `trainable`."
        )
    optimizer = keras.optimizers.Adam(checked_rate(learning_rate))
    optimizer.build(variables)

    @tf.function(reduce_retracing=True)
    def step(inputs, weights):
        expected = _tensor("teacher", teacher(inputs, training=False), loss)
        with tf.GradientTape() as tape:
            outputs = student(inputs, training=True)
            losses = (loss or _divergence)(
                expected, _tensor("student", outputs, loss)
            )
            counts = _counts(losses, getattr(outputs, "_keras_mask", None))
            if weights is not None:
                counts *= _aligned(tf.cast(weights, counts.dtype), counts)
            total = tf.math.divide_no_nan(
                tf.reduce_sum(losses * counts), tf.reduce_sum(counts)
            )
        gradients = tape.gradient(
            total, variables, unconnected_gradients="zero"
        )
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return total

    history = []
    for inputs, weights in repeated_weighted_batches(data, steps):
        inputs = keras.tree.map_structure(tf.convert_to_tensor, inputs)
        with kept_losses(student, teacher):
            history.append(float(step(inputs, weights)))
    return history


def _tensor(name, outputs, loss):
    if loss is None and not tf.is_tensor(outputs):
        raise ValueError(
            "`loss` is needed for models whose output is not one tensor of "
            f"logits. Received: a {name} that returns a "
            f"{type(outputs).__name__}, and loss=None."
        )
    return outputs


def _divergence(expected, outputs):
    """KL divergence of two laws by their logits, for each position."""
    expected = tf.cast(expected, tf.float32)
    outputs = tf.cast(outputs, tf.float32)
    if outputs.shape[-1] == 1:
        expected, outputs = (
            tf.concat([x, tf.zeros_like(x)], -1) for x in (expected, outputs)
        )
    expected = tf.nn.log_softmax(expected)
    difference = expected - tf.nn.log_softmax(outputs)
    return tf.reduce_sum(tf.exp(expected) * difference, axis=-1)


def _counts(losses, mask):
    """1 for each position that counts, in the shape of the losses."""
    counts = tf.ones_like(losses)
    if mask is None:
        return counts
    return counts * _aligned(tf.cast(mask, counts.dtype), counts)


def _aligned(weights, counts):
    """Weights with axes of size 1 at the end, as far as losses have axes."""
    missing = counts.shape.rank - weights.shape.rank
    shape = tf.concat([tf.shape(weights), tf.ones(missing, tf.int32)], 0)
    return tf.reshape(weights, shape)
