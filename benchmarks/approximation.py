"""Error of the attention matrix against softmax, by coupling of the features.

Random queries and keys on a sphere, |q|² = |k|² = tau; every method sees the
same inputs for the same seed, and has the same number of features D. Reports
the relative Frobenius error of the row-normalized matrix, median over seeds,
beside the error of replacing attention by the uniform matrix.

    python benchmarks/approximation.py --output results/approximation
"""

import argparse
import csv
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import styles

# Coupling, radius, two-sided.
METHODS = {
    "iid": ("iid", "chi", False),
    "Sobol": ("sobol", "chi", False),
    "Performer (orthogonal)": ("orthogonal", "chi", False),
    "two-sided iid": ("iid", "chi", True),
    "two-sided orthogonal": ("orthogonal", "chi", True),
    "default (two-sided, fixed radius)": ("orthogonal", "fixed", True),
}
# Color, mark and dashes; two-sided features are ours.
STYLES = {
    "iid": (styles.OTHERS[0], "o", "-"),
    "Sobol": (styles.OTHERS[1], "v", "-"),
    "Performer (orthogonal)": (styles.FIXED, "o", "-"),
    "two-sided iid": (styles.NORMAL, "^", ":"),
    "two-sided orthogonal": (styles.NORMAL, "D", "--"),
    "default (two-sided, fixed radius)": (styles.NORMAL, "s", "-"),
    "uniform": (styles.SOFTMAX, "", ":"),
}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--head-dim", type=int, default=64, help="size")
    parser.add_argument("--length", type=int, default=512, help="tokens")
    parser.add_argument("--seeds", type=int, default=8, help="draws of each")
    parser.add_argument(
        "--tau",
        type=float,
        nargs="+",
        default=[0.5, 1.0, 2.0],
        help="|q|² = |k|²",
    )
    parser.add_argument(
        "--features", type=int, nargs="+", default=[64, 128, 256, 512], help="D"
    )
    parser.add_argument(
        "--output",
        default="results/approximation",
        help="to write, without suffix",
    )
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import numpy as np
import tensorflow as tf

import keras_kt
from keras_kt import kernels


def attention_matrix(method, num_features, query, key, seed):
    """Row-normalized matrix of one draw of a method's features."""
    coupling, radius, two_sided = METHODS[method]
    prior = keras_kt.NormalPrior(coupling=coupling, radius=radius, seed=seed)
    feature_map = keras_kt.PositiveFeatures(two_sided=two_sided)
    head_dim = query.shape[-1]
    count = feature_map.num_frequencies(num_features)
    prior.build((1, count, head_dim))
    feature_map.build(1)
    features = feature_map.bind(prior())
    query, key = (
        tf.exp(tf.cast(features.keys(x[np.newaxis, np.newaxis]), tf.float64))
        for x in (query, key)
    )
    kernel = tf.matmul(query, key, transpose_b=True)[0, 0]
    return kernels.kernel_attention(kernel, key[0, 0])[1]


def errors(args, tau, num_features):
    """Relative errors of each method, one a seed."""
    result = {name: [] for name in (*METHODS, "uniform")}
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        query, key = rng.normal(size=(2, args.length, args.head_dim))
        query, key = (
            (np.sqrt(tau) * x / np.linalg.norm(x, axis=-1, keepdims=True))
            for x in (query, key)
        )
        query, key = query.astype("float32"), key.astype("float32")
        exact = kernels.softmax_attention(query, key, key)[1]
        for name in METHODS:
            estimate = attention_matrix(name, num_features, query, key, seed)
            result[name].append(_relative(estimate, exact))
        uniform = np.full_like(exact, 1.0 / args.length)
        result["uniform"].append(_relative(uniform, exact))
    return result


def _relative(estimate, exact):
    return float(np.linalg.norm(estimate - exact) / np.linalg.norm(exact))


def write(rows, path):
    """A line a row; its errors, one a seed, stand in one cell."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        for row in rows:
            errors = " ".join(map(str, row["errors"]))
            writer.writerow([*list(row.values())[:-1], errors])


def plot(rows):
    taus = sorted({row["tau"] for row in rows})
    figure, panels = styles.pyplot().subplots(
        1,
        len(taus),
        figsize=(styles.WIDTH, 4.0),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for panel, tau in zip(panels[0], taus, strict=True):
        for name, (color, mark, dashes) in STYLES.items():
            points = [
                r for r in rows if r["tau"] == tau and r["method"] == name
            ]
            panel.loglog(
                [p["num_features"] for p in points],
                [p["median"] for p in points],
                label=name,
                color=color,
                marker=mark,
                linestyle=dashes,
                linewidth=2.5 if name.startswith("default") else 1.4,
                markersize=4.5,
            )
        panel.set_title(f"|q|² = |k|² = {tau:g}")
        panel.set_xlabel("features a head")
        panel.set_xticks(sorted({r["num_features"] for r in rows}))
        panel.get_xaxis().set_major_formatter("{x:.0f}")
        panel.minorticks_off()
        panel.grid(color="0.92")
    panels[0, 0].yaxis.set_major_formatter("{x:g}")
    panels[0, 0].set_ylabel("relative error of the attention matrix")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
    )
    return figure


def main():
    args = parse_args()
    rows = []
    for tau in args.tau:
        for num_features in args.features:
            for name, values in errors(args, tau, num_features).items():
                rows.append(
                    {
                        "tau": tau,
                        "num_features": num_features,
                        "method": name,
                        "median": float(np.median(values)),
                        "errors": values,
                    }
                )
                print(
                    f"tau {tau:<4g} D {num_features:<5d} {name:34s} "
                    f"{np.median(values):.4f}",
                    flush=True,
                )
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(rows, path.with_suffix(".csv"))
    print(f"wrote {path.with_suffix('.csv')}")
    try:
        styles.save(plot(rows), path.with_suffix(".png"))
    except ImportError:
        print("No picture: it needs `pip install matplotlib`.")


if __name__ == "__main__":
    main()
