"""`ops.attend`: every algorithm over four bound maps, without distance."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from keras_kt import ops
from tests.helpers import cases, problems, reference
from tests.helpers.contract import one_in
from tests.helpers.problems import ALGORITHMS, BOUND, CAUSAL, attend
from tests.helpers.tensors import Identity, tokens_first, visible

MAPS = tuple(BOUND)
IDS = ("whole", "padded")


@pytest.mark.parametrize("masked", (False, True), ids=IDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", MAPS)
def test_outputs_and_gradients_match_float64_numpy(name, algorithm, masked):
    keys = cases.LENGTH if algorithm in CAUSAL else cases.KEYS
    problems.check(algorithm, BOUND[name], keys=keys, masked=masked)


@pytest.mark.parametrize(
    "length, masked",
    one_in(2, ((37, True), (37, False), (8, True), (1, False))),
)
@pytest.mark.parametrize("algorithm", ("bidirectional", "causal", "steps"))
@pytest.mark.parametrize("name", MAPS)
def test_blocks_of_any_number_match_the_matrix_with_gradients(
    name, algorithm, length, masked, small_blocks
):
    problem = problems.make(
        BOUND[name],
        algorithm in CAUSAL,
        length=length,
        masked=masked,
        scale=0.7,
    )
    slow = "causal-matrix" if problem.causal else "matrix"
    answers = [
        problems.tensorflow_answer(each, problem) for each in (algorithm, slow)
    ]
    problems.assert_same(*answers, atol=1e-5)


@pytest.mark.parametrize("name", MAPS)
def test_split_and_resume_gives_the_same_answer_state_and_gradients(
    name, small_blocks
):
    pair = problems.built(*BOUND[name])
    arrays = tokens_first(*problems.inputs(BOUND[name][1], 29, 29, 0.7))
    mask = tf.constant(cases.key_mask(29))
    upstream = tf.constant(
        np.random.default_rng(3).normal(size=arrays[2].shape), tf.float32
    )
    answers = []
    for cut in (None, 1, 10, 28):
        pieces = (0, 29) if cut is None else (0, cut, 29)
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            bound, _ = problems.bind(*pair)
            state, outputs = None, []
            for start, end in zip(pieces[:-1], pieces[1:], strict=True):
                output, state = ops.attend(
                    *(x[:, start:end] for x in arrays),
                    bound,
                    causal=True,
                    key_mask=mask[:, start:end],
                    state=state,
                )
                outputs.append(output)
            output = tf.concat(outputs, axis=1)
            # The state takes part in the loss, so its gradient counts too.
            loss = tf.reduce_mean(output * upstream)
            loss += 1e-2 * tf.reduce_mean(tf.square(state.sums))
        gradients = tape.gradient(loss, arrays)
        answers.append((output, *tf.nest.flatten(state), *gradients))
    for answer in answers[1:]:
        for one, whole in zip(answer, answers[0], strict=True):
            np.testing.assert_allclose(one, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", (False, True), ids=IDS)
@pytest.mark.parametrize("loud", (50.0, 200.0, 400.0))
@pytest.mark.parametrize("algorithm", CAUSAL)
def test_one_loud_future_key_leaves_the_past_alone(
    algorithm, loud, masked, small_blocks
):
    """A maximum over the whole sequence loses the past to underflow here."""
    rng = np.random.default_rng(0)
    shape = (cases.BATCH, cases.HEADS, cases.LENGTH, 17)
    log_query, log_key = (
        rng.normal(size=shape).astype("float32") for _ in range(2)
    )
    log_key[:, :, 6] += loud
    # Another chunk, and another position inside the chunk.
    log_key[0, 1, 9, 3] += loud / 2
    value = cases.inputs(keys=cases.LENGTH)[2]
    mask = cases.key_mask(cases.LENGTH) if masked else None
    upstream = rng.normal(size=value.shape).astype("float32") / value.size**0.5
    tensors = [tf.constant(x) for x in (log_query, log_key, value)]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = attend(algorithm, *tensors, Identity(), mask)
        loss = tf.reduce_sum(output * upstream)
    gradients = tape.gradient(loss, tensors)
    seen = visible(cases.LENGTH, cases.LENGTH, mask, causal=True)
    arrays = [x.astype("float64") for x in (log_query, log_key, value)]
    expected = reference.log_attention(*arrays, seen)
    np.testing.assert_allclose(output, expected, atol=2e-5, rtol=0)
    for index, gradient in enumerate(gradients):
        moved = [array.copy() for array in arrays]
        for _ in range(5):
            direction = rng.normal(size=arrays[index].shape)
            slopes = []
            for sign in (1e-5, -1e-5):
                moved[index] = arrays[index] + sign * direction
                answer = reference.log_attention(*moved, seen)
                slopes.append((answer * upstream).sum() / 2e-5)
            slope = slopes[0] - slopes[1]
            got = (gradient.numpy() * direction).sum()
            np.testing.assert_allclose(got, slope, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("algorithm", CAUSAL)
@pytest.mark.parametrize("name", MAPS)
def test_future_tokens_do_not_change_the_past(name, algorithm):
    bound = problems.bound_map(name)
    query, key, value = problems.inputs(BOUND[name][1])
    before = attend(algorithm, query, key, value, bound)
    for x in (query, key, value):
        x[:, :, 6:] = 30.0 * x[:, :, 6:] + 1.0
    after = attend(algorithm, query, key, value, bound)
    np.testing.assert_allclose(
        before[:, :, :6], after[:, :, :6], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("loud", (50.0, 200.0, 400.0))
def test_masked_loud_key_leaves_dense_masks_exact(loud):
    """The key that sets the maximum may be hidden from a row by the mask."""
    rng = np.random.default_rng(0)
    shape = (cases.BATCH, cases.HEADS, cases.LENGTH, 17)
    log_query, log_key = (
        rng.normal(size=shape).astype("float32") for _ in range(2)
    )
    log_key[:, :, 4] += loud
    value = cases.inputs(keys=cases.LENGTH)[2]
    mask = rng.random((cases.BATCH, 1, cases.LENGTH, cases.LENGTH)) < 0.5
    mask[..., 4] = False
    mask[0, 0, 2] = False
    tensors = [tf.constant(x) for x in (log_query, log_key, value)]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output, weights = ops.attend_with_matrix(
            *tokens_first(*tensors), Identity(), attention_mask=mask
        )
    gradients = tape.gradient(output, tensors)
    output = tokens_first(output)[0]
    expected = reference.log_attention(
        *(x.astype("float64") for x in (log_query, log_key, value)), mask
    )
    np.testing.assert_allclose(output, expected, atol=2e-5, rtol=0)
    seen = mask.any(-1) + np.zeros_like(weights[..., 0])
    np.testing.assert_allclose(tf.reduce_sum(weights, -1), seen, atol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("loud", (0.0, 200.0))
@pytest.mark.parametrize("length", (cases.LENGTH, None))
@pytest.mark.parametrize("jit", (False, True), ids=("graph", "XLA"))
def test_gradients_of_a_matrix_in_a_graph_are_those_of_eager_calls(
    jit, length, loud
):
    """Where a branch forms it pair by pair, and where none does."""
    rng = np.random.default_rng(0)
    shape = (cases.BATCH, cases.LENGTH, cases.HEADS, 17)
    tensors = [rng.normal(size=shape).astype("float32") for _ in range(2)]
    tensors[1][:, 6] += loud
    tensors.append(cases.inputs(keys=cases.LENGTH)[2].swapaxes(1, 2))
    tensors = [tf.constant(x) for x in tensors]
    decay = tf.constant(0.1 * rng.random(shape[:3] + (1,)), tf.float32)

    def gradients(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output, weights = ops.attend_with_matrix(
                *tensors[:3], Identity(), causal=True, decay=tensors[3]
            )
            loss = tf.reduce_sum(tf.square(output))
            loss += tf.reduce_sum(tf.square(weights))
        return tape.gradient(loss, tensors)

    tensors.append(decay)
    specs = [tf.TensorSpec((x.shape[0], length, *x.shape[2:])) for x in tensors]
    compiled = tf.function(
        gradients, jit_compile=jit, autograph=False, input_signature=specs
    )
    pairs = zip(gradients(*tensors), compiled(*tensors), strict=True)
    for eager, graph in pairs:
        scale = np.abs(eager).max()
        assert scale > 0.0
        np.testing.assert_allclose(graph, eager, atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", MAPS)
def test_padded_content_changes_nothing(name, algorithm):
    bound = problems.bound_map(name)
    query, key, value = problems.inputs(BOUND[name][1])
    mask = cases.key_mask(cases.LENGTH)
    before = attend(algorithm, query, key, value, bound, mask)
    hidden = ~mask[:, None, :, None]
    # One poison for all padded tokens, then another for each.
    mixed = np.resize([1e30, np.inf, -1e30, np.nan], (1, 1, cases.LENGTH, 1))
    for poison in (np.nan, 1e30, mixed):
        spoiled = [
            np.where(hidden, np.asarray(poison, "float32"), x)
            for x in (key, value)
        ]
        after = attend(algorithm, query, *spoiled, bound, mask)
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("algorithm", ("bidirectional", "causal", "steps"))
@pytest.mark.parametrize("name", MAPS)
def test_permuting_and_adding_padding_changes_nothing(name, algorithm):
    bound = problems.bound_map(name)
    query, key, value = problems.inputs(BOUND[name][1], scale=0.5)
    plain = attend(algorithm, query, key, value, bound)
    padding = ((0, 0), (0, 0), (0, 5), (0, 0))
    longer = [np.pad(x, padding, constant_values=9.0) for x in (key, value)]
    if algorithm != "bidirectional":
        query = np.pad(query, padding)
    mask = np.zeros((cases.BATCH, cases.LENGTH + 5), "bool")
    mask[:, : cases.LENGTH] = True
    padded = attend(algorithm, query, *longer, bound, mask)
    np.testing.assert_allclose(
        padded[:, :, : cases.LENGTH], plain, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", MAPS)
def test_rows_that_see_nothing_are_zero_with_zero_gradients(name, algorithm):
    mask = np.ones((cases.BATCH, cases.LENGTH), "bool")
    mask[0] = False
    mask[1, :3] = False
    problem = problems.make(BOUND[name], algorithm in CAUSAL)
    problem = problem._replace(mask=mask, upstream=np.float32(1.0))
    output, gradients = problems.tensorflow_answer(algorithm, problem)
    np.testing.assert_array_equal(output[0], 0.0)
    assert np.abs(output[1, :, 3:]).min(axis=-1).max() > 0
    if problem.causal:
        np.testing.assert_array_equal(output[1, :, :3], 0.0)
    for array in ("query", "key", "value"):
        np.testing.assert_array_equal(gradients[array][0], 0.0)
    assert all(np.isfinite(g).all() for g in gradients.values())


# Apart, as one loud sequence sends its whole block the exact way.
@pytest.mark.parametrize("scales", ((1.0, 3.0), (10.0, 30.0), (1.0, 100.0)))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", MAPS)
def test_large_inputs_stay_finite_and_do_not_vanish(name, algorithm, scales):
    problem = problems.make(BOUND[name], algorithm in CAUSAL, scale=1.0)
    scales = np.reshape(np.float32(scales), (cases.BATCH, 1, 1, 1))
    query, key, value, _ = problem.arrays.values()
    arrays = {
        "query": scales * query,
        "key": scales * key,
        "value": value + 3.0,
    }
    problem = problem._replace(arrays=arrays, upstream=np.float32(1.0))
    answer = problems.tensorflow_answer(algorithm, problem)
    problems.assert_lively(answer, problem)


@pytest.mark.parametrize("name", ("one-sided", "two-sided", "identity"))
def test_normalizer_of_positive_features_is_between_one_and_all(name):
    bound = problems.bound_map(name)
    for scale in (1.0, 10.0, 100.0):
        tokens = problems.inputs(BOUND[name][1], scale=scale)
        _, state = ops.attend(*tokens_first(*tokens), bound, causal=True)
        keys = cases.LENGTH
        total = state.sums.numpy()[:, :, -1]  # (batch, heads, features)
        assert total.min() >= 1.0 and total.max() <= keys * (1 + 1e-6)
        log_query = bound.queries(tokens[0]) + state.maximum[:, :, tf.newaxis]
        log_query -= tf.reduce_max(log_query, -1, keepdims=True)
        normalizer = tf.einsum("bhtf,bhf->bht", tf.exp(log_query), total)
        assert normalizer.numpy().min() >= 1.0
        assert normalizer.numpy().max() <= keys * bound.width * (1 + 1e-6)


@pytest.mark.parametrize("name", MAPS)
def test_state_has_a_fixed_size_and_masked_tokens_leave_it_alone(name):
    bound = problems.bound_map(name)
    query, key, value = tokens_first(*problems.inputs(BOUND[name][1]))
    _, state = ops.attend(query, key, value, bound, causal=True)
    for count in (1, 3):
        _, after = ops.attend(
            query[:, :count],
            1e6 * key[:, :count],
            value[:, :count],
            bound,
            causal=True,
            state=state,
            key_mask=np.zeros((cases.BATCH, count), "bool"),
        )
        assert isinstance(after, type(state))
        tf.nest.map_structure(np.testing.assert_array_equal, after, state)


def _is_quick(*case):
    """Compiling takes seconds: the quick suite has two of these."""
    return case in (
        ("two-sided", "bidirectional", True),
        ("two-sided", "causal", True),
    )


COMPILED = [
    pytest.param(*case, marks=() if _is_quick(*case) else pytest.mark.slow)
    for case in itertools.product(
        ("two-sided", "trigonometric"), ALGORITHMS, (False, True)
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("name, algorithm, masked", COMPILED)
def test_xla_dynamic_shapes_and_eager_agree(name, algorithm, masked):
    bound = problems.bound_map(name)
    arrays = [tf.constant(x) for x in problems.inputs(BOUND[name][1])]
    mask = tf.constant(cases.key_mask(cases.LENGTH)) if masked else None

    def answer(query, key, value):
        return attend(algorithm, query, key, value, bound, mask)

    def answer_and_gradient(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = answer(*tensors)
        return output, *tape.gradient(output, tensors)

    eager = answer_and_gradient(*arrays)
    compiled = tf.function(answer_and_gradient, jit_compile=True)(*arrays)
    for one, other in zip(eager, compiled, strict=True):
        # Gradients of a first token are zero: what is left of larger ones.
        atol = max(3e-5, 3e-6 * np.abs(other).max())
        np.testing.assert_allclose(one, other, atol=atol, rtol=1e-4)
    if algorithm == "steps":
        return  # the helper cuts by static lengths
    spec = [
        tf.TensorSpec((None, cases.HEADS, None, x.shape[-1])) for x in arrays
    ]
    dynamic = tf.function(answer, input_signature=spec)(*arrays)
    np.testing.assert_allclose(eager[0], dynamic, atol=1e-5, rtol=0)


@pytest.mark.parametrize("algorithm", ("bidirectional", "matrix", "causal"))
@pytest.mark.parametrize("name", MAPS)
def test_empty_sequences_are_empty_or_zero(name, algorithm):
    bound = problems.bound_map(name)
    query, key, value = problems.inputs(BOUND[name][1])
    none = key[:, :, :0], value[:, :, :0]
    if algorithm != "causal":
        output = attend(algorithm, query, *none, bound)
        np.testing.assert_array_equal(output, np.zeros_like(output))
    output = attend(algorithm, query[:, :, :0], *none, bound)
    assert output.shape[2] == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", MAPS)
def test_query_heads_share_the_key_value_head_of_their_group(name, algorithm):
    """Query head i uses key-value head i // 2; gradients of a group add."""
    bound = problems.bound_map(name)
    query, key, value = problems.inputs(BOUND[name][1], scale=0.5)
    queries = [tf.constant(query), tf.constant(query[:, ::-1] + 0.1)]
    key, value = tf.constant(key), tf.constant(value)
    mask = cases.key_mask(cases.LENGTH)
    upstream = problems.upstream_of((2, *value.shape))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([queries, key, value])
        apart = tf.stack(
            [attend(algorithm, x, key, value, bound, mask) for x in queries]
        )
        shape = tf.shape(query) * [1, 2, 1, 1]
        joined = tf.reshape(tf.stack(queries, axis=2), shape)
        output = attend(algorithm, joined, key, value, bound, mask)
        groups = tf.stack([output[:, 0::2], output[:, 1::2]])
        losses = [tf.reduce_sum(x * upstream) for x in (apart, groups)]
    np.testing.assert_allclose(groups, apart, atol=1e-5)
    wanted, got = (tape.gradient(x, [*queries, key, value]) for x in losses)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("causal", (False, True))
def test_a_smoothing_that_has_vanished_still_counts_the_keys(causal):
    """The count is a ratio of constant features, which were both zero."""
    layer = keras_kt.KernelizedAttention(
        3, 5, feature_map="trigonometric", seed=1, implementation="linear"
    )
    x = np.random.default_rng(0).normal(size=(2, 11, 6)).astype("float32")
    layer(x, x)
    (smoothing,) = layer.feature_map.trainable_weights
    smoothing.assign(np.full(smoothing.shape, -200.0))
    with tf.GradientTape() as tape:
        output = layer(x, x, use_causal_mask=causal)
    assert np.isfinite(output).all() and np.abs(output).max() > 0.0
    for gradient in tape.gradient(output, layer.trainable_weights):
        assert np.isfinite(gradient).all()
