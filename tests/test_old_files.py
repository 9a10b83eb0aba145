"""Files that version 0.1 saved load, and give what they gave.

Models of one `KernelizedAttention` each, made by commit 8583c78.
"""

from pathlib import Path

import keras
import numpy as np
import pytest

import keras_kt  # noqa: F401, which registers what the files name

FOLDER = Path(__file__).parent / "fixtures" / "v01"


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("*.keras")), ids=lambda p: p.stem
)
def test_files_of_version_0_1_give_the_same(path):
    arrays = np.load(FOLDER / "outputs.npz")
    x, expected = (arrays[f"{path.stem}/{name}"] for name in ("x", "output"))
    output = keras.saving.load_model(path)(x)
    limit = 2e-6 * np.abs(expected).max()
    np.testing.assert_allclose(output, expected, rtol=0, atol=limit)
