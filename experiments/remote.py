"""Makes the runs of a pack, on a machine with jaxlib and no TensorFlow.

`offload` says what a pack is. Runs are made cell by cell, a cell being all
seeds of one setting, by several processes that share the accelerator. What is
done when the time is up is kept, in files that grow as runs finish:

    python3 -m experiments.remote PACK --out OUT --processes 12 --limit 540

OUT gets results-0.tar, results-1.tar, … of at most --megabytes each, and
log.txt. Runs that OUT holds are not made again.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from subprocess import DEVNULL

ROOT = Path(__file__).resolve().parents[1]
# For short programs, which compile longer than they run.
XLA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
# Of a file, for what an archive holds besides the results.
SPARE = 2**16


def main():
    args = parse_args()
    runs = read_runs(args.pack)
    if args.worker:
        from experiments.remote_worker import work

        return work(runs, args.pack, args.work, args.until)
    args.until = time.time() + args.limit
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sharing(args) as environment:
        args.work = Path(folder)
        done = done_before(args.out)
        for name in done:
            (args.work / f"{name}.done").touch()
        print(f"{len(runs)} runs, {len(done)} of them done before", flush=True)
        return make_all(runs, args, environment)


def parse_args():
    parser = argparse.ArgumentParser(
        prog="python3 -m experiments.remote",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("pack", type=Path, help="a folder")
    add("--out", type=Path, required=True, help="a folder")
    add("--processes", type=int, default=1, help="default: %(default)s")
    add("--limit", type=float, default=86_400, help="seconds")
    add("--megabytes", type=float, default=15, help="of a file, at most")
    add("--files", type=int, default=4, help="of results, at most")
    add("--xla-flags", default=XLA_FLAGS, help="with a =; default: %(default)s")
    add("--no-mps", action="store_true", help="processes take turns on a GPU")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--work", type=Path, help=argparse.SUPPRESS)
    add("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def read_runs(pack):
    """Lines of the pack, the last of each run, cell by cell."""
    lines = (pack / "runs.jsonl").read_text().splitlines()
    runs = {run["run"]: run for run in map(json.loads, lines)}.values()
    cells = list(dict.fromkeys(run["cell"] for run in runs))
    return sorted(runs, key=lambda run: cells.index(run["cell"]))


def done_before(out):
    names = set()
    for path in out.glob("*.tar"):
        with tarfile.open(path) as file:
            names |= {name.removesuffix(".npz") for name in file.getnames()}
    return names


@contextlib.contextmanager
def sharing(args):
    """The environment of the processes, with what works on this machine."""
    own = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    flagged = {
        **own,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {args.xla_flags}",
    }
    control = shutil.which("nvidia-cuda-mps-control")
    if args.no_mps or args.processes == 1:
        control = None
    if control:
        # A daemon that held this output would keep its reader waiting.
        subprocess.run([control, "-d"], stdout=DEVNULL, stderr=DEVNULL)
        if _works(flagged):
            try:
                yield flagged
            finally:
                subprocess.run([control], input=b"quit\n", stdout=DEVNULL)
            return
        print("No GPU is seen through MPS: processes take turns.", flush=True)
        subprocess.run([control], input=b"quit\n", stdout=DEVNULL)
    if _works(flagged):
        yield flagged
    else:
        print(f"{args.xla_flags} are refused: left out.", flush=True)
        yield own


def _works(environment):
    code = "import jax; print(jax.device_put(1.0).device)"
    try:
        return not subprocess.run(
            [sys.executable, "-c", code], env=environment, timeout=60
        ).returncode
    except subprocess.TimeoutExpired:
        return False


def make_all(runs, args, environment):
    """Starts the processes, and keeps what they make as they make it."""
    command = [
        *(sys.executable, "-m", "experiments.remote", str(args.pack)),
        *("--out", str(args.out), "--worker", "--work", str(args.work)),
        *("--until", str(args.until)),
    ]
    log = args.out / "log.txt"
    with log.open("a") as file:
        workers = [
            subprocess.Popen(command, env=environment, stdout=file, stderr=file)
            for _ in range(args.processes)
        ]
    start, count = time.time(), 0
    try:
        while True:
            # What ended before the folder is read has left all it made.
            ended = all(worker.poll() is not None for worker in workers)
            count += collect(args)
            if ended or time.time() > args.until:
                break
            time.sleep(0.2)
    finally:
        for worker in workers:
            worker.kill()
    print(
        f"{count} runs made in {time.time() - start:.0f} s; "
        f"{len(done_before(args.out))} of {len(runs)} are done"
    )
    if any(worker.wait() not in (0, -9) for worker in workers):
        print(f"Something failed: see {log.name}")
        return 1
    return 0


def collect(args):
    """Moves finished results into the files; returns how many there were."""
    count = 0
    for path in sorted(args.work.glob("*.npz")):
        limit = args.megabytes * 2**20 - SPARE - path.stat().st_size
        for number in range(args.files):
            target = args.out / f"results-{number}.tar"
            if not target.exists() or target.stat().st_size < limit:
                break
        else:
            print(f"No room is left for {path.stem}", flush=True)
            path.rename(path.with_suffix(".left"))
            continue
        with tarfile.open(target, "a") as file:
            file.add(path, path.name)
        path.rename(path.with_suffix(".done"))
        count += 1
    return count


if __name__ == "__main__":
    raise SystemExit(main())
