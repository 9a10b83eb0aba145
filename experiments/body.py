"""The body: one transformer for every kind of attention.

Pre-norm blocks; positions and a convolutional stem where a task has them.
"""

import keras
import tensorflow as tf

import keras_kt
from experiments.flags import attention_options


def softmax_attention(block, key_dim, name):
    """Keras's own attention for a block; drops weights at its rate."""
    return keras.layers.MultiHeadAttention(
        block.num_heads,
        key_dim,
        dropout=block.dropout,
        dtype=block.dtype_policy,
        name=name,
    )


@keras.saving.register_keras_serializable(package="experiments")
class SoftmaxEncoder(keras_kt.KernelizedTransformerEncoder):
    """The same block around Keras's own attention."""

    def make_attention(self, key_dim, name):
        return softmax_attention(self, key_dim, name)


@keras.saving.register_keras_serializable(package="experiments")
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


@keras.saving.register_keras_serializable(package="experiments")
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


@keras.saving.register_keras_serializable(package="experiments")
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
