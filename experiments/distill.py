"""How much of a trained softmax model a converted one keeps, without labels.

Trains the models of convert.py with softmax, converts each in several ways and
distills: first layer by layer, then the whole by its teacher's outputs. Both
together take a fifth of the teacher's steps. What layers alone get back in as
many: `--layer-steps 120 --output-steps 0`. Records the quality after each
stage, and with the far field zeroed where there is a near one:

    python -m experiments distill --data-dir .
"""

import argparse
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_kt
from examples.progress import working
from experiments import records, reviews
from experiments.convert import fit
from experiments.convert_tasks import TASKS
from experiments.help import Help

LEARNING_RATE = 2e-3
KEYS = ("task", "seed", "way", "number")
# Ways to convert: arguments of `convert_attention`. The first is its default.
WAYS = {
    "default": dict,
    "self": lambda: {
        "feature_map": keras_kt.PositiveFeatures("self"),
    },
    "points": lambda: {
        "spectral_prior": keras_kt.EmpiricalPrior(tied=False),
        "feature_map": keras_kt.PositiveFeatures("self"),
    },
    "near": lambda: {
        "feature_map": keras_kt.PositiveFeatures("self"),
        "near_field": 64,
    },
}


def main(argv):
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    train, test = reviews.labelled(args.data_dir)
    for seed in args.seeds:
        for name in args.tasks:
            task = TASKS[name]
            data = task.arrays(train, args), task.arrays(test, args)
            run(name, seed, *data, args)
    table = render(args.results)
    (args.results / "distill.md").write_text(table)
    print(table)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m experiments distill",
        description=__doc__.split("\n\n")[0],
        formatter_class=Help,
    )
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("."), help="has aclImdb/")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="names")
    add(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="to convert"
    )
    add("--seeds", nargs="+", type=int, default=[0], help="of runs")
    add("--steps", type=int, default=600, help="default: %(default)s")
    add("--layer-steps", type=int, default=40, help="default: %(default)s")
    add("--output-steps", type=int, default=80, help="0: no such stage")
    add("--layer-rate", type=float, default=1e-2, help="default: %(default)s")
    add("--output-rate", type=float, default=2e-3, help="default: %(default)s")
    add("--batch-size", type=int, default=32, help="default: %(default)s")
    add("--words", type=int, default=128, help="default: %(default)s")
    add("--bytes", type=int, default=128, help="default: %(default)s")
    add("--test-examples", type=int, default=2000, help="default: %(default)s")
    add("--features", type=int, default=64, help="D; default: %(default)s")
    add("--work", type=Path, default=Path("runs/distill"), help="teachers")
    add("--results", type=Path, default=Path("runs/distill"), help="a folder")
    return parser.parse_args(argv)


def run(name, seed, train, test, args):
    """One teacher and its students, those that are not recorded yet."""
    keras.utils.set_random_seed(seed)
    task = TASKS[name]
    test = tuple(array[: args.test_examples] for array in test)
    teacher, seconds = trained(name, seed, train, args)
    done = {
        tuple(row[key] for key in KEYS[:3])
        for row in records.read(args.results, "stages")
    }
    reference = scored(task, teacher, test, args)
    for way in args.ways:
        if (name, str(seed), way) in done:
            continue
        rows = [("softmax", args.steps, seconds, reference, None)]
        rows += stages(task, seed, way, teacher, train, test, args)
        columns = "stage", "steps", "seconds", "score", "near_alone"
        common = {"task": name, "seed": seed, "metric": task.metric}
        sizes = {
            "tokens": args.bytes if name == "lm" else args.words,
            "num_features": args.features,
            "batch_size": args.batch_size,
        }
        versions = {m.__name__: m.__version__ for m in (keras, tf, keras_kt)}
        records.write(
            args.results,
            [
                common
                | {"way": way, "number": number}
                | dict(zip(columns, row, strict=True))
                | sizes
                | versions
                for number, row in enumerate(rows)
            ],
            name="stages",
            keys=KEYS,
        )


def trained(name, seed, train, args):
    """The teacher, from its file if there is one, and its seconds."""
    task = TASKS[name]
    teacher = task.build()
    stem = f"{name}-{seed}-{args.steps}-{args.batch_size}"
    path = args.work / f"{stem}-{args.bytes}-{args.words}.weights.h5"
    if path.exists():
        teacher.load_weights(path)
        return teacher, None
    args.seed = seed
    seconds = fit(task, teacher, train, args, args.steps, LEARNING_RATE)
    teacher.save_weights(path)
    return teacher, seconds


def stages(task, seed, way, teacher, train, test, args):
    """Rows of one student: stage, steps, seconds, score and near field's."""
    student, _ = keras_kt.convert_attention(
        teacher, num_features=args.features, seed=seed, **WAYS[way]()
    )
    rows = []

    def report(stage, steps, start):
        seconds = time.perf_counter() - start
        score, near = scored(task, student, test, args), None
        if WAYS[way]().get("near_field"):
            with keras_kt.conversion.without_far_field(student):
                near = scored(task, student, test, args)
        rows.append((stage, steps, seconds, score, near))
        beside = "" if near is None else f", near field alone {near:.4f}"
        print(
            f"{task.metric} of {way}, {stage}: {score:.4f}{beside}", flush=True
        )

    start = time.perf_counter()
    report("converted", 0, start)
    batches = tf.data.Dataset.from_tensor_slices(train[0])
    batches = batches.shuffle(len(train[0]), seed=seed).batch(args.batch_size)
    start = time.perf_counter()
    with working(f"Distilling layers, {args.layer_steps} steps"):
        keras_kt.conversion.distill(
            student,
            teacher,
            batches,
            steps=args.layer_steps,
            learning_rate=schedule(args.layer_rate, args.layer_steps),
            train_projections=True,
        )
    report("layers distilled", args.layer_steps, start)
    if not args.output_steps:
        return rows
    start = time.perf_counter()
    with working(f"Distilling outputs, {args.output_steps} steps"):
        keras_kt.conversion.distill_outputs(
            student,
            teacher,
            batches.skip(args.layer_steps),
            steps=args.output_steps,
            learning_rate=schedule(args.output_rate, args.output_steps),
        )
    report("outputs distilled", args.output_steps, start)
    return rows


def schedule(rate, steps):
    return keras.optimizers.schedules.CosineDecay(rate, max(steps, 1))


def scored(task, model, test, args):
    # Not `predict`, which keeps the graph of another attention.
    outputs = [
        np.asarray(model(x, training=False))
        for x in np.array_split(test[0], -(-len(test[0]) // 100))
    ]
    return task.score(np.concatenate(outputs), test[1])


def render(folder):
    """Markdown: means over seeds, with standard errors, a line a stage."""
    lines = []
    rows = records.read(folder, "stages")
    for task, of_task in records.by(rows, lambda row: row["task"]).items():
        lines += [
            f"| {task}: way | stage | {of_task[0]['metric']} | less the "
            "teacher's | near field alone |",
            "| --- | --- | --- | --- | --- |",
        ]
        stages = records.by(of_task, lambda r: (r["way"], r["stage"]))
        teachers = {
            (row["seed"], row["way"]): float(row["score"])
            for row in of_task
            if row["stage"] == "softmax"
        }
        for (way, stage), found in stages.items():
            scores = np.array([float(row["score"]) for row in found])
            paired = scores - [teachers[r["seed"], r["way"]] for r in found]
            near = [float(r["near_alone"]) for r in found if r["near_alone"]]
            error = (
                np.std(paired, ddof=1) / len(paired) ** 0.5
                if len(paired) > 1
                else float("nan")
            )
            lines.append(
                f"| {way} | {stage} | {scores.mean():.4f} | "
                f"{paired.mean():+.4f} ± {error:.4f} | "
                + (f"{np.mean(near):.4f} |" if near else "|")
            )
        lines.append("")
    return "\n".join(lines)
