"""Tables and pictures of a study, from what its runs left behind.

python -m experiments report --results results/experiments
"""

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from experiments import grids, plots, records
from experiments.attentions import SYSTEMS
from experiments.help import Help
from experiments.tasks import to_beat

COLUMNS = "| attention | test {} | fresh draws | validation "
COLUMNS += "| ms a step | minutes | peak MiB | seeds |"


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m experiments report",
        description=__doc__.split("\n\n")[0],
        formatter_class=Help,
    )
    add = parser.add_argument
    add("--results", type=Path, default="results/experiments", help="a folder")
    write(parser.parse_args(argv).results)


def write(folder):
    """Writes experiments.md and, if matplotlib is installed, pictures."""
    rows = records.read(folder)
    if not rows:
        sys.exit(f"No results in {folder}: run something first.")
    table = tables(rows)
    (folder / "experiments.md").write_text(table)
    print(table)
    plots.draw(by_task(rows), folder)


def by_task(rows):
    """Rows by task, then attention: lists over seeds.

    Where runs of a task differ in their sizes, these are told beside the
    attention.
    """
    tasks = defaultdict(list)
    for row in rows:
        # TASK, or TASK.PART of the same run.
        task, _, part = row["task"].partition(".")
        tasks[part or task].append(row)
    systems = {task: defaultdict(list) for task in tasks}
    for task, of_task in tasks.items():
        differ = len({row.get("sizes", "") for row in of_task}) > 1
        for row in of_task:
            systems[task][records.label(row, with_sizes=differ)].append(row)
    return systems


def tables(rows):
    """Markdown: an overview, then a table a task, best first."""
    tasks = by_task(rows)
    lines = [
        "# Experiments",
        "",
        "`python -m experiments sweep`; each run's flags are in runs.csv.",
        "",
        # Of a single task its own table says more.
        *(overview(tasks) if len(tasks) > 1 else []),
    ]
    for task, systems in tasks.items():
        lines += grids.table(task, [r for rs in systems.values() for r in rs])
        first = next(iter(systems.values()))[0]
        floor = to_beat(task, first.get("sizes", ""))
        lines += [
            f"## {plots.title(first)}",
            "",
            f"To beat: {floor}." if floor else "",
            "",
            COLUMNS.format(first["metric"]),
            "|" + " --- |" * 8,
        ]
        cells = sorted(
            (summary(attention, runs) for attention, runs in systems.items()),
            key=lambda cell: cell[0],
            reverse=not records.is_loss(first),
        )
        lines += [text for _, text in cells] + [""]
    return "\n".join(lines) + "\n"


def overview(tasks):
    """A table of mean test scores, attention × task."""
    attentions = {a: None for a in SYSTEMS} | {
        a: None for systems in tasks.values() for a in systems
    }
    lines = [
        "| attention | " + " | ".join(tasks) + " |",
        "|" + " --- |" * (1 + len(tasks)),
    ]
    for attention in attentions:
        cells = []
        for systems in tasks.values():
            runs = systems.get(attention, [])
            mark = f" ({len(runs)})" if len(runs) > 1 else ""
            cells.append(f"{mean(runs, 'score'):.4f}{mark}" if runs else "")
        if any(cells):
            lines.append(f"| {attention} | " + " | ".join(cells) + " |")
    floors = map(to_beat, tasks)
    return [*lines, "| *to beat* | " + " | ".join(floors) + " |", ""]


def summary(attention, runs):
    """The mean score of a system, and its line."""
    score = mean(runs, "score")
    draws = [x for row in runs for x in records.numbers(row["fresh_draws"])]
    spread = "–"
    if draws:
        center = statistics.fmean(draws)
        spread = f"{center:.4f} ± {statistics.pstdev(draws):.4f}"
    tests = ""
    if len(runs) > 1:
        tests = ", ".join(f"{float(row['score']):.4f}" for row in runs)
        tests = f" ({tests})"
    # GLUE's own score of CoLA.
    if runs[0].get("matthews"):
        tests += f", Matthews {mean(runs, 'matthews'):.4f}"
    # Of another machine, whose accelerator runs share, they would say nothing.
    step = minutes = memory = "–"
    if not plots.is_remote(runs):
        step = f"{mean(runs, 'milliseconds_per_step'):.0f}"
        minutes = f"{mean(runs, 'seconds') / 60:.1f}"
        memory = f"{mean(runs, 'peak_memory_mib'):.0f}"
    return score, (
        f"| {attention} | {score:.4f}{tests} | {spread} "
        f"| {mean(runs, 'validation'):.4f} "
        f"| {step} | {minutes} | {memory} "
        f"| {len(runs)} |"
    )


def mean(runs, column):
    # Not `sum`, which rounds otherwise from Python 3.12 on.
    return statistics.fmean(float(row[column]) for row in runs)
