"""Generation: tokens from a causal model, at a constant cost for each.

Any model with `initial_state(batch_size)` and `step(tokens, state)` that gives
logits will do: the prompt is one `step`, and so is every token after it.
"""

import weakref
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_kt import _checks, streaming

# Compiled loops of each model, by their options.
_LOOPS = weakref.WeakKeyDictionary()


def generate(
    model,
    prompt,
    max_new_tokens,
    *,
    temperature=1.0,
    top_k=None,
    end_token=None,
    seed=None,
    jit_compile=False,
):
    """Continues prompts, token by token, from a state of fixed size.

    The first call with a model, a prompt's shape and options that are static
    (all but `temperature` above 0 and `seed`) traces a loop; later ones run it,
    until the model has other variables.

    Args:
        model: a causal model with `initial_state(batch_size)` and `step(tokens,
            state)`, which returns logits `(batch, new_tokens, vocabulary)` and
            the new state.
        prompt: `(batch, prompt_length)` integers, at least one token, the same
            number for all. Prompts of several lengths go one by one.
        max_new_tokens: number of tokens to add.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: number of likeliest tokens to choose from. Defaults to `None`,
            which means all, as does a number above theirs.
        end_token: after this token a row is filled with it, and when all rows
            have had it generation ends. Defaults to `None`, which means none.
        seed: integer; the same seed gives the same tokens. Defaults to `None`,
            which draws one.
        jit_compile: whether XLA compiles the loop.

    Returns:
        `(batch, prompt_length + max_new_tokens)` int32, prompt first.

    Examples:

    >>> class Decoder(keras.Model):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embedding = keras.layers.Embedding(10, 8)
    ...         self.block = keras_kt.KernelizedTransformerDecoder(16, 2)
    ...         self.head = keras.layers.Dense(10)
    ...     def call(self, tokens):
    ...         return self.head(self.block(self.embedding(tokens)))
    ...     def initial_state(self, batch_size):
    ...         return self.block.initial_state(batch_size)
    ...     def step(self, tokens, state):
    ...         x, state = self.block.step(self.embedding(tokens), state)
    ...         return self.head(x), state
    >>> model = Decoder()
    >>> _ = model(np.array([[1, 2, 3]]))
    >>> keras_kt.generate(model, [[1, 2, 3]], 5, seed=0).shape
    TensorShape([1, 8])
    """
    streaming.stream_of(model)
    prompt = _prompt(prompt)
    temperature = _checks.number("temperature", temperature)
    options = _Options(
        _checks.integer("max_new_tokens", max_new_tokens),
        temperature == 0.0,
        _checks.integer("top_k", top_k, optional=True),
        _checks.integer("end_token", end_token, minimum=None, optional=True),
        _checks.boolean("jit_compile", jit_compile),
    )
    seed = _checks.integer("seed", seed, minimum=None, optional=True)
    if prompt.shape[0] == 0:
        return tf.zeros((0, prompt.shape[1] + options.max_new_tokens), tf.int32)
    if seed is None:
        seed = keras.random.randint((), 0, 2**31 - 1, dtype="int32")
    elif abs(seed) >= 2**31:
        raise ValueError(
            f"`seed` must have at most 31 bits. Received: seed={seed}"
        )
    return _loop(model, options)(
        prompt, tf.constant(temperature, tf.float32), tf.cast(seed, tf.int32)
    )


class _Options(NamedTuple):
    """What a loop is traced for."""

    max_new_tokens: int
    is_greedy: bool
    top_k: int | None
    end_token: int | None
    jit_compile: bool


def _loop(model, options):
    """The compiled loop of a model, made anew if its variables are others."""
    try:
        loops = _LOOPS.setdefault(model, {})
    except TypeError:  # neither hashable nor weakly referenced
        return _traced(lambda: model, options)
    variables = list(getattr(model, "variables", ()))
    known, loop = loops.get(options, ((), None))
    same = len(known) == len(variables) and all(
        reference() is v for reference, v in zip(known, variables, strict=True)
    )
    if loop is None or not same:
        # The loop lives as long as the model, so it must not hold it.
        loop = _traced(weakref.ref(model), options)
        loops[options] = tuple(map(weakref.ref, variables)), loop
    return loop


def _traced(model_of, options):
    """`(prompt, temperature, seed)` to tokens, as a `tf.function`."""

    def choose(logits, position, temperature, seed):
        logits = tf.cast(logits[:, -1], tf.float32)
        if options.top_k is not None:
            size = logits.shape[-1] or tf.shape(logits)[-1]
            top_k = tf.minimum(options.top_k, size)
            least = tf.math.top_k(logits, top_k).values[:, -1:]
            logits = tf.where(logits < least, logits.dtype.min, logits)
        if options.is_greedy:
            return tf.argmax(logits, -1, tf.int32)
        return tf.random.stateless_categorical(
            logits / temperature, 1, tf.stack([seed, position]), tf.int32
        )[:, 0]

    def run(prompt, temperature, seed):
        model, count, end = (
            streaming.stream_of(model_of()),
            options.max_new_tokens,
            options.end_token,
        )
        batch = tf.shape(prompt)[0]
        logits, state = model.step(prompt, model.initial_state(batch))
        # What is never reached reads as the end.
        tokens = tf.fill((count, batch), 0 if end is None else end)
        ended = tf.fill((batch,), False)

        def going_on(position, tokens, token, ended, state):
            return (position < count) & ~tf.reduce_all(ended)

        def add(position, tokens, token, ended, state):
            tokens = tf.tensor_scatter_nd_update(
                tokens, [[position]], token[tf.newaxis]
            )
            logits, state = model.step(token[:, tf.newaxis], state)
            following = choose(logits, position + 1, temperature, seed)
            if end is not None:
                ended |= token == end
                following = tf.where(ended, end, following)
            return position + 1, tokens, following, ended, state

        token = choose(logits, 0, temperature, seed)
        first = 0, tokens, token, ended, state
        _, tokens, *_ = tf.while_loop(going_on, add, first)
        return tf.concat([prompt, tf.transpose(tokens)], axis=1)

    return tf.function(run, jit_compile=options.jit_compile, autograph=False)


def _prompt(prompt):
    """The prompt as int32, or what is wrong."""
    received = f"a {type(prompt).__name__}"
    if not isinstance(prompt, tf.RaggedTensor):
        try:
            prompt = tf.convert_to_tensor(prompt)
        except (TypeError, ValueError):
            received += " whose rows are not all integers of one number"
    if tf.is_tensor(prompt) and not isinstance(prompt, tf.RaggedTensor):
        is_batch = prompt.dtype.is_integer and prompt.shape.rank == 2
        if is_batch and prompt.shape[1] != 0:
            return tf.cast(prompt, tf.int32)
        shape = (
            prompt.shape if prompt.shape.rank is None else tuple(prompt.shape)
        )
        received = f"{prompt.dtype.name} of shape {shape}"
    raise ValueError(
        "`prompt` must be integers of shape (batch, prompt_length), at least "
        f"one token each, the same number in each row. Received: {received}. "
        "Give prompts of several lengths one by one; start an empty one with a "
        "token that means the start."
    )
