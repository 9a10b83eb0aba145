"""Benchmarks run, on sizes that say nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = "--length 11 --heads 2 --head-dim 4 --blocks 1".split()


@pytest.mark.parametrize(
    "flags", [["--counts-only"], pytest.param([], marks=pytest.mark.slow)]
)
def test_tracing_counts_and_times(flags, tmp_path):
    path = tmp_path / "tracing"
    command = [sys.executable, str(ROOT / "benchmarks" / "tracing.py"), *TINY]
    command += ["--rows", "causal", "MultiHeadAttention", *flags]
    done = subprocess.run(
        [*command, "--output", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    ours, theirs = (row["operations"] for row in rows)
    assert ours > theirs > 50
    assert all(("compile" in row) == (not flags) for row in rows)
    table = path.with_suffix(".md").read_text()
    assert f"| causal | 1 | {ours:,} |" in table
    assert str(tmp_path) not in path.with_suffix(".md").read_text()
