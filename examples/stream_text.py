"""Trains a functional model of a text's bytes, and streams it as it is.

No class with methods of its own: `keras_kt.streaming_model(model)` makes a
stream of the model that `fit` trained, and `export_saved_model` one for a
server. Here the text appears byte by byte, first from the model, then from the
export in another process, which has TensorFlow and nothing else. Any text will
do; Shakespeare's works are 5 MB:

    curl -o shakespeare.txt https://www.gutenberg.org/cache/epub/100/pg100.txt
    python examples/stream_text.py --text shakespeare.txt
"""

import codecs
import subprocess
import sys
from pathlib import Path

from common import flags, read_text


def parse_args():
    parser = flags(__doc__)
    add = parser.add_argument
    add("--text", type=Path, default="shakespeare.txt", help="a text file")
    add("--length", type=int, default=256, help="of a window, in bytes")
    add("--steps", type=int, default=1000, help="of training")
    add("--seed", type=int, default=0, help="of weights and texts")
    add("--prompt", default="ROMEO.\n", help="where texts start")
    add("--sample", type=int, default=300, help="bytes of a text")
    add("--temperature", type=float, default=0.8, help="of sampling")
    add("--export", type=Path, default="stream_output", help="a folder")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import keras
import numpy as np
import tensorflow as tf
from progress import progress, working

import keras_kt

WIDTH, HEADS, BLOCKS, BATCH_SIZE = 128, 4, 2, 16
# What runs in the other process.
CLIENT = """
import sys
import tensorflow as tf
folder, prompt, count, temperature, seed = sys.argv[1:]
served = tf.saved_model.load(folder).signatures
state = served["initial_state"](batch_size=tf.constant(1))
tokens = tf.constant([list(prompt.encode())])
result = served["prefill"](tokens=tokens, **state)
for position in range(int(count)):
    logits = result.pop("output_0")[:, -1] / float(temperature)
    token = tf.random.stateless_categorical(
        logits, 1, [int(seed), position], tf.int32
    )
    sys.stdout.buffer.write(bytes(token[0].numpy().tolist()))
    sys.stdout.buffer.flush()
    result = served["decode"](tokens=token, **result)
sys.exit("keras_kt" in sys.modules)
"""


def main():
    args = parse_args()
    keras.utils.set_random_seed(args.seed)
    model = build_model()
    train(model, args)
    print("\nFrom the model, byte by byte:\n")
    here = show(args.prompt, bytes_of(keras_kt.streaming_model(model), args))
    print()
    with working("Exporting"):
        folder = keras_kt.export_saved_model(model, args.export, streaming=True)
    print(f"\nFrom {folder}, in a process without keras_kt:\n")
    there = show(args.prompt, bytes_of_export(folder, args))
    answer = "the same" if here == there else "another"
    print(f"\nThe export wrote {answer} text of {len(there)} bytes.")


def build_model():
    """Causal convolution, attention and dense layers, as one would write."""
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(256, WIDTH)(tokens)
    x = keras.layers.Conv1D(WIDTH, 5, padding="causal", activation="gelu")(x)
    for _ in range(BLOCKS):
        normed = keras.layers.LayerNormalization()(x)
        layer = keras_kt.KernelizedAttention(HEADS, WIDTH // HEADS)
        attended = layer(normed, normed, use_causal_mask=True)
        x = keras.layers.Add()([x, attended])
        hidden = keras.layers.LayerNormalization()(x)
        hidden = keras.layers.Dense(2 * WIDTH, activation="gelu")(hidden)
        x = keras.layers.Add()([x, keras.layers.Dense(WIDTH)(hidden)])
    x = keras.layers.LayerNormalization()(x)
    return keras.Model(tokens, keras.layers.Dense(256)(x))


def train(model, args):
    text = read_text(args.text, args.length + 2)
    rng = np.random.default_rng(args.seed)
    size = args.steps * BATCH_SIZE, 1
    starts = rng.integers(len(text) - args.length, size=size)
    windows = text[starts + np.arange(args.length + 1)]
    schedule = keras.optimizers.schedules.CosineDecay(3e-3, args.steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=0.05), loss)
    model.fit(windows[:, :-1], windows[:, 1:], BATCH_SIZE, **progress())


def bytes_of(stream, args):
    """Yields bytes that a stream writes after the prompt, one at a time."""
    step = tf.function(stream.step, reduce_retracing=True)
    tokens = tf.constant([list(args.prompt.encode())])
    state = stream.initial_state(batch_size=1)
    for position in range(args.sample):
        logits, state = step(tokens, state)
        tokens = tf.random.stateless_categorical(
            logits[:, -1] / args.temperature, 1, [args.seed, position], tf.int32
        )
        yield bytes(tokens[0].numpy().tolist())


def bytes_of_export(folder, args):
    """The same from a SavedModel, by a process that knows no keras_kt."""
    words = folder, args.prompt, args.sample, args.temperature, args.seed
    command = [sys.executable, "-c", CLIENT, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        yield from iter(lambda: client.stdout.read(1), b"")
    if client.returncode:
        sys.exit("The process that reads the export failed.")


def show(prompt, stream):
    """Prints a text as it comes, and returns its bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(prompt, end="", flush=True)
    text = b""
    for byte in stream:
        text += byte
        print(decoder.decode(byte), end="", flush=True)
    print()
    return text


if __name__ == "__main__":
    main()
