"""What can be run, by name."""

from typing import NamedTuple


class Task(NamedTuple):
    """A task of the sweep.

    Attributes:
        module: the file that runs it.
        to_beat: what a model should be better than.
        sizes: flags of its own that tell runs of one attention apart.
    """

    module: str
    to_beat: str = ""
    sizes: tuple[str, ...] = ()


GLUE = ("pretraining_steps",)
TASKS = {
    "listops": Task(
        "listops", "first operator alone 0.320", ("min_length", "data_seed")
    ),
    "text": Task("text", "byte counts 0.646"),
    "image": Task("image", "linear on pixels 0.289"),
    "dna": Task(
        "dna", "4-mers 0.945", ("rank", "split_seed", "mutations", "shift")
    ),
    "mnist5k": Task("image"),
    "pathfinder": Task("image", "chance 0.5", ("data_seed",)),
    "retrieval": Task("retrieval", "TF-IDF cosine 0.83"),
    "sparsity": Task("sparsity", sizes=("density",)),
    "mqar": Task("mqar", sizes=("pairs",)),
    "language": Task("language", "order-4 model 2.22", ("text",)),
    "sst2": Task("glue", "majority 0.509", GLUE),
    "cola": Task("glue", "majority 0.689", GLUE),
    "rte": Task("glue", sizes=GLUE),
}
# Not of the sweep.
OTHERS = (
    "sweep",
    "report",
    "compare",
    "pages",
    "convert",
    "distill",
    "distributed",
)


def to_beat(task, sizes=""):
    """What a model should be better than; nothing for other data than that of
    the task's preset.

    Args:
        task: its name.
        sizes: the flags of sizes that a run was given.
    """
    if {"--length", "--min-length"} & set(sizes.split()):
        return ""
    return TASKS[task].to_beat if task in TASKS else ""
