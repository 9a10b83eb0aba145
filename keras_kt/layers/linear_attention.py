"""LinearAttention: where prior, feature map and algorithm meet.

Heads in, heads out: what stands between the projections of an attention layer.
Tensors are `(batch, length, heads, dim)`.
"""

import functools
import warnings
from typing import Any

import keras
import tensorflow as tf

from keras_kt import _checks
from keras_kt.features import FeatureMap
from keras_kt.layers import kernel, route
from keras_kt.layers.axes import (
    Folding,
    both,
    check_heads,
    mask_of,
    select_heads,
    shared_mask,
)
from keras_kt.layers.stream import HeadStream
from keras_kt.priors import SpectralPrior

_COUNT = functools.partial(_checks.integer, optional=True)
# As in `kernel`, whose arguments are among them.
ARGUMENTS = {
    **kernel.ARGUMENTS,
    "num_heads": _checks.integer,
    "key_dim": _checks.integer,
    "value_dim": _COUNT,
    "num_key_value_heads": _COUNT,
    "implementation": functools.partial(
        _checks.choice, choices=route.IMPLEMENTATIONS
    ),
}


@keras.saving.register_keras_serializable(package="keras_kt")
class LinearAttention(HeadStream):
    """Attention of projected heads with a learned kernel, in linear time.

    Weights of keys are k(q, k) / Σ k(q, ·) with k(x, y) = E[φ_ω(x)·φ_ω(y)], ω
    drawn from a trainable spectral prior; no matrix is formed. For models that
    project by themselves; `KernelizedAttention` is projections, masks and this.

    Masked keys leave by selection: their content (NaN too) has no effect.
    Masked queries, and queries that see no key, get zeros.

    Args:
        num_heads: number of query heads.
        key_dim: size of each head of query and key.
        value_dim: size of each head of value. Defaults to `key_dim`.
        num_key_value_heads: number of heads of key and value, which have prior,
            features, temperature, decay and state; as many query heads in a row
            share each. Defaults to `num_heads`.
        spectral_prior: `"normal"` (default), `"mixture"`, `"fastfood"`,
            `"generator"`, `"empirical"`, or a `SpectralPrior`: a recipe, whose
            built copy is `layer.spectral_prior`.
        feature_map: `"positive"` (default; `"prf"`), `"trigonometric"`
            (`"rks"`), or an instance of a `FeatureMap`.
        num_features: D, the width of φ. Defaults to a whole block of orthogonal
            frequencies for each component: 2 · key_dim · components.
        qk_norm: `None` scales queries and keys by key_dim^(-1/4) each; `"l2"`
            normalizes them and learns a temperature per head; `"weighted"`
            does so too, and weighs each key by a power of its length, so that
            some keys matter more than others to any query; for trigonometric
            features. `"auto"` (default) is `"l2"` with these, which do not
            train without, and `None` with positive ones, which it hurts.
        redraw: `"never"` (default): one stored draw, a weight. `"step"`: fresh
            noise at every training step.
        implementation: `"auto"` (default) is linear, except where a call needs
            the matrix (a dense `attention_mask`, `return_attention_scores`) and
            where forming it is faster: sequences known to have at most 64
            tokens, causal ones 128. `"linear"` never forms it, `"quadratic"`
            always.
        decay: `None` (default), `"constant"` or `"gated"`: the weight of key s
            for query t is multiplied by exp(−Σ λ_u) over the tokens u after s
            up to t (after t up to s, for keys after the query). With
            `"constant"` the layer owns and learns λ ≥ 0 of each head, at the
            start for memories of 32 to 4096 tokens. With `"gated"` the caller
            computes λ of each token and gives it as `decay`. Masked tokens do
            not count.
        near_field: keys less than so many visible tokens from the query weigh
            by the kernel in closed form, those beyond by features. Needs
            positive features of a normal or mixture prior. Defaults to `None`.
        sliding_window: only keys less than so many visible tokens from the
            query are seen, in O(length · window) time. They weigh by the kernel
            in closed form where a `near_field` could, else by features. Lengths
            must be equal. Defaults to `None`, keys at any distance.
        rotary_max_wavelength: queries and keys are turned by their places, as
            by KerasHub's `RotaryEmbedding` of this `max_wavelength` (10000 in
            most models), before anything else. A key's place is the number of
            visible keys before it, so padding takes none; query t stands where
            key t does, in attention to another sequence too. Needs an even
            `key_dim`. Defaults to `None`: no positions.
        spectral_pace: how many times as fast as other weights the kernel's own
            move (those of prior and feature map, and the temperature): their
            variables are values divided by it. Defaults to 4.
        seed: of the stored draw and of redraws. Defaults to a global one.

    Call arguments:
        query: `(batch, query_length, num_heads, key_dim)`.
        key: `(batch, key_length, num_key_value_heads, key_dim)`.
        value: `(batch, key_length, num_key_value_heads, value_dim)`.
        query_mask, key_mask: `(batch, length)` boolean. Default to the Keras
            masks of the tensors.
        attention_mask: boolean, broadcast to `(batch, num_heads, query_length,
            key_length)`. Costs O(length²), unless its query axis has size 1.
        decay: `(batch, key_length, num_key_value_heads, 1)`, λ ≥ 0 of tokens.
        use_causal_mask: query t sees keys 0 … t only; stays linear.
        training: whether to redraw.
        return_attention_scores: also return weights `(batch, heads, t, s)`.

    Returns:
        `(batch, query_length, num_heads, value_dim)`, and the weights if asked
        for.

    Examples:
        >>> layer = keras_kt.LinearAttention(4, 8, num_key_value_heads=2)
        >>> q, k, v = (np.ones((2, 100, heads, 8)) for heads in (4, 2, 2))
        >>> layer(q, k, v, use_causal_mask=True).shape
        TensorShape([2, 100, 4, 8])
        >>> state = layer.initial_state(batch_size=2)
        >>> output, state = layer.step(q[:, :1], k[:, :1], v[:, :1], state)
        >>> output.shape
        TensorShape([2, 1, 4, 8])
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        num_key_value_heads: int | None = None,
        *,
        spectral_prior: str | SpectralPrior = "normal",
        feature_map: str | FeatureMap = "positive",
        num_features: int | None = None,
        qk_norm: str | None = "auto",
        redraw: str = "never",
        implementation: str = "auto",
        decay: str | None = None,
        near_field: int | None = None,
        sliding_window: int | None = None,
        rotary_max_wavelength: float | None = None,
        spectral_pace: float = 4.0,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            spectral_prior=spectral_prior,
            feature_map=feature_map,
            num_features=num_features,
            qk_norm=qk_norm,
            redraw=redraw,
            decay=decay,
            near_field=near_field,
            sliding_window=sliding_window,
            rotary_max_wavelength=rotary_max_wavelength,
            spectral_pace=spectral_pace,
            seed=seed,
            **kwargs,
        )
        self.supports_masking = True
        plain = _checks.plain(
            ARGUMENTS,
            num_heads=num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            num_key_value_heads=num_key_value_heads,
            implementation=implementation,
        )
        for name, value in plain.items():
            setattr(self, name, value)
        self.value_dim: int = self.value_dim or self.key_dim
        self.num_key_value_heads: int = (
            self.num_key_value_heads or self.num_heads
        )
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_heads` must be a multiple of `num_key_value_heads`, so "
                "that as many query heads share each. Received: "
                f"{num_heads=}, {num_key_value_heads=}"
            )
        if self.rotary_max_wavelength and self.key_dim % 2:
            raise ValueError(
                "`key_dim`, the size of a head, must be even where "
                "`rotary_max_wavelength` turns its halves as pairs. Received: "
                f"{key_dim=}, {rotary_max_wavelength=}"
            )
        self.frequency_count()
        self._warned_of_dense_mask = False

    def build(self, query_shape, key_shape, value_shape):
        self._check_heads(query_shape, key_shape, value_shape)
        self.build_kernel(self.num_key_value_heads)
        self.built = True

    def _check_heads(self, query, key, value):
        """Raises a `ValueError` unless shapes are those of the heads."""
        few = self.num_key_value_heads
        check_heads(
            (query, key, value),
            (self.num_heads, few, few),
            (self.key_dim, self.key_dim, self.value_dim),
        )

    def call(
        self,
        query: tf.Tensor,
        key: tf.Tensor,
        value: tf.Tensor,
        query_mask: tf.Tensor | None = None,
        key_mask: tf.Tensor | None = None,
        attention_mask: tf.Tensor | None = None,
        decay: tf.Tensor | None = None,
        use_causal_mask: bool = False,
        return_attention_scores: bool = False,
        training: bool | None = None,
    ) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
        query_mask = mask_of(query, query_mask)
        key_mask = both(mask_of(key, key_mask), mask_of(value))
        self._check_heads(query.shape, key.shape, value.shape)
        if attention_mask is not None:
            folding = Folding(query, key, (1,))
            shared, attention_mask = shared_mask(
                folding.fold_dense_mask(attention_mask)
            )
            key_mask = both(key_mask, shared)
        query_mask, query = select_heads("query_mask", query_mask, query)
        key_mask, key, value = select_heads("key_mask", key_mask, key, value)
        output, scores = self.attend(
            query,
            key,
            value,
            query_mask=query_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            decay=decay,
            use_causal_mask=use_causal_mask,
            return_attention_scores=return_attention_scores,
            training=training,
        )
        output = tf.cast(output, self.compute_dtype)
        if query_mask is not None:
            output._keras_mask = query_mask
        if return_attention_scores:
            return output, tf.cast(scores, self.compute_dtype)
        return output

    def attend(
        self,
        query,
        key,
        value,
        *,
        query_mask=None,
        key_mask=None,
        attention_mask=None,
        decay=None,
        use_causal_mask=False,
        return_attention_scores=False,
        training=None,
        same_length=False,
    ):
        """What a call does, without Keras's masks; for layers around this one.

        Args:
            query, key, value: as in the call; finite where masked.
            query_mask, key_mask: `(batch, length)` boolean, or `None`.
            attention_mask: boolean of rank 4, or `None`.
            same_length: whether queries are known to be as many as keys, which
                dynamic shapes do not tell.

        Returns:
            Float32 outputs, and the attention weights or `None`.
        """
        if self.sliding_window:
            route.check_window(query, key, self.sliding_window)
        forms_matrix = self._forms_matrix(
            query,
            key,
            attention_mask is not None,
            return_attention_scores,
            use_causal_mask,
        )
        decay = self.rates(key, decay)
        query, key = self.rotated(query, key, key_mask)
        query, key, feature_map, near = self.kernel_inputs(query, key, training)
        return route.attend(
            query,
            key,
            tf.cast(value, tf.float32),
            feature_map,
            forms_matrix=forms_matrix,
            needs_weights=return_attention_scores,
            query_mask=query_mask,
            attention_mask=attention_mask,
            same_length=same_length,
            causal=use_causal_mask,
            key_mask=key_mask,
            decay=decay,
            near=near,
        )

    def _forms_matrix(self, query, key, has_mask, needs_scores, causal):
        if self.implementation == "quadratic":
            return True
        needs_matrix = route.needs_matrix(
            self.implementation, has_mask, needs_scores
        )
        if has_mask and not needs_scores and not self._warned_of_dense_mask:
            self._warned_of_dense_mask = True
            warnings.warn(route.DENSE_MASK_WARNING, stacklevel=2)
        if self.implementation != "auto":
            return needs_matrix
        return needs_matrix or route.is_short(query, key, causal)

    def compute_output_shape(self, query_shape, key_shape, value_shape):
        self._check_heads(query_shape, key_shape, value_shape)
        return (*query_shape[:3], self.value_dim)

    def compute_output_spec(
        self, query, key, value, return_attention_scores=False, **kwargs
    ):
        shape = self.compute_output_shape(query.shape, key.shape, value.shape)
        output = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return output
        scores = shape[0], shape[2], shape[1], key.shape[1]
        return output, keras.KerasTensor(scores, dtype=self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "num_key_value_heads": self.num_key_value_heads,
            "implementation": self.implementation,
        }
