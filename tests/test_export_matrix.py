"""Which feature runs in which runtime, as docs/serving.md says.

`MATRIX` is the one source: the table of the documentation is made from it, and
each cell is either checked to its tolerance or stands there as not working.
"""

import functools
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers import runtimes
from tests.helpers.contract import exhaustive

PAGE = Path(__file__).parent.parent / "docs" / "serving.md"
CAUSAL = {"use_causal_mask": True}
# Arguments of the layer, and of its call.
FEATURES = {
    "bidirectional": ({}, {}),
    "causal": ({}, CAUSAL),
    "masked": ({}, {}),
    "causal, masked": ({}, CAUSAL),
    "trigonometric": ({"feature_map": "trigonometric"}, {}),
    "trigonometric, causal": ({"feature_map": "trigonometric"}, CAUSAL),
    "constant decay": ({"decay": "constant"}, {}),
    "constant decay, causal": ({"decay": "constant"}, CAUSAL),
    "gated decay, causal": ({"decay": "gated"}, CAUSAL),
    "near field": ({"near_field": 3}, {}),
    "near field, causal": ({"near_field": 3}, CAUSAL),
    "sliding window": ({"sliding_window": 3}, {}),
    "sliding window, causal": ({"sliding_window": 3}, CAUSAL),
    "inputs of rank 4": ({"attention_axes": 2}, {}),
}
RUNTIMES = (
    "SavedModel",
    "SavedModel, XLA",
    "C host",
    "ONNX",
    "OpenVINO",
    "LiteRT",
    "LiteRT, matrix",
)
ALWAYS = {
    "SavedModel": 1e-6,
    "SavedModel, XLA": 1e-5,
    "C host": 1e-6,
    "ONNX": 1e-5,
    "OpenVINO": 1e-5,
    "LiteRT": 1e-5,
    "LiteRT, matrix": 1e-5,
}
# Tolerances of outputs of size one; `None` is what does not work.
MATRIX = {name: dict(ALWAYS) for name in FEATURES}
for name in FEATURES:
    if "trigonometric" in name:
        # A normalizer that may be small makes rounding larger.
        MATRIX[name]["SavedModel, XLA"] = 1e-4
    if "decay" in name:
        # Its matrix is summed in float64, of which LiteRT has no cumsum.
        MATRIX[name]["LiteRT, matrix"] = None
    if "near field" in name or "sliding window" in name:
        # Its compiler fails on the loop over a band; the matrix runs.
        MATRIX[name]["OpenVINO"] = None
# It may choose bfloat16 by itself.
OPEN_VINO = {"INFERENCE_PRECISION_HINT": "f32"}
# Cells that are quick enough for every run of the tests.
QUICK = {("causal", "SavedModel"), ("bidirectional", "LiteRT, matrix")}
# Converters take up to a minute: in CI for each kind of loop.
CONVERTED = "ONNX", "LiteRT", "LiteRT, matrix"
KINDS = (
    "causal, masked",
    "trigonometric",
    "constant decay, causal",
    "near field, causal",
    "inputs of rank 4",
)


def network(feature, batch, length, implementation):
    """A model of one layer, and inputs for it; masked ones have two."""
    arguments, call = FEATURES[feature]
    shape = (length, 6) if feature != "inputs of rank 4" else (3, length, 6)
    x = keras.Input(batch_shape=(batch, *shape), name="x")
    inputs, masks = {"x": x}, {}
    if "masked" in feature:
        inputs["mask"] = keras.Input(
            batch_shape=(batch, length), dtype="bool", name="mask"
        )
        masks = {"value_mask": inputs["mask"]}
    layer = keras_kt.KernelizedAttention(
        3, 5, seed=1, implementation=implementation, **arguments
    )
    return keras.Model(inputs, {"y": layer(x, x, **masks, **call)})


def batch_of(feature, batch, length):
    shape = (length, 6) if feature != "inputs of rank 4" else (3, length, 6)
    arrays = {"x": runtimes.array((batch, *shape), seed=length)}
    if "masked" in feature:
        lengths = np.arange(1, batch + 1)[:, np.newaxis] * length // batch
        arrays["mask"] = np.arange(length) < lengths
    return arrays


# What runtimes share; the cells of a feature are next to each other.
@functools.lru_cache(maxsize=1)
def dynamic(feature):
    """A model of dynamic batch and length."""
    return network(feature, None, None, "linear")


@functools.lru_cache(maxsize=2)
def exported(feature, folder, jit_compile=False):
    """It and its SavedModel, in a folder of all tests."""
    model = dynamic(feature)
    path = folder / f"{feature}, {'XLA' if jit_compile else 'graph'}"
    version = keras_kt.export_saved_model(model, path, jit_compile=jit_compile)
    return model, version


def saved_model(feature, tmp_path, c_program, jit_compile=False):
    model, folder = exported(feature, tmp_path.parent, jit_compile)
    # Whole, since a signature does not keep its weights alive.
    artifact = tf.saved_model.load(folder)

    def run(arrays):
        tensors = {name: tf.constant(x) for name, x in arrays.items()}
        return artifact.signatures["serve"](**tensors)["y"]

    return model, run, (79, 11)


def xla(feature, tmp_path, c_program):
    return saved_model(feature, tmp_path, c_program, jit_compile=True)


def c_host(feature, tmp_path, c_program):
    model, folder = exported(feature, tmp_path.parent)

    def run(arrays):
        return runtimes.serve(c_program, folder, arrays, tmp_path)["y"]

    return model, run, (79, 11)


def onnx(feature, tmp_path, c_program):
    import onnxruntime
    import tf2onnx

    model = dynamic(feature)
    specs = [
        tf.TensorSpec(x.shape, x.dtype, name) for name, x in model.input.items()
    ]
    names = list(model.input)
    function = tf.function(
        lambda *tensors: model(dict(zip(names, tensors, strict=True)))["y"],
        input_signature=specs,
        autograph=False,
    )
    proto, _ = tf2onnx.convert.from_function(
        function, input_signature=specs, opset=18
    )
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return model, lambda arrays: session.run(None, arrays)[0], (79, 11)


def open_vino(feature, tmp_path, c_program):
    """It reads the SavedModel itself."""
    openvino = pytest.importorskip("openvino")
    model, folder = exported(feature, tmp_path.parent)
    compiled = openvino.compile_model(folder, "CPU", OPEN_VINO)
    return model, lambda arrays: compiled(arrays)["y"], (79, 11)


def lite_rt(feature, tmp_path, c_program):
    """By TensorFlow's converter, without Flex; fixed batch and length."""
    model = network(feature, 2, 79, "linear")
    examples = batch_of(feature, 2, 79)
    names = list(examples)

    def call(*tensors):
        return model(dict(zip(names, tensors, strict=True)))

    runner = runtimes.lite_rt(call, examples)
    return model, lambda arrays: runner(**arrays)["y"], (79,)


def lite_rt_matrix(feature, tmp_path, c_program):
    """By Keras, as docs/serving.md has it; fixed batch and length."""
    from ai_edge_litert.interpreter import Interpreter

    model = network(feature, 2, 79, "quadratic")
    path = str(tmp_path / "model.tflite")
    model.export(path, format="litert", verbose=False)
    interpreter = Interpreter(path)

    def run(arrays):
        runner = interpreter.get_signature_runner()
        (output,) = runner(**arrays).values()
        return output

    return model, run, (79,)


EXPORTS = dict(
    zip(
        RUNTIMES,
        (saved_model, xla, c_host, onnx, open_vino, lite_rt, lite_rt_matrix),
        strict=True,
    )
)


def cells():
    for feature, row in MATRIX.items():
        for runtime, tolerance in row.items():
            if tolerance is not None:
                name = f"{feature}-{runtime}"
                if (feature, runtime) in QUICK:
                    yield pytest.param(feature, runtime, id=name)
                elif runtime in CONVERTED and feature not in KINDS:
                    yield exhaustive(feature, runtime, id=name)
                else:
                    slow = pytest.mark.slow
                    yield pytest.param(feature, runtime, marks=slow, id=name)


@functools.lru_cache(maxsize=2)
def answer(model, feature, length):
    arrays = batch_of(feature, 2, length)
    return tf.function(model, autograph=False)(arrays)["y"]


@pytest.mark.filterwarnings("ignore:.*jit_compile.*")
@pytest.mark.parametrize("feature, runtime", list(cells()))
def test_runtime_equals_keras(feature, runtime, tmp_path, host):
    model, run, lengths = EXPORTS[runtime](feature, tmp_path, host)
    for length in lengths:
        output = run(batch_of(feature, 2, length))
        error = np.abs(output - answer(model, feature, length)).max()
        print(feature, runtime, length, error)
        assert error < MATRIX[feature][runtime]


def table():
    """The matrix as it stands in the documentation."""
    lines = [
        "| | " + " | ".join(RUNTIMES) + " |",
        "| --- |" + " --- |" * len(RUNTIMES),
    ]
    for feature, row in MATRIX.items():
        cells = ("no" if x is None else f"{x:.0e}" for x in row.values())
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("e-0", "e-")


@pytest.mark.slow
def test_what_does_not_run_in_lite_rt_says_so(tmp_path):
    """Else the table would be too modest."""
    _, run, _ = lite_rt_matrix("constant decay", tmp_path, None)
    with pytest.raises(RuntimeError, match="FlexCumsum"):
        run(batch_of("constant decay", 2, 79))


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["near field", "sliding window"])
def test_open_vino_runs_the_matrix_where_it_fails_on_a_band(feature, tmp_path):
    openvino = pytest.importorskip("openvino")
    with pytest.raises(RuntimeError, match="Gather"):
        open_vino(feature, tmp_path / "linear", None)
    model = network(feature, None, None, "quadratic")
    folder = keras_kt.export_saved_model(model, tmp_path / "quadratic")
    arrays = batch_of(feature, 2, 79)
    output = openvino.compile_model(folder, "CPU", OPEN_VINO)(arrays)["y"]
    np.testing.assert_allclose(output, model(arrays)["y"], atol=1e-5)


@pytest.mark.slow
def test_lite_rt_needs_one_block():
    """Else docs/serving.md would be too modest: it has no loop over blocks."""
    length = 2048 // 3 + 100
    model = network("causal", 1, length, "linear")
    arrays = batch_of("causal", 1, length)
    runner = runtimes.lite_rt(lambda x: model({"x": x}), arrays)
    with pytest.raises(RuntimeError, match="SLICE"):
        runner(**arrays)


@pytest.mark.slow
def test_lite_rt_runs_the_exact_form():
    """The first token sees itself alone, a key of no weight beside others."""
    model = network("causal", 1, 79, "linear")
    x = 0.3 * np.ones((1, 79, 6), "float32")
    run = runtimes.lite_rt(lambda x: {"y": model({"x": x})["y"]}, {"x": x})
    x += runtimes.array(x.shape)
    x[:, 0] *= 300.0
    expected = model({"x": x})["y"]
    np.testing.assert_allclose(run(x=x)["y"], expected, atol=1e-4)


def test_documented_table_is_that_of_the_tests():
    written = re.search(
        r"<!-- matrix -->\n(.*?)\n<!-- end -->", PAGE.read_text(), re.DOTALL
    )
    assert written, table()
    assert written.group(1).strip() == table()
