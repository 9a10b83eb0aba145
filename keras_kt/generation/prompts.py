"""Prompts: integers of one shape, and a mask where their lengths differ."""

import numpy as np
import tensorflow as tf

from keras_kt import streaming


def read(prompt, mask=None, lengths=None):
    """Tokens and their mask, or what is wrong with them.

    Args:
        prompt: `(batch, prompt_length)` integers; or rows of several lengths,
            which are padded on the left: what follows stands beside them.
        mask: `(batch, prompt_length)` boolean, or `None`.
        lengths: `(batch,)` integers instead, of prompts padded on the right.

    Returns:
        `(batch, prompt_length)` int32, and `(batch, prompt_length)` boolean,
        `None` where nothing can be masked.
    """
    rows = prompt if isinstance(prompt, tf.RaggedTensor) else None
    received = f"a {type(prompt).__name__}"
    if rows is None:
        try:
            prompt = tf.convert_to_tensor(prompt)
        except (TypeError, ValueError):
            rows = _ragged(prompt)
            received += " whose rows are not all integers"
    if rows is not None:
        if mask is not None or lengths is not None:
            raise ValueError(
                "`prompt_mask` and `prompt_lengths` are for prompts that are "
                "padded. Received one with a prompt of rows of several "
                "lengths, which has its own."
            )
        prompt, mask = _padded(rows)
    elif mask is not None and lengths is not None:
        raise ValueError(
            "Give `prompt_mask` or `prompt_lengths`. Received: both."
        )
    if tf.is_tensor(prompt):
        shape = prompt.shape
        is_batch = prompt.dtype.is_integer and shape.rank == 2
        if is_batch and shape[1] != 0:
            if mask is not None:
                mask = _mask(mask, shape)
            elif lengths is not None:
                mask = _mask_of_lengths(lengths, prompt)
            return tf.cast(prompt, tf.int32), mask
        shape = shape if shape.rank is None else tuple(shape)
        received = f"{prompt.dtype.name} of shape {shape}"
    raise ValueError(
        "`prompt` must be integers of shape (batch, prompt_length), at least "
        "one token each, or rows of several lengths. Received: "
        f"{received}. Start an empty one with a token that means the start."
    )


def mask_for(model, mask):
    """The mask that the model's `step` is given, or that it takes none."""
    if mask is None or streaming.mask_argument(model) is not None:
        return mask
    if np.all(tf.get_static_value(mask)):
        return None
    raise ValueError(
        "Prompts of several lengths need a model whose `step` has an argument "
        "`mask`, `(batch, new_tokens)` boolean, True for tokens. Received: a "
        f"{type(model).__name__} whose `step` has none. Give it one, which "
        "goes to the `step` of each of its layers, or give the prompts one by "
        "one."
    )


def last_tokens(outputs, mask):
    """Outputs at each row's last token, `(batch, …)`."""
    if mask is None:
        return outputs[:, -1]
    last = tf.argmax(mask[:, ::-1], 1, tf.int32)
    last = tf.shape(mask)[1] - 1 - last
    return tf.gather(outputs, last, axis=1, batch_dims=1)


def _ragged(rows):
    """Rows of integers as a RaggedTensor; `None` where they are something else.

    An empty row is an empty one of floats to NumPy.
    """
    try:
        rows = [np.asarray(row) for row in rows]
    except (TypeError, ValueError):
        return None
    if any(x.ndim != 1 or (x.size and x.dtype.kind not in "iu") for x in rows):
        return None
    return tf.RaggedTensor.from_row_lengths(
        np.concatenate(rows).astype("int32"), [len(row) for row in rows]
    )


def _padded(rows):
    """Rows padded on the left, and which of them are tokens."""
    if rows.shape.rank != 2 or not rows.dtype.is_integer:
        return rows.to_tensor(), None
    lengths = rows.row_lengths()
    _no_empty_rows(lengths, "`prompt`")
    tokens = tf.reverse(rows, [1]).to_tensor()[:, ::-1]
    mask = tf.sequence_mask(lengths, tf.shape(tokens)[1])
    return tokens, mask[:, ::-1]


def _mask(mask, shape):
    received = f"a {type(mask).__name__}"
    try:
        mask = tf.convert_to_tensor(mask)
        received = f"{mask.dtype.name} of shape {mask.shape}"
    except (TypeError, ValueError):
        mask = None
    if (
        mask is None
        or not (mask.dtype.is_bool or mask.dtype.is_integer)
        or not mask.shape.is_compatible_with(shape)
    ):
        raise ValueError(
            f"`prompt_mask` must be boolean, of the prompt's shape "
            f"{tuple(shape)}, True for tokens. Received: {received}"
        )
    mask = tf.cast(mask, tf.bool)
    counts = tf.reduce_sum(tf.cast(mask, tf.int32), 1)
    _no_empty_rows(counts, "`prompt_mask`")
    return mask


def _mask_of_lengths(lengths, prompt):
    batch, longest = prompt.shape
    try:
        array = np.asarray(lengths)
    except (TypeError, ValueError, NotImplementedError):
        array = np.zeros(0)
    if (
        array.shape != (batch,)
        or array.dtype.kind not in "iu"
        or (array > longest).any()
        or (array < 0).any()
    ):
        raise ValueError(
            "`prompt_lengths` must be one integer for each prompt, from 1 to "
            f"{longest}. Received: prompt_lengths={lengths!r} for a prompt of "
            f"shape {(batch, longest)}"
        )
    _no_empty_rows(array, "`prompt_lengths`")
    return tf.sequence_mask(array, longest)


def _no_empty_rows(counts, name):
    counts = tf.get_static_value(counts)
    if counts is not None and (counts == 0).any():
        raise ValueError(
            f"{name} must have at least one token in each row. Received: none "
            f"in the rows {np.flatnonzero(counts == 0).tolist()}. Start an "
            "empty prompt with a token that means the start."
        )
