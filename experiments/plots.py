"""Pictures of a study: curves, kernels, and accuracy against sizes."""

import numpy as np

from experiments import records, size_plots
from experiments.attentions import FIXED_SYSTEMS, SYSTEMS
from experiments.measure import DISTANCES

# More lines in one panel cannot be told apart.
MOST_LINES = 20


def draw(tasks, folder):
    """Writes the pictures, if matplotlib is installed.

    Args:
        tasks: rows by task, then attention.
        folder: of the study.
    """
    try:
        import matplotlib
    except ImportError:
        print("No pictures: they need `pip install keras_kt[plot]`.")
        return
    matplotlib.use("Agg")
    rows = {
        task: [row for runs in systems.values() for row in runs]
        for task, systems in tasks.items()
    }
    few = {
        task: systems
        for task, systems in tasks.items()
        if len(systems) <= MOST_LINES
    }
    for name, figure in (
        ("experiments", draw_curves(few, folder)),
        ("kernels", draw_kernels(tasks, folder)),
        ("sparsity", draw_sparsity(few.get("sparsity", {}), folder)),
        ("pairs", size_plots.draw_pairs(rows.get("mqar", []))),
        *((f"heads_{t}", size_plots.draw_heads(rows[t])) for t in tasks),
    ):
        if figure is not None:
            # Tight, since a panel may have left.
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=110, bbox_inches="tight")
            print(f"Picture: {folder / name}.png")


def is_remote(rows):
    """Whether another machine made any of these runs."""
    return any(row.get("device") for row in rows)


def draw_curves(tasks, folder):
    """Validation against step and against seconds, a row of panels a task.

    Only against step where another machine made runs.
    """
    from matplotlib import pyplot

    if not tasks:
        return None
    figure, panels = pyplot.subplots(
        len(tasks),
        2,
        figsize=(11, 3.6 * len(tasks)),
        layout="constrained",
        squeeze=False,
    )
    validation = records.POINT.index("validation")
    for (left, right), systems in zip(panels, tasks.values(), strict=True):
        for attention, runs in sorted(systems.items()):
            for index, row in enumerate(runs):
                curve = records.read_arrays(folder, row)["curve"].T
                label = attention if index == 0 else None
                for panel, column in ((left, "step"), (right, "seconds")):
                    panel.plot(
                        curve[records.POINT.index(column)],
                        curve[validation],
                        label=label,
                        **style(attention, systems),
                    )
        first = next(iter(systems.values()))[0]
        left.set_title(title(first))
        left.set_xlabel("training step")
        left.set_ylabel(f"validation {first['metric']}")
        right.set_xlabel("seconds of training")
        beside = right
        if is_remote(row for runs in systems.values() for row in runs):
            right.remove()
            beside = left
        # Beside the panels, where it hides no curve; labels are the left one's.
        beside.legend(
            *left.get_legend_handles_labels(),
            fontsize=7,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )
    return figure


def title(row):
    """The task's name, with what its preset does to the sequence."""
    stem = f"stem of stride {row['stride']}"
    if row["stride"] == "1" or stem in row["title"]:
        return row["title"]
    return f"{row['title']}, {stem}"


def style(attention, others):
    """The same line for an attention in every panel.

    A mended system has the color of the published one, which is pale then.
    """

    def system(name):
        return name.removeprefix("mended-")

    known = [*SYSTEMS, *sorted({*map(system, others)} - set(SYSTEMS))]
    number = known.index(system(attention))
    has_twin = f"mended-{attention}" in others
    # There are ten colors.
    dashes = "-" if number < 10 else "-."
    if attention.endswith("RKS"):
        dashes = "--"
    return {
        "color": "k" if attention == "softmax" else f"C{number % 10}",
        "ls": dashes,
        "alpha": 0.35 if has_twin else 1.0,
    }


def draw_kernels(tasks, folder):
    """The kernels of each task's best learned system, a row a task."""
    from matplotlib import pyplot

    lines = []
    for task, systems in tasks.items():
        runs = [
            row
            for of_system in systems.values()
            for row in of_system
            if row["attention"] not in (*FIXED_SYSTEMS, "softmax")
        ]
        if runs:
            better = min if records.is_loss(runs[0]) else max
            best = better(runs, key=lambda row: float(row["validation"]))
            lines.append((task, best, records.read_arrays(folder, best)))
    if not lines:
        return None
    columns = max(len(arrays["trained"]) for _, _, arrays in lines)
    figure, panels = pyplot.subplots(
        len(lines),
        columns,
        figsize=(4.5 * columns, 3 * len(lines)),
        layout="constrained",
        squeeze=False,
    )
    for line, (task, row, arrays) in zip(panels, lines, strict=True):
        layers = len(arrays["trained"])
        for panel in line[layers:]:
            panel.set_axis_off()
        for layer, panel in enumerate(line[:layers]):
            for kind, dashes in (("untrained", ":"), ("trained", "-")):
                for head, profile in enumerate(arrays[kind][layer]):
                    panel.plot(DISTANCES, profile, dashes, color=f"C{head}")
            panel.axhline(0.0, color="0.8", zorder=0)
            panel.set_title(
                f"{task}, {row['attention']}, layer {layer + 1}", fontsize=9
            )
            panel.set_xlabel("|q − k|")
        line[0].set_ylabel("E cos ω·(q − k)")
    figure.suptitle("Kernels: a color a head; dotted before training")
    return figure


def draw_sparsity(systems, folder):
    """Accuracy against the share of the tokens that must be attended to."""
    from matplotlib import pyplot

    if not systems:
        return None
    figure, panel = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for attention, runs in sorted(systems.items()):
        tables = [
            records.read_arrays(folder, row)["densities"].T for row in runs
        ]
        density, _, uniform = tables[0]
        accuracy = np.mean([table[1] for table in tables], axis=0)
        panel.plot(
            density, accuracy, label=attention, **style(attention, systems)
        )
    panel.plot(density, uniform, ":", color="0.5", label="uniform attention")
    panel.set_xscale("log", base=2)
    panel.invert_xaxis()
    panel.set_xlabel("density: share of the tokens that share a key")
    panel.set_ylabel("test accuracy")
    panel.set_title(runs[0]["title"])
    figure.legend(fontsize=7, loc="outside right upper")
    return figure
