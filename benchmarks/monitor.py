"""What `SpectralMonitor` costs, as a share of the training that it watches.

    python benchmarks/monitor.py
    python benchmarks/monitor.py --steps 500 --layers 4

Times the callback itself within `fit`, at the end of each epoch, and the rest
of the epoch. The first epoch, which compiles, is left out.
"""

import argparse
import os
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=4, help="default: %(default)s")
    add("--steps", type=int, default=100, help="of an epoch")
    add("--length", type=int, default=1024, help="tokens")
    add("--batch", type=int, default=8, help="default: %(default)s")
    add("--layers", type=int, default=2, help="default: %(default)s")
    add("--health", action="store_true", help="look at a batch, too")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # First, so that --help does not wait for TensorFlow.
    print("Loading TensorFlow …", flush=True)

import keras
import numpy as np

import keras_kt


class Timed(keras_kt.diagnostics.SpectralMonitor):
    """The monitor, with a clock."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.epochs, self.costs = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        end = time.perf_counter()
        super().on_epoch_end(epoch, logs)
        self.epochs.append(end - self.start)
        self.costs.append(time.perf_counter() - end)


def main():
    args = parse_args()
    x = keras.Input((args.length, 64))
    y = x
    for _ in range(args.layers):
        y += keras_kt.KernelizedAttention(4, 16, spectral_prior="mixture")(y, y)
    model = keras.Model(x, y)
    model.compile("adam", "mse")
    batch = np.random.default_rng(0).normal(size=(args.batch, args.length, 64))
    data = np.tile(batch.astype("float32"), (args.steps, 1, 1))
    print("Compiling the training step …", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        monitor = Timed(
            folder, data=data[: args.batch] if args.health else None
        )
        model.fit(
            data,
            data,
            batch_size=args.batch,
            epochs=args.epochs,
            callbacks=[monitor],
            verbose=2,
        )
    cost, epoch = (
        1e3 * float(np.median(seconds[1:]))
        for seconds in (monitor.costs, monitor.epochs)
    )
    print(
        f"{args.layers} layers, {args.steps} steps of {args.batch} x "
        f"{args.length} tokens an epoch: {epoch:.0f} ms, and {cost:.0f} ms of "
        f"monitoring, {cost / epoch:.2%}"
    )


if __name__ == "__main__":
    main()
