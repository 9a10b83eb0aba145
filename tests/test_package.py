"""What holds for the package as a whole: names, docs, imports, tidiness."""

import ast
import doctest
import inspect
import re
import subprocess
from pathlib import Path

import keras
import pytest

from tests.helpers.pages import (
    GLOBALS,
    PAGES,
    ROOT,
    documented,
    public_names,
)

PACKAGE = ROOT / "keras_kt"


def tracked_files():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listing.stdout.split()]


def files():
    """The package's modules."""
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize(
    ("name", "value"), [pytest.param(*x, id=x[0]) for x in public_names()]
)
def test_public_names_are_documented_and_serializable(name, value):
    name = name.split(".")[-1]
    if not isinstance(value, tuple):
        assert inspect.getdoc(value)
    if inspect.isclass(value) and issubclass(value, keras.layers.Layer):
        if name in ("SpectralPrior", "FeatureMap"):
            return  # abstract
        registered = keras.saving.get_registered_name(value)
        assert registered == f"keras_kt>{name}"


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_public_functions_are_documented(path):
    name = path.stem
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}.{node.name}"


@pytest.mark.slow
@pytest.mark.parametrize("value", list(documented()))
def test_docstring_examples_run_as_written(value):
    parser = doctest.DocTestParser()
    examples = parser.get_doctest(
        inspect.getdoc(value) or "", dict(GLOBALS), "example", None, 0
    )
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(examples).failed == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_code_runs_as_written(page, tmp_path, monkeypatch):
    """All Python blocks of a page, one after the other, in one namespace."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    namespace = {}
    for index, block in enumerate(blocks):
        code = compile(block, f"{page.name}, block {index + 1}", "exec")
        exec(code, namespace)  # noqa: S102


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ["README.md", "docs/experiments.md"])
def test_results_are_those_of_the_last_sweep(page):
    text = (ROOT / page).read_text()
    table = text.split("<!-- overview -->")[1].split("<!-- end -->")[0]
    folder = ROOT / "results" / "experiments"
    assert table.strip() in (folder / "experiments.md").read_text()


def test_every_page_and_public_name_is_in_the_documentation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    reference = (ROOT / "docs" / "api.md").read_text()
    for page in PAGES[1:]:
        assert page.name in navigation
    for name, value in public_names():
        # A constant has no docstring to show.
        if name == "PAPER_SYSTEMS" or inspect.ismodule(value):
            continue
        # A module shows what is in it.
        module = name.rpartition(".")[0]
        shown = {f"::: keras_kt.{name}\n", f"::: keras_kt.{module}\n"}
        assert any(entry in reference for entry in shown), name


def test_no_machine_paths_downloads_or_large_files():
    machine = re.compile(r"(^|[^\w.-])/(work|root|home|tmp)/")
    for path in tracked_files():
        if not path.exists():
            continue
        assert path.stat().st_size < 2**20, path
        if path.suffix in (".py", ".md", ".toml", ".ini", ".txt", ""):
            text = path.read_text()
            if path != Path(__file__):
                assert not machine.search(text), path
    for path in files():
        text = path.read_text()
        assert "get_file(" not in text and "urllib" not in text, path
