"""`streaming_model`: a functional model streams as it is."""

from typing import Any

import keras
import tensorflow as tf

from keras_kt.streaming import protocol
from keras_kt.streaming.stream import stream_of


def streaming_model(model: keras.Model) -> Any:
    """A model with `initial_state` and `step`, from one trained with `fit`.

    The graph of a functional or Sequential model is followed, models within it
    too, and each call gets its way to stream: layers with `initial_state` and
    `step` (those of this package, or yours) by these, causal convolutions and
    recurrent layers by what they remember, layers whose call takes `positions`
    (KerasHub's `PositionEmbedding`, `RotaryEmbedding`) by a count of the tokens
    so far. Every other layer and operation must act on each token alone, which
    is tried on random tokens, of your own layers as well. One that tells
    positions apart, of an input whose length is known, costs a pass over that
    length in each step.

    Weights are shared: what trains the model trains its stream. Inference only,
    no dropout. `generate` and `export_saved_model(…, streaming=True)` do this
    by themselves.

    Args:
        model: a built functional or Sequential model with one input, `(batch,
            length, …)`, all of whose outputs are `(batch, length, …)` and
            causal. A model that has the methods already is returned as it is.

    Returns:
        A `keras.Model` with the call of `model` and two methods.
        `initial_state(batch_size)` gives the state of streams that have seen
        nothing, a dict by the names of layers. `step(tokens, state, mask=None)`
        gives outputs at the new tokens, as of the whole call however the stream
        is cut, and the new state. Where `mask`, `(batch, new_tokens)` boolean,
        is False, there is no token: it takes no place in any layer, and outputs
        are zeros. Masks that layers make (`Embedding(mask_zero=True)`) do what
        they do in the call.

    Raises:
        ValueError: names the first layer or operation that cannot stream
            (bidirectional attention, pooling, what mixes the rows of a batch or
            moves the axis of tokens), its place in the graph, and a way out.

    Examples:
        >>> tokens = keras.Input((None,), dtype="int32")
        >>> x = keras.layers.Embedding(100, 32)(tokens)
        >>> x = keras.layers.Conv1D(32, 5, padding="causal")(x)
        >>> attention = keras_kt.KernelizedAttention(num_heads=4, key_dim=8)
        >>> x = x + attention(x, x, use_causal_mask=True)
        >>> model = keras.Model(tokens, keras.layers.Dense(100)(x))
        >>> stream = keras_kt.streaming_model(model)
        >>> state = stream.initial_state(batch_size=1)
        >>> logits, state = stream.step([[1, 2, 3]], state)
        >>> logits.shape
        TensorShape([1, 3, 100])
    """
    if not protocol.missing_methods(model):
        return model
    return StreamingModel(model)


@keras.saving.register_keras_serializable(package="keras_kt")
class StreamingModel(keras.Model):
    """A model that streams by its graph; made by `streaming_model`."""

    def __init__(self, model, **kwargs):
        stream = stream_of(model)
        super().__init__(**kwargs)
        self.model = model
        self._stream = stream
        self.built = True

    @property
    def inputs(self):
        """The inputs of the model that it was made of."""
        return self.model.inputs

    @property
    def input(self):
        """Likewise, in their structure."""
        return self.model.input

    @property
    def takes_mask(self) -> bool:
        """Whether `step` takes a mask: each layer in the model has to."""
        return self._stream.takes_mask

    def call(self, inputs, training=None):
        return self.model(inputs, training=training)

    def compute_output_shape(self, input_shape):
        return self.model.compute_output_shape(input_shape)

    def initial_state(self, batch_size: int | tf.Tensor) -> Any:
        """The state of streams that have seen nothing.

        Args:
            batch_size: number of streams, an integer or a scalar tensor.

        Returns:
            A dict of the layers' states by their places in the graph.
        """
        return self._stream.initial_state(batch_size)

    def step(
        self, tokens: tf.Tensor, state: Any, mask: tf.Tensor | None = None
    ) -> tuple[Any, Any]:
        """What the call gives for the next tokens of its streams.

        Args:
            tokens: `(batch, new_tokens, …)`, at least one new token.
            state: from `initial_state` or an earlier `step`.
            mask: `(batch, new_tokens)` boolean, True for tokens. Defaults to
                `None`: all are.

        Returns:
            Outputs `(batch, new_tokens, …)` in the structure of the call's, and
            the new state, of the same size.
        """
        return self._stream.step(tokens, state, mask=mask)

    def get_config(self):
        model = keras.saving.serialize_keras_object(self.model)
        return {**super().get_config(), "model": model}

    @classmethod
    def from_config(cls, config):
        model = keras.saving.deserialize_keras_object(config["model"])
        return cls(**{**config, "model": model})
