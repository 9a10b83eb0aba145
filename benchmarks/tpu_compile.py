"""Compiles training and serving for TPUs, with no TPU attached.

TensorFlow lowers each program to StableHLO by its own XLA bridge; `libtpu`,
Google's TPU compiler, compiles that for a named topology, or refuses it, and
says how much memory it takes. Nothing is run: this shows that a program
compiles and fits, not how fast it is. Stock TensorFlow has XLA kernels for CPUs
and GPUs only, so those are what it lowers with.

    pip install -e '.[tpu-check]'
    python benchmarks/tpu_compile.py             # priors × maps × programs
    python benchmarks/tpu_compile.py --lengths   # memory per length
"""

import argparse
import gc
import json
import os
import re
import time
from pathlib import Path

os.environ.update(
    {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "-1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_LOG_DIR": "disabled",
        # Else a second process at the same time fails on a lock file.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # These silence warnings; the topology is the target.
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        **os.environ,
    }
)

import jax
import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from jax._src.interpreters import mlir
from jax._src.lib import _jax, xla_client
from jax.experimental import topologies
from jaxlib import _hlo
from jaxlib.mlir import ir

import keras_kt
from keras_kt import numerics
from keras_kt.ops import blocks

HEADS, KEY_DIM = 4, 64
WIDTH = HEADS * KEY_DIM
POLICIES = ("float32", "mixed_bfloat16")
FORMS = ("bidirectional", "causal")
LENGTHS = (1024, 8192, 32768, 131072)
MIB = 2**20


@keras.saving.register_keras_serializable(package="tpu_compile")
def laplace(parameters):
    scale = tf.nn.softplus(parameters["scale"])
    return tfp.distributions.Independent(
        tfp.distributions.Laplace(parameters["loc"], scale), 1
    )


PRIORS = {
    "normal": keras_kt.NormalPrior,
    "mixture": lambda: keras_kt.MixturePrior(num_components=2),
    "fastfood": keras_kt.FastFoodPrior,
    "generator": keras_kt.GeneratorPrior,
    "distribution": lambda: keras_kt.DistributionPrior(
        laplace,
        {"loc": "zeros", "scale": "ones"},
        has_moment_generating_function=True,
    ),
}
MAPS = ("positive", "trigonometric")


def main():
    args = parse_args()
    # What the layer does where a TPU is visible.
    blocks.CPU_BLOCK_ROWS = args.block_rows
    blocks.CPU_CAUSAL_BLOCK_ROWS = causal_rows(args)
    numerics._rounds_products = lambda: True
    device = topologies.get_topology_desc(
        platform="tpu", topology_name=args.topology
    ).devices[0]
    print(
        f"{device.device_kind}, jax {jax.__version__}, tensorflow "
        f"{tf.__version__}, keras {keras.__version__}; batch {args.batch}, "
        f"{HEADS} heads of {KEY_DIM}, blocks of {args.block_rows} rows"
    )
    programs = length_programs if args.lengths is not None else all_programs
    rows = recorded(args, device)
    for labels, make in programs(args):
        if any(labels.items() <= row.items() for row in rows):
            continue
        rows.append({**labels, **compile_program(make, device)})
        if args.lengths is not None:
            rows[-1]["counted_flops"] = count_flops(labels, args)
        print(describe(rows[-1]), flush=True)
        save(rows, args, device)
        keras.backend.clear_session()
        gc.collect()
    refused = [row for row in rows if "refused" in row]
    print(f"{len(rows) - len(refused)} compiled, {len(refused)} refused")
    if args.lengths is not None:
        print_lengths("MiB", rows, temporary_mib)
        print_lengths("GFLOP", rows, lambda row: row["counted_flops"] / 1e9)
    print(f"Results: {args.output}")
    # A softmax matrix may be too large; of ours, all must compile.
    return any(row["attention"] != "softmax" for row in refused)


def causal_rows(args):
    """Rows of a causal block, which holds more for each."""
    return min(args.block_rows, blocks.ACCELERATOR_CAUSAL_BLOCK_ROWS)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--topology", default="v5e:2x2", help="default: %(default)s")
    add("--priors", nargs="+", choices=PRIORS, default=list(PRIORS))
    add("--maps", nargs="+", choices=MAPS, default=MAPS)
    add("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    add("--forms", nargs="+", choices=FORMS, default=FORMS)
    add("--batch", type=int, default=1, help="default: %(default)s")
    add("--length", type=int, default=512, help="without --lengths")
    add("--lengths", type=int, nargs="*", help=f"memory; default {LENGTHS}")
    add(
        "--block-rows",
        type=int,
        default=blocks.ACCELERATOR_BLOCK_ROWS,
        help="default: those of an accelerator, %(default)s",
    )
    add("--output", type=Path, default="results/tpu.json")
    args = parser.parse_args()
    if args.lengths == []:
        args.lengths = list(LENGTHS)
    return args


def all_programs(args):
    """Every prior × map × policy × program, as (labels, maker)."""
    for policy in args.policies:
        for prior in args.priors:
            for feature_map in args.maps:
                for form in args.forms:
                    for kind in ("forward", "train"):
                        labels = {
                            "attention": f"{prior} {feature_map}",
                            "policy": policy,
                            "form": form,
                            "program": kind,
                            "length": args.length,
                        }
                        yield labels, maker(labels, args)
                labels = {**labels, "form": "decode", "program": "step"}
                yield {**labels, "length": 1}, maker(labels, args)


def length_programs(args):
    for length in args.lengths:
        for policy in args.policies:
            for name in ("softmax", "normal positive", "normal trigonometric"):
                for form in args.forms:
                    labels = {
                        "attention": name,
                        "policy": policy,
                        "form": form,
                        "program": "train",
                        "length": length,
                    }
                    yield labels, maker(labels, args)


def maker(labels, args):
    """A function that makes `(function, specs)` of a program."""

    def make():
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(labels["policy"])
        layer = make_attention(labels["attention"], labels["program"])
        if labels["program"] == "step":
            return decode_step(layer, args.batch)
        shape = args.batch, labels["length"], WIDTH
        is_causal = labels["form"] == "causal"
        model = make_model(layer, shape, is_causal)
        if labels["program"] == "forward":
            return model, [tf.TensorSpec(shape)]
        return train_step(model), [
            tf.TensorSpec(shape),
            tf.TensorSpec((args.batch, 1)),
        ]

    return make


def make_attention(name, program):
    if name == "softmax":
        return keras.layers.MultiHeadAttention(HEADS, KEY_DIM)
    prior, feature_map = name.split()
    return keras_kt.KernelizedAttention(
        HEADS,
        KEY_DIM,
        spectral_prior=PRIORS[prior](),
        feature_map=feature_map,
        # So that drawing is part of what must compile.
        redraw="step" if program == "train" else "never",
        seed=0,
    )


def make_model(layer, shape, is_causal):
    x = keras.Input(batch_shape=shape, dtype="float32")
    normed = keras.layers.LayerNormalization()(x)
    y = normed + layer(normed, normed, use_causal_mask=is_causal)
    y = keras.layers.GlobalAveragePooling1D()(y)
    return keras.Model(x, keras.layers.Dense(1, dtype="float32")(y))


def train_step(model):
    """Forward, backward and optimizer, on the variables themselves."""
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return loss

    return step


def decode_step(layer, batch):
    token = tf.zeros((batch, 1, WIDTH), layer.compute_dtype)
    state = layer.initial_state(batch)
    layer.step(token, state)  # builds the layer

    def step(token, *state):
        return layer.step(token, keras_kt.AttentionState(*state))

    return step, [tf.TensorSpec(x.shape, x.dtype) for x in (token, *state)]


def compile_program(make, device):
    """Memory and cost of a compiled program, or why it was refused."""
    start = time.perf_counter()
    function, specs = make()
    proto = lower(function, specs)
    text = _hlo.HloModule.from_serialized_hlo_module_proto(proto).to_string()
    lowered = time.perf_counter()
    result = {"lower_seconds": lowered - start, "longest_window": window(text)}
    try:
        executable = compile_hlo(proto, text, device)
    except jax.errors.JaxRuntimeError as error:
        return {**result, "refused": reason(str(error))}
    memory = executable.get_compiled_memory_stats()
    return {
        **result,
        "compile_seconds": time.perf_counter() - lowered,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "flops": executable.cost_analysis()["flops"],
    }


def count_flops(labels, args):
    """Operations of a program, from those of one block.

    A compiled program's own count takes the body of a loop once. What lies
    outside blocks grows with the length too, but for the draw and Adam.
    """
    length = labels["length"]
    if labels["attention"] != "softmax":
        is_causal = labels["form"] == "causal"
        rows = causal_rows(args) if is_causal else args.block_rows
        length = min(length, rows // HEADS, blocks.MAX_BLOCK)
    count = labels["length"] / length
    proto = lower(*maker({**labels, "length": length}, args)())
    module = _hlo.HloModule.from_serialized_hlo_module_proto(proto)
    client = jax.devices("cpu")[0].client
    return count * _jax.hlo_module_cost_analysis(client, module)["flops"]


def lower(function, specs):
    """A serialised HLO module, by TensorFlow's XLA bridge."""
    function = tf.function(function, jit_compile=True, autograph=False)
    return function.experimental_get_compiler_ir(*specs)(stage="hlo_serialized")


def compile_hlo(proto, text, device):
    # StableHLO has no word for the copies that TensorFlow makes of variables.
    if " copy(" in text:
        module = _hlo.hlo_module_from_text(text.replace(" copy(", " reshape("))
        proto = module.as_serialized_hlo_module_proto()
    options = xla_client.CompileOptions()
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.array([[device.id]], "int32")
    )
    with mlir.make_ir_context():
        return device.client.compile(
            ir.Module.parse(_jax.mlir.hlo_to_stablehlo(proto)),
            executable_devices=xla_client.DeviceList((device,)),
            compile_options=options,
        )


def window(text):
    """The longest window that a program sums over, as a cumsum does."""
    windows = re.findall(r"window=\{size=([\dx]+)", text)
    return max([int(n) for w in windows for n in w.split("x")], default=0)


def reason(message):
    used = re.search(r"Used [\w.]+ of [\w.]+ hbm", message)
    return used.group() if used else message.splitlines()[0][:200]


def describe(row):
    labels = "{policy:15s} {attention:26s} {form:14s} {program:8s}"
    text = labels.format(**row) + f"{row['length']:7d} "
    if "refused" in row:
        return f"{text} REFUSED: {row['refused']}"
    return (
        f"{text} {row['temporary_bytes'] / MIB:9.1f} MiB temporary, "
        f"{row['flops']:.3g} flops, compiled in {row['compile_seconds']:.1f} s"
    )


def temporary_mib(row):
    return None if "refused" in row else row["temporary_bytes"] / MIB


def print_lengths(unit, rows, value):
    """A Markdown table of a value over lengths; `None` was refused."""
    lengths = sorted({row["length"] for row in rows})
    table = {}
    for row in rows:
        key = row["attention"], row["form"], row["policy"]
        number = value(row)
        cell = "refused" if number is None else f"{number:,.0f}"
        table.setdefault(key, {})[row["length"]] = cell
    print(f"\n| {unit} | " + " | ".join(f"{n:,}" for n in lengths) + " |")
    print("|" + " --- |" * (len(lengths) + 1))
    for key, cells in sorted(table.items()):
        print(f"| {', '.join(key)} | " + " | ".join(cells.values()) + " |")


def recorded(args, device):
    """What an interrupted run of the same settings has written."""
    saved = read(args).get(part(args), {})
    same = {key: saved.get(key) for key in settings(args, device)}
    return saved["rows"] if same == settings(args, device) else []


def save(rows, args, device):
    """Keeps what the other mode has written."""
    record = {
        **read(args),
        part(args): {**settings(args, device), "rows": rows},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1)
    # Each row in one line.
    rows = re.compile(r"\{[^{}]*\}")
    text = rows.sub(lambda row: " ".join(row[0].split()), text)
    args.output.write_text(text + "\n")


def read(args):
    return json.loads(args.output.read_text()) if args.output.exists() else {}


def part(args):
    return "programs" if args.lengths is None else "lengths"


def settings(args, device):
    """What all rows of a record must share."""
    return {
        "batch": args.batch,
        "block_rows": args.block_rows,
        "topology": args.topology,
        "device": device.device_kind,
        "versions": {m.__name__: m.__version__ for m in (jax, tf, keras)},
    }


if __name__ == "__main__":
    raise SystemExit(main())
