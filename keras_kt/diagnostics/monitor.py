"""A callback that writes a model's kernels to TensorBoard as it trains.

What `diagnostics` computes of each layer becomes curves, histograms, pictures
and warnings, and stays in the callback's `history` for `plots.plot_history`.
"""

import importlib.util
import io
import logging
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kt import _checks
from keras_kt.diagnostics import plots
from keras_kt.diagnostics.findings import health
from keras_kt.diagnostics.profile import (
    component_shares,
    kernel_profile,
    spectrum,
)
from keras_kt.diagnostics.record import layers_of
from keras_kt.diagnostics.rows import row_sums

_LOG = logging.getLogger("keras_kt")


class SpectralMonitor(keras.callbacks.Callback):
    """Watches the kernels of a model: curves, histograms, pictures, warnings.

    For each `KernelizedAttention`, at the end of an epoch: the norms of its
    frequencies and the kernel's value at some distances, by head; a mixture's
    probabilities; learned temperatures and smoothing; a picture of the kernels,
    if matplotlib is installed; with `data`, what rows of attention weights of
    trigonometric features sum to. What `diagnostics.health` finds is logged as
    a warning, once.

    Args:
        log_dir: folder of the TensorBoard files.
        every: epochs between two records. Defaults to 1.
        data: a batch of the model's inputs for `health` and `row_sums`, which
            take a forward pass each then. Defaults to `None`, which looks at
            weights only.
        distances: |q − k| at which kernels are written.
        pictures: records between two pictures, which take longest. Defaults to
            10, the first record included; 0 for none.

    Attributes:
        epoch: numbers of the epochs that were recorded, from 0.
        history: arrays by a layer's path and a quantity's name, in lists, one
            for each recorded epoch: `kernel` of shape `(heads, distances)` and,
            if the layer has them, `probability` of shape `(heads, components)`,
            `temperature`, `smoothing`, `guarded_rows` and `least_row_sum` of
            shape `(heads, 1)`.
            `plots.plot_history` draws them.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> attention = keras_kt.KernelizedAttention(2, 4, name="attention")
        >>> model = keras.Model(x, attention(x, x))
        >>> model.compile("sgd", "mse")
        >>> batch = np.zeros((4, 6, 8))
        >>> monitor = keras_kt.diagnostics.SpectralMonitor(tempfile.mkdtemp())
        >>> _ = model.fit(batch, batch, callbacks=[monitor], verbose=0)
        >>> sorted(monitor.history["attention"])
        ['kernel']
    """

    def __init__(
        self,
        log_dir: str | os.PathLike,
        every: int = 1,
        data: Any = None,
        distances: Sequence[float] = (1.0, 2.0, 5.0),
        pictures: int = 10,
    ):
        super().__init__()
        self.log_dir = str(log_dir)
        self.every = _checks.integer("every", every)
        self.data = data
        pictures = _checks.integer("pictures", pictures, minimum=0)
        if importlib.util.find_spec("matplotlib") is None:
            pictures = 0
        self.pictures = pictures
        self.distances = _checks.floats("distances", distances)
        self._writer = None

    def on_train_begin(self, logs=None):
        # Told here and not after the first epoch.
        layers_of(self.model)
        self._writer = tf.summary.create_file_writer(self.log_dir)
        self._said = set()
        self.epoch, self.history = [], {}

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every:
            return
        has_picture = self.pictures and len(self.epoch) % self.pictures == 0
        self.epoch.append(epoch)
        summary = tf.compat.v1.Summary()
        sums = {}
        if self.data is not None:
            sums = row_sums(self.model, self.data)
        for path, layer in layers_of(self.model).items():
            values = _values(layer, self.distances, sums.get(path))
            _add_layer(summary, path, layer, values, self.distances)
            past = self.history.setdefault(path, {name: [] for name in values})
            for name, value in values.items():
                past[name].append(value)
            if has_picture:
                summary.value.add(
                    tag=f"{path}/kernels",
                    image=tf.compat.v1.Summary.Image(
                        encoded_image_string=_picture(layer)
                    ),
                )
        with self._writer.as_default():
            # TensorFlow's own functions need TensorBoard to be installed.
            tf.summary.experimental.write_raw_pb(
                summary.SerializeToString(), step=epoch
            )
        for finding in health(self.model, self.data):
            # Numbers in the text change from epoch to epoch.
            key = finding.path, finding.head, finding.advice
            if key not in self._said:
                self._said.add(key)
                _LOG.warning("Epoch %d: %s", epoch + 1, finding)

    def on_train_end(self, logs=None):
        self._writer.close()


def _values(layer, distances, sums):
    """Arrays with a row a head, by name: what `history` holds."""
    values = {"kernel": kernel_profile(layer, distances).kernel}
    prior, feature_map = layer.spectral_prior, layer.feature_map
    if prior.num_components > 1:
        values["probability"] = component_shares(layer)
    if layer.temperature is not None:
        values["temperature"] = layer.temperature
    if feature_map.is_shift_invariant:
        values["smoothing"] = feature_map.smoothing_weights
    if sums is not None:
        values["guarded_rows"], values["least_row_sum"] = sums
    return {
        name: np.reshape(value, (layer.num_heads, -1))
        for name, value in values.items()
    }


def _add_layer(summary, path, layer, values, distances):
    norms = np.linalg.norm(spectrum(layer).frequencies, axis=-1)
    for head in range(layer.num_heads):
        place = f"{path}/head_{head}"
        summary.value.add(
            tag=f"{place}/frequency_norm", histo=_histogram(norms[head])
        )
        for name, rows in values.items():
            for column, value in enumerate(rows[head]):
                tag = name
                if name == "kernel":
                    tag = f"kernel_at_{distances[column]:g}"
                elif name == "probability":
                    tag = f"probability_of_component_{column}"
                summary.value.add(tag=f"{place}/{tag}", simple_value=value)


def _picture(layer):
    """The kernels of a layer, as PNG."""
    from matplotlib import pyplot

    figure, file = plots.plot_kernels(layer), io.BytesIO()
    figure.savefig(file, dpi=60)
    pyplot.close(figure)
    return file.getvalue()


def _histogram(values, bins=20):
    counts, edges = np.histogram(values, bins)
    return tf.compat.v1.HistogramProto(
        min=values.min(),
        max=values.max(),
        num=values.size,
        sum=values.sum(),
        sum_squares=np.square(values).sum(),
        bucket_limit=edges[1:],
        bucket=counts,
    )
