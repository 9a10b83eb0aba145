"""Copies a model with other layers in the place of some, weights and all."""

from collections.abc import Callable
from typing import NamedTuple

import keras

from keras_kt.conversion import keras_hub
from keras_kt.conversion.hub_generation import generate_on_states
from keras_kt.conversion.probe import replace_method
from keras_kt.conversion.seam import Seam, put_in

_PROJECTIONS = (
    "_query_dense",
    "_key_dense",
    "_gate_dense",
    "_value_dense",
    "_output_dense",
)


class Plan(NamedTuple):
    """What comes in the place of a softmax layer, or into it.

    Attributes:
        make: function of no arguments, which makes the new layer.
        seam: where the layer stays, and is given the new one for its heads.
        dropout: rate of dropout on heads' outputs, with a seam.
    """

    make: Callable
    seam: Seam | None = None
    dropout: float = 0.0


def copy_with(model, plans):
    """A copy of the model with planned layers replaced, weights and all.

    Args:
        model: the model.
        plans: a `Plan` by the id of the layer.

    Returns:
        The copy, and the layers that were made by the id of the original.
    """
    clones, made, rebuilt = {}, {}, []

    def clone(layer):
        if id(layer) not in clones:
            plan = plans.get(id(layer))
            if plan and not plan.seam:
                new = made[id(layer)] = plan.make()
            elif _is_graph(layer, plans):
                new = keras.models.clone_model(layer, clone_function=clone)
            else:
                new = _from_config(layer)
                if isinstance(layer, keras.Layer):
                    rebuilt.append(new)
            clones[id(layer)] = new
        return clones[id(layer)]

    copy = clone(model)
    # A compiled clone's optimizer holds variables of replaced layers.
    copy.compiled = False
    if not copy.built:
        copy.build_from_config(model.get_build_config())
    swaps = list(_match(model, copy, plans, set()))
    for parent, original, twin in swaps:
        plan = plans[id(original)]
        if plan.seam:
            new = made[id(original)] = plan.make()
            put_in(twin, parent, plan.seam, new, plan.dropout)
        elif twin is not made.get(id(original)):
            new = made.setdefault(id(original), None) or plan.make()
            made[id(original)] = new
            _transfer(original, new)
            replace_layer(parent, twin, new)
        else:
            _transfer(original, twin)
    keras_hub.linearize_masks(copy)
    generate_on_states(copy)
    inner = {id(new) for new in made.values()}
    for layer in rebuilt:
        if any(id(other) in inner for other in layer._flatten_layers()):
            replace_method(layer, "get_config", _refuse_config)
    return copy, made


def projections(layer):
    """The projections of an attention layer by attribute."""
    return {
        name: getattr(layer, name)
        for name in _PROJECTIONS
        if hasattr(layer, name)
    }


def children(layer):
    """The layers that a layer tracks itself."""
    return layer._flatten_layers(include_self=False, recursive=False)


def _is_graph(layer, plans):
    """Whether a model is made of its graph, so that its nodes are replaced."""
    if isinstance(layer, keras.Sequential):
        return True
    if not hasattr(layer, "_run_through_graph"):
        return False
    # A class of its own survives where the graph need not change.
    return type(layer).__name__ == "Functional" or any(
        id(child) in plans for child in layer.operations
    )


def _from_config(layer):
    try:
        new = type(layer).from_config(layer.get_config())
    except (NotImplementedError, TypeError) as error:
        raise ValueError(
            f"{type(layer).__name__} must be made again from its "
            "configuration, so that the original stays as it is. Received: "
            f"{layer.name!r}, for which `from_config(get_config())` fails: "
            f"{str(error).splitlines()[0]} Implement `get_config` with every "
            "argument of `__init__`, and let `__init__` pass others (name, "
            "trainable, dtype) on to `super().__init__`."
        ) from error
    if isinstance(layer, keras.Layer):
        own = {id(child) for child in children(layer)}
        shared = [x.name for x in children(new) if id(x) in own]
        if shared:
            raise ValueError(
                "`get_config` must describe layers and not hold them, else the "
                "copy would share, and change, those of the original. "
                f"Received: {layer.name!r}, whose copy has its {shared}. Use "
                "`keras.saving.serialize_keras_object` in `get_config`, and "
                "its inverse in `from_config`."
            )
    return new


def _match(original, copy, plans, seen):
    """Copies weights layer by layer.

    Yields:
        `(parent in the copy, softmax layer, its twin in the copy)` for planned
        layers, whose weights are left.
    """
    if id(original) in seen:
        return
    seen.add(id(original))
    store = {}
    original.save_own_variables(store)
    copy.load_own_variables(store)
    if copy.trainable != original.trainable:
        copy.trainable = original.trainable
    for child, twin in _twins(original, copy):
        plan = plans.get(id(child))
        if plan and (id(child) not in seen or not plan.seam):
            yield copy, child, twin
        if plan is None or plan.seam:
            yield from _match(child, twin, plans, seen)


def _twins(original, copy):
    """Pairs of children, by name where the copy has the names."""
    ours, twins = children(original), children(copy)
    by_name = {twin.name: twin for twin in twins}
    if type(copy) is not type(original):
        # A graph of a class of its own became a plain one.
        ours = [child for child in ours if child.name in by_name]
    if all(child.name in by_name for child in ours):
        twins = [by_name[child.name] for child in ours]
    if len(ours) != len(twins):
        raise ValueError(
            f"{type(original).__name__} must make the same layers again from "
            f"its configuration. Received: {original.name!r} with "
            f"{len(ours)} layers, and {len(twins)} in its copy. Make all of "
            "them in `__init__` or `build`, from arguments in `get_config`."
        )
    return zip(ours, twins, strict=True)


def _transfer(softmax, kernelized):
    """Copies the projections, by name."""
    dense_layers = projections(softmax)
    if not kernelized.built:
        query, key, value = (
            (*[None] * (dense.equation.index(",") - 1), dense.kernel.shape[0])
            for dense in (
                softmax.query_dense,
                softmax.key_dense,
                softmax.value_dense,
            )
        )
        kernelized.build(query, value, key)
    for name, dense in dense_layers.items():
        ours = getattr(kernelized, name)
        ours.kernel.assign(dense.kernel)
        if dense.bias is not None:
            ours.bias.assign(dense.bias)
        ours.trainable = dense.trainable


def replace_layer(parent, old, new):
    """Puts a layer where a built parent has another one."""
    parent._tracker.replace_tracked_value("layers", old, new)
    for name, value in list(vars(parent).items()):
        if name not in ("_tracker", "_layers"):
            changed = _substituted(value, old, new)
            if changed is not value:
                setattr(parent, name, changed)


def _substituted(value, old, new):
    if value is old:
        return new
    if isinstance(value, (list, dict)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in list(items):
            changed = _substituted(item, old, new)
            if changed is not item:
                value[key] = changed
    if type(value) is tuple and any(item is old for item in value):
        return tuple(new if item is old else item for item in value)
    return value


def _refuse_config(layer, _):
    raise NotImplementedError(
        f"The configuration of {layer.name!r} would make softmax attention "
        "again: its class makes its own attention layers, and "
        "`convert_attention` replaced them. Use `save_weights`, and "
        "`load_weights` on a model that was converted in the same way, or "
        "export the model."
    )
