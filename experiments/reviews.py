"""IMDb's reviews, from the archive that is offered, unpacked, or one file.

https://ai.stanford.edu/~amaas/data/sentiment/ has aclImdb_v1.tar.gz, which
unpacks to aclImdb/; where a folder has neither, Keras downloads it to its own.
"""

import sys
import zipfile

import numpy as np

from examples.common import download_reviews

SPLITS = ("train", "test")


def labelled(data_dir):
    """Returns `(texts, labels)` for training and for the test, shuffled."""
    if (data_dir / "aclImdb").is_dir():
        splits = [_read_folder(data_dir / "aclImdb" / s) for s in SPLITS]
    elif (data_dir / "imdb_labelled.npz").exists():
        splits = _read_packed(data_dir / "imdb_labelled.npz")
    else:
        folder = download_reviews(data_dir.resolve())
        splits = [_read_folder(folder / s) for s in SPLITS]
    shuffled = []
    for texts, labels in splits:
        # The same order for every seed of the training.
        order = np.random.default_rng(0).permutation(len(texts))
        texts = [texts[i] for i in order]
        shuffled.append((texts, np.asarray(labels, "int32")[order]))
    return shuffled


def _read_folder(folder):
    texts, labels = [], []
    for label, name in enumerate(("neg", "pos")):
        paths = sorted((folder / name).glob("*.txt"))
        if not paths:
            sys.exit(
                f"{folder / name} must hold reviews, one .txt file each, and "
                "holds none. Unpack aclImdb_v1.tar.gz again."
            )
        texts += [path.read_bytes() for path in paths]
        labels += [label] * len(paths)
    return texts, labels


def _read_packed(path):
    """The same reviews in one file of bytes and offsets."""
    try:
        with np.load(path) as packed:
            data, offsets = packed["data"].tobytes(), packed["offsets"]
            is_test, labels = packed["is_test"].astype(bool), packed["label"]
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as e:
        sys.exit(
            f"{path} must hold the arrays data, offsets, is_test and label. "
            f"Reading it failed: {e!r}. Copy it again, or use aclImdb/."
        )
    splits = []
    for chosen in (~is_test, is_test):
        index = np.flatnonzero(chosen)
        texts = [data[offsets[i] : offsets[i + 1]] for i in index]
        splits.append((texts, labels[index]))
    return splits


def unlabelled(folder):
    """The unlabelled reviews, a list of bytes."""
    unpacked, packed = folder / "aclImdb", folder / "imdb_unlabelled.npz"
    if packed.exists() and not unpacked.is_dir():
        with np.load(packed) as arrays:
            data, offsets = arrays["data"].tobytes(), arrays["offsets"]
        pairs = zip(offsets[:-1], offsets[1:], strict=True)
        return [data[start:end] for start, end in pairs]
    if not unpacked.is_dir():
        unpacked = download_reviews(folder.resolve())
    paths = sorted((unpacked / "train" / "unsup").glob("*.txt"))
    return [path.read_bytes() for path in paths]
