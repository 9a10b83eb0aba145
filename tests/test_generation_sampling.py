"""Sampling against a loop in float64 NumPy, with Threefry in Python integers.

The oracle knows nothing of batches: it continues one prompt, given the four
words of its noise.
"""

import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt.generation import sampling
from tests.helpers.fading import Fading, last_logits

ROWS = ([1, 2, 3, 4, 5], [6], [10, 7, 8])
WORD = 2**32


def threefry(key, counter):
    """Salmon et al., 2011, in integers of any size."""
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = (counter[0] + keys[0]) % WORD, (counter[1] + keys[1]) % WORD
    for turn in range(20):
        shift = (13, 15, 26, 6, 17, 29, 16, 24)[turn % 8]
        x = (x + y) % WORD
        y = ((y << shift) | (y >> (32 - shift))) % WORD ^ x
        if turn % 4 == 3:
            group = turn // 4 + 1
            x = (x + keys[group % 3]) % WORD
            y = (y + keys[(group + 1) % 3] + group) % WORD
    return x, y


def chosen(logits, top_k, top_p, noise):
    """A token by the definition: the likeliest ones, one after the other."""
    order = np.argsort(-logits)[:top_k]
    weights = np.exp(logits[order] - logits.max())
    kept, total = [], 0.0
    for token, weight in zip(order, weights / weights.sum(), strict=True):
        if top_p is not None and total >= top_p:
            break
        kept.append(token)
        total += weight
    kept = np.sort(kept)
    weights = np.exp(logits[kept] - logits.max())
    return kept[np.argmax(np.cumsum(weights) / weights.sum() > noise)]


def continued(
    model,
    prompt,
    count,
    words,
    temperature=1.0,
    top_k=None,
    top_p=None,
    ends=(),
):
    seed, place, which = words
    tokens = list(prompt)
    for position in range(count):
        bits, _ = threefry((seed % WORD, place), (which, position))
        logits = last_logits(model, tokens) / temperature
        tokens.append(chosen(logits, top_k, top_p, (bits >> 8) / 2**24))
        if tokens[-1] in ends:
            break
    new = tokens[len(prompt) :]
    return new + [new[-1]] * (count - len(new))


def test_noise_is_threefry():
    """Its published answers, and those of the oracle here."""
    pi = (0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)
    for (key, counter), expected in (
        (((0, 0), (0, 0)), (0x6B200159, 0x99BA4EFE)),
        (((WORD - 1,) * 2,) * 2, (0x1CB996FC, 0xBB002BE7)),
        (pi, (0xC4923A9C, 0x483DF7A0)),
    ):
        assert threefry(key, counter) == expected
        key, counter = (
            [tf.constant([x], tf.uint32) for x in pair]
            for pair in (key, counter)
        )
        for function in (
            sampling.threefry,
            tf.function(sampling.threefry, jit_compile=True),
        ):
            actual = [int(x[0]) for x in function(key, counter)]
            assert tuple(actual) == expected
    words = tf.constant([[-3, 5, 7], [11, 0, 2]])
    wanted = [
        (threefry((w[0] % WORD, w[1]), (w[2], 13))[0] >> 8) / 2**24
        for w in words.numpy().tolist()
    ]
    np.testing.assert_array_equal(sampling.uniform(words, 13), wanted)


def test_noise_is_uniform_along_each_of_its_words():
    """χ² of 50 cells at 4 σ, and neighbours that are not correlated."""
    count = np.arange(20_000, dtype="int32")
    zeros = np.zeros_like(count)
    for words, position in (
        ((count, zeros, zeros), 0),
        ((zeros, count, zeros), 0),
        ((zeros, zeros, count), 0),
        ((zeros, zeros, zeros), count),
    ):
        noise = sampling.uniform(tf.stack(words, 1), position).numpy()
        assert 0.0 <= noise.min() and noise.max() < 1.0
        cells = np.bincount((50 * noise).astype(int), minlength=50)
        statistic = ((cells - 400) ** 2 / 400).sum()
        assert abs(statistic - 49) < 4 * np.sqrt(2 * 49)
        near = np.corrcoef(noise[1:], noise[:-1])[0, 1]
        assert abs(near) < 4 / np.sqrt(len(noise))


OPTIONS = (
    {"temperature": 2.0},
    {"temperature": 3.0, "top_k": 4},
    {"temperature": 3.0, "top_p": 0.8},
    {"temperature": 5.0, "top_k": 7, "top_p": 0.6, "ends": (3, 5, 8)},
    {"temperature": 5.0, "top_p": 1.0, "ends": (2,)},
    {"temperature": 5.0, "top_p": 1e-9},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_samples_are_those_of_a_written_out_loop(options):
    model = Fading()
    given = {k: x for k, x in options.items() if k != "ends"}
    if "ends" in options:
        given["end_token"] = options["ends"]
    # One of them compiled, which takes as long as all the others.
    for seed, jit_compile in ((0, False), (-3, len(options) == 4)):
        actual = keras_kt.generate(
            model,
            ROWS,
            13,
            seed=seed,
            num_return_sequences=3,
            jit_compile=jit_compile,
            **given,
        )
        new = actual.numpy()[:, -13:].reshape(3, 3, 13)
        for place, prompt in enumerate(ROWS):
            for which in range(3):
                np.testing.assert_array_equal(
                    new[place, which],
                    continued(
                        model, prompt, 13, (seed, place, which), **options
                    ),
                )
        assert len(np.unique(new)) > 3


def test_likeliest_tokens_are_kept_with_their_equals():
    logits = np.log([[0.1, 0.4, 0.1, 0.3, 0.1], [0.96, 0.01, 0.01, 0.01, 0.01]])
    logits = tf.constant(logits, tf.float32)
    for top_k, top_p, expected in (
        (None, None, ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])),
        (2, None, ([1, 3], [0, 1, 2, 3, 4])),
        (99, None, ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])),
        (None, 0.39, ([1], [0])),
        (None, 0.41, ([1, 3], [0])),
        (None, 0.71, ([0, 1, 2, 3, 4], [0])),
        (None, 0.97, ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])),
        # Of the two likeliest: 4/7 and 3/7.
        (2, 0.55, ([1], [0])),
        (2, 0.60, ([1, 3], [0])),
    ):
        actual = sampling.likeliest(logits, top_k, top_p).numpy()
        for row, kept, before in zip(actual, expected, logits, strict=True):
            np.testing.assert_array_equal(np.flatnonzero(row > -np.inf), kept)
            np.testing.assert_array_equal(row[kept], before.numpy()[kept])


@pytest.mark.parametrize("jit_compile", (False, True))
def test_a_token_without_probability_is_never_sampled(jit_compile):
    """Whatever the noise, and the order in which sums are formed."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 1009)).astype("float32")
    logits[0, rng.permutation(1009)[:700]] = -np.inf
    noise = np.linspace(0, 1 - 2.0**-24, 2003).astype("float32")
    sample = tf.function(sampling.sample, jit_compile=jit_compile)
    tokens = sample(np.repeat(logits, len(noise), 0), noise).numpy()
    assert np.isfinite(logits[0, tokens]).all()
    finite = np.flatnonzero(np.isfinite(logits[0]))
    assert tokens[0] == finite[0] and tokens[-1] == finite[-1]
    assert (np.diff(tokens) >= 0).all()
