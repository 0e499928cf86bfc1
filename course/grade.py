"""Grades a folder of submissions with nbgrader, several at once, and loses nothing.

    SUBMITTED/STUDENT/WEEK/WEEK.ipynb   what students handed in; never changed
    OUT/grades.csv                      one row for each check of each submission
    OUT/gradebook.db                    nbgrader's gradebook; OUT opens in formgrader
    OUT/feedback/STUDENT/WEEK.html      what the student gets to read
    OUT/autograded/STUDENT/WEEK/        the executed notebooks, as formgrader wants them

For trusted submissions only: nbgrader runs the hidden tests inside the student's own kernel, where
the student's code can read and forge everything. The isolating grader will take this one's place
behind the same command.

Each submission gets a course directory and a gradebook of its own, because nbgrader in parallel on
one SQLite file is slower than one after the other. This process alone writes to OUT, each file in
one step. OUT/.grading/ remembers what each submission got, by the digest of the submission and of
the week's tests: a run that was stopped, even by SIGKILL, goes on where it was, and what did not
change is not run again. Scores and comments given by hand in formgrader are kept.

The status of a row in grades.csv:

    passed, failed   what the check said; the reason is the first line of its error
    to mark          a written answer that waits for a person (no points yet)
    marked           a person gave these points in formgrader; run again to see them in grades.csv
    stopped          the notebook did not run to its end; the reason says why
    damaged          no notebook of this week: missing, a link, too large, or unreadable
    refused          the course has no such week
"""

import csv
import hashlib
import html
import io
import json
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

from course.check import QUIET_KERNEL, cores, kernel_environment, process_pool
from course.classroom import (
    database_url,
    init,
    nbgrader_at,
    release,
    run_converter,
    solved_bytes,
    source_path,
    write_atomically,
)
from course.source import (
    CourseError,
    imported_answer,
    read_week,
    resolve_week,
    week_names,
    weeks_folder,
)

TRUSTED_ONLY = (
    "Hidden tests run inside each student's own kernel here: grade only submissions that you "
    "trust, until the isolating grader takes this one's place."
)
COLUMNS = ("student", "week", "exercise", "check", "points", "max_points", "status", "reason")
LARGEST_NOTEBOOK = 20 * 2**20  # bytes
LONGEST_REASON = 300  # characters of a reason in grades.csv
NEUTRAL = "student"  # the name inside a submission's own course directory: real names may be globs
UNWRITTEN = "YOUR ANSWER HERE"  # what stands in the cell below a written question
RECORD_FORMAT = 1  # of the files in OUT/.grading; a record of another format is graded anew


@dataclass(frozen=True)
class Submission:
    """One notebook that somebody handed in. With a problem there is nothing to run."""

    student: str
    week: str
    path: Path | None
    status: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Item:
    """One thing that earns points. A written answer is marked by hand."""

    grade_id: str
    exercise: str
    check: str
    max_points: float
    title: str = ""
    by_hand: bool = False


@dataclass(frozen=True)
class Row:
    """One line of grades.csv; `points` is None while a written answer waits."""

    grade_id: str
    exercise: str
    check: str
    points: float | None
    max_points: float
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """What one submission got. `comments` holds what was said about single answer cells."""

    student: str
    week: str
    digest: str
    rows: list[Row]
    comments: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    notebook: str = ""  # the executed notebook and its feedback, until they are moved into OUT
    feedback: str = ""

    @property
    def outcome(self) -> str:
        """graded, or the status that all rows share because there was nothing to grade."""
        odd = {row.status for row in self.rows} & {"damaged", "refused", "stopped"}
        return odd.pop() if odd else "graded"


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

    @property
    def to_mark(self) -> int:
        return sum(row["status"] == "to mark" for row in self.rows)


def grade(
    submitted: Path,
    to: Path,
    *,
    week: str | None = None,
    jobs: int | None = None,
    timeout: float = 60.0,
    folder: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Grade every submission in a folder.

    `on_progress(done, total)` is told when the first begins and when each ends; `total` leaves out
    those that an earlier run graded. `timeout` is for one cell, in seconds.
    Raises: CourseError, when the folder is missing or empty, the week is unknown, or OUT cannot be
    used. A submission, however broken, raises nothing: it gets its rows.
    """
    started = time.perf_counter()
    submitted, to = Path(submitted), Path(to)
    if jobs is not None and jobs < 1:
        raise CourseError(f"--jobs is {jobs}; wanted 1 or more.")
    if timeout <= 0:
        raise CourseError(f"--timeout is {timeout:g}; wanted more than 0 seconds.")
    if to.resolve().is_relative_to(submitted.resolve()):
        raise CourseError(f"{to} is inside {submitted}; grades go into a folder outside of it.")
    folder = weeks_folder(folder)
    only = resolve_week(week, folder) if week else None
    submissions, ignored = find_submissions(submitted, only, folder)
    weeks = sorted({s.week for s in submissions if s.status != "refused"})
    plans = {name: Plan.of(name, folder) for name in weeks}
    with _machine_trouble(), sole_writer(to) as records:
        earlier = read_records(records)
        todo = [
            s
            for s in submissions
            if not _is_kept(earlier.get((s.student, s.week)), s, plans.get(s.week), to)
        ]
        with tempfile.TemporaryDirectory(
            prefix="work-", dir=records, ignore_cleanup_errors=True
        ) as scratch:
            work = Path(scratch)
            template = template_for(plans, records, work, folder)
            open_classroom(to, template, plans, folder)
            on_progress(0, len(todo))
            new = _grade_all(todo, plans, template, work, jobs or default_jobs(), timeout, folder)
            with closing(new) as results:
                for done, result in enumerate(results, start=1):
                    keep(result, to, records)
                    earlier[result.student, result.week] = result
                    on_progress(done, len(todo))
            fresh = {(s.student, s.week) for s in todo}
            rows = merge(list(earlier.values()), fresh, to, work)
        write_atomically(to / "grades.csv", as_csv(rows))
    now = [earlier[s.student, s.week].outcome for s in submissions]
    return Summary(
        to=to,
        rows=rows,
        graded=len(todo),
        kept=len(submissions) - len(todo),
        odd=dict(Counter(outcome for outcome in now if outcome != "graded")),
        ignored=ignored,
        seconds=time.perf_counter() - started,
    )


def default_jobs() -> int:
    """As many as there are cores, and as fit: a kernel with torch takes most of a GiB."""
    import psutil

    return max(1, min(cores(), psutil.virtual_memory().available // 2**30))


# Intake


def find_submissions(
    submitted: Path, only: str | None = None, folder: Path | None = None
) -> tuple[list[Submission], list[str]]:
    """All submissions in nbgrader's layout, and the names of what was no submission.

    Raises: CourseError, when there is none.
    """
    layout = "SUBMITTED/STUDENT/WEEK/WEEK.ipynb"
    if not submitted.is_dir():
        raise CourseError(f"{submitted} is no folder; wanted submissions as {layout}.")
    known, found, ignored = set(week_names(folder)), [], []
    for student in sorted(submitted.iterdir()):
        if student.name.startswith("."):
            continue
        if student.is_symlink() or not student.is_dir():
            ignored.append(student.name)
            continue
        for entry in sorted(student.iterdir()):
            name = entry.stem if entry.suffix == ".ipynb" else entry.name
            if entry.name.startswith(".") or (only and name != only):
                continue
            if entry.is_dir() or (entry.suffix == ".ipynb" and not (student / name).is_dir()):
                found.append(_examine(student.name, name, entry, known))
            else:
                ignored.append(f"{student.name}/{entry.name}")
    if not found:
        of = f" of {only}" if only else ""
        raise CourseError(f"{submitted} holds no submission{of}; wanted {layout}.")
    return found, ignored


def _examine(student: str, week: str, entry: Path, known: set[str]) -> Submission:
    def refused(problem: str, status: str = "refused") -> Submission:
        return Submission(student, week, None, status, problem)

    if week not in known:
        return refused(f"the course has no week {week!r}; wanted one of {', '.join(sorted(known))}")
    path = entry / f"{week}.ipynb" if entry.is_dir() else entry
    if entry.is_symlink() or path.is_symlink():
        return refused("it is a link, not a file", "damaged")
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in entry.iterdir())) or "nothing"
        return refused(f"there is no {week}.ipynb in it but {there}", "damaged")
    if path.stat().st_size > LARGEST_NOTEBOOK:
        return refused(
            f"{path.stat().st_size / 2**20:.0f} MiB are too much; the limit is "
            f"{LARGEST_NOTEBOOK // 2**20} MiB",
            "damaged",
        )
    return Submission(student, week, path)


@dataclass(frozen=True)
class Plan:
    """What a week asks for: its points in order, and a digest of everything that decides them."""

    week: str
    items: list[Item]
    digest: str

    @staticmethod
    def of(name: str, folder: Path | None = None) -> "Plan":
        week, solved = read_week(name, folder), solved_bytes(name, folder)
        items = [
            Item(check.grade_id, exercise.name, check.aspect, float(check.points), check.title)
            for exercise in week.exercises.values()
            for check in exercise.checks
        ]
        items += [
            Item(w.name, w.name, "written", float(w.points), by_hand=True) for w in week.written
        ]
        forbidden = json.dumps({e.name: e.forbids for e in week.exercises.values()})
        digest = hashlib.sha256(solved + forbidden.encode()).hexdigest()
        return Plan(name, items, digest)


def digest_of(submission: Submission, plan: Plan | None) -> str:
    """Changes when the submission or the week's tests change, and at no other time."""
    seen = hashlib.sha256((plan.digest if plan else "").encode())
    seen.update(submission.problem.encode())
    if submission.path is not None:
        seen.update(submission.path.read_bytes())
    return seen.hexdigest()


# What a run leaves behind for the next


@contextmanager
def sole_writer(to: Path) -> Iterator[Path]:
    """OUT/.grading, held by this run alone and swept of what a killed run left.

    Raises: CourseError, when OUT is a file or another run holds it.
    """
    import fcntl

    records = to / ".grading"
    if to.exists() and not to.is_dir():
        raise CourseError(f"{to} is a file; --to wants a folder.")
    records.mkdir(parents=True, exist_ok=True)
    with open(records / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CourseError(
                f"Another run is grading into {to}; wait for it, or grade into another folder."
            ) from None
        _sweep(records)
        try:
            yield records
        finally:
            _sweep(records)


def _sweep(records: Path) -> None:
    """Remove the working folders, also those that a dying kernel still writes into."""
    for _ in range(20):
        leftovers = list(records.glob("work-*"))
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
        if not leftovers:
            return
        time.sleep(0.1)


@contextmanager
def _machine_trouble() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CourseError(
            f"Grading stopped: {error}; what was graded is kept, and the same command goes on."
        ) from error


def read_records(records: Path) -> dict[tuple[str, str], Result]:
    """What earlier runs found, by student and week. A record that cannot be read is not there."""
    found = {}
    for path in sorted(records.glob("*.json")):
        with suppress(ValueError, TypeError, KeyError):
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.pop("format") == RECORD_FORMAT:
                rows = [Row(**row) for row in record.pop("rows")]
                result = Result(rows=rows, **record)
                found[result.student, result.week] = result
    return found


def keep(result: Result, to: Path, records: Path) -> None:
    """Move a submission's results into OUT; the record comes last, so it vouches for the rest."""
    feedback, executed = feedback_path(to, result), executed_path(to, result)
    if result.feedback:
        write_atomically(feedback, Path(result.feedback).read_bytes())
    else:
        write_atomically(feedback, plain_feedback(result).encode())
    if result.notebook:
        write_atomically(executed, Path(result.notebook).read_bytes())
    else:
        shutil.rmtree(executed.parent, ignore_errors=True)
    record = asdict(result) | {"format": RECORD_FORMAT, "notebook": "", "feedback": ""}
    name = hashlib.sha256(json.dumps([result.student, result.week]).encode()).hexdigest()
    write_atomically(records / f"{name[:32]}.json", json.dumps(record, indent=1).encode())


def _is_kept(record: Result | None, submission: Submission, plan: Plan | None, to: Path) -> bool:
    if record is None or record.digest != digest_of(submission, plan):
        return False
    executed = executed_path(to, record).is_file() or record.outcome != "graded"
    return executed and feedback_path(to, record).is_file()


def feedback_path(to: Path, result: Result) -> Path:
    return to / "feedback" / result.student / f"{result.week}.html"


def executed_path(to: Path, result: Result) -> Path:
    return to / "autograded" / result.student / result.week / f"{result.week}.ipynb"


def plain_feedback(result: Result) -> str:
    """The page of a submission that could not be run."""
    reason = html.escape(result.rows[0].reason)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(result.week)}'
        f"</title>\n<h1>{html.escape(result.week)}: no points</h1>\n<p>Your notebook was not "
        f"graded, because {reason}.</p>\n<p>Open it in JupyterLab, run every cell, save it and hand"
        " it in again; or begin again with a fresh copy of the week.</p>\n</html>\n"
    )


# OUT as a course directory


def template_for(plans: dict[str, Plan], records: Path, work: Path, folder: Path | None) -> Path:
    """A classroom with these weeks and no student, which every submission gets a copy of.

    It is kept from run to run, because nbgrader takes seconds to make a gradebook.
    """
    versions = "".join(plans[week].digest for week in sorted(plans))
    place = records / f"template-{hashlib.sha256(versions.encode()).hexdigest()[:16]}"
    if not place.exists():
        for other in records.glob("template-*"):
            shutil.rmtree(other)
        init(work / "template")
        for week in plans:
            release(work / "template", week, folder)
        os.rename(work / "template", place)
    return place


def open_classroom(to: Path, template: Path, plans: dict[str, Plan], folder: Path | None) -> None:
    """Make OUT a course directory that has these weeks, so that formgrader can open it.

    Raises: CourseError, when OUT has a week in another version than the course.
    """
    if {path.name for path in to.iterdir()} <= {".grading"}:
        shutil.copytree(
            template, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("gradebook.db")
        )
        write_atomically(to / "gradebook.db", (template / "gradebook.db").read_bytes())
        return
    init(to)
    for week in plans:
        source = source_path(to, week)
        if source.exists() and source.read_bytes() != solved_bytes(week, folder):
            raise CourseError(
                f"{source} is not the course's present version of {week}; bring it up to date with "
                f"`python -m course release {week} --class {to}`, or grade into another folder."
            )
        release(to, week, folder)


def merge(results: list[Result], new: set, to: Path, work: Path) -> list[dict]:
    """Put all results into the gradebook through nbgrader's API; return the rows of grades.csv.

    A score or comment given by hand is never touched; if the submission is `new` since, it is up
    for another look, in formgrader and in the reason. The new gradebook takes the old one's
    place in one step.
    """
    from nbgrader.api import Gradebook

    merged, rows = work / "gradebook.db", []
    shutil.copyfile(to / "gradebook.db", merged)
    with nbgrader_at(to) as config:
        course = config.CourseDirectory.course_id
        with Gradebook(f"sqlite:///{merged.resolve()}", course) as gradebook:
            for result in sorted(results, key=lambda r: (r.student, r.week)):
                marked = {}
                if result.outcome != "refused":
                    marked = _enter(gradebook, result, (result.student, result.week) in new)
                rows += [_csv_row(result, marked.get(row.grade_id, row)) for row in result.rows]
    os.replace(merged, to / "gradebook.db")
    return rows


def _enter(gradebook, result: Result, new: bool) -> dict[str, Row]:
    """Enter one submission; return the rows of what a person has marked."""
    gradebook.update_or_create_student(result.student)
    with gradebook.db.no_autoflush:  # or SQLAlchemy warns of each object that is half made
        gradebook.update_or_create_submission(result.week, result.student)
    entry = gradebook.find_submission_notebook(result.week, result.week, result.student)
    rows, marked = {row.grade_id: row for row in result.rows}, {}
    for grade in entry.grades:
        if (row := rows.get(grade.name)) is None:
            continue
        grade.auto_score = row.points
        if grade.manual_score is None:
            grade.needs_manual_grade = row.points is None
        elif new:
            grade.needs_manual_grade = True
        if grade.manual_score is not None or grade.extra_credit:
            automatic = row.points or 0.0
            given = automatic if grade.manual_score is None else grade.manual_score
            reason = "marked before it changed" if grade.needs_manual_grade else ""
            points = given + (grade.extra_credit or 0.0)
            marked[grade.name] = replace(row, points=points, status="marked", reason=reason)
    for comment in entry.comments:
        comment.auto_comment = result.comments.get(comment.name)
    gradebook.db.commit()
    return marked


def _csv_row(result: Result, row: Row) -> dict:
    values = (
        result.student,
        result.week,
        row.exercise,
        row.check,
        "" if row.points is None else f"{row.points:g}",
        f"{row.max_points:g}",
        row.status,
        row.reason,
    )
    return dict(zip(COLUMNS, values, strict=True))


def as_csv(rows: list[dict]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "replace")


def totals(rows: list[dict]) -> dict[str, dict[str, tuple[float, float, float]]]:
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


# Running them


@dataclass(frozen=True)
class Task:
    submission: Submission
    plan: Plan
    digest: str
    template: Path  # a classroom with the week released and no student
    work: Path
    timeout: float
    folder: Path | None


def _grade_all(
    submissions, plans, template: Path, work: Path, jobs: int, timeout: float, folder: Path
) -> Iterator[Result]:
    tasks = []
    for submission in submissions:
        plan = plans.get(submission.week)
        if submission.problem:
            yield zero(submission, plan, digest_of(submission, plan))
            continue
        place = work / str(len(tasks))
        digest = digest_of(submission, plan)
        tasks.append(Task(submission, plan, digest, template, place, timeout, folder))
    if not tasks:
        return
    jobs = min(jobs, len(tasks))
    environment = kernel_environment(work, threads=max(1, cores() // jobs))
    environment["HF_HUB_OFFLINE"] = "1"  # a notebook that waits for the network holds up the class
    waiting = {task.work: task for task in tasks}
    try:
        with process_pool(jobs, environment) as pool:
            for future in as_completed([pool.submit(grade_one, task) for task in tasks]):
                result, place = future.result()
                del waiting[place]
                yield result
                shutil.rmtree(place, ignore_errors=True)
    except BrokenProcessPool:
        # One of them took a worker down, and with it everything in the pool: find out which.
        for task in waiting.values():
            shutil.rmtree(task.work, ignore_errors=True)
            try:
                with process_pool(1, environment) as pool:
                    yield pool.submit(grade_one, task).result()[0]
            except BrokenProcessPool:
                reason = "it ended the process that graded it, most likely for want of memory"
                yield zero(task.submission, task.plan, task.digest, "stopped", reason)


def zero(
    submission: Submission, plan: Plan | None, digest: str, status: str = "", reason: str = ""
) -> Result:
    """No points for anything, with the reason in every row."""
    status, reason = status or submission.status, reason or submission.problem
    items = plan.items if plan and status != "refused" else [Item("", "", "", 0.0)]
    rows = [
        Row(item.grade_id, item.exercise, item.check, 0.0, item.max_points, status, reason)
        for item in items
    ]
    return Result(submission.student, submission.week, digest, rows)


# In the worker process


class Damaged(Exception):
    """A file that cannot be graded; the message completes "because ..."."""


def grade_one(task: Task) -> tuple[Result, Path]:
    """Grade one submission in a course directory of its own."""
    started = time.perf_counter()
    submission, week = task.submission, task.submission.week
    released = task.template / "release" / week / f"{week}.ipynb"
    try:
        import nbformat

        notebook = read_notebook(submission.path.read_bytes())
        mended, notes = mend(notebook, nbformat.read(released, as_version=4))
        rows, comments = _autograde(task, mended, notes)
    except Damaged as damage:
        return zero(submission, task.plan, task.digest, "damaged", str(damage)), task.work
    except _Stopped as stop:
        return zero(submission, task.plan, task.digest, "stopped", str(stop)), task.work
    except OSError:
        raise  # the machine's trouble, a full disk for one, is no fault of the submission
    except Exception as error:
        reason = f"the grader failed on it with {type(error).__name__}: {error}".splitlines()[0]
        return zero(submission, task.plan, task.digest, "stopped", reason), task.work
    place = Path(NEUTRAL) / week
    result = Result(
        submission.student,
        week,
        task.digest,
        rows,
        comments,
        time.perf_counter() - started,
        notebook=str(task.work / "autograded" / place / f"{week}.ipynb"),
        feedback=str(task.work / "feedback" / place / f"{week}.html"),
    )
    return result, task.work


def read_notebook(content: bytes):
    """A submitted file as a notebook of the present format.

    Raises: Damaged, saying what is wrong with it.
    """
    import nbformat
    from nbformat.validator import normalize

    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Damaged("the file is not UTF-8 text") from None
    if not text.strip():
        raise Damaged("the file is empty")
    try:
        data = json.loads(text)
        # Half a character (a lone surrogate, from cutting a string in two) cannot be written again.
        data = json.loads(json.dumps(data, ensure_ascii=False).encode("utf-8", "replace"))
    except json.JSONDecodeError as error:
        where = f"it breaks off or is damaged at line {error.lineno}"
        raise Damaged(f"the file is not JSON: {where}") from None
    except RecursionError:
        raise Damaged("the file is nested too deeply") from None
    if not isinstance(data, dict) or not ("cells" in data or "worksheets" in data):
        raise Damaged("the file is JSON but no notebook")
    try:
        notebook = nbformat.convert(nbformat.from_dict(data), 4)
        _, notebook = normalize(notebook)  # cell ids: missing ones made, copied ones made anew
        nbformat.validate(notebook)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(f"the file is no valid notebook: {first}") from None
    return notebook


def mend(notebook, released) -> tuple:
    """Make the graded cells of a submission those of the released notebook, each exactly once.

    nbgrader gives up on a whole submission for one copied cell, and passes by what was deleted.
    Here the last copy counts, deleted cells are put back (an answer as its stub), and metadata are
    the released ones. Returns the notebook and, by grade id, what was wrong.
    Raises: Damaged, when no graded cell is left.
    """
    from copy import deepcopy

    order = [cell for cell in released.cells if "nbgrader" in cell.metadata]
    wanted = {cell.metadata.nbgrader.grade_id: cell for cell in order}
    by_cell_id = {cell.id: grade_id for grade_id, cell in wanted.items()}
    notebook, last, notes, copies = deepcopy(notebook), {}, {}, Counter()
    for cell in notebook.cells:
        marks = cell.metadata.pop("nbgrader", None)
        grade_id = marks.get("grade_id") if isinstance(marks, dict) else None
        if grade_id not in wanted:
            grade_id = by_cell_id.get(cell.get("id"))
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if grade_id is not None:
            copies[grade_id] += 1
            last[grade_id] = cell
    if not last:
        raise Damaged("it has no graded cell of this week")
    for grade_id, cell in last.items():
        cell.metadata["nbgrader"] = deepcopy(wanted[grade_id].metadata.nbgrader)
        if copies[grade_id] > 1:
            notes[grade_id] = (
                f"the cell {grade_id!r} is in the notebook {copies[grade_id]} times; "
                "the last one was graded"
            )
    for place, cell in enumerate(order):
        grade_id = cell.metadata.nbgrader.grade_id
        if grade_id in last:
            continue
        notes[grade_id] = f"the cell {grade_id!r} was deleted from the notebook and put back"
        # After the graded cell before it, which is there by now; the first ones before the next.
        neighbours = order[place - 1 : place] or order
        near = next(last[i] for c in neighbours if (i := c.metadata.nbgrader.grade_id) in last)
        index = next(i for i, c in enumerate(notebook.cells) if c is near)
        last[grade_id] = deepcopy(cell)
        notebook.cells.insert(index + (place > 0), last[grade_id])
    return notebook, notes


class _Stopped(Exception):
    """The notebook did not run to its end; the message completes "because ..."."""


def _autograde(task: Task, notebook, notes: dict[str, str]) -> tuple[list[Row], dict[str, str]]:
    import warnings

    import nbformat
    from nbgrader.api import Gradebook
    from nbgrader.converters import Autograde, GenerateFeedback
    from sqlalchemy.exc import SAWarning

    warnings.simplefilter("ignore", SAWarning)  # nbgrader's own; this process runs nothing else
    week, root = task.submission.week, task.work
    root.mkdir()
    for name in ("nbgrader_config.py", "gradebook.db"):
        shutil.copyfile(task.template / name, root / name)
    handed_in = root / "submitted" / NEUTRAL / week
    handed_in.mkdir(parents=True)
    nbformat.write(notebook, handed_in / f"{week}.ipynb")
    with nbgrader_at(root) as config:
        config.Execute.timeout = max(1, round(task.timeout))
        config.Execute.kernel_name = "python3"
        config.Execute.extra_arguments = QUIET_KERNEL
        whole = 60 + 3 * task.timeout  # seconds: imports, and a few cells that each use their time
        with time_limit(whole) as clock:
            try:
                run_converter(Autograde, config, week, NEUTRAL)
            except CourseError as error:
                if clock.is_set():
                    raise _Stopped(f"it ran longer than {whole:.0f} s in all") from None
                if "DeadKernelError" in str(error):
                    raise _Stopped(
                        "its kernel died: out of memory, or the code ended its own process"
                    ) from None
                raise _Stopped(str(error)) from None
        executed = nbformat.read(root / "autograded" / NEUTRAL / week / f"{week}.ipynb", 4)
        with Gradebook(database_url(root)) as gradebook:
            entry = gradebook.find_submission_notebook(week, week, NEUTRAL)
            scores = {grade.name: grade.auto_score for grade in entry.grades}
            rows, comments = score(task.plan, executed, scores, notes, task.folder)
            given = {row.grade_id: row.points for row in rows}
            for grade in entry.grades:
                if grade.name in given:
                    grade.auto_score = given[grade.name]
            for comment in entry.comments:
                comment.auto_comment = comments.get(comment.name) or comment.auto_comment
                if comment.auto_comment:
                    comments[comment.name] = comment.auto_comment
            gradebook.db.commit()
        run_converter(GenerateFeedback, config, week, NEUTRAL)
    return rows, comments


@contextmanager
def time_limit(seconds: float) -> Iterator[threading.Event]:
    """End this process's children, the kernel among them, after so many seconds."""
    import psutil

    rang = threading.Event()

    def ring() -> None:
        rang.set()
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()

    timer = threading.Timer(seconds, ring)
    timer.daemon = True
    timer.start()
    try:
        yield rang
    finally:
        timer.cancel()


def score(
    plan: Plan, executed, scores: dict, notes: dict[str, str], folder: Path | None
) -> tuple[list[Row], dict[str, str]]:
    """The rows of an executed notebook, and comments for its answer cells."""
    cells = {
        cell.metadata.nbgrader.grade_id: cell
        for cell in executed.cells
        if cell.metadata.get("nbgrader", {}).get("grade_id")
    }
    comments = {grade_id: note[0].upper() + note[1:] + "." for grade_id, note in notes.items()}
    unanswered = {c.get("id") for c in executed.cells if c.source.strip() == UNWRITTEN}
    taken = {}
    for name, exercise in _exercises(plan.week, folder).items():
        code = cells[name].source
        others = [
            c.source for c in executed.cells if c.cell_type == "code" and c is not cells[name]
        ]
        if said := imported_answer(code, exercise, "\n".join(_parsable(others))):
            taken[name] = comments[name] = said
    rows = []
    for item in plan.items:
        points, cell = scores.get(item.grade_id), cells[item.grade_id]
        if item.by_hand:
            left = unanswered & {f"{item.grade_id}-answer"}
            points, status = None, "to mark"
            reason = "the answer cell was left as it was" if left else ""
        elif item.exercise in taken:
            points, status, reason = 0.0, "failed", taken[item.exercise]
        elif points == item.max_points:
            status, reason = "passed", ""
        else:
            points, status = points or 0.0, "failed"
            reason = why(item, cell, cells[item.exercise])
        said = [notes[i] for i in (item.exercise, item.grade_id) if i in notes]
        reason = "; ".join(filter(None, [*said, reason]))[:LONGEST_REASON]
        rows.append(
            Row(item.grade_id, item.exercise, item.check, points, item.max_points, status, reason)
        )
    return rows, comments


@cache
def _exercises(week: str, folder: Path | None) -> dict:
    return read_week(week, folder).exercises


def _parsable(sources: list[str]) -> list[str]:
    import ast

    kept = []
    for source in sources:
        with suppress(SyntaxError, ValueError, RecursionError):
            ast.parse(source)
            kept.append(source)
    return kept


def why(item: Item, check, answer) -> str:
    """The first line of a check's error, or the answer cell's own error when that is the cause."""
    error = _error(check)
    if error is None:
        return "the check did not earn its points"
    if error.ename == "NameError" and (cause := _error(answer)) is not None:
        return f"the answer cell stopped with {_first_line(cause)}"
    if error.ename == "AssertionError" and not error.evalue.strip():
        return f"it must hold: {item.title}"
    return _first_line(error)


def _error(cell):
    return next((o for o in cell.get("outputs", []) if o.output_type == "error"), None)


def _first_line(error) -> str:
    from nbconvert.filters import strip_ansi

    lines = strip_ansi(error.evalue).strip().splitlines()
    if error.ename == "NotImplementedError":
        return "not answered yet (NotImplementedError)"
    if error.ename == "CellTimeoutError":
        return "it ran longer than one cell may"
    if error.ename == "AssertionError" and lines:
        return lines[0]
    return f"{error.ename}: {lines[0]}" if lines else error.ename
