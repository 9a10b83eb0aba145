"""Time and memory of attention against its peers and the device's own GEMMs.

Every column runs at the same batch × length. Repeats are interleaved, so that
a busy machine slows all columns alike: read ratios, not milliseconds. Where
times of a table spread by more than 15 % (interquartile range over median, the
median of its columns), they are taken again, and the program ends if they still
do. Before anything is timed, each column is compared with float64 softmax
attention, and ours with its own kernel formed explicitly.

    python -m benchmarks.attention                     # time, core and layer
    python -m benchmarks.attention --memory            # peak memory too
    python -m benchmarks.attention --decode            # one token at a time
    pip download --no-deps tf-models-official==2.20.0  # for the peer column
    python -m benchmarks.attention --model-garden tf_models_official-*.whl
"""

import argparse
import functools
import json
import os
import platform
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

LENGTHS = (256, 384, *(2**n for n in range(9, 17)))


def parse_args():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    add("--tokens", type=int, default=4096, help="batch × length")
    add("--heads", type=int, default=8, help="number")
    add("--head-dim", type=int, default=64, help="size")
    add("--features", type=int, default=128, help="D")
    add("--window", type=int, default=256, help="keys that a window has")
    add("--repeats", type=int, default=9, help="of each time")
    add("--budget", type=float, default=10, help="seconds per slow column")
    add("--spread", type=float, default=0.15, help="most that is written")
    add("--levels", nargs="+", default=["core", "layer"], help="what is timed")
    add(
        "--positions",
        type=int,
        nargs="+",
        default=[100, 1024, 16384, 10**6],
        help="of one token",
    )
    add("--model-garden", help="wheel of tf-models-official 2.20.0")
    add("--memory", action="store_true", help="peak memory of the core")
    add("--decode", action="store_true", help="time of one token")
    add("--no-timings", action="store_true", help="errors only")
    add(
        "--output", default="results/attention", help="to write, without suffix"
    )
    add("--plot", type=Path, help="draw this JSON again, measure nothing")
    add("--peak", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import keras
import tensorflow as tf

from benchmarks.attention import report
from benchmarks.attention.columns import check_agreement
from benchmarks.attention.decode import decode
from benchmarks.attention.memory import memory, peak_of_one
from benchmarks.attention.timing import timings


def main():
    args = parse_args()
    if args.peak:
        name, batch, length, jit = args.peak
        return peak_of_one(args, name, int(batch), int(length), jit)
    if args.plot:
        return report.draw(json.loads(args.plot.read_text()), args.plot)
    print("Checking that columns agree …", flush=True)
    # No paths of this machine, and what was measured alone.
    elsewhere = "output", "plot", "peak"
    arguments = {k: v for k, v in vars(args).items() if k not in elsewhere}
    if args.model_garden:
        arguments["model_garden"] = Path(args.model_garden).name
    record = {
        "arguments": arguments,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "errors": check_agreement(args),
    }
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)

    def save(name, found):
        record[name] = found
        path.with_suffix(".json").write_text(report.dumps(record))
        path.with_suffix(".md").write_text(report.tables(record))

    if not args.no_timings:
        timings(args, functools.partial(save, "timings"))
    if args.memory:
        print("\npeak memory, core, forward + backward")
        save("memory", memory(args))
    if args.decode:
        save("decode", decode(args))
    print(f"wrote {path.with_suffix('.json')} and {path.with_suffix('.md')}")
    report.draw(record, path)


if __name__ == "__main__":
    main()
