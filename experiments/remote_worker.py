"""One process of `remote`: makes runs, cell by cell, until the time is up."""

import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
import pickle
import time
import traceback

import numpy as np

from experiments.data import Data, Synthetic, batches, first, training_order
from experiments.programs import Program, device_name, put


def work(runs, pack, folder, until):
    """Makes the runs that no other process makes.

    Args:
        runs: lines of the pack, those of one cell one after the other.
        pack: its folder.
        folder: of the results; a file NAME.done there says that a run is done.
        until: time at which nothing is begun any more.

    Returns:
        Whether something failed.
    """
    failed, longest = False, 0.0
    for cell, group in itertools.groupby(runs, lambda run: run["cell"]):
        waiting = [
            run for run in group if not (folder / f"{run['run']}.done").exists()
        ]
        if not waiting or not _claim(folder / f"{cell}.claim"):
            continue
        try:
            start = time.time()
            if start + longest > until:
                break
            runner = Runner(pack, cell, folder)
            print(f"{cell}: compiled in {time.time() - start:.1f} s")
            for run in waiting:
                start = time.time()
                if start + longest > until:
                    break
                result = runner.make(run)
                _save(
                    folder / f"{run['run']}.npz",
                    functools.partial(np.savez_compressed, **result),
                )
                longest = max(longest, time.time() - start)
                print(f"{run['run']}: {time.time() - start:.1f} s", flush=True)
        except Exception:
            # Another cell may well do better.
            traceback.print_exc()
            failed = True
    return failed


def _claim(path):
    """Whether this process is the first to ask."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class Runner:
    """Makes the runs of a cell.

    Args:
        pack: the folder of the pack.
        name: of the cell.
        folder: for data that is made.
    """

    def __init__(self, pack, name, folder):
        self.pack, self.folder = pack, folder
        self.cell = json.loads((pack / "cells" / f"{name}.json").read_text())
        parts = self.cell["train"], self.cell["evaluate"]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            self.train, self.evaluate = pool.map(
                lambda part: Program(pack / "modules" / f"{part['module']}.gz"),
                parts,
            )
        self.captured = [part["captured"] for part in parts]

    def make(self, run):
        """Trains and scores; arrays of the result by name."""
        cell = self.cell
        data = self._data(run["data"])
        test = self._batches(first(data.test, cell["test_examples"]))
        values = [
            put(self._value(stored, variable))
            for stored, variable in zip(
                run["values"], cell["variables"], strict=True
            )
        ]
        values, record = self._train(run["seed"], data, values)
        fresh = []
        for draw in cell["draws"]:
            drawn = list(values)
            for place, stored in draw:
                drawn[place] = put(
                    self._value(stored, cell["variables"][place])
                )
            fresh.append(self._scores(test, drawn, cell["draw_examples"]))
        return {
            **record,
            "test": self._scores(test, values),
            "fresh": np.array(fresh),
            "device": device_name(),
            **{
                f"variable/{place}": np.asarray(values[place])
                for place in cell["kept"]
            },
        }

    def _train(self, seed, data, values):
        """The trained values, and what was seen on the way."""
        cell, (captured, _) = self.cell, self.captured
        validation = self._batches(
            first(data.validation, cell["validation_examples"])
        )
        order = training_order(
            len(data.train[1]), cell["batch"], cell["steps"], seed
        ).astype("int32")
        arrays = [put(array) for array in _flat(data.train)]
        losses, times, seconds, scores = [], [], [], []
        for start in range(0, cell["steps"], cell["chunk"]):
            end = start + cell["chunk"]
            begin = time.perf_counter()
            part, *values = self.train(
                put(order[start:end]),
                *arrays,
                *values,
                *(values[place] for place in captured),
            )[: 1 + len(values)]
            losses.append(np.asarray(part))
            times.append(time.perf_counter() - begin)
            if end in cell["points"]:
                seconds.append(sum(times))
                scores.append(
                    self._scores(validation, values).mean(dtype=float)
                )
        return values, {
            "losses": np.concatenate(losses),
            "points": cell["points"],
            "validation": scores,
            "seconds": seconds,
            "milliseconds_per_step": 1e3 * np.median(times) / cell["chunk"],
        }

    def _batches(self, split):
        """Batches on the device, and how many examples they hold."""
        count = len(split[1])
        return [
            [put(array[index]) for array in _flat(split)]
            for index in batches(count, self.cell["scored_batch"])
        ], count

    def _scores(self, split, values, examples=None):
        """Scores of the first examples, of all if `examples` is `None`."""
        parts, count = split
        count = min(count, count if examples is None else examples)
        needed = -(-count // self.cell["scored_batch"])
        values = [
            *values[: self.cell["of_model"]],
            *(values[place] for place in self.captured[1]),
        ]
        scores = [self.evaluate(*part, *values)[0] for part in parts[:needed]]
        return np.concatenate([np.asarray(x) for x in scores])[:count]

    def _value(self, stored, variable):
        """An array by its name, or one of a single value."""
        _, shape, dtype = variable
        if isinstance(stored, str):
            return self._array(stored)
        return np.full(shape, stored, dtype)

    def _array(self, name):
        with np.load(self.pack / "arrays" / f"{name}.npz") as file:
            return file["arr_0"]

    def _data(self, source):
        if "function" in source:
            return _made(Synthetic(**source), self.folder)
        return Data(
            **{
                name: (
                    tuple(map(self._array, x))
                    if isinstance(x, list)
                    else self._array(x),
                    self._array(y),
                )
                for name, (x, y) in source.items()
            }
        )


def _flat(split):
    x, y = split
    return [*x, y] if isinstance(x, tuple) else [x, y]


def _made(source, folder):
    """Data that is made once for all processes, as a rule."""
    name = hashlib.sha256(json.dumps(source).encode()).hexdigest()
    path = folder / f"{name[:20]}.data"
    if not path.exists():
        _save(path, lambda file: pickle.dump(source.make(), file, protocol=5))
    with path.open("rb") as file:
        return pickle.load(file)


def _save(path, write):
    """Makes a file that appears when it is complete."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    with unfinished.open("wb") as file:
        write(file)
    unfinished.rename(path)
