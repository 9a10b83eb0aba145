"""Short sequences, options and single tokens, as ratios to what they replace.

Of a training step of the layer to `MultiHeadAttention`, of the matrix to the
linear form where `"auto"` chooses between them, of options to attention
without them, and of one token of a stream to the same products in NumPy. What
is compared runs in turn, with XLA and without; where times of a table spread by
more than 15 % (interquartile range over median, the median of its rows), they
are taken again, and not written if they still do.

    python -m benchmarks.ratios
"""

import argparse
import functools
import json
import os
import platform
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

LENGTHS = (64, 128, 256, 384, 512, 1024)
ROUTE_LENGTHS = (32, 64, 128)
SECTIONS = ("short", "routes", "options", "steps")


def parse_args():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ratios",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--sections",
        nargs="+",
        default=SECTIONS,
        choices=SECTIONS,
        help="what is timed; others are kept as they were",
    )
    add("--heads", nargs="+", default=["4x16", "8x32", "8x64"], help="layouts")
    add("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    add(
        "--route-lengths",
        type=int,
        nargs="+",
        default=ROUTE_LENGTHS,
        help="tokens, of the matrix and the linear form",
    )
    add("--tokens", type=int, default=8192, help="batch × length of layers")
    add("--core-length", type=int, default=4096, help="tokens, of options")
    add("--batches", type=int, nargs="+", default=[1, 32], help="of steps")
    add("--steps", type=int, default=256, help="tokens of a loop")
    add("--repeats", type=int, default=9, help="of each time")
    add("--spread", type=float, default=0.15, help="most that is written")
    add("--output", type=Path, default="results/ratios", help="no suffix")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import keras
import numpy as np
import tensorflow as tf

import keras_kt
from benchmarks.attention.columns import backward
from benchmarks.attention.timing import measure_steadily

MODES = {"graph": False, "XLA": True}
ROUTES = {"matrix": "quadratic", "linear": "linear"}


def main():
    args = parse_args()
    path = args.output.with_suffix(".json")
    record = json.loads(path.read_text()) if path.exists() else {}
    record["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    record["tensorflow"] = tf.__version__
    rows = {
        "short": short_rows,
        "routes": route_rows,
        "options": options_rows,
        "steps": steps_rows,
    }
    for section in args.sections:
        record[section] = {
            "arguments": {
                k: v
                for k, v in vars(args).items()
                if k not in ("output", "sections")
            },
            "rows": list(rows[section](args)),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(tables(record))


def short_rows(args):
    """Training steps of layers and of `MultiHeadAttention`."""
    for found in _layer_rows(
        args,
        args.lengths,
        softmax=keras.layers.MultiHeadAttention,
        ours=functools.partial(keras_kt.KernelizedAttention, seed=0),
    ):
        softmax, ours = found["softmax"], found["ours"]
        yield _row(**found, ratio=min(softmax.values()) / min(ours.values()))


def route_rows(args):
    """Training steps of layers by the matrix and by the linear form."""
    layers = {
        name: functools.partial(
            keras_kt.KernelizedAttention, seed=0, implementation=implementation
        )
        for name, implementation in ROUTES.items()
    }
    for found in _layer_rows(args, args.route_lengths, **layers):
        matrix, linear = (found[name] for name in ROUTES)
        ratio = {mode: round(matrix[mode] / linear[mode], 3) for mode in MODES}
        yield _row(**found, ratio=ratio)


def _layer_rows(args, lengths, **kinds):
    """Seconds of training steps of kinds of layers, by heads and length."""
    rng = np.random.default_rng(0)
    for layout in args.heads:
        heads, dim = map(int, layout.split("x"))
        layers = {name: kind(heads, dim) for name, kind in kinds.items()}
        for length in lengths:
            shape = max(1, args.tokens // length), length, heads * dim
            x = tf.constant((0.35 * rng.normal(size=shape)).astype("float32"))
            runs = {
                (name, causal): _attends(layer, causal)
                for name, layer in layers.items()
                for causal in (False, True)
            }
            times = in_turn(runs, [x], args)
            for causal in (False, True):
                yield {
                    "keys": {
                        "heads": layout,
                        "length": length,
                        "causal": causal,
                    },
                    **{name: times[name, causal] for name in layers},
                }


def _attends(layer, causal):
    return backward(lambda x: layer(x, x, use_causal_mask=causal))


def options_rows(args):
    """Training steps of the core with an option, and without."""
    options = {
        "no option": {},
        'decay="constant"': {"decay": "constant"},
        "near_field=64": {"near_field": 64},
        "sliding_window=256": {"sliding_window": 256},
        "trigonometric features": {"feature_map": "trigonometric"},
        "self-normalized features": {
            "feature_map": keras_kt.PositiveFeatures("self")
        },
    }
    layers = {
        name: keras_kt.LinearAttention(8, 64, num_features=128, **kwargs)
        for name, kwargs in options.items()
    }
    rng = np.random.default_rng(0)
    shape = 1, args.core_length, 8, 64
    inputs = [
        tf.constant((0.35 * rng.normal(size=shape)).astype("float32"))
        for _ in range(3)
    ]
    for causal in (False, True):
        runs = {
            name: backward(
                lambda *x, layer=layer, causal=causal: layer(
                    *x, use_causal_mask=causal
                )
            )
            for name, layer in layers.items()
        }
        times = in_turn(runs, inputs, args)
        plain = min(times["no option"].values())
        for name, modes in times.items():
            yield _row(
                {"option": name, "causal": causal},
                ours=modes,
                ratio=min(modes.values()) / plain,
            )


def steps_rows(args):
    """One token of a layer in a loop, and its products in NumPy."""
    layer = keras_kt.KernelizedAttention(8, 64, num_features=128, seed=0)
    layer.build((None, 1, 512), (None, 1, 512))
    for batch in args.batches:
        x = np.random.default_rng(0).normal(size=(batch, 1, 512))
        x = tf.constant(x.astype("float32"))

        def stream(x, batch=batch):
            def step(x, state):
                y, state = layer.step(x, state)
                return tf.tanh(y), state

            state = layer.initial_state(batch)
            return tf.while_loop(
                lambda *_: True, step, (x, state), maximum_iterations=args.steps
            )[0]

        runs = {"ours": stream}
        products = numpy_products(x.numpy(), args.steps)
        times = in_turn(runs, [x], args, {"NumPy": products})
        # In milliseconds of a token, not of the loop.
        times = {
            name: {mode: t / args.steps for mode, t in modes.items()}
            for name, modes in times.items()
        }
        (numpy,) = times["NumPy"].values()
        for mode, seconds in times["ours"].items():
            yield _row(
                {"batch": batch, "mode": mode},
                ours={mode: seconds},
                numpy={"": numpy},
                ratio=seconds / numpy,
            )


def numpy_products(x, steps):
    """The products of a token of 8 heads of 64, as often: its floor.

    Args:
        x: `(batch, 1, 512)`.
        steps: how often.

    Returns:
        A function without arguments, of which weights are no part.
    """
    rng = np.random.default_rng(1)
    batch = x.shape[0]
    weights = rng.normal(size=(4, 512, 512), scale=0.04).astype("float32")
    omega = rng.normal(size=(8, 64, 64), scale=0.1).astype("float32")
    state = np.zeros((batch, 8, 65, 128), "float32")
    ones = np.ones((batch, 8, 1), "float32")

    def run():
        y = x[:, 0]
        state[...] = 0.0
        for _ in range(steps):
            query, key, value = (
                (y @ w).reshape(batch, 8, 64) for w in weights[:3]
            )
            query, key = (
                np.matmul(z.transpose(1, 0, 2), omega).transpose(1, 0, 2)
                for z in (query, key)
            )
            query, key = (np.concatenate([z, -z], -1) for z in (query, key))
            value = np.concatenate([value, ones], -1)
            np.add(
                state,
                value[..., np.newaxis] * key[:, :, np.newaxis],
                out=state,
            )
            read = np.matmul(state, query[..., np.newaxis])[:, :, :64, 0]
            y = 1e-3 * read.reshape(batch, 512) @ weights[3]
        return tf.constant(y)

    return run


def in_turn(runs, inputs, args, plain=()):
    """Median seconds of functions, with XLA and without.

    Args:
        runs: functions by name, which TensorFlow compiles.
        inputs: what they are called with.
        args: of the command line.
        plain: functions by name, called as they are, without arguments.

    Returns:
        Seconds by name and mode.
    """
    calls = {}
    for name, run in runs.items():
        for mode, jit in MODES.items():
            compiled = tf.function(run, jit_compile=jit, autograph=False)
            calls[name, mode] = lambda run=compiled: run(*inputs)
    for name, run in dict(plain).items():
        calls[name, ""] = run
    _, seconds = measure_steadily(calls, args.repeats, args.spread)
    times = {}
    for (name, mode), values in seconds.items():
        times.setdefault(name, {})[mode] = float(np.median(values))
    return times


def _row(keys, ratio, **columns):
    """A row, in milliseconds; printed."""
    row = {
        **keys,
        **{
            name: {mode: round(1e3 * t, 4) for mode, t in modes.items()}
            for name, modes in columns.items()
        },
        "ratio": ratio if isinstance(ratio, dict) else round(ratio, 3),
    }
    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def tables(record):
    """Markdown: a table of each section."""
    lines = []
    if "short" in record:
        lines += ["# Short sequences", ""]
        lines += _by_length(record["short"]["rows"], "{:.2f}".format)
    if "routes" in record:
        lines += ["# Matrix over linear form", ""]
        lines += _by_length(
            record["routes"]["rows"], lambda x: _modes(x, "{:.2f}")
        )
    if "options" in record:
        rows = record["options"]["rows"]
        lines += ["# Options", "", "| option | bidirectional | causal |"]
        lines.append("| --- | --- | --- |")
        for name in dict.fromkeys(row["option"] for row in rows):
            cells = [
                f"{row['ratio']:.2f} ({_modes(row['ours'], '{:.0f}')})"
                for row in rows
                if row["option"] == name
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    if "steps" in record:
        lines += ["# One token", "", "| batch | loop | ms | NumPy's | ratio |"]
        lines.append("| --- | --- | --- | --- | --- |")
        lines += [
            f"| {row['batch']} | {row['mode']} | {row['ours'][row['mode']]:.2f}"
            f" | {row['numpy']['']:.2f} | {row['ratio']:.2f} |"
            for row in record["steps"]["rows"]
        ]
        lines.append("")
    return "\n".join(lines)


def _by_length(rows, written):
    """Lines of a table: a row for each length, a column for each layer."""
    layouts = list(dict.fromkeys(row["heads"] for row in rows))
    columns = [
        f"{x.replace('x', ' × ')}{kind}"
        for x in layouts
        for kind in ("", ", causal")
    ]
    lines = [
        f"| tokens | {' | '.join(columns)} |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for length in dict.fromkeys(row["length"] for row in rows):
        cells = [
            written(row["ratio"])
            for layout in layouts
            for row in rows
            if (row["heads"], row["length"]) == (layout, length)
        ]
        lines.append(f"| {length:,} | {' | '.join(cells)} |")
    return [*lines, ""]


def _modes(times, form):
    return ", ".join(form.format(times[mode]) for mode in MODES)


if __name__ == "__main__":
    main()
