"""Recipes: what is given to one or many layers, each of which builds a copy."""

import inspect
from typing import Any

from keras_kt import _checks
from keras_kt._pace import PacedLayer


class Recipe(PacedLayer):
    """A float32 layer that can be copied before it is built.

    The base of spectral priors and feature maps. Their parameters stay float32
    under any policy: an error in ω·x is a relative error of the kernel.

    Args:
        pace: how many times as fast as other weights its own move. Defaults to
            `None`, which means the `spectral_pace` of the layer that owns it.
    """

    # Arguments of base classes, which `**kwargs` of a constructor take.
    inherited: tuple[str, ...] = ("name", "trainable", "pace")

    def __new__(cls, *args, **kwargs):
        recipe = super().__new__(cls, *args, **kwargs)
        # Past Keras, which would track the containers among them.
        object.__setattr__(recipe, "_given", (args, kwargs))
        return recipe

    def __init__(self, *, pace: float | None = None, **kwargs: Any):
        super().__init__(**{**_checks.keywords(kwargs), "dtype": "float32"})
        self.pace = _checks.number("pace", pace, is_open=True, optional=True)

    def copy(self, **changes: Any) -> Any:
        """An unbuilt recipe like this one, but for some arguments.

        Arguments are handed on as they are, so that what cannot be saved can be
        copied all the same. An argument counts as its attribute says now.
        """
        args, kwargs = self._given
        signature = inspect.signature(type(self).__init__)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = dict(list(bound.arguments.items())[1:])
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given.update(given.pop(name))
                given.update(dict.fromkeys(self.inherited))
        given.pop("dtype", None)
        given = {name: getattr(self, name, x) for name, x in given.items()}
        return type(self)(**{**given, **changes})

    def get_config(self):
        config = super().get_config()
        config.pop("dtype", None)
        return {**config, "pace": self.pace}
