"""Generation: equals choosing from whole passes; seeds; ends; errors."""

import gc
import time
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt.generation import loop
from tests.helpers.fading import Fading

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


def test_rows_end_at_any_of_several_tokens():
    model = Fading()
    free = keras_kt.generate(model, PROMPT, 17, temperature=5.0, seed=1)
    for ends in ([2, 7, 9], (3,), np.array([0, 4]), []):
        actual = keras_kt.generate(
            model, PROMPT, 17, temperature=5.0, seed=1, end_token=ends
        ).numpy()
        for row, wanted in zip(actual[:, 4:], free.numpy()[:, 4:], strict=True):
            stop = np.flatnonzero(np.isin(wanted, ends))
            stop = stop[0] + 1 if len(stop) else 17
            np.testing.assert_array_equal(row[:stop], wanted[:stop])
            assert (row[stop:] == wanted[stop - 1]).all()


def test_generation_ends_with_the_last_row():
    """Steps that are run, not those that are traced."""
    model = Fading()
    steps = tf.Variable(0)
    step = model.step

    def count(tokens, state):
        steps.assign_add(1)
        return step(tokens, state)

    model.step = count
    everything = list(range(11))
    for given in ({}, {"on_tokens": lambda tokens: None}):
        for ends, expected in ((everything, 1), (None, 13)):
            steps.assign(0)
            keras_kt.generate(model, PROMPT, 13, end_token=ends, **given)
            assert int(steps) == expected


OPTIONS = (
    {"temperature": 0},
    {"top_p": 0.8, "end_token": (2, 7), "num_return_sequences": 3},
    {"top_k": 3, "jit_compile": True},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_tokens_come_one_by_one_and_are_the_same(options):
    model = Fading()
    options = {"temperature": 5.0, "seed": 2} | options
    expected = keras_kt.generate(model, PROMPT, 17, **options).numpy()
    seen = []

    def on_tokens(tokens):
        assert isinstance(tokens, np.ndarray) and tokens.dtype == np.int32
        seen.append(tokens.copy())
        # What is done to it has no effect.
        tokens[:] = 0

    actual = keras_kt.generate(
        model, PROMPT, 17, on_tokens=on_tokens, **options
    )
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == tf.int32
    new = expected[:, 4:]
    np.testing.assert_array_equal(np.stack(seen, 1), new[:, : len(seen)])
    ends = np.isin(new, options.get("end_token", []))
    last = np.where(ends.any(1), ends.argmax(1) + 1, 17).max()
    assert len(seen) == last


def test_tokens_of_a_decoder_come_one_by_one(model):
    seen = []
    actual = keras_kt.generate(
        model, PROMPT, 7, temperature=0, on_tokens=seen.append
    )
    np.testing.assert_array_equal(
        actual, greedy_by_whole_passes(model, PROMPT, 7)
    )
    np.testing.assert_array_equal(np.stack(seen, 1), actual[:, 4:])


def test_an_error_of_the_callback_stops_generation():
    seen = []

    def stop(tokens):
        seen.append(tokens)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keras_kt.generate(Fading(), PROMPT, 17, seed=0, on_tokens=stop)
    assert len(seen) == 3


@pytest.mark.parametrize("is_streamed", (False, True))
def test_one_trace_serves_all_values_of_its_options(is_streamed):
    model = Fading()
    given = {"on_tokens": lambda tokens: None} if is_streamed else {}
    mask = np.arange(4) >= [[1], [2]]

    def run(prompt=PROMPT, mask=mask, **options):
        options = {"top_p": 0.8, "end_token": [1, 2], "seed": 0} | options
        keras_kt.generate(
            model, prompt, 9, prompt_mask=mask, **options, **given
        )

    run()
    traces = model.calls
    assert traces == 2  # the prompt and one token
    for options in (
        {"temperature": 3.0},
        {"top_p": 0.3},
        {"top_p": 1.0},
        {"seed": [5, 6]},
        {"seed": None},
        {"end_token": (9, 0)},
        {"mask": mask[::-1]},
        {"prompt": PROMPT[::-1]},
        {"prompt": PROMPT.tolist()},
    ):
        run(**options)
        assert model.calls == traces, options
    run(prompt=PROMPT[:, :3], mask=mask[:, :3])
    # Another length is another prompt, and the same step after it.
    assert model.calls == traces + (1 if is_streamed else 2)


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
        ({"prompt": tf.ragged.constant([[1, 2], [3]])}, "Decoder whose `step`"),
        ({"prompt": [[1, 2], [3]]}, "Prompts of several lengths need a model"),
        ({"prompt_mask": PROMPT > 1}, "or give the prompts one by one"),
        ({"prompt_lengths": [3, 4]}, "or give the prompts one by one"),
        ({"top_k": 0}, "argument `top_k`"),
    ],
)
def test_bad_input_is_named(model, change, message):
    arguments = {"model": model, "prompt": PROMPT, "max_new_tokens": 3}
    with pytest.raises(ValueError, match=message):
        keras_kt.generate(**{**arguments, **change})


def test_a_loop_evaluates_the_kernel_outside(model):
    keras_kt.generate(model, PROMPT, 5, temperature=0)
    options = loop.Options(1, True, None, False, False)
    whole = loop.of_model(model, options).whole
    traced = whole._list_all_concrete_functions()[0]
    graph = traced.graph
    body = next(
        graph._get_function(op.get_attr("body").name).cached_definition
        for op in graph.get_operations()
        if op.type in ("While", "StatelessWhile")
    )
    # The scale of a normal prior is a softplus, which nothing else here is.
    assert "Softplus" in {op.type for op in graph.get_operations()}
    assert "Softplus" not in {node.op for node in body.node_def}


def test_kernels_are_evaluated_again_where_a_function_is_traced_once():
    """Its graph must hold no tensor of the loop that it was traced in."""
    model = Decoder()
    model(PROMPT)
    model.step = tf.function(model.step)
    plain = Decoder()
    plain(PROMPT)
    plain.set_weights(model.get_weights())
    for count in (5, 7):
        for prompt in (PROMPT, PROMPT[:, :1]):
            np.testing.assert_array_equal(
                keras_kt.generate(model, prompt, count, temperature=0),
                keras_kt.generate(plain, prompt, count, temperature=0),
            )
