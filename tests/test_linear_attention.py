import functools

import numpy as np
import pytest
import tensorflow as tf

from keras_kt.ops import block_grid, linear, quadratic, scaling, states
from keras_kt.ops.states import AttentionState
from tests.helpers import cases, reference
from tests.helpers.tensors import Identity, tokens_first, visible

pytestmark = pytest.mark.filterwarnings("ignore:FastFoodPrior needs a power")

CHUNK = 4


def run(algorithm, query, key, value, feature_map, mask):
    """Outputs of one algorithm, heads first, whatever else it returns."""
    inputs = (*tokens_first(query, key, value), feature_map)
    if algorithm == "bidirectional":
        output = linear.bidirectional(*inputs, key_mask=mask)
    elif algorithm == "causal":
        output, _ = linear.causal(*inputs, key_mask=mask)
    elif algorithm == "step":
        output = in_steps(*inputs, mask)
    else:
        output, _ = quadratic.quadratic(
            *inputs,
            key_mask=mask,
            use_causal_mask=algorithm == "quadratic-causal",
        )
    return tokens_first(output)[0]


def in_steps(query, key, value, feature_map, mask, cuts=(0, 1, 2, 7)):
    """The causal answer in pieces: single tokens and a longer prefill."""
    state = states.initial_state(
        query.shape[0], query.shape[2], feature_map.width, value.shape[-1]
    )
    outputs = []
    for start, end in zip(cuts, (*cuts[1:], query.shape[1]), strict=True):
        output, state = linear.step(
            query[:, start:end],
            key[:, start:end],
            value[:, start:end],
            feature_map,
            state,
            key_mask=None if mask is None else mask[:, start:end],
        )
        outputs.append(output)
    return tf.concat(outputs, axis=1)


CAUSAL = ("causal", "step", "quadratic-causal")
ALGORITHMS = ("bidirectional", "quadratic", *CAUSAL)


def tensorflow_answer(algorithm, prior, feature_map, arrays, mask, upstream):
    weights = [*prior.trainable_weights, *feature_map.trainable_weights]
    variables = [w.value for w in weights]
    tensors = [tf.constant(array) for array in arrays]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        bound = feature_map.bind(prior())
        output = run(algorithm, *tensors, bound, mask)
        loss = tf.reduce_sum(output * upstream)
    gradients = tape.gradient(loss, [*tensors, *variables])
    assert all(gradient is not None for gradient in gradients)
    names = ["query", "key", "value", *map(cases.name_of, weights)]
    arrays = (tf.convert_to_tensor(g).numpy() for g in gradients)
    return output.numpy(), dict(zip(names, arrays, strict=True))


def numpy_answer(causal, prior, feature_map, arrays, mask, upstream):
    arrays = dict(
        zip(
            ("query", "key", "value"),
            (a.astype("float64") for a in arrays),
            strict=True,
        )
    )
    seen = visible(
        arrays["query"].shape[2], arrays["key"].shape[2], mask, causal
    )
    noise = cases.reference_noise(prior)
    weights = {**cases.weights_of(prior), **cases.weights_of(feature_map)}

    def losses(keep=(0, 1), **changed):
        now = {**arrays, **weights, **changed}
        frequencies = cases.reference_frequencies(prior, now, noise)
        kind = cases.reference_kind(feature_map, now)
        phi = [
            reference.features(now[x], frequencies, kind)
            for x in ("query", "key")
        ]
        limit = 1e-2 if kind["map"] == "trigonometric" else 0.0
        output, _ = reference.attention(*phi, now["value"], seen, limit)
        if keep is None:
            return output
        other = tuple(axis for axis in range(4) if axis not in keep)
        return (output * upstream).sum(other)

    gradients = {}
    for name in arrays:
        gradients[name] = reference.complex_step(
            lambda x, name=name: losses(**{name: x}), arrays[name], 2
        )
    for name in weights:
        # One head's weights touch only that head's losses.
        gradients[name] = reference.complex_step(
            lambda x, name=name: losses(keep=(1,), **{name: x}),
            weights[name],
            weights[name].ndim - 1,
        )
    return losses(keep=None).real, gradients


@functools.cache
def solved(prior_name, map_name, causal, masked):
    """A problem and its NumPy answer, shared by the algorithms."""
    keys = cases.LENGTH if causal else cases.KEYS
    prior, feature_map = cases.build(prior_name, map_name)
    # Unit-scale q and k, as a layer scales them: by dim^(-1/4) each. Signed
    # normalizers come near zero there, which no float32 code survives to five
    # digits, so trigonometric features get |q|² = |k|² = 1/4.
    query, key, value = cases.inputs(keys=keys)
    scale = cases.DIM**-0.25
    if map_name == "trigonometric":
        scale = 0.5 * cases.DIM**-0.5
    arrays = [query * scale, key * scale, value]
    mask = cases.key_mask(keys) if masked else None
    rng = np.random.default_rng(7)
    upstream = rng.normal(size=(*query.shape[:3], cases.VALUE_DIM))
    upstream = (upstream / upstream.size**0.5).astype("float32")
    problem = (prior, feature_map, arrays, mask, upstream)
    return problem, numpy_answer(causal, *problem)


@pytest.mark.parametrize("masked", (False, True), ids=("whole", "padded"))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "prior_name, map_name", cases.PAIRS, ids=lambda name: name
)
def test_outputs_and_gradients_match_float64_numpy(
    prior_name, map_name, algorithm, masked
):
    problem, expected = solved(
        prior_name, map_name, algorithm in CAUSAL, masked
    )
    output, gradients = tensorflow_answer(algorithm, *problem)
    np.testing.assert_allclose(output, expected[0], atol=2e-5, rtol=0)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            gradient,
            expected[1][name],
            atol=2e-5,
            rtol=0,
            err_msg=f"gradient to {name}",
        )


@pytest.mark.parametrize("masked", (False, True), ids=("whole", "padded"))
@pytest.mark.parametrize("map_name", cases.MAPS)
def test_causal_step_and_quadratic_agree(map_name, masked):
    prior, feature_map = cases.build("mixture", map_name)
    arrays = cases.inputs(keys=cases.LENGTH, scale=0.7)
    mask = cases.key_mask(cases.LENGTH) if masked else None
    upstream = np.random.default_rng(7).normal(size=arrays[2].shape)
    upstream = (upstream / upstream.size**0.5).astype("float32")
    answers = {
        algorithm: tensorflow_answer(
            algorithm, prior, feature_map, arrays, mask, upstream
        )
        for algorithm in CAUSAL
    }
    output, gradients = answers["quadratic-causal"]
    for algorithm in ("causal", "step"):
        other_output, other_gradients = answers[algorithm]
        np.testing.assert_allclose(other_output, output, atol=1e-5, rtol=0)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(
                other_gradients[name], gradient, atol=1e-5, rtol=0
            )


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of several chunks at the lengths of a test."""
    monkeypatch.setattr(block_grid, "CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(block_grid, "MAX_BLOCK", 2 * CHUNK)


@pytest.mark.parametrize("masked", (False, True), ids=("whole", "padded"))
@pytest.mark.parametrize("length", (1, 8, 37))
@pytest.mark.parametrize("algorithm", ("bidirectional", "causal"))
@pytest.mark.parametrize("map_name", cases.MAPS)
def test_blocks_of_any_number_match_quadratic_with_gradients(
    map_name, algorithm, length, masked, small_blocks
):
    prior, feature_map = cases.build("mixture", map_name)
    arrays = cases.inputs(length, length, scale=0.7)
    mask = cases.key_mask(length + 3)[:, :length] if masked else None
    upstream = np.random.default_rng(7).normal(size=arrays[2].shape)
    upstream = (upstream / upstream.size**0.5).astype("float32")
    slow = "quadratic-causal" if algorithm == "causal" else "quadratic"
    answers = [
        tensorflow_answer(a, prior, feature_map, arrays, mask, upstream)
        for a in (algorithm, slow)
    ]
    np.testing.assert_allclose(answers[0][0], answers[1][0], atol=1e-5, rtol=0)
    for name, gradient in answers[1][1].items():
        np.testing.assert_allclose(
            answers[0][1][name], gradient, atol=1e-5, rtol=0, err_msg=name
        )


@pytest.mark.parametrize("map_name", cases.MAPS)
def test_split_and_resume_gives_the_same_answer_state_and_gradients(
    map_name, small_blocks
):
    prior, feature_map = cases.build("mixture", map_name)
    arrays = tokens_first(*cases.inputs(29, 29, scale=0.7))
    mask = tf.constant(cases.key_mask(29))
    upstream = tf.constant(
        np.random.default_rng(3).normal(size=arrays[2].shape), tf.float32
    )
    answers = []
    for cut in (None, 1, 10, 28):
        pieces = (0, 29) if cut is None else (0, cut, 29)
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            bound = feature_map.bind(prior())
            state, outputs = None, []
            for start, end in zip(pieces[:-1], pieces[1:], strict=True):
                output, state = linear.causal(
                    *(x[:, start:end] for x in arrays),
                    bound,
                    key_mask=mask[:, start:end],
                    state=state,
                )
                outputs.append(output)
            output = tf.concat(outputs, axis=1)
            # The state takes part in the loss, so its gradient counts too.
            loss = tf.reduce_mean(output * upstream)
            loss += 1e-2 * tf.reduce_mean(tf.square(state.sums))
        gradients = tape.gradient(loss, arrays)
        answers.append((output, *state, *gradients))
    for answer in answers[1:]:
        for one, whole in zip(answer, answers[0], strict=True):
            np.testing.assert_allclose(one, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", (False, True), ids=("whole", "padded"))
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
        output = run(algorithm, *tensors, Identity(), mask)
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
@pytest.mark.parametrize("map_name", cases.MAPS)
def test_future_tokens_do_not_change_the_past(map_name, algorithm):
    prior, feature_map = cases.build("normal", map_name)
    bound = feature_map.bind(prior())
    query, key, value = cases.inputs(keys=cases.LENGTH)
    before = run(algorithm, query, key, value, bound, None)
    for x in (query, key, value):
        x[:, :, 6:] = 30.0 * x[:, :, 6:] + 1.0
    after = run(algorithm, query, key, value, bound, None)
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
        output, weights = quadratic.quadratic(
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


@pytest.mark.parametrize("poison", (np.nan, 1e30, -1e30, np.inf))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("map_name", cases.MAPS)
def test_padded_content_changes_nothing(map_name, algorithm, poison):
    prior, feature_map = cases.build("mixture", map_name)
    bound = feature_map.bind(prior())
    query, key, value = cases.inputs(keys=cases.LENGTH)
    mask = cases.key_mask(cases.LENGTH)
    before = run(algorithm, query, key, value, bound, mask)
    hidden = np.broadcast_to(~mask[:, None, :, None], key.shape[:3] + (1,))
    key = np.where(hidden, np.float32(poison), key)
    value = np.where(hidden, np.float32(poison), value)
    after = run(algorithm, query, key, value, bound, mask)
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("algorithm", ("bidirectional", "causal", "step"))
@pytest.mark.parametrize("map_name", ("positive", "trigonometric"))
def test_permuting_and_adding_padding_changes_nothing(map_name, algorithm):
    prior, feature_map = cases.build("normal", map_name)
    bound = feature_map.bind(prior())
    query, key, value = cases.inputs(keys=cases.LENGTH, scale=0.5)
    plain = run(algorithm, query, key, value, bound, None)
    padding = ((0, 0), (0, 0), (0, 5), (0, 0))
    longer = [np.pad(x, padding, constant_values=9.0) for x in (key, value)]
    if algorithm != "bidirectional":
        query = np.pad(query, padding)
    mask = np.zeros((cases.BATCH, cases.LENGTH + 5), "bool")
    mask[:, : cases.LENGTH] = True
    padded = run(algorithm, query, *longer, bound, mask)
    np.testing.assert_allclose(
        padded[:, :, : cases.LENGTH], plain, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("map_name", cases.MAPS)
def test_rows_that_see_nothing_are_zero_with_zero_gradients(
    map_name, algorithm
):
    prior, feature_map = cases.build("normal", map_name)
    arrays = cases.inputs(keys=cases.LENGTH)
    mask = np.ones((cases.BATCH, cases.LENGTH), "bool")
    mask[0] = False
    mask[1, :3] = False
    upstream = np.ones((*arrays[0].shape[:3], cases.VALUE_DIM), "float32")
    output, gradients = tensorflow_answer(
        algorithm, prior, feature_map, arrays, mask, upstream
    )
    np.testing.assert_array_equal(output[0], 0.0)
    assert np.abs(output[1, :, 3:]).min(axis=-1).max() > 0
    if algorithm in CAUSAL:
        np.testing.assert_array_equal(output[1, :, :3], 0.0)
    for name in ("query", "key", "value"):
        np.testing.assert_array_equal(gradients[name][0], 0.0)
    assert all(np.isfinite(g).all() for g in gradients.values())


@pytest.mark.parametrize("scale", (1.0, 3.0, 10.0, 30.0, 100.0))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("map_name", cases.MAPS)
def test_large_inputs_stay_finite_and_do_not_vanish(map_name, algorithm, scale):
    prior, feature_map = cases.build("normal", map_name)
    query, key, value = cases.inputs(keys=cases.LENGTH)
    arrays = [scale * query, scale * key, value + 3.0]
    upstream = np.ones((*query.shape[:3], cases.VALUE_DIM), "float32")
    output, gradients = tensorflow_answer(
        algorithm, prior, feature_map, arrays, None, upstream
    )
    assert np.isfinite(output).all()
    assert all(np.isfinite(g).all() for g in gradients.values())
    if map_name != "trigonometric":
        # Weights are convex, so every output is inside the values' range.
        assert output.min() >= arrays[2].min() - 1e-4
        assert output.max() <= arrays[2].max() + 1e-4
    else:
        assert np.abs(output).max(axis=-1).min() > 0


@pytest.mark.parametrize("map_name", cases.MAPS)
def test_normalizer_of_positive_features_is_between_one_and_all(map_name):
    if map_name == "trigonometric":
        pytest.skip("signed features have no such bound")
    prior, feature_map = cases.build("normal", map_name)
    bound = feature_map.bind(prior())
    for scale in (1.0, 10.0, 100.0):
        query, key, _ = cases.inputs(scale=scale)
        maximum = scaling.maximum_of(bound(key))
        query = scaling.exp_query(bound(query), maximum)
        key = scaling.exp_key(bound(key), maximum)
        normalizer = tf.matmul(query, tf.reduce_sum(key, 2)[..., tf.newaxis])
        assert normalizer.numpy().min() >= 1.0
        assert normalizer.numpy().max() <= key.shape[2] * key.shape[3]


def test_state_has_a_fixed_size_and_masked_tokens_leave_it_alone():
    prior, feature_map = cases.build("normal", "positive")
    bound = feature_map.bind(prior())
    query, key, value = tokens_first(*cases.inputs(keys=cases.LENGTH))
    _, state = linear.causal(query, key, value, bound)
    for count in (1, 3):
        _, after = linear.step(
            query[:, :count],
            1e6 * key[:, :count],
            value[:, :count],
            bound,
            state,
            key_mask=np.zeros((cases.BATCH, count), "bool"),
        )
        assert isinstance(after, AttentionState)
        for old, new in zip(state, after, strict=True):
            np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("masked", (False, True), ids=("whole", "padded"))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("map_name", ("positive", "trigonometric"))
def test_xla_dynamic_shapes_and_eager_agree(map_name, algorithm, masked):
    prior, feature_map = cases.build("mixture", map_name)
    arrays = cases.inputs(keys=cases.LENGTH)
    mask = tf.constant(cases.key_mask(cases.LENGTH)) if masked else None
    bound = feature_map.bind(prior())

    def answer(query, key, value):
        return run(algorithm, query, key, value, bound, mask)

    def answer_and_gradient(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = answer(*tensors)
        return output, *tape.gradient(output, tensors)

    arrays = [tf.constant(x) for x in arrays]
    eager = answer_and_gradient(*arrays)
    compiled = tf.function(answer_and_gradient, jit_compile=True)(*arrays)
    for one, other in zip(eager, compiled, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5, rtol=1e-4)
    if algorithm == "step":
        return  # the helper cuts by static lengths
    spec = [
        tf.TensorSpec((None, cases.HEADS, None, x.shape[-1])) for x in arrays
    ]
    dynamic = tf.function(answer, input_signature=spec)(*arrays)
    np.testing.assert_allclose(eager[0], dynamic, atol=1e-5, rtol=0)


@pytest.mark.parametrize("algorithm", ("bidirectional", "quadratic", "causal"))
@pytest.mark.parametrize("map_name", ("positive", "trigonometric"))
def test_empty_sequences_are_empty_or_zero(map_name, algorithm):
    prior, feature_map = cases.build("normal", map_name)
    bound = feature_map.bind(prior())
    query, key, value = cases.inputs()
    if algorithm != "causal":
        output = run(
            algorithm, query, key[:, :, :0], value[:, :, :0], bound, None
        )
        np.testing.assert_array_equal(output, np.zeros_like(output))
    output = run(
        algorithm,
        query[:, :, :0],
        key[:, :, :0],
        value[:, :, :0],
        bound,
        None,
    )
    assert output.shape[2] == 0
