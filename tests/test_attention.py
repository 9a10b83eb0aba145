import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt import ops
from keras_kt.layers import route as layer_route
from tests.helpers import cases
from tests.helpers.contract import layer_contract, one_quick
from tests.helpers.tensors import array, wrong

pytestmark = [
    pytest.mark.filterwarnings("ignore:FastFoodPrior needs a power"),
    # Raised by Keras's own exporter and EinsumDense.
    pytest.mark.filterwarnings("ignore:.*jit_compile.*"),
]

QUERY, KEYS, FEATURES = (2, 11, 6), (2, 13, 10), 6
LINEAR = ("positive", "trigonometric")


def pair_of(route, other, shape=QUERY, **kwargs):
    """Two layers with the same weights and different routes."""
    layers = []
    for implementation in (route, other):
        layer = keras_kt.KernelizedAttention(
            3, 5, implementation=implementation, seed=1, **kwargs
        )
        layer.build(shape, shape)
        layers.append(layer)
    layers[1].set_weights(layers[0].get_weights())
    return layers


# Every prior once and every map at least twice; the algebra of all pairs is
# tested in test_crossed.py.
CONTRACT_PAIRS = (
    ("normal", "positive"),
    ("normal-isotropic", "positive-gaussian"),
    ("normal-full", "positive"),
    ("normal-mean", "trigonometric"),
    ("mixture", "positive"),
    ("mixture-mean", "positive-isotropic-one-sided"),
    ("fastfood", "positive-gaussian"),
    ("fastfood", "trigonometric"),
    ("generator", "positive"),
    ("generator", "trigonometric"),
    ("distribution", "positive-isotropic-one-sided"),
)


@pytest.mark.slow
@pytest.mark.parametrize("prior_name, map_name", one_quick(CONTRACT_PAIRS))
def test_contract_of_every_prior_and_map(prior_name, map_name, tmp_path):
    layer_contract(
        lambda: make_layer(prior_name, map_name),
        (QUERY, KEYS),
        tmp_path,
        exact_jit=2e-4 if map_name == "trigonometric" else 1e-5,
        # Signed normalizers amplify the rounding of half-precision projections.
        half=0.3 if map_name == "trigonometric" else 0.1,
        jit_fit=prior_name in ("normal", "mixture", "generator"),
    )


def test_softmax_prefactor_refuses_a_trained_mean():
    with pytest.raises(ValueError, match="cancels the mean of the prior"):
        make_layer("normal-mean", "positive")


def make_layer(prior_name, map_name, **kwargs):
    return keras_kt.KernelizedAttention(
        3,
        5,
        seed=1,
        num_features=40,
        spectral_prior=cases.PRIORS[prior_name](),
        feature_map=cases.MAPS[map_name](),
        **kwargs,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, call",
    (
        ({"value_dim": 7, "dropout": 0.3, "use_gate": True}, {}),
        ({"output_shape": (3, 4), "use_bias": False}, {}),
        ({"qk_norm": "l2"}, {"use_causal_mask": True}),
        ({"redraw": "step"}, {"use_causal_mask": True}),
        ({"implementation": "quadratic"}, {}),
        ({"sliding_window": 3, "implementation": "quadratic"}, {}),
    ),
    ids=lambda value: "-".join(value) or "plain",
)
def test_contract_of_the_arguments(arguments, call, tmp_path):
    layer_contract(
        lambda: keras_kt.KernelizedAttention(3, 5, seed=1, **arguments),
        (QUERY, QUERY),
        tmp_path,
        call=call,
    )


def test_every_argument_survives_the_config():
    arguments = {
        "num_heads": 3,
        "key_dim": 4,
        "value_dim": 7,
        "dropout": 0.25,
        "use_bias": False,
        "output_shape": (3, 2),
        "attention_axes": (1,),
        "sliding_window": 2,
        "use_gate": True,
        "seed": 5,
        "num_features": 16,
        "qk_norm": "l2",
        "redraw": "step",
        "implementation": "quadratic",
        "decay": "gated",
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
    layer = keras_kt.KernelizedAttention(**arguments, **objects)
    config = layer.get_config()
    for name, value in arguments.items():
        assert config[name] == value, name
    again = keras_kt.KernelizedAttention.from_config(config)
    assert again.get_config() == config
    default = keras_kt.KernelizedAttention(3, 4).get_config()
    for name in objects:
        assert config[name] != default[name], name
    # Beside a window there is no near field.
    assert set(arguments) | set(objects) | {"dtype", "near_field"} == set(
        config
    )


def test_first_weights_are_multi_head_attentions():
    theirs = keras.layers.MultiHeadAttention(3, 5, value_dim=7)
    ours = keras_kt.KernelizedAttention(3, 5, value_dim=7)
    for layer in (theirs, ours):
        layer.build(QUERY, KEYS)
    count = len(theirs.weights)
    for mine, reference in zip(ours.weights, theirs.weights, strict=False):
        assert mine.path.split("/")[1:] == reference.path.split("/")[1:]
        assert mine.shape == reference.shape
    ours.set_weights([*theirs.get_weights(), *ours.get_weights()[count:]])
    x = array(QUERY, scale=0.3), array(KEYS, scale=0.3)
    assert ours(*x).shape == theirs(*x).shape


def test_default_comes_close_to_softmax_attention():
    shape = (2, 50, 64)
    theirs = keras.layers.MultiHeadAttention(4, 16)
    ours = keras_kt.KernelizedAttention(4, 16, seed=0, num_features=256)
    for layer in (theirs, ours):
        layer.build(shape, shape)
    ours.set_weights([*theirs.get_weights(), *ours.get_weights()[8:]])
    x = array(shape, scale=0.4)
    for causal in (False, True):
        expected = theirs(x, x, use_causal_mask=causal)
        got = ours(x, x, use_causal_mask=causal)
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error < 0.05


@pytest.mark.parametrize("feature_map", LINEAR)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("masked", (False, True))
def test_linear_route_equals_quadratic_with_gradients(
    feature_map, causal, masked
):
    layers = pair_of("linear", "quadratic", feature_map=feature_map)
    x = tf.constant(array(QUERY))
    mask = np.ones(QUERY[:2], "bool")
    mask[0, 8:] = mask[1, :2] = False
    masks = {"query_mask": mask, "value_mask": mask} if masked else {}
    answers = []
    for layer in layers:
        weights = layer.trainable_weights
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = layer(x, x, use_causal_mask=causal, **masks)
            loss = tf.reduce_mean(output**2)
        wanted = [x, *(w.value for w in weights)]
        answers.append([output, *tape.gradient(loss, wanted)])
    for one, other in zip(*answers, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", (False, True))
def test_every_mask_reaches_the_output(causal):
    """An explicit query_mask is ignored by MultiHeadAttention."""
    layer = keras_kt.KernelizedAttention(3, 5, bias_initializer="ones")
    query, value = array(QUERY), array(KEYS)
    plain = layer(query, value, use_causal_mask=causal)
    query_mask = np.arange(11) < np.array([[9], [5]])
    value_mask = np.arange(13) < np.array([[4], [13]])
    key_mask = np.arange(13) != np.array([[0], [2]])
    both = layer(
        query,
        value,
        query_mask=query_mask,
        value_mask=value_mask,
        key_mask=key_mask,
        use_causal_mask=causal,
    )
    dense = query_mask[:, :, None] & value_mask[:, None] & key_mask[:, None]
    if causal:
        dense &= np.tril(np.ones((11, 13), "bool"))
    slow = layer(
        query, value, attention_mask=dense, return_attention_scores=True
    )[0]
    np.testing.assert_allclose(both, slow, atol=1e-5)
    assert np.abs(both - plain).max() > 1e-3
    # A zero context is the output bias.
    np.testing.assert_allclose(both[~query_mask], 1.0, atol=1e-6)


def test_keras_masks_are_picked_up_and_passed_on():
    tokens = np.array([[1, 2, 3, 0, 0], [3, 3, 1, 1, 2]])
    embed = keras.layers.Embedding(4, 6, mask_zero=True)
    layer = keras_kt.KernelizedAttention(3, 5)
    masked = embed(tokens)
    automatic = layer(masked, masked)
    np.testing.assert_array_equal(automatic._keras_mask, tokens > 0)
    plain = tf.constant(masked.numpy())
    explicit = layer(plain, plain, query_mask=tokens > 0, value_mask=tokens > 0)
    np.testing.assert_array_equal(automatic, explicit)
    inputs = keras.Input((None,), dtype="int32")
    x = embed(inputs)
    model = keras.Model(inputs, layer(x, x))
    np.testing.assert_allclose(model(tokens), automatic, atol=1e-6)


@pytest.mark.parametrize("poison", (np.nan, 1e30, np.inf))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("feature_map", LINEAR)
def test_padded_content_changes_neither_output_nor_gradients(
    feature_map, causal, poison
):
    layer = keras_kt.KernelizedAttention(3, 5, feature_map=feature_map)
    x = array(QUERY)
    mask = np.arange(11) < np.array([[7], [11]])
    answers = []
    for fill in (0.0, poison):
        data = tf.constant(np.where(mask[..., None], x, np.float32(fill)))
        if not layer.built:
            layer.build(data.shape, data.shape)
        weights = [w.value for w in layer.trainable_weights]
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
    for clean, dirty in zip(*answers, strict=True):
        np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize(
    "query, value, axes",
    (
        ((2, 3, 4, 6), (2, 3, 5, 6), (2,)),
        ((2, 3, 4, 6), (2, 3, 5, 6), -2),
        ((2, 4, 3, 6), (2, 5, 3, 6), 1),
        ((2, 3, 4, 6), (2, 5, 7, 6), (1, 2)),
        ((2, 3, 4, 6), (2, 5, 7, 6), None),
        ((2, 7, 3, 4, 6), (2, 7, 5, 2, 6), (2, 3)),
    ),
)
def test_attention_axes_match_folding_by_hand(query, value, axes):
    layers = [
        keras_kt.KernelizedAttention(
            2, 5, attention_axes=axes, implementation=route, seed=3
        )
        for route in ("linear", "quadratic")
    ]
    q, v = array(query), array(value, 1)
    value_mask = array(value[:-1], 2) > -0.7
    for layer in layers:
        layer.build(query, value)
    layers[1].set_weights(layers[0].get_weights())
    outputs = [layer(q, v, value_mask=value_mask) for layer in layers]
    np.testing.assert_allclose(*outputs, atol=1e-5)
    _, scores = layers[1](q, v, return_attention_scores=True)
    symbolic = layers[1](
        keras.KerasTensor(query),
        keras.KerasTensor(value),
        return_attention_scores=True,
    )
    assert tuple(symbolic[1].shape) == tuple(scores.shape)
    # One slice of the free axes at a time, through a plain rank-3 layer.
    resolved = layers[0].attention_axes
    free = [a for a in range(1, len(query) - 1) if a not in resolved]
    flat = keras_kt.KernelizedAttention(2, 5, seed=3)
    flat.build((2, None, 6), (2, None, 6))
    flat.set_weights(layers[0].get_weights())

    def folded(x):
        last = (x.ndim - 1,) if x.ndim == len(query) else ()
        order = (0, *free, *resolved, *last)
        x = x.transpose(order)
        batch = int(np.prod(x.shape[: 1 + len(free)]))
        return x.reshape(batch, -1, *x.shape[len(order) - len(last) :])

    expected = flat(folded(q), folded(v), value_mask=folded(value_mask))
    if len(resolved) == 1:
        # A (batch, length) mask holds along the free axes.
        vector = array((value[0], value[resolved[0]]), 3) > -0.7
        shape = [1] * (len(value) - 1)
        shape[0], shape[resolved[0]] = vector.shape
        np.testing.assert_array_equal(
            layers[0](q, v, value_mask=vector),
            layers[0](q, v, value_mask=vector.reshape(shape)),
        )
    np.testing.assert_allclose(folded(outputs[0].numpy()), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        *(
            (QUERY, axes)
            for axes in (0, (0,), (1, 1), (1, -2), -1, 2, (), 5, -3)
        ),
        ((2, 3, 4, 6), (0, 2)),
        ((2, 3, 4, 6), (1, 3)),
        ((2, 6), None),
    ],
)
def test_axes_that_are_no_positions_are_refused(shape, axes):
    """0 meant axis 1, others failed in a transpose or an index."""
    layer = keras_kt.KernelizedAttention(2, 5, attention_axes=axes)
    valid = str(tuple(range(1, len(shape) - 1))).replace("(", r"\(")
    match = (
        f"`attention_axes` must name.*rank {len(shape)}, any of {valid[:-1]}"
    )
    wrong(match, lambda: layer(array(shape), array(shape)))
    wrong(match, lambda: layer.build(shape, shape))
    spec = keras.KerasTensor(shape)
    wrong(
        match,
        lambda: layer.compute_output_spec(
            spec, spec, return_attention_scores=True
        ),
    )


def test_the_configuration_has_the_axes_as_they_were_given():
    """A built layer told all axes of its own rank, another's are others."""
    four = array((2, 3, 4, 6))
    for axes, resolved in ((None, (1, 2)), (-2, (2,)), ([2, 1], (2, 1))):
        layer = keras_kt.KernelizedAttention(2, 5, attention_axes=axes)
        layer(four, four)
        assert layer.attention_axes == resolved
        config = layer.get_config()
        given = axes if axes is None else tuple(np.ravel(axes))
        assert config["attention_axes"] == given
    layer = keras_kt.KernelizedAttention(2, 5)
    layer(four, four)
    again = keras_kt.KernelizedAttention.from_config(layer.get_config())
    again(array(QUERY), array(QUERY))
    assert again.attention_axes == (1,)


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
def test_softmax_weights_in_the_place_of_ours_name_the_conversion(
    kind, tmp_path
):
    """Keras said that the layer received 0 variables."""

    def make(attention):
        if kind == "functional":
            x = keras.Input((None, 6))
            return keras.Model(x, attention(x, x))

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.attention = attention

            def call(self, x):
                return self.attention(x, x)

        model = Model()
        model(array(QUERY))
        return model

    path = tmp_path / "model.weights.h5"
    make(keras.layers.MultiHeadAttention(2, 5)).save_weights(path)
    ours = make(keras_kt.KernelizedAttention(2, 5))
    with warnings.catch_warnings():
        # Keras warns of names in the file, too.
        warnings.simplefilter("ignore")
        wrong("convert_attention", lambda: ours.load_weights(path))
    ours.save_weights(path)
    again = make(keras_kt.KernelizedAttention(2, 5))
    again.load_weights(path)
    np.testing.assert_array_equal(again(array(QUERY)), ours(array(QUERY)))


@pytest.mark.parametrize("rank", (2, 3, 4))
def test_dense_masks_of_every_rank_mean_what_they_mean_in_keras(rank):
    layer = keras_kt.KernelizedAttention(3, 5, implementation="quadratic")
    query, value = array(QUERY), array(KEYS)
    mask = array((2, 3, 11, 13)[4 - rank :] if rank < 4 else (2, 3, 11, 13)) > 0
    if rank == 3:
        mask = array((2, 11, 13)) > 0
    _, scores = layer(
        query, value, attention_mask=mask, return_attention_scores=True
    )
    full = (
        mask
        if rank == 4
        else mask.reshape((1, 1, 11, 13) if rank == 2 else (2, 1, 11, 13))
    )
    full = np.broadcast_to(full, scores.shape)
    np.testing.assert_array_equal(scores.numpy()[~full], 0.0)
    np.testing.assert_allclose(
        scores.numpy().sum(-1), full.any(-1).astype("float32"), atol=1e-5
    )


def test_dense_mask_warns_once_and_names_the_alternatives():
    layer = keras_kt.KernelizedAttention(3, 5)
    x = array(QUERY)
    mask = np.ones((11, 11), "bool")
    with pytest.warns(UserWarning, match="use_causal_mask=True` stay linear"):
        layer(x, x, attention_mask=mask)
    layer(x, x, attention_mask=mask)  # a second warning would be an error


def test_linear_route_refuses_what_needs_the_matrix():
    layer = keras_kt.KernelizedAttention(3, 5, implementation="linear")
    x = array(QUERY)
    with pytest.raises(ValueError, match='implementation="auto"'):
        layer(x, x, return_attention_scores=True)
    with pytest.raises(ValueError, match="needs the attention matrix"):
        layer(x, x, attention_mask=np.ones((11, 11), "bool"))


@pytest.mark.parametrize("lengths", ((5, 3), (3, 5), (7, 7)))
def test_causal_cross_attention_is_anchored_at_the_start(lengths):
    layers = pair_of("linear", "quadratic")
    query, value = array((2, lengths[0], 6)), array((2, lengths[1], 6), 1)
    mask = array((2, lengths[1])) > -0.5
    for masks in ({}, {"value_mask": mask}):
        outputs = [
            layer(query, value, use_causal_mask=True, **masks)
            for layer in layers
        ]
        np.testing.assert_allclose(*outputs, atol=1e-5)
    spec = [tf.TensorSpec((None, None, 6))] * 2
    dynamic = tf.function(
        lambda q, v: layers[0](q, v, use_causal_mask=True),
        input_signature=spec,
    )
    np.testing.assert_allclose(
        dynamic(query, value),
        layers[0](query, value, use_causal_mask=True),
        atol=1e-5,
    )


@pytest.mark.parametrize("feature_map", LINEAR)
@pytest.mark.parametrize("qk_norm", (None, "l2"))
def test_steps_of_any_size_equal_the_causal_call(feature_map, qk_norm):
    layer = keras_kt.KernelizedAttention(
        3, 5, value_dim=7, feature_map=feature_map, qk_norm=qk_norm
    )
    x = array((2, 90, 6))
    mask = np.ones((2, 90), "bool")
    mask[0, :4] = mask[1, 50:55] = False  # left padding, and a gap
    expected = layer(x, x, value_mask=mask, use_causal_mask=True)
    for cuts in ((0, 90), (0, 1, 2, 70, 90), (0, 89, 90)):
        state, outputs = layer.initial_state(2), []
        sizes = [tuple(t.shape) for t in state]
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            output, state = layer.step(
                x[:, start:end], state, value_mask=mask[:, start:end]
            )
            outputs.append(output)
        assert sizes == [tuple(t.shape) for t in state]
        np.testing.assert_allclose(
            np.concatenate(outputs, 1), expected, atol=2e-5
        )


@pytest.mark.parametrize("causal", (True, False), ids=("causal", "both"))
@pytest.mark.parametrize(
    "implementation, options",
    one_quick(
        (route, options)
        for route in ("quadratic", "linear")
        for options in (
            {},
            {"feature_map": "trigonometric"},
            {"decay": "constant"},
            {"near_field": 3},
            {"sliding_window": 3},
            {"sliding_window": 3, "spectral_prior": "generator"},
        )
    ),
    ids=str,
)
def test_gradients_traced_with_dynamic_shapes_compile(
    implementation, options, causal
):
    """As Keras traces a training step: batch and length are not known."""
    layer = keras_kt.KernelizedAttention(
        3, 5, seed=1, implementation=implementation, **options
    )
    x = array(QUERY)
    layer.build(x.shape, x.shape)

    def gradients(x):
        with tf.GradientTape() as tape:
            output = layer(x, x, use_causal_mask=causal)
            loss = tf.reduce_sum(tf.sin(output))
        return tape.gradient(loss, layer.trainable_weights)

    spec = [tf.TensorSpec((None, None, FEATURES))]
    compiled = tf.function(gradients, jit_compile=True, input_signature=spec)
    for actual, expected in zip(
        compiled(x), gradients(tf.constant(x)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.slow
def test_step_compiles_and_takes_a_state_of_dynamic_batch():
    layer = keras_kt.KernelizedAttention(3, 5)
    x = array((2, 9, 6))
    layer.build(x.shape, x.shape)
    state = layer.initial_state(2)
    for jit in (False, True):
        step = tf.function(layer.step, jit_compile=jit)
        output, _ = step(tf.constant(x), state)
        np.testing.assert_allclose(output, layer.step(x, state)[0], atol=1e-5)
    spec = keras_kt.AttentionState(
        tf.TensorSpec((None, 3, 10)),
        tf.TensorSpec((None, 3, 6, 10)),
    )
    step = tf.function(
        layer.step, input_signature=[tf.TensorSpec((None, None, 6)), spec]
    )
    np.testing.assert_allclose(
        step(x, state)[0], layer.step(x, state)[0], atol=1e-5
    )


def test_redraw_step_changes_training_only():
    layer = keras_kt.KernelizedAttention(3, 5, redraw="step", seed=2)
    x = array(QUERY)
    stored = layer(x, x, training=False)
    first, second = (layer(x, x, training=True) for _ in range(2))
    assert np.abs(first - second).max() > 1e-4
    np.testing.assert_array_equal(layer(x, x, training=False), stored)
    fixed = keras_kt.KernelizedAttention(3, 5, seed=2)
    np.testing.assert_array_equal(
        fixed(x, x, training=True), fixed(x, x, training=False)
    )


def test_the_draw_travels_with_the_weights(tmp_path):
    x = array(QUERY)

    def model():
        inputs = keras.Input((None, 6))
        layer = keras_kt.KernelizedAttention(3, 5, redraw="step")
        return keras.Model(inputs, layer(inputs, inputs))

    first, second = model(), model()
    assert np.abs(first(x) - second(x)).max() > 1e-4
    first.save_weights(tmp_path / "draw.weights.h5")
    second.load_weights(tmp_path / "draw.weights.h5")
    np.testing.assert_array_equal(first(x), second(x))


def test_layers_and_heads_draw_noise_of_their_own():
    layers = [keras_kt.KernelizedAttention(3, 5) for _ in range(2)]
    noise = []
    for layer in layers:
        layer.build(QUERY, QUERY)
        noise.append(layer.spectral_prior.base_noise.numpy())
    assert np.abs(noise[0] - noise[1]).max() > 0.1
    assert np.abs(noise[0][0] - noise[0][1]).max() > 0.1
    keras.utils.set_random_seed(3)
    layer = keras_kt.KernelizedAttention(3, 5)
    layer.build(QUERY, QUERY)
    keras.utils.set_random_seed(3)
    again = keras_kt.KernelizedAttention(3, 5)
    again.build(QUERY, QUERY)
    for one, other in zip(layer.weights, again.weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_prior_instance_serves_many_layers():
    prior = keras_kt.MixturePrior()
    layers = [
        keras_kt.KernelizedAttention(heads, 4, spectral_prior=prior)
        for heads in (2, 3)
    ]
    for layer in layers:
        layer.build(QUERY, QUERY)
    assert layers[0].spectral_prior is not layers[1].spectral_prior
    assert not prior.built


def test_dropout_acts_on_the_heads_outputs():
    layer = keras_kt.KernelizedAttention(3, 5, dropout=0.99999, use_bias=False)
    x = array(QUERY)
    np.testing.assert_allclose(layer(x, x, training=True), 0.0, atol=1e-6)
    assert np.abs(layer(x, x, training=False)).max() > 1e-3


def test_kl_weight_and_regularizers_reach_the_models_losses():
    prior = keras_kt.NormalPrior(
        initial_scale=0.5, kl_weight=1.0, scale_regularizer="l2"
    )
    layer = keras_kt.KernelizedAttention(3, 5, spectral_prior=prior)
    inputs = keras.Input((None, 6))
    model = keras.Model(inputs, layer(inputs, inputs))
    x = array(QUERY)
    model(x)
    assert len(model.losses) == 2
    assert all(float(loss) > 0 for loss in model.losses)
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)


@pytest.mark.slow
def test_lora_trains_saves_and_loads(tmp_path):
    """Keras's own test, with the spectral weights counted."""
    x = array((1, 2, 2))
    layer = keras_kt.KernelizedAttention(3, 8, use_bias=False, use_gate=True)
    layer.build((1, 2, 2), (1, 2, 2))
    for dense in (layer.query_dense, layer.key_dense, layer.value_dense):
        dense.enable_lora(2)
    assert len(layer.trainable_variables) == 8 + 1
    assert len(layer.non_trainable_variables) == 3 + 1
    inputs = [keras.Input((2, 2)) for _ in range(3)]
    model = keras.Model(inputs, layer(*inputs))
    model.compile("sgd", "mse")
    model.fit([x] * 3, x, verbose=0)
    expected = model.predict([x] * 3, verbose=0)
    model.save(tmp_path / "lora.keras")
    loaded = keras.saving.load_model(tmp_path / "lora.keras")
    np.testing.assert_allclose(
        loaded.predict([x] * 3, verbose=0), expected, atol=1e-6
    )
    model.save_weights(tmp_path / "lora.weights.h5")
    plain = keras_kt.KernelizedAttention(3, 8, use_bias=False, use_gate=True)
    fresh = keras.Model(inputs, plain(*inputs))
    fresh.load_weights(tmp_path / "lora.weights.h5")
    np.testing.assert_allclose(
        fresh.predict([x] * 3, verbose=0), expected, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_int8_quantization_keeps_the_spectral_weights_float32():
    inputs = keras.Input((None, 16))
    layer = keras_kt.KernelizedAttention(2, 16)
    model = keras.Model(inputs, layer(inputs, inputs))
    x = array((2, 9, 16), scale=0.5)
    expected = model(x)
    model.quantize("int8")
    assert layer.query_dense.kernel.dtype == "int8"
    for weight in layer.spectral_prior.weights:
        assert weight.dtype == "float32"
    error = np.linalg.norm(model(x) - expected) / np.linalg.norm(expected)
    assert error < 0.05


@pytest.mark.parametrize("policy", ("mixed_bfloat16", "mixed_float16"))
@pytest.mark.parametrize("scale", (1.0, 10.0, 100.0))
def test_half_precision_stays_finite_and_does_not_vanish(policy, scale):
    layer = keras_kt.KernelizedAttention(3, 5, dtype=policy, use_bias=False)
    x = tf.constant(array(QUERY, scale=scale))
    layer.build(x.shape, x.shape)
    assert all(
        weight.dtype == "float32" for weight in layer.spectral_prior.weights
    )
    for causal in (False, True):
        with tf.GradientTape() as tape:
            output = layer(x, x, use_causal_mask=causal)
            loss = tf.reduce_mean(tf.cast(output, tf.float32))
        weights = [w.value for w in layer.trainable_weights]
        gradients = tape.gradient(loss, weights)
        assert all(np.isfinite(g).all() for g in gradients)
        size = np.abs(tf.cast(output, tf.float32)).max(axis=-1)
        assert np.isfinite(size).all() and size.min() > 1e-3 * scale


def test_scores_are_the_weights_that_made_the_output():
    layer = keras_kt.KernelizedAttention(3, 5, use_bias=False)
    query, value = array(QUERY), array(KEYS)
    output, scores = layer(query, value, return_attention_scores=True)
    assert scores.shape == (2, 3, 11, 13)
    np.testing.assert_allclose(tf.reduce_sum(scores, -1), 1.0, atol=1e-5)
    heads = tf.einsum("bhts,bshe->bthe", scores, layer.value_dense(value))
    np.testing.assert_allclose(layer.output_dense(heads), output, atol=1e-5)
    np.testing.assert_allclose(layer(query, value), output, atol=1e-5)


@pytest.mark.slow
def test_trains_better_than_it_started():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 4))
    layer = keras_kt.KernelizedAttention(2, 8, spectral_prior="mixture")
    x = layer(inputs, inputs)
    outputs = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(x))
    model = keras.Model(inputs, outputs)
    data = array((256, 16, 4))
    target = (data.max(axis=1) * [1, -1, 1, -1]).sum(-1, keepdims=True)
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    history = model.fit(data, target, epochs=15, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]


def test_wrong_arguments_name_what_is_expected():
    make = keras_kt.KernelizedAttention
    for bad in (0, -2, 1.5):
        wrong("argument `num_heads`", lambda bad=bad: make(bad, 4))
        wrong("argument `key_dim`", lambda bad=bad: make(4, bad))
        wrong("argument `value_dim`", lambda bad=bad: make(4, 4, bad))
        wrong(
            "argument `num_features`",
            lambda bad=bad: make(4, 4, num_features=bad),
        )
    for bad in (-0.1, 1.0, 1.5, "half"):
        wrong(
            r"`dropout` must be a number in \[0, 1\)",
            lambda bad=bad: make(2, 4, dropout=bad),
        )
    wrong("Invalid `output_shape`", lambda: make(2, 4, output_shape=8.0))
    wrong("`attention_axes` must be", lambda: make(2, 4, attention_axes=1.0))
    wrong("argument `sliding_window`", lambda: make(2, 4, sliding_window=0))
    wrong("`qk_norm` must be one of", lambda: make(2, 4, qk_norm="rms"))
    wrong("`redraw` must be one of", lambda: make(2, 4, redraw="epoch"))
    wrong("`implementation` must be", lambda: make(2, 4, implementation="x"))
    wrong(
        "`spectral_prior` must be one of",
        lambda: make(2, 4, spectral_prior="gmm"),
    )
    wrong(
        "`feature_map` must be one of", lambda: make(2, 4, feature_map="relu")
    )
    wrong(
        "num_features=2, num_components=4. Raise `num_features`",
        lambda: make(
            2,
            4,
            num_features=2,
            spectral_prior=keras_kt.MixturePrior(num_components=4),
        ),
    )
    wrong(
        "the same number of frequencies.*Choose a multiple of 6",
        lambda: make(
            2,
            4,
            num_features=16,
            spectral_prior=keras_kt.MixturePrior(num_components=3),
        ),
    )
    for feature_map in LINEAR:
        wrong(
            "must be even.*Choose 18",
            lambda f=feature_map: make(2, 4, num_features=17, feature_map=f),
        )
    wrong(
        "cancels the mean",
        lambda: make(2, 4, spectral_prior=keras_kt.NormalPrior(use_mean=True)),
    )
    wrong("`prefactor` must be one of", lambda: keras_kt.PositiveFeatures("x"))
    wrong(
        "`smoothing` must be a positive",
        lambda: keras_kt.TrigonometricFeatures(smoothing=0.0),
    )
    with pytest.warns(UserWarning, match="`flash_attention` has no effect"):
        make(2, 4, flash_attention=True)
    make(2, 4, flash_attention=None)


def test_wrong_tensors_name_what_is_expected():
    layer = keras_kt.KernelizedAttention(2, 4)
    x = array(QUERY)
    wrong("same batch size", lambda: layer(x, x[:1]))
    wrong(
        "same batch size",
        lambda: layer(
            keras.KerasTensor((2, 3, 6)), keras.KerasTensor((5, 3, 6))
        ),
    )
    wrong("must be equal", lambda: layer(x, x, x[:, :5]))
    wrong(
        "must be equal",
        lambda: layer.compute_output_shape((2, 4, 8), (2, 2, 8), (2, 1, 7)),
    )
    fresh = keras_kt.KernelizedAttention(2, 4)
    wrong("same rank", lambda: fresh(x, array((2, 3, 4, 6))))
    layer(x, x)
    wrong(
        r"A \(batch, key_length\) padding mask is `value_mask`",
        lambda: layer(x, x, attention_mask=np.ones((2, 13), "bool")),
    )
    wrong(
        "Use `attention_mask` for a mask of pairs",
        lambda: layer(x, x, value_mask=np.ones((2, 11, 11), "bool")),
    )
    wide = keras_kt.KernelizedAttention(2, 4)
    grid = array((2, 3, 4, 6))
    wrong(
        "single attention axis",
        lambda: wide(grid, grid, use_causal_mask=True),
    )


def test_wrong_steps_name_the_way_out():
    layer = keras_kt.KernelizedAttention(2, 4)
    x = array(QUERY)
    layer(x, x)
    state = layer.initial_state(2)
    wrong(
        "`step` is causal.*call the layer itself",
        lambda: layer.step(x, state, value=x[:, :5]),
    )
    wrong(
        r"a state of batch size 3.*initial_state\(batch_size\)",
        lambda: layer.step(x, layer.initial_state(3)),
    )
    wrong("`state` must be an AttentionState", lambda: layer.step(x, None))
    grid = array((2, 3, 4, 6))
    wide = keras_kt.KernelizedAttention(2, 4)
    wide(grid, grid)
    wrong("inputs of rank 3", lambda: wide.step(grid, state))


def test_another_backend_is_refused_by_name():
    # Keras's other backends need packages that are not installed here.
    code = (
        "import keras; keras.backend.backend = lambda: 'jax'; import keras_kt"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "needs the TensorFlow backend" in result.stderr
    assert "KERAS_BACKEND=tensorflow" in result.stderr


@pytest.mark.parametrize("causal", (False, True))
def test_auto_forms_the_matrix_only_of_short_inputs(causal, monkeypatch):
    monkeypatch.setattr(layer_route, "SHORT_LENGTH", 64)
    monkeypatch.setattr(layer_route, "SHORT_CAUSAL_LENGTH", 128)
    routes = []

    def spy_on(module, name):
        plain = getattr(module, name)

        def spy(*args, **kwargs):
            routes.append(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)

    spy_on(ops.quadratic, "attend")
    spy_on(ops.linear, "causal")
    spy_on(ops.linear, "bidirectional")
    auto, linear = pair_of("auto", "linear", (2, None, 6))
    expected = {True: "causal", False: "bidirectional"}[causal]
    short = {True: 128, False: 64}[causal]
    for length, route in ((short, "attend"), (short + 1, expected)):
        x = array((2, length, 6))
        routes.clear()
        one = auto(x, x, use_causal_mask=causal)
        assert routes == [route]
        routes.clear()
        other = linear(x, x, use_causal_mask=causal)
        assert routes == [expected]
        np.testing.assert_allclose(one, other, atol=1e-5)
    # An unknown length may be long.
    routes.clear()
    spec = tf.TensorSpec((2, None, 6))
    tf.function(
        lambda x: auto(x, x, use_causal_mask=causal)
    ).get_concrete_function(spec)
    assert routes == [expected]
