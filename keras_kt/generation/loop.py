"""The loop: a prompt's step, then one for each token, compiled once a shape."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_kt import streaming
from keras_kt.generation import prompts, sampling
from keras_kt.layers import evaluated
from keras_kt.ops.streams import gather_state

# Compiled functions of each model, by their options.
_FUNCTIONS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Options(NamedTuple):
    """What functions are traced for."""

    sequences: int
    is_greedy: bool
    top_k: int | None
    has_top_p: bool
    jit_compile: bool


class Settings(NamedTuple):
    """What they are run with.

    Attributes:
        temperature, top_p: scalars.
        ends: `(…,)` int32, tokens that end a row.
        words: `(rows, 3)` int32, as of `sampling.words`.
    """

    temperature: tf.Tensor
    top_p: tf.Tensor
    ends: tf.Tensor
    words: tf.Tensor


class Rows(NamedTuple):
    """Where the rows stand.

    Attributes:
        token: `(rows,)` int32, the newest; of one that has ended, its end.
        ended: `(rows,)` boolean.
        state: of the model, before that token.
    """

    token: tf.Tensor
    ended: tf.Tensor
    state: object


class Functions(NamedTuple):
    """Compiled functions of a model, traced when they are first called.

    Attributes:
        whole: `(prompt, mask, count, settings)` to prompt and new tokens.
        start: `(prompt, mask, settings)` to the `Rows` of the first token.
        advance: `(position, rows, settings)` to those of the one at a position.
    """

    whole: Callable
    start: Callable
    advance: Callable


def of_model(model, options) -> Functions:
    """A model's functions, made anew if its variables are others."""
    try:
        known = _FUNCTIONS.setdefault(model, {})
    except TypeError:  # neither hashable nor weakly referenced
        return _functions(lambda: model, options)
    variables = list(getattr(model, "variables", ()))
    references, functions = known.get(options, ((), None))
    same = len(references) == len(variables) and all(
        reference() is v
        for reference, v in zip(references, variables, strict=True)
    )
    if functions is None or not same:
        # They live as long as the model, so they must not hold it.
        functions = _functions(weakref.ref(model), options)
        known[options] = tuple(map(weakref.ref, variables)), functions
    return functions


def stream(functions, prompt, mask, count, settings, on_tokens):
    """What `functions.whole` gives; each token is shown as it comes."""
    rows = functions.start(prompt, mask, settings)
    tokens = []
    for position in range(count):
        if position:
            rows = functions.advance(tf.constant(position), rows, settings)
        tokens.append(rows.token.numpy())
        on_tokens(tokens[-1].copy())
        if np.all(rows.ended):
            break
    tokens += (count - len(tokens)) * tokens[-1:]
    repeats = len(tokens[0]) // prompt.shape[0]
    return tf.concat([tf.repeat(prompt, repeats, 0), np.stack(tokens, 1)], 1)


def _functions(model_of, options):
    def choose(logits, position, settings):
        if options.is_greedy:
            return tf.argmax(logits, -1, tf.int32)
        logits = sampling.likeliest(
            logits / settings.temperature,
            options.top_k,
            settings.top_p if options.has_top_p else None,
        )
        return sampling.sample(
            logits, sampling.uniform(settings.words, position)
        )

    def is_end(token, settings):
        return tf.reduce_any(token[:, tf.newaxis] == settings.ends, axis=1)

    def start(prompt, mask, settings):
        model = streaming.stream_of(model_of())
        masks = {}
        if mask is not None:
            masks[streaming.mask_argument(model)] = mask
            # What stands for padding need not be a token.
            prompt = tf.where(mask, prompt, 0)
        state = model.initial_state(tf.shape(prompt)[0])
        logits, state = model.step(prompt, state, **masks)
        logits = tf.cast(prompts.last_tokens(logits, mask), tf.float32)
        if options.sequences > 1:
            rows = tf.repeat(tf.range(tf.shape(prompt)[0]), options.sequences)
            logits, state = gather_state((logits, state), rows)
        token = choose(logits, 0, settings)
        return Rows(token, is_end(token, settings), state)

    def advance(position, rows, settings):
        token, ended, state = rows
        model = streaming.stream_of(model_of())
        logits, state = model.step(token[:, tf.newaxis], state)
        logits = tf.cast(logits[:, -1], tf.float32)
        token = tf.where(ended, token, choose(logits, position, settings))
        return Rows(token, ended | is_end(token, settings), state)

    def whole(prompt, mask, count, settings):
        with evaluated.once() as in_loop:
            return continued(prompt, mask, count, settings, in_loop)

    def continued(prompt, mask, count, settings, in_loop):
        rows = start(prompt, mask, settings)
        # What is never reached reads as the last token.
        tokens = tf.TensorArray(tf.int32, count, element_shape=rows.token.shape)

        def going_on(position, rows, tokens):
            return (position < count) & ~tf.reduce_all(rows.ended)

        def add(position, rows, tokens):
            with in_loop():
                rows = advance(position, rows, settings)
            return position + 1, rows, tokens.write(position, rows.token)

        first = 1, rows, tokens.write(0, rows.token)
        reached, rows, tokens = tf.while_loop(going_on, add, first)
        tokens = tf.where(
            tf.range(count)[:, tf.newaxis] < reached,
            tokens.stack(),
            rows.token,
        )
        prompt = tf.repeat(prompt, options.sequences, axis=0)
        return tf.concat([prompt, tf.transpose(tokens)], axis=1)

    return Functions(
        *(
            tf.function(f, jit_compile=options.jit_compile, autograph=False)
            for f in (whole, start, advance)
        )
    )
