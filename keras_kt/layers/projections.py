"""Projections and axes of an attention layer, as `MultiHeadAttention`'s."""

import functools
import math
import re
import string

import keras
import numpy as np
import tensorflow as tf

from keras_kt import _checks
from keras_kt.layers.axes import (
    as_axes,
    check_shapes,
    check_tensors,
    position_mask,
    resolve_axes,
    scores_shape,
)

# Which check the value of an argument has to pass, to leave as plain Python.
ARGUMENTS = {
    "dropout": functools.partial(_checks.number, below=1.0),
    "use_bias": _checks.boolean,
    "use_gate": _checks.boolean,
}


class ProjectedAttention(keras.layers.Layer):
    """Base of layers that project tokens to heads, and heads to tokens.

    Weights and their order are `MultiHeadAttention`'s. A subclass has
    `num_heads`, `num_key_value_heads`, `key_dim`, `value_dim` and `seed`.
    """

    def __init__(
        self,
        *,
        dropout,
        use_bias,
        output_shape,
        attention_axes,
        kernel_initializer,
        bias_initializer,
        kernel_regularizer,
        bias_regularizer,
        activity_regularizer,
        kernel_constraint,
        bias_constraint,
        use_gate,
        **kwargs,
    ):
        plain = _checks.plain(
            ARGUMENTS, dropout=dropout, use_bias=use_bias, use_gate=use_gate
        )
        super().__init__(**_checks.keywords(kwargs))
        for name, value in plain.items():
            setattr(self, name, value)
        # Not a public attribute: Functional models have one of that name.
        self._output_shape = _as_shape(output_shape)
        # As given: what "all axes" and negative ones are, the rank decides.
        self._given_axes = as_axes(attention_axes)
        self._attention_axes = self._given_axes
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.projection_activity_regularizer = keras.regularizers.get(
            activity_regularizer
        )
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)

    @property
    def attention_axes(self):
        return self._attention_axes

    @property
    def query_dense(self):
        return self._query_dense

    @property
    def key_dense(self):
        return self._key_dense

    @property
    def value_dense(self):
        return self._value_dense

    @property
    def output_dense(self):
        return self._output_dense

    def build_projections(self, query_shape, value_shape, key_shape):
        """Creates them, in `MultiHeadAttention`'s order."""
        check_shapes(query_shape, value_shape, key_shape)
        rank = len(query_shape)
        self._attention_axes = resolve_axes(self._given_axes, rank)
        heads_out = (self.num_heads, self.value_dim)
        few = self.num_key_value_heads
        self._query_dense = self._project(
            "query", query_shape, (self.num_heads, self.key_dim)
        )
        self._key_dense = self._project("key", key_shape, (few, self.key_dim))
        if self.use_gate:
            self._gate_dense = self._project(
                "gate", query_shape, heads_out, activation="sigmoid"
            )
        self._value_dense = self._project(
            "value", value_shape, (few, self.value_dim)
        )
        self._dropout_layer = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, seed=self.seed
        )
        self._output_dense = self._project(
            "attention_output",
            (*query_shape[:-1], *heads_out),
            self._output_shape or (query_shape[-1],),
            bound=2,
        )

    def _project(self, name, input_shape, output_shape, bound=1, **kwargs):
        letters = string.ascii_lowercase
        free = len(input_shape) - bound
        inputs = letters[: free + bound]
        outputs = letters[free + bound : free + bound + len(output_shape)]
        equation = (
            f"{inputs},{inputs[free:]}{outputs}->{inputs[:free]}{outputs}"
        )
        layer = keras.layers.EinsumDense(
            equation,
            output_shape=(*[None] * (free - 1), *output_shape),
            bias_axes=outputs if self.use_bias else None,
            name=name,
            kernel_initializer=self.kernel_initializer.clone(),
            bias_initializer=self.bias_initializer.clone(),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            activity_regularizer=self.projection_activity_regularizer,
            kernel_constraint=self.kernel_constraint,
            bias_constraint=self.bias_constraint,
            dtype=self.dtype_policy,
            **kwargs,
        )
        layer.build(tuple(input_shape))
        return layer

    def _project_heads(self, heads, query, training):
        if self.dropout:
            heads = self._dropout_layer(heads, training=training)
        if self.use_gate:
            heads = heads * self._gate_dense(query)
        return self._output_dense(heads)

    def _project_step_heads(self, heads, query):
        """`_project_heads` of a step of inference."""
        if self.use_gate:
            heads = heads * of_step(self._gate_dense, query)
        return of_step(self._output_dense, heads)

    def check_mask(self, name, mask, x):
        """A mask that broadcasts to the positions of x, or `None`."""
        return position_mask(name, mask, x.shape[:-1], self._attention_axes)

    def compute_output_shape(self, query_shape, value_shape, key_shape=None):
        key_shape = value_shape if key_shape is None else key_shape
        check_shapes(query_shape, value_shape, key_shape)
        if self._output_shape:
            return (*query_shape[:-1], *self._output_shape)
        return tuple(query_shape)

    def compute_output_spec(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
    ):
        check_tensors(query, value, value if key is None else key)
        shape = self.compute_output_shape(
            query.shape, value.shape, None if key is None else key.shape
        )
        output = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return output
        axes = resolve_axes(self._given_axes, len(query.shape))
        scores = scores_shape(query.shape, value.shape, axes, self.num_heads)
        return output, keras.KerasTensor(scores, dtype=self.compute_dtype)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "output_shape": self._output_shape,
            "attention_axes": self._given_axes,
            "kernel_initializer": serialize(self.kernel_initializer),
            "bias_initializer": serialize(self.bias_initializer),
            "kernel_regularizer": serialize(self.kernel_regularizer),
            "bias_regularizer": serialize(self.bias_regularizer),
            "activity_regularizer": serialize(
                self.projection_activity_regularizer
            ),
            "kernel_constraint": serialize(self.kernel_constraint),
            "bias_constraint": serialize(self.bias_constraint),
            "use_gate": self.use_gate,
        }


def of_step(dense, x, call=None):
    """`dense(x)` of the tokens of a step; of a single one by plain matrices.

    XLA's CPU compiler makes a loop of the product of one row and a reshaped
    weight, twenty times as slow as its own product of two rows. So a row of
    zeros goes with the batch, unless that is known to have more than one.

    Args:
        dense: a layer; an `EinsumDense` of `(batch, length, …)` is written
            otherwise.
        x: `(batch, length, …)`.
        call: what to call otherwise; defaults to the layer.
    """
    if x.shape[1] != 1 or not _is_product(dense):
        return (call or dense)(x)
    kernel = tf.cast(dense.kernel, dense.compute_dtype)
    bound = x.shape.rank - 2
    size, outputs = math.prod(kernel.shape[:bound]), kernel.shape[bound:]
    rows = tf.reshape(tf.cast(x, kernel.dtype), (-1, size))
    may_be_row = x.shape[0] in (None, 1)
    if may_be_row:
        rows = tf.pad(rows, [[0, 1], [0, 0]])
    y = tf.matmul(rows, tf.reshape(kernel, (size, -1)))
    y = tf.reshape(y[:-1] if may_be_row else y, (-1, 1, *outputs))
    if dense.bias is not None:
        y += tf.cast(dense.bias, y.dtype)
    return dense.activation(y)


def _is_product(dense):
    """Whether a layer is a matrix product of tokens, and no more."""
    if type(dense) is not keras.layers.EinsumDense or (
        dense.quantization_mode or dense.activity_regularizer
    ):
        return False
    tokens, kernel, outputs = re.split(",|->", dense.equation)
    return tokens[:2] == outputs[:2] and kernel == tokens[2:] + outputs[2:]


def _as_shape(output_shape):
    if output_shape is None:
        return None
    if np.ndim(output_shape) == 0:
        output_shape = [output_shape]
    try:
        return _checks.integers("output_shape", output_shape) or None
    except ValueError as error:
        raise ValueError(
            f"Invalid `output_shape`: {output_shape}. When specified, the "
            "`output_shape` should be of type tuple, list, or int."
        ) from error
