"""Pictures of studies that vary a size: accuracy against it, a line a kernel.

A line is the mean over seeds, its bars the standard error; names stand at the
lines' ends. Colors are those of Okabe and Ito, and marks differ too, so that
nothing hangs on the color alone.
"""

import itertools
import re
import statistics
from collections import defaultdict
from typing import NamedTuple

from experiments import attentions, grids, records
from experiments.compare import num_features

# Color, mark and dashes of a prior.
PRIORS = {
    "fixed": ("#000000", "o", ":"),
    "normal": ("#0072B2", "s", "-"),
    "mixture": ("#009E73", "^", "-"),
    "fastfood": ("#56B4E9", "v", "-"),
    "generator": ("#D55E00", "D", "-"),
    "empirical": ("#CC79A7", "P", "-"),
}
NAMES = {"self": "self-normalized"}
SOFTMAX = ("#7F7F7F", "x", "--")
# Of any other lines; what is not learned is dotted.
STYLES = tuple(
    (color, mark, dashes)
    for dashes in ("-", "-.")
    for (color, mark, _) in list(PRIORS.values())[1:]
)
# Shares of a panel's height between the names of lines.
GAP = 0.055


class Line(NamedTuple):
    """A line of a panel.

    Attributes:
        name: at its end.
        x: sizes in order.
        y: mean score at each.
        errors: standard error of each; 0 for a single seed.
        style: color, mark, dashes.
    """

    name: str
    x: list[int]
    y: list[float]
    errors: list[float]
    style: tuple[str, str, str]


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
    styles = _styles([*kernels, *softmax], _prior)
    panels = {
        f"{NAMES.get(name, name)} features": _lines(
            [*runs, *softmax], "key_dim", _prior, styles
        )
        for name, runs in sorted(records.by(kernels, _feature_map).items())
    }
    counts = map(str, sorted({num_features(row) for row in kernels}))
    title = f"{kernels[0]['title']}, D = {', '.join(counts)}"
    return _figure({"": panels}, "head_dim", title, kernels[0]["metric"])


def draw_pairs(rows):
    """Accuracy against pairs: a panel for each D, a row for other sizes."""
    rows = [row for row in rows if row.get("pairs")]
    if len({row["pairs"] for row in rows}) < 2:
        return None
    styles = _styles(rows, _attention)
    grid = defaultdict(dict)
    for sizes, of_sizes in sorted(records.by(rows, _other_sizes).items()):
        groups = records.by(of_sizes, num_features)
        softmax = groups.pop(None, [])
        for features, runs in sorted(groups.items()) or [("any", [])]:
            grid[sizes][f"D = {features}"] = _lines(
                [*runs, *softmax], "pairs", _attention, styles
            )
    return _figure(grid, "pairs", "Associative recall", rows[0]["metric"])


def _other_sizes(row):
    """Sizes beside the number of pairs, as a title."""
    sizes = grids.given(row)
    sizes.pop("--pairs", None)
    return " ".join(map(" ".join, sizes.items())).replace("--", "")


def _feature_map(row):
    return row["attention"].partition(":")[2]


def _prior(row):
    return f"{row['attention'].partition(':')[0]} {_flags(row)}".strip()


def _attention(row):
    return f"{row['attention']} {_flags(row)}".strip()


def _flags(row):
    """Flags of the attention but D, which a panel names."""
    flags = re.sub(r"--num-features \S+", "", row["flags"])
    return " ".join(flags.replace("--", "").split())


def _styles(rows, name):
    """Color, mark and dashes of each name, the same in every panel."""
    known = {**PRIORS, "softmax": SOFTMAX, "Performer": PRIORS["fixed"]}
    learned = {name(r): attentions.is_learned(r["attention"]) for r in rows}
    others = sorted(learned.keys() - known.keys())
    for each, style in zip(others, itertools.cycle(STYLES), strict=False):
        color, mark, dashes = style
        known[each] = color, mark, dashes if learned[each] else ":"
    return known


def _lines(rows, size, name, styles):
    """A `Line` of each name."""
    lines = []
    for of_name, runs in sorted(records.by(rows, name).items()):
        groups = sorted(records.by(runs, lambda row: int(row[size])).items())
        scores = [[float(row["score"]) for row in group] for _, group in groups]
        lines.append(
            Line(
                of_name,
                [x for x, _ in groups],
                [statistics.mean(each) for each in scores],
                [grids.standard_error(each) or 0.0 for each in scores],
                styles[of_name],
            )
        )
    return lines


def _figure(grid, size, title, metric):
    """Panels of lines: rows of panels by name, panels of a row by name."""
    from matplotlib import pyplot

    columns = max(map(len, grid.values()))
    figure, panels = pyplot.subplots(
        len(grid),
        columns,
        figsize=(1.0 + 4.2 * columns, 0.5 + 3.4 * len(grid)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    drawn = []
    for of_row, (row_name, cells) in zip(panels, grid.items(), strict=True):
        for panel in of_row[len(cells) :]:
            panel.set_axis_off()
        for panel, (name, lines) in zip(of_row, cells.items(), strict=False):
            _draw_panel(panel, lines, size)
            panel.set_title(", ".join(filter(None, (name, row_name))))
            drawn.append((panel, lines))
        of_row[0].set_ylabel(f"test {metric}")
    figure.suptitle(title)
    # Panels share their limits, which all of the lines have set by now.
    for panel, lines in drawn:
        _name_lines(panel, lines)
    return figure


def _draw_panel(panel, lines, size):
    for line in lines:
        color, mark, dashes = line.style
        panel.errorbar(
            line.x,
            line.y,
            line.errors,
            color=color,
            marker=mark,
            markersize=4,
            linestyle=dashes,
            linewidth=1.4,
            elinewidth=0.9,
            capsize=2,
        )
    sizes = sorted({x for line in lines for x in line.x})
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, list(map(str, sizes)))
    panel.minorticks_off()
    panel.set_xlabel(size)
    panel.grid(axis="y", color="0.9")
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _name_lines(panel, lines):
    """Writes names at the lines' ends, apart from one another."""
    low, high = panel.get_ylim()
    ends = sorted((line.y[-1], line) for line in lines)
    places = [(y - low) / (high - low) for y, _ in ends]
    for place, (_, line) in zip(spread(places, GAP), ends, strict=True):
        panel.annotate(
            line.name,
            (1.0, place),
            xytext=(6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=line.style[0],
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


def spread(places, gap):
    """Places in order, moved as little as may be to be `gap` apart.

    Those that are too close become a cluster around their mean, of which none
    is below zero.

    Args:
        places: numbers in ascending order.
        gap: the least distance between two.

    Returns:
        As many numbers, in the same order.
    """
    clusters = []
    for place in places:
        clusters.append([place, 1])
        while len(clusters) > 1 and _touch(*clusters[-2:], gap):
            (center, count), (other, more) = clusters[-2:]
            total = count + more
            mean = (center * count + other * more) / total
            clusters[-2:] = [[max(mean, gap * (total - 1) / 2), total]]
    return [
        center + gap * (index - (count - 1) / 2)
        for center, count in clusters
        for index in range(count)
    ]


def _touch(first, second, gap):
    return second[0] - first[0] < gap * (first[1] + second[1]) / 2
