"""One recipe for all: it trains and tests a model, and records the run."""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_kt
from experiments import measure, records
from experiments.flags import identity
from experiments.measure import accuracy, cross_entropy
from experiments.progress import Progress
from experiments.strategies import is_chief, make_strategy, train, uses_xla


class Data(NamedTuple):
    """Arrays `(x, y)` of each split; x may be a tuple of arrays."""

    train: tuple
    validation: tuple
    test: tuple


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
):
    """Trains and tests one model, and records what came of it.

    Args:
        args: from `parse_args`.
        title: the task's name as results should show it.
        data: `Data`.
        build_model: function of `args` to a built Keras model; called in the
            strategy's scope, with seeds set.
        loss: function of `(y, outputs)` to a loss for each example.
        score: function of `(y, outputs)` to a score for each example, whose
            mean is reported.
        metric: its name.
        more: function of the trained model to columns and arrays that the
            record gains, two dictionaries. Defaults to `None`: nothing.

    Returns:
        The trained model, and its row in the study.
    """
    data = data._replace(
        validation=measure.first(data.validation, args.validation_examples),
        test=measure.first(data.test, args.test_examples),
    )
    keras.utils.set_random_seed(args.seed)
    strategy = make_strategy(args)
    with strategy.scope():
        model = build_model(args)
        optimizer = make_optimizer(args, model)
    arrays = {"untrained": measure.kernel_profiles(model)}
    print(
        f"{title}: {args.attention}, seed {args.seed}; "
        f"{model.count_params():,} weights, "
        f"{len(data.train[1]):,} / {len(data.validation[1]):,} / "
        f"{len(data.test[1]):,} examples, {args.preset.steps:,} steps of "
        f"{args.preset.batch_size}",
        flush=True,
    )
    evaluate = measure.make_evaluation(args, model, score)
    progress = Progress(args, title, lambda: evaluate(data.validation), metric)
    memory = measure.peak_memory()
    train(
        strategy,
        model,
        optimizer,
        loss,
        make_batches(data.train, args),
        steps=args.preset.steps,
        checkpoints=args.checkpoints,
        save_every=args.save_every,
        jit_compile=uses_xla(args),
        after_step=progress.after_step,
    )
    peak = measure.peak_memory()
    draws = measure.fresh_draws(args, model, data.test, evaluate)
    row = {
        **identity(args),
        "metric": metric,
        "score": evaluate(data.test),
        "validation": progress.curve[-1]["validation"],
        "fresh_draws": draws,
        **progress.times_of_all(),
        "peak_memory_mib": peak,
        "training_memory_mib": peak - memory,
        "weights": model.count_params(),
        "title": title,
        **_settings(args),
    }
    arrays["trained"] = measure.kernel_profiles(model)
    arrays["curve"] = [
        [point[name] for name in records.POINT] for point in progress.curve
    ]
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
    if more:
        columns, others = more(model)
        row, arrays = row | columns, arrays | others
    if is_chief(strategy):
        records.write(args.results, [row], arrays)
        print(f"Results: {args.results / 'runs.csv'}")
    return model, row


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
    count, batch = len(split[1]), args.preset.batch_size
    needed = args.preset.steps * batch
    rng = np.random.default_rng(args.seed)
    epochs = -(-needed // count)
    order = np.concatenate([rng.permutation(count) for _ in range(epochs)])
    order = order[:needed].reshape(-1, batch)

    def pick(index):
        return tf.nest.map_structure(lambda a: tf.gather(a, index), (x, y))

    return tf.data.Dataset.from_tensor_slices(order).map(pick).prefetch(2)
