import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest
import tensorflow as tf

tf.config.set_visible_devices([], "GPU")


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(1234)
