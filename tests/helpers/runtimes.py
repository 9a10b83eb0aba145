"""Runtimes without Keras: a C program, and LiteRT, as functions of arrays."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import kernel_def_pb2
from tensorflow.core.protobuf import saved_model_pb2

ROOT = Path(__file__).parents[2]
TENSORFLOW = Path(tf.sysconfig.get_lib())


def c_program(folder):
    """The C program of tests/serving: a function of its script."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc to compile tests/serving/host.c")
    program = folder / "host"
    subprocess.run(
        [
            compiler,
            *("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror"),
            str(ROOT / "tests" / "serving" / "host.c"),
            f"-I{tf.sysconfig.get_include()}",
            f"-L{TENSORFLOW}",
            *("-l:libtensorflow_cc.so.2", "-l:libtensorflow_framework.so.2"),
            f"-Wl,-rpath,{TENSORFLOW}",
            *("-o", str(program)),
        ],
        check=True,
    )
    libraries = subprocess.run(
        ["ldd", program], capture_output=True, text=True, check=True
    )
    assert "libpython" not in libraries.stdout

    def run(script):
        done = subprocess.run(
            [program],
            input="".join(f"{line}\n" for line in script),
            env={"TF_CPP_MIN_LOG_LEVEL": "2"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)

    return run


def meta_graph(folder):
    message = saved_model_pb2.SavedModel()
    message.ParseFromString((Path(folder) / "saved_model.pb").read_bytes())
    return message.meta_graphs[0]


def write_tensors(path, arrays):
    with open(path, "wb") as file:
        for name, array in arrays.items():
            array = np.asarray(array)
            dtype = tf.as_dtype(array.dtype)
            header = (name, dtype.as_datatype_enum, array.ndim, *array.shape)
            file.write(" ".join(map(str, header)).encode() + b"\n")
            if dtype == tf.string:
                for string in array.ravel():
                    file.write(b"%d\n%s" % (len(string), string))
            else:
                file.write(array.tobytes())


def read_tensors(path):
    arrays = {}
    with open(path, "rb") as file:
        while header := file.readline().split():
            name, dtype, _, *shape = header
            dtype = tf.as_dtype(int(dtype)).as_numpy_dtype
            shape = tuple(map(int, shape))
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            array = np.frombuffer(file.read(size), dtype).reshape(shape)
            arrays[name.decode()] = array
    return arrays


def run_line(signature, feeds, fetches):
    """A `run` of an endpoint; feeds and fetches: variables by name."""
    words = ["run"]
    words += [f"{signature.inputs[k].name}={v}" for k, v in feeds.items()]
    words += ["->"]
    words += [f"{v}={signature.outputs[k].name}" for k, v in fetches.items()]
    return " ".join(words)


def serve(host, folder, inputs, tmp_path, libraries=(), endpoint="serve"):
    """What the C program gets from an endpoint, by output name."""
    signature = meta_graph(folder).signature_def[endpoint]
    names = sorted(signature.outputs)
    assert set(signature.inputs) == set(inputs)
    write_tensors(tmp_path / "inputs", inputs)
    host(
        [
            *(f"library {library}" for library in libraries),
            f"model {folder}",
            f"read {tmp_path / 'inputs'}",
            run_line(signature, {k: k for k in inputs}, {k: k for k in names}),
            f"write {tmp_path / 'outputs'} {' '.join(names)}",
        ]
    )
    return read_tensors(tmp_path / "outputs")


def ops_without_kernel(host, folder, tmp_path, libraries=()):
    """Ops of a SavedModel that no kernel of a process without Python runs."""
    path = tmp_path / "kernels"
    host([*(f"library {x}" for x in libraries), f"kernels {path}"])
    kernels = kernel_def_pb2.KernelList()
    kernels.ParseFromString(path.read_bytes())
    graph = meta_graph(folder).graph_def
    functions = graph.library.function
    used = {node.op for node in graph.node}
    used.update(node.op for f in functions for node in f.node_def)
    used -= {f.signature.name for f in functions}
    return used - {kernel.op for kernel in kernels.kernel}


def lite_rt(function, examples):
    """A function of tensors, converted, as the LiteRT interpreter runs it."""
    from ai_edge_litert.interpreter import Interpreter

    specs = [tf.TensorSpec(x.shape, x.dtype, k) for k, x in examples.items()]
    concrete = tf.function(
        function, input_signature=specs, autograph=False
    ).get_concrete_function()
    # With its owner, or the converter drops the signature and its names.
    owner = tf.Module()
    owner.function, owner.variables_used = concrete, concrete.variables
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [concrete], owner
    )
    interpreter = Interpreter(model_content=converter.convert())
    return interpreter.get_signature_runner()


def array(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype("float32")
