"""The build is one way, deterministic and whole; what learners get holds no answer."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from course import attempts, fingerprints
from course.build import build, solution_notebook, student_notebook
from course.source import STUB, CourseError, read_week, repository

WEEKS = Path(__file__).parent / "weeks"
ROOT = Path(__file__).parent.parent
SAMPLE = (WEEKS / "w99_sample.py").read_text("utf-8")
NAMES = [
    "notebooks/w99_sample.ipynb",
    "solutions/w99_sample.ipynb",
    "mmlearn/fingerprints.json",
]


@pytest.fixture(scope="module")
def week():
    return read_week("99", WEEKS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sample week, built once."""
    folder = tmp_path_factory.mktemp("built")
    build(to=folder, folder=WEEKS)
    return folder


@pytest.fixture
def student(built):
    return nbformat.read(built / NAMES[0], as_version=4)


@pytest.fixture
def weeks(tmp_path):
    """A folder of two weeks to change; its fingerprints are not worked out."""
    folder = tmp_path / "weeks"
    folder.mkdir()
    (folder / "w99_sample.py").write_text(SAMPLE, "utf-8")
    other = SAMPLE.replace("Week 99", "Week 98").replace("w99_sample", "w98_other")
    (folder / "w98_other.py").write_text(other, "utf-8")
    return folder


@pytest.fixture
def recorded(monkeypatch):
    """Which exercises were worked out; instead of running them a value is made up."""
    worked_out = []

    def record(weeks, keys):
        worked_out.extend(sorted(keys))
        return {key: {f"{key}/hand": [{"value": 1.0, "says": "No."}]} for key in keys}

    monkeypatch.setattr(fingerprints, "record_wrong_answers", record)
    return worked_out


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def graded(notebook):
    return {c.metadata.nbgrader.grade_id: c for c in notebook.cells if "nbgrader" in c.metadata}


# What learners get


def test_notebooks_are_valid_and_without_outputs(built):
    for name in NAMES[:2]:
        notebook = nbformat.read(built / name, as_version=4)
        nbformat.validate(notebook)
        assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
        assert not any(cell.get("outputs") for cell in notebook.cells)


def test_the_student_sees_no_answer_hidden_test_wrong_answer_or_mark_scheme(student, week):
    text = "\n".join(cell.source for cell in student.cells)
    for secret in ("keepdim", "register_buffer", "generator", "huge", "_own_work", "factor"):
        assert secret in SAMPLE or secret == "_own_work"
        assert secret not in text
    assert not re.search("(BEGIN|END) (SOLUTION|HIDDEN TESTS|MARK SCHEME)", text)
    for exercise in week.exercises.values():
        for wrong in exercise.wrongs:
            assert wrong.says not in text
            assert wrong.name not in text


def test_the_solved_notebook_holds_everything_but_the_wrong_answers(built, week):
    text = "\n".join(c.source for c in nbformat.read(built / NAMES[1], as_version=4).cells)
    for part in ("keepdim", "huge", "- 1 point: the factor cancels", "Numerator and denominator"):
        assert part in text
    assert not any(w.code in text for e in week.exercises.values() for w in e.wrongs)


def test_graded_cells_carry_their_ids_points_and_locks(student):
    cells = graded(student)
    answer, check, task = cells["softmax"], cells["softmax-example"], cells["why_max"]
    assert list(cells) == [
        "softmax",
        "softmax-example",
        "softmax-overflow",
        "running_mean",
        "running_mean-example",
        "why_max",
    ]
    assert all(cell.id == grade_id for grade_id, cell in cells.items())
    assert (answer.metadata.nbgrader.solution, answer.metadata.nbgrader.grade) == (True, False)
    assert (check.metadata.nbgrader.points, check.metadata.editable) == (2, False)
    assert (task.metadata.nbgrader.task, task.metadata.nbgrader.points) == (True, 2)
    below = student.cells[student.cells.index(task) + 1]
    assert (below.id, below.source) == ("why_max-answer", "YOUR ANSWER HERE")


def test_the_stub_is_the_one_that_source_py_makes(student, week):
    for name, exercise in week.exercises.items():
        assert graded(student)[name].source == f"# Exercise {name}\n{exercise.stub}"
        assert STUB.split("\n")[1] in exercise.stub


def test_headers_say_difficulty_minutes_and_points(student):
    header = next(cell.source for cell in student.cells if "from scores to shares" in cell.source)
    lines = header.split("\n")
    assert lines[0] == "### Exercise: from scores to shares"
    assert lines[2] == "*Difficulty 2 of 5 · about 10 minutes · 3 points*"


def test_a_hidden_check_shows_its_title_and_nothing_else(student):
    assert graded(student)["softmax-overflow"].source == (
        "# Hidden check softmax-overflow, 1 point: survives scores of a thousand.\n"
        "# It runs when your notebook is graded."
    )


def test_tags_that_papermill_and_nbgrader_need_are_kept(student):
    tags = [cell.metadata.get("tags") for cell in student.cells if "tags" in cell.metadata]
    assert tags == [["parameters"], ["experiment"]]


def test_badges_stand_below_the_title_and_point_at_this_repository(student):
    title, badges = student.cells[:2]
    assert title.source.startswith("# Week 99.")
    links = re.findall(r"\[!\[(.+?)\]\(https://.+?\)\]\((.+?)\)", badges.source)
    path = f"{repository()}/blob/main/notebooks/w99_sample.ipynb"
    assert [text for text, _ in links] == ["Open in Colab", "Open in Kaggle"]
    assert links[0][1] == f"https://colab.research.google.com/github/{path}"
    assert links[1][1].endswith(f"src=https://github.com/{path}")


def test_nbgrader_makes_the_same_student_notebook(built, tmp_path):
    source = tmp_path / "source" / "w99_sample"
    source.mkdir(parents=True)
    (source / "w99_sample.ipynb").write_bytes((built / NAMES[1]).read_bytes())
    (tmp_path / "nbgrader_config.py").write_text("")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "nbgrader", "generate_assignment", "w99_sample"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    released = tmp_path / "release" / "w99_sample" / "w99_sample.ipynb"
    assert released.read_bytes() == (built / NAMES[0]).read_bytes()


def test_every_check_refuses_an_answer_that_is_mmlearns_own(built):
    from mmlearn.feedback import fingerprint

    for cell in graded(nbformat.read(built / NAMES[1], as_version=4)).values():
        if cell.metadata.nbgrader.grade:
            hidden = cell.source.split("### BEGIN HIDDEN TESTS")[1]
            name = cell.metadata.nbgrader.grade_id.split("-")[0]
            name = {"running_mean": "RunningMean"}.get(name, name)
            with pytest.raises(AssertionError, match=r"fingerprint comes from mmlearn\.feedback"):
                exec(hidden, {name: fingerprint})


# The first code cell


def setup_cell(notebook):
    return next(cell.source for cell in notebook.cells if cell.id.startswith("setup"))


def run_python(code, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, **options
    )


def test_the_first_cell_needs_only_what_mmlearn_needs(student):
    """Everything that is not a dependency of mmlearn, at any depth, cannot be imported."""
    code = f"""
import importlib.metadata as metadata, re, sys, tomllib
from packaging.requirements import Requirement

def closure(requirements, found):
    for text in requirements:
        requirement = Requirement(text)
        name = re.sub("[-_.]+", "-", requirement.name).lower()
        marker = requirement.marker
        if name in found or (marker and not marker.evaluate({{"extra": ""}})):
            continue
        found.add(name)
        try:
            closure(metadata.requires(name) or [], found)
        except metadata.PackageNotFoundError:
            pass
    return found

project = tomllib.loads(open({str(ROOT / "pyproject.toml")!r}).read())["project"]
allowed = closure(project["dependencies"], set())

class Block:
    owners = metadata.packages_distributions()
    def find_spec(self, name, path=None, target=None):
        owners = {{re.sub("[-_.]+", "-", o).lower() for o in self.owners.get(name, [])}}
        if owners and not owners & (allowed | {{"mmlearn-course"}}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

for name in list(sys.modules):
    if name.split(".")[0] == "packaging":
        del sys.modules[name]
sys.meta_path.insert(0, Block())
try:
    import nbformat
except ModuleNotFoundError:
    print("blocked")
exec({setup_cell(student)!r})
import mmlearn.feedback
"""
    done = run_python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("blocked\nPython 3.")
    assert "torch 2." in done.stdout


def test_the_first_cell_installs_mmlearn_where_it_is_missing_and_never_torch(student):
    code = f"""
import sys

class Block:
    on = True
    def find_spec(self, name, path=None, target=None):
        if self.on and name == "mmlearn":
            raise ModuleNotFoundError("No module named 'mmlearn'", name=name)

class Shell:
    def run_line_magic(self, *line):
        print(line)
        Block.on = False

sys.meta_path.insert(0, Block())
get_ipython = Shell
exec({setup_cell(student)!r})
"""
    done = run_python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    magic, line = eval(done.stdout.split("\n")[0])
    assert magic == "pip"
    assert line.startswith("install -q --no-deps ")
    assert f"mmlearn-course @ git+https://github.com/{repository()}" in line
    assert "torch" not in line


# Files


def test_a_second_build_changes_nothing_and_works_nothing_out(built, monkeypatch):
    monkeypatch.setattr(attempts, "run_jobs", lambda *_, **__: pytest.fail("answers were run"))
    before = snapshot(built)
    result = build(to=built, folder=WEEKS)
    assert result.clean
    assert result.unchanged == NAMES
    assert snapshot(built) == before


def test_another_process_in_another_folder_makes_the_same_bytes(built, tmp_path):
    code = f"from course.build import build; build(to='out', folder={str(WEEKS)!r})"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    done = run_python(code, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes() == (built / name).read_bytes()


def test_fingerprints_hold_values_and_sentences_but_no_code(built, week):
    content = json.loads((built / NAMES[2]).read_text("utf-8"))
    assert content["probes"]["w99_sample/running_mean/hand"][0] == {
        "value": [1.0, 2.0, 6.0],
        "says": "You return the last value. Keep a sum and a count.",
    }
    assert set(content["probes"]) == {
        "w99_sample/softmax/hand",
        "w99_sample/running_mean/hand",
        "w99_sample/running_mean/infinite",
    }
    text = json.dumps(content)
    codes = [w.code for e in week.exercises.values() for w in e.wrongs]
    assert not any(line.strip() in text for code in codes for line in code.split("\n") if line)


def test_only_looking_writes_nothing_and_says_what_would_change(weeks, tmp_path, recorded):
    result = build(to=tmp_path / "out", folder=weeks, check=True)
    assert not result.clean
    assert set(NAMES) < set(result.changed)
    assert not (tmp_path / "out").exists()


def test_only_what_changed_is_written(weeks, tmp_path, recorded):
    out = tmp_path / "out"
    build(to=out, folder=weeks)
    text = SAMPLE.replace("## What was new", "## What was new this week")
    (weeks / "w99_sample.py").write_text(text, "utf-8")
    recorded.clear()
    result = build(to=out, folder=weeks)
    assert result.changed == NAMES[:2]
    assert recorded == []


def test_fingerprints_are_worked_out_again_where_the_text_changed(weeks, tmp_path, recorded):
    out = tmp_path / "out"
    build(to=out, folder=weeks)
    assert len(recorded) == 4
    recorded.clear()
    text = SAMPLE.replace("These are powers", "Those are powers")
    (weeks / "w99_sample.py").write_text(text, "utf-8")
    assert NAMES[2] in build(to=out, folder=weeks).changed
    assert recorded == ["w99_sample/softmax"]
    recorded.clear()
    build(["w98"], to=out, folder=weeks, fresh=True)
    assert recorded == ["w98_other/running_mean", "w98_other/softmax"]
    assert len(json.loads((out / NAMES[2]).read_text("utf-8"))["probes"]) == 4


def test_a_damaged_fingerprint_file_is_made_anew(weeks, tmp_path, recorded):
    out = tmp_path / "out"
    build(to=out, folder=weeks)
    good = (out / NAMES[2]).read_bytes()
    (out / NAMES[2]).write_bytes(b"{ not json")
    build(to=out, folder=weeks)
    assert (out / NAMES[2]).read_bytes() == good


def test_what_remains_of_a_removed_week_is_deleted_and_nothing_else(weeks, tmp_path, recorded):
    out = tmp_path / "out"
    build(to=out, folder=weeks)
    (out / "notebooks" / "my_own.ipynb").write_text("{}")
    (weeks / "w98_other.py").unlink()
    result = build(to=out, folder=weeks)
    assert result.removed == ["notebooks/w98_other.ipynb", "solutions/w98_other.ipynb"]
    assert sorted(path.name for path in (out / "notebooks").iterdir()) == [
        "my_own.ipynb",
        "w99_sample.ipynb",
    ]
    assert "w98_other" not in (out / NAMES[2]).read_text("utf-8")


def test_one_week_can_be_built_alone(weeks, tmp_path, recorded):
    result = build(["98"], to=tmp_path / "out", folder=weeks)
    assert [name for name in result.changed if "w99" in name] == []
    assert recorded == ["w98_other/running_mean", "w98_other/softmax"]


def test_an_error_in_one_week_leaves_every_file_as_it_was(weeks, tmp_path, recorded):
    out = tmp_path / "out"
    build(to=out, folder=weeks)
    before = snapshot(out)
    (weeks / "w98_other.py").write_text("x = 1\n")
    text = SAMPLE.replace("## What was new", "## What was new this week")
    (weeks / "w99_sample.py").write_text(text, "utf-8")
    with pytest.raises(CourseError, match=r"w98_other\.py"):
        build(to=out, folder=weeks)
    assert snapshot(out) == before


def test_a_disk_that_is_full_leaves_no_half_file(weeks, tmp_path, recorded, monkeypatch):
    out = tmp_path / "out"
    build(to=out, folder=weeks)
    before = snapshot(out)
    text = SAMPLE.replace("## What was new", "## What was new this week")
    (weeks / "w99_sample.py").write_text(text, "utf-8")

    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CourseError, match=r"w99_sample\.ipynb cannot be written .*No space left"):
        build(to=out, folder=weeks)
    monkeypatch.undo()
    assert snapshot(out) == before


def test_no_weeks_at_all_is_said(tmp_path):
    with pytest.raises(CourseError, match="no weeks to build"):
        build(to=tmp_path, folder=tmp_path)


def test_building_leaves_the_week_as_it_was(week):
    before = [cell.text for cell in week.cells]
    assert student_notebook(week) == student_notebook(week)
    assert solution_notebook(week) == solution_notebook(week)
    assert [cell.text for cell in week.cells] == before
