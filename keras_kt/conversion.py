"""Conversion: a trained model's softmax attention becomes linear.

`convert_attention` copies a model and puts `KernelizedAttention` in the place
of each `MultiHeadAttention`, with its projections. The kernel is then an
estimate of softmax's, exp(q·k), by the features of the layer's spectral prior:
`calibration` measures how close it is, and brings it closer.
"""

import contextlib
import functools
import inspect
import warnings
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_kt import (
    _checks,
    feature_maps,
    keras_hub_layers,
    priors,
)
from keras_kt.attention import KernelizedAttention

ON_UNSUPPORTED = ("skip", "quadratic", "error")
_PROJECTIONS = (
    "_query_dense",
    "_key_dense",
    "_gate_dense",
    "_value_dense",
    "_output_dense",
)
# What a subclass of MultiHeadAttention may not change if its weights are to
# mean the same in KernelizedAttention.
_COMPUTATION = ("call", "_compute_attention", "_masked_softmax")


class ConvertedLayer(NamedTuple):
    """What became of one attention layer.

    Attributes:
        path: names of the layers that lead to it, joined by "/".
        status: `"linear"`, `"quadratic"`, or `"kept"` (still softmax).
        num_features: D of the converted layer, or `None`.
        note: what differs from the original, or why it was kept.
    """

    path: str
    status: str
    num_features: int | None
    note: str


class ConversionReport(NamedTuple):
    """The attention layers of a model, and what became of each.

    Attributes:
        layers: tuple of `ConvertedLayer`, in the model's order.
    """

    layers: tuple

    @property
    def converted(self) -> dict:
        """D of the converted layers, by path; fits `num_features`."""
        return {
            layer.path: layer.num_features
            for layer in self.layers
            if layer.status != "kept"
        }

    @property
    def kept(self) -> dict:
        """Why each of the other layers was kept, by path."""
        return {
            layer.path: layer.note
            for layer in self.layers
            if layer.status == "kept"
        }

    def __str__(self):
        lines = [
            f"{path}: {status}"
            + (f", {count} features" if count else "")
            + (f" ({note})" if note else "")
            for path, status, count, note in self.layers
        ]
        return "\n".join(lines)


def convert_attention(
    model,
    *,
    layers=None,
    spectral_prior=None,
    feature_map="tilted",
    num_features=None,
    dropout=None,
    on_unsupported="skip",
    seed=0,
    **kwargs,
):
    """Copies a trained model with linear attention in the place of softmax.

    The original is left as it is. The copy has the class of the original and
    all of its weights, attention's projections included, and is not compiled.
    What changes is the kernel: converted layers estimate softmax. Measure it
    with `attention_error`, improve it with `calibrate`, then `distil`, then
    `fit`.

    Functional models, nested or not, Sequential models and models whose
    blocks make their attention layers themselves (KerasHub's too) are
    converted. A block or model of a class of its own must implement
    `get_config`, and recreates softmax attention from it: save such a copy
    with `save_weights` (and convert again to load), or export it; `.keras`
    saving raises. Padded queries get a zero context, where softmax gives them
    an average: outputs at padded positions differ.

    Args:
        model: a built model.
        layers: paths or names of the layers to convert, as the report spells
            them. Defaults to `None`, which means all.
        spectral_prior: as in `KernelizedAttention`. Defaults to `None`, which
            means `NormalPrior(use_mean=True)`: softmax's, with a mean for
            `calibrate` to move the queries' mean into.
        feature_map: as in `KernelizedAttention`. Defaults to `"tilted"`, which
            means `PositiveFeatures("tilted")`: softmax's with that mean.
        num_features: D for all layers, or a dictionary from paths to D. The
            default `None` and layers not in the dictionary get the layer's
            default.
        dropout: rate of dropout on the heads' outputs. Linear attention has no
            weights to drop; with `None` (default), layers that drop attention
            weights are unsupported.
        on_unsupported: what to do with layers that use what linear attention
            cannot honour (dropout of attention weights, dense masks, sliding
            windows, attention scores). `"skip"` (default) keeps them softmax,
            `"quadratic"` converts them with implementation="quadratic" (and
            their rate of dropout on the outputs), `"error"` raises. Layers
            that are not MultiHeadAttention, or compute attention in a way of
            their own, are always kept. Masks of models that are not functional
            are not known before a call; there the layer itself says so.
        seed: integer seed of the draws of frequencies.
        **kwargs: other keyword arguments of `KernelizedAttention`.

    Returns:
        The converted copy, and a `ConversionReport`.

    Examples:

    >>> x = keras.Input((None, 8))
    >>> y = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    >>> model = keras.Model(x, y)
    >>> converted, report = keras_kt.convert_attention(model)
    >>> print(report)
    attention: linear, 8 features
    """
    on_unsupported = _checks.choice(
        "on_unsupported", on_unsupported, ON_UNSUPPORTED
    )
    dropout = _checks.number("dropout", dropout, below=1.0, optional=True)
    seed = _checks.integer("seed", seed, minimum=None)
    _check_model(model)
    found = attention_layers(model)
    chosen = _choose(found, layers)
    if spectral_prior is None:
        spectral_prior = priors.NormalPrior(use_mean=True)
    if isinstance(feature_map, str) and feature_map == "tilted":
        feature_map = feature_maps.PositiveFeatures("tilted")
    counts = _feature_counts(num_features, chosen)
    problems = _problems(model, chosen, dropout)
    if on_unsupported == "error" and any(problems.values()):
        listing = "; ".join(f"{p}: {why}" for p, why in problems.items() if why)
        raise ValueError(
            "Some attention layers use what linear attention cannot honour. "
            f"Received: on_unsupported='error' with {listing}. Use "
            '"skip" to keep them softmax, "quadratic" to give them the matrix, '
            "or `dropout=` to drop heads' outputs in place of weights."
        )
    plans, entries = {}, []
    for number, (path, layer) in enumerate(found.items()):
        why_not = _refusal(layer) if path in chosen else "not asked for"
        problem = problems.get(path)
        if problem and on_unsupported == "skip":
            why_not = f"{problem}, which linear attention cannot"
        if why_not:
            entries.append(ConvertedLayer(path, "kept", None, why_not))
            continue
        changes = dict(
            kwargs,
            spectral_prior=spectral_prior,
            feature_map=feature_map,
            num_features=counts.get(path),
            seed=seed + 3 * number,
        )
        if dropout is not None:
            changes["dropout"] = dropout
        if problem:
            changes["implementation"] = "quadratic"
        plans[id(layer)] = functools.partial(_kernelized, layer, changes)
        entries.append((path, layer, problem))
    if not plans:
        raise ValueError(
            "No attention layer of the model can be converted. Received: "
            + "; ".join(f"{entry.path}: {entry.note}" for entry in entries)
            + '. `on_unsupported="quadratic"` or `dropout=` may help.'
        )
    copy, made = _copy(model, plans)
    return copy, ConversionReport(
        tuple(_entry(entry, made) for entry in entries)
    )


def attention_layers(model) -> dict:
    """The attention layers of a model by path, those of any kind."""
    found = {}

    def visit(layer, path):
        for child in _children(layer):
            place = f"{path}/{child.name}" if path else child.name
            if _is_attention(child):
                if not any(child is other for other in found.values()):
                    found[_unused(place, found)] = child
            else:
                visit(child, place)

    visit(model, "")
    return found


@contextlib.contextmanager
def recorded_calls(layers):
    """Records the calls of layers, in a graph or eagerly.

    Args:
        layers: the layers; they are as before when the context ends.

    Yields:
        A list that fills with `(layer, bound_arguments, output)`.
    """
    calls = []

    def record(layer, call, *args, **kwargs):
        output = call(*args, **kwargs)
        bound = inspect.signature(call).bind(*args, **kwargs)
        calls.append((layer, bound.arguments, output))
        return output

    with replaced_methods(layers, "call", record):
        yield calls


@contextlib.contextmanager
def replaced_methods(layers, name, replacement):
    """Gives layers another method, until the context ends. Contexts nest.

    Args:
        layers: the layers; they are as before when the context ends.
        name: of the method.
        replacement: function of a layer, the method it had, and the method's
            arguments.
    """
    with contextlib.ExitStack() as stack:
        for layer in layers:
            method = getattr(layer, name)
            # A replacement of someone else's is put back, too.
            before = {name: method} if name in vars(layer) else {}
            stack.callback(vars(layer).update, before)
            stack.callback(vars(layer).pop, name)
            setattr(layer, name, functools.partial(replacement, layer, method))
        yield


@contextlib.contextmanager
def kept_losses(*models):
    """Puts the losses of models back: a graph's are dead outside of it.

    Args:
        models: the models, which are called within the context.
    """
    layers = [
        layer
        for model in models
        for layer in model._flatten_layers()
        if isinstance(layer, keras.Layer)
    ]
    before = [list(layer._losses) for layer in layers]
    try:
        yield
    finally:
        for layer, losses in zip(layers, before, strict=True):
            layer._losses[:] = losses


def _is_attention(layer):
    return "Attention" in type(layer).__name__ or isinstance(
        layer, keras.layers.MultiHeadAttention
    )


def _children(layer):
    return layer._flatten_layers(include_self=False, recursive=False)


def _unused(path, found):
    number, name = 1, path
    while name in found:
        number += 1
        name = f"{path}#{number}"
    return name


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            "`model` must be a keras.Model. Received: a "
            f"{type(model).__name__}. Wrap layers in keras.Model or "
            "keras.Sequential."
        )
    if not model.built:
        raise ValueError(
            "`model` must be built: its weights are what is converted. "
            f"Received: {model.name!r}, which has none yet. Call it on a batch "
            "or give it a keras.Input, and load its weights."
        )
    if not attention_layers(model):
        names = sorted({type(layer).__name__ for layer in model.layers})
        raise ValueError(
            "No attention layer was found in `model`. Received: a model of "
            f"{names}. Layers are found where Keras tracks them: as attributes "
            "of layers, or in lists and dictionaries that are."
        )


def _choose(found, layers):
    if layers is None:
        return found
    wanted = {layers} if isinstance(layers, str) else set(layers)
    chosen = {
        path: layer
        for path, layer in found.items()
        if path in wanted or path.split("/")[-1] in wanted
    }
    known = set(chosen) | {path.split("/")[-1] for path in chosen}
    if not wanted <= known or not wanted:
        raise ValueError(
            "`layers` must name attention layers of the model, "
            f"{tuple(found)}. Received: layers={layers}, of which "
            f"{sorted(wanted - known)} are none of them."
        )
    return chosen


def _feature_counts(num_features, chosen):
    if not isinstance(num_features, dict):
        count = _checks.integer("num_features", num_features, optional=True)
        return dict.fromkeys(chosen, count)
    unknown = sorted(set(num_features) - set(chosen))
    if unknown:
        raise ValueError(
            "`num_features` must map paths of converted layers to D; these are "
            f"{tuple(sorted(chosen))}. Received: {unknown}, which are not."
        )
    return num_features


def _refusal(layer):
    """Why a layer cannot stand for its weights in KernelizedAttention."""
    name = type(layer).__name__
    if isinstance(layer, KernelizedAttention):
        return "is linear already"
    if not isinstance(layer, keras.layers.MultiHeadAttention):
        return f"{name} is not a MultiHeadAttention"
    base = keras.layers.MultiHeadAttention
    if keras_hub_layers.is_cached(layer):
        base = keras_hub_layers.cached_class()
    for method in _COMPUTATION:
        if getattr(type(layer), method) is not getattr(base, method):
            return f"{name} has a `{method}` of its own"
    if not layer.built:
        return "is not built: it was never called"
    if any(dense.quantization_mode for dense in _projections(layer).values()):
        return "its projections are quantized"
    return None


def _problems(model, chosen, dropout):
    """What linear attention cannot honour, by path; "" where nothing."""
    supported = {p: layer for p, layer in chosen.items() if not _refusal(layer)}
    calls = _traced_calls(model, list(supported.values()))
    causal = {
        id(attention)
        for _, attention in keras_hub_layers.causal_attention(model)
    }
    problems = {}
    for path, layer in supported.items():
        needs = {
            need
            for called, arguments, _ in calls
            if called is layer
            for need in _needs(arguments, id(layer) in causal)
        }
        if layer.dropout and dropout is None:
            needs.add("drops attention weights")
        if layer._sliding_window:
            needs.add("has a sliding window")
        problems[path] = " and ".join(sorted(needs))
    return problems


def _needs(arguments, is_causal_block):
    """What a call needs the attention matrix for."""
    if arguments.get("return_attention_scores"):
        yield "returns its scores"
    mask = arguments.get("attention_mask")
    # A mask that all queries share is a key mask.
    if mask is not None and not is_causal_block and mask.shape[-2] != 1:
        yield "takes a dense mask"


def _traced_calls(model, layers):
    """The calls of layers when a functional model runs, without running it."""
    inputs = getattr(model, "inputs", None)
    if not inputs:
        return []
    if not isinstance(model, keras.Sequential):
        inputs = model.input
    elif len(inputs) == 1:
        (inputs,) = inputs
    spec = keras.tree.map_structure(
        lambda x: tf.TensorSpec(x.shape, x.dtype), inputs
    )
    with (
        kept_losses(model),
        recorded_calls(layers) as calls,
        # The original says at every call of its own what it has to say.
        warnings.catch_warnings(action="ignore"),
    ):
        tf.function(
            lambda x: model(x, training=False), autograph=False
        ).get_concrete_function(spec)
    return calls


def _projections(layer):
    """The projections of an attention layer by attribute."""
    return {
        name: getattr(layer, name)
        for name in _PROJECTIONS
        if hasattr(layer, name)
    }


def _kernelized(layer, changes):
    """An unbuilt KernelizedAttention with the arguments of a softmax layer."""
    kind = KernelizedAttention
    if keras_hub_layers.is_cached(layer):
        kind = keras_hub_layers.CachedKernelizedAttention
    known = set(inspect.signature(KernelizedAttention.__init__).parameters)
    known |= {"name", "trainable", "dtype"}
    config = layer.get_config()
    config = {name: config[name] for name in known & set(config)}
    return kind.from_config({**config, **changes})


def _entry(entry, made):
    if isinstance(entry, ConvertedLayer):
        return entry
    path, layer, problem = entry
    kernelized = made[id(layer)]
    notes = [problem] if problem else []
    if layer.dropout and kernelized.dropout:
        notes.append("dropout moved from weights to heads' outputs")
    is_quadratic = kernelized.implementation == "quadratic"
    return ConvertedLayer(
        path,
        "quadratic" if is_quadratic else "linear",
        kernelized._resolve_num_features()[0],
        "; ".join(notes),
    )


def _copy(model, plans):
    """A copy of the model with planned layers replaced, weights and all.

    Returns:
        The copy, and the layers that were made by the id of the original.
    """
    clones, made, rebuilt = {}, {}, []

    def clone(layer):
        if id(layer) not in clones:
            if id(layer) in plans:
                new = made[id(layer)] = plans[id(layer)]()
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
        if twin is not made.get(id(original)):
            new = made.setdefault(id(original), None) or plans[id(original)]()
            made[id(original)] = new
            _transfer(original, new)
            replace_layer(parent, twin, new)
        else:
            _transfer(original, twin)
    keras_hub_layers.linearise_masks(copy)
    inner = {id(new) for new in made.values()}
    for layer in rebuilt:
        if any(id(other) in inner for other in layer._flatten_layers()):
            layer.get_config = functools.partial(_refuse_config, layer.name)
    return copy, made


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
        own = {id(child) for child in _children(layer)}
        shared = [x.name for x in _children(new) if id(x) in own]
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
        if id(child) in plans:
            yield copy, child, twin
        else:
            yield from _match(child, twin, plans, seen)


def _twins(original, copy):
    """Pairs of children, by name where the copy has the names."""
    ours, twins = _children(original), _children(copy)
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
    projections = _projections(softmax)
    if not kernelized.built:
        query, key, value = (
            (*[None] * (dense.equation.index(",") - 1), dense.kernel.shape[0])
            for dense in (
                softmax._query_dense,
                softmax._key_dense,
                softmax._value_dense,
            )
        )
        kernelized.build(query, value, key)
    for name, dense in projections.items():
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


def _refuse_config(name):
    raise NotImplementedError(
        f"The configuration of {name!r} would make softmax attention again: "
        "its class makes its own attention layers, and `convert_attention` "
        "replaced them. Use `save_weights`, and `load_weights` on a model that "
        "was converted in the same way, or export the model."
    )
