"""Every prior × map × algorithm × mask: what the axes' own tests promise
together, outputs and gradients against float64 NumPy."""

import itertools

import pytest

from tests.helpers import cases, problems
from tests.helpers.problems import ALGORITHMS, CAUSAL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:FastFoodPrior needs a power"),
]


@pytest.mark.parametrize("masked", (False, True), ids=("whole", "padded"))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("pair", cases.PAIRS, ids="/".join)
def test_outputs_and_gradients_match_float64_numpy(pair, algorithm, masked):
    keys = cases.LENGTH if algorithm in CAUSAL else cases.KEYS
    problems.check(algorithm, pair, keys=keys, masked=masked)


# Priors whose kernel has a closed form, and one whose has none.
OF_DISTANCE = [
    pair
    for pair in cases.PAIRS
    if pair[0] in ("normal-full", "mixture-mean", "generator")
]


@pytest.mark.parametrize(
    "pair, near, fades, algorithm",
    [
        (pair, *options, algorithm)
        for pair, options, algorithm in itertools.product(
            OF_DISTANCE, ((0, True), (5, False), (5, True)), ALGORITHMS
        )
        if problems.allows(pair, algorithm, *options)
    ],
    ids=lambda x: "/".join(x) if isinstance(x, tuple) else str(x),
)
def test_distances_match_float64_numpy(
    pair, near, fades, algorithm, small_blocks
):
    problems.check(algorithm, pair, near=near, fades=fades, masked=True)


@pytest.mark.parametrize("scale", (1.0, 3.0, 10.0, 30.0, 100.0))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("map_name", cases.MAPS)
def test_large_inputs_stay_finite_and_do_not_vanish(map_name, algorithm, scale):
    problem = problems.make(
        ("normal", map_name), algorithm in CAUSAL, scale=scale
    )
    arrays = {**problem.arrays, "value": problem.arrays["value"] + 3.0}
    problem = problem._replace(arrays=arrays)
    answer = problems.tensorflow_answer(algorithm, problem)
    problems.assert_lively(answer, problem)
