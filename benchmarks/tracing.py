"""What it costs to trace, to start and to compile a layer with its gradient.

Operations of the graph, all function bodies counted, are exact; seconds are
those of this machine, so run them on a quiet one. Every row starts in a process
of its own, where nothing is traced or cached yet; two more fill the cache that
XLA keeps on disk, and compile from it.

    python benchmarks/tracing.py                # counts and seconds
    python benchmarks/tracing.py --counts-only  # on a busy machine
    python benchmarks/tracing.py --rows causal MultiHeadAttention --blocks 1
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

CAUSAL = {"use_causal_mask": True}
# Arguments of the layer, and of its call.
ROWS = {
    "bidirectional": ({}, {}),
    "causal": ({}, CAUSAL),
    "trigonometric": ({"feature_map": "trigonometric"}, {}),
    "causal trigonometric": ({"feature_map": "trigonometric"}, CAUSAL),
    "bidirectional decay": ({"decay": "constant"}, {}),
    "causal decay": ({"decay": "constant"}, CAUSAL),
    "bidirectional near field": ({"near_field": 64}, {}),
    "causal near field": ({"near_field": 64}, CAUSAL),
    "MultiHeadAttention": (None, {}),
    "causal MultiHeadAttention": (None, CAUSAL),
}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--rows",
        nargs="+",
        default=list(ROWS),
        choices=list(ROWS),
        help="layers",
    )
    add(
        "--blocks",
        type=int,
        nargs="+",
        default=[1, 4],
        help="layers of a model",
    )
    add("--batch", type=int, default=2, help="sequences")
    add("--length", type=int, default=1024, help="tokens")
    add("--heads", type=int, default=8, help="number")
    add("--head-dim", type=int, default=64, help="size")
    add("--dynamic", action="store_true", help="batch and length unknown")
    add("--counts-only", action="store_true", help="no seconds")
    add("--output", default="results/tracing", help="of .json and .md")
    add("--one", nargs=2, help=argparse.SUPPRESS)
    add("--compile-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import keras
import tensorflow as tf

import keras_kt

COLUMNS = {
    "operations": "operations",
    "trace": "trace, s",
    "first": "first step, s",
    "compile": "compile by XLA, s",
    "cached": "from its cache, s",
    "fit": "first `fit`, s",
    "built": "its optimizer built, s",
}


def model(args, name, blocks):
    """Residual blocks of one layer each."""
    arguments, call = ROWS[name]
    length = None if args.dynamic else args.length
    x = y = keras.Input((length, args.heads * args.head_dim))
    for _ in range(blocks):
        if arguments is None:
            layer = keras.layers.MultiHeadAttention(args.heads, args.head_dim)
        else:
            layer = keras_kt.KernelizedAttention(
                args.heads, args.head_dim, implementation="linear", **arguments
            )
        y = y + layer(y, y, **call)
    return keras.Model(x, y)


def step_of(network, jit_compile):
    """One step's loss and gradients as a function of a batch."""

    def step(batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(network(batch, training=True)))
        return loss, tape.gradient(loss, network.trainable_variables)

    return tf.function(step, jit_compile=jit_compile, autograph=False)


def operations(concrete):
    """Number of operations of a graph and of all its function bodies."""
    graph = concrete.graph.as_graph_def()
    bodies = [function.node_def for function in graph.library.function]
    return len(graph.node) + sum(map(len, bodies))


def timed(function):
    """Its result, and wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
    }


def measure(args, name, blocks):
    """One row."""
    network = model(args, name, blocks)
    batch = tf.random.normal(
        (args.batch, args.length, args.heads * args.head_dim)
    )
    if args.compile_only:
        return {"compile": first_compiled(network, batch)}
    step = step_of(network, False)
    spec = (
        tf.TensorSpec((None, None, batch.shape[2])) if args.dynamic else batch
    )
    concrete, trace = timed(lambda: step.get_concrete_function(spec))
    row = {"row": name, "blocks": blocks, "operations": operations(concrete)}
    if args.counts_only:
        return row
    row["trace"] = trace
    # With the trace, as a user waits for it.
    _, first = timed(lambda: concrete(batch)[0].numpy())
    row["first"] = {key: first[key] + trace[key] for key in first}
    row["compile"] = first_compiled(network, batch)
    row["fit"] = first_fit(args, name, blocks, batch, is_built=False)
    row["built"] = first_fit(args, name, blocks, batch, is_built=True)
    return row


def first_compiled(network, batch):
    """Seconds to trace, compile and run one step."""
    compiled = step_of(network, True)
    _, seconds = timed(lambda: compiled(batch)[0].numpy())
    return seconds


def first_fit(args, name, blocks, batch, is_built):
    """Seconds of one step by Keras, which is traced again where the first
    trace makes variables: those of an optimizer that is not built."""
    network = model(args, name, blocks)
    network.compile("adam", "mse", jit_compile=False)
    if is_built:
        network.optimizer.build(network.trainable_variables)
    _, seconds = timed(lambda: network.fit(batch, batch, verbose=0))
    return seconds


def table(record):
    """The rows as Markdown; of seconds the CPU's, the wall's in brackets."""
    rows = record["rows"]
    columns = [key for key in COLUMNS if key in rows[0]]
    lines = [
        "# First step",
        "",
        f"One training step, {record['machine']}, TensorFlow "
        f"{record['tensorflow']}, Keras {record['keras']}. Seconds are of the "
        "CPU, of the wall in brackets.",
        "",
        "| "
        + " | ".join(["layer", "blocks", *(COLUMNS[c] for c in columns)])
        + " |",
        "| " + " | ".join(["---"] * (2 + len(columns))) + " |",
    ]
    for row in rows:
        cells = [row["row"], str(row["blocks"]), f"{row['operations']:,}"]
        cells += [
            f"{row[c]['cpu']:.1f} ({row[c]['wall']:.1f})" for c in columns[1:]
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def in_own_process(name, blocks, *flags, **environment):
    """A row, measured where nothing else was traced."""
    one = "--one", name, str(blocks), *flags
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], *one],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def from_cache(name, blocks):
    """Seconds to compile a step that an earlier process compiled."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            os.environ.get("TF_XLA_FLAGS", ""),
            f"--tf_xla_persistent_cache_directory={folder}",
        )
        for _ in range(2):
            row = in_own_process(
                name, blocks, "--compile-only", TF_XLA_FLAGS=" ".join(flags)
            )
            if not any(Path(folder).iterdir()):
                sys.exit("TensorFlow has kept nothing of what XLA compiled.")
    return row["compile"]


def main():
    args = parse_args()
    if args.one:
        print(json.dumps(measure(args, args.one[0], int(args.one[1]))))
        return
    elsewhere = "compile_only", "one", "output"
    record = {
        "arguments": {
            k: v for k, v in vars(args).items() if k not in elsewhere
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "rows": [],
    }
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = [(name, n) for n in args.blocks for name in args.rows]
    for index, (name, blocks) in enumerate(pairs, 1):
        print(f"{name}, {blocks} blocks …", flush=True)
        row = in_own_process(name, blocks)
        if not args.counts_only:
            row["cached"] = from_cache(name, blocks)
        record["rows"].append(row)
        print(f"{index}/{len(pairs)} {json.dumps(record['rows'][-1])}")
        # Kept as it grows: a run takes minutes.
        text = json.dumps(record, indent=1) + "\n"
        path.with_suffix(".json").write_text(text)
        path.with_suffix(".md").write_text(table(record))
    print(f"wrote {path.with_suffix('.json')} and {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
