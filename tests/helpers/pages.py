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


def public_names(module=keras_kt, prefix=""):
    """Dotted names below `keras_kt` and their values, of public modules too."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if name[0] != "_"
            and getattr(value, "__module__", None) == module.__name__
        ]
    for name in names:
        value = getattr(module, name)
        yield prefix + name, value
        if inspect.ismodule(value):
            yield from public_names(value, f"{prefix}{name}.")


def documented():
    """Public functions and classes, those of public modules too."""
    for name, value in public_names():
        if not inspect.ismodule(value):
            yield pytest.param(value, id=name)
