"""Serves exports by a Triton server: TensorFlow and pytriton, not keras_kt.

    pip install tensorflow nvidia-pytriton==0.7.0
    python benchmarks/serving/host.py classifier=FOLDER stream=FOLDER

An endpoint of an export is a model of the server: `classifier` is the export's
`serve`, `stream_decode` its `decode`. Requests of equal shapes, up to
`--max-batch`, are joined along their first axis: clients pad to few lengths.
"""

import argparse
import os
import sys
from pathlib import Path

import pytriton
import tensorflow as tf
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig, TritonSecurityConfig


def bind(triton, name, signature, config):
    """Serves one endpoint of an export."""
    inputs = signature.structured_input_signature[1]
    outputs = signature.structured_outputs
    is_batch = all(spec.shape.rank for spec in inputs.values())

    def described(specs):
        """Their axes; the server adds the batch, and asks for one beside it."""
        skipped = 1 if is_batch else 0
        return [
            Tensor(
                name=key,
                dtype=spec.dtype.as_numpy_dtype,
                shape=tuple(
                    -1 if size is None else size
                    for size in spec.shape.as_list()[skipped:] or [1]
                ),
            )
            for key, spec in specs.items()
        ]

    def infer(**arrays):
        tensors = {
            key: tf.constant(
                x[..., 0] if x.ndim > inputs[key].shape.rank else x
            )
            for key, x in arrays.items()
        }
        return {key: x.numpy() for key, x in signature(**tensors).items()}

    def infer_each(requests):
        return [infer(**request) for request in requests]

    triton.bind(
        name,
        batch(infer) if is_batch else infer_each,
        described(inputs),
        described(outputs),
        config=config if is_batch else ModelConfig(batching=False),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("exports", nargs="+", metavar="NAME=FOLDER")
    add("--only", nargs="+", help="models to serve (default: all)")
    add("--port", type=int, default=8000, help="of HTTP; gRPC has the next")
    add("--max-batch", type=int, default=16)
    add("--delay", type=int, default=500, help="microseconds to wait for more")
    add("--workspace", help="folder of the server's files")
    args = parser.parse_args()
    libraries = str(Path(pytriton.__file__).parents[1] / "nvidia_pytriton.libs")
    rest = os.environ.get("LD_LIBRARY_PATH")
    os.environ["LD_LIBRARY_PATH"] = f"{libraries}:{rest}" if rest else libraries
    config = ModelConfig(
        max_batch_size=args.max_batch,
        batcher=DynamicBatcher(max_queue_delay_microseconds=args.delay),
    )
    ports = TritonConfig(
        http_address="127.0.0.1",
        http_port=args.port,
        grpc_address="127.0.0.1",
        grpc_port=args.port + 1,
        allow_metrics=False,
    )
    # All but statistics, which pytriton would hide as well.
    security = TritonSecurityConfig(
        restricted_endpoints=["shared-memory", "model-repository"]
    )
    # Whole, since a signature does not keep its weights alive.
    artifacts = []
    with Triton(
        config=ports, workspace=args.workspace, security_config=security
    ) as triton:
        for export in args.exports:
            name, folder = export.split("=", 1)
            artifacts.append(tf.saved_model.load(folder))
            for endpoint, signature in artifacts[-1].signatures.items():
                model = f"{name}_{endpoint}".removesuffix("_serve")
                is_wanted = args.only is None or model in args.only
                if is_wanted and endpoint != "serving_default":
                    bind(triton, model, signature, config)
        if "keras_kt" in sys.modules:
            raise RuntimeError("keras_kt was imported; exports need it not.")
        triton.serve()


if __name__ == "__main__":
    main()
