"""Weights that move at a pace of their own.

Adam and its kin make steps of the size of the learning rate, whatever the
weight: right for thousands of entries of size 0.1, and so little for a kernel's
few parameters of size one that training ends before they have moved.
"""

import keras
import numpy as np
import tensorflow as tf


class PacedLayer(keras.layers.Layer):
    """A float32 layer whose weights a learning rate moves `pace`-fold.

    A variable is its value divided by the pace, so that a step of its size is
    `pace` steps of the value's. Its gradient is that of the value: norms by
    which gradients are clipped stay what they are, and plain gradient descent
    is `pace` times as fast too. Files hold values, whatever the pace.

    Attributes:
        pace: the factor; `None` means 1.
    """

    pace = None
    # Of variables of `paced_weight`, by identity; replaced, never changed.
    _factors: dict = {}

    def paced_weight(
        self, name, shape, initializer, regularizer=None, *, is_paced=True
    ):
        """`add_weight` by the start of the value, which `value_of` gives.

        One that is not paced is its value.
        """
        initializer = keras.initializers.get(initializer)
        regularizer = keras.regularizers.get(regularizer)
        pace = self.pace if is_paced and self.pace else 1.0
        if regularizer:
            penalty = regularizer

            def regularizer(weight):
                return penalty(_paced(weight, pace))

        weight = self.add_weight(
            name=name,
            shape=shape,
            initializer=lambda shape, dtype: initializer(shape, dtype) / pace,
            regularizer=regularizer,
            autocast=False,
        )
        # Past Keras, which would track it.
        factors = {**self._factors, id(weight): pace}
        object.__setattr__(self, "_factors", factors)
        return weight

    def value_of(self, weight: keras.Variable) -> tf.Tensor:
        """The value that a variable of `paced_weight` stands for."""
        factor = self._factors.get(id(weight))
        if factor is None:
            # Where nothing is paced an expression is as good.
            if set(self._factors.values()) <= {1.0}:
                return tf.convert_to_tensor(weight)
            raise ValueError(
                "The value of a weight is asked for by the variable that "
                "`add_parameter` returned, which is divided by the pace. "
                f"Received: {weight!r}. Compute with what `for_heads(variable)`"
                " returns."
            )
        return _paced(weight, factor)

    def assign_value(self, weight, value) -> None:
        """Sets the value of a variable of `paced_weight`."""
        weight.assign(value / self._factors[id(weight)])

    def save_own_variables(self, store):
        for key, weight in self._own_variables().items():
            value = keras.ops.convert_to_numpy(weight)
            store[key] = value * self._factor(weight)

    def load_own_variables(self, store):
        own = self._own_variables()
        if set(store.keys()) == set(own):
            store = {
                key: np.asarray(store[key]) / self._factor(weight)
                for key, weight in own.items()
            }
        # Else Keras says what is wrong.
        super().load_own_variables(store)

    def _own_variables(self):
        own = {}
        super().save_own_variables(own)
        return own

    def _factor(self, weight):
        factor = self._factors.get(id(weight), 1)
        # As an array, so that integers stay what they are.
        return np.asarray(factor, weight.dtype)


def _paced(weight, pace):
    weight = tf.convert_to_tensor(weight)
    if pace == 1:
        return weight
    # The second term is zero, and its gradient one.
    return tf.stop_gradient(pace * weight) + (weight - tf.stop_gradient(weight))
