"""An nbgrader course directory: made once, then a week at a time.

    init     CLASS/nbgrader_config.py, source/, submitted/, gradebook.db
    release  CLASS/source/WEEK/WEEK.ipynb, then nbgrader's generate_assignment writes
             CLASS/release/WEEK/WEEK.ipynb, which is what students get

From there on it is a course directory like any other: `nbgrader autograde`, `generate_feedback`,
`export` and formgrader work in it, and `python -m course grade CLASS/submitted --to CLASS` puts its
grades into the same gradebook.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from course.source import CourseError, read_week, resolve_week

CONFIG_NAME = "nbgrader_config.py"
COURSE_ID = "mmlearn"

CONFIG = '''"""How nbgrader grades this course. `python -m course init` wrote it; it is yours."""

from pathlib import Path

c = get_config()  # noqa: F821

c.CourseDirectory.course_id = "{course_id}"
# Absolute, so that nbgrader and formgrader find this folder whatever folder they are started in.
# formgrader shows only an error page when the Jupyter server's root is not this folder or above it.
c.CourseDirectory.root = str(Path(__file__).resolve().parent)

# Training and plots belong to the lesson, not to the grade: they are not run again when grading.
c.Execute.skip_cells_with_tag = "experiment"
# Seconds that one cell may run.
c.Execute.timeout = 60
# Or each kernel warns on the terminal that its loopback connection is not encrypted.
c.Execute.extra_arguments = ["--IPKernelApp.log_level=ERROR"]
# nbgrader gives no points to a check that prints to stderr. A warning is no wrong answer.
c.IgnorePattern.enabled = True
c.IgnorePattern.pattern = "(?s).*"
# `nbgrader export` writes here; grades.csv is what `python -m course grade` writes.
c.CsvExportPlugin.to = "gradebook.csv"
# A check that a student deleted is put back and counts.
c.OverwriteCells.add_missing_cells = True
'''


def init(folder: Path, course_id: str = COURSE_ID) -> list[str]:
    """Make a classroom; return what was made, in words. In a classroom it makes what is missing.

    Nothing that exists is changed.
    Raises: CourseError, when the folder is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CourseError(f"{folder} is a file; a classroom needs a folder, new or empty.")
    made = []
    for name in ("source", "release", "submitted"):
        if not (folder / name).is_dir():
            (folder / name).mkdir(parents=True)
            made.append(f"{name}/")
    config = folder / CONFIG_NAME
    if not config.exists():
        write_atomically(config, CONFIG.format(course_id=course_id).encode())
        made.append(CONFIG_NAME)
    if not (folder / "gradebook.db").exists():
        from nbgrader.api import Gradebook

        with nbgrader_at(folder) as config:
            Gradebook(database_url(folder), config.CourseDirectory.course_id).close()
        made.append("gradebook.db")
    return made


def release(folder: Path, week: str, weeks_folder: Path | None = None) -> list[str]:
    """Put a week into a classroom and make the students' version; return what changed, in words.

    The same week again changes nothing. A source notebook that differs (the course was updated, or
    somebody edited it here) is kept in replaced/ before the new one takes its place.
    Raises: CourseError, when the folder is no classroom, the week is unknown, or nbgrader refuses.
    """
    folder = Path(folder).resolve()
    require_classroom(folder)
    week = resolve_week(week, weeks_folder)
    new = solved_bytes(week, weeks_folder)
    source = source_path(folder, week)
    released = folder / "release" / week / f"{week}.ipynb"
    before = {path: path.read_bytes() for path in (source, released) if path.exists()}
    said = []
    if (old := before.get(source)) is not None:
        if old == new and released.exists() and _in_gradebook(folder, week):
            return []
        if old != new:
            kept = folder / "replaced" / f"{week}.{hashlib.sha256(old).hexdigest()[:8]}.ipynb"
            write_atomically(kept, old)
            said.append(f"{source.relative_to(folder)} differed; the old one is {kept}")
    write_atomically(source, new)
    from nbgrader.converters import GenerateAssignment

    try:
        with nbgrader_at(folder) as config:
            run_converter(GenerateAssignment, config, week)
    except BaseException as error:
        # nbgrader deletes what it could not make: students keep what they had.
        for path, content in before.items():
            write_atomically(path, content)
        if isinstance(error, CourseError) and "submissions associated" in str(error):
            raise CourseError(
                f"{week} has other checks than the version that {folder} has grades for, and "
                "nbgrader cannot change those; use a new classroom for the new version."
            ) from error
        raise
    said.append(f"{released.relative_to(folder)} is what students get")
    return said


def _in_gradebook(folder: Path, week: str) -> bool:
    from nbgrader.api import Gradebook, MissingEntry

    with nbgrader_at(folder) as config:
        course = config.CourseDirectory.course_id
        with Gradebook(database_url(folder), course) as gradebook:
            try:
                gradebook.find_notebook(week, week)
            except MissingEntry:
                return False
            return True


def require_classroom(folder: Path) -> None:
    """Raises: CourseError, when `init` has not been run there."""
    if not (folder / CONFIG_NAME).is_file():
        raise CourseError(
            f"{folder} is no classroom ({CONFIG_NAME} is missing); "
            f"make one with `python -m course init {folder}`."
        )


def solved_bytes(week: str, weeks_folder: Path | None = None) -> bytes:
    """The solved notebook of a week as a file: nbgrader's source version, hidden checks and all."""
    import nbformat

    from course.build import solution_notebook

    notebook = solution_notebook(read_week(week, weeks_folder))
    return (nbformat.writes(notebook).rstrip("\n") + "\n").encode()


def source_path(folder: Path, week: str) -> Path:
    return Path(folder) / "source" / week / f"{week}.ipynb"


def database_url(folder: Path) -> str:
    return f"sqlite:///{Path(folder).resolve() / 'gradebook.db'}"


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target, then take its place: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)


@contextmanager
def nbgrader_at(folder: Path) -> Iterator:
    """nbgrader's configuration for a classroom, with `alembic` findable while it is in use.

    nbgrader runs alembic from PATH when it makes a gradebook, and it is not on PATH when the
    environment was not activated.
    """
    from traitlets.config import PyFileConfigLoader

    folder = Path(folder).resolve()
    config = PyFileConfigLoader(CONFIG_NAME, path=str(folder)).load_config()
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield config
    finally:
        os.environ["PATH"] = before


def run_converter(converter, config, week: str, student: str | None = None, **settings) -> str:
    """Run one of nbgrader's steps and return its log.

    Raises: CourseError with the sentence that nbgrader logged, when it fails.
    """
    import io

    from nbgrader.coursedir import CourseDirectory
    from traitlets.log import get_logger

    course = CourseDirectory(config=config)
    course.assignment_id = week
    if student is not None:
        course.student_id = student
    step = converter(coursedir=course, config=config)
    step.force = True
    for name, value in settings.items():
        setattr(step, name, value)
    logger, log = get_logger(), io.StringIO()
    handler = logging.StreamHandler(log)
    handlers, level, spreads = logger.handlers, logger.level, logger.propagate
    # nbgrader's log goes into the answer only, not onto the terminal.
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        step.start()
    except Exception as error:
        said = [line for line in log.getvalue().splitlines() if line.strip()]
        cause = next((line for line in reversed(said) if "Error: " in line), str(error))
        raise CourseError(f"nbgrader refused {week}: {cause.strip()}") from error
    finally:
        logger.handlers, logger.propagate = handlers, spreads
        logger.setLevel(level)
    return log.getvalue()
