"""Arguments in Python's, NumPy's and TensorFlow's spelling are the same.

Whatever can be constructed can be saved and loaded. To cover another class,
add it to `CLASSES`: how a model is made of it, and a value for each argument.
"""

import inspect
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers.contract import one_in
from tests.helpers.fading import Fading

WIDTH = 6


def attention(**kwargs):
    return keras_kt.KernelizedAttention(
        **{"num_heads": 2, "key_dim": 4} | kwargs
    )


def cached(**kwargs):
    return keras_kt.conversion.CachedKernelizedAttention(
        **{"num_heads": 2, "key_dim": 4} | kwargs
    )


def grouped(**kwargs):
    return keras_kt.KernelizedGroupedQueryAttention(
        **{"head_dim": 4, "num_query_heads": 6, "num_key_value_heads": 3}
        | kwargs
    )


def of_heads(**kwargs):
    return keras_kt.LinearAttention(**{"num_heads": 6, "key_dim": 4} | kwargs)


def with_heads(layer):
    """A call of a layer of heads on a tensor of tokens."""

    def call(x):
        x = keras.ops.expand_dims(x[..., :1], 2)
        few = layer.num_key_value_heads
        sizes = (
            (layer.num_heads, layer.key_dim),
            (few, layer.key_dim),
            (few, layer.value_dim),
        )
        return layer(*(keras.ops.tile(x, (1, 1, *size)) for size in sizes))

    return call


def encoder(**kwargs):
    return keras_kt.KernelizedTransformerEncoder(
        **{"intermediate_dim": 8, "num_heads": 3} | kwargs
    )


def decoder(**kwargs):
    return keras_kt.KernelizedTransformerDecoder(
        **{"intermediate_dim": 8, "num_heads": 3} | kwargs
    )


def with_prior(kind, **defaults):
    """Attention with a prior of the arguments."""

    def make(**kwargs):
        prior = kind(**defaults | kwargs)
        return attention(
            spectral_prior=prior, feature_map="rks", num_features=16, seed=5
        )

    return make


def with_map(kind):
    return lambda **kwargs: attention(feature_map=kind(**kwargs), seed=5)


def with_itself(layer):
    return lambda x: layer(x, x)


# Arguments of the layer that a block takes as well.
OPTIONS = {
    "use_bias": False,
    "seed": 3,
    "spectral_prior": "mixture",
    "feature_map": "trigonometric",
    "num_features": 16,
    "qk_norm": "l2",
    "redraw": "step",
    "implementation": "quadratic",
    "decay": "constant",
    "near_field": 3,
    "rotary_max_wavelength": 100.0,
    "spectral_pace": 2.0,
}
# Arguments of every Keras layer.
KERAS = {"name": "given", "trainable": False, "dtype": "float32"}
INITIALIZERS = {"kernel_initializer": "he_normal", "bias_initializer": "ones"}
ATTENTION = {
    "num_heads": 3,
    "key_dim": 5,
    "value_dim": 7,
    "dropout": 0.5,
    "output_shape": (5,),
    "attention_axes": (1,),
    "sliding_window": 3,
    "flash_attention": False,
    "kernel_regularizer": "l2",
    "bias_regularizer": "l2",
    "activity_regularizer": "l2",
    "kernel_constraint": "non_neg",
    "bias_constraint": "non_neg",
    "use_gate": True,
    **INITIALIZERS,
    **OPTIONS,
    **KERAS,
}
OF_ATTENTION_ALONE = {
    "num_heads",
    "key_dim",
    "value_dim",
    "output_shape",
    "attention_axes",
}
GROUPED = {
    "head_dim": 6,
    "num_query_heads": 9,
    "num_key_value_heads": 2,
    **{
        name: value
        for name, value in ATTENTION.items()
        if name not in OF_ATTENTION_ALONE
    },
}
OF_HEADS = {
    "num_heads": 3,
    "key_dim": 5,
    "value_dim": 7,
    "num_key_value_heads": 3,
    **{name: x for name, x in OPTIONS.items() if name != "use_bias"},
    "sliding_window": 3,
    **KERAS,
}
BLOCK = {
    "intermediate_dim": 5,
    "num_heads": 2,
    "dropout": 0.5,
    "activation": "gelu",
    "layer_norm_epsilon": 0.25,
    "normalize_first": True,
    "key_dim": 5,
    "num_key_value_heads": 3,
    "local_context": 3,
    **INITIALIZERS,
    **OPTIONS,
    **KERAS,
}
PRIOR = {
    "per_head": False,
    "scale_spread": 2.0,
    "pace": 2.0,
    "seed": 3,
    "kernel_regularizer": "l2",
    "name": "given",
    "trainable": False,
}
GAUSSIAN = {
    "initial_scale": 0.5,
    "covariance": "full",
    "use_mean": True,
    "coupling": "iid",
    "radius": "chi",
    "mean_initializer": "ones",
    "mean_regularizer": "l2",
    "scale_regularizer": "l2",
    "kl_weight": 0.5,
    **{name: x for name, x in PRIOR.items() if name != "kernel_regularizer"},
}
MIXTURE = {
    **GAUSSIAN,
    "num_components": 4,
    # For the two components that there are by default.
    "initial_scale": (0.5, 2.0),
    "logits_regularizer": "l2",
}
GENERATOR = {
    "hidden_units": (5, 3),
    "activation": "leaky_relu",
    "noise_dim": 3,
    "coupling": "orthogonal",
    "kernel_initializer": "he_normal",
    **PRIOR,
}
EMPIRICAL = {
    "initial_scale": 0.5,
    "tied": False,
    "coupling": "iid",
    "radius": "chi",
    "regularizer": "l2",
    **{name: x for name, x in PRIOR.items() if name != "kernel_regularizer"},
}
FASTFOOD = {"diagonal_regularizer": "l2", "per_head": False, "seed": 3}
# A class: a function from its arguments to the layer under test, how that is
# called, and a value for each argument.
CLASSES = {
    keras_kt.KernelizedAttention: (attention, with_itself, ATTENTION),
    keras_kt.conversion.CachedKernelizedAttention: (
        cached,
        with_itself,
        ATTENTION,
    ),
    keras_kt.KernelizedGroupedQueryAttention: (grouped, with_itself, GROUPED),
    keras_kt.LinearAttention: (of_heads, with_heads, OF_HEADS),
    keras_kt.KernelizedTransformerEncoder: (encoder, lambda f: f, BLOCK),
    keras_kt.KernelizedTransformerDecoder: (decoder, lambda f: f, BLOCK),
    keras_kt.NormalPrior: (
        with_prior(keras_kt.NormalPrior),
        with_itself,
        GAUSSIAN,
    ),
    keras_kt.MixturePrior: (
        with_prior(keras_kt.MixturePrior),
        with_itself,
        MIXTURE,
    ),
    keras_kt.GeneratorPrior: (
        with_prior(keras_kt.GeneratorPrior),
        with_itself,
        GENERATOR,
    ),
    keras_kt.EmpiricalPrior: (
        with_prior(keras_kt.EmpiricalPrior),
        with_itself,
        EMPIRICAL,
    ),
    keras_kt.FastFoodPrior: (
        with_prior(keras_kt.FastFoodPrior),
        with_itself,
        FASTFOOD,
    ),
    keras_kt.PositiveFeatures: (
        with_map(keras_kt.PositiveFeatures),
        with_itself,
        {"prefactor": "gaussian", "two_sided": False, "pace": 2.0},
    ),
    keras_kt.TrigonometricFeatures: (
        with_map(keras_kt.TrigonometricFeatures),
        with_itself,
        {"smoothing": 0.5, "trainable": False, "pace": 2.0},
    ),
}
# Names that Keras, or `get`, looks up: strings of NumPy's, but no tensors.
LOOKED_UP = {
    "activation",
    "spectral_prior",
    "feature_map",
    "name",
    "dtype",
    *(name for name in ATTENTION if name.split("_")[-1].endswith("izer")),
    *(name for name in ATTENTION if name.endswith("_constraint")),
    *(name for name in MIXTURE if name.split("_")[-1].endswith("izer")),
    "diagonal_regularizer",
    "regularizer",
}
# What takes its arguments from a class above does not check them itself.
DERIVED = {
    keras_kt.conversion.CachedKernelizedAttention: ATTENTION,
    keras_kt.KernelizedGroupedQueryAttention: ATTENTION,
    keras_kt.KernelizedTransformerEncoder: {**OPTIONS, **INITIALIZERS},
    keras_kt.KernelizedTransformerDecoder: BLOCK,
    keras_kt.MixturePrior: GAUSSIAN,
}
ROWS = [
    pytest.param(
        kind,
        name,
        id=f"{kind.__name__}-{name}",
        marks=pytest.mark.slow if name in DERIVED.get(kind, ()) else (),
    )
    for kind, (_, _, arguments) in CLASSES.items()
    for name in arguments
]
X = np.random.default_rng(0).normal(size=(2, 7, WIDTH)).astype("float32")


def spellings(value, is_looked_up):
    """NumPy's, and TensorFlow's where it is no name that is looked up."""
    yield np.str_(value) if isinstance(value, str) else np.asarray(value)[()]
    if not is_looked_up:
        yield tf.constant(value)


def model_of(kind, **kwargs):
    make, call, _ = CLASSES[kind]
    keras.utils.set_random_seed(1)
    layer = make(**kwargs)
    # Two heads divide the width too.
    x = keras.Input((None, WIDTH))
    return layer, keras.Model(x, call(layer)(x))


@pytest.mark.filterwarnings("ignore:.*costs O.length²")
@pytest.mark.parametrize(("kind", "name"), one_in(4, ROWS))
def test_every_spelling_saves_and_loads(kind, name, tmp_path):
    """`num_features=np.int64(16)` was refused; others broke the saving."""
    value, expected = CLASSES[kind][2][name], None
    for spelled in (value, *spellings(value, name in LOOKED_UP)):
        layer, model = model_of(kind, **{name: spelled})
        # As text, since 1 == np.int64(1) == True.
        actual = json.dumps(nameless(layer.get_config())), model(X).numpy()
        expected = actual if expected is None else expected
        assert actual[0] == expected[0], spelled
        np.testing.assert_array_equal(actual[1], expected[1])
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(loaded(X), expected[1])


def nameless(config):
    """A configuration without the names that Keras makes up."""
    if isinstance(config, dict):
        return {k: nameless(v) for k, v in config.items() if k != "name"}
    return config


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_argument_has_a_row(kind):
    """Arguments that are not `self` and what goes on to Keras."""
    names = {
        name
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    assert names <= set(CLASSES[kind][2])


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_what_is_no_number_is_refused_in_every_spelling(kind):
    make, _, arguments = CLASSES[kind]
    for name, value in arguments.items():
        if name in LOOKED_UP or isinstance(value, (str, tuple)):
            continue
        for bad in ("x", np.array([1, 2]), tf.constant([1, 2]), object()):
            if name in ("flash_attention", "trainable"):
                continue
            with pytest.raises(ValueError, match=f"`{name}`"):
                make(**{name: bad})


@pytest.mark.slow
def test_functions_take_every_spelling():
    """Numbers of functions; the results are those of Python's numbers."""
    x = keras.Input((None, WIDTH))
    attend = keras.layers.MultiHeadAttention(2, 3, name="attention")
    softmax = keras.Model(x, attend(x, x))
    results = []
    for spell in (lambda x: x, lambda x: np.asarray(x)[()], tf.constant):
        keras.utils.set_random_seed(1)
        model, report = keras_kt.convert_attention(
            softmax,
            num_features=spell(12),
            dropout=spell(0.5),
            seed=spell(2),
            on_unsupported=spell("quadratic"),
            near_field=spell(2),
        )
        assert json.dumps(report.converted)
        errors = keras_kt.conversion.attention_error(model, X, batches=spell(1))
        report = keras_kt.conversion.calibrate(
            model, X, budget=spell(12), batches=spell(1), steps=spell(1)
        )
        history = keras_kt.conversion.distill(
            model,
            softmax,
            X,
            steps=spell(1),
            learning_rate=spell(0.01),
            target=spell("matrix"),
            train_projections=spell(True),
        )
        history += keras_kt.conversion.distill_outputs(
            model, softmax, X, steps=spell(1), learning_rate=spell(0.01)
        )
        layer = model.get_layer("attention")
        profile = keras_kt.diagnostics.kernel_profile(
            layer, spell([0.0, 1.0]), directions=spell(3), seed=spell(1)
        )
        (found,) = keras_kt.diagnostics.attention_maps(model, X)
        keras_kt.diagnostics.plots.plot_attention(found, spell(1), spell(1))
        keras_kt.diagnostics.plots.plot_spectrum(layer, spell(1))
        monitor = keras_kt.diagnostics.SpectralMonitor(
            "logs",
            every=spell(2),
            distances=spell([1.0, 2.0]),
            pictures=spell(3),
        )
        system = keras_kt.paper_system(spell("GMM-RKS"), spell(4))
        tokens = keras_kt.generate(
            Fading(),
            spell([[1, 2, 3], [4, 5, 6]]),
            spell(5),
            temperature=spell(2.0),
            top_k=spell(7),
            top_p=spell(0.75),
            end_token=spell([1, 2]),
            seed=spell([3, 4]),
            jit_compile=spell(False),
            prompt_mask=spell([[True, True, True], [False, True, True]]),
            num_return_sequences=spell(2),
        )
        lengths = keras_kt.generate(
            Fading(),
            spell([[1, 2, 3], [4, 5, 6]]),
            spell(5),
            end_token=spell(1),
            seed=spell(3),
            prompt_lengths=spell([2, 3]),
        )
        state = keras_kt.gather_state({"x": X}, spell([1, 1]))
        state = keras_kt.unstack_states(state, spell([2, 0]))
        results.append(
            (
                errors,
                report.after,
                history,
                profile.kernel.tolist(),
                json.dumps(
                    [monitor.every, monitor.distances, monitor.pictures]
                ),
                json.dumps(system["num_features"]),
                tokens.numpy().tolist(),
                lengths.numpy().tolist(),
                [part["x"].numpy().tolist() for part in state],
            )
        )
    assert results[1] == results[0] and results[2] == results[0]
