"""Functional models that stream, made at random, and how they are streamed."""

import keras
import numpy as np

import keras_kt

VOCABULARY, WIDTH = 19, 12
layers = keras.layers


@keras.saving.register_keras_serializable("keras_kt_tests")
class Positions(layers.Layer):
    """A learned position embedding that knows nothing of streams."""

    def build(self, input_shape):
        self.positions = self.add_weight(input_shape[1:], "random_normal")

    def call(self, x):
        return x + self.positions


def attend(x, rng):
    options = [
        {},
        {"decay": "constant"},
        {"decay": "gated", "spectral_prior": "mixture"},
        {"near_field": 3},
        {"feature_map": "trigonometric"},
    ]
    layer = keras_kt.KernelizedAttention(
        3, 4, seed=int(rng.integers(99)), **options[rng.integers(len(options))]
    )
    return layer(layers.LayerNormalization()(x), x, use_causal_mask=True)


def decode(x, rng):
    size = [None, 4][rng.integers(2)]
    return keras_kt.KernelizedTransformerDecoder(
        14, 3, seed=0, local_context=size, normalize_first=bool(size)
    )(x)


def convolve(x, rng):
    size, rate = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    return layers.Conv1D(
        WIDTH, size, padding="causal", dilation_rate=rate, activation="tanh"
    )(x)


def recur(x, rng):
    kinds = layers.GRU, layers.LSTM, layers.SimpleRNN
    return kinds[rng.integers(3)](WIDTH, return_sequences=True)(x)


def linear_heads(x, rng):
    heads = layers.Reshape((-1, 3, WIDTH // 3))
    q, k, v = (heads(layers.Dense(WIDTH)(x)) for _ in range(3))
    core = keras_kt.LinearAttention(3, WIDTH // 3, seed=0)
    x = core(q, k, v, use_causal_mask=True)
    return layers.Reshape((-1, WIDTH))(x)


def per_token(x, rng):
    choice = rng.integers(6)
    if choice == 0:
        return layers.EinsumDense("btc,cd->btd", (None, WIDTH))(x)
    if choice == 1:
        return layers.BatchNormalization()(layers.Dense(WIDTH)(x))
    if choice == 2:
        gate = layers.Dense(WIDTH, activation="sigmoid")(x)
        return layers.Multiply()([x, gate])
    if choice == 3:
        x = layers.Concatenate(axis=-1)(
            [x, 0.5 * layers.UnitNormalization()(x)]
        )
        return layers.Dense(WIDTH)(layers.Dropout(0.3)(x))
    if choice == 4:
        return keras.ops.tanh(x * 2.0) - keras.ops.flip(x, axis=-1)
    return layers.TimeDistributed(layers.Dense(WIDTH, "gelu"))(x)


def nested(x, rng):
    tokens = keras.Input((None, WIDTH))
    y = recur(tokens, rng) + tokens
    inner = keras.Model(tokens, convolve(y, rng))
    # Shared: two calls, two states.
    return inner(inner(x))


def sequential(x, rng):
    return keras.Sequential(
        [
            layers.Dense(WIDTH, activation="relu"),
            layers.GRU(WIDTH, return_sequences=True),
        ]
    )(x)


PARTS = (
    attend,
    decode,
    convolve,
    recur,
    linear_heads,
    per_token,
    nested,
    sequential,
)


def random_model(seed, mask_zero=False, parts=PARTS):
    """A causal model of a few of these parts, with weights that are not new."""
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = layers.Embedding(VOCABULARY, WIDTH, mask_zero=mask_zero)(tokens)
    for index in rng.permutation(len(parts))[:3]:
        y = parts[index](x, rng)
        x = layers.Add()([x, y]) if rng.integers(2) else y
    x = layers.LayerNormalization()(x)
    model = keras.Model(tokens, layers.Dense(VOCABULARY)(x))
    shift(model, rng)
    return model


def shift(model, rng):
    """Moves weights away from where they start."""
    for weight in model.trainable_weights:
        noise = 0.1 * rng.normal(size=weight.shape)
        weight.assign_add(noise.astype("float32"))


def random_cuts(length, seed):
    """Ends of stretches that make up a stream."""
    rng = np.random.default_rng(seed)
    inner = rng.choice(np.arange(1, length), rng.integers(1, 5), replace=False)
    return [0, *sorted(map(int, inner)), length]


def run(stream, tokens, cuts, mask=None):
    """Outputs of a stream that is cut, joined."""
    state, outputs = stream.initial_state(len(tokens)), []
    for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
        some = {} if mask is None else {"mask": mask[:, begin:end]}
        output, state = stream.step(tokens[:, begin:end], state, **some)
        outputs.append(output)
    return np.concatenate(outputs, axis=1)
