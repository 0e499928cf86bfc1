"""What the verbs put on the terminal: bars on stderr while they work, tables on stdout."""

import os
from contextlib import ExitStack, closing

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "absent": "dim"}


def run_weeks(weeks, show: bool = True, **options) -> list:
    """Run weeks behind one bar each; return the runs in the order of the weeks."""
    from course.check import check

    runs = []
    with _bar(show) as bar:
        tasks = {}

        def on_cell(week: str, cell: int, cells: int) -> None:
            if week not in tasks:
                tasks[week] = bar.add_task(week, total=cells, note="")
            bar.update(tasks[week], completed=cell, note=f"cell {cell + 1} of {cells}")

        with closing(check(weeks, on_cell=on_cell, **options)) as ended:
            for run in ended:
                runs.append(run)
                if run.week in tasks and not run.failure:
                    total = next(task.total for task in bar.tasks if task.id == tasks[run.week])
                    bar.update(tasks[run.week], completed=total, note="done")
    return sorted(runs, key=lambda run: run.week)


def grade_class(submitted, to, show: bool = True, **options):
    """Grade behind a bar with submissions per second and time left; return the summary."""
    from course.grade import grade

    with _bar(show) as bar:

        def on_progress(done: int, total: int) -> None:
            task = bar.task_ids[0] if bar.task_ids else bar.add_task("grading", note="")
            seconds = max(bar.tasks[0].elapsed or 0.0, 1e-3)
            note = f"{done} of {total}, {done / seconds:.2f} submissions/s"
            bar.update(task, total=total, completed=done, note=note)

        return grade(submitted, to, on_progress=on_progress, **options)


def verify_weeks(weeks, show: bool = True):
    """Verify behind a bar of exercises; return the verification."""
    from course.source import read_week
    from course.verify import verify

    with _bar(show) as bar:
        total = sum(len(read_week(week).exercises) for week in weeks)
        task = bar.add_task("verifying", total=total, note="")

        def done(result) -> None:
            bar.update(task, advance=1, note=f"{result.week}/{result.exercise}")

        return verify(weeks, done=done)


def make_slides(weeks, html: bool, pdf: bool, show: bool = True) -> list:
    """Make slides behind a bar, below another for the weeks that must be run first."""
    from course.decks import make_slides as make

    with ExitStack() as stack:
        bars = []  # begun when no week is running any more: two at a time overwrite each other

        def run(names, folder, to):
            return run_weeks(names, show=show, folder=folder, to=to)

        def on_step(what: str, step: int, steps: int) -> None:
            if not bars:
                bars.append(stack.enter_context(_bar(show)))
                bars[0].add_task("slides", note="")
            bars[0].update(bars[0].task_ids[0], completed=step, total=steps, note=what)

        return make(weeks, html=html, pdf=pdf, run=run, on_step=on_step)


def _bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not show,
    )


def print_build(result, check: bool) -> None:
    """What `course build` wrote, or would have written."""
    said = "is out of date" if check else "written"
    for name in result.changed:
        print(f"{name} {said}")
    for name in result.removed:
        print(f"{name} {'is of no week' if check else 'deleted: it was of no week'}")
    print(f"{_count(len(result.unchanged), 'file')} up to date.")
    if check and not result.clean:
        print("Run `python -m course build` and commit what it writes.")


def print_runs(runs, together: int) -> None:
    """The table of `course check`, and for each week that failed its cell and its error."""
    from course.check import SECONDS_BAR, cores

    console = Console()
    table = Table("week", box=box.SIMPLE_HEAD)
    table.add_column("seconds", justify="right")
    table.add_column("peak MiB", justify="right")
    table.add_column("status")
    for run in runs:
        status = "[red]failed[/]" if run.failure else "[green]ok[/]"
        if run.over:
            status += f" [yellow]{', '.join(run.over)}[/]"
        table.add_row(run.week, f"{run.seconds:.1f}", f"{run.peak_mib:.0f}", status)
    console.print(table)
    if together > 1:
        print(
            f"Run {together} at a time on {cores()} cores: the seconds that count against the bar "
            f"of {SECONDS_BAR:.0f} s are those of --jobs 1."
        )
    for run in runs:
        if (failure := run.failure) is not None:
            print(f"{run.week} stopped at {failure.place}:")
            for text in filter(None, (failure.first_line, failure.traceback or failure.error)):
                print("    " + text.replace("\n", "\n    "))
    folders = sorted({os.path.dirname(run.notebook) for run in runs})
    print(f"The executed notebooks, with their plots: {', '.join(folders)}")


def print_slides(made) -> None:
    """What `course slides` wrote, and from which run its figures are."""
    table = Table("week", box=box.SIMPLE_HEAD)
    for column in ("slides", "figures"):
        table.add_column(column, justify="right")
    table.add_column("from a run")
    for deck in made:
        ran = "of this moment" if deck.ran else "that course check kept"
        table.add_row(deck.week, str(deck.slides), str(deck.figures), ran)
    Console().print(table)
    folder = os.path.dirname(made[0].files[0])
    kinds = [os.path.splitext(file)[1][1:] for file in made[0].files]
    print(f"As {', '.join(kinds)} in {folder}")


def print_findings(rows) -> None:
    """The table of `course doctor`."""
    table = Table("", "status", "found", box=box.SIMPLE_HEAD)
    for row in rows:
        found = f"{row.found} → {row.advice}" if row.advice else row.found
        table.add_row(row.name, f"[{COLOURS[row.status]}]{row.status}", escape(found))
    Console().print(table)


def print_samples(samples, folder) -> None:
    """What each sample submission should get from its checks."""
    table = Table("student", "week", box=box.SIMPLE_HEAD)
    table.add_column("should get", justify="right")
    for sample in samples:
        wanted = f"{sample.lowest:g}"
        if sample.highest > sample.lowest:
            wanted += f" to {sample.highest:g}"
        table.add_row(escape(sample.student), sample.week, f"{wanted} of {sample.of:g}")
    Console().print(table)
    print(f"{_count(len(samples), 'submission')} in {folder}")


def print_summary(summary) -> None:
    """What `course grade` did, and what to look at next."""
    again = f", {summary.kept} kept from before" if summary.kept else ""
    pace = f" in {summary.seconds:.1f} s" if summary.graded else ""
    print(f"{_count(summary.graded, 'submission')} graded{pace}{again}.")
    if summary.isolation:
        print(f"Isolation: {summary.isolation}")
    for line in filter(None, (*summary.notices, summary.moved)):
        print(line)
    for outcome, number in sorted(summary.odd.items()):
        print(f"  {number} {outcome}: the reasons are in grades.csv")
    for said in summary.ignored:
        print(f"  {said}")
    print(f"{summary.to}/report.html shows the class; grades.csv, gradebook.db and feedback/ are")
    print("up to date beside it.")
    if summary.to_mark:
        print(
            f"{_count(summary.to_mark, 'written answer')} to mark by hand: start JupyterLab in "
            f"{summary.to}, open Nbgrader → Formgrader; then run this again for grades.csv."
        )


def print_gradebook(rows) -> None:
    """Students by weeks: points earned of those possible."""
    from course.grade import totals

    points = totals(rows)
    weeks = sorted({row["week"] for row in rows})
    table = Table("student", box=box.SIMPLE_HEAD)
    for week in weeks:
        table.add_column(week, justify="right")
    for student, of_student in points.items():
        cells = []
        for week in weeks:
            if week not in of_student:
                cells.append("")
                continue
            earned, possible, waiting = of_student[week]
            cells.append(f"{earned:g} of {possible:g}" + (f" (+{waiting:g}?)" if waiting else ""))
        table.add_row(escape(student), *cells)
    Console().print(table)
    if any(waiting for of_student in points.values() for _, _, waiting in of_student.values()):
        print("(+n?) n points are for written answers that wait for a person.")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
