import numpy as np
import pytest
import tensorflow as tf

from keras_kt.priors import base_noise

SEED = tf.constant([3, 5], tf.int32)


def many(shape, count, **kwargs):
    sets = base_noise.draw((count * shape[0], *shape[1:]), SEED, **kwargs)
    return sets.numpy()


@pytest.mark.parametrize("coupling", base_noise.COUPLINGS)
@pytest.mark.parametrize("radius", base_noise.RADII)
def test_draws_are_equal_with_and_without_xla(coupling, radius):
    """TensorFlow's own normal draws differ by several units there."""

    def draw(seed):
        return base_noise.draw(
            (3, 13, 5), seed, coupling=coupling, radius=radius
        )

    compiled = tf.function(draw, jit_compile=True)(SEED)
    np.testing.assert_allclose(draw(SEED), compiled, atol=2e-5)
    assert np.abs(draw(SEED) - draw(SEED + 1)).max() > 0.1


@pytest.mark.parametrize("coupling", base_noise.COUPLINGS)
def test_rows_are_standard_normal_with_chi_radii(coupling):
    rows = many((1, 10, 5), 4000, coupling=coupling, radius="chi")
    count = rows[..., 0].size
    flat = rows.reshape(-1, 5)
    mean_error = np.abs(flat.mean(0)).max()
    covariance = flat.T @ flat / count
    # Coupled rows have at most the variance of independent ones.
    assert mean_error < 4 / count**0.5
    np.testing.assert_allclose(
        covariance, np.eye(5), atol=4 * (2 / count) ** 0.5
    )
    fourth = (flat**4).mean(0)
    np.testing.assert_allclose(fourth, 3.0, atol=5 * (96 / count) ** 0.5)


@pytest.mark.parametrize("coupling", base_noise.COUPLINGS)
def test_fixed_radius_is_the_root_of_the_dimension(coupling):
    rows = many((2, 7, 5), 3, coupling=coupling, radius="fixed")
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 5**0.5, rtol=1e-5)


def test_orthogonal_blocks_are_orthogonal_and_haar():
    """Without the sign fix the mean diagonal is −0.2 at dimension 16."""
    rows = many((1, 16, 16), 4000, coupling="orthogonal", radius="fixed") / 4.0
    gram = rows @ rows.transpose(0, 2, 1)
    np.testing.assert_allclose(gram, gram * 0 + np.eye(16), atol=1e-5)
    z = np.abs(rows.mean(0)) / (0.25 / 4000**0.5)
    assert z.max() < 5.0


def test_a_partial_block_is_cut_from_a_whole_one():
    rows = many((1, 7, 5), 1, coupling="orthogonal", radius="fixed")[0]
    gram = rows @ rows.T / 5.0
    np.testing.assert_allclose(gram[:5, :5], np.eye(5), atol=1e-5)
    np.testing.assert_allclose(gram[5:, 5:], np.eye(2), atol=1e-5)


def test_sobol_points_are_points_in_the_right_dimension():
    """Swapped axes would give `dim` points in dimension `rows`."""
    uniform = 64
    rows = many((1, uniform, 3), 1, coupling="sobol", radius="chi")[0]
    for coordinate in rows.T:
        quantiles = np.sort(coordinate)
        # One point in each of 64 equal cells (up to the shift).
        cells = np.floor(uniform * _normal_cdf(quantiles))
        assert len(set(cells)) >= uniform - 2


def _normal_cdf(x):
    return 0.5 * (1.0 + tf.math.erf(x / 2**0.5).numpy())
