"""The command line: `python -m course VERB`. Only arguments and printing.

Every import that is not needed to print the help is inside the verb that needs it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

cli = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # a third of the time to --help, and examples that can be copied
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The workshop of the course: makes, checks and grades its weeks.",
)

Weeks = Annotated[
    list[str] | None, typer.Argument(metavar="WEEK", help="as 3, w03 or w03_clip; default: all")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for a program")]


@cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(
    context: typer.Context,
    week: Annotated[
        str | None, typer.Argument(metavar="WEEK", help="open this week's notebook")
    ] = None,
) -> None:
    """Open JupyterLab on your own copies of the notebooks, in work/.

    What you write there is yours: a new version of a week never overwrites it.
    Options that this command does not know go to JupyterLab.

    \b
    Example:
      python -m course lab 3
      python -m course lab 3 --no-browser --port 8899
    """
    from course.lab import prepare

    extra = list(context.args)
    if week is not None and week.startswith("-"):
        week, extra = None, [week, *extra]
    start = prepare(week, extra)
    for line in start.copied:
        print(f"work/{line}", file=sys.stderr)
    os.chdir(start.folder)
    os.execve(start.arguments[0], start.arguments, start.environment)


@cli.command()
def build(
    check: Annotated[
        bool, typer.Option("--check", help="write nothing; fail if a built file is out of date")
    ] = False,
) -> None:
    """Make notebooks and solutions from the weeks' sources.

    \b
    Example:
      python -m course build
      python -m course build --check
    """
    from course.build import build as make
    from course.show import print_build

    result = make(check=check)
    print_build(result, check)
    if check and not result.clean:
        raise typer.Exit(1)


@cli.command()
def check(
    weeks: Weeks = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "cpu",
    scale: Annotated[str, typer.Option(help="cpu or gpu: the size of the experiments")] = "cpu",
    data: Annotated[str, typer.Option(help="embedded, or hub (needs the network)")] = "embedded",
    seed: Annotated[int, typer.Option(help="the seed of everything that is random")] = 0,
    jobs: Annotated[
        int | None, typer.Option(help="weeks at the same time; default: 2, on one core 1")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run whole weeks and say what each one cost.

    Training and plots are run too. The executed notebooks are kept in
    build/check/. Exit code 1 if one of them failed.

    \b
    Example:
      python -m course check
      python -m course check 3 --jobs 1
      python -m course check 3 --device cuda --scale gpu
    """
    from course.check import default_jobs
    from course.show import print_runs, run_weeks
    from course.source import resolve_week, week_names

    names = [resolve_week(week) for week in weeks or week_names()]
    options = {"device": device, "scale": scale, "data": data, "seed": seed, "jobs": jobs}
    runs = run_weeks(names, show=not as_json, **options)
    if as_json:
        print(json.dumps([run.as_json() for run in runs], indent=1))
    else:
        print_runs(runs, min(jobs or default_jobs(), len(runs)))
    if any(run.failure for run in runs):
        raise typer.Exit(1)


@cli.command()
def verify(weeks: Weeks = None, as_json: AsJson = False) -> None:
    """Prove that the grading means something, exercise by exercise.

    The solution passes every check, the bare stub fails all, every known wrong answer is caught,
    and no check needs another exercise's answer. Exit code 1 otherwise.

    \b
    Example:
      python -m course verify
      python -m course verify 3 --json
    """
    from course.show import verify_weeks
    from course.source import resolve_week, week_names
    from course.verify import show

    names = [resolve_week(week) for week in weeks or week_names()]
    verification = verify_weeks(names, not as_json)
    if as_json:
        print(json.dumps(verification.as_dict(), indent=1))
    else:
        from rich.console import Console

        show(verification, Console())
    if not verification.ok:
        raise typer.Exit(1)


@cli.command()
def slides(
    weeks: Weeks = None,
    html: Annotated[bool, typer.Option("--html", help="a page each, which needs nothing")] = False,
    pdf: Annotated[bool, typer.Option("--pdf", help="a PDF each; needs a browser, too")] = False,
    as_json: AsJson = False,
) -> None:
    """Make slides from the decks, with the weeks' own figures.

    Writes build/slides/WEEK.md with its pictures beside it, for an editor with a Marp preview.
    A week whose kept run (course check) is out of date is run first. HTML and PDF
    are made by Marp: the one on PATH, or fetched by npx where Node.js is installed.

    \b
    Example:
      python -m course slides
      python -m course slides 3 --html
      python -m course slides w01 w03 --html --pdf
    """
    from course.show import make_slides, print_slides

    made = make_slides(weeks, html, pdf, show=not as_json)
    if as_json:
        print(json.dumps([deck.as_json() for deck in made], indent=1))
    else:
        print_slides(made)


@cli.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a new or empty folder")],
) -> None:
    """Make an nbgrader classroom. What is already there is never changed.

    \b
    Example:
      python -m course init class
    """
    from course.classroom import init as make

    made = make(folder)
    if not made:
        print(f"{folder} is a classroom already; nothing was changed.")
        return
    print(f"{folder}: made {', '.join(made)}.")
    print(f"Next: python -m course release w01_attention --class {folder}")


@cli.command()
def release(
    week: Annotated[str, typer.Argument(metavar="WEEK", help="as 3, w03 or w03_clip")],
    folder: Annotated[Path, typer.Option("--class", help="the classroom")] = Path("."),
) -> None:
    """Put a week into a classroom and make the version for students.

    \b
    Example:
      python -m course release 3 --class class
    """
    from course.classroom import release as put

    said = put(folder, week)
    for line in said or ["The classroom has this week already; nothing was changed."]:
        print(line)


@cli.command()
def grade(
    submitted: Annotated[
        Path,
        typer.Argument(metavar="SUBMITTED", help="STUDENT/WEEK/WEEK.ipynb, or what an LMS exports"),
    ],
    to: Annotated[Path, typer.Option(help="where grades go; a classroom, or a folder of its own")],
    week: Annotated[str | None, typer.Option(help="only this week")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="submissions at the same time; default: as cores and memory allow"),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="a Dask cluster whose workers you trust, tcp://host:8786")
    ] = None,
    isolation: Annotated[
        str | None, typer.Option(help="bubblewrap, landlock or process; default: the best there is")
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--i-trust-these-students", help="allow --isolation process: no sandbox"),
    ] = False,
    regrade: Annotated[bool, typer.Option("--regrade", help="run again what is graded")] = False,
    timeout: Annotated[
        float, typer.Option(help="seconds for a notebook's cells, and again for each check")
    ] = 60.0,
    memory: Annotated[int, typer.Option(help="MiB for one submission")] = 2048,
    as_json: AsJson = False,
) -> None:
    """Grade a folder of notebooks, honest or not, in a sandbox.

    Hidden tests never enter the students' processes. Writes journal.jsonl, grades.csv,
    gradebook.db, report.html and feedback/STUDENT/WEEK.html into the folder given with --to.
    Started again it goes on where it was, and grades only what changed.
    Exit code 0 when every submission has its rows, 2 for a usage error, 3 when interrupted.

    \b
    Example:
      python -m course grade class/submitted --to class
      python -m course grade class/submitted --to class --week 3 --jobs 4
      python -m course grade unpacked-lms-export --to grades --week w03_clip
    """
    from course.show import grade_class, print_summary
    from course.source import CourseError

    if isolation == "process" and not trust:
        raise CourseError(
            "--isolation process runs students' code with your rights: add "
            "--i-trust-these-students if you do, or leave --isolation out for the best sandbox."
        )
    options = {"week": week, "jobs": jobs, "scheduler": scheduler, "isolation": isolation}
    options |= {"regrade": regrade, "timeout": timeout, "memory": memory}
    try:
        summary = grade_class(submitted, to, show=not as_json, **options)
    except KeyboardInterrupt:
        print("Interrupted: what was graded is kept; the same command goes on.", file=sys.stderr)
        raise typer.Exit(3) from None
    if as_json:
        from dataclasses import asdict

        print(json.dumps(asdict(summary) | {"to": str(summary.to)}, indent=1))
    else:
        print_summary(summary)


@cli.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="what --to named when grading")],
) -> None:
    """Write everything that is derived from OUT/journal.jsonl again.

    That is grades.csv, gradebook.db, feedback/ and report.html. Nothing is run.
    Marks that a person gave in formgrader are kept.

    \b
    Example:
      python -m course report class
    """
    from course.grade import rebuild
    from course.show import print_summary

    print_summary(rebuild(folder))


@cli.command()
def samples(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where the submissions go")],
    week: Annotated[
        list[str] | None, typer.Option(help="this week; repeat it for more; default: all")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a small class of sample submissions.

    They come from the weeks' sources: right answers, every known wrong answer,
    half right, cells missing, a damaged file. Says what each should get.

    \b
    Example:
      python -m course samples build/class --week 3
      python -m course grade build/class --to build/grades
    """
    from course.samples import write_class
    from course.show import print_samples

    written = write_class(folder, week)
    if as_json:
        print(json.dumps([sample.as_json() for sample in written], indent=1))
    else:
        print_samples(written, folder)


@cli.command()
def demo() -> None:
    """Build, run and grade the course once: what `make demo` runs.

    \b
    Example:
      python -m course demo
    """
    from course.demo import demo as run

    raise typer.Exit(run())


@cli.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what works on this machine and what is missing.

    Exit code 1 if something that the course needs is not there.

    \b
    Example:
      python -m course doctor
    """
    from dataclasses import asdict

    from course.doctor import examine
    from course.show import print_findings

    if as_json:
        rows = list(examine())
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print("Looking at this machine; this takes about half a minute.", file=sys.stderr)
        rows = list(examine())
        print_findings(rows)
    if any(row.status == "failed" for row in rows):
        raise typer.Exit(1)


def app(arguments: list[str] | None = None) -> None:
    """Run the command line. A CourseError is one sentence on stderr and exit code 2."""
    try:
        cli(args=arguments, prog_name="python -m course")
    except Exception as error:
        from course.source import CourseError

        if not isinstance(error, CourseError):
            raise
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    app()
