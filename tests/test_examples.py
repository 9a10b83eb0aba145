"""The examples run on toy data; what they print on real data is theirs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_convert_pretrained_reports_every_stage(tmp_path):
    pytest.importorskip("tensorflow_text")
    rng = np.random.default_rng(0)
    words = [b"good ", b"bad ", b"film ", b"plot "]
    texts = [b"".join(rng.choice(words, 30)) for _ in range(48)]
    np.savez(
        tmp_path / "imdb_labelled.npz",
        data=np.frombuffer(b"".join(texts), "uint8"),
        offsets=np.cumsum([0, *map(len, texts)]),
        is_test=np.arange(48) % 2,
        label=rng.integers(0, 2, 48),
    )
    arguments = (
        f"--data-dir {tmp_path} --output {tmp_path} --steps 10 "
        "--batch-size 4 --words 16 --bytes 40 --near-field 8 --features 32 "
        "--distill-steps 2 --test-examples 8 --speed-tokens 64 --sample 5"
    )
    subprocess.run(
        [
            sys.executable,
            ROOT / "examples" / "convert_pretrained.py",
            *arguments.split(),
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    for task in ("classifier", "lm"):
        results = json.loads((tmp_path / f"convert_{task}.json").read_text())
        for kind in ("errors", "attention_0", "attention_1"):
            assert (tmp_path / f"convert_{task}_{kind}.png").exists()
        stages = {row["stage"]: row for row in results["stages"]}
        assert list(stages) == [
            "softmax",
            "plain orthogonal features",
            "converted",
            "calibrated",
            "distilled",
            "fine-tuned",
        ]
        errors = {
            name: np.mean(row["error by layer"])
            for name, row in stages.items()
            if name != "softmax"
        }
        assert errors["calibrated"] < errors["plain orthogonal features"]
    assert results["stream"]["sample"].startswith("This film ")


@pytest.mark.slow
def test_sweep_runs_resumes_and_reports(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "examples" / "sweep.py"),
        *("--tasks", "sparsity", "--results", str(tmp_path / "results")),
        *("--work", str(tmp_path / "work"), "--jobs", "2"),
        *(
            "--attention",
            "softmax",
            "GMM-PRF",
            "fixed:positive --decay constant",
        ),
        *("--", "--length", "16", "--steps", "2", "--examples", "32"),
        *("--draws", "1", "--validations", "1"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first, second = (
        subprocess.run(
            command, check=True, env=environment, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    )
    assert "3 runs, 0 of them done before" in first
    assert "3 runs, 3 of them done before" in second
    table = (tmp_path / "results" / "experiments.md").read_text()
    for label in ("softmax", "GMM-PRF", "fixed-positive-decay-constant"):
        assert f"| {label} |" in table
        name = f"sparsity-{label}-0.json"
        record = json.loads((tmp_path / "results" / name).read_text())
        assert str(tmp_path) not in json.dumps(record)
        profiles = record["kernels"]["trained"]
        assert all(head[0] == 1.0 for layer in profiles for head in layer)
        assert bool(profiles) == (label != "softmax")
    for picture in ("experiments", "kernels", "sparsity"):
        assert (tmp_path / "results" / f"{picture}.png").stat().st_size > 0


def test_pretraining_is_a_task_of_its_own_in_the_report(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import sweep

    for name in ("sst2-GMM-PRF-0", "sst2-GMM-PRF-0.pretraining"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name}))
    records = sweep.read_records(tmp_path)
    assert {task: dict(systems) for task, systems in records.items()} == {
        "sst2": {"GMM-PRF": [{"name": "sst2-GMM-PRF-0"}]},
        "pretraining": {"GMM-PRF": [{"name": "sst2-GMM-PRF-0.pretraining"}]},
    }


@pytest.mark.parametrize(
    "arguments",
    [
        "--attention softmax --decay constant",
        "--attention GMM-PRF --qk-norm l2",
        "--attention normal:positive --components 3",
    ],
)
def test_flags_that_would_do_nothing_are_refused(
    arguments, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import synthetic_sparsity

    monkeypatch.setattr(sys, "argv", ["sparsity", *arguments.split()])
    with pytest.raises(SystemExit):
        synthetic_sparsity.main()
    assert "does not apply to the --attention" in capsys.readouterr().err
