"""The one place where tests cut sequences into small blocks."""

from keras_kt.ops import blocks

CHUNK = 4


def cut_small(monkeypatch):
    """Several blocks of several chunks at the lengths of a test."""
    monkeypatch.setattr(blocks, "CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(blocks, "MAX_BLOCK", 2 * CHUNK)
