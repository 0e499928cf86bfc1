"""Every layout is understood, and nothing that was handed in leads the reader astray."""

import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from course.grade.intake import (
    LARGEST_NOTEBOOK,
    Damaged,
    find_submissions,
    read_submission,
    safe_name,
)
from course.grade.records import Submission
from course.source import CourseError

WEEK = "w99_sample"
OTHER = "w98_other"


@pytest.fixture
def weeks(tmp_path):
    """Two weeks by name; intake never opens them."""
    folder = tmp_path / "weeks"
    folder.mkdir()
    for name in (WEEK, OTHER):
        (folder / f"{name}.py").write_text("")
    return folder


@pytest.fixture
def submitted(tmp_path):
    folder = tmp_path / "submitted"
    folder.mkdir()
    return folder


def put(path, content=b"{}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def pack(path, members, method=zipfile.ZIP_DEFLATED):
    """A zip file of (name or ZipInfo, content) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def found(submitted, weeks, only=None):
    """(student, week, content or problem) of each submission, and what else was said."""
    submissions, said = find_submissions(submitted, only, weeks)
    table = []
    for s in submissions:
        assert bool(s.problem) == bool(s.status)
        try:
            table.append((s.student, s.week, read_submission(s)))
        except Damaged as damage:
            table.append((s.student, s.week, str(damage)))
    return table, said


def one_problem(submitted, weeks):
    table, _ = found(submitted, weeks)
    assert len(table) == 1, table
    assert isinstance(table[0][2], str), table
    return table[0][2]


# Layouts


@pytest.mark.parametrize(
    ("name", "student"),
    [
        (f"ana/{WEEK}/{WEEK}.ipynb", "ana"),
        (f"ana/{WEEK}.ipynb", "ana"),
        (f"ana/my work/{WEEK}.ipynb", "ana"),
        (f"Ana Belén_12345_assignsubmission_file_/{WEEK}.ipynb", "Ana Belén_12345"),
        (f"Ana Belén_12345_assignsubmission_file/{WEEK}.ipynb", "Ana Belén_12345"),
        (f"Ana Belén_12345_assignsubmission_file_{WEEK}.ipynb", "Ana Belén_12345"),
        (f"belenana_123_4567_{WEEK}.ipynb", "belenana_123"),
        (f"belenana_LATE_123_4567_{WEEK}-2.ipynb", "belenana_123"),
        (f"ana-{WEEK}.ipynb", "ana"),
        (f"ana/{WEEK} (1).ipynb", "ana"),
        (f"ana/{WEEK}-1.ipynb", "ana"),
        (f"ana/Copy of {WEEK}.ipynb", "ana"),
        (f"ana/{WEEK}-Copy1.ipynb", "ana"),
        (f"ana/{WEEK} - Copy.ipynb", "ana"),
        (f"ana/{WEEK}_final.IPYNB", "ana"),
        ("ana/W99-Sample.ipynb", "ana"),
        (f"ana/{WEEK}/{WEEK} (1).ipynb", "ana"),
    ],
)
def test_a_notebook_is_found_in_every_layout_and_under_every_usual_name(
    submitted, weeks, name, student
):
    put(submitted / name, b"mine")
    assert found(submitted, weeks) == ([(student, WEEK, b"mine")], [])


@pytest.mark.parametrize(
    ("name", "members", "student"),
    [
        ("ana.zip", [f"{WEEK}.ipynb"], "ana"),
        ("ana.zip", [f"{WEEK}/{WEEK}.ipynb"], "ana"),
        ("ana.ZIP", [f"a/b/{WEEK} (2).ipynb", "a/b/data.csv"], "ana"),
        ("ana/anything.zip", [f"{WEEK}.ipynb", f"__MACOSX/._{WEEK}.ipynb"], "ana"),
        (
            f"ana/{WEEK}/w.zip",
            [f".ipynb_checkpoints/{WEEK}-checkpoint.ipynb", f"{WEEK}.ipynb"],
            "ana",
        ),
        ("belenana_123_4567_homework.zip", [f"{WEEK}.ipynb"], "belenana_123"),
        (f"belenana_123_4567_{WEEK}.zip", [f"{WEEK}.ipynb"], "belenana_123"),
        ("Ana_12_assignsubmission_file_/work.zip", [f"work\\{WEEK}.ipynb"], "Ana_12"),
    ],
)
def test_a_zip_file_is_as_good_as_a_folder(submitted, weeks, name, members, student):
    pack(submitted / name, [(member, b"mine") for member in members])
    assert found(submitted, weeks) == ([(student, WEEK, b"mine")], [])


def test_several_weeks_of_several_students_come_in_order_and_one_week_can_be_asked_for(
    submitted, weeks
):
    put(submitted / "ben" / f"{WEEK}.ipynb", b"1")
    pack(submitted / "ana.zip", [(f"{WEEK}.ipynb", b"2"), (f"{OTHER}.ipynb", b"3")])
    put(submitted / "cem" / "homework.ipynb")
    table, said = found(submitted, weeks)
    assert table == [
        ("ana", OTHER, b"3"),
        ("ana", WEEK, b"2"),
        ("ben", WEEK, b"1"),
        (
            "cem",
            "homework",
            "the course has no week 'homework'; wanted one of w98_other, w99_sample",
        ),
    ]
    assert [s.status for s in find_submissions(submitted, None, weeks)[0]] == [
        "",
        "",
        "",
        "refused",
    ]
    assert said == []
    assert found(submitted, weeks, OTHER)[0] == [("ana", OTHER, b"3")]


def test_a_missing_folder_a_file_and_an_empty_class_are_said_in_one_sentence(submitted, weeks):
    with pytest.raises(CourseError, match="is no folder"):
        find_submissions(submitted / "none", None, weeks)
    with pytest.raises(CourseError, match="is no folder"):
        find_submissions(put(submitted / "notes.txt"), None, weeks)
    (submitted / "ana").mkdir()
    with pytest.raises(CourseError, match="holds no submission"):
        find_submissions(submitted, None, weeks)
    put(submitted / "ana" / f"{WEEK}.ipynb")
    with pytest.raises(CourseError, match="holds no submission of w98_other"):
        find_submissions(submitted, OTHER, weeks)


def test_what_is_no_submission_is_named_and_what_tools_leave_behind_is_not(submitted, weeks):
    put(submitted / "ana" / f"{WEEK}.ipynb")
    put(submitted / "ana" / "readme.md")
    put(submitted / "ana" / ".ipynb_checkpoints" / f"{WEEK}-checkpoint.ipynb")
    put(submitted / "ana" / "__MACOSX" / f"._{WEEK}.ipynb")
    put(submitted / "ana" / "data" / "scenes.csv")
    put(submitted / "grades.csv")
    put(submitted / f"{WEEK}.ipynb")  # whose?
    (submitted / "ben").mkdir()
    (submitted / ".git").mkdir()
    table, said = found(submitted, weeks)
    assert table == [("ana", WEEK, b"{}")]
    assert [sentence.split(" was passed by")[0] for sentence in said] == [
        "ana/data",
        "ana/readme.md",
        "ben",
        "grades.csv",
        f"{WEEK}.ipynb",
    ]


# Two for one week


def test_the_exact_name_in_the_usual_place_wins_and_the_others_are_named(submitted, weeks):
    put(submitted / "ana" / WEEK / f"{WEEK}.ipynb", b"this")
    put(submitted / "ana" / WEEK / f"{WEEK} (1).ipynb", b"copy")
    put(submitted / "ana" / f"{WEEK}.ipynb", b"beside")
    pack(submitted / "ana.zip", [(f"{WEEK}.ipynb", b"packed")])
    table, said = found(submitted, weeks)
    assert table == [("ana", WEEK, b"this")]
    assert len(said) == 3
    assert all(f"ana/{WEEK}/{WEEK}.ipynb is the one that counts" in sentence for sentence in said)


def test_of_two_equally_good_ones_none_counts_and_both_are_named(submitted, weeks):
    put(submitted / "ana" / f"{WEEK} (1).ipynb", b"one")
    put(submitted / "ana" / f"{WEEK} (2).ipynb", b"two")
    problem = one_problem(submitted, weeks)
    assert "2 notebooks for this week" in problem
    assert f"{WEEK} (1).ipynb" in problem
    assert f"{WEEK} (2).ipynb" in problem
    assert find_submissions(submitted, None, weeks)[0][0].status == "damaged"


def test_a_name_with_two_weeks_in_it_belongs_to_neither(submitted, weeks):
    put(submitted / "ana" / f"{WEEK} and {OTHER}.ipynb")
    assert "the course has no week" in one_problem(submitted, weeks)


# What is not taken


def test_a_weeks_folder_without_its_notebook_says_what_is_there(submitted, weeks):
    put(submitted / "ana" / WEEK / "Untitled.ipynb")
    put(submitted / "ana" / WEEK / "plot.png")
    assert one_problem(submitted, weeks) == (
        f"there is no {WEEK}.ipynb in it but Untitled.ipynb, plot.png"
    )


@pytest.mark.parametrize("at", ["file", "week", "student"])
def test_no_link_is_followed_wherever_it_stands(submitted, weeks, tmp_path, at):
    secret = put(tmp_path / "elsewhere" / WEEK / f"{WEEK}.ipynb", b"another student's")
    put(submitted / "ben" / WEEK / f"{WEEK}.ipynb", b"ben's")
    path = submitted / "ana" / WEEK / f"{WEEK}.ipynb"
    if at == "file":
        path.parent.mkdir(parents=True)
        path.symlink_to(secret)
    elif at == "week":
        path.parent.parent.mkdir()
        path.parent.symlink_to(secret.parent)
    else:
        path.parent.parent.symlink_to(secret.parent.parent)
    table, said = found(submitted, weeks)
    assert ("ben", WEEK, b"ben's") in table
    if at == "student":
        assert table[1:] == []
        assert said == ["ana was passed by: it is a link"]
    else:
        assert table[0] == ("ana", WEEK, "it is a link, not a file")


@pytest.mark.parametrize("at", ["file", "week", "student"])
def test_a_link_made_after_the_search_is_not_followed_either(submitted, weeks, tmp_path, at):
    path = put(submitted / "ana" / WEEK / f"{WEEK}.ipynb", b"mine")
    (submission,), _ = find_submissions(submitted, None, weeks)
    assert read_submission(submission) == b"mine"
    part = {"file": path, "week": path.parent, "student": path.parent.parent}[at]
    part.rename(tmp_path / "moved")
    part.symlink_to(tmp_path / "moved")
    assert path.read_bytes() == b"mine"
    with pytest.raises(Damaged, match="link"):
        read_submission(submission)


def test_a_link_to_the_whole_class_is_the_instructors_own(submitted, weeks, tmp_path):
    put(submitted / "ana" / f"{WEEK}.ipynb", b"mine")
    (tmp_path / "link").symlink_to(submitted)
    assert found(tmp_path / "link", weeks)[0] == [("ana", WEEK, b"mine")]


def test_a_named_pipe_does_not_hold_up_the_class(submitted, weeks):
    (submitted / "ana").mkdir()
    os.mkfifo(submitted / "ana" / f"{WEEK}.ipynb")
    assert one_problem(submitted, weeks) == "it is no plain file"
    with pytest.raises(Damaged, match="no plain file"):
        read_submission(Submission("ana", WEEK, submitted / "ana" / f"{WEEK}.ipynb"))
    os.mkfifo(submitted / "ben.zip")
    assert "no plain file" in find_submissions(submitted, None, weeks)[0][1].problem


def test_a_folder_with_a_notebooks_name_is_looked_into(submitted, weeks):
    put(submitted / "ana" / f"{WEEK}.ipynb" / f"{WEEK}.ipynb", b"inner")
    assert found(submitted, weeks)[0] == [("ana", WEEK, b"inner")]


def test_twenty_megabytes_are_read_and_one_byte_more_is_not(submitted, weeks):
    path = put(submitted / "ana" / f"{WEEK}.ipynb", b"x" * LARGEST_NOTEBOOK)
    (submission,), _ = find_submissions(submitted, None, weeks)
    assert len(read_submission(submission)) == LARGEST_NOTEBOOK
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(Damaged, match="20 MiB"):
        read_submission(submission)
    assert "20 MiB" in one_problem(submitted, weeks)


def test_a_file_that_went_away_or_may_not_be_read_is_damaged(submitted, weeks):
    path = put(submitted / "ana" / f"{WEEK}.ipynb")
    (submission,), _ = find_submissions(submitted, None, weeks)
    path.unlink()
    with pytest.raises(Damaged, match="cannot be opened"):
        read_submission(submission)


def test_a_tree_without_end_is_left_in_time(submitted, weeks):
    deep = submitted / "ana"
    for _ in range(40):
        deep = deep / "d"
    put(deep / f"{WEEK}.ipynb")
    put(submitted / "ben" / f"{WEEK}.ipynb")
    assert [row[0] for row in found(submitted, weeks)[0]] == ["ben"]


# Zip files


def packed_names(submitted, *names, **attributes):
    members = []
    for name in names:
        info = zipfile.ZipInfo(name)
        for key, value in attributes.items():
            setattr(info, key, value)
        members.append((info, b"content"))
    return pack(submitted / "ana.zip", members)


@pytest.mark.parametrize(
    "name",
    [f"../../{WEEK}.ipynb", f"/etc/{WEEK}.ipynb", f"C:\\{WEEK}.ipynb", f"a\\..\\{WEEK}.ipynb"],
)
def test_a_name_that_leads_out_of_its_zip_file_is_refused_by_name(submitted, weeks, name):
    packed_names(submitted, name)
    before = sorted(submitted.parent.rglob("*"))
    assert "a name that leads out of it" in one_problem(submitted, weeks)
    assert sorted(submitted.parent.rglob("*")) == before


def test_a_link_inside_a_zip_file_is_refused(submitted, weeks):
    packed_names(submitted, f"{WEEK}.ipynb", external_attr=(stat.S_IFLNK | 0o777) << 16)
    assert "link" in one_problem(submitted, weeks)


def test_an_encrypted_zip_file_is_refused(submitted, weeks):
    path = packed_names(submitted, f"{WEEK}.ipynb")
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "encrypted" in one_problem(submitted, weeks)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_whose_memory_the_sender_chooses_are_refused(submitted, weeks, method):
    pack(submitted / "ana.zip", [(f"{WEEK}.ipynb", b"content")], method)
    assert "few programs" in one_problem(submitted, weeks)


def test_a_zip_bomb_is_refused_by_its_size_and_when_it_lies_about_it_while_unpacking(
    submitted, weeks
):
    path = pack(submitted / "ana.zip", [(f"{WEEK}.ipynb", b"0" * (LARGEST_NOTEBOOK + 1))])
    assert "20 MiB" in one_problem(submitted, weeks)
    content = path.read_bytes()
    told = struct.pack("<L", LARGEST_NOTEBOOK + 1)
    lie = content.replace(told, struct.pack("<L", 100))
    assert lie != content
    path.write_bytes(lie)
    (submission,), _ = find_submissions(submitted, None, weeks)
    assert submission.problem == ""
    with pytest.raises(Damaged):
        read_submission(submission)


def test_a_table_of_contents_without_end_is_not_read(submitted, weeks):
    import tracemalloc

    with zipfile.ZipFile(submitted / "ana.zip", "w") as archive:
        for number in range(40_000):
            archive.writestr(f"{number}.txt", b"")
    tracemalloc.start()
    try:
        assert "too many files" in one_problem(submitted, weeks)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_two_members_of_one_name_and_a_zip_in_a_zip_are_named(submitted, weeks):
    with pytest.warns(UserWarning, match="Duplicate"):
        pack(submitted / "ana.zip", [(f"{WEEK}.ipynb", b"1"), (f"{WEEK}.ipynb", b"2")])
    assert "2 notebooks" in one_problem(submitted, weeks)
    pack(submitted / "ana.zip", [("inner.zip", b"PK")])
    assert "there is no notebook in ana.zip but inner.zip" in one_problem(submitted, weeks)


def test_a_broken_zip_file_has_a_row_and_names_its_week_when_it_can(submitted, weeks):
    put(submitted / "ana.zip", b"PK\x03\x04 and then nothing")
    put(submitted / f"ben_{WEEK}.zip", b"")
    put(submitted / "cem" / WEEK / "work.zip", b"no zip")
    submissions, _ = find_submissions(submitted, None, weeks)
    assert [(s.student, s.week, s.status) for s in submissions] == [
        ("ana", "unknown", "refused"),
        ("ben", WEEK, "damaged"),
        ("cem", WEEK, "damaged"),
    ]
    assert all("cannot be opened" in s.problem for s in submissions)
    assert [s.week for s in find_submissions(submitted, WEEK, weeks)[0]] == [WEEK] * 3


def test_a_damaged_member_is_damaged_and_nothing_else(submitted, weeks):
    path = pack(submitted / "ana.zip", [(f"{WEEK}.ipynb", bytes(range(256)) * 40)])
    good = path.read_bytes()
    (submission,), _ = find_submissions(submitted, None, weeks)
    random = __import__("random").Random(0)
    outcomes = set()
    for _ in range(1500):
        broken = bytearray(good)
        for _ in range(random.randint(1, 4)):
            broken[random.randrange(len(broken))] = random.randrange(256)
        path.write_bytes(broken)
        find_submissions(submitted, None, weeks)  # raises nothing
        try:
            read_submission(submission)
            outcomes.add("read")
        except Damaged:
            outcomes.add("damaged")
    assert outcomes == {"read", "damaged"}


# Students' names


@pytest.mark.parametrize(
    "name", ["ana", "Ana Belén", "o'neil", "a@b.org", "王芳", "Müller, Ana", "a+b"]
)
def test_an_ordinary_name_stays_as_it_is(name):
    assert safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".hidden",
        "-rf",
        "a/b",
        "a\\b",
        "a\nb",
        "a\x00b",
        "\u202egnp.ana",
        "a*",
        "[a]",
        "100%",
        "a.",
        " a ",
    ],
)
def test_an_odd_name_can_be_read_back_from_what_becomes_of_it(name):
    from urllib.parse import unquote

    made = safe_name(name)
    assert made != name
    assert made.isprintable()
    assert not set(made) & set('/\\*?[]:|<>"')
    assert made[0] not in ".-"
    assert made == made.strip()
    assert unquote(made) == name


def test_long_names_and_names_of_no_encoding_stay_apart():
    long = ["é" * 150 + tail for tail in "ab"]
    made = [safe_name(name) for name in (*long, "", "\udcff", "\udcfe", "\ud800")]
    assert len(set(made)) == len(made)
    assert all(0 < len(name.encode()) <= 200 for name in made)


def test_odd_names_are_said_and_capitals_alone_do_not_tell_two_students_apart(submitted, weeks):
    for name in ("ana", "Ana", "..x*", "be\u0301n", "b\u00e9n"):
        put(submitted / name / f"{WEEK}.ipynb", name.encode())
    put(Path(os.fsdecode(os.fsencode(submitted) + b"/\xff")) / f"{WEEK}.ipynb", b"bytes")
    table, said = found(submitted, weeks)
    ids = [row[0] for row in table]
    assert len({i.casefold() for i in ids}) == 5  # ..x* is hidden, as in any folder
    assert "ana" in ids
    assert "%FF" in ids
    assert any(sentence.startswith("Ana is graded as Ana~") for sentence in said)
    assert all(isinstance(content, bytes) for *_, content in table)


def test_a_name_in_a_message_stays_on_one_line(submitted, weeks):
    put(submitted / "ana" / "home\nwork\x1b[2J.ipynb")
    (submission,), _ = find_submissions(submitted, None, weeks)
    assert submission.status == "refused"
    assert submission.problem.isprintable()
    assert submission.shown.isprintable()
    assert submission.week == "home%0Awork%1B%5B2J"
