"""Generation: equals choosing from whole passes; seeds; ends; errors."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt

VOCABULARY = 11


class Decoder(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = keras.layers.Embedding(VOCABULARY, 12)
        self.block = keras_kt.KernelizedTransformerDecoder(
            20, 3, local_context=3, normalize_first=True, seed=0
        )
        self.head = keras.layers.Dense(VOCABULARY, kernel_initializer="normal")

    def call(self, tokens):
        return 30.0 * self.head(self.block(self.embedding(tokens)))

    def initial_state(self, batch_size):
        return self.block.initial_state(batch_size)

    def step(self, tokens, state):
        x, state = self.block.step(self.embedding(tokens), state)
        return 30.0 * self.head(x), state


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    model = Decoder()
    model(PROMPT)
    return model


PROMPT = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])


def greedy_by_whole_passes(model, tokens, count):
    for _ in range(count):
        best = np.argmax(model(tokens)[:, -1], -1)
        tokens = np.concatenate([tokens, best[:, None]], 1)
    return tokens


@pytest.mark.parametrize("jit_compile", [False, True])
def test_greedy_equals_whole_passes(model, jit_compile):
    actual = keras_kt.generate(
        model, PROMPT, 13, temperature=0, jit_compile=jit_compile
    )
    expected = greedy_by_whole_passes(model, PROMPT, 13)
    np.testing.assert_array_equal(actual, expected)
    assert len(np.unique(expected[:, 4:])) > 2  # not one token for ever


def test_top_1_is_greedy(model):
    np.testing.assert_array_equal(
        keras_kt.generate(model, PROMPT, 7, top_k=1, seed=3),
        keras_kt.generate(model, PROMPT, 7, temperature=0),
    )


def test_seeds_reproduce_and_differ(model):
    def sample(seed):
        return keras_kt.generate(
            model, PROMPT, 20, temperature=9.0, seed=seed
        ).numpy()

    np.testing.assert_array_equal(sample(1), sample(1))
    assert (sample(1) != sample(2)).any()
    keras.utils.set_random_seed(5)
    first = sample(None)
    assert (first != sample(None)).any()


def test_samples_follow_the_logits(model):
    """One step: frequencies against the softmax, by χ² at 3 σ."""
    prompt = np.repeat(PROMPT[:1], 4000, axis=0)
    drawn = keras_kt.generate(model, prompt, 1, temperature=20.0, seed=0)
    counts = np.bincount(drawn[:, -1], minlength=VOCABULARY)
    logits = model(PROMPT[:1])[0, -1] / 20.0
    expected = 4000 * tf.nn.softmax(logits).numpy()
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert expected.min() > 20
    freedom = VOCABULARY - 1
    assert statistic < freedom + 3 * np.sqrt(2 * freedom)


def test_end_token_fills_the_row(model):
    free = keras_kt.generate(model, PROMPT, 13, temperature=0).numpy()
    end = free[0, 6]
    actual = keras_kt.generate(
        model, PROMPT, 13, temperature=0, end_token=end
    ).numpy()
    for row, wanted in zip(actual[:, 4:], free[:, 4:], strict=True):
        stop = np.flatnonzero(wanted == end)
        stop = stop[0] + 1 if len(stop) else 13
        np.testing.assert_array_equal(row[:stop], wanted[:stop])
        assert (row[stop:] == end).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": keras.layers.Dense(2)}, "`initial_state` and `step`"),
        ({"prompt": [[1.0, 2.0]]}, "`prompt` must be integers"),
        ({"prompt": [1, 2]}, "`prompt` must be integers"),
        ({"prompt": np.zeros((2, 0), int)}, "at least one token"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be"),
        ({"temperature": -1}, "`temperature` must be"),
        ({"top_k": 0}, "`top_k` must be"),
    ],
)
def test_bad_input_is_named(model, change, message):
    arguments = {"model": model, "prompt": PROMPT, "max_new_tokens": 3}
    with pytest.raises(ValueError, match=message):
        keras_kt.generate(**{**arguments, **change})
