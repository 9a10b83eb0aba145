"""Generation: equals choosing from whole passes; seeds; ends; errors."""

import gc
import time
import weakref

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


def test_samples_are_those_of_a_written_out_loop(model):
    """Temperature and seed are inputs of the loop, not part of its trace."""
    for seed, temperature in ((0, 9.0), (3, 9.0), (-3, 20.0)):
        tokens = PROMPT
        for position in range(7):
            drawn = tf.random.stateless_categorical(
                model(tokens)[:, -1] / temperature, 1, [seed, position]
            )
            tokens = np.concatenate([tokens, drawn], 1)
        actual = keras_kt.generate(
            model, PROMPT, 7, temperature=temperature, seed=seed
        )
        np.testing.assert_array_equal(actual, tokens)


def counting_model():
    """A model that counts how often its prompt is traced."""
    model = Decoder()
    model(PROMPT)
    model.traces = 0
    step = model.step

    def count(tokens, state):
        model.traces += tokens.shape[1] != 1
        return step(tokens, state)

    model.step = count
    return model


def test_one_trace_serves_every_call_of_its_shape():
    """Each call made a new function and traced it: seconds per call."""
    model = counting_model()
    options = {"temperature": 2.0, "seed": 1}
    keras_kt.generate(model, PROMPT, 9, **options)
    assert model.traces == 1
    start = time.perf_counter()
    for seed, temperature in ((2, 2.0), (None, 3), (np.int64(5), np.pi)):
        keras_kt.generate(model, PROMPT, 9, temperature=temperature, seed=seed)
    assert time.perf_counter() - start < 1.0
    assert model.traces == 1
    for change in ({"temperature": 0}, {"top_k": 3}, {"end_token": 1}):
        for _ in range(2):
            keras_kt.generate(model, PROMPT, 9, **{**options, **change})
    assert model.traces == 4
    for _ in range(2):
        keras_kt.generate(model, PROMPT[:, :3], 9, **options)
        keras_kt.generate(model, PROMPT, 9, **options)
    assert model.traces == 5


def test_other_variables_make_another_trace():
    model = counting_model()
    keras_kt.generate(model, PROMPT, 9, temperature=0)
    # The same variables with other values need none.
    model.head.bias.assign(50.0 * (np.arange(VOCABULARY) == 2))
    other = keras_kt.generate(model, PROMPT, 9, temperature=0)
    assert (other.numpy()[:, 4:] == 2).all()
    assert model.traces == 1
    model.head.bias.assign(np.zeros(VOCABULARY))
    model.head.quantize("int8")
    quantized = keras_kt.generate(model, PROMPT, 9, temperature=0)
    assert model.traces == 2
    np.testing.assert_array_equal(
        quantized, greedy_by_whole_passes(model, PROMPT, 9)
    )


def test_the_cache_does_not_keep_a_model_alive():
    model = Decoder()
    model(PROMPT)
    keras_kt.generate(model, PROMPT, 3, seed=0)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_numbers_of_numpy_and_tensorflow_are_taken(model):
    expected = keras_kt.generate(
        model, PROMPT, 5, temperature=2.0, top_k=3, end_token=1, seed=4
    )
    for convert in (np.int64, np.array, tf.constant):
        actual = keras_kt.generate(
            model,
            convert(PROMPT) if convert is not np.int64 else PROMPT.tolist(),
            convert(5),
            temperature=convert(2),
            top_k=convert(3),
            end_token=convert(1),
            seed=convert(4),
        )
        np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(
        keras_kt.generate(model, PROMPT, 5, top_k=100, seed=4),
        keras_kt.generate(model, PROMPT, 5, seed=4),
    )


def test_an_empty_batch_gives_an_empty_batch(model):
    for temperature in (0, 1.0):
        actual = keras_kt.generate(
            model, PROMPT[:0], 5, temperature=temperature
        )
        assert actual.shape == (0, 9)
        assert actual.dtype == tf.int32


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
        ({"max_new_tokens": 0}, "argument `max_new_tokens`"),
        ({"temperature": -1}, "`temperature` must be"),
        ({"max_new_tokens": 2.0}, "argument `max_new_tokens`"),
        ({"seed": 0.5}, "argument `seed`"),
        ({"jit_compile": None}, "`jit_compile` must be"),
        (
            {"prompt": tf.ragged.constant([[1, 2], [3]])},
            "a RaggedTensor.*several lengths one by one",
        ),
        ({"prompt": [[1, 2], [3]]}, "a list whose rows.*one by one"),
        ({"top_k": 0}, "argument `top_k`"),
    ],
)
def test_bad_input_is_named(model, change, message):
    arguments = {"model": model, "prompt": PROMPT, "max_new_tokens": 3}
    with pytest.raises(ValueError, match=message):
        keras_kt.generate(**{**arguments, **change})
