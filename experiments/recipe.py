"""One recipe for all: it trains and tests a model, and records the run."""

import sys
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_kt
from examples.progress import INTERVAL, working
from experiments import measure, offload, records
from experiments.data import Synthetic, first, training_order
from experiments.flags import identity
from experiments.measure import Scores, accuracy, cross_entropy
from experiments.progress import Progress
from experiments.strategies import is_chief, make_strategy, train, uses_xla


class Trained(NamedTuple):
    """What came of a training, wherever it ran.

    Attributes:
        columns: of the row: times, memory, device.
        curve: rows of `records.POINT`.
        scores: `Scores` of the test set.
    """

    columns: dict
    curve: list
    scores: Scores


def run(
    args,
    title,
    data,
    build_model,
    *,
    loss=cross_entropy,
    score=accuracy,
    metric="accuracy",
    more=None,
    tabulate=None,
    draw_all=False,
):
    """Trains and tests one model, and records what came of it.

    With `args.pack` it only packs what another machine needs to do so, and with
    `args.unpack` it records what that machine sent back (see `offload`).

    Args:
        args: from `parse_args`.
        title: the task's name as results should show it.
        data: `Data`, or `Synthetic`.
        build_model: function of `args` to a built Keras model; called in the
            strategy's scope, with seeds set.
        loss: function of `(y, outputs)` to a loss for each example.
        score: function of `(y, outputs)` to a score for each example, whose
            mean is reported.
        metric: its name.
        more: function of the trained model to columns and arrays that the
            record gains, two dictionaries. Defaults to `None`: nothing.
        tabulate: function of the test set and its `Scores` to columns and
            arrays, likewise.
        draw_all: whether `tabulate` needs the scores of fresh draws for the
            whole test set.

    Returns:
        The trained model, and its row in the study; `None` in its place where
        the run was only packed. A model that another machine has trained has
        the kernels' trained weights alone.
    """
    if more and (args.pack or args.unpack):
        sys.exit(
            f"{title}: part of its record needs the whole trained model, which "
            "does not come back from another machine. Run it here."
        )
    source = data
    if isinstance(data, Synthetic):
        with working("Making data"):
            data = data.make()
    data = data._replace(
        validation=first(data.validation, args.validation_examples),
        test=first(data.test, args.test_examples),
    )
    keras.utils.set_random_seed(args.seed)
    strategy = make_strategy(args)
    with strategy.scope():
        model = build_model(args)
        optimizer = make_optimizer(args, model)
    print(
        f"{title}: {args.attention}, seed {args.seed}; "
        f"{model.count_params():,} weights, "
        f"{len(data.train[1]):,} / {len(data.validation[1]):,} / "
        f"{len(data.test[1]):,} examples, {args.preset.steps:,} steps of "
        f"{args.preset.batch_size}",
        flush=True,
    )
    scored_by_draws = None if draw_all else args.draw_examples
    if args.pack:
        offload.pack(
            args, source, data, model, optimizer, loss, score, scored_by_draws
        )
        return model, None
    arrays = {"untrained": measure.kernel_profiles(model)}
    if args.unpack:
        trained = Trained(*offload.unpack(args, model))
    else:
        evaluate = measure.make_evaluation(args, model, score)
        part = first(data.test, scored_by_draws)
        progress = Progress(
            args,
            title,
            lambda: _mean(evaluate(data.validation)),
            metric,
            INTERVAL,
        )
        columns, curve = _train(
            args, progress, data.train, (strategy, model, optimizer, loss)
        )
        with working(f"Testing, and with {args.draws} fresh draws"):
            draws = measure.fresh_draws(model, args.draws)
            fresh = np.array([evaluate(part) for _ in draws])
            scores = Scores(evaluate(data.test), fresh)
        trained = Trained(columns, curve, scores)
    draws = trained.scores.means_of_draws(args.draw_examples)
    row = {
        **identity(args),
        "metric": metric,
        "score": _mean(trained.scores.stored),
        "validation": trained.curve[-1][records.POINT.index("validation")],
        "fresh_draws": draws,
        **trained.columns,
        "weights": model.count_params(),
        "title": title,
        **_settings(args),
    }
    arrays["trained"] = measure.kernel_profiles(model)
    arrays["curve"] = trained.curve
    spread = (
        f"; {len(draws)} fresh draws {np.mean(draws):.4f} ± {np.std(draws):.4f}"
        if draws
        else ""
    )
    print(
        f"{title}, {args.attention}, seed {args.seed}: test {metric} "
        f"{row['score']:.4f}{spread}; {row['milliseconds_per_step']:.0f}"
        f" ms a step, {row['seconds'] / 60:.1f} minutes"
    )
    for columns, others in (
        more(model) if more else ({}, {}),
        tabulate(data.test, trained.scores) if tabulate else ({}, {}),
    ):
        row, arrays = row | columns, arrays | others
    if is_chief(strategy):
        records.write(args.results, [row], arrays)
        print(f"Results: {args.results / 'runs.csv'}")
    return model, row


def _mean(scores):
    # In double precision, as a sum of Python's numbers has.
    return float(np.mean(scores, dtype=float))


def _train(args, progress, split, training):
    """Trains on this machine; columns of the row, and the curve."""
    memory = measure.peak_memory()
    with progress.before_step as waiting:
        waiting.enter_context(working("Compiling the training step"))
        train(
            *training,
            make_batches(split, args),
            steps=args.preset.steps,
            checkpoints=args.checkpoints,
            save_every=args.save_every,
            jit_compile=uses_xla(args),
            after_step=progress.after_step,
        )
    peak = measure.peak_memory()
    columns = {
        **progress.times_of_all(),
        "peak_memory_mib": peak,
        "training_memory_mib": peak - memory,
    }
    return columns, [
        [point[name] for name in records.POINT] for point in progress.curve
    ]


def _settings(args):
    return {
        "preset": args.preset_name,
        **vars(args.preset),
        "options": args.options,
        **{m.__name__: m.__version__ for m in (keras, tf, keras_kt)},
    }


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
        for layer in measure.attention_layers(model)
        for weight in layer.spectral_weights
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


def make_batches(split, args):
    """Batches of whole epochs in random order, the same in every run."""
    x, y = tf.nest.map_structure(tf.constant, split)
    preset = args.preset
    order = training_order(
        len(split[1]), preset.batch_size, preset.steps, args.seed
    )

    def pick(index):
        return tf.nest.map_structure(lambda a: tf.gather(a, index), (x, y))

    return tf.data.Dataset.from_tensor_slices(order).map(pick).prefetch(2)
