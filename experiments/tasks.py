"""What can be run, by name."""

from typing import NamedTuple

import keras_kt


class Task(NamedTuple):
    """A task of the sweep.

    Attributes:
        module: the file that runs it.
        to_beat: what a model should be better than.
    """

    module: str
    to_beat: str = ""


TASKS = {
    "listops": Task("listops", "first operator alone 0.320"),
    "text": Task("text", "byte counts 0.646"),
    "image": Task("image", "linear on pixels 0.289"),
    "dna": Task("dna", "4-mers 0.945"),
    "mnist5k": Task("image"),
    "pathfinder": Task("image", "chance 0.5"),
    "retrieval": Task("retrieval", "TF-IDF cosine 0.83"),
    "sparsity": Task("sparsity"),
    "language": Task("language", "order-4 model 2.22"),
    "sst2": Task("glue", "majority 0.509"),
    "cola": Task("glue", "majority 0.689"),
    "rte": Task("glue"),
}
SYSTEMS = ("softmax", *keras_kt.PAPER_SYSTEMS)
# Of these systems the kernel is not learned.
FIXED = ("Performer", "RBF-RKS", "RBF-PRF")
# Not of the sweep.
OTHERS = ("sweep", "report", "convert", "distributed")


def to_beat(task):
    return TASKS[task].to_beat if task in TASKS else ""
