"""Small things that many tests need: arrays, errors, masks, a bare map."""

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import cases


def array(shape, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=shape)).astype("float32")


def wrong(match, call):
    with pytest.raises(ValueError, match=match):
        call()


class Identity:
    """Log-features handed in as they are, to set their range by hand."""

    positive = True
    width = 17

    def queries(self, x):
        return x

    keys = queries


def visible(length, keys, mask, causal):
    seen = np.ones((cases.BATCH, 1, length, keys), "bool")
    if mask is not None:
        seen = seen & mask[:, None, None]
    return np.tril(seen) if causal else seen


def tokens_first(*arrays):
    """The core's `(batch, length, heads, dim)` from heads first, and back."""
    return [tf.transpose(x, (0, 2, 1, 3)) for x in arrays]
