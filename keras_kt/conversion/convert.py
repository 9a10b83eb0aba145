"""Conversion: a trained model's softmax attention becomes linear.

`convert_attention` copies a model and puts `KernelizedAttention` in the place
of each `MultiHeadAttention`, with its projections. The kernel is then an
estimate of softmax's, exp(q·k), by the features of the layer's spectral prior:
`calibration` measures how close it is, and brings it closer.
"""

import functools
import inspect
import warnings
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_kt import _checks, priors
from keras_kt.conversion import keras_hub
from keras_kt.conversion.probe import kept_losses, recorded_calls
from keras_kt.conversion.surgery import children, copy_with, projections
from keras_kt.features import PositiveFeatures
from keras_kt.layers.attention import KernelizedAttention

ON_UNSUPPORTED = ("skip", "quadratic", "error")
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
    with `attention_error`, improve it with `calibrate`, then `distill`, then
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
        feature_map = PositiveFeatures("tilted")
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
    copy, made = copy_with(model, plans)
    return copy, ConversionReport(
        tuple(_entry(entry, made) for entry in entries)
    )


def attention_layers(model) -> dict:
    """The attention layers of a model by path, those of any kind."""
    found = {}

    def visit(layer, path):
        for child in children(layer):
            place = f"{path}/{child.name}" if path else child.name
            if _is_attention(child):
                if not any(child is other for other in found.values()):
                    found[_unused(place, found)] = child
            else:
                visit(child, place)

    visit(model, "")
    return found


def _is_attention(layer):
    return "Attention" in type(layer).__name__ or isinstance(
        layer, keras.layers.MultiHeadAttention
    )


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
    if keras_hub.is_cached(layer):
        base = keras_hub.cached_class()
    for method in _COMPUTATION:
        if getattr(type(layer), method) is not getattr(base, method):
            return f"{name} has a `{method}` of its own"
    if not layer.built:
        return "is not built: it was never called"
    if any(dense.quantization_mode for dense in projections(layer).values()):
        return "its projections are quantized"
    return None


def _problems(model, chosen, dropout):
    """What linear attention cannot honour, by path; "" where nothing."""
    supported = {p: layer for p, layer in chosen.items() if not _refusal(layer)}
    calls = _traced_calls(model, list(supported.values()))
    causal = {
        id(attention) for _, attention in keras_hub.causal_attention(model)
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


def _kernelized(layer, changes):
    """An unbuilt KernelizedAttention with the arguments of a softmax layer."""
    kind = KernelizedAttention
    if keras_hub.is_cached(layer):
        kind = keras_hub.CachedKernelizedAttention
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
        kernelized.spectral_prior.num_frequencies
        * kernelized.feature_map.sides,
        "; ".join(notes),
    )
