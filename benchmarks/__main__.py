"""Measures what docs/benchmarks.md says, and fills its tables.

One benchmark after another, each a process of its own, since they must not
disturb one another; two hours on two quiet cores. `attention` checks
agreement first; it and `ratios` write no table whose times spread.

    python -m benchmarks --model-garden tf_models_official-*.whl
    python -m benchmarks --only ratios tracing
    python -m benchmarks --dry-run
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from experiments import pages

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs/benchmarks.md")
# As the page has them, behind `python`.
COMMANDS = {
    "approximation": "benchmarks/approximation.py",
    "attention": (
        "-m benchmarks.attention --decode --model-garden WHEEL "
        "--lengths 256 384 512 1024 4096 8192 65536 --repeats 5 --budget 2"
    ),
    "memory": (
        "-m benchmarks.attention --no-timings --memory "
        "--lengths 4096 8192 16384 32768 65536 --output results/memory"
    ),
    "memory of wide heads": (
        "-m benchmarks.attention --no-timings --memory --tokens 8192 "
        "--lengths 64 128 256 384 512 1024 --output results/memory_wide/memory"
    ),
    "memory of narrow heads": (
        "-m benchmarks.attention --no-timings --memory --tokens 8192 "
        "--lengths 64 128 256 384 512 1024 "
        "--output results/memory_narrow/memory "
        "--heads 4 --head-dim 16 --features 32"
    ),
    "ratios": "-m benchmarks.ratios --repeats 7",
    "generate": (
        "benchmarks/hub_decode.py --positions 100 4096 16384 --tokens 129 "
        "--repeats 7"
    ),
    "stream": (
        "benchmarks/long_stream.py --output results/streams/long_stream.json"
    ),
    "window": (
        "benchmarks/window.py --no-memory --repeats 3 "
        "--output results/streams/window.json"
    ),
    "tracing": (
        'benchmarks/tracing.py --rows causal "causal MultiHeadAttention" '
        "--output results/tracing_seconds"
    ),
    "import": "benchmarks/imports.py --output results/imports/imports.json",
    "picture": "-m benchmarks.overview",
}


def parse_args():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        default=list(COMMANDS),
        choices=list(COMMANDS),
        help="what is measured",
    )
    add(
        "--model-garden",
        help="wheel of tf-models-official 2.20.0; "
        "without it the page loses the column of this peer",
    )
    add("--dry-run", action="store_true", help="only say what would run")
    return parser.parse_args()


def words_of(name, wheel=None):
    """The words of a command behind `python`."""
    words = shlex.split(COMMANDS[name])
    if "WHEEL" in words:
        place = words.index("WHEEL")
        words[place - 1 : place + 1] = (
            ["--model-garden", str(Path(wheel).resolve())] if wheel else []
        )
    return words


def main():
    args = parse_args()
    for number, name in enumerate(args.only, 1):
        words = words_of(name, args.model_garden)
        print(
            f"[{number}/{len(args.only)}] python {shlex.join(words)}",
            flush=True,
        )
        if args.dry_run:
            continue
        done = subprocess.run([sys.executable, *words], cwd=ROOT, check=False)
        if done.returncode:
            sys.exit(
                f"{name} failed; what came before it is written. Go on with "
                f"--only {shlex.join(args.only[number - 1 :])}"
            )
    if not args.dry_run:
        page = ROOT / PAGE
        page.write_text(pages.fill(page.read_text(), ROOT))
        print(
            f"Filled the tables of {PAGE}. Which sentences have other numbers "
            "now: python -m pytest tests/test_figures.py "
            "tests/test_figures_of_guides.py"
        )


if __name__ == "__main__":
    main()
