"""The pure parts of the experiments on lists, pictures, DNA and reviews."""

import argparse
import io
import pickle
import tarfile

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.scripts import script

LIST_OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(np.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
LINEAGE = "Bacteria; P; C; O; F; G"


def list_value(words):
    """The value of a list, by a stack."""
    stack = [[]]
    for word in words:
        if word in LIST_OPERATORS:
            stack.append([word])
        elif word == "]":
            name, *values = stack.pop()
            stack[-1].append(LIST_OPERATORS[name](values))
        else:
            stack[-1].append(int(word))
    ((value,),) = stack
    return value


def words(tokens):
    vocabulary = [None, *map(str, range(10)), *LIST_OPERATORS, "]"]
    return [vocabulary[token] for token in tokens if token]


@pytest.mark.parametrize(
    "operator, values, expected",
    [
        ("[MIN", (4, 2, 9), 2),
        ("[MAX", (4, 2, 9), 9),
        ("[MED", (4, 2, 9), 4),
        ("[MED", (4, 2, 9, 7), 5),
        ("[MED", (3, 0), 1),
        ("[SM", (4, 2, 9), 5),
        ("[SM", (9,) * 10, 0),
        ("[MIN", (9,) * 10, 9),
    ],
)
def test_list_operators_mean_what_they_say(operator, values, expected):
    listops = script("listops")
    # Another node's children stand behind, and must not be looked at.
    value, _ = listops.evaluate(
        np.array([listops.OPERATORS.index(operator), 0]),
        np.array([*values, 0, 8]),
        np.array([0, len(values)]),
        np.array([len(values), 2]),
    )
    assert value == expected


def test_trees_have_the_values_and_lengths_they_should():
    x, y = script("listops").make_trees(
        300, min_length=5, max_length=400, seed=1
    )
    lengths = (x > 0).sum(1)
    assert lengths.min() >= 5 and lengths.max() <= 400
    assert len({row.tobytes() for row in x}) == len(x)
    assert [list_value(words(row)) for row in x] == y.tolist()
    assert not (x[np.arange(400) >= lengths[:, np.newaxis]]).any()


def test_trees_of_a_seed_do_not_depend_on_their_number():
    make_trees = script("listops").make_trees
    sizes = {"min_length": 20, "max_length": 60}
    few, many = (make_trees(n, seed=2, **sizes) for n in (10, 500))
    np.testing.assert_array_equal(few[0], many[0][:10])
    np.testing.assert_array_equal(few[1], many[1][:10])
    other, _ = make_trees(10, seed=3, **sizes)
    assert (other != few[0]).any()


def test_lists_of_impossible_length_raise():
    with pytest.raises(ValueError, match="min_length=9, max_length=3"):
        script("listops").make_trees(1, min_length=9, max_length=3, seed=0)


def test_pathfinder_pictures_reproduce_and_are_balanced():
    make_pictures = script("pathfinder").make_pictures
    x, y = make_pictures(200, seed=0, batch=500)
    again, _ = make_pictures(20, seed=0, batch=500)
    np.testing.assert_array_equal(again, x[:20])
    assert x.shape == (200, 32, 32) and x.dtype == np.uint8
    # Dots are all that is white.
    assert ((x == 255).sum((1, 2)) > 0).all()
    assert 70 <= y.sum() <= 130


def test_pathfinder_contours_keep_clear_of_one_another(monkeypatch):
    pathfinder = script("pathfinder")
    dashes, kept = [], []
    add = pathfinder.Canvas.add

    def recorded(self, dash, chosen):
        dashes.append(dash)
        kept.append(chosen)
        return add(self, dash, chosen)

    monkeypatch.setattr(pathfinder.Canvas, "add", recorded)
    pathfinder._draw(np.random.default_rng(0), 100)
    # The two long contours grow in turns.
    targets = 2 * pathfinder.CONTOUR
    alive = kept[targets - 2] & kept[targets - 1]
    assert alive.any()
    first, second = (
        np.concatenate(dashes[i:targets:2], axis=1)[alive] for i in (0, 1)
    )
    gaps = first[:, :, np.newaxis] - second[:, np.newaxis]
    # Points are looked up in cells of half a pixel.
    cell = 1 / pathfinder.ANTIALIAS
    distance = np.linalg.norm(gaps, axis=-1).min()
    assert distance > pathfinder.CLEARANCE - cell


def fasta(sequence="ACGT", lineage=LINEAGE):
    return f">1\tname\tmore\t{lineage}\n{sequence}\nNA\n"


def test_fasta_with_a_bracket_in_a_name_is_one_record():
    text = ">1\ta <S51>S\t" + LINEAGE + "\nAC\ngt\n" + fasta()
    sequences, lineages = script("dna").read_fasta(text)
    assert sequences == [b"ACGT", b"ACGTNA"]
    assert lineages == [tuple(LINEAGE.split("; "))] * 2


def test_fasta_without_a_lineage_says_what_it_expects():
    with pytest.raises(ValueError, match="6 names, domain to genus"):
        script("dna").read_fasta(fasta(lineage="Bacteria; P"))


def test_no_genus_is_in_two_splits():
    rng = np.random.default_rng(0)
    lineages = [
        ("Bacteria", f"P{genus % 3}", "C", "O", "F", f"G{genus}")
        for genus in rng.integers(0, 50, 400)
    ]
    split = script("dna").split_by_genus
    splits, y, classes = split(lineages, "phylum", seed=0)
    assert classes == 3 and set(y) == {0, 1, 2}
    assert sorted(np.concatenate(splits)) == list(range(400))
    genera = [{lineages[i] for i in part} for part in splits]
    assert not (genera[0] & genera[1] or genera[0] & genera[2])
    assert not genera[1] & genera[2]
    again, _, _ = split(lineages, "phylum", seed=0)
    for part, same in zip(splits, again, strict=True):
        np.testing.assert_array_equal(part, same)


def test_four_mers_by_hand():
    dna = script("dna")
    (row,) = dna.four_mers([b"AAAACNAAAT"])
    assert row[0] == row[1] == row[3] == pytest.approx(1 / 3)
    assert row.sum() == pytest.approx(1.0)
    tokens = dna.encode_bases([b"ACGTN", b"A"], 4)
    np.testing.assert_array_equal(tokens, [[1, 2, 3, 4], [1, 0, 0, 0]])


def test_nearest_neighbour_by_hand():
    features = np.array([[0.0], [1.0], [0.9], [0.2]])
    y = np.array([5, 6, 6, 6])
    score = script("dna").nearest_neighbour(features, y, [0, 1], [2, 3])
    assert score == 0.5


def deb(content, name):
    """A Debian package of one file."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as files:
        info = tarfile.TarInfo(f"./{name}")
        info.size = len(content)
        files.addfile(info, io.BytesIO(content))
    members = {"debian-binary": b"2.0", "data.tar.xz": packed.getvalue()}
    package = b"!<arch>\n"
    for member, body in members.items():
        header = f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(body):<10}`"
        package += header.encode() + b"\n" + body + b"\n" * (len(body) % 2)
    return package


def test_mutations_are_for_training_only():
    dna = script("dna")
    x = np.tile(np.arange(1, 5, dtype="uint8"), (200, 25))
    x[:, 90:] = 0
    np.testing.assert_array_equal(dna.Mutate(0.1, 8, seed=0)(x), x)
    layer = dna.Mutate(0.1, 0, seed=0)
    mutated = tf.function(
        lambda tokens: layer(tokens, training=True), jit_compile=True
    )(x).numpy()
    np.testing.assert_array_equal(mutated[:, 90:], 0)
    assert set(np.unique(mutated[:, :90])) == {1, 2, 3, 4}
    # A quarter of the drawn bases are what they were.
    share = np.mean(mutated[:, :90] != x[:, :90])
    assert 0.06 < share < 0.09
    shifted = dna.Mutate(0.0, 3, seed=0)(x, training=True).numpy()
    starts = shifted[:, 0] - 1
    assert set(starts) == {0, 1, 2, 3}
    for row, start in zip(shifted, starts, strict=True):
        np.testing.assert_array_equal(row, np.pad(x[0], (0, 3))[start:][:100])


def test_dna_is_read_from_the_package(tmp_path):
    dna = script("dna")
    path = tmp_path / "microbiomeutil-data_1_all.deb"
    path.write_bytes(deb(fasta().encode(), f"{dna.FOLDER}/{dna.FASTA}"))
    assert dna.load_fasta(tmp_path) == fasta()


@pytest.mark.parametrize(
    "content", [b"", b"!<arch>\n", b"!<arch>\nbroken", deb(b"", "other")]
)
def test_a_damaged_package_is_named(tmp_path, content):
    path = tmp_path / "microbiomeutil-data_1_all.deb"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=path.name):
        script("dna").load_fasta(tmp_path)


def missing_cifar(folder):
    preset = script("image").CPU
    args = argparse.Namespace(data_dir=folder, preset=preset)
    return script("image").load_cifar10(args)


def missing_reviews(folder):
    return script("reviews").labelled(folder)


@pytest.mark.parametrize(
    "load, words",
    [
        (missing_cifar, "cifar-10-python.tar.gz"),
        (missing_reviews, "aclImdb_v1.tar.gz"),
        (lambda folder: script("dna").load_fasta(folder), "microbiomeutil"),
    ],
)
def test_missing_data_name_the_archive_and_the_flag(tmp_path, load, words):
    with pytest.raises(SystemExit, match=f"(?s){words}.*--data-dir"):
        load(tmp_path)


def test_cifar10_comes_by_keras_where_the_folder_has_none(
    tmp_path, monkeypatch, capsys
):
    images = script("image")
    x = np.zeros((10, 32, 32, 3), "uint8")
    x[..., 0] = 255
    part = x, np.arange(10, dtype="uint8")[:, np.newaxis]
    monkeypatch.setattr(
        keras.datasets.cifar10, "load_data", lambda: (part, part)
    )
    monkeypatch.setattr(images, "split", lambda train, test, *_: (train, test))
    for pictures, labels in missing_cifar(tmp_path):
        assert pictures.shape == (10, 32, 32) and (pictures == 76).all()
        np.testing.assert_array_equal(labels, range(10))
    assert "downloading cifar-10-python.tar.gz" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cifar10_gray.npz", "cifar-10-python.tar.gz"])
def test_damaged_cifar10_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an archive")
    with pytest.raises(SystemExit, match="CIFAR-10 .* cannot be read"):
        missing_cifar(tmp_path)


def test_damaged_reviews_are_named(tmp_path):
    (tmp_path / "imdb_labelled.npz").write_bytes(b"not an archive")
    with pytest.raises(SystemExit, match="imdb_labelled.npz must hold"):
        missing_reviews(tmp_path)


def test_cifar10_is_read_from_the_official_archive(tmp_path):
    images = script("image")
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]])
    content = {
        b"data": np.repeat(colors, 1024, axis=1).astype("uint8"),
        b"labels": [0, 1, 2, 3],
    }
    packed = pickle.dumps(content)
    with tarfile.open(tmp_path / images.CIFAR, "w:gz") as files:
        for name in images.BATCHES:
            info = tarfile.TarInfo(f"{images.CIFAR_FOLDER}/{name}")
            info.size = len(packed)
            files.addfile(info, io.BytesIO(packed))
    (x, y), test = images.read_cifar10(tmp_path)
    assert x.shape == (20, 32, 32) and test[0].shape == (4, 32, 32)
    # Luma: 0.2989, 0.5870, 0.1140.
    levels = test[0].reshape(4, -1)
    assert (np.ptp(levels, axis=1) == 0).all()
    np.testing.assert_allclose(levels[:, 0], [76, 150, 29, 9], atol=1)
    np.testing.assert_array_equal(y, [0, 1, 2, 3] * 5)


def test_validation_pictures_come_from_the_training_pictures():
    x, test_x = np.arange(100), np.arange(100, 130)
    data = script("image").split((x, x), (test_x, test_x), 10, None)
    assert [len(y) for _, y in data] == [90, 10, 30]
    together = np.concatenate([data.train[0], data.validation[0]])
    assert sorted(together) == x.tolist()
    assert sorted(data.test[0]) == test_x.tolist()


def test_tokens_and_counts_of_reviews():
    pytest.importorskip("tensorflow_text")
    text = script("text")
    tokens = text.tokenise([b"ab", b"", b"abcdef"], 5)
    expected = [[98, 99, 1, 0, 0], [1, 0, 0, 0, 0], [98, 99, 100, 101, 102]]
    np.testing.assert_array_equal(tokens, expected)
    shares = text.count_bytes(tokens) ** 2
    assert shares[0, 98] == pytest.approx(1 / 3) and not shares[:, 0].any()
    data = text.split((tokens, np.arange(3)), (tokens, np.arange(3)), 1)
    assert [len(y) for _, y in data] == [1, 0, 3]


def test_linear_floor_solves_what_is_linear():
    x = np.random.default_rng(0).normal(size=(300, 5))
    y = (x[:, 2] > 0).astype(int)
    score = script("measure").linear_floor(
        (x[:200], y[:200]), (x[200:], y[200:])
    )
    assert score > 0.9
