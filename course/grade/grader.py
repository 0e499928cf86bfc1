"""Grades one submission: heals it, runs its cells in the sandbox, and asks its answers the checks.

A `Grader` lives in a trusted process and keeps one warm sandbox for all submissions. Whatever a
submission does, `grade` returns its result. The order is always the same:

1. The notebook is read and healed (`healing.py`); what cannot be is `damaged`, with a reason.
2. Its cells run in a child of the sandbox, without the checks and without the experiments. At the
   place of its checks each exercise's names are remembered, since a later cell may rebind them.
3. Each check runs here, on proxies of those names (`checks.py`).

A cell or a check that hangs, crashes or ends the child costs only itself: a new child runs the
cells again, without the one that was fatal, and the next check goes on there.
"""

import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from course.grade import sandbox
from course.grade.checks import Program, Stopwatch, Suite, Verdict, row_of
from course.grade.healing import Healed, heal
from course.grade.inside.wire import Connection, Lost
from course.grade.intake import Damaged
from course.grade.notebook import read_notebook
from course.grade.outputs import SLACK, executed
from course.grade.plan import Settings, nothing, versions
from course.grade.records import Item, Result, Row
from course.grade.remote import CellOutcome, Client
from course.names import imported_answer, names_bound
from course.seeds import Salt
from course.source import CourseError, Exercise

MOST_ATTEMPTS = 5  # of the hidden seeds, until the course's own solution passes
GRACE = 1.0  # seconds to end in, after an interrupt, or for a check with what it got
TOO_SLOW = "checking what it returned took too long"
UNWRITTEN = "YOUR ANSWER HERE"  # what stands in the cell below a written question


class Grader:
    """One trusted grader with its warm sandbox. Close it, or use it as a context manager."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tier = sandbox.probe(settings.isolation)
        self.box = sandbox.Sandbox(self.tier, settings.limits, settings.preload)
        self.suites: dict[str, Suite] = {}
        self.attempts: dict[tuple[str, str], int] = {}  # by week and check, when not the first

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.box.close()

    def suite(self, week: str) -> Suite:
        """The week's checks, tried on the course's own solution before the first student."""
        if week not in self.suites:
            suite = Suite.of(week, self.settings.folder)
            self._try_on_the_solution(suite)
            self.suites[week] = suite
        return self.suites[week]

    def grade(self, student: str, week: str, content: bytes) -> tuple[Result, bytes]:
        """Grade one notebook; return what it got, and the notebook with its outputs as a file."""
        watch = Stopwatch()
        suite = self.suite(week)
        digest = hashlib.sha256(content).hexdigest()
        try:
            healed = heal(read_notebook(content), suite.released)
        except Damaged as damage:
            return self._nothing(suite, student, digest, "damaged", str(damage)), b""
        intake = watch.seconds
        with Attempt(self, suite, healed) as attempt:
            attempt.run_cells()
            cells = watch.seconds - intake
            rows = attempt.run_checks()
        result = Result(
            student,
            week,
            digest,
            self.settings.tests_digest(suite.plan.digest),
            tuple(rows),
            dict(healed.notes),
            {
                "intake": round(intake, 4),
                "cells": round(cells, 4),
                "checks": round(watch.seconds - intake - cells, 4),
                "total": round(watch.seconds, 4),
            },
            round(attempt.peak_mib, 1),
            f"{self.tier.number} {self.tier.name}",
            versions(),
        )
        limit = self.settings.limits.output_bytes + SLACK
        return result, _as_bytes(executed(healed.notebook, attempt.outcomes, limit=limit))

    def _nothing(self, suite: Suite, student: str, digest: str, status: str, reason: str) -> Result:
        tests = self.settings.tests_digest(suite.plan.digest)
        return nothing(student, suite.week.name, digest, tests, suite.plan.items, status, reason)

    def salt(self, program: Program) -> Salt:
        place = f"{program.week}/{program.item.grade_id}"
        attempt = self.attempts.get((program.week, program.item.grade_id), 0)
        return Salt(self.settings.secret, place, attempt)

    def _try_on_the_solution(self, suite: Suite) -> None:
        """Find out before the first student whether the checks, the seeds and the sandbox work.

        A check whose solution fails under the numbers that the secret gives it takes the next
        numbers; the same ones in every process, because nothing else decides it.
        Raises: CourseError, when it fails under all of them.
        """
        from course.samples import solved

        week, grade_ids = suite.week.name, {p.item.grade_id for p in _programs(suite)}
        healed = heal(solved(suite.week), suite.released)
        for number in range(MOST_ATTEMPTS):
            self.attempts |= {(week, grade_id): number for grade_id in grade_ids}
            with Attempt(self, suite, healed) as attempt:
                attempt.run_cells()
                rows = attempt.run_checks(only=grade_ids)
            failed = {row.grade_id: row.reason for row in rows if row.status != "passed"}
            grade_ids = set(failed)
            if not failed:
                return
        name, reason = next(iter(failed.items()))
        raise CourseError(
            f"The course's own solution of {week} fails the check {name} in the sandbox: {reason}; "
            f"see `python -m course verify {week}` and `python -m course doctor`."
        )


class Attempt:
    """One submission on its way through the sandbox: the child it has at present, and its fate."""

    def __init__(self, grader: Grader, suite: Suite, healed: Healed) -> None:
        self.grader, self.suite, self.healed = grader, suite, healed
        self.limits = grader.settings.limits
        self.script = list(_script(suite, healed))
        self.outcomes: dict[int, CellOutcome] = {}
        self.fatal: dict[int, str] = {}  # cells that ended or blocked a child, and how
        self.late: dict[int, str] = {}  # cells that took all the time and could be interrupted
        self.interrupted = False
        self.child = self.client = None
        self.peak_mib = 0.0

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, *_) -> None:
        self._end_child()

    # Cells

    def run_cells(self) -> None:
        """Run the cells from the first to the last, past those that cannot be survived."""
        until = time.monotonic() + 3 * self.limits.seconds
        while not self._run_script() and time.monotonic() < until:
            pass

    def _run_script(self) -> bool:
        """Run what is not known to be fatal in a new child; False when that child was lost.

        A cell that takes all the time is interrupted, and what stands below it has as much again.
        """
        self._start_child()
        connection, seconds = self.client.connection, self.limits.seconds
        connection.when_late = self._interrupt
        until, periods = time.monotonic() + seconds, 2
        for index, step in self.script:
            if index in self.fatal:
                continue
            known = min(until, time.monotonic() + seconds / 10)
            connection.deadline, self.interrupted = known if index in self.late else until, False
            try:
                if isinstance(step, tuple):
                    self.client.keep(*step)
                elif periods:
                    self._note(index, self.client.run_cell(step))
            except Lost as lost:
                reason = self._why(lost)
                self.fatal[index] = reason
                self._note(index, CellOutcome([], ("Stopped", reason), seconds))
                return False
            if self.interrupted and index not in self.late:
                self.late[index] = f"it ran longer than {seconds:g} s"
                until, periods = time.monotonic() + seconds, periods - 1
        return True

    def _note(self, index: int, outcome: CellOutcome) -> None:
        if index not in self.outcomes or index in self.fatal:
            self.outcomes[index] = outcome

    def _interrupt(self) -> float | None:
        """Press Ctrl-C once for a cell whose time is over, and wait a moment more."""
        if self.interrupted:
            return None
        self.interrupted = True
        self.child.interrupt()
        return time.monotonic() + GRACE

    # Checks

    def run_checks(self, only: set[str] | None = None) -> list[Row]:
        """Run every check (or `only` some), each exercise with its own time; return all rows."""
        rows = {}
        for name, programs in self.suite.programs.items():
            for program, verdict, seconds in self._run_exercise(name, programs, only):
                rows[program.item.grade_id] = row_of(program, verdict, seconds)
        if only is not None:
            return list(rows.values())
        return [rows.get(i.grade_id) or self._written(i) for i in self.suite.plan.items]

    def _run_exercise(self, name: str, programs, only) -> Iterator[tuple[Program, Verdict, float]]:
        programs = [p for p in programs if only is None or p.item.grade_id in only]
        exercise = self.suite.week.exercises[name]
        if said := self._taken(name, exercise):
            for program in programs:
                yield program, Verdict(False, said, "", said), 0.0
            return
        # A check that runs out of time leaves a tenth of it for each one after it, and all of an
        # exercise's checks, with what it costs to bring back a child, have twice the time of one.
        whole, share, verdict = time.monotonic() + 2 * self.limits.seconds, 1.0, None
        for program in programs:
            watch = Stopwatch()
            if verdict is None or verdict.lost is None or time.monotonic() < whole:
                verdict = self._run_check(program, share * self.limits.seconds)
                if verdict.lost is not None and verdict.lost.how == "late":
                    share = 0.1
            yield program, verdict, watch.seconds

    def _taken(self, name: str, exercise: Exercise) -> str | None:
        """Say how the answer, or a cell that binds its names again, takes it from mmlearn."""
        answer = self._index(name)
        cells = {
            index: cell.source
            for index, cell in enumerate(self.healed.notebook.cells)
            if cell.cell_type == "code"
        }
        for index, code in cells.items():
            if index == answer or binds(code) & exercise.names:
                elsewhere = [source for other, source in cells.items() if other != index]
                if said := imported_answer(code, exercise, elsewhere):
                    return said
        return None

    def _run_check(self, program: Program, seconds: float) -> Verdict:
        is_inherited = self.client is not None
        if self.client is None and not self._again():
            reason = next(reversed(self.fatal.values()), "its cells could not be run again")
            return Verdict(False, reason, "", reason, lost=Lost("ended", reason))
        connection, until = self.client.connection, time.monotonic() + seconds
        connection.deadline, connection.when_late = until, lambda: None
        answers = {}
        try:
            for name in sorted(program.names):
                try:
                    answers[name] = self.client.value(program.exercise.name, name)
                except NameError:
                    reason = self._why_missing(program.exercise.name, name)
                    return Verdict(False, reason, "", reason)
                except Exception as error:  # a class that raises as soon as it is looked at
                    reason = f"the answer raised {type(error).__name__}"
                    return Verdict(False, reason, "", reason)
            with _alarm(until):
                verdict = program.run(answers, self.grader.salt(program))
        except Lost as lost:
            if is_inherited and lost.how != "late" and len(answers) < len(program.names):
                # Nothing of this check has run: an earlier one's answer spoke or died behind it.
                self._end_child()
                return self._run_check(program, seconds)
            verdict = Verdict(False, lost.sentence, "", lost.sentence, lost=lost)
        if verdict.lost is not None:
            reason = self._why(verdict.lost)
            # An exit code or a signal can carry hidden inputs out, a few bits at a time.
            said = reason if verdict.part == "visible" else reason.split(" (")[0]
            verdict = verdict._replace(reason=reason, said=said)
        return verdict

    def _again(self) -> bool:
        """Bring the cells back to life in a new child, for the checks that are left."""
        return self._run_script() or self._run_script()

    def _why_missing(self, exercise: str, name: str) -> str:
        """Why a name is not there: what its own cell ended with, if it did."""
        index = self._index(exercise)
        stopped = self.fatal | self.late
        if index in stopped:
            return stopped[index]
        outcome = self.outcomes.get(index)
        if outcome is None and stopped:
            return f"a cell above it took all the time: {next(reversed(stopped.values()))}"
        if outcome is not None and outcome.error is not None:
            kind, value = outcome.error
            first = f"{kind}: {value}".strip().split("\n")[0].rstrip(": ")
            return f"the answer cell stopped with {first}"[:300]
        return f"{name} is not defined"

    def _written(self, item: Item) -> Row:
        answers = {c.get("id"): c.source.strip() for c in self.healed.notebook.cells}
        answer = answers.get(f"{item.grade_id}-answer", "")
        reason = "" if answer not in ("", UNWRITTEN) else "the answer cell was left as it was"
        return Row(
            item.grade_id, item.exercise, item.check, None, item.max_points, "to mark", reason
        )

    # The child

    def _start_child(self) -> None:
        self._end_child()
        self.child = self.grader.box.start_child()
        self.client = Client(Connection(self.child.sock))

    def _end_child(self):
        child, self.child, self.client = self.child, None, None
        if child is None:
            return None
        ending = child.end()
        self.peak_mib = max(self.peak_mib, ending.peak_mib)
        return ending

    def _why(self, lost: Lost) -> str:
        """End the child that was lost, and say in words what became of it."""
        ending = self._end_child()
        limits = self.limits
        if lost.how == "broken" or lost.sentence == TOO_SLOW:
            return lost.sentence
        if ending is not None and ending.how == "memory":
            return f"it needed more than {limits.memory_mib} MiB of memory"
        if ending is not None and ending.how == "processes":
            return f"it started more than {limits.processes} processes"
        if lost.how == "late":
            return f"it ran longer than {limits.seconds:g} s"
        if ending is not None and ending.how == "signal":
            return f"its process crashed ({_signal_name(ending.code)})"
        if ending is not None and ending.how == "exit":
            return f"it ended its own process (exit code {ending.code})"
        return lost.sentence

    def _index(self, grade_id: str) -> int:
        return _places(self.healed)[grade_id]


def _places(healed: Healed) -> dict[str, int]:
    return {
        cell.metadata.nbgrader.grade_id: index
        for index, cell in enumerate(healed.notebook.cells)
        if cell.metadata.get("nbgrader", {}).get("grade_id")
    }


def _script(suite: Suite, healed: Healed) -> Iterator[tuple[int, str | tuple[str, list[str]]]]:
    """What happens in the child, in order: the source of a cell, or names to remember."""
    places = _places(healed)
    keep: dict[int, list[tuple[str, list[str]]]] = {}
    for name, programs in suite.programs.items():
        last = max(places[name], *(places[p.item.grade_id] for p in programs))
        keep.setdefault(last, []).append((name, sorted(suite.week.exercises[name].names)))
    for index, cell in enumerate(healed.notebook.cells):
        marks = cell.metadata.get("nbgrader", {})
        is_check = marks.get("grade") and not marks.get("solution")
        is_experiment = "experiment" in cell.metadata.get("tags", ())
        if cell.cell_type == "code" and not is_check and not is_experiment and cell.source.strip():
            yield index, cell.source
        for step in keep.get(index, ()):
            yield index, step


@lru_cache(maxsize=1024)  # most cells of a class are the released ones
def binds(code: str) -> frozenset[str]:
    """The names that a cell binds; none, when it is no Python."""
    try:
        return frozenset(names_bound(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()


def _programs(suite: Suite) -> Iterator[Program]:
    for programs in suite.programs.values():
        yield from programs


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def _alarm(until: float) -> Iterator[None]:
    """Stop a check whose own computing takes too long, for example with what an answer returned."""
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return

    def ring(*_) -> None:
        raise Lost("late", TOO_SLOW)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(until - time.monotonic(), 0.001) + GRACE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _as_bytes(notebook) -> bytes:
    """A notebook as a file, each text in one piece, which is faster than nbformat's lines."""
    text = json.dumps(notebook, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")
