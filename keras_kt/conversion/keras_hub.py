"""KerasHub's attention: its cache, and its masks taken apart.

KerasHub is never imported; where it is in use, its layers are recognised. Its
decoder blocks merge causality into a dense mask, which costs O(length²), and
pass a key-value cache: `linearize_masks` keeps causality apart, and
`CachedKernelizedAttention` takes the cache, or a state in its place.
"""

import sys
from typing import Any

import keras
import tensorflow as tf

from keras_kt.conversion import hub_cache
from keras_kt.conversion.probe import replace_method
from keras_kt.layers.attention import KernelizedAttention
from keras_kt.layers.axes import mask_of, without_mask


@keras.saving.register_keras_serializable(package="keras_kt")
class CachedKernelizedAttention(KernelizedAttention):
    """KernelizedAttention with the call of KerasHub's cached attention.

    Takes the place of `keras_hub.layers.CachedMultiHeadAttention`. A cache of
    keys and values is honoured as there, at O(cache length) for each token. In
    a language model's `generate`, the cache is a state of fixed size.

    Call arguments:
        query, value, key, return_attention_scores, training: as in
            `KernelizedAttention`. As in KerasHub, Keras masks of keys and
            values count only where neither a mask nor a cache is given.
        attention_mask: as there; or a tuple of padding masks
            `(batch, 1, key_length)`, none or one, which means causal.
        cache: `(batch, 2, length, heads, key_dim)`, or `None`; or what
            `generate` of a converted model puts in its place.
        cache_update_index: where the new keys and values go in the cache.

    Returns:
        The output, the scores if asked for, and the cache if there is one.
    """

    def call(  # type: ignore[override]
        self,
        query: tf.Tensor,
        value: tf.Tensor,
        key: tf.Tensor | None = None,
        attention_mask: tf.Tensor | None = None,
        cache: tf.Tensor | None = None,
        cache_update_index: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
    ) -> Any:
        is_causal = isinstance(attention_mask, tuple)
        if is_causal:
            attention_mask = attention_mask[0] if attention_mask else None
        query_mask = mask_of(query)
        if cache is not None or attention_mask is not None:
            value = without_mask(value)
            key = None if key is None else without_mask(key)
        if cache is None:
            return super().call(
                query,
                value,
                key=key,
                query_mask=query_mask,
                attention_mask=attention_mask,
                return_attention_scores=return_attention_scores,
                training=training,
                use_causal_mask=is_causal,
            )
        if hub_cache.is_packed(cache):
            return self._stream(query, value, key, cache, cache_update_index)
        names = "decay", "near_field", "sliding_window", "rotary_max_wavelength"
        given = {n: getattr(self, n) for n in names if getattr(self, n)}
        if given:
            raise ValueError(
                "A key-value cache does not tell how far its keys are, which "
                f"{' and '.join(f'`{name}`' for name in given)} go by. "
                f"Received: a cache for {self.name!r} with {given}. Convert "
                "without, or stream with `step`."
            )
        query = without_mask(query)
        keys, values = cache[:, 0], cache[:, 1]
        if cache_update_index is not None:
            start = [0, cache_update_index, 0, 0]
            key = self._key_dense(value if key is None else key)
            keys = keras.ops.slice_update(keys, start, key)
            value = self._value_dense(value)
            values = keras.ops.slice_update(values, start, value)
            cache = tf.stack([keys, values], axis=1)
        heads, scores = self._compute_attention(
            self._query_dense(query),
            keys,
            values,
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            training=training,
        )
        output = self._project_heads(heads, query, training)
        if return_attention_scores:
            return output, scores, cache
        return output, cache

    def _stream(self, query, value, key, cache, start):
        """A call on a packed state, which it gives back with the new tokens."""
        query, value = without_mask(query), without_mask(value)
        state = hub_cache.read_state(cache, self.state_shapes)
        output, state = self.step(
            query,
            state,
            value,
            key,
            value_mask=hub_cache.taken(cache, start, query),
        )
        return output, hub_cache.write_state(state, cache.shape[1])

    def compute_output_spec(
        self,
        query,
        value,
        key=None,
        attention_mask=None,
        cache=None,
        cache_update_index=None,
        return_attention_scores=False,
        training=None,
    ):
        output, scores = super().compute_output_spec(
            query, value, key, return_attention_scores=True
        )
        results = [output]
        if return_attention_scores:
            if cache is not None:
                shape = (*scores.shape[:-1], cache.shape[2])
                scores = keras.KerasTensor(shape, dtype=scores.dtype)
            results.append(scores)
        if cache is not None:
            results.append(keras.KerasTensor(cache.shape, dtype=cache.dtype))
        return output if len(results) == 1 else tuple(results)


def is_cached(layer) -> bool:
    """Whether a layer is KerasHub's cached attention, or a subclass."""
    return isinstance(layer, cached_class())


def cached_class():
    """KerasHub's cached attention, or an empty tuple if it is not in use."""
    return _hub("CachedMultiHeadAttention")


def language_models(model):
    """KerasHub's language models in a model, itself among them."""
    hub = sys.modules.get("keras_hub")
    kind = hub.models.CausalLM if hub else ()
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, kind) and hasattr(layer, "call_with_cache")
    ]


def learned_positions(model):
    """How many positions a model has learned embeddings of, or `None`."""
    kind = _hub("PositionEmbedding")
    return min(
        (
            layer.sequence_length
            for layer in model._flatten_layers()
            if isinstance(layer, kind)
        ),
        default=None,
    )


def linearize_masks(model):
    """Lets converted decoder blocks pass causality apart from padding."""
    for block, attention in causal_attention(model):
        if isinstance(attention, CachedKernelizedAttention):
            replace_method(block, "_compute_self_attention_mask", _causal_mask)


def _hub(name):
    """A layer class of KerasHub if that is in use, or an empty tuple."""
    hub = sys.modules.get("keras_hub")
    return getattr(hub.layers, name) if hub else ()


def causal_attention(model):
    """KerasHub's decoder blocks of a model, with their self-attention."""
    decoder = _hub("TransformerDecoder")
    return [
        (layer, layer._self_attention_layer)
        for layer in model._flatten_layers()
        if isinstance(layer, decoder) and layer.built
    ]


def _causal_mask(block, dense_mask, *, use_causal_mask, **kwargs):
    """A decoder block's mask, as a tuple where causality stays linear."""
    cache = kwargs["self_attention_cache"]
    if hub_cache.is_packed(cache):
        return ()
    is_dense = kwargs["decoder_attention_mask"] is not None
    is_cached = cache is not None
    if not use_causal_mask or is_dense or is_cached:
        return dense_mask(use_causal_mask=use_causal_mask, **kwargs)
    padding = dense_mask(use_causal_mask=False, **kwargs)
    return () if padding is None else (padding,)
