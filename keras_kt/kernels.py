"""Closed-form kernels and exact quadratic attention, in float64 NumPy.

What random features estimate, written out: the characteristic function of the
prior for trigonometric features, its moment generating function for positive
ones. Slow and plain on purpose; it shares no computation with the feature maps
and attention algorithms that it judges.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# Prefactors whose quadratic part is −½xᵀΣx; the others have −xᵀΣx.
_HALF = ("softmax", "tilted")


def softmax_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    mask: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention of scaled queries and keys.

    Args:
        query: `(…, query_length, dim)`, already scaled: logits are q·k.
        key: `(…, key_length, dim)`.
        value: `(…, key_length, value_dim)`.
        mask: boolean, broadcast to `(…, query_length, key_length)`; True
            for keys that are seen.

    Returns:
        Outputs `(…, query_length, value_dim)` and weights
        `(…, query_length, key_length)`, float64.

    Examples:
        >>> _, weights = keras_kt.kernels.softmax_attention(
        ...     np.zeros((2, 4)), np.ones((5, 4)), np.ones((5, 3)))
        >>> weights[0].tolist()
        [0.2, 0.2, 0.2, 0.2, 0.2]
    """
    logits = np.asarray(query, "float64") @ np.swapaxes(key, -1, -2)
    logits -= logits.max(axis=-1, keepdims=True)
    return kernel_attention(np.exp(logits), value, mask)


def kernel_attention(
    kernel: ArrayLike, value: ArrayLike, mask: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Attention whose weights are a kernel matrix, normalized over keys.

    Args:
        kernel: `(…, query_length, key_length)`.
        value: `(…, key_length, value_dim)`.
        mask: as in `softmax_attention`.

    Returns:
        Outputs and weights; rows that see no key are zero.

    Examples:
        >>> _, weights = keras_kt.kernels.kernel_attention(
        ...     np.array([[1.0, 3.0]]), np.ones((2, 1)))
        >>> weights.tolist()
        [[0.25, 0.75]]
    """
    kernel = np.asarray(kernel, "float64")
    if mask is not None:
        kernel = np.where(mask, kernel, 0.0)
    total = kernel.sum(axis=-1, keepdims=True)
    weights = np.divide(
        kernel, total, out=np.zeros_like(kernel), where=total != 0.0
    )
    return weights @ np.asarray(value, "float64"), weights


def closed_form(
    prior: Any, feature_map: Any, x: ArrayLike, y: ArrayLike
) -> np.ndarray:
    """E[φ_ω(x)·φ_ω(y)] under the prior, for all pairs.

    Args:
        prior: a built prior. Gaussian families, FastFood (whose law is the
            uniform one over its rows) and `DistributionPrior` of independent
            normal, Laplace, Cauchy or uniform coordinates, or of a multivariate
            normal, have closed forms.
        feature_map: a built feature map.
        x: `(heads, n, head_dim)`, or `(n, head_dim)` for all heads alike.
        y: `(heads, m, head_dim)`, likewise.

    Returns:
        `(heads, n, m)` float64.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(
        ...     1, 4, spectral_prior=keras_kt.NormalPrior(radius="chi"))
        >>> _ = layer(np.ones((1, 3, 5)), np.ones((1, 3, 5)))
        >>> x = 0.5 * np.ones((1, 4))
        >>> kernel = keras_kt.kernels.closed_form(
        ...     layer.spectral_prior, layer.feature_map, x, x)
        >>> float(kernel[0, 0, 0].round(4)), round(float(np.exp(1.0)), 4)
        (2.7183, 2.7183)
    """
    x, y = (_each_head(points, prior.num_heads) for points in (x, y))
    return _kernel(_law_of(prior), feature_map, x, y)


def characteristic_function(prior: Any, z: ArrayLike) -> np.ndarray:
    """E cos ω·z under the prior: its kernel by the difference of two points.

    Args:
        prior: as in `closed_form`.
        z: `(heads, n, head_dim)`, or `(n, head_dim)` for all heads alike.

    Returns:
        `(heads, n)` float64.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(
        ...     1, 4, spectral_prior=keras_kt.NormalPrior(radius="chi"))
        >>> _ = layer(np.ones((1, 3, 5)), np.ones((1, 3, 5)))
        >>> values = keras_kt.kernels.characteristic_function(
        ...     layer.spectral_prior, 0.5 * np.ones((1, 4)))
        >>> float(values[0, 0].round(4)), round(float(np.exp(-0.5)), 4)
        (0.6065, 0.6065)
    """
    points = _each_head(z, prior.num_heads)
    return _law_of(prior).characteristic(points[:, :, None])[..., 0]


def from_frequencies(
    frequencies: Any, feature_map: Any, x: Any, y: Any
) -> np.ndarray:
    """The kernel of a finite set of equally likely frequencies.

    Args:
        frequencies: `(heads, num_frequencies, head_dim)`.
        feature_map, x, y: as in `closed_form`. Two-sided positive features and
            prefactors take the frequencies' own second moments, center zero.

    Returns:
        `(heads, n, m)` float64.

    Examples:
        >>> feature_map = keras_kt.TrigonometricFeatures(smoothing=0.5)
        >>> feature_map.build(1)
        >>> kernel = keras_kt.kernels.from_frequencies(
        ...     np.ones((1, 1, 2)), feature_map, *np.zeros((2, 1, 2)))
        >>> kernel.round(4).tolist()
        [[[1.5]]]
    """
    omega = np.asarray(frequencies, "float64")
    x, y = (_each_head(points, len(omega)) for points in (x, y))
    return _kernel(_Empirical(omega), feature_map, x, y)


def _kernel(law, feature_map, x, y):
    """E[φ_ω(x)·φ_ω(y)] under a law, `(heads, n, m)`."""
    if feature_map.is_shift_invariant:
        smoothing = np.asarray(feature_map.smoothing_weights, "float64")
        delta = x[:, :, None] - y[:, None]
        return law.characteristic(delta) + smoothing
    return law.positive(x, y, x[:, :, None] + y[:, None], feature_map)


class _Empirical:
    """The uniform law over some frequencies."""

    def __init__(self, frequencies):
        self.frequencies = frequencies  # (heads, frequencies, d)

    def characteristic(self, delta):
        return np.cos(self._products(delta)).mean(axis=-1)

    def positive(self, x, y, total, feature_map):
        terms = np.cosh if feature_map.two_sided else np.exp
        if feature_map.prefactor == "self":
            return _self_normalized(
                x, y, lambda z: terms(self._products(z)).mean(axis=-1)
            )
        second = np.square(self.frequencies).mean(axis=1)
        if feature_map.prefactor == "isotropic":
            second = np.ones_like(second)
        share = 0.5 if feature_map.prefactor in _HALF else 1.0
        h_x = -share * np.einsum("hnd,hd->hn", x**2, second)
        h_y = -share * np.einsum("hnd,hd->hn", y**2, second)
        return terms(self._products(total)).mean(axis=-1) * np.exp(
            h_x[..., :, None] + h_y[..., None, :]
        )

    def _products(self, points):
        return np.einsum("hnmd,hfd->hnmf", points, self.frequencies)


class _Gaussian:
    """A mixture of Gaussians, or of spheres under a linear map."""

    def __init__(self, means, factors, probabilities, fixed_radius):
        self.means = np.asarray(means, "float64")  # (heads, c, d)
        self.factors = np.asarray(factors, "float64")  # (heads, c, d, d)
        self.probabilities = np.asarray(probabilities, "float64")  # (heads, c)
        self.fixed_radius = fixed_radius

    def characteristic(self, delta):
        squares = self._squares(delta)
        phases = np.einsum("hnmd,hcd->hcnm", delta, self.means)
        radial = self._radial(-squares)
        return np.einsum(
            "hc,hcnm->hnm", self.probabilities, np.cos(phases) * radial
        )

    def positive(self, x, y, total, feature_map):
        prefactor = feature_map.prefactor
        if prefactor == "self":
            return _self_normalized(x, y, self._moment)
        terms = self._radial(self._squares(total))
        if prefactor != "softmax":
            terms *= np.exp(np.einsum("hnmd,hcd->hcnm", total, self.means))
        norms = []
        for points in (x, y):
            if prefactor == "isotropic":
                norm = np.sum(points**2, axis=-1)[:, None]
            else:
                mapped = np.einsum("hnd,hcde->hcne", points, self.factors)
                norm = np.sum(mapped**2, axis=-1)
            norms.append((0.5 if prefactor in _HALF else 1.0) * norm)
        terms *= np.exp(-norms[0][..., :, None] - norms[1][..., None, :])
        return np.einsum("hc,hcnm->hnm", self.probabilities, terms)

    def _moment(self, points):
        """E exp(ω·z), `(heads, n, m)`."""
        terms = self._radial(self._squares(points))
        terms *= np.exp(np.einsum("hnmd,hcd->hcnm", points, self.means))
        return np.einsum("hc,hcnm->hnm", self.probabilities, terms)

    def _squares(self, points):
        mapped = np.einsum("hnmd,hcde->hcnme", points, self.factors)
        return np.sum(mapped**2, axis=-1)

    def _radial(self, squares):
        if not self.fixed_radius:
            return np.exp(0.5 * squares)
        return sphere_moment(squares, self.means.shape[-1])


class _Independent:
    """Independent coordinates with given transforms and moments."""

    def __init__(self, location, characteristic, moment, variance):
        self.location = np.asarray(location, "float64")
        self._characteristic, self._moment = characteristic, moment
        self._variance = variance

    def characteristic(self, delta):
        phases = np.einsum("hnmd,hd->hnm", delta, self.location)
        return np.cos(phases) * np.prod(self._characteristic(delta), axis=-1)

    def positive(self, x, y, total, feature_map):
        prefactor = feature_map.prefactor
        if self._moment is None:
            raise ValueError("This law has no moment generating function.")
        if prefactor == "self":
            return _self_normalized(x, y, self._moment_at)
        terms = np.prod(self._moment(total), axis=-1)
        variance = self._variance
        if prefactor == "isotropic":
            variance = np.ones_like(self.location)
        if prefactor != "softmax":
            terms *= np.exp(np.einsum("hnmd,hd->hnm", total, self.location))
        share = 0.5 if prefactor in _HALF else 1.0
        h_x = share * np.einsum("hnd,hd->hn", x**2, variance)
        h_y = share * np.einsum("hnd,hd->hn", y**2, variance)
        return terms * np.exp(-h_x[..., :, None] - h_y[..., None, :])

    def _moment_at(self, points):
        shift = np.einsum("hnmd,hd->hnm", points, self.location)
        return np.prod(self._moment(points), axis=-1) * np.exp(shift)


def _self_normalized(x, y, moment):
    """E exp(ω·(x + y)) over E exp(ω·x) and E exp(ω·y), `(heads, n, m)`."""
    x, y = x[:, :, None], y[:, None]
    return moment(x + y) / (moment(x) * moment(y))


def sphere_moment(squares: ArrayLike, dim: int) -> np.ndarray:
    """E exp(√dim u·z) for u uniform on the unit sphere, by |z|².

    The confluent series ₀F₁(; dim/2; dim |z|²/4); a negative argument gives
    E cos(√dim u·z) of −|z|². It is what rows of fixed radius estimate.

    Args:
        squares: |z|², an array of any shape; negative for the cosine.
        dim: size of z.

    Returns:
        The moments, in the shape of `squares`.

    Examples:
        >>> float(keras_kt.kernels.sphere_moment(0.0, 8))
        1.0
    """
    argument = np.asarray(squares, "float64") * dim / 4.0
    term = np.ones_like(argument)
    total = term.copy()
    for index in range(1, 1000):
        term = term * argument / (index * (dim / 2.0 + index - 1.0))
        total += term
        if np.all(np.abs(term) <= 1e-17 * np.abs(total)):
            break
    return total


def _each_head(points, heads):
    """`(heads, n, head_dim)` float64, from that or `(n, head_dim)`."""
    points = np.asarray(points, "float64")
    if points.ndim == 2:
        points = np.broadcast_to(points, (heads, *points.shape))
    return points


def _law_of(prior):
    """The law of a prior, from its parameters or its distribution."""
    if prior.is_gaussian:
        return _gaussian(prior)
    if prior.has_known_law:
        return _from_tfp(prior.distribution())
    raise ValueError(
        f"{type(prior).__name__} has no closed-form kernel. Use "
        "`from_frequencies` with samples of `prior.distribution()`."
    )


def _gaussian(prior):
    factors = prior.scale.numpy()
    if factors.ndim == 3:
        factors = factors[..., None] * np.eye(factors.shape[-1])
    return _Gaussian(
        prior.mean.numpy(),
        factors,
        np.exp(prior.log_probabilities.numpy().astype("float64")),
        prior.radius == "fixed",
    )


def _from_tfp(law):
    from tensorflow_probability import distributions as tfd

    if isinstance(law, tfd.Independent):
        base = law.distribution
        if isinstance(base, tfd.Normal):
            factors = base.stddev().numpy()[:, None, :, None]
            factors = factors * np.eye(factors.shape[2])
            ones = np.ones((len(factors), 1))
            return _Gaussian(base.mean().numpy()[:, None], factors, ones, False)
        if isinstance(base, tfd.Laplace):
            b = np.asarray(base.scale, "float64")[:, None, None]
            return _Independent(
                base.loc,
                lambda delta: 1.0 / (1.0 + (b * delta) ** 2),
                lambda z: 1.0 / (1.0 - (b * z) ** 2),
                2.0 * b[:, 0, 0] ** 2,
            )
        if isinstance(base, tfd.Cauchy):
            g = np.asarray(base.scale, "float64")[:, None, None]
            return _Independent(
                base.loc, lambda delta: np.exp(-g * np.abs(delta)), None, None
            )
        if isinstance(base, tfd.Uniform):
            low = np.asarray(base.low, "float64")
            high = np.asarray(base.high, "float64")
            a = ((high - low) / 2.0)[:, None, None]
            return _Independent(
                (low + high) / 2.0,
                lambda delta: np.sinc(a * delta / math.pi),
                lambda z: np.sinh(a * z) / (a * z),
                (high - low) ** 2 / 12.0,
            )
    if isinstance(law, tfd.Empirical):
        return _Empirical(np.asarray(law.samples, "float64"))
    if isinstance(law, tfd.MultivariateNormalLinearOperator):
        factors = np.linalg.cholesky(law.covariance().numpy())[:, None]
        ones = np.ones((len(factors), 1))
        return _Gaussian(law.mean().numpy()[:, None], factors, ones, False)
    raise ValueError(
        f"No closed form is known here for {law.name}. Use `from_frequencies` "
        "with samples of `prior.distribution()`."
    )
