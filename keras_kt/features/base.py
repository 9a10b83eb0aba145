"""Feature maps: from a query or key to its features φ_ω(x), per head.

Equations 5-9 of arXiv 2110.08323; the paper's M is `num_frequencies` here. A
map is bound to one draw of `Frequencies`, which gives functions of queries and
of keys from `(batch, heads, length, head_dim)` to
`(batch, heads, length, feature_dim)`.
"""

from typing import Any

import tensorflow as tf

from keras_kt._recipe import Recipe
from keras_kt.priors import Frequencies, SpectralPrior


class FeatureMap(Recipe):
    """Base class of the feature maps; like a prior, a recipe until built.

    Args:
        **kwargs: `pace`, as in the layer's `spectral_pace`; `name`.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(2, 8)
        >>> isinstance(layer.feature_map, keras_kt.FeatureMap)
        True
        >>> layer.feature_map.num_frequencies(32)
        16
    """

    # Features per frequency.
    sides = 1
    # E cos ω·(x − y) and the map's `smoothing_weights`.
    is_shift_invariant = False
    # Of N(μ, I) it is exp(x·y), up to factors of x and exp(μ·y).
    is_softmax = False
    # Whether a layer's `qk_norm="auto"` is "l2".
    needs_unit_norm = False
    # Whether its bound maps have `weighing_keys`, for `qk_norm="weighted"`.
    can_weigh_keys = False

    def num_frequencies(self, num_features: int) -> int:
        """Frequencies that give `num_features` features."""
        if num_features % self.sides:
            raise ValueError(
                f"`num_features` must be even for {type(self).__name__}, which "
                "makes two features from each frequency. Received: "
                f"num_features={num_features}. Choose {num_features + 1}."
            )
        return num_features // self.sides

    def default_num_features(self, prior: SpectralPrior, head_dim: int) -> int:
        """One whole block of the coupling for each component."""
        return self.sides * prior.block_size(head_dim)

    def feature_dim(self, num_features: int) -> int:
        """Width of φ with what the map adds to `num_features`."""
        return num_features

    def validate(self, prior: SpectralPrior) -> None:
        """Raises a `ValueError` if the prior gives no kernel with this map."""
        # AutoGraph, which drops docstrings, fails on a body that has no more.
        return None

    def initial_temperature(
        self, head_dim: int, *, weighs_keys: bool = False
    ) -> float:
        """At which the temperature of normalized queries and keys starts.

        Args:
            head_dim: of queries and keys.
            weighs_keys: whether keys weigh by their length as well.
        """
        return 1.0

    def build(self, num_heads):
        """Creates the weights, if the map has any."""
        self.built = True

    def bind(
        self,
        frequencies: Frequencies,
        scale: float = 1.0,
        *,
        is_absolute: bool = False,
    ) -> Any:
        """The map φ(scale · x) for one draw of frequencies.

        Args:
            frequencies: `Frequencies`.
            scale: factor of queries and keys.
            is_absolute: whether features of queries have to be comparable with
                `exact_kernel`, as for a near field, and not only with those of
                the same query.

        Returns:
            A named tuple of tensors with `queries` and `keys`, functions to
            features, or to their logarithms if its `positive` is true; and
            `width`, the size of their last axis.
        """
        raise NotImplementedError

    def cancels_mean(self, prior: SpectralPrior) -> bool:
        """Whether a mean of the prior has no part in the weights of keys."""
        return False

    def is_tilted(self, prior: SpectralPrior) -> bool:
        """Whether the prior's mean μ weighs keys y by exp(μ·y), as softmax of
        queries that are shifted by μ."""
        return False

    def logits(
        self, prior: SpectralPrior, query: tf.Tensor, key: tf.Tensor
    ) -> tf.Tensor:
        """Logits of the softmax that the kernel stands for, with Σ = I.

        Args:
            prior: a built prior.
            query, key: `(batch, length, heads, head_dim)`, scaled. As many
                query heads in a row share each head of keys, and of the prior.

        Returns:
            `(batch, query_heads, query_length, key_length)`.
        """
        repeats = query.shape[2] // key.shape[2]
        repeated = tf.repeat(key, repeats, axis=2)
        logits = tf.einsum("bthd,bshd->bhts", query, repeated)
        if self.is_tilted(prior):
            tilt = tf.einsum("hd,bshd->bhs", prior.mean[:, 0], key)
            logits += tf.repeat(tilt, repeats, axis=1)[:, :, tf.newaxis]
        return logits

    def has_exact_kernel(self, prior: SpectralPrior) -> bool:
        """Whether `exact_kernel` has a kernel to give; of recipes, too."""
        return False

    def exact_kernel(self, prior: SpectralPrior, scale: float = 1.0) -> Any:
        """The kernel that features estimate, in closed form.

        Args:
            prior: a built prior.
            scale: factor of queries and keys, as in `bind`.

        Returns:
            An `ExactKernel`, or `None` where no closed form is known.
        """
        return None


def per_feature(components: tf.Tensor, count: int) -> tf.Tensor:
    """Repeats the last axis, components, to `count` frequencies; not a one."""
    if components.shape[-1] == 1:
        return components
    return tf.repeat(components, count // components.shape[-1], axis=-1)
