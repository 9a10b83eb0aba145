"""Executes the notebooks: each .py script here becomes an .ipynb with outputs.

    pip install -e '.[test]'
    python examples/notebooks/make.py                 # all
    python examples/notebooks/make.py swap_attention

Scripts are what is written and reviewed, notebooks what is read.
"""

import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat

HERE = Path(__file__).resolve().parent
NAMES = ("swap_attention", "watch_a_kernel", "convert_and_stream")


def execute(name, **parameters):
    """A script as a notebook with outputs.

    Args:
        name: of the script.
        **parameters: assigned after the cell that is tagged `parameters`.
    """
    notebook = jupytext.read(HERE / f"{name}.py")
    if parameters:
        lines = [f"{key} = {value!r}" for key, value in parameters.items()]
        cell = nbformat.v4.new_code_cell("\n".join(lines))
        (place,) = (
            number
            for number, other in enumerate(notebook.cells)
            if "parameters" in other.metadata.get("tags", [])
        )
        notebook.cells.insert(place + 1, cell)
    client = nbclient.NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        resources={"metadata": {"path": str(HERE)}},
        # No times of cells: a new run is a small change.
        record_timing=False,
    )
    return client.execute()


def without_machine(notebook):
    """Drops what TensorFlow says of the machine, and joins what was printed."""
    for number, cell in enumerate(notebook.cells):
        # Else random, and a change at every run.
        cell.id = str(number)
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if output.get("name") == "stderr":
                continue
            if kept and output.get("name") == kept[-1].get("name") == "stdout":
                kept[-1].text += output.text
            else:
                kept.append(output)
        cell.outputs = kept
    # Without the version of Python.
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        print(f"{name} …", flush=True)
        notebook = without_machine(execute(name))
        nbformat.write(notebook, HERE / f"{name}.ipynb")
