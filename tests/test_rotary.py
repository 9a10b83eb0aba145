"""Rotary positions of layers: against KerasHub and float64 NumPy."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt.layers import rotary
from tests.helpers import cases, reference
from tests.helpers.contract import layer_contract
from tests.helpers.tensors import array, wrong

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*jit_compile.*"),
    pytest.mark.filterwarnings("ignore:.*costs O.length²"),
]

BATCH, LENGTH, HEADS, FEW, DIM, VALUE_DIM, WIDTH = 2, 13, 6, 3, 4, 7, 17
WAVELENGTH = 30.0


def heads(length=LENGTH, keys=None):
    keys = length if keys is None else keys
    return [
        array((BATCH, length, HEADS, DIM), seed=1),
        array((BATCH, keys, FEW, DIM), seed=2),
        array((BATCH, keys, FEW, VALUE_DIM), seed=3),
    ]


def make(**options):
    layer = keras_kt.LinearAttention(
        HEADS,
        DIM,
        VALUE_DIM,
        FEW,
        seed=1,
        **{"rotary_max_wavelength": WAVELENGTH, **options},
    )
    layer.build(*(x.shape for x in heads()))
    return layer


def mask_of(side, length=LENGTH):
    """Padding on a side, or in between."""
    if side is None:
        return None
    mask = np.ones((BATCH, length), "bool")
    if side == "left":
        mask[0, :5] = mask[1, :2] = False
    elif side == "right":
        mask[0, -5:] = mask[1, -2:] = False
    else:
        mask[0, [0, 3, 4]] = mask[1, [2, length - 3]] = False
    return mask


SIDES = ("left", "right", "inside")


# The oracle.


def places_of(mask, length):
    """Visible keys up to each query, less one, counted one by one."""
    places = np.zeros((len(mask), length))
    for row, keep in zip(places, mask, strict=True):
        seen = 0
        for t in range(length):
            seen += keep[t] if t < len(keep) else 1
            row[t] = seen - 1
    return places


def turned(x, places, wavelength=WAVELENGTH):
    """Complex numbers of the two halves, multiplied by e^(i·angle).

    `x` is heads first. Real and imaginary parts are kept apart, since a
    complex step has an imaginary part of its own.
    """
    half = x.shape[-1] // 2
    angles = np.zeros((*places.shape, half))
    for j in range(half):
        angles[..., j] = places * wavelength ** (-j / half)
    turn = np.exp(1j * angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    c, s = turn.real, turn.imag
    return np.concatenate([a * c - b * s, a * s + b * c], -1)


def oracle(layer, query, key, value, mask, causal, rates=None):
    """Outputs, heads first, in float64 or complex."""
    repeats = HEADS // FEW
    weights = {**cases.weights_of(layer)}
    frequencies = [
        np.repeat(x, repeats, 0)
        for x in cases.reference_frequencies(
            layer.spectral_prior,
            weights,
            cases.reference_noise(layer.spectral_prior),
        )
    ]
    kind = cases.reference_kind(layer.feature_map, weights)
    if "smoothing" in kind:
        kind["smoothing"] = np.repeat(kind["smoothing"], repeats, 0)
    length, keys = query.shape[2], key.shape[2]
    keep = np.ones((BATCH, keys), "bool") if mask is None else mask
    places = places_of(keep, max(length, keys))
    if layer.rotary_max_wavelength:
        query = turned(query, places[:, :length])
        key = turned(key, places[:, :keys])
    key, value = (np.repeat(x, repeats, 1) for x in (key, value))
    if "temperature" in weights:
        temperature = reference.softplus(weights["temperature"])
        scale = np.sqrt(np.repeat(temperature, repeats, 0))[:, None]
        query, key = (
            scale * x / np.sqrt((x**2).sum(-1, keepdims=True))
            for x in (query, key)
        )
    else:
        query, key = (x * DIM**-0.25 for x in (query, key))
    phi = [reference.features(x, frequencies, kind) for x in (query, key)]
    matrix = np.einsum("bhtf,bhsf->bhts", *phi)
    if layer.near_field:
        exact = reference.gaussian_kernel(
            query, key, frequencies, kind["prefactor"]
        )
        near = reference.distances(keep, length) < layer.near_field
        matrix = np.where(near, exact, matrix)
    seen = np.ones((BATCH, 1, length, keys)) * keep[:, None, None]
    seen = np.tril(seen) if causal else seen
    if layer.decay == "constant":
        rate = reference.softplus(weights["decay_rate"])[None, :, None]
        rates = np.broadcast_to(rate, (BATCH, FEW, keys))
    if layer.decay:
        fades = reference.fading(rates.astype("float64"), keep)
        seen = seen * np.repeat(fades, repeats, 1)
    limit = 1e-2 if kind["map"] == "trigonometric" else 0.0
    return reference.attention_of(matrix, value, seen, limit)


def first(x):
    """Heads first, or tokens first again."""
    return np.swapaxes(np.asarray(x), 1, 2)


ROUTES = {
    "linear": ({}, {}),
    "causal": ({}, {"use_causal_mask": True}),
    "quadratic": ({"implementation": "quadratic"}, {"use_causal_mask": True}),
    "normed": ({"qk_norm": "l2"}, {"use_causal_mask": True}),
    "signed": ({"feature_map": "trigonometric"}, {"use_causal_mask": True}),
    "signed both ways": ({"feature_map": "trigonometric"}, {}),
    "decay": ({"decay": "constant"}, {"use_causal_mask": True}),
    "decay both ways": ({"decay": "constant"}, {}),
    "gated": ({"decay": "gated"}, {"use_causal_mask": True}),
    "near": (
        {"near_field": 3, "spectral_prior": "mixture"},
        {"use_causal_mask": True},
    ),
    "near both ways": ({"near_field": 3, "decay": "constant"}, {}),
    "near quadratic": ({"near_field": 3, "implementation": "quadratic"}, {}),
}


def answers(layer, mask, call):
    """Outputs and gradients to queries and keys, and the oracle's."""
    tensors = [tf.constant(x) for x in heads()]
    call, rates = dict(call), None
    if layer.decay == "gated":
        rates = np.abs(array((BATCH, LENGTH, FEW, 1), seed=4))
        call["decay"], rates = rates, first(rates)[..., 0]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = layer(*tensors, key_mask=mask, **call)
        upstream = array(output.shape, seed=5)
        loss = tf.reduce_sum(output * upstream)
    gradients = tape.gradient(loss, tensors)
    arrays = [first(x).astype("float64") for x in heads()]
    causal = call.get("use_causal_mask", False)

    def outputs(index, x):
        now = [*arrays[:index], x, *arrays[index + 1 :]]
        return oracle(layer, *now, mask, causal, rates)[0]

    wanted = []
    for index in (0, 1):
        # One number of one token at a time: a rotation mixes two of a head.
        x, gradient = arrays[index], np.zeros_like(arrays[index])
        for token, d in np.ndindex(x.shape[2:]):
            moved = x.astype("complex128")
            moved[:, :, token, d] += 1j * reference.STEP
            losses = (outputs(index, moved) * first(upstream)).sum((-1, -2))
            losses = losses.reshape(*x.shape[:2], -1).sum(-1)
            gradient[:, :, token, d] = losses.imag / reference.STEP
        wanted.append(first(gradient))
    return output, gradients[:2], first(outputs(0, arrays[0])).real, wanted


@pytest.mark.parametrize("side", (None, "inside"))
@pytest.mark.parametrize("name", ROUTES)
def test_every_route_matches_float64_numpy(name, side):
    options, call = ROUTES[name]
    layer = make(**options)
    output, gradients, expected, wanted = answers(layer, mask_of(side), call)
    np.testing.assert_allclose(output, expected, atol=2e-5)
    for one, other in zip(gradients, wanted, strict=True):
        scale = max(1.0, np.abs(other).max())
        np.testing.assert_allclose(one / scale, other / scale, atol=5e-5)


def test_places_matter():
    """Else the oracle could agree with a layer that turns nothing."""
    tensors = heads()
    for name, (options, call) in ROUTES.items():
        if options.get("decay") != "gated":
            here, there = (
                make(**options),
                make(**options, rotary_max_wavelength=None),
            )
            there.set_weights(here.get_weights())
            apart = here(*tensors, **call) - there(*tensors, **call)
            assert np.abs(apart).max() > 1e-2, name


@pytest.mark.parametrize("side", (None, "inside"))
def test_scores_are_of_turned_heads(side):
    layer, mask = make(near_field=2), mask_of(side)
    output, scores = layer(
        *heads(), key_mask=mask, return_attention_scores=True
    )
    arrays = [first(x).astype("float64") for x in heads()]
    expected, weights = oracle(layer, *arrays, mask, False)
    np.testing.assert_allclose(scores, weights, atol=2e-5)
    np.testing.assert_allclose(output, first(expected), atol=2e-5)


@pytest.mark.parametrize("causal", (True, False), ids=("causal", "both"))
@pytest.mark.parametrize("lengths", ((5, 11), (11, 5)))
@pytest.mark.parametrize("masked", (False, True))
def test_queries_stand_where_keys_do_and_count_on(lengths, causal, masked):
    """Attention to another sequence, of static and of dynamic length."""
    layer, tensors = make(), heads(*lengths)
    mask = mask_of("inside", lengths[1]) if masked else None
    output = layer(*tensors, key_mask=mask, use_causal_mask=causal)
    arrays = [first(x).astype("float64") for x in tensors]
    expected, _ = oracle(layer, *arrays, mask, causal)
    np.testing.assert_allclose(output, first(expected), atol=2e-5)
    dynamic = tf.function(
        lambda *x: layer(*x, key_mask=mask, use_causal_mask=causal),
        input_signature=[
            tf.TensorSpec((None, None, *x.shape[2:])) for x in tensors
        ],
    )
    np.testing.assert_allclose(dynamic(*tensors), output, atol=1e-5)


# Of the rotation alone.


def test_the_rotation_is_keras_hubs():
    hub = pytest.importorskip("keras_hub")
    for wavelength in (100, 10000):
        theirs = hub.layers.RotaryEmbedding(max_wavelength=wavelength)
        for start in (0, 7):
            found = rotary.rotate(
                *(tf.constant(x) for x in heads(31)[:2]),
                wavelength,
                start=tf.fill((BATCH,), float(start)),
            )
            for x, mine in zip(heads(31), found, strict=False):
                expected = theirs(x, start_index=start)
                np.testing.assert_allclose(mine, expected, atol=1e-6)


@pytest.mark.parametrize("start", (0, 1000, 16384, 10**6))
def test_far_places_keep_their_angles(start):
    """A float32 product loses 0.06 radians at a million."""
    x = array((BATCH, 31, HEADS, 8))
    found, _ = rotary.rotate(
        tf.constant(x), tf.constant(x), 1e4, start=tf.fill((BATCH,), start / 1)
    )
    places = np.tile(start + np.arange(31.0), (BATCH, 1))
    expected = turned(first(x).astype("float64"), places, 1e4)
    np.testing.assert_allclose(found, first(expected), atol=2e-3)


def test_lengths_and_padding_are_kerashubs_by_index():
    """Contiguous padding moves all places alike, and differences matter."""
    hub = pytest.importorskip("keras_hub")
    turn = hub.layers.RotaryEmbedding(max_wavelength=WAVELENGTH)
    layer = make(near_field=LENGTH + 1, qk_norm=None)
    query, key, value = heads()
    q, k = (np.asarray(turn(x), "float64") for x in (query, key))
    k, value = (np.repeat(x, HEADS // FEW, 2) for x in (k, value))
    logits = np.einsum("bthd,bshd->bhts", q, k) * DIM**-0.5
    for side in (None, "left", "right"):
        mask = mask_of(side)
        seen = np.ones((BATCH, LENGTH), "bool") if side is None else mask
        for causal in (True, False):
            pairs = seen[:, None, None] & seen[:, None, :, None]
            pairs = np.tril(pairs) if causal else pairs
            weights = np.where(pairs, np.exp(logits), 0.0)
            weights /= weights.sum(-1, keepdims=True) + 1e-300
            expected = np.einsum("bhts,bshe->bthe", weights, value)
            output = layer(
                *heads(),
                query_mask=mask,
                key_mask=mask,
                use_causal_mask=causal,
            )
            np.testing.assert_allclose(output, expected, atol=1e-5)


# Padding and steps.

LAYERS = (
    {},
    {"feature_map": "trigonometric"},
    {"near_field": 3, "decay": "gated"},
)
CUTS = ((0, LENGTH), (0, 1, 2, 9, LENGTH), tuple(range(LENGTH + 1)))


def attention(**options):
    return keras_kt.KernelizedAttention(
        3, 4, seed=1, **{"rotary_max_wavelength": WAVELENGTH, **options}
    )


def block(**options):
    return keras_kt.KernelizedTransformerDecoder(
        20, 3, key_dim=4, seed=0, rotary_max_wavelength=WAVELENGTH, **options
    )


def in_steps(step, state, x, mask, cuts):
    outputs = []
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        part = slice(start, end)
        output, state = step(x[:, part], state, mask[:, part])
        outputs.append(output)
    return tf.concat(outputs, 1), state


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "options", LAYERS, ids=lambda options: "-".join(options) or "plain"
)
def test_padded_calls_and_steps_equal_those_without_padding(options, side):
    layer, mask = attention(**options), mask_of(side)
    x = np.where(mask[..., None], array((BATCH, LENGTH, WIDTH)), np.nan)
    layer.build(x.shape, x.shape)
    whole = layer(x, x, query_mask=mask, value_mask=mask, use_causal_mask=True)

    def step(x, state, mask):
        return layer.step(x, state, query_mask=mask, value_mask=mask)

    stepped = [
        in_steps(step, layer.initial_state(BATCH), x, mask, cuts)
        for cuts in CUTS
    ]
    for row, keep in enumerate(mask):
        alone = x[row, keep][None]
        expected = layer(alone, alone, use_causal_mask=True)[0]
        for output in (whole, *(output for output, _ in stepped)):
            np.testing.assert_allclose(output[row][keep], expected, atol=2e-5)
    for _, state in stepped:
        np.testing.assert_array_equal(state.position, mask.sum(1))
    if "feature_map" not in options:
        both = layer(x, x, query_mask=mask, value_mask=mask)
        for row, keep in enumerate(mask):
            alone = x[row, keep][None]
            expected = layer(alone, alone)[0]
            np.testing.assert_allclose(both[row][keep], expected, atol=2e-5)


def test_streams_of_a_batch_stand_at_places_of_their_own():
    """One stream a token ahead of another, as states of both are joined."""
    layer = make()
    tensors = heads()
    expected = layer(*tensors, use_causal_mask=True)
    state = layer.initial_state(BATCH)
    mask = np.array([[True], [False]])
    first_token = [x[:, :1] for x in tensors]
    _, state = layer.step(*first_token, state, key_mask=mask)
    np.testing.assert_array_equal(state.position, [1.0, 0.0])
    now = [np.stack([x[0, 1:], x[1, :-1]]) for x in tensors]
    output, state = layer.step(*now, state)
    np.testing.assert_allclose(output[0], expected[0, 1:], atol=1e-5)
    np.testing.assert_allclose(output[1], expected[1, :-1], atol=1e-5)
    np.testing.assert_array_equal(state.position, [LENGTH, LENGTH - 1])


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", (False, True))
def test_steps_resume_from_arrays_of_any_batch_and_length(jit_compile):
    layer = make(near_field=3)
    tensors = heads()
    expected = layer(*tensors, use_causal_mask=True)
    state = layer.initial_state(BATCH)
    assert isinstance(state, keras_kt.RotaryState)
    assert isinstance(state.attention, keras_kt.NearFieldState)
    shapes = tf.nest.map_structure(lambda x: (None, *x.shape[1:]), state)
    assert shapes == layer.state_shapes
    _, state = layer.step(*(x[:, :4] for x in tensors), state)
    step = tf.function(
        layer.step,
        jit_compile=jit_compile,
        input_signature=[
            *(tf.TensorSpec((None, None, *x.shape[2:])) for x in tensors),
            tf.nest.map_structure(
                lambda x: tf.TensorSpec((None, *x.shape[1:])), state
            ),
        ],
    )
    rest = [x[:, 4:] for x in tensors]
    output, _ = step(*rest, state)
    np.testing.assert_allclose(output, expected[:, 4:], atol=1e-5)
    plain = {
        "attention": tuple(
            tf.nest.map_structure(lambda x: x.numpy(), tuple(state.attention))
        ),
        "position": np.float64(state.position),
    }
    output, _ = layer.step(*rest, plain)
    np.testing.assert_allclose(output, expected[:, 4:], atol=1e-5)
    wrong(
        r"RotaryState\(attention=NearFieldState\(.*position=\(batch,\)\)",
        lambda: layer.step(*rest, state.attention),
    )


@pytest.mark.parametrize("side", SIDES)
def test_decoders_step_as_they_are_called(side):
    layer, mask = block(local_context=3), mask_of(side)
    x = array((BATCH, LENGTH, WIDTH))
    expected = layer(x, decoder_padding_mask=mask)

    def step(x, state, mask):
        return layer.step(x, state, decoder_padding_mask=mask)

    for cuts in CUTS:
        state = layer.initial_state(BATCH)
        output, _ = in_steps(step, state, x, mask, cuts)
        np.testing.assert_allclose(output[mask], expected[mask], atol=2e-5)


def test_attention_to_an_encoder_has_no_places():
    """A step does not know how many tokens were before."""
    layer = block()
    x, memory = array((BATCH, LENGTH, WIDTH)), array((BATCH, 7, WIDTH), 1)
    expected = layer(x, memory)
    state = layer.initial_state(BATCH)
    outputs = []
    for t in range(LENGTH):
        output, state = layer.step(x[:, t : t + 1], state, memory)
        outputs.append(output)
    np.testing.assert_allclose(tf.concat(outputs, 1), expected, atol=2e-5)


@pytest.mark.slow
def test_a_stream_is_served(tmp_path):
    layer, x = attention(), array((BATCH, LENGTH, WIDTH))
    expected = layer(x, x, use_causal_mask=True)
    folder = keras_kt.export_saved_model(
        layer,
        tmp_path,
        input_signature=[
            tf.TensorSpec((None, None, WIDTH), name=name)
            for name in ("query", "value")
        ],
        streaming=True,
    )
    artifact = tf.saved_model.load(folder)
    served = artifact.signatures
    state = served["initial_state"](batch_size=tf.constant(BATCH))
    names = {"state_0_maximum", "state_0_sums", "state_0_position"}
    assert set(state) == names
    result = served["prefill"](query=tf.constant(x[:, :10]), **state)
    result.pop("output_0")
    result = served["decode"](query=tf.constant(x[:, 10:11]), **result)
    np.testing.assert_allclose(
        result["output_0"], expected[:, 10:11], atol=1e-5
    )


# Layers, arguments, files.


@pytest.mark.slow
@pytest.mark.parametrize("causal", (True, False), ids=("causal", "both"))
def test_contract(causal, tmp_path):
    shape = BATCH, LENGTH, WIDTH
    layer_contract(
        attention,
        (shape, shape),
        tmp_path,
        call={"use_causal_mask": causal},
        jit_fit=causal,
    )


@pytest.mark.slow
def test_contract_of_heads_and_blocks(tmp_path):
    layer_contract(
        functools.partial(
            keras_kt.LinearAttention,
            HEADS,
            DIM,
            VALUE_DIM,
            FEW,
            rotary_max_wavelength=WAVELENGTH,
            near_field=3,
            seed=1,
        ),
        [x.shape for x in heads()],
        tmp_path,
        call={"use_causal_mask": True},
        known=2,
    )
    layer_contract(
        functools.partial(block, normalize_first=True),
        [(BATCH, LENGTH, WIDTH)],
        tmp_path,
    )


def test_half_precision_turns_in_float32():
    """bfloat16 knows no place beyond 256."""
    x = array((1, 400, WIDTH), scale=0.5)
    full = attention(num_features=64)
    expected = full(x, x, use_causal_mask=True)
    half = attention(num_features=64, dtype="mixed_bfloat16")
    half.build(x.shape, x.shape)
    half.set_weights(full.get_weights())
    output = half(x, x, use_causal_mask=True)
    assert output.dtype == tf.bfloat16
    output = tf.cast(output, tf.float32)
    np.testing.assert_allclose(output, expected, atol=0.05)


def test_configurations_without_positions_load():
    """Files of versions that had none."""
    for layer in (attention(), make()):
        config = layer.get_config()
        assert config["rotary_max_wavelength"] == WAVELENGTH
        again = type(layer).from_config(config)
        assert again.get_config() == config
        config.pop("rotary_max_wavelength")
        assert type(layer).from_config(config).rotary_max_wavelength is None


def test_scaled_heads_are_turned():
    layer, mask = make(), mask_of("inside")
    query, key, _ = heads()
    found = layer.scaled(query, key, mask)
    places = places_of(mask, LENGTH)
    for x, mine in zip((query, key), found, strict=True):
        expected = first(turned(first(x), places)) * DIM**-0.25
        np.testing.assert_allclose(mine[mask], expected[mask], atol=1e-6)


def test_diagnostics_see_turned_heads():
    x = keras.Input((None, WIDTH))
    layer = attention(num_features=4096)
    model = keras.Model(x, layer(x, x))
    data = array((BATCH, LENGTH, WIDTH), scale=0.5)
    (errors,) = keras_kt.diagnostics.kernel_errors(model, data).values()
    assert errors.max() < 0.1
    (found,) = keras_kt.diagnostics.attention_maps(model, data)
    arrays = [first(d(data)) for d in (layer.query_dense, layer.key_dense)]
    places = np.tile(np.arange(LENGTH), (BATCH, 1))
    query, key = (turned(x.astype("float64"), places) for x in arrays)
    logits = np.einsum("bhtd,bhsd->bhts", query, key) * 4**-0.5
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found.softmax, weights, atol=1e-5)


def test_what_cannot_be_turned_is_refused():
    for bad in (0, -1.0, "long", True):
        wrong(
            "`rotary_max_wavelength` must be a positive number or `None`",
            lambda bad=bad: attention(rotary_max_wavelength=bad),
        )
    wrong(
        "`key_dim`, the size of a head, must be even.*key_dim=5",
        lambda: keras_kt.KernelizedAttention(
            3, 5, rotary_max_wavelength=WAVELENGTH
        ),
    )
    grid = array((BATCH, 3, 5, WIDTH))
    wrong("single attention axis", lambda: attention()(grid, grid))
    # Along one axis of a grid there is an order.
    layer = attention(attention_axes=(1,))
    output = layer(grid, grid)
    rows = np.swapaxes(grid, 1, 2).reshape(-1, 3, WIDTH)
    plain = attention()
    plain.build(rows.shape, rows.shape)
    plain.set_weights(layer.get_weights())
    expected = np.reshape(plain(rows, rows), (BATCH, 5, 3, WIDTH))
    np.testing.assert_allclose(output, np.swapaxes(expected, 1, 2), atol=1e-5)
