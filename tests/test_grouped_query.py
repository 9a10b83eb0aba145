"""KernelizedGroupedQueryAttention: GroupQueryAttention's contract.

What it shares with KernelizedAttention is tested there, and Keras's own tests
are run by `make conformance`.
"""

import inspect
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers.contract import layer_contract, one_quick
from tests.helpers.tensors import array, wrong

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*jit_compile.*"),
    pytest.mark.filterwarnings("ignore:.*costs O.length²"),
]

HEADS, FEW, DIM = 6, 3, 4
QUERY, KEYS = (2, 11, 7), (2, 13, 7)


def make(**kwargs):
    return keras_kt.KernelizedGroupedQueryAttention(
        DIM, HEADS, FEW, **{"seed": 1, **kwargs}
    )


def theirs(**kwargs):
    return keras.layers.GroupQueryAttention(DIM, HEADS, FEW, **kwargs)


def pair(query=QUERY, value=KEYS, key=None, ours=None, **kwargs):
    """Keras's layer and ours, with the same weights first."""
    layers = theirs(**kwargs), make(**kwargs, **(ours or {}))
    for layer in layers:
        layer.build(query, value, key)
    set_first(layers[1], layers[0])
    return layers


def set_first(ours, theirs):
    count = len(theirs.weights)
    ours.set_weights([*random_weights(theirs), *ours.get_weights()[count:]])


def random_weights(layer):
    """Biases too are random, so that none can be forgotten."""
    weights = [
        w + 0.1 * array(w.shape, seed=i)
        for i, w in enumerate(layer.get_weights())
    ]
    layer.set_weights(weights)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, causal",
    one_quick(
        [
            ({"decay": "gated", "near_field": 3, "dropout": 0.3}, True),
            ({"use_gate": True, "use_bias": False}, False),
            ({"qk_norm": "l2", "rotary_max_wavelength": 30.0}, True),
            ({"sliding_window": 3, "redraw": "step"}, True),
        ]
    ),
)
def test_contract(arguments, causal, tmp_path):
    layer_contract(
        lambda: make(**arguments),
        (QUERY, QUERY),
        tmp_path,
        call={"use_causal_mask": causal},
        jit_fit="use_gate" in arguments,
    )


def test_the_arguments_are_keras_layers_in_their_order():
    mine = inspect.signature(keras_kt.KernelizedGroupedQueryAttention)
    reference = inspect.signature(keras.layers.GroupQueryAttention)
    count = len(reference.parameters) - 1
    for one, other in zip(
        list(mine.parameters.values())[:count],
        list(reference.parameters.values())[:count],
        strict=True,
    ):
        assert (one.name, one.default, one.kind) == (
            other.name,
            other.default,
            other.kind,
        )
    for method in ("call", "build", "compute_output_shape"):
        mine, reference = (
            inspect.signature(getattr(kind, method)).parameters
            for kind in (
                keras_kt.KernelizedGroupedQueryAttention,
                keras.layers.GroupQueryAttention,
            )
        )
        assert list(mine) == list(reference)
    # The rest are KernelizedAttention's.
    options = [
        {
            name: x.default
            for name, x in inspect.signature(kind).parameters.items()
            if x.kind is x.KEYWORD_ONLY
        }
        for kind in (
            keras_kt.KernelizedAttention,
            keras_kt.KernelizedGroupedQueryAttention,
        )
    ]
    assert options[0] == options[1]


def test_every_argument_survives_the_config():
    arguments = {
        "head_dim": 4,
        "num_query_heads": 6,
        "num_key_value_heads": 3,
        "dropout": 0.25,
        "use_bias": False,
        "sliding_window": 2,
        "use_gate": True,
        "seed": 5,
        "num_features": 16,
        "qk_norm": "l2",
        "redraw": "step",
        "implementation": "quadratic",
        "decay": "gated",
        "near_field": None,
        "rotary_max_wavelength": 100.0,
        "spectral_pace": 2.0,
        "name": "mine",
        "trainable": False,
    }
    objects = {
        "kernel_initializer": "he_normal",
        "bias_initializer": "ones",
        "kernel_regularizer": "l2",
        "bias_regularizer": "l1",
        "activity_regularizer": "l1",
        "kernel_constraint": "max_norm",
        "bias_constraint": "non_neg",
        "spectral_prior": "mixture",
        "feature_map": keras_kt.PositiveFeatures("gaussian"),
    }
    layer = keras_kt.KernelizedGroupedQueryAttention(**arguments, **objects)
    config = layer.get_config()
    assert {name: config[name] for name in arguments} == arguments
    again = keras_kt.KernelizedGroupedQueryAttention.from_config(config)
    assert again.get_config() == config
    default = make().get_config()
    for name in objects:
        assert config[name] != default[name], name
    assert set(arguments) | set(objects) | {"dtype"} == set(config)
    # Whatever Keras's layer is configured by, ours is.
    assert set(theirs().get_config()) <= set(config)
    plain = theirs(use_gate=True, sliding_window=3, dropout=0.5).get_config()
    made = keras_kt.KernelizedGroupedQueryAttention.from_config(plain)
    for name in ("head_dim", "sliding_window", "dropout", "use_gate"):
        assert made.get_config()[name] == plain[name]


@pytest.mark.parametrize("use_gate", (False, True))
@pytest.mark.parametrize("use_bias", (False, True))
def test_first_weights_are_group_query_attentions(use_gate, use_bias):
    reference, ours = pair(use_gate=use_gate, use_bias=use_bias)
    count = len(reference.weights)
    assert count == (4 + use_gate) * (1 + use_bias)
    for one, other in zip(ours.weights, reference.weights, strict=False):
        assert one.path.split("/")[1:] == other.path.split("/")[1:]
        np.testing.assert_array_equal(one, other)
    assert len(ours.weights) == count + 2


def masks(shape, seed):
    mask = np.random.default_rng(seed).random(shape[:2]) < 0.7
    mask[:, 0] = True
    return mask


# All keys are near, and the kernel of the default prior is softmax.
EXACT = {"near_field": 16}


@pytest.mark.parametrize("use_gate", (False, True))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("route", ("linear", "quadratic"))
def test_the_closed_form_is_group_query_attention(causal, use_gate, route):
    """Outputs and gradients, with masks, of a query, a value and a key."""
    options = {**EXACT, "implementation": route}
    reference, ours = pair(use_gate=use_gate, ours=options)
    tensors = [
        tf.constant(array(shape, seed=i, scale=2.0))
        for i, shape in enumerate((QUERY, KEYS, KEYS))
    ]
    call = {
        "query_mask": masks(QUERY, 1),
        "value_mask": masks(KEYS, 2),
        "key_mask": masks(KEYS, 3),
        "use_causal_mask": causal,
    }
    # Keras gives a masked query the mean of all values, and we nothing.
    seen = call["query_mask"]
    answers = []
    for layer in (reference, ours):
        count = len(reference.trainable_weights)
        weights = [w.value for w in layer.trainable_weights[:count]]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = layer(*tensors, **call)
            loss = tf.reduce_sum(tf.sin(output[seen]))
        gradients = tape.gradient(loss, [*tensors, *weights])
        answers.append([output[seen], *gradients])
    for one, other in zip(*answers, strict=True):
        scale = max(1.0, np.abs(other).max())
        np.testing.assert_allclose(one / scale, other / scale, atol=2e-5)


def test_scores_have_keras_layers_shape_and_values():
    reference, ours = pair(ours=EXACT)
    x = array(QUERY), array(KEYS)
    expected = reference(*x, return_attention_scores=True)
    found = ours(*x, return_attention_scores=True)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=1e-5)
    inputs = [keras.Input(shape[1:]) for shape in (QUERY, KEYS)]
    symbolic = ours(*inputs, return_attention_scores=True)
    for one, other in zip(symbolic, expected, strict=True):
        assert tuple(one.shape[1:]) == tuple(other.shape[1:])


@pytest.mark.parametrize("causal", (False, True))
def test_a_sliding_window_is_keras_layers(causal):
    reference, ours = pair(value=QUERY, sliding_window=3)
    x = array(QUERY, scale=2.0)
    expected = reference(x, x, use_causal_mask=causal)
    output = ours(x, x, use_causal_mask=causal)
    np.testing.assert_allclose(output, expected, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    ({}, {"near_field": 3, "decay": "gated"}, {"rotary_max_wavelength": 30.0}),
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("causal", (False, True))
def test_as_many_heads_of_each_are_kernelized_attention(options, causal):
    ours = keras_kt.KernelizedGroupedQueryAttention(
        DIM, 3, 3, seed=1, **options
    )
    other = keras_kt.KernelizedAttention(3, DIM, seed=1, **options)
    for layer in (ours, other):
        layer.build(QUERY, QUERY)
    random_weights(other)
    ours.set_weights(other.get_weights())
    x, mask = array(QUERY), masks(QUERY, 1)
    outputs = [
        layer(x, x, query_mask=mask, value_mask=mask, use_causal_mask=causal)
        for layer in (ours, other)
    ]
    np.testing.assert_allclose(*outputs, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"feature_map": "trigonometric"},
        {"feature_map": "trigonometric", "qk_norm": "weighted"},
        {"decay": "gated", "near_field": 3, "rotary_max_wavelength": 30.0},
        {"sliding_window": 3, "rotary_max_wavelength": 30.0},
    ),
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("is_masked", (False, True))
def test_steps_equal_the_causal_call(options, is_masked):
    layer = make(**options)
    layer.build(QUERY, QUERY)
    random_weights(layer)
    x = array(QUERY)
    mask = masks(QUERY, 4) if is_masked else np.ones(QUERY[:2], "bool")
    expected = layer(
        x, x, query_mask=mask, value_mask=mask, use_causal_mask=True
    )
    for cuts in ((0, 11), (0, 1, 5, 11)):
        state, outputs = layer.initial_state(2), []
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            part = slice(start, end)
            output, state = layer.step(
                x[:, part],
                state,
                query_mask=mask[:, part],
                value_mask=mask[:, part],
            )
            outputs.append(output)
        np.testing.assert_allclose(tf.concat(outputs, 1), expected, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    ({}, {"near_field": 5}, {"sliding_window": 5}),
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_state_is_of_key_value_heads(options):
    """8 query heads on 2: a quarter of the state, and of key features."""
    grouped = keras_kt.KernelizedGroupedQueryAttention(8, 8, 2, **options)
    full = keras_kt.KernelizedAttention(8, 8, **options)
    sizes = []
    for layer in (grouped, full):
        layer.build(QUERY, QUERY)
        state = layer.initial_state(2)
        shapes = tf.nest.map_structure(lambda x: (None, *x.shape[1:]), state)
        assert shapes == layer.state_shapes
        # But for one flag a token of the window, which has no heads.
        leaves = [x for x in tf.nest.flatten(state) if x.shape.rank > 2]
        sizes.append(sum(np.prod(x.shape) for x in leaves))
    assert sizes[1] == 4 * sizes[0]
    assert grouped.spectral_prior.base_noise.shape[0] == 2
    query, key = (
        grouped.query_dense(array(QUERY)),
        grouped.key_dense(array(KEYS)),
    )
    _, scaled = grouped.scaled(query, key)
    features = grouped.bound().keys(tf.transpose(scaled, (0, 2, 1, 3)))
    assert features.shape[1] == 2


def test_values_of_another_width_are_refused_as_in_keras():
    layer = make()
    for shapes in (
        (QUERY, (2, 13, 5)),
        (QUERY, KEYS, (2, 11, 7)),
    ):
        wrong("must be equal", lambda s=shapes: layer.compute_output_shape(*s))
    # A key may have a width of its own.
    assert layer.compute_output_shape(QUERY, KEYS, (2, 13, 5)) == QUERY
    x = array(QUERY), array(KEYS), array((2, 13, 5))
    assert layer(*x).shape == QUERY


def test_wrong_sizes_are_named_as_they_were_given():
    for name in ("head_dim", "num_query_heads", "num_key_value_heads"):
        sizes = {"head_dim": 4, "num_query_heads": 6, "num_key_value_heads": 3}
        for bad in (0, 2.5, None):
            wrong(
                f"`{name}`",
                lambda sizes={**sizes, name: bad}: (
                    keras_kt.KernelizedGroupedQueryAttention(**sizes)
                ),
            )
    wrong(
        "`num_query_heads` must be divisible by `num_key_value_heads`.*=4",
        lambda: keras_kt.KernelizedGroupedQueryAttention(4, 6, 4),
    )
    wrong("sliding_window", lambda: make(sliding_window=0))
    with pytest.warns(UserWarning, match="KernelizedGroupedQueryAttention"):
        make(flash_attention=True)


def test_files_of_keras_layer_say_how_to_load_them(tmp_path):
    x = keras.Input((None, 7))
    softmax, ours = theirs(name="attention"), make(name="attention")
    theirs_model = keras.Model(x, softmax(x, x))
    ours_model = keras.Model(x, ours(x, x))
    random_weights(softmax)
    path = str(tmp_path / "model.weights.h5")
    theirs_model.save_weights(path)
    with warnings.catch_warnings():
        # Keras warns of names in the file, too.
        warnings.simplefilter("ignore")
        wrong(
            "GroupQueryAttention, load it into that model and take its arrays",
            lambda: ours_model.load_weights(path),
        )
    # The way out that the error names.
    ours.set_weights(
        [*softmax.get_weights(), *ours.get_weights()[len(softmax.weights) :]]
    )
    ours_model.save_weights(path)
    again = make(name="attention")
    model = keras.Model(x, again(x, x))
    model.load_weights(path)
    data = array(QUERY)
    np.testing.assert_array_equal(model(data), ours_model(data))


# Blocks.


@pytest.mark.parametrize(
    "kind",
    (
        keras_kt.KernelizedTransformerEncoder,
        keras_kt.KernelizedTransformerDecoder,
    ),
)
def test_blocks_take_few_key_value_heads(kind):
    block = kind(20, 6, key_dim=4, num_key_value_heads=2, seed=0)
    x = array(QUERY)
    assert block(x).shape == QUERY
    assert block.get_config()["num_key_value_heads"] == 2
    again = kind.from_config(block.get_config())
    again.build(QUERY)
    again.set_weights(block.get_weights())
    np.testing.assert_array_equal(again(x), block(x))
    wrong(
        "`num_query_heads` must be divisible",
        lambda: kind(20, 6, key_dim=4, num_key_value_heads=4),
    )
    assert "num_key_value_heads" in kind(20, 6).get_config()
    config = kind(20, 6).get_config()
    config.pop("num_key_value_heads")
    assert kind.from_config(config).num_key_value_heads is None


def test_decoders_of_few_key_value_heads_step_as_they_are_called():
    block = keras_kt.KernelizedTransformerDecoder(
        20,
        6,
        key_dim=4,
        num_key_value_heads=2,
        rotary_max_wavelength=30.0,
        local_context=3,
        seed=0,
    )
    x, memory = array(QUERY), array((2, 5, 9))
    expected = block(x, memory)
    state, outputs = block.initial_state(2), []
    assert state.attention.attention.sums.shape[1] == 2
    for part in (slice(0, 1), slice(1, 11)):
        output, state = block.step(x[:, part], state, memory)
        outputs.append(output)
    np.testing.assert_allclose(tf.concat(outputs, 1), expected, atol=2e-5)
