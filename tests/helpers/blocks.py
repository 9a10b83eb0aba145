"""The one place where tests cut sequences into small blocks."""

from keras_kt.ops import block_grid

CHUNK = 4


def cut_small(monkeypatch):
    """Several blocks of several chunks at the lengths of a test."""
    monkeypatch.setattr(block_grid, "CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(block_grid, "MAX_BLOCK", 2 * CHUNK)
