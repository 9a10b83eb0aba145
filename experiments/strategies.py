"""Devices, and a training loop that runs the same on any of them.

`model.fit` trains under every strategy but `MultiWorkerMirroredStrategy`, where
Keras 3 fails (keras issue 20585); this loop does there, too, and goes on from
its checkpoints where it was killed.
"""

import os
import socket
import sys
from pathlib import Path

import keras
import tensorflow as tf

STRATEGIES = ("none", "mirrored", "multiworker", "tpu")
TF_CONFIG = (
    '{"cluster": {"worker": ["host0:12345", "host1:12345"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


def add_strategy_arguments(parser):
    group = parser.add_argument_group("distribution")
    add = group.add_argument
    add("--strategy", choices=STRATEGIES, default="none", help="devices")
    add("--tpu", default="local", help="name, address, or local (TPU VM)")
    add("--cpus", type=int, help="logical CPUs that `mirrored` runs on")
    add("--no-xla", action="store_true", help="compile nothing: short trials")
    add("--policy", help="dtype policy; on TPU defaults to mixed_bfloat16")


def make_strategy(args):
    """The strategy that was asked for; sets the dtype policy.

    Must run before anything else touches TensorFlow's devices.
    """
    policy = "mixed_bfloat16" if args.strategy == "tpu" else "float32"
    keras.config.set_dtype_policy(args.policy or policy)
    if args.strategy == "none":
        return tf.distribute.get_strategy()
    if args.strategy == "mirrored":
        return tf.distribute.MirroredStrategy(_logical_cpus(args.cpus))
    if args.strategy == "multiworker":
        if "TF_CONFIG" not in os.environ:
            sys.exit(
                "--strategy multiworker expects the cluster in TF_CONFIG, "
                "which is not set. Set it for every worker, each with its own "
                f"index:\n\n    TF_CONFIG='{TF_CONFIG}'\n\nor use --strategy "
                "mirrored on one machine."
            )
        return tf.distribute.MultiWorkerMirroredStrategy()
    return _tpu_strategy(args.tpu)


def _logical_cpus(count):
    if count is None:
        return None
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * count
    )
    return [f"CPU:{i}" for i in range(count)]


def _tpu_strategy(tpu):
    try:
        _check_address(tpu)
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    # What comes depends on the wheel and on where the search for a TPU ends.
    except (
        ImportError,
        IndexError,
        OSError,
        RuntimeError,
        ValueError,
        tf.errors.OpError,
    ) as error:
        sys.exit(
            f"--strategy tpu expects a TPU at --tpu {tpu!r}, and none was "
            f"found there ({type(error).__name__}). On a TPU VM install "
            "tensorflow-tpu and use --tpu local; elsewhere give the name or "
            "the grpc:// address. Without a TPU use --strategy mirrored, and "
            "benchmarks/tpu_compile.py to compile for one."
        )


def _check_address(tpu):
    """TensorFlow would wait for minutes where nobody answers."""
    if tpu.startswith("grpc://"):
        host, _, port = tpu.removeprefix("grpc://").partition(":")
        socket.create_connection((host, int(port or 8470)), timeout=10).close()


def uses_xla(args):
    """Whether XLA compiles steps; Keras's strategies have no use for it."""
    return args.strategy == "none" and not args.no_xla


def is_chief(strategy):
    """Whether this process is the one that writes results."""
    resolver = strategy.cluster_resolver
    return resolver is None or not resolver.task_id


def train(
    strategy,
    model,
    optimizer,
    loss,
    dataset,
    *,
    steps,
    checkpoints=None,
    save_every=10,
    jit_compile=False,
    after_step=None,
):
    """Trains to a number of steps, from the last checkpoint if there is one.

    Args:
        strategy: the strategy in whose scope model and optimizer were made.
        model: a built model.
        optimizer: its optimizer.
        loss: function of `(y, outputs)` to a loss for each example.
        dataset: global batches `(x, y)` of a static shape, the same in every
            run: a resumed run skips what was seen.
        steps: number of steps, those before the checkpoint included.
        checkpoints: folder of the checkpoints, seen by all workers. Defaults
            to `None`, which means none.
        save_every: steps between checkpoints.
        jit_compile: whether XLA compiles the step; only without a strategy.
        after_step: function of `(number, loss)`, called after a step. Defaults
            to `None`, which prints both.

    Returns:
        The loss of each step that this run made, by its number.
    """
    with strategy.scope():
        optimizer.build(model.trainable_variables)
        done = tf.Variable(0, dtype=tf.int64, trainable=False)
    manager = None
    if checkpoints is not None:
        # Variables of the model, since Keras's own checkpoints leave out the
        # states of seed generators, which dropout and redraws continue from.
        checkpoint = tf.train.Checkpoint(
            variables=model.variables, optimizer=optimizer, done=done
        )
        manager = _manager(strategy, checkpoint, Path(checkpoints))
        latest = tf.train.latest_checkpoint(checkpoints)
        if latest:
            checkpoint.restore(latest).assert_consumed()
    step = _step_function(strategy, model, optimizer, loss, jit_compile)
    start = int(done.numpy())
    batches = strategy.experimental_distribute_dataset(
        dataset.skip(start).take(steps - start)
    )
    losses = {}
    for number, (x, y) in enumerate(batches, start + 1):
        losses[number] = float(step(x, y))
        done.assign(number)
        if manager and (number % save_every == 0 or number == steps):
            manager.save()
        if after_step:
            after_step(number, losses[number])
        elif is_chief(strategy):
            print(f"step {number} loss {losses[number]:.8f}", flush=True)
    return losses


def _manager(strategy, checkpoint, folder):
    """All workers take part in a save; what the chief writes is kept."""
    if not is_chief(strategy):
        folder = folder / f"worker-{strategy.cluster_resolver.task_id}"
    return tf.train.CheckpointManager(checkpoint, folder, max_to_keep=2)


def training_step(model, optimizer, loss, replicas=1):
    """A function of a batch `(x, y)` that trains on it, and returns the loss.

    Args:
        model: a built model.
        optimizer: its optimizer.
        loss: function of `(y, outputs)` to a loss for each example.
        replicas: number of those that share the batch; the loss is a share.
    """

    def step(x, y):
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            # Gradients are summed over replicas, so losses are shares.
            share = tf.reduce_mean(loss(y, outputs))
            share /= replicas
            scaled = optimizer.scale_loss(share)
        variables = model.trainable_variables
        optimizer.apply_gradients(
            zip(tape.gradient(scaled, variables), variables, strict=True)
        )
        return share

    return step


def _step_function(strategy, model, optimizer, loss, jit_compile):
    replica_step = training_step(
        model, optimizer, loss, strategy.num_replicas_in_sync
    )

    @tf.function(jit_compile=jit_compile)
    def step(x, y):
        shares = strategy.run(replica_step, args=(x, y))
        return strategy.reduce("SUM", shares, axis=None)

    return step
