"""What a distribution must be, and do, to be a spectral prior."""

import tensorflow as tf
import tensorflow_probability as tfp

from keras_kt.priors import reparameterization

tfd = tfp.distributions


def check_shape(law, heads: int, head_dim: int) -> None:
    """Raises a `ValueError` unless `law` has the shapes of a prior."""
    if not isinstance(law, tfd.Distribution):
        raise ValueError(
            f"`distribution_fn` must return a tfd.Distribution. Received: {law}"
        )
    if law.dtype != tf.float32:
        raise ValueError(
            "`distribution_fn` must return a float32 distribution, as "
            "frequencies are float32 under any policy. Received: "
            f"{law.name} of dtype {law.dtype}. Cast what it is made of."
        )
    batch, event = tuple(law.batch_shape), tuple(law.event_shape)
    if batch != (heads,) or event != (head_dim,):
        raise ValueError(
            "`distribution_fn` must return batch shape (heads,) and event "
            f"shape (head_dim,), here {(heads,)} and {(head_dim,)}. Received: "
            f"batch shape {batch}, event shape {event}. "
            "`tfd.Independent(..., 1)` turns the last batch axis into the "
            "event."
        )


def noise_size(law) -> int:
    """How many uniform numbers make one frequency, or why none do."""
    _, parts = reparameterization.mixture(law)
    try:
        return reparameterization.sampler(parts).size
    except NotImplementedError as error:
        if parts.reparameterization_type != tfd.FULLY_REPARAMETERIZED:
            raise ValueError(
                "A spectral prior is trained through its samples, so its "
                "distribution must be fully reparameterised. Received: "
                f"{law.name}, which is {parts.reparameterization_type}. Use a "
                "reparameterised family, or `GeneratorPrior`."
            ) from error
        raise ValueError(
            "`distribution_fn` must return a law whose samples are a known "
            "function of uniform numbers, so that one stored draw is the same "
            "eagerly, under XLA and in a server; TFP's samplers are not. "
            f"Received: {law.name}, for whose part {error} none is known. "
            "Make it of laws that have a `quantile`, by tfd.Independent, "
            "tfd.TransformedDistribution, tfd.Blockwise or a "
            "tfd.MixtureSameFamily on the outside, or write a SpectralPrior "
            "with a `draw` of its own."
        ) from error


def check_count(num_frequencies: int, components: int) -> None:
    """Raises a `ValueError` if a component would get no frequency."""
    if num_frequencies < components:
        raise ValueError(
            "`num_features` must give each component of the mixture that "
            "`distribution_fn` returns a frequency. Received: "
            f"{num_frequencies} frequencies for {components} components. "
            "Raise `num_features`."
        )


def check_training(prior) -> None:
    """Raises a `ValueError` if a prior would train in part, or to NaN.

    Args:
        prior: a `DistributionPrior` that has its weights and can be sampled.
    """
    noise = prior.draw(tf.constant([1, 2]))
    names = list(prior.parameters)

    # In a graph, which knows all the variables that it reads.
    @tf.function(autograph=False)
    def gradients_of_samples():
        values = prior.parameter_values()
        law = prior.distribution_fn(values)
        draw = prior.frequencies_of(law, noise)
        # Squares, as the sum of a law's shares does not move.
        total = tf.add_n(
            [tf.reduce_sum(tf.square(x)) for x in draw if x is not None]
        )
        return tf.gradients(total, [values[name] for name in names])

    try:
        traced = gradients_of_samples.get_concrete_function()
    except ValueError as error:
        if "tf.Variable" not in str(error):
            raise
        raise _stray("variables that it makes anew at each call") from error
    own = set()
    for weight in prior.weights:
        # Under a strategy there is one for each replica.
        variable = weight.value
        own |= {id(variable), *map(id, getattr(variable, "values", ()))}
    stray = [
        f"{variable.name} {tuple(variable.shape)}"
        for variable in traced.graph.variables
        if id(variable) not in own
    ]
    if stray:
        raise _stray(f"the variables {stray}")
    for name, gradient in zip(names, traced(), strict=True):
        if gradient is None:
            raise ValueError(
                "Every entry of `parameters` must move the samples of the "
                f"distribution. Received: {name!r}, on which they do not "
                "depend, so that it would never be trained. Leave it out, or "
                "use it in `distribution_fn`."
            )
        if not tf.reduce_all(tf.math.is_finite(gradient)):
            raise ValueError(
                "The samples of the distribution must have finite gradients. "
                f"Received: gradients to the parameter {name!r} that are not, "
                f"for {prior.distribution().name} at its start. Start "
                "elsewhere, or take another law."
            )


def _stray(what):
    return ValueError(
        "`distribution_fn` must get all that is trained from its argument. "
        f"Received: a function that also reads {what}, which would be neither "
        "trained nor saved with the layer. Make each an entry of "
        "`parameters`, with its shape and initializer."
    )
