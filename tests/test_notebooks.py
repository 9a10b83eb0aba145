"""Notebooks run, and are what their scripts are."""

import importlib.util
import json

import pytest

from tests.helpers import toys
from tests.helpers.scripts import EXAMPLES, ROOT

FOLDER = EXAMPLES / "notebooks"
# Sizes that say nothing, but that all cells run.
SMALL = {
    "swap_attention": {"EPOCHS": 1},
    "watch_a_kernel": {"EXAMPLES": 32, "EPOCHS": 3},
    "convert_and_stream": {
        "STEPS": 20,
        "DISTILL_STEPS": 3,
        "LENGTH": 32,
        "NEW_BYTES": 8,
    },
}


@pytest.fixture
def make():
    """The module that executes them."""
    for module in ("ipykernel", "jupytext", "nbclient"):
        pytest.importorskip(module)
    spec = importlib.util.spec_from_file_location("make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_is_a_notebook_with_outputs_and_no_other_is():
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"make"}
    assert scripts == {path.stem for path in FOLDER.glob("*.ipynb")}
    assert scripts == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_has_its_outputs_and_nothing_of_a_machine(name):
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < 400_000
    cells = json.loads(path.read_text())["cells"]
    outputs = [out for cell in cells for out in cell.get("outputs", ())]
    assert len(outputs) > 4
    for output in outputs:
        assert output["output_type"] in ("stream", "display_data"), output
        text = "".join(output.get("text", ""))
        assert output.get("name", "stdout") == "stdout", text
        assert str(ROOT) not in text and "site-packages" not in text


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_has_the_cells_of_its_script(make, name):
    written, shown = (
        make.jupytext.read(FOLDER / f"{name}{suffix}").cells
        for suffix in (".py", ".ipynb")
    )
    assert make.NAMES and name in make.NAMES
    assert [(cell.cell_type, cell.source) for cell in shown] == [
        (cell.cell_type, cell.source) for cell in written
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs(make, name, tmp_path, monkeypatch):
    values = dict(SMALL[name])
    if name == "swap_attention":
        toys.write_digits(tmp_path, 20)
        values["DIGITS"] = str(tmp_path)
    if name == "convert_and_stream":
        pytest.importorskip("keras_hub")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # It raises where a cell does.
    cells = make.execute(name, **values).cells
    printed = [
        output.text
        for cell in cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stdout"
    ]
    assert len(printed) > 4
