"""Looks at this machine and says what the course finds, what is missing, and the way out.

Each row is one thing that has stopped somebody before. A failed row is needed for the weeks or for
grading; a warning is worth knowing; an absent helper only matters for what its row names.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from course.source import CourseError, repo_root

DISTRIBUTION = "mmlearn-course"
REINSTALL = "run `make setup`, which installs what constraints.txt names"
DISK_GIB = 2.0  # what a class of notebooks, its feedback and one run of every week take, with room
MEMORY_GIB = 3.0  # one week (2 GiB) and the tools that run it

# What Debian packages beside Python, by the command they bring: the package and what it is for.
HELPERS = {
    "espeak-ng": ("espeak-ng", "speaking words when speech data are made anew"),
    "ffmpeg": ("ffmpeg", "speech pipelines that are given a path to a sound file"),
    "tesseract": ("tesseract-ocr", "document pipelines that read the words of a scan themselves"),
    "chromium": ("chromium", "the tests that open pages in a browser"),
    "node": ("nodejs npm", "slides as HTML or PDF, which Marp makes"),
}


@dataclass(frozen=True)
class Row:
    """One finding. `status` is ok, warning, failed or absent; `advice` is empty when ok."""

    name: str
    status: str
    found: str
    advice: str = ""


def examine(constraints: Path | None = None) -> Iterator[Row]:
    """Yield the rows one after the other; some take seconds, because they really try it."""
    yield python_row()
    yield from package_rows(constraints or repo_root() / "constraints.txt")
    yield from torch_rows()
    with tempfile.TemporaryDirectory(prefix="course-doctor-") as scratch:
        yield kernel_row(Path(scratch))
        yield gradebook_row(Path(scratch))
    yield isolation_row()
    yield disk_row(repo_root())
    yield memory_row()
    for command in HELPERS:
        yield helper_row(command)


def python_row(version: tuple[int, ...] = sys.version_info[:3]) -> Row:
    """Python 3.11 or newer, in an environment of its own."""
    found = ".".join(map(str, version))
    if version < (3, 11):
        advice = "the course needs Python 3.11 or newer; install one and " + REINSTALL + "."
        return Row("python", "failed", found, advice)
    if sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ:
        advice = "this is the system's Python; use .venv/bin/python, which `make demo` makes."
        return Row("python", "warning", f"{found}, no virtual environment", advice)
    return Row("python", "ok", f"{found} in {sys.prefix}")


def package_rows(constraints: Path) -> Iterator[Row]:
    """Installed versions against what the course requires and what its tests ran with."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        advice = "install the course itself: `python -m pip install -e '.[course]'`."
        yield Row("packages", "failed", f"{DISTRIBUTION} is not installed", advice)
        return
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": "course"})]
    unusable = []
    for requirement in wanted:
        version = installed(requirement.name)
        if version is None:
            unusable.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            unusable.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if unusable:
        yield Row("packages", "failed", "; ".join(unusable), REINSTALL + ".")
    else:
        yield Row("packages", "ok", f"all {len(wanted)} that the course needs")
    if not constraints.is_file():
        yield Row("versions", "warning", "no constraints.txt", "take it from the repository.")
        return
    tested = dict(read_constraints(constraints))
    versions = {name: installed(name) for name in tested}
    different = [
        f"{name} {versions[name]} (tested: {version})"
        for name, version in tested.items()
        if versions[name] not in (None, version)
    ]
    if different:
        some = "; ".join(different[:5]) + ("; …" if len(different) > 5 else "")
        advice = "these versions were not tested together; to get those that were, " + REINSTALL
        yield Row("versions", "warning", f"{len(different)} differ: {some}", advice + ".")
    else:
        same = sum(version is not None for version in versions.values())
        yield Row("versions", "ok", f"{same} equal the tested ones in constraints.txt")


def read_constraints(path: Path) -> Iterator[tuple[str, str]]:
    """The names and versions in a constraints file; other lines are none of our business."""
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equals, version = line.split("#")[0].split(";")[0].partition("==")
        if equals:
            yield name.strip(), version.strip()


def installed(name: str) -> str | None:
    """The installed version without a build's local label (2.11.0+cpu is 2.11.0), or None."""
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def torch_rows() -> Iterator[Row]:
    """Import what only loads as a matched set, in another process, because it can crash there."""
    program = (
        "import json, torch; found = {'torch': torch.__version__, 'cuda': None}\n"
        "if torch.cuda.is_available():\n"
        "    found['cuda'] = f'{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}'\n"
        "import torchvision, torchaudio, transformers\n"
        "found |= {m.__name__: m.__version__ for m in (torchvision, torchaudio, transformers)}\n"
        "print(json.dumps(found))"
    )
    ok, output = run_python(program)
    if not ok:
        advice = (
            "torch, torchvision and torchaudio load only as a matched set "
            "(2.11.0, 0.26.0, 2.11.0); " + REINSTALL + "."
        )
        yield Row("torch", "failed", output, advice)
        return
    found = json.loads(output)
    device = found.pop("cuda")
    yield Row("torch", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))
    if device:
        yield Row("cuda", "ok", device)
    else:
        advice = 'every week runs on the CPU; only SCALE = "gpu" needs one.'
        yield Row("cuda", "absent", "no CUDA device", advice)


def kernel_row(scratch: Path) -> Row:
    """Start the kernel that notebooks will run in and ask which Python it is."""
    from course.check import kernel_environment

    program = (
        "import sys; from jupyter_client.manager import start_new_kernel\n"
        "manager, client = start_new_kernel(kernel_name='python3')\n"
        "client.execute_interactive('import sys; print(sys.prefix)', timeout=60)\n"
        "client.stop_channels(); manager.shutdown_kernel()"
    )
    ok, output = run_python(program, kernel_environment(scratch))
    if not ok:
        return Row("kernel", "failed", output, "notebooks cannot start; " + REINSTALL + ".")
    if Path(output).resolve() != Path(sys.prefix).resolve():
        advice = "the kernel python3 belongs to another Python; " + REINSTALL + "."
        return Row("kernel", "failed", output, advice)
    return Row("kernel", "ok", "python3 starts in this environment")


def gradebook_row(scratch: Path) -> Row:
    """Make a gradebook, which is when nbgrader runs alembic from PATH."""
    from course.check import kernel_environment

    program = (
        "import nbgrader; from nbgrader.api import Gradebook\n"
        f"Gradebook('sqlite:///{scratch / 'gradebook.db'}').close()\n"
        "print('nbgrader', nbgrader.__version__)"
    )
    ok, output = run_python(program, kernel_environment(scratch))
    if not ok:
        return Row("gradebook", "failed", output, "grading cannot work; " + REINSTALL + ".")
    return Row("gradebook", "ok", f"{output} makes a gradebook")


def isolation_row() -> Row:
    """Start a process as a student's code is run, and see whether it is shut in."""
    from course.grade import sandbox

    try:
        tier = sandbox.probe()
    except CourseError as problem:
        first = str(problem).partition(". ")[0]
        advice = sandbox.way_to_better() + " Until then grade only students whom you trust."
        return Row("isolation", "warning", first, advice)
    found = f"tier {tier.number}, {tier.name}: {tier.detail}"
    return Row("isolation", "warning" if tier.better else "ok", found, tier.better)


def run_python(program: str, environment: dict[str, str] | None = None) -> tuple[bool, str]:
    """Run a program in this Python: whether it ended well, and its output or last error line."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | (environment or {}),
        timeout=300,
    )
    if done.returncode == 0:
        return True, done.stdout.strip()
    lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
    return False, lines[-1]


def disk_row(folder: Path, needed_gib: float = DISK_GIB) -> Row:
    """Free space where build/ is."""
    free = shutil.disk_usage(folder).free / 2**30
    if free < needed_gib:
        advice = (
            f"a class and its notebooks need about {needed_gib:.0f} GiB; delete build/ or more."
        )
        return Row("disk", "warning", f"{free:.1f} GiB free", advice)
    return Row("disk", "ok", f"{free:.0f} GiB free")


def memory_row(needed_gib: float = MEMORY_GIB) -> Row:
    """Memory that is free now."""
    import psutil

    free = psutil.virtual_memory().available / 2**30
    if free < needed_gib:
        advice = "a week needs up to 2 GiB, its tools 1 more; close programs, or use --jobs 1."
        return Row("memory", "warning", f"{free:.1f} GiB available", advice)
    return Row("memory", "ok", f"{free:.0f} GiB available")


def helper_row(command: str) -> Row:
    """A program that pip cannot bring."""
    package, purpose = HELPERS[command]
    if path := shutil.which(command):
        return Row(command, "ok", path)
    return Row(command, "absent", "not installed", f"only for {purpose}: apt install {package}.")
