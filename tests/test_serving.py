"""SavedModels, run by a C program that knows nothing of Python or Keras.

`serving/host.c` loads them through the C API of the TensorFlow wheel: the
loader and the kernels that TensorFlow Serving links too.
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers import cases, runtimes

ROOT = Path(__file__).parent.parent
TENSORFLOW = Path(tf.sysconfig.get_lib())
VOCABULARY = 29
TOKENS = tf.TensorSpec((None, None), "int32", "tokens")

pytestmark = [
    pytest.mark.filterwarnings("ignore:FastFoodPrior needs a power"),
    # Raised inside Keras's EinsumDense where the length is dynamic.
    pytest.mark.filterwarnings("ignore:.*jit_compile.*"),
]


class Decoder(keras.Model):
    """A causal language model of the streaming protocol."""

    def __init__(self, blocks=2, **kwargs):
        super().__init__()
        self.embedding = keras.layers.Embedding(VOCABULARY, 12)
        self.blocks = [
            keras_kt.KernelizedAttention(3, 5, seed=i, **kwargs)
            for i in range(blocks)
        ]
        self.head = keras.layers.Dense(VOCABULARY)

    def call(self, tokens):
        x = self.embedding(tokens)
        for attention in self.blocks:
            x = x + attention(x, x, use_causal_mask=True)
        return self.head(x)

    def initial_state(self, batch_size):
        return [block.initial_state(batch_size) for block in self.blocks]

    def step(self, tokens, state):
        x, after = self.embedding(tokens), []
        for attention, before in zip(self.blocks, state, strict=True):
            y, new = attention.step(x, before)
            x = x + y
            after.append(new)
        return self.head(x), after


@keras.saving.register_keras_serializable("keras_kt_tests")
class Bytes(keras.layers.Layer):
    """Bytes of strings by tensorflow-text, padded with 0, shifted by one."""

    def call(self, text):
        import tensorflow_text

        parts = tensorflow_text.ByteSplitter().split(text)
        return (tf.cast(parts, "int32") + 1).to_tensor()


@keras.saving.register_keras_serializable("keras_kt_tests")
class Words(keras.layers.Layer):
    """Subwords of strings; the vocabulary is in a lookup table."""

    def __init__(self):
        super().__init__()
        import tensorflow_text

        words = ["[UNK]", "the", "kernel", "learn", "##ed", "##s"]
        table = tf.lookup.StaticVocabularyTable(
            tf.lookup.KeyValueTensorInitializer(
                words, range(len(words)), "string", "int64"
            ),
            num_oov_buckets=1,
        )
        self.splitter = tensorflow_text.WhitespaceTokenizer()
        self.wordpieces = tensorflow_text.WordpieceTokenizer(
            table, token_out_type="int64"
        )

    def call(self, text):
        words = self.wordpieces.tokenize(self.splitter.tokenize(text))
        return tf.cast(words.merge_dims(1, 2).to_tensor(), "int32")


def serving_api(name):
    """A module of tensorflow-serving-api, for the tests that need it."""
    return pytest.importorskip(f"tensorflow_serving.apis.{name}")


def text_libraries(*names):
    import tensorflow_text

    folder = Path(tensorflow_text.__file__).parent / "python" / "ops"
    return [folder / f"_{name}.so" for name in names]


def tokens_of(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCABULARY, shape).astype("int32")


def attention_model(**kwargs):
    x = keras.Input((None, 6), name="x")
    layer = keras_kt.KernelizedAttention(3, 5, seed=1, **kwargs)
    return keras.Model(x, {"y": layer(x, x)})


def check_pairs(pairs, host, tmp_path):
    """Compares the C program with Keras; one model of a layer per pair."""
    x = keras.Input((None, 6), name="x")
    outputs = {}
    for prior_name, map_name in pairs:
        layer = keras_kt.KernelizedAttention(
            3,
            5,
            seed=1,
            num_features=40,
            spectral_prior=cases.PRIORS[prior_name](),
            feature_map=cases.MAPS[map_name](),
        )
        outputs[f"{prior_name}_{map_name}".replace("-", "_")] = layer(x, x)
    model = keras.Model(x, outputs)
    folder = keras_kt.export_saved_model(model, tmp_path / "model")
    assert not runtimes.ops_without_kernel(host, folder, tmp_path)
    spec = tf.TensorSpec((None, None, 6))
    keras_model = tf.function(model, input_signature=[spec])
    for shape in ((2, 11, 6), (3, 79, 6)):
        inputs = runtimes.array(shape)
        served = runtimes.serve(host, folder, {"x": inputs}, tmp_path)
        expected = keras_model(inputs)
        assert set(served) == set(outputs)
        for name, value in expected.items():
            print(name, shape[1], np.abs(served[name] - value).max())
            np.testing.assert_allclose(
                served[name], value, atol=1e-6, err_msg=name
            )


@pytest.fixture(scope="module")
def streaming(tmp_path_factory):
    """A decoder and its folder: tracing four endpoints takes seconds."""
    model = Decoder(feature_map="positive")
    model(tokens_of((2, 5)))
    folder = keras_kt.export_saved_model(
        model,
        tmp_path_factory.mktemp("streaming") / "model",
        input_signature=[TOKENS],
        streaming=True,
    )
    return model, folder


@pytest.mark.slow
def test_c_host_equals_keras(host, tmp_path):
    pairs = (("normal", "positive"), ("mixture", "trigonometric"))
    check_pairs(pairs, host, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("map_name", cases.MAPS)
def test_c_host_equals_keras_for_every_prior(map_name, host, tmp_path):
    pairs = [pair for pair in cases.PAIRS if pair[1] == map_name]
    check_pairs(pairs, host, tmp_path)


def stream_by_host(host, folder, tokens, prefix, tmp_path):
    """Logits of a prefill and of decoding token by token, all by the host."""
    signatures = runtimes.meta_graph(folder).signature_def
    state = {name: name for name in signatures["initial_state"].outputs}
    steps = [
        tokens[:, :prefix],
        *np.split(tokens[:, prefix:], tokens.shape[1] - prefix, 1),
    ]
    variables = {f"tokens{i}": step for i, step in enumerate(steps)}
    batch_size = np.array(len(tokens), "int32")
    runtimes.write_tensors(
        tmp_path / "inputs", {**variables, "batch_size": batch_size}
    )
    script = [
        f"model {folder}",
        f"read {tmp_path / 'inputs'}",
        runtimes.run_line(
            signatures["initial_state"], {"batch_size": "batch_size"}, state
        ),
    ]
    for index in range(len(steps)):
        signature = signatures["decode" if index else "prefill"]
        feeds = {"tokens": f"tokens{index}", **state}
        fetches = {"output_0": f"output{index}", **state}
        script.append(runtimes.run_line(signature, feeds, fetches))
    names = [f"output{index}" for index in range(len(steps))]
    script.append(f"write {tmp_path / 'outputs'} {' '.join(names)}")
    host(script)
    outputs = runtimes.read_tensors(tmp_path / "outputs")
    return np.concatenate([outputs[name] for name in names], axis=1)


@pytest.mark.slow
def test_decode_endpoint_equals_the_full_pass(streaming, host, tmp_path):
    check_decoding(*streaming, host, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "feature_map, jit_compile",
    (("trigonometric", False), ("positive", True), ("trigonometric", True)),
)
def test_decode_endpoint_of_every_map_equals_the_full_pass(
    feature_map, jit_compile, host, tmp_path
):
    model = Decoder(feature_map=feature_map)
    model(tokens_of((2, 5)))
    folder = keras_kt.export_saved_model(
        model,
        tmp_path / "model",
        input_signature=[TOKENS],
        streaming=True,
        jit_compile=jit_compile,
    )
    check_decoding(model, folder, host, tmp_path, jit_compile)


def check_decoding(model, folder, host, tmp_path, jit_compile=False):
    tokens = tokens_of((2, 67))
    expected = model(tokens)
    assert not runtimes.ops_without_kernel(host, folder, tmp_path)
    full = runtimes.serve(host, folder, {"tokens": tokens}, tmp_path)[
        "output_0"
    ]
    np.testing.assert_allclose(full, expected, atol=1e-5)
    if jit_compile:
        return  # run in one process only: each compiles again
    streamed = stream_by_host(host, folder, tokens, 17, tmp_path)
    np.testing.assert_allclose(streamed, expected, atol=1e-4)


@pytest.mark.slow
def test_ten_thousand_decoded_tokens_equal_the_full_pass(host, tmp_path):
    model = Decoder()
    tokens = tokens_of((1, 10_001))
    expected = model(tokens)
    folder = keras_kt.export_saved_model(
        model, tmp_path / "model", input_signature=[TOKENS], streaming=True
    )
    streamed = stream_by_host(host, folder, tokens, 1, tmp_path)
    print("largest difference", np.abs(streamed - expected).max())
    np.testing.assert_allclose(streamed, expected, atol=1e-4)


def test_states_are_flat_named_and_of_fixed_size(streaming):
    _, folder = streaming
    artifact = tf.saved_model.load(folder)
    served = artifact.signatures
    names = {
        f"state_{i}_{field}"
        for i in range(2)
        for field in keras_kt.AttentionState._fields
    }
    assert {"state_0_maximum", "state_1_sums"} <= names
    assert set(served["initial_state"].structured_outputs) == names
    for endpoint, length in (("prefill", None), ("decode", 1)):
        _, inputs = served[endpoint].structured_input_signature
        outputs = served[endpoint].structured_outputs
        assert inputs.pop("tokens").shape.as_list() == [None, length]
        assert outputs.pop("output_0").shape.as_list()[0] is None
        assert set(inputs) == set(outputs) == names
        for name in names:
            shape = inputs[name].shape.as_list()
            assert shape[0] is None and None not in shape[1:]
            assert outputs[name].shape.as_list() == shape


@pytest.mark.slow
def test_a_bare_layer_streams_too(tmp_path):
    layer = keras_kt.KernelizedAttention(3, 5, seed=1)
    x = runtimes.array((2, 7, 6))
    expected = layer(x, x, use_causal_mask=True)
    folder = keras_kt.export_saved_model(
        layer,
        tmp_path,
        input_signature=[
            tf.TensorSpec((None, None, 6), name=name)
            for name in ("query", "value")
        ],
        streaming=True,
    )
    artifact = tf.saved_model.load(folder)
    served = artifact.signatures
    state = served["initial_state"](batch_size=tf.constant(2))
    result = served["prefill"](query=tf.constant(x), **state)
    np.testing.assert_allclose(result.pop("output_0"), expected, atol=1e-5)
    _, seen = layer.step(x, layer.initial_state(2))
    assert set(result) == {f"state_0_{field}" for field in seen._fields}
    for field, value in seen._asdict().items():
        np.testing.assert_allclose(result[f"state_0_{field}"], value, atol=1e-4)


@pytest.mark.slow
def test_raw_strings_go_in_without_python(host, tmp_path):
    pytest.importorskip("tensorflow_text")
    text = keras.Input((), dtype="string", name="text")
    pooled = []
    for tokens in (Bytes()(text), Words()(text)):
        x = keras.layers.Embedding(257, 6, mask_zero=True)(tokens)
        x = x + keras_kt.KernelizedAttention(3, 5)(x, x)
        pooled.append(keras.layers.GlobalAveragePooling1D()(x))
    x = keras.layers.Concatenate()(pooled)
    model = keras.Model(text, {"logits": keras.layers.Dense(2)(x)})
    folder = keras_kt.export_saved_model(model, tmp_path / "model")
    libraries = text_libraries(
        "byte_splitter", "whitespace_tokenizer_v2", "wordpiece_tokenizer"
    )
    assert not runtimes.ops_without_kernel(host, folder, tmp_path, libraries)
    missing = runtimes.ops_without_kernel(host, folder, tmp_path)
    assert any(op.startswith("TFText>") for op in missing), missing
    texts = np.array([b"the learned kernel", "ein größerer Kern".encode()])
    served = runtimes.serve(
        host, folder, {"text": texts}, tmp_path, libraries=libraries
    )
    expected = model(tf.constant(texts))["logits"]
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(served["logits"], expected, atol=1e-6)


def test_ops_that_need_python_are_found(host, tmp_path):
    def needs_python(x):
        return tf.ensure_shape(tf.numpy_function(np.sin, [x], "float32"), [1])

    folder = keras_kt.export_saved_model(
        attention_model(),
        tmp_path / "model",
        signatures={"sine": (needs_python, [tf.TensorSpec((1,), name="x")])},
    )
    assert runtimes.ops_without_kernel(host, folder, tmp_path) == {"PyFunc"}
    with pytest.raises(RuntimeError, match="PyFunc"):
        runtimes.serve(
            host, folder, {"x": np.ones(1, "float32")}, tmp_path, (), "sine"
        )


def test_names_come_from_inputs_dicts_and_specs(tmp_path):
    layer = keras_kt.KernelizedAttention(3, 5)
    named = {k: keras.Input((None, 6), name=k) for k in ("query", "value")}
    keyed = keras.Model(named, layer(named["query"], named["value"]))
    unnamed = [keras.Input((None, 6)), keras.Input((None, 6), name="value")]
    listed = keras.Model(unnamed, layer(*unnamed))
    chain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    for model, inputs in (
        (keyed, {"query", "value"}),
        (listed, {"input_0", "value"}),
        (chain, {"input_0"}),
    ):
        folder = keras_kt.export_saved_model(model, tmp_path)
        signatures = runtimes.meta_graph(folder).signature_def
        for endpoint in ("serve", "serving_default"):
            signature = signatures[endpoint]
            assert set(signature.inputs) == inputs
            assert set(signature.outputs) == {"output_0"}
            assert signature.method_name == "tensorflow/serving/predict"
            for tensor in signature.inputs.values():
                assert tensor.tensor_shape.dim[0].size == -1
    artifact = tf.saved_model.load(str(tmp_path / "2"))
    reloaded = artifact.signatures["serve"]
    x, y = runtimes.array((2, 11, 6)), runtimes.array((2, 13, 6), seed=1)
    np.testing.assert_allclose(
        reloaded(input_0=x, value=y)["output_0"], listed([x, y]), atol=1e-5
    )


def test_more_signatures_share_the_weights(tmp_path):
    model = attention_model()

    def mean(x):
        return {"mean": tf.reduce_mean(model(x)["y"], axis=1)}

    folder = keras_kt.export_saved_model(
        model,
        tmp_path,
        signatures={"mean": (mean, [tf.TensorSpec((None, None, 6), name="x")])},
    )
    x = runtimes.array((2, 11, 6))
    artifact = tf.saved_model.load(folder)
    served = artifact.signatures["mean"]
    expected = np.mean(model(x)["y"], axis=1)
    np.testing.assert_allclose(served(x=x)["mean"], expected, atol=1e-6)


def test_versions_count_up_and_are_never_half_written(tmp_path):
    # What is in a version does not matter here, and exports are many.
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    path = tmp_path / "name"

    def export(**kwargs):
        return keras_kt.export_saved_model(model, path, **kwargs)

    assert export() == str(path / "1")
    assert export(version=7) == str(path / "7")
    assert export() == str(path / "8")
    before = (path / "7" / "fingerprint.pb").read_bytes()
    with pytest.raises(ValueError, match="`version` must be free.*overwrite"):
        export(version=7)
    assert (path / "7" / "fingerprint.pb").read_bytes() == before
    assert export(version=7, overwrite=True) == str(path / "7")
    assert (path / "7" / "fingerprint.pb").read_bytes() != before
    assert {p.name for p in path.iterdir()} == {"1", "7", "8"}
    with pytest.raises(ValueError, match="needs the `version` to overwrite"):
        export(overwrite=True)
    for version in (0, True, "1"):
        with pytest.raises(ValueError, match="positive integer"):
            export(version=version)


def test_stored_draw_is_served_and_said_to_be_frozen(tmp_path):
    model = attention_model(redraw="step")
    with pytest.warns(UserWarning, match='redraw="step".*frozen'):
        folder = keras_kt.export_saved_model(model, tmp_path)
    x = runtimes.array((2, 11, 6))
    artifact = tf.saved_model.load(folder)
    served = artifact.signatures["serve"]
    first, second = (served(x=x)["y"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, model(x)["y"], atol=1e-6)


@pytest.mark.slow
def test_warmup_requests_are_prediction_logs(tmp_path):
    prediction_log_pb2 = serving_api("prediction_log_pb2")
    model = Decoder()
    model(tokens_of((2, 5)))
    state = {
        f"state_{i}_{field}": value.numpy()
        for i, block in enumerate(model.initial_state(2))
        for field, value in block._asdict().items()
    }
    tokens = tokens_of((2, 1))
    folder = keras_kt.export_saved_model(
        model,
        tmp_path / "language",
        input_signature=[TOKENS],
        streaming=True,
        warmup={
            "serve": [tokens_of((1, 3)).tolist(), tokens_of((2, 11))],
            "decode": [{"tokens": tokens, **state}],
        },
    )
    file = Path(folder) / "assets.extra" / "tf_serving_warmup_requests"
    served = tf.saved_model.load(folder)
    logs = [
        prediction_log_pb2.PredictionLog.FromString(record.numpy())
        for record in tf.data.TFRecordDataset(str(file))
    ]
    assert len(logs) == 3
    expected = [model(tokens_of((1, 3))), model(tokens_of((2, 11)))]
    expected.append(model(tokens))
    for log, value in zip(logs, expected, strict=True):
        request = log.predict_log.request
        assert request.model_spec.name == "language"
        np.testing.assert_allclose(
            answer(served, request)["output_0"], value, atol=1e-5
        )
    assert logs[2].predict_log.request.model_spec.signature_name == "decode"


def answer(served, request):
    """What a server does with a PredictRequest."""
    signature = served.signatures[
        request.model_spec.signature_name or "serving_default"
    ]
    inputs = {
        name: tf.constant(tf.make_ndarray(tensor))
        for name, tensor in request.inputs.items()
    }
    return signature(**inputs)


def test_request_bodies_follow_from_the_signature(tmp_path):
    predict_pb2 = serving_api("predict_pb2")
    model = attention_model()
    folder = keras_kt.export_saved_model(model, tmp_path)
    served = tf.saved_model.load(folder)
    x = runtimes.array((2, 11, 6))
    expected = model(x)["y"]
    signature = runtimes.meta_graph(folder).signature_def["serving_default"]
    ((name, info),) = signature.inputs.items()
    # gRPC: a PredictRequest over the wire, and a PredictResponse back.
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "kernel"
    request.inputs[name].CopyFrom(tf.make_tensor_proto(x, info.dtype))
    request = predict_pb2.PredictRequest.FromString(request.SerializeToString())
    response = predict_pb2.PredictResponse()
    for key, value in answer(served, request).items():
        response.outputs[key].CopyFrom(tf.make_tensor_proto(value))
    response = response.FromString(response.SerializeToString())
    assert set(response.outputs) == set(signature.outputs)
    np.testing.assert_allclose(
        tf.make_ndarray(response.outputs["y"]), expected, atol=1e-6
    )
    # REST: rows of "instances", or whole "inputs".
    for body in (
        {"instances": [{name: row.tolist()} for row in x]},
        {"inputs": {name: x.tolist()}},
    ):
        body = json.loads(json.dumps(body))
        if "instances" in body:
            inputs = [row[name] for row in body["instances"]]
        else:
            inputs = body["inputs"][name]
        inputs = tf.constant(inputs, tf.as_dtype(info.dtype))
        result = served.signatures["serving_default"](**{name: inputs})
        np.testing.assert_allclose(result["y"], expected, atol=1e-6)


def test_wrong_exports_name_the_way_out(tmp_path, monkeypatch):
    serving_api("prediction_log_pb2")
    model = attention_model()

    def wrong(match, model=model, error=ValueError, **kwargs):
        with pytest.raises(error, match=match):
            keras_kt.export_saved_model(model, tmp_path / "wrong", **kwargs)

    wrong("must be a Keras model or layer", model=tf.sin)
    wrong("must be built.*Call it once", model=Decoder())
    wrong("without `use_causal_mask=True`", streaming=True)
    built = Decoder()
    built(tokens_of((2, 5)))
    wrong("`input_signature` is needed", model=built)
    scalar = [tf.TensorSpec((None,), "string", "text")]
    wrong("batch, length", model=built, input_signature=scalar, streaming=True)
    wrong(
        "string inputs", model=built, input_signature=scalar, jit_compile=True
    )
    wrong(
        "names of their own",
        signatures={"serve": (tf.sin, [tf.TensorSpec((1,))])},
    )
    wrong("must name endpoints of this export", warmup={"decode": [1.0]})
    wrong(r"by the names \['x'\]", warmup=[{"y": runtimes.array((1, 2, 6))}])
    wrong(r"shape \(None, None, 6\)", warmup=[runtimes.array((1, 2, 5))])
    wrong("at most 1000", warmup=[runtimes.array((1, 2, 6))] * 1001)
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    wrong(
        r"keras_kt\[serving\]",
        error=ImportError,
        warmup=[runtimes.array((1, 2, 6))],
    )
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
@pytest.mark.parametrize("feature_map", ("positive", "trigonometric"))
def test_lite_rt_runs_a_fixed_length_and_a_decode_step(feature_map):
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is missing")
    layer = keras_kt.KernelizedAttention(3, 5, seed=1, feature_map=feature_map)
    x = runtimes.array((1, 79, 6))
    layer.build(x.shape, x.shape)
    run = runtimes.lite_rt(lambda x: {"y": layer(x, x)}, {"x": x})
    np.testing.assert_allclose(run(x=x)["y"], layer(x, x), atol=1e-4)

    def decode(token, *state):
        y, state = layer.step(token, keras_kt.AttentionState(*state))
        return {"y": y, **state._asdict()}

    expected = layer(x, x, use_causal_mask=True)
    state = {k: v.numpy() for k, v in layer.initial_state(1)._asdict().items()}
    run = runtimes.lite_rt(decode, {"token": x[:, :1], **state})
    for index in range(x.shape[1]):
        state = run(token=x[:, index : index + 1], **state)
        np.testing.assert_allclose(
            state.pop("y"), expected[:, index : index + 1], atol=1e-4
        )
