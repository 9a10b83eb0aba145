"""Warm-up requests: what a server runs before the first real request.

Checked against the endpoints that they are for, as the messages that TensorFlow
Serving reads from a SavedModel's extra assets.
"""

import os

import numpy as np
import tensorflow as tf

_WARMUP = "assets.extra/tf_serving_warmup_requests"
# TensorFlow Serving reads no more.
_MOST_WARMUP = 1000


def write_warmup(folder, records):
    """Writes requests where TensorFlow Serving looks for them.

    Args:
        folder: of one version of a SavedModel.
        records: of `warmup_records`; nothing is written if there are none.
    """
    if not records:
        return
    file = os.path.join(folder, _WARMUP)
    tf.io.gfile.makedirs(os.path.dirname(file))
    with tf.io.TFRecordWriter(file) as writer:
        for record in records:
            writer.write(record)


def warmup_records(path, warmup, endpoints):
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
