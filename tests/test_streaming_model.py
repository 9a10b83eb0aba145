"""Functional models stream as they are: equal to the whole call, or named."""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers import streams
from tests.helpers.streams import VOCABULARY, WIDTH

layers = keras.layers
LENGTH = 17


def hub_layers():
    """KerasHub's layers, for the tests that need it."""
    return pytest.importorskip("keras_hub").layers


def tokens_of(seed, length=LENGTH, batch=2):
    rng = np.random.default_rng(seed)
    return rng.integers(1, VOCABULARY, (batch, length)).astype("int32")


def attend(x, **options):
    attention = keras_kt.KernelizedAttention(3, 4, seed=0, **options)
    return attention(x, x, use_causal_mask=True)


def small_model(*parts, **options):
    """One that has a state of each kind; `parts` stand before the head."""
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = layers.Embedding(VOCABULARY, WIDTH, **options)(tokens)
    x = x + layers.Conv1D(WIDTH, 3, padding="causal")(x)
    x = layers.GRU(WIDTH, return_sequences=True)(x)
    x = x + hub_layers().PositionEmbedding(50)(x)
    x = x + attend(x)
    for part in parts:
        x = part(x)
    model = keras.Model(tokens, layers.Dense(VOCABULARY)(x))
    streams.shift(model, np.random.default_rng(0))
    return model


@pytest.mark.parametrize(
    "seed",
    [
        seed if seed < 4 else pytest.param(seed, marks=pytest.mark.slow)
        for seed in range(40)
    ],
)
def test_random_models_stream_what_they_call(seed):
    model = streams.random_model(seed)
    tokens = tokens_of(seed)
    actual = streams.run(
        keras_kt.streaming_model(model),
        tokens,
        streams.random_cuts(LENGTH, seed),
    )
    np.testing.assert_allclose(actual, model(tokens), atol=1e-5, rtol=1e-5)
    # Not because it is constant.
    assert np.ptp(actual, axis=1).max() > 1e-2


def paddings():
    """`(batch, length)` masks: padding left, right and in the middle."""
    mask = np.ones((4, LENGTH), "bool")
    mask[0, :5] = False
    mask[1, 11:] = False
    mask[2, [3, 4, 9]] = False
    mask[3, [0, 6, 7, 16]] = False
    return mask


@pytest.mark.parametrize(
    "seed",
    [
        seed if seed < 2 else pytest.param(seed, marks=pytest.mark.slow)
        for seed in range(12)
    ],
)
@pytest.mark.filterwarnings("ignore:Layer 'functional.*support masking")
def test_masks_of_layers_do_what_they_do_in_the_call(seed):
    """Padding is a token to the layers that the mask does not reach."""
    recurrent = streams.recur, streams.attend, streams.decode
    model = streams.random_model(
        seed, mask_zero=True, parts=(*recurrent, streams.nested)
    )
    tokens = np.where(paddings(), tokens_of(seed, batch=4), 0)
    stream = keras_kt.streaming_model(model)
    # Also cut where a stretch begins with padding.
    for cuts in ([0, 3, 4, 8, LENGTH], streams.random_cuts(LENGTH, seed)):
        actual = streams.run(stream, tokens, cuts)
        np.testing.assert_allclose(actual, model(tokens), atol=1e-5, rtol=1e-5)


def test_what_a_mask_hides_is_no_token_for_any_layer():
    """Not for a convolution or a position embedding, which ignore masks."""
    model = small_model()
    stream = keras_kt.streaming_model(model)
    tokens, mask = tokens_of(0, batch=4), paddings()
    actual = streams.run(stream, tokens, [0, 2, 8, LENGTH], mask)
    for row, keep in enumerate(mask):
        expected = model(tokens[row : row + 1, keep])[0]
        np.testing.assert_allclose(actual[row, keep], expected, atol=1e-5)
        assert (actual[row, ~keep] == 0.0).all()
    # Nor does it matter what it is.
    other = np.where(mask, tokens, 3)
    again = streams.run(stream, other, [0, 2, 8, LENGTH], mask)
    np.testing.assert_array_equal(actual, again)


def test_the_quickstart_made_causal_streams_in_one_line():
    pixels = keras.Input((LENGTH, 1))
    x = layers.Conv1D(WIDTH, 5, padding="causal")(pixels)
    x = streams.Positions()(x)
    normed = layers.LayerNormalization()(x)
    features = keras_kt.PositiveFeatures(prefactor="gaussian")
    prior = keras_kt.MixturePrior(num_components=2)
    options = {"spectral_prior": prior, "feature_map": features}
    x = layers.Add()([x, attend(normed, **options)])
    hidden = layers.LayerNormalization()(x)
    hidden = layers.Dense(2 * WIDTH, activation="gelu")(hidden)
    x = layers.Add()([x, layers.Dense(WIDTH)(hidden)])
    x = layers.LayerNormalization()(x)
    model = keras.Model(pixels, layers.Dense(10)(x))
    stream = keras_kt.streaming_model(model)
    image = np.random.default_rng(0).normal(size=(2, LENGTH, 1))
    whole = model(image.astype("float32"))
    for cut in (1, 2, 8, 16):
        actual = streams.run(stream, image, [0, cut, LENGTH])
        np.testing.assert_allclose(actual, whole, atol=1e-5)
    # Of positions beyond the last there is nothing to know.
    _, state = stream.step(image, stream.initial_state(2))
    with pytest.raises(ValueError, match="the 17 positions.*position 18"):
        stream.step(image[:, :1], state)
    traced = tf.function(stream.step)
    assert np.isnan(traced(tf.constant(image[:, :1]), state)[0]).all()


@pytest.mark.parametrize(
    "embed",
    [
        lambda x: hub_layers().TokenAndPositionEmbedding(VOCABULARY, 30, WIDTH)(
            x
        ),
        lambda x: hub_layers().RotaryEmbedding()(
            layers.Embedding(VOCABULARY, WIDTH)(x)
        ),
        lambda x: hub_layers().SinePositionEncoding()(
            layers.Embedding(VOCABULARY, WIDTH)(x)
        ),
    ],
)
def test_positions_of_keras_hub_are_counted(embed):
    tokens = keras.Input((None,), dtype="int32")
    model = keras.Model(tokens, attend(embed(tokens)))
    ids = tokens_of(0)
    actual = streams.run(
        keras_kt.streaming_model(model), ids, [0, 1, 7, LENGTH]
    )
    np.testing.assert_allclose(actual, model(ids), atol=1e-5)


@pytest.mark.slow
def test_weights_are_shared_and_training_goes_on():
    model = small_model()
    stream = keras_kt.streaming_model(model)
    assert [id(w) for w in stream.weights] == [id(w) for w in model.weights]
    before = np.array(model(tokens_of(0)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    model.fit(tokens_of(1), tokens_of(2), verbose=0)
    whole = model(tokens_of(0))
    assert np.abs(whole - before).max() > 1e-3
    actual = streams.run(stream, tokens_of(0), [0, 9, LENGTH])
    np.testing.assert_allclose(actual, whole, atol=1e-5)
    np.testing.assert_array_equal(stream(tokens_of(0)), whole)


def test_making_a_stream_changes_nothing_in_the_model():
    model = small_model(layers.Dropout(0.5))
    config, weights = model.get_config(), model.get_weights()
    keras_kt.streaming_model(model)
    assert model.get_config() == config
    for now, before in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(now, before)


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_steps_compile_with_any_batch_and_length(jit_compile):
    model = small_model()
    stream = keras_kt.streaming_model(model)

    def step(tokens, mask, state):
        return stream.step(tokens, state, mask=mask)

    spec = [
        tf.TensorSpec((None, None), "int32"),
        tf.TensorSpec((None, None), "bool"),
        tf.nest.map_structure(
            lambda x: tf.TensorSpec((None, *x.shape[1:]), x.dtype),
            stream.initial_state(1),
        ),
    ]
    step = tf.function(step, spec, jit_compile=jit_compile)
    for batch, cuts in ((2, [0, 5, 6, LENGTH]), (3, [0, LENGTH])):
        tokens = tokens_of(batch, batch=batch)
        state, outputs = stream.initial_state(batch), []
        for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
            some = tf.constant(tokens[:, begin:end])
            output, state = step(some, tf.ones_like(some, "bool"), state)
            outputs.append(output)
        actual = np.concatenate(outputs, axis=1)
        np.testing.assert_allclose(actual, model(tokens), atol=1e-4)


@pytest.mark.slow
def test_gradients_pass_through_steps():
    model = small_model()
    stream, tokens = keras_kt.streaming_model(model), tokens_of(0)
    weights = model.trainable_weights

    def gradients(outputs):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(outputs()))
        return tape.gradient(loss, [w.value for w in weights])

    def stepped():
        first, state = stream.step(tokens[:, :6], stream.initial_state(2))
        return tf.concat([first, stream.step(tokens[:, 6:], state)[0]], axis=1)

    expected = gradients(lambda: model(tokens))
    for actual, wanted in zip(gradients(stepped), expected, strict=True):
        actual, wanted = map(tf.convert_to_tensor, (actual, wanted))
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(actual, wanted, atol=1e-4 * scale)


def test_mixed_precision_streams_to_its_own_rounding():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = small_model()
        stream = keras_kt.streaming_model(model)
    finally:
        keras.config.set_dtype_policy("float32")
    tokens = tokens_of(0)
    actual = streams.run(stream, tokens, [0, 4, LENGTH]).astype("float32")
    whole = tf.cast(model(tokens), "float32")
    assert np.abs(actual - whole).max() < 0.05 * np.abs(whole).max()
    for x in tf.nest.flatten(stream.initial_state(2)):
        assert x.dtype in (tf.float32, tf.int32)


@pytest.mark.slow
def test_a_saved_model_streams_when_it_is_loaded(tmp_path):
    model = small_model()
    expected = model(tokens_of(0))
    model.save(tmp_path / "model.keras")
    keras_kt.streaming_model(model).save(tmp_path / "stream.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for stream in (
        keras_kt.streaming_model(loaded),
        keras.saving.load_model(tmp_path / "stream.keras"),
    ):
        actual = streams.run(stream, tokens_of(0), [0, 4, LENGTH])
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_state_can_be_saved_and_resumed():
    stream = keras_kt.streaming_model(small_model())
    tokens = tokens_of(0)
    _, state = stream.step(tokens[:, :5], stream.initial_state(2))
    expected, _ = stream.step(tokens[:, 5:], state)
    saved = tf.nest.map_structure(np.asarray, state)
    actual, _ = stream.step(tokens[:, 5:], saved)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
def test_exports_stream(tmp_path):
    model = small_model()
    folder = keras_kt.export_saved_model(model, tmp_path, streaming=True)
    served = tf.saved_model.load(folder).signatures
    tokens = tokens_of(0)
    state = served["initial_state"](batch_size=tf.constant(2))
    outputs = []
    first = served["prefill"](tokens=tf.constant(tokens[:, :6]), **state)
    outputs.append(first.pop("output_0"))
    for position in range(6, LENGTH):
        token = tf.constant(tokens[:, position : position + 1])
        first = served["decode"](tokens=token, **first)
        outputs.append(first.pop("output_0"))
    actual = np.concatenate(outputs, axis=1)
    np.testing.assert_allclose(actual, model(tokens), atol=1e-5)
    mask = paddings()[:2]
    state = served["initial_state"](batch_size=tf.constant(2))
    actual = served["prefill_masked"](
        tokens=tf.constant(tokens), mask=tf.constant(mask), **state
    )["output_0"]
    expected = model(tokens[:1, mask[0]])[0]
    np.testing.assert_allclose(actual[0][mask[0]], expected, atol=1e-5)


def test_generate_takes_a_functional_model():
    model, prompt = small_model(), tokens_of(0, length=4)
    actual = keras_kt.generate(model, prompt, 9, temperature=0)
    expected = prompt
    for _ in range(9):
        best = np.argmax(model(expected)[:, -1], -1)
        expected = np.concatenate([expected, best[:, None]], 1)
    np.testing.assert_array_equal(actual, expected)
    stream = keras_kt.streaming_model(model)
    actual = keras_kt.generate(stream, prompt, 9, temperature=0)
    np.testing.assert_array_equal(actual, expected)


def test_a_model_that_was_generated_from_can_go():
    model = small_model()
    keras_kt.generate(model, tokens_of(0, length=3), 2, seed=0)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_a_model_with_the_methods_is_its_own_stream():
    stream = keras_kt.streaming_model(small_model())
    assert keras_kt.streaming_model(stream) is stream


class Mean(layers.Layer):
    """A running mean that streams by itself, where `step` has no mask."""

    def call(self, x):
        return self.step(x, self.initial_state(tf.shape(x)[0]))[0]

    def initial_state(self, batch_size):
        return tf.zeros((batch_size, WIDTH)), tf.zeros((batch_size,))

    def step(self, x, state):
        total, count = state
        sums = total[:, None] + tf.cumsum(x, 1)
        counts = count[:, None] + 1.0 + range_of(x)
        return sums / counts[..., None], (sums[:, -1], counts[:, -1])


def range_of(x):
    return tf.range(tf.shape(x)[1], dtype="float32")


@pytest.mark.slow
def test_a_layer_of_ones_own_streams_by_its_step(tmp_path):
    model = small_model(Mean())
    stream, tokens = keras_kt.streaming_model(model), tokens_of(0)
    actual = streams.run(stream, tokens, [0, 1, 7, LENGTH])
    np.testing.assert_allclose(actual, model(tokens), atol=1e-5)
    with pytest.raises(ValueError, match="`mask` must be None.*'mean'"):
        stream.step(tokens, stream.initial_state(2), mask=tokens > 0)
    folder = keras_kt.export_saved_model(model, tmp_path, streaming=True)
    assert "prefill_masked" not in tf.saved_model.load(folder).signatures


class WrongStep(Mean):
    def call(self, x):
        return super().step(x, self.initial_state(tf.shape(x)[0]))[0]

    def step(self, x, state):
        return x, state


class Residual(layers.Layer):
    """Mixes tokens by a weight that starts at zero."""

    def build(self, input_shape):
        self.gate = self.add_weight((), "zeros")

    def call(self, x):
        return x + self.gate * keras.ops.mean(x, axis=1, keepdims=True)


class Far(layers.Layer):
    """Sees the token 100 places before."""

    def call(self, x):
        return x + tf.pad(x, [(0, 0), (100, 0), (0, 0)])[:, : tf.shape(x)[1]]


class Slope(layers.Layer):
    """Adds the position by a weight that starts at zero."""

    def build(self, input_shape):
        self.slope = self.add_weight((), "zeros")

    def call(self, x):
        return (
            x + self.slope * tf.range(tf.shape(x)[1], dtype="float32")[:, None]
        )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            lambda x: keras_kt.KernelizedAttention(3, 4, name="both")(x, x),
            "'both', a KernelizedAttention called on .*without "
            "`use_causal_mask=True`.*Call it with",
        ),
        (
            lambda x: keras_kt.KernelizedTransformerEncoder(9, 3)(x),
            "KernelizedTransformerEncoder.*mixes tokens.*TransformerDecoder",
        ),
        (
            lambda x: layers.MultiHeadAttention(3, 4)(
                x, x, use_causal_mask=True
            ),
            "MultiHeadAttention.*mixes tokens.*convert_attention",
        ),
        (
            layers.GlobalAveragePooling1D(name="pool"),
            "'pool', a GlobalAveragePooling1D called on 'add.*pool outside",
        ),
        (layers.MaxPooling1D(2), "MaxPooling1D.*second axis"),
        (layers.Permute((2, 1)), "Permute.*second axis"),
        (
            layers.Bidirectional(layers.GRU(3, return_sequences=True)),
            "Bidirectional.*mixes tokens.*one direction",
        ),
        (layers.GRU(3), "return_sequences=False.*return_sequences=True"),
        (
            layers.LSTM(3, return_sequences=True, go_backwards=True),
            "go_backwards=True.*go_backwards=False",
        ),
        (layers.Conv1D(3, 2, padding="same"), "Conv1D.*padding='same'"),
        (
            layers.SeparableConv1D(3, 3, padding="same", dilation_rate=200),
            "SeparableConv1D.*mixes tokens",
        ),
        (layers.GroupNormalization(2), "mixes tokens.*last axis"),
        (lambda x: keras.ops.cumsum(x, axis=1), "'cumsum.*mixes tokens"),
        (lambda x: x[:, -1], "GetItem.*second axis"),
        (
            lambda x: x - keras.ops.roll(x, 1, axis=0),
            "Roll.*mixes the rows of a batch",
        ),
        (
            lambda x: keras.ops.concatenate([x, x], 1),
            "Concatenate.*second axis",
        ),
        (Residual(), "Residual.*mixes tokens"),
        (Far(), "Far.*mixes tokens"),
        (Slope(), "Slope.*depends on the length or the position.*`positions`"),
        (WrongStep(), "WrongStep.*gives other outputs when it is cut"),
        (
            lambda x: keras_kt.KernelizedTransformerDecoder(9, 3)(x, 2.0 * x),
            "KernelizedTransformerDecoder.*gives other outputs when it is cut",
        ),
    ],
)
def test_what_cannot_stream_is_named_with_its_place(part, message):
    tokens = keras.Input((None, WIDTH))
    model = keras.Model(tokens, part(tokens + attend(tokens)))
    with pytest.raises(ValueError, match=f"must be causal.*{message}"):
        keras_kt.streaming_model(model)


def test_a_place_within_a_model_is_named():
    tokens = keras.Input((None, WIDTH))
    pool = layers.GlobalMaxPooling1D(name="pool")
    inner = keras.Model(tokens, pool(layers.Dense(3)(tokens)), name="inner")
    model = keras.Model(tokens, inner(tokens), name="outer")
    with pytest.raises(ValueError, match="'outer'.*'inner/pool'.*'inner/dense"):
        keras_kt.export_saved_model(model, "unused", streaming=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: keras.Model([x, keras.Input((None, 3))], x), "one input"),
        (lambda x: keras.Sequential([layers.Dense(2)]), "must be built"),
        (lambda x: layers.Dense(2), "`initial_state` and `step`"),
        (
            lambda x: (lambda y: keras.Model(y, 2.0 * y))(keras.Input(())),
            "shape .batch, length",
        ),
    ],
)
def test_other_models_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        keras_kt.streaming_model(make(keras.Input((None, WIDTH))))


def test_bad_input_of_a_step_is_named():
    stream = keras_kt.streaming_model(small_model())
    state, tokens = stream.initial_state(2), tokens_of(0)
    other = {name: x for name, x in state.items() if "gru" not in name}
    for arguments, message in (
        ((tokens[:, :0], state), "at least one new token"),
        ((tokens[:, :, None], state), "`tokens` must be of shape"),
        ((tokens, other), "`state` must be a dict"),
        ((tokens, ()), "`state` must be a dict"),
        ((tokens, stream.initial_state(3)), "`state` must"),
        ((tokens, state, tokens[:, :3] > 0), "`mask` must be of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.step(*arguments)
