"""Coordinates of least variance, by theory.

Means a and b, and T such that q' and k' have the same second moments, which are
diagonal and of the least possible trace: the matrix form of the balancing in
SADERF, arXiv 2302.00787.
"""

import numpy as np

from keras_kt.conversion.change import (
    Change,
    best_of,
    can_shift,
    fold,
    unchanged,
)

# Second moments are regularised by this share of their mean eigenvalue.
_SHRINKAGE = 1e-4


def balanced(item):
    """Gives one layer coordinates of little variance.

    The best of three, by the measured errors of each head: those it has, and
    those of the theory, with tokens weighed alike or by their squared attention
    weights, which is how the error of the matrix weighs them.
    """
    candidates = [unchanged(item.layer)]
    for weights in (None, _squared_weights(item)):
        candidates.append(least_variance(item, weights))
    return fold(item, best_of(item, candidates))


def _squared_weights(item):
    """Squared attention weights of each visible query and of each key."""
    sums = []
    for axis in (-1, -2):
        rows = []
        for heads in item.batches:
            # Heads may share a mask.
            total = np.sum(np.square(heads.weights, dtype="float64"), axis=axis)
            taken = np.any(heads.visible, axis=(1, axis))
            rows.append(np.swapaxes(total, 1, 2)[taken])
        sums.append(np.swapaxes(np.concatenate(rows), 0, 1))
    return sums


def least_variance(item, weights):
    """Means a, b and the map T of least variance, of weighed tokens."""
    layer = item.layer
    tokens = item.visible_tokens()
    if weights is None:
        weights = [np.ones(x.shape[:2]) for x in tokens]
    weights = [w / np.sum(w, axis=1, keepdims=True) for w in weights]
    change = unchanged(layer)
    shifts = [
        np.einsum("ht,htd->hd", w, x) if possible else zero
        for w, x, possible, zero in zip(
            weights, tokens, can_shift(layer), change, strict=False
        )
    ]
    moments = [
        np.einsum("ht,htd,hte->hde", w, x - shift, x - shift)
        for w, x, shift in zip(
            weights, tokens, (s[:, np.newaxis] for s in shifts), strict=True
        )
    ]
    maps = [_balancing(q, k) for q, k in zip(*moments, strict=True)]
    return Change(*shifts, np.stack(maps))


def _balancing(*moments):
    """T that gives T q and T⁻ᵀ k the same diagonal second moments.

    Of all T it has the least E|T q|² + E|T⁻ᵀ k|²: TᵀT is the geometric mean of
    the inverse moments of q and the moments of k.
    """
    moments = [
        m + (_SHRINKAGE * np.trace(m) / len(m) + 1e-12) * np.eye(len(m))
        for m in moments
    ]
    root, inverse_root = _power(moments[0], 0.5), _power(moments[0], -0.5)
    middle = _power(root @ moments[1] @ root, 0.5)
    balance = _power(inverse_root @ middle @ inverse_root, 0.5)
    _, basis = np.linalg.eigh(balance @ moments[0] @ balance)
    return basis.T @ balance


def _power(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 1e-30) ** exponent) @ vectors.T
