"""The table of docs/serving.md, from what was measured."""

import re

PLACE = re.compile(r"(<!-- triton -->\n)(.*?)(<!-- end -->)", re.DOTALL)
HEAD = (
    *("", "requests/s", "50 %, ms", "90 %, ms", "99 %, ms"),
    *("requests a run", "sent again", "largest error"),
)


def table(record):
    """Markdown: a row for each model that was served."""
    rows = [HEAD, ["---"] * len(HEAD)]
    for model, row in record["models"].items():
        error = row["largest_error"]
        rows.append(
            [
                model,
                f"{row['per_second']:.0f}",
                *(f"{x:.0f}" for x in row["milliseconds"].values()),
                f"{row['requests_in_a_run']:.1f}",
                str(row["sent_again"]),
                "" if error is None else f"{error:.0e}".replace("e-0", "e-"),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write(record, page):
    """Puts the table of a record in its place on a page."""
    text = page.read_text()
    page.write_text(PLACE.sub(rf"\g<1>{table(record)}\n\g<3>", text))
