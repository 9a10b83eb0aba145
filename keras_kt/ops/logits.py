"""Logarithms of what pairs of tokens weigh, where a matrix of them is formed.

Heads first: `(batch, heads, query_length, key_length)`.
"""

import tensorflow as tf

from keras_kt.numerics import precise_product
from keras_kt.ops.blocks import Blocks
from keras_kt.ops.heads import size_of, swap_heads
from keras_kt.ops.scan import scan


def of_kernel(query, key):
    """log Σ_c exp(query_tc·key_sc) of an `ExactKernel`.

    Args:
        query, key: `(batch, heads, length, components, dim)`, from it.
    """
    if query.shape[3] == 1:
        return precise_product(
            query[:, :, :, 0], tf.linalg.matrix_transpose(key[:, :, :, 0])
        )
    query = tf.einsum("bhtcd->bhctd", query)
    key = tf.einsum("bhscd->bhcds", key)
    return tf.reduce_logsumexp(precise_product(query, key), axis=2)


def of_features(query, key):
    """log Σ_f exp(query_tf + key_sf) of any range, one query at a time.

    Its gradient belongs into the branch of its results, as `unless` and `scan`
    put it: of another one XLA does not take numbers for constants.

    Args:
        query, key: log-features, `(batch, heads, length, features)`.
    """
    batch, length = size_of(query, 0), size_of(query, 2)
    one_by_one = Blocks(batch, length, None, batch, 1, 1)
    (logits,), _ = scan(
        _of_one, [swap_heads(query)], one_by_one, results=1, memory=[key]
    )
    return swap_heads(logits)


def _of_one(tokens, _, __, memory, ___):
    """Logits of one query, as a body of `scan`."""
    ((query,), (key,)) = tokens, memory
    logits = query[:, :, :, tf.newaxis] + key[:, :, tf.newaxis]
    return [tf.reduce_logsumexp(logits, axis=-1)], [], True
