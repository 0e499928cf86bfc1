"""Turn the weeks into notebooks: `notebooks/` for learners, `solutions/` for nbgrader.

One way and deterministic: the same sources give the same bytes, on any machine and from any
folder. The student's notebook is the solved one after nbgrader's own preprocessors, so that
`nbgrader generate_assignment` on `solutions/` makes the same notebook again.

Beside them it writes `mmlearn/fingerprints.json`: what each known wrong answer gives at the probes
of the visible checks (see `mmlearn.feedback`). Those are worked out again only for an exercise
whose text has changed, so a rebuild on another machine is no diff either.
"""

import contextlib
import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from course.fingerprints import FINGERPRINTS, fingerprint_bytes
from course.source import (
    CourseError,
    read_week,
    repo_root,
    repository,
    resolve_week,
    week_names,
)

_FOLDERS = ("notebooks", "solutions")


@dataclass
class BuildResult:
    """Which files a build changed, deleted and left; or would, if it only looked."""

    root: Path
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)

    @property
    def clean(self):
        return not self.changed and not self.removed


def build(weeks=None, to=None, *, check=False, fresh=False, folder=None):
    """Build the named weeks, or all, under `to` (default: this checkout).

    All is made before the first file is written, and each file is replaced in one step, so an
    error leaves everything as it was. Notebooks of weeks that are no more are deleted. With
    `check` nothing is written. With `fresh` all fingerprints are worked out again. `folder` holds
    the week sources, if they are not the checkout's.
    Raises: CourseError.
    """
    root = Path(to) if to is not None else repo_root()
    names = week_names(folder)
    chosen = sorted({resolve_week(week, folder) for week in weeks}) if weeks else names
    if not chosen:
        raise CourseError("There are no weeks to build: add course/weeks/wNN_topic.py.")
    read = [read_week(name, folder) for name in chosen]
    files = {}
    for week in read:
        for place, notebook in zip(_FOLDERS, (student_notebook(week), solution_notebook(week))):
            files[f"{place}/{week.name}.ipynb"] = _to_bytes(notebook)
    files[FINGERPRINTS] = fingerprint_bytes(read, names, root / FINGERPRINTS, fresh)
    result = BuildResult(root)
    for place in _FOLDERS:
        for path in sorted((root / place).glob("*.ipynb")):
            if re.fullmatch(r"w\d\d_.*", path.stem) and path.stem not in names:
                result.removed.append(f"{place}/{path.name}")
    for name, content in files.items():
        path = root / name
        same = path.is_file() and path.read_bytes() == content
        (result.unchanged if same else result.changed).append(name)
    if not check:
        for name in result.changed:
            _replace(root / name, files[name])
        for name in result.removed:
            (root / name).unlink()
    return result


# Notebooks


def solution_notebook(week):
    """The week as nbgrader's source version: solved, with hidden tests and mark schemes."""
    title, *rest = week.cells
    cells = [_prose(title.text), *_first_cells(week)]
    for cell in rest:
        cells += _notebook_cells(week, cell)
    return _notebook(cells)


def student_notebook(week):
    """The week as learners get it: the solved version after nbgrader's own preprocessors."""
    from nbgrader.preprocessors import (
        CheckCellMetadata,
        ClearHiddenTests,
        ClearMarkScheme,
        ClearOutput,
        ClearSolutions,
        ComputeChecksums,
        LockCells,
    )

    # The order of nbgrader's GenerateAssignment, without what writes to a gradebook.
    steps = (
        LockCells,
        ClearSolutions,
        ClearOutput,
        CheckCellMetadata,
        ClearHiddenTests,
        ClearMarkScheme,
        ComputeChecksums,
        CheckCellMetadata,
    )
    notebook = solution_notebook(week)
    for step in steps:
        notebook, _ = step().preprocess(notebook, {})
    return notebook


def _notebook_cells(week, cell):
    """The notebook cells of one source cell; a wrong answer has none."""
    keys = cell.metadata
    if cell.kind == "prose":
        return [_prose(cell.text)]
    if cell.kind == "code":
        return [_code(cell.text, keys)]
    if cell.kind == "exercise":
        return [_prose(_with_facts(week.exercises[keys["exercise"]]), "exercise")]
    if cell.kind == "answer":
        text = f"# Exercise {keys['answer']}\n{cell.text}"
        return [_graded("code", text, keys["answer"], solution=True)]
    if cell.kind == "check":
        exercise = week.exercises[keys["check"]]
        check = next(check for check in exercise.checks if check.cell is cell)
        text = _check_text(exercise, check)
        return [_graded("code", text, check.grade_id, points=check.points, grade=True, locked=True)]
    if cell.kind == "written":
        written = next(written for written in week.written if written.cell is cell)
        return _written_cells(written)
    return []


def _with_facts(exercise):
    """The header's text with a line under its heading: difficulty, minutes, points."""
    facts = (
        f"*Difficulty {exercise.difficulty} of 5 · about {exercise.minutes} minutes · "
        f"{_points(exercise.points)}*"
    )
    first, _, rest = exercise.header.text.partition("\n")
    if not first.startswith("#"):
        return f"{facts}\n\n{exercise.header.text}"
    return f"{first}\n\n{facts}\n\n{rest.lstrip()}".rstrip()


def _check_text(exercise, check):
    """The check, under a comment that says what it asks, with a guard where nobody looks.

    The guard makes every check fail for an answer that is mmlearn's own, also under nbgrader.
    """
    name = f"{check.grade_id}, {_points(check.points)}: {check.title.rstrip('.')}."
    if not check.visible:
        comment = f"# Hidden check {name}\n# It runs when your notebook is graded."
    elif check.hidden:
        comment = f"# Check {name}\n# Grading asks for more than you see here."
    else:
        comment = f"# Check {name}"
    guard = (
        "from mmlearn.feedback import own_work as _own_work\n"
        f"_own_work({', '.join(sorted(exercise.names))})"
    )
    hidden = f"### BEGIN HIDDEN TESTS\n{guard}\n{check.hidden}".rstrip() + "\n### END HIDDEN TESTS"
    return "\n".join(part for part in (comment, check.visible, hidden) if part)


def _written_cells(written):
    """A question that a person grades (nbgrader's task), and an empty cell below for the answer.

    nbgrader keeps a mark scheme only in a task cell; there formgrader and the feedback show it
    beside the submission. What is handed in is whatever the learner writes below.
    """
    question = (
        f"{written.question}\n\n*Written answer · {_points(written.points)}, given by a person*\n\n"
        f"### BEGIN MARK SCHEME\n**Model answer.** {written.model_answer}\n\n"
        f"**Mark scheme.**\n\n{written.mark_scheme}\n### END MARK SCHEME"
    )
    answer = _prose("YOUR ANSWER HERE")
    answer |= {"id": f"{written.name}-answer", "metadata": {"deletable": False}}
    flags = {"points": written.points, "task": True, "locked": True}
    return [_graded("markdown", question, written.name, **flags), answer]


def _first_cells(week):
    """The badges, and a first code cell that makes Colab and Kaggle ready."""
    slug = repository()
    path = f"{slug}/blob/main/notebooks/{week.name}.ipynb"
    colab, kaggle = "https://colab.research.google.com", "https://kaggle.com"
    badges = (
        f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{path})\n"
        f"[![Open in Kaggle]({kaggle}/static/images/open-in-kaggle.svg)]"
        f"({kaggle}/kernels/welcome?src=https://github.com/{path})"
    )
    packages = f"'mmlearn-course @ git+https://github.com/{slug}' jaxtyping wadler-lindig"
    setup = f"""
# Installs the course's package where it is missing (Colab, Kaggle). The torch that is there stays.
import importlib.metadata
import platform

try:
    import mmlearn
except ModuleNotFoundError:
    get_ipython().run_line_magic("pip", "install -q --no-deps {packages}")
    importlib.invalidate_caches()
    import mmlearn

versions = [f"{{name}} {{importlib.metadata.version(name)}}" for name in ("torch", "numpy")]
print(f"Python {{platform.python_version()}}, {{', '.join(versions)}}, mmlearn is ready")
""".strip()
    return [_prose(badges, "badges"), _code(setup, {}, "setup")]


def _points(points):
    return f"{points} point{'' if points == 1 else 's'}"


def _prose(text, kind="prose"):
    return {"cell_type": "markdown", "metadata": {}, "source": text, "kind": kind}


def _code(text, keys, kind="code"):
    metadata = {"tags": list(keys["tags"])} if keys.get("tags") else {}
    return {"cell_type": "code", "metadata": metadata, "source": text, "kind": kind}


def _graded(cell_type, text, grade_id, points=None, **flags):
    """A cell with nbgrader's metadata, schema 3."""
    nbgrader = {"schema_version": 3, "grade_id": grade_id}
    nbgrader |= {key: flags.get(key, False) for key in ("grade", "solution", "locked", "task")}
    if points is not None:
        nbgrader["points"] = points
    metadata = {"nbgrader": nbgrader}
    return {"cell_type": cell_type, "metadata": metadata, "source": text, "id": grade_id}


def _notebook(cells):
    """Put cells into a notebook; those without an id get one made from what they are."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    seen, made = Counter(), []
    for cell in cells:
        text = cell["source"]
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        cell_id = cell.get("id") or f"{cell['kind']}-{digest}"
        seen[cell_id] += 1
        if seen[cell_id] > 1:
            cell_id = f"{cell_id}-{seen[cell_id]}"
        new_cell = new_code_cell if cell["cell_type"] == "code" else new_markdown_cell
        made.append(new_cell(text, metadata=cell["metadata"], id=cell_id))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return new_notebook(cells=made, metadata=metadata)


# Files


def _to_bytes(notebook):
    import nbformat

    return (nbformat.writes(notebook, version=4).rstrip("\n") + "\n").encode()


def _replace(path, content):
    """Write a file in one step: a reader sees the old one or the new one, never a half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise CourseError(
            f"{path} cannot be written ({error.strerror}): make room, or see that the folder is "
            "yours, and build again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
