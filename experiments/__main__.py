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
    if "--help" not in argv and "-h" not in argv:
        print("Loading TensorFlow …", flush=True)
    try:
        module = importlib.import_module(f"experiments.{module}")
    except ModuleNotFoundError as error:
        if error.name not in ("tensorflow_text", "keras_hub"):
            raise
        sys.exit(
            f"{name} needs {error.name.replace('_', '-')}, which is not "
            f"installed. From a clone: pip install -e '.[text]' (tensorflow-"
            "text), or pip install keras-hub."
        )
    return module.main(argv, name) if name in TASKS else module.main(argv)


if __name__ == "__main__":
    sys.exit(main())
