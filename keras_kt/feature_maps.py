"""Feature maps: from a query or key to its features φ_ω(x), per head.

`PositiveFeatures` (PRF): φ_ω(x) = h(x) exp(ω·x), kept as logarithms until the
attention algorithm exponentiates them, so that nothing overflows.
`TrigonometricFeatures` (RKS): φ_ω(x) = (cos ω·x, sin ω·x). Equations 5-9 of
arXiv 2110.08323; the paper's M is `num_frequencies` here.

A feature map is bound to one draw of `Frequencies`, which gives a function from
`(batch, heads, length, head_dim)` to `(batch, heads, length, feature_dim)`.
"""

import math
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_kt import _checks
from keras_kt._recipe import Recipe
from keras_kt.priors import Frequencies, SpectralPrior
from keras_kt.written_gradients import written_gradient

PREFACTORS = ("softmax", "tilted", "gaussian", "isotropic")


class PositiveMap(NamedTuple):
    """Log-features of x; `C` components share the frequencies evenly.

    Attributes:
        projection: `(heads, head_dim, num_frequencies)`.
        linear: `(heads, head_dim, components)` or `None`.
        quadratic: `(heads, head_dim, components)` for Σ_d q_d x_d², or
            `(heads, components, head_dim, head_dim)` for |qᵀx|².
        log_amplitudes: `(heads, 1, components)`.
        two_sided: whether each frequency gives exp(+ω·x) and exp(−ω·x).
    """

    projection: tf.Tensor
    linear: tf.Tensor | None
    quadratic: tf.Tensor
    log_amplitudes: tf.Tensor
    two_sided: bool

    positive = True

    @property
    def width(self) -> int:
        """Size of the feature axis."""
        return self.projection.shape[-1] * (2 if self.two_sided else 1)

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return self._sides(x, self.exponent(x))

    def exponent(self, x: tf.Tensor) -> tf.Tensor:
        """What the log-features of a component share."""
        exponent = self.log_amplitudes - self._quadratic_form(x)
        if self.linear is not None:
            exponent += precise_product(x, self.linear)
        return exponent

    def relative(self, x: tf.Tensor) -> tf.Tensor:
        """Log-features up to a constant of each x, which attention cancels."""
        if self.log_amplitudes.shape[-1] > 1:
            return self(x)
        return self._sides(x, tf.zeros_like(self.log_amplitudes))

    def _sides(self, x, exponent):
        projected = precise_product(x, self.projection)
        exponent = _per_frequency(exponent, projected)
        if self.two_sided:
            projected = tf.concat([projected, -projected], -1)
            if exponent.shape[-1] > 1:
                exponent = tf.concat([exponent, exponent], -1)
        return projected + exponent

    def _quadratic_form(self, x):
        if self.quadratic.shape.rank == 3 and self.quadratic.shape[-1] == 1:
            diagonal = tf.linalg.matrix_transpose(self.quadratic)
            return tf.reduce_sum(tf.square(x) * diagonal, -1, keepdims=True)
        if self.quadratic.shape.rank == 3:
            return precise_product(tf.square(x), self.quadratic)
        rotated = _by_component(x, self.quadratic)
        return tf.reduce_sum(tf.square(rotated), axis=-1)


class ExactKernel(NamedTuple):
    """The kernel that a `PositiveMap` of Gaussian frequencies estimates.

    It is Σ_c exp(q̃_c·k̃_c), up to the factor of the query that the map's
    `relative` leaves out, where q̃_c and k̃_c are x under a factor of Σ_c with
    two more coordinates.

    Attributes:
        feature_map: the `PositiveMap`.
        factors: `(heads, components, head_dim)` standard deviations, or
            Cholesky factors `(heads, components, head_dim, head_dim)`.
    """

    feature_map: PositiveMap
    factors: tf.Tensor

    def queries(self, x: tf.Tensor) -> tf.Tensor:
        """q̃, `(batch, heads, length, components, head_dim + 2)`."""
        mapped, exponent = self._mapped(x)
        if self.factors.shape[1] > 1:
            exponent += self.feature_map.exponent(x)
        return self._join(mapped, exponent, tf.ones_like(exponent))

    def keys(self, x: tf.Tensor) -> tf.Tensor:
        """k̃, like q̃."""
        mapped, exponent = self._mapped(x)
        # Features are a sum over frequencies and sides.
        terms = self.feature_map.width // self.factors.shape[1]
        exponent += self.feature_map.exponent(x) + math.log(terms)
        return self._join(mapped, tf.ones_like(exponent), exponent)

    def _mapped(self, x):
        if self.factors.shape.rank == 3:
            factors = self.factors[:, tf.newaxis]
            mapped = x[:, :, :, tf.newaxis] * factors
        else:
            mapped = _by_component(x, self.factors)
        return mapped, 0.5 * tf.reduce_sum(tf.square(mapped), axis=-1)

    def _join(self, mapped, *coordinates):
        more = tf.stack(coordinates, axis=-1)
        return tf.concat([mapped, more], axis=-1)


class TrigonometricMap(NamedTuple):
    """Signed features of x, with one constant feature for the smoothing.

    Attributes:
        projection: `(heads, head_dim, num_frequencies)`.
        amplitudes: `(heads, 1, num_frequencies)`.
        smoothing: `(heads, 1, 1)`, the constant that the kernel gains.
    """

    projection: tf.Tensor
    amplitudes: tf.Tensor
    smoothing: tf.Tensor

    positive = False

    @property
    def width(self) -> int:
        """Size of the feature axis."""
        return 2 * self.projection.shape[-1] + 1

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        angles = precise_product(x, self.projection)
        constant = tf.sqrt(self.smoothing) * tf.ones_like(angles[..., :1])
        sine, cosine = _sine_and_cosine(angles)
        return tf.concat(
            [self.amplitudes * cosine, self.amplitudes * sine, constant],
            axis=-1,
        )


# Angles beyond have no meaning in float32: its numbers lie 2⁻⁶ apart there.
_LARGEST_ANGLE = 2.0**17
# π/2 in three parts: products of the first two with whole numbers are exact.
_HALF_PI = 1.5703125, 4.837512969970703125e-4, 7.549789948768648e-8


@written_gradient
def _sine_and_cosine(x):
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


def _by_component(x, factors):
    """x under each component's factor, `(batch, heads, t, c, e)`."""
    mapped = precise_product(x[:, :, tf.newaxis], factors)
    return tf.einsum("bhcte->bhtce", mapped)


def precise_product(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """`a @ b` in float32, on a TPU too: for what is to be exponentiated.

    A TPU rounds the operands of a float32 product to bfloat16, which is an
    error of some percent of exp(ω·x), and TensorFlow can forbid that for a
    whole program only. Here each operand is split in two that survive it; the
    product of the two lower parts, 2⁻¹⁶ of the result, is left out.
    """
    if not _rounds_products():
        return tf.matmul(a, b)
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    small = tf.matmul(a_high, b_low) + tf.matmul(a_low, b_high)
    return tf.matmul(a_high, b_high) + small


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


class FeatureMap(Recipe):
    """Base class of the feature maps; like a prior, a recipe until built."""

    # Features per frequency.
    sides = 1

    def num_frequencies(self, num_features: int) -> int:
        """Frequencies that give `num_features` features."""
        if num_features % self.sides:
            raise ValueError(
                f"`num_features` must be even for {type(self).__name__}, which "
                "makes two features from each frequency. Received: "
                f"num_features={num_features}. Choose {num_features + 1}."
            )
        return num_features // self.sides

    def default_num_features(self, prior: SpectralPrior, head_dim: int) -> int:
        """One whole block of the coupling for each component."""
        return self.sides * prior.block_size(head_dim)

    def feature_dim(self, num_features: int) -> int:
        """Width of φ with what the map adds to `num_features`."""
        return num_features

    def validate(self, prior: SpectralPrior) -> None:
        """Raises a `ValueError` if the prior gives no kernel with this map."""
        # AutoGraph, which drops docstrings, fails on a body that has no more.
        return None

    def build(self, num_heads):
        """Creates the weights, if the map has any."""
        self.built = True

    def bind(self, frequencies: Frequencies, scale: float = 1.0):
        """A function from x to φ(scale · x), for one draw of frequencies."""
        raise NotImplementedError


@keras.saving.register_keras_serializable(package="keras_kt")
class PositiveFeatures(FeatureMap):
    """Positive random features (PRF): φ_ω(x) = h(x) exp(ω·x).

    k(x, y) = E[φ_ω(x)·φ_ω(y)] = h(x) h(y) E exp(ω·(x + y)): always positive, so
    attention weights are a convex combination and the normaliser is at least
    one, without any epsilon.

    Args:
        prefactor: log h(x), with Σ and μ those of the prior (of each component
            of a mixture). `"softmax"` (default): −½xᵀΣx − μ·x, so that keys
            weigh exp(qᵀΣk). `"tilted"`: −½xᵀΣx, so that they weigh
            exp(qᵀΣk + μ·k): softmax of queries whose mean, moved into μ, costs
            no variance. `"gaussian"`: −xᵀΣx, so that they weigh
            exp(μ·k − ½(q−k)ᵀΣ(q−k)). `"isotropic"`: −|x|² whatever Σ is, the
            paper's released form.
        two_sided: whether every frequency ω = μ + δ is used with its mirror
            image μ − δ. Half the projections for a given number of features,
            and a smaller error. Defaults to `True`.

    References:
        arXiv 2110.08323, equation 8; Choromanski et al., arXiv 2009.14794.

    Examples:

    >>> layer = keras_kt.KernelizedAttention(
    ...     2, 8, feature_map=keras_kt.PositiveFeatures("gaussian"))
    >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
    TensorShape([1, 4, 3])
    """

    def __init__(self, prefactor="softmax", two_sided=True, **kwargs):
        super().__init__(**kwargs)
        self.prefactor = _checks.choice("prefactor", prefactor, PREFACTORS)
        self.two_sided = _checks.boolean("two_sided", two_sided)

    @property
    def sides(self):
        return 2 if self.two_sided else 1

    def default_num_features(self, prior, head_dim):
        # Both kinds need whole blocks; one-sided features need the width too.
        return 2 * prior.block_size(head_dim)

    def validate(self, prior):
        if not prior.has_moment_generating_function:
            raise ValueError(
                "Positive features need a prior with a moment generating "
                "function: E exp(ω·z) must be finite for every z. Received: "
                f"{_describe(prior)}, whose tails are too heavy (or not known "
                'to be light). Use feature_map="trigonometric", which takes '
                "any distribution, or has_moment_generating_function=True if "
                "you know that it exists."
            )
        if prior.has_mean and self.prefactor == "softmax":
            raise ValueError(
                "The softmax prefactor cancels the mean of the prior, so that "
                "it would never be trained. Received: prefactor='softmax' with "
                f"use_mean=True in {type(prior).__name__}. Use "
                'PositiveFeatures(prefactor="tilted"), which keeps it, '
                'prefactor="gaussian", trigonometric features, or '
                "use_mean=False."
            )

    def bind(self, frequencies, scale=1.0):
        linear = None
        if self.prefactor != "softmax" and frequencies.means is not None:
            linear = scale * tf.linalg.matrix_transpose(frequencies.means)
        covariances = frequencies.covariances
        is_half = self.prefactor in ("softmax", "tilted")
        share = scale**2 * (0.5 if is_half else 1.0)
        if self.prefactor == "isotropic":
            quadratic = share * tf.ones_like(frequencies.offsets[:, :1])
            quadratic = tf.linalg.matrix_transpose(quadratic)
        elif covariances.shape.rank == 3:
            quadratic = share * tf.linalg.matrix_transpose(covariances)
        else:
            quadratic = math.sqrt(share) * covariances
        return PositiveMap(
            projection=scale * tf.linalg.matrix_transpose(frequencies.offsets),
            linear=linear,
            quadratic=quadratic,
            log_amplitudes=0.5
            * (frequencies.log_weights - math.log(self.sides))[:, tf.newaxis],
            two_sided=self.two_sided,
        )

    def bind_exact(self, frequencies, scale=1.0):
        """The closed form of what `bind` estimates, for Gaussian priors.

        Frequencies of fixed radius estimate it with a small bias.
        """
        factors = frequencies.covariances
        if factors.shape.rank == 3:
            factors = tf.sqrt(factors)
        return ExactKernel(self.bind(frequencies, scale), scale * factors)

    def get_config(self):
        return {
            **super().get_config(),
            "prefactor": self.prefactor,
            "two_sided": self.two_sided,
        }


@keras.saving.register_keras_serializable(package="keras_kt")
class TrigonometricFeatures(FeatureMap):
    """Random kitchen sinks (RKS): φ_ω(x) = (cos ω·x, sin ω·x).

    k(x, y) = E cos(ω·(x − y)) + s: shift-invariant, defined for every prior,
    heavy tails included, and bounded. The estimate may be negative, so weights
    need not be a convex combination; the smoothing s (an atom of the prior at
    ω = 0) keeps the normaliser away from zero and is learned per head.

    Args:
        smoothing: s at the start. Defaults to 0.1.
        trainable: whether s is trained. Defaults to `True`.

    References:
        arXiv 2110.08323, equation 6; Rahimi and Recht, NeurIPS 2007.

    Examples:

    >>> layer = keras_kt.KernelizedAttention(
    ...     2, 8, feature_map=keras_kt.TrigonometricFeatures(smoothing=0.5))
    >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
    TensorShape([1, 4, 3])
    """

    sides = 2

    def __init__(self, smoothing=0.1, *, trainable=True, **kwargs):
        super().__init__(trainable=trainable, **kwargs)
        self.smoothing = _checks.number("smoothing", smoothing, is_open=True)

    def build(self, num_heads):
        raw = self.smoothing + math.log(-math.expm1(-self.smoothing))
        self._raw_smoothing = self.add_weight(
            name="spectral_smoothing",
            shape=(int(num_heads), 1, 1),
            initializer=keras.initializers.Constant(raw),
            autocast=False,
        )
        self.built = True

    def feature_dim(self, num_features):
        # The constant feature of the smoothing.
        return num_features + 1

    @property
    def smoothing_weights(self) -> tf.Tensor:
        """s of each head, `(heads, 1, 1)`."""
        return tf.nn.softplus(tf.convert_to_tensor(self._raw_smoothing))

    def bind(self, frequencies, scale=1.0):
        projection = tf.linalg.matrix_transpose(frequencies.offsets)
        if frequencies.means is not None:
            means = tf.linalg.matrix_transpose(frequencies.means)
            projection += _per_frequency(means, projection)
        amplitudes = tf.exp(0.5 * frequencies.log_weights)[:, tf.newaxis]
        return TrigonometricMap(
            scale * projection,
            _per_frequency(amplitudes, projection[:, :1]),
            self.smoothing_weights,
        )

    def get_config(self):
        return {**super().get_config(), "smoothing": self.smoothing}


def get(identifier) -> FeatureMap:
    """Resolves a name or an instance to a `FeatureMap`."""
    if isinstance(identifier, FeatureMap):
        return identifier
    if isinstance(identifier, dict):
        return get(keras.saving.deserialize_keras_object(identifier))
    if isinstance(identifier, str) and identifier in _MAPS:
        return _MAPS[identifier]()
    raise ValueError(
        f"`feature_map` must be one of {sorted(_MAPS)} or an instance of "
        "keras_kt.FeatureMap. Received: "
        f"feature_map={identifier}"
    )


_MAPS = {
    "positive": PositiveFeatures,
    "prf": PositiveFeatures,
    "trigonometric": TrigonometricFeatures,
    "rks": TrigonometricFeatures,
}


def _per_frequency(components: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Repeats the last axis, components, to the frequencies of `like`."""
    count = components.shape[-1]
    if count == 1:
        return components
    return tf.repeat(components, like.shape[-1] // count, axis=-1)


def _describe(prior):
    describe = type(prior).__name__
    if hasattr(prior, "distribution_fn"):
        describe += f" of {prior.distribution().name}"
    return describe
