"""A check says the same in the author's notebook, under plain nbgrader, and in this grader.

Every solution, every stub and every known wrong answer of every week is tried in the first and the
last. Under nbgrader, which takes seconds for each submission, all are those of the sample week; of
a real week it is one of each kind. One submission holds one wrong answer of each exercise, since no
check depends on another's answer.
"""

import hashlib
from pathlib import Path

import nbformat
import pytest
from nbgrader.api import Gradebook
from nbgrader.converters import Autograde

from course.attempts import job_for, run_jobs
from course.build import student_notebook
from course.classroom import database_url, init, nbgrader_at, release, run_converter
from course.grade.grader import Grader, Settings
from course.samples import filled, samples
from course.source import read_week, week_names

SAMPLES = Path(__file__).parents[1] / "weeks"
WEEKS = [*((None, name) for name in week_names()), (SAMPLES, "w99_sample")]


def submissions_of(week):
    """By name: the answers of a submission, and the name of each answer."""
    most = max(len(exercise.wrongs) for exercise in week.exercises.values())
    made = {"right": {}, "stub": {}} | {f"wrong{n}": {} for n in range(most)}
    for name, exercise in week.exercises.items():
        made["right"][name] = ("solution", exercise.solution)
        made["stub"][name] = ("stub", exercise.stub)
        for n in range(most):
            wrong = exercise.wrongs[n] if n < len(exercise.wrongs) else None
            answer = (wrong.name, wrong.code) if wrong else made["right"][name]
            made[f"wrong{n}"][name] = answer
    return made


def in_the_notebook(week, submissions):
    """Points by submission and check, from running each check as a cell (as `course verify`)."""
    jobs = []
    for name, exercise in week.exercises.items():
        answers = dict(answers[name] for answers in submissions.values())
        placed = [(answer, exercise.answer.line, code) for answer, code in answers.items()]
        jobs.append(job_for(week, exercise, placed))
    ran = {result["key"].split("/")[1]: result["answers"] for result in run_jobs(jobs)}
    return {
        student: {
            check.grade_id: float(check.points)
            * (ran[name][answers[name][0]][0]["checks"][check.grade_id]["whole"]["error"] is None)
            for name, exercise in week.exercises.items()
            for check in exercise.checks
        }
        for student, answers in submissions.items()
    }


def under_nbgrader(week, notebooks, room, folder):
    init(room)
    release(room, week.name, folder)
    for student, content in notebooks.items():
        path = room / "submitted" / student / week.name / f"{week.name}.ipynb"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    with nbgrader_at(room) as config:
        run_converter(Autograde, config, week.name, "*")
        with Gradebook(database_url(room)) as gradebook:
            return {
                student: {
                    grade.name: grade.auto_score
                    for grade in gradebook.find_submission_notebook(
                        week.name, week.name, student
                    ).grades
                    if grade.auto_score is not None
                }
                for student in notebooks
            }


def in_this_grader(week, notebooks, folder):
    with Grader(Settings(hashlib.sha256(b"three places").digest(), folder)) as grader:
        graded = {s: grader.grade(s, week.name, content)[0] for s, content in notebooks.items()}
    return {
        student: {row.grade_id: row.points for row in result.rows if row.points is not None}
        for student, result in graded.items()
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
@pytest.mark.parametrize(("folder", "name"), WEEKS, ids=[name for _, name in WEEKS])
def test_every_answer_gets_the_same_points_in_all_three_places(folder, name, tmp_path):
    week = read_week(name, folder)
    submissions = submissions_of(week)
    notebooks = {
        student: nbformat.writes(
            filled(
                week, student_notebook(week), {name: code for name, (_, code) in answers.items()}
            )
        ).encode()
        for student, answers in submissions.items()
    }
    author = in_the_notebook(week, submissions)
    assert sum(author["right"].values()) == sum(e.points for e in week.exercises.values())
    assert sum(author["stub"].values()) == 0
    assert in_this_grader(week, notebooks, folder) == author
    tried = notebooks.keys() if folder else ("right", "stub", "wrong0")
    under = under_nbgrader(week, {name: notebooks[name] for name in tried}, tmp_path, folder)
    assert under == {name: author[name] for name in tried}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
def test_a_forgery_that_earns_everything_under_nbgrader_earns_nothing_here(tmp_path):
    week = read_week("w99_sample", SAMPLES)
    (hostile,) = samples("w99_sample", SAMPLES, ["hostile"])
    notebooks = {"hostile": hostile.content}
    full = {check.grade_id: check.points for e in week.exercises.values() for check in e.checks}
    assert under_nbgrader(week, notebooks, tmp_path, SAMPLES) == {"hostile": full}
    assert in_this_grader(week, notebooks, SAMPLES) == {"hostile": dict.fromkeys(full, 0.0)}
