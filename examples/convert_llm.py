"""A KerasHub language model made linear: converted, distilled, generated from.

Trains a small Llama of bytes, as a model that you have, and converts it:
kernels take the place of softmax, all else stays. `distill` trains them on the
original's attention, `distill_outputs` the whole on its predictions, and `fit`
on the text. Its own `generate` runs on states of fixed size then:

    pip install keras-hub
    curl -o shakespeare.txt https://www.gutenberg.org/cache/epub/100/pg100.txt
    python examples/convert_llm.py --text shakespeare.txt
"""

import time
from pathlib import Path

from common import flags, read_text, require


def parse_args():
    parser = flags(__doc__)
    add = parser.add_argument
    add("--text", type=Path, default="shakespeare.txt", help="a text file")
    add("--length", type=int, default=128, help="of a window, in bytes")
    add("--steps", type=int, default=1000, help="of the softmax model")
    add("--distill-steps", type=int, default=60, help="of layers")
    add("--fine-tune-steps", type=int, default=100, help="of the linear one")
    add("--width", type=int, default=128, help="of the model")
    add("--features", type=int, default=64, help="D of a head")
    add("--prompt", default="ROMEO.\n", help="where a sample starts")
    add("--sample", type=int, default=200, help="bytes to write")
    add("--long", type=int, default=2048, help="bytes of a timed text")
    add("--seed", type=int, default=0, help="of weights and data")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    require("keras_hub", "keras-hub")
    print("Loading TensorFlow …", flush=True)

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from progress import progress, working

import keras_kt
from keras_kt import conversion

BATCH_SIZE, HELD_OUT = 16, 0.05
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def main():
    args = parse_args()
    train, test = read(args)
    keras.utils.set_random_seed(args.seed)
    teacher = build(args)
    fit(teacher, train, args.steps, 3e-3)
    report("softmax", teacher, test)

    options = {
        "spectral_prior": keras_kt.EmpiricalPrior(tied=False),
        "feature_map": keras_kt.PositiveFeatures("self"),
        "num_features": args.features,
    }
    student, layers = keras_kt.convert_attention(teacher, **options)
    print(layers)
    report("converted", student, test)

    steps = args.distill_steps
    with working(f"Distilling layers, {steps} steps"):
        conversion.distill(student, teacher, train, steps=steps)
    report("layers distilled", student, test)
    rest = train.skip(steps)
    with working(f"Distilling outputs, {2 * steps} steps"):
        conversion.distill_outputs(student, teacher, rest, steps=2 * steps)
    report("outputs distilled", student, test)
    fit(student, train.skip(3 * steps), args.fine_tune_steps, 1e-3)
    report("fine-tuned", student, test)

    for name, model in (("softmax", teacher), ("linear", student)):
        model.compile(sampler="greedy")
        with working(f"Compiling {name} generation"):
            generated(model, args, args.long)
        start = time.perf_counter()
        generated(model, args, args.long)
        each = 1000.0 * (time.perf_counter() - start) / args.long
        print(f"{name}: {each:.2f} ms a byte in a text of {args.long} bytes")
    student.compile(sampler="top_k")
    print(generated(student, args, args.sample))


def read(args):
    """Batches of windows of the text's bytes, each with what comes next."""
    text = read_text(args.text, 40 * args.length).astype("int32")
    parts = np.split(text, [round((1.0 - HELD_OUT) * len(text))])
    rng = np.random.default_rng(args.seed)

    def batches(text, count):
        starts = rng.integers(len(text) - args.length, size=(count, 1))
        windows = text[starts + np.arange(args.length + 1)]
        dataset = tf.data.Dataset.from_tensor_slices(windows)
        return dataset.batch(BATCH_SIZE).map(example)

    return batches(parts[0], args.steps * BATCH_SIZE), batches(parts[1], 256)


def example(windows):
    x = {"token_ids": windows[:, :-1]}
    return x | {"padding_mask": tf.ones_like(windows[:, 1:])}, windows[:, 1:]


def build(args):
    """A Llama with two key-value heads for four of queries."""
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=256,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=args.width,
        intermediate_dim=2 * args.width,
    )
    return keras_hub.models.LlamaCausalLM(backbone)


def fit(model, data, steps, learning_rate):
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    model.compile(optimizer=keras.optimizers.AdamW(schedule), loss=LOSS)
    options = {"steps_per_epoch": steps, "shuffle": False, **progress()}
    model.fit(data.repeat(), **options)


def report(stage, model, test):
    nats = np.mean([LOSS(y, model(x, training=False)) for x, y in test])
    print(f"{stage}: {nats / np.log(2.0):.3f} bits per byte", flush=True)


def generated(model, args, length):
    """The prompt's continuation to so many bytes."""
    prompt = list(args.prompt.encode())
    tokens = np.array([prompt + [0] * (length - len(prompt))], "int32")
    mask = np.arange(length)[np.newaxis] < len(prompt)
    given = {"token_ids": tokens, "padding_mask": mask.astype("int32")}
    tokens = model.generate(given, stop_token_ids=None)["token_ids"][0]
    return bytes(np.asarray(tokens, "uint8")).decode(errors="replace")


if __name__ == "__main__":
    main()
