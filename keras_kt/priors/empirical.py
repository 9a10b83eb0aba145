"""Frequencies that are weights themselves: a law of point masses."""

from typing import Any

import keras
import tensorflow as tf

from keras_kt import _checks
from keras_kt.priors import base_noise
from keras_kt.priors.base import Frequencies, SpectralPrior, no_density


@keras.saving.register_keras_serializable(package="keras_kt")
class EmpiricalPrior(SpectralPrior):
    """Equally likely frequencies, each of them trained.

    The kernel is exactly that of its points, so nothing depends on a draw: what
    `FastFoodPrior` is with fewer weights, and what any law that is only ever
    seen through one stored draw comes to. With self-normalized positive
    features this is the map of Hedgehog.

    Args:
        initial_scale: standard deviation of the points at the start. Defaults
            to 1.
        tied: whether queries and keys have the same points. With `False` keys
            start at those of queries and learn their own: a bilinear form, no
            kernel any more, and no longer symmetric. Defaults to `True`.
        coupling, radius: of the points at the start, as in `NormalPrior`.
        regularizer: of the points.
        **kwargs: as in `SpectralPrior`.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(
        ...     2, 8, spectral_prior=keras_kt.EmpiricalPrior(), num_features=32)
        >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
        TensorShape([1, 4, 3])
        >>> layer.spectral_prior.points.shape
        TensorShape([2, 16, 8])
    """

    has_draw = False

    def __init__(
        self,
        initial_scale: float = 1.0,
        *,
        tied: bool = True,
        coupling: str = "orthogonal",
        radius: str = "fixed",
        regularizer: Any = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if self.kl_weight:
            raise ValueError(no_density("kl_weight", "EmpiricalPrior"))
        self.initial_scale = _checks.number(
            "initial_scale", initial_scale, is_open=True
        )
        self.tied = self.has_known_law = _checks.boolean("tied", tied)
        self.coupling = _checks.choice(
            "coupling", coupling, base_noise.COUPLINGS
        )
        self.radius = _checks.choice("radius", radius, base_noise.RADII)
        self.regularizer = keras.regularizers.get(regularizer)

    def build_parameters(self) -> None:
        points = self._initial_noise(self._draw_seed)
        scales = self.initial_scale * self.head_scales()
        points = points * scales[:, None, None]

        def add(name):
            return self.add_parameter(
                name,
                points.shape[1:],
                lambda shape, dtype: points.astype(dtype),
                self.regularizer,
                is_paced=True,
            )

        self._points = add("points")
        self._key_points = None if self.tied else add("key_points")

    @property
    def points(self) -> tf.Tensor:
        """The frequencies, `(heads, num_frequencies, head_dim)`."""
        self.require_built()
        return self.for_heads(self._points)

    def draw(self, seed: tf.Tensor) -> tf.Tensor:
        """The points that it starts at, in standard units."""
        heads = self.num_heads if self.per_head else 1
        return base_noise.draw(
            (heads, self.num_frequencies, self.head_dim),
            seed,
            coupling=self.coupling,
            radius=self.radius,
        )

    def frequencies(self, noise: tf.Tensor | None = None) -> Frequencies:
        of_keys = None if self.tied else self.for_heads(self._key_points)
        return Frequencies.of_samples(self.points, of_keys)

    def distribution(self) -> Any:
        """The uniform distribution over the points, `tfd.Empirical`."""
        self.require_built()
        if not self.tied:
            raise ValueError(
                "EmpiricalPrior(tied=False) has no distribution: keys have "
                "points of their own, so the weights are no kernel. Use "
                "tied=True where one is needed."
            )
        from tensorflow_probability import distributions as tfd

        return tfd.Empirical(self.points, event_ndims=1)

    def get_config(self):
        return {
            **super().get_config(),
            "initial_scale": self.initial_scale,
            "tied": self.tied,
            "coupling": self.coupling,
            "radius": self.radius,
            "regularizer": keras.regularizers.serialize(self.regularizer),
        }
