"""`ops.attend` with weights of the distance: decay and exact near field."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from keras_kt.ops import chunks, exact_chunks
from tests.helpers import cases, problems, reference
from tests.helpers.contract import one_in
from tests.helpers.problems import ALGORITHMS, BOUND, CAUSAL, attend, decays
from tests.helpers.tensors import Identity, visible

pytestmark = pytest.mark.usefixtures("small_blocks")

# The default of layers; its closed form leaves out a factor of the query.
DEFAULT = ("normal", "positive")
MAPS = {**BOUND, "self-normalized": problems.SELF_NORMALIZED}
# Near 0: features at any distance.
OPTIONS = ((0, True), (5, False), (5, True))


def quick_if(is_quick, *case):
    """Cases that cross what others cover one by one are slow."""
    return pytest.param(*case, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(
    "name, near, fades, algorithm",
    one_in(
        4,
        (
            (name, *options, algorithm)
            for name, options, algorithm in itertools.product(
                MAPS, OPTIONS, ALGORITHMS
            )
            if problems.allows(MAPS[name], algorithm, *options)
        ),
    ),
)
def test_outputs_and_gradients_match_float64_numpy(
    name, near, fades, algorithm
):
    problems.check(algorithm, MAPS[name], near=near, fades=fades, masked=True)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "mask, near, fades",
    [
        ("nothing", 3, True),
        *(
            quick_if(mask == "inside" or options == (3, True), mask, *options)
            for mask in ("left", "right", "inside")
            for options in ((3, True), (3, False), (16, True))
        ),
    ],
)
def test_masked_tokens_take_no_place_in_the_distance(
    mask, near, fades, algorithm
):
    """They pushed real keys out of the window, in the stream for good."""
    problems.check(
        algorithm, DEFAULT, length=13, near=near, fades=fades, masked=mask
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "length, near, fades",
    [
        quick_if(length < 21 or near == 16, length, near, fades)
        for length in (1, 3, 21)
        for near, fades in ((0, True), (1, False), (16, True))
    ],
)
def test_any_length_matches_float64_numpy(length, near, fades, algorithm):
    problems.check(algorithm, DEFAULT, length=length, near=near, fades=fades)


@pytest.mark.parametrize("loud", (50.0, 200.0, 400.0))
@pytest.mark.parametrize("algorithm", (*CAUSAL, "bidirectional"))
def test_loud_keys_leave_the_past_alone_and_are_forgotten(algorithm, loud):
    """A scale that does not fade loses what follows a forgotten key."""
    rng = np.random.default_rng(0)
    shape = (cases.BATCH, cases.HEADS, 23, 17)
    log_query, log_key = (
        rng.normal(size=shape).astype("float32") for _ in range(2)
    )
    log_key[:, :, 3] += loud
    log_key[0, 1, 14, 3] += loud / 2
    value = cases.inputs(keys=23)[2]
    decay = 10.0 * decays(23)
    tensors = [tf.constant(x) for x in (log_query, log_key, value, decay)]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = attend(algorithm, *tensors[:3], Identity(), decay=tensors[3])
    gradients = tape.gradient(output, tensors)
    assert all(np.isfinite(g).all() for g in gradients)
    arrays = [x.astype("float64") for x in (log_query, log_key, value)]
    faded = reference.fading(decay.astype("float64"), np.ones((2, 23)))
    pairs = arrays[0][..., :, None, :] + arrays[1][..., None, :, :]
    logits = np.log(np.exp(pairs).sum(-1)) + np.log(faded)
    if algorithm in CAUSAL:
        logits = np.where(visible(23, 23, None, True), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(output, weights @ arrays[2], atol=2e-5, rtol=0)


@pytest.mark.parametrize("repeats", (1, 2))
@pytest.mark.parametrize("fades, both_ways", [(0, 0), (1, 0), (1, 1)])
def test_a_block_by_its_exact_form_is_the_fast_one(fades, both_ways, repeats):
    """Where features are of a range that both can take, gradients too."""
    rng = np.random.default_rng(0)
    tokens, width, dim = 64, 5, 3
    shapes = {
        "query": (2, 3, tokens * repeats, width),
        "key": (2, 3, tokens, width),
        "value": (2, 3, tokens, dim),
        "decay": (2, 3, tokens, 1),
        "past": (2, 3, dim + 1, width),
        "future": (2, 3, dim + 1, width),
    }
    arrays = {
        name: tf.constant(rng.random(shape), tf.float32)
        for name, shape in shapes.items()
    }
    maximum = tf.constant(rng.random((2, 3, width)), tf.float32)
    keep = rng.random((2, 1, tokens, 1)) < 0.8
    arrays["decay"] *= 0.1 * tf.cast(keep, tf.float32)
    wanted = [arrays[name] for name in shapes if name != "future" or both_ways]
    if not fades:
        wanted.pop(3)

    def answer(attend):
        with tf.GradientTape() as tape:
            tape.watch(wanted)
            sums, (top, after), exact = attend(
                Identity(),
                *(arrays[name] for name in ("query", "key", "value")),
                arrays["decay"] if fades else None,
                keep=keep,
                state=(maximum, arrays["past"]),
                future=(maximum, arrays["future"]) if both_ways else (),
                repeats=repeats,
            )
            output = sums.values[..., :-1] / sums.values[..., -1:]
            normalizer = tf.math.log(sums.values[..., -1:]) + sums.scale
            state = after * tf.exp(top[..., tf.newaxis, :])
            results = output, normalizer, state
            loss = sum(tf.reduce_sum(tf.square(x)) for x in results)
        assert exact
        return *results, *tape.gradient(loss, wanted)

    pairs = zip(answer(chunks.attend), answer(exact_chunks.attend), strict=True)
    for fast, exact in pairs:
        atol = 1e-5 * np.abs(exact).max()
        np.testing.assert_allclose(fast, exact, atol=atol, rtol=0)
