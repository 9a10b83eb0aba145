"""Every experiment runs end to end on toy data, and leaves its record."""

import re
import shlex
import sys

import numpy as np
import pytest

from experiments import records
from tests.helpers import toys
from tests.helpers.scripts import ROOT, SIZES, experiment, script

KERNEL = "--attention normal:positive --num-features 8"
SOFTMAX = "--attention softmax"
# The task, what writes its data, its own flags.
RUNS = {
    "listops": (None, f"--length 30 --min-length 5 --examples 8 {KERNEL}"),
    "pathfinder": (None, f"--examples 8 --stride 16 {SOFTMAX}"),
    "mnist5k": (
        lambda folder: toys.write_digits(folder, 60),
        "--stride 14 --attention GMM-RKS",
    ),
    "dna": (
        toys.write_genes,
        f"--length 40 --mutations 0.1 --shift 2 {KERNEL}",
    ),
    "retrieval": (toys.write_pairs, f"--length 8 --stride 2 {SOFTMAX}"),
    "text": (toys.write_reviews, f"--length 32 {KERNEL}"),
    "language": (
        toys.write_works,
        f"--length 16 --sample 3 --prompt ab --decay constant {KERNEL}",
    ),
    "sst2": (toys.write_sentences, f"--length 8 --draws 0 {SOFTMAX}"),
}


def run(task, folder, *words):
    experiment(
        task,
        *("--data-dir", folder, "--results", folder / "study"),
        *("--draws", 1, *SIZES.split(), *words),
    )
    return records.read(folder / "study")


# GMM-RKS as published, which has no norm.
@pytest.mark.filterwarnings("ignore:Trigonometric features train badly")
@pytest.mark.slow
@pytest.mark.parametrize("task", RUNS)
def test_task_runs_and_is_recorded(task, tmp_path, monkeypatch):
    write, flags = RUNS[task]
    if task in ("text", "sst2"):
        pytest.importorskip("tensorflow_text")
    if write:
        write(tmp_path)
    words = shlex.split(flags)
    if task == "text":
        words += ["--export", tmp_path / "out"]
    if task == "sst2":
        pretraining = script("pretraining")
        monkeypatch.setattr(pretraining, "HELD_OUT_WINDOWS", 4)
        words += [
            *("--text", tmp_path / "text", "--vocabulary-size", 40),
            *("--pretraining-steps", 2, "--pretrained", tmp_path / "encoder"),
        ]
    rows = run(task, tmp_path, *words)
    names = [row["task"] for row in rows]
    assert names == [task] + [f"{task}.pretraining"] * (task == "sst2")
    for row in rows:
        assert 0.0 <= float(row["score"]) <= 9.0
        assert row["steps"] == "2" and row["keras_kt"]
        assert str(tmp_path) not in str(row)
        arrays = records.read_arrays(tmp_path / "study", row)
        assert arrays["curve"][:, 0].tolist() == [2.0]
        has_kernel = row["attention"] != "softmax"
        assert (arrays["trained"].size > 0) == has_kernel
        assert bool(row["fresh_draws"]) == (has_kernel and task != "sst2")
    if task == "text":
        assert (tmp_path / "out/reviews/1/saved_model.pb").exists()
    if task == "language":
        assert str(arrays["sample"]).startswith("ab")
    if task == "sst2":
        # The second run takes what the first one pretrained.
        kept = (tmp_path / "encoder").stat().st_mtime_ns
        run(task, tmp_path, *words, "--seed", 1)
        assert (tmp_path / "encoder").stat().st_mtime_ns == kept


@pytest.mark.slow
def test_a_rerun_replaces_its_row(tmp_path):
    flags = (*"--length 8 --examples 8".split(), *SOFTMAX.split())
    (first,) = run("sparsity", tmp_path, *flags)
    (again,) = run("sparsity", tmp_path, *flags, "--steps", 3)
    assert (first["steps"], again["steps"]) == ("2", "3")
    assert len(run("sparsity", tmp_path, *flags, "--seed", 1)) == 2
    arrays = records.read_arrays(tmp_path / "study", again)
    assert arrays["curve"][-1, 0] == 3.0
    assert arrays["densities"][:, 0].tolist() == [1.0, 0.5, 0.25, 0.125]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path, capsys):
    flags = (*"--length 8 --examples 8".split(), *SOFTMAX.split())
    flags += ("--checkpoints", tmp_path / "checkpoints")
    run("sparsity", tmp_path, *flags)
    (row,) = run("sparsity", tmp_path, *flags)
    # There was nothing left to train.
    assert capsys.readouterr().out.count("step      2") == 1
    assert row["score"] and row["validation"]
    with pytest.raises(SystemExit, match="steps=2.*steps=3"):
        run("sparsity", tmp_path, *flags, "--steps", 3)


@pytest.mark.slow
def test_conversion_reports_every_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(script("convert_tasks"), "BLOCKS", 1)
    toys.write_reviews(tmp_path)
    experiment(
        *("convert", "--data-dir", tmp_path, "--results", tmp_path / "study"),
        *"--steps 5 --batch-size 4 --words 8 --bytes 20 --near-field 4".split(),
        *"--features 32 --distill-steps 2 --test-examples 8".split(),
        *"--speed-tokens 0 --sample 2".split(),
    )
    study = tmp_path / "study"
    stages = records.read(study, "stages")
    for task in ("classifier", "lm"):
        for kind in ("errors", "attention_0"):
            assert (study / f"convert_{task}_{kind}.png").exists()
        of_task = [row for row in stages if row["task"] == task]
        assert [row["stage"] for row in of_task] == [
            "softmax",
            "plain orthogonal features",
            "converted",
            "calibrated",
            "distilled",
            "fine-tuned",
        ]
        errors = {
            row["stage"]: np.mean(records.numbers(row["errors"]))
            for row in of_task[1:]
        }
        assert errors["calibrated"] < errors["plain orthogonal features"]
    keys = script("convert_report").RUN
    arrays = records.read_arrays(study, {"task": "lm", "seed": 0}, keys)
    assert str(arrays["sample"]).startswith("This film ")
    assert len(arrays["heads"]) == len(arrays["paths"]) == 4
    assert (study / "convert.md").read_text().count("| fine-tuned |") == 2


@pytest.mark.slow
def test_distillation_is_scored_by_stage_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(script("convert_tasks"), "BLOCKS", 1)
    toys.write_reviews(tmp_path)
    study = tmp_path / "study"
    words = [
        *("distill", "--data-dir", tmp_path, "--results", study),
        *("--work", tmp_path / "work"),
        *"--steps 5 --batch-size 4 --words 8 --bytes 20 --features 32".split(),
        *"--layer-steps 2 --output-steps 2 --test-examples 8".split(),
    ]
    experiment(*words, "--ways", "points", "--seeds", 0)
    first = (study / "stages.csv").read_text()
    experiment(*words, "--ways", "points", "near", "--seeds", 0)
    rows = records.read(study, "stages")
    # What was there was not run again.
    kept = [row for row in first.splitlines() if ",0,points," in row]
    assert set(kept) <= set((study / "stages.csv").read_text().splitlines())
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        assert bool(row["near_alone"]) == (
            row["way"] == "near" and row["stage"] != "softmax"
        )
    table = (study / "distill.md").read_text()
    assert table.count("| near | outputs distilled |") == 2


@pytest.mark.slow
def test_sweep_runs_resumes_and_reports(tmp_path, capsys):
    words = [
        *("sweep", "--tasks", "sparsity"),
        *("--results", tmp_path / "results", "--work", tmp_path / "work"),
        *("--jobs", 2, "--attention", "softmax"),
        "fixed:positive --decay constant --num-features 8",
    ]
    flags = ["--", *"--length 8 --steps 2 --examples 8 --draws 1".split()]
    flags += ["--no-xla", "--validations", "1"]
    for done in (0, 2):
        assert not experiment(*words, *flags)
        assert f"2 runs, {done} of them done" in capsys.readouterr().out
    rows = records.read(tmp_path / "results")
    assert [row["flags"] for row in rows] == [
        "--num-features 8 --decay constant",
        "",
    ]
    assert all(row["options"].endswith("--no-xla") for row in rows)
    assert str(tmp_path) not in (tmp_path / "results/runs.csv").read_text()
    table = (tmp_path / "results" / "experiments.md").read_text()
    for label in ("softmax", "fixed-positive-num-features-8-decay-constant"):
        assert f"| {label} |" in table
    for picture in ("experiments", "curves", "sparsity"):
        assert (tmp_path / "results" / f"{picture}.png").stat().st_size > 0
    # Nothing was learned.
    assert not (tmp_path / "results" / "kernels.png").exists()


def test_pretraining_is_a_task_of_its_own_in_the_report():
    rows = [
        {"task": task, "attention": "GMM-PRF", "flags": "", "seed": "0"}
        for task in ("sst2", "sst2.pretraining")
    ]
    tasks = script("report").by_task(rows)
    assert {task: dict(systems) for task, systems in tasks.items()} == {
        "sst2": {"GMM-PRF": [rows[0]]},
        "pretraining": {"GMM-PRF": [rows[1]]},
    }


@pytest.mark.parametrize(
    "flags",
    [
        "--attention softmax --decay constant",
        "--attention softmax --qk-norm l2",
        "--attention GMM-PRF --prefactor self",
        "--attention normal:positive --components 3",
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        experiment("sparsity", *flags.split())
    assert "does not apply to the --attention" in capsys.readouterr().err


def test_flags_of_an_attention_have_one_order():
    name, flags = script("attentions").split(
        "fixed:positive --decay gated --num-features 8"
    )
    assert (name, flags) == ("fixed:positive", "--num-features 8 --decay gated")


def test_an_unknown_experiment_lists_those_there_are(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments", "nothing"])
    with pytest.raises(SystemExit, match="(?s)listops.*Received: nothing"):
        script("__main__").main()


def test_files_are_short_and_know_no_example():
    for path in (ROOT / "experiments").rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        assert not re.search(r"\bexamples?[./]\w+\.py|import examples", text)
    for path in (ROOT / "benchmarks" / "attention").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
