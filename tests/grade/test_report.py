"""The page that an instructor reads, made from classes whose numbers are known."""

import random
import re
import tracemalloc
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from course.grade import report
from course.grade.journal import Move
from course.grade.records import Limits, Result, Row
from course.source import read_week

from .browser import Page, needs_chromium, overflow

FOLDER = Path(__file__).resolve().parent.parent / "weeks"
OPEN = "not answered yet (NotImplementedError)"


@cache
def week():
    return read_week("w99_sample", FOLDER)


CHECKS = {c.grade_id: c for e in week().exercises.values() for c in e.checks}


def submission(student, passes, *, reason="it must hold", recognised=(), **more) -> Result:
    """A submission that passes these checks; `reason` is why it fails the others."""
    rows = tuple(
        Row(c.grade_id, c.exercise, c.aspect, float(c.points), float(c.points), "passed")
        if c.grade_id in passes
        else Row(
            c.grade_id, c.exercise, c.aspect, 0.0, float(c.points), "failed", reason,
            recognised=recognised,
        )
        for c in CHECKS.values()
    )  # fmt: skip
    written = Row("why_max", "why_max", "written", None, 2.0, "to mark")
    given = {
        "submission_digest": f"digest of {student}",
        "tests_digest": "cd",
        "seconds": {"cells": 0.2, "checks": 0.1, "total": 0.3},
        "peak_mib": 100.0,
        "tier": "1 bubblewrap",
        "versions": {"python": "3.11"},
    }
    return Result(student, "w99_sample", rows=(*rows, written), **(given | more))


def failed(student, status, reason) -> Result:
    whole = submission(student, CHECKS)
    rows = (replace(r, points=0.0, status=status, reason=reason) for r in whole.rows)
    return replace(whole, rows=tuple(rows))


def page_of(results, **more) -> Page:
    html = report.page(results, {"w99_sample": week()}, **more)
    assert "default-src 'none'" in html
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html)
    page = Page(html)
    assert not [tag for tag, _ in page.elements if tag in ("script", "iframe", "object", "img")]
    assert not [a for _, found in page.elements for a in found if a.startswith("on")]
    return page


EXAMPLE, OVERFLOW, MEAN = "softmax-example", "softmax-overflow", "running_mean-example"


# Numbers


def test_the_correlation_of_a_check_with_the_rest_equals_one_worked_by_hand():
    item = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert report.item_rest(item, [2 * i for i in item]) == pytest.approx(1.0)
    assert report.item_rest(item, [-i for i in item]) == pytest.approx(-1.0)
    # Means 0.5 and 2; products of deviations: 5 × 0.5 × (2.4 − 2) + 5 × 0.5 × (2 − 1.6) = 2;
    # squares: 10 × 0.25 = 2.5 and 10 × (deviations 1, 1, 0, 0, 0 below and above) = 4.
    rest = [3, 3, 2, 2, 2, 1, 1, 2, 2, 2]
    assert report.item_rest(item, rest) == pytest.approx(2 / (2.5 * 4) ** 0.5)


def test_there_is_no_correlation_with_few_submissions_or_where_all_are_alike():
    assert report.item_rest([1, 0] * 4 + [1], [1, 2] * 4 + [1]) is None
    assert report.item_rest([1] * 12, range(12)) is None
    assert report.item_rest([0, 1] * 6, [3] * 12) is None
    assert report.item_rest([0, 1] * 5, [3, 4] * 5) == pytest.approx(1.0)


def test_points_and_difficulty_are_averages_over_those_who_tried():
    students = [submission(f"s{i}", CHECKS) for i in range(3)]
    students += [submission("half", {EXAMPLE}), submission("empty", (), reason=OPEN)]
    students += [failed("torn", "damaged", "the file is empty")]
    page = page_of(students)
    # 5 + 5 + 5 + 2 of 5 points for four who tried.
    assert "w99_sample 6 4 4.2 5.0 5" in page.text
    assert "6 submissions: 4 tried, 1 with nothing answered, 1 damaged." in page.text
    assert (
        "softmax-overflow survives scores of a thousand, 1 point 75% – 1 × it must hold"
        in page.text
    )
    assert "softmax-example numbers you can work by hand, 2 points 100%" in page.text


def test_the_distribution_counts_each_submission_once_and_has_axes_and_a_table():
    groups = {(): 2, (OVERFLOW,): 3, (EXAMPLE, OVERFLOW): 4, tuple(CHECKS): 5}
    students = [
        submission(f"s{passes}{i}", passes) for passes, n in groups.items() for i in range(n)
    ]
    page = page_of(students)
    assert "points from the checks, of 5" in page.text
    titles = re.findall(r"(\d) points: (\d+)", page.text)
    assert titles == [("0", "2"), ("1", "3"), ("2", "0"), ("3", "4"), ("4", "0"), ("5", "5")]
    assert "Points Submissions 0 2 1 3 3 4 5 5" in page.text
    heights = [float(f["height"]) for tag, f in page.elements if tag == "rect"]
    assert [round(h / heights[0] * 2) for h in heights] == [2, 3, 0, 4, 0, 5]
    assert [f.get("role") for tag, f in page.elements if tag == "svg"] == ["img"]


@pytest.mark.parametrize("possible", [1, 5, 22, 26, 60, 100])
@pytest.mark.parametrize("most", [1, 4, 7, 60, 999])
def test_every_bar_lies_inside_the_picture_and_the_grid_reaches_above_it(possible, most):
    points = [possible] * most + [0.0, possible / 3]
    chart = report._chart(points, possible)
    assert sum(bar["count"] for bar in chart["bars"]) == len(points)
    assert len(chart["bars"]) <= report.MOST_BARS
    assert len(chart["grid"]) <= 7
    assert chart["grid"][-1][1] >= max(bar["count"] for bar in chart["bars"])
    for bar in chart["bars"]:
        assert 0 <= bar["y"] <= chart["bottom"]
        assert chart["left"] <= bar["x"] <= chart["right"] - bar["width"] + 1e-6
        assert bar["y"] + bar["height"] == pytest.approx(chart["bottom"], abs=0.2)


# Checks that look wrong


def graded_class(strong, weak):
    """Six strong students and six weak ones, each a set of checks that they pass."""
    students = [submission(f"strong{i}", strong(i)) for i in range(6)]
    return students + [submission(f"weak{i}", weak(i)) for i in range(6)]


def test_a_check_that_strong_students_fail_is_called_probably_bad():
    page = page_of(graded_class(lambda i: {EXAMPLE, MEAN}, lambda i: {OVERFLOW}))
    assert "Look at these checks first" in page.text
    assert "4 of the strongest 4 fail it: probably a bad check" in page.text
    assert page.text.count("probably a bad check") == 1
    suspects = page.text.split("Look at these checks first")[1].split("Exercises")[0]
    assert OVERFLOW in suspects
    assert EXAMPLE not in suspects


def test_a_check_that_nobody_passes_is_named_unless_it_was_left_open():
    nobody = graded_class(lambda i: {EXAMPLE, MEAN}, lambda i: {EXAMPLE})
    assert "nobody passes it" in page_of(nobody).text
    rows = [
        replace(s, rows=tuple(
            replace(r, reason=OPEN) if r.grade_id == OVERFLOW else r for r in s.rows
        ))
        for s in nobody
    ]  # fmt: skip
    assert "Look at these checks first" not in page_of(rows).text


def test_a_check_whose_passers_do_worse_elsewhere_is_named():
    # Four of six strong ones fail it; only two of the strongest four do, which is no majority.
    page = page_of(
        graded_class(
            lambda i: {EXAMPLE, MEAN} | ({OVERFLOW} if i < 2 else set()), lambda i: {OVERFLOW}
        )
    )
    assert "those who fail it do better elsewhere than those who pass it" in page.text
    assert "−0." in page.text


def test_an_ordinary_class_has_no_suspicious_check():
    draw = random.Random(3)
    students = []
    for i in range(60):
        skill = draw.gauss(0, 2)
        students.append(
            submission(
                f"s{i}", {g for k, g in enumerate(CHECKS) if skill + draw.gauss(1 - k, 1) > 0}
            )
        )
    page = page_of(students)
    assert "Look at these checks first" not in page.text
    assert "rough guess" not in page.text
    assert "+0." in page.text


def test_few_submissions_are_told_apart_from_a_finding():
    few = [submission(f"s{i}", (EXAMPLE,)) for i in range(3)]
    text = page_of(few).text
    assert "With 3 submissions it cannot be told; 10 are the fewest." in text
    assert "Look at these checks first" not in text
    some = graded_class(lambda i: set(CHECKS), lambda i: {EXAMPLE})
    assert "With 12 submissions it is a rough guess" in page_of(some).text


def test_a_check_that_everybody_passes_is_said_to_tell_nobody_apart():
    page = page_of(graded_class(lambda i: set(CHECKS), lambda i: {EXAMPLE}))
    assert "Everybody passes softmax-example: fine for an example" in page.text


# What students did


def test_recognised_mistakes_are_counted_by_submission_with_their_sentences():
    says = {w.name: w.says for w in week().exercises["softmax"].wrongs}
    students = [submission(f"a{i}", {MEAN}, recognised=("wrong_axis",)) for i in range(3)]
    students += [submission(f"b{i}", {MEAN}, recognised=("no_sum", "overflows")) for i in range(2)]
    text = page_of(students).text
    assert f"softmax: wrong_axis {says['wrong_axis']} 3" in text, "two checks, one submission"
    assert f"softmax: no_sum or overflows {says['no_sum']} {says['overflows']} 2" in text
    assert text.index("wrong_axis") < text.index("no_sum")


def test_rare_mistakes_are_folded():
    students = [submission(f"s{i}", {MEAN}, recognised=(f"name{i}",)) for i in range(14)]
    assert "4 rarer mistakes" in page_of(students).text


def test_the_commonest_reasons_stand_beside_their_check():
    students = [submission(f"s{i}", (), reason="the rows do not sum to one") for i in range(4)]
    students += [submission("t", (), reason="it must hold: survives scores of a thousand")]
    text = page_of(students).text
    assert "4 × the rows do not sum to one" in text
    assert "1 × an assert without a message" in text


def test_reasons_without_end_take_no_memory_without_end():
    tally = report._Check("a-b", "a", "title", 1.0)
    for i in range(10_000):
        tally.count(Row("a-b", "a", "b", 0.0, 1.0, "failed", f"{i} {'x' * 1000}"))
    assert len(tally.reasons) <= report.MOST_REASONS + 1
    assert tally.reasons.total() == 10_000
    assert max(map(len, tally.reasons)) <= 160


def test_what_broke_or_ran_into_a_limit_is_listed_with_its_reason():
    students = [
        submission("fine", CHECKS),
        submission("loop", {MEAN}, reason="it ran longer than 60 s"),
        failed("torn", "damaged", "the file is empty"),
        failed("dead", "stopped", "it ended the process that graded it"),
    ]
    text = page_of(students).text.split("Submissions that broke")[1].split("Students")[0]
    assert "loop w99_sample softmax it ran longer than 60 s" in text
    assert text.count("ran longer") == 1, "once an exercise, not once a check"
    assert "torn w99_sample damaged the file is empty" in text
    assert "dead w99_sample stopped it ended the process that graded it" in text
    assert "fine" not in text


def test_equal_files_of_two_students_are_named_and_equal_empty_ones_are_not():
    students = [submission(name, CHECKS, submission_digest="same") for name in ("bo", "al")]
    students += [
        submission(name, (), reason=OPEN, submission_digest="released") for name in ("cy", "di")
    ]
    text = page_of(students).text
    assert "w99_sample: al, bo" in text
    assert "cy, di" not in text


def test_what_was_mended_is_listed_by_student():
    text = page_of(
        [submission("ada", CHECKS, notes={"softmax": "Two cells; the last counts."})]
    ).text
    assert "1 repair" in text
    assert "ada, w99_sample: Two cells; the last counts." in text


def test_the_slowest_and_the_largest_are_named_in_order():
    students = [
        submission(f"s{i}", CHECKS, seconds={"cells": i / 2, "checks": 0.0, "total": float(i)},
                   peak_mib=300.0 - i)
        for i in range(1, 21)
    ]  # fmt: skip
    text = page_of(students).text
    times = text.split("The slowest")[1].split("Most memory")[0]
    assert re.findall(r"s\d+ w99", times)[:2] == ["s20 w99", "s19 w99"]
    assert len(re.findall(r"s\d+ w99", times)) == 10
    assert "s20 w99_sample 10.00 s 0.00 s 20.00 s" in times
    assert "Most memory: s1 (w99_sample) 299 MiB, s2" in text
    assert "less than 10.50 s, nineteen of twenty less than 19.00 s" in text


def test_marks_given_by_a_person_are_averaged_and_the_waiting_counted():
    marked = submission("ada", CHECKS)
    rows = tuple(
        replace(r, points=1.0, status="marked") if r.check == "written" else r for r in marked.rows
    )
    text = page_of([replace(marked, rows=rows), submission("bo", CHECKS)]).text
    assert "Written answers marked so far earned 50% of their points." in text
    assert "w99_sample 2 2 5.0 5.0 5 1" in text


def test_a_regrade_says_who_moved_by_which_check():
    moves = [
        Move("ada", "w99_sample", 4.0, 5.0, ((OVERFLOW, 1.0),)),
        Move("bo", "w99_sample", 5.0, 3.0, ((EXAMPLE, -2.0),)),
    ]
    text = page_of(
        [submission("ada", CHECKS)], moved="1 student +1, 1 student -2", moves=moves
    ).text
    assert "1 student +1, 1 student -2. By check: softmax-example of w99_sample 1 down" in text
    assert "softmax-overflow of w99_sample 1 up." in text
    assert "ada w99_sample 4 5" in text
    assert "What the regrade moved" not in page_of([], moved="nobody moved").text


# Around it


def test_how_it_was_graded_is_recorded():
    page = page_of(
        [submission("ada", CHECKS), submission("bo", CHECKS, tier="2 landlock")],
        tier="1 bubblewrap",
        versions={"torch": "2.11.0"},
        limits=Limits(seconds=30),
        secret="a1b2c3d4",
        notices=["A half-written line was cut off."],
    )
    assert "Isolation of this run: 1 bubblewrap." in page.text
    assert "Of all grades: 1 bubblewrap (1), 2 landlock (1)." in page.text
    assert "30 s for a notebook's cells" in page.text
    assert "torch 2.11.0" in page.text
    assert "fingerprint a1b2c3d4" in page.text
    assert "A half-written line was cut off." in page.text


def test_grades_without_isolation_and_grades_of_other_versions_are_warned_of():
    other = submission("bo", CHECKS, versions={"python": "3.12"})
    text = page_of([submission("ada", CHECKS), other], tier="4 process").text
    assert "This run was not isolated" in text
    assert "Regrade before you compare them" in text
    alike = page_of([submission("ada", CHECKS)], tier="1 bubblewrap").text
    assert "not isolated" not in alike
    assert "Regrade" not in alike


def test_each_student_links_to_the_feedback_beside_the_report():
    page = page_of([submission("ada lovelace/…", CHECKS), failed("torn", "damaged", "empty")])
    assert "feedback/ada%20lovelace%2F%E2%80%A6/w99_sample.html" in page.values("href")
    assert "torn damaged" in page.text


def test_an_empty_class_has_a_page():
    assert "There are no submissions yet." in page_of([]).text


def test_a_week_that_the_course_does_not_have_and_odd_rows_are_reported():
    refused = Result("x", "w42_no", "", "", (Row("", "", "", 0.0, 0.0, "refused", "no such week"),))
    old = replace(submission("y", CHECKS), week="w01_old")
    text = page_of([refused, old]).text
    assert "x w42_no refused no such week" in text
    assert "1 submission: 0 tried, 1 refused." in text
    assert "w01_old 1 1 5.0 5.0 5" in text


@pytest.mark.parametrize(
    "evil",
    [
        "<script>alert(1)</script>",
        '"><svg onload=alert(1)>',
        "</title><iframe>",
        "{{ 1 }}",
        "\ud800\x00",
    ],
)
def test_whatever_a_student_writes_is_text(evil):
    broken = failed(evil, "damaged", evil)
    noted = submission(evil + "2", {EXAMPLE}, reason=evil, notes={"": evil}, recognised=(evil,))
    limit = submission(evil + "3", (), reason=f"it ran longer than {evil}", tier=evil)
    move = Move(evil, "w99_sample", 1.0, 2.0, ((evil, 1.0),))
    html = report.page([broken, noted, limit], {"w99_sample": week()}, moves=[move])
    html.encode()
    page_of([broken, noted, limit], moves=[move])
    assert evil not in html or evil == "{{ 1 }}"


def test_the_page_is_in_order_for_whoever_hears_it_read():
    page_of(graded_class(lambda i: set(CHECKS), lambda i: {OVERFLOW})).assert_in_order()


def test_a_thousand_submissions_from_an_iterator_take_little_memory():
    def thousand():
        for i in range(1000):
            said = "x" * 100_000  # what a student reads is never kept
            whole = submission(f"s{i}", set(CHECKS) if i % 3 else {EXAMPLE}, reason=f"reason {i}")
            yield replace(whole, rows=tuple(replace(r, said=said + str(i)) for r in whole.rows))

    report.page([submission("warm", CHECKS)], {"w99_sample": week()})
    tracemalloc.start()
    html = report.page(thousand(), {"w99_sample": week()})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "s999" in html
    assert peak < 8 * 2**20


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_on_a_phone_or_a_desk(tmp_path, width):
    long = "w" * 200
    students = graded_class(lambda i: set(CHECKS), lambda i: {OVERFLOW})
    students += [submission(long, (), reason=f"it ran longer than {long}", notes={"": long})]
    html = report.page(students, {"w99_sample": week()}, tier=long, versions={long: long})
    assert overflow(html, width, tmp_path) <= 0


def test_a_part_of_a_point_falls_to_the_nearest_bar():
    chart = report._chart([0.6, 1.0, 1.4, 4.7], 5.0)
    assert [bar["count"] for bar in chart["bars"]] == [0, 3, 0, 0, 0, 1]


def test_discrimination_leaves_a_checks_own_points_out_of_the_rest():
    students = [
        submission(
            f"s{i}", ({EXAMPLE, MEAN} if i % 2 else set()) | ({OVERFLOW} if i < 6 else set())
        )
        for i in range(12)
    ]
    assert "survives scores of a thousand, 1 point 50% +0.00" in page_of(students).text
