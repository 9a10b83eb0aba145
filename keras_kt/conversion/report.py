"""The report of a conversion: what became of each attention layer.

One entry a layer, by path, in the model's order; printed it is a table, and its
`converted` fits the `num_features` of another conversion.
"""

from typing import NamedTuple


class ConvertedLayer(NamedTuple):
    """What became of one attention layer.

    Attributes:
        path: names of the layers that lead to it, joined by "/".
        status: `"linear"`, `"quadratic"`, or `"kept"` (still softmax).
        num_features: D of the converted layer, or `None`.
        note: what differs from the original, or why it was kept.
    """

    path: str
    status: str
    num_features: int | None
    note: str


class ConversionReport(NamedTuple):
    """The attention layers of a model, and what became of each.

    Attributes:
        layers: tuple of `ConvertedLayer`, in the model's order.
    """

    layers: tuple

    @property
    def converted(self) -> dict:
        """D of the converted layers, by path; fits `num_features`."""
        return {
            layer.path: layer.num_features
            for layer in self.layers
            if layer.status != "kept"
        }

    @property
    def kept(self) -> dict:
        """Why each of the other layers was kept, by path."""
        return {
            layer.path: layer.note
            for layer in self.layers
            if layer.status == "kept"
        }

    def __str__(self):
        lines = [
            f"{path}: {status}"
            + (f", {count} features" if count else "")
            + (f" ({note})" if note else "")
            for path, status, count, note in self.layers
        ]
        return "\n".join(lines)
