"""Rotary positions: queries and keys turned by the places where they stand.

Pairs of a head's dimensions, one of each half, turn by place · λ^(−2j/dim), so
that q·k depends on the distance alone ("RoFormer", arXiv 2104.09864; halves as
in KerasHub's `RotaryEmbedding`). A place is a number of visible keys: masked
ones take none, wherever they stand.
"""

import math

import numpy as np
import tensorflow as tf

from keras_kt.ops import visible_tokens
from keras_kt.ops.heads import size_of

# A product of place and rate loses the angle as places grow in float32: what
# so many tokens turn by is known up to full turns.
_ROUND = 1024


def rotate(query, key, max_wavelength, *, key_mask=None, start=None):
    """Queries and keys, turned by their places.

    Query t stands where key t does, and beyond the last key goes on counting.

    Args:
        query: `(batch, query_length, heads, dim)`, float32; `dim` is even.
        key: `(batch, key_length, heads, dim)`.
        max_wavelength: λ, a number; wavelengths go from 2π tokens up to almost
            2π · λ.
        key_mask: `(batch, key_length)` boolean, True keeps; or `None`.
        start: `(batch,)`, places of the first tokens. Defaults to `None`: 0.

    Returns:
        Both.
    """
    places = _places(query, key, key_mask)
    if start is not None:
        places += start[:, tf.newaxis]
    angles = _angles(places, query.shape[-1], max_wavelength)
    turns = tf.cos(angles), tf.sin(angles)
    return [_turned(x, *turns) for x in (query, key)]


def count(key, key_mask=None):
    """How many places keys take: `(batch,)`, or a number for all."""
    if key_mask is None:
        return tf.cast(size_of(key, 1), tf.float32)
    return tf.reduce_sum(tf.cast(key_mask, tf.float32), axis=1)


def _places(query, key, key_mask):
    """Places of the longer of both: `(batch or 1, length)`, float32."""
    length, keys = (size_of(x, 1) for x in (query, key))
    if key_mask is None:
        longer = tf.maximum(length, keys)
        return tf.range(tf.cast(longer, tf.float32))[tf.newaxis]
    missing = tf.maximum(length - keys, 0)
    mask = tf.cast(key_mask, "bool")
    mask = tf.pad(mask, [(0, 0), (0, missing)], constant_values=True)
    return tf.cast(visible_tokens.running_count(mask) - 1, tf.float32)


def _angles(places, dim, max_wavelength):
    """`(batch or 1, length, 1, dim / 2)`, up to full turns."""
    rates = float(max_wavelength) ** -(np.arange(0, dim, 2) / dim)
    rounds = np.mod(_ROUND * rates, 2.0 * math.pi)
    places = places[:, :, tf.newaxis, tf.newaxis]
    full = tf.floor(places / _ROUND)
    rest = places - _ROUND * full
    return rest * rates.astype("float32") + full * rounds.astype("float32")


def _turned(x, cos, sin):
    cos, sin = (y[:, : size_of(x, 1)] for y in (cos, sin))
    first, second = tf.split(x, 2, axis=-1)
    return tf.concat(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
