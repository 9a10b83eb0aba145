"""KernelizedAttention: MultiHeadAttention's contract at O(length) cost.

Projections, masks and attention axes, around a `LinearAttention` of heads.
Inside, tensors are `(batch, length, heads, head_dim)`; other attention axes are
folded into the batch or the length.
"""

import warnings

import keras
import tensorflow as tf

from keras_kt.layers import route
from keras_kt.layers.axes import (
    Folding,
    both,
    check_one_axis,
    check_tensors,
    mask_of,
    select_rows,
    shared_mask,
    without_mask,
)
from keras_kt.layers.kernelized import Kernelized
from keras_kt.layers.linear_attention import LinearAttention
from keras_kt.layers.projections import ProjectedAttention
from keras_kt.layers.scaling import Decay


@keras.saving.register_keras_serializable(package="keras_kt")
class KernelizedAttention(Kernelized, ProjectedAttention):
    """Multi-head attention with a learned kernel, in time linear in length.

    Takes the place of `keras.layers.MultiHeadAttention`: same arguments, same
    call, same weights first. Keys weigh k(q, k) / Σ k(q, ·) with k(x, y) =
    E[φ_ω(x)·φ_ω(y)], ω drawn from a trainable spectral prior; no matrix.

    Masked keys leave by selection: their content (NaN too) has no effect.
    Masked queries, and queries that see no key, get a zero context (the output
    bias). True keeps in every mask.

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
            `"l2"` normalizes them and learns a temperature per head. `"auto"`
            (default) is `"l2"` for trigonometric features, else `None`.
        redraw: `"never"` (default): one stored draw, a weight. `"step"`: fresh
            noise at every training step, and the stored draw for all else.
        implementation: `"auto"` (default) is linear, except where a call needs
            the matrix (a dense `attention_mask`, `return_attention_scores`) and
            for at most 32 tokens. `"linear"` refuses such calls. `"quadratic"`
            always forms it. The estimate is the same.
        decay: `None` (default), `"constant"` or `"gated"`: forgetting with the
            distance, as in `LinearAttention`, at a learned rate of each head,
            or of each token of `key`, by a gate that starts at a constant.
        near_field: keys less than so many visible tokens away weigh by the
            kernel in closed form. Defaults to `None`: features at any distance.
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

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        dropout=0.0,
        use_bias=True,
        output_shape=None,
        attention_axes=None,
        sliding_window=None,
        flash_attention=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        use_gate=False,
        seed=None,
        *,
        spectral_prior="normal",
        feature_map="positive",
        num_features=None,
        qk_norm="auto",
        redraw="never",
        implementation="auto",
        decay=None,
        near_field=None,
        spectral_pace=4.0,
        **kwargs,
    ):
        if flash_attention:
            warnings.warn(
                "`flash_attention` has no effect on KernelizedAttention, whose "
                "memory is linear in length without it.",
                stacklevel=2,
            )
        super().__init__(
            dropout=dropout,
            use_bias=use_bias,
            output_shape=output_shape,
            attention_axes=attention_axes,
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
            spectral_pace=spectral_pace,
            seed=seed,
            dtype="float32",
            name="linear_attention",
        )
        # Past Keras, which tracks it when it is built: MultiHeadAttention's
        # weights come first.
        object.__setattr__(self, "_unprojected", heads_attention)
        self.supports_masking = True
        # Under MultiHeadAttention's private name too, which its tests read.
        self._sliding_window = self.sliding_window
        self._gated_decay = None

    def heads_attention(self):
        """The `LinearAttention` between the projections."""
        return self._unprojected

    # Keras files a sublayer under the first attribute that has it: public names
    # first, then by the alphabet. Version 0.1 filed these here, prior and map
    # under their public names, so they must come before `_unprojected`.

    @property
    def _decay(self):
        return self._gated_decay or self._unprojected.decay_rates

    @property
    def _qk_norm(self):
        return self._unprojected.unit_norm

    def build(self, query_shape, value_shape, key_shape=None):
        key_shape = value_shape if key_shape is None else key_shape
        self.build_projections(query_shape, value_shape, key_shape)
        for name in ("decay", "near_field", "sliding_window"):
            if getattr(self, name):
                check_one_axis(name, getattr(self, name), self._attention_axes)
        self._unprojected = self._unprojected
        sizes = self.key_dim, self.key_dim, self.value_dim
        heads = (None, None, self.num_heads)
        self._unprojected.build(*((*heads, size) for size in sizes))
        if self.decay == "gated":
            self._gated_decay = Decay(is_gated=True, name="decay")
            self._gated_decay.build((self.num_heads, key_shape[-1]))
        self.built = True

    def call(
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
        # Keras passes these on only where it calls, not to `layer.call`.
        query_mask = mask_of(query, query_mask)
        value_mask = mask_of(value, value_mask)
        key_mask = key_mask if key is None else mask_of(key, key_mask)
        key = value if key is None else key
        check_tensors(query, value, key)
        query_mask = self.check_mask("query_mask", query_mask, query)
        value_mask = self.check_mask("value_mask", value_mask, value)
        key_mask = self.check_mask("key_mask", key_mask, key)
        key_mask = both(value_mask, key_mask)
        if len(query.shape) == 3:
            shared, attention_mask = shared_mask(attention_mask)
            key_mask = both(key_mask, shared)
        output, scores = self._attend(
            query,
            value,
            key,
            query_mask=query_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            training=training,
            return_attention_scores=return_attention_scores,
            use_causal_mask=use_causal_mask,
            same_length=query is key or query is value,
        )
        if query_mask is not None:
            output._keras_mask = query_mask
        if return_attention_scores:
            return output, scores
        return output

    def _attend(self, query, value, key, *, query_mask, key_mask, **kwargs):
        # What is selected has no Keras mask, of whose loss the projections
        # would warn; the caller's tensors keep theirs.
        if query_mask is not None:
            query = select_rows(query, query_mask)
        if key_mask is not None:
            same = key is value
            value = select_rows(value, key_mask)
            key = value if same else select_rows(key, key_mask)
        if self._gated_decay:
            kwargs["decay"] = self._gated_decay(key)
        heads, scores = self._compute_attention(
            self._query_dense(query),
            self._key_dense(key),
            self._value_dense(value),
            query_mask=query_mask,
            key_mask=key_mask,
            **kwargs,
        )
        return self._project_heads(heads, query, kwargs["training"]), scores

    def _compute_attention(
        self,
        query,
        key,
        value,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
        use_causal_mask=False,
        query_mask=None,
        key_mask=None,
        decay=None,
        same_length=False,
    ):
        """Attention of projected heads; MultiHeadAttention's override point.

        Args:
            query, key, value: `(batch, length, heads, dim)`; or more axes.
            attention_mask, training, return_attention_scores, use_causal_mask:
                as in the call.
            query_mask, key_mask: `(batch, length)` masks that stay vectors.
            decay: `(batch, key_length, heads, 1)` if gated, or `None`.
            same_length: whether queries are known to be as many as keys, which
                dynamic shapes do not tell.

        Returns:
            Outputs of heads, and the weights or `None`.
        """
        axes = self._attention_axes
        if len(axes) > 1 and use_causal_mask:
            raise ValueError(
                "`use_causal_mask` needs an order of positions, so a single "
                f"attention axis. Received: attention_axes={axes}. Flatten the "
                "axes, or pass an `attention_mask`."
            )
        folding = Folding(query, value, axes)
        if attention_mask is not None:
            attention_mask = folding.fold_dense_mask(attention_mask)
        heads, scores = self._unprojected.attend(
            folding.fold(query),
            folding.fold(key),
            folding.fold(value),
            query_mask=folding.fold_mask(query_mask, folding.query_sizes),
            key_mask=folding.fold_mask(key_mask, folding.key_sizes),
            attention_mask=attention_mask,
            decay=None if decay is None else folding.fold(decay),
            use_causal_mask=use_causal_mask,
            return_attention_scores=return_attention_scores,
            training=training,
            same_length=same_length,
        )
        heads = folding.unfold(tf.cast(heads, self.compute_dtype))
        if not return_attention_scores:
            return heads, None
        scores = tf.cast(scores, self.compute_dtype)
        return heads, folding.unfold_scores(scores)

    def step(
        self,
        query,
        state,
        value=None,
        key=None,
        value_mask=None,
        query_mask=None,
        key_mask=None,
    ):
        """Causal attention of new tokens on a state: prefill and decode.

        Equals `call(..., use_causal_mask=True)` on the whole sequence, however
        it is cut. The stored draw is used, and no dropout.

        Args:
            query: `(batch, new_tokens, features)`, at least one new token.
            state: `AttentionState` from `initial_state` or an earlier `step`;
                or its arrays, NumPy's too, in a tuple, a list or a dict.
            value, key: likewise. Default to `query`, and to `value`.
            value_mask, key_mask: `(batch, new_tokens)` boolean; masked tokens
                leave the state as it is, and take no place. Default to the
                Keras masks of the tensors.
            query_mask: likewise; masked queries get a zero context.

        Returns:
            `(batch, new_tokens, output_dim)`, which carries the query's mask,
            and the new state, of the same size.
        """
        value = query if value is None else value
        key = value if key is None else key
        # Read before conversions lose them.
        query_mask = mask_of(query, query_mask)
        value_mask = mask_of(value, value_mask)
        if key is not value:
            key_mask = mask_of(key, key_mask)
        query, value, key = (
            tf.convert_to_tensor(x, self.compute_dtype)
            if not tf.is_tensor(x)
            else x
            for x in (query, value, key)
        )
        if not self.built:
            self.build(query.shape, value.shape, key.shape)
        if len(query.shape) != 3:
            raise ValueError(
                "`step` streams one causal axis: it needs inputs of rank 3. "
                f"Received: query of shape {tuple(query.shape)}"
            )
        route.check_step(query, key, value)
        query_mask = self.check_mask("query_mask", query_mask, query)
        key_mask = both(
            self.check_mask("value_mask", value_mask, value),
            self.check_mask("key_mask", key_mask, key),
        )
        if query_mask is not None:
            query = select_rows(query, query_mask)
        if key_mask is not None:
            value, key = (select_rows(x, key_mask) for x in (value, key))
        heads, state = self._unprojected.step(
            self._query_dense(query),
            self._key_dense(key),
            self._value_dense(value),
            state,
            key_mask=key_mask,
            query_mask=query_mask,
            decay=self._gated_decay(key) if self._gated_decay else None,
        )
        heads = tf.cast(without_mask(heads), self.compute_dtype)
        output = self._project_heads(heads, query, training=False)
        if query_mask is not None:
            output._keras_mask = query_mask
        return output, state

    def load_own_variables(self, store):
        """Tells weights of MultiHeadAttention, which lack the kernel's."""
        super().load_own_variables(store)
        path = getattr(store, "_h5_entry_path", None)
        if not (self.built and path and hasattr(store, "has_path")):
            return
        names = ("spectral_prior", "_unprojected")
        if not any(store.has_path(f"{path}/{name}") for name in names):
            has = "another layer" if store.has_path(path) else "nothing"
            raise ValueError(
                f"The file must hold the weights of a {type(self).__name__}, "
                f"its kernel's among them, at {path!r}. Received: a file with "
                f"{has} there. If it was saved from a model with "
                "MultiHeadAttention, load it into that model and convert it: "
                "`model, report = keras_kt.convert_attention(model)`."
            )

    def get_config(self):
        kernel = self._unprojected.get_config()
        for name in ("name", "trainable", "dtype", "num_key_value_heads"):
            kernel.pop(name)
        return {**super().get_config(), **kernel}
