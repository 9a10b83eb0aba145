"""Any TFP distribution as a spectral prior."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_kt import _checks
from keras_kt.priors import base_noise
from keras_kt.priors.base import Frequencies, SpectralPrior, each_head


@keras.saving.register_keras_serializable(package="keras_kt")
class DistributionPrior(SpectralPrior):
    """Any TFP distribution that you write, trained through its samples.

    Samples are a function of stored uniform numbers: through quantile
    functions, coordinate by coordinate, and through the bijectors of
    transformed laws. So the draw is in the file, and the same eagerly, under
    XLA and in a server. `Independent`, `Sample`, `Blockwise`,
    `TransformedDistribution` (all multivariate normals among them), mixtures,
    the multivariate Student-t and laws on the sphere are taken apart; what is
    left must have a `quantile`. Other laws are refused when the layer is built.

    A `MixtureSameFamily` is stratified as in `MixturePrior`: components have
    equal shares of the frequencies, and their probabilities are weights.

    Args:
        distribution_fn: a function from a dict of tensors to a
            `tfd.Distribution` with batch shape `(heads,)` and event shape
            `(head_dim,)`, float32. Register it with
            `keras.saving.register_keras_serializable` to save the model. All
            that it trains must be among `parameters`.
        parameters: dict from a parameter's name to its initializer, or to
            `(shape, initializer)`. The shape may hold the word `"head_dim"` and
            defaults to `("head_dim",)`; a leading axis of heads is added.
        has_moment_generating_function: whether E exp(ω·z) is finite for all z,
            which positive features need. Defaults to `None`: known for TFP's
            normal, truncated, bounded and mixture families; for any other
            family positive features ask you to say so.
        parameter_regularizer: regularizer of every parameter.
        **kwargs: as in `SpectralPrior`; `kl_weight` in closed form where TFP
            registers one, else estimated from the draw. `scale_spread` is for
            the initializers to give.

    Two-sided features reflect frequencies about the mean, so for a skewed law
    they estimate the kernel of the symmetrised one.

    Examples:
        >>> @keras.saving.register_keras_serializable("my_project")
        ... def laplace(parameters):
        ...     scale = tf.nn.softplus(parameters["scale"])
        ...     return tfd.Independent(tfd.Laplace(parameters["loc"], scale), 1)
        >>> prior = keras_kt.DistributionPrior(
        ...     laplace, {"loc": "zeros", "scale": "ones"})
        >>> layer = keras_kt.KernelizedAttention(
        ...     2, 4, spectral_prior=prior, feature_map="trigonometric")
        >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
        TensorShape([1, 4, 3])
    """

    has_known_law = True

    def __init__(
        self,
        distribution_fn: Callable,
        parameters: dict,
        *,
        has_moment_generating_function: bool | None = None,
        parameter_regularizer: Any = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if self.scale_spread > 1.0:
            raise ValueError(
                "`scale_spread` is not known to DistributionPrior, which does "
                "not know your parameters' meaning. Received: scale_spread="
                f"{self.scale_spread}. Give initializers that differ by head."
            )
        if not callable(distribution_fn):
            raise ValueError(
                "`distribution_fn` must be a function from a dict of tensors "
                "to a tfd.Distribution. Received: "
                f"distribution_fn={distribution_fn}"
            )
        self.distribution_fn = distribution_fn
        self.parameters = {
            name: _parameter(name, value) for name, value in parameters.items()
        }
        if has_moment_generating_function is not None:
            has_moment_generating_function = _checks.boolean(
                "has_moment_generating_function",
                has_moment_generating_function,
            )
        self._declared_mgf = has_moment_generating_function
        self.parameter_regularizer = keras.regularizers.get(
            parameter_regularizer
        )

    def copy(self, **changes: Any) -> Any:
        return super().copy(
            **{"has_moment_generating_function": self._declared_mgf, **changes}
        )

    @property
    def has_moment_generating_function(  # type: ignore[override]
        self,
    ) -> bool:
        if self._declared_mgf is not None:
            return self._declared_mgf
        if not self.built:
            return True  # judged again once built
        from keras_kt.priors import reparameterization

        return reparameterization.has_entire_mgf(self.distribution())

    def build_parameters(self) -> None:
        self._parameter_weights = {}
        for name, (shape, initializer) in self.parameters.items():
            sizes = [self.head_dim if s == "head_dim" else s for s in shape]
            self._parameter_weights[name] = self.add_parameter(
                name,
                sizes,
                each_head(initializer),
                self.parameter_regularizer,
                is_paced=True,
            )
        from keras_kt.priors import law_checks, reparameterization

        # Eagerly, even if the layer is built in a graph.
        with tf.init_scope():
            law = self.distribution()
            law_checks.check_shape(law, self.num_heads, self.head_dim)
            size = law_checks.noise_size(law)
            log_probabilities, _ = reparameterization.mixture(law)
            components = 1
            if log_probabilities is not None:
                components = log_probabilities.shape[1]
            law_checks.check_count(self.num_frequencies, components)
            rows = -(-self.num_frequencies // components)
            self._noise_shape = self.num_heads, components, rows, size
            law_checks.check_training(self)

    def draw(self, seed: tf.Tensor) -> tf.Tensor:
        return base_noise.uniform(self._noise_shape, seed)

    def frequencies(self, noise: tf.Tensor) -> Frequencies:
        return self.frequencies_of(self.distribution(), noise)

    def frequencies_of(self, law: Any, noise: tf.Tensor) -> Frequencies:
        """The `Frequencies` that noise gives under a distribution."""
        from keras_kt.priors import reparameterization

        log_probabilities, law = reparameterization.mixture(law)
        is_mixture = log_probabilities is not None
        if not is_mixture:
            noise = noise[:, 0]
            log_probabilities = tf.zeros((self.num_heads, 1))
        # Rows lead, so that heads and components line up with the law's batch.
        rank = noise.shape.rank
        noise = tf.transpose(noise, (rank - 2, *range(rank - 2), rank - 1))
        samples = reparameterization.sampler(law).sample(noise)
        samples = tf.transpose(samples, (*range(1, rank - 1), 0, rank - 1))
        moments = None
        if self.has_moment_generating_function:
            moments = reparameterization.moments(law) or _moments_of(samples)
        if not is_mixture:
            samples = samples[:, tf.newaxis]
            moments = moments and [x[:, tf.newaxis] for x in moments]
        return _grouped(
            samples, moments, log_probabilities, self.num_frequencies
        )

    def describe(self) -> str:
        return f"{super().describe()} of {self.distribution().name}"

    def distribution(self) -> Any:
        return self.distribution_fn(self.parameter_values())

    def parameter_values(self) -> dict:
        """What `distribution_fn` gets: tensors `(heads, …)` by name."""
        if not hasattr(self, "_parameter_weights"):
            self.require_built()
        return {
            name: self.for_heads(weight)
            for name, weight in self._parameter_weights.items()
        }

    def kl_divergence(self) -> tf.Tensor:
        from tensorflow_probability import distributions as tfd

        law = self.distribution()
        zeros = tf.zeros((self.num_heads, self.head_dim))
        reference = tfd.MultivariateNormalDiag(loc=zeros)
        try:
            return tfd.kl_divergence(law, reference)
        except NotImplementedError:
            pass
        draw = self.frequencies(tf.convert_to_tensor(self.base_noise))
        omega, log_weights = draw.offsets, draw.log_weights
        rows = self.num_frequencies // log_weights.shape[1]
        if draw.means is not None:
            omega += tf.repeat(draw.means, rows, axis=1)
        weights = tf.repeat(tf.exp(log_weights), rows, axis=1)
        omega = tf.transpose(omega, (1, 0, 2))
        ratio = law.log_prob(omega) - reference.log_prob(omega)
        return tf.reduce_sum(weights * tf.transpose(ratio), axis=1)

    def get_config(self):
        return {
            **super().get_config(),
            "distribution_fn": _serialized(self.distribution_fn),
            "parameters": {
                name: [list(shape), keras.initializers.serialize(initializer)]
                for name, (shape, initializer) in self.parameters.items()
            },
            "has_moment_generating_function": self._declared_mgf,
            "parameter_regularizer": keras.regularizers.serialize(
                self.parameter_regularizer
            ),
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        if isinstance(config["distribution_fn"], dict):
            config["distribution_fn"] = keras.saving.deserialize_keras_object(
                config["distribution_fn"]
            )
        return cls(**config)


def _parameter(name, value):
    """`(shape, initializer)` of one entry of `parameters`."""
    shape, initializer = ("head_dim",), value
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(
                "`parameters` must map names to an initializer or to (shape, "
                f"initializer). Received: {name!r}: {value!r}"
            )
        shape, initializer = value
    if hasattr(shape, "shape"):
        shape = _checks.integers("parameters", shape)
    shape = tuple(
        size
        if size == "head_dim"
        else _checks.integer(f"parameters[{name!r}]", size)
        for size in shape
    )
    return shape, keras.initializers.get(initializer)


def _serialized(function):
    try:
        return keras.saving.serialize_keras_object(function)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`distribution_fn` must be a function that Keras can find again "
            "for the model to be saved. Received: "
            f"{function}. Write a function by `def`, decorated with "
            "`@keras.saving.register_keras_serializable()`, or save weights "
            "only, by `save_weights`."
        ) from error


def _moments_of(samples):
    """Mean and variances of the draw itself, over its rows."""
    mean = tf.reduce_mean(samples, axis=-2)
    return mean, tf.math.reduce_variance(samples, axis=-2)


def _grouped(samples, moments, log_probabilities, count):
    """`Frequencies` of `(heads, components, rows, head_dim)` samples."""
    heads, components, rows, dim = samples.shape
    counts = [rows] * components
    if count < rows * components:
        # Shares differ by one, and each frequency is a group of its own.
        counts = [
            count // components + (c < count % components)
            for c in range(components)
        ]
    log_counts = tf.math.log(tf.constant(counts, tf.float32))
    omega = tf.concat([samples[:, c, :n] for c, n in enumerate(counts)], axis=1)
    log_weights = log_probabilities - log_counts
    is_even = len(set(counts)) == 1
    repeats = [1] * components if is_even else counts
    log_weights = tf.repeat(log_weights, repeats, axis=1)
    if moments is None:
        weights = tf.repeat(tf.exp(log_weights), count // sum(repeats), axis=1)
        second = tf.einsum("hm,hmd->hd", weights, tf.square(omega))
        return Frequencies(omega, None, log_weights, second[:, tf.newaxis])
    mean, covariance = moments
    mean = tf.broadcast_to(mean, (heads, components, dim))
    offsets = omega - tf.repeat(mean, counts, axis=1)
    return Frequencies(
        offsets,
        tf.repeat(mean, repeats, axis=1),
        log_weights,
        tf.repeat(covariance, repeats, axis=1),
    )
