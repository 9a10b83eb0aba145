"""The streaming protocol: what a causal model has, so that it runs in steps.

`initial_state(batch_size)` and `step(tokens, state)`, as those of
`KernelizedAttention` and `KernelizedTransformerDecoder`. `generate` and
streaming exports need nothing else of a model.
"""


def missing_methods(model) -> str:
    """What a model lacks to stream, as "`initial_state` and `step`"; or ""."""
    return " and ".join(
        f"`{name}`"
        for name in ("initial_state", "step")
        if not callable(getattr(model, name, None))
    )
