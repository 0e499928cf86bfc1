"""A week runs from its first cell to its last, and what went wrong is named."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from course.check import Failure, Run, check, kernel_environment, peak_memory, resolve_device
from course.source import CourseError

HEAD = """\
# %% [markdown]
# # Week {number}. What does running cost?

# %% tags=["parameters"]
SEED = 0
DEVICE = "cpu"
SCALE = "cpu"
DATA = "embedded"
"""


@pytest.fixture
def weeks(tmp_path, monkeypatch):
    """Write weeks of the cells given, w01_first and so on; run them; keep their notebooks here."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    folder = tmp_path / "weeks"
    folder.mkdir()

    def run(*cells, **options):
        for number, name in zip(range(1, len(cells) + 1), ("first", "second"), strict=False):
            text = HEAD.format(number=number) + "".join(
                f"\n# %%{cell}\n" for cell in cells[:number][-1:]
            )
            (folder / f"w{number:02d}_{name}.py").write_text(text, "utf-8")
        runs = list(check(folder=folder, to=tmp_path / "kept", **options))
        assert list(scratch.iterdir()) == [], "temporary files were left behind"
        return sorted(runs, key=lambda run: run.week)

    return run


def outputs(run):
    cells = nbformat.read(run.notebook, as_version=4).cells
    return "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)


@pytest.mark.slow
def test_the_parameters_reach_the_notebook_and_experiments_are_run(weeks):
    (run,) = weeks(
        "\nprint(SEED, DEVICE, SCALE, DATA)",
        seed=7,
        scale="gpu",
        data="hub",
    )
    assert run.failure is None
    assert "7 cpu gpu hub\n" in outputs(run)


@pytest.mark.slow
def test_the_kernel_is_this_python_whatever_the_user_has_registered(weeks, tmp_path, monkeypatch):
    kernel = tmp_path / "data" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    spec = {"argv": ["false", "{connection_file}"], "display_name": "mine", "language": "python"}
    kernel.write_text(json.dumps(spec), "utf-8")
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    (run,) = weeks(' tags=["experiment"]\nimport sys\nprint(sys.prefix)')
    assert run.failure is None
    assert sys.prefix in outputs(run)


@pytest.mark.slow
def test_weeks_run_together_and_a_failing_one_names_its_cell_and_keeps_its_notebook(weeks):
    progress = []
    first, second = weeks(
        "\nprint('fine')",
        "\n# a remark\nwaveform = [1, 2]\nwaveform[2]",
        jobs=2,
        on_cell=lambda *event: progress.append(event),
    )
    assert (first.week, first.failure) == ("w01_first", None)
    assert "fine" in outputs(first)
    failure = second.failure
    solved = [cell for cell in nbformat.read(second.notebook, 4).cells if "error" in str(cell)]
    assert failure.error == "IndexError: list index out of range"
    assert failure.first_line == "# a remark"
    assert failure.cell == 5  # title, badges, set-up, parameters, and this one
    assert failure.cell_id.startswith("code-")
    assert "waveform[2]" in failure.traceback
    assert solved, "the kept notebook does not show the error"
    assert {week for week, _, _ in progress} == {"w01_first", "w02_second"}
    assert all(0 <= cell < cells for _, cell, cells in progress)


@pytest.mark.slow
def test_a_kernel_that_dies_is_a_failure_of_its_cell(weeks):
    (run,) = weeks("\nimport os\nos._exit(1)")
    assert run.failure.first_line == "import os"
    assert run.failure.error.startswith("The kernel died")


@pytest.mark.slow
def test_the_peak_is_that_of_the_kernel_and_its_children(weeks):
    two_processes_of_200_mib = """
import subprocess, sys
block = bytearray(200 * 2**20)
hold = "import time; block = bytearray(200 * 2**20); time.sleep(1)"
print(subprocess.run([sys.executable, "-c", hold]).returncode)"""
    (run,) = weeks(two_processes_of_200_mib)
    # Two blocks, two interpreters and the kernel's modules; more would be somebody else's memory.
    assert 400 < run.peak_mib < 700


def test_a_peak_between_two_samples_is_seen():
    with peak_memory() as memory:
        subprocess.run([sys.executable, "-c", "bytearray(150 * 2**20)"], check=True)
    assert memory.mib > 150


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"device": "tpu"}, "'tpu'"),
        ({"scale": "huge"}, "'huge'"),
        ({"data": "web"}, "'web'"),
        ({"jobs": 0}, "--jobs is 0"),
        ({"weeks": ["w77_none"]}, "w77_none"),
    ],
)
def test_what_is_not_offered_is_refused_before_anything_runs(options, named):
    with pytest.raises(CourseError, match=named):
        check(**options)


def test_cuda_without_a_device_is_refused_and_auto_takes_the_cpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(CourseError, match="no CUDA device"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (resolve_device("cuda"), resolve_device("auto")) == ("cuda", "cuda")


def test_a_run_says_which_bars_it_missed():
    assert Run("w01", 89.0, 2000.0, "").over == []
    assert Run("w01", 91.0, 2100.0, "").over == ["over 90 s", "over 2 GiB"]
    failed = Run("w01", 1.0, 1.0, "", Failure(3, "code-1", "x", "NameError: x", ""))
    assert failed.failure.place == "cell 3 (code-1)"
    assert "before the first cell" in Failure(0, "", "", "RuntimeError: no kernel", "").place
    assert (failed.as_json()["status"], failed.as_json()["failure"]["cell"]) == ("failed", 3)


def test_notebooks_share_the_threads_and_leave_their_files_where_they_are_told(tmp_path):
    environment = kernel_environment(tmp_path, threads=3)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    for name in ("TMPDIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        assert Path(environment[name]).is_relative_to(tmp_path)


@pytest.mark.slow
def test_leaving_early_ends_kernels_and_workers(weeks, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        weeks("\nimport time\ntime.sleep(60)", on_cell=_interrupt_main_at_cell_4)
    deadline = time.monotonic() + 10
    while (left := running_in(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def running_in(folder):
    """The processes whose command names something in this folder: kernels, by their connection."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in argument for argument in process.cmdline()):
                found.append(process)
    return found


def _interrupt_main_at_cell_4(week, cell, cells):
    if cell == 4:
        os.kill(os.getpid(), signal.SIGINT)
