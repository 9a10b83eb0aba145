"""Paired differences between attentions of a study, with standard errors.

Runs are paired that differ in their attention alone: of the same task, sizes,
schedule and seed, so of the same batches, and of the same D, unless softmax is
one of them or both names give their own --num-features. A name without
--num-features stands for its runs of every D.

    python -m experiments compare --results results/experiments \\
        --pair "normal:positive" "fixed:positive" --pair GMM-PRF softmax

Last comes the best learned kernel less the best fixed one, at equal D, decay
and near field: the best by validation, so that the choice has no part in the
difference of test scores.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from experiments import attentions, grids, records
from experiments.flags import SIZES
from experiments.help import Help

# Columns that pairs share, beside the seed and D.
SHARED = ("task", "sizes", "title", "metric", "preset", *SIZES)
HEADER = "| task | sizes | D | first | second | first is better by "
HEADER += "| standard error | seeds |"


class Difference(NamedTuple):
    """What one attention gains over another, in one setting.

    Attributes:
        row: of one of the runs, for what all of them share.
        features: D of both, as a text.
        first: mean score of the first attention.
        second: mean score of the second one.
        gain: mean of the paired differences, positive where the first is
            better: lower bits are.
        error: its standard error; `None` for a single seed.
        seeds: number of pairs.
        names: labels of both.
    """

    row: dict
    features: str
    first: float
    second: float
    gain: float
    error: float | None
    seeds: int
    names: tuple[str, str]


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m experiments compare",
        description=__doc__,
        formatter_class=Help,
    )
    add = parser.add_argument
    add("--results", type=Path, default="results/experiments", help="a folder")
    add(
        "--pair",
        nargs=2,
        action="append",
        default=[],
        metavar=("FIRST", "SECOND"),
        help="attentions, each with its flags",
    )
    args = parser.parse_args(argv)
    rows = records.read(args.results)
    if not rows:
        sys.exit(f"No results in {args.results}: run something first.")
    text = tables(rows, args.pair)
    (args.results / "compare.md").write_text(text)
    print(text)


def tables(rows, pairs):
    """Markdown: a table a pair, then the best learned and the best fixed."""
    lines = ["# Paired differences", ""]
    for first, second in pairs:
        lines += [f"## {first} less {second}", ""]
        found = differences(rows, first, second)
        if found:
            lines += table(found)
        else:
            lines += ["No runs differ in these alone.", ""]
    found = best_differences(rows)
    if found:
        lines += ["## Best learned kernel less best fixed one", ""]
        lines += table(found, with_names=True)
    return "\n".join(lines)


def table(found, with_names=False):
    """Lines of Markdown, a `Difference` each."""
    header = HEADER + (" of |" if with_names else "")
    lines = [header, "|" + " --- |" * (header.count("|") - 1)]
    for each in found:
        error = "–" if each.error is None else f"{each.error:.4f}"
        line = (
            f"| {each.row['task']} | {each.row.get('sizes', '')} "
            f"| {each.features} | {each.first:.4f} | {each.second:.4f} "
            f"| {each.gain:+.4f} | {error} | {each.seeds} |"
        )
        if with_names:
            line += f" {each.names[0]} less {each.names[1]} |"
        lines.append(line)
    return [*lines, ""]


def differences(rows, first, second):
    """What one attention gains over another in each setting.

    Args:
        rows: of a study.
        first: an attention with its flags, as a sweep takes it.
        second: another one.

    Returns:
        A list of `Difference`, by task, sizes and D.
    """
    names = attentions.parse(first), attentions.parse(second)
    both_given = all(name.num_features is not None for name in names)
    found = []
    for setting in records.by(rows, _setting).values():
        of_first, of_second = (
            records.by((row for row in setting if _is(row, name)), num_features)
            for name in names
        )
        for d, runs in of_first.items():
            for other, other_runs in of_second.items():
                if both_given or d == other or None in (d, other):
                    found.append(difference(runs, other_runs))
    return sorted(filter(None, found), key=_order)


def best_differences(rows):
    """What the best learned kernel gains over the best fixed one.

    Returns:
        A list of `Difference`, one for each setting and D where there are both.
    """
    found = []
    kernels = [row for row in rows if row["attention"] != "softmax"]
    for setting in records.by(kernels, _kernel_setting).values():
        learned, fixed = (
            [
                row
                for row in setting
                if attentions.is_learned(row["attention"]) == is_learned
            ]
            for is_learned in (True, False)
        )
        if learned and fixed:
            found.append(difference(_best(learned), _best(fixed)))
    return sorted(filter(None, found), key=_order)


def difference(first, second):
    """The `Difference` of two attentions' runs, `None` if no seed is shared."""
    pairs = _by_seed(first), _by_seed(second)
    seeds = sorted(pairs[0].keys() & pairs[1].keys())
    if not seeds:
        return None
    row = first[0]
    scores = [[float(runs[seed]["score"]) for seed in seeds] for runs in pairs]
    sign = -1.0 if records.is_loss(row) else 1.0
    gains = [sign * (a - b) for a, b in zip(*scores, strict=True)]
    widths = dict.fromkeys(num_features(runs[0]) for runs in (first, second))
    return Difference(
        row=row,
        features=" / ".join(str(d) for d in widths if d is not None),
        first=statistics.mean(scores[0]),
        second=statistics.mean(scores[1]),
        gain=statistics.mean(gains),
        error=grids.standard_error(gains),
        seeds=len(seeds),
        names=(records.label(first[0]), records.label(second[0])),
    )


def num_features(row):
    """D of a run; `None` for softmax."""
    return attentions.num_features(
        row["attention"], row["flags"], int(row["key_dim"])
    )


def _is(row, name):
    """Whether it is a run of the attention that was parsed as `name`."""
    given = attentions.parse(f"{row['attention']} {row['flags']}")
    if name.num_features is None:
        given.num_features = None
    return given == name


def _setting(row):
    return tuple(row.get(column, "") for column in SHARED)


def _kernel_setting(row):
    given = attentions.parse(f"{row['attention']} {row['flags']}")
    kernel = num_features(row), given.decay, given.near_field
    return *_setting(row), *kernel


def _best(rows):
    """Runs of the best attention, among those of the most seeds."""
    runs = list(records.by(rows, records.label).values())
    most = max(map(len, runs))
    better = min if records.is_loss(rows[0]) else max
    return better(
        (each for each in runs if len(each) == most),
        key=lambda each: statistics.mean(
            float(row["validation"]) for row in each
        ),
    )


def _by_seed(rows):
    return {int(row["seed"]): row for row in rows}


def _order(each):
    sizes = f"{each.row.get('sizes', '')} {each.features}"
    return each.row["task"], grids.natural(sizes), each.names
