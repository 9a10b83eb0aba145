"""The shape of the package: who may import whom, and how long files are."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "keras_kt"
# What each room (a module, or a folder) may import of the others. The three
# axes, `priors`, `features` and `ops`, meet in `layers`.
MAY_IMPORT = {
    "_checks": set(),
    "written_gradients": set(),
    "numerics": {"written_gradients"},
    "_recipe": {"_checks"},
    "priors": {"_checks", "_recipe"},
    "features": {"_checks", "_recipe", "numerics", "priors"},
    "ops": {"numerics", "written_gradients"},
    "layers": {"_checks", "features", "ops", "priors"},
    "kernels": {"features", "priors"},
    "systems": {"_checks", "features", "priors"},
    "generation": {"_checks"},
    "serving": {"ops", "written_gradients"},
    "conversion": {
        "_checks",
        "features",
        "kernels",
        "layers",
        "ops",
        "priors",
    },
    "diagnostics": {"_checks", "conversion", "features", "kernels", "layers"},
}
LIMIT = 400
# Files that are still longer, and how long they may be: to be cut, not raised.
TOO_LONG = {
    "layers/attention.py": 1030,
    "ops/linear.py": 645,
    "diagnostics/inspect.py": 620,
    "conversion/errors.py": 525,
    "layers/transformer.py": 485,
    "conversion/calibrate.py": 475,
    "serving.py": 425,
}


def files():
    """The package's modules, but its own `__init__`."""
    top = PACKAGE / "__init__.py"
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != top]


def room(path):
    """The module or folder of the package that a file is, or is in."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path):
    """Dotted names that a file imports of the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if (node.module or "").split(".")[0] == "keras_kt":
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def test_every_room_is_in_the_table():
    assert {room(path) for path in files()} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", files(), ids=lambda p: f"{room(p)}/{p.stem}")
def test_rooms_import_what_the_table_allows(path):
    for name in imports(path):
        other = name.split(".")[1]
        if other != room(path):
            assert other in MAY_IMPORT[room(path)], (path, name)


def test_the_table_has_no_circle():
    done = set()
    while len(done) < len(MAY_IMPORT):
        ready = {x for x, needs in MAY_IMPORT.items() if needs <= done} - done
        assert ready, set(MAY_IMPORT) - done
        done |= ready


@pytest.mark.parametrize("path", files(), ids=lambda p: f"{room(p)}/{p.stem}")
def test_no_file_reaches_for_private_names_of_another(path):
    modules = set()
    for name in imports(path):
        *_, module, last = name.split(".")
        # `_checks` and `_recipe` are private to the package, not to a room.
        is_private = last.startswith("_") and module != "keras_kt"
        assert not is_private, name
        modules.add(last)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            is_private = re.match("_[^_]", node.attr)
            assert not (node.value.id in modules and is_private), node.attr


def test_files_are_short():
    lengths = {
        str(path.relative_to(PACKAGE)): len(path.read_text().splitlines())
        for path in files()
    }
    for name, length in lengths.items():
        assert length <= TOO_LONG.get(name, LIMIT), (name, length)
    # What was cut leaves the list.
    assert all(lengths[name] > LIMIT for name in TOO_LONG)


def test_only_the_priors_and_their_oracle_import_tfp():
    importing = re.compile(r"(from|import) tensorflow_probability")
    users = {room(p) for p in files() if importing.search(p.read_text())}
    assert users == {"kernels", "priors"}


def test_tfp_is_imported_when_it_is_used():
    """It costs seconds, and most models do without it."""
    code = (
        "import sys, keras\n"
        "before = set(sys.modules)\n"
        "import keras_kt, numpy as np\n"
        "x = np.ones((1, 3, 4))\n"
        "keras_kt.KernelizedAttention(2, 4, spectral_prior='mixture')(x, x)\n"
        "late = {'tensorflow_probability', 'tf_keras', 'matplotlib'}\n"
        "assert not late & set(sys.modules) - before, set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
