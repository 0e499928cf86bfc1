"""What the parts of the grader hand to each other: plain values, each with one meaning."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

# The statuses of a row, as the first page of `course/grade/README.md` explains them.
STATUSES = ("passed", "failed", "to mark", "marked", "stopped", "damaged", "refused")
COLUMNS = ("student", "week", "exercise", "check", "points", "max_points", "status", "reason")


@dataclass(frozen=True)
class Limits:
    """What one submission may use. `seconds` is for its cells, and again for each exercise."""

    seconds: float = 60.0
    memory_mib: int = 2048
    processes: int = 64
    disk_mib: int = 256
    output_bytes: int = 2**20


@dataclass(frozen=True)
class Submission:
    """One notebook that somebody handed in, not yet read. With a problem there is nothing to run.

    `place` is the file, or the zip file that holds it as `member`. `shown` is how a message names
    it. `status` is "damaged" or "refused" when there is a `problem`.
    """

    student: str
    week: str
    place: Path | None = None
    member: str = ""
    shown: str = ""
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
    """What one item got; `points` is None while a written answer waits for a person.

    `part` says which part of a check failed: "visible", "hidden" or "" (neither was reached).
    `reason` is one line for the instructor; `said` is what the student reads, up to a few lines.
    """

    grade_id: str
    exercise: str
    check: str
    points: float | None
    max_points: float
    status: str
    reason: str = ""
    part: str = ""
    said: str = ""
    recognised: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """What one submission got: one line of the journal.

    `notes` says, by grade id ("" for the whole notebook), what was mended in a damaged notebook.
    `seconds` holds durations by phase: "intake", "cells", "checks", "total". `tier` is the
    isolation it ran in, `versions` those of python, torch, mmlearn and the grader.
    """

    student: str
    week: str
    submission_digest: str
    tests_digest: str
    rows: tuple[Row, ...]
    notes: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: float = 0.0
    tier: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.student, self.week

    @property
    def outcome(self) -> str:
        """graded, or the status that all rows share because there was nothing to grade."""
        odd = {row.status for row in self.rows} & {"damaged", "refused"}
        return odd.pop() if odd else "graded"

    @property
    def points(self) -> float:
        """What the checks gave; written answers that wait are not counted."""
        return sum(row.points or 0.0 for row in self.rows)

    def as_json(self) -> dict:
        """Plain values, from which `from_json` makes an equal result."""
        return asdict(self)

    @staticmethod
    def from_json(record: dict) -> "Result":
        """Raises: TypeError or KeyError, when the record is of another shape."""
        values = dict(record)
        rows = tuple(
            Row(**(row | {"recognised": tuple(row.get("recognised", ()))}))
            for row in values.pop("rows")
        )
        return Result(rows=rows, **values)
