"""LinearAttention: the layer of heads."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers.contract import layer_contract, one_in
from tests.helpers.tensors import array, wrong

pytestmark = [
    # Raised by Keras's own exporter.
    pytest.mark.filterwarnings("ignore:.*jit_compile.*"),
]

BATCH, LENGTH, KEYS = 2, 11, 13
HEADS, FEW, DIM, VALUE_DIM, WIDTH = 6, 3, 5, 7, 17
DENSE = pytest.mark.filterwarnings("ignore:.*costs O.length²")


def heads(length=LENGTH, keys=None, few=FEW):
    """Queries, keys and values."""
    keys = length if keys is None else keys
    return [
        tf.constant(array((BATCH, length, HEADS, DIM), seed=1)),
        tf.constant(array((BATCH, keys, few, DIM), seed=2)),
        tf.constant(array((BATCH, keys, few, VALUE_DIM), seed=3)),
    ]


def rates(length=LENGTH, few=FEW):
    return tf.constant(np.abs(array((BATCH, length, few, 1), seed=4)))


def random_mask(*shape):
    mask = np.random.default_rng(7).random(shape) < 0.6
    mask[..., 0] = True
    return mask


def make(num_key_value_heads=FEW, **kwargs):
    layer = keras_kt.LinearAttention(
        HEADS, DIM, VALUE_DIM, num_key_value_heads, seed=1, **kwargs
    )
    few = layer.num_key_value_heads
    layer.build(*(x.shape for x in heads(few=few)))
    return layer


def with_gradients(layer, tensors, **call):
    """Outputs, and gradients to the tensors and the weights."""
    weights = [w.value for w in layer.trainable_weights]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = layer(*tensors, **call)
        loss = tf.reduce_sum(output * array(output.shape, seed=5))
    gradients = tape.gradient(loss, [*tensors, *weights])
    assert all(x is not None for x in gradients)
    return output, gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, call",
    (
        ({"qk_norm": "l2"}, {"use_causal_mask": True}),
        ({"feature_map": "trigonometric", "spectral_prior": "mixture"}, {}),
        ({"feature_map": "trigonometric", "qk_norm": "weighted"}, {}),
        ({"decay": "constant", "near_field": 3}, {}),
    ),
    ids=("causal", "trigonometric", "weighted", "distance"),
)
def test_contract(arguments, call, tmp_path):
    is_signed = "feature_map" in arguments
    layer_contract(
        lambda: keras_kt.LinearAttention(
            HEADS, DIM, VALUE_DIM, FEW, seed=1, **arguments
        ),
        [x.shape for x in heads()],
        tmp_path,
        call=call,
        known=2,
        exact_jit=2e-4 if is_signed else 1e-5,
        half=0.3 if is_signed else 0.1,
        jit_fit=bool(call),
    )


def test_every_argument_survives_the_config():
    arguments = {
        "num_heads": 6,
        "key_dim": 4,
        "value_dim": 7,
        "num_key_value_heads": 3,
        "num_features": 40,
        "qk_norm": "l2",
        "redraw": "step",
        "implementation": "quadratic",
        "decay": "gated",
        "near_field": 2,
        "rotary_max_wavelength": 100.0,
        "spectral_pace": 2.0,
        "seed": 3,
    }
    layer = keras_kt.LinearAttention(
        **arguments, spectral_prior=keras_kt.MixturePrior(num_components=4)
    )
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == layer.get_config()
    assert {name: getattr(again, name) for name in arguments} == arguments
    assert again.spectral_prior.num_components == 4


@pytest.mark.parametrize(
    "arguments",
    (
        {},
        {"feature_map": "trigonometric", "qk_norm": "l2"},
        {"decay": "constant"},
        {"decay": "gated", "near_field": 3},
    ),
    ids=lambda arguments: "-".join(arguments) or "plain",
)
@pytest.mark.parametrize("causal", (False, True))
def test_kernelized_attention_is_projections_and_this(arguments, causal):
    if "feature_map" not in arguments or causal:
        around = keras_kt.KernelizedAttention(
            HEADS, DIM, VALUE_DIM, seed=1, **arguments
        )
        x = array((BATCH, LENGTH, WIDTH))
        mask = random_mask(BATCH, LENGTH)
        expected = around(x, x, value_mask=mask, use_causal_mask=causal)
        within = make(None, **arguments)
        of_heads = around.weights[8:]
        if arguments.get("decay") == "gated":
            # The gate and its bias stay with whom has the tokens.
            *of_heads, bias, gate = of_heads
        for mine, theirs in zip(within.weights, of_heads, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        call = {"key_mask": mask, "use_causal_mask": causal}
        if arguments.get("decay") == "gated":
            gate.assign(array(gate.shape))
            expected = around(x, x, value_mask=mask, use_causal_mask=causal)
            call["decay"] = tf.nn.softplus(x @ gate + bias)[..., tf.newaxis]
        tokens = around.query_dense(x), around.key_dense(x)
        output = within(*tokens, around.value_dense(x), **call)
        np.testing.assert_allclose(
            around.output_dense(output), expected, atol=2e-6
        )


ROUTES = {
    "bidirectional": ({}, {}),
    "mixture": ({"spectral_prior": "mixture"}, {"key_mask": (BATCH, KEYS)}),
    "causal": ({"qk_norm": "l2"}, {"use_causal_mask": True}),
    "signed": ({"feature_map": "trigonometric"}, {"use_causal_mask": True}),
    "quadratic": ({"implementation": "quadratic"}, {"use_causal_mask": True}),
    "dense": ({}, {"attention_mask": (BATCH, HEADS, LENGTH, KEYS)}),
    "dense for all": ({}, {"attention_mask": (1, 1, LENGTH, KEYS)}),
    "dense for all examples": (
        {},
        {"attention_mask": (1, HEADS, LENGTH, KEYS)},
    ),
    "dense for all heads": ({}, {"attention_mask": (BATCH, LENGTH, KEYS)}),
    "dense of pairs": ({}, {"attention_mask": (LENGTH, KEYS)}),
    "dense of keys": ({}, {"attention_mask": (1, 1, 1, KEYS)}),
    "decay": ({"decay": "constant"}, {"use_causal_mask": True}),
    "decay both ways": ({"decay": "constant"}, {"key_mask": (BATCH, KEYS)}),
    "signed decay both ways": (
        {"feature_map": "trigonometric", "decay": "constant"},
        {"key_mask": (BATCH, KEYS)},
    ),
    "gated": ({"decay": "gated"}, {"use_causal_mask": True}),
    "near": ({"near_field": 3}, {"use_causal_mask": True}),
    "near both ways": ({"near_field": 3, "decay": "constant"}, {}),
}


@DENSE
@pytest.mark.parametrize("name", ROUTES)
def test_grouped_heads_equal_repeated_ones(name):
    arguments, call = ROUTES[name]
    call = {
        name: random_mask(*x) if name.endswith("_mask") and x is not True else x
        for name, x in call.items()
    }
    few, repeats = make(**arguments), HEADS // FEW
    full = make(None, **arguments)
    # Every weight of the kernel has the heads as its first axis.
    full.set_weights([np.repeat(w, repeats, 0) for w in few.get_weights()])
    tensors = heads(LENGTH, KEYS)
    repeated = [tensors[0], *(tf.repeat(x, repeats, 2) for x in tensors[1:])]
    of_few, of_full = dict(call), dict(call)
    if few.decay == "gated":
        of_few["decay"] = rates(KEYS)
        of_full["decay"] = tf.repeat(of_few["decay"], repeats, 2)
    output, gradients = with_gradients(few, tensors, **of_few)
    expected, wanted = with_gradients(full, repeated, **of_full)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    axes = [None, 2, 2, *[0] * len(few.trainable_weights)]
    for x, y, axis in zip(gradients, wanted, axes, strict=True):
        if axis is not None:
            sizes = [*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :]]
            y = tf.reduce_sum(tf.reshape(y, sizes), axis + 1)
        scale = max(1.0, np.abs(y).max())
        np.testing.assert_allclose(x / scale, y / scale, atol=1e-5)


@DENSE
def test_scores_of_grouped_heads_weigh_their_values():
    layer = make()
    query, key, value = heads(LENGTH, KEYS)
    mask = random_mask(1, HEADS, LENGTH, KEYS)
    output, scores = layer(
        query, key, value, attention_mask=mask, return_attention_scores=True
    )
    assert scores.shape == (BATCH, HEADS, LENGTH, KEYS)
    np.testing.assert_allclose(np.where(mask, 0.0, scores), 0.0)
    np.testing.assert_allclose(tf.reduce_sum(scores, -1), 1.0, atol=1e-5)
    value = tf.repeat(value, HEADS // FEW, 2)
    by_hand = tf.einsum("bhts,bshe->bthe", scores, value)
    np.testing.assert_allclose(output, by_hand, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    (
        {},
        {"feature_map": "trigonometric"},
        {"feature_map": "trigonometric", "qk_norm": "weighted"},
        {"decay": "gated"},
        {"near_field": 3, "decay": "constant", "qk_norm": "l2"},
    ),
    ids=lambda arguments: "-".join(arguments) or "plain",
)
@pytest.mark.parametrize("is_masked", one_in(2, (True, False)))
def test_steps_equal_the_causal_call(arguments, is_masked):
    layer = make(**arguments)
    tensors = heads()
    call = {"decay": rates()} if layer.decay == "gated" else {}
    if is_masked:
        call["key_mask"] = random_mask(BATCH, LENGTH)
        call["query_mask"] = random_mask(BATCH, LENGTH)
    expected = layer(*tensors, use_causal_mask=True, **call)
    step = tf.function(layer.step, reduce_retracing=True)
    state, outputs, start = layer.initial_state(BATCH), [], 0
    shapes = tf.nest.map_structure(lambda x: (None, *x.shape[1:]), state)
    assert shapes == layer.state_shapes
    for end in (1, 5, LENGTH):
        part = slice(start, end)
        output, state = step(
            *(x[:, part] for x in tensors),
            state,
            **{name: x[:, part] for name, x in call.items()},
        )
        outputs.append(output)
        start = end
    np.testing.assert_allclose(tf.concat(outputs, 1), expected, atol=1e-5)


def test_a_state_resumes_as_arrays_and_under_xla():
    layer = make()
    tensors = [x.numpy() for x in heads()]
    expected = layer(*tensors, use_causal_mask=True)
    _, state = layer.step(*(x[:, :4] for x in tensors), layer.initial_state(2))
    state = tf.nest.map_structure(lambda x: x.numpy(), state)
    step = tf.function(layer.step, jit_compile=True)
    output, _ = step(*(x[:, 4:] for x in tensors), state)
    np.testing.assert_allclose(output, expected[:, 4:], atol=1e-5)


@pytest.mark.parametrize(
    "arguments, call",
    (
        ({}, {}),
        ({}, {"use_causal_mask": True}),
        ({"implementation": "quadratic"}, {}),
        ({"feature_map": "trigonometric"}, {}),
        ({"feature_map": "trigonometric", "qk_norm": "weighted"}, {}),
        ({"decay": "gated", "near_field": 3}, {"use_causal_mask": True}),
        ({"decay": "gated", "near_field": 3}, {}),
    ),
)
def test_what_masks_hide_may_be_nan(arguments, call):
    layer = make(**arguments)
    query, key, value = heads()
    masks = random_mask(BATCH, LENGTH), random_mask(BATCH, LENGTH)[:, ::-1]

    def hidden(fill):
        of_query, of_key = (m[..., np.newaxis, np.newaxis] for m in masks)
        tensors = [tf.where(of_query, query, fill)]
        tensors += [tf.where(of_key, x, fill) for x in (key, value)]
        more = {"query_mask": masks[0], "key_mask": masks[1], **call}
        if layer.decay:
            more["decay"] = tf.where(of_key, rates(), fill)
        return with_gradients(layer, tensors, **more)

    expected, wanted = hidden(0.0)
    output, gradients = hidden(np.nan)
    np.testing.assert_array_equal(output, expected)
    for one, other in zip(gradients, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.any(output.numpy()[~masks[0]])
    assert not np.any(gradients[0].numpy()[~masks[0]])
    assert not np.any(gradients[1].numpy()[~masks[1]])


def test_keras_masks_are_picked_up_and_handed_on():
    layer = make()
    query, key, value = heads()
    mask = tf.constant(random_mask(BATCH, LENGTH))
    expected = layer(query, key, value, query_mask=mask, key_mask=mask)
    query, key, value = (tf.identity(x) for x in (query, key, value))
    query._keras_mask = value._keras_mask = mask
    output = layer(query, key, value)
    np.testing.assert_array_equal(output, expected)
    np.testing.assert_array_equal(output._keras_mask, mask)
    output, _ = layer.step(query, key, value, layer.initial_state(BATCH))
    np.testing.assert_array_equal(output._keras_mask, mask)


def test_lengths_may_be_unknown_and_different():
    layer = make(decay="constant", near_field=2)
    specs = [tf.TensorSpec((None, None, *x.shape[2:])) for x in heads()]
    for causal in (False, True):
        call = tf.function(
            lambda *x, causal=causal: layer(*x, use_causal_mask=causal),
            input_signature=specs,
        )
        for lengths in ((LENGTH, KEYS), (KEYS, LENGTH), (LENGTH, LENGTH)):
            tensors = heads(*lengths)
            expected = layer(*tensors, use_causal_mask=causal)
            np.testing.assert_allclose(call(*tensors), expected, atol=1e-5)


@pytest.mark.parametrize("qk_norm", (None, "l2"))
@pytest.mark.parametrize("near_field", (None, LENGTH))
def test_scaled_heads_give_the_weights(qk_norm, near_field):
    """`bound`, and where all keys are near `exact_kernel`, of scaled heads."""
    layer = make(qk_norm=qk_norm, near_field=near_field)
    query, key, value = heads()
    _, scores = layer(query, key, value, return_attention_scores=True)
    query, key = (
        tf.transpose(x, (0, 2, 1, 3)) for x in layer.scaled(query, key)
    )
    query = tf.reshape(query, (BATCH, FEW, -1, DIM))
    if near_field:
        exact = layer.exact_kernel()
        logits = tf.einsum(
            "bhtcd,bhscd->bhts", exact.queries(query), exact.keys(key)
        )
        weights = tf.nn.softmax(logits)
        # Of a standard normal prior.
        softmax = tf.nn.softmax(tf.matmul(query, key, transpose_b=True))
        np.testing.assert_allclose(weights, softmax, atol=1e-5)
    else:
        bound = layer.bound()
        features = tf.exp(bound.queries(query)), tf.exp(bound.keys(key))
        kernel = tf.matmul(*features, transpose_b=True)
        weights = kernel / tf.reduce_sum(kernel, -1, keepdims=True)
    np.testing.assert_allclose(
        tf.reshape(scores, weights.shape), weights, atol=1e-5
    )
    assert (layer.temperature is None) == (qk_norm is None)


def test_maps_without_a_closed_form_have_no_exact_kernel():
    assert make(feature_map="trigonometric").exact_kernel() is None
    assert make(spectral_prior="generator").exact_kernel() is None


def test_a_prior_of_another_size_takes_the_place():
    layer = make(num_features=20)
    prior = layer.spectral_prior.copy()
    prior.build((FEW, 25, DIM))
    layer.replace_prior(prior)
    assert layer.spectral_prior is prior and layer.num_features == 50
    assert len(layer.weights) == 2 and layer.weights[1].shape == (FEW, 25, DIM)
    tensors = heads()
    output, _ = layer.step(*tensors, layer.initial_state(BATCH))
    np.testing.assert_allclose(
        output, layer(*tensors, use_causal_mask=True), atol=1e-5
    )


def test_a_map_of_all_is_warned_of_once():
    layer = make()
    mask = random_mask(LENGTH, LENGTH)
    with pytest.warns(UserWarning, match="use_causal_mask=True` stay linear"):
        layer(*heads(), attention_mask=mask)
    layer(*heads(), attention_mask=mask)
    # One that all queries share costs nothing.
    linear = make(implementation="linear")
    linear(*heads(), attention_mask=random_mask(BATCH, 1, LENGTH))


def test_wrong_heads_name_the_way_out():
    layer = make()
    query, key, value = heads()
    state = layer.initial_state(BATCH)
    shapes = r"`query` \(batch, query_length, 6, 5\), `key` \(batch, key_length"
    for tensors in (
        (query[..., 0], key, value),
        (query[:, :, :4], key, value),
        (query, tf.repeat(key, 2, 2), value),
        (query, key, value[..., 1:]),
        (query, key[:, 1:], value),
        (query[:1], key, value),
    ):
        wrong(shapes, lambda tensors=tensors: layer(*tensors))
        wrong(shapes, lambda tensors=tensors: layer.step(*tensors, state))
    with pytest.raises(ValueError, match=shapes):
        layer(*(keras.Input((None, 2, 3)) for _ in range(3)))
    wrong(
        "must be a multiple of `num_key_value_heads`.*num_heads=6",
        lambda: keras_kt.LinearAttention(6, 5, num_key_value_heads=4),
    )
    wrong(
        "call the layer itself",
        lambda: layer.step(query[:, :2], key, value, state),
    )
    wrong(
        r"a state of batch size 3.*initial_state\(batch_size\)",
        lambda: layer.step(query, key, value, layer.initial_state(3)),
    )
    other = keras_kt.LinearAttention(HEADS, DIM, VALUE_DIM)
    wrong(
        "`state` must be an AttentionState",
        lambda: layer.step(query, key, value, other.initial_state(BATCH)),
    )
    wrong(
        "Use `attention_mask` for a mask of pairs",
        lambda: layer(query, key, value, key_mask=random_mask(2, 11, 11)),
    )
    refusing = make(implementation="linear")
    wrong(
        "needs the attention matrix",
        lambda: refusing(query, key, value, return_attention_scores=True),
    )


def test_wrong_rates_name_the_way_out():
    tensors = heads()
    gated, plain = make(decay="gated"), make(decay="constant")
    wrong("called without rates", lambda: gated(*tensors))
    wrong("called with rates", lambda: plain(*tensors, decay=rates()))
    wrong(
        r"must be \(batch, key_length, num_key_value_heads, 1\)",
        lambda: gated(*tensors, decay=rates()[..., 0]),
    )
    wrong(
        "`near_field` needs a kernel in closed form",
        lambda: make(near_field=2, feature_map="trigonometric"),
    )


@pytest.mark.parametrize("key_dim", [2, 5, 16])
@pytest.mark.parametrize("feature_map", ["positive", "trigonometric"])
def test_one_small_head_is_right(feature_map, key_dim):
    """TensorFlow's product of a batch with one small matrix was wrong, by up to
    1e35, and wrote past its memory."""
    layer = keras_kt.LinearAttention(1, key_dim, feature_map=feature_map)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 21, 1, key_dim)).astype("float32")
    with tf.GradientTape() as tape:
        inputs = tf.constant(x)
        tape.watch(inputs)
        output = layer(inputs, x, x, use_causal_mask=True)
    gradient = tape.gradient(output, inputs)
    features = layer.bound()
    scaled, _ = layer.scaled(x, x)
    projected = np.asarray(features.queries(tf.transpose(scaled, (0, 2, 1, 3))))
    for row in range(2):
        alone = layer(
            x[row:][:1], x[row:][:1], x[row:][:1], use_causal_mask=True
        )
        np.testing.assert_allclose(output[row], alone[0], atol=1e-5)
        one = features.queries(tf.transpose(scaled[row:][:1], (0, 2, 1, 3)))
        np.testing.assert_allclose(projected[row], one[0], atol=1e-4)
    assert np.isfinite(gradient).all() and np.abs(output).max() < 10.0
