"""Masks in streams: padding takes no place, wherever it stands.

Whatever is asked of a padded batch is asked of each sequence without padding,
one by one.
"""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers.contract import one_in
from tests.helpers.tensors import array, wrong

pytestmark = pytest.mark.filterwarnings("ignore:.*jit_compile.*")

WIDTH = 6
LENGTHS = (5, 11, 8)
PADDED = 13
SIDES = ("left", "right", "inside")
LAYERS = (
    {},
    {"feature_map": "trigonometric", "qk_norm": "l2"},
    {"decay": "gated"},
    {"near_field": 3},
    {"near_field": 4, "decay": "gated", "spectral_prior": "mixture"},
    {"sliding_window": 4, "decay": "gated"},
)


def name_of(options):
    return "-".join(options) if isinstance(options, dict) else str(options)


def padding(side, lengths=LENGTHS, padded=PADDED):
    """A mask with as many tokens as asked for in each row."""
    mask = np.zeros((len(lengths), padded), "bool")
    rng = np.random.default_rng(3)
    for row, length in zip(mask, lengths, strict=True):
        if side == "left":
            row[padded - length :] = True
        elif side == "right":
            row[:length] = True
        else:
            row[np.sort(rng.permutation(padded)[:length])] = True
    return mask


def spoiled(mask, width=WIDTH, fill=np.nan):
    """Tokens of a batch, NaN where masked."""
    x = array((*mask.shape, width))
    return np.where(mask[..., None], x, np.float32(fill))


def with_mask(x, mask):
    """What an Embedding with `mask_zero` gives."""
    x = tf.constant(x)
    x._keras_mask = tf.constant(mask)
    return x


def attention(**options):
    return keras_kt.KernelizedAttention(3, 5, seed=1, **options)


def block(**options):
    options = {"local_context": 4, "normalize_first": True, **options}
    return keras_kt.KernelizedTransformerDecoder(20, 3, seed=0, **options)


def of_rows(function, x, mask):
    """`function` of each sequence without its padding, joined."""
    pairs = zip(x, mask, strict=True)
    return [function(row[keep][None])[0] for row, keep in pairs]


def assert_rows(output, mask, expected, atol=2e-5):
    for row, keep, wanted in zip(output, mask, expected, strict=True):
        np.testing.assert_allclose(row[keep], wanted, atol=atol)


def assert_same_state(state, expected):
    """Every array of two states, however they nest."""
    assert type(state) is type(expected)
    tf.nest.map_structure(np.testing.assert_array_equal, state, expected)


def assert_joined(state, states, atol=1e-4):
    """A batch's state against those of its sequences, one by one."""
    wanted = tf.nest.map_structure(lambda *x: tf.concat(x, 0), *states)
    for one, other in zip(
        tf.nest.flatten(state), tf.nest.flatten(wanted), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=atol, rtol=1e-4)


def in_steps(step, state, x, mask, cuts):
    outputs = []
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        part = slice(start, end)
        output, state = step(x[:, part], state, mask[:, part])
        outputs.append(output)
    return tf.concat(outputs, 1), state


CUTS = ((0, 13), (0, 1, 2, 9, 13), tuple(range(14)))


@pytest.mark.parametrize("causal", (True, False), ids=("causal", "both"))
@pytest.mark.parametrize(
    "route, side",
    [
        # The matrix sees no order but that of the mask.
        pytest.param(
            route,
            side,
            marks=pytest.mark.slow
            if route == "quadratic" and side != "inside"
            else (),
        )
        for route in ("linear", "quadratic")
        for side in SIDES
    ],
)
@pytest.mark.parametrize("options", one_in(2, LAYERS), ids=name_of)
def test_padded_calls_equal_calls_without_padding(options, side, route, causal):
    """Masked tokens pushed real ones out of the near field."""
    if not causal and options.get("feature_map") and "decay" in options:
        return
    layer = attention(implementation=route, **options)
    mask = padding(side)
    x = spoiled(mask)
    kwargs = {"use_causal_mask": causal}
    output = layer(x, x, query_mask=mask, value_mask=mask, **kwargs)
    rows = of_rows(lambda row: layer(row, row, **kwargs), x, mask)
    assert np.isfinite(output).all()
    assert_rows(output, mask, rows)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("options", one_in(2, LAYERS), ids=name_of)
def test_padded_steps_equal_steps_without_padding(options, side):
    layer = attention(**options)
    mask = padding(side)
    x = spoiled(mask)
    layer.build(x.shape, x.shape)
    rows, states = [], []
    for row, keep in zip(x, mask, strict=True):
        output, state = layer.step(row[keep][None], layer.initial_state(1))
        rows.append(output[0])
        states.append(state)

    def step(x, state, mask):
        return layer.step(x, state, query_mask=mask, value_mask=mask)

    for cuts in CUTS:
        output, state = in_steps(step, layer.initial_state(3), x, mask, cuts)
        assert np.isfinite(output).all()
        assert_rows(output, mask, rows)
        assert_joined(state, states)


@pytest.mark.parametrize("options", LAYERS[3:], ids=name_of)
def test_masked_tokens_leave_the_window_as_it_was(options):
    """20 masked tokens after 12 real ones emptied a window of 8."""
    name = next(iter(options))
    layer = attention(**{**options, name: 8})
    x = array((2, 33, WIDTH))
    real = np.concatenate([x[:, :12], x[:, 32:]], 1)
    expected = layer(real, real, use_causal_mask=True)
    state = layer.step(x[:, :12], layer.initial_state(2))[1]
    for count in (1, 20):
        _, after = layer.step(
            1e6 * x[:, :count], state, value_mask=np.zeros((2, count), "bool")
        )
        assert_same_state(after, state)
    output, _ = layer.step(x[:, 32:], after)
    np.testing.assert_allclose(output[:, 0], expected[:, 12], atol=2e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("options", LAYERS, ids=name_of)
def test_keras_masks_are_picked_up_by_call_and_step_alike(options, side):
    """`step` ignored the mask of an Embedding, and warned that it is lost."""
    layer = attention(**options)
    mask = padding(side)
    x = spoiled(mask)
    layer.build(x.shape, x.shape)
    expected = layer(with_mask(x, mask), with_mask(x, mask), use_causal_mask=1)
    tokens = with_mask(x, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output, state = layer.step(tokens, layer.initial_state(3))
    np.testing.assert_allclose(output, expected, atol=2e-5)
    masks = {"query_mask": mask, "value_mask": mask}
    _, wanted = layer.step(x, layer.initial_state(3), **masks)
    assert_same_state(state, wanted)
    np.testing.assert_array_equal(output._keras_mask, mask)
    np.testing.assert_array_equal(tokens._keras_mask, mask)
    # Arguments come before Keras masks.
    everything = np.ones_like(mask)
    finite = with_mask(spoiled(mask, fill=1.0), mask)
    masks = {"query_mask": everything, "value_mask": everything}
    _, state = layer.step(finite, layer.initial_state(3), **masks)
    bare = tf.constant(spoiled(mask, fill=1.0))
    _, wanted = layer.step(bare, layer.initial_state(3), **masks)
    assert_same_state(state, wanted)
    _, unlike = layer.step(finite, layer.initial_state(3))
    # A window alone has forgotten what came before its last tokens.
    forgets = side == "left" and "sliding_window" in options
    assert forgets or any(
        np.abs(one - other).max() > 1e-3
        for one, other in zip(
            tf.nest.flatten(state), tf.nest.flatten(unlike), strict=True
        )
    )


def test_masks_of_query_value_and_key_mean_what_they_mean_in_the_call():
    layer = attention(near_field=3, decay="constant")
    query, value, key = (array((2, 11, 6), seed) for seed in range(3))
    masks = {
        f"{name}_mask": np.random.default_rng(seed).random((2, 11)) < 0.7
        for seed, name in enumerate(("query", "value", "key"))
    }
    expected = layer(query, value, key, use_causal_mask=True, **masks)
    state = layer.initial_state(2)
    output, _ = layer.step(query, state, value, key, **masks)
    np.testing.assert_allclose(output, expected, atol=2e-5)
    tensors = [
        with_mask(x, mask)
        for x, mask in zip((query, value, key), masks.values(), strict=True)
    ]
    output, _ = layer.step(tensors[0], state, *tensors[1:])
    np.testing.assert_allclose(output, expected, atol=2e-5)
    # One row of a mask holds for the batch.
    row = masks["value_mask"][:1]
    output, _ = layer.step(query, state, value_mask=row)
    expected = layer(query, query, value_mask=row, use_causal_mask=True)
    np.testing.assert_allclose(output, expected, atol=2e-5)


BLOCKS = (
    {"local_context": None},
    {},
    {"local_context": 1, "normalize_first": False},
    {"local_context": 3, "near_field": 3, "decay": "gated"},
)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("options", one_in(2, BLOCKS), ids=name_of)
def test_padded_decoders_equal_decoders_without_padding(options, side):
    """`step` took no mask, and padding stood between neighbours."""
    layer = block(**options)
    mask = padding(side)
    x = spoiled(mask)
    layer.build(x.shape)
    rows = of_rows(layer, x, mask)
    assert_rows(layer(x, decoder_padding_mask=mask), mask, rows)
    assert_rows(layer(with_mask(x, mask)), mask, rows)

    def step(x, state, mask):
        return layer.step(x, state, decoder_padding_mask=mask)

    def step_by_keras_mask(x, state, mask):
        output, state = layer.step(with_mask(x, mask), state)
        np.testing.assert_array_equal(output._keras_mask, mask)
        return output, state

    for function in (step, step_by_keras_mask):
        for cuts in CUTS:
            state = layer.initial_state(3)
            output, state = in_steps(function, state, x, mask, cuts)
            assert_rows(output, mask, rows)
    alone = of_rows(
        lambda row: [layer.step(row, layer.initial_state(1))[1]], x, mask
    )
    assert_joined(state, alone)


@pytest.mark.parametrize("local_context", (1, 4, 5))
@pytest.mark.parametrize("side", SIDES)
def test_padded_encoders_equal_encoders_without_padding(side, local_context):
    """Padding inside stood between neighbours in the local context."""
    layer = keras_kt.KernelizedTransformerEncoder(
        20, 3, local_context=local_context, seed=0
    )
    mask = padding(side)
    x = spoiled(mask)
    layer.build(x.shape)
    rows = of_rows(layer, x, mask)
    assert_rows(layer(x, padding_mask=mask), mask, rows)


def test_cross_attention_of_a_step_gives_masked_queries_no_context():
    layer = block()
    mask = padding("inside")
    x, memory = spoiled(mask), array((3, 7, WIDTH), 1)
    expected = layer(x, memory, decoder_padding_mask=mask)
    state = layer.initial_state(3)
    output, _ = layer.step(x, state, memory, decoder_padding_mask=mask)
    np.testing.assert_allclose(output[mask], expected[mask], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_gradients_of_padded_blocks_equal_those_without_padding(side):
    """Through the near field, the local context and the decay, split once."""
    layer = block(near_field=3, decay="gated")
    mask = padding(side)
    x = spoiled(mask, fill=0.0)
    layer.build(x.shape)
    weights = [w.value for w in layer.trainable_weights]

    def gradients(x, mask):
        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            whole = layer(x, decoder_padding_mask=mask)
            first, state = layer.step(
                x[:, :4],
                layer.initial_state(len(x)),
                decoder_padding_mask=mask[:, :4],
            )
            rest, _ = layer.step(
                x[:, 4:], state, decoder_padding_mask=mask[:, 4:]
            )
            output = tf.sin(whole) + tf.concat([first, rest], 1) ** 2
            loss = tf.reduce_sum(tf.where(mask[..., None], output, 0.0))
        return tape.gradient(loss, [x, *weights])

    of_x, *of_weights = gradients(x, mask)
    rows, totals = [], []
    for row, keep in zip(x, mask, strict=True):
        row = row[keep][None]
        of_row, *others = gradients(row, np.ones(row.shape[:2], "bool"))
        rows.append(of_row[0])
        totals.append(others)
    assert_rows(of_x, mask, rows, atol=1e-4)
    assert not of_x.numpy()[~mask].any()
    for actual, *parts in zip(of_weights, *totals, strict=True):
        np.testing.assert_allclose(actual, sum(parts), atol=2e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", (False, True))
def test_masked_steps_compile_with_any_batch_and_length(jit_compile):
    layer = block(near_field=3, decay="gated")
    mask = padding("inside")
    x = spoiled(mask)
    layer.build(x.shape)
    expected, wanted = layer.step(
        x, layer.initial_state(3), decoder_padding_mask=mask
    )

    @tf.function(
        jit_compile=jit_compile,
        input_signature=[
            tf.TensorSpec((None, None, WIDTH)),
            tf.TensorSpec((None, None), "bool"),
        ],
    )
    def step(x, mask):
        state = layer.initial_state(tf.shape(x)[0])
        whole = layer(x, decoder_padding_mask=mask)
        return whole, layer.step(x, state, decoder_padding_mask=mask)

    whole, (output, state) = step(x, mask)
    np.testing.assert_allclose(whole[mask], expected[mask], atol=2e-5)
    np.testing.assert_allclose(output[mask], expected[mask], atol=2e-5)
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state, wanted
    )


def forms_of(state):
    """A state as it comes from a file or another program."""
    plain = tf.nest.map_structure(lambda x: x.numpy(), state)

    def convert(x, make):
        if not hasattr(x, "_fields"):
            return x
        parts = [convert(part, make) for part in x]
        return make(type(x), parts)

    return {
        "numpy": plain,
        "tuples": convert(state, lambda kind, parts: tuple(parts)),
        "lists": convert(plain, lambda kind, parts: list(parts)),
        "dicts": convert(
            plain,
            lambda kind, parts: dict(zip(kind._fields, parts, strict=True)),
        ),
        "float64": tf.nest.map_structure(np.float64, plain),
    }


STREAMS = (
    attention,
    lambda: attention(near_field=3, decay="gated"),
    lambda: block(near_field=3),
)


@pytest.mark.parametrize("make", STREAMS, ids=("sums", "window", "decoder"))
@pytest.mark.parametrize("count", (1, 21))
def test_a_state_is_any_nest_of_arrays_of_its_shapes(make, count):
    """One from a file did for one token and failed for 21."""
    layer = make()
    x = array((2, 30, WIDTH))
    layer.build(*[x.shape] * (1 if hasattr(layer, "intermediate_dim") else 2))
    _, state = layer.step(x[:, :9], layer.initial_state(2))
    expected, after = layer.step(x[:, 9 : 9 + count], state)
    for form, given in forms_of(state).items():
        output, new = layer.step(x[:, 9 : 9 + count], given)
        np.testing.assert_array_equal(output, expected, err_msg=form)
        assert type(new) is type(state)
        tf.nest.map_structure(np.testing.assert_array_equal, new, after)


def test_a_state_of_wrong_arrays_is_named_in_one_error():
    layer = attention()
    x = array((2, 4, WIDTH))
    layer(x, x)
    state = layer.initial_state(2)
    expected = (
        r"`state` must be an AttentionState.*AttentionState\(maximum=\(batch, "
        r"3, 10\), sums=\(batch, 3, 6, 10\)\).*Received: "
    )
    maximum, sums = state
    fields = state._asdict()
    for given, received in (
        (None, "a NoneType"),
        (sums, r"\(2, 3, 6, 10\)"),
        ((maximum,), r"tuple\(\(2, 3, 10\)\)"),
        ([sums, maximum], r"list\(\(2, 3, 6, 10\), \(2, 3, 10\)\)"),
        (state._replace(maximum=sums), r"AttentionState\(maximum=\(2, 3, 6"),
        (state._replace(maximum=maximum[:1]), r".*maximum=\(1, 3"),
        (state._replace(maximum="two"), ".*maximum=a str"),
        ({**fields, "more": maximum}, r"dict\(.*more=\(2, 3, 10\)"),
        (attention(near_field=3).initial_state(2), r"NearFieldState\(far="),
    ):
        wrong(
            f"(?s){expected}{received}",
            lambda given=given: layer.step(x, given),
        )
    decoder = block(near_field=3)
    decoder(x)
    state = decoder.initial_state(2)
    wrong(
        r"a DecoderState.*attention=NearFieldState\(.*context=\(batch, 3, 6\)"
        r".*Received: DecoderState\(attention=AttentionState\(",
        lambda: decoder.step(
            x, state._replace(attention=layer.initial_state(2))
        ),
    )


class Decoder(keras.Model):
    """A causal language model whose stream takes a mask."""

    def __init__(self, blocks=2):
        super().__init__()
        self.embedding = keras.layers.Embedding(17, WIDTH)
        options = {"near_field": 3, "decay": "gated"}
        self.blocks = [block(**options) for _ in range(blocks)]
        self.head = keras.layers.Dense(17)

    def call(self, tokens):
        x = self.embedding(tokens)
        for each in self.blocks:
            x = each(x)
        return self.head(x)

    def initial_state(self, batch_size):
        return [each.initial_state(batch_size) for each in self.blocks]

    def step(self, tokens, state, padding_mask=None):
        x, after = self.embedding(tokens), []
        for each, before in zip(self.blocks, state, strict=True):
            x, new = each.step(x, before, decoder_padding_mask=padding_mask)
            after.append(new)
        return self.head(x), after


def export(model, folder, **kwargs):
    folder = keras_kt.export_saved_model(
        model,
        folder,
        input_signature=[tf.TensorSpec((None, None), "int32", "tokens")],
        streaming=True,
        **kwargs,
    )
    artifact = tf.saved_model.load(folder)
    return artifact, artifact.signatures


def routes_of(model, served):
    """Masked prefill and decoding of one token, by every way to run them."""

    def prefill(tokens, mask):
        state = model.initial_state(tf.shape(tokens)[0])
        return model.step(tokens, state, padding_mask=mask)

    def served_prefill(tokens, mask):
        state = served["initial_state"](batch_size=tf.shape(tokens)[0])
        result = served["prefill_masked"](tokens=tokens, mask=mask, **state)
        return result.pop("output_0"), result

    def served_decode(tokens, state):
        result = served["decode"](tokens=tokens, **state)
        return result.pop("output_0"), result

    return {
        "eager": (prefill, model.step),
        "graph": (tf.function(prefill), tf.function(model.step)),
        "xla": (
            tf.function(prefill, jit_compile=True),
            tf.function(model.step, jit_compile=True),
        ),
        "served": (served_prefill, served_decode),
    }


@pytest.mark.slow
def test_prompts_of_several_lengths_are_served_in_one_batch(tmp_path):
    model = Decoder()
    tokens = np.random.default_rng(0).integers(0, 17, (3, PADDED + 4), "int32")
    model(tokens)
    artifact, served = export(model, tmp_path)
    routes = routes_of(model, served)
    new = tokens[:, PADDED:]
    for side in SIDES:
        mask = padding(side)
        rows = []
        for row, keep, rest in zip(tokens, mask, new, strict=True):
            whole = np.concatenate([row[:PADDED][keep], rest])
            rows.append(model(whole[None])[0])
        for name, (prefill, decode) in routes.items():
            prompt = tf.constant(tokens[:, :PADDED])
            output, state = prefill(prompt, tf.constant(mask))
            assert_rows(output, mask, [row[:-4] for row in rows])
            for i in range(4):
                output, state = decode(tf.constant(new[:, i : i + 1]), state)
                wanted = [row[i - 4] for row in rows]
                np.testing.assert_allclose(
                    output[:, 0], wanted, atol=2e-5, err_msg=f"{side}, {name}"
                )


@pytest.mark.slow
def test_the_masked_endpoint_is_compiled_with_the_others(tmp_path):
    model = Decoder(blocks=1)
    tokens = np.random.default_rng(0).integers(0, 17, (3, PADDED), "int32")
    model(tokens)
    artifact, served = export(model, tmp_path, jit_compile=True)
    mask = padding("inside")
    prefill, _ = routes_of(model, served)["served"]
    output, _ = prefill(tf.constant(tokens), tf.constant(mask))
    expected, _ = model.step(tokens, model.initial_state(3), padding_mask=mask)
    np.testing.assert_allclose(output[mask], expected[mask], atol=2e-5)


@pytest.mark.slow
def test_a_mask_is_served_where_the_step_takes_one(tmp_path):
    layer = attention()
    x = spoiled(padding("left"))
    layer(x, x)

    def export_layer(name, folder):
        folder = keras_kt.export_saved_model(
            layer,
            folder,
            input_signature=[
                tf.TensorSpec((None, None, WIDTH), name=each)
                for each in (name, "value")
            ],
            streaming=True,
        )
        return tf.saved_model.load(folder)

    artifact = export_layer("query", tmp_path / "layer")
    _, inputs = artifact.signatures["prefill_masked"].structured_input_signature
    assert inputs["mask"].dtype == tf.bool
    assert inputs["mask"].shape.as_list() == [None, None]
    _, unmasked = artifact.signatures["prefill"].structured_input_signature
    assert set(inputs) - set(unmasked) == {"mask"}
    wrong("another name than 'mask'", lambda: export_layer("mask", tmp_path))
