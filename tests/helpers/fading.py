"""A causal model that traces at once, and what it says in float64 NumPy.

Its state is a fading sum of the tokens' rows of a table.
"""

import keras
import numpy as np
import tensorflow as tf

FADING = 0.7


class Fading(keras.Model):
    """Logits of sums that fade; counts how often its step is traced or run.

    `scale` sets how far from one another the logits are.
    """

    def __init__(self, vocabulary=11, width=5, scale=3.0, seed=0):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.tables = [
            (size * rng.normal(size=shape)).astype("float32")
            for size, shape in (
                (1.0, (vocabulary, width)),
                (scale, (width, vocabulary)),
            )
        ]
        self.calls = 0
        self.built = True

    def call(self, tokens):
        return self.step(tokens, self.initial_state(tf.shape(tokens)[0]))[0]

    def initial_state(self, batch_size):
        return {"sum": tf.zeros((batch_size, self.tables[0].shape[1]))}

    def step(self, tokens, state, mask=None):
        self.calls += 1
        first, last = self.tables
        if mask is None:
            mask = tf.ones_like(tokens, tf.bool)
        counts = tf.cumsum(tf.cast(mask, tf.float32), axis=1)
        since = counts[:, :, tf.newaxis] - counts[:, tf.newaxis]
        seen = mask[:, tf.newaxis] & (
            tf.range(tf.shape(tokens)[1])[:, tf.newaxis]
            >= tf.range(tf.shape(tokens)[1])
        )
        weights = tf.where(seen, FADING ** tf.maximum(since, 0.0), 0.0)
        sums = tf.matmul(weights, tf.gather(first, tokens))
        sums += FADING ** counts[:, :, tf.newaxis] * state["sum"][:, tf.newaxis]
        return tf.matmul(sums, last), {"sum": sums[:, -1]}


class WithoutMask(Fading):
    """The same, whose step takes no mask."""

    def step(self, tokens, state):
        return super().step(tokens, state)


def last_logits(model, tokens):
    """Logits after one sequence, by the sum as it is written."""
    first, last = (table.astype("float64") for table in model.tables)
    total = np.zeros(first.shape[1])
    for token in tokens:
        total = FADING * total + first[token]
    return total @ last
