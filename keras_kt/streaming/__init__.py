"""Streams: causal models in steps, from a state of fixed size.

`protocol` says what a model needs for that, `streaming_model` gives it to a
functional one.
"""

from keras_kt.streaming.model import streaming_model
from keras_kt.streaming.protocol import mask_argument, missing_methods
from keras_kt.streaming.stream import stream_of

__all__ = ["mask_argument", "missing_methods", "stream_of", "streaming_model"]
