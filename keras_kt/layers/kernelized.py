"""What a layer around a `LinearAttention` shows of it."""

from typing import Any

import keras
import tensorflow as tf

from keras_kt.priors import SpectralPrior


def _of_heads(name, doc):
    """An attribute that is the `LinearAttention`'s."""

    def read(layer):
        return getattr(layer.heads_attention(), name)

    def write(layer, value):
        setattr(layer.heads_attention(), name, value)

    return property(read, write, doc=doc)


class Kernelized(keras.Layer):
    """Attributes and methods of the `LinearAttention` within a layer.

    A subclass has `heads_attention`, which returns that.
    """

    num_heads = _of_heads("num_heads", "Number of query heads.")
    num_key_value_heads = _of_heads(
        "num_key_value_heads",
        "Number of heads of key and value, kernels and states.",
    )
    key_dim = _of_heads("key_dim", "Size of queries and keys per head.")
    value_dim = _of_heads("value_dim", "Size of values per head.")
    seed = _of_heads("seed", "As given.")
    num_features = _of_heads("num_features", "As given, or replaced.")
    qk_norm = _of_heads("qk_norm", "As given.")
    redraw = _of_heads("redraw", "As given.")
    implementation = _of_heads("implementation", "As given.")
    decay = _of_heads("decay", "As given.")
    near_field = _of_heads("near_field", "As given.")
    sliding_window = _of_heads("sliding_window", "As given.")
    rotary_max_wavelength = _of_heads("rotary_max_wavelength", "As given.")
    spectral_pace = _of_heads("spectral_pace", "As given.")
    spectral_prior = _of_heads(
        "spectral_prior", "The built prior; before `build`, the recipe."
    )
    feature_map = _of_heads(
        "feature_map", "The built feature map; before `build`, the recipe."
    )
    spectral_weights = _of_heads(
        "spectral_weights",
        "The trainable weights of the kernel: of the prior and the feature "
        "map, and the temperature. Their names begin with `spectral_`; they "
        "are values divided by `spectral_pace`.",
    )
    temperature = _of_heads(
        "temperature", "What a norm of queries and keys has learned, or `None`."
    )
    weighs_keys = _of_heads(
        "weighs_keys",
        "Whether keys weigh by their length, which `scaled` leaves them.",
    )
    state_shapes = _of_heads(
        "state_shapes",
        "Shapes of the state's tensors, as a state; `None` for the batch.",
    )

    def initial_state(self, batch_size: int | tf.Tensor) -> Any:
        """The state of a causal stream that has seen nothing.

        Args:
            batch_size: number of streams, an integer or a scalar tensor.

        Returns:
            `AttentionState`, `NearFieldState` or `WindowState` of float32
            tensors; in a `RotaryState` if there are rotary positions. Needs no
            built layer.
        """
        return self.heads_attention().initial_state(batch_size)

    def scaled(
        self,
        query: tf.Tensor,
        key: tf.Tensor,
        key_mask: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Projected heads as the kernel takes them, float32.

        As `LinearAttention.scaled`.
        """
        return self.heads_attention().scaled(query, key, key_mask)

    def bound(self) -> Any:
        """The feature map of the stored draw, a function of `scaled` heads.

        As `LinearAttention.bound`.
        """
        return self.heads_attention().bound()

    def exact_kernel(self) -> Any:
        """The kernel of `scaled` heads in closed form, or `None`.

        As `LinearAttention.exact_kernel`.
        """
        return self.heads_attention().exact_kernel()

    def replace_prior(self, prior: SpectralPrior) -> None:
        """Puts a built prior in the place of the layer's own.

        As `LinearAttention.replace_prior`.
        """
        self.heads_attention().replace_prior(prior)
