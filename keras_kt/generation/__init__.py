"""Generation: tokens from a causal model, at a constant cost for each.

Any model with `initial_state(batch_size)` and `step(tokens, state)` that gives
logits will do: the prompt is one `step`, and so is every token after it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from numpy.typing import ArrayLike

from keras_kt import _checks, streaming
from keras_kt.generation import loop, prompts, sampling


def generate(
    model: keras.Model,
    prompt: Any,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end_token: int | Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
    jit_compile: bool = False,
    prompt_mask: ArrayLike | None = None,
    prompt_lengths: ArrayLike | None = None,
    num_return_sequences: int = 1,
    on_tokens: Callable | None = None,
) -> tf.Tensor:
    """Continues prompts, token by token, from a state of fixed size.

    The first call with a model, a prompt's shape and options that are static
    (`max_new_tokens`, `top_k`, whether `temperature` is 0, whether there is a
    `top_p`, a `prompt_mask`, how many `end_token` and sequences) traces a loop;
    later ones run it, whatever the other values, until the model has other
    variables.

    Prompts of several lengths are one batch where the model's `step` takes a
    mask of the tokens: an argument `mask`, `padding_mask`,
    `decoder_padding_mask` or `value_mask`.

    A row's sample depends on its prompt, its seed and its place in the batch,
    not on the other rows: one seed draws other noise for each place, and with a
    seed for each prompt the place does not count, so that a batch gives what
    its prompts give one by one. The bits are those of Threefry-2x32, the same
    on every device, compiled or not.

    Args:
        model: a causal model with `initial_state(batch_size)` and `step(tokens,
            state)`, which returns logits `(batch, new_tokens, vocabulary)` and
            the new state.
        prompt: `(batch, prompt_length)` integers, at least one token each. Rows
            of several lengths, as a list of lists or a `tf.RaggedTensor`, are
            padded on the left, with zeros.
        max_new_tokens: number of tokens to add.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: number of likeliest tokens to choose from. Defaults to `None`,
            which means all, as does a number above theirs.
        top_p: a probability in (0, 1]: of those tokens, at that temperature,
            the likeliest that together have it are chosen from. Defaults to
            `None`, which means all.
        end_token: an integer, or a sequence of them. After one of these a row
            is filled with it, and when all rows have had one generation ends.
            Defaults to `None`, which means none.
        seed: an integer, or one for each prompt; the same seed gives the same
            tokens. Defaults to `None`, which draws one.
        jit_compile: whether XLA compiles the loop.
        prompt_mask: `(batch, prompt_length)` boolean, True for tokens: padding,
            wherever it stands, takes no place. Defaults to `None`, which means
            tokens all.
        prompt_lengths: `(batch,)` integers, instead of a mask of prompts that
            are padded on the right.
        num_return_sequences: number of continuations of each prompt, which is
            read once. Samples do not depend on it: more are added.
        on_tokens: a function that is called with every new token as it comes,
            the array `(batch · num_return_sequences,)` of NumPy's int32, to
            write to a terminal, say. The loop is Python's then, around one
            compiled step; the tokens are the same. Defaults to `None`.

    Returns:
        `(batch · num_return_sequences, prompt_length + max_new_tokens)` int32:
        the prompt as it was padded, then the new tokens, which begin at the
        same place in every row. Continuations of a prompt follow one another.

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
        ...     def step(self, tokens, state, mask=None):
        ...         x, state = self.block.step(
        ...             self.embedding(tokens), state, decoder_padding_mask=mask
        ...         )
        ...         return self.head(x), state
        >>> model = Decoder()
        >>> _ = model(np.array([[1, 2, 3]]))
        >>> keras_kt.generate(model, [[1, 2, 3]], 5, seed=0).shape
        TensorShape([1, 8])
        >>> keras_kt.generate(model, [[1, 2, 3], [4]], 5, top_p=0.9).shape
        TensorShape([2, 8])
    """
    stream = streaming.stream_of(model)
    prompt, mask = prompts.read(prompt, prompt_mask, prompt_lengths)
    mask = prompts.mask_for(stream, mask)
    count = _checks.integer("max_new_tokens", max_new_tokens)
    temperature = _checks.number("temperature", temperature)
    top_p = sampling.check_top_p(top_p)
    sequences = _checks.integer("num_return_sequences", num_return_sequences)
    options = loop.Options(
        sequences,
        temperature == 0.0,
        _checks.integer("top_k", top_k, optional=True),
        top_p is not None,
        _checks.boolean("jit_compile", jit_compile),
    )
    ends: Any = [] if end_token is None else end_token
    if _checks.is_sequence(ends):
        ends = _checks.integers("end_token", ends, minimum=None)
    else:
        ends = (_checks.integer("end_token", ends, minimum=None),)
    if on_tokens is not None and not callable(on_tokens):
        raise ValueError(
            "`on_tokens` must be a function of the array of new tokens, one "
            f"for each row, or `None`. Received: on_tokens={on_tokens!r}"
        )
    batch = prompt.shape[0]
    words = sampling.words(seed, batch, sequences)
    if batch == 0:
        return tf.zeros((0, prompt.shape[1] + count), tf.int32)
    settings = loop.Settings(
        tf.constant(temperature, tf.float32),
        tf.constant(1.0 if top_p is None else top_p, tf.float32),
        tf.constant(ends, tf.int32),
        words,
    )
    functions = loop.of_model(model, options)
    if on_tokens is None:
        return functions.whole(prompt, mask, count, settings)
    return loop.stream(functions, prompt, mask, count, settings, on_tokens)
