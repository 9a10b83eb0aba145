"""Benchmarks run, on sizes that say nothing."""

import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from benchmarks import __main__ as benchmarks
from benchmarks import approximation, gallery, long_stream, ratios
from benchmarks.attention import report, timing
from tests.helpers import toys
from tests.helpers.contract import exhaustive
from tests.helpers.scripts import command

ROOT = Path(__file__).parent.parent
TINY = "--length 11 --heads 2 --head-dim 4 --blocks 1".split()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--counts-only"], exhaustive([])])
def test_tracing_counts_and_times(flags, tmp_path):
    path = tmp_path / "tracing"
    command = [sys.executable, str(ROOT / "benchmarks" / "tracing.py"), *TINY]
    command += ["--rows", "causal", "MultiHeadAttention", *flags]
    done = subprocess.run(
        [*command, "--output", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    text = path.with_suffix(".json").read_text()
    assert str(tmp_path) not in text
    rows = json.loads(text)["rows"]
    ours, theirs = (row["operations"] for row in rows)
    assert ours > theirs > 50
    for kind in "compile", "cached":
        assert all((kind in row) == (not flags) for row in rows)
    table = path.with_suffix(".md").read_text()
    assert f"| causal | 1 | {ours:,} |" in table
    assert str(tmp_path) not in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "name",
    ["attention", "memory", "memory_narrow/memory", "memory_wide/memory"],
)
def test_tables_of_attention_come_from_the_record(name, tmp_path):
    path = ROOT / "results" / f"{name}.json"
    record = json.loads(path.read_text())
    assert report.dumps(record) == path.read_text()
    assert report.tables(record) == path.with_suffix(".md").read_text()
    report.draw(record, tmp_path / path.name)
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 0


def test_slow_columns_stop_early_and_others_do_not():
    calls = []

    def column(name):
        def call():
            calls.append(name)
            return tf.constant(0.0)

        return call

    first, seconds = timing.measure({n: column(n) for n in "ab"}, 4, budget=-1)
    # Once to compile, once to warm up, then in turn.
    assert calls == ["a", "a", "b", "b", "a", "b", "a", "b"]
    assert {name: len(times) for name, times in seconds.items()} == {
        "a": 2,
        "b": 2,
    }
    assert set(first) == {"a", "b"}


def test_what_memory_does_not_suffice_for_is_left_out(capsys):
    def too_large():
        raise tf.errors.ResourceExhaustedError(None, None, "8 GiB")

    runs = {"a": too_large, "b": lambda: tf.constant(0.0)}
    first, seconds = timing.measure(runs, 2)
    assert set(first) == set(seconds) == {"b"} and len(seconds["b"]) == 2
    assert "a: memory does not suffice" in capsys.readouterr().out


def test_spread_is_the_median_of_the_runs():
    # Ranges of half, all and none of the median.
    seconds = {"a": [3.0, 4.0, 5.0, 2.0, 6.0], "b": [1.0, 1.0, 2.0], "c": [7.0]}
    assert timing.spread_of({"a": seconds["a"]}) == pytest.approx(0.5)
    assert timing.spread_of({"b": seconds["b"]}) == pytest.approx(0.5)
    assert timing.spread_of(seconds) == pytest.approx(0.5)
    assert timing.spread_of({"c": [7.0], "d": [7.0]}) == 0.0


def test_times_that_spread_are_taken_again_and_then_refused(monkeypatch):
    answers = iter([({"a": 9.0}, {"a": [1.0, 2.0]}), ({}, {"a": [1.0, 1.0]})])
    monkeypatch.setattr(timing, "measure", lambda *_: next(answers))
    first, seconds = timing.measure_steadily({"a": None}, 2, spread=0.15)
    # The first call of all compiled.
    assert first == {"a": 9.0} and seconds == {"a": [1.0, 1.0]}
    monkeypatch.setattr(timing, "measure", lambda *_: ({}, {"a": [1.0, 2.0]}))
    with pytest.raises(SystemExit, match="more than --spread 15%"):
        timing.measure_steadily({"a": None}, 2, spread=0.15)


def test_what_is_written_does_not_spread():
    record = json.loads((ROOT / "results" / "attention.json").read_text())
    tables = {}
    for row in record["timings"]:
        low, high = row["quartiles"]
        table = tables.setdefault((row["level"], row["length"]), [])
        table.append((high - low) / row["median"])
    assert len(tables) == 14
    assert max(map(statistics.median, tables.values())) <= 0.15


@pytest.mark.parametrize("name", benchmarks.COMMANDS)
def test_commands_of_the_page_stand_on_it_and_are_taken(name, monkeypatch):
    page = (ROOT / benchmarks.PAGE).read_text().replace("\\\n", " ")
    assert f"python {benchmarks.COMMANDS[name]}" in " ".join(page.split())
    words = benchmarks.words_of(name, "a.whl")
    name = words[1] if words[0] == "-m" else words[0]
    name = name.removesuffix(".py").replace("/", ".")
    if name == "benchmarks.attention":
        name += ".__main__"
    module = importlib.import_module(name)
    if words[0] == "-m":
        del words[0]
    monkeypatch.setattr("sys.argv", words)
    module.parse_args()


def test_the_page_says_what_it_would_run():
    done = command("-m", "benchmarks", "--dry-run", "--only", "attention")
    assert done.returncode == 0, done.stderr
    assert "--decode --lengths 256" in done.stdout
    assert "WHEEL" not in done.stdout
    done = command("-m", "benchmarks", "--only", "nothing")
    assert "invalid choice: 'nothing'" in done.stderr


def test_tables_of_ratios_come_from_the_record():
    path = ROOT / "results" / "ratios.json"
    table = ratios.tables(json.loads(path.read_text()))
    assert table == path.with_suffix(".md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("spread, code", [exhaustive("9", 0), ("-1", 1)])
def test_ratios_are_written_unless_times_spread(spread, code, tmp_path):
    done = command(
        *("-m", "benchmarks.ratios", "--heads", "2x4", "--lengths", 16),
        *("--route-lengths", 16, "--tokens", 32, "--core-length", 32),
        *("--batches", 1, "--steps", 4, "--repeats", 3),
        *(f"--spread={spread}", "--output", tmp_path / "x"),
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "x.md").exists() == (not code)
    assert not code or "does other work" in done.stderr


@pytest.mark.slow
def test_attention_checks_itself_and_decodes(tmp_path):
    done = command(
        *("-m", "benchmarks.attention", "--no-timings", "--decode"),
        *"--positions 3 20 --heads 2 --head-dim 4 --features 8".split(),
        *("--repeats", 1, "--output", tmp_path / "attention"),
    )
    assert done.returncode == 0, done.stderr
    assert "linear against quadratic" in done.stdout
    text = (tmp_path / "attention.json").read_text()
    assert str(tmp_path) not in text
    record = json.loads(text)
    sizes = {(row["column"], row["position"]): row for row in record["decode"]}
    ours = [sizes["ours", position]["bytes"] for position in (3, 20)]
    theirs = [sizes["cache", position]["bytes"] for position in (3, 20)]
    assert ours[0] == ours[1] and 3 * theirs[1] == 20 * theirs[0]
    table = (tmp_path / "attention.md").read_text()
    assert f"| ours | 20 | {1e6 * sizes['ours', 20]['median']:.0f} " in table


@pytest.mark.slow
def test_generation_is_timed_whole_and_by_token(tmp_path):
    pytest.importorskip("keras_hub")
    done = command(
        *"benchmarks/hub_decode.py --layers 1 --heads 2 --head-dim 8".split(),
        *"--positions 10 40 --tokens 5 --repeats 1 --prompts 8".split(),
        *("--new", 4, "--whole-repeats", 1, "--output", tmp_path / "x.json"),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "x.json").read_text())
    whole = {row["model"]: row["seconds"] for row in record["whole"]}
    assert set(whole) == {"original", "converted"} and min(whole.values()) > 0
    sizes = {
        (row["model"], row["position"]): row["cache_bytes"]
        for row in record["rows"]
    }
    assert sizes["original", 40] > sizes["original", 10]
    assert sizes["converted", 40] == sizes["converted", 10]


@pytest.mark.slow
def test_attention_measures_peaks():
    done = command(
        *("-m", "benchmarks.attention", "--peak", "softmax", 8, 512, "no-XLA"),
        *"--heads 2 --head-dim 4 --features 8".split(),
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    size = 4 * 4096 * 2 * 4
    # Inputs count, whatever the allocator had kept of the call before.
    assert row["peak"] > 3 * size and row["tensors"] == 8 * size


@pytest.mark.slow
def test_window_compares_time_and_memory(tmp_path):
    path = tmp_path / "window.json"
    done = command(
        *("benchmarks/window.py", "--lengths", 64, "--window", 5),
        *"--heads 2 --head-dim 4 --features 8 --repeats 1".split(),
        *("--output", path),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["tokens"] for row in rows] == 6 * [64]
    assert all(row["ratio"] > 0 for row in rows)


def test_imports_are_measured_in_processes_of_their_own(tmp_path):
    path = tmp_path / "imports.json"
    done = command("benchmarks/imports.py", "--repeats", 1, "--output", path)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    (run,) = record["runs"]
    assert run == record["median"]
    # The package is the small part, and measured: it is not zero.
    assert 0 < run["added CPU s"] < run["keras CPU s"]


def test_errors_of_approximations_are_one_a_row(tmp_path):
    rows = [
        {"tau": 0.5, "num_features": 64, "median": 0.1, "errors": [0.1, 0.2]}
    ]
    approximation.write(rows, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == (
        "tau,num_features,median,errors\n0.5,64,0.1,0.1 0.2\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, exhaustive({"near_field": 3, "decay": "gated"})]
)
def test_a_long_stream_equals_its_restart_and_the_whole_call(options):
    """The script raises where a half differs, or where the state grows."""
    record = long_stream.stream(20_000, 1000, options)
    assert record["restart_equals"] and record["last_by_first"] > 0
    keras.utils.set_random_seed(0)
    layer = keras_kt.KernelizedAttention(4, 8, seed=0, **options)
    run = long_stream.compiled(layer)
    parts = [long_stream.inputs(i, 1000) for i in range(20)]
    tokens = tf.concat(parts, 1)
    whole = layer(tokens, tokens, use_causal_mask=True)[0]
    state = layer.initial_state(1)
    assert record["state_bytes"] == long_stream.bytes_of(state)
    for call in range(20):
        state, outputs = run(state, parts[call])
        part = whole[1000 * call : 1000 * (call + 1)]
        np.testing.assert_allclose(outputs, part, atol=1e-4)


@pytest.mark.slow
def test_the_script_of_a_long_stream_writes_its_record(tmp_path):
    script = ROOT / "benchmarks" / "long_stream.py"
    path = tmp_path / "record.json"
    flags = ["--tokens", "40", "--per-call", "10", "--output", str(path)]
    done = subprocess.run(
        [sys.executable, str(script), *flags], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text())["tokens"] == 40


def test_patches_of_a_digit_are_squares_of_it():
    digit = np.arange(28 * 28).reshape(1, 28, 28)
    patches = gallery.patches(digit)
    assert patches.shape == (1, 49, 16)
    np.testing.assert_array_equal(
        patches[0, 8].reshape(4, 4), digit[0, 4:8, 4:8]
    )


@pytest.mark.slow
def test_the_gallery_is_drawn(tmp_path):
    toys.write_digits(tmp_path, 60)
    done = command(
        *("-m", "benchmarks.gallery", "--epochs", 1),
        *("--data-dir", tmp_path, "--output", tmp_path / "pictures"),
    )
    assert done.returncode == 0, done.stderr
    drawn = {path.stem for path in (tmp_path / "pictures").glob("*.png")}
    # One more is a screenshot.
    shown = {path.stem for path in (ROOT / "results/gallery").glob("*.png")}
    assert drawn == shown - {"tensorboard"}
