"""Pretrains an encoder on masked tokens, then learns a task of GLUE.

The tasks are SST-2, CoLA and RTE, from the folders that
https://gluebenchmark.com/tasks offers or from glue_small.zip; their dev set is
the test here, as the labels of GLUE's tests are not public, and validation
comes from train. The text to pretrain on is the unlabelled reviews of IMDb
(aclImdb/ or imdb_unlabelled.npz in --data-dir) or --text, a file with a
document a line, such as WikiText-103, which the paper takes.

    python examples/sentence_pairs.py --task SST-2 --data-dir . \\
        --pretrained gmm.npz --attention GMM-PRF
    python examples/sentence_pairs.py --task CoLA --data-dir . \\
        --pretrained gmm.npz --attention GMM-PRF

The first run learns a WordPiece vocabulary and an encoder and writes both to
--pretrained; the second finds them there. --pretraining-steps 0 does without.
"""

import argparse
import csv
import io
import json
import sys
import zipfile
from pathlib import Path

import common
import keras
import language_model
import numpy as np
import tensorflow as tf
import tensorflow_text
from tensorflow_text.tools.wordpiece_vocab import bert_vocab_from_dataset

TASKS = {
    "SST-2": ("sentence",),
    "CoLA": ("sentence",),
    "RTE": ("sentence1", "sentence2"),
}
# CoLA's own files have no header.
COLUMNS = {"CoLA": ["source", "label", "mark", "sentence"]}
LABELS = {"0": 0, "1": 1, "not_entailment": 0, "entailment": 1}
PACKED = "glue_small.zip"
VALIDATION = 0.05
RESERVED = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNKNOWN, CLASS, SEPARATOR, MASK = range(5)
MASKED = 0.15
# The vocabulary is learnt from so many documents, which takes a minute or two.
VOCABULARY_DOCUMENTS = 8000
HELD_OUT_WINDOWS = 500
# Of fine-tuning; pretraining has its own steps and rate.
PRESETS = {
    "cpu": common.Preset(
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
    "paper": common.Preset(
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
PRETRAINING = {
    "cpu": {"steps": 3000, "learning_rate": 2e-3},
    "paper": {"steps": 100_000, "learning_rate": 1e-4, "batch_size": 256},
}
# What a pretrained encoder must share with a run that takes it.
SIZES = ("length", "blocks", "width", "heads", "key_dim", "hidden", "context")
KERNEL = (*common.LAYER_FLAGS, *common.KERNEL_FLAGS)


def main():
    args = common.parse_args(__doc__, PRESETS, extra=add_arguments)
    if args.pretraining_steps is None:
        args.pretraining_steps = PRETRAINING[args.preset_name]["steps"]
    examples = read_task(args.data_dir, args.task)
    vocabulary, weights = pretrained(args)
    data = make_data(examples, tokenizer(vocabulary), args)

    def build_model(args):
        encoder = build_encoder(len(vocabulary), args)
        if weights is not None:
            encoder.set_weights(weights)
        return build_classifier(encoder, args)

    task = args.task if weights is None else f"{args.task}, pretrained"
    common.run(
        args,
        task,
        data,
        build_model,
        more=lambda model: correlate(model, data.test, args),
    )


def correlate(model, test, args):
    """CoLA's own score; the other tasks have none besides accuracy."""
    if args.task != "CoLA":
        return {}
    outputs = model.predict(
        test[0], batch_size=args.preset.batch_size, verbose=0
    )
    correlation = matthews(test[1], outputs.argmax(-1))
    print(f"Matthews correlation {correlation:.4f}")
    return {"matthews": correlation}


def add_arguments(parser):
    add = parser.add_argument
    add("--task", choices=TASKS, default="SST-2")
    add("--text", type=Path, help="a file to pretrain on, a document a line")
    add("--pretrained", type=Path, help="an NPZ file to write, or to take")
    add("--pretraining-steps", type=int, help="0 for none")
    add("--vocabulary", type=Path, help="a text file to write, or to take")
    add("--vocabulary-size", type=int, default=8000)


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
                f"label and {' and '.join(TASKS[task])}. Received: {error!r}. "
                "Unpack it again."
            )
    return splits


def parse(table, task):
    """`(texts, labels)` of a table, with the header of its columns or none."""
    rows = list(
        csv.reader(io.StringIO(table), delimiter="\t", quoting=csv.QUOTE_NONE)
    )
    columns = rows.pop(0) if "label" in rows[0] else COLUMNS.get(task, [])
    label = columns.index("label")
    sentences = [columns.index(name) for name in TASKS[task]]
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
    return common.Data(
        (x[train], labels[train]),
        (x[held_out], labels[held_out]),
        (encode(test_texts, tokenize, args.preset.length), test_labels),
    )


def tokenizer(vocabulary):
    return tensorflow_text.FastBertTokenizer(
        vocabulary, token_out_type=tf.int32, lower_case_nfd_strip_accents=True
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


def build_encoder(vocabulary_size, args):
    preset = args.preset
    tokens = keras.Input((preset.length,), dtype="int32", name="tokens")
    embedding = keras.layers.Embedding(
        vocabulary_size, preset.width, mask_zero=True
    )
    return keras.Model(tokens, common.encode(embedding(tokens), args))


def build_classifier(encoder, args):
    tokens = keras.Input((args.preset.length,), dtype="int32", name="tokens")
    # The mask is found again, since it does not leave the encoder.
    mask = keras.ops.not_equal(tokens, PAD)
    pooling = keras.layers.GlobalAveragePooling1D()
    x = pooling(encoder(tokens), mask=mask)
    x = keras.layers.Dropout(args.preset.dropout)(x)
    return keras.Model(tokens, keras.layers.Dense(2)(x))


def pretrained(args):
    """The vocabulary, and the encoder's weights or `None` for none."""
    if args.pretrained and args.pretrained.exists():
        return load_pretrained(args)
    documents = read_documents(args)
    vocabulary = read_vocabulary(documents, args)
    if not args.pretraining_steps:
        return vocabulary, None
    weights = pretrain(documents, vocabulary, args)
    if args.pretrained:
        args.pretrained.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            args.pretrained,
            vocabulary=np.array(vocabulary),
            config=json.dumps(encoder_config(args)),
            **{f"weight_{i}": weight for i, weight in enumerate(weights)},
        )
        print(f"Encoder: {args.pretrained}")
    return vocabulary, weights


def load_pretrained(args):
    try:
        with np.load(args.pretrained) as arrays:
            config = json.loads(str(arrays["config"]))
            vocabulary = arrays["vocabulary"].tolist()
            names = [name for name in arrays if name.startswith("weight_")]
            weights = [arrays[f"weight_{i}"] for i in range(len(names))]
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(
            "--pretrained must be a file that this script wrote. Received: "
            f"{args.pretrained}: {error!r}. Give another name to write one."
        )
    different = [
        f"{key} was {config.get(key)}, is {value}"
        for key, value in encoder_config(args).items()
        if config.get(key) != value
    ]
    if different:
        sys.exit(
            f"--pretrained {args.pretrained} holds another encoder: "
            f"{'; '.join(different)}. Give the flags of that one to take it, "
            "or another name to pretrain."
        )
    return vocabulary, weights


def encoder_config(args):
    sizes = {name: getattr(args.preset, name) for name in SIZES}
    kernel = {name: getattr(args, name) for name in KERNEL}
    return {"attention": args.attention, **sizes, **kernel}


def pretrain(documents, vocabulary, args):
    """The weights of an encoder that learned to fill in masked tokens."""
    args = pretraining_args(args)
    data = make_windows(documents, vocabulary, args)
    encoders = []

    def build_model(args):
        encoders.append(build_encoder(len(vocabulary), args))
        return build_filler(encoders[-1], len(vocabulary), args)

    name = args.text.stem if args.text else "IMDb"
    common.run(args, f"Masked tokens, {name}", data, build_model)
    return encoders[-1].get_weights()


def pretraining_args(args):
    """The arguments with pretraining's schedule, and files of its own."""
    changes = {
        **PRETRAINING[args.preset_name],
        "steps": args.pretraining_steps,
        "examples": None,
    }
    args = argparse.Namespace(**vars(args))
    args.preset = common.dataclasses.replace(args.preset, **changes)
    if args.output:
        args.output = args.output.with_suffix(".pretraining.json")
    if args.checkpoints:
        args.checkpoints = args.checkpoints / "pretraining"
    # The encoder does not depend on the task that comes after.
    args.task = args.steps = args.learning_rate = args.examples = None
    args.draws = 0
    return args


def read_documents(args):
    """Texts to learn the vocabulary from and to pretrain on, shuffled."""
    if args.text is None:
        documents = language_model.read_reviews(args.data_dir)
    elif args.text.exists():
        lines = args.text.read_bytes().splitlines()
        documents = [line for line in lines if line.strip()]
    else:
        sys.exit(
            "--text must be a text file, a document a line. Received: "
            f"{args.text}, which does not exist. Without it the reviews of "
            "IMDb are read from --data-dir."
        )
    order = np.random.default_rng(0).permutation(len(documents))
    return [documents[i].replace(b"<br />", b" ") for i in order]


def read_vocabulary(documents, args):
    """WordPieces: those of the file, or learnt ones that go into it."""
    path = args.vocabulary
    if path and path.exists():
        return path.read_text("utf-8").splitlines()
    print("Learning a vocabulary …", flush=True)
    dataset = tf.data.Dataset.from_tensor_slices(
        documents[:VOCABULARY_DOCUMENTS]
    )
    vocabulary = bert_vocab_from_dataset.bert_vocab_from_dataset(
        dataset.batch(500),
        args.vocabulary_size,
        RESERVED,
        bert_tokenizer_params={"lower_case": True},
    )
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(vocabulary), "utf-8")
    return vocabulary


def make_windows(documents, vocabulary, args):
    """`Data` of masked windows: x is (tokens, positions), y what was there."""
    length, preset = args.preset.length, args.preset
    needed = preset.steps * preset.batch_size + 2 * HELD_OUT_WINDOWS
    tokenize = tokenizer(vocabulary)
    stream = token_stream(documents, tokenize, needed * length)
    windows = stream[: len(stream) // length * length].reshape(-1, length)
    rng = np.random.default_rng(args.seed)
    # A text that is too short is seen again, under other masks.
    test, validation, train = np.split(
        windows, [HELD_OUT_WINDOWS, 2 * HELD_OUT_WINDOWS]
    )
    if not len(train):
        sys.exit(
            "The text to pretrain on must have more than "
            f"{2 * HELD_OUT_WINDOWS} windows of {length} tokens. Received: "
            f"{len(windows)}. Give a longer one, or --pretraining-steps 0."
        )
    repeats = -(-(needed - 2 * HELD_OUT_WINDOWS) // len(train))
    train = np.tile(train, (repeats, 1))
    parts = train, validation, test
    return common.Data(*(mask_tokens(p, len(vocabulary), rng) for p in parts))


def token_stream(documents, tokenize, count):
    """At least `count` tokens if the documents have them, [SEP] between."""
    parts, total = [], 0
    for start in range(0, len(documents), 500):
        batch = tokenize.tokenize(documents[start : start + 500])
        ends = tf.fill((batch.nrows(), 1), SEPARATOR)
        parts.append(tf.concat([batch, ends], 1).flat_values)
        total += len(parts[-1])
        if total >= count:
            break
    return np.concatenate(parts).astype("uint16")


def mask_tokens(windows, vocabulary_size, rng):
    """BERT's masks: of those chosen 80 % hidden, 10 % replaced, 10 % kept.

    Returns:
        `((tokens, positions), originals)`; positions and originals are
        `(windows, round(MASKED * length))`.
    """
    count, length = windows.shape
    chosen = round(MASKED * length)
    order = rng.random((count, length), "float32").argsort(axis=1)
    positions = np.sort(order[:, :chosen], axis=1).astype("int32")
    originals = np.take_along_axis(windows, positions, axis=1)
    kind = rng.random(originals.shape)
    others = rng.integers(len(RESERVED), vocabulary_size, originals.shape)
    replaced = np.where(kind < 0.8, MASK, np.where(kind < 0.9, others, -1))
    replaced = np.where(replaced < 0, originals, replaced)
    tokens = windows.astype("int32")
    np.put_along_axis(tokens, positions, replaced.astype("int32"), axis=1)
    return (tokens, positions), originals.astype("int32")


def build_filler(encoder, vocabulary_size, args):
    preset = args.preset
    tokens = keras.Input((preset.length,), dtype="int32", name="tokens")
    chosen = round(MASKED * preset.length)
    positions = keras.Input((chosen,), dtype="int32", name="positions")
    x = encoder(tokens)
    pick = keras.ops.one_hot(positions, preset.length, dtype=x.dtype)
    x = keras.ops.matmul(pick, x)
    x = keras.layers.Dense(preset.width, activation="gelu")(x)
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.Dense(vocabulary_size)(x)
    return keras.Model((tokens, positions), x)


if __name__ == "__main__":
    main()
