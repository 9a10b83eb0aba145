"""KernelizedAttention: MultiHeadAttention's contract at O(length) cost."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_kt.features import FeatureMap
from keras_kt.layers.linear_attention import LinearAttention
from keras_kt.layers.token_attention import TokenAttention
from keras_kt.priors import SpectralPrior


@keras.saving.register_keras_serializable(package="keras_kt")
class KernelizedAttention(TokenAttention):
    """Multi-head attention with a learned kernel, in time linear in length.

    Takes the place of `keras.layers.MultiHeadAttention`: same arguments, same
    call, same weights first. Keys weigh k(q, k) / Σ k(q, ·) with k(x, y) =
    E[φ_ω(x)·φ_ω(y)], ω drawn from a trainable spectral prior; no matrix. φ(x)
    has `num_features` numbers for each head: the more, the smaller the error of
    the estimate, and the more it costs.

    Masked keys leave by selection: their content (NaN too) has no effect.
    Masked queries, and queries that see no key, get a zero context (the output
    bias).

    Args:
        num_heads: number of attention heads.
        key_dim, value_dim: size of each head of query and key, and of value,
            which defaults to `key_dim`.
        dropout: rate of dropout on the heads' outputs; there is no matrix.
        use_bias: whether the projections have biases.
        output_shape: shape of an output token. Defaults to the query's.
        attention_axes: axes to attend over. Default to all in the middle.
        sliding_window: as in `MultiHeadAttention`, only keys less than so many
            tokens away are seen, in O(length · window) time: by the kernel in
            closed form (softmax, of the default prior at the start) where a
            `near_field` could, else by features. Masked tokens take no place.
        flash_attention: has no effect; memory is linear without it.
        kernel_initializer: of the projections, as in `MultiHeadAttention`;
            as are bias_initializer, kernel_regularizer, bias_regularizer,
            activity_regularizer, kernel_constraint, bias_constraint and
            use_gate.
        seed: integer seed of the stored draw, of redraws and of dropout.
            Defaults to one from Keras's global generator.
        spectral_prior: `"normal"` (default), `"mixture"`, `"fastfood"`,
            `"generator"`, `"empirical"`, or a `SpectralPrior`: a recipe, whose
            built copy is `layer.spectral_prior`.
        feature_map: `"positive"` (default; also `"prf"`), `"trigonometric"`
            (also `"rks"`), or an instance of a `FeatureMap`.
        num_features: D, the width of φ. Defaults to 2 · key_dim · components.
        qk_norm: `None` scales queries and keys as `MultiHeadAttention` does;
            `"l2"` normalizes them and learns a temperature per head;
            `"weighted"` does so too, and weighs each key by its length.
            `"auto"` (default) is `"l2"` for trigonometric features, else
            `None`.
        redraw: `"never"` (default): one stored draw, a weight. `"step"`: fresh
            noise at every training step, and the stored draw for all else.
        implementation: `"auto"` (default) is linear, except where a call needs
            the matrix (a dense `attention_mask`, `return_attention_scores`) and
            for at most 64 tokens, causal ones 128. `"linear"` refuses such
            calls. `"quadratic"` always forms it. The estimate is the same.
        decay: `None` (default), `"constant"` or `"gated"`: forgetting with the
            distance, as in `LinearAttention`, at a learned rate of each head,
            or of each token of `key`, by a gate that starts at a constant.
        near_field: keys less than so many visible tokens away weigh by the
            kernel in closed form. Defaults to `None`: features at any distance.
        rotary_max_wavelength: queries and keys are turned by their places, as
            KerasHub's `RotaryEmbedding` does; see `LinearAttention`.
        spectral_pace: how many times as fast as others the kernel's weights
            move; see `LinearAttention`. Defaults to 4.

    Call arguments:
        query: `(batch, query_length, features)`.
        value, key: `(batch, key_length, features)`. `key` defaults to `value`.
        query_mask, value_mask, key_mask: `(batch, length)` boolean. Default to
            the Keras masks of the tensors.
        attention_mask: boolean, broadcast to `(batch, heads, query_length,
            key_length)` as in `MultiHeadAttention`. Costs O(length²), unless
            its query axis is known to have size 1: that is a key mask.
        training: whether to apply dropout and redraws.
        use_causal_mask: query t sees keys 0 … t only; stays linear.
        return_attention_scores: also return weights `(batch, heads, t, s)`.

    Returns:
        `(batch, query_length, output_dim)`, and the weights if asked for.

    Examples:
        >>> x = np.random.normal(size=(2, 100, 32)).astype("float32")
        >>> layer = keras_kt.KernelizedAttention(num_heads=4, key_dim=8)
        >>> layer(x, x, use_causal_mask=True).shape
        TensorShape([2, 100, 32])
        >>> state = layer.initial_state(batch_size=2)
        >>> output, state = layer.step(x[:, :1], state)
        >>> output.shape
        TensorShape([2, 1, 32])

    References:
        "On Learning the Transformer Kernel", arXiv 2110.08323.
    """

    replaces = "MultiHeadAttention"
    way_out = "convert it: `model, report = keras_kt.convert_attention(model)`."

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: int | Sequence[int] | None = None,
        attention_axes: int | Sequence[int] | None = None,
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
        heads_attention = LinearAttention(
            num_heads,
            key_dim,
            value_dim,
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
            output_shape=output_shape,
            attention_axes=attention_axes,
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

    def get_config(self):
        config = super().get_config()
        config.pop("num_key_value_heads")
        return config
