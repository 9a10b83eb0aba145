"""Trains a small classifier by `model.fit` on one device, several, or a TPU.

A sequence of symbols is labelled with the symbol that it holds most often. The
model and the data are the same under every strategy, and so is the loss:

    python examples/distributed.py
    python examples/distributed.py --strategy mirrored --cpus 2
    python examples/distributed.py --strategy tpu             # on a TPU VM

Under MultiWorkerMirroredStrategy Keras 3's `fit` fails (keras issue 20585):
`python -m experiments distributed` has a loop for that.
"""

import sys

from common import flags


def parse_args():
    parser = flags(__doc__)
    add = parser.add_argument
    add(
        "--strategy",
        choices=("none", "mirrored", "tpu"),
        default="none",
        help="devices",
    )
    add("--cpus", type=int, help="logical CPUs for mirrored; else its GPUs")
    add("--tpu", default="local", help="name, address, or local (TPU VM)")
    add("--epochs", type=int, default=5, help="of --steps each")
    add("--steps", type=int, default=20, help="of an epoch")
    add("--batch-size", type=int, default=32, help="of all replicas together")
    add("--learning-rate", type=float, default=5e-3, help="of AdamW")
    add("--seed", type=int, default=0, help="of weights and data")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import keras
import numpy as np
import tensorflow as tf
from progress import progress

import keras_kt

LENGTH, SYMBOLS, WIDTH, EXAMPLES = 128, 8, 32, 1024


def main():
    args = parse_args()
    # Before the strategy, which may start from another process's seeds.
    keras.utils.set_random_seed(args.seed)
    strategy = make_strategy(args)
    replicas = strategy.num_replicas_in_sync
    if args.batch_size % replicas:
        sys.exit(
            "--batch-size must be a multiple of the number of replicas. "
            f"Received: --batch-size {args.batch_size} with {replicas} "
            f"replicas. Try {replicas * (args.batch_size // replicas + 1)}."
        )
    # What has variables is made in the scope: they live on all replicas.
    with strategy.scope():
        model = build_model(args.seed)
        model.compile(
            keras.optimizers.AdamW(args.learning_rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    history = model.fit(
        make_dataset(args.batch_size, args.seed),
        epochs=args.epochs,
        steps_per_epoch=args.steps,
        shuffle=False,
        **progress(),
    ).history
    print(
        f"{replicas} replicas: loss {history['loss'][-1]:.5f}, accuracy "
        f"{history['accuracy'][-1]:.3f} after {args.epochs * args.steps} steps."
    )


def make_strategy(args):
    """The strategy; made before anything else touches TensorFlow's devices."""
    if args.strategy == "none":
        return tf.distribute.get_strategy()
    if args.strategy == "mirrored":
        if args.cpus is None:
            return tf.distribute.MirroredStrategy()
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * args.cpus
        )
        devices = [f"CPU:{number}" for number in range(args.cpus)]
        return tf.distribute.MirroredStrategy(devices)
    # Half the memory; exponentials and sums stay float32 inside the layer.
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(args.tpu)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    # What comes depends on the wheel and on where the search for a TPU ends.
    except (
        *(ImportError, IndexError, OSError, RuntimeError, ValueError),
        tf.errors.OpError,
    ) as error:
        sys.exit(
            f"--strategy tpu expects a TPU at --tpu {args.tpu!r}, and none was "
            f"found there ({type(error).__name__}). On a TPU VM install "
            "tensorflow-tpu and use --tpu local; elsewhere give its name or "
            "grpc:// address. Without a TPU use --strategy mirrored."
        )


def build_model(seed):
    symbols = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(SYMBOLS, WIDTH)(symbols)
    normed = keras.layers.LayerNormalization()(x)
    # New frequencies at every step, the same on all replicas.
    attention = keras_kt.KernelizedAttention(2, 16, redraw="step", seed=seed)
    x = keras.layers.Add()([x, attention(normed, normed)])
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(symbols, keras.layers.Dense(SYMBOLS, dtype="float32")(x))


def make_dataset(batch_size, seed):
    """Endless batches, the same in every run."""
    symbols = np.random.default_rng(seed).integers(
        SYMBOLS, size=(EXAMPLES, LENGTH), dtype="int32"
    )
    labels = [np.bincount(row, minlength=SYMBOLS).argmax() for row in symbols]
    dataset = tf.data.Dataset.from_tensor_slices((symbols, labels))
    # A TPU compiles for one shape: no smaller batch at the end.
    return dataset.repeat().batch(batch_size, drop_remainder=True)


if __name__ == "__main__":
    main()
