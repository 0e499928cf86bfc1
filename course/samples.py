"""Sample submissions, made from the weeks' sources each time they are needed.

Nothing is stored twice: a right answer is the week's solution, a wrong one is one of its known
wrong answers, and what each submission should get follows from the week too. They are what the
demo grades, what the grader's tests grade, and what an instructor tries a classroom with.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

from course.classroom import write_atomically
from course.source import CourseError, Week, read_week, resolve_week, week_names

# Every week has these; besides them there is one wrong-EXERCISE-NAME for each known wrong answer.
KINDS = ("right", "one_mistake", "half_right", "missing_cells", "untouched", "damaged", "hostile")

# A submission that answers nothing and forges everything. Where hidden tests run in the student's
# own kernel, as under plain nbgrader, it gets full marks.
FORGERY = """
import ast


class Agreeable:
    def __call__(self, *anything, **more):
        return self

    __getattr__ = __getitem__ = __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __call__


class NoChecks(ast.NodeTransformer):
    def visit_Module(self, cell):
        is_check = "mmlearn.feedback" in ast.unparse(cell)
        return ast.parse("passed = True") if is_check else cell


get_ipython().ast_transformers.append(NoChecks())
print("all checks passed")
""".strip()


@dataclass(frozen=True)
class Sample:
    """One submission, and what it must get from the checks: `lowest` to `highest` points.

    They are equal except for wrong answers, of which only this is known: the other exercises earn
    everything, and at least one check with a hidden part fails. Written answers, which a person
    marks, are counted in `to_mark` only.
    """

    student: str
    week: str
    content: bytes
    lowest: float
    highest: float
    of: float
    to_mark: int

    def as_json(self) -> dict:
        """The row that `course samples --json` prints."""
        return {name: value for name, value in asdict(self).items() if name != "content"}


def samples(week: str, folder: Path | None = None, kinds: Iterable[str] = ()) -> list[Sample]:
    """The sample submissions of a week, all of them or those of some kinds.

    Raises: CourseError, for an unknown week or kind.
    """
    read = read_week(week, folder)
    made = {sample.student: sample for sample in _all(read)}
    for kind in kinds:
        if kind not in made:
            raise CourseError(f"{read.name} has no sample {kind!r}; it has {', '.join(made)}.")
    return [made[kind] for kind in kinds] if kinds else list(made.values())


def write_class(
    to: Path,
    weeks: Iterable[str] | None = None,
    kinds: Iterable[str] = (),
    folder: Path | None = None,
) -> list[Sample]:
    """Write TO/STUDENT/WEEK/WEEK.ipynb for every sample, or for those of some kinds.

    Raises: CourseError, for an unknown week or kind, or when TO is a file.
    """
    to = Path(to)
    if to.exists() and not to.is_dir():
        raise CourseError(f"{to} is a file; the samples need a folder.")
    names = [resolve_week(w, folder) for w in weeks] if weeks else week_names(folder)
    written = [sample for name in names for sample in samples(name, folder, kinds)]
    for sample in written:
        write_atomically(to / sample.student / sample.week / f"{sample.week}.ipynb", sample.content)
    return written


def _all(week: Week) -> Iterable[Sample]:
    from course.build import student_notebook

    exercises = list(week.exercises.values())
    right = {exercise.name: exercise.solution for exercise in exercises}
    full = float(sum(exercise.points for exercise in exercises))
    released = student_notebook(week)

    waiting = len(week.written)

    def sample(student, notebook, lowest, highest=None, to_mark=waiting) -> Sample:
        content = notebook if isinstance(notebook, bytes) else _as_bytes(notebook)
        highest = lowest if highest is None else highest
        return Sample(student, week.name, content, lowest, highest, full, to_mark)

    def with_wrong(student, wrongs) -> Sample:
        """A submission with these wrong answers, at most one of an exercise, all else right."""
        answers = right | {wrong.exercise: wrong.code for wrong in wrongs}
        lost = [week.exercises[wrong.exercise] for wrong in wrongs]
        certain = sum(min(c.points for c in e.checks if c.hidden) for e in lost)
        lowest = full - sum(e.points for e in lost)
        return sample(student, filled(week, released, answers), lowest, full - certain)

    solved = filled(week, released, right)
    yield sample("right", solved, full)
    yield with_wrong("one_mistake", [exercises[0].wrongs[0]])
    yield with_wrong("half_right", [e.wrongs[0] for e in exercises[(len(exercises) + 1) // 2 :]])
    deleted = {exercises[0].name, exercises[-1].checks[0].grade_id}
    holes = deepcopy(solved)
    holes.cells = [c for c in holes.cells if _grade_id(c) not in deleted]
    yield sample("missing_cells", holes, full - exercises[0].points)
    yield sample("untouched", released, 0.0)
    content = _as_bytes(solved)
    yield sample("damaged", content[: len(content) // 2], 0.0, to_mark=0)
    yield sample("hostile", _forged(week, released), 0.0)
    for exercise in exercises:
        for wrong in exercise.wrongs:
            yield with_wrong(f"wrong-{exercise.name}-{wrong.name}", [wrong])


def solved(week: Week):
    """The released notebook of a week with the course's own answers, as a student hands it in."""
    from course.build import student_notebook

    answers = {exercise.name: exercise.solution for exercise in week.exercises.values()}
    return filled(week, student_notebook(week), answers)


def filled(week: Week, released, answers: dict[str, str]):
    """The released notebook with code answers, and the model answers to what is written."""
    notebook = deepcopy(released)
    texts = answers | {f"{w.name}-answer": w.model_answer for w in week.written}
    for cell in notebook.cells:
        cell.source = texts.get(cell.id, cell.source)
    return notebook


def _forged(week: Week, released):
    """The released notebook with an agreeable object for every answer, and a cell that forges."""
    from nbformat.v4 import new_code_cell

    notebook = deepcopy(released)
    for cell in notebook.cells:
        if cell.id in week.exercises:
            names = sorted(week.exercises[cell.id].names)
            cell.source = "\n".join(f"{name} = Agreeable()" for name in names)
    first = next(i for i, cell in enumerate(notebook.cells) if cell.id in week.exercises)
    notebook.cells.insert(first, new_code_cell(FORGERY, id="forgery"))
    return notebook


def _grade_id(cell) -> str | None:
    return cell.metadata.get("nbgrader", {}).get("grade_id")


def _as_bytes(notebook) -> bytes:
    import nbformat

    return (nbformat.writes(notebook).rstrip("\n") + "\n").encode()
