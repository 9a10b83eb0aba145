"""The paper's systems and their baselines, by name, as keyword arguments."""

import math

from keras_kt import _checks
from keras_kt.features import PositiveFeatures, TrigonometricFeatures
from keras_kt.priors import FastFoodPrior, GeneratorPrior, NormalPrior

# Of mended trigonometric systems, where a prior has the argument.
_CENTERED = {"initial_scale": 1.0, "activation": "tanh"}
PAPER_SYSTEMS = (
    "GMM-RKS",
    "GMM-PRF",
    "FastFood-RKS",
    "FastFood-PRF",
    "Generator-RKS",
    "Generator-PRF",
    "Performer",
    "RBF-RKS",
    "RBF-PRF",
)
"""Names that `paper_system` takes: the six learned systems, three baselines."""


def paper_system(name: str, key_dim: int = 64, *, mended: bool = False) -> dict:
    """Keyword arguments that make `KernelizedAttention` a system of the paper.

    All differ from the released code in three ways: the draw is stored and
    deterministic (it redraws at every call, evaluation too), features are
    stabilised in log space (it divides by a sum plus 1e-6), and every head
    draws noise of its own (it shares one draw). None of its defects are kept:
    FastFood-PRF, and Performer and RBF-PRF with non-zero frequencies, run.

    Args:
        name: one of `PAPER_SYSTEMS`.
        key_dim: the layer's `key_dim`, which sets the paper's feature counts.
        mended: whether to change what keeps the system from training. Queries
            and keys of trigonometric features are normalized, their smoothing
            learns, from 0.1 on, and frequencies start at unit scale and
            centered; positive features are two-sided and normalized by
            themselves, which leaves nothing to a mean; kernels learn at the
            layer's own pace; all have 4 · key_dim features. Defaults to
            `False`: as published, but for what is said above.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(
        ...     2, 16, **keras_kt.paper_system("GMM-PRF", key_dim=16))
        >>> layer(np.ones((1, 4, 3)), np.ones((1, 4, 3))).shape
        TensorShape([1, 4, 3])
    """
    name = _checks.choice("name", name, PAPER_SYSTEMS)
    key_dim = _checks.integer("key_dim", key_dim)
    options = _BUILDERS[name](key_dim)
    if _checks.boolean("mended", mended):
        return _mended(options, key_dim)
    return {**options, "qk_norm": None, "spectral_pace": 1.0}


def _mended(options, key_dim):
    prior, feature_map = options["spectral_prior"], options["feature_map"]
    if feature_map.needs_unit_norm:
        changes, feature_map = _CENTERED, TrigonometricFeatures()
    else:
        # A mean cancels in features that are normalized by themselves.
        changes, feature_map = {"use_mean": False}, PositiveFeatures("self")
    known = {k: x for k, x in changes.items() if hasattr(prior, k)}
    prior = prior.copy(**known)
    return {
        "spectral_prior": prior,
        "feature_map": feature_map,
        "num_features": 4 * key_dim,
    }


def _gmm_rks(key_dim):
    """GMM-RKS: a trained Gaussian per head, full covariance, trained mean.

    Paper: a Gaussian mixture. Released: one Gaussian per head ("mixture" are
    the heads), features of ω = ±μ + Lε for the same ε and k(0) = 2, smoothing
    1, frequencies that start at 0.17 of unit scale. Ours: as released, with
    k(0) = 1 and Cholesky factors; cos and sin are symmetric in ω, so mirrored
    means add nothing and the features go to independent frequencies instead.
    `MixturePrior` is the true mixture.
    """
    return {
        "spectral_prior": NormalPrior(
            0.17,
            "full",
            use_mean=True,
            coupling="iid",
            radius="chi",
            mean_initializer=_uniform(1.0 / key_dim),
        ),
        "feature_map": _released_smoothing(),
        "num_features": 4 * _paper_count(key_dim),
    }


def _gmm_prf(key_dim):
    """GMM-PRF: a trained diagonal Gaussian per head, prefactor −|x|².

    Paper: a Gaussian mixture. Released: one Gaussian per head, log-variances
    drawn around 0 and means within ±key_dim^(-1/2). Ours: as released, all
    variances 1 at the start.
    """
    return {
        "spectral_prior": NormalPrior(
            use_mean=True,
            coupling="iid",
            radius="chi",
            mean_initializer=_uniform(key_dim**-0.5),
        ),
        "feature_map": PositiveFeatures("isotropic", two_sided=False),
        "num_features": _paper_count(key_dim),
    }


def _fastfood_rks(key_dim):
    """FastFood-RKS: trained S, G, B shared by the heads; smoothing 1.

    Paper: Fastfood with learned diagonals. Released: start with frequencies 600
    times too small, a permutation redrawn at every call and never saved. Ours:
    exact N(0, I) rows at the start, one stored permutation per head.
    """
    return {
        "spectral_prior": FastFoodPrior(per_head=False),
        "feature_map": _released_smoothing(),
        "num_features": 2 * FastFoodPrior.padded_dim(key_dim),
    }


def _fastfood_prf(key_dim):
    """FastFood-PRF: as FastFood-RKS with one-sided positive features.

    Released: cannot be constructed (its initializer calls a class that it does
    not inherit from).
    """
    return {
        "spectral_prior": FastFoodPrior(per_head=False),
        "feature_map": PositiveFeatures("isotropic", two_sided=False),
        "num_features": FastFoodPrior.padded_dim(key_dim),
    }


def _generator_rks(key_dim):
    """Generator-RKS: frequencies from a network shared by the heads.

    Paper and released: hidden layer of 4 · key_dim, tanh output, batch
    normalization over the sampled frequencies, whose running statistics serve
    at inference. Ours: normalizes each sample by itself, learned output scale.
    """
    return {
        "spectral_prior": GeneratorPrior(
            per_head=False, activation="leaky_relu"
        ),
        "feature_map": _released_smoothing(),
        "num_features": 2 * _paper_count(key_dim),
    }


def _generator_prf(key_dim):
    """Generator-PRF: as Generator-RKS with one-sided positive features.

    Released: 127 samples where 256 were meant, after two halvings. Ours: 256
    at key_dim 64.
    """
    return {
        "spectral_prior": GeneratorPrior(
            per_head=False, activation="leaky_relu"
        ),
        "feature_map": PositiveFeatures("isotropic", two_sided=False),
        "num_features": _paper_count(key_dim),
    }


def _performer(key_dim):
    """Performer: FAVOR+, fixed N(0, I), orthogonal, two-sided, softmax kernel.

    Released: its orthogonal frequencies are all zero when square, which is the
    case used.
    """
    return {
        "spectral_prior": _fixed_normal("orthogonal"),
        "feature_map": PositiveFeatures("softmax"),
        "num_features": 2 * key_dim,
    }


def _rbf_rks(key_dim):
    """RBF-RKS: random kitchen sinks of the fixed Gaussian kernel."""
    return {
        "spectral_prior": _fixed_normal("iid"),
        "feature_map": _released_smoothing(),
        "num_features": 2 * _paper_count(key_dim),
    }


def _rbf_prf(key_dim):
    """RBF-PRF: two-sided positive features of the fixed Gaussian kernel.

    Released: zero frequencies, as in Performer.
    """
    return {
        "spectral_prior": _fixed_normal("orthogonal"),
        "feature_map": PositiveFeatures("gaussian"),
        "num_features": 2 * key_dim,
    }


_BUILDERS = dict(
    zip(
        PAPER_SYSTEMS,
        (
            _gmm_rks,
            _gmm_prf,
            _fastfood_rks,
            _fastfood_prf,
            _generator_rks,
            _generator_prf,
            _performer,
            _rbf_rks,
            _rbf_prf,
        ),
        strict=True,
    )
)


def _paper_count(key_dim):
    """d ln d, to the nearest power of two by its second binary digit."""
    target = max(2, int(key_dim * math.log(key_dim))) if key_dim > 1 else 2
    power = 1 << (target.bit_length() - 1)
    rounds_up = target & (power >> 1)
    return 2 * power if rounds_up else power


def _fixed_normal(coupling):
    return NormalPrior(coupling=coupling, radius="chi", trainable=False)


def _released_smoothing():
    return TrigonometricFeatures(smoothing=1.0, trainable=False)


def _uniform(bound):
    return {
        "class_name": "RandomUniform",
        "config": {"minval": -bound, "maxval": bound},
    }
