"""An exact sliding window against plain causal attention: time and memory.

Of the core, heads in and out, at batch 1. Both columns run in turn, so that a
busy machine slows them alike: read ratios, not milliseconds.

    python benchmarks/window.py                 # 16,384 and 65,536 tokens
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[16384, 65536], help="tokens")
    add("--window", type=int, default=256, help="keys")
    add("--heads", type=int, default=8, help="number")
    add("--head-dim", type=int, default=64, help="size")
    add("--features", type=int, default=128, help="D")
    add("--repeats", type=int, default=5, help="of each time")
    add("--no-memory", action="store_true", help="times only")
    add("--output", type=Path, help="a JSON file for the record")
    parser.set_defaults(model_garden=None)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import numpy as np
import tensorflow as tf

from benchmarks.attention.columns import (
    WINDOW,
    backward,
    core_columns,
    make_inputs,
)
from benchmarks.attention.memory import peak
from benchmarks.attention.timing import measure

CAUSAL = "ours causal"


def main():
    args = parse_args()
    record = {
        "arguments": {k: v for k, v in vars(args).items() if k != "output"},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "tensorflow": tf.__version__,
        "rows": [],
    }
    for length in args.lengths:
        print(f"{length:,} tokens, compiling …", flush=True)
        for row in rows_of(args, length):
            record["rows"].append(row)
            words = [f"{name} {value}" for name, value in row.items()]
            print("  ".join(words), flush=True)
    if args.output:
        args.output.write_text(json.dumps(record) + "\n")


def rows_of(args, length):
    """Medians of both columns in every mode, and peaks of training steps."""
    inputs = make_inputs(args, "core", 1, length)
    columns = {name: core_columns(args)[name] for name in (CAUSAL, WINDOW)}
    runs = {}
    for name, function in columns.items():
        for mode, wanted in (
            ("forward", function),
            ("forward + backward", backward(function)),
        ):
            for jit in (False, True):
                compiled = tf.function(wanted, jit_compile=jit, autograph=False)
                runs[mode, jit, name] = lambda run=compiled: run(*inputs)
    _, seconds = measure(runs, args.repeats)
    for mode, jit in dict.fromkeys(key[:2] for key in runs):
        causal, window = (
            1e3 * float(np.median(seconds[mode, jit, name])) for name in columns
        )
        row = {"tokens": length, "mode": mode, "XLA": jit}
        row |= {"causal ms": round(causal, 1), "window ms": round(window, 1)}
        yield {**row, "ratio": round(window / causal, 2)}
    for jit in () if args.no_memory else ("no-XLA", "XLA"):
        causal, window = (
            peak(args, name, 1, length, jit)["peak"] / 2**20 for name in columns
        )
        row = {"tokens": length, "mode": "peak", "XLA": jit == "XLA"}
        row |= {"causal MiB": round(causal), "window MiB": round(window)}
        yield {**row, "ratio": round(window / causal, 2)}


if __name__ == "__main__":
    main()
