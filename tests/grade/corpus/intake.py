"""What is handed in as files: links, archives and names. Nothing outside is read or written.

`build(kit, folder)` lays one thing into SUBMITTED for one student; `points` are None where the
student has no row at all. All of them are graded as one class, beside honest students.
"""

import io
import os
import zipfile

from .kit import FULL, NOTHING, WEEK, collector

CASES, case = collector("intake")
NOTEBOOK = f"{WEEK}.ipynb"


def usual(folder, student: str):
    """The folder in which the student's notebook of the week belongs."""
    place = folder / student / WEEK
    place.mkdir(parents=True)
    return place


def zipped(path, members: dict[str, bytes], **how) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@case(NOTHING, "link", status="damaged")
def a_link_to_a_notebook(kit, folder):
    """The notebook is a link to somebody else's."""
    (kit.decoys / "theirs.ipynb").write_bytes(kit.hand_in())
    (usual(folder, "a_link_to_a_notebook") / NOTEBOOK).symlink_to(kit.decoys / "theirs.ipynb")


@case(NOTHING, "link", status="damaged")
def a_link_to_a_secret(kit, folder):
    (usual(folder, "a_link_to_a_secret") / NOTEBOOK).symlink_to(kit.decoys / "home" / "notes.txt")


@case(NOTHING, "link", status="damaged")
def a_folder_that_is_a_link(kit, folder):
    other = kit.decoys / "theirs" / WEEK
    other.mkdir(parents=True)
    (other / NOTEBOOK).write_bytes(kit.hand_in())
    (folder / "a_folder_that_is_a_link").mkdir()
    (folder / "a_folder_that_is_a_link" / WEEK).symlink_to(other)


@case(None)
def a_student_that_is_a_link(kit, folder):
    (folder / "a_student_that_is_a_link").symlink_to(kit.decoys / "submitted")


@case(NOTHING, "link|loop", status="damaged")
def a_link_to_itself(kit, folder):
    path = usual(folder, "a_link_to_itself") / NOTEBOOK
    path.symlink_to(path)


@case(NOTHING, "it is no plain file", status="damaged")
def a_pipe(kit, folder):
    """Whoever opens it waits for a writer that never comes."""
    os.mkfifo(usual(folder, "a_pipe") / NOTEBOOK)


@case(NOTHING, "it is no plain file|folder|there is no", status="damaged")
def a_folder_named_like_a_notebook(kit, folder):
    (usual(folder, "a_folder_named_like_a_notebook") / NOTEBOOK).mkdir()


@case(NOTHING, "Untitled|no notebook|there is no", status="damaged")
def a_file_of_another_name(kit, folder):
    (usual(folder, "a_file_of_another_name") / "Untitled7.ipynb").write_bytes(kit.hand_in())


@case(NOTHING, "nothing|no notebook|there is no|empty", status="damaged")
def an_empty_folder(kit, folder):
    usual(folder, "an_empty_folder")


@case(FULL)
def a_browsers_copy(kit, folder):
    (usual(folder, "a_browsers_copy") / f"{WEEK} (1).ipynb").write_bytes(kit.hand_in())


@case(FULL)
def two_notebooks_one_exact(kit, folder):
    place = usual(folder, "two_notebooks_one_exact")
    (place / NOTEBOOK).write_bytes(kit.hand_in())
    (place / f"{WEEK} (1).ipynb").write_bytes(b"{}")


@case(NOTHING, r"\(1\).*\(2\)|two|2 notebooks|several", status="damaged")
def two_notebooks_none_exact(kit, folder):
    place = usual(folder, "two_notebooks_none_exact")
    (place / f"{WEEK} (1).ipynb").write_bytes(kit.hand_in())
    (place / f"{WEEK} (2).ipynb").write_bytes(kit.hand_in())


@case(NOTHING, "MiB", status="damaged")
def a_file_of_holes(kit, folder):
    """Ten gigabytes that take no room on the disk."""
    with open(usual(folder, "a_file_of_holes") / NOTEBOOK, "wb") as file:
        file.truncate(10 * 2**30)


@case(FULL)
def a_zip(kit, folder):
    (folder / "a_zip").mkdir()
    zipped(folder / "a_zip" / "hand_in.zip", {f"mine/{NOTEBOOK}": kit.hand_in()})


@case(FULL)
def a_zip_for_the_student(kit, folder):
    zipped(folder / "a_zip_for_the_student.zip", {NOTEBOOK: kit.hand_in()})


@case(None)
def a_zip_that_slips(kit, folder):
    """Its members have names that lead outside."""
    (folder / "a_zip_that_slips").mkdir()
    names = ("../" * 8 + "tmp/corpus_slipped", f"{kit.decoys}/slipped.ipynb", "..\\slipped.ipynb")
    zipped(folder / "a_zip_that_slips" / "in.zip", dict.fromkeys(names, kit.hand_in()))


@case(NOTHING, "outside|\\.\\.|name|no notebook|refus", status="damaged")
def a_zip_that_slips_with_the_right_name(kit, folder):
    (folder / "a_zip_that_slips_with_the_right_name").mkdir()
    zipped(
        folder / "a_zip_that_slips_with_the_right_name" / "in.zip",
        {f"../../../../{NOTEBOOK}": kit.hand_in()},
    )


@case(NOTHING, "MiB|large", status="damaged")
def a_zip_bomb(kit, folder):
    """60 MB of spaces in as many kilobytes."""
    (folder / "a_zip_bomb").mkdir()
    zipped(folder / "a_zip_bomb" / "in.zip", {NOTEBOOK: b" " * 60 * 2**20})


@case(NOTHING, "MiB|large|damaged|size|longer|zip", status="damaged")
def a_zip_that_lies_about_its_size(kit, folder):
    """The table of contents says a hundred bytes."""
    (folder / "a_zip_that_lies_about_its_size").mkdir()
    buffer = io.BytesIO()
    zipped(buffer, {NOTEBOOK: b" " * 60 * 2**20})
    content = bytearray(buffer.getvalue())
    for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = content.index(mark) + place
        content[start : start + 4] = (100).to_bytes(4, "little")
    (folder / "a_zip_that_lies_about_its_size" / "in.zip").write_bytes(content)


@case(NOTHING, "password|encrypted", status="damaged")
def a_zip_with_a_password(kit, folder):
    (folder / "a_zip_with_a_password").mkdir()
    buffer = io.BytesIO()
    zipped(buffer, {NOTEBOOK: kit.hand_in()})
    content = bytearray(buffer.getvalue())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + place] |= 1
    (folder / "a_zip_with_a_password" / "in.zip").write_bytes(content)


@case(NOTHING, "link", status="damaged")
def a_zip_with_a_link(kit, folder):
    (folder / "a_zip_with_a_link").mkdir()
    link = zipfile.ZipInfo(NOTEBOOK)
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(folder / "a_zip_with_a_link" / "in.zip", "w") as archive:
        archive.writestr(link, str(kit.decoys / "home" / "notes.txt"))


@case(None)
def a_zip_in_a_zip(kit, folder):
    (folder / "a_zip_in_a_zip").mkdir()
    inner = io.BytesIO()
    zipped(inner, {NOTEBOOK: kit.hand_in()})
    zipped(folder / "a_zip_in_a_zip" / "in.zip", {"inner.zip": inner.getvalue()})


@case(None)
def a_zip_that_is_none(kit, folder):
    (folder / "a_zip_that_is_none").mkdir()
    (folder / "a_zip_that_is_none" / "in.zip").write_bytes(b"PK\x03\x04" + b"\xff" * 500)


@case(None)
def an_unknown_week(kit, folder):
    place = folder / "an_unknown_week" / "w77_nothing"
    place.mkdir(parents=True)
    (place / "w77_nothing.ipynb").write_bytes(kit.hand_in())


@case(FULL, student="Ada Lovelace_12345")
def moodles_layout(kit, folder):
    place = folder / "Ada Lovelace_12345_assignsubmission_file_"
    place.mkdir()
    (place / NOTEBOOK).write_bytes(kit.hand_in())


@case(FULL, student="hoppergrace_123")
def canvas_layout(kit, folder):
    (folder / f"hoppergrace_123_456_{NOTEBOOK}").write_bytes(kit.hand_in())
