"""Logarithms of what pairs of tokens weigh, where a matrix of them is formed.

Heads first: `(batch, heads, query_length, key_length)`.
"""

import tensorflow as tf

from keras_kt.numerics import precise_product
from keras_kt.ops.blocks import Blocks
from keras_kt.ops.heads import size_of, swap_heads
from keras_kt.ops.scan import scan
from keras_kt.written_gradients import written_gradient


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


@written_gradient
def of_features(query, key):
    """log Σ_f exp(query_tf + key_sf) of any range, one query at a time.

    Args:
        query, key: log-features, `(batch, heads, length, features)`.
    """

    batch, length = size_of(query, 0), size_of(query, 2)
    one_by_one = Blocks(batch, length, None, batch, 1, 1)
    (logits,), _ = scan(
        _of_one, [swap_heads(query)], one_by_one, results=1, memory=[key]
    )

    def gradient(of_logits):
        def add(sums, row, of_its_logits):
            shares = tf.nn.softmax(row[:, :, tf.newaxis] + key)
            shares *= of_its_logits[..., tf.newaxis]
            return (sums[0] + shares,), tf.reduce_sum(shares, axis=2)

        # Not the scan's own, which makes a layer's graph an eighth larger.
        rows = [query, of_logits]
        (of_key,), of_query = _walk(rows, add, (tf.zeros_like(key),))
        return of_query, of_key

    return swap_heads(logits), gradient


def _of_one(tokens, _, __, memory, ___):
    """Logits of one query, as a body of `scan`."""
    ((query,), (key,)) = tokens, memory
    logits = query[:, :, :, tf.newaxis] + key[:, :, tf.newaxis]
    return [tf.reduce_logsumexp(logits, axis=-1)], [], True


def _walk(inputs, body, sums):
    """Walks the rows of queries.

    Args:
        inputs: tensors `(batch, heads, query_length, …)`.
        body: `(sums, *rows) -> (sums, result)`.
        sums: tuple of tensors.

    Returns:
        The last sums, and the results, `(batch, heads, query_length, …)`.
    """
    length = size_of(inputs[0], 2)

    def advance(row, sums, results):
        rows = [tf.gather(x, row, axis=2) for x in inputs]
        sums, result = body(sums, *rows)
        return row + 1, sums, results.write(row, result)

    _, sums, results = tf.while_loop(
        lambda row, *_: row < length,
        advance,
        (tf.constant(0), sums, tf.TensorArray(tf.float32, length)),
        parallel_iterations=1,
        maximum_iterations=length,
    )
    return sums, tf.transpose(results.stack(), (1, 2, 0, 3))
