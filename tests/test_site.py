"""The built site: what its pages show, ask of other hosts, and are found by."""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers.pages import ROOT, public_names

pytestmark = pytest.mark.slow
pytest.importorskip("material")
NAMES = [
    pytest.param(name, value, id=name)
    for name, value in public_names()
    if not inspect.ismodule(value)
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build = "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(
        [sys.executable, "-m", *build], cwd=ROOT, env=environment, check=True
    )
    return folder


@pytest.fixture(scope="module")
def entries(site):
    """HTML of each name in the reference, up to the next name."""
    heading = re.compile(r'<h\d id="(keras_kt\.[\w.]+)"')
    found = {}
    for page in (site / "api").rglob("*.html"):
        _, *parts = heading.split(page.read_text())
        found.update(zip(parts[::2], parts[1::2], strict=True))
    return found


@pytest.mark.parametrize(("name", "value"), NAMES)
def test_names_have_signature_arguments_and_code(name, value, entries):
    entry = entries[f"keras_kt.{name}"]
    assert 'class="highlight"' in entry or "doc-signature" in entry
    if not callable(value):
        return
    assert "doc-signature" in entry
    if _arguments(value):
        assert re.search("<table>\n? *<thead>", entry)
    if "." not in name:
        # Code, not quotations within quotations.
        assert re.search('<div class="highlight"><pre>.*&gt;&gt;&gt;', entry)
    assert "<blockquote>" not in entry


def _arguments(value):
    return [
        name
        for name, parameter in inspect.signature(value).parameters.items()
        if parameter.kind
        not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def test_constructors_show_defaults_and_bases_that_users_know(entries):
    entry = entries["keras_kt.KernelizedAttention"]
    text = re.sub("<[^>]+>", "", entry)
    assert re.search(r"spectral_pace(: \w+ )?= ?4\.0", text)
    assert "Call arguments:" in text
    assert "keras.layers.Layer" in text
    for entry in entries.values():
        for base in re.findall("Bases: (.*?)</p>", entry, re.DOTALL):
            assert not re.search(r"TransformerBlock|Recipe|<code>_", base)
            assert base.count("Layer</code>") <= 1


def test_pages_ask_nothing_of_other_hosts(site):
    asking = re.compile(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//[^"]*')
    sheets = re.compile(r'<link[^>]*href="(?:https?:)?//[^"]*[^>]*>')
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not asking.findall(text), page
        for link in sheets.findall(text):
            assert re.search('rel="(canonical|prev|next)"', link), link
        # The theme asks the repository's host for stars, unless told not to.
        assert 'data-md-component="source"' not in text, page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)[\"' ]*http", sheet.read_text())


def test_tables_are_those_that_the_theme_lets_scroll(site):
    for page in site.rglob("*.html"):
        assert "<table class" not in page.read_text(), page


def test_notebooks_and_formulas_are_shown(site):
    assert "<math" in (site / "index.html").read_text()
    for notebook in (ROOT / "examples" / "notebooks").glob("*.ipynb"):
        page = site / "notebooks" / notebook.stem / "index.html"
        # Imports in color.
        assert '<span class="kn">import</span>' in page.read_text()


def test_arguments_are_found_where_they_are_explained(site):
    """As the theme's script searches: by section, titles and pages weighed."""
    lunr = pytest.importorskip("lunr")
    index = json.loads((site / "search" / "search_index.json").read_text())
    separator = re.compile(index["config"]["separator"])
    documents = [
        (
            {
                "location": entry["location"],
                "title": _words(entry["title"], separator),
                "text": _words(entry["text"], separator),
            },
            {"boost": entry.get("boost", 1)},
        )
        for entry in index["docs"]
    ]
    fields = [{"field_name": "title", "boost": 1e3}, "text"]
    search = lunr.lunr("location", fields, documents).search
    for argument in ("num_features", "near_field", "sliding_window"):
        best = search(argument)[0]["ref"]
        assert best == "api/layers/#keras_kt.KernelizedAttention", argument


def _words(html, separator):
    return " ".join(separator.split(re.sub("<[^>]+>", " ", html)))
