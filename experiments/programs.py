"""HLO modules compiled and run by jaxlib; no TensorFlow here.

All that depends on the version of jaxlib is in this file: none of it is public.
Tried with jax 0.10.2 and 0.11.2.
"""

import gzip

import jax
import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib import _jax, xla_client
from jaxlib import _hlo
from jaxlib.mlir import ir

ALIASES = "mhlo.input_output_alias"
# Else what counts steps, an int64, would be cut.
jax.config.update("jax_enable_x64", True)


class Program:
    """A compiled module: a function of device arrays to device arrays.

    Args:
        path: a serialized module, gzipped.
    """

    def __init__(self, path):
        self._executable = _compile(gzip.decompress(path.read_bytes()))

    def __call__(self, *arrays):
        results = self._executable.execute_sharded(arrays)
        parts = results.disassemble_into_single_device_arrays()
        return [part for (part,) in parts]


def put(array):
    return jax.device_put(np.asarray(array), jax.devices()[0])


def device_name():
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


def _compile(proto):
    options = _hlo.HloPrintOptions()
    options.print_large_constants = True
    module = _hlo.HloModule.from_serialized_hlo_module_proto(proto)
    text = module.to_string(options)
    # StableHLO has no word for the copies that TensorFlow makes of variables.
    if " copy(" in text:
        module = _hlo.hlo_module_from_text(text.replace(" copy(", " reshape("))
        proto = module.as_serialized_hlo_module_proto()
    device = jax.devices()[0]
    options = xla_client.CompileOptions()
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.array([[device.id]], "int32")
    )
    with mlir.make_ir_context():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(proto))
        # Else updates would take the place of what was passed.
        attributes = module.operation.attributes
        if ALIASES in attributes:
            del attributes[ALIASES]
        return device.client.compile_and_load(
            module,
            executable_devices=xla_client.DeviceList((device,)),
            compile_options=options,
        )
