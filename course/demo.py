"""The course's main job, once, from nothing to a gradebook: what `make demo` runs.

Everything it makes is under build/demo/, which it empties first.
"""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from course.samples import KINDS, write_class
from course.source import repo_root, week_names


def demo(root: Path | None = None, folder: Path | None = None, kinds: Iterable[str] = KINDS) -> int:
    """Build, run, release and grade all weeks with a small class; return the exit code.

    Everything is made under `root`, from the weeks in `folder`: by default this checkout's.
    """
    from rich.console import Console

    from course.build import build
    from course.check import default_jobs
    from course.classroom import init, release
    from course.show import grade_class, print_gradebook, print_runs, run_weeks

    console, started = Console(), time.perf_counter()
    root, weeks = root or repo_root(), week_names(folder)
    classroom = root / "build" / "demo" / "class"
    shutil.rmtree(classroom.parent, ignore_errors=True)

    with _step(console, "The notebooks are built from the weeks' sources"):
        build(to=root, folder=folder)
    with _step(console, "Every week runs from its first cell to its last"):
        runs = run_weeks(weeks, folder=folder, to=root / "build" / "check")
    with _step(console, "An nbgrader classroom gets the weeks"):
        init(classroom)
        for week in weeks:
            release(classroom, week, folder)
    with _step(console, "A class hands in: right, half right, cells missing, damaged, forged"):
        expected = write_class(classroom / "submitted", weeks, kinds, folder)
    with _step(console, "Its notebooks are graded"):
        summary = grade_class(classroom / "submitted", classroom, folder=folder)

    print_runs(runs, min(default_jobs(), len(runs)))
    print_gradebook(summary.rows)
    surprises = list(compare(expected, summary.rows))
    for surprise in surprises:
        print(f"Surprise: {surprise}")
    if not surprises:
        print("Every submission got what it should have got.")
    home = os.path.relpath(classroom)
    lab = f"cd {shlex.quote(home)} && {shlex.quote(os.path.relpath(sys.executable, classroom))}"
    print(f"""
Grades       {home}/grades.csv and gradebook.db
The class    {home}/report.html
Feedback     {home}/feedback/half_right/{weeks[-1]}.html
Plots        {os.path.relpath(runs[-1].notebook)}: all that the week prints and draws
Formgrader   ({lab} -m jupyterlab), then Nbgrader → Formgrader
Took         {time.perf_counter() - started:.0f} s

Next: make lab""")
    return 1 if surprises or any(run.failure for run in runs) else 0


def compare(expected, rows) -> Iterator[str]:
    """What the class got against what it should have got: a sentence for each difference."""
    earned, waiting = {}, {}
    for row in rows:
        key = row["student"], row["week"]
        earned[key] = earned.get(key, 0.0) + float(row["points"] or 0)
        waiting[key] = waiting.get(key, 0) + (row["status"] == "to mark")
    for sample in expected:
        key = sample.student, sample.week
        name = f"{sample.student}'s {sample.week}"
        if key not in earned:
            yield f"{name} has no grade."
        elif not sample.lowest <= earned[key] <= sample.highest:
            wanted = f"{sample.lowest:g}"
            if sample.highest > sample.lowest:
                wanted += f" to {sample.highest:g}"
            yield f"{name} got {earned[key]:g} points; it should have got {wanted}."
        elif waiting[key] != sample.to_mark:
            yield f"{name} has {waiting[key]} answers to mark by hand, not {sample.to_mark}."


@contextmanager
def _step(console, title: str) -> Iterator[None]:
    started = time.perf_counter()
    console.print(f"[bold]{title}")
    yield
    console.print(f"  {time.perf_counter() - started:.1f} s", style="dim")
