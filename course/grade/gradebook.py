"""nbgrader's gradebook and grades.csv, made from the journal and from what people gave by hand.

OUT is an nbgrader course directory (`source/`, `release/`, `autograded/`, `gradebook.db`), so that
formgrader and nbgrader's own commands work in it. It may be the instructor's classroom. Submissions
are not copied into `submitted/`: formgrader needs them only to count them on its first page, and to
run them, which is what this grader exists to avoid.

A gradebook is written in place and in one transaction, because formgrader keeps it open: a file
put in its place would leave formgrader writing marks into one that nobody reads. It is reached
through nbgrader's models only; its own API commits 31 times for a submission.

What a person gave in formgrader, scores, extra credit and comments, is never written over. When
the notebook or the check that it was given for has changed since, the cell is up for another look.
"""

import csv
import io
import json
import os
import re
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import NamedTuple

from course.classroom import (
    CONFIG_NAME,
    init,
    nbgrader_at,
    release,
    solved_bytes,
    source_path,
    write_atomically,
)
from course.grade.journal import STATE, Key
from course.grade.records import COLUMNS, Result, Row
from course.source import CourseError, week_names

NAME = "gradebook.db"
PATIENCE = 10.0  # seconds to wait for another program that is writing into the gradebook
BATCH = 100  # submissions that are in memory at a time

# OUT as a course directory


def open_classroom(to: Path, weeks: Iterable[str], folder: Path | None = None) -> None:
    """Make OUT a course directory that has these weeks, as the course has them at present.

    Where this function made OUT, a week whose tests changed is brought up to date. An instructor's
    classroom is left as it is, since its `release/` is what students get.
    Raises: CourseError, when a classroom has a week in another version.
    """
    with _trouble(to):
        if not (to / NAME).exists():
            _make(to, weeks, folder)
        for week in weeks:
            source = source_path(to, week)
            if source.exists() and source.read_bytes() != solved_bytes(week, folder):
                _require_ours(to, week)
            try:
                release(to, week, folder)
            except CourseError as error:
                # nbgrader refuses a week with other checks once somebody has handed it in.
                if "other checks" not in str(error):
                    raise
                _renew(to, weeks, folder)


def _require_ours(to: Path, week: str) -> None:
    if not _is_ours(to):
        raise CourseError(
            f"{source_path(to, week)} is not the course's present version of {week}; bring it up "
            f"to date with `python -m course release {week} --class {to}`, or grade into another "
            "folder."
        )


def _is_ours(to: Path) -> bool:
    return (to / STATE / "classroom").exists()


def _make(to: Path, weeks: Iterable[str], folder: Path | None) -> None:
    """A new gradebook, made aside and moved in whole: nbgrader takes seconds to make one."""
    state = to / STATE
    state.mkdir(parents=True, exist_ok=True)
    if not (to / CONFIG_NAME).exists():
        write_atomically(state / "classroom", b"The grader made this course directory.\n")
    with tempfile.TemporaryDirectory(prefix="work-", dir=state) as scratch:
        room = _scratch_room(Path(scratch), to, weeks, folder)
        for path in sorted(room.rglob("*")):
            place = to / path.relative_to(room)
            if path.is_dir():
                place.mkdir(exist_ok=True)
            elif path.name != NAME and not place.exists():
                write_atomically(place, path.read_bytes())
        os.replace(room / NAME, to / NAME)


def _scratch_room(scratch: Path, to: Path, weeks: Iterable[str], folder: Path | None) -> Path:
    room = scratch / "room"
    room.mkdir()
    if (to / CONFIG_NAME).exists():
        shutil.copyfile(to / CONFIG_NAME, room / CONFIG_NAME)
    init(room)
    for week in weeks:
        release(room, week, folder)
    return room


def _renew(to: Path, weeks: Iterable[str], folder: Path | None) -> None:
    """Give OUT an empty gradebook with the weeks as they are; `write_gradebook` fills it again."""
    known = set(week_names(folder))
    weeks = {path.name for path in (to / "source").iterdir()} & known | set(weeks)
    with _session(to) as db:
        memory = Memory.read(to)
        memory.look(db)
        memory.write(to)
    with tempfile.TemporaryDirectory(prefix="work-", dir=to / STATE) as scratch:
        room = _scratch_room(Path(scratch), to, sorted(weeks), folder)
        _take_over(room / NAME, to / NAME)
        # The sources come last: while they are the old ones, a killed run begins here again.
        for kind in ("release", "source"):
            for path in (room / kind).rglob("*.ipynb"):
                write_atomically(to / path.relative_to(room), path.read_bytes())


def _take_over(new: Path, old: Path) -> None:
    """Put one gradebook's content into the file of another, where formgrader goes on reading it."""

    def give_up(status: int, *_) -> None:
        if status in _IN_USE:  # Python's backup would try again without end
            raise _in_use(old)

    patient = sqlite3.connect(old, timeout=PATIENCE)
    with closing(sqlite3.connect(new)) as source, closing(patient) as target:
        source.backup(target, progress=give_up)


def _is_whole(path: Path) -> bool:
    with closing(sqlite3.connect(path, timeout=PATIENCE)) as gradebook:
        try:
            return gradebook.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
        except sqlite3.DatabaseError as error:
            if _code(error) in _DAMAGED:
                return False
            raise


def keep_notebook(to: Path, result: Result, content: bytes) -> None:
    """Put a graded notebook where formgrader looks for it; do so before the journal has its line.

    For a submission that could not be run, `content` is empty: formgrader then shows the released
    notebook with the reason above it, so that a person can still give points.
    """
    if result.outcome == "refused":
        return
    place = notebook_path(to, result)
    if not content:
        released = to / "release" / result.week / f"{result.week}.ipynb"
        if not released.is_file():
            shutil.rmtree(place.parent, ignore_errors=True)
            return
        content = _stand_in(released, result)
    with _trouble(to):
        write_atomically(place, content)
        # A notebook cannot be made again from the journal: it must survive what the journal does.
        with open(place, "rb") as file:
            os.fsync(file.fileno())


def notebook_path(to: Path, result: Result) -> Path:
    """OUT/autograded/STUDENT/WEEK/WEEK.ipynb."""
    for name in result.key:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"{name!r} is no name for a folder")
    return to / "autograded" / result.student / result.week / f"{result.week}.ipynb"


def _stand_in(released: Path, result: Result) -> bytes:
    import nbformat
    from nbformat.v4 import new_code_cell

    notebook = nbformat.read(released, as_version=4)
    reason = " ".join(result.rows[0].reason.split())
    # A comment in a code cell: whatever a student's file name holds, it is shown and not run.
    said = f"# {result.rows[0].status}: {reason}\n# Below is the notebook as it was released."
    notebook.cells.insert(0, new_code_cell(said, id="not-graded"))
    return nbformat.writes(notebook).encode("utf-8", "replace")


# Writing grades


def write_gradebook(to: Path, results: Mapping[Key, Result]) -> list[dict]:
    """Put results into the gradebook; return the rows of grades.csv, with what people gave.

    Only what differs is written. Weeks that the gradebook does not have get rows, no more. It
    makes no difference whether one call gets all results or several get a part each.
    Raises: CourseError, when the gradebook cannot be written. It is then as it was before.
    """
    memory, rows = Memory.read(to), {}
    with _trouble(to), _session(to) as db:
        known = _weeks(db)
        by_week: dict[str, list[str]] = {}
        for student, week in sorted(results):
            by_week.setdefault(week, []).append(student)
        for week, students in by_week.items():
            for batch in _batches(students):
                found = {student: results[student, week] for student in batch}
                marked = {}
                if cells := known.get(week):
                    entered = {s: r for s, r in found.items() if r.outcome != "refused"}
                    marked = _enter_batch(db, cells, entered, memory, to)
                for student, result in found.items():
                    rows[result.key] = [
                        _csv_row(result, marked.get((student, row.grade_id), row))
                        for row in result.rows
                    ]
        db.commit()
        memory.look(db)
        memory.write(to)
    return [row for key in sorted(rows) for row in rows[key]]


def rebuild(
    to: Path, results: Mapping[Key, Result], weeks: Iterable[str], folder: Path | None = None
) -> list[dict]:
    """Make the gradebook anew from the journal's results; return the rows of grades.csv.

    What people gave by hand is carried over from the old gradebook or, where that is missing or
    damaged, from what the last run saw in it. The gradebook of an instructor's classroom may hold
    more than the journal knows: as long as it is whole, only the journal's results are put right.
    """
    path = to / NAME
    with _trouble(to):
        if path.exists() and not _is_whole(path):
            os.replace(path, path.with_name(f"{NAME}.damaged"))
        has_grades = path.exists()
        open_classroom(to, weeks, folder)
        if has_grades and _is_ours(to):
            _renew(to, weeks, folder)
    return write_gradebook(to, results)


class Cells(NamedTuple):
    """Where a week is in the gradebook, and its cells by name."""

    week: str
    assignment: str
    notebook: str
    graded: dict[str, str]
    commented: dict[str, str]


def _weeks(db) -> dict[str, Cells]:
    from nbgrader.api import Assignment, GradeCell, Notebook, SolutionCell, TaskCell
    from sqlalchemy import select

    weeks = {}
    query = select(Assignment.name, Assignment.id, Notebook.id).join(
        Notebook, Notebook.assignment_id == Assignment.id
    )
    for week, assignment, notebook in db.execute(query.where(Notebook.name == Assignment.name)):
        graded, commented = {}, {}
        for kind, into in (
            (GradeCell, [graded]),
            (SolutionCell, [commented]),
            (TaskCell, [graded, commented]),
        ):
            cells = db.execute(select(kind.name, kind.id).where(kind.notebook_id == notebook))
            for name, cell in cells:
                for place in into:
                    place[name] = cell
        weeks[week] = Cells(week, assignment, notebook, graded, commented)
    return weeks


def _enter_batch(
    db, cells: Cells, results: dict[str, Result], memory: "Memory", to: Path
) -> dict[tuple[str, str], Row]:
    """Enter some results of one week; return the rows that a person has marked."""
    from nbgrader.api import Comment, Grade
    from sqlalchemy import select

    notebooks = _submitted_notebooks(db, cells, results, to)
    grades, comments = Grade.__table__, Comment.__table__
    ids = list(notebooks.values())
    old_grades = {
        (entry.notebook_id, entry.cell_id): entry
        for entry in db.execute(select(grades).where(grades.c.notebook_id.in_(ids)))
    }
    old_comments = {
        (entry.notebook_id, entry.cell_id): entry
        for entry in db.execute(select(comments).where(comments.c.notebook_id.in_(ids)))
    }
    write = _Writes(db)
    marked: dict[tuple[str, str], Row] = {}
    for student, result in results.items():
        notebook, rows = notebooks[student], {row.grade_id: row for row in result.rows}
        before = memory.entered.get((student, cells.week))
        for name, cell in cells.graded.items():
            old = old_grades.get((notebook, cell))
            if (row := rows.get(name)) is None and old is not None:
                continue
            given = old or memory.scores.get((student, cells.week, name))
            value = _grade(row, given, _needs_look(row, result, before, given))
            write.row(grades, old, {"notebook_id": notebook, "cell_id": cell}, value)
            if row is not None and _is_marked(value):
                marked[student, name] = _marked(row, value)
        for name, cell in cells.commented.items():
            old = old_comments.get((notebook, cell))
            place = student, cells.week, name
            manual = old.manual_comment if old else memory.comments.get(place)
            value = {"auto_comment": _comment(name, result), "manual_comment": manual}
            write.row(comments, old, {"notebook_id": notebook, "cell_id": cell}, value)
        memory.entered[student, cells.week] = (result.submission_digest, result.tests_digest)
    write.flush()
    return marked


def _submitted_notebooks(db, cells: Cells, results: dict[str, Result], to: Path) -> dict[str, str]:
    """The id of each student's submitted notebook; what is missing is made."""
    from nbgrader.api import Student, SubmittedAssignment, SubmittedNotebook, new_uuid
    from sqlalchemy import bindparam, insert, select, update

    handed_in, notebook = SubmittedAssignment.__table__, SubmittedNotebook.__table__
    there = set(db.scalars(select(Student.id).where(Student.id.in_(results))))
    if new := [{"id": student} for student in results if student not in there]:
        db.execute(insert(Student.__table__), new)
    query = select(handed_in.c.student_id, handed_in.c.id, handed_in.c.timestamp)
    query = query.where(
        handed_in.c.assignment_id == cells.assignment, handed_in.c.student_id.in_(results)
    )
    old = {student: (made, when) for student, made, when in db.execute(query)}
    new, moved_in_time = [], []
    for student in results:
        when = _handed_in(to, student, cells.week)
        if student not in old:
            made = {"id": new_uuid(), "assignment_id": cells.assignment, "student_id": student}
            new.append(made | {"timestamp": when})
        elif old[student][1] != when:
            moved_in_time.append({"which": old[student][0], "when": when})
    if new:
        db.execute(insert(handed_in), new)
    if moved_in_time:
        changes = update(handed_in).where(handed_in.c.id == bindparam("which"))
        db.connection().execute(changes.values(timestamp=bindparam("when")), moved_in_time)
    submissions = {student: made for student, (made, _) in old.items()}
    submissions |= {made["student_id"]: made["id"] for made in new}
    query = select(notebook.c.assignment_id, notebook.c.id).where(
        notebook.c.notebook_id == cells.notebook,
        notebook.c.assignment_id.in_(list(submissions.values())),
    )
    found = dict(list(db.execute(query)))
    missing = [
        {"id": new_uuid(), "assignment_id": made, "notebook_id": cells.notebook}
        for made in submissions.values()
        if made not in found
    ]
    if missing:
        db.execute(insert(notebook), missing)
    found |= {entry["assignment_id"]: entry["id"] for entry in missing}
    return {student: found[made] for student, made in submissions.items()}


def _handed_in(to: Path, student: str, week: str):
    """When a notebook was handed in, as nbgrader's exchange wrote it down.

    formgrader takes a submission for graded only when the gradebook has the same time.
    """
    from nbgrader.utils import parse_utc

    place = to / "submitted" / student / week / "timestamp.txt"
    with suppress(OSError, ValueError, OverflowError):
        handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, encoding="utf-8") as file:
            if stat.S_ISREG(os.fstat(handle).st_mode):
                return parse_utc(file.read(100).strip())
    return None


class _Writes:
    """Collects what is to be inserted or updated, and leaves out what is there already."""

    def __init__(self, db) -> None:
        self.db = db
        self.new: dict = {}
        self.changed: dict = {}

    def row(self, table, old, place: dict, value: dict) -> None:
        if old is None:
            self.new.setdefault(table, []).append(place | value)
        elif any(getattr(old, name) != given for name, given in value.items()):
            # Only what the grader decides: a person may be typing a mark at this moment.
            ours = {f"new_{name}": value[name] for name in value if name in _OURS}
            self.changed.setdefault(table, []).append({"which": old.id} | ours)

    def flush(self) -> None:
        from nbgrader.api import new_uuid
        from sqlalchemy import bindparam, insert, update

        for table, rows in self.new.items():
            self.db.execute(insert(table), [{"id": new_uuid()} | row for row in rows])
        for table, rows in self.changed.items():
            values = {name: bindparam(f"new_{name}") for name in _OURS & set(table.c.keys())}
            change = update(table).where(table.c.id == bindparam("which")).values(values)
            self.db.connection().execute(change, rows)


_OURS = {"auto_score", "needs_manual_grade", "auto_comment"}


def _grade(row: Row | None, given, another_look: bool) -> dict:
    """The columns of a grade. Without a row (a check of another version) it waits for a person."""
    manual = given.manual_score if given else None
    points = row.points if row else None
    if manual is None:
        needs = points is None
    else:
        needs = given.needs_manual_grade or another_look
    return {
        "auto_score": points,
        "manual_score": manual,
        "extra_credit": given.extra_credit if given else None,
        "needs_manual_grade": needs,
    }


def _needs_look(row: Row | None, result: Result, before, given) -> bool:
    """Whether what a person marked is another thing than it was then."""
    if row is None or given is None:
        return False
    if before is None:
        return True
    by_hand = row.points is None
    return before[0] != result.submission_digest or (
        not by_hand and before[1] != result.tests_digest
    )


def _is_marked(grade: dict) -> bool:
    return grade["manual_score"] is not None or bool(grade["extra_credit"])


def _marked(row: Row, grade: dict) -> Row:
    manual, extra = grade["manual_score"], grade["extra_credit"] or 0.0
    if manual is None:
        manual = row.points or 0.0
    look = grade["manual_score"] is not None and grade["needs_manual_grade"]
    reason = "marked before it changed" if look else ""
    return replace(row, points=manual + extra, status="marked", reason=reason)


def _comment(cell: str, result: Result) -> str | None:
    """What formgrader and nbgrader's own feedback say about an answer: what a student may read.

    nbgrader shows comments as Markdown, in which HTML would run: a student's words are escaped.
    """
    rows = [row for row in result.rows if row.exercise == cell]
    first = result.rows and result.rows[0].exercise == cell
    said = [result.notes.get("", "")] if first else []
    said += [result.notes.get(name, "") for name in (cell, *(row.grade_id for row in rows))]
    said += [row.said for row in rows if row.points is not None]
    sentences = dict.fromkeys(escape(text.strip(), quote=False) for text in said if text.strip())
    return "\n\n".join(text[0].upper() + text[1:] for text in sentences) or None


# What people gave, kept beside the gradebook: a lost gradebook is made again with it


class Score(NamedTuple):
    manual_score: float | None
    extra_credit: float | None
    needs_manual_grade: bool


Place = tuple[str, str, str]  # student, week, cell


@dataclass
class Memory:
    """What was entered when, and what people had given by hand when the last run looked."""

    entered: dict[Key, tuple[str, str]] = field(default_factory=dict)  # submission's and tests'
    scores: dict[Place, Score] = field(default_factory=dict)
    comments: dict[Place, str] = field(default_factory=dict)

    @staticmethod
    def read(to: Path) -> "Memory":
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(_memory_path(to).read_text("ascii"))
            return Memory(
                {(s, w): (submission, tests) for s, w, submission, tests in record["entered"]},
                {(s, w, cell): Score(*given) for s, w, cell, *given in record["scores"]},
                {(s, w, cell): text for s, w, cell, text in record["comments"]},
            )
        return Memory()

    def write(self, to: Path) -> None:
        record = {
            "entered": [[*key, *digests] for key, digests in sorted(self.entered.items())],
            "scores": [[*place, *given] for place, given in sorted(self.scores.items())],
            "comments": [[*place, text] for place, text in sorted(self.comments.items())],
        }
        write_atomically(_memory_path(to), json.dumps(record, indent=1).encode("ascii"))

    def look(self, db) -> None:
        """Note what is in the gradebook. What it does not have yet, for it is new, stays noted."""
        from nbgrader.api import Assignment, Comment, Grade, SubmittedAssignment
        from sqlalchemy import or_, select

        query = select(SubmittedAssignment.student_id, Assignment.name)
        query = query.join(Assignment, SubmittedAssignment.assignment_id == Assignment.id)
        there = {(student, week) for student, week in db.execute(query)}
        scores = _with_names(
            Grade, Grade.manual_score, Grade.extra_credit, Grade.needs_manual_grade
        )
        scores = scores.where(or_(Grade.manual_score.is_not(None), Grade.extra_credit.is_not(None)))
        comments = _with_names(Comment, Comment.manual_comment)
        comments = comments.where(Comment.manual_comment.is_not(None))
        self.scores = {place: s for place, s in self.scores.items() if place[:2] not in there}
        self.comments = {place: c for place, c in self.comments.items() if place[:2] not in there}
        self.scores |= {(s, w, cell): Score(*given) for s, w, cell, *given in db.execute(scores)}
        self.comments |= {(s, w, cell): text for s, w, cell, text in db.execute(comments)}


def written_comments(to: Path) -> dict[Key, dict[str, str]]:
    """What people had written in formgrader when the last run looked, by submission and cell."""
    found: dict[Key, dict[str, str]] = {}
    for (student, week, cell), text in Memory.read(to).comments.items():
        if text.strip():  # formgrader keeps an emptied comment as one without words
            found.setdefault((student, week), {})[cell] = text
    return found


def _memory_path(to: Path) -> Path:
    return to / STATE / "given.json"


def _with_names(kind, *columns):
    """Select grades or comments as (student, week, cell, *columns)."""
    from nbgrader.api import Assignment, BaseCell, SubmittedAssignment, SubmittedNotebook
    from sqlalchemy import select

    return (
        select(SubmittedAssignment.student_id, Assignment.name, BaseCell.name, *columns)
        .join_from(kind, SubmittedNotebook, kind.notebook_id == SubmittedNotebook.id)
        .join(SubmittedAssignment, SubmittedNotebook.assignment_id == SubmittedAssignment.id)
        .join(Assignment, SubmittedAssignment.assignment_id == Assignment.id)
        .join(BaseCell, kind.cell_id == BaseCell.id)
    )


# The database, and who else has it open

_IN_USE = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
_SAFE = "every grade is safe in the journal"


@contextmanager
def _session(to: Path) -> Iterator:
    """A session over nbgrader's models that has the gradebook to itself until it ends."""
    from nbgrader.api import Gradebook
    from sqlalchemy import URL

    url = URL.create(
        "sqlite", database=str((to / NAME).resolve()), query={"timeout": str(PATIENCE)}
    )
    with nbgrader_at(to) as config, Gradebook(url, config.CourseDirectory.course_id) as gradebook:
        gradebook.db.connection().exec_driver_sql("BEGIN IMMEDIATE")
        yield gradebook.db


@contextmanager
def _trouble(to: Path) -> Iterator[None]:
    """One sentence for a gradebook that is in use or damaged, and for a full disk."""
    from sqlalchemy.exc import DBAPIError

    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        code = _code(cause)
        if code in _IN_USE:
            raise _in_use(to / NAME) from error
        if code in _DAMAGED:
            raise CourseError(
                f"{to / NAME} is damaged ({cause}); {_SAFE}: move that file away, and the same "
                "command makes it anew, with the marks given by hand that the last run saw."
            ) from error
        raise CourseError(
            f"{to / NAME} could not be written ({cause}); {_SAFE}: make room or see to it that it "
            "can be written, and the same command goes on."
        ) from error
    except OSError as error:
        raise CourseError(
            f"Writing into {to} stopped ({error.strerror or error}); {_SAFE}: make room or see to "
            "it that it can be written, and the same command goes on."
        ) from error


def _in_use(path: Path) -> CourseError:
    return CourseError(
        f"{path} is in use by another program (formgrader?); {_SAFE}: close that program, and the "
        "same command goes on."
    )


def _code(error: BaseException | None) -> int:
    """SQLite's primary result code: the lower byte of the extended one."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def _batches(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), BATCH):
        yield names[start : start + BATCH]


# grades.csv


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


# What a spreadsheet takes for a formula at the beginning of a cell, also in full-width letters;
# where ; or a tab separates columns, a cell begins in the middle of ours.
_FORMULA = r"(?='*[=+\-@＝＋－＠\t\r])"
_CELL_BEGINS = r"(^|[;\t\r\n])"


def as_csv(rows: Iterable[dict]) -> bytes:
    """grades.csv. Text that a spreadsheet would run begins with an apostrophe: see `read_csv`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _as_text(name, value) for name, value in row.items()})
    return text.getvalue().encode("utf-8", "replace")


def read_csv(content: bytes) -> list[dict]:
    """The rows that `as_csv` wrote, as they were."""
    rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
    return [
        {name: re.sub(f"{_CELL_BEGINS}'{_FORMULA}", r"\1", value) for name, value in row.items()}
        for row in rows
    ]


def _as_text(column: str, value: str) -> str:
    if column in ("points", "max_points"):
        return value
    return re.sub(f"{_CELL_BEGINS}{_FORMULA}", r"\1'", value.replace("\r", " "))
