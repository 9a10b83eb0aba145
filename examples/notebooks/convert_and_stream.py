# %% [markdown]
# # Convert a KerasHub language model and stream it
#
# A language model of KerasHub keeps the keys and values of all tokens while it
# generates: its cache grows with the text. Converted to linear attention it
# keeps a state of fixed size instead, and its own `generate`, samplers and end
# tokens included, runs on that.
#
# The model here is a Llama so small that it trains in a minute, on bytes of
# text that Python brings along: the topics of its `help()`. Nothing is
# downloaded. With a model of yours, `from_preset` takes the place of the first
# part. Needs `pip install keras-hub`.

# %%
import os
import pydoc_data.topics

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np
import tensorflow as tf

import keras_kt
from keras_kt import conversion

keras.utils.set_random_seed(0)

# %% tags=["parameters"]
STEPS, DISTILL_STEPS, LENGTH, NEW_BYTES = 400, 40, 96, 160

# %%
text = "\n".join(pydoc_data.topics.topics.values()).encode()
data = np.frombuffer(text, "uint8").astype("int32")
cut = len(data) * 9 // 10
print(f"{len(data):,} bytes, of which {len(data) - cut:,} test")


def batches(part, count, seed):
    """Windows of the text, and of each byte the one that follows."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(len(part) - LENGTH, size=(16 * count, 1))
    windows = part[starts + np.arange(LENGTH + 1)]
    x = {
        "token_ids": windows[:, :-1],
        "padding_mask": np.ones_like(windows[:, 1:]),
    }
    return tf.data.Dataset.from_tensor_slices((x, windows[:, 1:])).batch(16)


train, test = batches(data[:cut], STEPS, 0), batches(data[cut:], 8, 1)

# %% [markdown]
# ## The softmax model
#
# Two layers, four heads of queries that share two of keys and values, rotary
# positions: a Llama.

# %%
backbone = keras_hub.models.LlamaBackbone(
    vocabulary_size=256,
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=96,
    intermediate_dim=192,
)
teacher = keras_hub.models.LlamaCausalLM(backbone)
cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def bits(model):
    nats = [cross_entropy(y, model(x, training=False)) for x, y in test]
    return np.mean(nats) / np.log(2.0)


schedule = keras.optimizers.schedules.CosineDecay(3e-3, STEPS)
teacher.compile(optimizer=keras.optimizers.AdamW(schedule), loss=cross_entropy)
teacher.fit(train, shuffle=False, verbose=0)
print(f"softmax: {bits(teacher):.3f} bits per byte")

# %% [markdown]
# ## Converted
#
# `convert_attention` copies the model and replaces its attention. Frequencies
# are weights here (`EmpiricalPrior`), of queries and of keys apart, which
# learns most from a teacher.

# %%
student, report = keras_kt.convert_attention(
    teacher,
    spectral_prior=keras_kt.EmpiricalPrior(tied=False),
    feature_map=keras_kt.PositiveFeatures("self"),
    num_features=64,
)
print(report)
print(f"converted: {bits(student):.3f} bits per byte")

# %% [markdown]
# ## Distilled
#
# `distill` trains kernels on the teacher's attention, each layer by itself;
# `distill_outputs` trains the whole on its predictions. Neither needs labels.

# %%
conversion.distill(student, teacher, train, steps=DISTILL_STEPS)
print(f"layers distilled: {bits(student):.3f} bits per byte")
rest = train.skip(DISTILL_STEPS)
conversion.distill_outputs(student, teacher, rest, steps=2 * DISTILL_STEPS)
print(f"outputs distilled: {bits(student):.3f} bits per byte")

# %% [markdown]
# ## It generates
#
# By KerasHub's own `generate`, compiled once. Prompts are bytes here; a model
# with a preprocessor takes texts.

# %%
PROMPT = "The class "


def generated(model, length):
    prompt = np.frombuffer(PROMPT.encode(), "uint8")
    tokens = np.zeros((1, length), "int32")
    tokens[0, : len(prompt)] = prompt
    mask = np.arange(length)[np.newaxis] < len(prompt)
    given = {"token_ids": tokens, "padding_mask": mask.astype("int32")}
    tokens = model.generate(given, stop_token_ids=None)["token_ids"][0]
    return bytes(np.asarray(tokens, "uint8")).decode(errors="replace")


for name, model in (("softmax", teacher), ("linear", student)):
    model.compile(sampler=keras_hub.samplers.TopKSampler(5, seed=0))
    print(f"--- {name}\n{generated(model, len(PROMPT) + NEW_BYTES)}\n")

# %% [markdown]
# ## What it keeps
#
# The softmax model's cache grows with the text, the linear one's state does
# not.


# %%
class Sampler(keras_hub.samplers.GreedySampler):
    """Greedy; looks at what is kept between two tokens."""

    def __call__(self, *args, cache, **kwargs):
        self.kept = cache.shape.num_elements() * cache.dtype.size
        return super().__call__(*args, cache=cache, **kwargs)


kept = {}
for name, model in (("softmax", teacher), ("linear", student)):
    model.compile(sampler=Sampler())
    for length in (64, 512):
        generated(model, length)
        kept[name, length] = model.sampler.kept
        print(f"{name}, {length} bytes: {kept[name, length] / 1024:,.0f} KiB")

# %% [markdown]
# The same student can be saved, and exported with an endpoint that generates:
# see *Converting a trained model* in the documentation.
