"""Types: public names have them, and mypy accepts them and what uses them."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import keras_kt
from tests.helpers.pages import ROOT, public_names

TYPED = ROOT / "tests" / "typed" / "public_names.py"
# What Keras calls, with arguments that it describes.
OF_KERAS = {
    "build",
    "compute_output_shape",
    "compute_output_spec",
    "from_config",
    "get_config",
    "load_own_variables",
    "on_epoch_end",
    "on_train_begin",
    "on_train_end",
    "save_own_variables",
}
# For those who write layers like these; their docstrings say what they take.
INNER = {
    "assign_value",
    "attend",
    "build_kernel",
    "build_projections",
    "check_mask",
    "heads_attention",
    "kernel_inputs",
    "make_attention",
    "paced_weight",
    "rates",
    "rotated",
}


def public_functions():
    """Public functions, constructors and methods by their dotted names."""
    for name, value in public_names():
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            yield from methods(name, value)


def methods(name, kind):
    for method in dir(kind):
        value = inspect.getattr_static(kind, method)
        value = getattr(value, "__func__", value)
        is_ours = str(getattr(value, "__module__", None)).startswith("keras_kt")
        is_public = not method.startswith("_") or method == "__init__"
        if is_ours and is_public and inspect.isfunction(value):
            if method not in OF_KERAS | INNER:
                yield f"{name}.{method}", value


def untyped(function):
    """Arguments of a function that have no types, and `return`."""
    signature = inspect.signature(function)
    for name, parameter in signature.parameters.items():
        if (
            name not in ("self", "cls")
            and parameter.annotation is parameter.empty
        ):
            yield name
    if function.__name__ != "__init__":
        if signature.return_annotation is signature.empty:
            yield "return"


def test_public_functions_have_types():
    missing = {
        name: list(untyped(function)) for name, function in public_functions()
    }
    assert len(missing) > 100
    assert not {name: x for name, x in missing.items() if x}


def test_a_missing_type_is_seen():
    def function(self, x, y: int = 1, **kwargs) -> None:
        pass

    assert list(untyped(function)) == ["x", "kwargs"]


def test_the_typed_program_uses_every_public_name():
    used = {
        node.attr if isinstance(node, ast.Attribute) else node.name
        for node in ast.walk(ast.parse(TYPED.read_text()))
        if isinstance(node, (ast.Attribute, ast.alias))
    }
    assert set(keras_kt.__all__) <= used


def test_the_marker_of_types_is_in_the_package():
    assert (Path(keras_kt.__file__).parent / "py.typed").exists()


def mypy(*words, **options):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is missing")
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_mypy_accepts_the_package_and_the_typed_program():
    done = mypy()
    assert done.returncode == 0, done.stdout


WRONG = """\
import keras_kt
keras_kt.KernelizedAttention("four", 8)
keras_kt.KernelizedAttention(4, 8, num_feature=64)
keras_kt.KernelizedAttention(4, 8, spectral_prior=3)
keras_kt.MixturePrior(num_components=None)
keras_kt.generate(None, [[1]], "many")
keras_kt.paper_system(5)
"""


@pytest.mark.slow
def test_mypy_refuses_wrong_arguments(tmp_path):
    """All lines but that of a misspelt name, which `**kwargs` takes."""
    path = tmp_path / "wrong.py"
    path.write_text(WRONG)
    done = mypy("--config-file", ROOT / "pyproject.toml", path)
    lines = {
        int(line.split(":")[1])
        for line in done.stdout.splitlines()
        if "wrong.py" in line
    }
    assert lines == {2, 4, 5, 6, 7}, done.stdout
