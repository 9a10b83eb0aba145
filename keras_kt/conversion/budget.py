"""Features go to the layers whose error they reduce most, within a budget.

Each layer is tried with one, two, four and more whole blocks of features; then
they are doubled, one layer after another, where the error of the attention
matrix falls most for a feature, while the mean over the layers allows it.
"""

import numpy as np

from keras_kt.conversion.errors import head_errors

# Blocks of features that a layer may get within a budget.
_BLOCKS = (1, 2, 4, 8, 16)


def spend(items, budget):
    """Gives each layer features while the mean is within the budget."""
    choices = []
    for item in items:
        by_count = {}
        for blocks in _BLOCKS:
            count = 2 * item.layer.key_dim * blocks
            if count <= budget * len(items):
                prior = _prior_with(item.layer, count)
                found = head_errors(item, prior)
                found = [head.matrix for head in found]
                by_count[count] = prior, float(np.mean(found))
        choices.append(by_count)
    spent = [min(by_count) for by_count in choices]
    while True:
        gains = []
        for number, by_count in enumerate(choices):
            more = 2 * spent[number]
            added = more - spent[number]
            if more in by_count and sum(spent) + added <= budget * len(items):
                gain = by_count[spent[number]][1] - by_count[more][1]
                gains.append((gain / added, number))
        if not gains or max(gains)[0] <= 0.0:
            break
        spent[max(gains)[1]] *= 2
    for item, by_count, count in zip(items, choices, spent, strict=True):
        item.layer.replace_prior(by_count[count][0])


def forget_compilation(model):
    """What Keras traced before would go on with the priors of that time."""
    model.compiled = False
    for part in model._flatten_layers():
        for kind in ("train", "test", "predict"):
            if getattr(part, f"{kind}_function", None) is not None:
                setattr(part, f"{kind}_function", None)


def _prior_with(layer, num_features):
    """A built copy of a layer's prior, with another number of features."""
    count = layer.feature_map.num_frequencies(num_features)
    prior = layer.spectral_prior.copy()
    prior.build((layer.num_key_value_heads, count, layer.key_dim))
    for ours, theirs in zip(
        prior.trainable_variables,
        layer.spectral_prior.trainable_variables,
        strict=True,
    ):
        ours.assign(theirs)
    return prior
