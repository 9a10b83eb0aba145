"""The versions that setup.py claims, and what is uploaded; see CONTRIBUTING.md.

`nox -s matrix` runs a cell for each Python that is there; `nox -s package`
builds the wheel and the sdist, and tries both.
"""

import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# Of the dependencies that setup.py gives ranges for.
VERSIONS = {
    "lowest": ["-c", "constraints-lowest.txt"],
    "tested": ["-c", "constraints.txt"],
}
# Tests that read files of the repository, which an sdist has to hold.
READING = ["architecture", "documentation", "package", "records", "typing"]

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["matrix"]


def smoke(session):
    """Runs tests/smoke.py where the source is not on the path."""
    folder = session.create_tmp()
    script = ROOT / "tests" / "smoke.py"
    with session.chdir(folder):
        session.run("python", str(script), "--installed")


@nox.session(python=PYTHONS)
@nox.parametrize("versions", list(VERSIONS))
def matrix(session, versions):
    """A smoke test of the nine systems; `-- tests/…` adds files of tests."""
    session.install(*VERSIONS[versions], ".")
    smoke(session)
    if session.posargs:
        session.install(*VERSIONS[versions], "pytest", "matplotlib")
        session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=PYTHONS)
def newest(session):
    """The same with what the registry has, beyond the ranges too."""
    session.install(".")
    session.install(
        *("--upgrade", "tensorflow", "keras", "tf-keras"),
        *("tensorflow-probability", "numpy"),
    )
    smoke(session)


@nox.session
def build(session):
    """The wheel and the sdist, in dist/."""
    session.install("build", "twine", "check-manifest", "setuptools>=64")
    if (ROOT / ".git").exists():
        session.run("check-manifest", "--no-build-isolation")
    shutil.rmtree(DIST, ignore_errors=True)
    session.run(
        "python", "-m", "build", "--no-isolation", "--outdir", str(DIST)
    )
    session.run("twine", "check", "--strict", *map(str, DIST.iterdir()))


@nox.session(requires=["build"])
def package(session):
    """The wheel runs in a clean environment, and the sdist's tests run."""
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    session.install("-c", "constraints.txt", str(wheel))
    smoke(session)
    session.install("-c", "constraints.txt", f"{wheel}[test]")
    folder = Path(session.create_tmp()) / "sdist"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.unpack_archive(sdist, folder)
    (source,) = folder.iterdir()
    session.chdir(source)
    session.run("python", "-m", "pytest", "--collect-only", "-qq")
    files = [f"tests/test_{name}.py" for name in READING]
    session.run("python", "-m", "pytest", "-m", "not slow", *files)
