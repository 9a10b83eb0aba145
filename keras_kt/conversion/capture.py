"""What converted layers attend to on real data: queries, keys, values, masks.

Layers attend exactly while they are recorded, so that each sees what it would
see if all did; or they are given the inputs of their teacher's layers. Errors
are measured, and kernels calibrated and distilled, on what is captured here.
"""

import functools
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kt import _checks
from keras_kt.conversion.batches import input_batches
from keras_kt.conversion.find import kernelized_layers, pairs_of_layers
from keras_kt.conversion.probe import kept_losses, recorded_calls
from keras_kt.conversion.softmax import (
    attending,
    fading,
    masked_softmax,
    nominal_logits,
    weighted,
)
from keras_kt.ops import visible_tokens


class Heads(NamedTuple):
    """One layer's attention on one batch: arrays or tensors.

    Attributes:
        query, key: `(batch, length, heads, key_dim)`, as projected; keys and
            values may have fewer heads.
        value: `(batch, key_length, heads, value_dim)`.
        visible: `(batch, 1 or heads, query_length, key_length)`, boolean.
        weights: softmax's weights, `(batch, heads, query_length, key_length)`.
    """

    query: tf.Tensor
    key: tf.Tensor
    value: tf.Tensor
    visible: tf.Tensor
    weights: tf.Tensor


class Captured(NamedTuple):
    """What one converted layer attended to.

    Attributes:
        path, layer: the layer.
        batches: tuple of `Heads`.
    """

    path: str
    layer: keras.Layer
    batches: tuple

    def examples(self):
        """`Heads` of one example after another, in batches of one."""
        for batch in self.batches:
            for one in range(batch.query.shape[0]):
                yield Heads(*(x[one : one + 1] for x in batch))

    def visible_tokens(self):
        """Queries and keys that take part: two of `(heads, tokens, dim)`."""
        tokens = []
        for name, axis in (("query", -1), ("key", -2)):
            rows = []
            for batch in self.batches:
                takes_part = np.any(batch.visible, axis=(1, axis))
                x = np.asarray(getattr(batch, name), "float64")
                rows.append(x[takes_part])
            tokens.append(np.swapaxes(np.concatenate(rows), 0, 1))
        return tokens

    def scaled_tokens(self):
        """`visible_tokens` as the layer's kernel takes them."""
        query, key = (
            np.swapaxes(x, 0, 1)[np.newaxis] for x in self.visible_tokens()
        )
        return [
            np.swapaxes(np.asarray(x[0], "float64"), 0, 1)
            for x in self.layer.scaled(query, key)
        ]


def capture(model, data, batches, teacher=None):
    """What converted layers attend to; a list of `Captured`."""
    batches = _checks.integer("batches", batches)
    layers = kernelized_layers(model)
    pairs = None if teacher is None else pairs_of_layers(model, teacher)
    found = {path: [] for path in layers}
    for inputs in input_batches(data, batches):
        if teacher is not None:
            seen = taught(pairs, teacher, inputs)
        else:
            seen = _attended(model, layers, inputs)
        for path, heads in seen.items():
            if not all(np.isfinite(x).all() for x in (heads.query, heads.key)):
                raise ValueError(
                    "`data` must give finite queries and keys. Received: "
                    f"inputs for which those of {path!r} are NaN or infinite."
                )
            found[path].append(heads)
    return [
        Captured(path, layers[path], tuple(heads))
        for path, heads in found.items()
        if heads
    ]


def taught(pairs, teacher, inputs):
    """Each student layer on what its teacher's layer was given.

    Args:
        pairs: of `find.pairs_of_layers`.
        teacher: the teacher.
        inputs: one batch.

    Returns:
        `Heads` by path.
    """
    originals = [pair.original for pair in pairs]
    seams = {
        id(pair.original): pair.holder.seam
        for pair in pairs
        if pair.holder is not pair.layer
    }
    sink = {}
    attend = functools.partial(_attend_softmax, sink, seams)
    # Recorded last: where a whole call is replaced, its own is not made.
    with kept_losses(teacher), attending(originals, attend):
        with recorded_calls(originals) as calls:
            teacher(inputs, training=False)
    given = {id(layer): arguments for layer, arguments, _ in calls}
    holders = [pair.holder for pair in pairs]
    with (
        kept_losses(*holders),
        attending([pair.layer for pair in pairs], attend),
    ):
        for pair in pairs:
            pair.holder(**{**given[id(pair.original)], "training": False})
    found = {}
    for pair in pairs:
        theirs, ours = sink[id(pair.original)], sink[id(pair.layer)]
        found[pair.path] = theirs._replace(query=ours.query, key=ours.key)
    return found


def _attended(model, layers, inputs):
    """`Heads` by path, of the layers that a forward pass calls."""
    sink = {}
    attend = functools.partial(_attend_softmax, sink, {})
    with kept_losses(model), attending(list(layers.values()), attend):
        model(inputs, training=False)
    return {
        path: sink[id(layer)]
        for path, layer in layers.items()
        if id(layer) in sink
    }


def _attend_softmax(sink, seams, layer, query, key, value, visible):
    """Softmax attention that is captured.

    Args:
        sink: a dictionary; gets `Heads` by the id of the layer.
        seams: a `Seam` by the id of a teacher's layer that has one.
        layer, query, key, value, visible: as in `attending`.
    """
    seam = seams.get(id(layer))
    if seam:
        query, key, value = seam.heads(query, key, value)
    if seam and seam.window:
        # It may have been the method's that is replaced.
        lengths = tf.shape(query)[1], tf.shape(key)[1]
        near = visible_tokens.within(lengths, None, seam.window)
        visible = tf.logical_and(visible, near)
    logits = nominal_logits(layer, query, key)
    if seam and seam.slopes:
        logits += fading(seam.slopes, logits)
    weights = masked_softmax(logits, visible)
    # A layer called twice is measured on its last call.
    sink[id(layer)] = Heads(query, key, value, visible, weights)
    return weighted(weights, value)
