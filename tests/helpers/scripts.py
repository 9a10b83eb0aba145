"""The examples, imported as modules where they are on the path."""

import argparse
import importlib


def script(name):
    return importlib.import_module(name)


def arguments(name, folder, **values):
    """What `parse_args` gives for the cpu preset, with a few values set."""
    common = importlib.import_module("common")
    preset = script(name).PRESETS["cpu"]
    fields = {k: v for k, v in values.items() if hasattr(preset, k)}
    rest = {k: v for k, v in values.items() if k not in fields}
    return argparse.Namespace(
        data_dir=folder,
        seed=0,
        preset=common.dataclasses.replace(preset, **fields),
        **dict.fromkeys((*common.LAYER_FLAGS, *common.KERNEL_FLAGS)) | rest,
    )
