"""Lets pages link to the repository's files, which are not in the site.

Pictures of results/ are copied to the site. Links to other files become their
names.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent


def on_files(files, config):
    for path in sorted((ROOT / "results").rglob("*.png")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    markdown = re.sub(r"\]\(\.\./(results/[^)]*\.png)\)", r"](\1)", markdown)
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)]*)\)", r"\1 (`\2`)", markdown)
