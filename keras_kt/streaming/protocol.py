"""The streaming protocol: what a causal model has, so that it runs in steps.

`initial_state(batch_size)` and `step(tokens, state)`, as those of
`KernelizedAttention` and `KernelizedTransformerDecoder`. `generate` and
streaming exports need nothing else of a model.
"""

import inspect

# Arguments of a `step` that are a mask of the new tokens.
_MASKS = (
    "mask",
    "padding_mask",
    "decoder_padding_mask",
    "value_mask",
    "key_mask",
)


def missing_methods(model) -> str:
    """What a model lacks to stream, as "`initial_state` and `step`"; or ""."""
    return " and ".join(
        f"`{name}`"
        for name in ("initial_state", "step")
        if not callable(getattr(model, name, None))
    )


def mask_argument(model) -> str | None:
    """The name of the mask of the tokens in a model's `step`, if it has one."""
    if not getattr(model, "takes_mask", True):
        return None
    parameters = inspect.signature(model.step).parameters
    return next((name for name in _MASKS if name in parameters), None)
