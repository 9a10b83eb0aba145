"""KerasHub's `generate` of converted models: states in the place of a cache.

The oracle is KerasHub's own sampler without a cache, with a converted model
that is called on the whole prefix for every token.
"""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt.conversion import hub_cache
from keras_kt.conversion.find import attention_layers

keras_hub = pytest.importorskip(
    "keras_hub", reason="keras-hub is an optional package: pip install it"
)

VOCABULARY, POSITIONS = 31, 19
GPT2 = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 10,
    "intermediate_dim": 14,
    "max_sequence_length": POSITIONS,
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def gpt2(**kwargs):
    backbone = keras_hub.models.GPT2Backbone(**{**GPT2, **kwargs})
    return louder(keras_hub.models.GPT2CausalLM(backbone))


def opt(**kwargs):
    backbone = keras_hub.models.OPTBackbone(**{**GPT2, **kwargs})
    return louder(keras_hub.models.OPTCausalLM(backbone))


def louder(model):
    """KerasHub's initial weights are so small that attention is uniform."""
    rng = np.random.default_rng(3)
    for weight in model.weights:
        noise = 0.4 * rng.normal(size=weight.shape)
        weight.assign(weight + noise.astype("float32"))
    return model


def converted(model, sampler="greedy", jit_compile=False, **kwargs):
    kwargs = {"dropout": 0.0, **kwargs}
    copy, _ = keras_kt.convert_attention(model, **kwargs)
    copy.preprocessor = None
    copy.compile(sampler=sampler, jit_compile=jit_compile)
    return copy


def prompts(lengths, length=13, seed=4):
    """Prompts of these lengths, and junk after them, as KerasHub takes them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY, size=(len(lengths), length))
    given = np.arange(length) < np.array(lengths)[:, np.newaxis]
    return {"token_ids": ids.astype("int32"), "padding_mask": given}


def by_whole_prefixes(model, inputs, sampler, stop_token_ids=None):
    """What the sampler picks if every token costs a call on all before it."""
    given = tf.constant(inputs["padding_mask"])

    def hidden_of(ids):
        everything = tf.ones_like(ids)
        return model.backbone({"token_ids": ids, "padding_mask": everything})

    @tf.function
    def after(ids, index):
        last = hidden_of(ids)[:, index - 1]
        embedding = model.backbone.token_embedding
        logits = embedding(last[:, tf.newaxis], reverse=True)
        return logits[:, 0], last

    ids = tf.constant(inputs["token_ids"])
    return sampler(
        next=lambda ids, cache, index: (*after(ids, index), cache),
        prompt=ids,
        index=tf.reduce_min(tf.reduce_sum(tf.cast(given, "int32"), axis=1)),
        mask=given,
        stop_token_ids=stop_token_ids,
        hidden_states=hidden_of(ids),
    ).numpy()


SAMPLERS = {
    "greedy": lambda: keras_hub.samplers.GreedySampler(),
    "seeded": lambda: keras_hub.samplers.RandomSampler(seed=7),
    "beam": lambda: keras_hub.samplers.BeamSampler(num_beams=3),
    "contrastive": lambda: keras_hub.samplers.ContrastiveSampler(k=3),
}


@pytest.mark.parametrize(
    "name", ["contrastive", slow("greedy"), slow("seeded"), slow("beam")]
)
def test_ragged_prompts_go_on_as_whole_prefixes_do(name):
    model = converted(gpt2(), sampler=SAMPLERS[name]())
    inputs = prompts([7, 3, 5])
    produced = model.generate(inputs, stop_token_ids=None)["token_ids"]
    expected = by_whole_prefixes(model, inputs, SAMPLERS[name]())
    np.testing.assert_array_equal(produced, expected)
    np.testing.assert_array_equal(
        produced[inputs["padding_mask"]],
        inputs["token_ids"][inputs["padding_mask"]],
    )
    assert len(np.unique(produced)) > 5


@pytest.mark.parametrize(
    "options",
    [
        {"decay": "gated", "near_field": 3},
        slow({"near_field": 3}),
        slow({"decay": "constant"}),
        slow({"implementation": "quadratic"}),
        slow({"feature_map": keras_kt.TrigonometricFeatures()}),
    ],
    ids=str,
)
def test_states_of_all_kinds_travel(options):
    model = converted(gpt2(num_layers=1), **options)
    inputs = prompts([4, 2])
    produced = model.generate(inputs, stop_token_ids=None)["token_ids"]
    expected = by_whole_prefixes(model, inputs, SAMPLERS["greedy"]())
    np.testing.assert_array_equal(produced, expected)


@pytest.mark.slow
def test_a_batch_is_its_prompts_one_by_one():
    """What follows a shorter prompt is junk, which no state takes in."""
    model = converted(gpt2())
    inputs = prompts([7, 3, 13])
    together = model.generate(inputs, stop_token_ids=None)["token_ids"]
    for row in range(3):
        alone = {name: x[row : row + 1] for name, x in inputs.items()}
        single = model.generate(alone, stop_token_ids=None)["token_ids"]
        np.testing.assert_array_equal(single[0], together[row])


@pytest.mark.slow
def test_prompts_that_fill_everything_come_back():
    model = converted(gpt2(num_layers=1))
    inputs = prompts([13, 13])
    produced = model.generate(inputs, stop_token_ids=None)
    np.testing.assert_array_equal(produced["token_ids"], inputs["token_ids"])


@pytest.mark.slow
def test_generation_stops_at_stop_tokens():
    model = converted(gpt2())
    inputs = prompts([4, 2])
    free = model.generate(inputs, stop_token_ids=None)["token_ids"]
    stops = [int(free[0, 6]), int(free[1, 5])]
    produced = model.generate(inputs, stop_token_ids=stops)
    expected = by_whole_prefixes(
        model, inputs, SAMPLERS["greedy"](), stop_token_ids=stops
    )
    np.testing.assert_array_equal(produced["token_ids"], expected)
    assert not produced["padding_mask"].all()


def test_a_second_call_traces_and_compiles_nothing():
    """Other lengths of prompts are data, for XLA too."""
    model, seconds = converted(gpt2(num_layers=1), jit_compile=True), []
    for lengths in ([5, 3], [7, 4]):
        inputs = prompts(lengths)
        start = time.perf_counter()
        produced = model.generate(inputs, stop_token_ids=None)["token_ids"]
        seconds.append(time.perf_counter() - start)
        expected = by_whole_prefixes(model, inputs, SAMPLERS["greedy"]())
        np.testing.assert_array_equal(produced, expected)
    assert model.generate_function.experimental_get_tracing_count() == 1
    assert seconds[1] < seconds[0] / 4


class Seen(keras_hub.samplers.GreedySampler):
    """Keeps the shape and the type of the cache that it is given."""

    def __call__(self, *args, cache, **kwargs):
        self.shape, self.dtype = cache.shape, cache.dtype
        return super().__call__(*args, cache=cache, **kwargs)


def test_the_cache_is_of_one_size_whatever_the_length():
    sampler = Seen()
    model = converted(gpt2(num_layers=1), sampler=sampler)
    shapes = []
    for length in (7, POSITIONS):
        model.generate(prompts([3, 2], length), stop_token_ids=None)
        shapes.append(sampler.shape)
    assert shapes[0] == shapes[1]
    (layer,) = cached_layers(model)
    numbers = sum(np.prod(shape[1:]) for shape in layer.state_shapes)
    assert shapes[0] == (2, 1, 1 + -(-numbers // 2))


def cached_layers(model):
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras_kt.conversion.CachedKernelizedAttention)
    ]


@pytest.mark.parametrize(
    "length, option",
    [
        (13, {"near_field": 3}),
        slow(13, {}),
        slow(POSITIONS, {"near_field": 3}),
        slow(POSITIONS, {}),
    ],
)
def test_layers_that_were_kept_find_their_keys(length, option):
    """The state is larger than keys and values at one length only."""
    model = gpt2(num_layers=2)
    names = [path for path in attention_layers(model) if "layer_1" in path]
    model = converted(model, layers=names, num_features=10, **option)
    assert len(cached_layers(model)) == 1
    inputs = prompts([7, 3, 5], length)
    produced = model.generate(inputs, stop_token_ids=None)["token_ids"]
    expected = by_whole_prefixes(model, inputs, SAMPLERS["greedy"]())
    np.testing.assert_array_equal(produced, expected)


@pytest.mark.slow
def test_generation_goes_on_after_weights_are_loaded(tmp_path):
    path = tmp_path / "model.weights.h5"
    model, inputs = gpt2(num_layers=1), prompts([5, 3])
    first = converted(model, seed=1)
    first.save_weights(path)
    expected = first.generate(inputs, stop_token_ids=None)["token_ids"]
    second = converted(model, seed=2)
    second.load_weights(path)
    produced = second.generate(inputs, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(produced, expected)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", slow("float16")])
def test_states_travel_where_floats_are_cast(dtype):
    """As integers, which no layer casts."""
    model = converted(gpt2(num_layers=1, dtype=dtype), sampler=Seen())
    inputs = prompts([6, 6])
    produced = model.generate(inputs, stop_token_ids=None)["token_ids"]
    assert model.sampler.dtype == tf.int64
    expected = by_whole_prefixes(model, inputs, SAMPLERS["greedy"]())
    np.testing.assert_array_equal(produced, expected)


def test_more_positions_than_were_learned_are_an_error():
    model = converted(gpt2(num_layers=1))
    with pytest.raises(ValueError, match=f"has learned, {POSITIONS}"):
        model.generate(prompts([3, 2], POSITIONS + 1), stop_token_ids=None)


GROUPED = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 14,
}
UNGROUPED = {
    name: GROUPED[name]
    for name in ("vocabulary_size", "num_layers", "intermediate_dim")
}
# Names of classes and their sizes.
FAMILIES = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 5},
    "Mixtral": {**GROUPED, "sliding_window": None, "num_experts": 3},
    "Gemma": {**GROUPED, "head_dim": 4},
    "Qwen": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 4, "sliding_window_size": None},
    "Phi3": GROUPED,
    "GPTNeoX": {**UNGROUPED, "num_heads": 4, "hidden_dim": 32},
    "Falcon": {**UNGROUPED, "num_attention_heads": 4, "hidden_dim": 16},
    "Bloom": {**UNGROUPED, "num_heads": 4, "hidden_dim": 16},
}


def family(name, **kwargs):
    backbone = getattr(keras_hub.models, f"{name}Backbone")
    task = getattr(keras_hub.models, f"{name}CausalLM")
    return louder(task(backbone(**{**FAMILIES[name], **kwargs})))


@pytest.mark.parametrize(
    "name", ["Llama", *(slow(x) for x in FAMILIES if x != "Llama")]
)
def test_families_with_a_seam_generate_on_states(name):
    model = converted(family(name), sampler=Seen())
    inputs = prompts([7, 3, 5])
    produced = model.generate(inputs, stop_token_ids=None)["token_ids"]
    assert model.sampler.dtype == tf.int64
    expected = by_whole_prefixes(model, inputs, SAMPLERS["greedy"]())
    np.testing.assert_array_equal(produced, expected)
    assert len(np.unique(produced)) > 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "mixed_bfloat16"},
        {"sampler": "contrastive"},
        {"sampler": "beam", "jit_compile": True},
        {"near_field": 3, "decay": "constant"},
        {"layers": ["transformer_layer_1"]},
    ],
    ids=str,
)
def test_a_seam_goes_with_everything(options):
    options = dict(options)
    dtype = options.pop("dtype", "float32")
    name = options.pop("sampler", "greedy")
    model = family("Llama", dtype=dtype)
    if "layers" in options:
        paths = attention_layers(model)
        options["layers"] = [x for x in paths if options["layers"][0] in x]
    model = converted(model, sampler=SAMPLERS[name](), **options)
    inputs = prompts([7, 3, 5])
    produced = model.generate(inputs, stop_token_ids=None)["token_ids"]
    expected = by_whole_prefixes(model, inputs, SAMPLERS[name]())
    np.testing.assert_array_equal(produced, expected)


@pytest.mark.slow
def test_a_cache_of_pairs_holds_states_beside_keys():
    """Gemma 3 has a cache for each layer, of which the first is kept here."""
    sizes = {**GROUPED, "num_layers": 7, "head_dim": 4, "image_size": 16}
    backbone = keras_hub.models.Gemma3Backbone(
        **sizes, sliding_window_size=5, vision_encoder=None
    )
    model = keras_hub.models.Gemma3CausalLM(None, backbone)
    first, *names = attention_layers(model)
    model = converted(louder(model), layers=names)
    inputs = prompts([7, 3, 5])
    # KerasHub's `generate` cannot give back that there are no images.
    generate = model.make_generate_function()
    produced = generate(inputs, stop_token_ids=None)["token_ids"]
    expected = by_whole_prefixes(model, inputs, SAMPLERS["greedy"]())
    np.testing.assert_array_equal(produced, expected)


@pytest.mark.slow
def test_another_family_with_cached_attention_generates():
    model = converted(opt())
    inputs = prompts([7, 3, 5])
    produced = model.generate(inputs, stop_token_ids=None)["token_ids"]
    expected = by_whole_prefixes(model, inputs, SAMPLERS["greedy"]())
    np.testing.assert_array_equal(produced, expected)


@pytest.mark.parametrize("dtype", [tf.float32, tf.float16, tf.bfloat16])
def test_a_cache_keeps_numbers_bit_by_bit(dtype):
    numbers = np.random.default_rng(2).normal(size=(3, 7, 5))
    numbers = tf.cast(numbers, dtype)
    cache = hub_cache.write(numbers, columns=41)
    assert cache.shape == (3, 41) and cache.dtype == tf.int64
    again = hub_cache.read(cache, dtype)
    np.testing.assert_array_equal(
        again[:, :35], tf.reshape(numbers, (3, 35)).numpy()
    )
    assert not keras.ops.any(again[:, 35:])


def test_a_limited_cache_takes_in_what_is_before_the_limit():
    cache = hub_cache.write(tf.zeros((2, 6)))
    tokens = tf.zeros((2, 5, 3))
    assert hub_cache.taken(cache, 4, tokens).numpy().all()
    limited = hub_cache.limited(cache, 7)
    np.testing.assert_array_equal(
        hub_cache.taken(limited, 4, tokens), [[1, 1, 1, 0, 0]] * 2
    )
    assert hub_cache.taken(limited, 9, tokens[:, :1]) is None
