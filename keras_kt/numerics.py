"""Numbers that must be right: precise products, and sines."""

import math

import tensorflow as tf

from keras_kt.written_gradients import written_gradient

# Angles beyond have no meaning in float32: its numbers lie 2⁻⁶ apart there.
_LARGEST_ANGLE = 2.0**17
# π/2 in three parts: products of the first two with whole numbers are exact.
_HALF_PI = 1.5703125, 4.837512969970703125e-4, 7.549789948768648e-8


@written_gradient
def sine_and_cosine(x):
    """sin x and cos x to 2e-7, of float32.

    XLA's own take about ten times as long on a CPU, one number at a time.
    Cephes's polynomials on [−π/4, π/4].
    """
    x = tf.clip_by_value(x, -_LARGEST_ANGLE, _LARGEST_ANGLE)
    turns = tf.round(x * (2.0 / math.pi))
    for part in _HALF_PI:
        x -= turns * part
    square = tf.square(x)
    sine = x + x * square * (
        -1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4)
    )
    cosine = (1.0 - 0.5 * square) + tf.square(square) * (
        4.166664568298827e-2
        + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    )
    # Odd quarter turns exchange the two; quarter turns 2 and 3 change the sign
    # of the sine, 1 and 2 that of the cosine.
    is_odd = _parity(turns) > 0.5
    sine, cosine = (
        tf.where(is_odd, cosine, sine) * _sign(tf.floor(0.5 * turns)),
        tf.where(is_odd, sine, cosine) * _sign(tf.floor(0.5 * (turns + 1.0))),
    )

    def gradient(of_sine, of_cosine):
        return of_sine * cosine - of_cosine * sine

    return (sine, cosine), gradient


def _parity(number):
    """1 where a whole number is odd, else 0."""
    return number - 2.0 * tf.floor(0.5 * number)


def _sign(number):
    """−1 where a whole number is odd, else 1."""
    return 1.0 - 2.0 * _parity(number)


def precise_product(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """`a @ b` in float32, on a TPU too: for what is to be exponentiated.

    A TPU rounds the operands of a float32 product to bfloat16, which is an
    error of some percent of exp(ω·x), and TensorFlow can forbid that for a
    whole program only. Here each operand is split in two that survive it; the
    product of the two lower parts, 2⁻¹⁶ of the result, is left out.
    """
    if not _rounds_products():
        return _product(a, b)
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    small = _product(a_high, b_low) + _product(a_low, b_high)
    return _product(a_high, b_high) + small


def _product(a, b):
    """`a @ b`, where `b` may be one matrix for the whole batch."""
    if b.shape.rank < 3 or any(size != 1 for size in b.shape[:-2]):
        return tf.matmul(a, b)
    # TensorFlow 2.21 on a CPU gives wrong numbers, and writes past its memory,
    # where it broadcasts a single small matrix along several axes.
    sizes = tf.shape(a)
    lead = [size or sizes[i] for i, size in enumerate(a.shape[:-1])]
    rows = tf.reshape(a, (-1, a.shape[-1]))
    rows = tf.matmul(rows, tf.reshape(b, b.shape[-2:]))
    return tf.reshape(rows, (*lead, b.shape[-1]))


def _rounds_products():
    """Whether float32 products may be bfloat16 passes."""
    return bool(
        tf.config.list_logical_devices("TPU")
        and tf.config.experimental.tensor_float_32_execution_enabled()
    )


def _split(x):
    """A bfloat16 in float32, and the rest. The gradient takes the rest."""
    # By its bits, since XLA may drop a cast there and back.
    bits = tf.bitcast(x, tf.uint32) + tf.constant(0x8000, tf.uint32)
    high = tf.bitcast(
        tf.bitwise.bitwise_and(bits, tf.constant(0xFFFF0000, tf.uint32)),
        tf.float32,
    )
    high = tf.stop_gradient(high)
    return high, x - high
