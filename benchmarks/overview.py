"""README's first picture: time, memory, and what learning the kernel gains.

It measures nothing, but draws what lies in results/.

    python -m benchmarks.overview
"""

import argparse
import json
from pathlib import Path


def parse_args():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overview",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--results", type=Path, default="results", help="a folder")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.

from benchmarks.attention import report
from experiments import records, size_plots, styles

METHODS = {
    "normal:trigonometric": "learned kernel",
    "fixed:trigonometric": "the same, fixed",
    "fixed:positive": "fixed, Performer's",
}


def draw(results):
    """A figure of three panels, from a folder of results."""
    timings = json.loads((results / "attention.json").read_text())["timings"]
    memory = json.loads((results / "memory.json").read_text())["memory"]
    rows = records.read(results / "narrow_heads")
    rows = [row for row in rows if row["attention"] in METHODS]
    figure, (time, peak, accuracy) = styles.pyplot().subplots(
        1, 3, figsize=(styles.WIDTH, 3.5), layout="constrained"
    )
    layer = [row for row in timings if row["level"] == "layer"]
    for panel, draw_one, measured, place in (
        (time, report.draw_times, layer, (0.36, 0.28)),
        (peak, report.draw_memory, memory, "upper right"),
    ):
        draw_one(panel, measured, "softmax").set_label("softmax attention")
        draw_one(panel, measured, "ours").set_label("keras_kt")
        panel.legend(loc=place, fontsize=9, handlelength=1.2)
    time.set_title("Time of a training step,\nmicroseconds a token")
    peak.set_title("Memory of a training step,\nMiB")
    lines = size_plots.lines_of(rows, "key_dim")
    handles = size_plots.draw_lines(accuracy, lines, "size of a head")
    accuracy.legend(
        [handles[name] for name in METHODS],
        METHODS.values(),
        loc="lower right",
        fontsize=9,
    )
    accuracy.set_title("Look-ups among 256 tokens,\ntest accuracy")
    return figure


def main():
    results = parse_args().results
    styles.save(draw(results), results / "overview.png")


if __name__ == "__main__":
    main()
