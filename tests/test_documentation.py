"""What pages and docstrings say of arguments, against the signatures."""

import inspect
import re

import keras
import pytest
import tensorflow_probability as tfp

import keras_kt
from tests.helpers.pages import PAGES, ROOT, documented

ATTENTION = keras_kt.KernelizedAttention
SOFTMAX = keras.layers.MultiHeadAttention
# Where a name in a table may come from, beside the signatures of the layers.
NAMESPACES = (
    keras_kt,
    keras_kt.conversion,
    keras_kt.diagnostics,
    keras_kt.diagnostics.plots,
    keras.layers,
    ATTENTION,
    keras.Model,
    tfp.distributions,
    tfp.distributions.Distribution,
)
# Of TensorFlow and TFP, and a class of the Model Garden.
ELSEWHERE = {"TPUStrategy", "tfd", "KernelAttention", "mixed_bfloat16"}
DENIALS = re.compile(
    r"no such|not an argument|does not (exist|take|accept)|unknown argument"
)


def parameters(function):
    signature = inspect.signature(function)
    return {
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind
        not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    } - {"self"}


OURS = parameters(ATTENTION) | parameters(ATTENTION.call)


def tables():
    """`(page, header, rows)`, cells split."""
    for page in PAGES:
        lines = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if line.startswith("|")
            else None
            for line in page.read_text().splitlines()
        ]
        block = []
        for line in [*lines, None]:
            if line is not None:
                block.append(line)
            elif block:
                name = f"{page.name}-{'-'.join(block[0])[:40]}"
                yield pytest.param(block[0], block[2:], id=name)
                block = []


def code(cell):
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize(("header", "rows"), list(tables()))
def test_names_in_tables_exist(header, rows):
    choices = {*map(str, _choices())}
    scripts = "".join(
        path.read_text()
        for folder in ("examples", "experiments", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    )
    for text in [
        text for row in [header, *rows] for c in row for text in code(c)
    ]:
        if "--" in text:
            for flag in re.findall(r"--([\w-]+)", text):
                assert f'"--{flag}"' in scripts or (
                    f"{flag.replace('-', '_')}:" in scripts
                ), text
            continue
        for part in text.split():
            if re.fullmatch(r'"[^"]*"', part):
                assert part.strip('"') in choices, text
            elif re.fullmatch(r"[A-Za-z_][\w.]*(=.+)?", part):
                name, _, value = part.partition("=")
                assert _is_known(name), text
                if value.startswith('"'):
                    assert value.strip('"') in choices, text


def _is_known(name):
    first, *rest = name.split(".")
    if rest:
        # Attributes are in docstrings: instances have them, not classes.
        spaces = (s for s in NAMESPACES if hasattr(s, first))
        owner = getattr(next(spaces), first)
        return all(f"{part}:" in inspect.getdoc(owner) for part in rest)
    parts = keras_kt.PositiveFeatures, keras_kt.EmpiricalPrior
    parts = (*parts, keras_kt.SpectralPrior)
    everything = OURS.union(ELSEWHERE, *map(parameters, parts))
    return name in everything or any(
        hasattr(space, name) for space in NAMESPACES
    )


def _choices():
    """Strings that arguments take, from the errors that list them."""
    for name in ("spectral_prior", "feature_map", "decay", "redraw", "qk_norm"):
        with pytest.raises(ValueError) as caught:
            ATTENTION(2, 4, **{name: "?"})
        yield from re.findall(r"'(\w+)'", str(caught.value))
    with pytest.raises(ValueError) as caught:
        keras_kt.PositiveFeatures("?")
    yield from re.findall(r"'(\w+)'", str(caught.value))
    for name in keras_kt.PAPER_SYSTEMS:
        yield name


@pytest.mark.parametrize(("header", "rows"), list(tables()))
def test_tables_of_arguments_agree_with_the_signatures(header, rows):
    """A row denied `flash_attention`, which is accepted."""
    for row in rows:
        names = {text.partition("=")[0] for text in code(row[0])}
        for title, cell in zip(header, row, strict=True):
            owner = SOFTMAX if "MultiHeadAttention" in title else ATTENTION
            if DENIALS.search(cell):
                has = parameters(owner) | parameters(owner.call)
                assert not names & has, cell
    if "`KernelizedAttention`" in header:
        for row in rows:
            for text in code(row[0]):
                assert text.partition("=")[0] in OURS, text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_denies_an_argument_that_exists(page):
    for sentence in re.split(r"[.\n|]", page.read_text()):
        if DENIALS.search(sentence):
            names = {text.partition("=")[0] for text in code(sentence)}
            assert not names & OURS, sentence


def test_arguments_are_those_of_multi_head_attention_first():
    ours, theirs = (
        [n for n in inspect.signature(f).parameters if n != "kwargs"]
        for f in (ATTENTION, SOFTMAX)
    )
    assert ours[: len(theirs)] == theirs
    assert list(inspect.signature(ATTENTION.call).parameters) == list(
        inspect.signature(SOFTMAX.call).parameters
    )


@pytest.mark.parametrize("value", list(documented()))
def test_docstrings_name_the_arguments_there_are(value):
    text = inspect.getdoc(value) or ""
    sections = {
        "Args": [value],
        "Call arguments": [getattr(value, "call", None)],
    }
    for title, (function,) in sections.items():
        section = re.search(
            rf"^{title}:\n((?:(?:    .*)?\n?)*)", text, re.MULTILINE
        )
        if section is None or function is None:
            continue
        entries = re.findall(
            r"^    (\*{0,2}\w+(?:, \w+)*):", section[1], re.MULTILINE
        )
        named = {n.strip("* ") for entry in entries for n in entry.split(",")}
        known = parameters(function) | {"kwargs"}
        assert named <= known, named - known
        # Named in the text of another entry counts, as do bases' docstrings.
        words = set(re.findall(r"\w+", section[1]))
        assert parameters(function) <= words, parameters(function) - words
