"""The process of `host.py`: started, killed with all that it started."""

import json
import os
import shutil
import signal
import site
import subprocess
import sys
import time
import urllib.request
import venv
from pathlib import Path

HERE = Path(__file__).parent


class Server:
    """A Triton server of exports.

    Args:
        folder: an empty one, of a short path, for its files.
        exports: folders of exports by name.
        models: what is served of them, names as of `host.py`.
        port: of HTTP; the next one is used too.
    """

    def __init__(self, folder, exports, models, port):
        self.folder, self.models = Path(folder), models
        self.words = [f"{name}={path}" for name, path in exports.items()]
        self.words += ["--only", *models, "--port", str(port)]
        self.url = f"http://127.0.0.1:{port}"
        self.python = _environment(self.folder / "python")
        self.process, self.starts = None, 0

    def start(self, seconds=300):
        """Starts it, and waits until it serves."""
        self.starts += 1
        workspace = self.folder / f"w{self.starts}"
        log = self.folder / f"log{self.starts}"
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                [
                    *(self.python, HERE / "host.py", *self.words),
                    *("--workspace", workspace),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
        end = time.monotonic() + seconds
        while not all(map(self._is_ready, self.models)):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"No server:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)

    def requests_and_runs(self, model):
        """How many requests of a model came, and how often it ran for them."""
        (stats,) = json.load(self._get(f"models/{model}/stats"))["model_stats"]
        return stats["inference_count"], stats["execution_count"]

    def _is_ready(self, model):
        try:
            return self._get(f"models/{model}/ready").status == 200
        except OSError:
            return False

    def _get(self, path):
        return urllib.request.urlopen(f"{self.url}/v2/{path}", timeout=10)

    def kill(self):
        """Ends it at once, with all processes that it started."""
        if self.process is None:
            return
        processes = [self.process.pid, *_descendants(self.process.pid)]
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self.process = None


def _environment(folder):
    """A Python as this one, with a lock that pytriton's server asks for."""
    venv.create(folder, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    lines = [f"import site; site.addsitedir({x!r})\n" for x in _site_packages()]
    (packages / "all.pth").write_text("".join(lines))
    shutil.copy(HERE / "embedded" / "sitecustomize.py", packages)
    return folder / "bin" / "python"


def _site_packages():
    return [path for path in site.getsitepackages() if Path(path).is_dir()]


def _descendants(process):
    """Numbers of the processes that one started, and so on."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found
