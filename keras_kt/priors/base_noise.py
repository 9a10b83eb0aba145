"""Base noise: the random numbers that a spectral prior turns into frequencies.

Noise is drawn once, in standardised coordinates, and stored; a prior maps it to
frequencies by a differentiable function, which *is* the reparameterised
sampling. How the rows of one draw depend on each other (their coupling) decides
the variance of the kernel estimate and lives here alone.

Draws are stateless and portable: the same seed gives the same numbers eagerly,
under XLA and on a TPU. TensorFlow's own `stateless_normal` does not promise
that, but the raw words of its Philox generator are bit-identical everywhere, so
uniform and normal numbers are made from those.
"""

import math

import numpy as np
import tensorflow as tf

COUPLINGS = ("orthogonal", "iid", "sobol")
RADII = ("fixed", "chi")


def uniform(shape, seed: tf.Tensor) -> tf.Tensor:
    """Uniform numbers in the open interval (0, 1), float32.

    Args:
        shape: shape of the result, integers or a tensor.
        seed: `(2,)` integer tensor.
    """
    words = tf.random.stateless_uniform(
        shape, seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
    )
    # 23 bits and a half step: never 0, never 1, symmetric about one half.
    bits = tf.cast(tf.bitwise.right_shift(words, np.uint32(9)), tf.float32)
    return (bits + 0.5) * 2.0**-23


def normal(shape, seed: tf.Tensor) -> tf.Tensor:
    """Standard normal numbers by the Box-Muller transform, float32.

    Args:
        shape: shape of the result, integers or a tensor.
        seed: `(2,)` integer tensor.
    """
    words = uniform(tf.concat([[2], shape], axis=0), seed)
    radius = tf.sqrt(-2.0 * tf.math.log(words[0]))
    return radius * tf.cos(2.0 * math.pi * words[1])


def draw(
    shape: tuple[int, int, int],
    seed: tf.Tensor,
    *,
    coupling: str = "orthogonal",
    radius: str = "chi",
) -> tf.Tensor:
    """Draws rows whose law is N(0, I), or N(0, I) with the radius fixed.

    Args:
        shape: `(sets, rows, dim)`. Sets are independent of each other; the
            coupling acts among the rows of a set.
        seed: `(2,)` integer tensor.
        coupling: `"orthogonal"`: blocks of `dim` rows are the rows of a
            Haar-distributed orthogonal matrix; a last partial block is cut.
            `"iid"`: independent rows. `"sobol"`: a randomly shifted Sobol
            sequence through the normal quantile function.
        radius: `"chi"`: the norms that N(0, I) has, so that every estimate is
            exactly unbiased. `"fixed"`: every row has norm √dim; with
            orthogonal rows in whole blocks and two-sided features this
            integrates all polynomials of degree three exactly and has the
            smallest error, at a bias of order |z|⁴/dim in the log-kernel.

    Returns:
        A float32 tensor of shape `(sets, rows, dim)`.
    """
    sets, rows, dim = shape
    seeds = tf.random.split(seed, 2, alg="philox")
    if coupling == "orthogonal":
        directions = _haar_rows(shape, seeds[0])
        if radius == "fixed":
            return directions * math.sqrt(dim)
        norms = tf.norm(normal(shape, seeds[1]), axis=-1, keepdims=True)
        return directions * norms
    if coupling == "iid":
        points = normal(shape, seeds[0])
    else:
        shift = uniform((sets, 1, dim), seeds[0])
        points = tf.math.floormod(_sobol_points(rows, dim) + shift, 1.0)
        points = tf.math.ndtri(tf.clip_by_value(points, 1e-6, 1.0 - 1e-6))
    if radius == "fixed":
        norms = tf.norm(points, axis=-1, keepdims=True)
        return points * (math.sqrt(dim) / norms)
    return points


def _haar_rows(shape: tuple[int, int, int], seed: tf.Tensor) -> tf.Tensor:
    sets, rows, dim = shape
    blocks = -(-rows // dim)
    gaussian = normal((sets, blocks, dim, dim), seed)
    orthogonal, upper = tf.linalg.qr(gaussian)
    # Without the signs of R's diagonal a QR factor is not Haar-distributed, and
    # one-sided positive features become biased.
    diagonal = tf.linalg.diag_part(upper)
    signs = tf.where(diagonal < 0.0, -1.0, 1.0)
    orthogonal *= signs[..., tf.newaxis, :]
    return tf.reshape(orthogonal, (sets, blocks * dim, dim))[:, :rows]


def _sobol_points(rows: int, dim: int) -> tf.Tensor:
    # Constants of the graph: the op has no XLA kernel, and only the random
    # shift differs from draw to draw.
    with tf.init_scope():
        points = tf.math.sobol_sample(dim, rows).numpy()
    return tf.constant(points, tf.float32)
