"""Sample submissions come from the week's source, and say what they should get."""

from pathlib import Path

import nbformat
import pytest

from course.build import student_notebook
from course.demo import compare, demo
from course.samples import KINDS, samples, write_class
from course.source import CourseError, read_week

WEEKS = Path(__file__).parent / "weeks"
WEEK = "w99_sample"


@pytest.fixture(scope="module")
def week():
    return read_week(WEEK, WEEKS)


@pytest.fixture(scope="module")
def made():
    return {sample.student: sample for sample in samples(WEEK, WEEKS)}


def cells(sample):
    return {c.id: c for c in nbformat.reads(sample.content.decode(), as_version=4).cells}


def test_every_wrong_answer_of_the_week_has_a_sample(week, made):
    wrongs = [w for exercise in week.exercises.values() for w in exercise.wrongs]
    assert list(made) == [*KINDS, *(f"wrong-{w.exercise}-{w.name}" for w in wrongs)]


def test_the_right_sample_has_every_solution_and_no_marker(week, made):
    right = made["right"]
    for exercise in week.exercises.values():
        assert cells(right)[exercise.name].source == exercise.solution
    assert "BEGIN SOLUTION" not in right.content.decode()
    assert (right.lowest, right.highest, right.of, right.to_mark) == (5.0, 5.0, 5.0, 1)


def test_a_wrong_sample_differs_from_the_right_one_in_one_answer(made):
    right, wrong = cells(made["right"]), cells(made["wrong-softmax-no_sum"])
    assert {i for i in right if right[i].source != wrong[i].source} == {"softmax"}


def test_a_wrong_answer_loses_at_least_its_cheapest_hidden_check(made):
    # softmax has hidden checks of 2 points and 1 point, running_mean one of 2 points.
    assert (made["wrong-softmax-no_sum"].lowest, made["wrong-softmax-no_sum"].highest) == (2.0, 4.0)
    assert made["wrong-running_mean-last_value"].highest == 3.0


def test_the_untouched_sample_is_the_released_notebook(week, made):
    released = student_notebook(week)
    assert nbformat.reads(made["untouched"].content.decode(), as_version=4) == released
    assert made["untouched"].highest == 0.0


def test_missing_cells_are_an_answer_and_a_check(made):
    gone = set(cells(made["right"])) - set(cells(made["missing_cells"]))
    assert gone == {"softmax", "running_mean-example"}
    assert made["missing_cells"].lowest == 2.0  # the check is put back, the answer is not


def test_the_damaged_sample_breaks_off(made):
    assert made["right"].content.startswith(made["damaged"].content)
    assert len(made["damaged"].content) < len(made["right"].content)


def test_a_class_is_written_in_nbgraders_layout(tmp_path):
    written = write_class(tmp_path / "class", ["99"], ["right", "damaged"], WEEKS)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == [
        tmp_path / "class" / kind / WEEK / f"{WEEK}.ipynb" for kind in ("damaged", "right")
    ]
    assert [sample.as_json()["student"] for sample in written] == ["right", "damaged"]


def test_an_unknown_kind_and_a_file_in_the_way_are_named(tmp_path):
    with pytest.raises(CourseError, match="no sample 'brilliant'; it has right,"):
        samples(WEEK, WEEKS, ["brilliant"])
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(CourseError, match="is a file"):
        write_class(tmp_path / "file", [WEEK], folder=WEEKS)


def test_a_grade_that_is_not_as_expected_is_said():
    row = {"student": "right", "week": WEEK, "points": "4", "status": "passed"}
    right, damaged = samples(WEEK, WEEKS, ["right", "damaged"])
    assert list(compare([right, damaged], [row])) == [
        f"right's {WEEK} got 4 points; it should have got 5.",
        f"damaged's {WEEK} has no grade.",
    ]
    rows = [row | {"points": "5"}, row | {"points": "", "status": "to mark"}]
    assert list(compare([right], rows)) == []


@pytest.mark.slow
def test_the_demo_goes_from_sources_to_a_gradebook(tmp_path, capsys):
    assert demo(tmp_path, WEEKS, ["right", "damaged"]) == 0
    said = capsys.readouterr().out
    assert "5 of 7 (+2?)" in said
    assert "Every submission got what it should have got." in said
    assert "make lab" in said
    for made in (
        f"notebooks/{WEEK}.ipynb",
        f"build/check/{WEEK}.ipynb",
        "build/demo/class/grades.csv",
        f"build/demo/class/feedback/right/{WEEK}.html",
    ):
        assert (tmp_path / made).is_file(), made
