"""Layers whose weights depend on the distance: decay, near field, window."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers.contract import exhaustive, layer_contract, one_in
from tests.helpers.tensors import array, wrong

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*jit_compile.*"),
    pytest.mark.usefixtures("small_blocks"),
]

SHAPE = (2, 11, 6)
# A signed normalizer that half precision leaves its sign.
SMOOTH = keras_kt.TrigonometricFeatures(smoothing=1.0)
LAYERS = (
    {"decay": "constant"},
    {"decay": "gated"},
    {"decay": "gated", "feature_map": SMOOTH},
    {"near_field": 3},
    {"near_field": 3, "decay": "gated", "spectral_prior": "mixture"},
    {"sliding_window": 3, "decay": "gated"},
    {"sliding_window": 3, "feature_map": SMOOTH},
)


def name_of(options):
    return "-".join(options) if isinstance(options, dict) else str(options)


def make(**options):
    return keras_kt.KernelizedAttention(3, 5, seed=1, **options)


# These have decay, near field and window; the others repeat them.
MIXED = LAYERS[2], LAYERS[4], LAYERS[6]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, causal",
    [
        *(
            (options, True) if options in MIXED else exhaustive(options, True)
            for options in LAYERS
        ),
        (LAYERS[2], False),
        (LAYERS[4], False),
    ],
    ids=name_of,
)
def test_contract_of_the_options(options, causal, tmp_path):
    layer_contract(
        lambda: make(**options),
        (SHAPE, SHAPE),
        tmp_path,
        call={"use_causal_mask": causal},
        jit_fit=options in (LAYERS[0], LAYERS[2]),
    )
    config = make(**options).get_config()
    for name in ("decay", "near_field", "sliding_window"):
        assert config[name] == options.get(name)


@pytest.mark.parametrize("causal", (True, False), ids=("causal", "both"))
@pytest.mark.parametrize("options", one_in(3, LAYERS), ids=name_of)
def test_padded_content_changes_neither_output_nor_gradients(options, causal):
    if not causal and options == LAYERS[2]:
        options = {**options, "implementation": "quadratic"}
    layer = make(**options)
    x = array(SHAPE)
    mask = np.arange(11) < np.array([[7], [11]])
    layer.build(SHAPE, SHAPE)
    weights = [w.value for w in layer.trainable_weights]
    # One poison for all padded tokens, then another for each.
    mixed = np.resize([1e30, np.inf, np.nan], (1, 11, 1))
    answers = []
    for fill in (0.0, np.nan, mixed):
        fill = np.asarray(fill, "float32")
        data = tf.constant(np.where(mask[..., None], x, fill))
        with tf.GradientTape() as tape:
            output = layer(
                data,
                data,
                query_mask=mask,
                value_mask=mask,
                use_causal_mask=causal,
            )
            loss = tf.reduce_sum(output)
        answers.append([output, *tape.gradient(loss, weights)])
    for dirty in answers[1:]:
        for one, other in zip(answers[0], dirty, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("options", one_in(3, LAYERS), ids=name_of)
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
        tf.nest.map_structure(np.testing.assert_array_equal, after, state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [x if x in MIXED else exhaustive(x) for x in LAYERS[3:]],
    ids=name_of,
)
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


@pytest.mark.slow
@pytest.mark.parametrize("lengths", ((5, 9), (9, 5)))
@pytest.mark.parametrize("causal", (True, False), ids=("causal", "both"))
@pytest.mark.parametrize("options", (LAYERS[1], *LAYERS[3:5]), ids=name_of)
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
    layer = make(near_field=3)
    state = make().initial_state(2)
    wrong("`state` must be a NearFieldState", lambda: layer.step(x, state))
