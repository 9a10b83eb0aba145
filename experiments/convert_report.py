"""Tables and pictures of the conversion."""

import keras_kt
from experiments import records
from experiments.convert_tasks import HEADS, TASKS
from keras_kt.diagnostics import plots

# What tells runs apart, and stages of a run.
RUN = ("task", "seed")
STAGE = ("task", "seed", "number")
# Tokens in a picture of attention, beyond the near field.
SHOWN = 64


def draw(name, model, calibration, inputs, args):
    """Pictures of the calibrated model, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("No pictures: they need `pip install matplotlib`.")
        return
    matplotlib.use("Agg")
    # A near field alone would show softmax itself.
    shown = SHOWN + (TASKS[name].near_field(args) or 0)
    maps = keras_kt.diagnostics.attention_maps(model, inputs[:, :shown])
    typical = {
        path: sorted(
            (head for head in calibration.after.heads if head.path == path),
            key=lambda head: head.matrix,
        )[HEADS // 2].head
        for path in calibration.after.layers
    }
    figures = {"errors": plots.plot_errors(calibration.after)}
    for number, each in enumerate(maps):
        figures[f"attention_{number}"] = plots.plot_attention(
            each, head=typical[each.path]
        )
    for kind, figure in figures.items():
        figure.savefig(args.results / f"convert_{name}_{kind}.png", dpi=110)


def render(folder):
    """Markdown of a study: a table a task, and times."""
    lines = ["# Conversion", ""]
    stages = records.read(folder, "stages")
    for run in records.read(folder):
        lines += [
            f"| {run['task']} | {run['metric']} | error by layer | seconds |",
            "| --- | --- | --- | --- |",
        ]
        for row in stages:
            if [row[key] for key in RUN] == [run[key] for key in RUN]:
                errors = [f"{e:.3f}" for e in records.numbers(row["errors"])]
                lines.append(
                    f"| {row['stage']} | {float(row['score']):.4f} | "
                    f"{', '.join(errors)} | {float(row['seconds']):.0f} |"
                )
        lines.append("")
        if run.get("softmax_milliseconds"):
            lines.append(
                f"One sequence of {run['speed_tokens']} tokens: softmax "
                f"{float(run['softmax_milliseconds']):.0f} ms, linear "
                f"{float(run['linear_milliseconds']):.0f} ms."
            )
        if run.get("byte_positions"):
            for position, time_of_byte in zip(
                records.numbers(run["byte_positions"]),
                records.numbers(run["byte_milliseconds"]),
                strict=True,
            ):
                lines.append(
                    f"After {position:.0f} bytes: {time_of_byte:.1f} ms a byte."
                )
        lines.append("")
    return "\n".join(lines)
