"""From a trained softmax model to a linear one, on IMDb reviews.

Trains an encoder that classifies reviews by their words and a causal model of
their bytes with `keras.layers.MultiHeadAttention`, converts both, and prints
quality after each stage: converted, calibrated, distilled, fine-tuned. The
causal one keeps an exact near field and then streams a review. The data are as
in text_classification.py:

    python examples/convert_pretrained.py --data-dir .
"""

import argparse
import os
import re
import sys
import time
import zlib
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from common import SoftmaxDecoder, save_results
from text_classification import load_reviews

import keras_kt

WIDTH = 64
HEADS = 4
KEY_DIM = 16
BLOCKS = 2
# Words are told apart by their hash.
VOCABULARY = 8192
LEARNING_RATE = 2e-3
FINE_TUNING_RATE = 5e-4
# Fine-tuning takes this share of the steps that the softmax model took.
SHARE = 0.2
# Sequences that calibration looks at.
CALIBRATING = 32
# Tokens in a picture of attention, beyond the near field.
SHOWN = 64


def main():
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train, test = (
        (texts[: args.examples], labels[: args.examples])
        for texts, labels in load_reviews(args.data_dir)
    )
    for name in args.tasks:
        keras.utils.set_random_seed(args.seed)
        task = TASKS[name]
        data = task.arrays(train, args), task.arrays(test, args)
        model, results = stages(name, *data, args)
        results["speed"] = speed(task, args)
        if hasattr(model, "step"):
            results["stream"] = stream(model, args)
        print_table(name, task.metric, results)
        save_results(args.output / f"convert_{name}.json", args, **results)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data-dir", type=Path, default=".", help="folder with aclImdb/")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--examples", type=int, help="reviews of each split; default: all")
    add("--steps", type=int, default=1000, help="default: %(default)s")
    add("--batch-size", type=int, default=32, help="default: %(default)s")
    add("--words", type=int, default=256, help="default: %(default)s")
    add("--bytes", type=int, default=256, help="default: %(default)s")
    add("--test-examples", type=int, default=2000, help="default: %(default)s")
    add("--features", type=int, default=64, help="mean D; default: %(default)s")
    add("--distill-steps", type=int, default=60, help="default: %(default)s")
    add("--speed-tokens", type=int, default=4096, help="default: %(default)s")
    add("--near-field", type=int, default=64, help="of the causal model")
    add("--prompt", default="This film ", help="default: %(default)r")
    add("--sample", type=int, default=200, help="bytes; default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--output", type=Path, default="convert_output", help="a folder")
    return parser.parse_args()


class Classifier:
    """Is a review positive? An encoder of its words."""

    metric = "accuracy"

    @staticmethod
    def near_field(args):
        return None

    @staticmethod
    def arrays(split, args):
        texts, labels = split
        return word_array(texts, args.words), labels[:, np.newaxis]

    @staticmethod
    def build():
        tokens = keras.Input((None,), dtype="int32", name="tokens")
        x = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)(tokens)
        for _ in range(BLOCKS):
            x = block(x)
        x = keras.layers.LayerNormalization()(x)
        x = keras.layers.GlobalAveragePooling1D()(x)
        return keras.Model(tokens, keras.layers.Dense(1)(x))

    @staticmethod
    def loss():
        return keras.losses.BinaryCrossentropy(from_logits=True)

    @staticmethod
    def score(outputs, y):
        return float(np.mean((outputs > 0.0) == (y > 0.5)))


@keras.saving.register_keras_serializable(package="examples")
class ByteModel(keras.Model):
    """Causal blocks of bytes; it streams once they are converted."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = keras.layers.Embedding(257, WIDTH)
        self.blocks = [
            SoftmaxDecoder(
                2 * WIDTH,
                HEADS,
                activation="gelu",
                normalize_first=True,
                key_dim=KEY_DIM,
                local_context=5,
            )
            for _ in range(BLOCKS)
        ]
        self.norm = keras.layers.LayerNormalization()
        self.logits = keras.layers.Dense(257)

    def call(self, tokens, training=None):
        x = self.embedding(tokens)
        for each in self.blocks:
            x = each(x, training=training)
        return self.logits(self.norm(x))

    def initial_state(self, batch_size):
        return [each.initial_state(batch_size) for each in self.blocks]

    def step(self, tokens, state):
        x = self.embedding(tokens)
        states = []
        for each, old in zip(self.blocks, state, strict=True):
            x, new = each.step(x, old)
            states.append(new)
        return self.logits(self.norm(x)), states


class LanguageModel:
    """What is the next byte? A causal decoder."""

    metric = "bits per byte"

    @staticmethod
    def near_field(args):
        return args.near_field or None

    @staticmethod
    def arrays(split, args):
        texts, _ = split
        long = [text for text in texts if len(text) > args.bytes]
        x = byte_array(long, args.bytes + 1)
        return x[:, :-1], x[:, 1:]

    @staticmethod
    def build():
        model = ByteModel()
        model(np.zeros((1, 8), "int32"))
        return model

    @staticmethod
    def loss():
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @staticmethod
    def score(outputs, y):
        nats = keras.losses.sparse_categorical_crossentropy(
            y, outputs, from_logits=True
        )
        return float(np.mean(nats) / np.log(2.0))


TASKS = {"classifier": Classifier, "lm": LanguageModel}


def byte_array(texts, length):
    """`(examples, length)` numbers 1 … 256 of the bytes; 0 pads."""
    array = np.zeros((len(texts), length), "int32")
    for row, text in zip(array, texts, strict=True):
        values = np.frombuffer(text[:length], "uint8")
        row[: len(values)] = values.astype("int32") + 1
    return array


def word_array(texts, length):
    """`(examples, length)` hashes of the words; 0 pads."""
    array = np.zeros((len(texts), length), "int32")
    for row, text in zip(array, texts, strict=True):
        words = re.findall(rb"[a-z']+", text.lower())[:length]
        hashes = [zlib.crc32(word) % (VOCABULARY - 1) + 1 for word in words]
        row[: len(hashes)] = hashes
    return array


def block(x):
    normed = keras.layers.LayerNormalization()(x)
    attention = keras.layers.MultiHeadAttention(HEADS, KEY_DIM)
    x = keras.layers.Add()([x, attention(normed, normed)])
    hidden = keras.layers.LayerNormalization()(x)
    hidden = keras.layers.Dense(2 * WIDTH, activation="gelu")(hidden)
    return keras.layers.Add()([x, keras.layers.Dense(WIDTH)(hidden)])


def stages(name, train, test, args):
    """The trained linear model, and quality and error after each stage."""
    task = TASKS[name]
    test = tuple(array[: args.test_examples] for array in test)
    rows = []

    def report(stage, model, seconds, is_linear=True):
        row = {"stage": stage, "seconds": seconds}
        row[task.metric] = task.score(
            model.predict(test[0], batch_size=args.batch_size, verbose=0),
            test[1],
        )
        if is_linear:
            errors = keras_kt.conversion.attention_error(
                model, test[0][:8], teacher=teacher
            )
            row["error by layer"] = list(errors.layers.values())
        rows.append(row)
        print(f"{stage}: {row}", flush=True)

    teacher = task.build()
    seconds = fit(task, teacher, train, args, args.steps, LEARNING_RATE)
    report("softmax", teacher, seconds, is_linear=False)

    plain, _ = keras_kt.convert_attention(
        teacher,
        spectral_prior=keras_kt.NormalPrior(radius="chi"),
        feature_map=keras_kt.PositiveFeatures(two_sided=False),
        num_features=args.features,
    )
    report("plain orthogonal features", plain, 0.0)

    start = time.perf_counter()
    student, conversion = keras_kt.convert_attention(
        teacher,
        num_features=args.features,
        near_field=task.near_field(args),
    )
    report("converted", student, time.perf_counter() - start)
    print(conversion)

    start = time.perf_counter()
    calibration = keras_kt.conversion.calibrate(
        student, train[0][:CALIBRATING], budget=args.features
    )
    report("calibrated", student, time.perf_counter() - start)
    print(calibration)
    draw(name, student, calibration, test[0][:1], args)

    start = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    chosen = rng.permutation(len(train[0]))[: 8 * args.distill_steps]
    keras_kt.conversion.distill(
        student,
        teacher,
        tf.data.Dataset.from_tensor_slices(train[0][chosen]).batch(8),
        steps=args.distill_steps,
        learning_rate=3e-3,
        train_projections=True,
    )
    report("distilled", student, time.perf_counter() - start)

    steps = int(SHARE * args.steps)
    seconds = fit(task, student, train, args, steps, FINE_TUNING_RATE)
    report("fine-tuned", student, seconds)
    return student, {
        "stages": rows,
        "heads": [head._asdict() for head in calibration.after.heads],
    }


def draw(name, model, calibration, inputs, args):
    """Pictures of the calibrated model, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("No pictures: they need `pip install keras_kt[plot]`.")
        return
    matplotlib.use("Agg")
    # A near field alone would show softmax itself.
    shown = SHOWN + (TASKS[name].near_field(args) or 0)
    maps = keras_kt.diagnostics.attention_maps(model, inputs[:, :shown])
    typical = {
        path: sorted(
            (head for head in calibration.after.heads if head.path == path),
            key=lambda head: head.matrix,
        )[HEADS // 2].head
        for path in calibration.after.layers
    }
    figures = {
        "errors": keras_kt.diagnostics.plots.plot_errors(calibration.after)
    }
    for number, each in enumerate(maps):
        figures[f"attention_{number}"] = (
            keras_kt.diagnostics.plots.plot_attention(
                each, head=typical[each.path]
            )
        )
    for kind, figure in figures.items():
        figure.savefig(args.output / f"convert_{name}_{kind}.png", dpi=110)


def fit(task, model, train, args, steps, learning_rate):
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        max(steps - steps // 10, 1),
        warmup_target=learning_rate,
        warmup_steps=steps // 10,
    )
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=1e-3), loss=task.loss()
    )
    data = tf.data.Dataset.from_tensor_slices(train)
    data = data.shuffle(len(train[0]), seed=args.seed).repeat()
    data = data.batch(args.batch_size).prefetch(2)
    reports = next(n for n in range(5, 0, -1) if steps % n == 0)
    start = time.perf_counter()
    model.fit(
        data,
        steps_per_epoch=steps // reports,
        epochs=reports,
        verbose=1 if sys.stdout.isatty() else 2,
    )
    return time.perf_counter() - start


def speed(task, args):
    """Milliseconds of inference on one long sequence, both models."""
    softmax = task.build()
    linear, _ = keras_kt.convert_attention(
        softmax,
        num_features=args.features,
        near_field=task.near_field(args),
    )
    rng = np.random.default_rng(args.seed)
    x = tf.constant(rng.integers(1, 257, size=(1, args.speed_tokens)), tf.int32)
    # Keras compiles by XLA or not as suits a model: the faster one counts.
    return {
        name: min(
            milliseconds(tf.function(model, jit_compile=jit), x)
            for jit in (True, False)
        )
        for name, model in (("softmax", softmax), ("linear", linear))
    }


def milliseconds(call, *inputs, laps=5):
    call(*inputs)
    times = []
    for _ in range(laps):
        start = time.perf_counter()
        keras.tree.map_structure(np.asarray, call(*inputs))
        times.append(1000.0 * (time.perf_counter() - start))
    return float(np.median(times))


def stream(model, args):
    """A review that the model makes up, and milliseconds a byte."""
    prompt = byte_array([args.prompt.encode()], len(args.prompt))
    tokens = keras_kt.generate(
        model, prompt, args.sample, temperature=0.8, seed=args.seed
    )
    text = bytes(np.clip(tokens[0] - 1, 0, 255).astype("uint8").tolist())
    step = tf.function(model.step)
    state, times = model.initial_state(1), {}
    for position in (100, args.speed_tokens):
        _, state = model.step(np.ones((1, position), "int32"), state)
        times[position] = milliseconds(
            step, tf.ones((1, 1), tf.int32), state, laps=50
        )
    sample = text.decode(errors="replace")
    print(sample)
    for position, time_of_byte in times.items():
        print(f"After {position:,} bytes: {time_of_byte:.2f} ms a byte")
    return {"sample": sample, "milliseconds a byte": times}


def print_table(name, metric, results):
    print(f"\n| {name} | {metric} | error of attention by layer | seconds |")
    print("| --- | --- | --- | --- |")
    for row in results["stages"]:
        errors = ", ".join(f"{e:.3f}" for e in row.get("error by layer", []))
        print(
            f"| {row['stage']} | {row[metric]:.3f} | {errors or '-'} | "
            f"{row['seconds']:.0f} |"
        )
    times = results["speed"]
    print(
        f"\nInference, one long sequence: softmax {times['softmax']:.0f} ms, "
        f"linear {times['linear']:.0f} ms.\n",
        flush=True,
    )


if __name__ == "__main__":
    main()
