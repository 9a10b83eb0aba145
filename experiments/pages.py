"""Fills the marked tables of pages with those of studies.

A mark names a file beside results/ and a heading in it; what stands between the
mark and its end is replaced by the first table under that heading:

    <!-- table: results/experiments/compare.md, Best learned kernel -->
    | … |
    <!-- end -->

    python -m experiments pages docs/experiments.md
"""

import argparse
import re
import sys
from pathlib import Path

from experiments.help import Help

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(
    r"(<!-- table: (?P<path>[^,]+), (?P<heading>.+?) -->\n).*?(<!-- end -->)",
    re.DOTALL,
)


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m experiments pages",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("pages", nargs="+", type=Path, help="Markdown files")
    for page in parser.parse_args(argv).pages:
        try:
            text = fill(page.read_text(), ROOT)
        except LookupError as error:
            sys.exit(f"{page}: {error.args[0]}")
        page.write_text(text)
        print(f"{page}: {len(MARK.findall(text))} tables")


def fill(text, root):
    """A page with its marked tables as they are now.

    Args:
        text: of the page.
        root: folder that marks are relative to.
    """

    def filled(match):
        path = root / match["path"]
        if not path.exists():
            raise LookupError(f"{match['path']} does not exist.")
        table = table_under(match["heading"], path.read_text())
        if not table:
            raise LookupError(
                f"{match['path']} has no table under a heading "
                f"{match['heading']!r}."
            )
        return f"{match[1]}{table}{match[4]}"

    return MARK.sub(filled, text)


def table_under(heading, text):
    """The first table under a heading, empty if there is none."""
    lines = iter(text.splitlines(keepends=True))
    for line in lines:
        if line.startswith("#") and line.lstrip("# ").strip() == heading:
            break
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append(line)
        elif table or line.startswith("#"):
            break
    return "".join(table)
