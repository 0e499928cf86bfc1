"""The page that a student reads: what each check asked, what came back, and what to do next.

Of a visible check the page shows all: it is in the student's own notebook. A hidden check has a
title and no more. Neither its text nor the numbers it uses may be found here, and not even the
message of an error that the student's code raised on those numbers, because a student can write
`raise ValueError(inputs)` and read them here. So what is said of a hidden part is written here or
in the week's source, and chosen by the reason, never quoted from it.

Everything else is quoted: the student's answers, what their cells printed, what the visible check
compared. It is data to the page (see `pages.py`).
"""

import base64
import binascii
import builtins
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from course.grade import pages
from course.grade.records import Result, Row
from course.source import Check, Exercise, Week

LONGEST_OUTPUT = 6_000  # characters of one output; the notebook itself has the rest
MOST_CHARACTERS = 400_000  # of all outputs on a page, so that a phone can open it
MOST_IMAGES = 12 * 2**20  # characters of all pictures on a page, base64
IMAGES = {"image/png": "iVBORw0KGgo", "image/jpeg": "/9j/"}  # how their base64 begins
UNWRITTEN = "YOUR ANSWER HERE"
OPEN = "not answered yet"  # how the reason of an answer begins that was never begun
_UNDEFINED = re.compile(r"(\w+) is not defined")


@dataclass
class Finding:
    """What came back from one failed check, or from several that failed in the same way."""

    titles: list[str]
    points: float
    max_points: float
    hidden: bool
    happened: str
    sentences: list[str]  # of the mistakes that were recognised
    comparison: list[tuple[str, str]]
    advice: list[str]
    compared: str = ""  # the visible check's text


@dataclass
class Block:
    """One exercise on the page."""

    name: str
    title: str
    points: float
    max_points: float
    passed: list[tuple[str, Row]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)  # what a person wrote about it
    answer: str = ""
    outputs: list[dict] = field(default_factory=list)

    @property
    def open(self) -> bool:
        """Nothing was written yet."""
        return bool(self.findings) and all(f.happened == _as_sentence(OPEN) for f in self.findings)


@dataclass
class Essay:
    """One written question on the page. The mark scheme is shown with the marks, not before."""

    name: str
    question: str
    points: float | None
    max_points: float
    note: str
    comment: str
    answer: str
    scheme: list[str]

    @property
    def open(self) -> bool:
        """Nothing was written yet."""
        return self.points is None and bool(self.note)


def page(
    result: Result,
    week: Week | None,
    executed: Mapping | None = None,
    written_comments: Mapping[str, str] | None = None,
) -> str:
    """The feedback on one submission, a whole HTML page.

    `week` is None for a week that the course does not have. `executed` is the notebook as it ran,
    from nbformat or from its JSON. `written_comments` are what a person wrote, by grade id; the
    points that a person gave come as rows with the status "marked".
    """
    view = _View(result, week, executed, written_comments or {})
    return pages.render("feedback", view.values())


class _View:
    """What the template needs, worked out from one result."""

    def __init__(self, result, week, executed, comments) -> None:
        self.result, self.week, self.comments = result, week, comments
        self.exercises = week.exercises if week else {}
        self.written = {w.name: w for w in week.written} if week else {}
        self.cells = _graded_cells(executed)
        self.space = _Space()
        self.executed = executed

    def values(self) -> dict:
        blocks, essays = self._blocks(), self._essays()
        checked = [row for row in self.result.rows if not is_by_hand(row)]
        earned = sum(row.points or 0.0 for row in checked)
        possible = sum(row.max_points for row in checked)
        refusal = ""
        if self.result.outcome != "graded" or _all_stopped(checked):
            refusal = next((r.reason for r in self.result.rows if r.reason), "it was not graded")
        begun = [block for block in blocks if block.findings and not block.open]
        return {
            "student": self.result.student,
            "name": self.result.week,
            "number": self.week.number if self.week else None,
            "title": self.week.title if self.week else self.result.week,
            "earned": earned,
            "possible": possible,
            "marked": [e for e in essays if e.points is not None],
            "waiting": sum(e.max_points for e in essays if e.points is None and not e.open),
            "refusal": refusal,
            "refusal_advice": _refusal_advice(self.result.outcome) if refusal else [],
            "summary": _summary(earned, possible, blocks),
            "blocks": [] if refusal else blocks,
            "first": begun[0] if len(begun) > 1 else None,
            "essays": essays if not refusal else [],
            "notes": self._general_notes(),
            "rest": [] if refusal else list(self._rest()),
            "result": self.result,
        }

    def _blocks(self) -> list[Block]:
        groups: dict[str, list[Row]] = {name: [] for name in self.exercises}
        for row in self.result.rows:
            if not is_by_hand(row):
                groups.setdefault(row.exercise, []).append(row)
        return [self._block(name, rows) for name, rows in groups.items() if rows]

    def _block(self, name: str, rows: list[Row]) -> Block:
        exercise = self.exercises.get(name)
        block = Block(
            name,
            heading(exercise) if exercise else name,
            sum(row.points or 0.0 for row in rows),
            sum(row.max_points for row in rows),
        )
        for row in rows:
            if row.status == "passed" or row.points == row.max_points:
                block.passed.append((self._title(row), row))
            else:
                _join(block.findings, self._finding(row, exercise, block))
        ids = {name, *(row.grade_id for row in rows)}
        block.notes = [note for at, note in self.result.notes.items() if at in ids]
        block.comments = [comment for at, comment in self.comments.items() if at in ids]
        if cell := self.cells.get(name):
            block.answer = _joined(cell.get("source")).strip()
            block.outputs = self.space.show(cell)
        return block

    def _title(self, row: Row) -> str:
        check = self._check(row)
        return check.title if check else row.check

    def _check(self, row: Row) -> Check | None:
        exercise = self.exercises.get(row.exercise)
        checks = exercise.checks if exercise else ()
        return next((check for check in checks if check.grade_id == row.grade_id), None)

    def _finding(self, row: Row, exercise: Exercise | None, block: Block) -> Finding:
        check, hidden = self._check(row), row.part == "hidden" and row.status != "marked"
        shown = check is not None and row.part == "visible" and not is_open(row.reason)
        sentences = _sentences(row, exercise)
        advice = _advice(
            row, exercise, bool(sentences), [f for f in block.findings if not f.hidden]
        )
        if hidden:
            happened, comparison = _hidden_words(row), []
        else:
            happened, comparison = _visible_words(row, sentences)
        if sentences and any(finding.sentences == sentences for finding in block.findings):
            sentences, happened = [], "The same mistake as above."
        return Finding(
            [self._title(row)],
            row.points or 0.0,
            row.max_points,
            hidden,
            happened,
            sentences,
            comparison,
            advice,
            check.visible.strip() if shown else "",
        )

    def _essays(self) -> list[Essay]:
        essays = []
        for row in self.result.rows:
            if not is_by_hand(row):
                continue
            written = self.written.get(row.grade_id)
            cell = self.cells.get(f"{row.grade_id}-answer", {})
            answer = _joined(cell.get("source")).strip()
            scheme = _scheme(written.mark_scheme) if written and row.points is not None else []
            essays.append(
                Essay(
                    row.grade_id,
                    _one_line(written.question) if written else row.grade_id,
                    row.points,
                    row.max_points,
                    row.reason if row.status in ("to mark", "marked") else "",
                    self.comments.get(row.grade_id, ""),
                    "" if answer == UNWRITTEN else answer,
                    scheme,
                )
            )
        return essays

    def _general_notes(self) -> list[str]:
        """What was mended and is not said beside an exercise."""
        said = {row.grade_id for row in self.result.rows if not is_by_hand(row)}
        said |= {row.exercise for row in self.result.rows if not is_by_hand(row)}
        return [note for at, note in self.result.notes.items() if at not in said]

    def _rest(self) -> Iterator[dict]:
        """The student's own cells that printed, drew or failed."""
        answers = {id(cell) for cell in self.cells.values()}
        for place, cell in enumerate((self.executed or {}).get("cells", ()), start=1):
            if cell.get("cell_type") != "code" or id(cell) in answers:
                continue
            if outputs := self.space.show(cell):
                failed = next((o["name"] for o in outputs if o["kind"] == "error"), "")
                first = _first_line(_joined(cell.get("source")))
                yield {"place": place, "first": first, "failed": failed, "outputs": outputs}


# What a row says


def is_by_hand(row: Row) -> bool:
    """Is it a written answer? A check stays a check when a person overrules its points."""
    return row.check == "written" or row.status == "to mark"


def is_open(words: str) -> bool:
    """Is it the reason of an answer that was never begun?"""
    return words.startswith(OPEN)


def names_a_limit(reason: str) -> bool:
    """Is it the reason of an answer that took too much, or that took its process down?"""
    return reason.startswith(tuple(_ENDINGS))


def _sentences(row: Row, exercise: Exercise | None) -> list[str]:
    """The sentences of the wrong answers that were recognised."""
    if exercise is None:
        return []
    return [wrong.says for wrong in exercise.wrongs if wrong.name in row.recognised]


def _visible_words(row: Row, sentences: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """What happened, without the sentences shown above it, and what `mmlearn.feedback` compared."""
    if row.status == "marked":
        return "A person gave these points.", []
    words, comparison = row.said or row.reason, []
    if match := re.search(r"\n  (yours|raised): (.*); wanted: (.*)\Z", words, re.DOTALL):
        label, got, wanted = match.groups()
        comparison = [("yours" if label == "yours" else "yours raised", got), ("wanted", wanted)]
        words = words[: match.start()]
    for sentence in sentences:
        words = words.replace(sentence, "")
    words = "\n".join(line for line in words.split("\n") if line.strip() not in ("", "Or:"))
    return _as_sentence(words.strip()) if words == row.reason else words.strip(), comparison


def _as_sentence(reason: str) -> str:
    """A reason, which completes `no points because ...`, as a sentence to the student."""
    if is_open(reason):
        return "Not answered yet."
    if match := _UNDEFINED.fullmatch(reason):
        return f"`{match[1]}` is not defined."
    for begins, instead in (("the answer raised ", "Your answer raised "), ("it ", "It ")):
        if reason.startswith(begins):
            reason = instead + reason.removeprefix(begins)
    return reason[:1].upper() + reason[1:] + ("" if reason.endswith((".", "!", "?")) else ".")


def _hidden_words(row: Row) -> str:
    """What may be said about a hidden part that failed; nothing in it can carry its numbers."""
    reason = row.reason
    if is_open(reason):
        return "Not answered yet."
    if "comes from mmlearn" in reason:
        return "The answer is mmlearn's own, so it earns nothing."
    if match := re.match(r"(?:the answer|it) raised (\w+)", reason):
        kind = getattr(builtins, match[1], None)
        known = isinstance(kind, type) and issubclass(kind, Exception)
        return f"Your code raised {_an(match[1]) if known else 'an error'} on a hidden input."
    for begins in _ENDINGS:
        if reason.startswith(begins):
            return _as_sentence(
                reason.split(" (")[0]
            )  # an exit code is a number that a student can choose
    if reason.startswith(("the check could not use", "what the answer returned is too large")):
        return "What your code returned on a hidden input has not the type or shape asked for."
    return "It does not hold on inputs that only the grader has."


def _an(kind: str) -> str:
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


# How a reason begins (`grader.py`, `checks.py`), and what a student can do about it.
_ENDINGS = {
    "it ran longer than": (
        "Look for a loop that does not come to its end, and for a loop over single numbers where "
        "one tensor operation does it. `%time` in front of a line says how long it takes."
    ),
    "checking what it returned took": (
        "What your answer returns is far larger than what was asked for: look at its shape."
    ),
    "it needed more than": (
        "Look for a tensor that grows with each step, and for shapes that broadcast into a far "
        "larger one: print the shapes on the way."
    ),
    "it started more than": "Your answer needs no processes of its own: leave them out.",
    "it ended its own process": (
        "Take `exit()`, `quit()` and `os._exit()` out of the notebook: they end Python itself, so "
        "that nothing is left to check."
    ),
    "its process": (
        "Restart the kernel and run all cells from the top. If that works for you, show your "
        "instructor this page."
    ),
}

# By the word that names a kind of check: how to look for the fault without its numbers.
_TRY = {
    "overflow": (
        "Call it with values of a thousand and of minus a thousand: what comes back must be finite."
    ),
    "numbers": (
        "Call it with very large values and with other dtypes: what comes back must be finite, and "
        "of the dtype that came in."
    ),
    "gradient": (
        "Let an input require its gradient and call `backward()`: no `item()`, `detach()`, "
        "`no_grad` or copy into a new tensor may stand between the inputs and the result."
    ),
    "refusal": (
        "Give it the input named in the title: it must raise the error that the exercise asks for."
    ),
    "masks": "Call it with masks of your own, with one that allows everything, and with none.",
    "law": "Test that sentence yourself, on small random inputs whose axes differ in length.",
}
_TRY |= {"gradients": _TRY["gradient"], "laws": _TRY["law"]}
_TRY_OTHERS = (
    "Call it with other inputs than the visible example: more rows, another width, all axes of "
    "different lengths, other random numbers. Compare with what the exercise's equation gives."
)


def _advice(
    row: Row, exercise: Exercise | None, recognised: bool, visible: list[Finding]
) -> list[str]:
    """The next step, in words. What `visible` checks found comes first: it can be tried at home."""
    reason, name = row.reason, row.exercise
    if row.status == "marked":
        return []
    hints = exercise.header.text.count("<summary>Hint") if exercise else 0
    hint = ""
    if hints:
        hint = "Open Hint 1 in the exercise" if hints > 1 else "Open the hint in the exercise"
    cell, check = f"`# Exercise {name}`", f"`# Check {row.grade_id}`"
    if row.status == "stopped":
        return ["Show your instructor this page: it is a matter for the grader."]
    if is_open(reason):
        begin = f" {hint} if you do not see how to begin." if hint else ""
        minutes = f" It takes about {exercise.minutes} minutes." if exercise else ""
        return [f"Write your answer into the cell that begins with {cell}.{minutes}{begin}"]
    if _UNDEFINED.fullmatch(reason):
        return [
            f"The checks look for that name, as it is spelled in the exercise: define it in the "
            f"cell that begins with {cell}."
        ]
    if reason.startswith("the answer cell stopped with"):
        again = (
            "Restart the kernel and run all cells from the top: a name that you deleted or renamed "
            "may still live in your kernel, and the grader begins with an empty one."
        )
        return [again]
    if "comes from mmlearn" in reason or "is taken from mmlearn" in reason:
        return ["Write it yourself, and compare it with mmlearn's afterwards."]
    for begins, advice in _ENDINGS.items():
        if reason.startswith(begins):
            return [advice]
    if row.part == "hidden" and visible:
        return ["Mend what is said above first: this may well go with it."]
    if row.part == "hidden":
        kind = next((word for word in row.check.split("_") if word in _TRY), "")
        return ["Look for that in your answer." if recognised else _TRY.get(kind, _TRY_OTHERS)]
    run = f"Then run the cell {check} in your notebook: it says nothing when all is well."
    if not recognised and hint:
        return [f"{hint} if the numbers do not tell you where to look.", run]
    return [run.replace("Then run", "Change your answer, then run")]


def _join(findings: list[Finding], new: Finding) -> None:
    """Say once what several checks of an exercise have in common."""
    for finding in findings:
        alike = (finding.happened, finding.sentences, finding.comparison, finding.advice)
        if alike == (new.happened, new.sentences, new.comparison, new.advice):
            finding.titles += new.titles
            finding.points += new.points
            finding.max_points += new.max_points
            finding.hidden = finding.hidden and new.hidden
            return
    findings.append(new)


# The top of the page


def _summary(earned: float, possible: float, blocks: list[Block]) -> str:
    missing = [block for block in blocks if block.findings]
    begun = [block for block in missing if not block.open]
    whole = len(blocks) - len(missing)
    if not missing:
        return "Every check passes. There is nothing to mend."
    if not begun and not whole:
        return "No exercise is answered yet. Begin with the first: later ones build on it."
    done = f"{_word(whole)} of {_word(len(blocks))} exercises right in full"
    if not begun:
        return f"{done.capitalize()}. The rest is still open; nothing of what you wrote is wrong."
    if not whole:
        return "No exercise is right in full yet. Below it says, for each, where to look."
    if len(missing) == 1 and possible and earned / possible >= 0.5:
        return f"{done.capitalize()}. One is left, and below it says where to look."
    return f"{done.capitalize()}. Below it says, for each of the others, where to look."


def _word(count: int) -> str:
    words = "none one two three four five six seven eight nine ten".split()
    return words[count] if count < len(words) else str(count)


def _all_stopped(rows: list[Row]) -> bool:
    return bool(rows) and all(row.status == "stopped" for row in rows)


def _refusal_advice(outcome: str) -> list[str]:
    if outcome == "refused":
        return [
            "Look at the name of the file: it should be the one under which the week was handed "
            "out. Then hand it in again."
        ]
    if outcome == "graded":  # and every check stopped
        return [
            "Restart the kernel and run all cells from the top. If that works for you, show your "
            "instructor this page."
        ]
    return [
        "Open the notebook in JupyterLab. If it opens, run every cell, save it, and hand in the "
        "file that you saved.",
        "If it does not open, fetch a fresh copy of the week, and copy your answers into it.",
    ]


def heading(exercise: Exercise) -> str:
    """The first heading of an exercise's header."""
    for line in exercise.header.text.split("\n"):
        if line.startswith("#"):
            return line.lstrip("#").strip()
    return exercise.name


def _one_line(markdown: str) -> str:
    """A written question as a sentence: without the marks for bold, in one line."""
    return " ".join(markdown.replace("**", "").split())


def _scheme(text: str) -> list[str]:
    """The lines of a mark scheme, each list item one."""
    items = re.split(r"\n(?=[-*] )", text.strip())
    return [" ".join(item.lstrip("-* ").split()) for item in items if item.strip()]


# The student's cells


def _graded_cells(notebook: Mapping | None) -> dict[str, Mapping]:
    """By grade id, or by cell id for the cells below a written question."""
    cells = {}
    for cell in (notebook or {}).get("cells", ()):
        marks = cell.get("metadata", {}).get("nbgrader")
        name = marks.get("grade_id") if isinstance(marks, Mapping) else None
        below = cell.get("id", "")
        if name or below.endswith("-answer"):
            cells.setdefault(name or below, cell)
    return cells


class _Space:
    """Outputs as the template shows them, until the page is full."""

    def __init__(self) -> None:
        self.characters, self.images = MOST_CHARACTERS, MOST_IMAGES

    def show(self, cell: Mapping) -> list[dict]:
        shown = (self._output(output) for output in cell.get("outputs", ()))
        return [output for output in shown if output]

    def _output(self, output: Mapping) -> dict | None:
        kind = output.get("output_type")
        if kind == "stream":
            return self._text(output.get("text", ""))
        if kind == "error":
            trace = "\n".join(_joined(line) for line in output.get("traceback", ()))
            name, value = _joined(output.get("ename", "")), _joined(output.get("evalue", ""))
            shown = self._text(trace.strip() or f"{name}: {value}")
            return shown and shown | {"kind": "error", "name": name}
        data = output.get("data", {})
        plain = _joined(data.get("text/plain", ""))
        for mime, beginning in IMAGES.items():
            content = re.sub(r"\s", "", _joined(data.get(mime, "")))
            if not content.startswith(beginning) or not _is_base64(content):
                continue
            self.images -= len(content)
            if self.images < 0:
                return {"kind": "note", "text": "A figure is left out: the page has too many."}
            about = output.get("metadata", {}).get(mime)
            described = _joined(about.get("alt")) if isinstance(about, Mapping) else ""
            described = described or plain
            alt = described if described and not described.startswith("<") else "A figure"
            return {"kind": "image", "source": f"data:{mime};base64,{content}", "alt": alt[:300]}
        return self._text(plain) if plain else None

    def _text(self, text: object) -> dict | None:
        text = _joined(text).rstrip()
        if not text:
            return None
        room = max(0, min(LONGEST_OUTPUT, self.characters))
        self.characters -= len(text[:room])
        cut = len(text) > room
        return {"kind": "text", "text": text[:room], "cut": len(text) - room if cut else 0}


def _first_line(source: str) -> str:
    """By which a person knows a cell again: its first line that is no comment."""
    lines = [line.strip() for line in source.split("\n") if line.strip()]
    return next((line for line in lines if not line.startswith("#")), "")[:80]


def _joined(text: object) -> str:
    """The text of a notebook's field, which may be a list of lines."""
    if isinstance(text, (list, tuple)):
        return "".join(part for part in text if isinstance(part, str))
    return text if isinstance(text, str) else ""


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True
