"""Read a week: one percent file becomes cells, exercises, checks and known wrong answers.

`course/weeks/wNN_topic.py` is the only place where a week is written. Its cells are marked in
short keys, after which they are sorted (`reader.py`) and held to rules (`rules.py`):

    # %% [markdown]                                             prose
    # %%                                                        code that is given to the learner
    # %% tags=["parameters"]                                    SEED, DEVICE, SCALE and DATA
    # %% tags=["experiment"]                                    slow code, skipped when grading
    # %% [markdown] exercise="loss" difficulty=3 minutes=15     an exercise's header
    # %% answer="loss"                                          holds ### BEGIN / END SOLUTION
    # %% check="loss" aspect="law" points=2 title="..."         may end in a hidden region
    # %% wrong="loss" name="no_mean" says="..."                 a known wrong answer
    # %% [markdown] written="why" points=2                      graded by a person

An exercise's header may list what else in mmlearn is its answer under another name, as
`forbids=["mmlearn.clip.contrastive_loss"]`. Whatever is not as it should be raises a `CourseError`
that names file, line and way out.
"""

import difflib
import re
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from course.names import imported_answer, names_bound, names_imported

__all__ = [
    "Cell",
    "Check",
    "CourseError",
    "Exercise",
    "Week",
    "Written",
    "Wrong",
    "imported_answer",
    "read_week",
    "repo_root",
    "repository",
    "resolve_week",
    "week_names",
    "weeks_folder",
]

STUB = "# YOUR CODE HERE\nraise NotImplementedError()"  # nbgrader's own words; a test compares


class CourseError(Exception):
    """One sentence for a person: what was wrong, what was wanted, the way out."""

    exit_code = 2


@dataclass(frozen=True)
class Cell:
    """One cell. Its kind is prose, code, exercise, answer, check, wrong or written."""

    kind: str
    cell_type: str
    text: str
    metadata: dict
    line: int  # of the first line of the text, in the week's file

    @property
    def tags(self):
        return tuple(self.metadata.get("tags", ()))

    @property
    def is_experiment(self):
        return "experiment" in self.tags


@dataclass(frozen=True)
class Check:
    """A graded test cell: what the learner sees, and what only the grader runs."""

    exercise: str
    aspect: str
    points: int
    title: str
    cell: Cell
    visible: str
    hidden: str

    @property
    def grade_id(self):
        return f"{self.exercise}-{self.aspect}"


@dataclass(frozen=True)
class Wrong:
    """A whole answer cell that a real learner might write, and what that learner needs to hear."""

    exercise: str
    name: str
    says: str
    code: str
    cell: Cell


@dataclass(frozen=True)
class Exercise:
    """A question with its answer, the checks that grade it, and the ways to get it wrong."""

    name: str
    difficulty: int
    minutes: int
    header: Cell
    answer: Cell
    checks: list[Check]
    wrongs: list[Wrong]
    forbids: tuple[str, ...] = ()  # dotted names in mmlearn that are this answer, renamed

    @property
    def points(self):
        return sum(check.points for check in self.checks)

    @cached_property
    def solution(self):
        """The right answer, without its markers."""
        return without_markers(self.answer.text)

    @property
    def stub(self):
        """What the learner starts from."""
        return without_solution(self.answer.text)

    @cached_property
    def names(self):
        """The names that the answer defines and the checks may use."""
        return names_bound(self.solution) - names_imported(self.solution)


@dataclass(frozen=True)
class Written:
    """A question that a person grades, with a model answer and a mark scheme."""

    name: str
    points: int
    question: str
    model_answer: str
    mark_scheme: str
    cell: Cell


@dataclass(frozen=True)
class Week:
    name: str
    number: int
    title: str
    path: Path
    cells: list[Cell]
    exercises: dict[str, Exercise] = field(default_factory=dict)
    written: list[Written] = field(default_factory=list)

    @property
    def points(self):
        return sum(e.points for e in self.exercises.values()) + sum(w.points for w in self.written)

    @property
    def given(self):
        """The code cells that the learner is given, experiments included."""
        return [cell for cell in self.cells if cell.kind == "code"]

    def given_before(self, exercise):
        """The given cells above an exercise's answer that are also run when grading."""
        line = self.exercises[exercise].answer.line
        return [cell for cell in self.given if cell.line < line and not cell.is_experiment]


# Where things are


def repo_root():
    """The checkout that this code runs from, or else the one around the working folder."""
    here = Path(__file__).resolve().parent.parent
    for folder in (here, Path.cwd(), *Path.cwd().parents):
        if (folder / "course" / "weeks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise CourseError(
        f"{Path.cwd()} is not inside a checkout of the course (no folder above it holds "
        "pyproject.toml and course/weeks): clone the repository and run the command there."
    )


def repository():
    """The repository's `owner/name`, for badges and for the install line of a notebook."""
    project = tomllib.loads((repo_root() / "pyproject.toml").read_text("utf-8"))
    slug = project.get("tool", {}).get("course", {}).get("repository", "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", slug):
        raise CourseError(
            f'pyproject.toml names the repository {slug!r}: write repository = "owner/name" '
            "under [tool.course]."
        )
    return slug


def weeks_folder(folder=None):
    """The folder of the week sources: the given one, or the checkout's."""
    return Path(folder) if folder is not None else repo_root() / "course" / "weeks"


def week_names(folder=None):
    """The stems of all weeks, in order: w01_attention, w02_tokens, ..."""
    stems = (path.stem for path in weeks_folder(folder).glob("w*.py"))
    return sorted(stem for stem in stems if re.fullmatch(r"w\d\d_[a-z0-9_]+", stem))


def resolve_week(text, folder=None):
    """Find the week that a person means by `3`, `w03`, `clip`, `w03_clip` or a path to it."""
    names = week_names(folder)
    wanted = re.sub(r"\.(py|ipynb)$", "", str(text).strip().replace("\\", "/").rsplit("/", 1)[-1])
    wanted = wanted.lower()
    if re.fullmatch(r"w?\d{1,2}", wanted):
        found = [name for name in names if int(name[1:3]) == int(wanted.removeprefix("w"))]
    else:
        found = [name for name in names if wanted in (name, name[4:])]
    if len(found) == 1:
        return found[0]
    near = difflib.get_close_matches(wanted, [*names, *(name[4:] for name in names)], n=1)
    hint = (
        f"did you mean {near[0]}?" if near else f"the weeks are {', '.join(names) or 'none yet'}."
    )
    raise CourseError(f"There is {'no' if not found else 'more than one'} week {text!r}: {hint}")


def read_week(name, folder=None):
    """Read and validate a week, named by anything that `resolve_week` understands.

    Raises: CourseError, naming file, line and way out.
    """
    from course.reader import Reader
    from course.rules import check_rules

    name = resolve_week(name, folder)
    week = Reader(weeks_folder(folder) / f"{name}.py").read_week(name)
    check_rules(week)
    return week


# Regions between markers


def without_markers(text, region="SOLUTION"):
    """The text without the lines `### BEGIN region` and `### END region`."""
    markers = (f"### BEGIN {region}", f"### END {region}")
    return "\n".join(line for line in text.split("\n") if line.strip() not in markers)


def without_solution(text):
    """The text with each solution region replaced by the stub, as nbgrader does it."""
    lines, inside = [], False
    for line in text.split("\n"):
        if line.strip() == "### BEGIN SOLUTION":
            inside = True
            indent = line[: len(line) - len(line.lstrip())]
            lines += [indent + stub_line for stub_line in STUB.split("\n")]
        elif line.strip() == "### END SOLUTION":
            inside = False
        elif not inside:
            lines.append(line)
    return "\n".join(lines)
