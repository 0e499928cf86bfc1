"""What one grader does with one submission, beyond what the corpus holds it to."""

import shutil
from pathlib import Path

import nbformat
import pytest

from course.grade.grader import Grader, Settings
from course.grade.records import Limits
from course.samples import samples
from course.source import CourseError

WEEKS = Path(__file__).parents[1] / "weeks"
WEEK = "w99_sample"
HIDDEN = "assert softmax(wide).shape == (2, 3, 5)\n"


def with_hidden(folder, extra):
    """The sample week with one more hidden assert, in a folder of its own."""
    shutil.copytree(WEEKS, folder)
    text = (folder / f"{WEEK}.py").read_text("utf-8")
    assert HIDDEN in text
    (folder / f"{WEEK}.py").write_text(text.replace(HIDDEN, HIDDEN + extra), "utf-8")
    return folder


def right():
    return samples(WEEK, WEEKS, ["right"])[0].content


def with_answer(code):
    notebook = nbformat.reads(right().decode(), as_version=4)
    next(cell for cell in notebook.cells if cell.id == "softmax").source = code
    return nbformat.writes(notebook).encode()


@pytest.mark.slow
def test_a_check_whose_solution_fails_under_the_first_numbers_takes_the_next(tmp_path):
    folder = with_hidden(
        tmp_path / "weeks",
        "torch.manual_seed(5)\nassert torch.rand(()) < 0.5, 'half of all seeds are bad'\n",
    )
    attempts = []
    for number in (0, 1, 2, 3, 0):
        with Grader(Settings(bytes([number]) * 32, folder, Limits(seconds=10))) as grader:
            result, _ = grader.grade("ada", WEEK, right())
            attempts.append(grader.attempts[WEEK, "softmax-example"])
        assert result.points == 5.0
    assert len(set(attempts)) > 1, "some secrets need another try, others do not"
    assert attempts[0] == attempts[-1], "the same secret needs the same"


def test_a_check_that_no_solution_passes_stops_the_run_by_name(tmp_path):
    folder = with_hidden(tmp_path / "weeks", "assert not 'possible'\n")
    with (
        Grader(Settings(b"x" * 32, folder, Limits(seconds=10))) as grader,
        pytest.raises(CourseError, match=r"own solution of w99_sample fails .* softmax-example"),
    ):
        grader.grade("ada", WEEK, right())


def test_an_error_of_a_hidden_part_is_told_to_the_instructor_and_not_to_the_student():
    code = (
        "def softmax(scores):\n"
        "    if scores.dim() == 3 or scores.max() > 10:\n"
        "        raise ValueError(f'I saw {scores.flatten()[:3].tolist()}')\n"
        "    return torch.softmax(scores, -1)\n"
    )
    with Grader(Settings(b"x" * 32, WEEKS, Limits(seconds=10))) as grader:
        result, _ = grader.grade("ada", WEEK, with_answer(code))
    row = result.rows[0]
    assert (row.part, row.said) == ("hidden", "")
    assert row.reason.startswith("the answer raised ValueError: I saw")


def test_an_answer_that_another_cell_takes_from_mmlearn_earns_nothing():
    notebook = nbformat.reads(right().decode(), as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if cell.id == "softmax")
    cell = nbformat.v4.new_code_cell(
        "import mmlearn.metrics as library\nsoftmax = library.softmax", id="sly"
    )
    notebook.cells.insert(place + 1, cell)
    with Grader(Settings(b"x" * 32, WEEKS, Limits(seconds=10))) as grader:
        result, _ = grader.grade("ada", WEEK, nbformat.writes(notebook).encode())
    assert [row.points for row in result.rows[:2]] == [0.0, 0.0]
    assert "is taken from mmlearn.metrics.softmax" in result.rows[0].reason
