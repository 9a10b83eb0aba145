"""Endpoints of a model that streams: its state as flat, named tensors.

The server keeps nothing between requests; a client sends the state that it got.
Names of the state's tensors are the same in and out.
"""

import inspect

import tensorflow as tf

from keras_kt.ops.states import AttentionState, NearFieldState, WindowState

_STATES = AttentionState, NearFieldState, WindowState
# Arguments of a model's `step` that are a mask of the tokens.
_MASKS = "mask", "padding_mask", "decoder_padding_mask", "value_mask"


def streaming_endpoints(model, tokens):
    """The endpoints of a model that has `initial_state` and `step`."""
    if tokens.shape.rank is None or tokens.shape.rank < 2:
        raise ValueError(
            "`streaming=True` needs a first input of shape (batch, length, …). "
            f"Received: {tokens.name!r} of shape {tokens.shape}. Give such an "
            "`input_signature`; text has to be tokenised by the client."
        )
    template = model.initial_state(1)
    names = _state_names(template)
    states = [
        tf.TensorSpec((None, *x.shape[1:]) if x.shape.rank else (), x.dtype, n)
        for n, x in zip(names, tf.nest.flatten(template), strict=True)
    ]

    def name_state(state):
        return dict(zip(names, tf.nest.flatten(state), strict=True))

    def initial_state(batch_size):
        return name_state(model.initial_state(batch_size))

    def step(tokens, *flat_state, **masks):
        state = tf.nest.pack_sequence_as(template, flat_state)
        outputs, state = model.step(tokens, state, **masks)
        if not isinstance(outputs, dict):
            outputs = tf.nest.flatten(outputs)
            outputs = {f"output_{i}": x for i, x in enumerate(outputs)}
        return {**outputs, **name_state(state)}

    def tokens_of(length):
        shape = (None, length, *tokens.shape[2:])
        return tf.TensorSpec(shape, tokens.dtype, tokens.name)

    batch_size = tf.TensorSpec((), tf.int32, "batch_size")
    endpoints = {
        "initial_state": (initial_state, [batch_size]),
        "prefill": (step, [tokens_of(None), *states]),
        "decode": (step, [tokens_of(1), *states]),
    }
    mask_name = _mask_argument(model)
    if mask_name:
        if tokens.name == "mask":
            raise ValueError(
                "`streaming=True` needs another name than 'mask', which "
                "`prefill_masked` gives its mask, for the first input. "
                f"Received: a first input {tokens.name!r}. Name it in "
                "`input_signature`."
            )

        def masked_step(tokens, mask, *flat_state):
            return step(tokens, *flat_state, **{mask_name: mask})

        mask = tf.TensorSpec((None, None), tf.bool, "mask")
        signature = [tokens_of(None), mask, *states]
        endpoints["prefill_masked"] = masked_step, signature
    return endpoints


def _mask_argument(model):
    """The name of the mask of the tokens in a model's `step`, or `None`."""
    parameters = inspect.signature(model.step).parameters
    return next((name for name in _MASKS if name in parameters), None)


def _state_names(state):
    """Names of the tensors of a state, in the order of `tf.nest.flatten`."""

    def fields(state):
        for name, value in state._asdict().items():
            # A state's name is lost in that of another one that holds it.
            yield from fields(value) if isinstance(value, _STATES) else [name]

    def parts(state):
        if tf.is_tensor(state):
            return [("",)]
        if isinstance(state, _STATES):
            return [tuple(f"_{field}" for field in fields(state))]
        if isinstance(state, dict):
            state = [state[key] for key in sorted(state)]
        return [part for x in state for part in parts(x)]

    return [
        f"state_{i}{field}"
        for i, fields in enumerate(parts(state))
        for field in fields
    ]
