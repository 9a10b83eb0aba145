"""Nothing that is called changes what it is given: masks, models, lists.

The mask of a tensor is read by every layer that the tensor goes to, so a layer
that erases it makes the next one attend to padding.
"""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt

WIDTH = 6
LENGTH, KEYS = 5, 7


def array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def masked(length, kept, width=WIDTH, seed=0):
    """A tensor with a Keras mask, of two examples."""
    mask = np.arange(length) < np.reshape(kept, (2, 1))
    x = np.where(mask[..., None], array(2, length, width, seed=seed), 0.0)
    x = tf.constant(x, "float32")
    x._keras_mask = tf.constant(mask)
    return x


def query():
    return masked(LENGTH, (3, 5))


def memory(seed=1):
    return masked(KEYS, (4, 7), WIDTH + 1, seed)


def attention(**kwargs):
    return keras_kt.KernelizedAttention(2, 3, seed=0, **kwargs)


def encoder(**kwargs):
    return keras_kt.KernelizedTransformerEncoder(5, 2, seed=0, **kwargs)


def decoder(**kwargs):
    return keras_kt.KernelizedTransformerDecoder(5, 2, seed=0, **kwargs)


def cached():
    return keras_kt.conversion.CachedKernelizedAttention(2, 3, seed=0)


MASK = tf.constant(np.arange(LENGTH) < [[4], [2]])
KEY_MASK = tf.constant(np.arange(KEYS) < [[6], [3]])
DENSE = tf.constant(array(2, LENGTH, KEYS) > -1.0)
SQUARE = tf.constant(array(2, LENGTH, LENGTH) > -1.0)
DENSE_WARNING = "ignore:.*costs O.length².:UserWarning"

# Each: the layer, its tensors, the other arguments of its call.
CALLS = {
    "attention-self": (attention, lambda: [query()] * 2, {}),
    "attention-cross": (attention, lambda: [query(), memory()], {}),
    "attention-key": (
        attention,
        lambda: [query(), memory(), memory(2)],
        {},
    ),
    "attention-causal": (
        attention,
        lambda: [query()] * 2,
        {"use_causal_mask": True},
    ),
    "attention-explicit-masks": (
        attention,
        lambda: [query(), memory(), memory(2)],
        {"query_mask": MASK, "value_mask": KEY_MASK, "key_mask": KEY_MASK},
    ),
    "attention-dense": (
        attention,
        lambda: [query(), memory()],
        {"attention_mask": DENSE},
    ),
    "attention-scores": (
        attention,
        lambda: [query(), memory()],
        {"return_attention_scores": True},
    ),
    "attention-gates": (
        lambda: attention(use_gate=True, decay="gated"),
        lambda: [query()] * 2,
        {},
    ),
    "attention-trigonometric": (
        lambda: attention(feature_map="trigonometric", qk_norm="l2"),
        lambda: [query(), memory()],
        {},
    ),
    "encoder": (encoder, lambda: [query()], {}),
    "encoder-pre-norm": (
        lambda: encoder(normalize_first=True, local_context=3),
        lambda: [query()],
        {},
    ),
    "encoder-explicit-mask": (
        encoder,
        lambda: [query()],
        {"padding_mask": MASK},
    ),
    "encoder-dense": (encoder, lambda: [query()], {"attention_mask": SQUARE}),
    "decoder": (decoder, lambda: [query()], {}),
    "decoder-pre-norm": (
        lambda: decoder(normalize_first=True, local_context=3),
        lambda: [query(), memory()],
        {},
    ),
    "decoder-memory": (decoder, lambda: [query(), memory()], {}),
    "decoder-explicit-masks": (
        decoder,
        lambda: [query(), memory()],
        {"decoder_padding_mask": MASK, "encoder_padding_mask": KEY_MASK},
    ),
    "cached": (cached, lambda: [query(), memory()], {}),
    "cached-causal": (
        cached,
        lambda: [query()] * 2,
        {"attention_mask": (MASK[:, tf.newaxis],)},
    ),
    "cached-dense": (
        cached,
        lambda: [query(), memory()],
        {"attention_mask": DENSE},
    ),
    "cached-cache": (
        cached,
        lambda: [query()] * 2,
        {"cache": array(2, 2, KEYS, 2, 3), "cache_update_index": 1},
    ),
    "cached-whole-cache": (
        cached,
        lambda: [query()] * 2,
        {"cache": array(2, 2, KEYS, 2, 3), "return_attention_scores": True},
    ),
}


def flat(outputs):
    return [np.asarray(x) for x in keras.tree.flatten(outputs)]


def assert_same(ones, others, atol=0.0):
    for one, other in zip(flat(ones), flat(others), strict=True):
        np.testing.assert_allclose(one, other, rtol=0.0, atol=atol)


def assert_masks_kept(tensors, masks, values):
    for tensor, mask, value in zip(tensors, masks, values, strict=True):
        assert tensor._keras_mask is mask
        np.testing.assert_array_equal(tensor, value)


@pytest.mark.filterwarnings(DENSE_WARNING)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_its_arguments_and_the_next_call_alone(name):
    """A layer erased the Keras masks of its inputs: the second of two
    consumers of a tensor attended to its padding."""
    make, tensors, kwargs = CALLS[name]
    layer, inputs = make(), tensors()
    masks = [x._keras_mask for x in inputs]
    values = [x.numpy() for x in inputs]
    # Warnings are errors: none may say that a mask was destroyed.
    first = layer(*inputs, **kwargs)
    assert_masks_kept(inputs, masks, values)
    assert_same(layer(*inputs, **kwargs), first)
    # Called by its own method, which Keras passes no masks to.
    assert_same(layer.call(*inputs, **kwargs), first)
    # Fresh tensors of the same content tell of no memory either.
    assert_same(layer(*tensors(), **kwargs), first)
    traced = tf.function(lambda *x: layer(*x, **kwargs), autograph=False)
    _ = traced(*inputs)
    assert_masks_kept(inputs, masks, values)


@pytest.mark.filterwarnings(DENSE_WARNING)
@pytest.mark.parametrize("name", CALLS)
def test_consumers_of_shared_inputs_do_not_see_each_other(name):
    """In one functional model; each consumer alone says what is right."""
    make, tensors, kwargs = CALLS[name]
    eager = tensors()
    layers = [make() for _ in range(2)]
    expected = [layer(*eager, **kwargs) for layer in layers]
    distinct = {id(x): x for x in eager}
    inputs = [keras.Input(batch_shape=x.shape) for x in distinct.values()]
    # Padding is zero, so that a layer in the model finds it.
    embedded = [keras.layers.Masking()(x) for x in inputs]
    symbolic = dict(zip(distinct, embedded, strict=True))
    symbolic = [symbolic[id(x)] for x in eager]
    model = keras.Model(inputs, [f(*symbolic, **kwargs) for f in layers])
    arrays = [x.numpy() for x in distinct.values()]
    for _ in range(2):
        assert_same(model(arrays), expected, atol=1e-5)


@keras.saving.register_keras_serializable("keras_kt_tests")
class TwoReaders(keras.Model):
    """A subclassed model, two of whose layers read one encoded source."""

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind
        self.embedding = keras.layers.Embedding(9, WIDTH, mask_zero=True)
        self.readers = [
            keras.layers.MultiHeadAttention(2, 3)
            if kind == "softmax"
            else attention()
            for _ in range(2)
        ]

    def build(self, shape):
        source, target = shape
        self.embedding.build(source)
        for reader in self.readers:
            reader.build((*target, WIDTH), (*source, WIDTH))
        super().build(shape)

    def call(self, inputs):
        source, target = (self.embedding(x) for x in inputs)
        outputs = []
        for reader in self.readers:
            target = target + reader(target, source)
            outputs.append(target)
        return outputs

    def get_config(self):
        return {**super().get_config(), "kind": self.kind}


def functional(reader):
    source, target = keras.Input((None,)), keras.Input((None,))
    embed = keras.layers.Embedding(9, WIDTH, mask_zero=True)
    x, y = embed(source), embed(target)
    outputs = []
    for _ in range(2):
        y = keras.layers.Add()([y, reader()(y, x)])
        outputs.append(y)
    return keras.Model([source, target], outputs)


def sequential(reader):
    class Reader(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.supports_masking = True
            self.readers = [reader(), reader()]

        def build(self, shape):
            for layer in self.readers:
                layer.build(shape, shape)

        def call(self, x):
            return sum(layer(x, x) for layer in self.readers)

    return keras.Sequential(
        [
            keras.Input((None,)),
            keras.layers.Embedding(9, WIDTH, mask_zero=True),
            Reader(),
        ]
    )


def softmax():
    return keras.layers.MultiHeadAttention(2, 3)


def hub(make):
    keras_hub = pytest.importorskip("keras_hub")
    source, target = keras.Input((None,)), keras.Input((None,))
    embed = keras.layers.Embedding(9, WIDTH, mask_zero=True)
    x, y = embed(source), embed(target)
    return make(keras_hub.layers, source, target, x, y)


def hub_decoders(layers, source, target, x, y):
    outputs = []
    for _ in range(2):
        y = layers.TransformerDecoder(5, 2)(y, x)
        outputs.append(y)
    return keras.Model([source, target], outputs)


def hub_encoders(layers, source, target, x, y):
    blocks = [layers.TransformerEncoder(5, 2) for _ in range(2)]
    return keras.Model(
        [source, target], [*(b(x) for b in blocks), blocks[0](x), y]
    )


MODELS = {
    "functional": lambda: functional(attention),
    "subclassed": lambda: TwoReaders("ours"),
    "sequential": lambda: sequential(attention),
    "functional-converted": lambda: functional(softmax),
    "subclassed-converted": lambda: TwoReaders("softmax"),
    "sequential-converted": lambda: sequential(softmax),
    "hub-decoders-converted": lambda: hub(hub_decoders),
    "hub-encoders-converted": lambda: hub(hub_encoders),
}


@pytest.mark.parametrize("name", MODELS)
def test_padding_the_source_of_several_readers_changes_nothing(name):
    """Padded by zeros, or not at all; converted models differed by 0.8."""
    model = MODELS[name]()
    rng = np.random.default_rng(4)
    source = rng.integers(1, 9, size=(2, 5)).astype("float32")
    target = rng.integers(1, 9, size=(2, 3)).astype("float32")
    padded = np.pad(source, ((0, 0), (0, 4)))
    short, long = source, padded
    if not isinstance(model, keras.Sequential):
        short, long = [source, target], [padded, target]
    with warnings.catch_warnings():
        # Keras's own layer, before conversion, destroys masks.
        warnings.simplefilter("ignore")
        model(short)
    if name.endswith("converted"):
        model, report = keras_kt.convert_attention(model)
        assert not report.kept
    louder(model)
    expected = flat(model(short))
    for _ in range(2):
        for output, other in zip(flat(model(long)), expected, strict=True):
            length = other.shape[1]
            np.testing.assert_allclose(
                output[:, :length], other, rtol=0.0, atol=2e-5
            )
    predicted = flat(model.predict(long, verbose=0))
    for output, other in zip(predicted, expected, strict=True):
        np.testing.assert_allclose(
            output[:, : other.shape[1]], other, rtol=0.0, atol=2e-5
        )


def louder(model):
    """Initial weights are so small that attention hardly tells keys apart."""
    rng = np.random.default_rng(3)
    for weight in model.trainable_weights:
        noise = 0.3 * rng.normal(size=weight.shape)
        weight.assign(weight + noise.astype("float32"))


def regularised():
    """Softmax attention whose outputs cost: layers then hold losses."""
    x = keras.Input((LENGTH, WIDTH))
    layer = keras.layers.MultiHeadAttention(
        2, 3, activity_regularizer="l2", name="attention"
    )
    y = keras.layers.Dense(WIDTH, activity_regularizer="l2")(layer(x, x))
    return keras.Model(x, y)


def state_of(model):
    """Attributes that the model's layers have of their own, by identity."""
    return [
        (layer.name, sorted((n, id(v)) for n, v in vars(layer).items()))
        for layer in model._flatten_layers()
    ]


def test_conversion_and_its_tools_leave_models_as_they_were():
    """Dead tensors of a graph stood in `model.losses` after a conversion."""
    model = regularised()
    batch = array(2, LENGTH, WIDTH)
    model.compile("sgd", "mse")
    model(batch)
    before = [float(x) for x in model.losses], state_of(model)
    converted, _ = keras_kt.convert_attention(model)
    converted(batch)
    losses = [float(x) for x in converted.losses]
    attributes = state_of(converted)
    for use in (
        lambda: keras_kt.conversion.attention_error(converted, batch),
        lambda: keras_kt.conversion.attention_error(
            converted, batch, teacher=model
        ),
        lambda: keras_kt.conversion.distill(converted, model, batch, steps=1),
        lambda: keras_kt.diagnostics.attention_maps(converted, batch),
        lambda: keras_kt.diagnostics.health(converted, batch),
    ):
        use()
        assert ([float(x) for x in model.losses], state_of(model)) == before
        assert [float(x) for x in converted.losses] == losses
        assert state_of(converted) == attributes


class Live(keras.layers.Layer):
    """A block whose configuration holds its own layer."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def build(self, shape):
        self.inner.build(shape, shape)

    def call(self, x):
        return self.inner(x, x)

    def get_config(self):
        return {**super().get_config(), "inner": self.inner}


def test_layers_of_the_original_are_not_shared_with_its_copy():
    x = keras.Input((LENGTH, WIDTH))
    model = keras.Model(x, Live(softmax())(x))
    model(array(2, LENGTH, WIDTH))
    before = state_of(model)
    with pytest.raises(ValueError, match="must describe layers"):
        keras_kt.convert_attention(model)
    assert state_of(model) == before


def test_hooks_nest():
    """The inner one removed the outer one's replacement with its own."""
    model, _ = keras_kt.convert_attention(regularised())
    batch = array(2, LENGTH, WIDTH)
    linear = model(batch)
    with keras_kt.conversion.closed_form_attention(model):
        exact = model(batch)
        assert np.abs(exact - linear).max() > 1e-6
        keras_kt.conversion.attention_error(model, batch)
        np.testing.assert_array_equal(model(batch), exact)
    np.testing.assert_array_equal(model(batch), linear)


def test_arguments_that_are_containers_stay_as_they_were():
    """Lists, dictionaries and instances that a user goes on using."""
    prior = keras_kt.MixturePrior(num_components=2)
    feature_map = keras_kt.PositiveFeatures("softmax")
    axes, shape, chosen = [1], [WIDTH], ["attention"]
    counts, system = {"attention": 12}, keras_kt.paper_system("Performer", 3)
    options = {"spectral_prior": prior, "feature_map": feature_map}
    given = (axes, shape, chosen, counts, options)
    before = repr(given), prior.get_config(), feature_map.get_config()
    names = sorted(system)
    x = array(2, LENGTH, WIDTH)
    layer = attention(attention_axes=axes, output_shape=shape, **options)
    layer(x, x)
    encoder(**options)(x)
    attention(**system)(x, x)
    keras_kt.convert_attention(
        regularised(), layers=chosen, num_features=counts
    )
    after = repr(given), prior.get_config(), feature_map.get_config()
    assert after == before and names == sorted(system)
    assert not prior.built and not feature_map.built
    config = layer.get_config()
    copy = keras.tree.map_structure(lambda value: value, config)
    keras_kt.KernelizedAttention.from_config(config)
    assert config == copy
