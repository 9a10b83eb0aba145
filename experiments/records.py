"""What runs left behind: a row each in runs.csv, arrays each in runs.npz.

A study is a folder with both. A run is known by its task, attention, flags of
the attention, sizes that were given, and seed; when it is run again its row and
its arrays are replaced. Rows are sorted, so that a change of one is a change of
one line.
"""

import contextlib
import csv
import fcntl
import os
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

KEYS = ("task", "attention", "flags", "sizes", "seed")
# Columns of a curve.
POINT = ("step", "loss", "validation", "seconds")


def read(folder, name="runs"):
    """Rows of a study, dictionaries of strings; none if there is no study."""
    path = Path(folder) / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_arrays(folder, row, keys=KEYS):
    """Arrays of one run by name."""
    path = Path(folder) / "runs.npz"
    if not path.exists():
        return {}
    start = _prefix(row, keys)
    with np.load(path) as arrays:
        return {
            name.removeprefix(start): arrays[name]
            for name in arrays
            if name.startswith(start)
        }


def write(folder, rows, arrays=None, *, name="runs", keys=KEYS):
    """Adds rows to a study, in place of those of the same keys.

    Both files are written anew and take the old ones' place only when they are
    complete. Processes that write to one study wait for one another.

    Args:
        folder: of the study; it is made if need be.
        rows: dictionaries; `None` is written as nothing, lists with spaces.
        arrays: of the first row's run, by name. Defaults to `None`, which
            leaves those there are.
        name: of the CSV file.
        keys: columns that tell rows apart.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        # The row comes last: what has a row has its arrays.
        if arrays is not None:
            _write_arrays(folder / "runs.npz", _prefix(rows[0], keys), arrays)
        table = {_identity(row, keys): row for row in read(folder, name)}
        for row in rows:
            row = {column: _text(value) for column, value in row.items()}
            table[_identity(row, keys)] = row
        rows = [row for _, row in sorted(table.items())]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with _replacing(folder / f"{name}.csv") as path:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


def numbers(text):
    """The numbers of a cell that holds several."""
    return [float(word) for word in text.split()]


def by(rows, key):
    """Rows in lists by what a function makes of them."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def is_loss(row):
    """Whether the lower score is the better one."""
    return row["metric"].startswith("bits")


def label(row, with_sizes=False):
    """The attention of a run and its flags, as tables and files name them.

    Args:
        row: of a run.
        with_sizes: whether its sizes follow.
    """
    words = f"{row['attention']} {row['flags']}".replace(":", " ")
    if with_sizes:
        words += f" {_key(row, 'sizes')}"
    return "-".join(words.replace("--", "").split())


def _identity(row, keys):
    return tuple(
        (int(value), "") if value.isdigit() else (-1, value)
        for value in (str(_key(row, key)) for key in keys)
    )


def _prefix(row, keys):
    # Studies from before there were sizes have arrays without a place for them.
    keys = [key for key in keys if key != "sizes" or _key(row, key)]
    return "".join(f"{_text(_key(row, key))}/" for key in keys)


def _key(row, key):
    return row.get(key, "") if key == "sizes" else row[key]


def _text(value):
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(map(_text, value))
    # The shortest text that gives the same number back.
    return repr(float(value)) if isinstance(value, float) else str(value)


def _write_arrays(path, prefix, arrays):
    kept = {}
    if path.exists():
        with np.load(path) as file:
            kept = {
                name: file[name] for name in file if not name.startswith(prefix)
            }
    new = {f"{prefix}{name}": array for name, array in arrays.items()}
    together = dict(sorted({**kept, **new}.items()))
    with _replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **together)


@contextlib.contextmanager
def _replacing(path):
    """A file to write, which takes the place of `path` at the end."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
