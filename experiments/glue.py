"""Pretrains an encoder on masked tokens, then learns a task of GLUE.

The tasks are SST-2, CoLA and RTE, from the folders that
https://gluebenchmark.com/tasks offers or from glue_small.zip; their dev set is
the test here, as the labels of GLUE's tests are not public, and validation
comes from train. The text to pretrain on is the unlabelled reviews of IMDb
(aclImdb/ or imdb_unlabelled.npz in --data-dir) or --text, a file with a
document a line, such as WikiText-103, which the paper takes.

    python -m experiments sst2 --data-dir . --attention GMM-PRF \\
        --pretrained gmm.npz
    python -m experiments cola --data-dir . --attention GMM-PRF \\
        --pretrained gmm.npz

The first run learns a WordPiece vocabulary and an encoder and writes both to
--pretrained; the second finds them there. --pretraining-steps 0 does without.
"""

import csv
import io
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import tensorflow_text

from experiments import pretraining, recipe, wordpieces
from experiments.data import Data
from experiments.flags import Preset, parse_args
from experiments.wordpieces import CLASS, PAD, SEPARATOR

NAMES = {"sst2": "SST-2", "cola": "CoLA", "rte": "RTE"}
SENTENCES = {
    "SST-2": ("sentence",),
    "CoLA": ("sentence",),
    "RTE": ("sentence1", "sentence2"),
}
# CoLA's own files have no header.
COLUMNS = {"CoLA": ["source", "label", "mark", "sentence"]}
LABELS = {"0": 0, "1": 1, "not_entailment": 0, "entailment": 1}
PACKED = "glue_small.zip"
VALIDATION = 0.05
# Of fine-tuning; pretraining has its own steps and rate.
PRESETS = {
    "cpu": Preset(
        length=128,
        blocks=2,
        width=128,
        heads=4,
        key_dim=32,
        hidden=256,
        batch_size=32,
        steps=1500,
        learning_rate=5e-4,
    ),
    "paper": Preset(
        length=128,
        blocks=12,
        width=768,
        heads=12,
        key_dim=64,
        hidden=3072,
        batch_size=32,
        steps=6000,
        learning_rate=3e-5,
    ),
}


def main(argv, task):
    args = parse_args(__doc__, PRESETS, argv, task, add_arguments)
    if args.pretraining_steps is None:
        args.pretraining_steps = pretraining.steps(args)
    name = NAMES[task]
    examples = read_task(args.data_dir, name)
    vocabulary, weights = pretraining.pretrained(args)
    data = make_data(examples, wordpieces.tokenizer(vocabulary), args)

    def build_model(args):
        encoder = pretraining.build_encoder(len(vocabulary), args)
        if weights is not None:
            encoder.set_weights(weights)
        return build_classifier(encoder, args)

    def correlation(model):
        return correlate(model, data.test, args), {}

    recipe.run(
        args,
        name if weights is None else f"{name}, pretrained",
        data,
        build_model,
        more=correlation if args.task == "cola" else None,
    )


def correlate(model, test, args):
    """CoLA's own score."""
    outputs = model.predict(
        test[0], batch_size=args.preset.batch_size, verbose=0
    )
    correlation = matthews(test[1], outputs.argmax(-1))
    print(f"Matthews correlation {correlation:.4f}")
    return {"matthews": correlation}


def add_arguments(parser):
    add = parser.add_argument
    add("--text", type=Path, help="a file to pretrain on, a document a line")
    add("--pretrained", type=Path, help="an NPZ file to write, or to take")
    add("--pretraining-steps", type=int, help="0 for none")
    add("--vocabulary", type=Path, help="a text file to write, or to take")
    add("--vocabulary-size", type=int, default=8000, help="words")


def read_task(folder, task):
    """`(texts, labels)` of train and of dev; a text is one or two strings."""
    splits = []
    for split in ("train", "dev"):
        name = f"{task}/{split}.tsv"
        try:
            if (folder / name).exists():
                table = (folder / name).read_text("utf-8")
            else:
                with zipfile.ZipFile(folder / PACKED) as archive:
                    table = archive.read(name).decode()
            splits.append(parse(table, task))
        except FileNotFoundError:
            sys.exit(
                f"--data-dir must hold {name} or {PACKED}. Received: "
                f"{folder.resolve()}, which does not. Get {task} from "
                "https://gluebenchmark.com/tasks and unpack it there."
            )
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            sys.exit(
                f"{name} in {folder.resolve()} must be a table of GLUE with a "
                f"label and {' and '.join(SENTENCES[task])}. Received: "
                f"{error!r}. Unpack it again."
            )
    return splits


def parse(table, task):
    """`(texts, labels)` of a table, with the header of its columns or none."""
    rows = list(
        csv.reader(io.StringIO(table), delimiter="\t", quoting=csv.QUOTE_NONE)
    )
    columns = rows.pop(0) if "label" in rows[0] else COLUMNS.get(task, [])
    label = columns.index("label")
    sentences = [columns.index(name) for name in SENTENCES[task]]
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"rows of other than {len(columns)} columns")
    texts = [[row[i] for i in sentences] for row in rows]
    return texts, np.array([LABELS[row[label]] for row in rows], "int32")


def make_data(examples, tokenize, args):
    """The task's `Data`; validation is a share of train."""
    (texts, labels), (test_texts, test_labels) = examples
    x = encode(texts, tokenize, args.preset.length)
    order = np.random.default_rng(args.seed).permutation(len(x))
    held_out, train = np.split(order, [round(VALIDATION * len(x))])
    train = train[: args.preset.examples]
    return Data(
        (x[train], labels[train]),
        (x[held_out], labels[held_out]),
        (encode(test_texts, tokenize, args.preset.length), test_labels),
    )


def encode(texts, tokenize, length):
    """`(examples, length)`: [CLS] a [SEP], or [CLS] a [SEP] b [SEP]."""
    segments = [
        tokenize.tokenize(list(column)) for column in zip(*texts, strict=True)
    ]
    # The longer of two sentences is cut first.
    trimmer = tensorflow_text.RoundRobinTrimmer(length - len(segments) - 1)
    tokens, _ = tensorflow_text.combine_segments(
        trimmer.trim(segments), CLASS, SEPARATOR
    )
    return tokens.to_tensor(PAD, shape=(None, length)).numpy()


def matthews(labels, predictions):
    """The correlation of two binary arrays; 0 if one of them is constant."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if len(set(labels)) < 2 or len(set(predictions)) < 2:
        return 0.0
    return float(np.corrcoef(labels, predictions)[0, 1])


def build_classifier(encoder, args):
    tokens = keras.Input((args.preset.length,), dtype="int32", name="tokens")
    # The mask is found again, since it does not leave the encoder.
    mask = keras.ops.not_equal(tokens, PAD)
    pooling = keras.layers.GlobalAveragePooling1D()
    x = pooling(encoder(tokens), mask=mask)
    x = keras.layers.Dropout(args.preset.dropout)(x)
    return keras.Model(tokens, keras.layers.Dense(2)(x))
