"""Generation: tokens from a causal model, at a constant cost for each.

Any model with `initial_state(batch_size)` and `step(tokens, state)` that gives
logits will do: the prompt is one `step`, and so is every token after it.
"""

import keras
import tensorflow as tf


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

    Args:
        model: a causal model with `initial_state(batch_size)` and `step(tokens,
            state)`, which returns logits `(batch, new_tokens, vocabulary)` and
            the new state.
        prompt: `(batch, prompt_length)` integers, at least one token, the same
            number for all.
        max_new_tokens: number of tokens to add.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: number of likeliest tokens to choose from. Defaults to `None`,
            which means all.
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
    prompt = _check(model, prompt, max_new_tokens, temperature, top_k)
    if seed is None:
        seed = keras.random.randint((), 0, 2**31 - 1, dtype="int32")
    seed = tf.stack([tf.cast(seed, tf.int32), 0])

    def choose(logits, position):
        logits = tf.cast(logits[:, -1], tf.float32)
        if top_k is not None:
            least = tf.math.top_k(logits, top_k).values[:, -1:]
            logits = tf.where(logits < least, logits.dtype.min, logits)
        if temperature == 0:
            return tf.argmax(logits, -1, tf.int32)
        seeds = seed + tf.stack([0, position])
        return tf.random.stateless_categorical(
            logits / temperature, 1, seeds, tf.int32
        )[:, 0]

    @tf.function(jit_compile=jit_compile, autograph=False)
    def run(prompt):
        batch = tf.shape(prompt)[0]
        logits, state = model.step(prompt, model.initial_state(batch))
        # What is never reached reads as the end.
        fill = 0 if end_token is None else end_token
        tokens = tf.fill((max_new_tokens, batch), fill)
        ended = tf.fill((batch,), False)

        def going_on(position, tokens, token, ended, state):
            return (position < max_new_tokens) & ~tf.reduce_all(ended)

        def add(position, tokens, token, ended, state):
            tokens = tf.tensor_scatter_nd_update(
                tokens, [[position]], token[tf.newaxis]
            )
            logits, state = model.step(token[:, tf.newaxis], state)
            following = choose(logits, position + 1)
            if end_token is not None:
                ended |= token == end_token
                following = tf.where(ended, end_token, following)
            return position + 1, tokens, following, ended, state

        token = choose(logits, 0)
        first = 0, tokens, token, ended, state
        _, tokens, *_ = tf.while_loop(going_on, add, first)
        return tf.concat([prompt, tf.transpose(tokens)], axis=1)

    return run(prompt)


def _check(model, prompt, max_new_tokens, temperature, top_k):
    """The prompt as int32, or what is wrong."""
    missing = [
        name
        for name in ("initial_state", "step")
        if not callable(getattr(model, name, None))
    ]
    if missing:
        raise ValueError(
            "`model` must be causal, with the methods `initial_state("
            "batch_size)` and `step(tokens, state)`. Received: a "
            f"{type(model).__name__} without "
            f"{' and '.join(f'`{name}`' for name in missing)}. They call those "
            "of its KernelizedAttention or KernelizedTransformerDecoder layers."
        )
    prompt = tf.convert_to_tensor(prompt)
    if (
        not prompt.dtype.is_integer
        or prompt.shape.rank != 2
        or (0 in prompt.shape[1:])
    ):
        raise ValueError(
            "`prompt` must be integers of shape (batch, prompt_length), at "
            f"least one token each. Received: {prompt.dtype.name} of shape "
            f"{tuple(prompt.shape)}. Give prompts of several lengths one by "
            "one; start an empty one with a token that means the start."
        )
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        raise ValueError(
            "`max_new_tokens` must be a positive integer. Received: "
            f"max_new_tokens={max_new_tokens!r}"
        )
    if temperature < 0:
        raise ValueError(
            "`temperature` must be 0 (the likeliest token) or more. Received: "
            f"temperature={temperature}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(
            "`top_k` must be `None` or a positive integer. Received: "
            f"top_k={top_k}"
        )
    return tf.cast(prompt, tf.int32)
