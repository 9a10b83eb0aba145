"""Package metadata; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "keras_kt" / "__init__.py").read_text()
).group(1)
SOURCE = "https://github.com/keras-kt/keras_kt"
SITE = "https://keras-kt.github.io/keras_kt/"

setup(
    name="keras_kt",
    version=VERSION,
    description=(
        "Linear-time attention with learned kernels, for Keras 3 on TensorFlow"
    ),
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The keras_kt authors",
    url=SOURCE,
    project_urls={
        "Documentation": SITE,
        "Source": SOURCE,
        "Issues": f"{SOURCE}/issues",
        "Changelog": f"{SOURCE}/blob/main/CHANGELOG.md",
    },
    license="Apache-2.0",
    packages=find_packages(include=["keras_kt", "keras_kt.*"]),
    package_data={"keras_kt": ["py.typed"]},
    python_requires=">=3.10",
    # The ranges are what `make matrix` has passed.
    install_requires=[
        "tensorflow>=2.18,<2.22",
        "keras>=3.8,<4",
        "tensorflow-probability>=0.24",
        # tensorflow-probability imports it but does not install it.
        "tf-keras>=2.18,<2.22",
        "numpy",
    ],
    extras_require={
        "plot": ["matplotlib"],
        "serving": ["tensorflow-serving-api>=2.18,<2.22"],
        "text": ["tensorflow-text>=2.18,<2.22"],
        # The TPU compiler; it uses jaxlib's private names, so one version.
        "tpu-check": ["jax[tpu]==0.10.2"],
        "docs": [
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6,<10",
            "mkdocstrings[python]>=1",
            "latex2mathml",
            # Notebooks become pages.
            "nbconvert",
            # Signatures are laid out by it.
            "ruff",
            # Searches the site as a browser does, in tests/test_site.py.
            "lunr",
        ],
        "test": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "matplotlib",
            "ai-edge-litert",
            "onnxruntime",
            "tf2onnx",
            # What executes the notebooks.
            "ipykernel",
            "jupytext",
            "nbclient",
            # Its models are converted; it needs Python 3.11.
            "keras-hub; python_version >= '3.11'",
        ],
        # `make matrix` and `make package`.
        "release": ["nox[uv]>=2024.10.9"],
    },
    keywords=[
        "attention",
        "keras",
        "kernel",
        "linear attention",
        "performer",
        "random features",
        "tensorflow",
        "transformer",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
