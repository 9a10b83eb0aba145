"""A change of coordinates of queries and keys that leaves softmax as it is.

For each head q' = T (q − a) and k' = T⁻ᵀ (k − b), while a·k is kept as the
prior's mean μ = T a. It is judged by the measured errors of the layer that
would have it, and folded into the projections, so that the layer is as fast as
before.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_kt.conversion.estimate import estimate, squared_errors


class Change(NamedTuple):
    """New coordinates of a layer's queries and keys, for each head.

    Attributes:
        shift_q, shift_k: `(heads, key_dim)`, a and b.
        maps: `(heads, key_dim, key_dim)`, T.
    """

    shift_q: np.ndarray
    shift_k: np.ndarray
    maps: np.ndarray


def unchanged(layer):
    """The change that is none."""
    shape = layer.num_heads, layer.key_dim
    maps = np.broadcast_to(np.eye(layer.key_dim), (*shape, layer.key_dim))
    return Change(np.zeros(shape), np.zeros(shape), maps)


def can_shift(layer):
    """Whether queries and keys can be shifted without a change of weights."""
    keys = layer.key_dense.bias is not None
    prior = layer.spectral_prior
    is_tilted = layer.feature_map.is_tilted(prior) and prior.per_head
    return keys and is_tilted, keys


def best_of(item, candidates):
    """The change with the least measured error, for each head."""
    errors = np.stack([_errors(item, x) for x in candidates])
    # Else a candidate that is not finite would be the least.
    winners = np.where(np.isfinite(errors), errors, np.inf).argmin(axis=0)
    heads = np.arange(len(winners))
    return Change(
        *(
            np.stack(parts)[winners, heads]
            for parts in zip(*candidates, strict=True)
        )
    )


def _errors(item, change):
    """Each head's squared relative errors, of its matrix plus its output."""
    sums = sum(
        squares_after(item.layer, change, heads).numpy()
        for heads in item.examples()
    )
    return np.sum(sums[:2] / np.maximum(sums[2:], 1e-30), axis=0)


def squares_after(layer, change, heads):
    """`squared_errors` of a layer that had a change, `(4, heads)`."""
    change = _single(change)
    inverse = tf.linalg.matrix_transpose(tf.linalg.inv(change.maps))
    query, key = heads.query - change.shift_q, heads.key - change.shift_k
    found = estimate(
        layer,
        tf.einsum("bthd,hed->bthe", query, change.maps),
        tf.einsum("bthd,hed->bthe", key, inverse),
        heads.value,
        heads.visible,
        _ShiftedPrior(layer, change),
    )
    return squared_errors(*found, heads)


def _single(change):
    return Change(*(tf.cast(x, tf.float32) for x in change))


class _ShiftedPrior:
    """A layer's prior with the mean that a change of the layer needs."""

    is_gaussian = True

    def __init__(self, layer, change):
        self.layer, self.change = layer, change

    def stored_frequencies(self):
        frequencies = self.layer.spectral_prior.stored_frequencies()
        if not can_shift(self.layer)[0]:
            return frequencies
        mean = _new_mean(self.layer, self.change)
        return frequencies._replace(means=mean[:, tf.newaxis])


def _new_mean(layer, change):
    """`(heads, key_dim)`, the prior's mean in the new coordinates."""
    shift, _ = layer.scaled(*2 * [change.shift_q[tf.newaxis, tf.newaxis]])
    shifted = layer.spectral_prior.mean[:, 0] + shift[0, 0]
    return tf.einsum("hd,hed->he", shifted, change.maps)


def fold(item, change):
    """Writes a change into the projections and the prior's mean.

    Returns:
        What the layer attends to then.
    """
    layer = item.layer
    # k·q is unchanged by T on queries and its inverse transpose on keys.
    inverse = np.swapaxes(np.linalg.inv(change.maps), -1, -2)
    if can_shift(layer)[0]:
        mean = _new_mean(layer, _single(change))
        layer.spectral_prior.assign_mean(mean[:, tf.newaxis])
    for dense, shift, maps in (
        (layer.query_dense, change.shift_q, change.maps),
        (layer.key_dense, change.shift_k, inverse),
    ):
        kernel = np.asarray(dense.kernel, "float64")
        dense.kernel.assign(np.einsum("xhd,hed->xhe", kernel, maps))
        if dense.bias is not None:
            bias = np.asarray(dense.bias, "float64") - shift
            dense.bias.assign(np.einsum("hd,hed->he", bias, maps))
    return item._replace(
        batches=tuple(
            heads._replace(
                query=_moved(heads.query, change.shift_q, change.maps),
                key=_moved(heads.key, change.shift_k, inverse),
            )
            for heads in item.batches
        )
    )


def _moved(x, shift, maps):
    return np.einsum("bthd,hed->bthe", x - shift, maps).astype("float32")
