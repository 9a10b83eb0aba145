"""What transformer blocks share: their arguments and their sublayers."""

import inspect
from typing import Any

import keras

from keras_kt import _checks
from keras_kt.layers import linear_attention, projections
from keras_kt.layers.attention import KernelizedAttention
from keras_kt.layers.grouped_query import KernelizedGroupedQueryAttention
from keras_kt.layers.local_context import LocalContext

# Whatever the layer takes, a block takes.
_OPTIONS = (
    "use_bias",
    "seed",
    "sliding_window",
    *(
        name
        for name, parameter in inspect.signature(
            KernelizedAttention
        ).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ),
)
_OF_DISTANCE = "decay", "near_field", "sliding_window", "rotary_max_wavelength"


class TransformerBlock(keras.layers.Layer):
    """Attention and feed-forward network, each with residual and norm."""

    is_causal = False

    def __init__(
        self,
        intermediate_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        activation: Any = "relu",
        layer_norm_epsilon: float = 1e-5,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        normalize_first: bool = False,
        *,
        key_dim: int | None = None,
        num_key_value_heads: int | None = None,
        local_context: int | None = None,
        **kwargs: Any,
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
        self.num_key_value_heads = _checks.integer(
            "num_key_value_heads", num_key_value_heads, optional=True
        )
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
        options = dict(self.attention_options)
        if name == "cross_attention":
            # Tokens of two sequences have no distance, and a step does not know
            # where its own stand.
            for option in _OF_DISTANCE:
                options.pop(option, None)
        kind, sizes = KernelizedAttention, (self.num_heads, key_dim)
        if self.num_key_value_heads is not None:
            kind = KernelizedGroupedQueryAttention
            sizes = key_dim, self.num_heads, self.num_key_value_heads
        return kind(
            *sizes,
            dropout=self.dropout,
            kernel_initializer=_fresh(self.kernel_initializer),
            bias_initializer=_fresh(self.bias_initializer),
            dtype=self.dtype_policy,
            name=name,
            **options,
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
            "num_key_value_heads": self.num_key_value_heads,
            "local_context": self.local_context,
            **{
                name: serialize(value)
                for name, value in self.attention_options.items()
            },
        }


def _fresh(initializer):
    """A copy, since one that was used gives the same values again."""
    return keras.initializers.get(keras.initializers.serialize(initializer))
