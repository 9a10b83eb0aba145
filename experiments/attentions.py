"""Names of attentions, their flags, and the layer's arguments for both.

An attention is `softmax`, a system of the paper, `mended:` before such a name,
or PRIOR:MAP. Its name and its flags, in one order, are how records know it.
"""

import argparse
import functools
import shlex
from pathlib import Path

import numpy as np

import keras_kt

PRIORS = {
    "fixed": functools.partial(keras_kt.NormalPrior, trainable=False),
    "normal": keras_kt.NormalPrior,
    "mixture": keras_kt.MixturePrior,
    "fastfood": keras_kt.FastFoodPrior,
    "generator": keras_kt.GeneratorPrior,
    "empirical": keras_kt.EmpiricalPrior,
}
MAPS = {
    "positive": keras_kt.PositiveFeatures,
    "trigonometric": keras_kt.TrigonometricFeatures,
    "self": functools.partial(keras_kt.PositiveFeatures, prefactor="self"),
}
SCALED = ("fixed", "normal", "mixture", "empirical")
# Flags of a prior and of a map, and where they apply.
PRIOR_FLAGS = {
    "components": ("mixture",),
    "initial_scale": SCALED,
    "scale_spread": tuple(PRIORS),
    "untied": ("empirical",),
}
MAP_FLAGS = {"prefactor": ("positive",), "smoothing": ("trigonometric",)}
# Of every attention with a kernel.
LAYER_FLAGS = (
    "num_features",
    "qk_norm",
    "spectral_pace",
    "decay",
    "near_field",
)
# All of them, in the order of records: new ones must not part old ones.
FLAGS = (
    "num_features",
    "components",
    "prefactor",
    "smoothing",
    "qk_norm",
    "redraw",
    "initial_scale",
    "scale_spread",
    "untied",
    "spectral_pace",
    "decay",
    "near_field",
)
SYSTEMS = ("softmax", *keras_kt.PAPER_SYSTEMS)
FIXED_SYSTEMS = ("Performer", "RBF-RKS", "RBF-PRF")
MENDED = "mended"
HELP = (
    f"Attention: softmax; a system of the paper "
    f"({', '.join(keras_kt.PAPER_SYSTEMS)}), as\npublished or as "
    f"{MENDED}:SYSTEM; or PRIOR:MAP of\n{{{','.join(PRIORS)}}}:"
    f"{{{','.join(MAPS)}}}."
)


def add_arguments(parser):
    layer = parser.add_argument_group("of any kernelized attention")
    add = layer.add_argument
    add("--num-features", type=int, help="of each head")
    norms = ("auto", "l2", "weighted", "none")
    add("--qk-norm", choices=norms, help="of queries and keys")
    add("--spectral-pace", type=float, help="of the kernel's parameters")
    add("--decay", choices=("constant", "gated"), help="of distant keys")
    add("--near-field", type=int, help="tokens")
    kernel = parser.add_argument_group("of PRIOR:MAP")
    add = kernel.add_argument
    add("--components", type=int, help="of a mixture")
    add("--initial-scale", type=float, help="of a mixture: times its own ones")
    add("--scale-spread", type=float, help="of heads: widest by narrowest")
    add(
        "--untied",
        action="store_true",
        default=None,
        help="queries and keys have point masses of their own",
    )
    add(
        "--prefactor",
        choices=("softmax", "gaussian", "tilted", "self"),
        help="of positive maps",
    )
    add("--smoothing", type=float, help="of trigonometric maps")
    add("--redraw", choices=("step",), help="fresh frequencies")


def flags_text(args):
    """The given flags of the attention, as a text, in one order."""
    return text_of(args, FLAGS)


def split(text):
    """Name and flags of `"NAME --flag value …"`, in the order of records."""
    args = parse(text)
    return args.name, flags_text(args)


def parse(text):
    """The arguments of `"NAME --flag value …"`; `name` is among them."""
    parser = argparse.ArgumentParser(
        prog="--attention",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=HELP,
    )
    parser.add_argument("name")
    add_arguments(parser)
    return parser.parse_args(shlex.split(text))


def text_of(args, names):
    """The arguments of such names that are not `None`, as flags."""
    words = []
    for name in names:
        value = getattr(args, name)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            # Where something lay is nobody's business but this machine's.
            words += [v.name if isinstance(v, Path) else str(v) for v in values]
    return shlex.join(words)


def is_system(name):
    """Whether it is a system of the paper, as published or mended."""
    return name.removeprefix(f"{MENDED}:") in keras_kt.PAPER_SYSTEMS


def is_learned(name):
    """Whether the law of the frequencies is trained."""
    if name == "softmax" or name.startswith("fixed:"):
        return False
    return name.removeprefix(f"{MENDED}:") not in FIXED_SYSTEMS


def layer_arguments(name, args, key_dim):
    """Arguments of `KernelizedAttention`.

    Args:
        name: of an attention.
        args: has the flags of `FLAGS` as attributes, `None` if not given.
        key_dim: size of a query or key.

    Returns:
        A dictionary, or `None` for softmax.
    """
    given = {
        flag: getattr(args, flag)
        for flag in FLAGS
        if getattr(args, flag) is not None
    }
    _check(name, given)
    if name == "softmax":
        return None
    layer = {flag: given[flag] for flag in LAYER_FLAGS if flag in given}
    if layer.get("qk_norm") == "none":
        layer["qk_norm"] = None
    if is_system(name):
        kind, _, system = name.rpartition(":")
        mended = {"mended": True} if kind else {}
        return keras_kt.paper_system(system, key_dim, **mended) | layer
    prior, _, feature_map = name.partition(":")
    if "redraw" in given:
        layer["redraw"] = given["redraw"]
    return {
        "spectral_prior": PRIORS[prior](**_prior_options(prior, given)),
        "feature_map": MAPS[feature_map](
            **{flag: given[flag] for flag in MAP_FLAGS if flag in given}
        ),
        **layer,
    }


def num_features(name, flags, key_dim):
    """D of an attention with such flags, a text; `None` for softmax."""
    options = layer_arguments(name, parse(f"{name} {flags}"), key_dim)
    if options is None:
        return None
    if options.get("num_features"):
        return options["num_features"]
    prior = options["spectral_prior"]
    return options["feature_map"].default_num_features(prior, key_dim)


def _check(name, given):
    prior, _, feature_map = name.partition(":")
    if name == "softmax":
        applies = ()
    elif is_system(name):
        applies = LAYER_FLAGS
    elif prior in PRIORS and feature_map in MAPS:
        applies = [
            flag
            for flag in FLAGS
            if prior in PRIOR_FLAGS.get(flag, PRIORS)
            and feature_map in MAP_FLAGS.get(flag, MAPS)
        ]
    else:
        raise ValueError(
            "--attention must be softmax, one of "
            f"{', '.join(keras_kt.PAPER_SYSTEMS)}, {MENDED}: before one of "
            f"these, or PRIOR:MAP with PRIOR among {', '.join(PRIORS)} and MAP "
            f"among {', '.join(MAPS)}. Received: {name}"
        )
    for flag, value in given.items():
        if flag not in applies:
            raise ValueError(
                f"`{flag}` does not apply to the --attention that was given. "
                f"Received: {value}"
            )


def _prior_options(prior, given):
    options = {flag: given[flag] for flag in PRIOR_FLAGS if flag in given}
    if options.pop("untied", False):
        options["tied"] = False
    if "components" in options:
        options["num_components"] = options.pop("components")
    if prior == "mixture" and "initial_scale" in options:
        # Its components keep the ratios that they have by default.
        factor = options.pop("initial_scale")
        own = keras_kt.MixturePrior(**options).initial_scale
        options["initial_scale"] = [factor * s for s in np.atleast_1d(own)]
    return options
