"""Tables and pictures of a record."""

import json

MODES = ("forward", "forward+backward")


def best(rows, **keys):
    """The better of XLA and not, or `None`."""
    found = [r for r in rows if all(r[k] == v for k, v in keys.items())]
    return min(found, key=lambda r: r["median"], default=None)


def tables(record):
    """Markdown: medians of the better of XLA and not, memory, decode."""
    rows = record.get("timings", [])
    lines = []
    for level in dict.fromkeys(r["level"] for r in rows):
        for mode in MODES:
            here = [r for r in rows if r["level"] == level]
            names = list(dict.fromkeys(r["column"] for r in here))
            lines += [
                f"{level}, {mode}, milliseconds",
                "",
                "| length | " + " | ".join(names) + " |",
                "| --- " * (len(names) + 1) + "|",
            ]
            for length in sorted({r["length"] for r in here}):
                cells = []
                for name in names:
                    is_floor = name == "floor"
                    row = best(
                        here,
                        length=length,
                        column=name,
                        mode="forward" if is_floor else mode,
                    )
                    factor = 3e3 if is_floor and mode != "forward" else 1e3
                    cells.append(
                        f"{factor * row['median']:.1f}" if row else "–"
                    )
                lines.append(f"| {length} | " + " | ".join(cells) + " |")
            lines.append("")
    if "memory" in record:
        lines += [
            "core, forward + backward, batch 1: peak MiB, and over the bytes "
            "of q, k, v, output and their gradients",
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
            "layer, decoding one token",
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


def plot(record, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = record["timings"]
    levels = list(dict.fromkeys(r["level"] for r in rows))
    figure, axes = plt.subplots(
        1, len(levels), figsize=(5.2 * len(levels), 4), squeeze=False
    )
    for axis, level in zip(axes[0], levels, strict=True):
        here = [r for r in rows if r["level"] == level]
        for name in dict.fromkeys(r["column"] for r in here):
            mode = "forward" if name == "floor" else "forward+backward"
            lengths = sorted({r["length"] for r in here})
            points = [
                (n, best(here, length=n, column=name, mode=mode))
                for n in lengths
            ]
            points = [(n, row) for n, row in points if row]
            factor = 3 if name == "floor" else 1
            axis.loglog(
                [n for n, _ in points],
                [
                    1e6 * factor * row["median"] / (n * row["batch"])
                    for n, row in points
                ],
                "k:" if name == "floor" else "o-",
                label="floor: the GEMMs alone" if name == "floor" else name,
                linewidth=2.2 if name.startswith("ours") else 1.2,
                markersize=4,
            )
        axis.set_xticks(lengths, [str(n) for n in lengths], fontsize=7)
        axis.minorticks_off()
        axis.set_xlabel(
            f"length (batch · length = {record['arguments']['tokens']}, "
            "beyond that batch 1)"
        )
        axis.set_title(f"{level}, forward + backward")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("microseconds per token")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def plot_memory(record, path):
    """Peak memory against length, the better of XLA and not."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = record["memory"]
    figure, axis = plt.subplots(figsize=(5.2, 4))
    lengths = sorted({row["length"] for row in rows})
    for name in dict.fromkeys(row["column"] for row in rows):
        peaks = {
            n: min(
                (
                    row["peak"]
                    for row in rows
                    if row["column"] == name and row["length"] == n
                ),
                default=None,
            )
            for n in lengths
        }
        axis.loglog(
            [n for n in lengths if peaks[n]],
            [peaks[n] / 2**20 for n in lengths if peaks[n]],
            "o-",
            label=name,
            markersize=4,
        )
    axis.loglog(
        lengths,
        [
            next(r["tensors"] for r in rows if r["length"] == n) / 2**20
            for n in lengths
        ],
        "k:",
        label="q, k, v, output and gradients",
    )
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths], fontsize=7)
    axis.minorticks_off()
    axis.set_xlabel("length, batch 1")
    axis.set_ylabel("peak of a training step, MiB")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def draw(record, path):
    """The pictures of a record, if matplotlib is installed."""
    try:
        if "timings" in record:
            plot(record, path.with_suffix(".png"))
        elif "memory" in record:
            plot_memory(record, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")
    except ImportError:
        print("matplotlib is missing: pip install 'keras_kt[plot]'")


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
