"""Transformer blocks around kernelized attention, encoder and decoder.

Arguments have the names that KerasHub's `TransformerEncoder` and
`TransformerDecoder` give them; the keyword-only arguments of
`KernelizedAttention` (`spectral_prior`, `feature_map`, …) are taken as well.
"""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kt.layers.axes import mask_of
from keras_kt.layers.block import TransformerBlock
from keras_kt.ops import states


class DecoderState(NamedTuple):
    """What a decoder block keeps of the tokens so far: `step` to `step`.

    Attributes:
        attention: `AttentionState` of the self-attention.
        context: `(batch, local_context - 1, width)`, the last inputs of the
            local context; of length 0 without one.

    Examples:
        >>> block = keras_kt.KernelizedTransformerDecoder(64, num_heads=4)
        >>> block.build((None, None, 32))
        >>> state = block.initial_state(batch_size=2)
        >>> type(state).__name__, type(state.attention).__name__
        ('DecoderState', 'AttentionState')
    """

    attention: states.AttentionState
    context: tf.Tensor


@keras.saving.register_keras_serializable(package="keras_kt")
class KernelizedTransformerEncoder(TransformerBlock):
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
        num_key_value_heads: number of heads of key and value, which as many
            query heads share each (`KernelizedGroupedQueryAttention`). Defaults
            to `None`, which means `num_heads` (`KernelizedAttention`).
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
        self,
        inputs: tf.Tensor,
        padding_mask: tf.Tensor | None = None,
        attention_mask: tf.Tensor | None = None,
        training: bool | None = None,
    ) -> tf.Tensor:
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
class KernelizedTransformerDecoder(TransformerBlock):
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
        num_key_value_heads: number of heads of key and value, which as many
            query heads share each (`KernelizedGroupedQueryAttention`). Defaults
            to `None`, which means `num_heads` (`KernelizedAttention`).
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
        decoder_sequence: tf.Tensor,
        encoder_sequence: tf.Tensor | None = None,
        decoder_padding_mask: tf.Tensor | None = None,
        encoder_padding_mask: tf.Tensor | None = None,
        training: bool | None = None,
    ) -> tf.Tensor:
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

    def initial_state(self, batch_size: int | tf.Tensor) -> DecoderState:
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
    def state_shapes(self) -> DecoderState:
        """Shapes of the state's tensors, as a state; `None` for the batch."""
        length = 0 if self.local_context is None else self.local_context - 1
        return DecoderState(
            self._self_attention.state_shapes, (None, length, self._width)
        )

    def step(
        self,
        decoder_sequence: tf.Tensor,
        state: Any,
        encoder_sequence: tf.Tensor | None = None,
        encoder_padding_mask: tf.Tensor | None = None,
        decoder_padding_mask: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, DecoderState]:
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
