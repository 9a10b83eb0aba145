"""Associative recall: sequences that a dictionary solves, and nothing less."""

import subprocess
import sys
import time

import numpy as np
import pytest

from tests.helpers.scripts import ROOT, SIZES, experiment, script

SMALL = {"pairs": 5, "length": 23, "keys": 17, "values": 7}


def answers(tokens, pairs, keys):
    """The value of each later token that stood in a pair, by a dictionary."""
    known = {}
    for key, value in tokens[: 2 * pairs].reshape(-1, 2).tolist():
        assert key not in known and key < keys <= value
        known[key] = value - keys
    return [known.get(token) for token in tokens[2 * pairs :].tolist()]


def test_a_dictionary_answers_every_query():
    data = script("mqar_data")
    x, y = data.draw(300, **SMALL, seed=0)
    assert x.shape == y.shape == (300, 23) and x.dtype == y.dtype == "int32"
    for tokens, labels in zip(x, y, strict=True):
        assert (labels[:10] == data.NO_QUERY).all()
        expected = answers(tokens, 5, 17)
        given = [
            None if y == data.NO_QUERY else y for y in labels[10:].tolist()
        ]
        # Every key once more, and all that is no query has no value.
        assert given == expected and 23 - 10 - given.count(None) == 5


def test_no_answer_is_told_by_its_query_or_its_place():
    """The best answer by key, by place and by the token before is a guess."""
    draw = script("mqar_data").draw
    (x, y), (test_x, test_y) = (
        draw(4000, **SMALL, seed=seed) for seed in ((0, 0), (0, 2))
    )
    # Not at once after the pairs, of which the last value is one of five.
    y[:, 10] = test_y[:, 10] = -1
    for guide, size in (
        (lambda x: x, 24),
        (lambda x: np.arange(23) + 0 * x, 23),
        (lambda x: np.roll(x, 1, 1), 24),
    ):
        counts = np.zeros((size, 7), int)
        asked = y >= 0
        np.add.at(counts, (guide(x)[asked], y[asked]), 1)
        asked = test_y >= 0
        right = counts.argmax(1)[guide(test_x)[asked]] == test_y[asked]
        # 15,000 queries: a standard error is 0.003.
        assert abs(right.mean() - 1 / 7) < 0.03


def test_queries_come_early_by_a_power_law():
    """Of two places per query the first one's share is that of Gumbel draws."""
    data = script("mqar_data")
    _, y = data.draw(20_000, pairs=1, length=4, keys=3, values=2, seed=1)
    shares = (y[:, 2:] >= 0).mean(0)
    weights = np.arange(1.0, 3.0) ** (data.POWER - 1)
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.015)


def test_splits_differ_and_the_test_set_is_of_no_seed():
    make_data = script("mqar_data").make_data
    first, again, other = (
        make_data(**SMALL, examples=examples, held_out=8, seed=seed)
        for examples, seed in ((20, 0), (30, 0), (20, 1))
    )
    for part, more in zip(first, again, strict=True):
        for array, longer in zip(part, more, strict=True):
            np.testing.assert_array_equal(array, longer[: len(array)])
    assert (first.train[0] != other.train[0]).any()
    assert (first.validation[0] != first.train[0][:8]).any()
    np.testing.assert_array_equal(first.test[0], other.test[0])


@pytest.mark.parametrize(
    "sizes", [{"length": 14}, {"keys": 5}, {"pairs": 0}], ids=str
)
def test_sequences_that_cannot_be_are_refused(sizes):
    with pytest.raises(ValueError, match="Let length be at least"):
        script("mqar_data").draw(1, **{**SMALL, **sizes}, seed=0)


def test_the_data_need_numpy_alone():
    """A machine without TensorFlow makes them too; in seconds, as it must."""
    code = "import sys; from experiments import mqar_data; print(len({*sys."
    code += "modules} & {'tensorflow', 'keras', 'keras_kt'}))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout == "0\n", found.stderr
    start = time.perf_counter()
    script("mqar_data").draw(
        12_000, pairs=64, length=256, keys=1024, values=64, seed=0
    )
    assert time.perf_counter() - start < 20.0


def test_loss_and_score_are_of_queries_alone():
    task = script("mqar")
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(2, 5, 3)).astype("float32")
    y = np.array([[-1, 2, -1, 0, -1], [1, -1, -1, -1, -1]], "int32")
    logs = outputs - np.log(np.exp(outputs).sum(-1, keepdims=True))
    expected = [-(logs[0, 1, 2] + logs[0, 3, 0]) / 2, -logs[1, 0, 1]]
    np.testing.assert_allclose(task.loss(y, outputs), expected, rtol=1e-5)
    right = outputs.argmax(-1) == y
    expected = [(right[0, 1] + right[0, 3] + 0.0) / 2, right[1, 0] + 0.0]
    np.testing.assert_allclose(task.accuracy(y, outputs), expected)
    louder = outputs + 9.0 * rng.normal(size=outputs.shape) * (y < 0)[..., None]
    np.testing.assert_allclose(task.loss(y, louder), task.loss(y, outputs))
    np.testing.assert_allclose(
        task.accuracy(y, louder), task.accuracy(y, outputs)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--attention softmax",
        "--attention normal:positive --num-features 8 --context 0 --blocks 2",
    ],
)
def test_recall_runs_and_is_recorded(flags, tmp_path):
    words = ["--pairs", 4, "--results", tmp_path, "--draws", 1]
    experiment(
        *("mqar", "--examples", 8), *words, *SIZES.split(), *flags.split()
    )
    (row,) = script("records").read(tmp_path)
    assert (row["pairs"], row["length"]) == ("4", "16")
    assert "--pairs 4" in row["sizes"] and 0.0 <= float(row["score"]) <= 1.0
    assert "4 pairs among 16 tokens" in row["title"]
