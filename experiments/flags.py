"""The flags of a run: sizes and schedule, attention, what is reported."""

import argparse
import dataclasses
import functools
import shlex
from pathlib import Path

import keras_kt
from experiments.strategies import add_strategy_arguments


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes and schedule of a run; a flag overrides each field.

    Attributes:
        length: tokens of a sequence, or of what the task says.
        blocks: number of transformer blocks.
        width: of the residual stream.
        heads: attention heads.
        key_dim: size of a query or key per head.
        hidden: width of the feed-forward network.
        batch_size: sequences of a step, of all replicas together.
        steps: training steps.
        learning_rate: at its peak.
        context: tokens that a learned sum brings into the attention's input,
            the same for every kind of attention; 0 for none.
        stride: tokens that the convolution stem merges into one, where the task
            has a stem.
        dropout: rate.
        weight_decay: of AdamW; not on norms, biases and kernels' parameters.
        examples: training examples; `None` means all.
    """

    length: int
    blocks: int
    width: int
    heads: int
    key_dim: int
    hidden: int
    batch_size: int
    steps: int
    learning_rate: float
    context: int = 5
    stride: int = 1
    dropout: float = 0.1
    weight_decay: float = 0.05
    examples: int | None = None


SIZES = tuple(field.name for field in dataclasses.fields(Preset))
PRIORS = {
    "fixed": functools.partial(keras_kt.NormalPrior, trainable=False),
    "normal": keras_kt.NormalPrior,
    "mixture": keras_kt.MixturePrior,
    "fastfood": keras_kt.FastFoodPrior,
    "generator": keras_kt.GeneratorPrior,
}
MAPS = {
    "positive": keras_kt.PositiveFeatures,
    "trigonometric": keras_kt.TrigonometricFeatures,
}
# Of any kernelized attention, and of PRIOR:MAP.
LAYER_FLAGS = ("decay", "near_field")
KERNEL_FLAGS = (
    "num_features",
    "components",
    "prefactor",
    "smoothing",
    "qk_norm",
    "redraw",
)
# Of where things lie and how results are told apart: not of what is computed.
PLACES = (
    "attention",
    "checkpoints",
    "data_dir",
    "export",
    "pack",
    "pretrained",
    "results",
    "seed",
    "unpack",
)
ATTENTIONS = (
    f"Attention: softmax, a system of the paper "
    f"({', '.join(keras_kt.PAPER_SYSTEMS)}), or PRIOR:MAP of\n"
    f"{{{','.join(PRIORS)}}}:{{{','.join(MAPS)}}}."
)


def parse_args(doc, presets, argv, task, extra=None):
    """The flags of an experiment.

    Args:
        doc: the module's docstring; its first paragraph is the description.
        presets: `Preset` by name, "cpu" among them.
        argv: the words to parse.
        task: the task's name on the command line.
        extra: function that adds the task's own flags to the parser.

    Returns:
        Arguments; `preset` is a `Preset` with the overrides, `attention` a name
        that was checked, `task` is the argument, and `options` are the given
        flags that are none of a preset, an attention or a place, as a text.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments {task}",
        description=doc.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=ATTENTIONS,
    )
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("."), help="a folder")
    add("--preset", choices=presets, default="cpu")
    add("--attention", default="mixture:positive", help="see below")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--results", type=Path, default="runs", help="folder of the study")
    add("--checkpoints", type=Path, help="a folder; a killed run resumes")
    add("--save-every", type=int, default=200, help="steps")
    add("--validations", type=int, default=10, help="default: %(default)s")
    add(
        "--validation-examples", type=int, default=1000, help="of each, at most"
    )
    add("--draws", type=int, default=10, help="fresh draws to test with")
    add("--draw-examples", type=int, default=1000, help="test examples of each")
    add("--test-examples", type=int, help="at most; default: all")
    add("--pack", type=Path, help="a folder to pack the run into: see offload")
    add("--unpack", type=Path, help="a folder of results to record")
    if extra:
        extra(parser)
    add_attention_arguments(parser)
    sizes = parser.add_argument_group("in place of the preset's")
    for field in dataclasses.fields(Preset):
        kind = float if field.type is float else int
        sizes.add_argument(f"--{field.name.replace('_', '-')}", type=kind)
    add_strategy_arguments(parser)
    args = parser.parse_args(argv)
    args.task, args.options = task, _options(parser, args)
    overrides = {
        name: getattr(args, name)
        for name in SIZES
        if getattr(args, name) is not None
    }
    args.preset_name = args.preset
    args.preset = dataclasses.replace(presets[args.preset], **overrides)
    try:
        attention_options(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def add_attention_arguments(parser):
    layer = parser.add_argument_group("of any kernelized attention")
    layer.add_argument("--decay", choices=("constant", "gated"))
    layer.add_argument("--near-field", type=int, help="tokens")
    kernel = parser.add_argument_group("of PRIOR:MAP")
    kernel.add_argument("--num-features", type=int, help="of each head")
    kernel.add_argument("--components", type=int, help="of a mixture")
    kernel.add_argument("--prefactor", choices=("softmax", "gaussian"))
    kernel.add_argument("--smoothing", type=float, help="of trigonometric maps")
    kernel.add_argument("--qk-norm", choices=("l2",))
    kernel.add_argument("--redraw", choices=("step",))


def attention_flags(args):
    """The given flags of the attention, as a text, in one order."""
    return _text(args, (*KERNEL_FLAGS, *LAYER_FLAGS))


def split_attention(text):
    """Name and flags of `"NAME --flag value …"`, in the order of records."""
    parser = argparse.ArgumentParser(prog="--attention", epilog=ATTENTIONS)
    parser.add_argument("name")
    add_attention_arguments(parser)
    args = parser.parse_args(shlex.split(text))
    return args.name, attention_flags(args)


def _options(parser, args):
    known = (*PLACES, *SIZES, *KERNEL_FLAGS, *LAYER_FLAGS, "preset", "task")
    return _text(
        args,
        [
            name
            for name, value in vars(args).items()
            if name not in known and value != parser.get_default(name)
        ],
    )


def _text(args, names):
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


def attention_options(args):
    """Arguments of `KernelizedAttention` for `args.attention`.

    Returns:
        A dictionary, or `None` for softmax.
    """
    name = args.attention
    is_system = name in keras_kt.PAPER_SYSTEMS
    if name == "softmax" or is_system:
        own = (*KERNEL_FLAGS, *(() if is_system else LAYER_FLAGS))
        for flag in own:
            _given(False, **{flag: getattr(args, flag)})
    if name == "softmax":
        return None
    layer = {flag: getattr(args, flag) for flag in LAYER_FLAGS}
    if is_system:
        return keras_kt.paper_system(name, args.preset.key_dim) | layer
    prior, _, feature_map = name.partition(":")
    if prior not in PRIORS or feature_map not in MAPS:
        raise ValueError(
            "--attention must be softmax, one of "
            f"{', '.join(keras_kt.PAPER_SYSTEMS)}, or PRIOR:MAP with PRIOR "
            f"among {', '.join(PRIORS)} and MAP among {', '.join(MAPS)}. "
            f"Received: {name}"
        )
    return {
        "spectral_prior": PRIORS[prior](
            **_given(prior == "mixture", num_components=args.components)
        ),
        "feature_map": MAPS[feature_map](
            **_given(feature_map == "positive", prefactor=args.prefactor),
            **_given(feature_map != "positive", smoothing=args.smoothing),
        ),
        "num_features": args.num_features,
        "qk_norm": args.qk_norm,
        "redraw": args.redraw or "never",
        **layer,
    }


def _given(applies, **options):
    ((name, value),) = options.items()
    if value is None:
        return {}
    if not applies:
        raise ValueError(
            f"`{name}` does not apply to the --attention that was given. "
            f"Received: {value}"
        )
    return options
