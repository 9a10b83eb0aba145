"""Weights that depend on the distance: decay and exact near field."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt.ops import block_grid, linear, quadratic, states
from keras_kt.ops import window as near
from tests.helpers import cases, reference
from tests.helpers.contract import layer_contract
from tests.helpers.tensors import (
    Identity,
    array,
    tokens_first,
    visible,
    wrong,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*jit_compile.*")

SHAPE = (2, 11, 6)
ALGORITHMS = ("linear", "step", "quadratic")
# Algorithms with what they can see; a stream is causal.
ROUTES = [(name, True) for name in ALGORITHMS]
ROUTES += [(name, False) for name in ALGORITHMS if name != "step"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of several chunks at the lengths of a test."""
    monkeypatch.setattr(block_grid, "CHUNK_SIZE", 4)
    monkeypatch.setattr(block_grid, "MAX_BLOCK", 8)


def decays(length, seed=5):
    """λ `(batch, heads, length)`, from nearly none to a sharp cut."""
    rng = np.random.default_rng(seed)
    shape = (cases.BATCH, cases.HEADS, length)
    return np.exp(rng.normal(-1.0, 1.5, size=shape)).astype("float32")


def run(algorithm, tensors, bound, kernel, window, mask, causal):
    """Outputs of one algorithm, heads first."""
    query, key, value, decay = tensors
    query, key, value = tokens_first(query, key, value)
    if decay is not None:
        decay = tf.transpose(decay, (0, 2, 1))[..., tf.newaxis]
    masks = {"key_mask": mask, "decay": decay}
    if algorithm == "quadratic":
        output, _ = quadratic.quadratic(
            query,
            key,
            value,
            bound,
            kernel=kernel,
            window=window,
            use_causal_mask=causal,
            **masks,
        )
    elif algorithm == "step":
        output = in_steps(query, key, value, bound, kernel, window, masks)
    elif kernel is not None:
        output, _ = near.near_field(
            query,
            key,
            value,
            bound,
            kernel,
            window,
            use_causal_mask=causal,
            **masks,
        )
    elif causal:
        output, _ = linear.causal(query, key, value, bound, **masks)
    else:
        output = near.fading(query, key, value, bound, decay, key_mask=mask)
    return tokens_first(output)[0]


def in_steps(query, key, value, bound, kernel, window, masks):
    """Single tokens, a longer prefill, and a token again."""
    batch, length, heads, dim = query.shape
    sizes = batch, heads, bound.width, value.shape[-1]
    if kernel is None:
        state = states.initial_state(*sizes)
        step = linear.step
    else:
        state = near.initial_near_field_state(*sizes, dim, window)

        def step(*args, **kwargs):
            return near.near_field(
                *args, kernel, window, use_causal_mask=True, **kwargs
            )

    shapes = [x.shape for x in state]
    outputs = []
    cuts = sorted({0, *(n for n in (1, 2, length - 1) if n > 0), length})
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        part = slice(start, end)
        output, state = step(
            *(x[:, part] for x in (query, key, value)),
            bound,
            state=state,
            **{k: None if x is None else x[:, part] for k, x in masks.items()},
        )
        outputs.append(output)
    assert [x.shape for x in state] == shapes
    return tf.concat(outputs, axis=1)


def tensorflow_answer(algorithm, problem):
    prior, feature_map, arrays, window, mask, causal, upstream = problem
    weights = [*prior.trainable_weights, *feature_map.trainable_weights]
    variables = [w.value for w in weights]
    tensors = [None if x is None else tf.constant(x) for x in arrays.values()]
    wanted = [x for x in tensors if x is not None]
    with tf.GradientTape() as tape:
        tape.watch(wanted)
        frequencies = prior()
        bound = feature_map.bind(frequencies)
        kernel = feature_map.exact_kernel(prior) if window else None
        output = run(algorithm, tensors, bound, kernel, window, mask, causal)
        loss = tf.reduce_sum(output * upstream)
    gradients = tape.gradient(loss, [*wanted, *variables])
    assert all(gradient is not None for gradient in gradients)
    names = [k for k, x in arrays.items() if x is not None]
    names += [cases.name_of(w) for w in weights]
    return output.numpy(), dict(zip(names, gradients, strict=True))


def numpy_answer(problem):
    prior, feature_map, arrays, window, mask, causal, upstream = problem
    arrays = {
        k: x.astype("float64") for k, x in arrays.items() if x is not None
    }
    length = arrays["query"].shape[2]
    keep = np.ones((cases.BATCH, length)) if mask is None else mask
    seen = visible(length, length, mask, causal)
    noise = cases.reference_noise(prior)
    weights = {**cases.weights_of(prior), **cases.weights_of(feature_map)}
    near = reference.distances(keep) < (window or 0)

    def losses(keep_axes=(0, 1), **changed):
        now = {**arrays, **weights, **changed}
        frequencies = cases.reference_frequencies(prior, now, noise)
        kind = cases.reference_kind(feature_map, now)
        pair = now["query"], now["key"]
        phi = [reference.features(x, frequencies, kind) for x in pair]
        matrix = np.einsum("bhtf,bhsf->bhts", *phi)
        if window:
            exact = reference.gaussian_kernel(
                *pair, frequencies, kind["prefactor"]
            )
            matrix = np.where(near, exact, matrix)
        shares = seen
        if "decay" in now:
            shares = seen * reference.fading(now["decay"], keep)
        limit = 1e-2 if kind["map"] == "trigonometric" else 0.0
        output, _ = reference.attention_of(matrix, now["value"], shares, limit)
        if keep_axes is None:
            return output
        other = tuple(axis for axis in range(4) if axis not in keep_axes)
        return (output * upstream).sum(other)

    gradients = {}
    for name, x in arrays.items():
        gradients[name] = reference.complex_step(
            lambda x, name=name: losses(**{name: x}), x, x.ndim - 2
        )
    for name, x in weights.items():
        gradients[name] = reference.complex_step(
            lambda x, name=name: losses((1,), **{name: x}), x, x.ndim - 1
        )
    return losses(None).real, gradients


def mask_of(name, length):
    """No mask, padding on one side, or gaps; `True` has some of each."""
    if not name:
        return None
    if name is True:
        return cases.key_mask(length + 3)[:, :length]
    mask = np.zeros((cases.BATCH, length), "bool")
    if name == "left":
        mask[0, 4:] = mask[1, length - 1 :] = True
    elif name == "right":
        mask[0, : length - 5] = mask[1, :1] = True
    elif name == "nothing":
        mask[0] = True
    else:
        mask[:, ::3] = mask[0, 1] = mask[1, 4:6] = True
    return mask


@functools.cache
def solved(prior_name, map_name, length, window, fades, masked, causal):
    """A problem and its NumPy answer, shared by the algorithms."""
    prior, feature_map = cases.build(prior_name, map_name)
    query, key, value = cases.inputs(length, length)
    scale = cases.DIM**-0.25
    if map_name == "trigonometric":
        scale = 0.5 * cases.DIM**-0.5
    arrays = {
        "query": query * scale,
        "key": key * scale,
        "value": value,
        "decay": decays(length) if fades else None,
    }
    mask = mask_of(masked, length)
    upstream = np.random.default_rng(7).normal(size=value.shape)
    upstream = (upstream / upstream.size**0.5).astype("float32")
    problem = prior, feature_map, arrays, window, mask, causal, upstream
    return problem, numpy_answer(problem)


# Window 0: features at any distance.
OPTIONS = ((0, True), (5, False), (5, True))
PAIRS = (
    ("normal", "positive"),
    ("mixture", "positive-gaussian"),
    ("mixture-mean", "positive-isotropic-one-sided"),
    ("normal-full", "positive"),
    ("normal-mean", "trigonometric"),
)


@pytest.mark.parametrize("causal", (True, False), ids=("causal", "both"))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("window, fades", OPTIONS)
@pytest.mark.parametrize("prior_name, map_name", PAIRS)
def test_outputs_and_gradients_match_float64_numpy(
    prior_name, map_name, window, fades, algorithm, causal
):
    if algorithm == "step" and not causal:
        return
    is_signed = map_name == "trigonometric"
    if is_signed and (window or not causal and algorithm != "quadratic"):
        return  # refused by the layer
    check(algorithm, prior_name, map_name, 11, window, fades, True, causal)


@pytest.mark.parametrize("algorithm, causal", ROUTES)
@pytest.mark.parametrize(
    "mask, window, fades",
    [
        ("nothing", 3, True),
        *(
            (mask, *options)
            for mask in ("left", "right", "inside")
            for options in ((3, True), (3, False), (16, True))
        ),
    ],
)
def test_masked_tokens_take_no_place_in_the_distance(
    mask, window, fades, algorithm, causal
):
    """They pushed real keys out of the window, in the stream for good."""
    check(algorithm, "normal", "positive", 13, window, fades, mask, causal)


@pytest.mark.parametrize("algorithm, causal", ROUTES)
@pytest.mark.parametrize("window, fades", ((0, True), (1, False), (16, True)))
@pytest.mark.parametrize("length", (1, 3, 21))
def test_any_length_matches_float64_numpy(
    length, window, fades, algorithm, causal
):
    check(algorithm, "normal", "positive", length, window, fades, False, causal)


def check(algorithm, *arguments):
    problem, (expected, expected_gradients) = solved(*arguments)
    output, gradients = tensorflow_answer(algorithm, problem)
    np.testing.assert_allclose(output, expected, atol=2e-5, rtol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            gradient,
            expected_gradients[name],
            atol=2e-5,
            rtol=0,
            err_msg=f"gradient to {name}",
        )


@pytest.mark.parametrize("loud", (50.0, 200.0, 400.0))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
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
        output = run(algorithm, tensors, Identity(), None, 0, None, True)
    gradients = tape.gradient(output, tensors)
    assert all(np.isfinite(g).all() for g in gradients)
    arrays = [x.astype("float64") for x in (log_query, log_key, value)]
    faded = reference.fading(decay.astype("float64"), np.ones((2, 23)))
    pairs = arrays[0][..., :, None, :] + arrays[1][..., None, :, :]
    logits = np.log(np.exp(pairs).sum(-1)) + np.log(faded)
    logits = np.where(visible(23, 23, None, True), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(output, weights @ arrays[2], atol=2e-5, rtol=0)


# A signed normalizer that half precision leaves its sign.
SMOOTH = keras_kt.TrigonometricFeatures(smoothing=1.0)
LAYERS = (
    {"decay": "constant"},
    {"decay": "gated"},
    {"decay": "gated", "feature_map": SMOOTH},
    {"near_field": 3},
    {"near_field": 3, "decay": "gated", "spectral_prior": "mixture"},
)


def name_of(options):
    return "-".join(options) if isinstance(options, dict) else str(options)


def make(**options):
    return keras_kt.KernelizedAttention(3, 5, seed=1, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, causal",
    [*((options, True) for options in LAYERS), (LAYERS[-1], False)],
    ids=name_of,
)
def test_contract_of_the_options(options, causal, tmp_path):
    layer_contract(
        lambda: make(**options),
        (SHAPE, SHAPE),
        tmp_path,
        call={"use_causal_mask": causal},
        jit_fit=options == LAYERS[0],
    )
    config = make(**options).get_config()
    for name in ("decay", "near_field"):
        assert config[name] == options.get(name)


@pytest.mark.parametrize("poison", (np.nan, np.inf, 1e30))
@pytest.mark.parametrize("causal", (True, False), ids=("causal", "both"))
@pytest.mark.parametrize("options", LAYERS, ids=name_of)
def test_padded_content_changes_neither_output_nor_gradients(
    options, causal, poison
):
    if not causal and "feature_map" in options:
        options = {**options, "implementation": "quadratic"}
    layer = make(**options)
    x = array(SHAPE)
    mask = np.arange(11) < np.array([[7], [11]])
    answers = []
    for fill in (0.0, poison):
        data = tf.constant(np.where(mask[..., None], x, np.float32(fill)))
        if not layer.built:
            layer.build(data.shape, data.shape)
        with tf.GradientTape() as tape:
            output = layer(
                data,
                data,
                query_mask=mask,
                value_mask=mask,
                use_causal_mask=causal,
            )
            loss = tf.reduce_sum(output)
        weights = [w.value for w in layer.trainable_weights]
        answers.append([output, *tape.gradient(loss, weights)])
    for clean, dirty in zip(*answers, strict=True):
        np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("options", LAYERS, ids=name_of)
def test_steps_of_any_size_equal_the_causal_call(options):
    layer = make(**options)
    x = array((2, 90, 6))
    mask = np.ones((2, 90), "bool")
    mask[0, :4] = mask[1, 50:55] = False
    expected = layer(x, x, value_mask=mask, use_causal_mask=True)
    for cuts in ((0, 90), (0, 1, 2, 70, 90), (0, 89, 90)):
        state, outputs = layer.initial_state(2), []
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            output, state = layer.step(
                x[:, start:end], state, value_mask=mask[:, start:end]
            )
            outputs.append(output)
        np.testing.assert_allclose(
            np.concatenate(outputs, 1), expected, atol=2e-5
        )


def test_masked_tokens_leave_a_fading_state_alone():
    layer = make(decay="gated")
    x = array(SHAPE)
    _, state = layer.step(x, layer.initial_state(2))
    for count in (1, 3):
        _, after = layer.step(
            1e6 * x[:, :count], state, value_mask=np.zeros((2, count), "bool")
        )
        for old, new in zip(state, after, strict=True):
            np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("options", LAYERS[3:], ids=name_of)
def test_a_stream_with_a_window_is_served(options, tmp_path):
    layer = make(**options)
    x = array(SHAPE)
    expected = layer(x, x, use_causal_mask=True)
    folder = keras_kt.export_saved_model(
        layer,
        tmp_path,
        input_signature=[
            tf.TensorSpec((None, None, 6), name=name)
            for name in ("query", "value")
        ],
        streaming=True,
    )
    artifact = tf.saved_model.load(folder)
    served = artifact.signatures
    state = served["initial_state"](batch_size=tf.constant(2))
    assert "state_0_keep" in state
    result = served["prefill"](query=tf.constant(x[:, :10]), **state)
    result.pop("output_0")
    result = served["decode"](query=tf.constant(x[:, 10:]), **result)
    np.testing.assert_allclose(result["output_0"], expected[:, 10:], atol=1e-5)


@pytest.mark.parametrize("lengths", ((5, 9), (9, 5)))
@pytest.mark.parametrize("causal", (True, False), ids=("causal", "both"))
@pytest.mark.parametrize("options", (LAYERS[1], *LAYERS[3:]), ids=name_of)
def test_lengths_that_differ_match_quadratic(options, causal, lengths):
    layers = [
        make(implementation=route, **options)
        for route in ("linear", "quadratic")
    ]
    query, value = (array((2, n, 6), n) for n in lengths)
    for layer in layers:
        layer.build(query.shape, value.shape)
    layers[1].set_weights(layers[0].get_weights())
    outputs = [x(query, value, use_causal_mask=causal) for x in layers]
    np.testing.assert_allclose(*outputs, atol=1e-5)
    spec = [tf.TensorSpec((None, None, 6))] * 2
    dynamic = tf.function(
        lambda q, v: layers[0](q, v, use_causal_mask=causal),
        input_signature=spec,
    )
    np.testing.assert_allclose(dynamic(query, value), outputs[0], atol=1e-5)


def test_scores_are_the_weights_that_made_the_output():
    layer = make(near_field=3, decay="constant")
    x = array(SHAPE)
    output, scores = layer(x, x, return_attention_scores=True)
    np.testing.assert_allclose(tf.reduce_sum(scores, -1), 1.0, atol=1e-5)
    np.testing.assert_allclose(layer(x, x), output, atol=1e-5)


def test_a_window_of_the_whole_length_is_softmax_attention():
    theirs = keras.layers.MultiHeadAttention(3, 5)
    ours = make(near_field=16)
    for layer in (theirs, ours):
        layer.build(SHAPE, SHAPE)
    ours.set_weights([*theirs.get_weights(), *ours.get_weights()[8:]])
    x = array(SHAPE, scale=3.0)
    for causal in (False, True):
        np.testing.assert_allclose(
            ours(x, x, use_causal_mask=causal),
            theirs(x, x, use_causal_mask=causal),
            atol=2e-5,
        )


def test_what_has_no_meaning_is_refused():
    wrong("`decay` must be one of", lambda: make(decay="fast"))
    wrong("argument `near_field`", lambda: make(near_field=0))
    for options in (
        {"feature_map": "trigonometric"},
        {"spectral_prior": "generator"},
        {"spectral_prior": "fastfood"},
    ):
        wrong(
            "closed form: positive features of a NormalPrior or MixturePrior",
            lambda options=options: make(near_field=3, **options),
        )
    grid = array((2, 3, 4, 6))
    wrong("single attention axis", lambda: make(decay="gated")(grid, grid))
    wrong("single attention axis", lambda: make(near_field=2)(grid, grid))
    x = array(SHAPE)
    signed = make(decay="gated", feature_map="trigonometric")
    wrong(
        "`use_causal_mask=True` or the attention matrix", lambda: signed(x, x)
    )
    layer = make(near_field=3)
    state = make().initial_state(2)
    wrong("`state` must be a NearFieldState", lambda: layer.step(x, state))
