"""Spectral priors: the first of the three axes, prior × map × algorithm."""

import keras

from keras_kt.priors.base import Frequencies, SpectralPrior
from keras_kt.priors.distribution import DistributionPrior
from keras_kt.priors.empirical import EmpiricalPrior
from keras_kt.priors.fastfood import FastFoodPrior
from keras_kt.priors.gaussian import GaussianPrior, MixturePrior, NormalPrior
from keras_kt.priors.generator import GeneratorPrior

__all__ = [
    "DistributionPrior",
    "EmpiricalPrior",
    "FastFoodPrior",
    "Frequencies",
    "GaussianPrior",
    "GeneratorPrior",
    "MixturePrior",
    "NormalPrior",
    "SpectralPrior",
    "get",
]

_FAMILIES = {
    "normal": NormalPrior,
    "mixture": MixturePrior,
    "fastfood": FastFoodPrior,
    "generator": GeneratorPrior,
    "empirical": EmpiricalPrior,
}


def get(identifier) -> SpectralPrior:
    """Resolves a name or an instance to a `SpectralPrior`."""
    if isinstance(identifier, SpectralPrior):
        return identifier
    if isinstance(identifier, dict):
        return get(keras.saving.deserialize_keras_object(identifier))
    if isinstance(identifier, str) and identifier in _FAMILIES:
        return _FAMILIES[identifier]()
    raise ValueError(
        f"`spectral_prior` must be one of {sorted(_FAMILIES)} or an instance "
        "of keras_kt.SpectralPrior (DistributionPrior takes a TFP "
        f"distribution). Received: spectral_prior={identifier}"
    )
