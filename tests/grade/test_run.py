"""A class gets what it earned, whatever it handed in and however often the grader is stopped."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import psutil
import pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course import grade as module
from course.demo import compare
from course.grade import grade, rebuild, totals
from course.grade.journal import verify_journal
from course.samples import samples, write_class
from course.source import CourseError, read_week

WEEKS = Path(__file__).parents[1] / "weeks"
WEEK = "w99_sample"
KINDS = [
    "right",
    "half_right",
    "missing_cells",
    "untouched",
    "damaged",
    "hostile",
    "wrong-softmax-overflows",
]
QUICK = {"folder": WEEKS, "preload": ()}


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


def files_below(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# A small class, graded once for all tests


def odd_submissions():
    """Submissions that no honest class has, by student."""
    copied = nbformat.reads(content("right").decode(), as_version=4)
    answer = next(cell for cell in copied.cells if cell.id == "softmax")
    copy = answer.copy()
    copy["id"], copy["source"] = "copied", answer.source + "\n# once more"
    copied.cells.insert(copied.cells.index(answer) + 1, copy)
    copied.cells.append(new_code_cell("import warnings\nwarnings.warn('a warning')", id="noise"))
    yield "copied", copied
    yield "someone else", new_notebook(cells=[new_markdown_cell("hello", id="hello")])
    yield "exits", with_answer("softmax", "import os\nos._exit(3)")
    yield (
        "dies later",
        with_answer("softmax", "def softmax(scores):\n    import os\n    os._exit(4)"),
    )


def with_answer(name, code):
    notebook = nbformat.reads(content("right").decode(), as_version=4)
    next(cell for cell in notebook.cells if cell.id == name).source = code
    return notebook


@pytest.fixture(scope="session")
def graded(tmp_path_factory):
    """submitted/ and out/ of one graded class, shared by the processes of a parallel run."""
    folder = tmp_path_factory.getbasetemp().parent / "grade_class"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tmp_path_factory.mktemp("grade") / "class"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            write_class(part / "submitted", [WEEK], KINDS, WEEKS)
            for student, notebook in odd_submissions():
                hand_in(part / "submitted", student, notebook)
            hand_in(part / "submitted", "homework", b"{}", name="essay.ipynb", week="essay")
            before = files_below(part / "submitted")
            summary = grade(part / "submitted", part / "out", **QUICK)
            assert files_below(part / "submitted") == before, "a submission was changed"
            (part / "isolation").write_text(summary.isolation)
            part.rename(folder)
    return folder


@pytest.fixture
def room(graded, tmp_path):
    """A copy of the graded class that a test may change."""
    shutil.copytree(graded, tmp_path / "room")
    return tmp_path / "room"


def test_every_submission_gets_what_it_earned(graded):
    expected = samples(WEEK, WEEKS, KINDS)
    assert list(compare(expected, read_csv(graded / "out"))) == []
    points = totals(read_csv(graded / "out"))
    assert points["copied"][WEEK][0] == 5.0
    assert points["someone else"][WEEK] == (0.0, 7.0, 0.0)
    assert points["exits"][WEEK][0] == points["dies later"][WEEK][0] == 2.0
    rows = rows_of(graded / "out", "exits")
    assert "exit code 3" in rows["softmax-example"]["reason"]
    assert rows["running_mean-example"]["status"] == "passed"
    rows = rows_of(graded / "out", "dies later")
    assert "exit code 4" in rows["softmax-overflow"]["reason"]
    (refused,) = [row for row in read_csv(graded / "out") if row["student"] == "homework"]
    assert (refused["status"], refused["points"]) == ("refused", "0")


def test_every_submission_has_feedback_and_what_ran_has_its_executed_notebook(graded):
    out = graded / "out"
    for student in {row["student"] for row in read_csv(out)} - {"homework"}:
        assert (out / "feedback" / student / f"{WEEK}.html").is_file()
    executed = nbformat.read(out / "autograded" / "right" / WEEK / f"{WEEK}.ipynb", 4)
    nbformat.validate(executed)
    assert "ends the process" not in (out / "report.html").read_text("utf-8")
    assert (out / "report.html").read_text("utf-8").count("half_right")


def test_hidden_tests_are_in_no_file_that_a_student_reads(graded):
    exercise = read_week(WEEK, WEEKS).exercises["softmax"]
    secret = exercise.checks[0].hidden.splitlines()[1].strip()
    assert secret in (graded / "out" / "source" / WEEK / f"{WEEK}.ipynb").read_text("utf-8")
    for path in (graded / "out" / "feedback").rglob("*.html"):
        assert secret not in path.read_text("utf-8")


def test_the_gradebook_agrees_with_the_csv(graded):
    from nbgrader.api import Gradebook

    rows = totals(read_csv(graded / "out"))
    with Gradebook(f"sqlite:///{graded / 'out' / 'gradebook.db'}") as gradebook:
        submissions = gradebook.assignment_submissions(WEEK)
        assert len(submissions) == len(KINDS) + 4
        for submission in submissions:
            earned, possible, waiting = rows[submission.student.id][WEEK]
            assert (submission.score, submission.max_score) == (earned, possible)
            assert submission.needs_manual_grade == bool(waiting)


def test_the_journal_holds_and_says_under_which_isolation(graded):
    lines = (graded / "out" / "journal.jsonl").read_text("utf-8").splitlines()
    assert verify_journal(graded / "out" / "journal.jsonl") == len(lines) == 1 + len(KINDS) + 5
    assert (graded / "isolation").read_text().split(":")[0] in lines[-1]


def test_what_did_not_change_is_not_run_again_and_what_changed_is(room):
    before = read_csv(room / "out")
    told = []

    def on_progress(*numbers):
        told.append(numbers)

    summary = grade(room / "submitted", room / "out", on_progress=on_progress, **QUICK)
    assert (told, summary.graded, summary.kept) == ([(0, 0)], 0, len(KINDS) + 5)
    assert read_csv(room / "out") == before

    hand_in(room / "submitted", "half_right", content("damaged"))
    summary = grade(room / "submitted", room / "out", on_progress=on_progress, **QUICK)
    assert (told[1:], summary.graded) == ([(0, 1), (1, 1)], 1)
    assert {r["status"] for r in rows_of(room / "out", "half_right").values()} == {"damaged"}
    unchanged = [r for r in before if r["student"] != "half_right"]
    assert [r for r in read_csv(room / "out") if r["student"] != "half_right"] == unchanged


def test_marks_given_by_hand_are_kept_and_come_into_the_csv_and_the_feedback(room):
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{room / 'out' / 'gradebook.db'}") as gradebook:
        mark = gradebook.find_grade("why_max", WEEK, WEEK, "right")
        mark.manual_score, mark.needs_manual_grade = 1.5, False
        comment = gradebook.find_comment("softmax", WEEK, WEEK, "right")
        comment.manual_comment = "Very clear code."
        gradebook.db.commit()
    grade(room / "submitted", room / "out", **QUICK)
    row = rows_of(room / "out", "right")["why_max-written"]
    assert (row["points"], row["status"], row["reason"]) == ("1.5", "marked", "")
    page = (room / "out" / "feedback" / "right" / f"{WEEK}.html").read_text("utf-8")
    assert "1.5" in page
    assert "Very clear code." in page

    hand_in(room / "submitted", "right", content("damaged"))
    grade(room / "submitted", room / "out", **QUICK)
    row = rows_of(room / "out", "right")["why_max-written"]
    assert (row["points"], row["reason"]) == ("1.5", "marked before it changed")


def test_a_changed_test_is_run_again_and_the_summary_says_who_moved(room, tmp_path):
    weeks = tmp_path / "weeks"
    shutil.copytree(WEEKS, weeks)
    text = (weeks / f"{WEEK}.py").read_text("utf-8")
    harder = text.replace("(last) - 4.5) < 1e-6", "(last) - 4.5) < 1e-6\nassert 1 + 1 == 3")
    assert harder != text
    (weeks / f"{WEEK}.py").write_text(harder, "utf-8")
    with pytest.raises(CourseError, match="own solution"):
        grade(room / "submitted", room / "out", folder=weeks, preload=())

    easier = text.replace(
        "assert torch.equal(softmax(huge), torch.tensor([[1.0, 0.0]]))", "softmax(huge)"
    )
    assert easier != text
    (weeks / f"{WEEK}.py").write_text(easier, "utf-8")
    summary = grade(room / "submitted", room / "out", folder=weeks, preload=())
    assert "2 students +1" in summary.moved  # and the forgery, of which nothing is asked
    assert "0 down" in summary.moved
    row = rows_of(room / "out", "wrong-softmax-overflows")["softmax-overflow"]
    assert row["status"] == "passed"


def test_everything_derived_is_made_again_from_the_journal_alone(room):
    out = room / "out"
    before = files_below(out / "feedback")
    rows = read_csv(out)
    shutil.rmtree(out / "feedback")
    for name in ("grades.csv", "gradebook.db", "report.html"):
        (out / name).unlink()
    summary = rebuild(out, WEEKS)
    assert summary.kept == len(KINDS) + 5
    assert read_csv(out) == rows
    assert files_below(out / "feedback") == before
    assert (out / "report.html").is_file()
    with pytest.raises(CourseError, match="no journal"):
        rebuild(room / "submitted", WEEKS)


def test_a_week_in_another_version_than_the_courses_is_refused(tmp_path):
    from course.classroom import init, release

    init(tmp_path / "class")
    release(tmp_path / "class", WEEK, WEEKS)
    source = tmp_path / "class" / "source" / WEEK / f"{WEEK}.ipynb"
    source.write_text(source.read_text("utf-8").replace("What was new", "Mine"), "utf-8")
    hand_in(tmp_path / "class" / "submitted", "ada", content("right"))
    with pytest.raises(CourseError, match="course release"):
        grade(tmp_path / "class" / "submitted", tmp_path / "class", **QUICK)


# Bad input


def test_a_missing_or_empty_folder_and_an_unknown_week_are_named(tmp_path):
    with pytest.raises(CourseError, match=r"none"):
        grade(tmp_path / "none", tmp_path / "out", **QUICK)
    (tmp_path / "class").mkdir()
    with pytest.raises(CourseError, match="holds no submission"):
        grade(tmp_path / "class", tmp_path / "out", **QUICK)
    with pytest.raises(CourseError, match="w77"):
        grade(tmp_path / "class", tmp_path / "out", week="w77", **QUICK)
    for name, options in (
        ("--jobs", {"jobs": 0}),
        ("--timeout", {"timeout": 0}),
        ("--memory", {"memory": 10}),
        ("carton", {"isolation": "carton"}),
    ):
        hand_in(tmp_path / "class", "ada", b"{}")
        with pytest.raises(CourseError, match=name):
            grade(tmp_path / "class", tmp_path / "out", **QUICK, **options)
    with pytest.raises(CourseError, match="is inside"):
        grade(tmp_path / "class", tmp_path / "class" / "ada", **QUICK)
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="is a file"):
        grade(tmp_path / "class", tmp_path / "file", **QUICK)


def test_no_sandbox_is_used_only_when_the_instructor_says_that_it_is_meant(tmp_path, capsys):
    from course.__main__ import app

    hand_in(tmp_path / "class", "ada", content("right"))
    with pytest.raises(SystemExit) as ended:
        app(["grade", str(tmp_path / "class"), "--to", str(tmp_path), "--isolation", "process"])
    assert ended.value.code == 2
    assert "--i-trust-these-students" in capsys.readouterr().err


def test_the_secret_is_the_instructors_alone_and_a_damaged_one_is_named(graded, tmp_path):
    secret = graded / "out" / ".grading" / "secret"
    assert secret.stat().st_mode & 0o077 == 0
    assert len(module.secret_of(graded / "out")) == 32
    (tmp_path / ".grading").mkdir()
    (tmp_path / ".grading" / "secret").write_text("not a secret")
    with pytest.raises(CourseError, match="damaged"):
        module.secret_of(tmp_path)


def test_a_table_of_totals_counts_what_waits_for_a_person():
    rows = [
        {"student": "ada", "week": WEEK, "points": "2", "max_points": "3", "status": "passed"},
        {"student": "ada", "week": WEEK, "points": "", "max_points": "2", "status": "to mark"},
    ]
    assert totals(rows) == {"ada": {WEEK: (2.0, 5.0, 2.0)}}


# Runs that are stopped


@contextmanager
def grading(submitted, out):
    """The command `course grade`, running, with the sample week as the course's only week."""
    program = (
        "import sys; from pathlib import Path\n"
        "import course.grade as grade, course.source as source, course.show as show\n"
        f"weeks = Path({str(WEEKS)!r})\n"
        "source.weeks_folder = grade.weeks_folder = lambda folder=None: Path(folder or weeks)\n"
        "grade.PRELOAD = (); whole = grade.grade\n"
        "grade.grade = lambda *a, **k: whole(*a, **k, preload=())\n"
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


def results_in(out):
    with suppress(OSError):
        return (out / "journal.jsonl").read_bytes().count(b',"result":{')
    return 0


def wait_for_results(out, number, running, seconds=60.0):
    until = time.monotonic() + seconds
    while results_in(out) < number and running.poll() is None and time.monotonic() < until:
        time.sleep(0.005)


def processes_in(folder):
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder) in argument for argument in process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_a_run_that_is_interrupted_ends_quietly_and_goes_on(graded, tmp_path):
    students, submitted, out = KINDS[:3], tmp_path / "submitted", tmp_path / "out"
    for student in students:
        shutil.copytree(graded / "submitted" / student, submitted / student)
    with grading(submitted, out) as running:
        # The first is kept when the second is being written, which the signal may undo.
        wait_for_results(out, 2, running)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 3
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert not (out / "grades.csv").exists()
    _, alive = psutil.wait_procs(processes_in(tmp_path), timeout=5)
    assert alive == [], "processes outlived the grader"

    summary = grade(submitted, out, **QUICK)
    assert summary.kept >= 1
    whole = [row for row in read_csv(graded / "out") if row["student"] in students]
    assert read_csv(out) == whole


@pytest.mark.slow
def test_ten_kills_at_random_moments_lose_nothing_and_grade_nothing_twice(graded, tmp_path):
    submitted, out = tmp_path / "submitted", tmp_path / "out"
    shutil.copytree(graded / "submitted", submitted)
    random.seed(20)
    for _ in range(10):
        there = results_in(out)
        with grading(submitted, out) as running:
            if random.random() < 0.7:  # between two submissions, or in one
                wait_for_results(out, there + 1, running)
                time.sleep(random.uniform(0, 0.2))
            else:  # while it starts
                time.sleep(random.uniform(0, 4))
            running.kill()
            running.wait(timeout=60)
    _, alive = psutil.wait_procs(processes_in(tmp_path), timeout=20)
    assert alive == [], "processes outlived the grader"

    grade(submitted, out, **QUICK)
    assert read_csv(out) == read_csv(graded / "out")
    lines = (out / "journal.jsonl").read_text("utf-8").splitlines()
    results = [record["result"] for record in map(json.loads, lines) if "result" in record]
    keys = [(result["student"], result["week"]) for result in results]
    assert len(keys) == len(KINDS) + 5
    assert len(keys) == len(set(keys)), "a submission was graded twice"
    verify_journal(out / "journal.jsonl")
    assert not list((out / ".grading").glob("work-*"))


def test_a_summary_is_json_for_programs(tmp_path, capsys, monkeypatch):
    from course.__main__ import app

    monkeypatch.setattr(module, "weeks_folder", lambda folder=None: WEEKS)
    hand_in(tmp_path / "submitted", "dee", b"{}", name="homework.ipynb", week="homework")
    with pytest.raises(SystemExit) as ended:
        app(["grade", str(tmp_path / "submitted"), "--to", str(tmp_path / "out"), "--json"])
    assert not ended.value.code
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["student"], row["status"]) == ("dee", "refused")
