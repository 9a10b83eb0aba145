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

import tensorflow as tf

from keras_kt.ops.block_grid import size_of

# Stands for log 0; finite, since ∞ − ∞ hides in fully padded prefixes.
FLOOR = -1e30
MOST_EXCESS = 60.0
UNDERFLOW = math.exp(-MOST_EXCESS)
# Signed normalizers are kept away from zero by this share of the key count.
SIGNED_LIMIT = 1e-2


def query_features(feature_map, query):
    """Features up to a factor of each query, which the ratio cancels."""
    return getattr(feature_map, "relative", feature_map)(query)


def key_features(feature_map, key, keep):
    """Features of keys, those of masked ones log 0 or 0."""
    features = feature_map(key)
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


def count_visible(key, key_mask):
    """Visible keys, `(batch,)`."""
    if key_mask is None:
        return tf.fill((size_of(key, 0),), tf.cast(size_of(key, 1), tf.float32))
    return tf.reduce_sum(tf.cast(key_mask, tf.float32), axis=1)


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
    return tf.exp(log_key - maximum[..., tf.newaxis, :])


def exp_query(log_query, maximum):
    """Features of queries, relative to each row's maximum."""
    log_query += maximum[..., tf.newaxis, :]
    return tf.exp(log_query - row_maximum(log_query))


def divide(sums, count=None):
    """Numerator over normalizer, and the normalizer.

    `count`, the number of visible keys, marks signed features.
    """
    numerator, normalizer = sums[..., :-1], sums[..., -1:]
    return numerator * _inverse(normalizer, count), normalizer


def divide_gradient(upstream, output, normalizer, count):
    """Gradient to sums, from the saved results of `divide`."""
    inverse = _inverse(normalizer, count)
    of_normalizer = -inverse * tf.reduce_sum(
        upstream * output, axis=-1, keepdims=True
    )
    if count is not None:
        moves = tf.abs(normalizer) >= SIGNED_LIMIT * count
        of_normalizer = tf.where(moves, of_normalizer, 0.0)
    return tf.concat([upstream * inverse, of_normalizer], axis=-1)


def _inverse(normalizer, count):
    if count is not None:
        return tf.where(count > 0.0, 1.0 / guarded(normalizer, count), 0.0)
    visible = normalizer > 0.0
    return tf.where(visible, 1.0 / tf.where(visible, normalizer, 1.0), 0.0)


def safe_ratio(numerator, normalizer):
    """A ratio that is zero where the normalizer is."""
    visible = normalizer > 0.0
    ratio = numerator / tf.where(visible, normalizer, 1.0)
    return tf.where(visible, ratio, 0.0)


def guarded(normalizer, count):
    """A signed normalizer kept away from zero; 1 where nothing is seen."""
    limit = SIGNED_LIMIT * tf.where(count > 0.0, count, 1.0 / SIGNED_LIMIT)
    magnitude = tf.maximum(tf.abs(normalizer), limit)
    return tf.where(normalizer < 0.0, -magnitude, magnitude)


def is_exact(sums, sees):
    """Whether no row that sees a key came near underflow."""
    exact = tf.stop_gradient(sums[..., -1:]) > UNDERFLOW
    if sees is not None:
        exact |= tf.logical_not(sees)
    return tf.reduce_all(exact)


def absolute_log(normalizer, scale):
    """Logarithm of a normalizer that was divided by exp(scale)."""
    visible = normalizer > 0.0
    logarithm = tf.math.log(tf.where(visible, normalizer, 1.0)) + scale
    return tf.where(visible, logarithm, FLOOR)


def with_log_gradient(of_sums, of_log, normalizer):
    """Gradient to sums and scale, the logarithm's part added."""
    visible = normalizer > 0.0
    of_log = tf.where(visible, of_log, 0.0)
    of_normalizer = of_log / tf.where(visible, normalizer, 1.0)
    return tf.concat(
        [of_sums[..., :-1], of_sums[..., -1:] + of_normalizer, of_log], axis=-1
    )
