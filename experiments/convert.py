"""From a trained softmax model to a linear one, on IMDb reviews.

Trains an encoder that classifies reviews by their words and a causal model of
their bytes with `keras.layers.MultiHeadAttention`, converts both, and records
quality after each stage: converted, calibrated, distilled, fine-tuned. The
causal one keeps an exact near field and then streams a review. The data are as
in text.py:

    python -m experiments convert --data-dir .
"""

import argparse
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_kt
from examples.progress import progress, working
from experiments import convert_report, records, reviews
from experiments.convert_report import RUN, STAGE
from experiments.convert_tasks import TASKS, byte_array
from experiments.help import Help

LEARNING_RATE = 2e-3
FINE_TUNING_RATE = 5e-4
# Fine-tuning takes this share of the steps that the softmax model took.
SHARE = 0.2
# Sequences that calibration looks at.
CALIBRATING = 32
# Bytes before the one whose time is taken.
EARLY = 100
# What a head's error is recorded as.
HEAD = ("head", "num_features", "matrix", "output", "uniform", "predicted")


def main(argv):
    args = parse_args(argv)
    args.results.mkdir(parents=True, exist_ok=True)
    train, test = (
        (texts[: args.examples], labels[: args.examples])
        for texts, labels in reviews.labelled(args.data_dir)
    )
    for name in args.tasks:
        keras.utils.set_random_seed(args.seed)
        task = TASKS[name]
        data = task.arrays(train, args), task.arrays(test, args)
        model, stages, arrays = run_stages(name, *data, args)
        run = {"task": name, "seed": args.seed, "metric": task.metric}
        if args.speed_tokens:
            run |= speed(task, args)
        if hasattr(model, "step"):
            sample, times = stream(model, args)
            arrays["sample"] = np.array(sample)
            run |= {
                "byte_positions": list(times),
                "byte_milliseconds": list(times.values()),
            }
        records.write(args.results, stages, name="stages", keys=STAGE)
        records.write(args.results, [run | settings(args)], arrays, keys=RUN)
    table = convert_report.render(args.results)
    (args.results / "convert.md").write_text(table)
    print(table)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m experiments convert",
        description=__doc__.split("\n\n")[0],
        formatter_class=Help,
    )
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("."), help="has aclImdb/")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="names")
    add("--examples", type=int, help="reviews of each split; None: all")
    add("--steps", type=int, default=1000, help="default: %(default)s")
    add("--batch-size", type=int, default=32, help="default: %(default)s")
    add("--words", type=int, default=256, help="default: %(default)s")
    add("--bytes", type=int, default=256, help="default: %(default)s")
    add("--test-examples", type=int, default=2000, help="default: %(default)s")
    add("--features", type=int, default=64, help="mean D; default: %(default)s")
    add("--distill-steps", type=int, default=60, help="default: %(default)s")
    add("--speed-tokens", type=int, default=4096, help="0 for none")
    add("--near-field", type=int, default=64, help="of the causal model")
    add("--prompt", default="This film ", help="default: %(default)r")
    add("--sample", type=int, default=200, help="bytes; default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--results", type=Path, default=Path("runs/convert"), help="a folder")
    return parser.parse_args(argv)


def settings(args):
    others = ("data_dir", "tasks", "prompt", "seed", "results")
    versions = {m.__name__: m.__version__ for m in (keras, tf, keras_kt)}
    return {k: v for k, v in vars(args).items() if k not in others} | versions


def run_stages(name, train, test, args):
    """The trained linear model; rows of stages, and the arrays of the run."""
    task = TASKS[name]
    test = tuple(array[: args.test_examples] for array in test)
    rows = []

    def report(stage, model, seconds):
        errors = []
        if model is not teacher:
            found = keras_kt.conversion.attention_error(
                model, test[0][:8], teacher=teacher
            )
            errors = list(found.layers.values())
        with working(f"Testing, {stage}"):
            outputs = model.predict(
                test[0], batch_size=args.batch_size, verbose=0
            )
        row = {
            "task": name,
            "seed": args.seed,
            "number": len(rows),
            "stage": stage,
            "metric": task.metric,
            "score": task.score(outputs, test[1]),
            "errors": errors,
            "seconds": seconds,
        }
        rows.append(row)
        print(f"{name}, {stage}: {task.metric} {row['score']:.4f}", flush=True)

    teacher = task.build()
    seconds = fit(task, teacher, train, args, args.steps, LEARNING_RATE)
    report("softmax", teacher, seconds)

    plain, _ = keras_kt.convert_attention(
        teacher,
        spectral_prior=keras_kt.NormalPrior(radius="chi"),
        feature_map=keras_kt.PositiveFeatures(two_sided=False),
        num_features=args.features,
    )
    report("plain orthogonal features", plain, 0.0)

    start = time.perf_counter()
    student, conversion = convert(task, teacher, args)
    report("converted", student, time.perf_counter() - start)
    print(conversion)

    start = time.perf_counter()
    with working("Calibrating"):
        calibration = keras_kt.conversion.calibrate(
            student, train[0][:CALIBRATING], budget=args.features
        )
    report("calibrated", student, time.perf_counter() - start)
    print(calibration)
    convert_report.draw(name, student, calibration, test[0][:1], args)

    start = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    chosen = rng.permutation(len(train[0]))[: 8 * args.distill_steps]
    with working(f"Distilling, {args.distill_steps} steps"):
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
    heads = calibration.after.heads
    return (
        student,
        rows,
        {
            "heads": np.array([[getattr(h, n) for n in HEAD] for h in heads]),
            "paths": np.array([head.path for head in heads]),
        },
    )


def convert(task, model, args):
    return keras_kt.convert_attention(
        model, num_features=args.features, near_field=task.near_field(args)
    )


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
        # The dataset does it.
        shuffle=False,
        **progress(),
    )
    return time.perf_counter() - start


def speed(task, args):
    """Milliseconds of inference on one long sequence, both models."""
    softmax = task.build()
    linear, _ = convert(task, softmax, args)
    rng = np.random.default_rng(args.seed)
    x = tf.constant(rng.integers(1, 257, size=(1, args.speed_tokens)), tf.int32)
    # Keras compiles by XLA or not as suits a model: the faster one counts.
    return {
        f"{name}_milliseconds": min(
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
    """A review that the model makes up; milliseconds a byte, by position."""
    prompt = byte_array([args.prompt.encode()], len(args.prompt))
    tokens = keras_kt.generate(
        model, prompt, args.sample, temperature=0.8, seed=args.seed
    )
    text = bytes(np.clip(tokens[0] - 1, 0, 255).astype("uint8").tolist())
    step = tf.function(model.step)
    state, times = model.initial_state(1), {}
    for position in (EARLY, *filter(None, [args.speed_tokens])):
        _, state = model.step(np.ones((1, position), "int32"), state)
        times[position] = milliseconds(
            step, tf.ones((1, 1), tf.int32), state, laps=50
        )
    sample = text.decode(errors="replace")
    print(sample)
    return sample, times
