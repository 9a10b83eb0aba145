"""Sampling: one token of each row's logits, and the noise that decides.

A token is where a uniform number falls among the cumulative probabilities, so a
row needs one number for a token. It is Threefry's of four words, the row's seed
and place, which continuation it is and the token's position, and of nothing
else: not of the other rows, nor of the shapes of what is drawn.

References:
    Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3.
"""

import keras
import tensorflow as tf

from keras_kt import _checks

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def check_top_p(top_p):
    """A `float` in (0, 1], or `None`."""
    top_p = _checks.number("top_p", top_p, is_open=True, optional=True)
    if top_p is not None and top_p > 1.0:
        raise ValueError(
            "`top_p` must be a probability in (0, 1] or `None`. Received: "
            f"top_p={top_p}"
        )
    return top_p


def words(seed, batch, sequences):
    """What tells rows apart: `(batch · sequences, 3)` int32.

    Args:
        seed: an integer, one for each of the batch, or `None`, which draws one.
        batch: number of prompts.
        sequences: number of continuations of each.

    Returns:
        The seed, the place in the batch, and which continuation it is. The
        place is 0 where the prompt has a seed of its own.
    """
    places = tf.range(batch)
    if seed is None:
        seed = keras.random.randint((), 0, 2**31 - 1, dtype="int32")
    elif _checks.is_sequence(seed):
        seed = [
            _bounded(x) for x in _checks.integers("seed", seed, minimum=None)
        ]
        if len(seed) != batch:
            raise ValueError(
                "`seed` must be an integer, or one for each prompt. Received: "
                f"{len(seed)} seeds for {batch} prompts."
            )
        places = tf.zeros_like(places)
    else:
        seed = _bounded(_checks.integer("seed", seed, minimum=None))
    seed = tf.broadcast_to(tf.cast(seed, tf.int32), (batch,))
    rows = tf.repeat(tf.stack([seed, places], 1), sequences, axis=0)
    which = tf.tile(tf.range(sequences), [batch])
    return tf.concat([rows, which[:, tf.newaxis]], 1)


def likeliest(logits, top_k=None, top_p=None):
    """Logits, −∞ for all but the likeliest tokens; equals stay together.

    Args:
        logits: `(rows, vocabulary)`, float32.
        top_k: how many to keep, an integer, or `None`.
        top_p: the probability of what to keep, a scalar tensor, or `None`.

    Returns:
        `(rows, vocabulary)`.
    """
    if top_k is None and top_p is None:
        return logits
    size = logits.shape[-1] or tf.shape(logits)[-1]
    best = tf.math.top_k(
        logits, size if top_k is None else tf.minimum(top_k, size)
    ).values
    least = best[:, -1:]
    if top_p is not None:
        weights = tf.exp(best - best[:, :1])
        before = tf.cumsum(weights, axis=1, exclusive=True)
        total = tf.reduce_sum(weights, axis=1, keepdims=True)
        kept = tf.where(before < top_p * total, best, best[:, :1])
        least = tf.reduce_min(kept, axis=1, keepdims=True)
    return tf.where(logits < least, -float("inf"), logits)


def sample(logits, noise):
    """The token of each row at which its cumulative probability passes a noise.

    Args:
        logits: `(rows, vocabulary)`, float32; −∞ is never chosen.
        noise: `(rows,)` in [0, 1).

    Returns:
        `(rows,)` int32.
    """
    weights = tf.exp(logits - tf.reduce_max(logits, axis=1, keepdims=True))
    # Sums that are not formed in order, as XLA's, may pass at a weight of zero.
    sums = tf.where(weights > 0.0, tf.cumsum(weights, axis=1), 0.0)
    total = tf.reduce_max(sums, axis=1, keepdims=True)
    return tf.argmax(sums > noise[:, tf.newaxis] * total, 1, tf.int32)


def uniform(words, position):
    """Noise of each row at a position, `(rows,)` in [0, 1)."""
    words = tf.bitcast(words, tf.uint32)
    seed, place, which = tf.unstack(words, axis=1)
    position = tf.bitcast(tf.cast(position, tf.int32), tf.uint32)
    position = tf.broadcast_to(position, tf.shape(seed))
    bits, _ = threefry((seed, place), (which, position))
    # As many as a float32 holds exactly.
    bits = tf.cast(tf.bitwise.right_shift(bits, _word(8)), tf.int32)
    return tf.cast(bits, tf.float32) * 2.0**-24


def threefry(key, counter):
    """Threefry-2x32 of 20 rounds: two words of each key and counter.

    Args:
        key, counter: pairs of uint32 tensors of one shape.

    Returns:
        A pair of such.
    """
    shift = tf.bitwise
    mixed = tf.bitwise.bitwise_xor(key[0], key[1])
    keys = (*key, tf.bitwise.bitwise_xor(mixed, _word(0x1BD11BDA)))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            x += y
            y = shift.bitwise_or(
                shift.left_shift(y, _word(turn)),
                shift.right_shift(y, _word(32 - turn)),
            )
            y = shift.bitwise_xor(x, y)
        x += keys[(group + 1) % 3]
        y += keys[(group + 2) % 3] + _word(group + 1)
    return x, y


def _word(x):
    return tf.constant(x, tf.uint32)


def _bounded(seed):
    if abs(seed) >= 2**31:
        raise ValueError(
            f"`seed` must have at most 31 bits. Received: seed={seed}"
        )
    return seed
