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
    "shared_traces": set(),
    "written_gradients": set(),
    "numerics": {"written_gradients"},
    "_pace": set(),
    "_recipe": {"_checks", "_pace"},
    "priors": {"_checks", "_recipe"},
    "features": {"_checks", "_recipe", "numerics", "priors"},
    "ops": {"numerics", "shared_traces", "written_gradients"},
    "layers": {"_checks", "_pace", "features", "ops", "priors"},
    "kernels": set(),
    "systems": {"_checks", "features", "priors"},
    # How layers hand masks on, and the order of visible tokens.
    "streaming": {"layers", "ops"},
    "generation": {"_checks", "layers", "ops", "streaming"},
    "serving": {"_checks", "ops", "streaming"},
    "conversion": {
        "_checks",
        "features",
        "kernels",
        "layers",
        "ops",
        "priors",
    },
    "diagnostics": {"_checks", "conversion", "kernels", "layers"},
}
LIMIT = 400


# Private names of objects that a file may use though it does not define them.
FOREIGN = {
    # The public interface of NamedTuples.
    "_asdict",
    "_fields",
    "_make",
    "_replace",
    # How Keras hands a mask on; it documents the name.
    "_keras_mask",
    # Keras has no public walk over the layers that a layer tracks, and none
    # over its own losses without those of the layers in it.
    "_flatten_layers",
    "_losses",
    # Keras has no public way to replace a layer in a built one, to tell a
    # model that is a graph, or to tell where in a file a layer's weights are.
    "_tracker",
    "_run_through_graph",
    "_h5_entry_path",
    # Where KerasHub's decoder block keeps its attention.
    "_self_attention_layer",
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


def tree_of(path):
    return ast.parse(path.read_text())


def private_definitions(tree):
    """Private names that a file defines: its own, and those of its classes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and _is_own(node.value):
            if isinstance(node.ctx, ast.Store):
                yield node.attr


def _is_own(node):
    """Whether an expression is `self`, `cls` or `super()`."""
    if isinstance(node, ast.Call):
        node = node.func
    return isinstance(node, ast.Name) and node.id in ("self", "cls", "super")


def reaches(source):
    """Private attributes of other objects, `other._name`, used in a source."""
    tree = ast.parse(source)
    own = set(private_definitions(tree))
    for node in ast.walk(tree):
        owner, name = None, ""
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif _is_by_name(node) and isinstance(node.args[1], ast.Constant):
            owner, name = node.args[0], node.args[1].value
        if owner is None or _is_own(owner) or name in own | FOREIGN:
            continue
        if re.match("_[^_]", name):
            yield ast.unparse(node)


def _is_by_name(node):
    """Whether a node is `getattr(x, name)` or its like."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr", "setattr")
    )


@pytest.mark.parametrize("path", files(), ids=lambda p: f"{room(p)}/{p.stem}")
def test_no_file_reaches_into_objects_of_another(path):
    assert not list(reaches(path.read_text()))


def test_a_reach_is_seen():
    source = "class A:\n    def f(self, layer):\n        self._x = 1\n"
    assert not list(reaches(source + "        return layer._x\n"))
    assert list(reaches(source + "        return layer._y\n")) == ["layer._y"]
    assert list(reaches(source + "        return getattr(layer, '_y')\n"))
    assert not list(reaches(source + "        return super()._y()\n"))


def axes_classes():
    """Classes of priors and maps, by the file that defines them."""
    return {
        node.name: path
        for axis in ("priors", "features")
        for path in (PACKAGE / axis).glob("*.py")
        for node in tree_of(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }


def asked_types(source):
    """Names of the classes that a source compares types with."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.MatchClass):
            yield from _names(node.cls)
        elif isinstance(node, ast.Compare) and "type(" in ast.unparse(node):
            yield from _names(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("isinstance", "issubclass"):
                yield from _names(node.args[1])


def _names(node):
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr


@pytest.mark.parametrize("path", files(), ids=lambda p: f"{room(p)}/{p.stem}")
def test_priors_and_maps_are_asked_for_capabilities_not_types(path):
    # The tables of names, one for each axis, tell an instance from a name.
    tables = {PACKAGE / axis / "__init__.py" for axis in ("priors", "features")}
    if path in tables:
        return
    classes = axes_classes()
    for name in asked_types(path.read_text()):
        assert classes.get(name, path) == path, name


def test_asking_for_a_type_is_seen():
    for source in (
        "isinstance(x, priors.NormalPrior)",
        "isinstance(x, (int, NormalPrior))",
        "issubclass(x, NormalPrior)",
        "type(x) is NormalPrior",
        "match x:\n    case NormalPrior():\n        pass",
    ):
        assert "NormalPrior" in set(asked_types(source)), source
    assert "NormalPrior" in axes_classes()


def test_one_file_replaces_methods_of_layers():
    """`probe`: hooks there nest, and are gone when their context ends."""
    for path in files():
        if path == PACKAGE / "conversion" / "probe.py":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.Assign, ast.AugAssign)):
                value = ast.unparse(node.value)
                is_hook = re.match(r"functools\.partial|lambda\b", value)
                targets = getattr(node, "targets", [])
                assert not is_hook or not any(
                    isinstance(target, ast.Attribute) for target in targets
                ), (path, ast.unparse(node))


def test_files_are_short():
    lengths = {
        str(path.relative_to(PACKAGE)): len(path.read_text().splitlines())
        for path in files()
    }
    for name, length in lengths.items():
        assert length <= LIMIT, (name, length)


TESTS = sorted(Path(__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_tests_import_helpers_and_no_test_modules(path):
    """Each module of tests runs and is read on its own."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, ast.unparse(node)
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "tests":
                assert parts[1:2] == ["helpers"], name
            assert not any(part.startswith("test_") for part in parts), name


def test_only_one_helper_sets_the_size_of_blocks():
    """Else a change of the algorithms is a change of many tests."""
    users = {
        path.name
        for path in TESTS
        if re.search(
            r"ops.blocks|(CHUNK_SIZE|_ROWS|MAX_BLOCK)\b", path.read_text()
        )
    }
    assert users <= {"blocks.py", Path(__file__).name}


def test_only_the_priors_and_their_oracle_import_tfp():
    importing = re.compile(r"(from|import) tensorflow_probability")
    users = {room(p) for p in files() if importing.search(p.read_text())}
    assert users == {"kernels", "priors"}


@pytest.mark.slow
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
