"""One problem of attention, solved by each algorithm and by NumPy.

Arrays are heads first here, `(batch, heads, length, dim)`; a bound map is all
that an algorithm knows of priors and feature maps.
"""

import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

import keras_kt
from keras_kt import ops
from keras_kt.ops import states
from tests.helpers import cases, reference
from tests.helpers.tensors import Identity, tokens_first, visible

CAUSAL = ("causal", "steps", "causal-matrix")
ALGORITHMS = ("bidirectional", "matrix", *CAUSAL)
# The bound maps that algorithms are tested on: what they can tell apart.
BOUND = {
    "one-sided": ("normal-mean", "positive-isotropic-one-sided"),
    "two-sided": ("mixture", "positive-gaussian"),
    "trigonometric": ("normal-mean", "trigonometric"),
    "identity": ("none", "identity"),
}
ONE_SIDED, TWO_SIDED, TRIGONOMETRIC, IDENTITY = BOUND.values()
# To algorithms it is another only beside a near field.
SELF_NORMALIZED = "mixture-mean", "positive-self"
SIGNED = "trigonometric"


class Problem(NamedTuple):
    """What is asked: the map, the tokens, and how they are weighed.

    Attributes:
        prior, feature_map: built, or `None` for bare log-features.
        arrays: query, key, value and decay, by name; no decay is `None`.
        near: number of tokens of an exact near field, 0 for none.
        has_far: whether keys beyond are seen.
        mask: `(batch, keys)`, or `None`.
        causal: whether query t sees keys 0 … t only.
        upstream: cotangent of the output.
    """

    prior: object
    feature_map: object
    arrays: dict
    near: int
    has_far: bool
    mask: np.ndarray | None
    causal: bool
    upstream: np.ndarray

    @property
    def is_signed(self):
        """Whether weights may be negative."""
        return isinstance(self.feature_map, keras_kt.TrigonometricFeatures)

    @property
    def is_exact(self):
        """Whether the kernel of near keys is a closed form."""
        return bool(
            self.near
            and self.prior is not None
            and self.feature_map.has_exact_kernel(self.prior)
        )

    @property
    def weights(self):
        """Trainable weights that the map is made of."""
        if self.prior is None:
            return []
        layers = self.prior, self.feature_map
        return [w for layer in layers for w in layer.trainable_weights]


def bind(prior, feature_map, near=0, has_far=True):
    """A bound map, and the near field or `None`."""
    kernel, bound = None, Identity()
    if prior is not None:
        is_absolute = bool(near and has_far)
        bound = feature_map.bind(prior(), is_absolute=is_absolute)
        kernel = feature_map.exact_kernel(prior)
    return bound, ops.NearField(kernel, near, has_far) if near else None


def bound_map(name):
    """One of the maps of `BOUND`."""
    return bind(*built(*BOUND[name]))[0]


def built(prior_name, map_name):
    """A built prior and map, or nothing for bare log-features."""
    if map_name == "identity":
        return None, None
    return cases.build(prior_name, map_name)


def inputs(map_name, length=cases.LENGTH, keys=cases.LENGTH, scale=1.0):
    """Query, key and value for a map of a name."""
    if map_name != "identity":
        return cases.inputs(length, keys, scale)
    rng = np.random.default_rng(0)
    shapes = [
        (cases.BATCH, cases.HEADS, n, Identity.width) for n in (length, keys)
    ]
    pair = [(scale * rng.normal(size=s)).astype("float32") for s in shapes]
    return [*pair, cases.inputs(length, keys, scale)[2]]


def attend(algorithm, query, key, value, bound, mask=None, **options):
    """Outputs of one algorithm, heads first.

    Args:
        algorithm: one of `ALGORITHMS`.
        query, key, value: heads first.
        bound: the bound map.
        mask: of keys.
        **options: `decay`, `(batch, heads, length)`, and `near`.
    """
    tokens = tokens_first(query, key, value)
    near, decay = options.get("near"), options.get("decay")
    if decay is not None:
        decay = tf.transpose(decay, (0, 2, 1))[..., tf.newaxis]
    options = {"key_mask": mask, "decay": decay, "near": near}
    if algorithm == "steps":
        output, _ = in_steps(*tokens, bound, **options)
    elif algorithm in ("causal", "bidirectional"):
        is_causal = algorithm == "causal"
        output, _ = ops.attend(*tokens, bound, causal=is_causal, **options)
    else:
        is_causal = algorithm == "causal-matrix"
        output, _ = ops.attend_with_matrix(
            *tokens, bound, causal=is_causal, **options
        )
    return tokens_first(output)[0]


def initial_state(key, value, bound, near):
    """The state of a stream before its first token."""
    batch, _, heads, dim = key.shape
    sizes = batch, heads, bound.width, value.shape[-1]
    if near is None:
        return states.initial_state(*sizes)
    sizes = heads, bound.width, value.shape[-1], dim
    fields = ("sliding_window", "near_field")
    shapes = states.shapes(*sizes, **{fields[near.has_far]: near.window})
    return states.initial(shapes, batch)


def in_steps(query, key, value, bound, *, near=None, cuts=None, **rest):
    """The causal answer in pieces, and the last state.

    Single tokens, a longer prefill, and a token again; `rest` has the
    `(batch, length, …)` arrays that are cut as the tokens are.
    """
    length = query.shape[1]
    cuts = cuts or sorted({0, 1, 2, 7, length - 1, length})
    cuts = [cut for cut in cuts if cut <= length]
    state = initial_state(key, value, bound, near)
    shapes = [x.shape for x in tf.nest.flatten(state)]
    outputs = []
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        part = slice(start, end)
        output, state = ops.attend(
            *(x[:, part] for x in (query, key, value)),
            bound,
            causal=True,
            near=near,
            state=state,
            **{k: None if x is None else x[:, part] for k, x in rest.items()},
        )
        outputs.append(output)
    assert [x.shape for x in tf.nest.flatten(state)] == shapes
    return tf.concat(outputs, axis=1), state


def tensorflow_answer(algorithm, problem):
    """The output of an algorithm, and gradients by name."""
    arrays = {k: x for k, x in problem.arrays.items() if x is not None}
    tensors = {name: tf.constant(x) for name, x in arrays.items()}
    weights = problem.weights
    wanted = [*tensors.values(), *(w.value for w in weights)]
    with tf.GradientTape() as tape:
        tape.watch(list(tensors.values()))
        bound, near = bind(
            problem.prior, problem.feature_map, problem.near, problem.has_far
        )
        output = attend(
            algorithm, **tensors, bound=bound, near=near, mask=problem.mask
        )
        loss = tf.reduce_sum(output * problem.upstream)
    gradients = tape.gradient(loss, wanted)
    assert all(gradient is not None for gradient in gradients)
    names = [*tensors, *map(cases.name_of, weights)]
    arrays = (tf.convert_to_tensor(g).numpy() for g in gradients)
    return output.numpy(), dict(zip(names, arrays, strict=True))


def numpy_answer(problem):
    """`tensorflow_answer` in float64, by the matrix and complex steps."""
    arrays = {
        name: x.astype("float64")
        for name, x in problem.arrays.items()
        if x is not None
    }
    length, keys = (arrays[name].shape[2] for name in ("query", "key"))
    keep = problem.mask
    if keep is None:
        keep = np.ones((cases.BATCH, keys), "bool")
    seen = visible(length, keys, problem.mask, problem.causal)
    is_near = False
    if problem.near:
        is_near = reference.distances(keep, length) < problem.near
    if not problem.has_far:
        seen = seen & is_near
    matrix_of, weights, limit = _matrix(problem, is_near)

    def losses(axes=(0, 1), **changed):
        now = {**arrays, **weights, **changed}
        matrix, shares = matrix_of(now), seen
        if "decay" in now:
            shares = seen * reference.fading(now["decay"], keep)
        output, _ = reference.attention_of(matrix, now["value"], shares, limit)
        if axes is None:
            return output
        others = tuple(axis for axis in range(4) if axis not in axes)
        return (output * problem.upstream).sum(others)

    gradients = {}
    for name, x in arrays.items():
        gradients[name] = reference.complex_step(
            lambda x, name=name: losses(**{name: x}), x, x.ndim - 2
        )
    for name, x in weights.items():
        # One head's weights touch only that head's losses.
        gradients[name] = reference.complex_step(
            lambda x, name=name: losses((1,), **{name: x}), x, x.ndim - 1
        )
    return losses(None).real, gradients


def _matrix(problem, is_near):
    """The kernel's matrix as a function of all arrays; weights; a limit."""
    prior, feature_map = problem.prior, problem.feature_map
    if prior is None:
        return (
            lambda now: np.einsum(
                "bhtf,bhsf->bhts", np.exp(now["query"]), np.exp(now["key"])
            ),
            {},
            0.0,
        )
    noise = cases.reference_noise(prior)
    weights = {**cases.weights_of(prior), **cases.weights_of(feature_map)}

    def matrix_of(now):
        frequencies = cases.reference_frequencies(prior, now, noise)
        kind = cases.reference_kind(feature_map, now)
        pair = now["query"], now["key"]
        phi = [reference.features(x, frequencies, kind) for x in pair]
        matrix = np.einsum("bhtf,bhsf->bhts", *phi)
        if problem.is_exact:
            exact = reference.gaussian_kernel(
                *pair, frequencies, kind["prefactor"]
            )
            matrix = np.where(is_near, exact, matrix)
        return matrix

    return matrix_of, weights, 1e-2 if problem.is_signed else 0.0


def decays(length, seed=5):
    """λ `(batch, heads, length)`, from nothing to a sharp cut."""
    rng = np.random.default_rng(seed)
    shape = (cases.BATCH, cases.HEADS, length)
    rates = np.exp(rng.normal(-1.0, 1.5, size=shape)).astype("float32")
    rates[:, :, 1::5] = 0.0
    return rates


def mask_of(name, length):
    """No mask, padding on one side, or gaps; `True` has some of each."""
    if not name:
        return None
    if name is True:
        more = 0 if length > 5 else 3
        return cases.key_mask(length + more)[:, :length]
    mask = np.zeros((cases.BATCH, length), "bool")
    if name == "left":
        mask[0, 4:] = mask[1, length - 1 :] = True
    elif name == "right":
        mask[0, : length - 5] = mask[1, :1] = True
    elif name == "nothing":
        mask[0] = True
    else:
        mask[:, ::3] = mask[0, 1] = mask[1, 4:6] = True
    return mask


def upstream_of(shape, seed=7):
    """A cotangent of length one."""
    upstream = np.random.default_rng(seed).normal(size=shape)
    return (upstream / upstream.size**0.5).astype("float32")


def make(
    pair,
    causal,
    *,
    length=cases.LENGTH,
    keys=None,
    near=0,
    has_far=True,
    fades=False,
    masked=False,
    scale=None,
):
    """A problem of one `(prior, map)` pair of names."""
    prior, feature_map = built(*pair)
    keys = length if keys is None else keys
    if scale is None:
        # Unit-scale q and k, as a layer scales them: by dim^(-1/4) each. Signed
        # normalizers come near zero there, which no float32 code survives to
        # five digits, so trigonometric features get |q|² = |k|² = 1/4.
        is_signed = pair[1] == SIGNED
        scale = 0.5 * cases.DIM**-0.5 if is_signed else cases.DIM**-0.25
    query, key, value = inputs(pair[1], length, keys)
    arrays = {
        "query": query * np.float32(scale),
        "key": key * np.float32(scale),
        "value": value,
        "decay": decays(keys) if fades else None,
    }
    upstream = upstream_of((*query.shape[:3], cases.VALUE_DIM))
    mask = mask_of(masked, keys)
    return Problem(
        prior, feature_map, arrays, near, has_far, mask, causal, upstream
    )


@functools.cache
def solved(pair, causal, **options):
    """A problem of `make` and its NumPy answer, shared by the algorithms."""
    problem = make(pair, causal, **options)
    return problem, numpy_answer(problem)


def allows(pair, algorithm, near, fades):
    """Whether an algorithm has this distance with the pair's map."""
    prior_name, map_name = pair
    return not near or (
        map_name.startswith("positive")
        and prior_name.startswith(("normal", "mixture"))
    )


def check(algorithm, pair, atol=2e-5, **options):
    """An algorithm's output and every gradient against float64 NumPy."""
    problem, expected = solved(pair, algorithm in CAUSAL, **options)
    assert_same(tensorflow_answer(algorithm, problem), expected, atol)


def assert_same(answer, expected, atol=1e-5):
    """Two answers: outputs, and gradients by name."""
    (output, gradients), (wanted, wanted_gradients) = answer, expected
    np.testing.assert_allclose(output, wanted, atol=atol, rtol=0)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            gradient,
            wanted_gradients[name],
            atol=atol,
            rtol=0,
            err_msg=f"gradient to {name}",
        )


def assert_lively(answer, problem):
    """Finite, and not vanished, whatever the scale of the inputs."""
    output, gradients = answer
    assert np.isfinite(output).all()
    assert all(np.isfinite(g).all() for g in gradients.values())
    if problem.is_signed:
        assert np.abs(output).max(axis=-1).min() > 0
        return
    # Weights are convex, so every output is inside the values' range.
    value = problem.arrays["value"]
    assert output.min() >= value.min() - 1e-4
    assert output.max() <= value.max() + 1e-4
