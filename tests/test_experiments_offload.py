"""Runs that another machine makes: what it is given, what is recorded."""

import io
import json
import tarfile

import numpy as np
import pytest

from experiments import records, remote
from tests.helpers.scripts import SIZES, command, experiment

STEPS = 3
FLAGS = (
    *"--length 8 --examples 8 --draws 2 --num-features 8".split(),
    *SIZES.split(),
    *f"--steps {STEPS} --validations 3 --test-examples 8".split(),
)


def sparsity(attention, seed, *words):
    experiment(
        *("sparsity", "--attention", attention, "--seed", seed),
        *(FLAGS if ":" in attention else FLAGS[:6] + FLAGS[8:]),
        *words,
    )


def answer(folder, arrays, line):
    """What another machine sends back of one run."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    member = tarfile.TarInfo(f"{line['run']}.npz")
    member.size = content.tell()
    content.seek(0)
    with tarfile.open(folder / "results-0.tar", "a") as file:
        file.addfile(member, content)


def test_a_pack_and_what_comes_back(tmp_path):
    pack = tmp_path / "pack"
    for seed in (0, 1):
        sparsity("normal:trigonometric", seed, "--pack", pack)
    first, second = remote.read_runs(pack)
    assert first["cell"] == second["cell"] and first["data"] != second["data"]
    assert len(list((pack / "modules").iterdir())) == 2
    path = pack / "cells" / f"{first['cell']}.json"
    cell = json.loads(path.read_text())
    names = [name for name, _, _ in cell["variables"]]
    for values in (first["values"], second["values"]):
        # What starts equal needs no file.
        assert values[names.index("iteration")] == 0
        assert all(
            isinstance(value, str) or value in (0, 1) or "spectral" in name
            for name, value in zip(names, values, strict=True)
            if "state" not in name
        )
    (draw, _), ((place, noise),) = cell["draws"], cell["draws"][0]
    assert draw == [[place, noise]]
    assert names[place] == "spectral_noise" and noise != first["values"][place]

    scale = names.index("spectral_scale")
    scores = np.arange(8.0, dtype="float32") / 8
    answer(
        tmp_path,
        {
            "losses": np.arange(1.0, 1.0 + STEPS),
            "points": cell["points"],
            "validation": [0.25, 0.5, 0.75],
            "seconds": [1.0, 2.0, 3.0],
            "milliseconds_per_step": 1000.0,
            "test": scores,
            "fresh": np.stack([scores, 1 - scores]),
            "device": "Imagined",
            f"variable/{scale}": np.full(cell["variables"][scale][1], 2.0),
        },
        first,
    )
    words = ("--results", tmp_path / "study", "--unpack", tmp_path)
    sparsity("normal:trigonometric", 0, *words)
    (row,) = records.read(tmp_path / "study")
    assert row["score"] == "0.4375" and row["validation"] == "0.75"
    assert records.numbers(row["fresh_draws"]) == [3 / 16, 13 / 16]
    assert (row["device"], row["seconds"]) == ("Imagined", "3.0")
    assert row["peak_memory_mib"] == ""
    arrays = records.read_arrays(tmp_path / "study", row)
    expected = [(i, i, i / 4, i) for i in (1, 2, 3)]
    np.testing.assert_array_equal(arrays["curve"], expected)
    # Of four densities in turn, the first has the examples 0 and 4.
    assert arrays["densities"][:, 1].tolist() == [0.25, 0.375, 0.5, 0.625]
    assert arrays["density_draws"][0].tolist() == [0.25, 0.75]
    assert np.abs(arrays["trained"] - arrays["untrained"]).max() > 0.1
    with pytest.raises(LookupError, match="no result of this run"):
        sparsity("normal:trigonometric", 1, *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention", ["softmax", "fixed:positive", "normal:trigonometric"]
)
def test_a_machine_without_tensorflow_makes_the_same_run(attention, tmp_path):
    pytest.importorskip("jax")
    # Of the second seed, by modules that were lowered with the first.
    for seed in (0, 1):
        sparsity(attention, seed, "--pack", tmp_path / "pack")
    words = ("-m", "experiments.remote", tmp_path / "pack", "--out", tmp_path)
    made = command(*words)
    assert "2 runs made" in made.stdout, made.stderr
    assert "2 of them done before" in command(*words).stdout
    for name, flags in (("here", ()), ("there", ("--unpack", tmp_path))):
        sparsity(attention, 1, "--results", tmp_path / name, *flags)
    here, there = (
        records.read(tmp_path / name)[0] for name in ("here", "there")
    )
    for column in ("score", "validation", "fresh_draws"):
        assert here[column] == there[column]
    arrays = [
        records.read_arrays(tmp_path / name, here) for name in ("here", "there")
    ]
    for name in arrays[0]:
        mine, theirs = (values[name] for values in arrays)
        if name == "curve":
            # Times differ.
            mine, theirs = mine[:, :3], theirs[:, :3]
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_runs_of_a_cell_follow_one_another(tmp_path):
    runs = [("a0", "a", 1), ("b0", "b", 2), ("a1", "a", 3), ("a0", "a", 4)]
    (tmp_path / "runs.jsonl").write_text(
        "\n".join(
            json.dumps({"run": run, "cell": cell, "seed": seed})
            for run, cell, seed in runs
        )
    )
    order = [(run["run"], run["seed"]) for run in remote.read_runs(tmp_path)]
    # A run that was packed again counts as it was packed last.
    assert order == [("a0", 4), ("a1", 3), ("b0", 2)]
