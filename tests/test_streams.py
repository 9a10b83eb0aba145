"""States of many streams: gathered, stored, forked, rolled back, batched."""

import re
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers.fading import Fading
from tests.helpers.tensors import array, wrong

pytestmark = pytest.mark.filterwarnings("ignore:.*jit_compile.*")

SERVING = Path(__file__).parent.parent / "docs" / "serving.md"


class Pair(NamedTuple):
    one: object
    other: object


def nest(batch, seed=0):
    """A state of every kind of container, of NumPy arrays."""
    return {
        "pair": Pair(array((batch, 3), seed), [array((batch,), seed + 1)]),
        "counts": (np.arange(batch, dtype="int64") + seed,),
        "attention": keras_kt.AttentionState(
            array((batch, 2, 5), seed + 2), array((batch, 2, 3, 5), seed + 3)
        ),
    }


def assert_same(actual, expected):
    tf.nest.assert_same_structure(actual, expected)
    for one, other in zip(
        tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True
    ):
        assert tf.is_tensor(one) and one.dtype.as_numpy_dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def rows(state, indices):
    return tf.nest.map_structure(lambda x: np.asarray(x)[indices], state)


@pytest.mark.parametrize("spell", (list, np.array, tf.constant))
def test_streams_are_gathered_in_any_nest(spell):
    state = nest(5)
    indices = [4, 0, 0, 3, 1, 4, 4]
    assert_same(
        keras_kt.gather_state(state, spell(indices)), rows(state, indices)
    )
    none = keras_kt.gather_state(state, spell([]) if spell is list else [])
    assert none["pair"].one.shape == (0, 3)
    bare = array((5, 3))
    assert_same(keras_kt.gather_state(bare, spell([2, 2])), bare[[2, 2]])


def test_states_are_stacked_and_unstacked():
    states = [nest(batch, batch) for batch in (2, 1, 0, 5)]
    joined = keras_kt.stack_states(states)
    for index, (start, end) in enumerate(((0, 2), (2, 3), (3, 3), (3, 8))):
        assert_same(
            keras_kt.gather_state(joined, list(range(start, end))),
            states[index],
        )
    for sizes in ((2, 1, 0, 5), np.array([2, 1, 0, 5])):
        parts = keras_kt.unstack_states(joined, sizes)
        for part, state in zip(parts, states, strict=True):
            assert_same(part, state)
    alone = keras_kt.unstack_states(joined)
    assert len(alone) == 8
    assert_same(alone[7], rows(states[3], [4]))
    assert keras_kt.unstack_states(nest(0)) == []
    assert_same(keras_kt.stack_states(tuple(states[:1])), states[0])


@pytest.mark.parametrize("jit_compile", (False, True))
def test_states_of_graphs_of_any_batch(jit_compile):
    specs = tf.nest.map_structure(
        lambda x: tf.TensorSpec((None, *x.shape[1:]), x.dtype), nest(2)
    )

    @tf.function(
        jit_compile=jit_compile,
        input_signature=[specs, tf.TensorSpec((None,), "int32")],
    )
    def run(state, indices):
        gathered = keras_kt.gather_state(state, indices)
        parts = keras_kt.unstack_states(gathered, [2, 3])
        return gathered, keras_kt.stack_states(parts[::-1])

    state, indices = nest(3), [2, 0, 0, 1, 2]
    gathered, turned = run(state, np.array(indices, "int32"))
    assert_same(gathered, rows(state, indices))
    assert_same(turned, rows(state, [0, 1, 2, 2, 0]))

    @tf.function(input_signature=[specs])
    def unknown(state):
        return keras_kt.unstack_states(state)

    wrong("`sizes` is needed where", lambda: unknown(state))


def test_gradients_go_back_to_the_streams_that_were_taken():
    x = tf.constant(array((4, 3)))
    scale = tf.constant(array((5, 3), 1))
    with tf.GradientTape() as tape:
        tape.watch(x)
        state = keras_kt.gather_state({"x": x}, [3, 0, 3, 2, 3])
        state = keras_kt.stack_states(keras_kt.unstack_states(state)[::-1])
        loss = tf.reduce_sum(scale * state["x"])
    expected = np.zeros((4, 3), "float32")
    np.add.at(expected, [3, 2, 3, 0, 3], scale.numpy())
    gradient = tf.convert_to_tensor(tape.gradient(loss, x))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: keras_kt.gather_state({"a": [nest(2), 3.0]}, [0]),
            r"a scalar at state\['a'\]\[1\].*gets an axis \(batch, …\)",
        ),
        (
            lambda: keras_kt.gather_state(Pair(np.ones(2), None), [0]),
            r"a NoneType at state\.other",
        ),
        (lambda: keras_kt.gather_state({}, [0]), "no tensor at all at state"),
        (
            lambda: keras_kt.gather_state([np.ones(2), np.ones(3)], [0]),
            r"one batch size in all.*\[\[2\], \[3\]\]",
        ),
        (lambda: keras_kt.gather_state(nest(3), [3]), "from 0 to 2.*3 streams"),
        (lambda: keras_kt.gather_state(nest(3), [-1]), "from 0 to 2"),
        (lambda: keras_kt.gather_state(nest(3), 1), r"shape \(new_batch,\)"),
        (lambda: keras_kt.gather_state(nest(3), [[1]]), r"\(new_batch,\)"),
        (lambda: keras_kt.gather_state(nest(3), [0.0]), "must be integers"),
        (lambda: keras_kt.gather_state(nest(3), None), "must be integers"),
        (lambda: keras_kt.stack_states([]), "at least one state"),
        (lambda: keras_kt.stack_states(nest(2)), "list or tuple of states"),
        (
            lambda: keras_kt.stack_states(Pair(np.ones(2), np.ones(2))),
            "list or tuple of states. Received: a Pair",
        ),
        (
            lambda: keras_kt.stack_states([nest(2), nest(2)["pair"]]),
            r"states of one model.*states\[1\] of",
        ),
        (
            lambda: keras_kt.stack_states([np.ones((2, 3)), np.ones((2, 4))]),
            r"\[2, 3\], and states\[1\] of \[2, 4\]",
        ),
        (
            lambda: keras_kt.stack_states([[np.ones(2)], [np.ones((), "f")]]),
            r"`states` must be a nest.*a scalar at states\[1\]\[0\]",
        ),
        (lambda: keras_kt.unstack_states(nest(3), [1, 1]), "add up to.*, 3"),
        (lambda: keras_kt.unstack_states(nest(3), [4, -1]), "integers ≥ 0"),
        (lambda: keras_kt.unstack_states(nest(3), [1.0, 2.0]), "integers ≥ 0"),
        (lambda: keras_kt.unstack_states(nest(3), 3), "integers ≥ 0"),
    ],
)
def test_what_is_no_state_of_streams_is_named(call, message):
    wrong(f"(?s){message}", call)


class Decoder(keras.Model):
    """A causal language model of every part that has a state."""

    def __init__(self, vocabulary=17, blocks=2):
        super().__init__()
        self.embedding = keras.layers.Embedding(vocabulary, 6)
        self.blocks = [
            keras_kt.KernelizedTransformerDecoder(
                20, 3, near_field=2, decay="gated", local_context=3, seed=i
            )
            for i in range(blocks)
        ]
        self.head = keras.layers.Dense(vocabulary, kernel_initializer="normal")

    def call(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return 9.0 * self.head(x)

    def initial_state(self, batch_size):
        return [block.initial_state(batch_size) for block in self.blocks]

    def step(self, tokens, state, mask=None):
        x, after = self.embedding(tokens), []
        for block, before in zip(self.blocks, state, strict=True):
            x, new = block.step(x, before, decoder_padding_mask=mask)
            after.append(new)
        return 9.0 * self.head(x), after


def tokens_of(shape, seed=0, vocabulary=17):
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocabulary, shape).astype("int32")


def test_a_state_is_forked_stored_and_rolled_back(tmp_path):
    model = Decoder()
    start, first, second = tokens_of((2, 7)), tokens_of((3, 5), 1), None
    second = tokens_of((3, 4), 2)
    model(start)
    _, before = model.step(start, model.initial_state(2))
    kept = tf.nest.map_structure(lambda x: x.numpy().copy(), before)
    chosen = [1, 0, 1]

    def check(state, tokens):
        output, after = model.step(tokens, keras_kt.gather_state(state, chosen))
        whole = model(np.concatenate([start[chosen], tokens], 1))
        np.testing.assert_allclose(output, whole[:, 7:], atol=1e-4)
        return after

    after = check(before, first)
    # Back to where it was, by another way.
    check(before, second)
    tf.nest.map_structure(np.testing.assert_array_equal, before, kept)
    # Stored, as arrays in the order of the nest, and taken up again.
    np.savez(tmp_path / "state.npz", *tf.nest.flatten(before))
    loaded = np.load(tmp_path / "state.npz")
    flat = [loaded[name] for name in loaded.files]
    check(tf.nest.pack_sequence_as(before, flat), second)
    # Streams of different ages go on as one batch.
    joined = keras_kt.stack_states([after, before])
    new = tokens_of((5, 2), 3)
    output, _ = model.step(new, joined)
    older = np.concatenate([start[chosen], first, new[:3]], 1)
    younger = np.concatenate([start, new[3:]], 1)
    np.testing.assert_allclose(output[:3], model(older)[:, -2:], atol=1e-4)
    np.testing.assert_allclose(output[3:], model(younger)[:, -2:], atol=1e-4)


def beam_search():
    """The function that the page shows."""
    blocks = re.findall(r"```python\n(.*?)```", SERVING.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "def beam_search" in block)
    source = block[block.index("def ") :]
    source = re.match(r"def .*?\n(?=\S|\Z)", source, re.DOTALL).group()
    namespace = {"tf": tf, "keras_kt": keras_kt}
    exec(compile(source, "docs/serving.md", "exec"), namespace)  # noqa: S102
    return namespace["beam_search"]


def test_beams_find_what_all_continuations_hold():
    """Scores of all 81, by one whole call that knows no state."""
    model = Decoder(vocabulary=3, blocks=1)
    prompt = [2, 0, 1, 1]
    new = np.stack(np.meshgrid(*[range(3)] * 4, indexing="ij"), -1)
    everything = np.concatenate(
        [np.tile(prompt, (81, 1)), new.reshape(81, 4)], 1
    )
    logs = tf.nn.log_softmax(model(everything)).numpy()
    places = np.arange(3, 7)
    scores = sum(logs[np.arange(81), i, everything[:, i + 1]] for i in places)
    order = np.argsort(-scores)
    assert -np.diff(scores[order[:28]]).max() > 1e-4  # no ties
    search = beam_search()
    beams, found = search(model, prompt, 27, 4)
    np.testing.assert_array_equal(beams, everything[order[:27]])
    np.testing.assert_allclose(found, scores[order[:27]], atol=1e-4)
    # Narrow beams lose some continuations and no score.
    scored = {tuple(x): y for x, y in zip(everything, scores, strict=True)}
    greedy = keras_kt.generate(model, [prompt], 4, temperature=0).numpy()[0]
    for width in (1, 2, 5):
        beams, found = search(model, prompt, width, 4)
        assert len(beams) == width == len(np.unique(beams, axis=0))
        wanted = [scored[tuple(beam)] for beam in beams.numpy()]
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        if width == 1:
            np.testing.assert_array_equal(beams[0], greedy)


class Client:
    """Streams in one batch, by NumPy and what the server answers alone."""

    def __init__(self, folder):
        self.artifact = tf.saved_model.load(folder)
        self.state = self.call("initial_state", batch_size=np.int32(0))
        self.names = []

    def call(self, endpoint, **arrays):
        arrays = {name: tf.constant(x) for name, x in arrays.items()}
        results = self.artifact.signatures[endpoint](**arrays)
        return {name: x.numpy() for name, x in results.items()}

    def join(self, prompts):
        """Logits at the ends of prompts, by the streams' names."""
        lengths = [len(prompt) for prompt in prompts.values()]
        tokens = np.zeros((len(prompts), max(lengths)), "int32")
        for row, prompt in zip(tokens, prompts.values(), strict=True):
            row[: len(prompt)] = prompt
        state = self.call("initial_state", batch_size=np.int32(len(prompts)))
        results = self.call(
            "prefill_lengths",
            tokens=tokens,
            lengths=np.array(lengths, "int32"),
            **state,
        )
        logits = results.pop("output_0")
        assert logits.shape[:2] == (len(prompts), 1)
        self.names += prompts
        self.state = {
            name: np.concatenate([x, results[name]], axis=0)
            for name, x in self.state.items()
        }
        return dict(zip(prompts, logits[:, 0], strict=True))

    def decode(self, tokens):
        """Logits after one more token of some streams; the others pause."""
        mask = np.array([[name in tokens] for name in self.names])
        column = [[tokens.get(name, 0)] for name in self.names]
        results = self.call(
            "decode_masked",
            tokens=np.array(column, "int32"),
            mask=mask,
            **self.state,
        )
        logits = results.pop("output_0")
        for name, before in self.state.items():
            still = ~mask[:, 0]
            np.testing.assert_array_equal(results[name][still], before[still])
        self.state = results
        return {
            name: row[0]
            for name, row in zip(self.names, logits, strict=True)
            if name in tokens
        }

    def leave(self, names):
        kept = np.array([name not in names for name in self.names], "bool")
        self.state = {name: x[kept] for name, x in self.state.items()}
        self.names = [name for name in self.names if name not in names]


def exported(model, folder):
    return keras_kt.export_saved_model(
        model,
        folder,
        input_signature=[tf.TensorSpec((None, None), "int32", "tokens")],
        streaming=True,
    )


@pytest.mark.parametrize(
    "make",
    (
        lambda: Fading(17, scale=1.0),
        pytest.param(lambda: Decoder(blocks=1), marks=pytest.mark.slow),
    ),
    ids=("fading", "decoder"),
)
def test_streams_join_and_leave_a_served_batch(make, tmp_path):
    """Eight, at different times, and each equals its own whole call."""
    model = make()
    model(tokens_of((1, 3)))
    client = Client(exported(model, tmp_path))
    prompts = {
        i: tokens_of(n, i) for i, n in enumerate((3, 1, 7, 2, 5, 4, 1, 6))
    }
    joins = {0: (0, 1), 2: (2,), 3: (3, 4, 5), 7: (6,), 9: (7,)}
    counts = dict(enumerate((5, 9, 2, 4, 11, 3, 1, 6)))
    rng = np.random.default_rng(0)
    tokens = {i: list(prompt) for i, prompt in prompts.items()}
    heard = {i: [] for i in prompts}
    most = 0
    for tick in range(60):
        logits = {}
        if tick in joins:
            logits |= client.join({i: prompts[i] for i in joins[tick]})
        awake = {
            i: tokens[i][-1]
            for i in client.names
            if i not in logits and rng.random() < 0.7
        }
        if awake:
            logits |= client.decode(awake)
        for i, row in logits.items():
            heard[i].append(row)
            tokens[i].append(int(np.argmax(row)))
        most = max(most, len(client.names))
        client.leave([i for i in client.names if len(heard[i]) > counts[i]])
        if tick > 9 and not client.names:
            break
    assert most > 3 and not client.names
    for i, prompt in prompts.items():
        assert len(heard[i]) == counts[i] + 1
        whole = model(np.array([tokens[i][:-1]], "int32"))[0]
        np.testing.assert_allclose(
            heard[i], whole[len(prompt) - 1 :], atol=1e-4
        )


def test_served_masks_and_lengths_are_named_and_shaped(tmp_path):
    artifact = tf.saved_model.load(exported(Fading(17), tmp_path))
    served = artifact.signatures
    for endpoint, length, extra in (
        ("prefill_masked", None, {"mask": [None, None]}),
        ("prefill_lengths", None, {"lengths": [None]}),
        ("decode_masked", 1, {"mask": [None, 1]}),
    ):
        _, inputs = served[endpoint].structured_input_signature
        shapes = {name: x.shape.as_list() for name, x in inputs.items()}
        assert shapes == {
            "tokens": [None, length],
            "state_0": [None, 5],
            **extra,
        }
        assert set(served[endpoint].structured_outputs) == {
            "output_0",
            "state_0",
        }
    for name in ("mask", "lengths"):
        wrong(
            "another name than 'mask' and 'lengths'",
            lambda name=name: keras_kt.export_saved_model(
                Fading(17),
                tmp_path,
                input_signature=[tf.TensorSpec((None, None), "int32", name)],
                streaming=True,
            ),
        )


def test_a_row_of_length_zero_keeps_its_state(tmp_path):
    model = Fading(17)
    served = tf.saved_model.load(exported(model, tmp_path))
    before = {"state_0": tf.constant(array((3, 5)))}
    result = served.signatures["prefill_lengths"](
        tokens=tf.constant(tokens_of((3, 4))),
        lengths=tf.constant([2, 0, 4]),
        **before,
    )
    after, before = result["state_0"].numpy(), before["state_0"].numpy()
    np.testing.assert_array_equal(after[1], before[1])
    assert np.abs(after - before)[[0, 2]].max(1).min() > 1e-3
