"""The gradebook agrees with the journal, and nothing that a person gave is ever lost."""

import csv
import io
import json
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from course.build import solution_notebook
from course.classroom import init, release
from course.grade import gradebook as module
from course.grade.gradebook import (
    Memory,
    as_csv,
    keep_notebook,
    notebook_path,
    open_classroom,
    read_csv,
    rebuild,
    write_gradebook,
    written_comments,
)
from course.grade.journal import STATE, Journal, read_results
from course.grade.records import COLUMNS, Result, Row
from course.source import CourseError, read_week

WEEKS = Path(__file__).parent.parent / "weeks"
WEEK = "w99_sample"
CHECKS = (
    ("softmax-example", "softmax", "example", 2.0),
    ("softmax-overflow", "softmax", "overflow", 1.0),
    ("running_mean-example", "running_mean", "example", 2.0),
)


def result(student="ada", points=(2.0, 1.0, 0.0), **changes):
    rows = [
        Row(name, exercise, check, got, of, "passed" if got else "failed", "" if got else "no")
        for (name, exercise, check, of), got in zip(CHECKS, points, strict=True)
    ]
    rows.append(Row("why_max", "why_max", "written", None, 2.0, "to mark"))
    return replace(Result(student, WEEK, "notebook", "tests", tuple(rows)), **changes)


def damaged(student="dee", reason="the file is empty"):
    rows = [Row(*check[:3], 0.0, check[3], "damaged", reason, said=reason) for check in CHECKS]
    rows.append(Row("why_max", "why_max", "written", 0.0, 2.0, "damaged", reason, said=reason))
    return Result(student, WEEK, "broken", "tests", tuple(rows))


def refused(student="eve"):
    row = Row("", "", "", 0.0, 0.0, "refused", "the course has no week 'homework'")
    return Result(student, "homework", "x", "", (row,))


def by_key(*results):
    return {one.key: one for one in results}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder of grades without students, made once: nbgrader takes seconds to make one."""
    out = tmp_path_factory.mktemp("template") / "out"
    open_classroom(out, [WEEK], WEEKS)
    return out


@pytest.fixture(autouse=True)
def a_gradebook_is_made_without_alembic(template, monkeypatch):
    """nbgrader asks alembic each time, in a second, for a word that the first gradebook has."""
    with closing(sqlite3.connect(template / "gradebook.db")) as opened:
        (version,) = opened.execute("SELECT version_num FROM alembic_version").fetchone()
    monkeypatch.setattr("nbgrader.api.get_alembic_version", lambda: version)


@pytest.fixture
def out(template, tmp_path):
    return shutil.copytree(template, tmp_path / "out")


@contextmanager
def gradebook(out):
    """nbgrader's own view of the gradebook."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{out / 'gradebook.db'}", "mmlearn") as opened:
        yield opened


def scores(out):
    with gradebook(out) as opened:
        return {s.student.id: s.score for s in opened.assignment_submissions(WEEK)}


def mark(out, student="ada", cell="why_max", points=1.5, extra=None, comment=None):
    """What formgrader does when a person types a score and a comment."""
    with gradebook(out) as opened:
        grade = opened.find_grade(cell, WEEK, WEEK, student)
        grade.manual_score, grade.extra_credit, grade.needs_manual_grade = points, extra, False
        if comment:
            opened.find_comment("softmax", WEEK, WEEK, student).manual_comment = comment
        opened.db.commit()


def row_of(rows, student="ada", exercise="why_max", check="written"):
    (row,) = (
        r for r in rows if (r["student"], r["exercise"], r["check"]) == (student, exercise, check)
    )
    return row["points"], row["status"], row["reason"]


# Entered


def test_nbgrader_reads_the_scores_that_the_journal_has(out):
    results = by_key(result(), result("ben", (0.0, 0.0, 0.0)), damaged(), refused())
    rows = write_gradebook(out, results)
    assert scores(out) == {"ada": 3.0, "ben": 0.0, "dee": 0.0}
    assert sum(float(row["points"] or 0) for row in rows) == 3.0
    with gradebook(out) as opened:
        for submission in opened.assignment_submissions(WEEK):
            assert submission.max_score == 7.0
            assert submission.needs_manual_grade == (submission.student.id != "dee")
            (notebook,) = submission.notebooks
            given = {grade.name: grade.auto_score for grade in notebook.grades}
            rows_of = results[submission.student.id, WEEK].rows
            assert given == {row.grade_id: row.points for row in rows_of}
        assert {s.id for s in opened.students} == {"ada", "ben", "dee"}


def test_every_submission_has_its_rows_in_order_also_what_the_gradebook_has_no_place_for(out):
    rows = write_gradebook(out, by_key(refused(), result("ben"), result()))
    assert [row["student"] for row in rows] == ["ada"] * 4 + ["ben"] * 4 + ["eve"]
    assert tuple(rows[0]) == COLUMNS
    assert row_of(rows, "ada", "softmax", "example") == ("2", "passed", "")
    assert row_of(rows, "ada") == ("", "to mark", "")
    assert row_of(rows, "eve", "", "")[1:] == ("refused", "the course has no week 'homework'")


def test_in_parts_or_at_once_and_twice_over_makes_no_difference(out, tmp_path, monkeypatch):
    class_ = [result(f"s{number}", (2.0, number % 2, 0.0)) for number in range(7)]
    other = shutil.copytree(out, tmp_path / "other")
    rows = write_gradebook(out, by_key(*class_))
    monkeypatch.setattr(module, "BATCH", 3)
    for one in class_:
        write_gradebook(other, by_key(one))
    assert write_gradebook(other, by_key(*class_)) == rows
    assert scores(other) == scores(out)
    before = (out / "gradebook.db").read_bytes()
    write_gradebook(out, by_key(*class_))
    assert (out / "gradebook.db").read_bytes() == before, "something was written twice"


def test_a_regrade_replaces_what_the_checks_gave(out):
    write_gradebook(out, by_key(result(), result("ben")))
    write_gradebook(out, by_key(result(points=(2.0, 0.0, 2.0), tests_digest="new")))
    assert scores(out) == {"ada": 4.0, "ben": 3.0}
    write_gradebook(out, by_key(damaged("ada")))
    assert scores(out) == {"ada": 0.0, "ben": 3.0}
    with gradebook(out) as opened:
        assert not opened.find_submission(WEEK, "ada").needs_manual_grade


def test_an_odd_name_is_a_name_like_any_other(out):
    names = ["Zoë [*] {x}", "o'neill; drop table grade", "=1+1", "名前", "a" * 120]
    write_gradebook(out, by_key(*map(result, names)))
    assert scores(out) == dict.fromkeys(names, 3.0)


# What a person gave


def test_marks_given_by_hand_are_kept_and_come_into_the_csv(out):
    write_gradebook(out, by_key(result(), result("ben")))
    mark(out, comment="Well done.")
    mark(out, "ben", "softmax-example", None, extra=0.5)
    rows = write_gradebook(out, by_key(result(), result("ben")))
    assert row_of(rows) == ("1.5", "marked", "")
    assert row_of(rows, "ben", "softmax", "example") == ("2.5", "marked", "")
    assert scores(out) == {"ada": 4.5, "ben": 3.5}
    with gradebook(out) as opened:
        assert opened.find_comment("softmax", WEEK, WEEK, "ada").comment == "Well done."
        assert not opened.find_grade("why_max", WEEK, WEEK, "ada").needs_manual_grade


def test_what_a_person_wrote_is_there_for_the_students_page(out):
    assert written_comments(out) == {}
    write_gradebook(out, by_key(result(), result("ben")))
    mark(out, comment="Well done.")
    mark(out, "ben", comment=" ")
    write_gradebook(out, by_key(result("ben")))
    assert written_comments(out) == {("ada", WEEK): {"softmax": "Well done."}}


@pytest.mark.parametrize(
    ("cell", "again", "look"),
    [
        ("why_max", result(submission_digest="another"), True),
        ("why_max", result(tests_digest="another"), False),
        ("softmax-example", result(tests_digest="another"), True),
        ("softmax-example", result(seconds={"total": 3.0}), False),
        ("why_max", damaged("ada"), True),
    ],
)
def test_a_mark_is_up_for_another_look_when_what_it_was_given_for_has_changed(
    out, cell, again, look
):
    write_gradebook(out, by_key(result()))
    mark(out, cell=cell, comment="Well done.")
    rows = write_gradebook(out, by_key(again))
    exercise, check = ("why_max", "written") if cell == "why_max" else ("softmax", "example")
    expected = ("1.5", "marked", "marked before it changed" if look else "")
    assert row_of(rows, "ada", exercise, check) == expected
    assert row_of(write_gradebook(out, by_key(again)), "ada", exercise, check) == expected
    with gradebook(out) as opened:
        grade = opened.find_grade(cell, WEEK, WEEK, "ada")
        assert (grade.manual_score, grade.needs_manual_grade) == (1.5, look)
        assert opened.find_comment("softmax", WEEK, WEEK, "ada").comment == "Well done."
    mark(out, cell=cell, points=1.0)  # a person looked
    rows = write_gradebook(out, by_key(again))
    assert row_of(rows, "ada", exercise, check) == ("1", "marked", "")


def test_a_changed_notebook_is_noticed_also_when_the_run_was_killed_before_the_gradebook(out):
    with Journal(out) as journal:
        journal.append(result())
        write_gradebook(out, journal.results())
    mark(out)
    with Journal(out) as journal:
        journal.append(result(submission_digest="another"))  # killed here
    with Journal(out) as journal:
        rows = write_gradebook(out, journal.results())
    assert row_of(rows) == ("1.5", "marked", "marked before it changed")


def test_marks_from_before_the_grader_knew_the_class_are_kept(out):
    with gradebook(out) as opened:
        opened.add_student("ada")
        with opened.db.no_autoflush:
            opened.add_submission(WEEK, "ada")
    mark(out)
    rows = write_gradebook(out, by_key(result()))
    assert row_of(rows) == ("1.5", "marked", "marked before it changed")
    assert scores(out) == {"ada": 4.5}


def test_comments_say_what_a_student_may_read_and_nothing_in_them_can_run(out):
    rows = list(result().rows)
    rows[0] = replace(rows[0], said="It raised <script>alert(1)</script> & more", reason="secret")
    mended = {"": "the file was UTF-16", "softmax": "the cell was there twice; the last one counts"}
    write_gradebook(out, by_key(result(rows=tuple(rows), notes=mended), result("ben"), damaged()))
    with gradebook(out) as opened:

        def comment(student, cell):
            return opened.find_comment(cell, WEEK, WEEK, student).comment

        assert comment("ada", "softmax") == (
            "The file was UTF-16\n\nThe cell was there twice; the last one counts\n\n"
            "It raised &lt;script&gt;alert(1)&lt;/script&gt; &amp; more"
        )
        assert comment("ben", "softmax") is None
        assert comment("dee", "running_mean") == "The file is empty"


# Other programs


def test_a_gradebook_that_formgrader_has_open_is_written_in_place(out):
    write_gradebook(out, by_key(result()))
    with gradebook(out) as open_all_the_time:
        grade = open_all_the_time.find_grade("why_max", WEEK, WEEK, "ada")
        write_gradebook(out, by_key(result(points=(2.0, 1.0, 2.0)), result("ben")))
        open_all_the_time.db.rollback()
        assert open_all_the_time.find_submission(WEEK, "ben").score == 3.0
        grade.manual_score, grade.needs_manual_grade = 2.0, False
        open_all_the_time.db.commit()
    assert row_of(write_gradebook(out, by_key(result()))) == ("2", "marked", "")


def test_nobody_can_mark_between_what_is_read_and_what_is_written(out, monkeypatch):
    write_gradebook(out, by_key(result()))
    read = module._weeks

    def meanwhile(db):
        with (
            closing(sqlite3.connect(out / "gradebook.db", timeout=0)) as other,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            other.execute("UPDATE grade SET manual_score = 1")
        return read(db)

    monkeypatch.setattr(module, "_weeks", meanwhile)
    write_gradebook(out, by_key(result()))


@pytest.mark.parametrize("kind", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_locked_gradebook_is_waited_for_and_then_one_sentence(out, monkeypatch, kind):
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    write_gradebook(out, by_key(result()))
    with closing(sqlite3.connect(out / "gradebook.db")) as other:
        other.execute(f"BEGIN {kind}")
        with pytest.raises(CourseError, match=r"in use by another program \(formgrader\?\); every"):
            write_gradebook(out, by_key(result("ben")))
        with pytest.raises(CourseError, match="in use by another program"):
            rebuild(out, by_key(result("ben")), [WEEK], WEEKS)
        with pytest.raises(CourseError, match="in use by another program"):
            module._take_over(
                shutil.copyfile(out / "gradebook.db", out / "new.db"), out / module.NAME
            )
    assert scores(out) == {"ada": 3.0}
    write_gradebook(out, by_key(result("ben")))
    assert scores(out) == {"ada": 3.0, "ben": 3.0}


def test_a_damaged_gradebook_is_one_sentence_and_can_be_made_anew_with_its_marks(out):
    results = by_key(result(), result("ben"))
    write_gradebook(out, results)
    mark(out, comment="Well done.")
    write_gradebook(out, results)
    whole = (out / "gradebook.db").read_bytes()
    (out / "gradebook.db").write_bytes(b"not a database at all" * 1000)
    with pytest.raises(CourseError, match="is damaged"):
        write_gradebook(out, results)
    with pytest.raises(CourseError, match="is damaged"):
        open_classroom(out, [WEEK], WEEKS)
    rows = rebuild(out, results, [WEEK], WEEKS)
    assert row_of(rows) == ("1.5", "marked", "")
    assert scores(out) == {"ada": 4.5, "ben": 3.0}
    assert (out / "gradebook.db.damaged").read_bytes().startswith(b"not a database")
    assert len(whole) > 0


def test_a_disk_that_is_full_leaves_the_gradebook_as_it_was(out):
    import resource

    write_gradebook(out, by_key(result()))
    many = by_key(*(result(f"s{number}") for number in range(300)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (out / "gradebook.db").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10_000, before[1]))
    try:
        with pytest.raises(CourseError, match=r"could not be written .*every grade is safe"):
            write_gradebook(out, many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert scores(out) == {"ada": 3.0}
    write_gradebook(out, many)
    assert len(scores(out)) == 301


# Made anew


def test_a_rebuilt_gradebook_has_the_same_scores_and_marks(out):
    class_ = by_key(result(), result("ben", (0.0, 1.0, 2.0)), damaged(), refused())
    with Journal(out) as journal:
        for one in class_.values():
            journal.append(one)
        write_gradebook(out, journal.results())
        mark(out, extra=0.25, comment="Well done.")
        rows, before = write_gradebook(out, journal.results()), scores(out)
    with Journal(out):
        assert rebuild(out, read_results(out), [WEEK], WEEKS) == rows
    assert scores(out) == before == {"ada": 4.75, "ben": 3.0, "dee": 0.0}
    (out / "gradebook.db").unlink()
    with Journal(out):
        assert rebuild(out, read_results(out), [WEEK], WEEKS) == rows
    assert scores(out) == before
    with gradebook(out) as opened:
        assert opened.find_comment("softmax", WEEK, WEEK, "ada").manual_comment == "Well done."


def test_a_mark_that_was_given_after_the_last_run_survives_a_rebuild(out):
    write_gradebook(out, by_key(result()))
    mark(out)
    assert row_of(rebuild(out, by_key(result()), [WEEK], WEEKS)) == ("1.5", "marked", "")


def test_a_gradebook_that_is_gone_comes_back_with_the_next_run(out):
    write_gradebook(out, by_key(result()))
    mark(out)
    write_gradebook(out, by_key(result()))
    (out / "gradebook.db").unlink()
    open_classroom(out, [], WEEKS)  # a run of other weeks in between forgets nothing
    write_gradebook(out, by_key(result()))
    (out / "gradebook.db").unlink()
    open_classroom(out, [WEEK], WEEKS)
    assert row_of(write_gradebook(out, by_key(result()))) == ("1.5", "marked", "")


def test_a_memory_that_cannot_be_read_costs_another_look_and_no_mark(out):
    write_gradebook(out, by_key(result()))
    mark(out)
    (out / STATE / "given.json").write_text('{"entered": 3}', "utf-8")
    assert Memory.read(out) == Memory()
    rows = write_gradebook(out, by_key(result()))
    assert row_of(rows) == ("1.5", "marked", "marked before it changed")


# A week that changes


def changed_week(tmp_path, old, new):
    folder = tmp_path / "weeks"
    folder.mkdir(exist_ok=True)
    text = (WEEKS / f"{WEEK}.py").read_text("utf-8")
    assert old in text
    (folder / f"{WEEK}.py").write_text(text.replace(old, new), "utf-8")
    return folder


def test_changed_tests_are_taken_into_a_folder_that_the_grader_made(out, tmp_path):
    write_gradebook(out, by_key(result()))
    mark(out)
    folder = changed_week(tmp_path, "points=2 title=", "points=3 title=")
    open_classroom(out, [WEEK], folder)
    rows = write_gradebook(out, by_key(result(points=(3.0, 1.0, 0.0), tests_digest="new")))
    assert row_of(rows) == ("1.5", "marked", "")
    with gradebook(out) as opened:
        submission = opened.find_submission(WEEK, "ada")
        assert (submission.score, submission.max_score) == (5.5, 9.0)


def test_a_week_with_other_checks_gets_a_new_gradebook_with_the_old_marks(out, tmp_path):
    write_gradebook(out, by_key(result(), result("ben")))
    mark(out, comment="Well done.")
    folder = changed_week(tmp_path, 'aspect="overflow"', 'aspect="huge"')
    open_classroom(out, [WEEK], folder)
    rows = list(result().rows)
    rows[1] = replace(rows[1], grade_id="softmax-huge", check="huge")
    again = [replace(result(s), rows=tuple(rows), tests_digest="new") for s in ("ada", "ben")]
    rows = write_gradebook(out, by_key(*again))
    assert row_of(rows) == ("1.5", "marked", "")
    assert scores(out) == {"ada": 4.5, "ben": 3.0}
    with gradebook(out) as opened:
        assert opened.find_grade("softmax-huge", WEEK, WEEK, "ada").auto_score == 1.0
        assert opened.find_comment("softmax", WEEK, WEEK, "ada").comment == "Well done."
    released = nbformat.read(out / "release" / WEEK / f"{WEEK}.ipynb", as_version=4)
    assert "softmax-huge" in {cell.id for cell in released.cells}
    assert not list((out / STATE).glob("work-*"))


def test_an_instructors_classroom_is_used_and_its_weeks_are_not_changed_unasked(tmp_path):
    room = tmp_path / "class"
    init(room)
    release(room, WEEK, WEEKS)
    open_classroom(room, [WEEK], WEEKS)
    write_gradebook(room, by_key(result()))
    mark(room)
    with gradebook(room) as opened:
        opened.add_assignment("an exam of another kind", course_id="mmlearn")
    assert row_of(rebuild(room, by_key(result()), [WEEK], WEEKS)) == ("1.5", "marked", "")
    with gradebook(room) as opened:
        assert opened.find_assignment("an exam of another kind")
    folder = changed_week(tmp_path, "What was new", "What was new today")
    before = (room / "source" / WEEK / f"{WEEK}.ipynb").read_bytes()
    for act in (open_classroom, lambda *given: rebuild(room, {}, *given[1:])):
        with pytest.raises(CourseError, match=f"course release {WEEK} --class"):
            act(room, [WEEK], folder)
    assert (room / "source" / WEEK / f"{WEEK}.ipynb").read_bytes() == before
    assert scores(room) == {"ada": 4.5}


def test_a_classroom_whose_gradebook_is_gone_keeps_its_course_and_its_files(tmp_path, template):
    room = shutil.copytree(template, tmp_path / "class")
    config = (room / "nbgrader_config.py").read_text("utf-8").replace('"mmlearn"', '"mine"')
    (room / "nbgrader_config.py").write_text(config, "utf-8")
    (room / "gradebook.db").unlink()
    open_classroom(room, [WEEK], WEEKS)
    assert (room / "nbgrader_config.py").read_text("utf-8") == config
    with closing(sqlite3.connect(room / "gradebook.db")) as opened:
        courses = {course for (course,) in opened.execute("SELECT id FROM course")}
    assert "mine" in courses
    assert "mmlearn" not in courses


# Notebooks, and formgrader


@pytest.fixture
def executed():
    return nbformat.writes(solution_notebook(read_week(WEEK, WEEKS))).encode()


def test_a_graded_notebook_is_where_formgrader_looks(out, executed):
    keep_notebook(out, result("Zoë [*] {x}"), executed)
    assert notebook_path(out, result("Zoë [*] {x}")).read_bytes() == executed
    assert (out / "autograded" / "Zoë [*] {x}" / WEEK / f"{WEEK}.ipynb").is_file()
    keep_notebook(out, refused(), b"")
    assert not (out / "autograded" / "eve").exists()


@pytest.mark.parametrize("name", ["..", ".", "", "../ada", "a/b", "a\0b"])
def test_no_name_leads_out_of_the_folder(out, name):
    with pytest.raises(ValueError, match="no name for a folder"):
        keep_notebook(out, result(name), b"{}")


def test_a_submission_that_could_not_be_run_is_shown_with_its_reason(out):
    reason = "it holds <img src=\"x\">\u2028import os; \"'''"
    keep_notebook(out, damaged(reason=reason), b"")
    shown = nbformat.read(notebook_path(out, damaged()), as_version=4)
    nbformat.validate(shown)
    first = shown.cells[0]
    assert first.cell_type == "code"
    assert all(line.startswith("#") for line in first.source.splitlines())
    assert 'damaged: it holds <img src="x"> import os' in first.source
    released = nbformat.read(out / "release" / WEEK / f"{WEEK}.ipynb", as_version=4)
    assert shown.cells[1:] == released.cells


def test_a_notebook_for_which_there_is_no_room_is_one_sentence(out, executed, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(CourseError, match=r"No space left on device\); every grade is safe"):
        keep_notebook(out, result(), executed)


def api(out):
    """What formgrader's pages are made from."""
    from nbgrader.apps.api import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory

    with module.nbgrader_at(out) as config:
        return NbGraderAPI(CourseDirectory(config=config), config=config)


@pytest.mark.parametrize("handed_in", [None, "2026-03-01 12:30:00.5 UTC", "yesterday?"])
def test_formgraders_lists_have_every_submission_with_its_score(out, executed, handed_in):
    class_ = by_key(result(), result("ben", (0.0, 0.0, 0.0)), damaged())
    for one in class_.values():
        keep_notebook(out, one, executed if one.outcome == "graded" else b"")
        if handed_in:
            place = out / "submitted" / one.student / WEEK
            place.mkdir(parents=True)
            if handed_in.endswith("UTC"):  # nbgrader itself fails on another text
                (place / "timestamp.txt").write_text(handed_in, "utf-8")
    write_gradebook(out, class_)
    write_gradebook(out, class_)
    listed = {entry["student"]: entry for entry in api(out).get_submissions(WEEK)}
    assert {s: (e["score"], e["autograded"]) for s, e in listed.items()} == {
        "ada": (3.0, True),
        "ben": (0.0, True),
        "dee": (0.0, True),
    }
    (week,) = api(out).get_assignments()
    in_submitted = 3 if handed_in else 0
    assert (week["num_submissions"], week["max_score"]) == (in_submitted, 7.0)
    notebooks = api(out).get_notebook_submissions(WEEK, WEEK)
    assert {(n["student"], n["score"], n["needs_manual_grade"]) for n in notebooks} == {
        ("ada", 3.0, True),
        ("ben", 0.0, True),
        ("dee", 0.0, False),
    }


def test_when_a_notebook_was_handed_in_is_read_from_a_plain_file_only(out, tmp_path):
    write_gradebook(out, by_key(result()))
    place = out / "submitted" / "ada" / WEEK
    place.mkdir(parents=True)
    (tmp_path / "when").write_text("2026-03-01 12:30:00 UTC", "utf-8")

    def when():
        write_gradebook(out, by_key(result()))
        with gradebook(out) as opened:
            return opened.find_submission(WEEK, "ada").timestamp

    (place / "timestamp.txt").symlink_to(tmp_path / "when")
    assert when() is None
    (place / "timestamp.txt").unlink()
    os.mkfifo(place / "timestamp.txt")
    assert when() is None
    (place / "timestamp.txt").unlink()
    (place / "timestamp.txt").write_text("no time at all", "utf-8")
    assert when() is None
    (place / "timestamp.txt").write_text("2026-03-01 12:30:00 UTC", "utf-8")
    assert str(when()) == "2026-03-01 12:30:00"


@contextmanager
def formgrader(out):
    """A headless Jupyter server in OUT; yields a function that asks it, or sends it JSON."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"ServerApp.root_dir": out, "IdentityProvider.token": "key", "ServerApp.port": port}
    command = [sys.executable, "-m", "jupyter", "server", "--no-browser", "--allow-root"]
    command += [f"--{name}={value}" for name, value in options.items()]

    def ask(path, send=None):
        headers = {"Authorization": "token key", "Content-Type": "application/json"}
        body = None if send is None else json.dumps(send).encode()
        method = "GET" if send is None else "PUT"
        address = f"http://127.0.0.1:{port}/{path}"
        request = urllib.request.Request(address, body, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    with (
        open(out.parent / "server.log", "w", encoding="utf-8") as log,
        subprocess.Popen(command, cwd=out, stdout=log, stderr=log) as server,
    ):
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    ask("api/status")
                    break
                except OSError:
                    assert server.poll() is None, "the server ended"
                    assert time.monotonic() < deadline, "the server does not answer"
                    time.sleep(0.2)
            yield ask
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.mark.slow
def test_formgrader_opens_the_result_and_a_mark_typed_into_it_survives_a_regrade(out, executed):
    class_ = by_key(result("Zoë [*] {x}"), damaged(reason="<b>empty</b>"))
    for one in class_.values():
        keep_notebook(out, one, executed if one.outcome == "graded" else b"")
    write_gradebook(out, class_)
    with formgrader(out) as ask:
        listed = json.loads(ask(f"formgrader/api/submitted_notebooks/{WEEK}/{WEEK}"))
        ids = {entry["student"]: entry["id"] for entry in listed}
        assert {(e["student"], e["score"], e["max_score"]) for e in listed} == {
            ("Zoë [*] {x}", 3.0, 7.0),
            ("dee", 0.0, 7.0),
        }
        page = ask(f"formgrader/submissions/{ids['Zoë [*] {x}']}/")
        assert "Why may softmax" in page
        assert 'id="softmax-example"' in page
        page = ask(f"formgrader/submissions/{ids['dee']}/")
        assert "damaged: " in page
        assert "<b>empty</b>" not in page
        grades = json.loads(ask(f"formgrader/api/grades?submission_id={ids['Zoë [*] {x}']}"))
        (written,) = (grade["id"] for grade in grades if grade["name"] == "why_max")
        ask(f"formgrader/api/grade/{written}", {"manual_score": 1.5})
        again = result("Zoë [*] {x}", (2.0, 1.0, 2.0), submission_digest="another")
        write_gradebook(out, by_key(again))
        (entry,) = (
            e
            for e in json.loads(ask(f"formgrader/api/submissions/{WEEK}"))
            if e["student"] != "dee"
        )
        assert (entry["score"], entry["needs_manual_grade"]) == (6.5, True)
        ask(f"formgrader/api/grade/{written}", {"manual_score": 2.0})
    rows = write_gradebook(out, by_key(again, damaged()))
    assert row_of(rows, "Zoë [*] {x}") == ("2", "marked", "")


PROGRAM = """
import sys; from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_gradebook import by_key, result, write_gradebook
classes = [by_key(*(result(f"s{n}", (p, p, p)) for n in range(300))) for p in (0.0, 1.0)]
while True:
    for results in classes:
        write_gradebook(Path(sys.argv[1]), results)
        print("written", flush=True)
"""


@pytest.mark.slow
def test_a_gradebook_is_whole_whenever_the_run_is_killed(out):
    for _ in range(3):
        command = [sys.executable, "-c", PROGRAM, str(out), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline() == "written\n"
                time.sleep(random.uniform(0, 0.3))
            finally:
                process.kill()
        with closing(sqlite3.connect(out / "gradebook.db")) as opened:
            assert opened.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert len(scores(out)) == 300
        assert len(set(scores(out).values())) == 1, "half of a class was entered"
    write_gradebook(out, by_key(*(result(f"s{n}") for n in range(300))))
    assert set(scores(out).values()) == {3.0}


@pytest.mark.slow
def test_nbgraders_own_feedback_works_in_the_folder(out, executed):
    from nbgrader.converters import GenerateFeedback

    from course.classroom import nbgrader_at, run_converter

    keep_notebook(out, result(), executed)
    write_gradebook(out, by_key(result()))
    with nbgrader_at(out) as config:
        run_converter(GenerateFeedback, config, WEEK, "ada")
    page = (out / "feedback" / "ada" / WEEK / f"{WEEK}.html").read_text("utf-8")
    assert "(Score: 3.0 / 7.0)" in page


# grades.csv


def rows_with(text, column="reason"):
    values = ("Zoë", "w1", "e", "c", "-1", "2", "failed", "")
    return [dict(zip(COLUMNS, values, strict=True)) | {column: text}]


def test_the_csv_has_the_columns_that_were_promised_and_survives_odd_text():
    lines = as_csv(rows_with('a "quoted", \ud800 reason')).decode().splitlines()
    assert lines == [
        "student,week,exercise,check,points,max_points,status,reason",
        'Zoë,w1,e,c,-1,2,failed,"a ""quoted"", ? reason"',
    ]


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "＝1", "'=1", "''=1"]


@pytest.mark.parametrize("text", [*FORMULAS, *(f"x;{formula}" for formula in FORMULAS), "a\n=1"])
@pytest.mark.parametrize("column", ["student", "week", "reason"])
def test_no_text_is_a_formula_for_a_spreadsheet(column, text):
    content = as_csv(rows_with(text, column))
    for delimiter in ",;\t":
        lines = csv.reader(io.StringIO(content.decode(), newline=""), delimiter=delimiter)
        cells = [cell for line in lines for cell in line if not cell.startswith("-1,")]
        cells = [cell for cell in cells if cell != "-1"]  # a number in the column of points
        assert not [cell for cell in cells if cell.startswith(tuple("=+-@＝＋－＠\t\r"))]
    assert read_csv(content) == rows_with(text, column)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("'=+-@;\t\n, \"xＡ＝0")), st.text())
@example("'", "=")
def test_what_was_written_is_read_back(student, reason):
    reason = reason.replace("\r", " ").encode("utf-8", "replace").decode()
    rows = rows_with(reason) + rows_with(student, "student")
    assert read_csv(as_csv(rows)) == rows


@pytest.mark.slow
def test_a_thousand_submissions_take_less_than_ten_milliseconds_each(out):
    class_ = by_key(*(result(f"s{number:04}") for number in range(1000)))
    began = time.process_time()
    rows = write_gradebook(out, class_)
    assert (time.process_time() - began) / 1000 < 0.010
    assert len(rows) == 4000
    with closing(sqlite3.connect(out / "gradebook.db")) as opened:
        assert opened.execute("SELECT count(*), sum(auto_score) FROM grade").fetchone() == (
            4000,
            3000.0,
        )
