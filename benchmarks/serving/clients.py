"""Clients that ask a Triton server, and compare each answer with Keras's.

A request that gets no answer is sent again: it holds all that it needs, the
state of a stream too, so it does not matter which process answers it.
"""

import dataclasses
import threading
import time

import numpy as np
from geventhttpclient.response import HTTPParseError
from tritonclient import http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

MODELS = (
    "classifier",
    "stream_initial_state",
    "stream_prefill_lengths",
    "stream_decode",
)


@dataclasses.dataclass
class Texts:
    """What is sent, and Keras's own answers.

    Args:
        whole: texts for the classifier, of several lengths.
        classes: its answers, of each text alone.
        streams: texts for the stream.
        logits: what it gives for them at once.
    """

    whole: list
    classes: list
    streams: list
    logits: list


class Client:
    """One of several that ask at the same time.

    Args:
        url: of the server.
        texts: `Texts`.
        seed: of what it asks.
        pad: lengths are padded to multiples of this.
        patience: seconds to go on asking.
    """

    def __init__(self, url, texts, seed, pad, patience=120.0):
        self.address, self.texts = url.removeprefix("http://"), texts
        self.pad, self.patience = pad, patience
        self.random = np.random.default_rng(seed)
        self.connection, self.error = None, None
        # Of each request: model, seconds, how often sent, and the error of the
        # answer, `None` where it is not compared.
        self.answered, self.streams = [], 0

    def run(self, is_over):
        """Asks until an event, and ends what it began."""
        try:
            while not is_over.is_set():
                ask = (self.classify, self.stream)[self.random.integers(2)]
                ask()
        except Exception as error:
            self.error = error
        finally:
            self._close()

    def classify(self):
        index = self.random.integers(len(self.texts.whole))
        text = self._padded(self.texts.whole[index])
        self._ask(
            "classifier",
            {"tokens": text},
            lambda x: x["output_0"][0] - self.texts.classes[index],
        )

    def stream(self, most=20):
        """A prompt and some tokens of a text, one at a time."""
        index = self.random.integers(len(self.texts.streams))
        text, logits = self.texts.streams[index], self.texts.logits[index]
        count = self.random.integers(1, min(most, len(text) // 2))
        start = self.random.integers(1, len(text) - count)
        state = self._ask("stream_initial_state", {"batch_size": [1]})

        def error_at(place):
            return lambda x: x["output_0"][0, 0] - logits[place]

        state = self._ask(
            "stream_prefill_lengths",
            {
                "tokens": self._padded(text[:start]),
                "lengths": [[start]],
                **state,
            },
            error_at(start - 1),
        )
        for place in range(start, start + count):
            state = self._ask(
                "stream_decode",
                {"tokens": [[text[place]]], **state},
                error_at(place),
            )
        self.streams += 1

    def _padded(self, text):
        return [np.pad(text, (0, -len(text) % self.pad))]

    def _ask(self, model, arrays, difference=None):
        """The answer, without the output that is compared."""
        arrays = {
            k: np.asarray(x, None if k.startswith("state") else "int32")
            for k, x in arrays.items()
        }
        begin, tries, answer = time.monotonic(), 0, None
        while answer is None:
            tries += 1
            start = time.monotonic()
            try:
                answer = self._answer(model, arrays)
            except (InferenceServerException, OSError, HTTPParseError):
                if time.monotonic() - begin > self.patience:
                    raise
                self._close()
                time.sleep(0.1)
        seconds = time.monotonic() - start
        error = None
        if difference is not None:
            error = float(np.abs(difference(answer)).max())
        self.answered.append((model, seconds, tries, error))
        answer.pop("output_0", None)
        return answer

    def _answer(self, model, arrays):
        if self.connection is None:
            self.connection = http.InferenceServerClient(self.address)
        inputs = []
        for name, array in arrays.items():
            kind = np_to_triton_dtype(array.dtype)
            inputs.append(http.InferInput(name, array.shape, kind))
            inputs[-1].set_data_from_numpy(array)
        result = self.connection.infer(model, inputs)
        names = [x["name"] for x in result.get_response()["outputs"]]
        return {name: result.as_numpy(name) for name in names}

    def _close(self):
        if self.connection is not None:
            self.connection.close()
        self.connection = None


def run(clients, seconds, meanwhile):
    """Runs all clients for some time; half-way, which lasts, something else.

    Returns:
        Seconds until the last answer.
    """
    start, is_over = time.monotonic(), threading.Event()
    threads = [
        threading.Thread(target=client.run, args=(is_over,))
        for client in clients
    ]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.5 * seconds)
        meanwhile()
        time.sleep(0.5 * seconds)
    finally:
        is_over.set()
    for thread in threads:
        thread.join()
    return time.monotonic() - start
