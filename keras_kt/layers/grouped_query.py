"""KernelizedGroupedQueryAttention: GroupQueryAttention's contract."""

from typing import Any

import keras

from keras_kt import _checks
from keras_kt.features import FeatureMap
from keras_kt.layers.linear_attention import LinearAttention
from keras_kt.layers.token_attention import TokenAttention
from keras_kt.priors import SpectralPrior

# Which check the value of an argument has to pass, to leave as plain Python.
_SIZES = dict.fromkeys(
    ("head_dim", "num_query_heads", "num_key_value_heads"), _checks.integer
)


@keras.saving.register_keras_serializable(package="keras_kt")
class KernelizedGroupedQueryAttention(TokenAttention):
    """Grouped-query attention with a learned kernel, in linear time.

    Takes the place of `keras.layers.GroupQueryAttention`: same arguments, same
    call, same weights first. Keys weigh k(q, k) / Σ k(q, ·) with k(x, y) =
    E[φ_ω(x)·φ_ω(y)], ω drawn from a trainable spectral prior. As many query
    heads in a row share a head of key and value, with its kernel, features and
    state: with 8 query heads on 2, a quarter of the state.

    Masks are as in `KernelizedAttention`.

    Args:
        head_dim: size of each head of query, key and value.
        num_query_heads: number of query heads.
        num_key_value_heads: number of heads of key and value, which divides
            `num_query_heads`.
        dropout: rate of dropout on the heads' outputs; there is no matrix.
        use_bias: whether the projections have biases.
        sliding_window: only keys less than so many tokens away are seen; see
            `KernelizedAttention`.
        flash_attention: has no effect; memory is linear without it.
        kernel_initializer: of the projections, as in `GroupQueryAttention`;
            as are bias_initializer, kernel_regularizer, bias_regularizer,
            activity_regularizer, kernel_constraint, bias_constraint and
            use_gate.
        seed: integer seed of the stored draw, of redraws and of dropout.
            Defaults to one from Keras's global generator.
        spectral_prior: as in `KernelizedAttention`; as are feature_map,
            num_features, qk_norm, redraw, implementation, decay, near_field,
            rotary_max_wavelength and spectral_pace.

    Call arguments:
        query: `(batch, query_length, features)`.
        value, key: `(batch, key_length, features)`, as wide as the query.
            `key` defaults to `value`.
        query_mask, value_mask, key_mask: `(batch, length)` boolean. Default to
            the Keras masks of the tensors.
        attention_mask: as in `KernelizedAttention`; as are training,
            use_causal_mask and return_attention_scores.

    Returns:
        `(batch, query_length, features)`, and the weights if asked for,
        `(batch, num_query_heads, query_length, key_length)`.

    Examples:
        >>> x = np.random.normal(size=(2, 100, 32)).astype("float32")
        >>> layer = keras_kt.KernelizedGroupedQueryAttention(
        ...     head_dim=8, num_query_heads=4, num_key_value_heads=2
        ... )
        >>> layer(x, x, use_causal_mask=True).shape
        TensorShape([2, 100, 32])
        >>> state = layer.initial_state(batch_size=2)
        >>> output, state = layer.step(x[:, :1], state)
        >>> output.shape, state.sums.shape
        (TensorShape([2, 1, 32]), TensorShape([2, 2, 9, 16]))

    References:
        "GQA: Training Generalized Multi-Query Transformer Models from
        Multi-Head Checkpoints", arXiv 2305.13245.
    """

    replaces = "GroupQueryAttention"
    way_out = (
        "take its arrays: `layer.set_weights([*theirs.get_weights(), "
        "*layer.get_weights()[len(theirs.weights):]])`."
    )

    def __init__(
        self,
        head_dim: int,
        num_query_heads: int,
        num_key_value_heads: int,
        dropout: float = 0.0,
        use_bias: bool = True,
        sliding_window: int | None = None,
        flash_attention: bool | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        use_gate: bool = False,
        seed: int | None = None,
        *,
        spectral_prior: str | SpectralPrior = "normal",
        feature_map: str | FeatureMap = "positive",
        num_features: int | None = None,
        qk_norm: str | None = "auto",
        redraw: str = "never",
        implementation: str = "auto",
        decay: str | None = None,
        near_field: int | None = None,
        rotary_max_wavelength: float | None = None,
        spectral_pace: float = 4.0,
        **kwargs: Any,
    ):
        sizes = _checks.plain(
            _SIZES,
            head_dim=head_dim,
            num_query_heads=num_query_heads,
            num_key_value_heads=num_key_value_heads,
        )
        if sizes["num_query_heads"] % sizes["num_key_value_heads"]:
            raise ValueError(
                "`num_query_heads` must be divisible by `num_key_value_heads`, "
                "so that as many query heads share each. Received: "
                f"{num_query_heads=}, {num_key_value_heads=}"
            )
        heads_attention = LinearAttention(
            sizes["num_query_heads"],
            sizes["head_dim"],
            num_key_value_heads=sizes["num_key_value_heads"],
            spectral_prior=spectral_prior,
            feature_map=feature_map,
            num_features=num_features,
            qk_norm=qk_norm,
            redraw=redraw,
            implementation=implementation,
            decay=decay,
            near_field=near_field,
            sliding_window=sliding_window,
            rotary_max_wavelength=rotary_max_wavelength,
            spectral_pace=spectral_pace,
            seed=seed,
            dtype="float32",
            name="linear_attention",
        )
        super().__init__(
            heads_attention,
            dropout=dropout,
            use_bias=use_bias,
            output_shape=None,
            attention_axes=None,
            flash_attention=flash_attention,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            use_gate=use_gate,
            **kwargs,
        )

    @property
    def head_dim(self) -> int:
        """Size of each head."""
        return self.key_dim

    @property
    def num_query_heads(self) -> int:
        """Number of query heads."""
        return self.num_heads

    def compute_output_shape(self, query_shape, value_shape, key_shape=None):
        if query_shape[-1] != value_shape[-1]:
            raise ValueError(
                "The last dimension of `query` and `value` must be equal. "
                f"Received: query_shape={tuple(query_shape)}, value_shape="
                f"{tuple(value_shape)}"
            )
        return super().compute_output_shape(query_shape, value_shape, key_shape)

    def get_config(self):
        config = super().get_config()
        for name in ("output_shape", "attention_axes", "value_dim"):
            config.pop(name)
        config["head_dim"] = config.pop("key_dim")
        config["num_query_heads"] = config.pop("num_heads")
        return config
