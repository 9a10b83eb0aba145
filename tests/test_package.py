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
TEXTS = {
    *(".cfg", ".csv", ".ini", ".ipynb", ".json", ".md", ".py", ".sh", ".toml"),
    *(".txt", ".yaml", ".yml", ""),
}


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


def test_no_file_names_a_path_of_a_machine():
    homes = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/[\w.]")
    absolute = re.compile(r"(?:^|[\s,\"'=(])/[\w.-]+/", re.MULTILINE)
    for path in tracked_files():
        if path.suffix not in TEXTS or not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        assert not homes.search(text), path
        if path.is_relative_to(ROOT / "results"):
            assert not absolute.search(text), path


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


# Where README's links begin, which have to work on an index of packages too.
HOSTS = (
    "https://github.com/keras-kt/keras_kt/blob/main/",
    "https://github.com/keras-kt/keras_kt/tree/main/",
    "https://raw.githubusercontent.com/keras-kt/keras_kt/main/",
)
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for address, anchor in LINK.findall(page.read_text()):
        target = page.parent / address if address else page
        for host in HOSTS:
            if address.startswith(host):
                target = ROOT / address.removeprefix(host)
        if not address.startswith("http") or address.startswith(HOSTS):
            assert target.exists(), address
            if anchor:
                assert anchor in anchors(target), f"{address}#{anchor}"


def anchors(page):
    """Of a page's headings, as the site and the repository host make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in titles
    }


def test_links_of_the_readme_are_absolute():
    """An index of packages shows it too, with no files beside it."""
    for address, _ in LINK.findall((ROOT / "README.md").read_text()):
        assert address.startswith("https://"), address


def test_the_readme_is_short_and_begins_with_what_it_is():
    """Code was its fourth section, and its table of ten columns was cut off."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        assert row.count("|") <= 6, row
    first_screen = text.split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", first_screen, re.DOTALL)[1]
    assert len(code.splitlines()) <= 12
    assert first_screen.index("![") < first_screen.index("pip install")
    # Terms that a newcomer does not know, and none of these is explained.
    prose = re.sub(r"```.*?```|\]\([^)]*\)", "", text, flags=re.DOTALL)
    terms = r"\b(GMM|PRF|RKS|GEMMs?|D|Bochner|core|the draw|True keeps)\b"
    assert not re.findall(terms, prose)


def test_every_page_and_public_name_is_in_the_documentation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    api = sorted((ROOT / "docs" / "api").glob("*.md"))
    reference = "".join(page.read_text() for page in api)
    for page in [*PAGES[1:], *api]:
        name = page.relative_to(ROOT / "docs").as_posix()
        assert re.search(rf"[ ]{re.escape(name)}$", navigation, re.MULTILINE)
    for name, value in public_names():
        if inspect.ismodule(value):
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
