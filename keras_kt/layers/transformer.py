"""Transformer blocks around `KernelizedAttention`, encoder and decoder.

Arguments have the names that KerasHub's `TransformerEncoder` and
`TransformerDecoder` give them; the keyword-only arguments of
`KernelizedAttention` (`spectral_prior`, `feature_map`, …) are taken as well.
"""

import inspect
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_kt import _checks
from keras_kt.layers import linear_attention, projections
from keras_kt.layers.attention import KernelizedAttention
from keras_kt.layers.axes import mask_of
from keras_kt.layers.local_context import LocalContext
from keras_kt.ops import states

# Whatever the layer takes, a block takes.
_OPTIONS = (
    "use_bias",
    "seed",
    *(
        name
        for name, parameter in inspect.signature(
            KernelizedAttention
        ).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ),
)


class DecoderState(NamedTuple):
    """What a decoder block keeps of the tokens so far: `step` to `step`.

    Attributes:
        attention: `AttentionState` of the self-attention.
        context: `(batch, local_context - 1, width)`, the last inputs of the
            local context; of length 0 without one.
    """

    attention: states.AttentionState
    context: tf.Tensor


class _Block(keras.layers.Layer):
    """Attention and feed-forward network, each with residual and norm."""

    is_causal = False

    def __init__(
        self,
        intermediate_dim,
        num_heads,
        dropout=0.0,
        activation="relu",
        layer_norm_epsilon=1e-5,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        normalize_first=False,
        *,
        key_dim=None,
        local_context=None,
        **kwargs,
    ):
        self.attention_options = _checks.plain(
            {**projections.ARGUMENTS, **linear_attention.ARGUMENTS},
            **{name: kwargs.pop(name) for name in _OPTIONS if name in kwargs},
        )
        super().__init__(**_checks.keywords(kwargs))
        self.supports_masking = True
        self.intermediate_dim = _checks.integer(
            "intermediate_dim", intermediate_dim
        )
        self.num_heads = _checks.integer("num_heads", num_heads)
        self.dropout = _checks.number("dropout", dropout, below=1.0)
        self.activation = keras.activations.get(activation)
        self.layer_norm_epsilon = _checks.number(
            "layer_norm_epsilon", layer_norm_epsilon
        )
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.normalize_first = _checks.boolean(
            "normalize_first", normalize_first
        )
        self.key_dim = _checks.integer("key_dim", key_dim, optional=True)
        self.local_context = _checks.integer(
            "local_context", local_context, optional=True
        )
        if self.key_dim is not None:
            # Wrong options are told here, not when the first input comes.
            self.make_attention(self.key_dim, "probe")

    def make_attention(self, key_dim, name):
        """The attention layer of a block, made when the block is built.

        A subclass that overrides this gets the same block around another layer
        with `MultiHeadAttention`'s call, for comparisons.

        Args:
            key_dim: size of queries and keys per head.
            name: name for the layer.

        Returns:
            An unbuilt layer.
        """
        return KernelizedAttention(
            self.num_heads,
            key_dim,
            dropout=self.dropout,
            kernel_initializer=_fresh(self.kernel_initializer),
            bias_initializer=_fresh(self.bias_initializer),
            dtype=self.dtype_policy,
            name=name,
            **self.attention_options,
        )

    def _build_block(self, width, cross_width=None):
        key_dim = self.key_dim
        if key_dim is None:
            if width % self.num_heads:
                raise ValueError(
                    "`num_heads` must divide the width of the inputs unless "
                    f"`key_dim` is given. Received: num_heads={self.num_heads}"
                    f", inputs of width {width}."
                )
            key_dim = width // self.num_heads
        shape = None, None, width
        self._norms = []
        self._self_attention = self.make_attention(key_dim, "self_attention")
        self._self_attention.build(shape, shape)
        self._add_norm("self_attention_norm", width)
        self._local_context = None
        if self.local_context is not None:
            self._local_context = LocalContext(
                self.local_context,
                self.is_causal,
                dtype=self.dtype_policy,
                name="local_context",
            )
            self._local_context.build(shape)
        self._cross_attention = None
        if cross_width is not None:
            self._cross_attention = self.make_attention(
                key_dim, "cross_attention"
            )
            self._cross_attention.build(shape, (None, None, cross_width))
            self._add_norm("cross_attention_norm", width)
        self._hidden = self._dense(
            self.intermediate_dim, "hidden", activation=self.activation
        )
        self._hidden.build(shape)
        self._output = self._dense(width, "output")
        self._output.build((None, None, self.intermediate_dim))
        self._add_norm("feed_forward_norm", width)
        self._dropout = keras.layers.Dropout(
            self.dropout,
            seed=self.attention_options.get("seed"),
            dtype=self.dtype_policy,
            name="dropout",
        )

    def _dense(self, units, name, **kwargs):
        return keras.layers.Dense(
            units,
            kernel_initializer=_fresh(self.kernel_initializer),
            bias_initializer=_fresh(self.bias_initializer),
            dtype=self.dtype_policy,
            name=name,
            **kwargs,
        )

    def _add_norm(self, name, width):
        norm = keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, dtype=self.dtype_policy, name=name
        )
        norm.build((None, None, width))
        self._norms.append(norm)

    def _residual(self, x, norm, function, training):
        if self.normalize_first:
            return x + self._dropout(function(norm(x)), training=training)
        return norm(x + self._dropout(function(x), training=training))

    def _feed_forward(self, x, training):
        return self._residual(
            x,
            self._norms[-1],
            lambda x: self._output(self._hidden(x)),
            training,
        )

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "num_heads": self.num_heads,
            "dropout": self.dropout,
            "activation": keras.activations.serialize(self.activation),
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "kernel_initializer": serialize(self.kernel_initializer),
            "bias_initializer": serialize(self.bias_initializer),
            "normalize_first": self.normalize_first,
            "key_dim": self.key_dim,
            "local_context": self.local_context,
            **{
                name: serialize(value)
                for name, value in self.attention_options.items()
            },
        }


@keras.saving.register_keras_serializable(package="keras_kt")
class KernelizedTransformerEncoder(_Block):
    """A transformer encoder block at a cost linear in length.

    Self-attention by `KernelizedAttention`, then two dense layers, each with a
    residual connection, layer normalization and dropout.

    Args:
        intermediate_dim: width of the hidden layer of the feed-forward network.
        num_heads: number of attention heads.
        dropout: rate of dropout of both branches and of the heads' outputs.
        activation: of the hidden layer. Defaults to `"relu"`.
        layer_norm_epsilon: of the layer normalizations.
        kernel_initializer: of dense and attention projections.
        bias_initializer: likewise.
        normalize_first: whether each branch normalizes its input (pre-norm)
            instead of the sum. Defaults to `False`, as in KerasHub.
        key_dim: size of queries and keys per head. Defaults to `None`, which
            means width / `num_heads`.
        local_context: number of neighbouring tokens, itself included, that a
            learned sum of each channel brings into the attention's input.
            Defaults to `None`, which means none.
        **kwargs: the keyword-only arguments of `KernelizedAttention`, its
            `use_bias` and `seed`, and the arguments of a Keras layer.

    Call arguments:
        inputs: `(batch, length, width)`.
        padding_mask: `(batch, length)` boolean, True for tokens. Defaults to
            the Keras mask of the inputs.
        attention_mask: `(batch, length, length)`; costs O(length²).
        training: whether dropout and redraws are on.

    Returns:
        `(batch, length, width)`.

    Examples:

    >>> block = keras_kt.KernelizedTransformerEncoder(
    ...     64, num_heads=4, spectral_prior="mixture", normalize_first=True
    ... )
    >>> block(np.zeros((2, 50, 32), "float32")).shape
    TensorShape([2, 50, 32])
    """

    def build(self, inputs_shape):
        self._build_block(inputs_shape[-1])

    def call(
        self, inputs, padding_mask=None, attention_mask=None, training=None
    ):
        mask = mask_of(inputs, padding_mask)

        def attend(x):
            if self._local_context is not None:
                x = self._local_context(x, mask=mask)
            return self._self_attention(
                x,
                x,
                query_mask=mask,
                value_mask=mask,
                attention_mask=attention_mask,
                training=training,
            )

        x = self._residual(inputs, self._norms[0], attend, training)
        return self._feed_forward(x, training)


@keras.saving.register_keras_serializable(package="keras_kt")
class KernelizedTransformerDecoder(_Block):
    """A transformer decoder block that streams at a constant cost per token.

    Causal self-attention, then attention to an encoder's output if there is
    one, then two dense layers, each with residual, normalization and dropout.

    Args:
        intermediate_dim: width of the hidden layer of the feed-forward network.
        num_heads: number of attention heads.
        dropout: rate of dropout of both branches and of the heads' outputs.
        activation: of the hidden layer. Defaults to `"relu"`.
        layer_norm_epsilon: of the layer normalizations.
        kernel_initializer: of dense and attention projections.
        bias_initializer: likewise.
        normalize_first: whether each branch normalizes its input (pre-norm)
            instead of the sum. Defaults to `False`, as in KerasHub.
        key_dim: size of queries and keys per head. Defaults to `None`, which
            means width / `num_heads`.
        local_context: number of tokens, the last one included, that a learned
            sum of each channel brings into the self-attention's input. Defaults
            to `None`, which means none.
        **kwargs: the keyword-only arguments of `KernelizedAttention`, its
            `use_bias` and `seed`, and the arguments of a Keras layer.

    Call arguments:
        decoder_sequence: `(batch, length, width)`.
        encoder_sequence: `(batch, encoder_length, encoder_width)`; given at the
            first call, or never.
        decoder_padding_mask: `(batch, length)` boolean, True for tokens.
            Defaults to the Keras mask of the sequence.
        encoder_padding_mask: `(batch, encoder_length)`, likewise.
        training: whether dropout and redraws are on.

    Returns:
        `(batch, length, width)`.

    Examples:

    >>> block = keras_kt.KernelizedTransformerDecoder(64, num_heads=4)
    >>> x = np.zeros((2, 50, 32), "float32")
    >>> block(x).shape
    TensorShape([2, 50, 32])
    >>> output, state = block.step(x[:, :1], block.initial_state(2))
    >>> output.shape
    TensorShape([2, 1, 32])
    """

    is_causal = True

    def build(self, decoder_sequence_shape, encoder_sequence_shape=None):
        cross = encoder_sequence_shape
        self._build_block(
            decoder_sequence_shape[-1], cross[-1] if cross else None
        )
        self._width = decoder_sequence_shape[-1]

    def call(
        self,
        decoder_sequence,
        encoder_sequence=None,
        decoder_padding_mask=None,
        encoder_padding_mask=None,
        training=None,
    ):
        mask = mask_of(decoder_sequence, decoder_padding_mask)

        def attend(x):
            if self._local_context is not None:
                x = self._local_context(x, mask=mask)
            return self._self_attention(
                x,
                x,
                query_mask=mask,
                value_mask=mask,
                training=training,
                use_causal_mask=True,
            )

        x = self._residual(decoder_sequence, self._norms[0], attend, training)
        x = self._attend_encoder(
            x, encoder_sequence, encoder_padding_mask, mask, training
        )
        return self._feed_forward(x, training)

    def _attend_encoder(self, x, sequence, padding_mask, mask, training):
        if (sequence is None) != (self._cross_attention is None):
            had = "without" if sequence is not None else "with"
            raise ValueError(
                "`encoder_sequence` must be given in every call or in none: "
                f"the block was built {had} one. Received: encoder_sequence="
                f"{'None' if sequence is None else tuple(sequence.shape)}"
            )
        if sequence is None:
            return x
        padding_mask = mask_of(sequence, padding_mask)
        return self._residual(
            x,
            self._norms[1],
            lambda x: self._cross_attention(
                x,
                sequence,
                query_mask=mask,
                value_mask=padding_mask,
                training=training,
            ),
            training,
        )

    def initial_state(self, batch_size):
        """The state of a stream that has seen nothing.

        Args:
            batch_size: number of streams, an integer or a scalar tensor.

        Returns:
            `DecoderState`. Needs a built block.
        """
        self._check_built("initial_state")
        return DecoderState(
            self._self_attention.initial_state(batch_size),
            states.zeros(self.state_shapes.context, batch_size),
        )

    def _check_built(self, name):
        if not self.built:
            raise ValueError(
                f"`{name}` needs a built block, whose width is known. "
                f"Received: {self.name!r}, which is not. Call it once."
            )

    @property
    def state_shapes(self):
        """Shapes of the state's tensors, as a state; `None` for the batch."""
        length = 0 if self.local_context is None else self.local_context - 1
        return DecoderState(
            self._self_attention.state_shapes, (None, length, self._width)
        )

    def step(
        self,
        decoder_sequence,
        state,
        encoder_sequence=None,
        encoder_padding_mask=None,
        decoder_padding_mask=None,
    ):
        """What the call gives for the next tokens of a stream.

        Args:
            decoder_sequence: `(batch, new_tokens, width)`.
            state: `DecoderState` from `initial_state` or an earlier `step`; or
                its arrays, NumPy's too, in tuples, lists or dicts.
            encoder_sequence: as in the call; attended anew in every step.
            encoder_padding_mask: likewise.
            decoder_padding_mask: `(batch, new_tokens)` boolean, True for
                tokens; padding leaves the state as it is. Defaults to the
                Keras mask of the sequence.

        Returns:
            `(batch, new_tokens, width)`, which carries the Keras mask of the
            sequence, and the new state.
        """
        self._check_built("step")
        state = states.restore(state, self.state_shapes)
        mask = mask_of(decoder_sequence, decoder_padding_mask)
        carried = mask_of(decoder_sequence)
        sequence = tf.cast(decoder_sequence, self.compute_dtype)
        after = []

        def attend(x):
            context = state.context
            if self._local_context is not None:
                x, context = self._local_context.step(x, context, mask=mask)
            x, attention = self._self_attention.step(
                x, state.attention, query_mask=mask, value_mask=mask
            )
            after.append(DecoderState(attention, context))
            return x

        x = self._residual(sequence, self._norms[0], attend, False)
        x = self._attend_encoder(
            x, encoder_sequence, encoder_padding_mask, mask, False
        )
        x = self._feed_forward(x, False)
        if carried is not None:
            x._keras_mask = carried
        return x, after[0]

    def compute_output_shape(
        self, decoder_sequence_shape, encoder_sequence_shape=None
    ):
        return tuple(decoder_sequence_shape)


def _fresh(initializer):
    """A copy, since one that was used gives the same values again."""
    return keras.initializers.get(keras.initializers.serialize(initializer))
