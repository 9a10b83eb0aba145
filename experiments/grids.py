"""Tables of a task whose runs differ in size: attention × the size's values."""

import re
import shlex
import statistics
from collections import defaultdict

from experiments import records


def table(task, rows):
    """Lines of Markdown; none where all runs have the same sizes.

    A column is a value of the flag that has most of them, a line an attention
    with its other sizes, and a cell the mean over seeds with its standard
    error.

    Args:
        task: its name.
        rows: of the task.
    """
    flag, values = _varied(rows)
    if flag is None:
        return []
    cells = defaultdict(list)
    lines = {}
    for row in rows:
        others = given(row)
        value = others.pop(flag, "")
        line = " ".join([records.label(row), *map(" ".join, others.items())])
        cells[line, value].append(float(row["score"]))
        lines[line] = None
    header = " | ".join(["attention", *(value or "preset" for value in values)])
    name = flag.removeprefix("--").replace("-", "_")
    return [
        f"## {task} by {name}",
        "",
        f"| {header} |",
        "|" + " --- |" * (1 + len(values)),
        *(
            " | ".join([f"| {line}", *(_cell(cells[line, v]) for v in values)])
            + " |"
            for line in sorted(lines, key=natural)
        ),
        "",
    ]


def given(row):
    """The sizes of a run: their values by flag, as texts."""
    sizes, flag = defaultdict(list), None
    for word in shlex.split(row.get("sizes", "")):
        if word.startswith("--"):
            flag = word
        else:
            sizes[flag].append(word)
    return {flag: " ".join(words) for flag, words in sizes.items()}


def natural(text):
    """A key that sorts numbers within texts by their size."""
    words = re.split(r"(\d+)", text)
    return [int(word) if word.isdigit() else word for word in words]


def standard_error(values):
    """Of the mean; `None` for a single value."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / len(values) ** 0.5


def _varied(rows):
    """The flag with most values, and these in order; `None` if none varies."""
    sizes = [given(row) for row in rows]
    values = {
        flag: sorted({each.get(flag, "") for each in sizes}, key=natural)
        for flag in dict.fromkeys(flag for each in sizes for flag in each)
    }
    flag = max(values, key=lambda flag: len(values[flag]), default=None)
    if flag is None or len(values[flag]) == 1:
        return None, []
    return flag, values[flag]


def _cell(scores):
    if not scores:
        return ""
    error = standard_error(scores)
    spread = "" if error is None else f" ± {error:.4f}"
    return f"{statistics.mean(scores):.4f}{spread}"
