"""Attention with random features in float64 NumPy, from raw weights to output.

The oracle of the equivalence tests. It shares no code with the package, has no
stabilisation, and is analytic, so that a complex step differentiates it to
machine precision.
"""

import statistics

import numpy as np

STEP = 1e-30


def softplus(x):
    return np.log1p(np.exp(x))


def normal_quantile(levels):
    """Inverse of the normal distribution function."""
    inverse = statistics.NormalDist().inv_cdf
    return np.vectorize(inverse, otypes=["float64"])(levels)


def matrix(scale):
    """Diagonal standard deviations, or a factor, to factors."""
    return scale[..., None] * np.eye(scale.shape[-1])


def gaussian_frequencies(weights, noise, components):
    """Offsets, means, probabilities and factors of a Gaussian prior."""
    heads, count, dim = noise.shape
    scale = softplus(weights["scale"]) + np.zeros((heads, components, dim))
    factors = matrix(scale)
    if "scale_lower" in weights:
        factors = factors + np.tril(weights["scale_lower"], -1)
    noise = noise.reshape(heads, components, count // components, dim)
    offsets = np.einsum("hcmd,hced->hcme", noise, factors)
    probabilities = np.ones((heads, components), noise.dtype) / components
    if "logits" in weights:
        probabilities = np.exp(weights["logits"])
        probabilities = probabilities / probabilities.sum(-1, keepdims=True)
    means = weights.get("mean", np.zeros((heads, components, dim)))
    return offsets, means, probabilities, factors


def atoms(omega):
    """Frequencies that are their own law."""
    heads = len(omega)
    second = (omega**2).mean(axis=1)
    return (
        omega[:, None],
        np.zeros((heads, 1, omega.shape[-1])),
        np.ones((heads, 1)),
        matrix(np.sqrt(second))[:, None],
    )


def hadamard(size):
    rows = np.arange(size)
    parity = np.array([[bin(i & j).count("1") % 2 for j in rows] for i in rows])
    return 1.0 - 2.0 * parity


def fastfood_frequencies(weights, permutation, count, dim):
    """Rows of S H G Π H B / (√n ‖G‖), one transform after the other."""
    s, g, b = weights["s"], weights["g"], weights["b"]
    heads, blocks, size = g.shape
    transform = hadamard(size)
    rows = []
    for head in range(heads):
        for block in range(blocks):
            v = np.eye(size)
            v = np.diag(b[head, block]) @ v
            v = transform @ v
            v = v[permutation[head, block]]
            v = np.diag(g[head, block]) @ v
            v = transform @ v
            norm = np.sqrt((g[head, block] ** 2).sum())
            v = np.diag(s[head, block] / norm) @ v / np.sqrt(size)
            rows.append(v)
    omega = np.stack(rows).reshape(heads, blocks * size, size)
    return atoms(omega[:, :count, :dim])


def generator_frequencies(weights, noise, activation):
    hidden, index = noise, 0
    while f"weight_{index}" in weights:
        kernel = weights[f"weight_{index}"]
        hidden = np.einsum("hmi,hio->hmo", hidden, kernel)
        hidden = hidden + weights[f"bias_{index}"][:, None]
        index += 1
        if f"weight_{index}" in weights:
            if activation == "tanh":
                hidden = np.tanh(hidden)
            else:
                hidden = np.where(hidden.real < 0, 0.01 * hidden, hidden)
        power = (hidden**2).mean(-1, keepdims=True)
        hidden = hidden / np.sqrt(power + 1e-6)
    return atoms(weights["scale"][:, None] * np.tanh(hidden))


def features(x, frequencies, kind):
    """φ(x) of `(batch, heads, length, dim)`; `kind` describes the map."""
    offsets, means, probabilities, factors = frequencies
    count = offsets.shape[2]
    heads = offsets.shape[0]
    omega = offsets + means[:, :, None]
    weight = np.sqrt(probabilities / count)
    if kind["map"] == "trigonometric":
        angles = np.einsum("bhtd,hcmd->bhtcm", x, omega)
        weight = weight[None, :, None, :, None]
        parts = [weight * np.cos(angles), weight * np.sin(angles)]
        flat = [part.reshape(*part.shape[:3], -1) for part in parts]
        constant = np.sqrt(kind["smoothing"]).reshape(1, heads, 1, 1)
        flat.append(np.ones_like(flat[0][..., :1]) * constant)
        return np.concatenate(flat, -1)
    mapped = np.einsum("bhtd,hcde->bhtce", x, factors)
    square = (mapped**2).sum(-1)
    linear = np.einsum("bhtd,hcd->bhtc", x, means)
    if kind["prefactor"] == "softmax":
        log_h = -0.5 * square - linear
    elif kind["prefactor"] == "tilted":
        log_h = -0.5 * square
    elif kind["prefactor"] == "gaussian":
        log_h = -square
    elif kind["prefactor"] == "self":
        log_h = 0.0 * square
    else:
        log_h = -((x**2).sum(-1))[..., None] + 0.0 * square
    signs = (1.0, -1.0) if kind["two_sided"] else (1.0,)
    parts = []
    for sign in signs:
        mirrored = means[:, :, None] + sign * offsets
        exponent = np.einsum("bhtd,hcmd->bhtcm", x, mirrored)
        exponent = exponent + log_h[..., None]
        part = np.exp(exponent) * weight[None, :, None, :, None]
        parts.append(part / np.sqrt(len(signs)))
    phi = np.concatenate([p.reshape(*p.shape[:3], -1) for p in parts], -1)
    if kind["prefactor"] == "self":
        each = np.repeat(weight, count, axis=1).reshape(1, heads, 1, -1)
        each = np.concatenate([each] * len(signs), -1) / np.sqrt(len(signs))
        phi = phi / (phi * each).sum(-1, keepdims=True)
    return phi


def attention(query, key, value, visible, limit=0.0):
    """Kernel attention of features; `visible` is `(batch, 1, t, s)`.

    Normalizers below `limit` times the number of keys are kept there.
    """
    kernel = np.einsum("bhtf,bhsf->bhts", query, key)
    return attention_of(kernel, value, visible, limit)


def attention_of(kernel, value, visible, limit=0.0):
    """`attention` of a kernel matrix; `visible` may hold shares of keys."""
    kernel = kernel * visible
    total = kernel.sum(-1, keepdims=True)
    least = limit * visible.sum(-1, keepdims=True)
    guarded = np.where(total.real < 0, -least, least)
    total = np.where(np.abs(total.real) < least, guarded, total)
    sees = visible.any(-1, keepdims=True)
    weights = kernel / np.where(sees, total, 1.0)
    return np.einsum("bhts,bhse->bhte", weights, value), weights


def gaussian_kernel(x, y, frequencies, prefactor):
    """E φ(x)·φ(y) of positive features of a Gaussian mixture."""
    _, means, probabilities, factors = frequencies
    if prefactor == "self":
        masses = []
        for points in (x, y):
            z = np.einsum("bhtd,hcde->bhtce", points, factors)
            exponent = 0.5 * (z**2).sum(-1)
            exponent = exponent + np.einsum("bhtd,hcd->bhtc", points, means)
            exponent = np.exp(exponent) * probabilities[:, None]
            masses.append(exponent.sum(-1))
        plain = gaussian_kernel(x, y, frequencies, "none")
        return plain / masses[0][..., :, None] / masses[1][..., None, :]
    total = 0.0
    for c in range(probabilities.shape[1]):
        logs = []
        for points in (x, y):
            mapped = np.einsum("bhtd,hde->bhte", points, factors[:, c])
            linear = np.einsum("bhtd,hd->bht", points, means[:, c])
            square = {
                "softmax": 0.5 * (mapped**2).sum(-1) + linear,
                "gaussian": (mapped**2).sum(-1),
                "isotropic": (points**2).sum(-1),
                "none": 0.0,
            }
            logs.append((mapped, linear - square[prefactor]))
        (u, log_x), (v, log_y) = logs
        both = u[..., :, None, :] + v[..., None, :, :]
        exponent = 0.5 * (both**2).sum(-1)
        exponent = exponent + log_x[..., :, None] + log_y[..., None, :]
        total = total + probabilities[:, c, None, None] * np.exp(exponent)
    return total


def fading(decay, keep):
    """exp(−Σ λ_u) over the tokens between, `(batch, heads, t, s)`.

    `decay` is `(batch, heads, length)` and `keep` `(batch, length)`. Sums are
    made pair by pair.
    """
    length = decay.shape[-1]
    decay = decay * keep[:, None]
    pairs = np.zeros((*decay.shape, length), decay.dtype)
    for t in range(length):
        for s in range(length):
            between = slice(min(s, t) + 1, max(s, t) + 1)
            pairs[..., t, s] = decay[..., between].sum(-1)
    return np.exp(-pairs)


def distances(keep, queries=None):
    """Visible keys between, `(batch, 1, t, s)`, counted pair by pair.

    After s up to t, or after t up to s; `keep` is `(batch, keys)`.
    """
    batch, keys = keep.shape
    counts = np.zeros((batch, 1, queries or keys, keys), int)
    for t in range(counts.shape[2]):
        for s in range(keys):
            between = slice(min(s, t) + 1, max(s, t) + 1)
            counts[:, 0, t, s] = (keep[:, between] != 0).sum(-1)
    return counts


def log_attention(log_query, log_key, value, visible):
    """`attention` of log-features of any range, pair by pair."""
    pairs = log_query[..., :, None, :] + log_key[..., None, :, :]
    top = pairs.max(-1)
    logits = top + np.log(np.exp(pairs - top[..., None]).sum(-1))
    logits = np.where(visible, logits, -np.inf)
    best = logits.max(-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(best), best, 0.0))
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1.0)
    return weights @ value


def complex_step(function, array, axes):
    """Gradient of a sum of independent losses by the complex step.

    Args:
        function: from a complex array of `array`'s shape to losses whose shape
            is `array.shape` without the last `axes` axes, or broadcasts to it.
        array: real float64 array.
        axes: how many trailing axes one loss depends on.
    """
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape[array.ndim - axes :]):
        moved = array.astype("complex128")
        moved[(..., *index)] += 1j * STEP
        gradient[(..., *index)] = function(moved).imag / STEP
    return gradient
