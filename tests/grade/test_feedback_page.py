"""The page that a student reads, made from results of the real weeks and of the sample week."""

import base64
import re
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_notebook, new_output

from course.grade import feedback, pages
from course.grade.records import Result, Row
from course.samples import solved
from course.source import read_week, week_names

from .browser import Page, needs_chromium, overflow

STYLE = (Path(pages.__file__).parent / "templates" / "style.css").read_text()
FOLDER = Path(__file__).resolve().parent.parent / "weeks"
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJg"
    "gg=="
)
TAGS = set(
    "a article body caption code dd details div dl dt figure footer h1 h2 h3 head header html img "
    "li line main meta ol p pre rect section span strong style summary svg table tbody td text th "
    "thead title tr ul".split()
)
ATTRIBUTES = set(
    "alt aria-hidden aria-label aria-labelledby charset class content data-name height href "
    "http-equiv id lang name role scope src style tabindex text-anchor transform viewbox width x "
    "x1 x2 y y1 y2".split()
)
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'/><svg onload=alert(1)>",
    "</style><script>alert(1)</script>",
    "</title></pre></details><iframe src=https://example.org>",
    "{{ 7 * 7 }}{% raw %}",
    "`</code><script>`",
    "javascript:alert(1)",
    "<!-- ",
    "&lt;script&gt;",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07\x00\x08 \u202egnp.exe \ud800 \ufffe",
)


def assert_harmless(html: str) -> Page:
    """Nothing but our own elements and attributes; nothing to run; nothing to fetch."""
    html.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]", html)
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag in TAGS, tag
        assert set(attributes) <= ATTRIBUTES, (tag, attributes)
    assert all(re.match(r"#[\w-]+\Z|feedback/[^:]*\Z", link) for link in page.values("href"))
    assert all(s.startswith(("data:image/png;base64,", "data:image/j")) for s in page.values("src"))
    assert html.count("Content-Security-Policy") >= 1
    assert "default-src 'none'" in html
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    return page


@cache
def week(name="w99_sample"):
    return read_week(name, FOLDER) if name == "w99_sample" else read_week(name)


def result(name="w99_sample", student="ada", **odd) -> Result:
    """A submission with everything right; `odd` says, by grade id with _ for -, what is not."""
    rows = [
        Row(c.grade_id, e.name, c.aspect, float(c.points), float(c.points), "passed")
        for e in week(name).exercises.values()
        for c in e.checks
    ]
    rows += [
        Row(w.name, w.name, "written", None, float(w.points), "to mark") for w in week(name).written
    ]
    rows = [
        replace(row, **odd[row.grade_id.replace("-", "_")])
        if row.grade_id.replace("-", "_") in odd
        else row
        for row in rows
    ]
    return Result(student, name, "ab12" * 16, "cd34" * 16, tuple(rows))


def failed(reason, said=None, part="", recognised=(), status="failed") -> dict:
    return {
        "points": 0.0,
        "status": status,
        "reason": reason,
        "part": part,
        "said": reason if said is None else said,
        "recognised": recognised,
    }


def everything_failed(reason, status, name="w99_sample", **more) -> Result:
    rows = tuple(replace(r, **failed(reason, status=status)) for r in result(name).rows)
    return replace(result(name), rows=rows, **more)


def wrong(exercise, name):
    return next(w for w in week().exercises[exercise].wrongs if w.name == name)


WRONG_AXIS = wrong("softmax", "wrong_axis").says
MISTAKEN = result(
    softmax_example=failed(
        WRONG_AXIS,
        f"{WRONG_AXIS}\n  yours: 0.1, 0.3 in shape (2, 2); wanted: 0.25, 0.75 in shape (2, 2)",
        "visible",
        ("wrong_axis",),
    ),
    softmax_overflow=failed("it must hold: survives scores of a thousand", "", "hidden"),
)


def page_of(given: Result, **more) -> Page:
    return assert_harmless(feedback.page(given, week(given.week), **more))


# What it says


def test_everything_right_is_said_in_one_sentence_with_all_points():
    page = page_of(result())
    assert "5 of 5 points from the checks" in page.text
    assert "Every check passes." in page.text
    assert "numbers you can work by hand" in page.text
    assert "bad" not in " ".join(page.values("class"))


def test_a_recognised_mistake_is_shown_with_its_sentence_once_and_both_values():
    page = page_of(MISTAKEN)
    assert page.text.count(WRONG_AXIS) == 1
    assert "yours 0.1, 0.3 in shape (2, 2)" in re.sub(
        r"\s+", " ", page.text.replace("yours", "yours ")
    )
    assert "0.25, 0.75 in shape (2, 2)" in page.text
    assert "# Check softmax-example" in page.text, "the next step names the cell to run"
    assert "2 of 5 points from the checks" in page.text


def test_a_mistake_seen_by_a_second_check_of_the_exercise_is_not_told_twice():
    again = MISTAKEN.rows[0]
    rows = (MISTAKEN.rows[0], replace(MISTAKEN.rows[1], **{
        name: getattr(again, name) for name in ("reason", "said", "part", "recognised")
    }), *MISTAKEN.rows[2:])  # fmt: skip
    said = again.said.replace("0.1, 0.3", "0.2, 0.4")
    page = page_of(replace(MISTAKEN, rows=(rows[0], replace(rows[1], said=said), *rows[2:])))
    assert page.text.count(WRONG_AXIS) == 1
    assert "The same mistake as above." in page.text


def test_two_mistakes_that_give_the_same_value_are_both_told():
    both = ("wrong_axis", "no_sum")
    says = [wrong("softmax", name).says for name in both]
    said = f"{says[0]}\nOr: {says[1]}\n  yours: 1; wanted: 2"
    page = page_of(result(softmax_example=failed(says[0], said, "visible", both)))
    assert f"Or: {says[1]}" in page.text
    assert page.text.count("Or:") == 1
    assert page.text.count(says[0]) == 1


def test_a_visible_check_shows_what_it_compares_and_nothing_of_its_hidden_region():
    page = page_of(MISTAKEN)
    assert 'expect( "w99_sample/softmax/hand"' in page.text
    assert "HIDDEN" not in page.text
    assert "generator" not in page.text


@pytest.mark.parametrize("name", ["w99_sample", *week_names()])
def test_no_line_of_a_hidden_region_and_no_message_of_its_asserts_is_on_any_page(name):
    def secret(code):
        # Part of a line that the student may read anyway is no secret either.
        visible = "\n".join("".join(line.split()) for line in everything_visible.split("\n"))
        lines = {"".join(line.split()) for line in code.split("\n")}
        return {line for line in lines if len(line) > 12 and line not in visible}

    checks = [c for e in week(name).exercises.values() for c in e.checks]
    released = solved(week(name))
    everything_visible = "\n".join([c.visible for c in checks] + [x.source for x in released.cells])
    messages = re.findall(r'assert .*, f?"([^"]{12,})"', "\n".join(c.hidden for c in checks))
    odd = {
        check.grade_id.replace("-", "_"): failed(
            next(iter(re.findall(r'assert .*, f?"([^"]{12,})"', check.hidden)), "it must hold"),
            f"assert: {check.hidden}",
            "hidden",
        )
        for check in checks
    }
    html = feedback.page(result(name, **odd), week(name), released)
    page = assert_harmless(html)
    squeezed = "".join("".join(page.texts).split())
    for line in secret("\n".join(c.hidden for c in checks)):
        assert line not in squeezed, line
    for message in messages:
        assert message in everything_visible or message not in page.text, message


def test_the_message_of_an_error_raised_on_a_hidden_input_is_kept_back():
    stolen = "tensor([[-1.5256, -0.7502]])"
    for reason in (
        f"the answer raised ValueError: {stolen}",
        f"the answer raised {'Stolen_1_5256'}: {stolen}",
        f"the check could not use what the answer returned (TypeError: {stolen})",
        stolen,
        f"it ended its own process (exit code {stolen})",
    ):
        page = page_of(result(softmax_overflow=failed(reason, reason, "hidden")))
        assert "1.5256" not in page.text
        assert "1_5256" not in page.text
    page = page_of(
        result(softmax_overflow=failed(f"the answer raised ValueError: {stolen}", None, "hidden"))
    )
    assert "Your code raised a ValueError on a hidden input." in page.text


def test_the_message_of_an_error_raised_on_a_visible_input_is_shown():
    reason = "the answer raised TypeError: unsupported operand"
    page = page_of(result(softmax_example=failed(reason, None, "visible")))
    assert "Your answer raised TypeError: unsupported operand." in page.text


def test_an_open_exercise_says_once_where_to_write_and_how_long_it_takes():
    reason = "not answered yet (NotImplementedError)"
    page = page_of(
        result(
            softmax_example=failed(reason, None, "visible"),
            softmax_overflow=failed(reason, None, "hidden"),
        )
    )
    assert page.text.count("Not answered yet.") == 1
    assert "# Exercise softmax" in page.text
    assert "about 10 minutes" in page.text
    assert "still open" in page.text
    assert "nothing of what you wrote is wrong" in page.text


@pytest.mark.parametrize(
    ("reason", "said", "advice"),
    [
        ("it ran longer than 60 s", "It ran longer than 60 s.", "a loop that does not come"),
        ("it needed more than 2048 MiB of memory", "It needed more than 2048 MiB", "broadcast"),
        ("it started more than 64 processes", "It started more", "no processes of its own"),
        ("it ended its own process (exit code 3)", "(exit code 3)", "os._exit()"),
        ("its process crashed (SIGSEGV)", "crashed (SIGSEGV)", "Restart the kernel"),
        ("its process answered out of turn", "answered out of turn", "show your instructor"),
        ("softmax is not defined", "softmax is not defined.", "define it in the cell"),
        (
            "the answer cell stopped with Odd: a free variable is not defined",
            "The answer cell stopped with Odd",
            "run all cells from the top",
        ),
        ("The answer to softmax is taken from mmlearn.x, so it earns nothing", "taken", "compare"),
    ],
)  # fmt: skip
def test_each_way_to_stop_is_named_in_a_sentence_with_what_to_do_next(reason, said, advice):
    page = page_of(result(softmax_example=failed(reason), softmax_overflow=failed(reason)))
    assert said in page.text
    assert advice in page.text
    assert page.text.count(advice) == 1, "two checks with the same fate are told of together"


def test_every_kind_of_hidden_check_has_its_own_advice_when_nothing_else_failed():
    def advice(aspect):
        row = Row(f"softmax-{aspect}", "softmax", aspect, 0.0, 1.0, "failed", "no", "hidden")
        return feedback._advice(row, week().exercises["softmax"], False, [])[0]

    assert "thousand" in advice("overflow")
    assert "backward()" in advice("gradient")
    assert "must raise" in advice("refusal")
    assert "axes differ" in advice("law")
    assert "axes" in advice("whatever")
    assert len({advice(a) for a in ("overflow", "gradient", "refusal", "law", "whatever")}) == 5


def test_a_hidden_check_beside_a_failed_visible_one_sends_the_student_there_first():
    assert "Mend what is said above first" in page_of(MISTAKEN).text


def test_the_summary_fits_what_was_done():
    def summary(*rights):
        odd = {
            check.grade_id.replace("-", "_"): failed("wrong", "wrong", "visible")
            for exercise in week().exercises.values()
            for check in exercise.checks
            if exercise.name not in rights
        }
        return page_of(result(**odd)).text

    assert "No exercise is right in full yet." in summary()
    assert "One of two exercises right in full. One is left" in summary("softmax")
    both = {
        check.grade_id.replace("-", "_"): failed("not answered yet (NotImplementedError)")
        for exercise in week().exercises.values()
        for check in exercise.checks
    }
    assert "No exercise is answered yet." in page_of(result(**both)).text


# Written answers, healing, what could not be graded


def test_a_written_answer_that_waits_shows_no_mark_scheme():
    page = page_of(result(), executed=solved(week()))
    assert "2 more points for written answers wait for a person" in page.text
    assert "a person will read it" in page.text
    assert "the factor cancels" not in page.text
    assert "Numerator and denominator" in page.text, "the student's own answer is there"


def test_a_marked_answer_shows_its_points_the_mark_scheme_and_the_comment():
    marked = result(why_max={"status": "marked", "points": 1.5})
    page = page_of(marked, written_comments={"why_max": "Say <why> it cancels.\nThen stop."})
    assert "Your written answers earned 1.5 of 2 points more." in page.text
    assert "1.5 of 2 points" in page.text
    assert "1 point: the factor cancels." in page.text
    assert "Say <why> it cancels." in page.text
    assert "wait" not in page.text


def test_an_empty_written_answer_is_said_to_be_open():
    page = page_of(result(why_max={"reason": "the answer cell was left as it was"}))
    assert "Nothing is written here yet" in page.text
    assert "wait" not in page.text


def test_a_check_that_a_person_overruled_stays_a_check():
    overruled = {"status": "marked", "points": 1.0, "reason": ""}
    page = page_of(result(softmax_example=overruled), written_comments={"softmax": "Half of it."})
    assert "4 of 5 points from the checks" in page.text
    assert "A person gave these points." in page.text
    assert "Half of it." in page.text


def test_what_was_mended_stands_beside_its_exercise_or_at_the_top():
    notes = {
        "": "It was read as version 4.5.",
        "softmax": "Two cells; the last counts.",
        "z": "Odd.",
    }
    page = page_of(replace(result(), notes=notes))
    top, exercise = page.text.split("Overview")
    assert "What was put in order first" in top
    assert "It was read as version 4.5." in top
    assert "Odd." in top
    assert "Two cells; the last counts." in exercise
    assert all(page.text.count(note) == 1 for note in notes.values())


@pytest.mark.parametrize("status", ["damaged", "stopped"])
def test_a_notebook_that_was_not_graded_gets_a_reason_and_the_way_out(status):
    page = page_of(everything_failed("the file is empty", status))
    assert "There are no points because the file is empty." in page.text
    assert "What to do next" in page.text
    assert "0 of 5 points" in page.text
    assert "Overview" not in page.text


def test_an_unknown_week_gets_a_page_too():
    refused = Result(
        "ada", "w42_no", "", "", (Row("", "", "", 0.0, 0.0, "refused", "there is no such week"),)
    )
    page = assert_harmless(feedback.page(refused, None))
    assert "There are no points because there is no such week." in page.text
    assert "name of the file" in page.text
    assert "points from the checks" not in page.text


def test_rows_of_checks_that_the_course_no_longer_has_are_still_shown():
    old = Row("gone-check", "gone", "check", 0.0, 3.0, "failed", "it was odd", said="it was odd")
    page = page_of(replace(result(), rows=(*result().rows, old)))
    assert "It was odd." in page.text
    assert "5 of 8 points" in page.text


# The student's own cells


def notebook_with(*outputs):
    notebook = solved(week())
    next(c for c in notebook.cells if c.get("id") == "softmax").outputs = list(outputs)
    return notebook


def test_outputs_are_text_and_pictures_and_never_html():
    page = page_of(
        result(),
        executed=notebook_with(
            new_output("stream", name="stdout", text="\x1b[31mred\x1b[0m <b>loss</b> 0.5\n"),
            new_output("display_data", {"image/png": PNG, "text/plain": "A falling curve"}),
            new_output("display_data", {"text/html": "<b>bold</b>", "text/plain": "a frame"}),
            new_output(
                "error", ename="NameError", evalue="x", traceback=["\x1b[0;31mline 3\x1b[0m"]
            ),
        ),
    )
    assert "red <b>loss</b> 0.5" in page.text
    assert page.values("src") == [f"data:image/png;base64,{PNG}"]
    assert page.values("alt") == ["A falling curve"]
    assert "a frame" in page.text
    assert "bold" not in page.text
    assert "line 3" in page.text


@pytest.mark.parametrize(
    "data",
    [
        "iVBORw0KGgo\" onerror=\"alert(1)",
        "PHN2ZyBvbmxvYWQ9YWxlcnQoMSk+",
        "iVBORw0KGgo&#34;",
        base64.b64encode(b"<html>").decode(),
        ["iVBOR", 7],
        None,
    ],
)  # fmt: skip
def test_a_picture_that_is_none_is_left_out(data):
    output = {"output_type": "display_data", "data": {"image/png": data, "text/plain": "<x>"}}
    page = page_of(result(), executed=notebook_with(output | {"metadata": {"image/png": "x"}}))
    assert page.values("src") == []
    assert "<x>" in page.text


def test_long_outputs_are_cut_and_a_page_does_not_grow_without_end():
    flood = new_output("stream", name="stdout", text="x" * 50_000)
    html = feedback.page(result(), week(), notebook_with(*[flood] * 200))
    assert "44000 more characters are not shown here." in html
    assert len(html) < feedback.MOST_CHARACTERS + 100_000
    many = new_output("display_data", {"image/png": PNG + "A" * 4 * 2**20, "text/plain": "p"})
    many["data"]["image/png"] = PNG[:-4] + "AAAA" * 2**20
    html = feedback.page(result(), week(), notebook_with(*[many] * 10))
    assert len(html) < feedback.MOST_IMAGES + 100_000
    assert "the page has too many" in html


def test_cells_that_print_or_fail_are_named_by_their_place_and_first_line():
    notebook = solved(week())
    place = next(i for i, c in enumerate(notebook.cells, 1) if "SEED = 0" in c.source)
    notebook.cells[place - 1].source = "# Numbers\n\nSEED = 0\n"
    notebook.cells[place - 1].outputs = [
        new_output("error", ename="OSError", evalue="no", traceback=["OSError: no"])
    ]
    page = page_of(result(), executed=notebook)
    assert f"Cell {place}, which stopped with OSError: SEED = 0" in page.text


def test_the_notebook_may_come_as_plain_json_with_lines_in_lists():
    import json

    notebook = json.loads(
        json.dumps(notebook_with({"output_type": "stream", "text": ["a\n", "b"]}))
    )
    for cell in notebook["cells"]:
        cell["source"] = cell["source"].splitlines(keepends=True)
    page = page_of(result(), executed=notebook)
    assert "a b" in page.text
    assert "def softmax(scores):" in page.text


# Hostile students


@pytest.mark.parametrize("evil", HOSTILE)
def test_whatever_a_student_writes_is_text(evil):
    html = feedback.page(hostile(evil), week(), hostile_notebook(evil), {"why_max": evil})
    assert_harmless(html)
    harmless = feedback.page(hostile("x"), week(), hostile_notebook("x"), {"why_max": "x"})
    assert tags(html) == tags(harmless)
    refused = replace(everything_failed(evil, "damaged"), student=evil, notes={"": evil})
    assert_harmless(feedback.page(refused, None))


def hostile(evil: str) -> Result:
    """Every field that a student or a broken file could have a hand in."""
    bad = failed(evil, f"{evil}\n  yours: {evil}; wanted: {evil}", "visible")
    changed = result(
        student=evil,
        softmax_example=bad,
        running_mean_example=failed("f", f"the answer raised {evil}: {evil}", "visible"),
        why_max={"status": "marked", "points": 1.0, "reason": evil},
    )
    changed = replace(changed, notes={"": evil, "softmax": evil, evil: evil})
    extra = Row(evil, f"q{evil}", evil, 0.0, 1.0, "failed", evil, "", evil, (evil,))
    return replace(changed, rows=(*changed.rows, extra), submission_digest=evil)


def hostile_notebook(evil: str):
    notebook = notebook_with(
        new_output("stream", name="stdout", text=f"a{evil}"),
        new_output("error", ename=f"a{evil}", evalue=evil, traceback=[f"a{evil}"]),
        {
            "output_type": "display_data",
            "data": {"image/png": PNG, "text/plain": f"a{evil}"},
            "metadata": {"image/png": {"alt": f"a{evil}"}},
        },
    )
    for cell in notebook.cells:
        if cell.cell_type == "code" and not cell.outputs:
            cell.outputs = [new_output("error", ename=f"a{evil}", evalue="", traceback=["a"])]
        cell.source = f"a{evil}\n{cell.source}"
    return notebook


def tags(html: str) -> list[str]:
    return [tag for tag, _ in Page(html).elements if tag != "code"]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=()), min_size=1, max_size=60))
def test_any_text_at_all_is_text(text):
    assert_harmless(feedback.page(hostile(text), week(), hostile_notebook(text)))


def test_all_and_none_are_said_of_all_and_none_only():
    shares = (0.0, 0.001, 0.334, 0.999, 1.0)
    assert [pages.percent(share) for share in shares] == ["0%", "1%", "33%", "99%", "100%"]
    assert [pages.number(points) for points in (2.0, 1.5, 0.1 + 0.2)] == ["2", "1.5", "0.3"]


def test_cleaning_keeps_what_people_write():
    kept = "naïve · 日本語 · עברית · 👩‍🏫 · x² ≤ ½ · a\tb\nc"
    assert pages.clean(kept) == kept
    assert pages.clean("a\r\nb\rc") == "a\nb\nc"
    assert pages.clean("\x1b[1;31mred\x1b[0m\x1b]0;title\x07!") == "red!"
    assert pages.clean("\u202e\ud800\x00") == "\ufffd" * 3


# The page as a page


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_texts_stand_out_from_what_is_behind_them_in_light_and_in_dark():
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in (light, dark)]
    schemes[1] = schemes[0] | schemes[1]
    for colours in schemes:
        for text in ("text", "soft", "link", "good", "bad", "wait"):
            assert contrast(colours[text], colours["page"]) >= 4.5, text
        for box in ("box", "good-box", "bad-box", "wait-box", "tip-box"):
            for text in ("text", "soft", "link"):
                assert contrast(colours[text], colours[box]) >= 4.5, (text, box)
        assert contrast(colours["bar"], colours["rail"]) >= 2.5


def test_the_page_is_in_order_for_whoever_hears_it_read():
    page_of(MISTAKEN, executed=solved(week())).assert_in_order()
    page_of(everything_failed("the file is empty", "damaged")).assert_in_order()


def test_a_page_costs_at_most_a_few_milliseconds():
    notebook, given_result = notebook_with(), result()
    feedback.page(given_result, week(), notebook)
    began = time.process_time()
    for _ in range(20):
        feedback.page(given_result, week(), notebook)
    assert (time.process_time() - began) / 20 < 0.005


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_sticks_out_on_a_phone_or_a_desk(tmp_path, width):
    long = "w" * 300
    said = f"{long}\n  yours: {long}; wanted: {long}"
    odd = result(student=long, softmax_example=failed(long, said, "visible"))
    odd = replace(odd, notes={"": long})
    html = feedback.page(odd, week(), hostile_notebook(long), {"softmax": long})
    assert overflow(html, width, tmp_path) <= 0


def test_an_empty_notebook_is_a_notebook():
    assert "Every check passes." in page_of(result(), executed=new_notebook()).text
