"""Experiments and examples, as modules and as commands."""

import argparse
import dataclasses
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# What examples import beside the package.
SHARED = ("__init__", "common", "progress")
SIZES = (
    "--blocks 1 --width 8 --heads 2 --key-dim 4 --hidden 8 --batch-size 4 "
    "--steps 2 --no-xla --validations 1 --validation-examples 4 "
    "--test-examples 4 --draw-examples 4"
)


def script(name):
    """A module of the experiments."""
    return importlib.import_module(f"experiments.{name}")


def example(name):
    """An example as a module, or one of those that they share."""
    if str(EXAMPLES) not in sys.path:
        # As for a script that is started.
        sys.path.insert(0, str(EXAMPLES))
    if name in SHARED:
        return importlib.import_module(name)
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def experiment(*words):
    """`python -m experiments …` in this process."""
    name, *argv = map(str, words)
    tasks = script("tasks").TASKS
    if name in tasks:
        return script(tasks[name].module).main(argv, name)
    return script(name).main(argv)


def command(*words, **variables):
    """A finished process of Python in the root, with the package on its path.

    Args:
        *words: after `python`.
        **variables: of the environment, beside this process's.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
    )


def arguments(name, folder, **values):
    """What `parse_args` gives for the cpu preset, with a few values set."""
    flags, preset = script("attentions").FLAGS, script(name).PRESETS["cpu"]
    fields = {k: v for k, v in values.items() if hasattr(preset, k)}
    rest = {k: v for k, v in values.items() if k not in fields}
    return argparse.Namespace(
        data_dir=folder,
        seed=0,
        preset=dataclasses.replace(preset, **fields),
        **dict.fromkeys(flags) | rest,
    )
