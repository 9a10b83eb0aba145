"""The law of a generator's frequencies, as a TFP distribution.

Imported when it is asked for, since TFP takes seconds to import.
"""

import tensorflow as tf
import tensorflow_probability as tfp

from keras_kt.priors.base import no_density


class GeneratorLaw(tfp.distributions.Distribution):
    """The law of g(ε), for sampling."""

    def __init__(self, prior):
        self._prior = prior
        super().__init__(
            dtype=tf.float32,
            reparameterization_type=tfp.distributions.FULLY_REPARAMETERIZED,
            validate_args=False,
            allow_nan_stats=True,
            name="Generator",
        )

    def _batch_shape(self):
        return tf.TensorShape([self._prior.num_heads])

    def _event_shape(self):
        return tf.TensorShape([self._prior.head_dim])

    def _sample_n(self, n, seed=None):
        prior = self._prior
        size = prior.noise_dim or prior.head_dim
        noise = tf.random.stateless_normal(
            (prior.num_heads, n, size), tfp.random.sanitize_seed(seed)
        )
        return tf.transpose(prior.generate(noise), (1, 0, 2))

    def _log_prob(self, value):
        raise NotImplementedError(no_density("log_prob", "GeneratorPrior"))
