"""course.decks: slides show what their week draws, and each deck is one to teach from."""

import base64
import datetime
import json
import re
import shutil
import stat
import subprocess
import sys

import nbformat
import pytest

from course import __main__ as command_line
from course import decks
from course.build import solution_notebook
from course.decks import (
    check_figures,
    decks_folder,
    find_marp,
    kept_run,
    make_slides,
    read_deck,
)
from course.source import CourseError, read_week, repo_root, week_names

ROOT = repo_root()
DECKS = sorted(decks_folder().glob("w*.md"))
# Where the papers are: a slide leads nowhere else.
PAPERS = r"https://(arxiv\.org|doi\.org|openreview\.net|aclanthology\.org|proceedings\.[\w.]+)/"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_marp = pytest.mark.skipif(
    shutil.which("marp") is None,
    reason="marp is not on PATH (npm install --global @marp-team/marp-cli)",
)

# A tiny week and its deck

PNG = base64.b64encode(b"\x89PNG, or so").decode()
WEEK = """\
# %% [markdown]
# # Week 1. What is a line?

# %% tags=["parameters"]
SEED = 0
DEVICE = "cpu"
SCALE = "cpu"
DATA = "embedded"

# %% tags=["experiment"]
from matplotlib import pyplot
from mmlearn.figures import show

figure, axis = pyplot.subplots(figsize=(1, 1))
axis.plot([0, 1])
show(figure, "line", "A line that rises by 50% at [full] contrast.")
"""
DECK = """\
---
marp: true
title: What is a line?
paginate: true
math: mathjax
theme: default
---

<!-- _class: lead -->

# What is a line?

Two words
and two more

<!-- Ask: what is it?
2 minutes. -->

---

## It rises

![w:300](w01_line/line.png)

| a | b |
|---|---|
| 1 | 2 |
"""


@pytest.fixture
def course(tmp_path):
    """Folders for weeks, decks and what is made, with one tiny week and its deck."""

    class Course:
        weeks, decks = tmp_path / "weeks", tmp_path / "slides"
        to, runs = tmp_path / "build" / "slides", tmp_path / "build" / "check"

        def make(self, **options):
            folders = {"weeks": self.weeks, "decks": self.decks, "to": self.to}
            return make_slides(**folders | {"run": self.must_not_run} | options)

        def must_not_run(self, *_):
            raise AssertionError("the kept run was not used")

        def write_week(self, text=WEEK):
            (self.weeks / "w01_line.py").write_text(text, "utf-8")

        def write_deck(self, text=DECK, name="w01_line"):
            (self.decks / f"{name}.md").write_text(text, "utf-8")

        def keep_run(self, **metadata):
            """Write what `course check` leaves, as if the week had run this moment."""
            notebook = executed(read_week("w01_line", self.weeks), **metadata)
            nbformat.write(notebook, self.runs / "w01_line.ipynb")

        @property
        def written(self):
            return (self.to / "w01_line.md").read_text("utf-8")

    made = Course()
    for folder in (made.weeks, made.decks, made.runs):
        folder.mkdir(parents=True)
    made.write_week()
    made.write_deck()
    return made


def executed(week, alt="A line that rises by 50% at [full] contrast.", name="line", **papermill):
    notebook = solution_notebook(week)
    for cell in notebook.cells:
        cell.metadata["papermill"] = {"status": "completed"}
    data = {"image/png": PNG, "text/plain": alt}
    output = nbformat.v4.new_output(
        "execute_result",
        data,
        execution_count=1,
        metadata={"image/png": {"alt": alt, "name": name}},
    )
    notebook.cells[-1].outputs = [output]
    injected = nbformat.v4.new_code_cell(
        "SEED = 0", metadata={"tags": ["injected-parameters"], "papermill": {}}
    )
    notebook.cells.insert(4, injected)
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    parameters = {"SEED": 0, "DEVICE": "cpu", "SCALE": "cpu", "DATA": "embedded"}
    notebook.metadata["papermill"] = {"parameters": parameters, "start_time": now.isoformat()}
    notebook.metadata["papermill"] |= papermill
    return notebook


# What is written


def test_a_slide_shows_the_figure_that_the_week_has_drawn(course):
    course.keep_run()
    (made,) = course.make()
    assert (made.week, made.slides, made.figures, made.ran) == ("w01_line", 2, 1, False)
    assert (course.to / "w01_line" / "line.png").read_bytes() == base64.b64decode(PNG)
    assert made.files == [str(course.to / "w01_line.md")]
    assert "(w01_line/line.png)" in course.written


def test_a_figure_without_a_description_gets_the_weeks_in_words_that_marp_leaves_alone(course):
    # As they stand, "50%" would shrink the picture, "contrast" is a filter, "]" ends the text.
    course.keep_run(alt="A line that rises by 50% at [full] contrast")
    course.make()
    alt = "A line that rises by 50%\u2060 at (full) contrast\u2060"
    assert f"![w:300 {alt}](w01_line/line.png)" in course.written


def test_a_description_in_the_deck_is_kept(course):
    course.write_deck(DECK.replace("w:300", "w:300 h:200 My own\nwords"))
    course.keep_run()
    course.make()
    assert "![w:300 h:200 My own words](w01_line/line.png)" in course.written


def test_lines_of_a_paragraph_are_joined_and_nothing_else_is(course):
    code = "\n```\na\nb\n```\n\n- one\n  goes on\n- two\n"
    course.write_deck(DECK + code)
    course.keep_run()
    course.make()
    assert "\nTwo words and two more\n" in course.written
    assert "| a | b |\n|---|---|\n| 1 | 2 |" in course.written
    assert "```\na\nb\n```\n\n- one goes on\n- two" in course.written


def test_a_title_with_a_colon_is_quoted_so_that_marp_reads_the_front_matter(course):
    course.write_deck(DECK.replace("title: What is a line?", "title: Lines: what are they?"))
    course.keep_run()
    course.make()
    assert '\ntitle: "Lines: what are they?"\n' in course.written


def test_figures_that_no_slide_shows_any_more_are_removed(course):
    course.keep_run()
    course.make()
    course.write_deck(DECK.replace("![w:300](w01_line/line.png)", "A line."))
    course.make()
    assert list((course.to / "w01_line").iterdir()) == []


@pytest.mark.slow
def test_a_week_without_a_kept_run_is_run(course):
    (made,) = course.make(run=decks._run)
    assert made.ran
    assert (course.to / "w01_line" / "line.png").read_bytes().startswith(b"\x89PNG")
    assert "A line that rises" in course.written
    (again,) = course.make()
    assert not again.ran, "the run was kept, and is not used"


def test_the_steps_are_told(course):
    course.keep_run()
    steps = []
    course.make(on_step=lambda *step: steps.append(step))
    assert steps == [("w01_line.md", 0, 1), ("done", 1, 1)]


# Which runs count

OLD = "2020-01-01T00:00:00+00:00"


@pytest.mark.parametrize(
    "changed",
    [
        {"parameters": {"SEED": 1, "DEVICE": "cpu", "SCALE": "cpu", "DATA": "embedded"}},
        {"parameters": {"SEED": 0, "DEVICE": "cuda", "SCALE": "cpu", "DATA": "embedded"}},
        {"start_time": OLD},
        {"start_time": None},
    ],
    ids=["other seed", "other device", "older than mmlearn", "never started"],
)
def test_a_run_that_may_show_something_else_does_not_count(course, changed):
    week = read_week("w01_line", course.weeks)
    course.keep_run()
    assert kept_run(week, course.runs) is not None
    course.keep_run(**changed)
    assert kept_run(week, course.runs) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [("[0, 1]", "[1, 0]"), ("SEED = 0", "SEED = 3"), ("a line", "a curve")],
    ids=["code", "parameters", "prose"],
)
def test_a_run_of_another_source_does_not_count(course, old, new):
    course.keep_run()
    course.write_week(WEEK.replace(old, new))
    assert kept_run(read_week("w01_line", course.weeks), course.runs) is None


@pytest.mark.parametrize("content", [None, "", "{}", '{"cells": 3}'])
def test_a_missing_or_damaged_run_does_not_count(course, content):
    if content is not None:
        (course.runs / "w01_line.ipynb").write_text(content, "utf-8")
    assert kept_run(read_week("w01_line", course.weeks), course.runs) is None


def test_a_run_that_stopped_does_not_count(course):
    week = read_week("w01_line", course.weeks)
    notebook = executed(week)
    notebook.cells[-1].metadata["papermill"]["status"] = "failed"
    nbformat.write(notebook, course.runs / "w01_line.ipynb")
    assert kept_run(week, course.runs) is None


# What is refused


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("line.png", "curve.png", r"line 21: w01_line draws no figure 'curve'; it has line\."),
        ("w01_line/line.png", "w02_x/line.png", r"line 21: .* is no figure of the week: write w01"),
        ("w01_line/line.png", "line.png", r"write w01_line/NAME\.png"),
        ("marp: true\n", "", r"line 1: the front matter does not say `marp: true`"),
        ("math: mathjax", "math: katex", r"does not say `math: mathjax`"),
        ("title: What is a line?\n", "", r"no `title: \.\.\.`"),
        ("2 minutes. -->\n\n---", "2 minutes. -->\n---", r"line 18: this `---` ends no slide"),
        ("minutes. -->\n\n---", "minutes.\n\n---\n\n-->", r"line 19: this `---` ends no slide"),
    ],
)
def test_a_deck_that_would_not_work_is_refused_before_a_week_is_run(course, old, new, sentence):
    assert old in DECK
    course.write_deck(DECK.replace(old, new))
    with pytest.raises(CourseError, match=sentence):
        course.make()


def test_a_deck_of_no_week_and_a_week_without_a_deck_are_named(course):
    course.write_deck(name="w02_curve")
    with pytest.raises(CourseError, match=r"w02_curve\.md is the deck of no week"):
        course.make()
    (course.decks / "w02_curve.md").unlink()
    (course.decks / "w01_line.md").unlink()
    with pytest.raises(CourseError, match=r"w01_line has no deck: write .*w01_line\.md"):
        course.make(names=["1"])
    with pytest.raises(CourseError, match="There is no deck"):
        course.make()


def test_a_figure_that_is_drawn_but_not_shown_is_named(course):
    course.keep_run(name="other")
    with pytest.raises(CourseError, match="without showing 'line': let show"):
        course.make()


def test_two_figures_of_one_name_are_refused(course):
    course.write_week(WEEK + 'show(figure, "line", "Again.")\n')
    with pytest.raises(CourseError, match=r"w01_line\.py line 17: there is a figure 'line'"):
        course.make()


@pytest.mark.slow
def test_a_week_that_stops_is_named_with_its_error(course):
    course.write_week(WEEK.replace("axis.plot([0, 1])", "1 / 0"))
    with pytest.raises(CourseError, match=r"w01_line stopped at cell .*ZeroDivisionError"):
        course.make(run=decks._run)


# Marp


@pytest.fixture
def fake_marp(tmp_path, monkeypatch):
    """Put a program called marp first on PATH; `deck`, `config` and `target` are its files."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(body):
        program = folder / "marp"
        head = f"#!{sys.executable}\nimport pathlib, sys\n"
        head += "config, deck, target = (pathlib.Path(sys.argv[n]) for n in (3, 4, 6))\n"
        program.write_text(head + body, "utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return make


def test_marp_gets_pictures_with_the_deck_and_no_emoji(course, fake_marp):
    fake_marp("target.write_text(config.read_text() + deck.read_text())")
    course.keep_run()
    (made,) = course.make(html=True)
    page = (course.to / "w01_line.html").read_text("utf-8")
    assert made.files[1] == str(course.to / "w01_line.html")
    assert f"(data:image/png;base64,{PNG})" in page
    assert json.loads(page.split("---")[0])["options"]["emoji"]["unicode"] is False


@pytest.mark.parametrize(
    "tag",
    [
        '<img alt="" src="https://example.org/a.png">',
        '<link rel="stylesheet" href="https://example.org/a.css">',
        "<style>@import 'https://example.org/a.css';</style>",
        "<style>a { background: url(https://example.org/a.png) }</style>",
    ],
)
def test_a_page_that_would_fetch_something_is_refused(course, fake_marp, tag):
    fake_marp(f"target.write_text({tag!r})")
    course.keep_run()
    with pytest.raises(CourseError, match=r"w01_line\.html would fetch https://example\.org/a"):
        course.make(html=True)
    assert not (course.to / "w01_line.html").exists()


def test_a_link_in_a_page_is_no_fetch(course, fake_marp):
    fake_marp("target.write_text('<a href=\"https://arxiv.org/abs/1\">a paper</a>')")
    course.keep_run()
    course.make(html=True)


def test_what_marp_complains_of_is_one_sentence(course, fake_marp):
    fake_marp("print('[  INFO ] Converting'); sys.exit('[ ERROR ] No suitable browser found.')")
    course.keep_run()
    with pytest.raises(CourseError, match=r"could not make w01_line\.pdf: \[ ERROR \] No suitable"):
        course.make(pdf=True)


def test_without_marp_npx_fetches_it_and_without_node_the_way_out_is_said(monkeypatch):
    there = {"node": "/bin/node", "npx": "/bin/npx"}
    monkeypatch.setattr(decks.shutil, "which", there.get)
    assert find_marp() == ["/bin/npx", "--yes", decks.MARP]
    there.clear()
    with pytest.raises(CourseError, match=r"install Node\.js .* or leave out --html and --pdf"):
        find_marp()


def test_marp_is_asked_for_before_a_week_is_run(course, monkeypatch):
    monkeypatch.setattr(decks.shutil, "which", lambda name: None)
    with pytest.raises(CourseError, match="made by Marp, which is not here"):
        course.make(html=True)


@needs_marp
@pytest.mark.slow
def test_marp_itself_makes_one_page_that_needs_nothing_else(course):
    # A real picture, with the deck's mathematics and an arrow that must stay a letter.
    course.write_deck(DECK.replace("## It rises", "## It rises → $\\sqrt x$"))
    (made,) = course.make(html=True, run=decks._run)
    page = (course.to / "w01_line.html").read_text("utf-8")
    assert page.count("<section") == made.slides == 2
    assert 'alt="A line that rises by 50%\u2060 at (full) contrast."' in page
    assert "width:300px;" in page, "a word of the description was taken for an option"
    assert "<mjx-container" in page
    assert "→" in page
    assert "Ask: what is it?" in page, "presenter notes are lost"
    assert set(re.findall(r"(?:src|href)=\"(?!data:|#)([^\"]+)", page)) == set()


# The verb


def test_the_verb_prints_a_table_and_json(monkeypatch, capsys, course):
    course.keep_run()
    monkeypatch.setattr(decks, "make_slides", lambda *_, **__: course.make())

    def said(*arguments):
        with pytest.raises(SystemExit) as ended:
            command_line.app(["slides", *arguments])
        assert not ended.value.code
        return capsys.readouterr().out

    assert re.search(r"w01_line +2 +1 +that course check kept", said())
    (row,) = json.loads(said("--json"))
    assert (row["week"], row["figures"], row["ran"]) == ("w01_line", 1, False)


# The decks of this course


@pytest.fixture(params=DECKS, ids=lambda path: path.stem)
def deck(request):
    return read_deck(request.param)


def test_every_week_has_a_deck():
    assert [path.stem for path in DECKS] == week_names()


def test_a_deck_shows_figures_of_its_week(deck):
    check_figures(deck, read_week(deck.name))
    assert len({image.name for _, image in deck.images}) >= 4
    for slide, image in deck.images:
        assert image.options, f"line {slide.line}: give the picture a width, w:900"
        assert not re.match(r"bg\b|left\b|right\b|fit\b", image.alt), f"line {slide.line}"


def test_a_deck_begins_with_its_weeks_question_and_ends_with_the_papers(deck):
    question = read_week(deck.name).title
    assert deck.slides[0].heading == deck.front["title"] == question
    assert deck.slides[-1].heading == "Papers"
    assert re.search(rf"{PAPERS}|arXiv \d{{4}}\.\d{{5}}", deck.slides[-1].text)


def test_a_deck_has_ten_to_twenty_slides_of_few_words_under_one_heading_each(deck):
    assert 10 <= len(deck.slides) <= 20
    for slide in deck.slides:
        assert len(re.findall(r"^#{1,6} ", slide.text, re.MULTILINE)) == 1, f"line {slide.line}"
        words = len(slide.words)
        assert words <= 90, f"line {slide.line}: {words} words; say the rest in the notes"
    assert sum(len(slide.words) for slide in deck.slides) <= 60 * len(deck.slides)


def test_a_deck_asks_before_it_shows(deck):
    asks = [n for n, slide in enumerate(deck.slides) if re.search("[Pp]redict", slide.text)]
    shows = [n for n, slide in enumerate(deck.slides) if slide.images]
    assert asks, "no slide asks for a prediction"
    assert min(asks) < max(shows)


def test_a_deck_has_something_to_discuss(deck):
    discuss = [slide for slide in deck.slides if slide.heading.startswith("Discuss")]
    assert discuss
    assert discuss[0].text.count("?") >= 2


def test_a_presenter_is_told_what_to_ask_and_how_long_it_takes(deck):
    silent = [slide.line for slide in deck.slides[:-1] if not slide.notes]
    assert silent == []
    notes = " ".join(note for slide in deck.slides for note in slide.notes)
    minutes = [int(number) for number in re.findall(r"(\d+) min", notes)]
    assert 30 <= sum(minutes) <= 120
    assert "?" in notes


def test_a_deck_leads_only_to_papers(deck):
    text = deck.path.read_text("utf-8")
    addresses = re.findall(r"\w+://[^\s)\"'>]+", text)
    assert [address for address in addresses if not re.match(PAPERS, address)] == []
    assert "<img" not in text
    assert "<script" not in text


MEASURE = """<script>onload = () => document.title = "over " + JSON.stringify(
  [...document.querySelectorAll("section")].map(s => [s.scrollHeight - s.clientHeight,
    s.scrollWidth - s.clientWidth]))</script>"""


@needs_marp
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_nothing_sticks_out_of_a_slide(deck, tmp_path):
    week = read_week(deck.name)
    if (run := kept_run(week, ROOT / "build" / "check")) is None:
        pytest.skip(f"no kept run of {deck.name}: python -m course check {deck.name}")
    runs = tmp_path / "check"
    runs.mkdir()
    nbformat.write(run, runs / f"{deck.name}.ipynb")
    make_slides([deck.name], to=tmp_path / "slides")
    source, page = tmp_path / "slides" / f"{deck.name}.md", tmp_path / "slides" / "bare.html"
    command = ["marp", "--no-stdin", "--template", "bare", str(source), "--output", str(page)]
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    page.write_text(page.read_text("utf-8").replace("</body>", f"{MEASURE}</body>"), "utf-8")
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking --dump-dom"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    shown = subprocess.run(
        [CHROMIUM, *options.split(), profile, f"file://{page}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    over = json.loads(re.search(r"<title>over (.*?)</title>", shown.stdout)[1])
    assert len(over) == len(deck.slides)
    full = {slide.line: by for slide, by in zip(deck.slides, over) if max(by) > 0}
    assert full == {}, f"slides at these lines of {deck.path.name} are too full, by these pixels"
