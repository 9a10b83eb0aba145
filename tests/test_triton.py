"""A Triton server of exports: answers under load, and after it was killed."""

import json
from pathlib import Path

import pytest

from benchmarks.serving import report

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_nothing_is_wrong_and_nothing_lost(tmp_path):
    """`python -m benchmarks.serving` for a minute; here 8 clients for 20 s."""
    pytest.importorskip("pytriton")
    from benchmarks.serving.__main__ import main

    sizes = "--seconds 20 --clients 8 --length 64 --pad 16 --texts 12"
    sizes += " --blocks 1 --width 16 --heads 2"
    output = tmp_path / "triton.json"
    # Raises where a client gave up.
    record = main([*sizes.split(), "--output", str(output)])
    assert json.loads(output.read_text()) == record
    rows = record["models"].values()
    assert len(rows) == 4 and all(row["requests"] > 0 for row in rows)
    errors = [row["largest_error"] for row in rows]
    # What a stream begins with is compared by what follows from it.
    assert errors.count(None) == 1
    assert all(error is None or error < 1e-5 for error in errors)
    assert any(row["sent_again"] for row in rows), "it was killed unnoticed"
    assert any(row["requests_in_a_run"] > 1.0 for row in rows)
    assert record["streams"] >= 8


def test_documented_table_is_that_of_the_record():
    record = ROOT / "results" / "serving" / "triton.json"
    page = (ROOT / "docs" / "serving.md").read_text()
    table = report.table(json.loads(record.read_text()))
    assert report.PLACE.search(page).group(2).strip() == table
