# %% [markdown]
# # Watch a kernel being learned
#
# Attention weighs keys by a kernel of the query and the key. In
# `MultiHeadAttention` it is fixed, `exp(q·k)`. In `KernelizedAttention` it
# comes from a distribution of frequencies whose parameters are trained with the
# model.
#
# Here the right kernel is known, so that we can see whether it is found. Points
# in the plane carry noisy numbers, and a query asks for their mean around
# itself, in which near points count by two length scales at once, 0.6 and 3.
# From the answers alone the layer has to find out how fast its weights should
# fall off.

# %%
import os
import tempfile
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_kt

warnings.filterwarnings("ignore", "Trigonometric features train badly")
keras.utils.set_random_seed(0)

# %% tags=["parameters"]
EXAMPLES, EPOCHS = 512, 24

# %% [markdown]
# ## The task
#
# The true kernel is a mixture of two Gaussians of the distance. No projection
# of queries and keys makes one of them into two.

# %%
POINTS = 128


def true_kernel(distance):
    near = np.exp(-0.5 * (distance / 0.6) ** 2)
    far = np.exp(-0.5 * (distance / 3.0) ** 2)
    return 0.8 * near + 0.2 * far


def make(count, rng):
    """Queries, keys, values and answers: `(count, points, size)`."""
    queries, keys = rng.uniform(-3, 3, (2, count, POINTS, 2))
    values = rng.normal(size=(count, POINTS, 1))
    between = queries[:, :, None] - keys[:, None]
    weights = true_kernel(np.linalg.norm(between, axis=-1))
    weights /= weights.sum(axis=-1, keepdims=True)
    arrays = queries, keys, values, weights @ values
    return [array.astype("float32") for array in arrays]


rng = np.random.default_rng(0)
*inputs, answers = make(EXAMPLES, rng)
*test_inputs, test_answers = make(128, rng)

# %% [markdown]
# ## A layer and nothing else
#
# One head, whose projections are the identity and stay so: all that can be
# learned is the kernel. The prior is a mixture of two Gaussians of frequencies.
# Features are trigonometric, whose kernel depends on the distance alone;
# `qk_norm=None` leaves queries and keys as long as they are, which a warning
# says is bad in general: it is meant here, where they are the points. In a
# plane `coupling="sobol"` spreads frequencies better than the default, which is
# for the many dimensions of a head.


# %%
def model_of(prior):
    queries = keras.Input((POINTS, 2), name="queries")
    keys = keras.Input((POINTS, 2), name="keys")
    values = keras.Input((POINTS, 1), name="values")
    layer = keras_kt.KernelizedAttention(
        num_heads=1,
        key_dim=2,
        value_dim=1,
        use_bias=False,
        spectral_prior=prior,
        feature_map="trigonometric",
        num_features=256,
        qk_norm=None,
        output_shape=(1,),
        seed=0,
        name="attention",
    )
    outputs = layer(queries, values, keys)
    for name in ("query", "key", "value", "output"):
        projection = getattr(layer, f"{name}_dense")
        kernel = projection.kernel
        size = max(kernel.shape)
        kernel.assign(np.reshape(np.eye(size), kernel.shape))
        projection.trainable = False
    model = keras.Model([queries, keys, values], outputs)
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    return model, layer


spread = {"coupling": "sobol", "radius": "chi"}
model, layer = model_of(keras_kt.MixturePrior(num_components=2, **spread))
for weight in layer.trainable_weights:
    print(weight.path, tuple(weight.shape))

# %% [markdown]
# ## Training, and watching
#
# `SpectralMonitor` is a callback that keeps the kernel at some distances, and
# writes it to TensorBoard. We also keep the whole profile of the kernel, at
# each epoch.

# %%
distances = np.linspace(0.0, 6.0, 61)
profiles = {}


def keep(epoch, logs=None):
    profile = keras_kt.diagnostics.kernel_profile(layer, distances)
    profiles[epoch] = profile.kernel[0]


keep(0)
figure = keras_kt.diagnostics.plots.plot_spectrum(layer)
_ = figure.suptitle("frequencies before training")
# %%
monitor = keras_kt.diagnostics.SpectralMonitor(
    tempfile.mkdtemp(), distances=(0.5, 1.0, 3.0)
)
keeper = keras.callbacks.LambdaCallback(
    on_epoch_end=lambda epoch, logs: keep(epoch + 1)
)
history = model.fit(
    inputs,
    answers,
    batch_size=16,
    epochs=EPOCHS,
    verbose=0,
    callbacks=[monitor, keeper],
)
milestones = sorted({1, 2, EPOCHS // 3, EPOCHS} - {0})
for epoch in milestones:
    print(f"epoch {epoch:2d}: loss {history.history['loss'][epoch - 1]:.5f}")

# %% [markdown]
# The kernel moves to the true one, dotted. The near length is found first,
# since most of the answer depends on it; the slow tail follows.

# %%
figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
for number, epoch in enumerate([0, *milestones]):
    shade = plt.cm.viridis(0.9 - 0.2 * number)
    panel.plot(distances, profiles[epoch], color=shade, label=f"epoch {epoch}")
panel.plot(distances, true_kernel(distances), "k:", lw=2, label="the true one")
panel.set_xlabel("|q − k|")
panel.set_ylabel("kernel")
_ = panel.legend()
# %% [markdown]
# What the monitor has kept: the kernel at three distances, the probabilities of
# the mixture's components, whose true ones are 0.2 and 0.8, and the smoothing
# of trigonometric features.

# %%
figure = keras_kt.diagnostics.plots.plot_history(monitor)

# %% [markdown]
# By Bochner's theorem the kernel is the Fourier transform of the law of the
# frequencies. The wide component makes the near length, the narrow one the far
# one.

# %%
figure = keras_kt.diagnostics.plots.plot_spectrum(layer)
_ = figure.suptitle("frequencies after training")

# %% [markdown]
# ## Does it matter?
#
# The same layer with one Gaussian in place of the mixture, and the mixture as
# it was before training. The error is that of predictions on points that were
# not seen, as a share of the variance of the answers.


# %%
def share(model):
    loss = model.evaluate(test_inputs, test_answers, verbose=0)
    return loss / np.var(test_answers)


single, _ = model_of(keras_kt.NormalPrior(**spread))
single.fit(inputs, answers, batch_size=16, epochs=EPOCHS, verbose=0)
untrained, _ = model_of(keras_kt.MixturePrior(num_components=2, **spread))
print(f"mixture, before training: {share(untrained):.3f}")
print(f"one Gaussian, learned:    {share(single):.3f}")
print(f"mixture, learned:         {share(model):.3f}")

# %% [markdown]
# In a real model nobody knows the true kernel; the callback and the pictures
# are the same. `SpectralMonitor` writes to TensorBoard while `fit` runs, and
# `keras_kt.diagnostics.health(model, batch)` says what looks wrong.
