"""Conversion: a trained model's softmax attention becomes linear.

`convert_attention` copies a model and puts `KernelizedAttention` in the place
of each `MultiHeadAttention`, with its projections, or a `LinearAttention` into
layers of other classes, between theirs. The kernel is then an estimate of
softmax's, exp(q·k), by the features of the layer's spectral prior:
`attention_error` measures how close it is, `calibrate` brings it closer.
"""

import functools
import inspect
from typing import Any

import keras

from keras_kt import _checks, features, priors
from keras_kt.conversion import keras_hub
from keras_kt.conversion.find import attention_layers
from keras_kt.conversion.report import ConversionReport, ConvertedLayer
from keras_kt.conversion.support import problems_of, refusal, seams_of
from keras_kt.conversion.surgery import Plan, copy_with
from keras_kt.features import FeatureMap, PositiveFeatures
from keras_kt.layers.attention import KernelizedAttention
from keras_kt.layers.linear_attention import LinearAttention
from keras_kt.priors import SpectralPrior

ON_UNSUPPORTED = ("skip", "quadratic", "error")


def convert_attention(
    model: keras.Model,
    *,
    layers: Any = None,
    spectral_prior: str | SpectralPrior | None = None,
    feature_map: str | FeatureMap | None = None,
    num_features: int | None = None,
    dropout: float | None = None,
    on_unsupported: str = "skip",
    seed: int = 0,
    **kwargs: Any,
) -> tuple[keras.Model, ConversionReport]:
    """Copies a trained model with linear attention in the place of softmax.

    The original is left as it is. The copy has the class of the original and
    all of its weights, attention's projections included, and is not compiled.
    What changes is the kernel: converted layers estimate softmax, but for those
    with a `sliding_window`, which compute it. Measure it with
    `attention_error`, improve it with `calibrate`, then `distill`, then `fit`.

    Functional models, nested or not, Sequential models and models whose
    blocks make their attention layers themselves (KerasHub's too) are
    converted. Attention of another class is tried on random inputs. Where it is
    softmax of what it hands to a method `_compute_attention(query, key, value,
    attention_mask, …)`, grouped, rotated and windowed as it may be, or Falcon's
    and Bloom's with ALiBi, the layer stays, with a `LinearAttention` for that;
    else the report says by how much it differs.

    A block or model of a class of its own must implement `get_config`, and
    recreates softmax attention from it: save such a copy with `save_weights`
    (and convert again to load), or export it; `.keras` saving raises. Padded
    queries may get another context than softmax gives them: outputs at padded
    positions differ.

    Args:
        model: a built model.
        layers: paths or names of the layers to convert, as the report spells
            them. Defaults to `None`, which means all.
        spectral_prior: as in `KernelizedAttention`. Defaults to `None`, which
            means `NormalPrior(use_mean=True)`: softmax's, with a mean for
            `calibrate` to move the queries' mean into, unless the map cancels
            it.
        feature_map: as in `KernelizedAttention`. Defaults to `None`, which
            means `PositiveFeatures("tilted")`: softmax's with that mean.
        num_features: D for all layers, or a dictionary from paths to D. The
            default `None` and layers not in the dictionary get the layer's
            default.
        dropout: rate of dropout on the heads' outputs. Linear attention has no
            weights to drop; with `None` (default), layers that drop attention
            weights are unsupported.
        on_unsupported: what to do with layers that use what linear attention
            cannot honour (dropout of attention weights, dense masks, attention
            scores). `"skip"` (default) keeps them softmax,
            `"quadratic"` converts them with implementation="quadratic" (and
            their rate of dropout on the outputs), `"error"` raises. Layers
            whose attention is no softmax are always kept. Masks of models that
            are not functional are not known before a call; there the layer
            itself says so.
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
    if feature_map is None:
        feature_map = PositiveFeatures("tilted")
    if spectral_prior is None:
        spectral_prior = priors.NormalPrior(use_mean=True)
        if features.get(feature_map).cancels_mean(spectral_prior):
            spectral_prior = priors.NormalPrior()
    counts = _feature_counts(num_features, chosen)
    seams = seams_of(model, chosen)
    problems = problems_of(model, chosen, dropout, seams)
    if on_unsupported == "error" and any(problems.values()):
        listing = "; ".join(f"{p}: {why}" for p, why in problems.items() if why)
        raise ValueError(
            "Some attention layers use what linear attention cannot honour. "
            f"Received: on_unsupported='error' with {listing}. Use "
            '"skip" to keep them softmax, "quadratic" to give them the matrix, '
            "or `dropout=` to drop heads' outputs in place of weights."
        )
    plans: dict = {}
    entries: list = []
    for number, (path, layer) in enumerate(found.items()):
        why_not = "not asked for"
        if path in chosen:
            why_not = refusal(layer, seams.get(path))
        problem = problems.get(path)
        if problem and on_unsupported == "skip":
            why_not = f"{problem}, which linear attention cannot"
        if why_not:
            entries.append(ConvertedLayer(path, "kept", None, why_not))
            continue
        # Softmax does not normalize, whatever features do by themselves.
        changes = dict(
            {"qk_norm": None} | kwargs,
            spectral_prior=spectral_prior,
            feature_map=feature_map,
            num_features=counts.get(path),
            seed=seed + 3 * number,
        )
        if problem:
            changes["implementation"] = "quadratic"
        if path in seams:
            plan = _within(layer, seams[path], changes, dropout)
        else:
            if dropout is not None:
                changes["dropout"] = dropout
            plan = Plan(functools.partial(_kernelized, layer, changes))
        plans[id(layer)] = plan
        entries.append((path, layer, problem))
    if not plans:
        raise ValueError(
            "No attention layer of the model can be converted. Received: "
            + "; ".join(f"{entry.path}: {entry.note}" for entry in entries)
            + '. `on_unsupported="quadratic"` or `dropout=` may help.'
        )
    copy, made = copy_with(model, plans)
    return copy, ConversionReport(
        tuple(_entry(entry, made, plans) for entry in entries)
    )


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


def _within(layer, seam, changes, dropout):
    """A `Plan` of a LinearAttention for the heads of another class's layer."""
    if changes.get("decay") == "gated" or (seam.slopes and "decay" in changes):
        raise ValueError(
            "`decay` of layers that are given a LinearAttention must be "
            '"constant", and `None` where logits fall with the distance '
            f"already. Received: decay={changes['decay']!r} for {layer.name!r},"
            f" a {type(layer).__name__}. Name other `layers`."
        )
    if seam.slopes:
        changes = {**changes, "decay": "constant"}
    if seam.window:
        # Exact, so that nothing is left for a near field.
        changes = {**changes, "near_field": None, "sliding_window": seam.window}
    sizes = seam.num_heads, seam.key_dim, seam.value_dim
    make = functools.partial(
        LinearAttention,
        *sizes,
        seam.num_key_value_heads,
        dtype="float32",
        name="linear_attention",
        **changes,
    )
    # Where outputs are dropped out, not weights, the layer goes on to do it.
    if not seam.weights_dropout:
        dropout = 0.0
    return Plan(
        make, seam, seam.weights_dropout if dropout is None else dropout
    )


def _entry(entry, made, plans):
    if isinstance(entry, ConvertedLayer):
        return entry
    path, layer, problem = entry
    kernelized, plan = made[id(layer)], plans[id(layer)]
    notes = [problem] if problem else []
    drops_weights = plan.seam.weights_dropout if plan.seam else layer.dropout
    if drops_weights and (plan.dropout or getattr(kernelized, "dropout", 0)):
        notes.append("dropout moved from weights to heads' outputs")
    prior, feature_map = kernelized.spectral_prior, kernelized.feature_map
    if kernelized.sliding_window and feature_map.has_exact_kernel(prior):
        notes.append("in closed form inside its window")
    is_quadratic = kernelized.implementation == "quadratic"
    return ConvertedLayer(
        path,
        "quadratic" if is_quadratic else "linear",
        prior.num_frequencies * feature_map.sides,
        "; ".join(notes),
    )
