"""A class gets what it earned, whatever it handed in and however often the grader is stopped."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

import nbformat
import psutil
import pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_notebook, new_output

from course import grade as module
from course.build import solution_notebook, student_notebook
from course.demo import compare
from course.grade import (
    Damaged,
    Item,
    Plan,
    Result,
    Row,
    Submission,
    Task,
    as_csv,
    find_submissions,
    grade,
    grade_one,
    mend,
    read_notebook,
    read_records,
    score,
    sole_writer,
    totals,
    why,
)
from course.samples import samples, write_class
from course.source import CourseError, read_week

WEEKS = Path(__file__).parent / "weeks"
WEEK = "w99_sample"
CHECKS = ["softmax-example", "softmax-overflow", "running_mean-example"]
KINDS = ["right", "half_right", "missing_cells", "untouched", "damaged", "wrong-softmax-overflows"]


@pytest.fixture(scope="module")
def released():
    return student_notebook(read_week(WEEK, WEEKS))


def content(kind):
    return samples(WEEK, WEEKS, [kind])[0].content


def hand_in(submitted, student, notebook, name=f"{WEEK}.ipynb", week=WEEK):
    path = submitted / student / week / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        notebook if isinstance(notebook, bytes) else nbformat.writes(notebook).encode()
    )
    return path


def read_csv(out):
    with open(out / "grades.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rows_of(out, student):
    return {f"{r['exercise']}-{r['check']}": r for r in read_csv(out) if r["student"] == student}


# What is read before anything runs


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        ("ü".encode("utf-16"), "not UTF-8"),
        (content("right")[:2000], "breaks off or is damaged at line"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "no notebook"),
        (b"{}", "no notebook"),
        (b'{"cells": [{"cell_type": "code"}], "nbformat": 4, "nbformat_minor": 5}', "no valid"),
        (b'{"cells": 3, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}', "no valid"),
    ],
)
def test_a_damaged_file_says_what_is_wrong_with_it(damaged, said):
    with pytest.raises(Damaged, match=said):
        read_notebook(damaged)


def test_older_formats_a_byte_order_mark_and_half_a_character_are_no_damage():
    old = b'{"metadata": {}, "nbformat": 3, "nbformat_minor": 0, "worksheets": []}'
    assert read_notebook(old).nbformat == 4
    assert read_notebook(b"\xef\xbb\xbf" + content("right")).cells
    halved = content("right").replace(b"What was new", b"What was \\ud83d")
    nbformat.writes(read_notebook(halved)).encode()


def test_submissions_are_found_and_what_is_none_is_named(tmp_path):
    hand_in(tmp_path, "ada", b"{}")
    (tmp_path / "ben").mkdir()
    (tmp_path / "ben" / f"{WEEK}.ipynb").write_bytes(b"{}")  # without the week's folder: clear
    hand_in(tmp_path, "cem", b"{}", name="Untitled.ipynb")
    hand_in(tmp_path, "dee", b"{}", week="homework")
    hand_in(tmp_path, "eve", b"{}").unlink()
    (tmp_path / "eve" / WEEK / f"{WEEK}.ipynb").symlink_to(
        tmp_path / "ada" / WEEK / f"{WEEK}.ipynb"
    )
    (tmp_path / "notes.txt").write_text("", "utf-8")
    (tmp_path / ".hidden").mkdir()
    found, ignored = find_submissions(tmp_path, folder=WEEKS)
    assert [(s.student, s.week, s.status) for s in found] == [
        ("ada", WEEK, ""),
        ("ben", WEEK, ""),
        ("cem", WEEK, "damaged"),
        ("dee", "homework", "refused"),
        ("eve", WEEK, "damaged"),
    ]
    problems = [s.problem for s in found]
    assert "Untitled.ipynb" in problems[2]
    assert "no week 'homework'" in problems[3]
    assert "link" in problems[4]
    assert ignored == ["notes.txt"]
    assert len(find_submissions(tmp_path, WEEK, WEEKS)[0]) == 4


def test_a_missing_or_empty_folder_and_an_unknown_week_are_named(tmp_path):
    with pytest.raises(CourseError, match="is no folder"):
        grade(tmp_path / "none", tmp_path / "out", folder=WEEKS)
    (tmp_path / "class").mkdir()
    with pytest.raises(CourseError, match="holds no submission"):
        grade(tmp_path / "class", tmp_path / "out", folder=WEEKS)
    with pytest.raises(CourseError, match="w77"):
        grade(tmp_path / "class", tmp_path / "out", week="w77", folder=WEEKS)
    for name, options in (("--jobs", {"jobs": 0}), ("--timeout", {"timeout": 0})):
        with pytest.raises(CourseError, match=name):
            grade(tmp_path / "class", tmp_path / "out", folder=WEEKS, **options)
    hand_in(tmp_path / "class", "ada", b"{}")
    with pytest.raises(CourseError, match="is inside"):
        grade(tmp_path / "class", tmp_path / "class" / "out", folder=WEEKS)
    assert not list(tmp_path.rglob("out"))


def test_what_the_grader_did_not_foresee_costs_only_that_submission(tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(module, "read_notebook", broken)
    submission = Submission("ada", WEEK, hand_in(tmp_path, "ada", b"{}"))
    plan = Plan.of(WEEK, WEEKS)
    result, _ = grade_one(Task(submission, plan, "", tmp_path, tmp_path, 60.0, WEEKS))
    assert result.outcome == "stopped"
    assert result.rows[0].reason == "the grader failed on it with ZeroDivisionError: a bug"


def test_two_runs_never_write_to_one_folder(tmp_path):
    with (
        sole_writer(tmp_path),
        pytest.raises(CourseError, match="Another run"),
        sole_writer(tmp_path),
    ):
        pass
    with sole_writer(tmp_path):
        pass


def test_what_a_killed_run_left_is_swept_and_an_unreadable_record_counts_as_none(tmp_path):
    (tmp_path / ".grading" / "work-abc" / "0").mkdir(parents=True)
    (tmp_path / ".grading" / "bad.json").write_text('{"format": 1, "student"', "utf-8")
    (tmp_path / ".grading" / "other.json").write_text('{"format": 99}', "utf-8")
    with sole_writer(tmp_path) as records:
        assert not (records / "work-abc").exists()
        assert read_records(records) == {}


# Healing


def graded_cells(notebook):
    return {c.metadata.nbgrader.grade_id: c for c in notebook.cells if "nbgrader" in c.metadata}


def test_an_undamaged_notebook_needs_no_mending(released):
    right = read_notebook(content("right"))
    mended, notes = mend(right, released)
    assert notes == {}
    assert [c.source for c in mended.cells] == [c.source for c in right.cells]


def test_the_last_of_several_copies_is_graded(released):
    copied = read_notebook(content("right"))
    first = next(c for c in copied.cells if c.id == "softmax")
    second = new_code_cell("softmax = None", metadata=deepcopy(first.metadata))
    copied.cells.append(second)
    mended, notes = mend(copied, released)
    assert graded_cells(mended)["softmax"].source == "softmax = None"
    assert sum("nbgrader" in c.metadata for c in mended.cells) == len(graded_cells(released))
    assert "2 times; the last one" in notes["softmax"]


@pytest.mark.parametrize("deleted", [["softmax"], CHECKS[:1], ["softmax", *CHECKS]])
def test_deleted_cells_are_put_back_in_their_order(released, deleted):
    holes = read_notebook(content("right"))
    holes.cells = [c for c in holes.cells if c.id not in deleted]
    mended, notes = mend(holes, released)
    assert list(graded_cells(mended)) == list(graded_cells(released))
    assert set(notes) == set(deleted)
    assert graded_cells(mended)[deleted[0]].source == graded_cells(released)[deleted[0]].source


def test_stripped_and_forged_metadata_become_the_released_ones(released):
    odd = read_notebook(content("right"))
    for cell in odd.cells:
        if cell.id == "softmax-example":
            del cell.metadata["nbgrader"]  # found again by its cell id
        elif cell.id == "softmax-overflow":
            cell.metadata.nbgrader["points"] = 100
        elif cell.id == "running_mean":
            cell.metadata["nbgrader"] = "broken"
    mended, notes = mend(odd, released)
    assert notes == {}
    for grade_id, cell in graded_cells(mended).items():
        assert cell.metadata.nbgrader == graded_cells(released)[grade_id].metadata.nbgrader


def test_a_notebook_of_something_else_is_no_submission(released):
    with pytest.raises(Damaged, match="no graded cell"):
        mend(new_notebook(cells=[new_code_cell("1 + 1")]), released)


# Reasons


def failing(ename, evalue):
    return new_code_cell(
        "", outputs=[new_output("error", ename=ename, evalue=evalue, traceback=[])]
    )


@pytest.mark.parametrize(
    ("check", "answer", "reason"),
    [
        (("AssertionError", "One sentence.\nAnd more."), None, "One sentence."),
        (("AssertionError", ""), None, "it must hold: rows sum to one"),
        (("NotImplementedError", ""), None, "not answered yet (NotImplementedError)"),
        (("CellTimeoutError", ""), None, "it ran longer than one cell may"),
        (("ValueError", "no"), None, "ValueError: no"),
        (
            ("NameError", "name 'f' is not defined"),
            ("SyntaxError", "invalid syntax (cell.py, line 1)"),
            "the answer cell stopped with SyntaxError: invalid syntax (cell.py, line 1)",
        ),
        (("NameError", "name 'g' is not defined"), None, "NameError: name 'g' is not defined"),
    ],
)
def test_a_reason_is_one_line_that_names_the_cause(check, answer, reason):
    item = Item("softmax-law", "softmax", "law", 1.0, "rows sum to one")
    answered = failing(*answer) if answer else new_code_cell("")
    assert why(item, failing(*check), answered) == reason


def test_an_answer_taken_from_mmlearn_earns_nothing_and_is_told_so():
    week = read_week(WEEK, WEEKS)
    executed = solution_notebook(week)
    for cell in executed.cells:
        if cell.id == "softmax":
            cell.source = "from mmlearn.transformer import softmax"
    points = {"softmax-example": 2.0, "softmax-overflow": 1.0, "running_mean-example": 2.0}
    rows, comments = score(Plan.of(WEEK, WEEKS), executed, points, {}, WEEKS)
    assert [row.points for row in rows] == [0.0, 0.0, 2.0, None]
    assert "taken from mmlearn" in rows[0].reason
    assert comments["softmax"] == rows[0].reason


def test_a_table_of_totals_counts_what_waits_for_a_person():
    rows = [
        {"student": "ada", "week": "w1", "points": "1.5", "max_points": "2", "status": "failed"},
        {"student": "ada", "week": "w1", "points": "", "max_points": "3", "status": "to mark"},
    ]
    assert totals(rows) == {"ada": {"w1": (1.5, 5.0, 3.0)}}


def test_the_csv_has_the_columns_that_were_promised_and_survives_odd_text():
    values = ("Zoë", "w1", "e", "c", "1", "2", "failed", 'a "quoted", \ud800 reason')
    names = ["student", "week", "exercise", "check", "points", "max_points", "status", "reason"]
    lines = as_csv([dict(zip(names, values, strict=True))]).decode().splitlines()
    assert lines[0] == ",".join(names)
    assert lines[1].startswith("Zoë,w1,e,c,1,2,failed,")


def test_a_time_limit_ends_the_children():
    program = (
        "import subprocess, sys; from course.grade import time_limit\n"
        "with time_limit(0.5) as rang:\n"
        "    ended = subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(rang.is_set(), ended.returncode)"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"True {-signal.SIGKILL}\n"
    assert time.monotonic() - started < 30


def test_what_all_rows_share_is_the_outcome():
    def result(*statuses):
        return Result("ada", WEEK, "", [Row("", "", "", 0.0, 1.0, s) for s in statuses])

    assert result("passed", "failed", "to mark").outcome == "graded"
    assert result("damaged", "damaged").outcome == "damaged"


# A class


@pytest.fixture(scope="session")
def graded(tmp_path_factory, request):
    """A class and its grades, made once for all worker processes; tests copy what they change."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent
    place = root / "graded"
    with FileLock(root / "graded.lock"):
        if not place.exists():
            submitted = place / "submitted"
            write_class(submitted, [WEEK], KINDS, WEEKS)
            copied = read_notebook(content("right"))
            answer = next(c for c in copied.cells if c.id == "softmax")
            copied.cells.insert(3, new_code_cell("softmax = None", metadata=answer.metadata))
            hand_in(submitted, "copied", copied)
            dies = read_notebook(content("right"))
            next(c for c in dies.cells if c.id == "softmax").source = "import os\nos._exit(1)"
            hand_in(submitted, "dies", dies)
            hand_in(submitted, "Zoë [*] {x}", content("untouched"))
            hand_in(submitted, "homework", b"{}", week="homework")
            (submitted / "nothing" / WEEK).mkdir(parents=True)
            before = contents(submitted)
            grade(submitted, place / "out", folder=WEEKS)
            assert contents(submitted) == before, "a submission was changed"
    return place


@pytest.fixture
def room(graded, tmp_path):
    return shutil.copytree(graded, tmp_path / "room")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_every_submission_gets_what_it_earned(graded):
    out = graded / "out"
    assert list(compare(samples(WEEK, WEEKS, KINDS), read_csv(out))) == []
    assert {r["status"] for r in rows_of(out, "damaged").values()} == {"damaged"}
    assert {r["status"] for r in rows_of(out, "dies").values()} == {"stopped"}
    assert "kernel died" in rows_of(out, "dies")["softmax-example"]["reason"]
    assert {r["status"] for r in rows_of(out, "nothing").values()} == {"damaged"}
    (refused,) = rows_of(out, "homework").values()
    assert (refused["status"], refused["max_points"]) == ("refused", "0")
    untouched = rows_of(out, "Zoë [*] {x}")
    assert untouched["softmax-example"]["reason"].startswith("not answered yet")
    assert untouched["why_max-written"]["status"] == "to mark"
    copied = rows_of(out, "copied")
    assert copied["softmax-example"]["points"] == "2"
    assert "2 times" in copied["softmax-example"]["reason"]


@pytest.mark.slow
def test_every_submission_has_feedback_and_what_ran_has_its_executed_notebook(graded):
    out = graded / "out"
    students = {r["student"] for r in read_csv(out)}
    for student in students - {"homework"}:
        page = (out / "feedback" / student / f"{WEEK}.html").read_text("utf-8")
        assert "<html" in page
    assert "breaks off" in (out / "feedback" / "damaged" / f"{WEEK}.html").read_text("utf-8")
    executed = {path.parent.parent.name for path in out.glob(f"autograded/*/{WEEK}/{WEEK}.ipynb")}
    assert executed == students - {"damaged", "dies", "homework", "nothing"}


@pytest.mark.slow
def test_the_gradebook_agrees_with_the_csv(graded):
    from nbgrader.api import Gradebook

    rows = totals(read_csv(graded / "out"))
    with Gradebook(f"sqlite:///{graded / 'out' / 'gradebook.db'}") as gradebook:
        for submission in gradebook.assignment_submissions(WEEK):
            earned, possible, waiting = rows[submission.student.id][WEEK]
            assert (submission.score, submission.max_score) == (earned, possible)
            assert submission.needs_manual_grade == bool(waiting)


@pytest.mark.slow
def test_what_did_not_change_is_not_run_again_and_what_changed_is(room):
    before = read_csv(room / "out")
    told = []

    def on_progress(*numbers):
        told.append(numbers)

    summary = grade(room / "submitted", room / "out", folder=WEEKS, on_progress=on_progress)
    assert (told, summary.graded, summary.kept) == ([(0, 0)], 0, 11)
    assert read_csv(room / "out") == before

    hand_in(room / "submitted", "half_right", content("damaged"))
    summary = grade(room / "submitted", room / "out", folder=WEEKS, on_progress=on_progress)
    assert (told[1:], summary.graded) == ([(0, 1), (1, 1)], 1)
    assert {r["status"] for r in rows_of(room / "out", "half_right").values()} == {"damaged"}
    unchanged = [r for r in before if r["student"] != "half_right"]
    assert [r for r in read_csv(room / "out") if r["student"] != "half_right"] == unchanged


@pytest.mark.slow
def test_marks_given_by_hand_are_kept_and_come_into_the_csv(room):
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{room / 'out' / 'gradebook.db'}") as gradebook:
        mark = gradebook.find_grade("why_max", WEEK, WEEK, "right")
        mark.manual_score, mark.needs_manual_grade = 1.5, False
        comment = gradebook.find_comment("softmax", WEEK, WEEK, "right")
        comment.manual_comment = "Well done."
        gradebook.db.commit()
    grade(room / "submitted", room / "out", folder=WEEKS)
    row = rows_of(room / "out", "right")["why_max-written"]
    assert (row["points"], row["status"], row["reason"]) == ("1.5", "marked", "")

    hand_in(room / "submitted", "right", content("damaged"))
    grade(room / "submitted", room / "out", folder=WEEKS)
    row = rows_of(room / "out", "right")["why_max-written"]
    assert (row["points"], row["reason"]) == ("1.5", "marked before it changed")
    with Gradebook(f"sqlite:///{room / 'out' / 'gradebook.db'}") as gradebook:
        assert gradebook.find_comment("softmax", WEEK, WEEK, "right").comment == "Well done."
        assert gradebook.find_grade("why_max", WEEK, WEEK, "right").needs_manual_grade


@pytest.mark.slow
def test_a_week_in_another_version_than_the_courses_is_refused(room):
    source = room / "out" / "source" / WEEK / f"{WEEK}.ipynb"
    source.write_text(source.read_text("utf-8").replace("What was new", "Mine"), "utf-8")
    with pytest.raises(CourseError, match="course release"):
        grade(room / "submitted", room / "out", folder=WEEKS)


@contextmanager
def grading(submitted, out):
    """The command `course grade`, running, with the sample week as the course's only week."""
    program = (
        "import sys; from pathlib import Path; import course.source as source\n"
        f"source.weeks_folder = lambda folder=None: Path(folder or {str(WEEKS)!r})\n"
        "from course.__main__ import app; app(sys.argv[1:])"
    )
    arguments = ["grade", str(submitted), "--to", str(out), "--jobs", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def wait_for_records(out, number, running):
    while len(list((out / ".grading").glob("*.json"))) < number:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.05)


def processes_in(folder):
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder) in argument for argument in process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_a_run_that_is_interrupted_and_then_killed_ends_with_the_same_grades(graded, tmp_path):
    students, submitted, out = KINDS[:3], tmp_path / "submitted", tmp_path / "out"
    for student in students:
        shutil.copytree(graded / "submitted" / student, submitted / student)
    with grading(submitted, out) as running:
        wait_for_records(out, 1, running)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 3
    assert "the same command goes on" in said
    assert "submissions that you trust" in " ".join(said.split())
    assert not (out / "grades.csv").exists()

    with grading(submitted, out) as running:
        wait_for_records(out, 2, running)
        os.kill(running.pid, signal.SIGKILL)
        running.wait(timeout=60)
    _, alive = psutil.wait_procs(processes_in(tmp_path), timeout=20)
    assert alive == [], "kernels outlived the grader"

    summary = grade(submitted, out, folder=WEEKS)
    assert summary.kept >= 2
    whole = [row for row in read_csv(graded / "out") if row["student"] in students]
    assert read_csv(out) == whole
    assert not list((out / ".grading").glob("work-*"))


def test_a_summary_is_json_for_programs(tmp_path, capsys, monkeypatch):
    from course.__main__ import app

    monkeypatch.setattr(module, "weeks_folder", lambda folder=None: WEEKS)
    hand_in(tmp_path / "submitted", "dee", b"{}", week="homework")
    with pytest.raises(SystemExit) as ended:
        app(["grade", str(tmp_path / "submitted"), "--to", str(tmp_path / "out"), "--json"])
    assert not ended.value.code
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["student"], row["status"]) == ("dee", "refused")
