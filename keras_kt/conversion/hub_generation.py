"""KerasHub's `generate` on states: a cost per token that does not grow.

KerasHub runs the prompts through the model at once, which fills a cache of keys
and values, and goes on token by token from where the shortest prompt ends. Here
the cache is made of states while `generate_step` runs, with what every prompt
has: a cache may hold what is overwritten later, a sum may not. Layers that were
kept softmax find their keys and values in it.
"""

import contextlib
import inspect

import keras
import tensorflow as tf

from keras_kt.conversion import hub_cache, keras_hub
from keras_kt.conversion.inline import METHOD
from keras_kt.conversion.probe import (
    heads_of,
    replace_method,
    replaced_methods,
)
from keras_kt.conversion.seam import kernel_within
from keras_kt.layers.projections import of_step


def generate_on_states(model):
    """Lets KerasHub's language models in a converted model stream."""
    for task in keras_hub.language_models(model):
        blocks = getattr(task.backbone, "transformer_layers", ())
        if any(_streaming_attention(block) for block in blocks):
            replace_method(task, "generate_step", _generate_step)


# KerasHub's loops are explicit, as other backends need; converting them and all
# layers takes most of the time of tracing.
@tf.autograph.experimental.do_not_convert
def _generate_step(task, generate_step, inputs, *args, **kwargs):
    _check_positions(task, inputs["token_ids"])
    lengths = tf.reduce_sum(tf.cast(inputs["padding_mask"], tf.int32), axis=-1)
    # KerasHub feeds the last token of the shortest prompt by itself.
    generation = _Generation(task, tf.reduce_min(lengths) - 1)
    with generation.running():
        return generate_step(inputs, *args, **kwargs)


def _check_positions(task, token_ids):
    count, length = keras_hub.learned_positions(task), token_ids.shape[1]
    if count and length and length > count:
        raise ValueError(
            "Prompts and new tokens together must have at most as many "
            f"positions as the model has learned, {count}. Received: {length} "
            f"for {task.name!r}. Pass `max_length={count}` to `generate`; "
            "without a preprocessor, cut or pad `token_ids` to that."
        )


class _Generation:
    """One run of `generate_step`: its cache, and who finds what in it.

    Args:
        task: the language model.
        taken: how many tokens all prompts have, but for one.
    """

    def __init__(self, task, taken):
        self.task, self.taken = task, taken
        self.blocks = task.backbone.transformer_layers
        # For each block, KerasHub's own cache: shapes and types.
        self.own = {}

    @contextlib.contextmanager
    def running(self):
        """Lets the model know such caches, until the context ends."""
        attention = [_streaming_attention(block) for block in self.blocks]
        pairs = list(zip(self.blocks, attention, strict=True))
        kept = [block for block, layer in pairs if layer is None]
        seams = [block for block, layer in pairs if kernel_within(layer)]
        products = [
            layer
            for layer in self.task.backbone._flatten_layers()
            if isinstance(layer, keras.layers.EinsumDense)
        ]
        with (
            replaced_methods([self.task], "call_with_cache", self._call_task),
            replaced_methods(kept, "call", self._call_kept),
            replaced_methods(seams, "call", self._call_seam),
            replaced_methods(products, "call", _call_product),
        ):
            yield

    def _call_task(self, _, call, *args, **kwargs):
        """A model on a cache, which is KerasHub's own the first time."""
        arguments = _bound(call, args, kwargs)
        own = arguments["cache"]
        # Among themselves, parts of an image are not causal.
        has_images = arguments.get("img_embeddings") is not None
        if has_images or _is_packed(own) or not self._knows(own):
            return call(**arguments)
        cache = self._packed(own)
        logits, hidden, cache = call(**{**arguments, "cache": cache})
        tokens = arguments["token_ids"]
        return logits, self._completed(hidden, call, tokens, cache), cache

    def _completed(self, hidden, call, tokens, cache):
        """Hidden states of all tokens that every prompt has, the last one too.

        That has not been taken in, and samplers may compare states with it.
        """

        def complete(position, hidden):
            token = tf.gather(tokens, [position], axis=1)
            _, last, _ = call(token, cache, position)
            start = [0, position, 0]
            hidden = keras.ops.slice_update(hidden, start, last)
            return position + 1, hidden

        # A loop of one: elsewhere XLA takes positions for constants, and would
        # compile anew for each length of prompts.
        _, hidden = tf.while_loop(
            lambda position, _: position <= self.taken,
            complete,
            (self.taken, hidden),
            maximum_iterations=1,
        )
        return hidden

    def _knows(self, own):
        """Whether a cache is keys and values of each block, and no more."""
        if tf.is_tensor(own):
            return own.shape.rank == 6 and own.shape[1] == len(self.blocks)
        return len(own) == len(self.blocks) and all(
            len(pair) == 2 and {x.shape.rank for x in pair} == {4}
            for pair in own
        )

    def _packed(self, own):
        """States that have seen nothing, in the place of KerasHub's zeros."""
        is_one = tf.is_tensor(own)
        rows = []
        for number, block in enumerate(self.blocks):
            zeros = own[:, number] if is_one else own[number]
            self.own[id(block)] = zeros
            attention = _streaming_attention(block)
            if attention:
                batch = tf.shape(keras.tree.flatten(zeros)[0])[0]
                kernel = kernel_within(attention) or attention
                state = kernel.initial_state(batch)
                row = hub_cache.write_state(state)
                zeros = hub_cache.limited(row, self.taken)
            rows.append(zeros)
        if not is_one:
            return tuple(rows)
        rows = [x if _is_packed(x) else hub_cache.write(x) for x in rows]
        columns = max(row.shape[1] for row in rows)
        return tf.stack([hub_cache.widened(x, columns) for x in rows], axis=1)

    def _call_kept(self, block, call, *args, **kwargs):
        """A block with softmax, which finds keys and values in the cache."""
        arguments = _bound(call, args, kwargs)
        name = _cache_name(arguments)
        cache = arguments[name]
        if not _is_packed(cache):
            return call(**arguments)
        *_, heads, size = self.own[id(block)].shape
        pairs = hub_cache.read(cache, self.own[id(block)].dtype)
        # More of them than positions, where states of other layers are larger.
        length = pairs.shape[1] // (2 * heads * size)
        pairs = tf.reshape(
            pairs[:, : 2 * length * heads * size], (-1, 2, length, heads, size)
        )
        output, pairs = call(**{**arguments, name: pairs})
        return output, hub_cache.write(pairs, cache.shape[1])

    def _call_seam(self, block, call, *args, **kwargs):
        """A block whose attention has a kernel at its seam, on a state.

        It gets an empty cache as long as the new tokens, and so makes heads of
        these alone, at their positions.
        """
        arguments = _bound(call, args, kwargs)
        name = _cache_name(arguments)
        cache, x = arguments[name], next(iter(arguments.values()))
        if not _is_packed(cache):
            return call(**arguments)
        # Of prompts, which are in KerasHub's own cache already.
        arguments.pop("cache_update_mask", None)
        start = arguments[f"{name}_update_index"]
        layer = _streaming_attention(block)
        kernel, states = kernel_within(layer), []

        def attend(layer, method, *args, **kwargs):
            call = heads_of(method, args, kwargs)
            heads, state = kernel.step(
                *layer.seam.heads(call["query"], call["key"], call["value"]),
                hub_cache.read_state(cache, kernel.state_shapes),
                key_mask=hub_cache.taken(cache, start, x),
            )
            states.append(state)
            return tf.cast(heads, layer.compute_dtype)

        def sees_all(*args, **kwargs):
            return tf.ones((tf.shape(x)[0], 1, tf.shape(x)[1]), "int32")

        arguments[name] = keras.tree.map_structure(
            lambda own: _as_long_as(own, x), self.own[id(block)]
        )
        with (
            replaced_methods([layer], METHOD, attend),
            replaced_methods([block], layer.seam.mask_method, sees_all),
            _rotating(layer, start),
        ):
            output, _ = call(**arguments)
        (state,) = states
        return output, hub_cache.write_state(state, cache.shape[1])


def _call_product(dense, call, x, *args, **kwargs):
    """A projection, in the form that XLA compiles well for one token."""
    return of_step(dense, x, lambda x: call(x, *args, **kwargs))


def _streaming_attention(block):
    """A block's attention if that can go on from a state, or `None`."""
    for layer in block._flatten_layers():
        if isinstance(layer, keras_hub.CachedKernelizedAttention):
            return layer
        if kernel_within(layer) is not None:
            return layer if layer.seam.is_causal else None
    return None


def _as_long_as(own, x):
    """An empty cache of keys and values for as many tokens as there are."""
    *lead, _, heads, size = own.shape
    shape = tf.shape(x)[0], *lead[1:], tf.shape(x)[1], heads, size
    return tf.zeros(shape, own.dtype)


@contextlib.contextmanager
def _rotating(layer, start):
    """Lets a layer rotate new tokens by their positions, until it ends.

    GPT-NeoX's does not say where they start: it rotates its whole cache.
    """

    def rotate(_, call, *args, **kwargs):
        return call(**{**_bound(call, args, kwargs), "start_index": start})

    rotary = getattr(layer, "rotary_embedding_layer", None)
    with replaced_methods([rotary] if rotary else [], "call", rotate):
        yield


def _cache_name(arguments):
    """Which argument of a block is its self-attention's cache."""
    return next(
        name
        for name in arguments
        if name.endswith("cache") and not name.startswith("cross")
    )


def _bound(call, args, kwargs):
    return inspect.signature(call).bind(*args, **kwargs).arguments


def _is_packed(cache):
    return any(map(hub_cache.is_packed, keras.tree.flatten(cache)))
