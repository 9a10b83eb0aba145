"""An encoder that is pretrained on masked tokens, made once and taken again."""

import argparse
import dataclasses
import json
import sys
import zipfile

import keras
import numpy as np

from experiments import body, recipe, wordpieces
from experiments.attentions import FLAGS
from experiments.data import Data
from experiments.wordpieces import MASK, RESERVED

MASKED = 0.15
HELD_OUT_WINDOWS = 500
PRETRAINING = {
    "cpu": {"steps": 3000, "learning_rate": 2e-3},
    "paper": {"steps": 100_000, "learning_rate": 1e-4, "batch_size": 256},
}
# What a pretrained encoder must share with a run that takes it.
SIZES = ("length", "blocks", "width", "heads", "key_dim", "hidden", "context")


def steps(args):
    """Of pretraining, with the preset that was asked for."""
    return PRETRAINING[args.preset_name]["steps"]


def pretrained(args):
    """The vocabulary, and the encoder's weights or `None` for none."""
    if args.pretrained and args.pretrained.exists():
        return load_pretrained(args)
    documents = wordpieces.read_documents(args)
    vocabulary = wordpieces.read_vocabulary(documents, args)
    if not args.pretraining_steps:
        return vocabulary, None
    weights = pretrain(documents, vocabulary, args)
    if args.pretrained:
        args.pretrained.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"weight_{i}": weight for i, weight in enumerate(weights)}
        # To a file, since NumPy would add its suffix to a name without it.
        with args.pretrained.open("wb") as file:
            np.savez(
                file,
                vocabulary=np.array(vocabulary),
                config=json.dumps(encoder_config(args)),
                **arrays,
            )
        print(f"Encoder: {args.pretrained}")
    return vocabulary, weights


def build_encoder(vocabulary_size, args):
    preset = args.preset
    tokens = keras.Input((preset.length,), dtype="int32", name="tokens")
    embedding = keras.layers.Embedding(
        vocabulary_size, preset.width, mask_zero=True
    )
    return keras.Model(tokens, body.encode(embedding(tokens), args))


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
    kernel = {name: getattr(args, name) for name in FLAGS}
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
    recipe.run(args, f"Masked tokens, {name}", data, build_model)
    return encoders[-1].get_weights()


def pretraining_args(args):
    """The arguments with pretraining's schedule, and files of its own."""
    changes = {
        **PRETRAINING[args.preset_name],
        "steps": args.pretraining_steps,
        "examples": None,
    }
    args = argparse.Namespace(**vars(args))
    args.preset = dataclasses.replace(args.preset, **changes)
    if args.checkpoints:
        args.checkpoints = args.checkpoints / "pretraining"
    args.task += ".pretraining"
    # The encoder does not depend on the schedule that comes after.
    args.steps = args.learning_rate = args.examples = None
    args.draws = 0
    return args


def make_windows(documents, vocabulary, args):
    """`Data` of masked windows: x is (tokens, positions), y what was there."""
    length, preset = args.preset.length, args.preset
    needed = preset.steps * preset.batch_size + 2 * HELD_OUT_WINDOWS
    tokenize = wordpieces.tokenizer(vocabulary)
    stream = wordpieces.token_stream(documents, tokenize, needed * length)
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
    return Data(*(mask_tokens(p, len(vocabulary), rng) for p in parts))


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
