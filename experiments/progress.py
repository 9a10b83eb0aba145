"""Progress of a run: its curve and times, which survive with checkpoints."""

import contextlib
import json
import sys
import time

import numpy as np

from experiments.data import is_point

# What may differ between a run and its resumption.
UNCHECKED = (
    "checkpoints",
    "data_dir",
    "draw_examples",
    "draws",
    "options",
    "pack",
    "results",
    "save_every",
    "task",
    "test_examples",
    "unpack",
    "validation_examples",
    "validations",
)


class Progress:
    """Progress, curve and times of a run; survives with its checkpoints."""

    def __init__(self, args, title, validate, metric, interval):
        self.args, self.validate, self.metric = args, validate, metric
        # Seconds between lines, and what ends with the first step.
        self.interval, self.before_step = interval, contextlib.ExitStack()
        self.curve, self.times, self.losses = [], [], []
        self.seconds = 0.0
        self.path = args.checkpoints and args.checkpoints / "progress.json"
        self.config = {
            "title": title,
            **{
                key: str(value)
                for key, value in sorted(vars(args).items())
                if key not in UNCHECKED
            },
        }
        if self.path and self.path.exists():
            self._resume(json.loads(self.path.read_text()))
        self.last = self.said = time.perf_counter()

    def _resume(self, saved):
        different = [
            f"{key} was {saved['config'].get(key)}, is {value}"
            for key, value in self.config.items()
            if saved["config"].get(key) != value
        ]
        if different:
            sys.exit(
                f"--checkpoints {self.args.checkpoints} holds a run of another "
                f"configuration: {'; '.join(different)}. Give the flags of "
                "that run to go on with it, or another folder."
            )
        self.curve, self.seconds = saved["curve"], saved["seconds"]

    def after_step(self, number, loss):
        now = time.perf_counter()
        self.before_step.close()
        self.times.append(now - self.last)
        self.losses.append(loss)
        steps = self.args.preset.steps
        if is_point(number, steps, self.args.validations):
            self._report(number)
            self.said = time.perf_counter()
        elif now - self.said >= self.interval:
            self.said = now
            seconds = self.seconds + sum(self.times)
            print(
                f"step {number:6d} of {steps}  loss {np.mean(self.losses):.4f}"
                f"  {seconds:.0f} s",
                flush=True,
            )
        if self.path and (
            number % self.args.save_every == 0 or number == steps
        ):
            self._save()
        # What was not training is not timed.
        self.last = time.perf_counter()

    def _report(self, number):
        point = {
            "step": number,
            "loss": float(np.mean(self.losses)),
            "validation": self.validate(),
            "seconds": self.seconds + sum(self.times),
        }
        self.losses = []
        # A resumed run comes past points that it has reported.
        self.curve = [p for p in self.curve if p["step"] < number] + [point]
        print(
            f"step {number:6d}  loss {point['loss']:.4f}  validation "
            f"{self.metric} {point['validation']:.4f}  "
            f"{point['seconds']:.0f} s",
            flush=True,
        )

    def _save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        saved = {
            "config": self.config,
            "curve": self.curve,
            "seconds": self.seconds + sum(self.times),
        }
        self.path.write_text(json.dumps(saved) + "\n")

    def times_of_all(self):
        """Seconds of training, and milliseconds of a step."""
        # The first two steps also compile.
        steady = self.times[2:] or self.times or [0.0]
        return {
            "seconds": self.seconds + sum(self.times),
            "milliseconds_per_step": 1e3 * float(np.median(steady)),
        }
