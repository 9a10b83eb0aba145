"""Attention to a window of tokens, and to nothing beyond it."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt import ops
from tests.helpers import blocks, cases, problems, reference
from tests.helpers.contract import exhaustive, layer_contract
from tests.helpers.problems import ALGORITHMS, CAUSAL, TRIGONOMETRIC
from tests.helpers.tensors import Identity, array, visible, wrong

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*jit_compile.*"),
    pytest.mark.usefixtures("small_blocks"),
]

CLOSED_FORM = ("normal", "positive")
# By a kernel in closed form, of one and of two components; by features.
MAPS = {
    "closed form": CLOSED_FORM,
    "mixture": ("mixture", "positive-gaussian"),
    "self-normalized": ("mixture-mean", "positive-self"),
    "features": ("generator", "positive"),
    "signed": TRIGONOMETRIC,
    "identity": problems.IDENTITY,
}
LAYERS = (
    {},
    {"decay": "gated"},
    {"spectral_prior": "mixture", "qk_norm": "l2"},
    {"spectral_prior": "generator"},
    {"feature_map": keras_kt.TrigonometricFeatures(smoothing=1.0)},
)
HEADS, DIM, WIDTH = 3, 5, 6
SHAPE = 2, 11, WIDTH


def name_of(options):
    return "-".join(options) or "plain" if isinstance(options, dict) else None


def quick_if(is_quick, *case):
    """Cases that cross what others cover one by one are slow."""
    return pytest.param(*case, marks=() if is_quick else pytest.mark.slow)


# What is quick: both walks, and the ring from call to call.
WALKS = "bidirectional", "steps"
BOTH_WAYS = pytest.mark.parametrize(
    "causal",
    (True, quick_if(False, False)),
    ids=("causal", "both"),
)


def make(window=3, **options):
    options = {"sliding_window": window, "seed": 1, **options}
    return keras_kt.KernelizedAttention(HEADS, DIM, **options)


def softmax(window, shape):
    """A MultiHeadAttention, and ours with its projections, both built."""
    theirs = keras.layers.MultiHeadAttention(HEADS, DIM, sliding_window=window)
    theirs.build(shape, shape)

    def ours(**options):
        layer = make(window, **options)
        layer.build(shape, shape)
        own = layer.get_weights()[len(theirs.weights) :]
        layer.set_weights([*theirs.get_weights(), *own])
        return layer

    return theirs, ours


@pytest.mark.parametrize(
    "name, fades, algorithm",
    [
        quick_if(
            fades
            and name in ("closed form", "features", "signed")
            and algorithm in WALKS,
            *(name, fades, algorithm),
        )
        for name, fades, algorithm in itertools.product(
            MAPS, (True, False), ALGORITHMS
        )
    ],
)
def test_outputs_and_gradients_match_float64_numpy(name, fades, algorithm):
    problems.check(
        algorithm, MAPS[name], near=4, has_far=False, fades=fades, masked=True
    )


@pytest.mark.parametrize(
    "length, near, algorithm",
    [
        quick_if(length < 5 and algorithm in WALKS, length, near, algorithm)
        for (length, near), algorithm in itertools.product(
            ((1, 1), (3, 5), (5, 5), (21, 1), (21, 2), (21, 16)), ALGORITHMS
        )
    ],
)
def test_any_length_and_window_match_float64_numpy(length, near, algorithm):
    problems.check(
        algorithm, CLOSED_FORM, length=length, near=near, has_far=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("mask", ("left", "right", "inside", "nothing"))
@pytest.mark.parametrize("name", ("closed form", "signed"))
def test_masked_tokens_take_no_place_in_the_window(name, mask, algorithm):
    fades = not (name == "signed" and algorithm == "bidirectional")
    problems.check(
        algorithm,
        MAPS[name],
        length=13,
        near=3,
        has_far=False,
        fades=fades,
        masked=mask,
    )


@pytest.mark.parametrize(
    "masked, algorithm",
    (
        (True, "causal"),
        quick_if(False, None, "causal"),
        quick_if(False, True, "bidirectional"),
        quick_if(False, None, "bidirectional"),
    ),
)
def test_sequences_may_go_one_by_one(algorithm, masked, monkeypatch):
    """As they do where one alone fills a block."""
    blocks.cut_small(monkeypatch, band_entries=1)
    problems.check(
        algorithm, CLOSED_FORM, near=6, has_far=False, fades=True, masked=masked
    )


@pytest.mark.parametrize(
    "algorithm, loud",
    [
        quick_if(case == ("causal", 200.0), *case)
        for case in itertools.product(
            ("bidirectional", *CAUSAL), (50.0, 200.0, 400.0)
        )
    ],
)
def test_features_of_any_range_are_weighed_pair_by_pair(algorithm, loud):
    """A loud key in the block hid the others, of rows that do not see it."""
    rng = np.random.default_rng(0)
    shape = (cases.BATCH, cases.HEADS, 23, 17)
    log_query, log_key = (
        rng.normal(size=shape).astype("float32") for _ in range(2)
    )
    log_key[:, :, 7] += loud
    value = cases.inputs(keys=23)[2]
    tensors = [tf.constant(x) for x in (log_query, log_key, value)]
    near = ops.NearField(None, 5, has_far=False)
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = problems.attend(algorithm, *tensors, Identity(), near=near)
    assert all(np.isfinite(g).all() for g in tape.gradient(output, tensors))
    seen = visible(23, 23, None, algorithm in CAUSAL)
    places = np.arange(23)
    seen = seen & (np.abs(places[:, None] - places) < 5)
    arrays = (x.astype("float64") for x in (log_query, log_key, value))
    expected = reference.log_attention(*arrays, seen)
    np.testing.assert_allclose(output, expected, atol=2e-5)


@BOTH_WAYS
@pytest.mark.parametrize(
    "window", (3, *(quick_if(False, n) for n in (1, 16, 50)))
)
def test_it_is_multi_head_attentions_window(window, causal):
    """Of padded batches, too, wherever the padding stands."""
    shape = 2, 37, WIDTH
    theirs, ours = softmax(window, shape)
    x = array(shape, scale=3.0)
    for side in (None, "left", "right"):
        mask = np.ones(shape[:2], "bool")
        if side:
            mask[0, slice(9) if side == "left" else slice(-9, None)] = False
        call = {"value_mask": mask, "query_mask": mask}
        call["use_causal_mask"] = causal
        expected = theirs(x, x, **call)
        for route in ("linear", "quadratic"):
            output = ours(implementation=route)(x, x, **call)
            np.testing.assert_allclose(output[mask], expected[mask], atol=2e-5)


def test_scores_are_multi_head_attentions():
    theirs, ours = softmax(3, SHAPE)
    x = array(SHAPE)
    layer = ours()
    expected, weights = theirs(x, x, return_attention_scores=True)
    output, scores = layer(x, x, return_attention_scores=True)
    np.testing.assert_allclose(scores, weights, atol=1e-5)
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_a_dense_mask_hides_more():
    theirs, ours = softmax(4, SHAPE)
    x = array(SHAPE)
    mask = np.random.default_rng(0).random((2, 11, 11)) < 0.6
    mask |= np.eye(11, dtype="bool")
    layer = ours()
    with pytest.warns(UserWarning, match="dense mask"):
        output = layer(x, x, attention_mask=mask)
    expected = theirs(x, x, attention_mask=mask)
    np.testing.assert_allclose(output, expected, atol=1e-5)


@BOTH_WAYS
@pytest.mark.parametrize(
    "options",
    (*LAYERS[:1], *(quick_if(False, x) for x in LAYERS[1:])),
    ids=name_of,
)
def test_routes_agree(options, causal):
    layers = [
        make(4, implementation=route, **options)
        for route in ("linear", "quadratic", "auto")
    ]
    x = array((2, 41, WIDTH))
    mask = np.random.default_rng(1).random((2, 41)) < 0.8
    for layer in layers:
        layer.build(x.shape, x.shape)
        layer.set_weights(layers[0].get_weights())
    outputs = [
        layer(x, x, value_mask=mask, use_causal_mask=causal) for layer in layers
    ]
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=2e-5)


@BOTH_WAYS
@pytest.mark.parametrize("options", ({}, {"decay": "constant"}), ids=name_of)
def test_query_heads_that_share_keys_match_the_matrix(options, causal):
    layers = [
        keras_kt.LinearAttention(
            4,
            5,
            7,
            2,
            sliding_window=3,
            seed=1,
            implementation=route,
            **options,
        )
        for route in ("linear", "quadratic")
    ]
    shapes = (2, 23, 4, 5), (2, 23, 2, 5), (2, 23, 2, 7)
    tensors = [tf.constant(array(shape, i)) for i, shape in enumerate(shapes)]
    answers = []
    for layer in layers:
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = layer(*tensors, use_causal_mask=causal)
            loss = tf.reduce_sum(output * array(output.shape, 9))
        weights = [w.value for w in layer.trainable_weights]
        answers.append([output, *tape.gradient(loss, [*tensors, *weights])])
    for one, other in zip(*answers, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)


@pytest.mark.parametrize(
    "options",
    (*LAYERS[:2], *(quick_if(False, x) for x in LAYERS[2:])),
    ids=name_of,
)
def test_steps_of_any_size_equal_the_causal_call(options):
    layer = make(5, **options)
    x = array((2, 40, WIDTH))
    mask = np.ones((2, 40), "bool")
    mask[0, :4] = mask[1, 20:27] = mask[0, 38] = False
    expected = layer(x, x, value_mask=mask, use_causal_mask=True)
    for cuts in ((0, 40), (0, 1, 2, 31, 40), (0, 38, 39, 40)):
        state, outputs = layer.initial_state(2), []
        assert isinstance(state, keras_kt.WindowState)
        shapes = [x.shape for x in state]
        for start, end in itertools.pairwise(cuts):
            output, state = layer.step(
                x[:, start:end], state, value_mask=mask[:, start:end]
            )
            outputs.append(output)
            assert [x.shape for x in state] == shapes
        output = np.concatenate(outputs, 1)
        np.testing.assert_allclose(output, expected, atol=2e-5)


def test_a_state_has_the_gradient_of_what_is_in_it():
    """Through the ring of a first half to the outputs of the second."""
    layer = make(5)
    x = tf.constant(array((2, 22, WIDTH)))
    gradients = []
    for in_steps in (False, True):
        with tf.GradientTape() as tape:
            tape.watch(x)
            if in_steps:
                _, state = layer.step(x[:, :11], layer.initial_state(2))
                output, _ = layer.step(x[:, 11:], state)
            else:
                output = layer(x, x, use_causal_mask=True)[:, 11:]
            loss = tf.reduce_sum(output * array(output.shape, 3))
        gradients.append(tape.gradient(loss, x))
    assert np.abs(gradients[0][:, 7:11]).max() > 1e-3
    np.testing.assert_allclose(*gradients, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("causal", (True, False), ids=("causal", "both"))
def test_compiled_and_of_dynamic_length_it_is_the_same(causal):
    layer = make(4, implementation="linear")
    layer.build(SHAPE, SHAPE)
    weights = [w.value for w in layer.trainable_weights]

    def answer(x, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = layer(x, x, value_mask=mask, use_causal_mask=causal)
            loss = tf.reduce_sum(tf.square(output))
        return output, *tape.gradient(loss, [x, *weights])

    dynamic = tf.function(
        answer,
        input_signature=[
            tf.TensorSpec((None, None, WIDTH)),
            tf.TensorSpec((None, None), tf.bool),
        ],
    )
    compiled = tf.function(answer, jit_compile=True)
    for length in (1, 3, 23):
        x = tf.constant(array((3, length, WIDTH)))
        mask = np.random.default_rng(2).random((3, length)) < 0.8
        mask = tf.constant(mask)
        expected = answer(x, mask)
        functions = [dynamic] if length < 23 else [dynamic, compiled]
        for function in functions:
            for one, other in zip(function(x, mask), expected, strict=True):
                np.testing.assert_allclose(one, other, atol=5e-5)


def sizes_in(graph):
    """Numbers of elements of the tensors that a graph makes, loops too."""
    functions = [f.graph for f in graph._functions.values()]
    for each in (graph, *functions):
        for operation in each.get_operations():
            for x in operation.outputs:
                if x.shape.is_fully_defined():
                    yield x.shape.num_elements()


def test_nothing_of_the_size_of_length_times_window_is_formed():
    """Forwards or backwards; the near field formed its band at once."""
    length, window = 2048, 128
    for has_far in (False, True):
        bound, near = problems.bind(
            *problems.built(*CLOSED_FORM), near=window, has_far=has_far
        )
        shape = 1, length, cases.HEADS, cases.DIM
        specs = [tf.TensorSpec(shape)] * 3

        def step(*tensors, bound=bound, near=near):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                output, _ = ops.attend(*tensors, bound, causal=True, near=near)
                loss = tf.reduce_sum(tf.square(output))
            return tape.gradient(loss, tensors)

        function = tf.function(step, autograph=False)
        graph = function.get_concrete_function(*specs).graph
        whole = length * window * cases.HEADS
        assert max(sizes_in(graph)) < whole / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [LAYERS[2], exhaustive(LAYERS[3])], ids=name_of
)
def test_contract(options, tmp_path):
    layer_contract(lambda: make(**options), (SHAPE, SHAPE), tmp_path)


@pytest.mark.slow
def test_contract_of_heads(tmp_path):
    layer_contract(
        lambda: keras_kt.LinearAttention(4, 5, 7, 2, sliding_window=3, seed=1),
        ((2, 11, 4, 5), (2, 11, 2, 5), (2, 11, 2, 7)),
        tmp_path,
        call={"use_causal_mask": True},
        known=2,
        jit_fit=True,
    )


def test_what_has_no_meaning_is_refused():
    wrong("argument `sliding_window`", lambda: make(0))
    wrong("only one of them can be", lambda: make(3, near_field=2))
    layer = make()
    query, value = array((2, 5, WIDTH)), array((2, 9, WIDTH))
    for route in ("linear", "quadratic", "auto"):
        layer = make(implementation=route)
        wrong(
            "in cross-attention nothing is near.*sliding_window=3",
            lambda layer=layer: layer(query, value),
        )
    heads = keras_kt.LinearAttention(HEADS, DIM, sliding_window=3)
    few, many = array((2, 5, HEADS, DIM)), array((2, 9, HEADS, DIM))
    wrong("in cross-attention", lambda: heads(few, many, many))
    grid = array((2, 3, 4, WIDTH))
    wrong("single attention axis", lambda: make()(grid, grid))
    state = keras_kt.KernelizedAttention(HEADS, DIM).initial_state(2)
    wrong("`state` must be a WindowState", lambda: make().step(query, state))
