"""Trains a model to say whether one paper cites another, from their bytes.

Two towers with the same weights read a document each; a small network compares
what they make of it. The data are the AAN files of the Long Range Arena
(new_aan_pairs.{train,eval,test}.tsv in lra_release.gz, see
https://github.com/google-research/long-range-arena), or aan_mini.zip, 1,723
papers of the same anthology, whose scores are not to be compared with LRA's:

    python -m experiments retrieval --data-dir lra_release/tsv_data
    python -m experiments retrieval --data-dir . --attention softmax
"""

import json
import sys
import zipfile

import keras
import numpy as np

from experiments import body, recipe
from experiments.data import Data
from experiments.flags import Preset, parse_args

LRA_FILES = [f"new_aan_pairs.{s}.tsv" for s in ("train", "eval", "test")]
PACKED = "aan_mini.zip"
# Of the cited papers of the training set, in aan_mini.
VALIDATION = 0.1
PRESETS = {
    "cpu": Preset(
        length=1024,
        blocks=2,
        width=64,
        heads=4,
        key_dim=16,
        hidden=128,
        batch_size=16,
        steps=1200,
        learning_rate=2e-3,
        stride=4,
    ),
    "paper": Preset(
        length=4000,
        blocks=4,
        width=128,
        heads=4,
        key_dim=32,
        hidden=512,
        batch_size=32,
        steps=9194,
        learning_rate=5.6e-4,
        context=0,
        weight_decay=0.1,
    ),
}


def main(argv, task):
    args = parse_args(__doc__, PRESETS, argv, task)
    name, data = load(args)
    recipe.run(args, f"{name}, 2 × {args.preset.length} bytes", data, build)


def load(args):
    """The name of the data, and `Data` of pairs of documents."""
    folder, length = args.data_dir, args.preset.length
    if all((folder / name).exists() for name in LRA_FILES):
        splits = [read_tsv(folder / name, length) for name in LRA_FILES]
        name = "Retrieval"
    elif (folder / PACKED).exists():
        splits = read_packed(folder / PACKED, length, args.seed)
        name = "AAN-mini"
    else:
        sys.exit(
            f"--data-dir must hold {', '.join(LRA_FILES)} or {PACKED}. "
            f"Received: {folder.resolve()}, which does not. Unpack "
            "lra_release.gz (https://github.com/google-research/"
            "long-range-arena) and give its folder tsv_data."
        )
    train, validation, test = (shuffle(split, args.seed) for split in splits)
    (first, second), labels = train
    kept = slice(args.preset.examples)
    train = (first[kept], second[kept]), labels[kept]
    return name, Data(train, validation, test)


def shuffle(split, seed):
    """Pairs in random order; files are sorted by label."""
    (first, second), labels = split
    order = np.random.default_rng(seed).permutation(len(labels))
    return (first[order], second[order]), labels[order]


def read_tsv(path, length):
    """`((first, second), labels)` of a file of LRA: label, ids, texts."""
    firsts, seconds, labels = [], [], []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip(b"\n").split(b"\t")
            if len(fields) != 5:
                sys.exit(
                    f"{path} must have five columns, label, two ids and two "
                    f"texts, without a header. Received: {len(fields)} in line "
                    f"{number}. Unpack the archive again."
                )
            labels.append(float(fields[0]))
            firsts.append(fields[3][:length])
            seconds.append(fields[4][:length])
    return (pad(firsts, length), pad(seconds, length)), np.int32(labels)


def read_packed(path, length, seed):
    """Training, validation and test; their pairs cite different papers."""
    try:
        with zipfile.ZipFile(path) as archive:
            lines = archive.read("aan_mini_docs.jsonl").splitlines()
            pairs = archive.read("aan_mini_pairs.tsv").decode().splitlines()
    except (KeyError, zipfile.BadZipFile) as error:
        sys.exit(
            f"{path} must be a ZIP archive of aan_mini_docs.jsonl and "
            f"aan_mini_pairs.tsv. Received: {error}. Copy it again."
        )
    texts = {}
    for line in lines:
        document = json.loads(line)
        texts[document["id"]] = document["text"].encode()[:length]
    pairs = [line.split("\t") for line in pairs]
    pairs = [pair for pair in pairs if pair[0] in ("train", "val")]
    splits = split_pairs(pairs, seed)
    return [to_arrays(split, texts, length) for split in splits]


def split_pairs(pairs, seed):
    """Training, validation and test pairs: what is held out is a cited paper.

    Args:
        pairs: lists of split, label, cited id and citing id.
        seed: chooses the papers of the validation set.
    """
    training = [pair for pair in pairs if pair[0] == "train"]
    cited = sorted({pair[2] for pair in training})
    chosen = np.random.default_rng(seed).permutation(len(cited))
    held_out = {cited[i] for i in chosen[: round(VALIDATION * len(cited))]}
    return (
        [pair for pair in training if pair[2] not in held_out],
        [pair for pair in training if pair[2] in held_out],
        [pair for pair in pairs if pair[0] == "val"],
    )


def to_arrays(pairs, texts, length):
    cited = pad([texts[pair[2]] for pair in pairs], length)
    citing = pad([texts[pair[3]] for pair in pairs], length)
    return (cited, citing), np.array([pair[1] for pair in pairs], "int32")


def pad(texts, length):
    """`(documents, length)` bytes; 0, which no text has, is padding."""
    padded = np.zeros((len(texts), length), "uint8")
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = np.frombuffer(text, "uint8")
    return padded


def build(args):
    preset = args.preset
    tower = build_tower(args)
    documents = [
        keras.Input((preset.length,), dtype="uint8", name=name)
        for name in ("first", "second")
    ]
    u, v = (tower(document) for document in documents)
    x = keras.ops.concatenate([u, v, u * v, keras.ops.abs(u - v)], axis=-1)
    x = keras.layers.Dense(preset.hidden, activation="relu")(x)
    x = keras.layers.Dropout(preset.dropout)(x)
    x = keras.layers.Dense(preset.hidden // 2, activation="relu")(x)
    return keras.Model(documents, keras.layers.Dense(2)(x))


def build_tower(args):
    preset = args.preset
    text = keras.Input((preset.length,), dtype="uint8")
    x = keras.ops.cast(text, "int32")
    x = keras.layers.Embedding(256, preset.width, mask_zero=True)(x)
    if preset.stride > 1:
        x = body.Stem(preset.width, preset.stride)(x)
    return keras.Model(text, body.pool(body.encode(x, args)), name="tower")
