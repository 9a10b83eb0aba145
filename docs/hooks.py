"""Lets pages link to the repository's files, which are not in the site.

Pictures of results/ are copied to the site, notebooks become pages of it; links
to other files lead to the repository's host. A block of `math` becomes MathML,
which browsers show as it is. A search for an argument finds the layer before
all that is like it.
"""

import json
import os
import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
NOTEBOOKS = ROOT / "examples" / "notebooks"
BLOCKS = "pymdownx.superfences"
FOUND_FIRST = "api/layers/#keras_kt.KernelizedAttention"


def on_config(config):
    fence = {"name": "math", "class": "math", "format": _formula}
    config.mdx_configs.setdefault(BLOCKS, {})["custom_fences"] = [fence]
    notebooks = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    if notebooks:
        pages = [f"notebooks/{name}.md" for name in notebooks]
        config.nav.insert(2, {"Notebooks": pages})


def _formula(source, language, css_class, options, md, **kwargs):
    return f'<div class="{css_class}">{convert(source, display="block")}</div>'


def on_files(files, config):
    for path in sorted((ROOT / "results").rglob("*.png")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.language_info = {"name": "python"}
        # Pictures are named by their notebook.
        resources = {"unique_key": path.stem}
        export = MarkdownExporter().from_notebook_node
        text, resources = export(notebook, resources)
        made = {f"{path.stem}.md": text, **resources["outputs"]}
        for name, content in made.items():
            name = f"notebooks/{name}"
            files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    here = (DOCS / page.file.src_uri).parent
    source = NOTEBOOKS if here.name == "notebooks" else here

    def link(match):
        path = (source / match[1]).resolve()
        if not path.exists():
            return match[0]
        place = path if DOCS in path.parents else None
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".png":
            place = DOCS / name
        if path.suffix == ".ipynb":
            place = DOCS / "notebooks" / f"{path.stem}.md"
        address = f"{config.repo_url}/blob/main/{name}"
        if place is not None:
            address = os.path.relpath(place, here)
        return f"]({address}{match[2] or ''})"

    return re.sub(r"\]\((\.\./[^)#]+)(#[^)]*)?\)", link, markdown)


def on_post_build(config):
    path = Path(config.site_dir) / "search" / "search_index.json"
    index = json.loads(path.read_text())
    for entry in index["docs"]:
        if entry["location"] == FOUND_FIRST:
            entry["boost"] = 4
    path.write_text(json.dumps(index, separators=(",", ":")))
