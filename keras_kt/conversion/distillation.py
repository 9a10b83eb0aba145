"""Distillation: the spectral prior learns a teacher's attention, by layers.

Layers are given the inputs of their teacher's layers, so that they learn in
parallel and errors do not accumulate. Gradients reach priors, maps and, if
asked for, the query and key projections.
"""

from typing import Any

import keras
import tensorflow as tf

from keras_kt import _checks
from keras_kt.conversion.batches import repeated_batches
from keras_kt.conversion.capture import taught
from keras_kt.conversion.estimate import estimate, squared_errors
from keras_kt.conversion.find import pairs_of_layers
from keras_kt.conversion.probe import kept_losses

TARGETS = ("both", "output", "matrix")


def distill(
    student: keras.Model,
    teacher: keras.Model,
    data: Any,
    *,
    steps: int = 100,
    learning_rate: float = 1e-2,
    target: str = "both",
    train_projections: bool = False,
) -> list[dict]:
    """Trains converted layers to attend as the teacher's do.

    Each layer is given the inputs that the teacher's has, so layers learn in
    parallel and errors do not accumulate. Only spectral priors and feature maps
    are trained, and the query and key projections if asked for: train the
    whole with `distill_outputs` or `fit` afterwards. O(length²).

    Without a near field it takes most from frequencies of both sides that are
    weights: convert with `EmpiricalPrior(tied=False)` and
    `PositiveFeatures("self")`.

    Args:
        student: a model from `convert_attention`, changed in place.
        teacher: the model that was converted.
        data: as in `attention_error`; batches are repeated as needed.
        steps: number of batches to train on.
        learning_rate: of Adam, a number or a schedule.
        target: `"output"`: relative squared error of the heads' outputs.
            `"matrix"`: cross-entropy to the teacher's attention weights.
            `"both"` (default): their sum.
        train_projections: whether query and key projections are trained too;
            not those of KerasHub's models, whose layers rotate in between.

    Returns:
        The loss of each step, a list of dictionaries by layer.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> y = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
        >>> softmax = keras.Model(x, y)
        >>> linear, _ = keras_kt.convert_attention(softmax)
        >>> batch = np.random.normal(size=(1, 50, 8)).astype("float32")
        >>> history = keras_kt.conversion.distill(
        ...     linear, softmax, batch, steps=3)
        >>> len(history), list(history[0])
        (3, ['attention'])
    """
    target = _checks.choice("target", target, TARGETS)
    steps = _checks.integer("steps", steps, minimum=0)
    train_projections = _checks.boolean("train_projections", train_projections)
    learning_rate = checked_rate(learning_rate)
    pairs = pairs_of_layers(student, teacher)
    layers = {pair.path: pair.layer for pair in pairs}
    variables = []
    for layer in layers.values():
        variables += layer.spectral_prior.trainable_variables
        variables += layer.feature_map.trainable_variables
        if train_projections:
            _check_projections(layer)
            variables += layer.query_dense.trainable_variables
            variables += layer.key_dense.trainable_variables
    if not variables:
        raise ValueError(
            "`distill` needs something to train. Received: layers whose priors "
            "have no trainable weights. Use train_projections=True, or convert "
            "with another `spectral_prior`."
        )
    optimizer = keras.optimizers.Adam(learning_rate)
    optimizer.build(variables)

    @tf.function(reduce_retracing=True)
    def step(inputs):
        with tf.GradientTape() as tape:
            losses = {
                path: _loss(layers[path], heads, target)
                for path, heads in taught(pairs, teacher, inputs).items()
            }
            total = tf.add_n(list(losses.values()))
        gradients = tape.gradient(
            total, variables, unconnected_gradients="zero"
        )
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return losses

    history = []
    for inputs in repeated_batches(data, steps):
        inputs = keras.tree.map_structure(tf.convert_to_tensor, inputs)
        with kept_losses(student):
            losses = step(inputs)
        history.append({path: float(loss) for path, loss in losses.items()})
    return history


def _check_projections(layer):
    if not hasattr(layer, "query_dense"):
        raise ValueError(
            "`train_projections` must be False for attention that was "
            "converted between projections of its own layer. Received: "
            f"train_projections=True for {layer.name!r}. `distill_outputs` "
            "trains all weights."
        )


def checked_rate(learning_rate):
    """A learning rate as a number, or the schedule that it is."""
    schedules = keras.optimizers.schedules.LearningRateSchedule
    if isinstance(learning_rate, schedules):
        return learning_rate
    return _checks.number("learning_rate", learning_rate)


def _loss(layer, heads, target):
    output, weights = estimate(layer, *heads[:4])
    loss = 0.0
    if target != "output":
        loss += _cross_entropy(weights, heads)
    if target != "matrix":
        _, error, _, norm = tf.unstack(squared_errors(output, weights, heads))
        loss += tf.reduce_mean(error / (norm + 1e-9))
    return loss


def _cross_entropy(weights, heads):
    """Of the teacher's weights, in rows that see something."""
    log_weights = tf.math.log(tf.maximum(weights, 1e-9))
    rows = tf.reduce_any(heads.visible, axis=-1)
    count = tf.reduce_sum(
        tf.cast(rows, tf.float32) * tf.ones_like(weights[..., 0])
    )
    return -tf.reduce_sum(heads.weights * log_weights) / count
