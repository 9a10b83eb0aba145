"""Pictures of studies that vary a size: accuracy against it, a line a kernel.

A line is the mean over seeds, its bars the standard error.
"""

import statistics
from collections import defaultdict
from typing import NamedTuple

from experiments import attentions, grids, records, styles
from experiments.compare import num_features

NAMES = {"self": "self-normalized"}


class Line(NamedTuple):
    """A line of a panel.

    Attributes:
        name: the attention, with its flags but the number of features, which
            a panel names.
        x: sizes in order.
        y: mean score at each.
        errors: standard error of each; 0 for a single seed.
    """

    name: str
    x: list[int]
    y: list[float]
    errors: list[float]


def draw_heads(rows):
    """Accuracy against head_dim: a panel a feature map, a line a prior."""
    softmax = [row for row in rows if row["attention"] == "softmax"]
    kernels = [
        row
        for row in rows
        if row not in softmax and not attentions.is_system(row["attention"])
    ]
    if len({row["key_dim"] for row in kernels}) < 2:
        return None
    panels = {
        f"{NAMES.get(name, name)} features": lines_of(
            [*runs, *softmax], "key_dim"
        )
        for name, runs in sorted(records.by(kernels, _feature_map).items())
    }
    counts = map(str, sorted({num_features(row) for row in kernels}))
    title = f"{kernels[0]['title']}, {', '.join(counts)} features a head"
    metric = kernels[0]["metric"]
    return _figure({"": panels}, "size of a head", title, metric, _prior)


def draw_pairs(rows):
    """Accuracy against pairs: a panel for each D, a row for other sizes."""
    rows = [row for row in rows if row.get("pairs")]
    if len({row["pairs"] for row in rows}) < 2:
        return None
    grid = defaultdict(dict)
    for sizes, of_sizes in sorted(records.by(rows, _other_sizes).items()):
        groups = records.by(of_sizes, num_features)
        softmax = groups.pop(None, [])
        for features, runs in sorted(groups.items()) or [("any", [])]:
            grid[sizes][f"{features} features"] = lines_of(
                [*runs, *softmax], "pairs"
            )
    return _figure(grid, "pairs", "Associative recall", rows[0]["metric"])


def _other_sizes(row):
    """Sizes beside the number of pairs, as a title."""
    sizes = grids.given(row)
    sizes.pop("--pairs", None)
    return " ".join(map(" ".join, sizes.items())).replace("--", "")


def _feature_map(row):
    return row["attention"].partition(":")[2]


def _name(row):
    words = row["flags"].split()
    if "--num-features" in words:
        place = words.index("--num-features")
        del words[place : place + 2]
    return " ".join([row["attention"], *words]).replace("--", "")


def lines_of(rows, size):
    """A `Line` of each attention."""
    lines = []
    for name, runs in sorted(records.by(rows, _name).items()):
        groups = sorted(records.by(runs, lambda row: int(row[size])).items())
        scores = [[float(row["score"]) for row in group] for _, group in groups]
        lines.append(
            Line(
                name,
                [x for x, _ in groups],
                [statistics.mean(each) for each in scores],
                [grids.standard_error(each) or 0.0 for each in scores],
            )
        )
    return lines


def _prior(name):
    return name.partition(":")[0]


def _figure(grid, size, title, metric, shown=str):
    """Panels of lines: rows of panels by name, panels of a row by name.

    `shown` makes a line's name in the legend.
    """
    figure, panels = styles.pyplot().subplots(
        len(grid),
        max(map(len, grid.values())),
        figsize=(styles.WIDTH, 1.0 + 2.6 * len(grid)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    drawn = {}
    for of_row, (row_name, cells) in zip(panels, grid.items(), strict=True):
        for panel in of_row[len(cells) :]:
            panel.set_axis_off()
        for panel, (name, lines) in zip(of_row, cells.items(), strict=False):
            drawn |= draw_lines(panel, lines, size)
            panel.set_title(", ".join(filter(None, (name, row_name))))
        of_row[0].set_ylabel(f"test {metric}")
    figure.suptitle(title)
    handles = {shown(name): drawn[name] for name in sorted(drawn)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=4 if len(handles) > 6 else len(handles),
    )
    return figure


def draw_lines(panel, lines, size):
    """Draws lines with their errors, each in its style.

    Returns:
        What a legend shows, by the lines' names.
    """
    handles = {
        line.name: panel.errorbar(
            line.x,
            line.y,
            line.errors,
            markersize=4.5,
            linewidth=1.5,
            elinewidth=0.9,
            capsize=2,
            **styles.of(line.name),
        )
        for line in lines
    }
    sizes = sorted({x for line in lines for x in line.x})
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, list(map(str, sizes)))
    panel.minorticks_off()
    panel.set_xlabel(size)
    panel.grid(axis="y", color="0.9")
    panel.set_axisbelow(True)
    return handles
