"""Time of one token of a stream, beside a key-value cache."""

import numpy as np
import tensorflow as tf

import keras_kt
from benchmarks.attention.columns import softmax_core
from benchmarks.attention.timing import measure

# Tokens that a state is brought forward by at a time.
PREFILL = 16384


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
    states = states_at(layer, width, args.positions)
    for position, state in states.items():
        problems["ours"][1][position] = token, state
        leaves = tf.nest.flatten(state)
        sizes["ours", position] = sum(4 * tf.size(x).numpy() for x in leaves)
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


def states_at(layer, width, positions):
    """States of a stream after so many tokens."""
    step = tf.function(layer.step, reduce_retracing=True)
    state, seen, states = layer.initial_state(1), 0, {}
    for position in sorted(positions):
        while seen < position:
            count = min(PREFILL, position - seen)
            seed = (seen, 3)
            tokens = tf.random.stateless_normal((1, count, width), seed)
            _, state = step(tokens, state)
            seen += count
        states[position] = state
    return states
