"""A classroom is a real nbgrader course directory, proved on nbgrader's own command line."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

from course.build import student_notebook
from course.classroom import init, release
from course.samples import samples
from course.source import CourseError, read_week

WEEKS = Path(__file__).parent / "weeks"
WEEK = "w99_sample"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A classroom with one week, made once: nbgrader takes seconds to make a gradebook."""
    folder = tmp_path_factory.mktemp("template") / "class"
    init(folder)
    release(folder, WEEK, WEEKS)
    return folder


@pytest.fixture
def classroom(template, tmp_path):
    return shutil.copytree(template, tmp_path / "class")


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_classroom_is_left_alone_when_it_is_made_again(classroom):
    config = classroom / "nbgrader_config.py"
    config.write_text(config.read_text("utf-8") + "# mine\n", "utf-8")
    before = files(classroom)
    assert init(classroom) == []
    assert files(classroom) == before


def test_what_is_missing_in_a_classroom_is_made(classroom):
    (classroom / "nbgrader_config.py").unlink()
    (classroom / "submitted").rmdir()
    assert init(classroom) == ["submitted/", "nbgrader_config.py"]


def test_what_students_get_is_the_built_notebook(classroom):
    released = nbformat.read(classroom / "release" / WEEK / f"{WEEK}.ipynb", as_version=4)
    assert released == student_notebook(read_week(WEEK, WEEKS))


def test_releasing_a_week_again_changes_nothing(classroom):
    before = files(classroom)
    assert release(classroom, WEEK, WEEKS) == []
    assert files(classroom) == before


def test_a_source_that_somebody_edited_is_kept_when_the_week_is_released_again(classroom):
    source = classroom / "source" / WEEK / f"{WEEK}.ipynb"
    text = source.read_text("utf-8")
    source.write_text(text.replace("What was new", "What I changed"), "utf-8")
    said = release(classroom, WEEK, WEEKS)
    assert source.read_text("utf-8") == text
    (kept,) = (classroom / "replaced").iterdir()
    assert "What I changed" in kept.read_text("utf-8")
    assert str(kept) in said[0]


def test_a_week_whose_checks_changed_after_grading_is_refused_and_nothing_is_lost(
    classroom, tmp_path
):
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{classroom / 'gradebook.db'}") as gradebook:
        gradebook.add_student("ada")
        with gradebook.db.no_autoflush:  # nbgrader's objects are half made for a moment
            gradebook.add_submission(WEEK, "ada")
    other = tmp_path / "weeks"
    other.mkdir()
    text = (WEEKS / f"{WEEK}.py").read_text("utf-8")
    (other / f"{WEEK}.py").write_text(text.replace('aspect="overflow"', 'aspect="large"'), "utf-8")
    before = files(classroom)
    with pytest.raises(CourseError, match="use a new classroom"):
        release(classroom, WEEK, other)
    after = files(classroom)
    assert {p: c for p, c in after.items() if p in before and p.suffix == ".ipynb"} == {
        p: c for p, c in before.items() if p.suffix == ".ipynb"
    }


def test_no_classroom_an_unknown_week_and_a_file_in_the_way_are_named(tmp_path, classroom):
    with pytest.raises(CourseError, match="is no classroom"):
        release(tmp_path, WEEK, WEEKS)
    with pytest.raises(CourseError, match="w77"):
        release(classroom, "w77_nothing", WEEKS)
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(CourseError, match="is a file"):
        init(tmp_path / "file")


def nbgrader(classroom, *arguments):
    """Run nbgrader as an instructor does, in the classroom, with no environment activated."""
    environment = os.environ | {"PATH": "/usr/bin:/bin", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [BIN / "nbgrader", *arguments],
        cwd=classroom,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_nbgraders_own_commands_work_in_it(classroom):
    (sample,) = samples(WEEK, WEEKS, ["right"])
    notebook = nbformat.reads(sample.content.decode(), as_version=4)
    for cell in notebook.cells:
        if cell.id == "softmax":  # honest noise on stderr, in the answer and so in the check
            cell.source += "\nprecise = softmax\n\n\ndef softmax(scores):\n"
            cell.source += (
                "    import warnings\n    warnings.warn('slow')\n    return precise(scores)"
            )
    handed_in = classroom / "submitted" / "ada" / WEEK / f"{WEEK}.ipynb"
    handed_in.parent.mkdir(parents=True)
    nbformat.write(notebook, handed_in)

    nbgrader(classroom, "generate_assignment", WEEK, "--force")
    nbgrader(classroom, "autograde", WEEK)
    nbgrader(classroom, "generate_feedback", WEEK)
    nbgrader(classroom, "export")

    with open(classroom / "gradebook.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["student_id"], row["score"], row["max_score"]) == ("ada", "5.0", "7.0")
    executed = nbformat.read(
        classroom / "autograded" / "ada" / WEEK / f"{WEEK}.ipynb", as_version=4
    )
    experiments = [c for c in executed.cells if "experiment" in c.metadata.get("tags", [])]
    others = [c for c in executed.cells if c.cell_type == "code" and c not in experiments]
    assert experiments
    assert all(c.execution_count is None for c in experiments)
    assert all(c.execution_count for c in others)
    feedback = classroom / "feedback" / "ada" / WEEK / f"{WEEK}.html"
    assert "Why may softmax" in feedback.read_text("utf-8")


@contextmanager
def jupyter_server(classroom, root):
    """A headless Jupyter server with formgrader, started in the classroom; yields a getter."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"ServerApp.root_dir": root, "IdentityProvider.token": "key", "ServerApp.port": port}
    command = [sys.executable, "-m", "jupyter", "server", "--no-browser", "--allow-root"]
    log = open(classroom.parent / "server.log", "w", encoding="utf-8")  # noqa: SIM115
    server = subprocess.Popen(
        [*command, *(f"--{name}={value}" for name, value in options.items())],
        cwd=classroom,
        env=os.environ | {"PATH": "/usr/bin:/bin"},
        stdout=log,
        stderr=log,
    )

    def get(path):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", headers={"Authorization": "token key"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                get("/api/status")
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.2)
        yield get
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


@pytest.mark.slow
def test_formgrader_lists_the_week_also_when_the_server_is_rooted_above_the_classroom(classroom):
    with jupyter_server(classroom, root=classroom.parent) as get:
        page = get("/formgrader/manage_assignments")
        assert 'var url_prefix = "class"' in page
        (week,) = json.loads(get("/formgrader/api/assignments"))
    assert (week["name"], week["max_score"]) == (WEEK, 7.0)
