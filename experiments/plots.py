"""Pictures of a study: scores, curves, kernels, and accuracy against sizes."""

import textwrap
from collections import Counter

import numpy as np

from experiments import attentions, grids, records, size_plots, styles
from experiments.measure import DISTANCES

# More lines in one panel cannot be told apart.
MOST_LINES = 20
MOST_CURVES = 5


def draw(tasks, folder):
    """Writes the pictures, if matplotlib is installed.

    Args:
        tasks: rows by task, then attention.
        folder: of the study.
    """
    try:
        styles.pyplot()
    except ImportError:
        print("No pictures: they need `pip install matplotlib`.")
        return
    rows = {
        task: [row for runs in systems.values() for row in runs]
        for task, systems in tasks.items()
    }
    few = at_most(MOST_LINES, tasks)
    for name, figure in (
        ("experiments", draw_scores(few)),
        ("curves", draw_curves(at_most(MOST_CURVES, tasks), folder)),
        ("kernels", draw_kernels(rows, folder)),
        ("sparsity", draw_sparsity(few.get("sparsity", {}), folder)),
        ("pairs", size_plots.draw_pairs(rows.get("mqar", []))),
        *((f"heads_{t}", size_plots.draw_heads(rows[t])) for t in tasks),
    ):
        if figure is not None:
            styles.save(figure, folder / f"{name}.png")


def at_most(count, tasks):
    """The tasks that no more attentions than these were trained on."""
    return {
        task: systems
        for task, systems in tasks.items()
        if len(systems) <= count
    }


def is_remote(rows):
    """Whether another machine made any of these runs."""
    return any(row.get("device") for row in rows)


def draw_scores(tasks):
    """Test scores: a panel a task, a line an attention, a mark a seed.

    Pale circles are fresh draws of the frequencies.
    """
    if not tasks:
        return None
    # Panels with as many attentions stand beside one another.
    tasks = dict(sorted(tasks.items(), key=lambda item: -len(item[1])))
    figure, panels = _grid(
        tasks, 2, [0.8 + 0.18 * len(systems) for systems in tasks.values()]
    )
    for panel, systems in zip(panels, tasks.values(), strict=True):
        places = sorted(systems, key=lambda name: _mean(systems[name]))
        if not records.is_loss(systems[places[0]][0]):
            places.reverse()
        for place, attention in enumerate(places):
            style = styles.of(attention)
            for row in systems[attention]:
                draws = records.numbers(row["fresh_draws"])
                panel.plot(
                    draws,
                    [place] * len(draws),
                    "o",
                    color=style["color"],
                    alpha=0.3,
                    markersize=4,
                    markerfacecolor="none",
                )
                panel.plot(
                    float(row["score"]),
                    place,
                    style["marker"],
                    color=style["color"],
                    markersize=5,
                )
        first = systems[places[0]][0]
        panel.set_title(textwrap.fill(title(first), 26))
        panel.set_xlabel(f"test {first['metric']}")
        names = [
            name.replace("-num-features-", ", ").replace("-qk-norm-", ", ")
            for name in places
        ]
        panel.set_yticks(range(len(places)), names)
        panel.set_ylim(len(places) - 0.5, -0.5)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
    figure.suptitle(
        "Best first; pale circles: the model with other draws of frequencies"
    )
    return figure


def _mean(rows):
    return np.mean([float(row["score"]) for row in rows])


def draw_curves(tasks, folder):
    """Validation against step: a panel a task, a line a run."""
    if not tasks:
        return None
    figure, panels = _grid(tasks, 2, [2.5])
    step, validation = map(records.POINT.index, ("step", "validation"))
    for panel, systems in zip(panels, tasks.values(), strict=True):
        alike = Counter()
        for attention, runs in sorted(systems.items()):
            style = styles.of(attention)
            look = tuple(style.values())
            if alike[look]:
                # Only flags or sizes differ: the color would not tell.
                style |= {
                    "alpha": 0.6 ** alike[look],
                    "markerfacecolor": "none",
                }
            alike[look] += 1
            for index, row in enumerate(runs):
                curve = records.read_arrays(folder, row)["curve"].T
                panel.plot(
                    curve[step],
                    curve[validation],
                    label=attention if index == 0 else None,
                    markersize=3,
                    **style,
                )
        first = next(iter(systems.values()))[0]
        panel.set_title(textwrap.fill(title(first), 40))
        panel.set_xlabel("training step")
        panel.set_ylabel(f"validation {first['metric']}")
        panel.legend(fontsize=8)
    return figure


def title(row):
    """The task's name, with what its preset does to the sequence."""
    stem = f"stem of stride {row['stride']}"
    if row["stride"] == "1" or stem in row["title"]:
        return row["title"]
    return f"{row['title']}, {stem}"


def draw_kernels(tasks, folder):
    """Kernels of the best learned system of each task and size.

    On the left all heads of all layers after training, black where they began;
    on the right what training changed.
    """
    best = []
    for task, rows in tasks.items():
        learned = [r for r in rows if attentions.is_learned(r["attention"])]
        sizes = records.by(learned, lambda row: row.get("sizes", ""))
        for of_size in sorted(sizes, key=grids.natural):
            runs = sizes[of_size]
            better = min if records.is_loss(runs[0]) else max
            row = better(runs, key=lambda row: float(row["validation"]))
            words = of_size.replace("--", "").replace("key-dim", "heads of")
            best.append((f"{task} {words}".strip(), row))
    if not best:
        return None
    figure, panels = _grid([*best, *best], 4, [1.9])
    changes = panels[1::2]
    for left, right, (name, row) in zip(
        panels[::2], changes, best, strict=True
    ):
        arrays = records.read_arrays(folder, row)
        color = styles.of(row["attention"])["color"]
        before, after = (
            arrays[kind].reshape(-1, len(DISTANCES))
            for kind in ("untrained", "trained")
        )
        left.plot(DISTANCES, before.T, color="k", linewidth=0.8)
        left.plot(DISTANCES, after.T, color=color, linewidth=1.2)
        right.plot(DISTANCES, (after - before).T, color=color, linewidth=1.2)
        right.axhline(0.0, color="k", linewidth=0.8)
        left.set_title(textwrap.fill(name, 25))
        words = f"change, {row['attention']} {row['flags']}".split("--num")[0]
        right.set_title(textwrap.fill(words, 25))
        for panel in (left, right):
            panel.set_xlabel("|q − k|")
    limit = max(map(abs, (y for p in changes for y in p.get_ylim())))
    for panel in changes:
        panel.set_ylim(-limit, limit)
    figure.suptitle("Kernels before (black) and after training, a line a head")
    return figure


def _grid(items, columns, heights):
    """A figure, and as many panels of it as there are items.

    Args:
        items: what has a panel each.
        columns: at most, of panels.
        heights: of the items, in inches; or one for all.
    """
    columns = min(columns, len(items))
    heights = heights * len(items) if len(heights) == 1 else heights
    heights = [
        max(heights[start : start + columns])
        for start in range(0, len(items), columns)
    ]
    figure, panels = styles.pyplot().subplots(
        len(heights),
        columns,
        figsize=(styles.WIDTH, 0.4 + sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for panel in panels.flat[len(items) :]:
        panel.set_axis_off()
    return figure, panels.flat[: len(items)]


def draw_sparsity(systems, folder):
    """Accuracy against the share of the tokens that must be attended to.

    Two panels where there are mended systems: as published, and mended.
    """
    if not systems:
        return None
    mended = {name for name in systems if name.startswith("mended-")}
    groups = {"as published": systems.keys() - mended, "mended": mended}
    if not mended:
        groups = {"": systems}
    figure, panels = styles.pyplot().subplots(
        1,
        len(groups),
        figsize=(styles.WIDTH, 3.8),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    handles = {}
    for panel, (name, members) in zip(panels[0], groups.items(), strict=True):
        for attention in sorted({*members, "softmax"} & systems.keys()):
            tables = [
                records.read_arrays(folder, row)["densities"].T
                for row in systems[attention]
            ]
            density, _, uniform = tables[0]
            accuracy = np.mean([table[1] for table in tables], axis=0)
            (handles[attention.removeprefix("mended-")],) = panel.plot(
                density, accuracy, markersize=4, **styles.of(attention)
            )
        (handles["uniform attention"],) = panel.plot(
            density, uniform, ":", color=styles.OTHERS[0]
        )
        panel.set_xscale("log", base=2)
        panel.invert_xaxis()
        panel.set_xlabel("density: share of the tokens that share a key")
        panel.set_title(name)
        panel.grid(axis="y", color="0.9")
    panels[0, 0].set_ylabel("test accuracy")
    figure.suptitle(next(iter(systems.values()))[0]["title"])
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=4,
        fontsize=8.5,
    )
    return figure
