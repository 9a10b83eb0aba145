"""What keys weigh in attention: where prior and feature map meet."""

import functools
import warnings
from typing import Any

import keras
import tensorflow as tf

from keras_kt import _checks, features, ops, priors
from keras_kt.features import FeatureMap
from keras_kt.layers import evaluated, rotary
from keras_kt.layers.scaling import Decay, UnitNorm, checked_rates
from keras_kt.priors import SpectralPrior

REDRAWS = ("never", "step")
QK_NORMS = ("auto", None, "l2", "weighted")
DECAYS = (None, "constant", "gated")
_COUNT = functools.partial(_checks.integer, optional=True)
# Which check the value of an argument has to pass, to leave as plain Python.
ARGUMENTS = {
    "num_features": _COUNT,
    "qk_norm": functools.partial(_checks.choice, choices=QK_NORMS),
    "redraw": functools.partial(_checks.choice, choices=REDRAWS),
    "decay": functools.partial(_checks.choice, choices=DECAYS),
    "near_field": _COUNT,
    "sliding_window": _COUNT,
    "rotary_max_wavelength": functools.partial(
        _checks.number, is_open=True, optional=True
    ),
    "spectral_pace": functools.partial(_checks.number, is_open=True),
    "seed": functools.partial(_checks.integer, minimum=None, optional=True),
}
# From results/options: normal:trigonometric, with --qk-norm none and without.
NORMS_WARNING = (
    "Trigonometric features train badly where queries and keys are not "
    "normalized: in a study of look-ups 0.36, 0.95 and 0.37 of the answers "
    "were right at three seeds, and 0.97 at each where they are. Received: "
    'qk_norm=None. Leave it at "auto", or use "l2" or "weighted".'
)


class LearnedKernel(keras.layers.Layer):
    """Base of `LinearAttention`: what keys weigh, and what that learns.

    Prior, feature map and draw, temperature, near field, window and decay.

    A subclass has `key_dim` and calls `build_kernel` when it is built.
    """

    def __init__(
        self,
        *,
        spectral_prior,
        feature_map,
        num_features,
        qk_norm,
        redraw,
        decay,
        near_field,
        sliding_window,
        rotary_max_wavelength,
        spectral_pace,
        seed,
        **kwargs,
    ):
        plain = _checks.plain(
            ARGUMENTS,
            num_features=num_features,
            qk_norm=qk_norm,
            redraw=redraw,
            decay=decay,
            near_field=near_field,
            sliding_window=sliding_window,
            rotary_max_wavelength=rotary_max_wavelength,
            spectral_pace=spectral_pace,
            seed=seed,
        )
        super().__init__(**_checks.keywords(kwargs))
        for name, value in plain.items():
            setattr(self, name, value)
        self._recipes = _Recipes(
            priors.get(spectral_prior), features.get(feature_map)
        )
        self.unit_norm = self.decay_rates = None
        self._warned_of_norms = False
        self._check_norm()
        self._check_near_field()
        self._check_redraw()

    @property
    def spectral_prior(self) -> SpectralPrior:
        """The built prior; before `build`, the recipe."""
        return getattr(self, "_spectral_prior", self._recipes.spectral_prior)

    @property
    def feature_map(self) -> FeatureMap:
        """The built feature map; before `build`, the recipe."""
        return getattr(self, "_feature_map", self._recipes.feature_map)

    @property
    def spectral_weights(self) -> list:
        """The trainable weights of the kernel: of the prior and the feature
        map, and the temperature. Their names begin with `spectral_`."""
        layers = self.spectral_prior, self.feature_map, self.unit_norm
        return [w for layer in layers if layer for w in layer.trainable_weights]

    @property
    def temperature(self) -> tf.Tensor | None:
        """What a norm of queries and keys has learned, `(heads, 1)`.

        `None` without one, and before the layer is built.
        """
        return self.unit_norm and self.unit_norm.temperature

    @property
    def weighs_keys(self) -> bool:
        """Whether keys weigh by their length, which `scaled` leaves them."""
        return self.qk_norm == "weighted"

    def _has_unit_norm(self):
        if self.qk_norm == "auto":
            return self.feature_map.needs_unit_norm
        return self.qk_norm is not None

    def _check_norm(self):
        if self.weighs_keys and not self.feature_map.can_weigh_keys:
            raise ValueError(
                '`qk_norm="weighted"` needs trigonometric features. Received: '
                f"qk_norm={self.qk_norm!r} with "
                f"{type(self.feature_map).__name__}, in which long keys weigh "
                'more as they are. Leave `qk_norm` out, or use "l2".'
            )

    def _resolved_features(self):
        if self.num_features is not None:
            return self.num_features
        return self.feature_map.default_num_features(
            self.spectral_prior, self.key_dim
        )

    @property
    def feature_dim(self) -> int:
        """Width of φ with what the map adds to `num_features`."""
        return self.feature_map.feature_dim(self._resolved_features())

    def frequency_count(self) -> int:
        """How many frequencies there are, or what is wrong with them."""
        self.feature_map.validate(self.spectral_prior)
        num_features = self._resolved_features()
        count = self.feature_map.num_frequencies(num_features)
        self.spectral_prior.validate(count, num_features)
        return count

    def _check_near_field(self):
        prior, feature_map = self.spectral_prior, self.feature_map
        if self.near_field and self.sliding_window:
            raise ValueError(
                "`near_field` has features beyond it, `sliding_window` nothing:"
                " only one of them can be. Received: near_field="
                f"{self.near_field}, sliding_window={self.sliding_window}. "
                "Leave one out."
            )
        if self.near_field and not feature_map.has_exact_kernel(prior):
            raise ValueError(
                "`near_field` needs a kernel in closed form: positive features "
                "of a NormalPrior or MixturePrior. Received: near_field="
                f"{self.near_field} with {type(feature_map).__name__} of a "
                f"{type(prior).__name__}. Choose among these, or leave "
                "`near_field` out."
            )

    def _check_redraw(self):
        if self.redraw == "step" and not self.spectral_prior.has_draw:
            raise ValueError(
                '`redraw="step"` needs a prior whose frequencies are drawn. '
                f"Received: redraw='step' with {self.spectral_prior.describe()}"
                ", whose frequencies are weights. Leave `redraw` out."
            )

    def build_kernel(self, num_heads):
        """Creates the weights of so many heads."""
        # The draw, the redraws and a caller's dropout need streams of their
        # own.
        draw, redraw = (
            None if self.seed is None else self.seed + i for i in (1, 2)
        )
        self._spectral_prior = self._recipes.prior_copy(
            draw, self.spectral_pace
        )
        self._feature_map = self._recipes.feature_map_copy(self.spectral_pace)
        self._spectral_prior.build(
            (num_heads, self.frequency_count(), self.key_dim)
        )
        self._feature_map.build(num_heads)
        # Some priors know only now whether they have what the map needs.
        self._feature_map.validate(self._spectral_prior)
        if self._has_unit_norm():
            self.unit_norm = UnitNorm(
                self.feature_map.initial_temperature(
                    self.key_dim, weighs_keys=self.weighs_keys
                ),
                self.spectral_pace,
                name="qk_norm",
            )
            self.unit_norm.build(num_heads)
        if self.decay == "constant":
            self.decay_rates = Decay(is_gated=False, name="decay")
            self.decay_rates.build((num_heads, None))
        if self.redraw == "step":
            self._redraw_seed = keras.random.SeedGenerator(redraw)

    def replace_prior(self, prior: SpectralPrior) -> None:
        """Puts a built prior in the place of the layer's own.

        Args:
            prior: a built `SpectralPrior` for as many heads of the same size;
                its number of frequencies may be another, and sets
                `num_features`.
        """
        self._tracker.replace_tracked_value(
            "layers", self._spectral_prior, prior
        )
        self._spectral_prior = prior
        self.num_features = prior.num_frequencies * self._feature_map.sides

    def scaled(
        self,
        query: tf.Tensor,
        key: tf.Tensor,
        key_mask: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Heads as the kernel takes them: scaled, or normalized by `qk_norm`.

        Keys that weigh by their length (`weighs_keys`) have it here, too.

        Args:
            query: `(batch, query_length, heads, key_dim)`.
            key: `(batch, key_length, heads, key_dim)`.
            key_mask: `(batch, key_length)` boolean, by which rotary positions
                count. Defaults to `None`: keys are visible.

        Returns:
            Both, float32. Weights of keys are the kernel of these.
        """
        query, key = self.rotated(query, key, key_mask)
        query, key, scale = self._normalized(query, key)
        return scale * query, scale * key

    def bound(self) -> Any:
        """The feature map of the stored draw, a function of `scaled` heads.

        Its `queries` and `keys` take and give `(batch, heads, length, dim)`;
        logarithms of features where its `positive` is true. Needs a built
        layer.
        """
        return self._bind(self.spectral_prior.stored_frequencies())

    def exact_kernel(self) -> Any:
        """The kernel of `scaled` heads in closed form, an `ExactKernel`.

        `None` where no closed form is known. Needs a built layer.
        """
        return self.feature_map.exact_kernel(self.spectral_prior)

    def rotated(self, query, key, key_mask=None, start=None):
        """Float32 heads, turned if the layer has rotary positions.

        Args:
            query, key, key_mask: as in `scaled`.
            start: `(batch,)`, places of the first tokens; or `None`: 0.
        """
        heads = [tf.cast(x, tf.float32) for x in (query, key)]
        wavelength = self.rotary_max_wavelength
        if wavelength is None:
            return heads
        return rotary.rotate(*heads, wavelength, key_mask=key_mask, start=start)

    def _normalized(self, query, key):
        """Heads, and the factor of both that `scaled` applies."""
        if self.unit_norm is None:
            return query, key, self.key_dim**-0.25
        query = self.unit_norm(query)
        if self.weighs_keys:
            return query, self.unit_norm.keys_with_length(key), 1.0
        return query, self.unit_norm(key), 1.0

    def kernel_inputs(self, query, key, training=False):
        """What `ops.attend` takes: heads, and the bound map that scales them.

        Args:
            query, key: float32, as `rotated` gives them.
            training: whether to redraw.

        Returns:
            Float32 queries and keys, the map, and a `NearField` or `None`.
        """
        query, key, scale = self._normalized(query, key)
        if not training:
            return query, key, *evaluated.of(self, lambda: self._kernel(scale))
        self._warn_of_norms()
        seed = None
        if self.redraw == "step":
            seed = tf.cast(self._redraw_seed.next(), tf.int64) % (2**31 - 1)
            seed = tf.cast(seed, tf.int32)
        return query, key, *self._kernel(scale, seed)

    def _kernel(self, scale, seed=None):
        """The bound map that scales heads, and a `NearField` or `None`."""
        frequencies = self._spectral_prior(seed=seed)
        near = None
        if self.near_field or self.sliding_window:
            near = ops.NearField(
                self._feature_map.exact_kernel(self._spectral_prior, scale),
                self.near_field or self.sliding_window,
                has_far=self.sliding_window is None,
            )
        return self._bind(frequencies, scale), near

    def _bind(self, frequencies, scale=1.0):
        bound = self.feature_map.bind(
            frequencies, scale, is_absolute=self.near_field is not None
        )
        if self.weighs_keys:
            return bound.weighing_keys(self.unit_norm.temperature)
        return bound

    def _warn_of_norms(self):
        if self._warned_of_norms or self.unit_norm is not None:
            return
        self._warned_of_norms = True
        if self.feature_map.needs_unit_norm:
            warnings.warn(NORMS_WARNING, stacklevel=2)

    def rates(self, key, decay):
        """The decay of each token, the layer's or the caller's; or `None`."""
        if (decay is not None) != (self.decay == "gated"):
            raise ValueError(
                "`decay` of a call, the rate of each token, belongs to "
                'decay="gated" and is needed there. Received: layer '
                f"{self.name!r} with decay={self.decay!r}, called "
                f"{'without' if decay is None else 'with'} rates."
            )
        if self.decay == "constant":
            return self.decay_rates(key[:, :, 0])
        return None if decay is None else checked_rates(decay, key)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "spectral_prior": serialize(self._recipes.spectral_prior),
            "feature_map": serialize(self._recipes.feature_map),
            "num_features": self.num_features,
            "qk_norm": self.qk_norm,
            "redraw": self.redraw,
            "decay": self.decay,
            "near_field": self.near_field,
            "sliding_window": self.sliding_window,
            "rotary_max_wavelength": self.rotary_max_wavelength,
            "spectral_pace": self.spectral_pace,
            "seed": self.seed,
        }


class _Recipes:
    """The prior and map as given; not a container that Keras would track."""

    def __init__(self, spectral_prior, feature_map):
        self.spectral_prior = spectral_prior
        self.feature_map = feature_map

    def prior_copy(self, seed, pace):
        prior = self.spectral_prior
        seed = seed if prior.seed is None else prior.seed
        pace = pace if prior.pace is None else prior.pace
        return prior.copy(name="spectral_prior", seed=seed, pace=pace)

    def feature_map_copy(self, pace):
        pace = pace if self.feature_map.pace is None else self.feature_map.pace
        return self.feature_map.copy(name="feature_map", pace=pace)
