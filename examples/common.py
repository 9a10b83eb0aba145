"""What the training scripts share: strategies, loop, body, experiments.

The loop runs the same under every strategy. `model.fit` does too, except under
`MultiWorkerMirroredStrategy`, where Keras 3 fails (keras issue 20585). The
second half is the experiments' recipe: one transformer body for every kind of
attention, one schedule, one evaluation, one JSON file a run.
"""

import argparse
import dataclasses
import functools
import json
import os
import resource
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_kt

# Of a query from a key, at which kernels are recorded.
DISTANCES = tuple(0.25 * step for step in range(41))
STRATEGIES = ("none", "mirrored", "multiworker", "tpu")
TF_CONFIG = (
    '{"cluster": {"worker": ["host0:12345", "host1:12345"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


def add_strategy_arguments(parser):
    group = parser.add_argument_group("distribution")
    add = group.add_argument
    add("--strategy", choices=STRATEGIES, default="none")
    add("--tpu", default="local", help="name, address, or local (TPU VM)")
    add("--cpus", type=int, help="logical CPUs that `mirrored` runs on")
    add("--policy", help="dtype policy; on TPU defaults to mixed_bfloat16")


def make_strategy(args):
    """The strategy that was asked for; sets the dtype policy.

    Must run before anything else touches TensorFlow's devices.
    """
    policy = "mixed_bfloat16" if args.strategy == "tpu" else "float32"
    keras.config.set_dtype_policy(args.policy or policy)
    if args.strategy == "none":
        return tf.distribute.get_strategy()
    if args.strategy == "mirrored":
        return tf.distribute.MirroredStrategy(_logical_cpus(args.cpus))
    if args.strategy == "multiworker":
        if "TF_CONFIG" not in os.environ:
            sys.exit(
                "--strategy multiworker expects the cluster in TF_CONFIG, "
                "which is not set. Set it for every worker, each with its own "
                f"index:\n\n    TF_CONFIG='{TF_CONFIG}'\n\nor use --strategy "
                "mirrored on one machine."
            )
        return tf.distribute.MultiWorkerMirroredStrategy()
    return _tpu_strategy(args.tpu)


def _logical_cpus(count):
    if count is None:
        return None
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * count
    )
    return [f"CPU:{i}" for i in range(count)]


def _tpu_strategy(tpu):
    try:
        _check_address(tpu)
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    # What comes depends on the wheel and on where the search for a TPU ends.
    except (
        ImportError,
        IndexError,
        OSError,
        RuntimeError,
        ValueError,
        tf.errors.OpError,
    ) as error:
        sys.exit(
            f"--strategy tpu expects a TPU at --tpu {tpu!r}, and none was "
            f"found there ({type(error).__name__}). On a TPU VM install "
            "tensorflow-tpu and use --tpu local; elsewhere give the name or "
            "the grpc:// address. Without a TPU use --strategy mirrored, and "
            "benchmarks/tpu_compile.py to compile for one."
        )


def _check_address(tpu):
    """TensorFlow would wait for minutes where nobody answers."""
    if tpu.startswith("grpc://"):
        host, _, port = tpu.removeprefix("grpc://").partition(":")
        socket.create_connection((host, int(port or 8470)), timeout=10).close()


def is_chief(strategy):
    """Whether this process is the one that writes results."""
    resolver = strategy.cluster_resolver
    return resolver is None or not resolver.task_id


def train(
    strategy,
    model,
    optimizer,
    loss,
    dataset,
    *,
    steps,
    checkpoints=None,
    save_every=10,
    jit_compile=False,
    after_step=None,
):
    """Trains to a number of steps, from the last checkpoint if there is one.

    Args:
        strategy: the strategy in whose scope model and optimizer were made.
        model: a built model.
        optimizer: its optimizer.
        loss: function of `(y, outputs)` to a loss for each example.
        dataset: global batches `(x, y)` of a static shape, the same in every
            run: a resumed run skips what was seen.
        steps: number of steps, those before the checkpoint included.
        checkpoints: folder of the checkpoints, seen by all workers. Defaults
            to `None`, which means none.
        save_every: steps between checkpoints.
        jit_compile: whether XLA compiles the step; only without a strategy.
        after_step: function of `(number, loss)`, called after a step. Defaults
            to `None`, which prints both.

    Returns:
        The loss of each step that this run made, by its number.
    """
    with strategy.scope():
        optimizer.build(model.trainable_variables)
        done = tf.Variable(0, dtype=tf.int64, trainable=False)
    manager = None
    if checkpoints is not None:
        # Variables of the model, since Keras's own checkpoints leave out the
        # states of seed generators, which dropout and redraws continue from.
        checkpoint = tf.train.Checkpoint(
            variables=model.variables, optimizer=optimizer, done=done
        )
        manager = _manager(strategy, checkpoint, Path(checkpoints))
        latest = tf.train.latest_checkpoint(checkpoints)
        if latest:
            checkpoint.restore(latest).assert_consumed()
    step = _step_function(strategy, model, optimizer, loss, jit_compile)
    start = int(done.numpy())
    batches = strategy.experimental_distribute_dataset(
        dataset.skip(start).take(steps - start)
    )
    losses = {}
    for number, (x, y) in enumerate(batches, start + 1):
        losses[number] = float(step(x, y))
        done.assign(number)
        if manager and (number % save_every == 0 or number == steps):
            manager.save()
        if after_step:
            after_step(number, losses[number])
        elif is_chief(strategy):
            print(f"step {number} loss {losses[number]:.8f}", flush=True)
    return losses


def _manager(strategy, checkpoint, folder):
    """All workers take part in a save; what the chief writes is kept."""
    if not is_chief(strategy):
        folder = folder / f"worker-{strategy.cluster_resolver.task_id}"
    return tf.train.CheckpointManager(checkpoint, folder, max_to_keep=2)


def _step_function(strategy, model, optimizer, loss, jit_compile):
    def replica_step(x, y):
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            # Gradients are summed over replicas, so losses are shares.
            share = tf.reduce_mean(loss(y, outputs))
            share /= strategy.num_replicas_in_sync
            scaled = optimizer.scale_loss(share)
        variables = model.trainable_variables
        optimizer.apply_gradients(
            zip(tape.gradient(scaled, variables), variables, strict=True)
        )
        return share

    @tf.function(jit_compile=jit_compile)
    def step(x, y):
        shares = strategy.run(replica_step, args=(x, y))
        return strategy.reduce("SUM", shares, axis=None)

    return step


def save_results(path, args, **results):
    """Writes arguments, versions and results as JSON."""
    versions = {m.__name__: m.__version__ for m in (keras, tf, keras_kt)}
    record = {"arguments": vars(args), "versions": versions, **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, default=_plain) + "\n")
    print(f"Results: {path}")


def _plain(value):
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    # Where something lay is nobody's business but this machine's.
    return value.name if isinstance(value, Path) else str(value)


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


class Data(NamedTuple):
    """Arrays `(x, y)` of each split; x may be a tuple of arrays."""

    train: tuple
    validation: tuple
    test: tuple


def parse_args(doc, presets, extra=None):
    """The flags of an experiment.

    Args:
        doc: the script's docstring; its first paragraph is the description.
        presets: `Preset` by name, "cpu" among them.
        extra: function that adds the script's own flags to the parser.

    Returns:
        Arguments; `preset` is a `Preset` with the overrides, and `attention` a
        name that was checked.
    """
    parser = argparse.ArgumentParser(
        description=doc.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Attention: softmax, a system of the paper ("
        + ", ".join(keras_kt.PAPER_SYSTEMS)
        + "), or PRIOR:MAP of\n"
        f"{{{','.join(PRIORS)}}}:{{{','.join(MAPS)}}}.",
    )
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("."), help="a folder")
    add("--preset", choices=presets, default="cpu")
    add("--attention", default="mixture:positive", help="see below")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--output", type=Path, help="the JSON file; default: in runs/")
    add("--checkpoints", type=Path, help="a folder; a killed run resumes")
    add("--save-every", type=int, default=200, help="steps")
    add("--validations", type=int, default=10, help="default: %(default)s")
    add(
        "--validation-examples", type=int, default=1000, help="of each, at most"
    )
    add("--draws", type=int, default=10, help="fresh draws to test with")
    add("--draw-examples", type=int, default=1000, help="test examples of each")
    add("--test-examples", type=int, help="at most; default: all")
    if extra:
        extra(parser)
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
    sizes = parser.add_argument_group("in place of the preset's")
    for field in dataclasses.fields(Preset):
        kind = float if field.type is float else int
        sizes.add_argument(f"--{field.name.replace('_', '-')}", type=kind)
    add_strategy_arguments(parser)
    args = parser.parse_args()
    overrides = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(Preset)
        if getattr(args, field.name) is not None
    }
    args.preset_name = args.preset
    args.preset = dataclasses.replace(presets[args.preset], **overrides)
    try:
        attention_options(args)
    except ValueError as error:
        parser.error(str(error))
    return args


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


# Flags of any kernelized attention, and of PRIOR:MAP.
LAYER_FLAGS = ("decay", "near_field")
KERNEL_FLAGS = (
    "num_features",
    "components",
    "prefactor",
    "smoothing",
    "qk_norm",
    "redraw",
)


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


def softmax_attention(block, key_dim, name):
    """Keras's own attention for a block; drops weights at its rate."""
    return keras.layers.MultiHeadAttention(
        block.num_heads,
        key_dim,
        dropout=block.dropout,
        dtype=block.dtype_policy,
        name=name,
    )


@keras.saving.register_keras_serializable(package="examples")
class SoftmaxEncoder(keras_kt.KernelizedTransformerEncoder):
    """The same block around Keras's own attention."""

    def make_attention(self, key_dim, name):
        return softmax_attention(self, key_dim, name)


@keras.saving.register_keras_serializable(package="examples")
class SoftmaxDecoder(keras_kt.KernelizedTransformerDecoder):
    """The same block around Keras's own attention; it cannot stream."""

    def make_attention(self, key_dim, name):
        return softmax_attention(self, key_dim, name)


def make_block(args, causal=False):
    """One pre-norm block of the body, with the attention that was asked for."""
    preset, options = args.preset, attention_options(args)
    kernelized = (
        keras_kt.KernelizedTransformerDecoder
        if causal
        else keras_kt.KernelizedTransformerEncoder
    )
    softmax = SoftmaxDecoder if causal else SoftmaxEncoder
    return (softmax if options is None else kernelized)(
        preset.hidden,
        preset.heads,
        dropout=preset.dropout,
        activation="gelu",
        normalize_first=True,
        key_dim=preset.key_dim,
        local_context=preset.context or None,
        **(options or {}),
    )


@keras.saving.register_keras_serializable(package="examples")
class Positions(keras.layers.Layer):
    """Adds a learned vector to each position."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, input_shape):
        self.positions = self.add_weight(
            input_shape[1:], keras.initializers.RandomNormal(stddev=0.02)
        )

    def call(self, x):
        length = x.shape[1] or tf.shape(x)[1]
        return x + tf.cast(self.positions[:length], x.dtype)


@keras.saving.register_keras_serializable(package="examples")
class Stem(keras.layers.Layer):
    """A convolution that merges `stride` tokens into one; masks follow."""

    def __init__(self, width, stride, kernel_size=None, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.stride = stride
        self.kernel_size = kernel_size or 2 * stride + 1
        self.supports_masking = True

    def build(self, input_shape):
        self.convolution = keras.layers.Conv1D(
            self.width,
            self.kernel_size,
            strides=self.stride,
            padding="same",
            activation="gelu",
            dtype=self.dtype_policy,
        )
        self.convolution.build(input_shape)

    def call(self, x, mask=None):
        if mask is not None:
            keep = tf.cast(mask, "bool")[..., tf.newaxis]
            x = tf.where(keep, x, tf.zeros((), x.dtype))
        return self.convolution(x)

    def compute_mask(self, x, mask=None):
        if mask is None:
            return None
        # A merged token is real if one of its tokens is.
        real = keras.ops.cast(mask, "float32")[..., tf.newaxis]
        real = keras.ops.max_pool(
            real, self.stride, self.stride, "same", "channels_last"
        )
        return real[..., 0] > 0

    def compute_output_shape(self, input_shape):
        batch, length, _ = input_shape
        length = length and -(-length // self.stride)
        return batch, length, self.width

    def get_config(self):
        return {
            **super().get_config(),
            "width": self.width,
            "stride": self.stride,
            "kernel_size": self.kernel_size,
        }


def encode(x, args, causal=False):
    """Positions, the blocks, and a last norm; masks are passed on.

    Args:
        x: `(batch, length, width)` Keras tensor.
        args: from `parse_args`.
        causal: whether a token sees only those before it.

    Returns:
        `(batch, length, width)`.
    """
    x = Positions()(x)
    x = keras.layers.Dropout(args.preset.dropout)(x)
    for _ in range(args.preset.blocks):
        x = make_block(args, causal)(x)
    return keras.layers.LayerNormalization()(x)


def pool(x):
    """`(batch, width)` means over the tokens that are not padding."""
    return keras.layers.GlobalAveragePooling1D()(x)


def make_optimizer(args, model):
    """AdamW with warm-up and cosine decay, clipped; decay spares kernels."""
    preset = args.preset
    warmup = max(1, preset.steps // 10)
    optimizer = keras.optimizers.AdamW(
        keras.optimizers.schedules.CosineDecay(
            0.0,
            max(1, preset.steps - warmup),
            warmup_target=preset.learning_rate,
            warmup_steps=warmup,
        ),
        weight_decay=preset.weight_decay,
        beta_2=0.98,
        global_clipnorm=1.0,
    )
    kernels = {
        id(weight)
        for layer in attention_layers(model)
        for weight in layer.spectral_prior.trainable_variables
    }
    spared = [
        weight
        for weight in model.trainable_variables
        if len(weight.shape) < 2 or id(weight) in kernels
    ]
    if spared:
        optimizer.exclude_from_weight_decay(var_list=spared)
    if keras.config.dtype_policy().name == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def attention_layers(model):
    """The `KernelizedAttention` layers of a model."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras_kt.KernelizedAttention)
    ]


def cross_entropy(y, outputs):
    return keras.losses.sparse_categorical_crossentropy(
        y, outputs, from_logits=True
    )


def accuracy(y, outputs):
    """1 for each example whose likeliest class is right, else 0."""
    return tf.cast(
        tf.equal(tf.cast(y, tf.int64), tf.argmax(outputs, -1)), tf.float32
    )


def run(
    args,
    task,
    data,
    build_model,
    *,
    loss=cross_entropy,
    score=accuracy,
    score_name="accuracy",
    more=None,
):
    """Trains and tests one model, and writes what came of it.

    Args:
        args: from `parse_args`.
        task: the task's name as results should show it.
        data: `Data`.
        build_model: function of `args` to a built Keras model; called in the
            strategy's scope, with seeds set.
        loss: function of `(y, outputs)` to a loss for each example.
        score: function of `(y, outputs)` to a score for each example, whose
            mean is reported.
        score_name: its name.
        more: function of the trained model to a dictionary that the results
            gain. Defaults to `None`, which means nothing.

    Returns:
        The trained model, and the results as a dictionary.
    """
    data = data._replace(
        validation=_first(data.validation, args.validation_examples),
        test=_first(data.test, args.test_examples),
    )
    keras.utils.set_random_seed(args.seed)
    strategy = make_strategy(args)
    with strategy.scope():
        model = build_model(args)
        optimizer = make_optimizer(args, model)
    untrained = kernel_profiles(model)
    print(
        f"{task}: {args.attention}, seed {args.seed}; "
        f"{model.count_params():,} weights, "
        f"{len(data.train[1]):,} / {len(data.validation[1]):,} / "
        f"{len(data.test[1]):,} examples, {args.preset.steps:,} steps of "
        f"{args.preset.batch_size}",
        flush=True,
    )
    evaluate = make_evaluation(args, model, score)
    record = Record(args, task, lambda: evaluate(data.validation), score_name)
    memory = peak_memory()
    train(
        strategy,
        model,
        optimizer,
        loss,
        make_batches(data.train, args),
        steps=args.preset.steps,
        checkpoints=args.checkpoints,
        save_every=args.save_every,
        jit_compile=args.strategy == "none",
        after_step=record.after_step,
    )
    results = {
        **record.results(),
        "peak_memory_mib": peak_memory(),
        "training_memory_mib": peak_memory() - memory,
        "weights": model.count_params(),
        "score": score_name,
        "test": evaluate(data.test),
        "fresh_draws": fresh_draws(args, model, data.test, evaluate),
        "kernels": {
            "distances": list(DISTANCES),
            "untrained": untrained,
            "trained": kernel_profiles(model),
        },
    }
    draws = results["fresh_draws"]
    spread = (
        f"; {len(draws)} fresh draws {np.mean(draws):.4f} ± {np.std(draws):.4f}"
        if draws
        else ""
    )
    print(
        f"{task}, {args.attention}, seed {args.seed}: test {score_name} "
        f"{results['test']:.4f}{spread}; {results['milliseconds_per_step']:.0f}"
        f" ms a step, {results['seconds'] / 60:.1f} minutes"
    )
    if more:
        results.update(more(model))
    if is_chief(strategy):
        save_results(output_path(args, task), args, task=task, **results)
    return model, results


def _first(split, count):
    return tf.nest.map_structure(lambda array: array[:count], split)


def output_path(args, task):
    if args.output:
        return args.output
    name = f"{task}-{args.attention}-{args.seed}.json"
    for mark in ":, ":
        name = name.replace(mark, "-")
    return Path("runs") / name


class Record:
    """Progress, curve and times of a run; survives with its checkpoints."""

    def __init__(self, args, task, validate, score_name):
        self.args, self.validate, self.score_name = args, validate, score_name
        self.curve, self.times, self.losses = [], [], []
        self.seconds = 0.0
        self.path = args.checkpoints and args.checkpoints / "progress.json"
        self.config = {
            "task": task,
            **{
                key: str(value)
                for key, value in sorted(vars(args).items())
                if key not in UNCHECKED
            },
        }
        if self.path and self.path.exists():
            self._resume(json.loads(self.path.read_text()))
        self.last = time.perf_counter()

    def _resume(self, saved):
        different = [
            f"{key} was {saved['config'].get(key)}, is {value}"
            for key, value in self.config.items()
            if saved["config"].get(key) != value
        ]
        if different:
            sys.exit(
                f"--checkpoints {self.args.checkpoints} holds a run of another "
                f"configuration: {'; '.join(different)}. Give the flags of "
                "that run to go on with it, or another folder."
            )
        self.curve, self.seconds = saved["curve"], saved["seconds"]

    def after_step(self, number, loss):
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.losses.append(loss)
        steps = self.args.preset.steps
        every = max(1, steps // self.args.validations)
        if number % every == 0 or number == steps:
            self._report(number)
        if self.path and (
            number % self.args.save_every == 0 or number == steps
        ):
            self._save()
        # What was not training is not timed.
        self.last = time.perf_counter()

    def _report(self, number):
        point = {
            "step": number,
            "loss": float(np.mean(self.losses)),
            "validation": self.validate(),
            "seconds": self.seconds + sum(self.times),
        }
        self.losses = []
        # A resumed run comes past points that it has reported.
        self.curve = [p for p in self.curve if p["step"] < number] + [point]
        print(
            f"step {number:6d}  loss {point['loss']:.4f}  validation "
            f"{self.score_name} {point['validation']:.4f}  "
            f"{point['seconds']:.0f} s",
            flush=True,
        )

    def _save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        saved = {
            "config": self.config,
            "curve": self.curve,
            "seconds": self.seconds + sum(self.times),
        }
        self.path.write_text(json.dumps(saved) + "\n")

    def results(self):
        # The first two steps also compile.
        steady = self.times[2:] or self.times or [0.0]
        return {
            "curve": self.curve,
            "seconds": self.seconds + sum(self.times),
            "milliseconds_per_step": 1e3 * float(np.median(steady)),
        }


# What may differ between a run and its resumption.
UNCHECKED = (
    "checkpoints",
    "data_dir",
    "draw_examples",
    "draws",
    "output",
    "save_every",
    "test_examples",
    "validation_examples",
    "validations",
)


def make_batches(split, args):
    """Batches of whole epochs in random order, the same in every run."""
    x, y = tf.nest.map_structure(tf.constant, split)
    count, batch = len(split[1]), args.preset.batch_size
    needed = args.preset.steps * batch
    rng = np.random.default_rng(args.seed)
    epochs = -(-needed // count)
    order = np.concatenate([rng.permutation(count) for _ in range(epochs)])
    order = order[:needed].reshape(-1, batch)

    def pick(index):
        return tf.nest.map_structure(lambda a: tf.gather(a, index), (x, y))

    return tf.data.Dataset.from_tensor_slices(order).map(pick).prefetch(2)


def make_evaluation(args, model, score):
    """A function of `(x, y)` to the mean score."""

    @tf.function(jit_compile=args.strategy == "none")
    def scores(x, y):
        result = score(y, tf.cast(model(x, training=False), tf.float32))
        return tf.reduce_mean(tf.reshape(result, (tf.shape(y)[0], -1)), 1)

    def evaluate(split):
        count, batch = len(split[1]), args.preset.batch_size
        total = 0.0
        for start in range(0, count, batch):
            # The last batch is filled up, for the sake of one compilation.
            index = np.minimum(np.arange(start, start + batch), count - 1)
            x, y = tf.nest.map_structure(lambda a: a[index], split)  # noqa: B023
            total += float(tf.reduce_sum(scores(x, y)[: count - start]))
        return total / count

    return evaluate


def fresh_draws(args, model, split, evaluate):
    """Scores with other draws of the frequencies; the stored one is kept."""
    layers = attention_layers(model)
    if not layers:
        return []
    stored = [layer.spectral_prior.base_noise.numpy() for layer in layers]
    part = _first(split, args.draw_examples)
    results = []
    for draw in range(args.draws):
        for number, layer in enumerate(layers):
            layer.spectral_prior.resample(1000 * (draw + 1) + number)
        results.append(evaluate(part))
    for layer, noise in zip(layers, stored, strict=True):
        layer.spectral_prior.base_noise.assign(noise)
    return results


def kernel_profiles(model):
    """`KernelProfile.kernel` of each layer, as nested lists."""
    return [
        keras_kt.diagnostics.kernel_profile(layer, DISTANCES)
        .kernel.round(4)
        .tolist()
        for layer in attention_layers(model)
    ]


def peak_memory():
    """The most resident memory this process has had so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def linear_floor(train, test, penalty=1e-3):
    """Accuracy of a linear classifier, as a floor to compare with.

    Ridge regression of the one-hot labels on standardised features.

    Args:
        train: features `(examples, features)` and labels `(examples,)`.
        test: the same, to score.
        penalty: share of a feature's variance that is added to it.
    """
    x, y = np.asarray(train[0], "float32"), np.asarray(train[1])
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / scale
    targets = np.eye(y.max() + 1, dtype="float32")[y]
    offset = targets.mean(0)
    gram = x.T @ x / len(x) + penalty * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (targets - offset) / len(x))
    outputs = (np.asarray(test[0], "float32") - mean) / scale @ weights
    return np.mean((outputs + offset).argmax(1) == test[1])
