"""Batches of a model's inputs, from what a user gives as `data`.

One batch of arrays, an iterator, a `tf.data.Dataset` or a `PyDataset`, with or
without labels, is a list of batches of inputs here, checked to be finite.
"""

import keras
import numpy as np
import tensorflow as tf


def input_batches(data, count):
    """Up to `count` batches of inputs."""
    return [inputs for inputs, _ in weighted_batches(data, count)]


def weighted_batches(data, count):
    """Up to `count` batches of inputs with their sample weights, or `None`."""
    is_dataset = isinstance(data, (tf.data.Dataset, keras.utils.PyDataset))
    if is_dataset or hasattr(data, "__next__"):
        batches = []
        for batch in data:
            if len(batches) == count:
                break
            weights = None
            if isinstance(batch, tuple):
                unpacked = keras.utils.unpack_x_y_sample_weight(batch)
                batch, _, weights = unpacked
            batches.append((batch, weights))
    else:
        batches = [(data, None)]
    leaves = [
        np.asarray(x) for batch, _ in batches for x in keras.tree.flatten(batch)
    ]
    if not leaves or any(x.size == 0 for x in leaves):
        raise ValueError(
            "`data` must hold at least one batch that is not empty. Received: "
            f"{len(batches)} batches, of shapes {[x.shape for x in leaves]}."
        )
    for x in leaves:
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            raise ValueError(
                "`data` must be finite. Received: an array of shape "
                f"{x.shape} with NaN or infinite values."
            )
    return batches


def repeated_batches(data, steps):
    """`steps` batches of inputs, from the start again when data end."""
    for inputs, _ in repeated_weighted_batches(data, steps):
        yield inputs


def repeated_weighted_batches(data, steps):
    """`weighted_batches`, from the start again when data end."""
    if isinstance(data, tf.data.Dataset):
        yield from weighted_batches(data.repeat(), steps)
        return
    batches = weighted_batches(data, steps)
    for number in range(steps):
        yield batches[number % len(batches)]
