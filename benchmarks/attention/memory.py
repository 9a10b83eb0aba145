"""Peak memory of a training step of the core."""

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import tensorflow as tf

from benchmarks.attention.columns import (
    backward,
    core_columns,
    is_affordable,
    make_inputs,
)
from benchmarks.attention.timing import wait

ROOT = Path(__file__).resolve().parents[2]


def memory(args):
    """Peak memory of one call beyond its inputs, each in its own process."""
    rows = []
    for length in args.lengths:
        for name, jit in (
            ("ours", "XLA"),
            ("ours", "no-XLA"),
            ("ours causal", "XLA"),
            ("ours causal", "no-XLA"),
            ("softmax", "XLA"),
            ("softmax", "no-XLA"),
        ):
            batch = max(1, args.tokens // length)
            if not is_affordable(name, args, batch, length):
                continue
            row = peak(args, name, batch, length, jit)
            rows.append(row)
            print(
                f"  {name:12s} {jit:6s} {length:7d} tokens: peak "
                f"{row['peak'] / 2**20:9.1f} MiB, "
                f"{row['peak'] / row['tensors']:.2f} x q, k, v, output and "
                "their gradients",
                flush=True,
            )
    return rows


def peak(args, name, batch, length, jit):
    """`peak_of_one` of a process of its own."""
    command = [
        sys.executable,
        *("-m", "benchmarks.attention"),
        *("--peak", name, str(batch), str(length), jit),
        *("--heads", str(args.heads)),
        *("--head-dim", str(args.head_dim)),
        *("--features", str(args.features)),
        *("--window", str(args.window)),
    ]
    output = subprocess.run(
        command,
        cwd=ROOT,
        # This process's packages, wherever they come from.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def peak_of_one(args, name, batch, length, jit):
    """Child process: resident peak of a later call, over the idle level."""
    function = backward(core_columns(args)[name])
    inputs = make_inputs(args, "core", batch, length)
    compiled = tf.function(function, jit_compile=jit == "XLA")
    wait(compiled(*inputs))
    gc.collect()
    # What the allocator keeps of the first call would hide part of the peak.
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    results = compiled(*inputs)
    wait(results)
    size = inputs[0].shape.num_elements() * 4
    row = {
        "column": name,
        "length": length,
        "xla": jit == "XLA",
        # The inputs were there before.
        "peak": _status("VmHWM") - before + 3 * size,
        "tensors": 8 * size,
    }
    print(json.dumps(row))


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(field)
