"""The transformer blocks: contract, masks, streaming, comparisons."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers import contract

WIDTH = 12


def encoder(**kwargs):
    kwargs = {"dropout": 0.0, "activation": "gelu", "seed": 0, **kwargs}
    return keras_kt.KernelizedTransformerEncoder(20, 3, **kwargs)


def decoder(**kwargs):
    kwargs = {"local_context": 3, "seed": 0, **kwargs}
    return keras_kt.KernelizedTransformerDecoder(20, 3, **kwargs)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {
            "normalize_first": True,
            "local_context": 5,
            "key_dim": 5,
            "spectral_prior": keras_kt.MixturePrior(num_components=2),
            "feature_map": "positive",
            "qk_norm": "l2",
            "kernel_initializer": "he_normal",
            "layer_norm_epsilon": 1e-3,
        },
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
def test_encoder_keeps_the_contract(options, tmp_path):
    contract.layer_contract(
        lambda: encoder(**options), [(2, 11, WIDTH)], tmp_path
    )


@pytest.mark.slow
def test_decoder_keeps_the_contract(tmp_path):
    contract.layer_contract(decoder, [(2, 11, WIDTH)], tmp_path)


@pytest.mark.slow
def test_decoder_with_encoder_keeps_the_contract(tmp_path):
    contract.layer_contract(
        decoder, [(2, 11, WIDTH), (2, 7, WIDTH + 1)], tmp_path
    )


@pytest.mark.parametrize("normalize_first", [False, True])
def test_encoder_is_attention_then_dense_layers(normalize_first):
    """Written out with the block's own weights, in NumPy but for attention."""
    block = encoder(normalize_first=normalize_first, local_context=3)
    x = normal(2, 11, WIDTH)
    actual = block(x)
    weights = {w.path.split("/", 1)[1]: w.numpy() for w in block.weights}

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}/gamma"] + weights[f"{name}/beta"]

    def attend(x):
        kernel = weights["local_context/kernel"]
        padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
        x = x + sum(kernel[i] * padded[:, i : i + 11] for i in range(3))
        return block._self_attention(x, x).numpy()

    def feed_forward(x):
        x = x @ weights["hidden/kernel"] + weights["hidden/bias"]
        x = keras.ops.gelu(x, approximate=False).numpy()
        return x @ weights["output/kernel"] + weights["output/bias"]

    for function, name in (
        (attend, "self_attention_norm"),
        (feed_forward, "feed_forward_norm"),
    ):
        if normalize_first:
            x = x + function(norm(name, x))
        else:
            x = norm(name, x + function(x))
    np.testing.assert_allclose(actual, x, atol=1e-5)


@pytest.mark.parametrize("make", [encoder, decoder])
def test_padding_changes_nothing(make):
    block = make(local_context=5, normalize_first=True)
    x = normal(2, 11, WIDTH)
    mask = np.arange(11) < [[7], [11]]
    plain = block(x[:1, :7])
    spoiled = np.where(mask[..., None], x, np.float32("nan"))
    embedded = tf.constant(spoiled)
    by_argument = (
        block(embedded, padding_mask=mask)
        if make is encoder
        else block(embedded, decoder_padding_mask=mask)
    )
    np.testing.assert_allclose(by_argument[:1, :7], plain, atol=1e-5)
    embedded._keras_mask = tf.constant(mask)
    picked_up = block(embedded)
    np.testing.assert_array_equal(picked_up[mask], by_argument[mask])
    assert picked_up._keras_mask is not None


def test_cross_attention_ignores_padding():
    block = decoder()
    x, memory = normal(2, 5, WIDTH), normal(2, 11, WIDTH, seed=1)
    mask = np.broadcast_to(np.arange(11) < 7, (2, 11))
    padded = block(x, memory, encoder_padding_mask=mask)
    np.testing.assert_allclose(padded, block(x, memory[:, :7]), atol=1e-5)


@pytest.mark.parametrize("cuts", [(1,) * 11, (4, 1, 6), (11,)])
@pytest.mark.parametrize("local_context", [None, 1, 4])
@pytest.mark.parametrize("has_encoder", [False, True])
def test_steps_of_any_size_equal_the_whole(cuts, local_context, has_encoder):
    block = decoder(local_context=local_context, normalize_first=True)
    x = normal(2, 11, WIDTH)
    memory = normal(2, 7, WIDTH, seed=1) if has_encoder else None
    whole = block(x, memory)
    state = block.initial_state(2)
    parts = []
    for part in np.split(x, np.cumsum(cuts)[:-1], axis=1):
        output, state = block.step(part, state, memory)
        parts.append(output)
    np.testing.assert_allclose(tf.concat(parts, 1), whole, atol=1e-5)


def test_options_of_the_layer_stream_too():
    block = decoder(decay="gated", near_field=3, spectral_prior="mixture")
    x = normal(2, 11, WIDTH)
    whole, state = block(x), block.initial_state(2)
    assert isinstance(state.attention, keras_kt.NearFieldState)
    first, state = block.step(x[:, :7], state)
    rest, _ = block.step(x[:, 7:], state)
    np.testing.assert_allclose(tf.concat([first, rest], 1), whole, atol=1e-5)
    again = keras_kt.KernelizedTransformerDecoder.from_config(
        block.get_config()
    )
    assert again.attention_options["near_field"] == 3


def test_future_tokens_do_not_change_the_past():
    block = decoder(local_context=4)
    x = normal(2, 11, WIDTH)
    loud = x.copy()
    loud[:, 6:] *= 1e3
    np.testing.assert_allclose(block(loud)[:, :6], block(x)[:, :6], atol=1e-6)


@keras.saving.register_keras_serializable("tests")
class SoftmaxEncoder(keras_kt.KernelizedTransformerEncoder):
    def make_attention(self, key_dim, name):
        return keras.layers.MultiHeadAttention(
            self.num_heads, key_dim, name=name
        )


def test_subclass_puts_softmax_into_the_same_block():
    block = SoftmaxEncoder(20, 3, local_context=3, normalize_first=True)
    x = normal(2, 11, WIDTH)
    mask = np.arange(11) < [[7], [11]]
    output = block(x, padding_mask=mask)
    np.testing.assert_allclose(output[:1, :7], block(x[:1, :7]), atol=1e-5)
    kernelized = encoder(local_context=3, normalize_first=True)
    kernelized(x)
    shapes = [w.shape for w in block.weights]
    assert set(shapes) <= {w.shape for w in kernelized.weights}


def test_half_precision_state_stays_float32():
    block = decoder(dtype="mixed_bfloat16")
    x = normal(2, 11, WIDTH)
    block(x)
    output, state = block.step(x[:, :4], block.initial_state(2))
    assert output.dtype == "bfloat16"
    assert {t.dtype for t in tf.nest.flatten(state)} == {tf.float32}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: encoder(key_dim=0), "argument `key_dim`"),
        (lambda: encoder(local_context=0), "argument `local_context`"),
        (
            lambda: encoder(key_dim=4, spectral_prior="cauchy"),
            "`spectral_prior` must be one of",
        ),
        (lambda: encoder()(normal(2, 5, 13)), "`num_heads` must divide"),
        (lambda: decoder().initial_state(2), "needs a built block"),
        (lambda: decoder().step(normal(2, 1, WIDTH), 3), "needs a built block"),
        (lambda: _misses_encoder(), "`encoder_sequence` must be given in"),
        (lambda: encoder(spectral="x"), "spectral"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _misses_encoder():
    block = decoder()
    x = normal(2, 5, WIDTH)
    block(x, x)
    block(x)


@pytest.mark.parametrize(
    "options",
    [
        {"decay": "constant"},
        {"decay": "gated"},
        {"near_field": 3},
        {"sliding_window": 3},
        {"rotary_max_wavelength": 100.0},
    ],
    ids=str,
)
def test_a_stream_attends_an_encoder_as_the_call_does(options):
    """Its steps took each token for the first one, and weighed by distance."""
    block = keras_kt.KernelizedTransformerDecoder(13, 2, **options)
    rng = np.random.default_rng(3)
    x, encoded = (
        rng.normal(size=(2, length, 8)).astype("float32") for length in (7, 5)
    )
    expected = block(x, encoded)
    state, outputs = block.initial_state(2), []
    for tokens in (x[:, :3], x[:, 3:4], x[:, 4:]):
        output, state = block.step(tokens, state, encoded)
        outputs.append(output)
    np.testing.assert_allclose(tf.concat(outputs, 1), expected, atol=1e-5)
    # Whatever the encoder's tokens, their order does not matter.
    np.testing.assert_allclose(block(x, encoded[:, ::-1]), expected, atol=1e-5)
