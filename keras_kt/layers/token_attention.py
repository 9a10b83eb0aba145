"""Attention of tokens: projections around a `LinearAttention` of heads.

What `KernelizedAttention` and `KernelizedGroupedQueryAttention` share: masks,
attention axes, steps, files. Inside, tensors are `(batch, length, heads,
head_dim)`; other attention axes are folded into the batch or the length.
"""

import warnings
from typing import Any

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
from keras_kt.layers.projections import ProjectedAttention, of_step
from keras_kt.layers.scaling import Decay


class TokenAttention(Kernelized, ProjectedAttention):
    """Base of layers that take the place of one of Keras's, weights first.

    A subclass has the constructor of that layer, and tells what its weights
    alone can become.

    Attributes:
        replaces: the name of Keras's layer.
        way_out: what to do with a file of its weights.
    """

    replaces = ""
    way_out = ""

    def __init__(self, heads_attention, *, flash_attention, **kwargs):
        if flash_attention:
            warnings.warn(
                f"`flash_attention` has no effect on {type(self).__name__}, "
                "whose memory is linear in length without it.",
                stacklevel=3,
            )
        super().__init__(**kwargs)
        # Past Keras, which tracks it when it is built: the weights of Keras's
        # layer come first.
        object.__setattr__(self, "_unprojected", heads_attention)
        self.supports_masking = True
        # Under Keras's private name too, which its tests read.
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
        for name in (
            "decay",
            "near_field",
            "sliding_window",
            "rotary_max_wavelength",
        ):
            if getattr(self, name):
                check_one_axis(name, getattr(self, name), self._attention_axes)
        self._unprojected = self._unprojected
        few = self.num_key_value_heads
        self._unprojected.build(
            (None, None, self.num_heads, self.key_dim),
            (None, None, few, self.key_dim),
            (None, None, few, self.value_dim),
        )
        if self.decay == "gated":
            self._gated_decay = Decay(is_gated=True, name="decay")
            self._gated_decay.build((few, key_shape[-1]))
        self.built = True

    def call(
        self,
        query: tf.Tensor,
        value: tf.Tensor,
        key: tf.Tensor | None = None,
        query_mask: tf.Tensor | None = None,
        value_mask: tf.Tensor | None = None,
        key_mask: tf.Tensor | None = None,
        attention_mask: tf.Tensor | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
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
        """Attention of projected heads; the override point of Keras's layers.

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
        query: tf.Tensor,
        state: Any,
        value: tf.Tensor | None = None,
        key: tf.Tensor | None = None,
        value_mask: tf.Tensor | None = None,
        query_mask: tf.Tensor | None = None,
        key_mask: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, Any]:
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
            of_step(self._query_dense, query),
            of_step(self._key_dense, key),
            of_step(self._value_dense, value),
            state,
            key_mask=key_mask,
            query_mask=query_mask,
            decay=self._gated_decay(key) if self._gated_decay else None,
        )
        heads = tf.cast(without_mask(heads), self.compute_dtype)
        output = self._project_step_heads(heads, query)
        if query_mask is not None:
            output._keras_mask = query_mask
        return output, state

    def load_own_variables(self, store):
        """Tells weights of Keras's layer, which lack the kernel's."""
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
                f"{self.replaces}, load it into that model and {self.way_out}"
            )

    def get_config(self):
        kernel = self._unprojected.get_config()
        for name in ("name", "trainable", "dtype"):
            kernel.pop(name)
        return {**super().get_config(), **kernel}
