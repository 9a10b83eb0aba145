"""Runs whose training another machine does, one without TensorFlow.

TensorFlow's XLA bridge lowers the training step of a run, in a loop over many
steps, and the scoring of a batch to HLO modules. A pack is a folder with those,
the values that all variables start with, and the data (of tasks that make
theirs, how to make it). `remote` compiles and runs them by jaxlib on whatever
it finds; what it sends back is recorded as if the run had been made here.

    python -m experiments sweep --tasks sparsity --attention softmax GMM-PRF \\
        --seeds 0 1 2 --pack PACK                   # here; no row is made
    python3 -m experiments.remote PACK --out OUT    # there
    python -m experiments sweep --tasks sparsity --attention softmax GMM-PRF \\
        --seeds 0 1 2 --unpack OUT --results …      # here

A pack may take any number of sweeps, of any flags after `--`, several at a time
too; what is the same in several runs is in it once. `--unpack` must be given
the flags of `--pack`. What has a row in --results is left out, as ever, so that
what did not come back can be packed again.

    runs.jsonl      a line for each run: its cell, seed, data and values
    cells/*.json    what the seeds of a run share: modules, variables, draws
    modules/*.gz    HLO modules, serialized
    arrays/*.npz    values and data
"""

import functools
import gzip
import hashlib
import importlib
import io
import json
import math
import shlex
import tarfile
from pathlib import Path

import keras
import numpy as np

from experiments import lowering, measure, records
from experiments.data import Synthetic, is_point, map_split
from experiments.flags import PLACES
from experiments.measure import Scores
from experiments.tasks import TASKS

# Scoring has no gradient to keep, so its batches may be so many times larger.
SCORED_BATCHES = 4
# Models that are kept until Keras forgets them all, which takes its time.
CLEARED_AFTER = 10
ROOT = Path(__file__).resolve().parents[1]


def run_all(jobs, args):
    """Packs or unpacks the runs of a sweep; returns the names of those failed.

    Args:
        jobs: dictionaries of `records.KEYS`.
        args: of the sweep.
    """
    failed = []
    for number, job in enumerate(jobs, 1):
        label = f"{job['task']}-{records.label(job, True)}-{job['seed']}"
        print(f"[{number}/{len(jobs)}] {label}", flush=True)
        module = TASKS[job["task"]].module
        words = [
            *("--attention", job["attention"], *shlex.split(job["flags"])),
            *shlex.split(job["sizes"]),
            *("--seed", str(job["seed"])),
            *("--data-dir", str(args.data_dir)),
            *("--results", str(args.results)),
            *(("--pack", str(args.pack)) if args.pack else ()),
            *(("--unpack", str(args.unpack)) if args.unpack else ()),
            *args.flags,
        ]
        main = importlib.import_module(f"experiments.{module}").main
        try:
            main(words, job["task"])
        except (SystemExit, LookupError) as error:
            print(error)
            failed.append(label)
        if number % CLEARED_AFTER == 0:
            keras.backend.clear_session()
    return failed


def pack(args, source, data, model, optimizer, loss, score, draw_examples):
    """Adds a run to the pack.

    Args:
        args: from `parse_args`; `pack` is the folder.
        source: what the data came from, `Data` or `Synthetic`.
        data: `Data`, validation and test set as far as they are used.
        model: a built model.
        optimizer: its optimizer.
        loss, score: functions of `(y, outputs)`, one number for each example.
        draw_examples: test examples that fresh draws are scored on; `None`
            means all.
    """
    optimizer.build(model.trainable_variables)
    variables = [*model.variables, *optimizer.variables]
    line = {
        "run": run_name(args),
        "cell": cell_name(args),
        "seed": args.seed,
        "values": [_store(args.pack, np.asarray(v)) for v in variables],
        "data": _pack_data(args.pack, source, data),
    }
    path = args.pack / "cells" / f"{cell_name(args)}.json"
    if not (path.exists() and json.loads(path.read_text())["code"] == _code()):
        cell = {
            **_sizes(args, draw_examples),
            "code": _code(),
            "variables": [(v.name, list(v.shape), v.dtype) for v in variables],
            "of_model": len(model.variables),
            # Kernels are recorded, which these make.
            "kept": [
                index
                for index, variable in enumerate(model.variables)
                if variable.name.startswith("spectral_")
            ],
            "draws": _draws(args, model, variables),
        }
        modules = lowering.lower(cell, data, model, optimizer, loss, score)
        for name, (module, captured) in modules.items():
            cell[name] = {
                "module": _write(args.pack, module),
                "captured": captured,
            }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cell) + "\n")
    with (args.pack / "runs.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def unpack(args, model):
    """Columns, curve and `Scores` of a run that another machine has made.

    The model gets the trained weights of its kernels.
    """
    result = _result(args)
    for name, value in result.items():
        if name.startswith("variable/"):
            model.variables[int(name.partition("/")[2])].assign(value)
    starts = [0, *result["points"][:-1]]
    curve = [
        (int(end), float(np.mean(result["losses"][start:end])), *rest)
        for start, end, *rest in zip(
            starts,
            result["points"],
            result["validation"].tolist(),
            result["seconds"].tolist(),
            strict=True,
        )
    ]
    columns = {
        "seconds": float(result["seconds"][-1]),
        "milliseconds_per_step": float(result["milliseconds_per_step"]),
        "peak_memory_mib": None,
        "training_memory_mib": None,
        "device": str(result["device"]),
    }
    return columns, curve, Scores(result["test"], result["fresh"])


def cell_name(args):
    """A hash of all that seeds of a run share."""
    shared = {
        name: str(value)
        for name, value in sorted(vars(args).items())
        if name not in PLACES
    }
    return _digest(json.dumps({**shared, "attention": args.attention}))


def run_name(args):
    return f"{cell_name(args)}-{args.seed}"


def _result(args):
    for path in sorted(args.unpack.rglob("*.tar")):
        if run_name(args) in _members(path):
            with tarfile.open(path) as file:
                content = file.extractfile(f"{run_name(args)}.npz").read()
            with np.load(io.BytesIO(content)) as arrays:
                return dict(arrays)
    raise LookupError(f"{args.unpack} holds no result of this run.")


@functools.cache
def _members(path):
    with tarfile.open(path) as file:
        return {name.removesuffix(".npz") for name in file.getnames()}


def _sizes(args, draw_examples):
    preset = args.preset
    points = [
        number
        for number in range(1, preset.steps + 1)
        if is_point(number, preset.steps, args.validations)
    ]
    return {
        "steps": preset.steps,
        "points": points,
        # Steps of one call.
        "chunk": math.gcd(*points),
        "batch": preset.batch_size,
        "scored_batch": SCORED_BATCHES * preset.batch_size,
        "validation_examples": args.validation_examples,
        "test_examples": args.test_examples,
        "draw_examples": draw_examples,
    }


def _pack_data(folder, source, data):
    if isinstance(source, Synthetic):
        return source._asdict()
    return {
        name: map_split(lambda array: _save(folder, array), split)
        for name, split in data._asdict().items()
    }


def _draws(args, model, variables):
    """Of each fresh draw, the variables that hold it, and their values."""
    places = {id(variable): i for i, variable in enumerate(variables)}
    held = [
        layer.spectral_prior.base_noise for layer in measure.drawn_layers(model)
    ]
    return [
        [
            (places[id(noise)], _store(args.pack, noise.numpy()))
            for noise in held
        ]
        for _ in measure.fresh_draws(model, args.draws)
    ]


def _store(folder, values):
    """The only value of an array, or else the name under which it is kept."""
    if values.size and (values == values.flat[0]).all():
        return values.flat[0].item()
    return _save(folder, values)


def _save(folder, array):
    name = _digest(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    path = folder / "arrays" / f"{name}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, array)
    return name


def _write(folder, module):
    name = _digest(module)
    path = folder / "modules" / f"{name}.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(module, mtime=0))
    return name


def _digest(content):
    content = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(content, digest_size=10).hexdigest()


@functools.cache
def _code():
    """A hash of what programs are lowered from."""
    files = sorted(
        path
        for folder in ("experiments", "keras_kt")
        for path in (ROOT / folder).rglob("*.py")
    )
    return _digest(b"".join(path.read_bytes() for path in files))
