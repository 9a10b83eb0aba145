"""Coordinates of the least measured error, by gradient descent.

Adam on T, a and b from where the layer is, one example a step. It is for the
draw of frequencies that the layer has; examples that it has not seen decide
whether the layer takes what it found.
"""

import keras
import numpy as np
import tensorflow as tf

from keras_kt.conversion.change import (
    Change,
    best_of,
    can_shift,
    fold,
    squares_after,
    unchanged,
)

# Of the gradient descent, in units of T and of a token's deviation.
_REFINING_RATE = 2e-2


def descended(item, steps):
    """Gives one layer what gradient descent finds, where that is better.

    Every other example is for the descent and the rest decide.
    """
    rest = _part(item, 1)
    start = unchanged(item.layer)
    try:
        found = _refined(_part(item, 0), start, steps)
        best = best_of(rest, [start, found])
    except tf.errors.InvalidArgumentError:
        # T has become singular, or NaN.
        return item
    return fold(item, best)


def _part(item, offset):
    """Every other example, if there are as many."""
    examples = tuple(item.examples())
    if len(examples) > 1:
        examples = examples[offset::2]
    return item._replace(batches=examples)


def _refined(item, change, steps):
    """Gradient descent of the error from a change of coordinates."""
    layer = item.layer
    scales = [np.std(x, axis=1) + 1e-6 for x in item.visible_tokens()]
    corrections = [tf.Variable(tf.zeros(x.shape)) for x in change]
    start = [tf.constant(x, tf.float32) for x in change]
    scales = [tf.constant(x, tf.float32) for x in scales]
    may_shift = can_shift(layer)

    def corrected():
        shifts = [
            a + float(possible) * scale * correction
            for a, possible, scale, correction in zip(
                start, may_shift, scales, corrections, strict=False
            )
        ]
        identity = tf.eye(layer.key_dim)
        return Change(*shifts, (identity + corrections[2]) @ start[2])

    optimizer = keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(_REFINING_RATE, steps)
    )
    optimizer.build(corrections)

    @tf.function(reduce_retracing=True)
    def step(heads):
        with tf.GradientTape() as tape:
            sums = squares_after(layer, corrected(), heads)
            loss = tf.reduce_sum(sums[:2] / (sums[2:] + 1e-9))
        gradients = tape.gradient(
            loss, corrections, unconnected_gradients="zero"
        )
        optimizer.apply_gradients(zip(gradients, corrections, strict=True))

    examples = [
        heads._make(map(tf.convert_to_tensor, heads))
        for heads in item.examples()
    ]
    for number in range(steps):
        step(examples[number % len(examples)])
    return Change(*(x.numpy().astype("float64") for x in corrected()))
