"""Feature maps: the second of the three axes, prior × map × algorithm."""

import keras

from keras_kt.features.base import FeatureMap
from keras_kt.features.positive import (
    ExactKernel,
    PositiveFeatures,
    PositiveMap,
)
from keras_kt.features.trigonometric import (
    TrigonometricFeatures,
    TrigonometricMap,
)

__all__ = [
    "ExactKernel",
    "FeatureMap",
    "PositiveFeatures",
    "PositiveMap",
    "TrigonometricFeatures",
    "TrigonometricMap",
    "get",
]


_MAPS = {
    "positive": PositiveFeatures,
    "prf": PositiveFeatures,
    "trigonometric": TrigonometricFeatures,
    "rks": TrigonometricFeatures,
}


def get(identifier) -> FeatureMap:
    """Resolves a name or an instance to a `FeatureMap`."""
    if isinstance(identifier, FeatureMap):
        return identifier
    if isinstance(identifier, dict):
        return get(keras.saving.deserialize_keras_object(identifier))
    if isinstance(identifier, str) and identifier in _MAPS:
        return _MAPS[identifier]()
    raise ValueError(
        f"`feature_map` must be one of {sorted(_MAPS)} or an instance of "
        "keras_kt.FeatureMap. Received: "
        f"feature_map={identifier}"
    )
