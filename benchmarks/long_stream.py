"""One stream of very many tokens: what a token costs, and what a state holds.

A causal layer takes random tokens one by one, in compiled calls of `--per-call`
of them. Half way the state is written to a file; the stream goes on, and then
again from the file: both second halves must be equal, bit for bit, and the
state's bytes those of the start throughout. Seconds are those of this machine,
so run it on a quiet one; the median of the last calls stands beside that of the
first ones.

    python benchmarks/long_stream.py                     # 10⁶ tokens
    python benchmarks/long_stream.py --tokens 20000      # a minute
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--tokens", type=int, default=1_000_000, help="of the stream"
    )
    parser.add_argument(
        "--per-call", type=int, default=1000, help="tokens of a call"
    )
    parser.add_argument(
        "--options",
        type=json.loads,
        default={"near_field": 16, "decay": "gated"},
        help="JSON of arguments of the layer",
    )
    parser.add_argument("--output", type=Path, help="where to write a record")
    args = parser.parse_args()
    if args.tokens % (2 * args.per_call):
        parser.error("--tokens must be a multiple of twice --per-call")
    return args


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import keras
import numpy as np
import tensorflow as tf

import keras_kt

WIDTH = 32


def main():
    args = parse_args()
    record = stream(args.tokens, args.per_call, args.options)
    print(json.dumps(record, indent=2))
    if args.output:
        args.output.write_text(json.dumps(record) + "\n")


def stream(tokens, per_call, options):
    """Runs a stream and half of it again; the record of what was seen."""
    keras.utils.set_random_seed(0)
    layer = keras_kt.KernelizedAttention(4, 8, seed=0, **options)
    layer(*[tf.zeros((1, 1, WIDTH))] * 2)
    run = compiled(layer)
    calls = tokens // per_call
    start = layer.initial_state(1)
    print("Compiling …", flush=True)
    run(start, inputs(0, per_call))  # traces
    said = time.monotonic()
    state, outputs, seconds, sizes = start, [], [], {bytes_of(start)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.npz"
        for call in range(calls):
            if time.monotonic() - said >= 10.0:
                said = time.monotonic()
                print(f"{call * per_call:,} of {tokens:,} tokens", flush=True)
            if call == calls // 2:
                np.savez(file, *tf.nest.flatten(state))
            tokens_of_call = inputs(call, per_call)
            began = time.perf_counter()
            state, output = run(state, tokens_of_call)
            outputs.append(output.numpy())
            seconds.append((time.perf_counter() - began) / per_call)
            sizes.add(bytes_of(state))
        with np.load(file) as arrays:
            again = tf.nest.pack_sequence_as(
                start, [arrays[name] for name in arrays.files]
            )
    print("The second half again, from the file …", flush=True)
    for call in range(calls // 2, calls):
        again, output = run(again, inputs(call, per_call))
        np.testing.assert_array_equal(output, outputs[call])
    for one, other in zip(*map(tf.nest.flatten, (state, again)), strict=True):
        np.testing.assert_array_equal(one, other)
    if len(sizes) != 1:
        raise AssertionError(f"bytes of the state: {sorted(sizes)}")
    if not all(np.isfinite(output).all() for output in outputs):
        raise AssertionError("an output is not finite")
    few = max(1, min(10, calls // 4))
    # The first thousands, but the first call, which may warm things up.
    first = statistics.median(seconds[1 : few + 1] or seconds)
    last = statistics.median(seconds[-few:])
    return {
        "tokens": tokens,
        "options": options,
        "state_bytes": sizes.pop(),
        "first_microseconds": 1e6 * first,
        "last_microseconds": 1e6 * last,
        "last_by_first": last / first,
        "restart_equals": True,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "tensorflow": tf.__version__,
    }


def compiled(layer):
    """`(state, tokens)` to the state after them, one by one, and outputs."""

    @tf.function(jit_compile=True, autograph=False)
    def run(state, tokens):
        per_call = tokens.shape[1]

        def add(i, state, outputs):
            output, state = layer.step(tokens[:, i][:, tf.newaxis], state)
            return i + 1, state, outputs.write(i, output[0, 0])

        outputs = tf.TensorArray(tf.float32, per_call, element_shape=(WIDTH,))
        first = 0, state, outputs
        _, state, outputs = tf.while_loop(
            lambda i, *_: i < per_call, add, first
        )
        return state, outputs.stack()

    return run


def inputs(call, per_call):
    """The tokens of a call, `(1, per_call, WIDTH)`."""
    return tf.random.stateless_normal((1, per_call, WIDTH), [call, 7])


def bytes_of(state):
    return sum(x.numpy().nbytes for x in tf.nest.flatten(state))


if __name__ == "__main__":
    main()
