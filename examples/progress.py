"""How the examples show progress: a bar on a terminal, lines in a log."""

import contextlib
import sys
import threading
import time

import keras

INTERVAL = 10.0  # seconds between lines


@contextlib.contextmanager
def working(what, interval=INTERVAL):
    """Says what is being done, and every few seconds that it still is."""
    done, start = threading.Event(), time.monotonic()

    def say():
        while not done.wait(interval):
            print(f"… {time.monotonic() - start:.0f} s", flush=True)

    print(f"{what} …", flush=True)
    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def progress(*callbacks):
    """Arguments of `fit`: Keras's bar on a terminal, lines in a log."""
    is_bar = sys.stdout.isatty()
    lines = Lines(is_bar=is_bar)
    return {"verbose": int(is_bar), "callbacks": [lines, *callbacks]}


class Lines(keras.callbacks.Callback):
    """Says how far a training is, a line every few seconds.

    And that the first step compiles; with `is_bar` no more than that, since
    Keras's bar has the rest.
    """

    def __init__(self, interval=INTERVAL, is_bar=False):
        super().__init__()
        self.interval, self.is_bar = interval, is_bar

    def on_train_begin(self, logs=None):
        self.compiling = contextlib.ExitStack()
        self.compiling.enter_context(
            working("Compiling the training step", self.interval)
        )
        self.is_compiled = False

    def on_epoch_begin(self, epoch, logs=None):
        epochs = self.params["epochs"]
        self.epoch = f"epoch {epoch + 1}/{epochs}, " if epochs > 1 else ""
        self.before = epoch * self.params["steps"]

    def on_train_batch_end(self, batch, logs=None):
        if not self.is_compiled:
            self.compiling.close()
            self.is_compiled = True
            self.start = self.last = time.monotonic()
        elif time.monotonic() - self.last >= self.interval:
            self._say(batch + 1, logs)

    def on_epoch_end(self, epoch, logs=None):
        self._say(self.params["steps"], logs)

    def on_train_end(self, logs=None):
        self.compiling.close()

    def _say(self, step, logs):
        self.last = time.monotonic()
        if self.is_bar:
            return
        steps, seconds = self.params["steps"], self.last - self.start
        done = self.before + step
        left = steps * self.params["epochs"] - done
        rest = seconds / max(done - 1, 1) * left
        values = "".join(f", {k} {v:.4g}" for k, v in (logs or {}).items())
        print(
            f"{self.epoch}step {step}/{steps}{values}, {seconds:.0f} s, "
            f"{rest:.0f} s to go",
            flush=True,
        )
