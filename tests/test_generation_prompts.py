"""Prompts of several lengths: a batch gives what its rows give one by one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers.fading import Fading, WithoutMask, last_logits
from tests.helpers.tensors import wrong

ROWS = [[1, 2, 3, 4, 5], [6], [10, 7, 8]]
LENGTHS = [5, 1, 3]
SEEDS = [3, 1_000_003, -7]
# Beside the rows: what pads must not matter, nor be a token.
PAD = -100


def padded(side):
    """The rows as one array, 7 wide, and its mask."""
    tokens, mask = np.full((3, 7), PAD), np.zeros((3, 7), "bool")
    rng = np.random.default_rng(1)
    for row, keep, given in zip(tokens, mask, ROWS, strict=True):
        places = {
            "left": np.arange(7 - len(given), 7),
            "right": np.arange(len(given)),
            "inside": np.sort(rng.permutation(7)[: len(given)]),
        }[side]
        row[places], keep[places] = given, True
    return tokens, mask


def forms():
    """Ways to give the rows: arguments, and what the result begins with."""
    left = np.array([[1, 2, 3, 4, 5], [0, 0, 0, 0, 6], [0, 0, 10, 7, 8]])
    yield "list", {"prompt": ROWS}, left
    yield "arrays", {"prompt": [np.array(row) for row in ROWS]}, left
    yield "ragged", {"prompt": tf.ragged.constant(ROWS)}, left
    for side in ("left", "right", "inside"):
        tokens, mask = padded(side)
        yield side, {"prompt": tokens, "prompt_mask": mask}, tokens
    tokens, _ = padded("right")
    yield "lengths", {"prompt": tokens, "prompt_lengths": LENGTHS}, tokens


def one_by_one(model, count, seeds=SEEDS, **options):
    """New tokens of each prompt alone, one after the other."""
    return np.concatenate(
        [
            keras_kt.generate(model, [row], count, seed=seed, **options)[
                :, len(row) :
            ]
            for row, seed in zip(ROWS, seeds, strict=True)
        ]
    )


OPTIONS = (
    {"temperature": 0},
    {"temperature": 4.0, "top_k": 5},
    {
        "temperature": 4.0,
        "top_p": 0.8,
        "num_return_sequences": 3,
        "end_token": [2, 9],
    },
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_a_batch_of_prompts_equals_them_one_by_one(options):
    model = Fading()
    expected = one_by_one(model, 13, **options)
    count = options.get("num_return_sequences", 1)
    for name, given, prompt in forms():
        actual = keras_kt.generate(
            model, max_new_tokens=13, seed=SEEDS, **given, **options
        ).numpy()
        np.testing.assert_array_equal(
            actual[:, :-13], np.repeat(prompt, count, 0), err_msg=name
        )
        np.testing.assert_array_equal(actual[:, -13:], expected, err_msg=name)


def test_greedy_tokens_are_those_of_the_sums():
    model = Fading()
    actual = keras_kt.generate(model, ROWS, 13, temperature=0).numpy()
    for row, new in zip(ROWS, actual[:, -13:], strict=True):
        tokens = list(row)
        for _ in range(13):
            tokens.append(np.argmax(last_logits(model, tokens)))
        np.testing.assert_array_equal(new, tokens[len(row) :])


def test_a_sample_does_not_depend_on_the_other_rows():
    model = Fading()
    options = {"temperature": 5.0, "max_new_tokens": 11}
    whole = keras_kt.generate(model, ROWS, seed=5, **options).numpy()
    # Rows before, after, or none: with one seed its place counts.
    for rows in (ROWS[:1], ROWS[:2], [*ROWS, [2, 2]]):
        other = keras_kt.generate(model, rows, seed=5, **options).numpy()
        known = min(3, len(rows))
        np.testing.assert_array_equal(other[:known, -11:], whole[:known, -11:])
    order = [2, 0, 1]
    own = keras_kt.generate(model, ROWS, seed=SEEDS, **options).numpy()
    moved = keras_kt.generate(
        model,
        [ROWS[i] for i in order],
        seed=[SEEDS[i] for i in order],
        **options,
    )
    np.testing.assert_array_equal(moved.numpy()[:, -11:], own[order, -11:])
    # More continuations, and more tokens, are added to those before.
    few, many = (
        keras_kt.generate(
            model, ROWS, count, seed=5, temperature=5.0, num_return_sequences=n
        ).numpy()
        for n, count in ((2, 7), (5, 11))
    )
    few, many = few.reshape(3, 2, -1), many.reshape(3, 5, -1)
    np.testing.assert_array_equal(many[:, :2, :-4], few)
    np.testing.assert_array_equal(many[:, 0, -11:], whole[:, -11:])


def test_equal_prompts_are_continued_in_their_own_ways():
    model = Fading()
    drawn = keras_kt.generate(
        model, [[1, 2]] * 5, 17, temperature=5.0, seed=0, num_return_sequences=3
    )
    assert len(np.unique(drawn, axis=0)) == 15
    same = keras_kt.generate(
        model, [[1, 2]] * 5, 17, temperature=5.0, seed=[4] * 5
    )
    assert len(np.unique(same, axis=0)) == 1


class Decoder(keras.Model):
    """A language model of the package's block, whose stream takes a mask."""

    def __init__(self):
        super().__init__()
        self.embedding = keras.layers.Embedding(11, 12)
        self.block = keras_kt.KernelizedTransformerDecoder(
            20, 3, local_context=3, normalize_first=True, seed=0
        )
        self.head = keras.layers.Dense(11, kernel_initializer="normal")

    def call(self, tokens):
        return 30.0 * self.head(self.block(self.embedding(tokens)))

    def initial_state(self, batch_size):
        return self.block.initial_state(batch_size)

    def step(self, tokens, state, padding_mask=None):
        x, state = self.block.step(
            self.embedding(tokens), state, decoder_padding_mask=padding_mask
        )
        return 30.0 * self.head(x), state


@pytest.mark.parametrize(
    ("name", "temperature", "jit_compile"),
    (
        ("inside", 9.0, False),
        pytest.param("inside", 0, False, marks=pytest.mark.slow),
        pytest.param("list", 9.0, False, marks=pytest.mark.slow),
        pytest.param("right", 0, False, marks=pytest.mark.slow),
        pytest.param("left", 9.0, True, marks=pytest.mark.slow),
    ),
)
def test_prompts_of_a_decoder_equal_them_one_by_one(
    name, temperature, jit_compile
):
    keras.utils.set_random_seed(0)
    model = Decoder()
    model(np.ones((1, 3), "int32"))
    given = {name: given for name, given, _ in forms()}[name]
    options = {"temperature": temperature, "num_return_sequences": 2}
    expected = one_by_one(model, 7, **options)
    actual = keras_kt.generate(
        model,
        max_new_tokens=7,
        seed=SEEDS,
        jit_compile=jit_compile,
        **given,
        **options,
    )
    np.testing.assert_array_equal(actual.numpy()[:, -7:], expected)
    assert len(np.unique(expected)) > 3


def test_a_model_without_a_mask_takes_prompts_of_one_length():
    model = WithoutMask()
    prompt = np.array([[1, 2, 3], [4, 5, 6]])
    expected = keras_kt.generate(model, prompt, 5, temperature=0)
    for given in (
        {"prompt": tf.ragged.constant(prompt.tolist())},
        {"prompt": prompt, "prompt_mask": np.ones((2, 3), "bool")},
        {"prompt": prompt, "prompt_lengths": [3, 3]},
    ):
        actual = keras_kt.generate(
            model, max_new_tokens=5, temperature=0, **given
        )
        np.testing.assert_array_equal(actual, expected)
    wrong(
        "several lengths need.*argument `mask`.*a WithoutMask whose `step`",
        lambda: keras_kt.generate(model, ROWS, 5),
    )


def test_spellings_of_masks_lengths_and_seeds_are_the_same():
    model = Fading()
    tokens, mask = padded("right")
    expected = None
    for spell in (np.ndarray.tolist, np.asarray, tf.constant):
        for given in (
            {"prompt_mask": spell(mask)},
            {"prompt_mask": spell(mask.astype(int))},
            {"prompt_lengths": spell(np.array(LENGTHS))},
        ):
            actual = keras_kt.generate(
                model,
                spell(tokens),
                7,
                seed=spell(np.array(SEEDS)),
                end_token=spell(np.array([1, 4])),
                top_p=spell(np.array(0.75)),
                num_return_sequences=spell(np.array(2)),
                **given,
            ).numpy()
            expected = actual if expected is None else expected
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": [[1], []]}, r"`prompt` must have at least one.*rows \[1\]"),
        ({"prompt": tf.ragged.constant([[], [1]])}, r"in the rows \[0\]"),
        ({"prompt": [[1, 2], [3.5]]}, "a list whose rows are not all integers"),
        ({"prompt": [[1, 2], 3]}, "a list whose rows are not all integers"),
        ({"prompt": [[[1, 2]], [[3]]]}, "rows are not all integers"),
        ({"prompt": None}, "`prompt` must be integers.*a NoneType"),
        ({"prompt": tf.ragged.constant([[1.0], [1.0, 2.0]])}, "float32 of sh"),
        (
            {"prompt": ROWS, "prompt_lengths": LENGTHS},
            "a prompt of rows of several lengths",
        ),
        ({"prompt_mask": np.ones((3, 5), "bool")}, r"shape \(3, 7\).*\(3, 5\)"),
        ({"prompt_mask": np.ones((3, 7))}, "boolean.*float64"),
        ({"prompt_mask": "left"}, "`prompt_mask` must be boolean"),
        ({"prompt_mask": np.eye(3, 7) > 1}, r"`prompt_mask`.*\[0, 1, 2\]"),
        ({"prompt_lengths": [5, 1]}, "one integer for each prompt"),
        ({"prompt_lengths": [5, 1, 8]}, "from 1 to 7"),
        ({"prompt_lengths": [5.0, 1.0, 3.0]}, "`prompt_lengths` must be one"),
        ({"prompt_lengths": [5, 0, 3]}, r"`prompt_lengths`.*rows \[1\]"),
        (
            {"prompt_lengths": LENGTHS, "prompt_mask": np.ones((3, 7), "bool")},
            "Received: both",
        ),
        ({"seed": [1, 2]}, "2 seeds for 3 prompts"),
        ({"seed": [1, 2, 2**31]}, "at most 31 bits"),
        ({"seed": [1, 2, 0.5]}, "argument `seed`"),
        ({"top_p": 0}, "`top_p` must be a positive number"),
        ({"top_p": 1.5}, r"`top_p` must be a probability in \(0, 1\]"),
        ({"end_token": [1, 0.5]}, "argument `end_token`"),
        ({"num_return_sequences": 0}, "argument `num_return_sequences`"),
        ({"on_tokens": "print"}, "`on_tokens` must be a function"),
    ],
)
def test_bad_prompts_and_options_are_named(change, message):
    arguments = {"prompt": np.ones((3, 7), "int32"), "max_new_tokens": 3}
    wrong(
        f"(?s){message}",
        lambda: keras_kt.generate(Fading(), **{**arguments, **change}),
    )
