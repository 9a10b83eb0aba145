"""Every prior, from its weights and its stored draw to frequencies."""

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import cases, reference

pytestmark = pytest.mark.filterwarnings("ignore:FastFoodPrior needs a power")


def tensors_of(draw):
    """What `Frequencies` say, as the oracle puts it: offsets and means
    `(heads, components, …, dim)`, probabilities and covariances."""
    offsets, means, log_weights, covariances, of_keys = draw
    assert of_keys is None
    heads, count, dim = offsets.shape
    components = log_weights.shape[1]
    rows = count // components
    if means is None:
        means = tf.zeros((heads, components, dim))
    if covariances.shape.rank == 3:
        covariances = tf.linalg.diag(covariances)
    else:
        covariances = covariances @ tf.linalg.matrix_transpose(covariances)
    return (
        tf.reshape(offsets, (heads, components, rows, dim)),
        means,
        rows * tf.exp(log_weights),
        covariances,
    )


def arrays_of(prior, weights, noise):
    offsets, means, probabilities, factors = cases.reference_frequencies(
        prior, weights, noise
    )
    covariances = factors @ np.swapaxes(factors, -1, -2)
    return offsets, means, probabilities, covariances


@pytest.mark.parametrize("name", cases.PRIORS)
def test_frequencies_and_gradients_match_float64_numpy(name):
    prior, _ = cases.build(name, "trigonometric")
    noise = cases.reference_noise(prior)
    weights = cases.weights_of(prior)
    expected = arrays_of(prior, weights, noise)
    rng = np.random.default_rng(7)
    upstream = [rng.normal(size=x.shape) / x.size**0.5 for x in expected]
    with tf.GradientTape() as tape:
        tensors = tensors_of(prior())
        loss = tf.add_n(
            [
                tf.reduce_sum(x * tf.cast(y, tf.float32))
                for x, y in zip(tensors, upstream, strict=True)
            ]
        )
    for one, other in zip(tensors, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)
    variables = [w.value for w in prior.trainable_weights]
    gradients = tape.gradient(loss, variables)
    names = [cases.name_of(w) for w in prior.trainable_weights]
    assert set(names) == set(weights)
    for weight, gradient in zip(names, gradients, strict=True):

        def losses(x, weight=weight):
            arrays = arrays_of(prior, {**weights, weight: x}, noise)
            # One head's weights touch only that head's frequencies.
            return sum(
                (x * y).reshape(cases.HEADS, -1).sum(1)
                for x, y in zip(arrays, upstream, strict=True)
            )

        wanted = reference.complex_step(
            losses, weights[weight], weights[weight].ndim - 1
        )
        np.testing.assert_allclose(
            gradient, wanted, atol=1e-5, rtol=1e-5, err_msg=weight
        )
