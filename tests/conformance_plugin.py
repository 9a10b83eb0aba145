"""Runs Keras's own tests of attention layers on ours.

`make conformance` runs the test files that the Keras wheel ships, unmodified,
with this plugin: it puts KernelizedAttention, with one route forced, in the
place of `MultiHeadAttention`, and KernelizedGroupedQueryAttention in that of
`GroupQueryAttention`, and adds the spectral weights to the counts that the
layer contract expects. Every case that is left out is named with its reason.
"""

import os
import re

import keras
import numpy as np
import pytest
from keras.src import layers, testing

import keras_kt

ROUTE = os.environ.get("KERAS_KT_ROUTE", "auto")

# One raw scale and one draw of base noise beyond MultiHeadAttention's weights.
EXTRA_TRAINABLE, EXTRA_FROZEN = 1, 1

# Patterns of whole test names, and why they are left out.
NOT_APPLICABLE = {
    "test_causal_only_skipped_for_subclass": (
        "pins that a subclass is handed a dense T×S mask; here causal and "
        "padding masks reach it as flags and vectors, which keeps it linear"
    ),
    "test_lora": (
        "counts MultiHeadAttention's 8 and 3 weights; restated with ours in "
        "test_attention.py"
    ),
}
NEEDS_THE_MATRIX = {
    pattern: "asks for the attention matrix, which the linear route refuses"
    for pattern in (
        "test_attention_axes_negative_indexing",
        "test_causal_only_fast_path",
        "test_causal_only_masks_non_4d_inputs",
        "test_causal_only_masks_when_fused_path_disabled_.*",
        "test_causal_only_with_other_mask_falls_back",
        "test_compute_attention_combines_causal_and_explicit_mask_.*",
        "test_correctness_disable_flash_attention",
        "test_masking_(causal|not_causal)",
        "test_masking_with_different_shapes",
        "test_sliding_window",
        r"test_symbolic_return_attention_scores\d",
        "test_symbolic_shape_with_return_attention_scores",
    )
}


class Swapped:
    """One of our layers as the Keras tests build and fill it."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("implementation", ROUTE)
        # Unbiased, with enough features to stand within their 1e-2 of softmax.
        kwargs.setdefault("spectral_prior", keras_kt.NormalPrior(radius="chi"))
        kwargs.setdefault("num_features", 8192)
        kwargs.setdefault("seed", 7)
        super().__init__(*args, **kwargs)

    def set_weights(self, weights):
        # `test_correctness` sets the eight arrays of Keras's layer.
        own = self.get_weights()
        super().set_weights([*weights, *own[len(weights) :]])


class MultiHeadAttention(Swapped, keras_kt.KernelizedAttention):
    """In the place of Keras's."""


class GroupedQueryAttention(Swapped, keras_kt.KernelizedGroupedQueryAttention):
    """In the place of Keras's."""

    def _compute_attention(self, query, key, value, **kwargs):
        # Keras repeats heads of keys and values first, and a test that calls
        # this itself has so many; ours takes those that there are.
        repeats = key.shape[2] // self.num_key_value_heads
        key, value = (x[:, :, ::repeats] for x in (key, value))
        return super()._compute_attention(query, key, value, **kwargs)


def pytest_configure(config):
    for swapped in (MultiHeadAttention, GroupedQueryAttention):
        # The tests look classes up by their module path when they deserialise.
        keras.saving.register_keras_serializable("conformance")(swapped)
        setattr(layers, swapped.__name__, swapped)
    plain = testing.TestCase.run_layer_test

    def run_layer_test(self, layer_cls, init_kwargs, input_shape, **kwargs):
        kwargs["expected_num_trainable_weights"] += EXTRA_TRAINABLE
        kwargs["expected_num_non_trainable_weights"] += EXTRA_FROZEN
        return plain(self, layer_cls, init_kwargs, input_shape, **kwargs)

    testing.TestCase.run_layer_test = run_layer_test
    np.random.seed(0)


def pytest_collection_modifyitems(items):
    excluded = dict(NOT_APPLICABLE)
    if ROUTE == "linear":
        excluded.update(NEEDS_THE_MATRIX)
    for item in items:
        for pattern, reason in excluded.items():
            if re.fullmatch(pattern, item.originalname or item.name):
                item.add_marker(pytest.mark.skip(reason=reason))
