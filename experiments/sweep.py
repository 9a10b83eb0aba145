"""Runs tasks × attentions × seeds, and makes the tables and pictures of them.

Each run is a process of its own, with a log and checkpoints in --work, and adds
its row to the study. A sweep that was stopped goes on: what has a row is not
run again, unless --again says so; what has a checkpoint is resumed.

    python -m experiments sweep --data-dir DATA                # everything
    python -m experiments sweep --data-dir DATA --tasks listops --attention \\
        softmax GMM-PRF --seeds 0 1 2 --jobs 2

Flags after `--` go to every run: `-- --steps 20` for a trial. Flags beside a
name go to its runs: `--attention "normal:positive --qk-norm l2"`. Each --vary
is a flag and its values, and all of them are crossed: `--vary key_dim 2 4 8
--vary num_features 64 128`. Softmax has no flags of a kernel to vary.
"""

import argparse
import concurrent.futures
import itertools
import os
import shlex
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

from experiments import attentions, flags, records, report
from experiments.attentions import SYSTEMS
from experiments.help import Help
from experiments.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
LOCKS = defaultdict(threading.Lock)


def main(argv):
    args = parse_args(argv)
    failed = run_all(make_jobs(args), args)
    if failed:
        print(f"{len(failed)} runs failed: {', '.join(failed)}")
    if not args.pack:
        report.write(args.results)
    return bool(failed)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m experiments sweep",
        description=__doc__,
        formatter_class=Help,
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="names")
    add("--attention", nargs="+", default=list(SYSTEMS), help="names")
    add("--seeds", nargs="+", type=int, default=[0], help="of runs")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--data-dir", type=Path, default=".", help="a folder")
    add("--results", type=Path, default="results/experiments", help="a folder")
    add("--work", type=Path, default="runs", help="for logs and checkpoints")
    add(
        "--vary",
        nargs="+",
        action="append",
        default=[],
        help="a flag's name and values, for each --vary",
    )
    add("--again", action="store_true", help="run what has a row, too")
    add("--pack", type=Path, help="a folder to pack the runs into: see offload")
    add("--unpack", type=Path, help="a folder of results to record")
    add("flags", nargs="*", help="after `--`: flags of every run")
    args = parser.parse_args(argv)
    args.attention = [attentions.split(text) for text in args.attention]
    for flag, *values in args.vary:
        for task in args.tasks:
            known = (*flags.size_names(task), *attentions.FLAGS)
            if flag not in known or not values:
                parser.error(
                    "--vary needs a flag's name, among those that tell runs of "
                    "every task apart, and its values. Received: --vary "
                    f"{' '.join([flag, *values])}. {task} has "
                    f"{', '.join(known)}."
                )
    return args


def make_jobs(args):
    """The runs that were asked for, each once: values of `records.KEYS`."""
    varied = [flag for flag, *_ in args.vary]
    jobs = {}
    for task, seed, attention, *values in itertools.product(
        args.tasks,
        args.seeds,
        args.attention,
        *(values for _, *values in args.vary),
    ):
        choice = zip(varied, values, strict=True)
        job = _make_job(task, attention, choice, seed, args)
        jobs.setdefault(name(job), job)
    return list(jobs.values())


def _make_job(task, attention, choice, seed, args):
    """The run of one choice of values of the flags that are varied."""
    of_kernel, others = [], []
    for flag, value in choice:
        words = of_kernel if flag in attentions.FLAGS else others
        words += [f"--{flag.replace('_', '-')}", value]
    if attention[0] != "softmax":
        attention = attentions.split(" ".join((*attention, *of_kernel)))
    sizes = flags.given_sizes([*others, *args.flags], task)
    return dict(zip(records.KEYS, (task, *attention, sizes, seed), strict=True))


def run_all(jobs, args):
    """Runs what has no row yet; returns the names of failed runs."""
    done = set() if args.again else set(map(name, records.read(args.results)))
    waiting = [job for job in jobs if name(job) not in done]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them done before")
    if args.pack or args.unpack:
        from experiments import offload

        return offload.run_all(waiting, args)
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
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / name(job)
    log = path.with_name(f"{path.name}.log")
    command = [
        *(sys.executable, "-m", "experiments", job["task"]),
        *("--attention", job["attention"], *shlex.split(job["flags"])),
        *shlex.split(job["sizes"]),
        *("--seed", str(job["seed"])),
        *("--data-dir", str(args.data_dir)),
        *("--results", str(args.results)),
    ]
    lock = LOCKS[path]
    if TASKS[job["task"]].module == "glue":
        # What one pretrains, the next takes.
        pretrained = args.work / f"{name({**job, 'task': 'pretrained'})}.npz"
        command += ["--pretrained", str(pretrained)]
        lock = LOCKS[pretrained]
    # A run that is made again must not go on from where it ended before.
    if not args.again:
        command += ["--checkpoints", str(path)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    if args.jobs > 1:
        # Else every run would start a thread for each core.
        threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
        environment["TF_NUM_INTRAOP_THREADS"] = threads
        environment["TF_NUM_INTEROP_THREADS"] = threads
    start = time.perf_counter()
    with lock, log.open("a") as file:
        print(f"{name(job)}: see {log}", flush=True)
        code = subprocess.run(
            [*command, *args.flags],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    lines = [x for x in log.read_text().splitlines() if ": test " in x]
    lines = lines or log.read_text().splitlines() or [""]
    return time.perf_counter() - start, code, lines[-1]


def name(row):
    return f"{row['task']}-{records.label(row, True)}-{row['seed']}"
