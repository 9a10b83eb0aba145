"""Time and memory of attention against its peers and the device's own GEMMs.

Every column runs at the same batch × length. Repeats are interleaved, so that
a busy machine slows all columns alike: read ratios, not milliseconds. Before
anything is timed, each column is compared with float64 softmax attention, and
ours with its own kernel formed explicitly.

    python benchmarks/attention.py                     # time, core and layer
    python benchmarks/attention.py --memory            # peak memory too
    python benchmarks/attention.py --decode            # one token at a time
    pip download --no-deps tf-models-official==2.20.0  # for the peer column
    python benchmarks/attention.py --model-garden tf_models_official-*.whl
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import keras_kt
from keras_kt import kernels
from keras_kt.ops import linear
from keras_kt.ops.quadratic import quadratic

# Scores of a quadratic column beyond this many bytes are not run.
MAX_SCORE_BYTES = 3e9
MODES = ("forward", "forward+backward")
LENGTHS = (256, 384, *(2**n for n in range(9, 17)))


def bound_map(args, feature_map):
    """One draw of our features, bound to the benchmark's sizes."""
    prior = keras_kt.NormalPrior(seed=0)
    prior.build((args.heads, args.features // 2, args.head_dim))
    feature_map.build(args.heads)
    return feature_map.bind(prior(), args.head_dim**-0.25)


def softmax_core(query, key, value, causal=False):
    logits = tf.einsum("bthd,bshd->bhts", query, key) * query.shape[-1] ** -0.5
    if causal:
        visible = tf.linalg.band_part(tf.ones(logits.shape[2:], "bool"), -1, 0)
        logits = tf.where(visible, logits, -1e30)
    return tf.einsum("bhts,bshe->bthe", tf.nn.softmax(logits), value)


def performer_core(omega):
    """Plain FAVOR+ in einsums, as TensorFlow users write it."""

    def features(x, axes):
        projected = tf.einsum("bthd,hmd->bthm", x, omega)
        half_square = tf.reduce_sum(x * x, axis=-1, keepdims=True) / 2.0
        peak = tf.reduce_max(projected, axis=axes, keepdims=True)
        return tf.exp(projected - half_square - tf.stop_gradient(peak)) + 1e-6

    def core(query, key, value):
        scale = query.shape[-1] ** -0.25
        query = features(query * scale, (-1,))
        key = features(key * scale, (-3, -1))
        context = tf.einsum("bshm,bshe->bhme", key, value)
        total = tf.einsum("bthm,bhm->bth", query, tf.reduce_sum(key, axis=1))
        return tf.einsum("bthm,bhme->bthe", query, context) / total[..., None]

    return core


def floor_core(args):
    """The four products that the computation cannot avoid, and no more."""
    rng = np.random.default_rng(0)

    def tensor(*shape):
        return tf.constant(rng.normal(size=shape).astype("float32"))

    heads, dim, width = args.heads, args.head_dim, args.features
    projection = tensor(heads, dim, width // 2)
    state = tensor(heads, dim, width)

    def core(query, key, features, value):
        return (
            tf.matmul(query, projection),
            tf.matmul(key, projection),
            # In the order that is fastest here.
            tf.matmul(value, features, transpose_a=True),
            tf.matmul(features, state, transpose_b=True),
        )

    def inputs(batch, length):
        x = [tensor(batch, heads, length, dim) for _ in range(3)]
        return [x[0], x[1], tensor(batch, heads, length, width), x[2]]

    return core, inputs


def load_kernel_attention(wheel):
    """Model Garden's one file, under tf_keras; its package is not needed."""
    import tf_keras  # noqa: F401

    for name in ("official", "official.modeling"):
        sys.modules.setdefault(name, types.ModuleType(name))
    utils = types.ModuleType("official.modeling.tf_utils")
    utils.get_shape_list = lambda tensor, *_, **__: tensor.shape.as_list()
    sys.modules["official.modeling"].tf_utils = utils
    sys.modules["official.modeling.tf_utils"] = utils
    name = "official/nlp/modeling/layers/kernel_attention.py"
    source = zipfile.ZipFile(wheel).read(name).decode()
    module = types.ModuleType("kernel_attention")
    exec(compile(source, name, "exec"), module.__dict__)  # noqa: S102
    return module.KernelAttention


def core_columns(args):
    """Name to (function, is quadratic)."""
    positive = bound_map(args, keras_kt.PositiveFeatures())
    trigonometric = bound_map(args, keras_kt.TrigonometricFeatures())
    columns = {
        "ours": lambda *x: linear.bidirectional(*x, positive),
        "ours causal": lambda *x: linear.causal(*x, positive)[0],
        "ours trigonometric": lambda *x: linear.bidirectional(
            *x, trigonometric
        ),
        "ours trigonometric causal": lambda *x: linear.causal(
            *x, trigonometric
        )[0],
        "ours as a matrix": lambda *x: quadratic(*x, positive)[0],
        "softmax": softmax_core,
        "softmax causal": lambda *x: softmax_core(*x, causal=True),
        "plain Performer": performer_core(_performer_frequencies(args)),
    }
    if args.model_garden:
        layer = load_kernel_attention(args.model_garden)(
            num_heads=args.heads,
            key_dim=args.head_dim,
            feature_transform="exp",
            num_random_features=args.features,
        )
        probe = tf.zeros((1, 2, args.heads * args.head_dim))
        layer(probe, probe)
        columns["Model Garden"] = lambda *x: layer._compute_attention(
            *x, "exp", False
        )
    return columns


def _performer_frequencies(args):
    prior = keras_kt.NormalPrior(radius="chi", seed=0)
    prior.build((args.heads, args.features, args.head_dim))
    return prior().offsets


def layer_columns(args):
    sizes = {"num_heads": args.heads, "key_dim": args.head_dim}

    def wrap(layer, **call):
        return lambda x: layer(x, x, **call)

    def ours(**kwargs):
        return keras_kt.KernelizedAttention(
            **sizes, num_features=args.features, **kwargs
        )

    theirs = keras.layers.MultiHeadAttention
    columns = {
        "ours": wrap(ours()),
        "ours causal": wrap(ours(), use_causal_mask=True),
        "ours trigonometric": wrap(ours(feature_map="trigonometric")),
        "softmax": wrap(theirs(**sizes)),
        "softmax causal": wrap(theirs(**sizes), use_causal_mask=True),
    }
    if args.model_garden:
        columns["Model Garden"] = wrap(
            load_kernel_attention(args.model_garden)(
                **sizes,
                feature_transform="exp",
                num_random_features=args.features,
            )
        )
    return columns


def make_inputs(args, level, batch, length):
    rng = np.random.default_rng(1)
    if level == "layer":
        shapes = [(batch, length, args.heads * args.head_dim)]
    else:
        shapes = [(batch, length, args.heads, args.head_dim)] * 3
    return [
        tf.constant((0.35 * rng.normal(size=s)).astype("float32"))
        for s in shapes
    ]


def backward(function):
    """Gradient to inputs and to every trainable weight that is touched."""

    def gradient(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = tf.nest.flatten(function(*inputs))
            loss = tf.add_n([tf.reduce_sum(tf.square(x)) for x in outputs])
        return tape.gradient(loss, [*inputs, *tape.watched_variables()])

    return gradient


def is_affordable(name, args, batch, length):
    if name == "ours as a matrix" and length > 512:
        return False
    if "softmax" not in name and "matrix" not in name:
        return True
    # The causal column holds a masked copy too.
    copies = 2 if "causal" in name else 1
    size = 4.0 * copies * batch * args.heads * length**2
    return size <= MAX_SCORE_BYTES


def check_agreement(args):
    """Errors against float64 softmax, and of ours against its own kernel."""
    inputs = make_inputs(args, "core", 1, 128)
    query, key, value = (x.numpy().transpose(0, 2, 1, 3) for x in inputs)
    scale = args.head_dim**-0.25
    errors = {}
    for name, function in core_columns(args).items():
        mask = (
            np.tril(np.ones((128, 128), "bool")) if "causal" in name else None
        )
        exact, _ = kernels.softmax_attention(
            query * scale, key * scale, value, mask
        )
        got = function(*inputs).numpy().transpose(0, 2, 1, 3)
        errors[name] = float(
            np.linalg.norm(got - exact) / np.linalg.norm(exact)
        )
    positive = bound_map(args, keras_kt.PositiveFeatures())
    own, _ = quadratic(*inputs, positive)
    fast = linear.bidirectional(*inputs, positive)
    deviation = float(np.abs(own - fast).max())
    if deviation > 1e-4:
        raise SystemExit(f"The linear route is wrong by {deviation}.")
    print("relative error to softmax at 128 tokens, |q|² = |k|² = 1 scaled:")
    for name, error in errors.items():
        print(f"  {name:28s} {error:.3f}")
    print(f"  ours, linear against quadratic: {deviation:.1e} (absolute)")
    return errors


def compiled_columns(args, level, batch, length):
    """(column, mode, XLA) to a callable without arguments."""
    columns = core_columns(args) if level == "core" else layer_columns(args)
    inputs = make_inputs(args, level, batch, length)
    problems = {
        name: (function, inputs)
        for name, function in columns.items()
        if is_affordable(name, args, batch, length)
    }
    if level == "core":
        function, floor_inputs = floor_core(args)
        problems["floor"] = (function, floor_inputs(batch, length))
    runs = {}
    for name, (function, tensors) in problems.items():
        for mode in MODES:
            if name == "floor" and mode != "forward":
                continue  # by definition three times the forward products
            wanted = backward(function) if mode != "forward" else function
            for jit in (False, True):
                compiled = tf.function(wanted, jit_compile=jit)
                runs[name, mode, jit] = (
                    lambda compiled=compiled, tensors=tensors: compiled(
                        *tensors
                    )
                )
    return runs


def measure(runs, repeats, budget=math.inf):
    """Seconds of each run, interleaved; the first call apart.

    Slow runs stop after two repeats once `budget` seconds are spent on them.
    """
    first, seconds = {}, {key: [] for key in runs}
    for key, run in runs.items():
        start = time.perf_counter()
        _wait(run())
        first[key] = time.perf_counter() - start
        _wait(run())
    for _ in range(repeats):
        for key, run in runs.items():
            if len(seconds[key]) >= 2 and sum(seconds[key]) > budget:
                continue
            start = time.perf_counter()
            _wait(run())
            seconds[key].append(time.perf_counter() - start)
    return first, seconds


def _wait(outputs):
    for output in tf.nest.flatten(outputs):
        if output is not None:
            output.numpy() if output.shape.num_elements() < 9 else output[
                ..., :1
            ]


def timings(args):
    rows = []
    for level in args.levels:
        for length in args.lengths:
            batch = max(1, args.tokens // length)
            runs = compiled_columns(args, level, batch, length)
            first, seconds = measure(runs, args.repeats, args.budget)
            for (name, mode, jit), values in seconds.items():
                rows.append(
                    {
                        "level": level,
                        "length": length,
                        "batch": batch,
                        "column": name,
                        "mode": mode,
                        "xla": jit,
                        "median": float(np.median(values)),
                        "minimum": float(np.min(values)),
                        "quartiles": np.quantile(values, (0.25, 0.75)).tolist(),
                        "first_call": first[name, mode, jit],
                    }
                )
            print_table(rows, level, length)
            print_compilation(rows, level, length)
            keras.backend.clear_session()
    return rows


def best(rows, **keys):
    """The better of XLA and not, or `None`."""
    found = [r for r in rows if all(r[k] == v for k, v in keys.items())]
    return min(found, key=lambda r: r["median"], default=None)


def print_table(rows, level, length):
    columns = list(
        dict.fromkeys(
            r["column"]
            for r in rows
            if r["level"] == level and r["length"] == length
        )
    )
    batch = next(r["batch"] for r in rows if r["length"] == length)
    print(f"\n{level}, {length} tokens, batch {batch}: median ms (quartiles)")
    for mode in MODES:
        softmax = best(
            rows, level=level, length=length, column="softmax", mode=mode
        )
        floor = best(rows, level=level, length=length, column="floor")
        for name in columns:
            row = best(rows, level=level, length=length, column=name, mode=mode)
            if row is None:
                continue
            low, high = (1e3 * q for q in row["quartiles"])
            text = f"  {mode:17s} {name:28s} {1e3 * row['median']:8.1f}"
            text += f" ({low:.1f}-{high:.1f})" + (" XLA" if row["xla"] else "")
            if softmax and name != "softmax":
                text += f"  {softmax['median'] / row['median']:.2f}x softmax"
            if floor and name.startswith("ours"):
                products = floor["median"] * (1 if mode == "forward" else 3)
                text += f"  {100 * products / row['median']:.0f} % of floor"
            print(text, flush=True)


def print_compilation(rows, level, length):
    """What the first call costs beyond a later one."""
    for row in rows:
        if (row["level"], row["length"]) != (level, length) or not row["xla"]:
            continue
        if row["column"] in ("ours", "ours causal"):
            seconds = row["first_call"] - row["median"]
            print(
                f"  compiled {row['mode']:17s} {row['column']:28s} "
                f"in {seconds:.2f} s"
            )


def memory(args):
    """Peak memory of one call beyond its inputs, each in its own process."""
    rows = []
    for length in args.lengths:
        for name, jit in (
            ("ours", "XLA"),
            ("ours", "no-XLA"),
            ("ours causal", "XLA"),
            ("ours causal", "no-XLA"),
            ("softmax", "no-XLA"),
        ):
            if not is_affordable(name, args, 1, length):
                continue
            command = [
                sys.executable,
                __file__,
                *("--peak", name, str(length), jit),
                *("--heads", str(args.heads)),
                *("--head-dim", str(args.head_dim)),
                *("--features", str(args.features)),
            ]
            output = subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout
            rows.append(json.loads(output.splitlines()[-1]))
            row = rows[-1]
            print(
                f"  {name:12s} {jit:6s} {length:7d} tokens: peak "
                f"{row['peak'] / 2**20:9.1f} MiB, "
                f"{row['peak'] / row['tensors']:.2f} x q, k, v, output and "
                "their gradients",
                flush=True,
            )
    return rows


def peak_of_one(args, name, length, jit):
    """Child process: resident peak of a later call, over the idle level."""
    function = backward(core_columns(args)[name])
    inputs = make_inputs(args, "core", 1, length)
    compiled = tf.function(function, jit_compile=jit == "XLA")
    _wait(compiled(*inputs))
    gc.collect()
    # What the allocator keeps of the first call would hide part of the peak.
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    results = compiled(*inputs)
    _wait(results)
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


def decode(args):
    """Time of one token at a position, beside a key-value cache."""
    layer = keras_kt.KernelizedAttention(
        args.heads, args.head_dim, num_features=args.features
    )
    width = args.heads * args.head_dim
    layer.build((1, 1, width), (1, 1, width))
    token = tf.random.stateless_normal((1, 1, width), (0, 1))

    def cached(token, keys, values):
        query = layer.query_dense(token)
        keys = tf.concat([keys[:, 1:], layer.key_dense(token)], 1)
        values = tf.concat([values[:, 1:], layer.value_dense(token)], 1)
        heads = softmax_core(query, keys, values)
        return layer.output_dense(heads), keys, values

    # Apart, since a long cache empties the processor's caches for all.
    problems = {"ours": (layer.step, {}), "cache": (cached, {})}
    sizes = {}
    state = layer.initial_state(1)
    for position in args.positions:
        at = state._replace(count=state.count + float(position))
        problems["ours"][1][position] = token, at
        sizes["ours", position] = sum(4 * tf.size(x).numpy() for x in at)
        if position <= 65536:
            shape = (1, position, args.heads, args.head_dim)
            keys = tf.random.stateless_normal(shape, (1, 2))
            problems["cache"][1][position] = token, keys, keys
            sizes["cache", position] = 8 * tf.size(keys).numpy()
    seconds = {}
    for name, (function, positions) in problems.items():
        runs = {}
        for jit in (False, True):
            compiled = tf.function(function, jit_compile=jit)
            for position, inputs in positions.items():
                runs[position, jit] = lambda compiled=compiled, inputs=inputs: (
                    compiled(*inputs)[0]
                )
        _, times = measure(runs, 30 * args.repeats, args.budget)
        for position in positions:
            seconds[name, position] = min(
                (times[position, jit] for jit in (False, True)), key=np.median
            )
    rows = []
    print("\ndecode, one token: median microseconds (quartiles), bytes")
    for (name, position), values in seconds.items():
        low, high = np.quantile(values, (0.25, 0.75))
        rows.append(
            {
                "column": name,
                "position": position,
                "median": float(np.median(values)),
                "quartiles": [float(low), float(high)],
                "bytes": int(sizes[name, position]),
            }
        )
        print(
            f"  {name:6s} position {position:8d}: "
            f"{1e6 * np.median(values):9.1f} us ({1e6 * low:.1f}-"
            f"{1e6 * high:.1f}), {sizes[name, position]:11d} bytes"
        )
    return rows


def tables(record):
    """Markdown: medians of the better of XLA and not, memory, decode."""
    rows = record.get("timings", [])
    lines = []
    for level in dict.fromkeys(r["level"] for r in rows):
        for mode in MODES:
            here = [r for r in rows if r["level"] == level]
            names = list(dict.fromkeys(r["column"] for r in here))
            lines += [
                f"{level}, {mode}, milliseconds",
                "",
                "| length | " + " | ".join(names) + " |",
                "| --- " * (len(names) + 1) + "|",
            ]
            for length in sorted({r["length"] for r in here}):
                cells = []
                for name in names:
                    is_floor = name == "floor"
                    row = best(
                        here,
                        length=length,
                        column=name,
                        mode="forward" if is_floor else mode,
                    )
                    factor = 3e3 if is_floor and mode != "forward" else 1e3
                    cells.append(
                        f"{factor * row['median']:.1f}" if row else "–"
                    )
                lines.append(f"| {length} | " + " | ".join(cells) + " |")
            lines.append("")
    if "memory" in record:
        lines += [
            "core, forward + backward, batch 1: peak MiB, and over the bytes "
            "of q, k, v, output and their gradients",
            "",
            "| column | XLA | length | MiB | ratio |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r['column']} | {'yes' if r['xla'] else 'no'} | {r['length']} "
            f"| {r['peak'] / 2**20:.1f} | {r['peak'] / r['tensors']:.2f} |"
            for r in record["memory"]
        ]
        lines.append("")
    if "decode" in record:
        lines += [
            "layer, decoding one token",
            "",
            "| column | position | microseconds | bytes |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r['column']} | {r['position']} | {1e6 * r['median']:.0f} "
            f"| {r['bytes']} |"
            for r in record["decode"]
        ]
        lines.append("")
    return "\n".join(lines)


def plot(record, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = record["timings"]
    levels = list(dict.fromkeys(r["level"] for r in rows))
    figure, axes = plt.subplots(
        1, len(levels), figsize=(5.2 * len(levels), 4), squeeze=False
    )
    for axis, level in zip(axes[0], levels, strict=True):
        here = [r for r in rows if r["level"] == level]
        for name in dict.fromkeys(r["column"] for r in here):
            mode = "forward" if name == "floor" else "forward+backward"
            lengths = sorted({r["length"] for r in here})
            points = [
                (n, best(here, length=n, column=name, mode=mode))
                for n in lengths
            ]
            points = [(n, row) for n, row in points if row]
            factor = 3 if name == "floor" else 1
            axis.loglog(
                [n for n, _ in points],
                [
                    1e6 * factor * row["median"] / (n * row["batch"])
                    for n, row in points
                ],
                "k:" if name == "floor" else "o-",
                label="floor: the GEMMs alone" if name == "floor" else name,
                linewidth=2.2 if name.startswith("ours") else 1.2,
                markersize=4,
            )
        axis.set_xticks(lengths, [str(n) for n in lengths], fontsize=7)
        axis.minorticks_off()
        axis.set_xlabel(
            f"length (batch · length = {record['arguments']['tokens']}, "
            "beyond that batch 1)"
        )
        axis.set_title(f"{level}, forward + backward")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("microseconds per token")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def plot_memory(record, path):
    """Peak memory against length, the better of XLA and not."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = record["memory"]
    figure, axis = plt.subplots(figsize=(5.2, 4))
    lengths = sorted({row["length"] for row in rows})
    for name in dict.fromkeys(row["column"] for row in rows):
        peaks = {
            n: min(
                (
                    row["peak"]
                    for row in rows
                    if row["column"] == name and row["length"] == n
                ),
                default=None,
            )
            for n in lengths
        }
        axis.loglog(
            [n for n in lengths if peaks[n]],
            [peaks[n] / 2**20 for n in lengths if peaks[n]],
            "o-",
            label=name,
            markersize=4,
        )
    axis.loglog(
        lengths,
        [
            next(r["tensors"] for r in rows if r["length"] == n) / 2**20
            for n in lengths
        ],
        "k:",
        label="q, k, v, output and gradients",
    )
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths], fontsize=7)
    axis.minorticks_off()
    axis.set_xlabel("length, batch 1")
    axis.set_ylabel("peak of a training step, MiB")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def draw(record, path):
    """The pictures of a record, if matplotlib is installed."""
    try:
        if "timings" in record:
            plot(record, path.with_suffix(".png"))
        elif "memory" in record:
            plot_memory(record, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")
    except ImportError:
        print("matplotlib is missing: pip install 'keras_kt[plot]'")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=LENGTHS)
    add("--tokens", type=int, default=4096, help="batch × length")
    add("--heads", type=int, default=8)
    add("--head-dim", type=int, default=64)
    add("--features", type=int, default=128)
    add("--repeats", type=int, default=9)
    add("--budget", type=float, default=10, help="seconds per slow column")
    add("--levels", nargs="+", default=["core", "layer"])
    add("--positions", type=int, nargs="+", default=[100, 1024, 16384, 10**6])
    add("--model-garden", help="wheel of tf-models-official 2.20.0")
    add("--memory", action="store_true", help="peak memory of the core")
    add("--decode", action="store_true", help="time of one token")
    add("--no-timings", action="store_true")
    add("--output", default="results/attention")
    add("--plot", type=Path, help="draw this JSON again, measure nothing")
    add("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        name, length, jit = args.peak
        return peak_of_one(args, name, int(length), jit)
    if args.plot:
        return draw(json.loads(args.plot.read_text()), args.plot)
    record = {
        # Names, not paths, of this machine's files.
        "arguments": {
            **vars(args),
            "model_garden": args.model_garden and Path(args.model_garden).name,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "errors": check_agreement(args),
    }
    if not args.no_timings:
        record["timings"] = timings(args)
    if args.memory:
        print("\npeak memory, core, forward + backward, batch 1")
        record["memory"] = memory(args)
    if args.decode:
        record["decode"] = decode(args)
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables(record))
    print(f"wrote {path.with_suffix('.json')} and {path.with_suffix('.md')}")
    draw(record, path)


if __name__ == "__main__":
    main()
