"""What the conversion is tried on: a classifier of words, a model of bytes."""

import re
import zlib

import keras
import numpy as np

from experiments.body import SoftmaxDecoder

WIDTH = 64
HEADS = 4
KEY_DIM = 16
BLOCKS = 2
# Words are told apart by their hash.
VOCABULARY = 8192


class Classifier:
    """Is a review positive? An encoder of its words."""

    metric = "accuracy"

    @staticmethod
    def near_field(args):
        return None

    @staticmethod
    def arrays(split, args):
        texts, labels = split
        return word_array(texts, args.words), labels[:, np.newaxis]

    @staticmethod
    def build():
        tokens = keras.Input((None,), dtype="int32", name="tokens")
        x = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)(tokens)
        for _ in range(BLOCKS):
            x = block(x)
        x = keras.layers.LayerNormalization()(x)
        x = keras.layers.GlobalAveragePooling1D()(x)
        return keras.Model(tokens, keras.layers.Dense(1)(x))

    @staticmethod
    def loss():
        return keras.losses.BinaryCrossentropy(from_logits=True)

    @staticmethod
    def score(outputs, y):
        return float(np.mean((outputs > 0.0) == (y > 0.5)))


@keras.saving.register_keras_serializable(package="experiments")
class ByteModel(keras.Model):
    """Causal blocks of bytes; it streams once they are converted."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = keras.layers.Embedding(257, WIDTH)
        self.blocks = [
            SoftmaxDecoder(
                2 * WIDTH,
                HEADS,
                activation="gelu",
                normalize_first=True,
                key_dim=KEY_DIM,
                local_context=5,
            )
            for _ in range(BLOCKS)
        ]
        self.norm = keras.layers.LayerNormalization()
        self.logits = keras.layers.Dense(257)

    def call(self, tokens, training=None):
        x = self.embedding(tokens)
        for each in self.blocks:
            x = each(x, training=training)
        return self.logits(self.norm(x))

    def initial_state(self, batch_size):
        return [each.initial_state(batch_size) for each in self.blocks]

    def step(self, tokens, state):
        x = self.embedding(tokens)
        states = []
        for each, old in zip(self.blocks, state, strict=True):
            x, new = each.step(x, old)
            states.append(new)
        return self.logits(self.norm(x)), states


class LanguageModel:
    """What is the next byte? A causal decoder."""

    metric = "bits per byte"

    @staticmethod
    def near_field(args):
        return args.near_field or None

    @staticmethod
    def arrays(split, args):
        texts, _ = split
        long = [text for text in texts if len(text) > args.bytes]
        x = byte_array(long, args.bytes + 1)
        return x[:, :-1], x[:, 1:]

    @staticmethod
    def build():
        model = ByteModel()
        model(np.zeros((1, 8), "int32"))
        return model

    @staticmethod
    def loss():
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @staticmethod
    def score(outputs, y):
        nats = keras.losses.sparse_categorical_crossentropy(
            y, outputs, from_logits=True
        )
        return float(np.mean(nats) / np.log(2.0))


TASKS = {"classifier": Classifier, "lm": LanguageModel}


def byte_array(texts, length):
    """`(examples, length)` numbers 1 … 256 of the bytes; 0 pads."""
    array = np.zeros((len(texts), length), "int32")
    for row, text in zip(array, texts, strict=True):
        values = np.frombuffer(text[:length], "uint8")
        row[: len(values)] = values.astype("int32") + 1
    return array


def word_array(texts, length):
    """`(examples, length)` hashes of the words; 0 pads."""
    array = np.zeros((len(texts), length), "int32")
    for row, text in zip(array, texts, strict=True):
        words = re.findall(rb"[a-z']+", text.lower())[:length]
        hashes = [zlib.crc32(word) % (VOCABULARY - 1) + 1 for word in words]
        row[: len(hashes)] = hashes
    return array


def block(x):
    normed = keras.layers.LayerNormalization()(x)
    attention = keras.layers.MultiHeadAttention(HEADS, KEY_DIM)
    x = keras.layers.Add()([x, attention(normed, normed)])
    hidden = keras.layers.LayerNormalization()(x)
    hidden = keras.layers.Dense(2 * WIDTH, activation="gelu")(hidden)
    return keras.layers.Add()([x, keras.layers.Dense(WIDTH)(hidden)])
