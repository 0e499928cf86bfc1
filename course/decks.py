"""Turns the decks in course/slides/ into slides, with the figures that their weeks draw.

A deck is Markdown for Marp and has its week's name. It shows a figure by the name that the week
gave it, `![w:900 What is to be seen](w03_clip/memory.png)`, and never holds a picture itself: the
pictures are taken from the executed week, so slides and notebook cannot disagree. A run that
`course check` has kept is used when nothing has changed since; otherwise the week is run.

Written are build/slides/WEEK.md with its pictures beside it, which editors with a Marp preview
show, and on demand WEEK.html and WEEK.pdf, which need no network and no other file.
"""

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

from course.classroom import write_atomically
from course.source import CourseError, read_week, repo_root, resolve_week, week_names

FRONT = {"marp": "true", "paginate": "true", "math": "mathjax", "theme": "default"}
MARP = "@marp-team/marp-cli@4"
# Only what a slide needs to look like the course's figures, and a picture to fit below its heading.
STYLE = """\
<style>
section { font-size: 30px; padding: 52px 72px 40px; align-content: start; }
section:not(:has(img, table, pre)) { font-size: 35px; }
section.lead { align-content: center; }
section h1, section h2 { color: #0072B2; margin: 0 0 20px; }
section h1 { font-size: 58px; }
section h2 { font-size: 40px; }
section img { display: block; margin: 0.3em auto; max-height: 420px; object-fit: contain; }
section table { display: table; width: auto; margin: 0.6em auto; }
section pre { font-size: 0.85em; }
</style>"""
# Marp reads each word of a description as an option, too: "50%" would shrink the picture. It drops
# what is escaped, but a sign without width makes of the option a word.
_JOINER = "\N{WORD JOINER}"
_FILTERS = "blur|brightness|contrast|drop-shadow|grayscale|hue-rotate|invert|opacity|saturate|sepia"
_OPTION = rf"[\d.]+%|(w|h|width|height):\S+|bg|({_FILTERS})(:\S+)?"
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]*)\)")
_DIRECTIVE = re.compile(r"_?(class|paginate|header|footer|color|background\w+|theme|style|size): ")
_COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
# What is fetched when a page opens; a link is only followed by a person.
_FETCHED = re.compile(
    r"""<(?:img|script|link|iframe|video|audio|source|image)\b[^>]*?"""
    r"""(?:src|href)=["'](?!data:|#)([^"']+)"""
    r"""|url\(["']?(?!data:|#)(\w+://[^)"']+)"""
    r"""|@import\s+["'(]?(?:url\()?([^;]+)"""
)


@dataclass(frozen=True)
class Image:
    """A figure on a slide: Marp's options, its description, and its name in the week."""

    options: str
    alt: str
    name: str


@dataclass(frozen=True)
class Slide:
    """One slide and the line of the deck on which it begins."""

    text: str
    line: int

    @cached_property
    def notes(self) -> list[str]:
        """What the presenter reads: all comments but those to Marp, such as `_class: lead`."""
        comments = [found.strip() for found in _COMMENT.findall(self.text)]
        return [text for text in comments if not _DIRECTIVE.match(text)]

    @cached_property
    def heading(self) -> str:
        found = re.search(r"^#{1,2} +(.+)$", self.text, re.MULTILINE)
        return found[1].strip() if found else ""

    @cached_property
    def images(self) -> list[tuple[str, str]]:
        """The text in the brackets and the address of every picture."""
        return _IMAGE.findall(_COMMENT.sub("", self.text))

    @cached_property
    def words(self) -> list[str]:
        """What an audience reads: without notes, pictures and signs; a formula is one word."""
        text = _IMAGE.sub("", _COMMENT.sub("", self.text))
        text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", " formula ", text, flags=re.DOTALL)
        text = re.sub(r"\]\([^)]*\)|<[^>]+>", " ", text)
        return re.findall(r"[^\W_][\w’'.,×/+-]*", text)


@dataclass(frozen=True)
class Deck:
    """One deck, read and held to what makes it work."""

    name: str
    path: Path
    front: dict[str, str]
    slides: list[Slide]

    @property
    def images(self) -> list[tuple[Slide, Image]]:
        """Every figure that the deck shows, with its slide."""
        return [
            (slide, self.image(slide, *found)) for slide in self.slides for found in slide.images
        ]

    def image(self, slide: Slide, inside: str, address: str) -> Image:
        """The figure that `![inside](address)` means."""
        match = re.fullmatch(rf"{self.name}/(\w+)\.png", address)
        if not match:
            self.fail(
                slide.line,
                f"the picture {address!r} is no figure of the week: write {self.name}/NAME.png.",
            )
        words = inside.split()
        first = next(
            (i for i, w in enumerate(words) if not re.fullmatch(r"[wh]:\d+", w)), len(words)
        )
        return Image(" ".join(words[:first]), " ".join(words[first:]), match[1])

    def fail(self, line: int, sentence: str):
        raise CourseError(f"{self.path.name} line {line}: {sentence}")


@dataclass(frozen=True)
class Made:
    """What was written for a week, and where its figures are from."""

    week: str
    slides: int
    figures: int
    ran: bool
    files: list[str]

    def as_json(self) -> dict:
        return dict(vars(self))


# Reading


def decks_folder(folder: Path | None = None) -> Path:
    """The folder of the decks: the given one, or the checkout's."""
    return Path(folder) if folder is not None else repo_root() / "course" / "slides"


def read_deck(path: Path) -> Deck:
    """Read a deck and see that Marp will understand it.

    Raises: CourseError, naming file, line and way out.
    """
    lines = path.read_text("utf-8").split("\n")
    end = lines.index("---", 1) if lines[0] == "---" and "---" in lines[1:] else 0
    front = dict(line.split(": ", 1) for line in lines[1:end] if ": " in line)
    deck = Deck(path.stem, path, front, _slides(path, lines, end + 1))
    for key, value in FRONT.items():
        if front.get(key) != value:
            deck.fail(1, f"the front matter does not say `{key}: {value}`: add it between `---`.")
    if not front.get("title"):
        deck.fail(1, "the front matter has no `title: ...`: give the deck its week's question.")
    return deck


def _slides(path: Path, lines: list[str], start: int) -> list[Slide]:
    ends, fenced, comment = [], False, False
    for number, line in enumerate(lines[start:], start):
        fenced ^= line.lstrip().startswith("```")
        comment = (comment or "<!--" in line) and "-->" not in line
        if line.rstrip() != "---" or fenced:
            continue
        if comment or lines[number - 1].strip():
            # Below a text `---` makes it a heading, and in a note it ends no slide.
            raise CourseError(
                f"{path.name} line {number + 1}: this `---` ends no slide: put an empty line "
                "before it, and outside of a note."
            )
        ends.append(number)
    slides = []
    for begin, end in zip([start, *(end + 1 for end in ends)], [*ends, len(lines)]):
        first = next((n for n in range(begin, end) if lines[n].strip()), begin)
        slides.append(Slide("\n".join(lines[first:end]).rstrip(), first + 1))
    return slides


def figures_of(week) -> dict[str, int]:
    """The figures that a week shows: their names, and the lines of their cells.

    Raises: CourseError, for a name that is used twice or is not written out.
    """
    names = {}
    for cell in week.given:
        for node in ast.walk(ast.parse(cell.text)):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "show"):
                continue
            given = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "name")]
            name = getattr(given[0], "value", None) if given else None
            where = f"{week.path.name} line {cell.line + node.lineno - 1}: "
            if not isinstance(name, str):
                raise CourseError(where + "give show the figure's name as a written-out string.")
            if name in names:
                raise CourseError(where + f"there is a figure {name!r} already: rename one.")
            names[name] = cell.line
    return names


def check_figures(deck: Deck, week) -> None:
    """Raise a CourseError if a slide shows a figure that its week does not draw."""
    there = figures_of(week)
    for slide, image in deck.images:
        if image.name not in there:
            deck.fail(
                slide.line,
                f"{week.name} draws no figure {image.name!r}; it has "
                f"{', '.join(sorted(there)) or 'none'}.",
            )


# Figures


def kept_run(week, folder: Path):
    """The executed notebook that `course check` kept, or None if it may show something old.

    It counts when the same cells ran with the parameters as they stand there, to the end, after
    the last change to mmlearn.
    """
    import nbformat

    from course.build import solution_notebook

    try:
        notebook = nbformat.read(folder / f"{week.name}.ipynb", as_version=4)
        run = notebook.metadata.papermill
        cells = [
            c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])
        ]
        started = datetime.fromisoformat(run.start_time).timestamp()
        whole = all(
            c.metadata.papermill.status == "completed" for c in cells if c.cell_type == "code"
        )
    except (OSError, ValueError, AttributeError, TypeError, nbformat.ValidationError):
        return None
    same = [(c.cell_type, c.source) for c in cells] == [
        (c.cell_type, c.source) for c in solution_notebook(week).cells
    ]
    default = dict(run.get("parameters", {})) == {
        "SEED": 0, "DEVICE": "cpu", "SCALE": "cpu", "DATA": "embedded"
    }  # fmt: skip
    changed = max(path.stat().st_mtime for path in (repo_root() / "mmlearn").rglob("*.py"))
    return notebook if same and default and whole and changed < started else None


def pictures_of(notebook) -> dict[str, tuple[bytes, str]]:
    """The figures in an executed notebook: by name, the PNG and its description."""
    found = {}
    for output in (o for cell in notebook.cells for o in cell.get("outputs", [])):
        said = output.get("metadata", {}).get("image/png", {})
        if "name" in said:
            found[said["name"]] = base64.b64decode(output.data["image/png"]), said["alt"]
    return found


def _run(names, weeks, folder):
    from course.check import check

    return list(check(names, folder=weeks, to=folder))


# Writing


def make_slides(
    names: Iterable[str] | None = None,
    *,
    html: bool = False,
    pdf: bool = False,
    weeks: Path | None = None,
    decks: Path | None = None,
    to: Path | None = None,
    run: Callable = _run,
    on_step: Callable[[str, int, int], None] = lambda what, step, steps: None,
) -> list[Made]:
    """Write the slides of the named weeks, or of all that have a deck.

    `run(names, weeks, folder)` runs the weeks whose kept run is out of date. `on_step` is told what
    is being made, and which of how many steps that is. `weeks`, `decks` and `to` take the places of
    the checkout's folders. Everything is validated before the first week is run.
    Raises: CourseError, also where Marp is wanted and is not there.
    """
    import nbformat

    chosen = [(deck, read_week(deck.name, weeks)) for deck in _decks(names, weeks, decks)]
    for deck, week in chosen:
        check_figures(deck, week)
    kinds = [kind for kind, wanted in (("html", html), ("pdf", pdf)) if wanted]
    marp = find_marp() if kinds else []
    to = Path(to) if to is not None else repo_root() / "build" / "slides"
    runs = to.parent / "check"
    kept = {week.name: kept_run(week, runs) for _, week in chosen}
    if missing := [name for name, notebook in kept.items() if notebook is None]:
        for done in run(missing, weeks, runs):
            if done.failure:
                raise CourseError(
                    f"{done.week} stopped at {done.failure.place}, so it has no figures: "
                    f"{done.failure.error}. Mend it with `python -m course check {done.week}`."
                )
            kept[done.week] = nbformat.read(done.notebook, as_version=4)
    made, step, steps = [], 0, len(chosen) * (1 + len(kinds))
    for deck, _ in chosen:
        files = [to / f"{deck.name}.{kind}" for kind in ("md", *kinds)]
        for file in files:
            on_step(file.name, step, steps)
            if file.suffix == ".md":
                pictures = _write(deck, pictures_of(kept[deck.name]), to)
            else:
                _convert(marp, deck, pictures, file)
            step += 1
        ran = deck.name in missing
        made.append(Made(deck.name, len(deck.slides), len(pictures), ran, [str(f) for f in files]))
    on_step("done", steps, steps)
    return made


def _decks(names, weeks, decks) -> list[Deck]:
    folder = decks_folder(decks)
    there = {path.stem: path for path in sorted(folder.glob("w*.md"))}
    for stem in there:
        if stem not in week_names(weeks):
            raise CourseError(f"{folder / stem}.md is the deck of no week: name it as its week.")
    chosen = dict.fromkeys(resolve_week(name, weeks) for name in names or there)
    for name in chosen:
        if name not in there:
            raise CourseError(f"{name} has no deck: write {folder / name}.md.")
    if not chosen:
        raise CourseError(f"There is no deck: {folder} holds no wNN_topic.md.")
    return [read_deck(there[name]) for name in chosen]


def _write(deck: Deck, pictures: dict, to: Path) -> dict[str, tuple[bytes, str]]:
    """Write a deck and its pictures; return those pictures by name."""
    wanted = {image.name for _, image in deck.images}
    if lost := sorted(wanted - set(pictures)):
        raise CourseError(
            f"{deck.name} ran without showing {lost[0]!r}: let show(...) be the last line of its "
            "cell, outside of any function, loop or condition."
        )
    folder = to / deck.name
    try:
        shutil.rmtree(folder, ignore_errors=True)  # figures that no slide shows any more
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(wanted):
            write_atomically(folder / f"{name}.png", pictures[name][0])
        text = _marp_text(deck, pictures, lambda name: f"{deck.name}/{name}.png")
        write_atomically(to / f"{deck.name}.md", text.encode())
    except OSError as error:
        raise CourseError(f"{folder} cannot be written ({error.strerror}): make room.") from error
    return {name: pictures[name] for name in wanted}


def _marp_text(deck: Deck, pictures: dict, address: Callable[[str], str]) -> str:
    """The deck for Marp: the course's style, and each picture with an address and a description."""

    def image(match):
        found = deck.image(deck.slides[0], match[1], match[2])
        alt = found.alt or pictures[found.name][1]
        return f"![{found.options} {_plain(alt)}]({address(found.name)})"

    # Quoted: a colon in the title would void the whole front matter, in silence.
    front = (
        {"lang": "en"} | deck.front | {"title": json.dumps(deck.front["title"], ensure_ascii=False)}
    )
    front = "\n".join(f"{key}: {value}" for key, value in front.items())
    slides = [_IMAGE.sub(image, _unwrap(slide.text)) for slide in deck.slides]
    return f"---\n{front}\n---\n\n{STYLE}\n\n" + "\n\n---\n\n".join(slides).strip() + "\n"


def _unwrap(text: str) -> str:
    """Join the lines of each paragraph: Marp breaks a line where its source does."""
    lines, goes_on, fenced = [], False, False
    for line in text.split("\n"):
        fence = line.lstrip().startswith("```")
        apart = fence or fenced or not line.strip()  # belongs to no paragraph
        if goes_on and not apart and not re.match(r"\s*([-*+] |\d+[.)] |-->|[>|<#])", line):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
        fenced ^= fence
        goes_on = not apart and not re.match(r"\s*[|<#]", line)
    return "\n".join(lines)


def _plain(alt: str) -> str:
    """A description in which Marp finds no option, and Markdown no sign of its own."""
    alt = alt.translate(str.maketrans("[]", "()", "*`$\\")).replace("<", f"<{_JOINER}")
    words = alt.split()
    return " ".join(f"{w}{_JOINER}" if re.fullmatch(_OPTION, w) else w for w in words)


# Marp


def find_marp() -> list[str]:
    """The command that starts Marp: the one on PATH, or npx, which fetches it the first time."""
    if found := shutil.which("marp"):
        return [found]
    if shutil.which("node") and (npx := shutil.which("npx")):
        return [npx, "--yes", MARP]
    raise CourseError(
        "HTML and PDF are made by Marp, which is not here: install Node.js (Debian: apt-get "
        "install nodejs npm) and run this again, or leave out --html and --pdf "
        "and open build/slides in an editor with a Marp preview."
    )


def _convert(marp: list[str], deck: Deck, pictures: dict, target: Path) -> None:
    """Let Marp make a page or a PDF that holds all of its pictures and fetches nothing."""
    with tempfile.TemporaryDirectory(prefix="course-slides-") as scratch:
        folder = Path(scratch)
        codes = {name: base64.b64encode(png).decode() for name, (png, _) in pictures.items()}
        text = _marp_text(deck, pictures, lambda name: f"data:image/png;base64,{codes[name]}")
        (folder / "deck.md").write_text(text, "utf-8")
        # Signs such as arrows stay letters: as pictures they would come from another host.
        options = {"options": {"emoji": {"shortcode": False, "unicode": False}}}
        (folder / "config.json").write_text(json.dumps(options), "utf-8")
        made = folder / f"deck{target.suffix}"
        command = [*marp, "--no-stdin", "--config", "config.json", "deck.md", "--output", made.name]
        if target.suffix == ".pdf":
            command.append("--pdf-outlines")
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=os.environ | {"NO_COLOR": "1"},
        )
        if done.returncode or not made.is_file():
            said = [
                line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()
            ]
            said += ["it said nothing"]
            problem = next((line for line in said if "error" in line.lower()), said[0])
            raise CourseError(f"Marp could not make {target.name}: {problem.rstrip('.')}.")
        if target.suffix == ".html":
            _refuse_addresses(made.read_text("utf-8"), target)
        write_atomically(target, made.read_bytes())


def _refuse_addresses(page: str, target: Path) -> None:
    if found := _FETCHED.search(page):
        address = next(part for part in found.groups() if part)
        raise CourseError(
            f"{target.name} would fetch {address[:90]}: slides must work without a network; take "
            "that out of the deck."
        )
