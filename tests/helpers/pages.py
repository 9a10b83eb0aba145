"""What the documentation is made of: pages, and the names of the package."""

import inspect
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

import keras_kt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What code on the pages may use without importing it.
GLOBALS = {
    "keras": keras,
    "keras_kt": keras_kt,
    "np": np,
    "tempfile": tempfile,
    "tf": tf,
    "tfd": tfp.distributions,
}


def documented():
    """Public names, and those of public modules."""
    for name in keras_kt.__all__:
        value = getattr(keras_kt, name)
        if not inspect.ismodule(value):
            yield pytest.param(value, id=name)
            continue
        for inner, function in inspect.getmembers(value, inspect.isfunction):
            is_own = function.__module__.startswith(value.__name__)
            if is_own and inner[0] != "_":
                yield pytest.param(function, id=f"{name}.{inner}")
