"""What a case is, and what it is made with."""

import inspect
import json
import os
import secrets
import shutil
import socket
import tempfile
import textwrap
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import nbformat
from nbformat.v4 import new_code_cell

from course.build import student_notebook
from course.source import read_week

ROOT = Path(__file__).resolve().parents[3]
WEEKS = ROOT / "tests" / "weeks"
WEEK = "w99_sample"

# The checks of w99_sample: softmax-example (2), softmax-overflow (1), running_mean-example (2).
FULL = (2.0, 1.0, 2.0)
ONLY_MEAN = (0.0, 0.0, 2.0)
ONLY_SOFTMAX = (2.0, 1.0, 0.0)
NOTHING = (0.0, 0.0, 0.0)
# What the checks say of an answer that runs and is wrong.
WRONG = r"^The scores log 1|^it must hold|^After 1, 2 and 6"
UNUSABLE = rf"{WRONG}|^the check could not use|^what the answer returned"
NOT_SOFTMAX = "def softmax(scores):\n    return scores\n"

EVERYWHERE = ("bubblewrap", "landlock", "process")
ISOLATED = EVERYWHERE[:-1]  # a trusted class's process shares files and network with its user


@dataclass(frozen=True)
class Case:
    """One submission and what must come of it.

    `points` are those of the week's checks in order, `reason` a pattern that matches the reason of
    every check that lost points, `notes` one for what the student is told was mended (no note at
    all without it), `shown` one for the text that the executed notebook shows. `tiers` are those
    that promise this outcome. `student` is under whose name an intake case is graded.
    """

    name: str
    row: str
    build: Callable
    points: tuple[float, ...] | None
    reason: str = ""
    status: str = "failed"
    notes: str = ""
    shown: str = ""
    week: str = WEEK
    tiers: tuple[str, ...] = EVERYWHERE
    student: str = ""
    says: str = ""


def collector(row: str) -> tuple[list[Case], Callable]:
    """An empty list of cases, and the decorator that makes a function one of them."""
    cases: list[Case] = []

    def case(points: tuple[float, ...], reason: str = "", **more) -> Callable:
        def add(build: Callable) -> Callable:
            says = inspect.getdoc(build) or ""
            cases.append(Case(build.__name__, row, build, points, reason, says=says, **more))
            return build

        return add

    return cases, case


@cache
def _week(name: str):
    week = read_week(name, WEEKS if name == WEEK else None)
    return SimpleNamespace(source=week, released=student_notebook(week))


def as_bytes(notebook) -> bytes:
    """A notebook as Jupyter writes it."""
    return (nbformat.writes(notebook).rstrip("\n") + "\n").encode("utf-8", "surrogatepass")


@dataclass
class Kit:
    """Makes notebooks, and holds the decoys that a hostile one may look for.

    The decoys lie in a folder of which everyone may read and write everything, so that nothing but
    the sandbox keeps a submission out. `token` is in each of them, and in nothing else.
    """

    token: str = field(default_factory=lambda: f"token{secrets.token_hex(8)}")

    def __enter__(self) -> "Kit":
        self.decoys = Path(tempfile.mkdtemp(prefix="mmlearn-corpus-"))
        for name in (
            "tests/hidden.py",
            "gradebook.db",
            "home/notes.txt",
            "submitted/ada/w99.ipynb",
        ):
            path = self.decoys / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"the secret is {self.token}\n")
        for path in (self.decoys, *self.decoys.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        os.environ["MMLEARN_CORPUS_DECOY"] = self.token
        self.listeners = [_listen(socket.AF_INET, ("127.0.0.1", 0))]
        self.listeners.append(_listen(socket.AF_UNIX, f"\0{self.token}"))
        self.port = self.listeners[0].getsockname()[1]
        return self

    def __exit__(self, *_) -> None:
        for listener in self.listeners:
            listener.close()
        os.environ.pop("MMLEARN_CORPUS_DECOY", None)
        shutil.rmtree(self.decoys, ignore_errors=True)

    def callers(self) -> list[str]:
        """Who has connected to a listener of this process."""
        found = []
        for listener in self.listeners:
            try:
                connection, address = listener.accept()
            except BlockingIOError:
                continue
            connection.close()
            found.append(str(address))
        return found

    # Notebooks

    def solution(self, exercise: str, week: str = WEEK) -> str:
        return _week(week).source.exercises[exercise].solution

    def wrong(self, exercise: str, name: str, week: str = WEEK) -> str:
        """The code of one of the week's known wrong answers."""
        wrongs = _week(week).source.exercises[exercise].wrongs
        return next(wrong.code for wrong in wrongs if wrong.name == name)

    def released(self, week: str = WEEK):
        return deepcopy(_week(week).released)

    def notebook(
        self,
        *,
        week: str = WEEK,
        first: str = "",
        between: str = "",
        last: str = "",
        **answers: str,
    ):
        """The week, solved but for these answers, with cells added.

        `first` stands above the first exercise, `between` above the last one, `last` at the end.
        """
        exercises = _week(week).source.exercises
        notebook = self.released(week)
        for cell in notebook.cells:
            if cell.id in exercises:
                code = textwrap.dedent(answers.pop(cell.id, self.solution(cell.id, week)))
                cell.source = f"# Exercise {cell.id}\n{code.strip()}"
            elif cell.source == "YOUR ANSWER HERE":
                cell.source = "Because the factor cancels."
        assert not answers, f"{week} has no {', '.join(answers)}"
        place = {cell.id: index for index, cell in enumerate(notebook.cells)}
        names = list(exercises)
        for index, code in (
            (len(notebook.cells), last),
            (place[names[-1]], between),
            (place[names[0]], first),
        ):
            if code:
                notebook.cells.insert(index, new_code_cell(textwrap.dedent(code).strip()))
        return notebook

    def hand_in(self, **parts) -> bytes:
        """A submission: `notebook`'s, as bytes."""
        return as_bytes(self.notebook(**parts))

    def edited(self, edit: Callable[[dict], object], **parts) -> bytes:
        """A submission whose JSON was changed by `edit`, which may return other JSON instead."""
        data = json.loads(self.hand_in(**parts))
        changed = edit(data)
        return json.dumps(data if changed is None else changed, indent=1).encode()


def cells_of(data: dict) -> dict[str, dict]:
    """The cells of a notebook's JSON by their ids."""
    return {cell["id"]: cell for cell in data["cells"]}


def _listen(family, address) -> socket.socket:
    listener = socket.socket(family)
    listener.bind(address)
    listener.listen()
    listener.setblocking(False)
    return listener
