"""Grades a folder of untrusted notebooks, several at once, and loses nothing.

    SUBMITTED/STUDENT/WEEK/WEEK.ipynb   what students handed in; never changed
    OUT/journal.jsonl                   what each submission got; all below is made from it
    OUT/grades.csv                      one row for each check of each submission
    OUT/gradebook.db                    nbgrader's gradebook; OUT opens in formgrader
    OUT/feedback/STUDENT/WEEK.html      what the student gets to read
    OUT/report.html                     what the instructor gets to read
    OUT/autograded/STUDENT/WEEK/        the executed notebooks, as formgrader wants them

Students' code runs in a sandbox; the hidden tests never enter it. `README.md` beside this file has
the threat model, what is promised and what is not. The map of this folder:

    intake.py, notebook.py    files and zips of any layout; what is in a submitted file
    healing.py                damaged notebooks made whole
    plan.py                   what a run knows beforehand: points, settings, digests
    checks.py                 a week's checks, run here on proxies of the student's names
    grader.py                 one submission, from bytes to its result
    remote.py, arguments.py   those proxies, and how a call's arguments travel
    mirrors.py                a student's module, held here as a module with parameters
    sandbox.py                the isolation tiers, and the warm parent of all children
    inside/                   all that exists in the sandbox; a student can read every line of it
    outputs.py                what the student's cells showed, made harmless
    schedule.py, job.py       several graders at once, on this machine or on a Dask cluster
    journal.py, gradebook.py  what is kept, and what is derived from it
    feedback.py, report.py    pages for students and for the instructor
    pages.py, templates/      what both kinds of page have in common, and how they look
    records.py                the values that these modules hand to each other

The status of a row in grades.csv:

    passed, failed   what the check said; the reason says why in one line
    to mark          a written answer that waits for a person (no points yet)
    marked           a person gave these points in formgrader; run again to see them in grades.csv
    stopped          the submission ended even the process that graded it; the reason says how
    damaged          no notebook of this week: missing, a link, too large, or unreadable
    refused          the course has no such week
"""

import hashlib
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from course.grade.records import Limits, Result, Row, Submission
from course.source import CourseError, resolve_week, weeks_folder

__all__ = [
    "COLUMNS",
    "Limits",
    "Result",
    "Row",
    "Submission",
    "Summary",
    "grade",
    "rebuild",
    "totals",
]

SECRET = Path(".grading", "secret")  # in OUT
# What a sandbox imports before its first child, besides what the weeks themselves import.
PRELOAD = ("torchvision", "torchaudio", "transformers", "torch._dynamo")


@dataclass(frozen=True)
class Summary:
    """What a run did: counts, the rows of grades.csv, and where things are."""

    to: Path
    rows: list[dict]
    graded: int
    kept: int
    odd: dict[str, int]
    ignored: list[str]
    seconds: float
    isolation: str = ""
    moved: str = ""
    notices: list[str] = field(default_factory=list)

    @property
    def to_mark(self) -> int:
        return sum(row["status"] == "to mark" for row in self.rows)


def grade(
    submitted: Path,
    to: Path,
    *,
    week: str | None = None,
    jobs: int | None = None,
    scheduler: str | None = None,
    isolation: str | None = None,
    regrade: bool = False,
    timeout: float = Limits.seconds,
    memory: int = Limits.memory_mib,
    folder: Path | None = None,
    preload: tuple[str, ...] = PRELOAD,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Grade every submission in a folder.

    `on_progress(done, total)` is told when the first begins and when each ends; `total` leaves out
    those that an earlier run graded. `timeout` is for a notebook's cells and again for each check,
    in seconds; `memory` in MiB. `scheduler` is the address of a Dask cluster whose workers are
    trusted. With `regrade` everything is run again.
    Raises: CourseError, when the folder is missing or empty, the week is unknown, or OUT cannot be
    used. A submission, however broken, raises nothing: it gets its rows.
    """
    from course.grade import sandbox
    from course.grade.gradebook import open_classroom
    from course.grade.intake import find_submissions
    from course.grade.journal import Journal, in_words, moved
    from course.grade.plan import Plan, Settings

    started = time.perf_counter()
    submitted, to = Path(submitted), Path(to)
    _check_options(jobs, timeout, memory)
    if to.resolve().is_relative_to(submitted.resolve()):
        raise CourseError(f"{to} is inside {submitted}; grades go into a folder outside of it.")
    folder = weeks_folder(folder)
    only = resolve_week(week, folder) if week else None
    submissions, ignored = find_submissions(submitted, only, folder)
    tier = sandbox.probe(isolation) if scheduler is None else None
    weeks = _read_weeks(folder)
    wanted = {s.week for s in submissions if s.status != "refused"}
    plans = {name: Plan.of(week) for name, week in weeks.items() if name in wanted}
    digests = {name: plan.digest for name, plan in plans.items()}
    with _machine_trouble(), Journal(to, digests) as journal:
        open_classroom(to, plans, folder)
        earlier = journal.results()
        limits = Limits(seconds=timeout, memory_mib=memory)
        modules = (*preload, *_imported(weeks[name] for name in plans))
        settings = Settings(secret_of(to), folder, limits, tier and tier.name, modules)
        tests = {name: settings.tests_digest(plan.digest) for name, plan in plans.items()}
        found = [Found.of(submission) for submission in submissions]
        todo = [f for f in found if regrade or not _is_kept(f, earlier, tests, to)]
        on_progress(0, len(todo))
        with closing(_results(todo, plans, tests, settings, jobs, scheduler)) as results:
            for done, (result, notebook) in enumerate(results, start=1):
                keep(to, result, notebook, weeks)
                journal.append(result)
                on_progress(done, len(todo))
        now = journal.results()
        moves = moved(earlier, now)
        again = any(f.key in earlier for f in todo)
        rows = derive(to, now, settings, weeks, moves)
    outcomes = [now[s.student, s.week].outcome for s in submissions]
    return Summary(
        to=to,
        rows=rows,
        graded=len(todo),
        kept=len(submissions) - len(todo),
        odd=dict(Counter(outcome for outcome in outcomes if outcome != "graded")),
        ignored=ignored,
        seconds=time.perf_counter() - started,
        isolation=f"{tier.name}: {tier.detail}" if tier else f"as the workers of {scheduler} have",
        moved=in_words(moves) if again else "",
        notices=[notice for notice in (journal.notice,) if notice],
    )


def _check_options(jobs: int | None, timeout: float, memory: int) -> None:
    if jobs is not None and jobs < 1:
        raise CourseError(f"--jobs is {jobs}; wanted 1 or more.")
    if not timeout > 0:
        raise CourseError(f"--timeout is {timeout:g}; wanted more than 0 seconds.")
    if memory < 256:
        raise CourseError(f"--memory is {memory}; wanted 256 MiB or more, or torch does not load.")


def totals(rows: Iterable[Mapping]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Points per student and week: earned, possible, and those that a person has yet to give."""
    table: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in rows:
        weeks = table.setdefault(row["student"], {})
        earned, possible, waiting = weeks.get(row["week"], (0.0, 0.0, 0.0))
        weeks[row["week"]] = (
            earned + float(row["points"] or 0),
            possible + float(row["max_points"]),
            waiting + (row["status"] == "to mark") * float(row["max_points"]),
        )
    return table


def secret_of(to: Path) -> bytes:
    """The secret that salts the hidden seeds, made at the first run and kept in OUT.

    Copy the file to another OUT to have the same hidden numbers there.
    """
    path = Path(to) / SECRET
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".secret.{os.getpid()}")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        os.replace(part, path)
    try:
        return bytes.fromhex(path.read_text("ascii"))
    except ValueError:
        raise CourseError(
            f"{path} is damaged (wanted 64 hexadecimal digits): put its copy back, or delete it "
            "and grade everything again."
        ) from None


# What is to be done


def _imported(weeks: Iterable) -> tuple[str, ...]:
    """The modules that the weeks themselves import: no submission should wait for them."""
    import ast

    found: dict[str, None] = {}
    for week in weeks:
        codes = [cell.text for cell in week.given] + [e.solution for e in week.exercises.values()]
        for node in (node for code in codes for node in ast.walk(ast.parse(code))):
            if isinstance(node, ast.Import):
                found |= dict.fromkeys(item.name for item in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found[node.module] = None
    return tuple(found)


@dataclass(frozen=True)
class Found:
    """A submission that was looked at: the digest of its bytes, or what is wrong with them."""

    submission: Submission
    digest: str
    status: str = ""
    problem: str = ""

    @staticmethod
    def of(submission: Submission) -> "Found":
        from course.grade.intake import Damaged, read_submission

        status, problem = submission.status, submission.problem
        if not problem:
            try:
                content = read_submission(submission)
                return Found(submission, hashlib.sha256(content).hexdigest())
            except Damaged as damage:
                status, problem = "damaged", str(damage)
        digest = hashlib.sha256(f"{status}: {problem}".encode()).hexdigest()
        return Found(submission, digest, status, problem)

    @property
    def key(self) -> tuple[str, str]:
        return self.submission.student, self.submission.week


def _is_kept(found: Found, earlier: Mapping, tests: Mapping[str, str], to: Path) -> bool:
    """Whether an earlier run graded these bytes with these tests, and what it wrote is there."""
    result = earlier.get(found.key)
    return (
        result is not None
        and result.tests_digest == tests.get(result.week, "")
        and result.submission_digest == found.digest
        and feedback_path(to, result).is_file()
        and (executed_path(to, result).is_file() or result.outcome != "graded")
    )


def _results(
    todo: list[Found], plans: Mapping, tests: Mapping[str, str], settings, jobs, scheduler
) -> Iterator[tuple[Result, bytes]]:
    """The results in the order in which they come, each with its executed notebook."""
    from course.grade.plan import nothing
    from course.grade.schedule import run

    for found in todo:
        if found.problem:
            week = found.submission.week
            items = plans[week].items if week in plans and found.status != "refused" else ()
            fate = items, found.status, found.problem
            yield nothing(*found.key, found.digest, tests.get(week, ""), *fate), b""
    entries = [(f.submission, tests[f.submission.week]) for f in todo if not f.problem]
    if entries:
        with closing(run(entries, settings, jobs, scheduler)) as results:
            yield from results


# What is kept, and what is made of it


def feedback_path(to: Path, result: Result) -> Path:
    return to / "feedback" / result.student / f"{result.week}.html"


def executed_path(to: Path, result: Result) -> Path:
    return to / "autograded" / result.student / result.week / f"{result.week}.ipynb"


def keep(to: Path, result: Result, notebook: bytes, weeks: Mapping) -> None:
    """Write what belongs to one submission; its line in the journal comes after this."""
    from course.grade.gradebook import keep_notebook

    keep_notebook(to, result, notebook)
    write_feedback(to, result, notebook, weeks)


def write_feedback(
    to: Path,
    result: Result,
    notebook: bytes,
    weeks: Mapping,
    comments: Mapping[str, str] | None = None,
) -> None:
    """Write the page that one student reads; `comments` are a person's, by grade id."""
    from course.classroom import write_atomically
    from course.grade import feedback

    executed = json.loads(notebook) if notebook else None
    page = feedback.page(result, weeks.get(result.week), executed, comments or {})
    write_atomically(feedback_path(to, result), page.encode())


def derive(
    to: Path, results: Mapping, settings, weeks: Mapping, moves: Iterable = ()
) -> list[dict]:
    """Write gradebook.db, grades.csv, report.html, and the pages of those whom a person marked."""
    from course.classroom import write_atomically
    from course.grade import gradebook, report
    from course.grade.journal import in_words
    from course.grade.plan import fingerprint

    rows = gradebook.write_gradebook(to, results)
    write_atomically(to / "grades.csv", gradebook.as_csv(rows))
    marked: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        if row["status"] == "marked":
            of_submission = marked.setdefault((row["student"], row["week"]), {})
            of_submission[row["exercise"], row["check"]] = row
    comments = gradebook.written_comments(to)
    for key in marked.keys() | comments.keys():
        if key in results and executed_path(to, results[key]).is_file():
            result = _with_marks(results[key], marked.get(key, {}))
            notebook = executed_path(to, result).read_bytes()
            write_feedback(to, result, notebook, weeks, comments.get(key))
    tiers = {result.tier: result.versions for result in results.values() if result.tier}
    page = report.page(
        (_with_marks(result, marked.get(key, {})) for key, result in results.items()),
        weeks,
        tier=", ".join(sorted(tiers)),
        versions=next(reversed(tiers.values()), {}),
        limits=settings.limits,
        secret=fingerprint(settings.secret),
        moved=in_words(moves),
        moves=moves,
    )
    write_atomically(to / "report.html", page.encode())
    return rows


def rebuild(to: Path, folder: Path | None = None) -> Summary:
    """Make everything that is derived from OUT/journal.jsonl again; nothing is run.

    Raises: CourseError, when OUT has no journal, or a damaged one.
    """
    from course.grade import gradebook
    from course.grade.journal import Journal
    from course.grade.plan import Settings

    started = time.perf_counter()
    to, folder = Path(to), weeks_folder(folder)
    weeks = _read_weeks(folder)
    if not (to / "journal.jsonl").is_file():
        raise CourseError(
            f"{to} has no journal.jsonl; name the folder that `python -m course grade --to` named."
        )
    with _machine_trouble(), Journal(to) as journal:
        results = journal.results()
        gradebook.rebuild(to, results, weeks, folder)
        for result in results.values():
            executed = executed_path(to, result)
            there = executed.is_file() and result.outcome == "graded"
            write_feedback(to, result, executed.read_bytes() if there else b"", weeks)
        rows = derive(to, results, Settings(secret_of(to), folder), weeks)
        odd = Counter(r.outcome for r in results.values() if r.outcome != "graded")
    return Summary(
        to=to,
        rows=rows,
        graded=0,
        kept=len(results),
        odd=dict(odd),
        ignored=[],
        seconds=time.perf_counter() - started,
        notices=[journal.notice] if journal.notice else [],
    )


def _with_marks(result: Result, marked: Mapping) -> Result:
    """A result with the points that a person gave, as grades.csv has them."""
    rows = []
    for row in result.rows:
        given = marked.get((row.exercise, row.check))
        if given is not None:
            points = float(given["points"]) if given["points"] else None
            row = replace(row, points=points, status="marked", reason=given["reason"])
        rows.append(row)
    return replace(result, rows=tuple(rows))


def _read_weeks(folder: Path) -> dict:
    from course.source import read_week, week_names

    return {name: read_week(name, folder) for name in week_names(folder)}


@contextmanager
def _machine_trouble() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CourseError(
            f"Grading stopped: {error}; what was graded is kept, and the same command goes on."
        ) from error
