"""Whatever is handed in gets what it earned, and nobody and nothing else notices.

The oracle for every case of the corpus, in every tier that this machine has: points and reasons are
as expected; somebody else is graded right before and after it, by the same grader; decoys that
anybody may write are as they were; no process is left, and the sandbox's warm parent is the same.
"""

import csv
import ctypes
import hashlib
import html.parser
import json
import os
import re
import stat
import sys
import tempfile
import time
import weakref
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from corpus import CASES, INTAKE, Case, Kit
from corpus.kit import EVERYWHERE, FULL, WEEK, WEEKS

from course.grade import feedback, grade
from course.grade.grader import Grader, Settings
from course.grade.records import Limits
from course.source import CourseError, read_week

LIMITS = Limits(seconds=3, memory_mib=768, processes=64, disk_mib=64, output_bytes=2**18)
SECRET = b"a secret of the corpus, 32 bytes"


@pytest.fixture(scope="module")
def kit():
    with Kit() as made:
        yield made


@pytest.fixture(scope="module")
def orphans_stay():
    """Make this process the parent of whatever loses its own, so that nothing can hide."""
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    yield
    libc.prctl(36, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def temporary():
    """Where graders make their temporary files, of which none is left when they are closed."""
    with (
        tempfile.TemporaryDirectory(prefix="mmlearn-corpus-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        os.chmod(folder, 0o755)  # a student's process is another user's
        patch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture(scope="module")
def grader_of(orphans_stay, temporary):
    """The grader of a tier, for the sample's week or for the real ones; one lives at a time."""
    made: dict[tuple[str, bool], Grader] = {}

    def close() -> None:
        for grader in made.values():
            grader.close()
        made.clear()
        assert not list(temporary.glob("course-*"))

    def grader_of(tier: str, case: Case) -> Grader:
        is_sample = case.week == WEEK
        if (tier, is_sample) not in made:
            close()
            # No case of a real week waits for a limit.
            limits = LIMITS if is_sample else replace(LIMITS, seconds=20)
            try:
                grader = Grader(Settings(SECRET, WEEKS if is_sample else None, limits, tier))
            except CourseError as error:
                pytest.skip(f"no isolation by {tier} here: {error}")
            made[tier, is_sample] = grader
        return made[tier, is_sample]

    yield grader_of
    close()


HAVE_GRADED = weakref.WeakSet()
IN_EVERY_TIER = [
    pytest.param(tier, case, id=f"{tier}-{case.name}")
    for tier in EVERYWHERE
    for case in sorted(CASES, key=lambda case: case.week != WEEK)
    if tier in case.tiers
]


@pytest.mark.slow
@pytest.mark.parametrize(("tier", "case"), IN_EVERY_TIER)
def test_a_case_gets_what_it_earns_and_leaves_no_trace(grader_of, tier, case, kit):
    assert examine(grader_of(tier, case), case, kit) == []


def test_the_corpus_is_large_enough_and_its_names_are_its_own():
    names = [case.name for case in (*CASES, *INTAKE)]
    assert len(names) >= 60
    assert len(set(names)) == len(names)
    for case in (*CASES, *INTAKE):
        for pattern in (case.reason, case.notes, case.shown):
            re.compile(pattern)


def test_every_case_that_is_no_damaged_file_is_a_notebook(kit):
    for case in CASES:
        content = case.build(kit)
        if case.status != "damaged" and case.row != "damaged":
            nbformat.validate(nbformat.reads(content.decode(), as_version=4))


# The oracle


def examine(grader, case: Case, kit: Kit) -> list[str]:
    """Grade one case between two honest neighbours; return everything that is not as it must be."""
    content = case.build(kit)
    neighbour = kit.hand_in(week=case.week)
    wrong = []
    if grader not in HAVE_GRADED:  # after the first case, the one after the last is the one before
        HAVE_GRADED.add(grader)
        wrong += neighbours_trouble(grader, neighbour, case.week)
    files, processes = files_in(kit.decoys), census()
    result, executed = grader.grade("eve", case.week, content)
    wrong += points_trouble(case, result.rows, result.notes)
    if left := left_after(0.5, processes):
        wrong.append(f"processes are left: {[describe(pid) for pid in left]}")
    if gone := processes.keys() - census().keys():
        wrong.append(f"the warm parent is another: {gone} ended")
    if files_in(kit.decoys) != files:
        wrong.append("decoys were changed")
    if callers := kit.callers():
        wrong.append(f"somebody called: {callers}")
    if result.seconds and result.seconds["total"] > 8 * LIMITS.seconds:
        wrong.append(f"it took {result.seconds['total']:.0f} s")
    if case.shown and not re.search(case.shown, text_of(executed)):
        wrong.append(f"the notebook does not show {case.shown!r}: {text_of(executed)[-500:]!r}")
    wrong += pages_trouble(grader, case, result, executed)
    return wrong + neighbours_trouble(grader, neighbour, case.week)


def neighbours_trouble(grader, content: bytes, week: str) -> list[str]:
    result, _ = grader.grade("ada", week, content)
    return [
        f"the neighbour's {row.grade_id} is {row.status}: {row.reason}"
        for row in result.rows
        if row.status not in ("passed", "to mark")
    ]


def points_trouble(case: Case, rows, notes) -> list[str]:
    """What is wrong with the points and reasons of a case's checks, and with its notes."""
    rows = [row for row in rows if row.status != "to mark" and row.check != "written"]
    wrong = []
    if [row.points for row in rows] != [float(points) for points in case.points]:
        wrong.append(f"points {[row.points for row in rows]}, wanted {list(case.points)}")
        wrong.append(f"reasons {[row.reason for row in rows]}")
    for row in rows:
        if row.points == row.max_points:
            if (row.status, row.reason) != ("passed", ""):
                wrong.append(f"{row.grade_id} has its points, and {row.status}: {row.reason!r}")
        elif row.status != case.status or not re.search(case.reason, row.reason):
            wrong.append(f"{row.grade_id} is {row.status}: {row.reason!r}, wanted {case.reason!r}")
        if len(row.reason) > 400 or "\n" in row.reason or "Traceback" in row.reason:
            wrong.append(f"{row.grade_id} has no reason in one line: {row.reason[:500]!r}")
    said = "; ".join(notes.values())
    if case.notes and not re.search(case.notes, said):
        wrong.append(f"the notes are {said!r}, wanted {case.notes!r}")
    return wrong


def pages_trouble(grader, case: Case, result, executed: bytes) -> list[str]:
    """What could run, or be fetched, when somebody opens the feedback; and how large it is."""
    notebook = nbformat.reads(executed.decode(), as_version=4) if executed else None
    if notebook is not None:
        nbformat.validate(notebook)
    week = read_week(case.week, grader.settings.folder)
    page = feedback.page(result, week, notebook)
    wrong = Reader.trouble(page)
    if len(page) > 4 * 2**20 or len(executed) > 8 * 2**20:
        wrong.append(f"{len(page)} characters of feedback, {len(executed)} bytes of notebook")
    return wrong


class Reader(html.parser.HTMLParser):
    """Notes in a page what a browser would run or fetch."""

    @staticmethod
    def trouble(page: str) -> list[str]:
        reader = Reader()
        reader.found = []
        reader.feed(page)
        return reader.found

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "iframe", "object", "embed", "base", "link", "form", "foreignobject"):
            self.found.append(f"the page has a {tag}")
        for name, value in attributes:
            value = (value or "").strip().lower()
            if name.startswith("on"):
                self.found.append(f"{tag} has {name}={value}")
            fetches = name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
            if fetches and not value.startswith(("#", "data:image/png", "data:image/jpeg")):
                self.found.append(f"{tag} has {name}={value[:60]}")


def text_of(executed: bytes) -> str:
    """All that the cells of an executed notebook printed."""
    if not executed:
        return ""
    cells = json.loads(executed)["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return "\n".join("".join(output.get("text", "")) for output in outputs)


def census() -> dict[int, float]:
    """The living processes that descend from this one, and when they began."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process.create_time()
        except psutil.NoSuchProcess:
            pass
    return found


def left_after(seconds: float, before: dict[int, float]) -> set[int]:
    """The processes that are new since and still live; one that is being ended has a moment."""
    until = time.monotonic() + seconds
    while (left := census().keys() - before.keys()) and time.monotonic() < until:
        time.sleep(0.02)
    return left


def describe(pid: int) -> str:
    try:
        return f"{pid} {' '.join(psutil.Process(pid).cmdline())[:100]}"
    except psutil.Error:
        return str(pid)


def files_in(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: kind, mode, size, time and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        content = ""
        if stat.S_ISREG(about.st_mode) and about.st_size < 2**25:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(about.st_mode):
            content = os.readlink(path)
        key = str(path.relative_to(folder))
        found[key] = (about.st_mode, about.st_size, about.st_mtime_ns, about.st_ino, content)
    return found


# What is handed in as files


@pytest.fixture(scope="module")
def handed_in(kit, tmp_path_factory):
    """SUBMITTED, with two honest students in it."""
    folder = tmp_path_factory.mktemp("class") / "submitted"
    folder.mkdir()
    for student in ("honest_first", "zz_honest_last"):
        path = folder / student / WEEK / f"{WEEK}.ipynb"
        path.parent.mkdir(parents=True)
        path.write_bytes(kit.hand_in())
    return folder


@pytest.fixture(scope="module")
def graded_class(kit, handed_in, tmp_path_factory, orphans_stay):
    """One run over the odd files and the honest students, as an instructor starts it."""
    for case in INTAKE:
        case.build(kit, handed_in)
    out = tmp_path_factory.mktemp("graded") / "out"
    before = files_in(handed_in), files_in(kit.decoys), census()
    summary = grade(handed_in, out, jobs=2, timeout=LIMITS.seconds, folder=WEEKS, preload=())
    with open(out / "grades.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return summary, rows, before, out


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in INTAKE])
def test_what_is_handed_in_as_files_gets_its_rows_or_is_passed_by(case, graded_class):
    summary, rows, _, _ = graded_class
    student = case.student or case.name
    mine = [row for row in rows if row["student"] == student]
    auto = [row for row in mine if row["check"] != "written"]
    if case.points is None:
        assert all(row["status"] in ("refused", "damaged") for row in mine)
        assert all(float(row["points"]) == 0 and row["reason"] for row in mine)
        assert mine or any(case.name in said for said in summary.ignored)
        return
    assert [float(row["points"]) for row in auto] == list(case.points)
    lost = [row for row in auto if float(row["points"]) < float(row["max_points"])]
    assert all(row["status"] == case.status for row in lost)
    assert all(re.search(case.reason, row["reason"]) for row in lost), lost


@pytest.mark.slow
def test_a_class_of_odd_files_costs_no_honest_student_anything(graded_class, kit, handed_in):
    _, rows, (files, decoys, processes), out = graded_class
    for student in ("honest_first", "zz_honest_last"):
        mine = [row for row in rows if row["student"] == student and row["check"] != "written"]
        assert [float(row["points"]) for row in mine] == list(FULL)
    assert files_in(handed_in) == files
    assert files_in(kit.decoys) == decoys
    assert census().keys() <= processes.keys()
    # Nothing slipped: neither beside SUBMITTED, nor beside OUT, nor where the archives pointed.
    assert [path.name for path in handed_in.parent.iterdir()] == ["submitted"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not list(Path("/tmp").glob("corpus_slipped*"))
