"""What was graded stays graded: killed, out of disk, or tampered with."""

import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from course.grade import journal as module
from course.grade.journal import Journal, in_words, moved, read_results, verify_journal
from course.grade.records import Result, Row
from course.source import CourseError

WEEK = "w99_sample"


def result(student="ada", points=2.0, submission="a", **changes):
    rows = (
        Row("softmax-example", "softmax", "example", points, 2.0, "passed", seconds=0.25),
        Row("why_max", "why_max", "written", None, 2.0, "to mark"),
    )
    plain = Result(student, WEEK, submission, "tests", rows, {"": "mended"}, {"cells": 0.5})
    return replace(plain, **changes)


def write(to, *results, **options):
    with Journal(to, **options) as journal:
        for one in results:
            journal.append(one)
    return to / module.NAME


@pytest.fixture
def five(tmp_path):
    """A journal of six lines: its head and five students."""
    return write(tmp_path, *(result(f"s{number}") for number in range(5)))


# What comes back


def test_what_was_appended_is_there_in_the_next_run(tmp_path):
    with Journal(tmp_path) as journal:
        assert dict(journal.results()) == {}
        journal.append(result("ada"))
        journal.append(result("ben"))
        assert journal.results()["ada", WEEK] == result("ada")
    with Journal(tmp_path) as journal:
        assert dict(journal.results()) == {
            ("ada", WEEK): result("ada"),
            ("ben", WEEK): result("ben"),
        }
        assert journal.notice == ""
    assert dict(read_results(tmp_path)) == {(s, WEEK): result(s) for s in ("ada", "ben")}


def test_the_newest_result_of_a_student_counts_and_the_older_ones_stay_in_the_file(tmp_path):
    path = write(tmp_path, result(points=1.0), result("ben"))
    with Journal(tmp_path) as journal:
        before = journal.results()
        journal.append(result(points=2.0))
        assert journal.results()["ada", WEEK].points == 2.0
        assert before["ada", WEEK].points == 1.0, "results that were handed out changed"
    assert len(path.read_bytes().splitlines()) == 4


@example("half \ud800 a character", 1.5, "lines\n\r\u2028\x85\x00", False)
@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=())), st.floats(0, 5), st.text(), st.booleans())
def test_any_text_and_number_comes_back_as_it_was(tmp_path_factory, student, points, reason, none):
    to = tmp_path_factory.mktemp("any")
    row = Row("a", "b", "c", None if none else points, 5.0, "failed", reason, said=student)
    odd = result(student, rows=(row,), notes={reason: student})
    path = write(to, odd, result("next"))
    assert dict(read_results(to)) == {odd.key: odd} | {("next", WEEK): result("next")}
    assert verify_journal(path) == 3


def test_a_line_says_when_it_was_written_and_which_line_it_follows(five):
    lines = [json.loads(line) for line in five.read_bytes().splitlines()]
    assert lines[0]["journal"] == "mmlearn grades"
    assert all(line["time"].endswith("+00:00") for line in lines)
    assert all(after["previous"] == before["hash"] for before, after in pairwise(lines))


def test_the_digests_of_the_weeks_are_noted_again_only_when_they_change(tmp_path):
    path = write(tmp_path, result(), weeks={WEEK: "one"})
    write(tmp_path, weeks={WEEK: "one"})
    write(tmp_path)
    assert verify_journal(path) == 2
    write(tmp_path, weeks={WEEK: "two"})
    write(tmp_path, weeks={"w98_other": "three"})
    write(tmp_path, weeks={WEEK: "two"})
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    noted = [line["weeks"] for line in lines if "weeks" in line]
    assert noted == [{WEEK: "one"}, {WEEK: "two"}, {WEEK: "two", "w98_other": "three"}]


def test_a_result_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    calls = []
    for name in ("write", "fsync", "ftruncate"):
        real = getattr(os, name)

        def spy(file, *rest, name=name, real=real):
            calls.append((name, os.readlink(f"/proc/self/fd/{file}")))
            return real(file, *rest)

        monkeypatch.setattr(os, name, spy)
    with Journal(tmp_path) as journal:
        calls.clear()
        journal.append(result())
        path = str(journal.path)
    assert [call for call in calls if call[1] == path] == [("write", path), ("fsync", path)]


def test_results_of_a_class_are_read_from_the_file_and_not_held_in_memory(tmp_path):
    with Journal(tmp_path) as journal:
        for number in range(200):
            journal.append(result(f"s{number}", notes={"": "x" * 1000}))
        assert sys.getsizeof(journal.results()._places) < 20_000
        assert len(list(journal.results().values())) == 200


# Altered, removed, moved


def altered(lines):
    lines[3] = lines[3].replace(b'"points":2.0', b'"points":9.0', 1)


def altered_by_a_bit(lines):
    lines[3] = lines[3][:80] + bytes([lines[3][80] ^ 1]) + lines[3][81:]


def altered_hash(lines):
    lines[3] = lines[3][:-4] + (b'1"}\n' if lines[3][-4:-3] == b"0" else b'0"}\n')


def removed(lines):
    del lines[3]


def doubled(lines):
    lines.insert(3, lines[2])


def swapped(lines):
    lines[3], lines[4] = lines[4], lines[3]


def emptied(lines):
    lines.insert(3, b"\n")


def no_json(lines):
    lines[3] = b"hello\n"


def without_the_first(lines):
    del lines[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (altered, "Line 4 .* was altered"),
        (altered_by_a_bit, "Line 4 .* was altered"),
        (altered_hash, "Line 4 .* was altered"),
        (removed, "Line 4 .* does not belong after line 3"),
        (doubled, "Line 4 .* does not belong after line 3"),
        (swapped, "Line 4 .* does not belong after line 3"),
        (emptied, "Line 4 .* was altered"),
        (no_json, "Line 4 .* was altered"),
        (without_the_first, "no journal of this grader"),
        (lambda lines: lines.pop(), "ends after line 5, but 6 lines were written"),
        (lambda lines: lines.clear(), "ends after line 0, but 6 lines were written"),
    ],
)
def test_a_line_that_is_not_as_it_was_written_is_named_and_the_run_refused(five, change, said):
    assert verify_journal(five) == verify_journal(five.parent) == 6
    lines = five.read_bytes().splitlines(keepends=True)
    change(lines)
    five.write_bytes(b"".join(lines))
    before = five.read_bytes()
    with pytest.raises(CourseError, match=said):
        verify_journal(five)
    with pytest.raises(CourseError, match=said), Journal(five.parent):
        pass
    with pytest.raises(CourseError, match=said):
        read_results(five.parent)
    assert five.read_bytes() == before, "the evidence was touched"


def test_a_whole_new_chain_is_no_way_to_alter_a_grade_unseen(five, tmp_path_factory):
    forged = write(tmp_path_factory.mktemp("forged"), *(result(f"s{n}", 1.0) for n in range(5)))
    five.write_bytes(forged.read_bytes())
    with pytest.raises(CourseError, match=r"Line 6 .* is not the one that was written there"):
        verify_journal(five)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_changed_byte_goes_unseen(changed_journal, place, by):
    path, good = changed_journal
    place %= len(good)
    path.write_bytes(good[:place] + bytes([good[place] ^ by]) + good[place + 1 :])
    with pytest.raises(CourseError, match=r"altered|version|no journal|breaks off|ends after"):
        verify_journal(path)


@pytest.fixture(scope="module")
def changed_journal(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("changed"), result("ada"), result("ben"))
    return path, path.read_bytes()


def test_a_journal_that_is_missing_or_of_something_else_is_named(tmp_path):
    with pytest.raises(CourseError, match="is not there"):
        verify_journal(tmp_path)
    with pytest.raises(CourseError, match=r"has no journal\.jsonl"):
        read_results(tmp_path)
    (tmp_path / module.NAME).write_text('{"event": "started"}\n', "utf-8")
    with pytest.raises(CourseError, match="no journal of this grader"), Journal(tmp_path):
        pass


def test_a_journal_of_another_version_is_refused_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "VERSION", 2)
    path = write(tmp_path, result())
    before = path.read_bytes()
    monkeypatch.undo()
    with pytest.raises(CourseError, match=r"has format 2.* knows format 1"), Journal(tmp_path):
        pass
    assert path.read_bytes() == before


def test_a_result_of_another_shape_is_named(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append(result())
        journal._append({"result": {"student": "ben", "week": WEEK, "grade": "A"}})
    with pytest.raises(CourseError, match="a result of ben for w99_sample in a form"):
        read_results(tmp_path)["ben", WEEK]


# Killed


@pytest.mark.parametrize("kept", [1, 100, -1])
def test_a_half_written_last_line_is_cut_off_and_kept_aside(five, kept):
    good = five.read_bytes()
    line, _ = module._line({"previous": "", "result": result("late").as_json()})
    five.write_bytes(good + line[:kept])
    with pytest.raises(CourseError, match="breaks off in line 7"):
        verify_journal(five)
    with Journal(five.parent) as journal:
        assert "Line 7" in journal.notice
        assert five.read_bytes() == good
        (aside,) = (five.parent / module.STATE).glob("cut-*")
        assert aside.read_bytes() == line[:kept]
        journal.append(result("late"))
    assert verify_journal(five) == 7
    with Journal(five.parent) as journal:
        assert journal.notice == ""


def test_a_journal_that_ends_in_its_first_line_begins_anew(tmp_path):
    path = tmp_path / module.NAME
    path.write_bytes(b'{"previous":"","time"')
    write(tmp_path, result())
    assert verify_journal(path) == 2


PROGRAM = """
import sys; from pathlib import Path; from course.grade.journal import Journal
from course.grade.records import Result, Row
with Journal(Path(sys.argv[1])) as journal:
    number = len(journal.results())
    while True:
        row = Row("a", "b", "c", 1.0, 1.0, "passed", "x" * 5000)
        journal.append(Result(f"s{number}", "w", "d", "t", (row,)))
        print(number, flush=True); number += 1
"""


@contextmanager
def appending(to):
    """A process that holds the journal of a folder and appends until it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(to)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_nothing_that_was_written_is_lost_when_the_run_is_killed_at_any_moment(tmp_path):
    written = 0
    for _ in range(10):
        with appending(tmp_path) as process:
            process.stdout.readline()
            time.sleep(random.uniform(0, 0.05))
            os.kill(process.pid, signal.SIGKILL)
            said = process.stdout.read().split()
        written = max([written, *map(int, said)])
        with Journal(tmp_path) as journal:
            assert {f"s{number}" for number in range(written + 1)} <= {
                student for student, _ in journal.results()
            }
    lines = verify_journal(tmp_path)
    assert len(read_results(tmp_path)) == lines - 1 >= 10, "something was written twice"


# Two runs


def test_two_runs_never_write_to_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    said = f"Another run \\(process {os.getpid()}\\) is grading into"
    with Journal(tmp_path), pytest.raises(CourseError, match=said), Journal(tmp_path):
        pass
    with Journal(tmp_path):
        pass


def test_the_lock_is_free_again_when_its_holder_was_killed_or_failed(tmp_path):
    with appending(tmp_path) as process:
        process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with Journal(tmp_path) as journal:
            assert len(journal.results()) >= 1
    with pytest.raises(ZeroDivisionError), Journal(tmp_path):
        raise ZeroDivisionError
    with Journal(tmp_path):
        pass


def test_a_lock_that_a_dying_helper_still_holds_is_waited_for(tmp_path):
    with Journal(tmp_path):
        pass
    with open(tmp_path / module.STATE / "lock", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pid = os.fork()
        if pid == 0:  # holds the lock by inheritance, as a helper of a killed run does
            time.sleep(0.3)
            os._exit(0)
    with Journal(tmp_path):
        pass
    os.waitpid(pid, 0)


def test_what_a_killed_run_left_is_swept(tmp_path):
    (tmp_path / module.STATE / "work-abc" / "0").mkdir(parents=True)
    with Journal(tmp_path):
        assert not (tmp_path / module.STATE / "work-abc").exists()


def test_a_line_written_by_another_program_meanwhile_stops_the_run(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append(result("ada"))
        with open(journal.path, "ab") as file:
            file.write(b"mine\n")
        with pytest.raises(CourseError, match="changed by another program"):
            journal.append(result("ben"))


def test_an_out_that_cannot_be_used_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    with (
        pytest.raises(CourseError, match="is a file; --to wants a folder"),
        Journal(tmp_path / "file"),
    ):
        pass
    with (
        pytest.raises(CourseError, match=r"Grading into .* stopped: Not a directory"),
        Journal(tmp_path / "file" / "out"),
    ):
        pass


# A full disk


@contextmanager
def largest_file(size):
    """No file of this process may become longer: a write that would be is cut short, then fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 2, 17, 300, -2, -1])
def test_a_full_disk_loses_no_finished_grade_and_the_next_run_goes_on(five, room):
    good = five.read_bytes()
    line = len(good.splitlines(keepends=True)[-1]) + 2  # "late" is two letters longer than "s4"
    with (
        Journal(five.parent) as journal,
        largest_file(len(good) + (room if room >= 0 else line + room)),
        pytest.raises(CourseError, match="the disk is full; what was graded is kept: make room"),
    ):
        journal.append(result("late"))
    assert five.read_bytes() == good
    assert len(read_results(five.parent)) == 5
    write(five.parent, result("late"))
    assert len(read_results(five.parent)) == 6


def test_the_same_run_can_go_on_when_there_is_room_again(five):
    with Journal(five.parent) as journal:
        with largest_file(five.stat().st_size + 50), pytest.raises(CourseError):
            journal.append(result("late"))
        journal.append(result("late"))
    assert verify_journal(five) == 7


def test_half_a_line_that_could_not_be_taken_back_is_cut_off_by_the_next_run(five, monkeypatch):
    def refuse(*_):
        raise OSError("no")

    with Journal(five.parent) as journal:
        monkeypatch.setattr(os, "ftruncate", refuse)
        with largest_file(five.stat().st_size + 50), pytest.raises(CourseError, match="disk"):
            journal.append(result("late"))
        with pytest.raises(CourseError, match="changed"):
            journal.append(result("later"))
    monkeypatch.undo()
    with Journal(five.parent) as journal:
        assert "Line 7" in journal.notice
        assert len(journal.results()) == 5


def test_a_line_that_the_disk_did_not_take_is_not_counted(five, monkeypatch):
    good = five.read_bytes()

    def fail(_):
        raise OSError(5, "Input/output error")

    with Journal(five.parent) as journal:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(CourseError, match="Input/output error"):
            journal.append(result("late"))
        assert ("late", WEEK) not in journal.results()
    assert five.read_bytes() == good


def test_a_line_that_was_interrupted_is_not_counted(five, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    with Journal(five.parent) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                journal.append(result("late"))
        journal.append(result("later"))
    assert verify_journal(five) == 7
    assert ("late", WEEK) not in read_results(five.parent)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a small disk")
def test_a_small_disk_that_fills_up_keeps_every_grade_that_was_reported(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow root to mount a small disk")
    try:
        many = [result(f"s{number}", notes={"": "x" * 900}) for number in range(100)]
        with pytest.raises(CourseError, match="disk is full"):
            write(small / "out", *many)
        kept = read_results(small / "out")
        assert dict(kept) == {one.key: one for one in many[: len(kept)]}
        assert 10 < len(kept) < 100
        with pytest.raises(CourseError, match="disk is full"):
            write(small / "out", result("more", notes={"": "x" * 9000}))
        assert len(read_results(small / "out")) == len(kept)
    finally:
        subprocess.run(["umount", str(small)], check=True)


# Who moved


def graded(points, submission="a"):
    """Results by student, each with the points of two checks."""
    found = {}
    for student, (one, two) in points.items():
        rows = tuple(
            Row(f"e-{check}", "e", check, got, 5.0, "failed")
            for check, got in (("one", one), ("two", two))
        )
        found[student, WEEK] = Result(student, WEEK, submission, "t", rows)
    return found


def test_a_regrade_says_who_moved_and_by_which_check():
    before = graded({"ada": (1, 1), "ben": (1, 1), "cem": (3, None), "dee": (2, 1), "eve": (1, 0)})
    after = graded({"ada": (2, 1), "ben": (1, 1), "cem": (1, None), "dee": (1, 2), "fay": (1, 1)})
    moves = moved(before, after)
    assert [str(move) for move in moves] == [
        f"ada, {WEEK}: 2 to 3 (e-one +1)",
        f"cem, {WEEK}: 3 to 1 (e-one -2)",
        f"dee, {WEEK}: 3 to 3 (e-one -1, e-two +1)",
    ]
    assert (
        in_words(moves)
        == "1 student +1, 1 student -2, 1 student the same in total from other checks"
    )


def test_a_new_notebook_is_no_move():
    assert moved(graded({"ada": (1, 1)}), graded({"ada": (2, 1)}, submission="b")) == []


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([], "nobody moved"),
        ([1] * 14, "14 students +1, 0 down"),
        ([-0.5], "0 up, 1 student -0.5"),
        ([1, 2, 2], "2 students +2, 1 student +1, 0 down"),
        ([1, 2, 3, 4, 4, -1], "5 students +1 to +4, 1 student -1"),
    ],
)
def test_moves_are_told_in_one_line(gains, said):
    before = graded({f"s{number}": (1, 1) for number in range(len(gains))})
    after = graded({f"s{number}": (1 + gain, 1) for number, gain in enumerate(gains)})
    assert in_words(moved(before, after)) == said


def test_a_sum_that_differs_in_the_last_digit_only_is_no_move():
    assert moved(graded({"ada": (0.3, 0)}), graded({"ada": (0.1 + 0.2, 0)})) == []


@pytest.mark.slow
def test_a_thousand_results_take_less_than_ten_milliseconds_each(tmp_path):
    rows = tuple(
        Row(f"exercise-{n}", "exercise", "aspect", 1.0, 1.0, "passed", "why " * 20, said="x" * 200)
        for n in range(15)
    )
    with Journal(tmp_path) as journal:
        began = time.process_time()
        for number in range(1000):
            journal.append(Result(f"s{number}", WEEK, "a", "t", rows))
        assert (time.process_time() - began) / 1000 < 0.010
    began = time.process_time()
    assert len(list(read_results(tmp_path).values())) == 1000
    assert time.process_time() - began < 5
    assert Path(tmp_path, module.NAME).stat().st_size > 10**6
