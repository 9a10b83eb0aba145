"""The flags of a run: sizes and schedule, attention, what is reported."""

import argparse
import dataclasses
from pathlib import Path

from experiments import attentions
from experiments.help import Help
from experiments.strategies import add_strategy_arguments
from experiments.tasks import TASKS


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
# What a run may be given more of: run again with more, it takes the place of
# the old one. All other sizes tell runs apart.
BUDGET = ("batch_size", "steps", "examples")
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
        that was checked, `task` is the argument, `options` are the given flags
        that are none of a preset, an attention or a place, as a text, and
        `sizes` what `given_sizes` says.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments {task}",
        description=doc.split("\n\n")[0],
        formatter_class=Help,
        epilog=attentions.HELP,
    )
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("."), help="a folder")
    add("--preset", choices=presets, default="cpu", help="sizes, schedule")
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
    add("--test-examples", type=int, help="at most; None: all")
    add("--pack", type=Path, help="a folder to pack the run into: see offload")
    add("--unpack", type=Path, help="a folder of results to record")
    if extra:
        extra(parser)
    attentions.add_arguments(parser)
    sizes = parser.add_argument_group("in place of the preset's")
    for field in dataclasses.fields(Preset):
        flag = f"--{field.name.replace('_', '-')}"
        values = [
            f"{name} {getattr(preset, field.name)}"
            for name, preset in presets.items()
        ]
        sizes.add_argument(
            flag, type=_type_of(field.name), help=", ".join(values)
        )
    add_strategy_arguments(parser)
    args = parser.parse_args(argv)
    args.task, args.options = task, _options(parser, args)
    args.sizes = given_sizes(argv, task)
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


def given_sizes(argv, task):
    """The given flags that tell runs of one attention apart, as a text.

    Args:
        argv: words of a command line; others are passed over.
        task: the task's name, which may have flags of its own among them.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = ["preset", *size_names(task)]
    for name in names:
        flag = f"--{name.replace('_', '-')}"
        if name in SIZES:
            parser.add_argument(flag, type=_type_of(name))
        else:
            parser.add_argument(flag, nargs="+")
    args, _ = parser.parse_known_args(list(map(str, argv)))
    return attentions.text_of(args, names)


def size_names(task):
    """Names of the flags that tell runs of a task apart."""
    return (*TASKS[task].sizes, *(n for n in SIZES if n not in BUDGET))


def identity(args):
    """What records know a run by: its values of `records.KEYS`."""
    return {
        "task": args.task,
        "attention": args.attention,
        "flags": attentions.flags_text(args),
        "sizes": args.sizes,
        "seed": args.seed,
    }


def attention_options(args):
    """Arguments of `KernelizedAttention` for `args.attention`.

    Returns:
        A dictionary, or `None` for softmax.
    """
    return attentions.layer_arguments(args.attention, args, args.preset.key_dim)


def _options(parser, args):
    known = (*PLACES, *SIZES, *attentions.FLAGS, "preset", "task")
    return attentions.text_of(
        args,
        [
            name
            for name, value in vars(args).items()
            if name not in known and value != parser.get_default(name)
        ],
    )


def _type_of(name):
    (field,) = (f for f in dataclasses.fields(Preset) if f.name == name)
    return float if field.type is float else int
