"""Features on scales that cancel, and the one place that divides.

Positive features are exponentiated relative to the maximum of each feature over
the keys and the maximum of each query over its features. Both cancel in the
ratio, all exponents are ≤ 0, and some feature of some key reaches 1, so the
normalizer is at least one in the bidirectional form and needs no epsilon. Where
a mask hides the key that set the maximum the normalizer can be small; it is
its own certificate: as long as it stays above e⁻⁶⁰ nothing was lost to
underflow, and below that an exact, slower form takes over at run time.

Values carry a column of ones, so that one product gives numerator and
normalizer. Masked keys have a zero row there, which removes them from both.
"""

import math
from typing import NamedTuple

import tensorflow as tf

from keras_kt.written_gradients import written_gradient

# Stands for log 0; finite, since ∞ − ∞ hides in fully padded prefixes.
FLOOR = -1e30
MOST_EXCESS = 60.0
_UNDERFLOW = math.exp(-MOST_EXCESS)
# Signed normalizers are kept away from zero by this share of the key count.
_SIGNED_LIMIT = 1e-2


class Sums(NamedTuple):
    """What queries read from keys, before the division.

    Attributes:
        values: `(…, value_dim + 1)`, numerators, and the normalizer.
        scale: `(…, 1)`: of positive features the logarithm of what `values`
            were divided by, or `None`; of signed ones the number of keys that
            are seen.
    """

    values: tf.Tensor
    scale: tf.Tensor | None = None


def key_features(feature_map, key, keep):
    """Features of keys, those of masked ones log 0 or 0."""
    features = feature_map.keys(key)
    if keep is None:
        return features
    # Selected, not multiplied: a padded row may hold anything, NaN too.
    return tf.where(keep, features, FLOOR if feature_map.positive else 0.0)


def with_ones(value, keep):
    """Values with a column of ones, zero where masked."""
    value = tf.concat([value, tf.ones_like(value[..., :1])], axis=-1)
    return value if keep is None else tf.where(keep, value, 0.0)


def visible_decay(decay, key_mask):
    """The decay of tokens that are seen; a padded one may hold anything."""
    if key_mask is None:
        return decay
    keep = tf.cast(key_mask, "bool")[:, :, tf.newaxis, tf.newaxis]
    return tf.where(keep, decay, 0.0)


def maximum_of(log_key, past=None):
    """Maximum of each log-feature over the keys and the past."""
    maximum = tf.reduce_max(log_key, axis=-2)
    if past is not None:
        maximum = tf.maximum(maximum, past)
    return tf.stop_gradient(maximum)


def row_maximum(log_query):
    """Maximum over the last axis, which is kept."""
    return tf.stop_gradient(tf.reduce_max(log_query, axis=-1, keepdims=True))


def exp_key(log_key, maximum):
    """Features of keys, relative to each feature's maximum."""
    return tf.exp(log_key - tf.expand_dims(maximum, -2))


def exp_query(log_query, maximum):
    """Features of queries, relative to each row's maximum, and that."""
    log_query += tf.expand_dims(maximum, -2)
    scale = row_maximum(log_query)
    return tf.exp(log_query - scale), scale


def read(feature_map, query, maximum, sums):
    """`Sums` of queries, heads first, from a state."""
    features = feature_map.queries(query)
    if feature_map.positive:
        features, scale = exp_query(features, maximum)
    else:
        # The sum of the constant feature counts the keys.
        scale = sums[..., -1:, -1:] / features[..., -1:]
    return Sums(tf.matmul(features, sums, transpose_b=True), scale)


def divide(sums, is_signed):
    """Numerators over normalizers, and the normalizers.

    The gradient keeps these two, not the sums.
    """
    width = sums.values.shape[-1] - 1

    @written_gradient
    def ratio(values, *count):
        normalizer = values[..., width:]
        divisor = guarded(normalizer, *count) if is_signed else normalizer
        # Divisors are zero only where nothing is seen.
        inverse = tf.math.divide_no_nan(1.0, divisor)
        output = values[..., :width] * inverse

        def gradient(of_output, of_normalizer):
            of_divisor = -inverse * tf.reduce_sum(
                of_output * output, axis=-1, keepdims=True
            )
            of_count = []
            if is_signed:
                moves = tf.equal(divisor, normalizer)
                share = tf.math.divide_no_nan(divisor, *count)
                of_count = [tf.where(moves, 0.0, of_divisor * share)]
                of_divisor = tf.where(moves, of_divisor, 0.0)
            of_values = of_output * inverse, of_normalizer + of_divisor
            return tf.concat(of_values, axis=-1), *of_count

        return (output, normalizer), gradient

    return ratio(*sums[: 1 + is_signed])


def guarded(normalizer, count):
    """A signed normalizer kept away from zero; 0 where nothing is seen."""
    magnitude = tf.maximum(tf.abs(normalizer), _SIGNED_LIMIT * count)
    return tf.where(normalizer < 0.0, -magnitude, magnitude)


def is_exact(sums, sees):
    """Whether no row that sees a key came near underflow."""
    exact = tf.stop_gradient(sums[..., -1:]) > _UNDERFLOW
    if sees is not None:
        exact |= tf.logical_not(sees)
    return tf.reduce_all(exact)


def absolute_log(normalizer, scale):
    """Logarithm of a normalizer that was divided by exp(scale)."""
    visible = normalizer > 0.0
    logarithm = tf.math.log(tf.where(visible, normalizer, 1.0)) + scale
    return tf.where(visible, logarithm, FLOOR)
