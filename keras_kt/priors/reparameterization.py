"""Samples of TFP distributions as functions of stored uniform numbers.

TFP's own samplers draw other numbers under XLA than eagerly for one seed, so a
seed does not pin a kernel. Here a law is taken apart (independent coordinates,
transformations, blocks) down to laws of single numbers, whose quantile
functions map uniform noise to samples, differentiably in the parameters. What
cannot be taken apart is refused. Imported when it is needed, as TFP takes
seconds to import.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf
import tensorflow_probability as tfp

tfd = tfp.distributions


class Sampler(NamedTuple):
    """How a distribution is sampled from uniform numbers.

    Attributes:
        size: how many numbers make one event.
        sample: function from `(…, *batch, size)` numbers in (0, 1) to events
            `(…, *batch, *event)`. Leading axes may stand for batch axes that
            the distribution would broadcast.
    """

    size: int
    sample: Callable[[tf.Tensor], tf.Tensor]


def sampler(distribution) -> Sampler:
    """The `Sampler` of a TFP distribution.

    Raises:
        NotImplementedError: if none is known, with the name of the law.
    """
    for kind, rule in _RULES:
        if isinstance(distribution, kind):
            return rule(distribution)
    if distribution.event_shape.rank == 0 and _has_quantile(distribution):
        return Sampler(1, lambda noise: distribution.quantile(noise[..., 0]))
    raise NotImplementedError(distribution.name)


def mixture(distribution):
    """A mixture's log-probabilities and components, or `None` and the law.

    Returns:
        `(heads, components)` or `None`, and a distribution whose last batch
        axis is that of the components.
    """
    if not isinstance(distribution, tfd.MixtureSameFamily):
        return None, distribution
    logits = distribution.mixture_distribution.logits_parameter()
    components = distribution.components_distribution
    heads, count = distribution.batch_shape[0], components.batch_shape[-1]
    log_probabilities = tf.nn.log_softmax(logits)
    return tf.broadcast_to(log_probabilities, (heads, count)), components


def moments(distribution):
    """Mean and variances, or a Cholesky factor for them; or `None`.

    Of laws whose moments are smooth in their parameters, with gradients that
    are finite for all of them.
    """
    if isinstance(distribution, tfd.Independent):
        inner = distribution.distribution
        if isinstance(inner, _SMOOTH):
            return inner.mean(), inner.variance()
    if isinstance(distribution, tfd.MultivariateNormalDiag):
        return distribution.mean(), distribution.variance()
    if isinstance(
        distribution, tfd.MultivariateNormalLinearOperator | _LOW_RANK
    ):
        covariance = distribution.covariance()
        return distribution.mean(), tf.linalg.cholesky(covariance)
    return None


def has_entire_mgf(distribution) -> bool:
    """Whether E exp(ω·z) is known to be finite for every z."""
    if isinstance(distribution, tfd.Independent | tfd.Sample):
        return has_entire_mgf(distribution.distribution)
    if isinstance(distribution, tfd.MixtureSameFamily):
        return has_entire_mgf(distribution.components_distribution)
    if isinstance(distribution, tfd.Blockwise):
        return all(map(has_entire_mgf, distribution.distributions))
    return isinstance(
        distribution,
        (
            tfd.Normal,
            tfd.MultivariateNormalLinearOperator,
            _LOW_RANK,
            tfd.TruncatedNormal,
            tfd.TruncatedCauchy,
            tfd.Uniform,
            tfd.Triangular,
            tfd.Beta,
            tfd.Kumaraswamy,
            tfd.Deterministic,
            tfd.VectorDeterministic,
            tfd.SphericalUniform,
            tfd.PowerSpherical,
        ),
    )


def _has_quantile(distribution):
    try:
        distribution.quantile(0.5)
    except NotImplementedError:
        return False
    return True


def _independent(law):
    inner = sampler(law.distribution)
    ndims = int(tf.get_static_value(law.reinterpreted_batch_ndims))
    shape = tuple(law.distribution.batch_shape)
    shape = shape[len(shape) - ndims :]

    def sample(noise):
        lead = noise.shape[:-1]
        return inner.sample(tf.reshape(noise, (*lead, *shape, inner.size)))

    return Sampler(math.prod(shape) * inner.size, sample)


def _sample(law):
    inner = sampler(law.distribution)
    shape = tuple(tf.get_static_value(law.sample_shape).ravel().tolist())
    copies = math.prod(shape)

    def sample(noise):
        lead = noise.shape[:-1]
        noise = tf.reshape(noise, (-1, copies, inner.size))
        # Copies in front, where broadcasting leaves the batch axes alone.
        noise = tf.transpose(noise, (1, 0, 2))
        events = inner.sample(tf.reshape(noise, (copies, *lead, inner.size)))
        rank = len(lead) + 1
        order = (*range(1, rank), 0, *range(rank, events.shape.rank))
        event = events.shape[rank:]
        return tf.reshape(tf.transpose(events, order), (*lead, *shape, *event))

    return Sampler(copies * inner.size, sample)


def _transformed(law):
    if isinstance(law.dtype, (dict, list, tuple)):
        raise NotImplementedError(law.name)
    inner, bijector = sampler(law.distribution), law.bijector
    return Sampler(
        inner.size, lambda noise: bijector.forward(inner.sample(noise))
    )


def _blockwise(law):
    if not isinstance(law.distributions, (list, tuple)):
        raise NotImplementedError(law.name)
    parts = [sampler(part) for part in law.distributions]

    def sample(noise):
        lead = noise.shape[:-1]
        pieces = tf.split(noise, [part.size for part in parts], axis=-1)
        events = [
            tf.reshape(part.sample(piece), (*lead, -1))
            for part, piece in zip(parts, pieces, strict=True)
        ]
        return tf.concat(events, axis=-1)

    return Sampler(sum(part.size for part in parts), sample)


def _deterministic(law):
    rank = law.event_shape.rank

    def sample(noise):
        zeros = tf.zeros(noise.shape[:-1])
        return law.loc + tf.reshape(zeros, (*zeros.shape, *[1] * rank))

    return Sampler(0, sample)


def _mixture(law):
    """A mixture of laws of single numbers, differentiated implicitly."""
    if law.event_shape.rank != 0:
        raise NotImplementedError(law.name)
    inner = sampler(law.components_distribution)
    probabilities = tf.exp(
        tf.nn.log_softmax(law.mixture_distribution.logits_parameter())
    )
    count = probabilities.shape[-1]
    shares = tf.cumsum(probabilities, axis=-1)[..., :-1]

    def sample(noise):
        chosen = tf.reduce_sum(
            tf.cast(noise[..., :1] > shares, tf.int32), axis=-1
        )
        of_each = inner.sample(noise[..., tf.newaxis, 1:])
        one_hot = tf.one_hot(chosen, count, on_value=True, off_value=False)
        x = tf.reduce_sum(tf.where(one_hot, of_each, 0.0), axis=-1)
        x = tf.stop_gradient(x)
        # d x = −dF(x) / p(x) at fixed F, for the parameters of F.
        level, density = law.cdf(x), tf.stop_gradient(law.prob(x))
        return x - (level - tf.stop_gradient(level)) / density

    return Sampler(1 + inner.size, sample)


def _student(law):
    size = law.event_shape[0]

    def sample(noise):
        ratio = tfd.Chi2(law.df).quantile(noise[..., 0]) / law.df
        normal = law.scale.matvec(tf.math.ndtri(noise[..., 1:]))
        return law.loc + normal * tf.math.rsqrt(ratio)[..., tf.newaxis]

    return Sampler(1 + size, sample)


def _directions(noise):
    return tf.math.l2_normalize(tf.math.ndtri(noise), axis=-1)


def _power_spherical(law):
    size = law.event_shape[0]

    def sample(noise):
        # Along the mean direction and across it, then a reflection that takes
        # the first axis there (De Cao and Aziz, arXiv 2006.04437).
        half = 0.5 * (size - 1.0)
        beta = tfd.Beta(half + law.concentration, half)
        along = 2.0 * beta.quantile(noise[..., 0]) - 1.0
        along = along[..., tf.newaxis]
        across = tf.sqrt(1.0 - tf.square(along)) * _directions(noise[..., 1:])
        point = tf.concat([along, across], axis=-1)
        axis = tf.one_hot(0, size) - law.mean_direction
        axis = tf.math.l2_normalize(axis, axis=-1)
        along = tf.reduce_sum(axis * point, axis=-1, keepdims=True)
        return point - 2.0 * along * axis

    return Sampler(size, sample)


def _normal_of_covariance(law):
    factor = tf.linalg.cholesky(law.covariance())

    def sample(noise):
        centered = tf.linalg.matvec(factor, tf.math.ndtri(noise))
        return centered if law.loc is None else law.loc + centered

    return Sampler(law.event_shape[0], sample)


def _generalized_normal(law):
    # TFP's quantile has NaN gradients: it takes powers of what it discards.
    def sample(noise):
        centered = 2.0 * noise[..., 0] - 1.0
        power = tf.math.reciprocal(law.power)
        size = tfp.math.igammainv(power, tf.abs(centered))
        return law.loc + tf.sign(centered) * law.scale * tf.pow(size, power)

    return Sampler(1, sample)


def _triangular(law):
    def sample(noise):
        u = noise[..., 0]
        width, rise = law.high - law.low, law.peak - law.low
        is_rising = u * width < rise
        # Selected first: the gradient of a root at zero is infinite.
        share = tf.where(is_rising, u * rise, (1.0 - u) * (width - rise))
        root = tf.sqrt(share * width)
        return tf.where(is_rising, law.low + root, law.high - root)

    return Sampler(1, sample)


def _pareto(law):
    return Sampler(
        1,
        lambda noise: (
            law.scale * tf.exp(-tf.math.log(noise[..., 0]) / law.concentration)
        ),
    )


_LOW_RANK = tfd.MultivariateNormalDiagPlusLowRankCovariance
# The first that fits is taken.
_RULES = (
    (tfd.Independent, _independent),
    (tfd.Sample, _sample),
    (tfd.Blockwise, _blockwise),
    (tfd.MixtureSameFamily, _mixture),
    (tfd.Deterministic, _deterministic),
    (tfd.VectorDeterministic, _deterministic),
    (tfd.MultivariateStudentTLinearOperator, _student),
    (
        tfd.SphericalUniform,
        lambda law: Sampler(law.event_shape[0], _directions),
    ),
    (tfd.PowerSpherical, _power_spherical),
    (_LOW_RANK, _normal_of_covariance),
    (tfd.GeneralizedNormal, _generalized_normal),
    (tfd.Triangular, _triangular),
    (tfd.Pareto, _pareto),
    (tfd.TransformedDistribution, _transformed),
)
_SMOOTH = (
    tfd.Normal,
    tfd.Laplace,
    tfd.Logistic,
    tfd.Uniform,
    tfd.Triangular,
    tfd.Beta,
)
