"""Runs the experiments, attention × task × seed, and makes their tables.

Each run is one of the other scripts in a process of its own, with a log, a
checkpoint and one JSON file. A sweep that was stopped goes on: what has a JSON
file is not run again, what has a checkpoint is resumed.

    python examples/sweep.py --data-dir DATA                # everything
    python examples/sweep.py --data-dir DATA --tasks listops --attention \\
        softmax GMM-PRF --seeds 0 1 2 --jobs 2
    python examples/sweep.py --report                       # tables only

Flags after `--` go to every run: `-- --steps 20` for a trial. Flags beside a
name go to its runs: `--attention "normal:positive --qk-norm l2"`.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras_kt

HERE = Path(__file__).parent
LOCKS = defaultdict(threading.Lock)
# The script of a task, its flags, and what it must beat (see the README).
TASKS = {
    "listops": ("listops.py", (), "first operator alone 0.320"),
    "text": (
        "text_classification.py",
        ("--export", "{export}"),
        "byte counts 0.646",
    ),
    "image": (
        "image_classification.py",
        ("--task", "cifar10"),
        "linear on pixels 0.289",
    ),
    "dna": ("dna.py", (), "4-mers 0.945"),
    "mnist5k": ("image_classification.py", ("--task", "mnist5k"), ""),
    "pathfinder": (
        "image_classification.py",
        ("--task", "pathfinder"),
        "chance 0.5",
    ),
    "retrieval": ("document_retrieval.py", (), "TF-IDF cosine 0.83"),
    "sparsity": ("synthetic_sparsity.py", (), ""),
    "language": ("language_model.py", (), "order-4 model 2.22"),
    "sst2": (
        "sentence_pairs.py",
        ("--task", "SST-2", "--pretrained", "{pretrained}"),
        "majority 0.509",
    ),
    "cola": (
        "sentence_pairs.py",
        ("--task", "CoLA", "--pretrained", "{pretrained}"),
        "majority 0.689",
    ),
}
SYSTEMS = ("softmax", *keras_kt.PAPER_SYSTEMS)
# Of these systems the kernel is not learned.
FIXED = ("Performer", "RBF-RKS", "RBF-PRF")


def main():
    args = parse_args()
    if not args.report:
        jobs = [
            (task, attention, seed)
            for task in args.tasks
            for seed in args.seeds
            for attention in args.attention
        ]
        failed = run_all(jobs, args)
        if failed:
            print(f"{len(failed)} runs failed: {', '.join(failed)}")
    records = read_records(args.results)
    if not records:
        sys.exit(f"No results in {args.results}: run without --report first.")
    write_table(records, args.results / "experiments.md")
    draw(records, args.results)
    return bool(not args.report and failed)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--attention", nargs="+", default=list(SYSTEMS))
    add("--seeds", nargs="+", type=int, default=[0])
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--data-dir", type=Path, default=".", help="a folder")
    add("--results", type=Path, default="results/experiments", help="a folder")
    add("--work", type=Path, default="runs", help="for logs and checkpoints")
    add("--report", action="store_true", help="tables and plot only")
    add("flags", nargs="*", help="after `--`: flags of every run")
    return parser.parse_args()


def run_all(jobs, args):
    """Runs what has no result yet; returns the names of failed runs."""
    waiting = [job for job in jobs if not result_path(job, args).exists()]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them done before")
    failed = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(run, job, args): job for job in waiting}
        finished = concurrent.futures.as_completed(futures)
        for number, future in enumerate(finished, 1):
            seconds, code, last = future.result()
            label = name(futures[future])
            if code:
                failed.append(label)
                last = f"FAILED, see {args.work / label}.log: {last}"
            print(
                f"[{number}/{len(waiting)}, {seconds / 60:.1f} minutes] {last}",
                flush=True,
            )
    return failed


def run(job, args):
    """Seconds, exit code and last words of one run."""
    task, attention, seed = job
    script, flags, _ = TASKS[task]
    label = name(job)
    args.work.mkdir(parents=True, exist_ok=True)
    pretrained = args.work / name(("pretrained", attention, seed))
    places = {
        "{pretrained}": f"{pretrained}.npz",
        "{export}": str(args.work / f"{label}-export"),
    }
    command = [
        sys.executable,
        str(HERE / script),
        *(places.get(flag, flag) for flag in flags),
        *("--attention", *attention.split(), "--seed", str(seed)),
        *("--data-dir", str(args.data_dir)),
        *("--output", str(result_path(job, args))),
        *("--checkpoints", str(args.work / label)),
        *args.flags,
    ]
    environment = dict(os.environ)
    if args.jobs > 1:
        # Else every run would start a thread for each core.
        threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
        environment["TF_NUM_INTRAOP_THREADS"] = threads
        environment["TF_NUM_INTEROP_THREADS"] = threads
    start = time.perf_counter()
    log = args.work / f"{label}.log"
    # What one pretrains, the next takes.
    shared = pretrained if "{pretrained}" in flags else log
    with LOCKS[shared], log.open("a") as file:
        code = subprocess.run(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    lines = [x for x in log.read_text().splitlines() if ": test " in x]
    lines = lines or log.read_text().splitlines() or [""]
    return time.perf_counter() - start, code, lines[-1]


def name(job):
    task, attention, seed = job
    words = attention.replace(":", " ").replace("--", "").split()
    return "-".join((task, *words, str(seed)))


def result_path(job, args):
    return args.results / f"{name(job)}.json"


def read_records(folder):
    """Records by task, then attention: lists over seeds."""
    records = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        # task-attention-seed, or task-attention-seed.part of the same run.
        stem, _, part = path.stem.partition(".")
        task = next((t for t in TASKS if stem.startswith(f"{t}-")), stem)
        label = stem.removeprefix(f"{task}-").rpartition("-")[0]
        task = part or task
        records[task][label].append(record)
    return records


def write_table(records, path):
    """A Markdown table a task, best first."""
    lines = [
        "# Experiments",
        "",
        "`python examples/sweep.py`; each run's flags are in its JSON file.",
        "",
    ]
    lines += overview(records)
    for task, systems in records.items():
        first = next(iter(systems.values()))[0]
        floor = TASKS.get(task, ("", (), ""))[2]
        lines += [
            f"## {title(first)}",
            "",
            f"To beat: {floor}." if floor else "",
            "",
            f"| attention | test {first['score']} | fresh draws | validation "
            "| ms a step | minutes | peak MiB | seeds |",
            "|" + " --- |" * 8,
        ]
        rows = sorted(
            (summary(attention, runs) for attention, runs in systems.items()),
            key=lambda row: row[0],
            reverse=not is_loss(first),
        )
        lines += [text for _, text in rows] + [""]
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


def title(record):
    """The task's name, with what its preset does to the sequence."""
    stride = record["arguments"]["preset"]["stride"]
    stem = f"stem of stride {stride}"
    if stride == 1 or stem in record["task"]:
        return record["task"]
    return f"{record['task']}, {stem}"


def is_loss(record):
    """Whether the lower score is the better one."""
    return record["score"].startswith("bits")


def overview(records):
    """A table of mean test scores, attention × task."""
    tasks = list(records)
    attentions = {a: None for a in SYSTEMS} | {
        a: None for systems in records.values() for a in systems
    }
    lines = [
        "| attention | " + " | ".join(tasks) + " |",
        "|" + " --- |" * (1 + len(tasks)),
    ]
    for attention in attentions:
        cells = []
        for task in tasks:
            runs = records[task].get(attention, [])
            mean = sum(run["test"] for run in runs) / max(1, len(runs))
            mark = f" ({len(runs)})" if len(runs) > 1 else ""
            cells.append(f"{mean:.4f}{mark}" if runs else "")
        if any(cells):
            lines.append(f"| {attention} | " + " | ".join(cells) + " |")
    floors = [TASKS.get(task, ("", (), ""))[2] for task in tasks]
    return [*lines, "| *to beat* | " + " | ".join(floors) + " |", ""]


def summary(attention, runs):
    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    test = mean(run["test"] for run in runs)
    draws = [draw for run in runs for draw in run["fresh_draws"]]
    spread = "–"
    if draws:
        center = mean(draws)
        deviation = mean((draw - center) ** 2 for draw in draws) ** 0.5
        spread = f"{center:.4f} ± {deviation:.4f}"
    tests = (
        ""
        if len(runs) == 1
        else " (" + ", ".join(f"{run['test']:.4f}" for run in runs) + ")"
    )
    # GLUE's own score of CoLA.
    if "matthews" in runs[0]:
        tests += f", Matthews {mean(run['matthews'] for run in runs):.4f}"
    return test, (
        f"| {attention} | {test:.4f}{tests} | {spread} "
        f"| {mean(run['curve'][-1]['validation'] for run in runs):.4f} "
        f"| {mean(run['milliseconds_per_step'] for run in runs):.0f} "
        f"| {mean(run['seconds'] for run in runs) / 60:.1f} "
        f"| {mean(run['peak_memory_mib'] for run in runs):.0f} "
        f"| {len(runs)} |"
    )


def draw(records, folder):
    try:
        import matplotlib
    except ImportError:
        print("No pictures: they need `pip install keras_kt[plot]`.")
        return
    matplotlib.use("Agg")
    for name, figure in (
        ("experiments", draw_curves(records)),
        ("kernels", draw_kernels(records)),
        ("sparsity", draw_sparsity(records.get("sparsity", {}))),
    ):
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110)
            print(f"Picture: {folder / name}.png")


def draw_curves(records):
    """Validation against step and against seconds, a row of panels a task."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(records),
        2,
        figsize=(11, 3.6 * len(records)),
        layout="constrained",
        squeeze=False,
    )
    for (left, right), (_, systems) in zip(
        panels, records.items(), strict=True
    ):
        for attention, runs in sorted(systems.items()):
            for index, run in enumerate(runs):
                points = run["curve"]
                label = attention if index == 0 else None
                for panel, key in ((left, "step"), (right, "seconds")):
                    panel.plot(
                        [p[key] for p in points],
                        [p["validation"] for p in points],
                        label=label,
                        **style(attention, systems),
                    )
        record = next(iter(systems.values()))[0]
        left.set_title(title(record))
        left.set_xlabel("training step")
        left.set_ylabel(f"validation {record['score']}")
        right.set_xlabel("seconds of training")
        # Beside the panels, where it hides no curve; labels are the left one's.
        right.legend(
            *left.get_legend_handles_labels(),
            fontsize=7,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )
    return figure


def style(attention, others):
    """The same line for an attention in every panel."""
    known = [*SYSTEMS, *sorted(set(others) - set(SYSTEMS))]
    number = known.index(attention)
    return {
        "color": "k" if attention == "softmax" else f"C{number % 10}",
        "ls": "--" if attention.endswith("RKS") else "-",
    }


def draw_kernels(records):
    """The kernels of each task's best learned system, a row a task."""
    from matplotlib import pyplot

    rows = []
    for task, systems in records.items():
        runs = [
            run
            for attention, of_system in systems.items()
            for run in of_system
            if attention not in (*FIXED, "softmax") and "kernels" in run
        ]
        if runs:
            better = min if is_loss(runs[0]) else max
            best = better(runs, key=lambda x: x["curve"][-1]["validation"])
            rows.append((task, best))
    if not rows:
        return None
    columns = max(len(run["kernels"]["trained"]) for _, run in rows)
    figure, panels = pyplot.subplots(
        len(rows),
        columns,
        figsize=(4.5 * columns, 3 * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    for row, (task, run) in zip(panels, rows, strict=True):
        kernels = run["kernels"]
        for panel in row[len(kernels["trained"]) :]:
            panel.set_axis_off()
        for layer, panel in enumerate(row[: len(kernels["trained"])]):
            for kind, line in (("untrained", ":"), ("trained", "-")):
                for head, profile in enumerate(kernels[kind][layer]):
                    panel.plot(
                        kernels["distances"], profile, line, color=f"C{head}"
                    )
            panel.axhline(0.0, color="0.8", zorder=0)
            name = run["arguments"]["attention"]
            panel.set_title(f"{task}, {name}, layer {layer + 1}", fontsize=9)
            panel.set_xlabel("|q − k|")
        row[0].set_ylabel("E cos ω·(q − k)")
    figure.suptitle("Kernels: a color a head; dotted before training")
    return figure


def draw_sparsity(systems):
    """Accuracy against the share of the tokens that must be attended to."""
    from matplotlib import pyplot

    if not systems:
        return None
    figure, panel = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for attention, runs in sorted(systems.items()):
        rows = runs[0]["densities"]
        mean = [
            sum(run["densities"][i]["accuracy"] for run in runs) / len(runs)
            for i in range(len(rows))
        ]
        density = [row["density"] for row in rows]
        panel.plot(density, mean, label=attention, **style(attention, systems))
    uniform = [row["uniform"] for row in rows]
    panel.plot(density, uniform, ":", color="0.5", label="uniform attention")
    panel.set_xscale("log", base=2)
    panel.invert_xaxis()
    panel.set_xlabel("density: share of the tokens that share a key")
    panel.set_ylabel("test accuracy")
    panel.set_title(runs[0]["task"])
    figure.legend(fontsize=7, loc="outside right upper")
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
