"""A layer's estimate of attention on captured heads, against softmax's.

By features, and by the near field or the window where the layer has one, with
the attention matrix formed. Errors, calibration and distillation all go by the
same sums of squared differences. O(length²).
"""

import tensorflow as tf

from keras_kt import ops


def estimate(layer, query, key, value, visible, prior=None):
    """The layer's outputs and weights, by features, near field or window.

    Args:
        layer: a built `KernelizedAttention`.
        query, key, value: `(batch, length, heads, dim)`, as projected.
        visible: boolean, broadcast to
            `(batch, heads, query_length, key_length)`.
        prior: another prior than the layer's. Defaults to `None`.

    Returns:
        `(batch, query_length, heads, value_dim)`, and weights
        `(batch, heads, query_length, key_length)`.
    """
    prior = layer.spectral_prior if prior is None else prior
    near = None
    if layer.near_field:
        kernel = layer.feature_map.exact_kernel(prior)
        near = ops.NearField(kernel, layer.near_field)
    elif layer.sliding_window:
        # What is in the window, `visible` tells.
        kernel = layer.feature_map.exact_kernel(prior)
        near = ops.NearField(kernel, tf.shape(key)[1], has_far=False)
    return ops.attend_with_matrix(
        *layer.scaled(query, key),
        value,
        layer.feature_map.bind(
            prior.stored_frequencies(), is_absolute=bool(layer.near_field)
        ),
        attention_mask=visible,
        near=near,
    )


def squared_errors(output, weights, heads):
    """Sums of squares over batch and positions, `(4, heads)`.

    Args:
        output, weights: an estimate, as `estimate` gives it.
        heads: the `Heads` that it is of.

    Returns:
        Errors of the weights and of the output, then both's squared norms.
    """
    exact = tf.einsum("bhts,bshe->bthe", heads.weights, heads.value)
    return tf.stack(
        [
            matrix_squares(weights - heads.weights),
            _output_squares(output - exact),
            matrix_squares(heads.weights),
            _output_squares(exact),
        ]
    )


def matrix_squares(weights):
    """The sum of squares of each head's weights, `(heads,)`."""
    return tf.reduce_sum(tf.square(weights), axis=(0, 2, 3))


def _output_squares(output):
    return tf.reduce_sum(tf.square(output), axis=(0, 1, 3))
