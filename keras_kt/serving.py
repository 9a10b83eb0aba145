"""SavedModels for TensorFlow Serving: endpoints, versions, warm-up requests.

A trained model goes in and a folder comes out that a stock TensorFlow Serving
loads: `path/1/saved_model.pb` and so on, weights and the stored draws inside.
Endpoints are built on `keras.export.ExportArchive`. Streaming models get some
more, whose state travels as flat named tensors of fixed size, so that a server
keeps nothing between requests.
"""

import inspect
import os
import re
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_kt.ops.states import AttentionState
from keras_kt.ops.window import NearFieldState

_STATES = AttentionState, NearFieldState
# Arguments of a model's `step` that are a mask of the tokens.
_MASKS = "mask", "padding_mask", "decoder_padding_mask", "value_mask"
_WARMUP = "assets.extra/tf_serving_warmup_requests"
# TensorFlow Serving reads no more.
_MOST_WARMUP = 1000
# Names that Keras makes up; their numbers depend on what was made before.
_MADE_UP = re.compile(r"(keras_tensor|input_layer)(_\d+)?")


def export_saved_model(
    model,
    path,
    *,
    input_signature=None,
    streaming=False,
    signatures=None,
    warmup=None,
    version=None,
    overwrite=False,
    jit_compile=False,
):
    """Writes a built model as a SavedModel for TensorFlow Serving.

    The endpoint `serve`, also `serving_default`, is the model's inference. Its
    inputs have the names given to `keras.Input` or the keys of a dict
    (`input_0`, … where there is none); its outputs have the keys of the model's
    dict, else `output_0`, …. The stored draws of the frequencies are among the
    weights, so what is served is deterministic.

    With `streaming=True` there are more, for a causal model or layer with
    the methods `initial_state(batch_size)` and `step(tokens, state)` of
    `KernelizedAttention`, where the state is an `AttentionState` or a structure
    of such:

    * `initial_state`: `batch_size`, a scalar int32, to a state;
    * `prefill`: tokens `(batch, length, …)` and a state to outputs and a state;
    * `decode`: the same for one token, `(batch, 1, …)`;
    * `prefill_masked`: as `prefill` with `mask`, `(batch, length)` bool, True
      for tokens: prompts of several lengths in one batch, padded anywhere. Only
      where `step` has an argument `mask`, `padding_mask`,
      `decoder_padding_mask` or `value_mask`. A row's next token follows from
      the output at its last True.

    The i-th `AttentionState` travels as `state_i_maximum`, `state_i_sums` and
    `state_i_count`, float32, the same names in and out; a `NearFieldState` has
    its other fields too. Tokens have the name,
    shape and dtype of the first input of `serve`, whose second axis is the
    length.

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
        ValueError: if the model is unbuilt, lacks the methods of a streaming
            model, the version exists, or a request fits no endpoint.
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
    _check_model(model, streaming)
    path = os.fspath(path)
    folder = os.path.join(path, str(_version(path, version, overwrite)))
    structure, specs = _named_specs(_signature_of(model, input_signature))
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
        endpoints.update(_streaming(model, specs[0]))
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
        endpoints[name] = function, _named_specs(signature)[1]
    records = _warmup_records(path, warmup, endpoints)

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
    if records:
        file = os.path.join(unfinished, _WARMUP)
        tf.io.gfile.makedirs(os.path.dirname(file))
        with tf.io.TFRecordWriter(file) as writer:
            for record in records:
                writer.write(record)
    if tf.io.gfile.exists(folder):
        tf.io.gfile.rmtree(folder)
    tf.io.gfile.rename(unfinished, folder)
    return folder


def _check_model(model, streaming):
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
    missing = [
        name
        for name in ("initial_state", "step")
        if not callable(getattr(model, name, None))
    ]
    if streaming and missing:
        raise ValueError(
            "`streaming=True` needs a causal model with the methods "
            "`initial_state(batch_size)` and `step(tokens, state)`. Received: "
            f"{model.name!r}, a {type(model).__name__} without "
            f"{' and '.join(f'`{name}`' for name in missing)}. A bidirectional "
            "model cannot stream: export it without `streaming`. Give a causal "
            "one the methods, which call those of its layers."
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
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(
            "`version` must be `None` or a positive integer. Received: "
            f"version={version!r}"
        )
    if tf.io.gfile.exists(os.path.join(path, str(version))) and not overwrite:
        raise ValueError(
            f"`version` must be free. Received: version={version}, which "
            f"exists in {path!r}. Pass `overwrite=True` to replace it, or "
            "leave `version` out to write the next one."
        )
    return version


def _signature_of(model, input_signature):
    if input_signature is not None:
        return input_signature
    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise ValueError(
            f"`input_signature` is needed for {model.name!r}, a "
            f"{type(model).__name__} whose inputs are not known. Received: "
            "None. Pass a list of a `tf.TensorSpec` for each argument of its "
            "call, with None for the batch and for a dynamic length."
        )
    if isinstance(model, keras.Sequential):
        return inputs
    return [model.input]


def _named_specs(signature):
    """The structure of a signature, and its flat specs, all with a name."""
    if not isinstance(signature, (list, tuple)):
        signature = [signature]
    specs = []
    for position, (path, x) in enumerate(
        keras.tree.flatten_with_path(list(signature))
    ):
        name = path[-1] if isinstance(path[-1], str) else x.name
        if name is None or _MADE_UP.fullmatch(name):
            name = f"input_{position}"
        shape = tuple(x.shape)
        if isinstance(x, keras.KerasTensor):
            shape = (None, *shape[1:])
        specs.append(tf.TensorSpec(shape, x.dtype, name))
    return list(signature), specs


def _streaming(model, tokens):
    """The endpoints of a model that has `initial_state` and `step`."""
    if tokens.shape.rank is None or tokens.shape.rank < 2:
        raise ValueError(
            "`streaming=True` needs a first input of shape (batch, length, …). "
            f"Received: {tokens.name!r} of shape {tokens.shape}. Give such an "
            "`input_signature`; text has to be tokenised by the client."
        )
    template = model.initial_state(1)
    names = _state_names(template)
    states = [
        tf.TensorSpec((None, *x.shape[1:]) if x.shape.rank else (), x.dtype, n)
        for n, x in zip(names, tf.nest.flatten(template), strict=True)
    ]

    def name_state(state):
        return dict(zip(names, tf.nest.flatten(state), strict=True))

    def initial_state(batch_size):
        return name_state(model.initial_state(batch_size))

    def step(tokens, *flat_state, **masks):
        state = tf.nest.pack_sequence_as(template, flat_state)
        outputs, state = model.step(tokens, state, **masks)
        if not isinstance(outputs, dict):
            outputs = tf.nest.flatten(outputs)
            outputs = {f"output_{i}": x for i, x in enumerate(outputs)}
        return {**outputs, **name_state(state)}

    def tokens_of(length):
        shape = (None, length, *tokens.shape[2:])
        return tf.TensorSpec(shape, tokens.dtype, tokens.name)

    batch_size = tf.TensorSpec((), tf.int32, "batch_size")
    endpoints = {
        "initial_state": (initial_state, [batch_size]),
        "prefill": (step, [tokens_of(None), *states]),
        "decode": (step, [tokens_of(1), *states]),
    }
    mask_name = _mask_argument(model)
    if mask_name:
        if tokens.name == "mask":
            raise ValueError(
                "`streaming=True` needs another name than 'mask', which "
                "`prefill_masked` gives its mask, for the first input. "
                f"Received: a first input {tokens.name!r}. Name it in "
                "`input_signature`."
            )

        def masked_step(tokens, mask, *flat_state):
            return step(tokens, *flat_state, **{mask_name: mask})

        mask = tf.TensorSpec((None, None), tf.bool, "mask")
        signature = [tokens_of(None), mask, *states]
        endpoints["prefill_masked"] = masked_step, signature
    return endpoints


def _mask_argument(model):
    """The name of the mask of the tokens in a model's `step`, or `None`."""
    parameters = inspect.signature(model.step).parameters
    return next((name for name in _MASKS if name in parameters), None)


def _state_names(state):
    """Names of the tensors of a state, in the order of `tf.nest.flatten`."""

    def parts(state):
        if tf.is_tensor(state):
            return [("",)]
        if isinstance(state, _STATES):
            return [tuple(f"_{field}" for field in state._fields)]
        if isinstance(state, dict):
            state = [state[key] for key in sorted(state)]
        return [part for x in state for part in parts(x)]

    return [
        f"state_{i}{field}"
        for i, fields in enumerate(parts(state))
        for field in fields
    ]


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


def _warmup_records(path, warmup, endpoints):
    """Serialised `PredictionLog` messages."""
    if not warmup:
        return []
    try:
        from tensorflow_serving.apis import prediction_log_pb2
    except ImportError as error:
        raise ImportError(
            "`warmup` writes messages of tensorflow-serving-api, which cannot "
            "be imported. Install it with `pip install 'keras_kt[serving]'`, "
            "or leave `warmup` out."
        ) from error
    if not isinstance(warmup, dict):
        warmup = {"serve": warmup}
    records = []
    for endpoint, requests in warmup.items():
        if endpoint not in endpoints:
            raise ValueError(
                f"`warmup` must name endpoints of this export: "
                f"{sorted(endpoints)}. Received: {endpoint!r}"
            )
        specs = endpoints[endpoint][1]
        for request in requests:
            log = prediction_log_pb2.PredictionLog()
            message = log.predict_log.request
            message.model_spec.name = os.path.basename(path.rstrip("/"))
            message.model_spec.signature_name = endpoint
            for name, tensor in _request(endpoint, request, specs).items():
                message.inputs[name].CopyFrom(tf.make_tensor_proto(tensor))
            records.append(log.SerializeToString())
    if len(records) > _MOST_WARMUP:
        raise ValueError(
            f"`warmup` must have at most {_MOST_WARMUP} requests, as many as "
            f"TensorFlow Serving runs. Received: {len(records)}"
        )
    return records


def _request(endpoint, request, specs):
    """Arrays by input name, of the endpoint's dtypes."""
    names = [spec.name for spec in specs]
    if not isinstance(request, dict) and len(specs) == 1:
        request = {names[0]: request}
    if not isinstance(request, dict) or set(request) != set(names):
        got = list(request) if isinstance(request, dict) else type(request)
        raise ValueError(
            f"A request of `warmup` for {endpoint!r} must be a dict of arrays "
            f"by the names {names}. Received: {got}"
        )
    arrays = {}
    for spec in specs:
        array = np.asarray(request[spec.name])
        if spec.dtype != tf.string:
            array = array.astype(spec.dtype.as_numpy_dtype)
        if not spec.shape.is_compatible_with(array.shape):
            raise ValueError(
                f"A request of `warmup` for {endpoint!r} must have "
                f"{spec.name!r} of shape {tuple(spec.shape)}. Received: shape "
                f"{array.shape}"
            )
        arrays[spec.name] = array
    return arrays
