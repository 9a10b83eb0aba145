"""Lets pages link to the repository's files, which are not in the site.

Pictures of results/ are copied to the site; links to other files lead to the
repository's host. A block of `math` becomes MathML, which browsers show as it
is. A search for an argument finds the layer before all that is like it.
"""

import json
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
BLOCKS = "pymdownx.superfences"
FOUND_FIRST = "api/layers/#keras_kt.KernelizedAttention"


def on_config(config):
    fence = {"name": "math", "class": "math", "format": _formula}
    config.mdx_configs.setdefault(BLOCKS, {})["custom_fences"] = [fence]


def _formula(source, language, css_class, options, md, **kwargs):
    return f'<div class="{css_class}">{convert(source, display="block")}</div>'


def on_files(files, config):
    for path in sorted((ROOT / "results").rglob("*.png")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    folder = Path(page.file.abs_src_path).parent

    def link(match):
        target, anchor = match[1], match[2] or ""
        path = (folder / target).resolve()
        if DOCS in path.parents or not path.exists():
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".png":
            return f"]({os.path.relpath(DOCS / name, folder)})"
        return f"]({config.repo_url}/blob/main/{name}{anchor})"

    return re.sub(r"\]\((\.\./[^)#]+)(#[^)]*)?\)", link, markdown)


def on_post_build(config):
    path = Path(config.site_dir) / "search" / "search_index.json"
    index = json.loads(path.read_text())
    for entry in index["docs"]:
        if entry["location"] == FOUND_FIRST:
            entry["boost"] = 4
    path.write_text(json.dumps(index, separators=(",", ":")))
