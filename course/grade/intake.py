"""Finds what was handed in, in any layout, and reads it without being led astray.

    SUBMITTED/STUDENT/WEEK/WEEK.ipynb            nbgrader's layout
    SUBMITTED/STUDENT/WEEK.ipynb                 a folder for each student
    SUBMITTED/STUDENT.zip, STUDENT/ANYTHING.zip  a zip file for each student
    SUBMITTED/NAME_123_assignsubmission_file_/WEEK.ipynb   as Moodle exports it
    SUBMITTED/NAME_123_456_WEEK.ipynb                      as Canvas exports it

A notebook is known by the week in its name, also as browsers and students change it: `w03_clip
(1).ipynb`, `Copy of W03_clip.ipynb`. Of several for one week the exact name in the usual place
counts; otherwise none does, and all are named. Nothing is ever unpacked to disk, no link below
SUBMITTED is followed, and a zip file is read only as far as it is needed.

A submission that cannot be taken has a problem that says why: `refused` means that the course has
no such week, `damaged` everything else.
"""

import errno
import hashlib
import io
import os
import re
import stat
import unicodedata
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from course.grade.records import Submission
from course.source import CourseError, week_names

LARGEST_NOTEBOOK = 20 * 2**20  # bytes
LARGEST_DIRECTORY = 2**20  # bytes of a zip file's table of contents: 10,000 members and more
DEEPEST, MOST_ENTRIES = 5, 5000  # levels of folders, and files, that are looked through per student
LONGEST_ID = 200  # bytes; a file name has 255, and `.html` and the like come behind it
LAYOUT = "SUBMITTED/STUDENT/WEEK/WEEK.ipynb"
NO_WEEK = "unknown"  # the week of a zip file that cannot be opened, when nothing names another
_LINK = "it is a link, not a file"
_MOODLE = re.compile(r"(.+_\d+)_assignsubmission_[a-z]+_?")
_CANVAS = re.compile(r"(.+?)(?:_LATE)?_(\d+)_\d+")


class Damaged(Exception):
    """A submission that cannot be graded; the message completes "no points because ..."."""


@dataclass(frozen=True)
class _Found:
    """A notebook that may be a submission. The lowest rank counts."""

    week: str
    place: Path
    shown: str
    member: str = ""
    rank: tuple[int, int] = (0, 0)
    problem: str = ""


def find_submissions(
    submitted: Path, only: str | None = None, folder: Path | None = None
) -> tuple[list[Submission], list[str]]:
    """All submissions, or those of one week, by student and week; and what else is to be said.

    That is one sentence for each thing that was passed by, and for each student whose name no file
    can have and who is graded under another. Notebooks are not read.
    Raises: CourseError, when there is no such folder or no submission in it.
    """
    submitted = Path(submitted)
    if not submitted.is_dir():
        raise CourseError(f"{submitted} is no folder; wanted submissions as {LAYOUT}.")
    search = _Search(week_names(folder))
    # From here on no part of a path may be a link; what leads to SUBMITTED is the instructor's.
    for entry in _entries(submitted.resolve()):
        search.look_at(entry)
    submissions = search.submissions(only)
    if not submissions:
        of = f" of {only}" if only else ""
        raise CourseError(
            f"{submitted} holds no submission{of}; wanted {LAYOUT}, or a folder or zip file for "
            "each student with notebooks named like the week."
        )
    return submissions, search.said


def read_submission(submission: Submission) -> bytes:
    """The submitted notebook as it is, at most 20 MiB of it.

    Raises: Damaged, when it has a problem, is no plain file, cannot be read, or is larger.
    """
    if submission.problem:
        raise Damaged(submission.problem)
    if submission.member:
        return _read_member(submission.place, submission.member)
    with io.BufferedReader(_open(submission.place)) as file:
        content = file.read(LARGEST_NOTEBOOK + 1)
    if len(content) > LARGEST_NOTEBOOK:
        raise Damaged(_too_large(os.stat(submission.place, follow_symlinks=False).st_size))
    return content


# Where the notebooks are


class _Search:
    """Goes through what was handed in and remembers, by student, what may be a submission."""

    def __init__(self, weeks: list[str]) -> None:
        self.weeks = weeks
        self.found: dict[str, list[_Found]] = defaultdict(list)
        self.said: list[str] = []
        self.seen = 0

    def look_at(self, entry: os.DirEntry) -> None:
        """One entry of SUBMITTED: a student's folder, zip file or notebook."""
        stem, suffix = os.path.splitext(entry.name)
        suffix = suffix.lower()
        self.seen = 0
        if entry.is_symlink():
            self.pass_by(entry.name, "it is a link")
        elif entry.is_dir(follow_symlinks=False):
            student = _student(entry.name)
            if not self.look_into(student, Path(entry.path), entry.name):
                self.pass_by(entry.name, "there is no notebook in it")
        elif suffix in (".zip", ".ipynb") and (student := self.owner(stem, suffix)):
            week = self.week_in(stem)[0]
            if suffix == ".zip":
                self.look_into_zip(student, Path(entry.path), entry.name, week)
            else:
                self.add(student, week, Path(entry.path), entry.name, rank=(1, 1))
        else:
            self.pass_by(entry.name, f"it is no {LAYOUT}")

    def owner(self, stem: str, suffix: str) -> str:
        """Whose file it is, by its name; empty when it does not say."""
        week, before = self.week_in(stem)
        if week:
            return _student(before)
        if suffix == ".zip":
            # Canvas puts the name of the student's file behind its own numbers.
            canvas = re.match(r"(.+?(?:_LATE)?_\d+_\d+)_", stem)
            return _student(canvas.group(1) if canvas else stem)
        return ""

    def look_into(
        self, student: str, path: Path, shown: str, week: str = "", depth: int = 1
    ) -> bool:
        """A folder of a student's, and those in it; whether any notebook or zip file is there."""
        others, any_found, before = [], False, len(self.found[student])
        for entry in _entries(path):
            self.seen += 1
            if self.seen > MOST_ENTRIES:
                self.pass_by(shown, f"it holds more than {MOST_ENTRIES:,} files")
                break
            stem, suffix = os.path.splitext(entry.name)
            suffix, name = suffix.lower(), f"{shown}/{entry.name}"
            own = Path(entry.path)
            if suffix == ".ipynb" and not (_is_folder(entry)):
                any_found |= self.look_at_notebook(student, entry, name, week, depth, others)
            elif _is_folder(entry) and depth < DEEPEST:
                named = week or self.week_in(entry.name)[0]
                inside = self.look_into(student, own, name, named, depth + 1)
                if not inside and not named:
                    self.pass_by(name, "there is no notebook in it")
                any_found |= inside or bool(named)
            elif suffix == ".zip" and entry.is_file(follow_symlinks=False):
                self.look_into_zip(student, own, name, week or self.week_in(stem)[0])
                any_found = True
            elif entry.is_symlink() and (named := week or self.week_in(entry.name)[0]):
                self.add(student, named, own, name, problem=_LINK)
                any_found = True
            elif depth == 1:
                self.pass_by(name, f"it is no {LAYOUT}")
            else:
                others.append(entry.name)
        if week and len(self.found[student]) == before:
            problem = f"there is no {week}.ipynb in it but {_some(others)}"
            self.add(student, week, path, shown, problem=problem)
        return any_found

    def look_at_notebook(
        self, student: str, entry: os.DirEntry, shown: str, week: str, depth: int, others: list
    ) -> bool:
        stem = os.path.splitext(entry.name)[0]
        named = self.week_in(stem)[0]
        if week and named != week:
            others.append(entry.name)
            return False
        problem = _LINK if entry.is_symlink() else ""
        if not problem and not entry.is_file(follow_symlinks=False):
            problem = "it is no plain file"
        size = entry.stat(follow_symlinks=False).st_size
        if not problem and size > LARGEST_NOTEBOOK:
            problem = _too_large(size)
        rank = (int(entry.name != f"{named}.ipynb"), 0 if week else depth)
        self.add(student, named or stem, Path(entry.path), shown, rank=rank, problem=problem)
        return True

    def look_into_zip(self, student: str, path: Path, shown: str, week: str) -> None:
        """The notebooks in a zip file, known by its table of contents."""
        try:
            with _Bounded(_open(path)) as file, _zip(file) as archive:
                members = archive.infolist()
        except Damaged as damage:
            self.add(student, week, path, shown, problem=str(damage))
            return
        others, any_found = [], False
        for member in members:
            parts = re.split(r"[/\\]", member.filename)
            hidden = any(part.startswith(".") and part.strip(".") for part in parts)
            if member.is_dir() or hidden or "__MACOSX" in parts:
                continue
            stem, suffix = os.path.splitext(parts[-1])
            if suffix.lower() != ".ipynb":
                others.append(parts[-1])
                continue
            named = self.week_in(stem)[0]
            if week and not named:
                others.append(parts[-1])
                continue
            folders = 0 if parts[-2:-1] == [named] else len(parts)
            self.add(
                student,
                named or stem,
                path,
                f"{shown}: {member.filename}",
                member.filename,
                # Behind the same notebook outside of the zip file.
                (int(parts[-1] != f"{named}.ipynb"), DEEPEST + folders),
                _problem_of(member),
            )
            any_found = True
        if not any_found:
            wanted = f"{week}.ipynb" if week else "notebook"
            problem = f"there is no {wanted} in {printable(path.name)} but {_some(others)}"
            self.add(student, week, path, shown, problem=problem)

    def week_in(self, name: str) -> tuple[str, str]:
        """The one week that a file's name holds, and what stands before it."""
        # One character for one, so that the place in it is the place in the name.
        text = re.sub(r"[ -]", "_", name).translate(_LOWER)
        hits = [
            (match.start(), week)
            for week in self.weeks
            for match in re.finditer(rf"(?<![a-z0-9]){re.escape(week)}(?![a-z0-9])", text)
        ]
        # The longer one where one week's name begins like another's.
        hits = [h for h in hits if not any(o[1] != h[1] and h[1] in o[1] for o in hits)]
        if len({week for _, week in hits}) != 1:
            return "", ""
        return hits[-1][1], name[: hits[-1][0]].strip(" _-.")

    def add(self, student, week, place, shown, member="", rank=(0, 0), problem="") -> None:
        self.found[student].append(_Found(week, place, shown, member, rank, problem))

    def pass_by(self, name: str, why: str) -> None:
        self.said.append(f"{printable(name)} was passed by: {why}")

    # What of it counts

    def submissions(self, only: str | None) -> list[Submission]:
        chosen = []
        for name, student in self.ids().items():
            weeks: dict[str, list[_Found]] = defaultdict(list)
            for found in self.found[name]:
                unnamed = only or (self.weeks[0] if len(self.weeks) == 1 else NO_WEEK)
                weeks[found.week or unnamed].append(found)
            for week in sorted(weeks):
                if only in (None, week):
                    chosen.append(self.choose(student, week, weeks[week]))
        return chosen

    def choose(self, student: str, week: str, several: list[_Found]) -> Submission:
        if week not in self.weeks:
            if week == NO_WEEK and several[0].problem:
                problem = several[0].problem
            else:
                known = ", ".join(self.weeks) or "none yet"
                problem = f"the course has no week {printable(week)!r}; wanted one of {known}"
            return Submission(
                student, safe_name(week), None, "", printable(several[0].shown), "refused", problem
            )
        good = sorted((f for f in several if not f.problem), key=lambda f: f.rank)
        best = good[0] if good else several[0]
        equal = [f for f in good if f.rank == best.rank]
        if len(equal) > 1:
            names = " and ".join(printable(f.shown) for f in equal[:5])
            more = ", ..." if equal[5:] else ""
            return Submission(
                student,
                week,
                shown=names + more,
                status="damaged",
                problem=f"there are {len(equal)} notebooks for this week, {names}{more}; "
                "hand in one of them",
            )
        for other in several:
            if other is not best:
                why = other.problem or f"{printable(best.shown)} is the one that counts"
                self.pass_by(other.shown, why)
        status = "damaged" if best.problem else ""
        shown = printable(best.shown)
        return Submission(student, week, best.place, best.member, shown, status, best.problem)

    def ids(self) -> dict[str, str]:
        """The id of each student by the name that was found, in the order of the ids."""
        ids, taken = {}, set()
        names = [name for name, found in self.found.items() if found]
        # Where capitals do not count in file names, Ana and ana must not share a page.
        for name in sorted(names, key=lambda name: (name != _folded(name), name)):
            ids[name] = safe_name(name)
            if _folded(ids[name]) in taken:
                ids[name] = _shortened(ids[name], name)
            taken.add(_folded(ids[name]))
            if ids[name] != name:
                self.said.append(
                    f"{printable(name)} is graded as {ids[name]}: not every file system can hold "
                    "the name as it is"
                )
        return dict(sorted(ids.items(), key=lambda pair: pair[1]))


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            found = [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]
    except PermissionError:
        return []
    return sorted(found, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _some(names: list[str]) -> str:
    return ", ".join(map(printable, names[:5])) + (", ..." if names[5:] else "") or "nothing"


def _too_large(size: int) -> str:
    limit = LARGEST_NOTEBOOK // 2**20
    return f"{size / 2**20:,.0f} MiB are too much; the limit is {limit} MiB"


# Names


_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")


def _student(name: str) -> str:
    """A student's name without what Moodle and Canvas put around it."""
    for pattern in (_MOODLE, _CANVAS):
        if found := pattern.fullmatch(name):
            return "_".join(found.groups())
    return name


def safe_name(name: str) -> str:
    """The name if it can be a file's on any system and an id in nbgrader; else one made of it.

    What is unfit becomes %XX, as in a URL, and can be read back; longer ones end in a digest.
    """
    inner = "".join(quote(_bytes(c), safe="") if _is_unfit(c) else c for c in name)
    if inner[:1] in (".", "-", " ", "~"):
        inner = f"%{ord(inner[0]):02X}{inner[1:]}"
    if inner[-1:] in (".", " "):
        inner = f"{inner[:-1]}%{ord(inner[-1]):02X}"
    if not inner or len(_bytes(inner)) > LONGEST_ID:
        return _shortened(inner, name)
    return inner


def _is_unfit(character: str) -> bool:
    # Control and format characters, among them those that turn the direction of writing; what file
    # systems and patterns of file names give a meaning; the sign of this encoding itself.
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") or (
        character in '/\\:*?"<>|[]%'
    )


def _shortened(text: str, name: str) -> str:
    digest = hashlib.sha256(_bytes(name)).hexdigest()[:10]
    return f"{_bytes(text)[: LONGEST_ID - 20].decode('utf-8', 'ignore')}~{digest}"


def _bytes(text: str) -> bytes:
    """The bytes of a name, also of one that was no UTF-8 on the disk."""
    return text.encode("utf-8", "surrogateescape" if _from_disk(text) else "surrogatepass")


def _from_disk(text: str) -> bool:
    return all("\udc80" <= c <= "\udcff" for c in text if "\ud800" <= c <= "\udfff")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def printable(name: str) -> str:
    """A name as a message may show it, on one line."""
    shown = "".join(c if c.isprintable() else "\ufffd" for c in str(name)[:300])
    return shown if len(str(name)) <= 300 else f"{shown}..."


# Files


def _open(path: Path) -> io.FileIO:
    """A plain file, opened without following a link anywhere and without waiting for anything."""
    path = Path(os.path.abspath(path))
    # A folder that may be entered but not listed is no obstacle.
    step = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.open(path.anchor, step)
    try:
        for part in path.parts[1:-1]:
            inner = os.open(part, step, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Opening a named pipe would wait for a writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(path.name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise Damaged("it is a link, not a file, or a folder on the way to it is one") from None
        if error.errno in (
            errno.ENOENT,
            errno.EACCES,
            errno.EPERM,
            errno.ENXIO,
            errno.ENAMETOOLONG,
        ):
            raise Damaged(f"it cannot be opened ({error.strerror})") from None
        raise
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise Damaged("it is no plain file")
    return io.FileIO(file, "rb")


class _Bounded(io.BufferedReader):
    """A file that gives a zip reader no more at once than a reasonable table of contents."""

    def read(self, size: int | None = -1) -> bytes:
        wanted = LARGEST_DIRECTORY + 1 if size is None or size < 0 else size
        if wanted <= LARGEST_DIRECTORY + 1:
            content = super().read(wanted)
            if len(content) <= LARGEST_DIRECTORY:
                return content
        raise Damaged("its zip file holds too many files")


def _zip(file: _Bounded) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except Damaged:
        raise
    except Exception:  # what zipfile raises on hostile bytes is not documented
        raise Damaged("its zip file cannot be opened") from None


def _problem_of(member: zipfile.ZipInfo) -> str:
    """Why a member is not read, by what the table of contents says of it."""
    parts = re.split(r"[/\\]", member.filename)
    if ".." in parts or not parts[0] or re.match(r"[A-Za-z]:", member.filename):
        return f"its zip file has a name that leads out of it, {printable(member.filename)!r}"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "it is a link in its zip file, not a file"
    if member.flag_bits & 1:
        return "its zip file is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "its zip file is packed in a way that only few programs can read"
    return _too_large(member.file_size) if member.file_size > LARGEST_NOTEBOOK else ""


def _read_member(path: Path, name: str) -> bytes:
    """One file out of a zip file, unpacked only as far as a notebook may be large."""
    with _Bounded(_open(path)) as file, _zip(file) as archive:
        try:
            member = archive.getinfo(name)
        except KeyError:
            raise Damaged("its zip file does not hold it any more") from None
        if problem := _problem_of(member):
            raise Damaged(problem)
        content = bytearray()
        try:
            with archive.open(member) as packed:
                while chunk := packed.read(2**16):
                    content += chunk
                    if len(content) > LARGEST_NOTEBOOK:
                        raise Damaged(
                            f"it is larger than {LARGEST_NOTEBOOK // 2**20} MiB when unpacked"
                        )
        except Damaged:
            raise
        except Exception:
            raise Damaged("it is damaged inside its zip file") from None
    return bytes(content)
