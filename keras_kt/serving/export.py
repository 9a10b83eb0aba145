"""SavedModels for TensorFlow Serving: endpoints and versions.

A trained model goes in and a folder comes out that a stock TensorFlow Serving
loads: `path/1/saved_model.pb` and so on, weights and the stored draws inside.
Endpoints are built on `keras.export.ExportArchive`; streaming models get some
more (`steps`), and requests to run first (`warmup`).
"""

import os
import warnings

import keras
import tensorflow as tf

from keras_kt import _checks
from keras_kt.serving.signatures import named_specs, signature_of
from keras_kt.serving.steps import streaming_endpoints
from keras_kt.serving.warmup import warmup_records, write_warmup
from keras_kt.streaming import stream_of


def export_saved_model(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    input_signature: list | None = None,
    streaming: bool = False,
    signatures: dict | None = None,
    warmup: list | dict | None = None,
    version: int | None = None,
    overwrite: bool = False,
    jit_compile: bool = False,
) -> str:
    """Writes a built model as a SavedModel for TensorFlow Serving.

    The endpoint `serve`, also `serving_default`, is the model's inference. Its
    inputs have the names given to `keras.Input` or the keys of a dict
    (`input_0`, … where there is none); its outputs have the keys of the model's
    dict, else `output_0`, …. The stored draws of the frequencies are among the
    weights, so what is served is deterministic.

    With `streaming=True` there are more, for a causal functional model, as
    `streaming_model` makes it a stream, and for a model or layer with
    the methods `initial_state(batch_size)` and `step(tokens, state)` of
    `KernelizedAttention`, where the state is an `AttentionState` or a structure
    of such:

    * `initial_state`: `batch_size`, a scalar int32, to a state;
    * `prefill`: tokens `(batch, length, …)` and a state to outputs and a state;
    * `decode`: the same for one token, `(batch, 1, …)`.

    Where `step` has an argument `mask`, `padding_mask`, `decoder_padding_mask`
    or `value_mask`, streams of different prompts make one batch:

    * `prefill_masked`: as `prefill` with `mask`, `(batch, length)` bool, True
      for tokens: prompts of several lengths in one batch, padded anywhere. A
      row's next token follows from the output at its last True;
    * `prefill_lengths`: with `lengths`, `(batch,)` int32, for prompts padded on
      the right. Outputs are those at each row's last token only, `(batch, 1,
      …)`, as of `decode`;
    * `decode_masked`: as `decode` with `mask`, `(batch, 1)` bool.

    A row that is all masked, or of length 0, keeps its state; what comes out
    for it means nothing.

    The fields of the i-th `AttentionState`, `NearFieldState`, `WindowState` or
    `RotaryState` travel as `state_i_maximum`, `state_i_sums` and so on,
    float32, the same names in and out. The batch is their first axis: joined
    and cut along it, they are the states of more streams, or of fewer. Tokens
    have the name, shape and dtype of the first input of `serve`, whose second
    axis is the length.

    The version appears under its number when it is complete, as a server that
    watches the folder needs it.

    Args:
        model: a built `keras.Model` or `keras.layers.Layer`.
        path: folder of the model's versions, local or `gs://`.
        input_signature: list with a structure of specs (`tf.TensorSpec`,
            `keras.InputSpec`) for each argument of the call, as in
            `ExportArchive.add_endpoint`. Defaults to `None`, which means the
            model's inputs, with a dynamic batch and the lengths that are
            `None` there; subclassed models and layers need it.
        streaming: whether to add the streaming endpoints.
        signatures: more endpoints, `{name: (function, input_signature)}`. The
            function gets the tensors one by one. What holds a lookup table must
            be a layer, or part of `model`.
        warmup: requests to run before the first real one: a list for `serve`,
            or `{endpoint: list}`. A request is a dict of arrays by input name,
            or one array where there is one input. At most 1000. Needs
            `pip install 'keras_kt[serving]'`.
        version: a positive integer. Defaults to `None`, which means the one
            after the highest in `path`.
        overwrite: whether to replace `version` if it exists.
        jit_compile: whether all endpoints but `initial_state` are compiled by
            XLA. On a CPU TensorFlow Serving then has to run with
            `--xla_cpu_compilation_enabled`.

    Returns:
        The folder that was written, `path/version`.

    Raises:
        ValueError: if the model is unbuilt, cannot stream (what in it is
            named), the version exists, or a request fits no endpoint.
        ImportError: if `warmup` is given without tensorflow-serving-api.

    Examples:
        >>> import tempfile
        >>> x = keras.Input((None, 32), name="x")
        >>> attention = keras_kt.KernelizedAttention(num_heads=4, key_dim=8)
        >>> model = keras.Model(x, {"y": attention(x, x)})
        >>> folder = keras_kt.export_saved_model(model, tempfile.mkdtemp())
        >>> served = tf.saved_model.load(folder)
        >>> serve = served.signatures["serve"]
        >>> serve(x=tf.ones((2, 100, 32)))["y"].shape
        TensorShape([2, 100, 32])
    """
    _check_model(model)
    path = os.fspath(path)
    folder = os.path.join(path, str(_version(path, version, overwrite)))
    structure, specs = named_specs(signature_of(model, input_signature))
    if jit_compile and any(spec.dtype == tf.string for spec in specs):
        raise ValueError(
            "`jit_compile` must be False for a model with string inputs, which "
            "XLA cannot compile. Received: jit_compile=True and inputs "
            f"{[(spec.name, spec.dtype.name) for spec in specs]}. Wrap the "
            "numeric part in `tf.function(jit_compile=True)` instead."
        )

    def serve(*tensors):
        arguments = keras.tree.pack_sequence_as(structure, list(tensors))
        return model(*arguments, training=False)

    endpoints = {"serve": (serve, specs)}
    if streaming:
        endpoints.update(streaming_endpoints(stream_of(model), specs[0]))
    if jit_compile:
        for name in set(endpoints) - {"initial_state"}:
            function, signature = endpoints[name]
            function = tf.function(function, jit_compile=True, autograph=False)
            endpoints[name] = function, signature
    for name, (function, signature) in (signatures or {}).items():
        if name in endpoints:
            raise ValueError(
                f"`signatures` must have names of their own. Received: {name!r}"
                f", which is taken; taken are {sorted(endpoints)}."
            )
        endpoints[name] = function, named_specs(signature)[1]
    records = warmup_records(path, warmup, endpoints)

    _say_what_is_frozen(model)
    archive = keras.export.ExportArchive()
    archive.track(model)
    for name, (function, signature) in endpoints.items():
        if isinstance(function, keras.layers.Layer):
            archive.track(function)
            function = function.__call__
        archive.add_endpoint(name, function, signature)
    # Not a number, so that no server takes it for a version.
    unfinished = f"{folder}.unfinished"
    if tf.io.gfile.exists(unfinished):
        tf.io.gfile.rmtree(unfinished)
    archive.write_out(unfinished, verbose=False)
    write_warmup(unfinished, records)
    if tf.io.gfile.exists(folder):
        tf.io.gfile.rmtree(folder)
    tf.io.gfile.rename(unfinished, folder)
    return folder


def _check_model(model):
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(
            "`model` must be a Keras model or layer. Received: a "
            f"{type(model).__name__}"
        )
    if not model.built:
        raise ValueError(
            "`model` must be built, so that it has weights to export. "
            f"Received: {model.name!r}, which is not. Call it once on a batch, "
            "or train it, before the export."
        )


def _version(path, version, overwrite):
    """The number to write, which is free or may be overwritten."""
    if version is None:
        if overwrite:
            raise ValueError(
                "`overwrite=True` needs the `version` to overwrite. Received: "
                "version=None. Give its number, or leave `overwrite` out to "
                "write the next one."
            )
        names = tf.io.gfile.listdir(path) if tf.io.gfile.isdir(path) else []
        names = [name.rstrip("/") for name in names]
        return 1 + max([0, *(int(name) for name in names if name.isdigit())])
    version = _checks.integer("version", version)
    if tf.io.gfile.exists(os.path.join(path, str(version))) and not overwrite:
        raise ValueError(
            f"`version` must be free. Received: version={version}, which "
            f"exists in {path!r}. Pass `overwrite=True` to replace it, or "
            "leave `version` out to write the next one."
        )
    return version


def _say_what_is_frozen(model):
    names = [
        layer.name
        for layer in model._flatten_layers()
        if getattr(layer, "redraw", None) == "step"
    ]
    if names:
        warnings.warn(
            f'The export holds one draw of {names}, which have redraw="step": '
            "the stored one, as at every inference. It is frozen from here on.",
            stacklevel=3,
        )
