"""A Triton server under load, killed and started again: what clients see.

A classifier and a causal model are exported, and served by a process without
keras_kt (`host.py`). Clients send texts of several lengths, and prompts of
which they then send the tokens one by one; half-way the server is killed and
started again. Each answer is compared with Keras's.

    pip install nvidia-pytriton==0.7.0
    python -m benchmarks.serving --output results/serving/triton.json
"""

import argparse
import json
import os
import platform
import socket
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytriton
import tensorflow as tf

import keras_kt
from benchmarks.serving import clients, report
from benchmarks.serving.server import Server

VOCABULARY = 256


def network(args, is_causal):
    """Blocks of attention, to classes or to the next token."""
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(VOCABULARY, args.width, mask_zero=not is_causal)(
        tokens
    )
    for _ in range(args.blocks):
        attention = keras_kt.KernelizedAttention(
            args.heads, args.width // args.heads
        )
        y = attention(x, x, use_causal_mask=is_causal)
        # Not `x + y`, which has no mask: the mean would be that of padding too.
        x = keras.layers.Add()([x, y])
        x = keras.layers.LayerNormalization()(x)
    if is_causal:
        return keras.Model(tokens, keras.layers.Dense(VOCABULARY)(x))
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, keras.layers.Dense(2)(x))


def texts_of(classifier, stream, args):
    """Texts of lengths between a quarter of the longest and it."""
    random = np.random.default_rng(0)
    lengths = random.integers(args.length // 4, args.length + 1, args.texts)
    whole = [random.integers(1, VOCABULARY, n).astype("int32") for n in lengths]
    # All at once, so that one graph does for all lengths.
    call = tf.function(classifier, reduce_retracing=True, autograph=False)
    spec = tf.TensorSpec((None, None), "int32")
    call = call.get_concrete_function(spec)
    logits = tf.function(stream, autograph=False).get_concrete_function(spec)
    return clients.Texts(
        whole,
        [call(tf.constant([x]))[0].numpy() for x in whole],
        whole,
        [logits(tf.constant([x]))[0].numpy() for x in whole],
    )


def measure(args, folder):
    classifier, stream = network(args, False), network(args, True)
    exports = {
        "classifier": keras_kt.export_saved_model(classifier, f"{folder}/c"),
        "stream": keras_kt.export_saved_model(
            stream, f"{folder}/s", streaming=True
        ),
    }
    texts = texts_of(classifier, stream, args)
    server = Server(folder, exports, clients.MODELS, args.port or free_port())
    counts, gap = [], []

    def count():
        counts.append([server.requests_and_runs(x) for x in clients.MODELS])

    def restart():
        count()
        start = time.monotonic()
        server.kill()
        server.start()
        gap.append(time.monotonic() - start)

    try:
        server.start()
        asking = [
            clients.Client(server.url, texts, seed, args.pad)
            for seed in range(args.clients)
        ]
        seconds = clients.run(asking, args.seconds, restart)
        count()
    finally:
        server.kill()
    for client in asking:
        if client.error is not None:
            raise client.error
    return {
        "seconds_in_all": seconds,
        "seconds_without_server": gap[0],
        "streams": sum(x.streams for x in asking),
        "models": summary(asking, counts, seconds - gap[0]),
    }


def summary(asking, counts, seconds):
    """Of each model: rates, and latency of what was answered at once."""
    rows = {}
    for index, model in enumerate(clients.MODELS):
        answered = [
            x for client in asking for x in client.answered if x[0] == model
        ]
        times = [1e3 * x[1] for x in answered if x[2] == 1]
        requests, runs = np.sum([x[index] for x in counts], axis=0)
        rows[model] = {
            "requests": len(answered),
            "per_second": len(answered) / seconds,
            "milliseconds": dict(
                zip(
                    ("50", "90", "99"),
                    np.percentile(times, (50, 90, 99)).tolist(),
                    strict=True,
                )
            ),
            "requests_in_a_run": float(requests / max(runs, 1)),
            "sent_again": sum(x[2] > 1 for x in answered),
            "largest_error": max(
                (x[3] for x in answered if x[3] is not None), default=None
            ),
        }
    return rows


def free_port():
    """One whose next is free, too, most likely."""
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--seconds", type=float, default=60.0)
    add("--clients", type=int, default=8)
    add("--length", type=int, default=512, help="of the longest texts")
    add("--texts", type=int, default=64)
    add("--pad", type=int, default=128, help="lengths are multiples of this")
    add("--blocks", type=int, default=2)
    add("--width", type=int, default=64)
    add("--heads", type=int, default=4)
    add("--port", type=int, help="of HTTP (default: a free one)")
    add("--output", type=Path, default="results/serving/triton.json")
    add("--page", type=Path, help="where the table goes, docs/serving.md")
    args = parser.parse_args(argv)
    # Raised inside Keras's EinsumDense where the length is dynamic.
    warnings.filterwarnings("ignore", ".*jit_compile.*")
    # Short: sockets of the server have paths in it.
    with tempfile.TemporaryDirectory(prefix="kt") as folder:
        found = measure(args, folder)
    print(report.table(found))
    gap, seconds = found["seconds_without_server"], found["seconds_in_all"]
    print(
        f"{found['streams']} streams; without a server for {gap:.1f} of "
        f"{seconds:.1f} s"
    )
    modules = keras, tf, pytriton, keras_kt
    elsewhere = "output", "page", "port"
    record = {
        **{k: v for k, v in vars(args).items() if k not in elsewhere},
        # Of the last minute, that of whatever else ran included.
        "load": os.getloadavg()[0],
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {m.__name__: m.__version__ for m in modules},
        **found,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.page:
        report.write(record, args.page)
    return record


if __name__ == "__main__":
    main()
