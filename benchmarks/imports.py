"""What `import keras_kt` adds to `import keras`: seconds and memory.

Each repeat is a process of its own, which imports Keras on TensorFlow, then the
package: the second import is what the package adds.

    python benchmarks/imports.py
    python benchmarks/imports.py --repeats 15 --output runs/imports.json
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHILD = """
import json, resource, time

def now():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = usage.ru_utime + usage.ru_stime
    return time.perf_counter(), cpu, usage.ru_maxrss / 1024

moments = [now()]
import keras
moments.append(now())
import keras_kt
moments.append(now())
print(json.dumps(moments))
"""


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--repeats", type=int, default=9, help="processes")
    add("--output", type=Path, help="a JSON file for the record")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1. Received: {args.repeats}")
    return args


def main():
    args = parse_args()
    runs = []
    for repeat in range(args.repeats):
        runs.append(one_process())
        print(f"{repeat + 1} of {args.repeats}: {runs[-1]}", flush=True)
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "runs": runs,
        "median": {
            name: round(statistics.median(run[name] for run in runs), 3)
            for name in runs[0]
        },
    }
    print(json.dumps(record["median"], indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record) + "\n")


def one_process():
    """Seconds of the wall and the CPU, and MiB, of both imports."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={
            **os.environ,
            # This process's packages, wherever they come from.
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "KERAS_BACKEND": "tensorflow",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    start, keras, package = json.loads(child.stdout.splitlines()[-1])
    return {
        "keras s": round(keras[0] - start[0], 3),
        "keras CPU s": round(keras[1] - start[1], 3),
        "added s": round(package[0] - keras[0], 3),
        "added CPU s": round(package[1] - keras[1], 3),
        "added MiB": round(package[2] - keras[2], 1),
    }


if __name__ == "__main__":
    main()
