"""Times of all columns, interleaved, with their compilation apart."""

import math
import sys
import time

import keras
import numpy as np
import tensorflow as tf

from benchmarks.attention.columns import (
    backward,
    core_columns,
    floor_core,
    is_affordable,
    layer_columns,
    make_inputs,
)
from benchmarks.attention.report import MODES, best


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

    Slow runs stop after two repeats once `budget` seconds are spent on them;
    those that the memory does not suffice for are left out.
    """
    first, seconds = {}, {key: [] for key in runs}
    say = every(10.0)
    for number, (key, run) in enumerate(runs.items()):
        say(f"  {number} of {len(runs)} compiled")
        start = time.perf_counter()
        try:
            wait(run())
            first[key] = time.perf_counter() - start
            wait(run())
        except tf.errors.ResourceExhaustedError:
            print(f"  {key}: memory does not suffice; left out", flush=True)
            del seconds[key]
    for lap in range(repeats):
        for key in seconds:
            run = runs[key]
            say(f"  repeat {lap + 1} of {repeats}")
            if len(seconds[key]) >= 2 and sum(seconds[key]) > budget:
                continue
            start = time.perf_counter()
            wait(run())
            seconds[key].append(time.perf_counter() - start)
    return first, seconds


def measure_steadily(runs, repeats, spread, budget=math.inf):
    """`measure`, twice more while times spread too much.

    Args:
        runs, repeats, budget: as there.
        spread: the most that a run's interquartile range may be of its median,
            by the median of all runs. Beyond it the program ends.
    """
    first = None
    for _ in range(3):
        calls, seconds = measure(runs, repeats, budget)
        first = first or calls  # Later ones compile nothing.
        found = spread_of(seconds)
        if found <= spread:
            return first, seconds
        print(f"times spread by {found:.0%}", flush=True)
    sys.exit(
        f"Times spread by {found:.0%}, more than --spread {spread:.0%}: the "
        "machine does other work. Nothing of this table is written."
    )


def spread_of(seconds):
    """Interquartile range over median, the median of all runs."""
    low, middle, high = np.transpose(
        [np.quantile(x, (0.25, 0.5, 0.75)) for x in seconds.values()]
    )
    return float(np.median((high - low) / middle))


def every(interval):
    """A function that prints a line, but only after so many seconds."""
    last = time.monotonic()

    def say(text):
        nonlocal last
        if time.monotonic() - last >= interval:
            last = time.monotonic()
            print(text, flush=True)

    return say


def wait(outputs):
    for output in tf.nest.flatten(outputs):
        if output is not None:
            output.numpy() if output.shape.num_elements() < 9 else output[
                ..., :1
            ]


def timings(args, save):
    """Measures all levels.

    Args:
        save: function of the rows so far, called after each length: a run of
            half an hour may end before its time.
    """
    rows = []
    for level in args.levels:
        for length in args.lengths:
            batch = max(1, args.tokens // length)
            print(f"\n{level}, {length} tokens, compiling …", flush=True)
            runs = compiled_columns(args, level, batch, length)
            first, seconds = measure_steadily(
                runs, args.repeats, args.spread, args.budget
            )
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
            save(rows)
            keras.backend.clear_session()


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
