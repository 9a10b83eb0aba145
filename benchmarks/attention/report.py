"""Tables and pictures of a record."""

import json

from experiments import styles

MODES = ("forward", "forward+backward")
# Columns in pictures: what they are called there, and the method whose color
# they have. Others are in the tables.
DRAWN = {
    "ours": ("this package", "normal:positive"),
    "ours causal": ("this package, causal", "normal:positive"),
    "ours trigonometric": (
        "this package, trigonometric",
        "normal:trigonometric",
    ),
    "softmax": ("softmax", "softmax"),
    "plain Performer": ("Performer, written plainly", "Performer"),
    "Model Garden": ("Model Garden", None),
    "floor": ("its matrix products alone", None),
    "tensors": ("q, k, v, output and their gradients", None),
}
# Columns of the summary of each level, as docs/benchmarks.md has them.
SUMMARIES = {
    "layer": {
        "ours": "ours",
        "ours causal": "ours, causal",
        "softmax": "`MultiHeadAttention`",
        "Model Garden": "Model Garden's `KernelAttention`",
    },
    "core": {
        "ours": "ours",
        "ours causal": "ours, causal",
        "softmax": "softmax",
        "floor": "GEMMs alone",
    },
}
TITLES = {
    "core": "attention of given queries, keys and values",
    "layer": "the whole layer",
}


def best(rows, **keys):
    """The better of XLA and not, or `None`."""
    found = [r for r in rows if all(r[k] == v for k, v in keys.items())]
    return min(found, key=lambda r: r["median"], default=None)


def milliseconds(rows, mode, **keys):
    """Of the better of XLA and not, or `None`.

    The floor of a training step is three times that of the forward pass.
    """
    if keys["column"] == "floor":
        row = best(rows, mode="forward", **keys)
        factor = 1e3 if mode == "forward" else 3e3
    else:
        row, factor = best(rows, mode=mode, **keys), 1e3
    return factor * row["median"] if row else None


def tables(record):
    """Markdown: medians of the better of XLA and not, memory, decode."""
    rows = record.get("timings", [])
    lines = []
    levels = list(dict.fromkeys(r["level"] for r in rows))
    for level in levels:
        lines += [f"# {level.title()}, a training step", ""]
        lines += _times(rows, level, MODES[1], SUMMARIES[level], "{:,.0f}")
    for level in levels:
        names = dict.fromkeys(r["column"] for r in rows if r["level"] == level)
        names = {name: name for name in names}
        for mode in MODES:
            lines += [f"# All of {level}, {mode}, milliseconds", ""]
            lines += _times(rows, level, mode, names, "{:,.1f}")
    if "memory" in record:
        lines += [
            "# Memory",
            "",
            "Core, forward + backward, batch × length = "
            f"{record['arguments']['tokens']:,}, beyond that batch 1: peak "
            "MiB, and over the bytes of q, k, v, output and their gradients.",
            "",
            "| column | XLA | length | MiB | ratio |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r['column']} | {'yes' if r['xla'] else 'no'} | {r['length']} "
            f"| {r['peak'] / 2**20:.1f} | {r['peak'] / r['tensors']:.2f} |"
            for r in record["memory"]
        ]
        lines.append("")
    if "decode" in record:
        lines += [
            "# One token of a layer",
            "",
            "| column | position | microseconds | bytes |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r['column']} | {r['position']} | {1e6 * r['median']:.0f} "
            f"| {r['bytes']} |"
            for r in record["decode"]
        ]
        lines.append("")
    return "\n".join(lines)


def _times(rows, level, mode, names, form):
    """Lines of a table: milliseconds by length and column."""
    here = [r for r in rows if r["level"] == level]
    names = {k: v for k, v in names.items() if best(here, column=k)}
    lines = [
        f"| {level} | " + " | ".join(names.values()) + " |",
        "| --- " * (len(names) + 1) + "|",
    ]
    for length in sorted({r["length"] for r in here}):
        times = [
            milliseconds(here, mode, length=length, column=name)
            for name in names
        ]
        cells = ["–" if t is None else form.format(t) for t in times]
        lines.append(f"| {length:,} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def plot(record):
    """Time a token in a training step, a panel a level."""
    rows = record["timings"]
    levels = list(dict.fromkeys(r["level"] for r in rows))
    figure, panels = styles.pyplot().subplots(
        1,
        len(levels),
        figsize=(styles.WIDTH, 4.2),
        layout="constrained",
        squeeze=False,
    )
    handles = {}
    for panel, level in zip(panels[0], levels, strict=True):
        here = [r for r in rows if r["level"] == level]
        for name in dict.fromkeys(r["column"] for r in here):
            if name in DRAWN:
                handles[name] = draw_times(panel, here, name)
        panel.set_title(TITLES[level])
    panels[0, 0].set_ylabel("microseconds a token")
    figure.legend(
        handles.values(),
        [DRAWN[name][0] for name in handles],
        loc="outside lower center",
        ncols=3,
    )
    return figure


def draw_times(panel, rows, name):
    """The time of one column against length, the better of XLA and not.

    Returns:
        The line.
    """
    mode, factor = ("forward", 3) if name == "floor" else (MODES[1], 1)
    lengths = sorted({r["length"] for r in rows})
    found = [best(rows, length=n, column=name, mode=mode) for n in lengths]
    found = [row for row in found if row]
    (line,) = panel.loglog(
        [row["length"] for row in found],
        [
            1e6 * factor * row["median"] / (row["length"] * row["batch"])
            for row in found
        ],
        **style(name),
    )
    _name_lengths(panel, lengths)
    return line


def draw_memory(panel, rows, name):
    """The peak of one column against length, the better of XLA and not.

    Returns:
        The line.
    """
    peaks = {}
    for row in rows:
        if row["column"] == name:
            known = peaks.get(row["length"], row["peak"])
            peaks[row["length"]] = min(known, row["peak"])
    (line,) = panel.loglog(
        peaks.keys(), [peak / 2**20 for peak in peaks.values()], **style(name)
    )
    _name_lengths(panel, sorted({row["length"] for row in rows}))
    return line


def style(name):
    """How a column is drawn: its color, and an empty mark if it is causal."""
    _, method = DRAWN[name]
    if method is None:
        dashes = ":" if name in ("floor", "tensors") else "-"
        given = {"color": styles.OTHERS[dashes == "-"], "linestyle": dashes}
    else:
        given = styles.of(method)
    if name.endswith("causal"):
        given["markerfacecolor"] = "white"
    return {"linewidth": 1.5, "markersize": 5, **given}


def _name_lengths(panel, lengths):
    # Names of lengths that are too near to one another would overlap.
    shown = [n for n in lengths if n & (n - 1) == 0]
    names = [f"{n // 1024}k" if n >= 1024 else str(n) for n in shown]
    if len(shown) > 7:
        names = [n if i % 2 == 0 else "" for i, n in enumerate(names)]
    panel.set_xticks(shown, names)
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.minorticks_off()
    panel.set_xlabel("tokens")
    panel.grid(color="0.92")
    panel.set_axisbelow(True)


def plot_memory(record):
    """Peak memory of a training step against length."""
    rows = record["memory"]
    tensors = [
        {**row, "column": "tensors", "peak": row["tensors"]} for row in rows
    ]
    figure, panel = styles.pyplot().subplots(
        figsize=(styles.WIDTH, 3.8), layout="constrained"
    )
    for name in dict.fromkeys(row["column"] for row in rows):
        draw_memory(panel, rows, name).set_label(DRAWN[name][0])
    draw_memory(panel, tensors, "tensors").set_label(DRAWN["tensors"][0])
    panel.set_ylabel("peak of a training step, MiB")
    panel.legend()
    return figure


def draw(record, path):
    """The pictures of a record, if matplotlib is installed."""
    try:
        if "timings" in record:
            styles.save(plot(record), path.with_suffix(".png"))
        elif "memory" in record:
            styles.save(plot_memory(record), path.with_suffix(".png"))
    except ImportError:
        print("No pictures: they need `pip install matplotlib`.")


def dumps(record):
    """JSON with a row a line."""
    parts = []
    for key, value in record.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            text = f"[\n{rows}\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
