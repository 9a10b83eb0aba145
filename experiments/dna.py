"""Names the phylum of bacteria of unseen genera from their 16S rRNA.

Sequences of about 1,450 bases, one token each. Whole genera are held out, so
that no close relative of a test sequence was seen. The data are the gold set of
microbiomeutil (Broad Institute, BSD licence), 5,181 sequences, from Debian:

    apt-get download microbiomeutil-data
    python -m experiments dna --data-dir .
    python -m experiments dna --data-dir . --attention softmax
    python -m experiments dna --data-dir . --floor   # 4-mers, nearest neighbour
    python -m experiments dna --data-dir . --steps 4000 --mutations 0.05 \\
        --shift 32
"""

import io
import lzma
import sys
import tarfile

import keras
import numpy as np
import tensorflow as tf

from experiments import body, recipe
from experiments.data import Data
from experiments.flags import Preset, parse_args

PRESETS = {
    "cpu": Preset(
        length=1500,
        stride=4,
        blocks=2,
        width=64,
        heads=4,
        key_dim=16,
        hidden=128,
        batch_size=16,
        steps=1000,
        learning_rate=4e-3,
        dropout=0.0,
    ),
    # Nobody has published one; these are the sizes of the paper's Text task.
    "paper": Preset(
        length=1600,
        blocks=4,
        width=256,
        heads=4,
        key_dim=64,
        hidden=1024,
        batch_size=32,
        steps=5000,
        learning_rate=5.6e-4,
        context=0,
        weight_decay=0.1,
    ),
}
FASTA = "rRNA16S.gold.fasta"
FOLDER = "usr/share/microbiomeutil-data/RESOURCES"
SEQUENCES = 5181
RANKS = ("domain", "phylum", "class", "order", "family", "genus")
BASES = b"ACGT"
STEM = 9


def main(argv, task):
    args = parse_args(__doc__, PRESETS, argv, task, add_arguments)
    sequences, lineages = read_fasta(load_fasta(args.data_dir))
    title = f"16S rRNA, {args.rank}, genera held out"
    splits, y, classes = split_by_genus(lineages, args.rank, args.split_seed)
    if args.floor:
        train, _, test = splits
        score = nearest_neighbour(four_mers(sequences), y, train, test)
        print(
            f"{title}: {len(train):,} / {len(test):,} sequences, {classes} "
            f"names; nearest neighbour by 4-mers {score:.4f}"
        )
        return
    args.classes = classes
    if not 0.0 <= args.mutations <= 0.5 or args.shift < 0:
        sys.exit(
            "--mutations must be a share of at most 0.5, and --shift a number "
            f"of bases. Received: {args.mutations} and {args.shift}."
        )
    x = encode_bases(sequences, args.preset.length)
    splits = [splits[0][: args.preset.examples], *splits[1:]]
    data = Data(*((x[index], y[index]) for index in splits))
    recipe.run(args, title, data, build_model)


def add_arguments(parser):
    add = parser.add_argument
    add("--rank", choices=RANKS[:-1], default="phylum", help="to be named")
    add(
        "--split-seed", type=int, default=0, help="of which genera are held out"
    )
    add("--floor", action="store_true", help="score 4-mers, leave")
    add(
        "--mutations",
        type=float,
        default=0.0,
        help="mean share of bases drawn anew in training, default 0",
    )
    add(
        "--shift",
        type=int,
        default=0,
        help="most bases cut off the start in training, default 0",
    )


def load_fasta(data_dir):
    """The text of the gold set, from the package or its files."""
    for folder in (data_dir, data_dir / FOLDER):
        if (folder / FASTA).is_file():
            return (folder / FASTA).read_text()
    packages = sorted(data_dir.glob("microbiomeutil-data_*.deb"))
    if not packages:
        sys.exit(
            f"No {FASTA} in {data_dir.resolve()}. Get it with "
            "`apt-get download microbiomeutil-data`, or from "
            "https://packages.debian.org/microbiomeutil-data, and give the "
            "folder that holds the .deb with --data-dir."
        )
    try:
        return read_deb(packages[-1], f"{FOLDER}/{FASTA}").decode()
    except (EOFError, KeyError, OSError, ValueError, tarfile.TarError) as error:
        sys.exit(
            f"{packages[-1]} must be a Debian package with {FASTA}. Reading it "
            f"failed: {error!r}. Download it again."
        )
    except lzma.LZMAError as error:
        sys.exit(f"{packages[-1]} is damaged: {error}. Download it again.")


def read_deb(path, name):
    """One file out of a .deb, which is an `ar` archive of tar archives."""
    package = path.read_bytes()
    if not package.startswith(b"!<arch>\n"):
        raise ValueError("not a Debian package")
    start = 8
    while start < len(package):
        header, start = package[start : start + 60], start + 60
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            packed = io.BytesIO(package[start : start + size])
            with tarfile.open(fileobj=packed) as files:
                return files.extractfile(f"./{name}").read()
        # Members begin at even places.
        start += size + size % 2
    raise ValueError("it holds no data.tar")


def read_fasta(text):
    """Returns sequences as bytes, and lineages of six names each."""
    sequences, lineages = [], []
    # A name may hold a ">" too.
    for record in ("\n" + text).split("\n>")[1:]:
        header, *lines = record.split("\n")
        lineage = tuple(header.split("\t")[-1].strip().split("; "))
        if len(lineage) != len(RANKS):
            raise ValueError(
                f"A header must end in {len(RANKS)} names, domain to genus. "
                f"Received: {header[:80]!r}"
            )
        sequences.append("".join(lines).strip().upper().encode())
        lineages.append(lineage)
    return sequences, lineages


def split_by_genus(lineages, rank, seed, shares=(0.1, 0.2)):
    """Splits whole genera at random into training, validation and test.

    Args:
        lineages: from `read_fasta`.
        rank: the rank to be named.
        seed: of the draw.
        shares: of the genera that are for validation and for the test.

    Returns:
        Indices of the three splits, in random order; labels `(sequences,)`,
        int32; and the number of classes.
    """
    level = RANKS.index(rank) + 1
    classes, y = np.unique(
        ["; ".join(lineage[:level]) for lineage in lineages],
        return_inverse=True,
    )
    _, genus = np.unique(
        ["; ".join(lineage) for lineage in lineages], return_inverse=True
    )
    rng = np.random.default_rng(seed)
    order = rng.permutation(genus.max() + 1)
    validation, test = (round(share * len(order)) for share in shares)
    parts = np.split(order, (test, test + validation))
    splits = [
        rng.permutation(np.flatnonzero(np.isin(genus, part))) for part in parts
    ]
    return (splits[2], splits[1], splits[0]), y.astype("int32"), len(classes)


def base_numbers(sequence):
    """0 to 3 for a base that is known, else 4."""
    numbers = np.full(256, len(BASES))
    numbers[list(BASES)] = range(len(BASES))
    return numbers[np.frombuffer(sequence, "uint8")]


def encode_bases(sequences, length):
    """Tokens `(sequences, length)`: 0 pads, 1 … 4 are bases, 5 is unknown."""
    tokens = np.zeros((len(sequences), length), "uint8")
    for row, sequence in zip(tokens, sequences, strict=True):
        numbers = base_numbers(sequence)[:length]
        row[: len(numbers)] = 1 + numbers
    return tokens


def four_mers(sequences):
    """Shares of the 256 words of four bases, `(sequences, 256)`."""
    shares = np.zeros((len(sequences), 256))
    for row, sequence in zip(shares, sequences, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(
            base_numbers(sequence), 4
        )
        known = windows[(windows < 4).all(1)]
        row[:] = np.bincount(known @ (64, 16, 4, 1), minlength=256)
        row /= max(1, len(known))
    return shares


def nearest_neighbour(features, y, train, test):
    """Accuracy of the label of the nearest training example."""
    known, asked = features[train], features[test]
    # |asked|² is the same for all that are known.
    distances = np.sum(known**2, 1) - 2 * asked @ known.T
    return np.mean(y[train][distances.argmin(1)] == y[test])


@keras.saving.register_keras_serializable(package="experiments")
class Mutate(keras.layers.Layer):
    """Changes bases and cuts off the start, in training only.

    Unseen genera differ from seen ones by just that.

    Args:
        mutations: mean share of the bases that are drawn anew; each sequence
            has its own share, up to twice the mean.
        shift: most bases that are cut off.
        seed: integer.
    """

    def __init__(self, mutations, shift, seed, **kwargs):
        super().__init__(**kwargs)
        self.mutations = mutations
        self.shift = shift
        self.seed = seed
        self.seeds = keras.random.SeedGenerator(seed)

    def call(self, tokens, training=False):
        tokens = tf.cast(tokens, tf.int32)
        if not training:
            return tokens
        shape = tf.shape(tokens)
        each, one = (shape[0], shape[1]), (shape[0], 1)
        share = 2.0 * self.mutations * self._uniform(one)
        others = 1 + self._integers(each, len(BASES))
        changes = (self._uniform(each) < share) & (tokens > 0)
        tokens = tf.where(changes, others, tokens)
        start = self._integers(one, self.shift + 1)
        padded = tf.pad(tokens, [(0, 0), (0, self.shift)])
        return tf.gather(padded, start + tf.range(shape[1]), batch_dims=1)

    def _uniform(self, shape):
        return keras.random.uniform(shape, seed=self.seeds)

    def _integers(self, shape, count):
        return tf.cast(self._uniform(shape) * count, tf.int32)

    def get_config(self):
        return {
            **super().get_config(),
            "mutations": self.mutations,
            "shift": self.shift,
            "seed": self.seed,
        }


def build_model(args):
    tokens = keras.Input((args.preset.length,), dtype="uint8", name="tokens")
    x = tokens
    if args.mutations or args.shift:
        x = Mutate(args.mutations, args.shift, args.seed)(x)
    x = keras.layers.Embedding(6, args.preset.width, mask_zero=True)(x)
    x = body.Stem(args.preset.width, args.preset.stride, STEM)(x)
    x = body.pool(body.encode(x, args))
    head = keras.layers.Dense(args.classes, dtype="float32")
    return keras.Model(tokens, head(x))
