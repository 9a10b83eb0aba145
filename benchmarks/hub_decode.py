"""Time of a token in KerasHub's `generate`: a cache of keys, or a state.

A small Llama of 64-dim heads as it is, and converted; both go through their own
`generate_step`, greedy, one compiled program for each length. What runs before
the first token, prefill, is cut: caches are filled from one token, and the time
of one new token is taken from that of several. Whole calls of `generate`, with
the prompt, are timed beside them.

    python benchmarks/hub_decode.py --output results/streams/hub_decode.json
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--positions",
        type=int,
        nargs="+",
        default=[100, 16_384],
        help="tokens before the one timed",
    )
    add("--batch", type=int, default=1, help="sequences")
    add("--layers", type=int, default=4, help="of the model")
    add("--heads", type=int, default=4, help="number")
    add("--head-dim", type=int, default=64, help="size")
    add("--tokens", type=int, default=65, help="new tokens of a run")
    add("--repeats", type=int, default=5, help="of each time")
    add(
        "--prompts",
        type=int,
        nargs="*",
        default=[128, 4096],
        help="tokens before whole calls",
    )
    add("--new", type=int, default=1000, help="new tokens of a whole call")
    add("--whole-repeats", type=int, default=3, help="of each whole call")
    add(
        "--output",
        type=Path,
        default="results/streams/hub_decode.json",
        help="a JSON file",
    )
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

import keras_kt

VOCABULARY = 256


class Sampler(keras_hub.samplers.GreedySampler):
    """Greedy; it keeps how many bytes the cache has."""

    def __call__(self, *args, cache, **kwargs):
        self.cache_bytes = cache.shape.num_elements() * cache.dtype.size
        return super().__call__(*args, cache=cache, **kwargs)


def language_model(args):
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=args.layers,
        num_query_heads=args.heads,
        num_key_value_heads=args.heads,
        hidden_dim=args.heads * args.head_dim,
        intermediate_dim=4 * args.heads * args.head_dim,
    )
    return keras_hub.models.LlamaCausalLM(backbone)


def without_prefill(model):
    """Lets a model begin with a cache that is full, of whatever."""
    build_cache = model._build_cache

    def build(token_ids):
        hidden, cache = build_cache(token_ids[:, :1])
        # Keys and values, not states.
        if len(cache.shape) > 3:
            cache = tf.repeat(cache, token_ids.shape[1], axis=3)
        return hidden, cache

    model._build_cache = build
    model.compile(sampler=Sampler(), jit_compile=True)
    return model.make_generate_function()


def seconds_of_token(generate, args, position):
    """Seconds of a token after so many."""
    length = position + args.tokens
    ids = np.ones((args.batch, length), "int32")

    def seconds(new_tokens):
        given = np.arange(length) < length - new_tokens
        mask = np.broadcast_to(given, ids.shape)
        start = time.perf_counter()
        output = generate({"token_ids": ids, "padding_mask": mask})
        output["token_ids"].numpy()
        return time.perf_counter() - start

    return (seconds(args.tokens) - seconds(1)) / (args.tokens - 1)


def seconds_of_call(generate, args, prompt):
    """Seconds of a whole call, the prompt included."""
    length = prompt + args.new
    ids = np.ones((args.batch, length), "int32")
    mask = np.broadcast_to(np.arange(length) < prompt, ids.shape)
    start = time.perf_counter()
    output = generate({"token_ids": ids, "padding_mask": mask})
    output["token_ids"].numpy()
    return time.perf_counter() - start


def in_turns(cells, repeats, seconds_of):
    """Median seconds of cells.

    In turns, so that a machine that slows down does so for all; the first turn
    compiles.
    """
    seconds = {cell: [] for cell in cells}
    for lap in range(1 + repeats):
        for name, tokens in cells:
            turn = f"turn {lap} of {repeats}" if lap else "compiling"
            print(f"{turn}: {name}, {tokens:,} tokens …", flush=True)
            found = seconds_of(name, tokens)
            if lap:
                seconds[name, tokens].append(found)
    return {cell: statistics.median(found) for cell, found in seconds.items()}


def measure(args):
    """Rows of tokens at positions, and rows of whole calls."""
    # Of the one token that fills the caches.
    warnings.filterwarnings("ignore", "You are using a softmax over axis")
    model = language_model(args)
    converted, _ = keras_kt.convert_attention(model, seed=0)
    tasks = {"original": model, "converted": converted}
    for task in tasks.values():
        task.compile(sampler=Sampler(), jit_compile=True)
    generates = {k: task.make_generate_function() for k, task in tasks.items()}
    cells = list(itertools.product(tasks, args.prompts))
    calls = in_turns(
        cells,
        args.whole_repeats,
        lambda name, prompt: seconds_of_call(generates[name], args, prompt),
    )
    generates = {name: without_prefill(task) for name, task in tasks.items()}
    sizes = {}

    def of_token(name, position):
        seconds = seconds_of_token(generates[name], args, position)
        sizes.setdefault((name, position), tasks[name].sampler.cache_bytes)
        return seconds

    cells = list(itertools.product(tasks, args.positions))
    rows = [
        {
            "model": name,
            "position": position,
            "milliseconds": 1e3 * seconds,
            "cache_bytes": sizes[name, position],
        }
        for (name, position), seconds in in_turns(
            cells, args.repeats, of_token
        ).items()
    ]
    whole = [
        {"model": name, "prompt": prompt, "seconds": seconds}
        for (name, prompt), seconds in calls.items()
    ]
    return rows, whole


def show(rows, whole):
    console = Console()
    table = Table("model", "prompt", "seconds")
    for row in whole:
        table.add_row(
            row["model"], f"{row['prompt']:,}", f"{row['seconds']:.2f}"
        )
    console.print(table)
    table = Table("model", "position", "ms per token", "cache, KiB")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['position']:,}",
            f"{row['milliseconds']:.3f}",
            f"{row['cache_bytes'] / 1024:,.0f}",
        )
    console.print(table)
    times = {(x["model"], x["position"]): x["milliseconds"] for x in rows}
    first, last = (f(x["position"] for x in rows) for f in (min, max))
    growth = times["converted", last] / times["converted", first]
    gain = times["original", last] / times["converted", last]
    console.print(
        f"converted: {growth:.2f} times the time of position {first:,} at "
        f"{last:,}; there {gain:.1f} times the original's tokens per second"
    )


def main():
    args = parse_args()
    rows, whole = measure(args)
    show(rows, whole)
    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(x) for x in gpus]
    modules = keras, keras_hub, tf, keras_kt
    record = {
        **{k: v for k, v in vars(args).items() if k != "output"},
        "device": [x.get("device_name") for x in details] or platform.machine(),
        "versions": {m.__name__: m.__version__ for m in modules},
        "rows": rows,
        "whole": whole,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
