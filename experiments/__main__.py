"""`python -m experiments NAME …`: one run, a sweep of runs, or a report."""

import importlib
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from experiments.tasks import OTHERS, TASKS

USAGE = f"""usage: python -m experiments NAME [flags]

NAME is a task, {", ".join(TASKS)};
or {", ".join(OTHERS)}. Flags: python -m experiments NAME --help"""


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        return 0
    name, *argv = sys.argv[1:]
    if name not in (*TASKS, *OTHERS):
        sys.exit(f"{USAGE}\n\nNAME must be one of these. Received: {name}")
    module = TASKS[name].module if name in TASKS else name
    module = importlib.import_module(f"experiments.{module}")
    return module.main(argv, name) if name in TASKS else module.main(argv)


if __name__ == "__main__":
    sys.exit(main())
