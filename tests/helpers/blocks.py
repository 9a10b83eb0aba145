"""The one place where tests cut sequences into small blocks."""

from keras_kt.ops import blocks

CHUNK = 4


def cut_small(monkeypatch, *, band_entries=None):
    """Several blocks of several chunks at the lengths of a test.

    Args:
        monkeypatch: pytest's.
        band_entries: of the matrices of a window in a block: few of them, and
            sequences go one by one. Defaults to `None`, as outside of tests.
    """
    if band_entries is not None:
        monkeypatch.setattr(blocks, "CPU_BAND_ENTRIES", band_entries)
    monkeypatch.setattr(blocks, "CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(blocks, "MAX_BLOCK", 2 * CHUNK)
