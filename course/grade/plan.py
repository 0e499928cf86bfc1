"""What a run knows without running anything: the plan of a week, the settings of its graders.

The main process needs these and never torch, so nothing here imports what does.
"""

import hashlib
import hmac
import json
import platform
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

from course.grade.records import Item, Limits, Result, Row, Submission
from course.source import Week

FORMAT = "1"  # raise it when the same submission and tests may get other points or words


@dataclass(frozen=True)
class Plan:
    """What a week asks for: its points in order, and a digest of everything that decides them."""

    week: str
    title: str
    items: tuple[Item, ...]
    digest: str

    @staticmethod
    def of(week: Week) -> "Plan":
        from course.classroom import solved_bytes

        items = [
            Item(check.grade_id, exercise.name, check.aspect, float(check.points), check.title)
            for exercise in week.exercises.values()
            for check in exercise.checks
        ]
        items += [
            Item(w.name, w.name, "written", float(w.points), by_hand=True) for w in week.written
        ]
        seen = hashlib.sha256(solved_bytes(week.name, week.path.parent))
        seen.update(json.dumps({e.name: e.forbids for e in week.exercises.values()}).encode())
        says = [[w.exercise, w.name, w.says] for e in week.exercises.values() for w in e.wrongs]
        seen.update(json.dumps(says).encode())
        return Plan(week.name, week.title, tuple(items), seen.hexdigest())


@dataclass(frozen=True)
class Settings:
    """What a Grader needs to know; it can be sent to another process that is trusted."""

    secret: bytes = field(repr=False)
    folder: Path | None = None
    limits: Limits = field(default_factory=Limits)
    isolation: str | None = None
    preload: tuple[str, ...] = ()

    def tests_digest(self, plan_digest: str) -> str:
        """Changes when the week's tests, the secret or the grader's format change."""
        seen = [FORMAT, plan_digest, hashlib.sha256(self.secret).hexdigest()]
        return hashlib.sha256("/".join(seen).encode()).hexdigest()


# Results without a run


def nothing(
    student: str,
    week: str,
    submission_digest: str,
    tests_digest: str,
    items: tuple[Item, ...],
    status: str,
    reason: str,
) -> Result:
    """No points for anything, with the reason in every row."""
    rows = tuple(
        Row(i.grade_id, i.exercise, i.check, 0.0, i.max_points, status, reason, said=reason)
        for i in items or (Item("", "", "", 0.0),)
    )
    return Result(student, week, submission_digest, tests_digest, rows, versions=versions())


def stopped(submission: Submission, content: bytes, tests_digest: str, plan, reason: str) -> Result:
    """The result of a submission that ended or blocked even the process that graded it."""
    digest = hashlib.sha256(content).hexdigest()
    return nothing(
        submission.student,
        submission.week,
        digest,
        tests_digest,
        plan.items,
        "stopped",
        reason,
    )


@cache
def versions() -> dict[str, str]:
    """What the points may depend on."""
    return {
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "mmlearn": metadata.version("mmlearn-course"),
        "grader": FORMAT,
    }


def fingerprint(secret: bytes) -> str:
    """A few letters that tell two secrets apart and give neither away."""
    return hmac.digest(secret, b"fingerprint", "sha256").hex()[:8]
