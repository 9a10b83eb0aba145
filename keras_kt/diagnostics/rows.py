"""What rows of attention weights sum to, for signed features.

Positive features give convex combinations; signed ones need not, where their
normalizer is guarded. O(length), as the layer's own attention.
"""

from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kt.diagnostics.record import is_signed, layers_of, recorded

# A row of weights that sums to less than this was scaled by the guard.
_WHOLE = 0.99


class RowSums(NamedTuple):
    """What a layer's attention weights sum to, where that is not always one.

    Signed features can give a query a normalizer near zero or below it, which
    is then guarded: the row of weights is scaled, and sums to less than one.

    Attributes:
        guarded: `(heads,)`, the share of rows that sum to less than 0.99, among
            those that see a key.
        least: `(heads,)`, the least sum of a row.
    """

    guarded: np.ndarray
    least: np.ndarray


def row_sums(model: keras.Model, data: Any) -> dict:
    """Whether the weights of each query sum to one, for signed features.

    Layers with positive features are left out: theirs always do. Sums are the
    outputs of the recorded calls for values of one, so they have its masks,
    causality and route, at the cost of that attention once more: linear in
    length where the call is.

    Args:
        model: a model with `KernelizedAttention` layers.
        data: one batch of its inputs.

    Returns:
        Dictionary from paths to `RowSums`; empty, without a forward pass, for a
        model of positive features only.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> attention = keras_kt.KernelizedAttention(
        ...     2, 4, feature_map="trigonometric", name="attention")
        >>> model = keras.Model(x, attention(x, x))
        >>> batch = np.random.normal(size=(1, 50, 8))
        >>> keras_kt.diagnostics.row_sums(model, batch)["attention"].least.shape
        (2,)
    """
    if not any(is_signed(layer) for layer in layers_of(model).values()):
        return {}
    return {
        path: summarized(layer, record.sums)
        for path, layer, record in recorded(model, data, sums=True)
        if record.sums is not None
    }


def summarized(layer, sums):
    """`RowSums` of `(…, heads, 1)` sums."""
    sums = np.reshape(sums, (-1, layer.num_heads)).astype("float64")
    # A row that sees a key sums to exactly zero with probability zero.
    guarded, least = np.zeros(layer.num_heads), np.ones(layer.num_heads)
    for head, rows in enumerate(sums.T):
        rows = rows[rows != 0.0]
        if rows.size:
            # NaN is not above the limit either.
            guarded[head] = np.mean(~(rows >= _WHOLE))
            least[head] = rows.min()
    return RowSums(guarded, least)
