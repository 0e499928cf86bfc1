"""OUT/journal.jsonl: one line for each graded submission, and the truth that all else is made from.

A line is on the disk before `append` returns, so a run can be killed at any moment: the next one
goes on after the last whole line. Each line holds the hash of the one before and its own, which
is taken over its bytes, so a line that was altered, removed or moved is found by its number:

    {"previous":"","time":...,"journal":"mmlearn grades","version":1,"weeks":{...},"hash":"..."}
    {"previous":"...","time":...,"result":{...},"hash":"..."}

A line with "weeks" comes again when the tests of a week change. The hash finds accidents and hasty
hands. It is no signature: who may write into OUT can write a whole new journal.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from course.classroom import write_atomically
from course.grade.records import Result
from course.source import CourseError

NAME = "journal.jsonl"
STATE = ".grading"  # the folder in OUT for the lock and what else is not meant for people
FORMAT, VERSION = "mmlearn grades", 1
PATIENCE = 2.0  # seconds to wait for the lock: helpers of a killed run hold it a moment longer

Key = tuple[str, str]  # student, week

_HASH = re.compile(rb',"hash":"([0-9a-f]{64})"}\n')
_LENGTH_OF_HASH = len(b',"hash":""}\n') + 64


class Journal:
    """The journal of OUT, and the only right to write there while it is open.

    `weeks` holds the digest of each week's tests, for the record. `notice` says in a sentence what
    had to be repaired on opening, or is empty.
    Raises: CourseError, on opening, when OUT cannot be used, another run holds it, another version
    of the grader wrote it, or a line is not as it was written.
    """

    def __init__(self, to: Path, weeks: Mapping[str, str] | None = None) -> None:
        self.to, self.path = Path(to), Path(to) / NAME
        self.weeks = dict(weeks or {})
        self.notice = ""

    def __enter__(self) -> "Journal":
        with ExitStack() as stack:
            stack.enter_context(_sole_writer(self.to))
            with _trouble(self.to):
                self._open()
            stack.callback(os.close, self._file)
            if not self._seen.lines:
                self._append({"journal": FORMAT, "version": VERSION, "weeks": self.weeks})
            elif missing := self.weeks.items() - self._seen.weeks.items():
                self._append({"weeks": self._seen.weeks | dict(missing)})
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def results(self) -> "Results":
        """The newest result of each (student, week)."""
        return Results(self.path, self._seen.places)

    def append(self, result: Result) -> None:
        """Write a result; on return it is on the disk.

        Raises: CourseError, when it cannot be written. The journal is then as it was before.
        """
        place = self._append({"result": result.as_json()})
        self._seen.places[result.key] = place

    def _open(self) -> None:
        seen = _scan(self.path)
        _compare_with_head(self.path, seen)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(self.path, flags, 0o644)
        try:
            if seen.tail:
                cut = self.to / STATE / f"cut-{hashlib.sha256(seen.tail).hexdigest()[:8]}"
                write_atomically(cut, seen.tail)
                os.ftruncate(self._file, seen.length)
                self.notice = (
                    f"Line {seen.lines + 1} of {self.path} was half written when an earlier run "
                    f"ended: it is cut off, kept in {cut}, and what it was about is graded again."
                )
            _flush(self._file)
            _flush_folder(self.to)
        except BaseException:
            os.close(self._file)
            raise
        self._seen = seen

    def _append(self, content: dict) -> tuple[int, int]:
        """Write one line; return where it begins and how long it is."""
        seen = self._seen
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line, own_hash = _line({"previous": seen.last, "time": now, **content})
        begin = seen.length
        with _trouble(self.to):
            if os.fstat(self._file).st_size != begin:
                raise CourseError(
                    f"{self.path} was changed by another program during the run; what was graded "
                    "until then is kept, and the same command looks what is wrong with it."
                )
            try:
                if os.write(self._file, line) < len(line):
                    # The next write would say it; a line that is not whole helps nobody.
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                _flush(self._file)
                seen.lines, seen.last, seen.length = seen.lines + 1, own_hash, begin + len(line)
            except BaseException:  # Ctrl-C, too: half a line must not be followed by another
                with suppress(OSError):
                    os.ftruncate(self._file, seen.length)
                raise
        with suppress(OSError):  # a help for finding lines removed from the end, no more
            _head(self.to).write_text(f"{seen.lines} {seen.last}\n", "ascii")
        return begin, len(line)


class Results(Mapping[Key, Result]):
    """The newest results of a journal, read from its file when asked for: a class of any size fits.

    It holds what was there when it was made.
    """

    def __init__(self, path: Path, places: Mapping[Key, tuple[int, int]]) -> None:
        self._path, self._places = path, dict(places)

    def __getitem__(self, key: Key) -> Result:
        begin, length = self._places[key]
        with open(self._path, "rb") as file:
            file.seek(begin)
            record = json.loads(file.read(length))
        try:
            return Result.from_json(record["result"])
        except (KeyError, TypeError, ValueError) as error:
            raise CourseError(
                f"{self._path} holds a result of {key[0]} for {key[1]} in a form that this version "
                "of the grader does not know; use the version that wrote it, or grade into "
                "another folder."
            ) from error

    def __iter__(self) -> Iterator[Key]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_results(to: Path) -> Results:
    """The newest results in OUT, without the right to write there: a run may be going on.

    Raises: CourseError, when OUT has no journal, or a line of it is not as it was written.
    """
    path = Path(to) / NAME
    if not path.is_file():
        raise CourseError(f"{to} has no {NAME}; wanted a folder that `course grade` wrote.")
    with _trouble(Path(to)):
        seen = _scan(path)
    _compare_with_head(path, seen)
    return Results(path, seen.places)


def verify_journal(path: Path) -> int:
    """Check every line of a journal, given as its file or its folder; return how many there are.

    Raises: CourseError, naming the first line that was altered, removed, moved or half written.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise CourseError(f"{path} is not there; wanted a {NAME} that `course grade` wrote.")
    with _trouble(path.parent):
        seen = _scan(path)
        _compare_with_head(path, seen)
    if seen.tail:
        raise CourseError(
            f"{path} breaks off in line {seen.lines + 1}; the next run of `course grade` cuts that "
            "line off and grades again what it was about."
        )
    return seen.lines


# Lines


@dataclass
class _Seen:
    """What a journal holds. `length` counts the bytes of its whole lines; `tail` comes after."""

    lines: int = 0
    length: int = 0
    last: str = ""
    tail: bytes = b""
    weeks: dict[str, str] = field(default_factory=dict)
    places: dict[Key, tuple[int, int]] = field(default_factory=dict)
    head: tuple[int, str] = (0, "")
    hash_at_head: str = ""


def _line(content: dict) -> tuple[bytes, str]:
    # ASCII, so that neither half a character nor an odd line separator in a student's text can
    # break a line in two.
    body = json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode()[:-1]
    own_hash = hashlib.sha256(body).hexdigest()
    return body + f',"hash":"{own_hash}"}}\n'.encode(), own_hash


def _scan(path: Path) -> _Seen:
    """Read a journal from its beginning to its last whole line.

    Raises: CourseError, naming the first line that is not as it was written.
    """
    seen = _Seen(head=_read_head(path.parent))  # before the journal, which a run may make longer
    if not path.exists():
        return seen
    with open(path, "rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                seen.tail = raw
                break
            number = seen.lines + 1
            if number == 1:
                _require_our_version(path, raw)
            record = _checked(path, number, raw, seen.last)
            if "weeks" in record:
                seen.weeks |= record["weeks"]
            if "result" in record:
                key = record["result"]["student"], record["result"]["week"]
                seen.places[key] = seen.length, len(raw)
            seen.lines, seen.last = number, record["hash"]
            seen.length += len(raw)
            if number == seen.head[0]:
                seen.hash_at_head = seen.last
    return seen


def _require_our_version(path: Path, raw: bytes) -> None:
    try:
        first = json.loads(raw)
    except ValueError:
        first = None
    if not isinstance(first, dict) or first.get("journal") != FORMAT:
        raise CourseError(
            f"{path} is no journal of this grader (see its first line); grade into another folder."
        )
    if first.get("version") != VERSION:
        raise CourseError(
            f"{path} has format {first.get('version')}, and this version of the grader knows "
            f"format {VERSION}; use the version that wrote it, or grade into another folder."
        )


def _checked(path: Path, number: int, raw: bytes, previous: str) -> dict:
    mark = _HASH.fullmatch(raw[-_LENGTH_OF_HASH:])
    body = raw[:-_LENGTH_OF_HASH]
    way_out = (
        "Bring back the file as it was; or move it away, and everything is graded again (marks "
        "given by hand are in gradebook.db and stay)."
    )
    if mark is None or hashlib.sha256(body).hexdigest() != mark[1].decode():
        raise CourseError(f"Line {number} of {path} was altered after it was written. {way_out}")
    record = json.loads(raw)
    if record["previous"] != previous:
        before = f"line {number - 1}" if number > 1 else "the beginning"
        raise CourseError(
            f"Line {number} of {path} does not belong after {before}: lines were removed, added "
            f"or moved there. {way_out}"
        )
    return record


# How far the journal had come: beside it, so that lines removed from its end are missed


def _head(to: Path) -> Path:
    return to / STATE / "head"


def _read_head(to: Path) -> tuple[int, str]:
    with suppress(OSError, ValueError):
        number, last = _head(to).read_text("ascii").split()
        return int(number), last
    return 0, ""


def _compare_with_head(path: Path, seen: _Seen) -> None:
    number, last = seen.head
    if number > seen.lines:
        raise CourseError(
            f"{path} ends after line {seen.lines}, but {number} lines were written. Bring back the "
            f"file as it was; or delete {_head(path.parent)}, and what is missing is graded again."
        )
    if number and seen.hash_at_head != last:
        raise CourseError(
            f"Line {number} of {path} is not the one that was written there. Bring back the file "
            f"as it was; or delete {_head(path.parent)} to go on with what it holds."
        )


# The disk, and other runs


def _flush(file: int) -> None:
    """Return when the disk has it. macOS needs to be told that the disk itself is meant."""
    import fcntl

    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(file)
    else:
        fcntl.fcntl(file, full)


def _flush_folder(folder: Path) -> None:
    """A new file is found again after a power cut only when its folder is on the disk, too."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _trouble(to: Path) -> Iterator[None]:
    """A full disk, a folder that cannot be written: one sentence, and what is finished is kept."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cause = "the disk is full" if full else error.strerror or str(error)
        way_out = "make room" if full else "see to it that it can be written"
        raise CourseError(
            f"Grading into {to} stopped: {cause}; what was graded is kept: {way_out}, and the "
            "same command goes on."
        ) from error


@contextmanager
def _sole_writer(to: Path) -> Iterator[None]:
    """Hold OUT for this run alone, and sweep what a killed run left in its state folder.

    Raises: CourseError, when OUT is a file or another run holds it.
    """
    import fcntl

    if to.exists() and not to.is_dir():
        raise CourseError(f"{to} is a file; --to wants a folder.")
    state = to / STATE
    with ExitStack() as stack:
        with _trouble(to):
            state.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(state / "lock", "a+", encoding="ascii"))
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise _another_run(to, lock) from None
                time.sleep(0.05)
        with _trouble(to):
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
        for leftover in state.glob("work-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _another_run(to: Path, lock) -> CourseError:
    lock.seek(0)
    process = lock.read(20).strip()
    who = f" (process {process})" if process.isdigit() else ""
    return CourseError(
        f"Another run{who} is grading into {to}; wait for it, or grade into another folder."
    )


# Who moved


class Move(NamedTuple):
    """A student whose points changed while the submission did not: the tests did.

    `checks` holds what each of them gave more or, below zero, less.
    """

    student: str
    week: str
    before: float
    after: float
    checks: tuple[tuple[str, float], ...]

    @property
    def by(self) -> float:
        return round(self.after - self.before, 6)

    def __str__(self) -> str:
        checks = ", ".join(f"{name} {change:+g}" for name, change in self.checks)
        return f"{self.student}, {self.week}: {self.before:g} to {self.after:g} ({checks})"


def moved(before: Mapping[Key, Result], after: Mapping[Key, Result]) -> list[Move]:
    """Who has other points after a regrade, by what the checks gave; new notebooks do not count."""
    moves = []
    for key in sorted(before.keys() & after.keys()):
        old, new = before[key], after[key]
        if old.submission_digest != new.submission_digest:
            continue
        points = Counter({row.grade_id: row.points or 0.0 for row in new.rows})
        points.subtract({row.grade_id: row.points or 0.0 for row in old.rows})
        checks = tuple((name, round(by, 6)) for name, by in points.items() if round(by, 6))
        if checks:
            moves.append(Move(*key, old.points, new.points, checks))
    return moves


def in_words(moves: Iterable[Move]) -> str:
    """One line: "14 students +1, 0 down"."""
    changes = Counter(move.by for move in moves)
    if not changes:
        return "nobody moved"
    up = {by: count for by, count in changes.items() if by > 0}
    down = {by: count for by, count in changes.items() if by < 0}
    parts = [_count(up, "up"), _count(down, "down")]
    if same := changes.get(0.0):
        parts.append(f"{_students(same)} the same in total from other checks")
    return ", ".join(parts)


def _count(changes: dict[float, int], word: str) -> str:
    if not changes:
        return f"0 {word}"
    if len(changes) > 3:
        low, high = sorted(changes, key=abs)[:: len(changes) - 1]
        return f"{_students(sum(changes.values()))} {low:+g} to {high:+g}"
    ordered = sorted(changes.items(), key=lambda change: -abs(change[0]))
    return ", ".join(f"{_students(count)} {by:+g}" for by, count in ordered)


def _students(count: int) -> str:
    return f"{count} student{'' if count == 1 else 's'}"
