"""The checks of a week as the grader runs them: here, while the answers run somewhere else.

A check is the same text as in the notebook. Its imports and asserts run in this process; the names
that the student defined are proxies (`remote.py`), so `attention(q, k, v)[0].shape` is a call to
another process whose result is a tensor here. No text of a check ever leaves this process.

Three things differ from running the cell in a notebook, and none changes what it says:

- Seeds in hidden regions are salted with the course's secret. `torch.manual_seed(1)` draws the same
  numbers for every student and on every regrade, and nobody knows them before.
- What the student's code returned may be of any size, so a check has a limit of memory.
- An answer that is mmlearn's own function fails before the hidden region, as the build has it.
"""

import ast
import contextlib
import io
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import NamedTuple

from course.grade.inside.wire import Lost
from course.grade.plan import Plan
from course.grade.records import Item, Row
from course.grade.remote import is_from_student
from course.names import names_used
from course.seeds import NAME as SALTED
from course.seeds import Salt, salted
from course.source import Check, Exercise, Week, read_week

CHECK_MEMORY = 2**30  # bytes that a check may take beyond what this process holds already
LONGEST_REASON = 300  # characters of a reason in grades.csv
LONGEST_SAID = 1500  # characters that a student reads about one check


class Verdict(NamedTuple):
    """What one check said. `lost` is set when the student's process cannot be spoken to again."""

    passed: bool
    reason: str = ""
    part: str = ""
    said: str = ""
    recognised: tuple[str, ...] = ()
    lost: Lost | None = None


@dataclass(frozen=True)
class Program:
    """One check, compiled."""

    week: str
    exercise: Exercise
    item: Item
    names: frozenset[str]  # of the answer, as far as the check uses them
    visible: CodeType
    hidden: CodeType | None

    @staticmethod
    def of(week: Week, exercise: Exercise, check: Check, item: Item) -> "Program":
        file = f"<check {week.name}/{check.grade_id}>"
        visible = compile(check.visible, file, "exec")
        hidden = None
        if check.hidden:
            hidden = compile(salted(ast.parse(check.hidden)), file, "exec")
        names = frozenset(names_used(check.cell.text) & exercise.names)
        return Program(week.name, exercise, item, names, visible, hidden)

    def run(self, answers: Mapping[str, object], salt: Salt) -> Verdict:
        """Run the check on the values that a student's names have. Never raises for their sake."""
        from mmlearn.feedback import own_work

        namespace = {"__name__": "check", **answers, SALTED: salt.seed}
        part = "visible"
        with _quiet(), _limited_memory():
            try:
                salt.start()
                exec(self.visible, namespace)
                part = "hidden"
                own_work(*answers.values())
                if self.hidden is not None:
                    salt.start()
                    exec(self.hidden, namespace)
            except Lost as lost:
                return Verdict(False, lost.sentence, part, lost.sentence, lost=lost)
            except Exception as error:
                return self._verdict(error, part)
        return Verdict(True)

    def _verdict(self, error: Exception, part: str) -> Verdict:
        text = str(error).strip()
        first = text.split("\n")[0]
        kind = type(error).__name__
        recognised = tuple(w.name for w in self.exercise.wrongs if w.says in text)
        if is_from_student(error):
            if isinstance(error, NotImplementedError):
                reason = "not answered yet (NotImplementedError)"
            elif kind == "CannotTravel":
                reason = f"what the answer returned cannot be checked: {first}"
            else:
                reason = f"the answer raised {kind}: {first}" if first else f"it raised {kind}"
            # An error of a student's own can carry hidden inputs: only the instructor reads it.
            return _verdict(reason, part, reason if part == "visible" else "", recognised)
        if isinstance(error, NameError) and getattr(error, "name", None) in self.exercise.names:
            return _verdict(f"{error.name} is not defined", part, f"{error.name} is not defined")
        if isinstance(error, MemoryError) or "can't allocate memory" in text:
            reason = "what the answer returned is too large to be checked"
            return _verdict(reason, part, reason)
        if isinstance(error, AssertionError):
            reason = first or f"it must hold: {self.item.title}"
            # Of a hidden region the student learns what it is about, not what it asks.
            own = "comes from mmlearn" in text or part == "visible"
            return _verdict(reason, part, text if own else "", recognised)
        reason = f"the check could not use what the answer returned ({kind}: {first})"
        return _verdict(reason, part, reason if part == "visible" else "")


def _verdict(reason: str, part: str, said: str = "", recognised: tuple[str, ...] = ()) -> Verdict:
    return Verdict(False, reason[:LONGEST_REASON], part, said[:LONGEST_SAID], recognised)


@dataclass(frozen=True)
class Suite:
    """A week, ready to grade with: its plan, its released notebook, its checks by exercise."""

    week: Week
    plan: Plan
    released: object  # NotebookNode
    programs: dict[str, tuple[Program, ...]]

    @staticmethod
    def of(name: str, folder: Path | None = None) -> "Suite":
        from course.build import student_notebook

        week = read_week(name, folder)
        plan = Plan.of(week)
        items = {item.grade_id: item for item in plan.items}
        programs = {
            exercise.name: tuple(
                Program.of(week, exercise, check, items[check.grade_id])
                for check in exercise.checks
            )
            for exercise in week.exercises.values()
        }
        return Suite(week, plan, student_notebook(week), programs)


def row_of(program: Program, verdict: Verdict, seconds: float = 0.0) -> Row:
    """The row of a check that was run, or that could not be."""
    item = program.item
    return Row(
        item.grade_id,
        item.exercise,
        item.check,
        item.max_points if verdict.passed else 0.0,
        item.max_points,
        "passed" if verdict.passed else "failed",
        verdict.reason,
        verdict.part,
        verdict.said,
        verdict.recognised,
        round(seconds, 4),
    )


# What a check may not do to the grader


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    noise = io.StringIO()
    with (
        contextlib.redirect_stdout(noise),
        contextlib.redirect_stderr(noise),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """A student's value can make a check ask for terabytes: that fails, and the grader does not.

    Two returned columns of 50,000 rows, subtracted from each other, are 10 GB by broadcasting.
    """
    try:
        import resource

        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except (ImportError, OSError):  # not Linux: the limits of the whole process have to do
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = held + CHECK_MEMORY
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began
