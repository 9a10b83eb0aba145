"""Numbers of the home page and of guides are those that results/ holds."""

import pytest

from tests.helpers.figures import decode, memory, milliseconds, of_token, record
from tests.helpers.pages import ROOT


def claims_of_home():
    ours, softmax = (
        milliseconds("layer", 8192, name) for name in ("ours", "softmax")
    )
    yield f"**{ours:,.0f} ms against {softmax:,.0f} ms**"
    arguments = record("attention.json")["arguments"]
    yield (
        "A training step of the layer at 8,192 tokens, and of "
        f"`MultiHeadAttention`: {arguments['heads']} heads of "
        f"{arguments['head_dim']}, two cores of a CPU. At 256 "
        f"tokens it is {milliseconds('layer', 256, 'ours'):.0f} ms against "
        f"{milliseconds('layer', 256, 'softmax'):.0f} ms."
    )
    ours, softmax = (memory(name, 8192) for name in ("ours", "softmax"))
    yield f"**{ours / 2**20:.0f} MiB against {softmax / 2**20:,.0f} MiB**"
    features = record("memory.json")["arguments"]["features"]
    yield f"training step at 8,192 tokens ({features} features)"
    early, late = map(of_token, (100, 10**6))
    yield f"**{early} ms for token 100, {late} for token 1,000,000**"
    yield f"a state of {decode('ours', 10**6)['bytes'] / 2**10:.0f} KiB"


def claims_of_distance():
    found = record("streams/window.json")
    assert found["arguments"]["window"] == 256
    ratios = [row["ratio"] for row in found["rows"]]
    yield (
        f"a window of 256 tokens takes between {min(ratios):.2f} and "
        f"{max(ratios):.2f} times as long as causal attention with "
        f"{found['arguments']['features']} features"
    )


CLAIMS = {"index.md": claims_of_home, "distance.md": claims_of_distance}


@pytest.mark.parametrize("page", CLAIMS)
def test_figures_are_those_of_the_results(page):
    text = " ".join((ROOT / "docs" / page).read_text().split())
    for claim in CLAIMS[page]():
        assert claim in text, f"{page} does not say: {claim!r}"
