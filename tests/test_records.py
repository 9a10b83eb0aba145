"""A study keeps one row a run, whatever happens while it is written."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from experiments import records, report
from tests.helpers.scripts import ROOT

STUDIES = sorted(path.parent for path in ROOT.glob("results/*/runs.csv"))
RUNS = [study for study in STUDIES if study.name != "convert"]


def row(seed=0, attention="softmax", **columns):
    return {
        "task": "listops",
        "attention": attention,
        "flags": "",
        "seed": seed,
        **columns,
    }


def test_a_rerun_takes_the_place_of_its_row_and_arrays(tmp_path):
    first, other = row(score=0.1), row(1, score=0.2)
    records.write(tmp_path, [first], {"curve": [1.0], "old": [2.0]})
    records.write(tmp_path, [other], {"curve": [3.0]})
    records.write(tmp_path, [row(score=1 / 3)], {"curve": [4.0]})
    assert [r["score"] for r in records.read(tmp_path)] == [repr(1 / 3), "0.2"]
    arrays = [
        {name: array.tolist() for name, array in of_row.items()}
        for of_row in (
            records.read_arrays(tmp_path, each)
            for each in records.read(tmp_path)
        )
    ]
    assert arrays == [{"curve": [4.0]}, {"curve": [3.0]}]
    assert {path.name for path in tmp_path.iterdir()} == {
        "runs.csv",
        "runs.npz",
    }


def test_flags_and_attentions_are_runs_of_their_own(tmp_path):
    names = ["normal:positive", "normal:positive", "softmax"]
    flags = ["", "--decay constant", ""]
    for attention, words in zip(names, flags, strict=True):
        records.write(tmp_path, [{**row(0, attention), "flags": words}])
    assert [records.label(r) for r in records.read(tmp_path)] == [
        "normal-positive",
        "normal-positive-decay-constant",
        "softmax",
    ]


def test_cells_give_back_what_was_written(tmp_path):
    draws = [0.1 + 0.2, np.float64(1e-9)]
    values = {"text": 'a "b", c\nd', "none": None, "draws": draws}
    records.write(tmp_path, [row(**values)])
    (read,) = records.read(tmp_path)
    assert read["text"] == values["text"] and read["none"] == ""
    assert records.numbers(read["draws"]) == draws
    # A row with other columns leaves the ones there are.
    records.write(tmp_path, [row(1, more=2)])
    assert [r["more"] for r in records.read(tmp_path)] == ["", "2"]
    assert records.read(tmp_path)[0]["text"] == values["text"]


@pytest.mark.parametrize("name", ["savez_compressed", "replace"])
def test_a_crash_loses_nothing(name, tmp_path, monkeypatch):
    records.write(tmp_path, [row(score=0.5)], {"curve": [1.0]})

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    owner = np if name == "savez_compressed" else records.os
    monkeypatch.setattr(owner, name, crash)
    with pytest.raises(KeyboardInterrupt):
        records.write(tmp_path, [row(score=0.9)], {"curve": [2.0]})
    monkeypatch.undo()
    (kept,) = records.read(tmp_path)
    assert kept["score"] == "0.5"
    assert records.read_arrays(tmp_path, kept)["curve"].tolist() == [1.0]
    assert len(list(tmp_path.iterdir())) == 2


def test_writers_wait_for_one_another(tmp_path):
    def write(seed):
        records.write(tmp_path, [row(seed)], {"curve": [float(seed)]})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    rows = records.read(tmp_path)
    assert [int(each["seed"]) for each in rows] == list(range(24))
    for each in rows:
        (seed,) = records.read_arrays(tmp_path, each)["curve"]
        assert seed == int(each["seed"])


@pytest.mark.parametrize("study", RUNS, ids=lambda path: path.name)
def test_the_tables_come_from_the_csv_alone(study):
    table = report.tables(records.read(study))
    assert table == (study / "experiments.md").read_text()


def test_the_table_of_the_page_is_that_of_the_study():
    rows = records.read(ROOT / "results" / "experiments")
    lines = report.overview(report.by_task(rows))
    page = ROOT / "docs" / "experiments.md"
    assert "\n".join(lines) in page.read_text()


@pytest.mark.parametrize("study", RUNS, ids=lambda path: path.name)
def test_every_run_has_its_curve_and_kernels(study):
    for each in records.read(study):
        arrays = records.read_arrays(study, each)
        assert arrays["curve"].shape[1] == len(records.POINT)
        assert float(each["validation"]) == arrays["curve"][-1, 2]
        for kind in ("trained", "untrained"):
            assert (arrays[kind].size > 0) == (each["attention"] != "softmax")
        if arrays["trained"].size:
            assert (arrays["trained"][..., 0] == 1.0).all()


def test_results_are_short_files():
    """They were 122 files of 97,144 lines."""
    paths = [
        path
        for path in (ROOT / "results").rglob("*")
        if path.suffix in (".json", ".csv", ".md")
    ]
    lines = sum(len(path.read_text().splitlines()) for path in paths)
    assert lines <= 5000
    # However many runs a study has, it has its table and what is made of that.
    top = ROOT / "results"
    for study in {path.parent for path in paths} - {top}:
        assert len([path for path in paths if path.parent == study]) <= 3, study
    assert len([path for path in paths if path.parent == top]) <= 12
