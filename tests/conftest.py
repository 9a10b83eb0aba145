import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Test processes share the cores already; more threads wait for each other.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import keras
import pytest
import tensorflow as tf
from keras.src.utils import file_utils

from keras_kt.layers import route
from tests.helpers import blocks, runtimes

tf.config.set_visible_devices([], "GPU")


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(1234)


@pytest.fixture(autouse=True)
def _no_downloads(monkeypatch):
    """By Keras, but of files of this machine."""
    retrieve = file_utils.urlretrieve

    def only_files(url, *args):
        if not url.startswith("file:"):
            raise OSError(f"tests download nothing: {url}")
        return retrieve(url, *args)

    monkeypatch.setattr(file_utils, "urlretrieve", only_files)


@pytest.fixture(autouse=True)
def _closed_figures():
    """A figure is the caller's to close; twenty open ones are a warning."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(autouse=True)
def _linear_at_any_length(monkeypatch):
    """Tests are short; what "auto" does with short inputs has its own test."""
    monkeypatch.setattr(route, "SHORT_LENGTH", 0)
    monkeypatch.setattr(route, "SHORT_CAUSAL_LENGTH", 0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of several chunks at the lengths of a test."""
    blocks.cut_small(monkeypatch)


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """The C program that runs SavedModels: a function of its script."""
    return runtimes.c_program(tmp_path_factory.mktemp("host"))
