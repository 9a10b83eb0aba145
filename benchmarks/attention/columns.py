"""What is timed: ours and its peers, as functions of the same inputs.

Heads in and out for the level "core", projections too for "layer".
"""

import sys
import types
import zipfile

import keras
import numpy as np
import tensorflow as tf

import keras_kt
from keras_kt import kernels, ops

# Scores of a quadratic column beyond this many bytes are not run.
MAX_SCORE_BYTES = 3e9
WINDOW = "ours causal in a window"


def bound_map(args, feature_map):
    """One draw of our features, bound to the benchmark's sizes."""
    prior = _built_prior(args)
    feature_map.build(args.heads)
    return feature_map.bind(prior(), args.head_dim**-0.25)


def _built_prior(args):
    prior = keras_kt.NormalPrior(seed=0)
    prior.build((args.heads, args.features // 2, args.head_dim))
    return prior


def exact_window(args):
    """A window of keys by the kernel in closed form, and nothing beyond."""
    kernel = keras_kt.PositiveFeatures().exact_kernel(
        _built_prior(args), args.head_dim**-0.25
    )
    return ops.NearField(kernel, args.window, has_far=False)


def softmax_core(query, key, value, causal=False):
    logits = tf.einsum("bthd,bshd->bhts", query, key) * query.shape[-1] ** -0.5
    if causal:
        visible = tf.linalg.band_part(tf.ones(logits.shape[2:], "bool"), -1, 0)
        logits = tf.where(visible, logits, -1e30)
    return tf.einsum("bhts,bshe->bthe", tf.nn.softmax(logits), value)


def performer_core(omega):
    """Plain FAVOR+ in einsums, as TensorFlow users write it."""

    def features(x, axes):
        projected = tf.einsum("bthd,hmd->bthm", x, omega)
        half_square = tf.reduce_sum(x * x, axis=-1, keepdims=True) / 2.0
        peak = tf.reduce_max(projected, axis=axes, keepdims=True)
        return tf.exp(projected - half_square - tf.stop_gradient(peak)) + 1e-6

    def core(query, key, value):
        scale = query.shape[-1] ** -0.25
        query = features(query * scale, (-1,))
        key = features(key * scale, (-3, -1))
        context = tf.einsum("bshm,bshe->bhme", key, value)
        total = tf.einsum("bthm,bhm->bth", query, tf.reduce_sum(key, axis=1))
        return tf.einsum("bthm,bhme->bthe", query, context) / total[..., None]

    return core


def floor_core(args):
    """The four products that the computation cannot avoid, and no more."""
    rng = np.random.default_rng(0)

    def tensor(*shape):
        return tf.constant(rng.normal(size=shape).astype("float32"))

    heads, dim, width = args.heads, args.head_dim, args.features
    projection = tensor(heads, dim, width // 2)
    state = tensor(heads, dim, width)

    def core(query, key, features, value):
        return (
            tf.matmul(query, projection),
            tf.matmul(key, projection),
            # In the order that is fastest here.
            tf.matmul(value, features, transpose_a=True),
            tf.matmul(features, state, transpose_b=True),
        )

    def inputs(batch, length):
        x = [tensor(batch, heads, length, dim) for _ in range(3)]
        return [x[0], x[1], tensor(batch, heads, length, width), x[2]]

    return core, inputs


def load_kernel_attention(wheel):
    """Model Garden's one file, under tf_keras; its package is not needed."""
    import tf_keras  # noqa: F401

    for name in ("official", "official.modeling"):
        sys.modules.setdefault(name, types.ModuleType(name))
    utils = types.ModuleType("official.modeling.tf_utils")
    utils.get_shape_list = lambda tensor, *_, **__: tensor.shape.as_list()
    sys.modules["official.modeling"].tf_utils = utils
    sys.modules["official.modeling.tf_utils"] = utils
    name = "official/nlp/modeling/layers/kernel_attention.py"
    source = zipfile.ZipFile(wheel).read(name).decode()
    module = types.ModuleType("kernel_attention")
    exec(compile(source, name, "exec"), module.__dict__)  # noqa: S102
    return module.KernelAttention


def core_columns(args):
    """Name to (function, is quadratic)."""
    positive = bound_map(args, keras_kt.PositiveFeatures())
    trigonometric = bound_map(args, keras_kt.TrigonometricFeatures())

    def ours(features, **options):
        return lambda *x: ops.attend(*x, features, **options)[0]

    columns = {
        "ours": ours(positive),
        "ours causal": ours(positive, causal=True),
        WINDOW: ours(positive, causal=True, near=exact_window(args)),
        "ours trigonometric": ours(trigonometric),
        "ours trigonometric causal": ours(trigonometric, causal=True),
        "ours as a matrix": lambda *x: ops.attend_with_matrix(*x, positive)[0],
        "softmax": softmax_core,
        "softmax causal": lambda *x: softmax_core(*x, causal=True),
        "plain Performer": performer_core(_performer_frequencies(args)),
    }
    if args.model_garden:
        layer = load_kernel_attention(args.model_garden)(
            num_heads=args.heads,
            key_dim=args.head_dim,
            feature_transform="exp",
            num_random_features=args.features,
        )
        probe = tf.zeros((1, 2, args.heads * args.head_dim))
        layer(probe, probe)
        columns["Model Garden"] = lambda *x: layer._compute_attention(
            *x, "exp", False
        )
    return columns


def _performer_frequencies(args):
    prior = keras_kt.NormalPrior(radius="chi", seed=0)
    prior.build((args.heads, args.features, args.head_dim))
    return prior().offsets


def layer_columns(args):
    sizes = {"num_heads": args.heads, "key_dim": args.head_dim}

    def wrap(layer, **call):
        return lambda x: layer(x, x, **call)

    def ours(**kwargs):
        return keras_kt.KernelizedAttention(
            **sizes, num_features=args.features, **kwargs
        )

    theirs = keras.layers.MultiHeadAttention
    columns = {
        "ours": wrap(ours()),
        "ours causal": wrap(ours(), use_causal_mask=True),
        "ours trigonometric": wrap(ours(feature_map="trigonometric")),
        "softmax": wrap(theirs(**sizes)),
        "softmax causal": wrap(theirs(**sizes), use_causal_mask=True),
    }
    if args.model_garden:
        columns["Model Garden"] = wrap(
            load_kernel_attention(args.model_garden)(
                **sizes,
                feature_transform="exp",
                num_random_features=args.features,
            )
        )
    return columns


def make_inputs(args, level, batch, length):
    rng = np.random.default_rng(1)
    if level == "layer":
        shapes = [(batch, length, args.heads * args.head_dim)]
    else:
        shapes = [(batch, length, args.heads, args.head_dim)] * 3
    return [
        tf.constant((0.35 * rng.normal(size=s)).astype("float32"))
        for s in shapes
    ]


def backward(function):
    """Gradient to inputs and to every trainable weight that is touched."""

    def gradient(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = tf.nest.flatten(function(*inputs))
            loss = tf.add_n([tf.reduce_sum(tf.square(x)) for x in outputs])
        return tape.gradient(loss, [*inputs, *tape.watched_variables()])

    return gradient


def is_affordable(name, args, batch, length):
    if name == "ours as a matrix" and length > 512:
        return False
    if "softmax" not in name and "matrix" not in name:
        return True
    # The causal column holds a masked copy too.
    copies = 2 if "causal" in name else 1
    size = 4.0 * copies * batch * args.heads * length**2
    return size <= MAX_SCORE_BYTES


def check_agreement(args):
    """Errors against float64 softmax, and of ours against its own kernel."""
    inputs = make_inputs(args, "core", 1, 128)
    query, key, value = (x.numpy().transpose(0, 2, 1, 3) for x in inputs)
    scale = args.head_dim**-0.25
    errors = {}
    for name, function in core_columns(args).items():
        mask = (
            np.tril(np.ones((128, 128), "bool")) if "causal" in name else None
        )
        exact, _ = kernels.softmax_attention(
            query * scale, key * scale, value, mask
        )
        got = function(*inputs).numpy().transpose(0, 2, 1, 3)
        errors[name] = float(
            np.linalg.norm(got - exact) / np.linalg.norm(exact)
        )
    positive = bound_map(args, keras_kt.PositiveFeatures())
    own, _ = ops.attend_with_matrix(*inputs, positive)
    fast, _ = ops.attend(*inputs, positive)
    deviation = float(np.abs(own - fast).max())
    if deviation > 1e-4:
        raise SystemExit(f"The linear route is wrong by {deviation}.")
    print("relative error to softmax at 128 tokens, |q|² = |k|² = 1 scaled:")
    for name, error in errors.items():
        print(f"  {name:28s} {error:.3f}")
    print(f"  ours, linear against quadratic: {deviation:.1e} (absolute)")
    return errors
