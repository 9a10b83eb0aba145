"""Reads results/, for the tests of numbers in README and on pages.

`claims` of a page are sentences or lines of tables as they have to stand there,
made of what results/ says; the test looks for each of them in the page.
"""

import csv
import functools
import json
import re
import statistics

from experiments import compare, records
from tests.helpers.pages import ROOT

RESULTS = ROOT / "results"
# Numbers: 1,024, 0.93, −3.3; not those in names and of
# densities, as in SST-2, 4-mers and 1/256.
NUMBER = re.compile(
    r"(?<![\w.,:/^²⁰-])[+−]?\d(?:[\d,]*\d)?(?:\.\d+)?(?![\w⁶/])(?!-\w|\.\d)"
)


def plain(text):
    """A page's text in one line, without what is no prose.

    Blocks of code, addresses of links, comments and bold type are left out.
    """
    text = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    text = re.sub(r"^    .*$", " ", text, flags=re.MULTILINE)
    text = re.sub(r"<!--.*?-->", " ", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(text.replace("**", "").split())


def unclaimed(page, claims, others):
    """Numbers of a page that neither claims nor `others` account for.

    Args:
        page: its name.
        claims: texts, of which each has to stand on the page.
        others: texts whose numbers rest on no result: sizes, versions.
    """
    text = plain((ROOT / page).read_text())
    for claim in sorted([*claims, *others], key=len, reverse=True):
        assert " ".join(claim.split()) in text, (
            f"{page} does not say: {claim!r}"
        )
        text = text.replace(" ".join(claim.split()), " ")
    text = re.sub(r"`[^`]*`", " ", text)
    return NUMBER.findall(text)


@functools.cache
def table(path):
    """Rows of a CSV file, dictionaries of strings."""
    with (RESULTS / path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@functools.cache
def record(path):
    return json.loads((RESULTS / path).read_text())


def runs(study, attention, flags="", **where):
    """The runs of an attention in a study; there must be some."""
    found = [
        row
        for row in table(f"{study}/runs.csv")
        if (row["attention"], row["flags"]) == (attention, flags)
        and all(row[name] == str(value) for name, value in where.items())
    ]
    assert found, (study, attention, flags, where)
    return found


def mean(study, attention, flags="", column="score", **where):
    """The mean over seeds of a column."""
    found = runs(study, attention, flags, **where)
    return statistics.mean(float(row[column]) for row in found)


def fresh(study, attention, flags="", **where):
    """The mean over seeds and fresh draws."""
    found = runs(study, attention, flags, **where)
    draws = [x for row in found for x in records.numbers(row["fresh_draws"])]
    return statistics.mean(draws)


def sparsest(study, attention, flags="", **where):
    """The mean accuracy at the least density of the sparsity study."""
    found = runs(study, attention, flags, **where)
    return statistics.mean(
        float(records.read_arrays(RESULTS / study, row)["densities"][-1, 1])
        for row in found
    )


def gains(study, first, second):
    """The paired difference by task, sizes and D."""
    rows = [
        row
        for row in table(f"{study}/runs.csv")
        if row["attention"] in (first, second)
    ]
    found = compare.differences(rows, first, second)
    return {
        (each.row["task"], each.row.get("sizes", ""), each.features): each
        for each in found
    }


def points(gain, digits=1):
    """A difference of accuracies in points, as pages write it."""
    text = f"{100 * gain.gain:+.{digits}f} ± {100 * gain.error:.{digits}f}"
    return text.replace("-", "−")


def milliseconds(level, length, column, mode="forward+backward"):
    """Of the table of speed: the better of XLA and not."""
    is_floor = column == "floor"
    times = [
        row["median"]
        for row in record("attention.json")["timings"]
        if (row["level"], row["length"], row["column"])
        == (level, length, column)
        and row["mode"] == ("forward" if is_floor else mode)
    ]
    return (3e3 if is_floor else 1e3) * min(times) if times else None


def number(value, text="{:,.0f}"):
    """A cell of a table; a dash where nothing was measured."""
    return "–" if value is None else text.format(value)


def memory(column, length, xla=None, path="memory.json"):
    """Peak bytes of a training step, the better of XLA and not."""
    return min(
        row["peak"]
        for row in record(path)["memory"]
        if (row["column"], row["length"]) == (column, length)
        and xla in (None, row["xla"])
    )


def decode(column, position):
    (found,) = (
        row
        for row in record("attention.json")["decode"]
        if (row["column"], row["position"]) == (column, position)
    )
    return found


def of_token(position):
    """Milliseconds of one token of a stream."""
    return f"{1e3 * decode('ours', position)['median']:.1f}"


def stage(task, name):
    """A stage of the conversion: score, errors by layer, seconds."""
    (found,) = (
        row
        for row in table("convert/stages.csv")
        if (row["task"], row["stage"]) == (task, name)
    )
    return (
        float(found["score"]),
        [f"{e:.3f}" for e in records.numbers(found["errors"])],
        float(found["seconds"]),
    )
