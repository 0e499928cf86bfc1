"""Makes a submitted notebook whole: each graded cell of the week is in it, once, as released.

What a student meant is looked for in this order: cell ids and grade ids; the first lines that the
build writes (`# Exercise NAME`, `# Check NAME-ASPECT, ...`); the names that an exercise asks for;
the released text, the same or similar. Whatever is found then gets the released metadata, and a
check the released text, so that nothing which a student does to a check counts. Every repair is
told in words that the student reads in the feedback.

Nothing is run and no more is guessed than is clear: an answer stays where the student put it, and
the student's own cells stay what they are.
"""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import count

from nbformat import NotebookNode

from course.grade.intake import Damaged
from course.grade.notebook import read_notebook
from course.names import names_bound

__all__ = ["Healed", "heal", "read_notebook"]

_MARKER = re.compile(r"#[ \t]*(?:exercise|check|hidden check)[ \t]+([\w-]+)", re.IGNORECASE)
_DEFINED = re.compile(
    r"^(?:async[ \t]+def|def|class)[ \t]+(\w+)|^(\w+)[ \t]*(?::[^=\n]+)?=(?!=)", re.M
)
_FENCED = re.compile(r"^```[ \t]*(?:python|py)?[ \t]*\n(.*?)^```", re.M | re.S | re.I)
_SIMILAR = 0.6  # share of lines in common, from which a cell is taken for an edited released one
_READ = 100_000  # characters of a cell that are looked at to find out what it is


@dataclass
class Healed:
    """A notebook with each graded cell once, and what was mended, by grade id ("" is all of it)."""

    notebook: NotebookNode
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class _Cell:
    """A submitted cell; `of` is the key of the released cell that it stands for, or empty."""

    node: NotebookNode
    of: str = ""

    @property
    def source(self) -> str:
        return self.node.source

    @property
    def is_code(self) -> bool:
        return self.node.cell_type == "code"


@dataclass(frozen=True)
class _Released:
    """A cell of the released notebook and what it is there for.

    `role` is answer, check, question, written (the cell below a question), given, experiment or
    prose; `key` is the grade id, or else the cell id.
    """

    key: str
    role: str
    node: NotebookNode
    names: frozenset[str] = frozenset()

    @property
    def is_graded(self) -> bool:
        return self.role in ("answer", "check", "question")


def heal(notebook: NotebookNode, released: NotebookNode) -> Healed:
    """Mend what `read_notebook` read; neither argument is changed.

    Raises: Damaged, when no graded cell of the week is found, or its language is another.
    """
    repair = _Repair(notebook, released)
    repair.claim()
    repair.find_answers()
    repair.find_checks()
    repair.find_questions()
    repair.find_written()
    repair.find_given()
    repair.put_back()
    repair.order_given()
    repair.say_language(notebook.metadata.get("language", "python"))
    return Healed(repair.whole(released), repair.notes())


class _Repair:
    """The cells of one notebook on their way to be whole. The methods are run in `heal`'s order."""

    def __init__(self, notebook: NotebookNode, released: NotebookNode) -> None:
        self.released = {cell.key: cell for cell in _read_released(released)}
        self.cells = list(self._split(_Cell(deepcopy(cell)) for cell in notebook.cells))
        self.said: dict[str, list[str]] = defaultdict(list)
        self.said[""] += notebook.metadata.get("mended", [])
        self.chosen: dict[str, _Cell] = {}

    def say(self, key: str, sentence: str) -> None:
        self.said[key].append(sentence)

    def notes(self) -> dict[str, str]:
        return {key: "; ".join(dict.fromkeys(said)) for key, said in self.said.items() if said}

    def of_role(self, *roles: str) -> list[_Released]:
        return [cell for cell in self.released.values() if cell.role in roles]

    def own(self, wanted: _Released) -> list[_Cell]:
        """The cells that say they are this one, by whatever sign."""
        return [cell for cell in self.cells if cell.of == wanted.key]

    def free(self, kind: str) -> list[_Cell]:
        return [cell for cell in self.cells if not cell.of and cell.node.cell_type == kind]

    def choose(self, cell: _Cell, wanted: _Released) -> None:
        """Let this cell stand for the released one, and no other. Bare copies of it go.

        The stub in a copy would take the answer's names away again.
        """
        others = [other for other in self.own(wanted) if other is not cell]
        for other in others:
            other.of = ""
        bare = {id(other) for other in others if _is_untouched(other, wanted)}
        self.cells = [other for other in self.cells if id(other) not in bare]
        cell.of, self.chosen[wanted.key] = wanted.key, cell

    # What is what

    def _split(self, cells: Iterable[_Cell]) -> Iterator[_Cell]:
        """Each cell, cut where a graded cell begins in its middle, and where a whole one ends."""
        for cell in cells:
            lines = cell.source.split("\n")
            head = next((i for i, line in enumerate(lines) if line.strip()), 0)
            cuts, tries = [], set()
            for place, line in enumerate(lines):
                if not (key := self._marked(line)):
                    continue
                if place > head:
                    cuts.append(place)
                text = self.released[key].node.source.rstrip().split("\n")
                end = place + len(text)
                below = next((line for line in lines[end:] if line.strip()), "")
                if lines[place:end] == text and below and not below[0].isspace():
                    cuts.append(end)
                    if self.released[key].role == "check":
                        tries.add(end)
            cuts = sorted(set(cuts))
            if not cuts or len(cuts) > 2 * len(self.released):  # more than a week merged into one
                yield cell
                continue
            for start, end in zip([0, *cuts], [*cuts, len(lines)], strict=True):
                part = _Cell(deepcopy(cell.node))
                part.node.source = "\n".join(lines[start:end]).strip("\n")
                # Below a check, code that defines nothing only tries the check's own names.
                if start in tries and not _bound(part.source):
                    continue
                if start:
                    part.node.id, part.node.metadata = "", NotebookNode()
                yield part

    def _marked(self, line: str) -> str:
        """The key that a line names as the build does at the head of a graded cell, or nothing."""
        found = _MARKER.match(line) if line.startswith("#") else None
        cell = self.released.get(found.group(1)) if found else None
        return cell.key if cell is not None and cell.role in ("answer", "check") else ""

    def claim(self) -> None:
        """By grade id, cell id, first line, or the same text."""
        for cell in self.cells:
            marks = cell.node.metadata.get("nbgrader", {}).get("grade_id")
            first = next((line for line in cell.source.split("\n") if line.strip()), "")
            found = marks if marks in self.released else cell.node.id
            cell.of = found if found in self.released else self._marked(first)
        claimed = {cell.of for cell in self.cells}
        texts: dict[tuple[str, str], list[_Cell]] = defaultdict(list)
        for cell in reversed(self.cells):
            if not cell.of and cell.source.strip():
                texts[cell.node.cell_type, _plain(cell.source)].append(cell)
        for wanted in self.released.values():
            same = texts[wanted.node.cell_type, _plain(wanted.node.source)]
            # The empty cells below the questions are all the same: those are known by their place.
            if same and wanted.key not in claimed and wanted.role != "written":
                same.pop().of = wanted.key

    # Answers

    def find_answers(self) -> None:
        """Each answer in its own cell, or else in one that defines what the exercise asks for."""
        for wanted in self.of_role("answer"):
            own = self.own(wanted)
            answered = [cell for cell in own if _answers(cell, wanted)]
            if answered:
                cell = self._last_piece(answered[-1], wanted)
            elif elsewhere := self._elsewhere(wanted):
                cell = elsewhere[-1]
                self.say(
                    wanted.key, "the answer was found in another cell, by the name that it defines"
                )
            elif own:
                cell = next((c for c in reversed(own) if not _is_untouched(c, wanted)), own[-1])
            else:
                cell = self._lookalike(wanted)
            if cell is None:
                continue
            if len(own) > 1 and cell in own:
                which = "one" if cell is own[-1] else "answered one"
                self.say(
                    wanted.key,
                    f"the cell {wanted.key!r} is in the notebook {len(own)} times; "
                    f"the last {which} was graded",
                )
            self.choose(cell, wanted)
            self._make_code(cell, wanted)
            self._join_rest(cell, wanted)
        if not any(cell.of and self.released[cell.of].is_graded for cell in self.cells):
            raise Damaged("it has no graded cell of this week")

    def _elsewhere(self, wanted: _Released) -> list[_Cell]:
        """Cells that define what is asked for and are neither as released nor another's answer."""
        found = []
        for cell in self.cells:
            if cell.of == wanted.key or not _answers(cell, wanted):
                continue
            other = self.released.get(cell.of)
            if other is None or not (
                cell is self.chosen.get(other.key)
                or _is_untouched(cell, other)
                or (other.role == "answer" and _answers(cell, other))
            ):
                found.append(cell)
        return found

    def _last_piece(self, cell: _Cell, wanted: _Released) -> _Cell:
        """The cell, or the last one below it that defines what is missing in it."""
        if not (missing := wanted.names - _defined(cell.source)):
            return cell
        below = self.cells[self.cells.index(cell) + 1 :]
        for piece in reversed(below):
            if piece.is_code and piece.of in ("", wanted.key) and missing & _defined(piece.source):
                self.say(wanted.key, "the answer is spread over several cells; all of them count")
                return piece
        return cell

    def _lookalike(self, wanted: _Released) -> _Cell | None:
        alike = _pairs([wanted], self.free("code"))
        likeness, _, cell = alike[0] if alike else (0.0, None, None)
        if likeness < _SIMILAR:
            return None
        self.say(wanted.key, "the answer cell had lost its marks and was found by its text")
        return cell

    def _make_code(self, cell: _Cell, wanted: _Released) -> None:
        if not cell.is_code:
            self.say(wanted.key, f"its {cell.node.cell_type} cell was made a code cell")
            cell.node = _code_cell(_code_in(cell))

    def _join_rest(self, cell: _Cell, wanted: _Released) -> None:
        """Undo a cut through the middle of a definition."""
        rest = next(iter(self.cells[self.cells.index(cell) + 1 :]), None)
        if rest is None or not rest.is_code or rest.of or not re.match(r"\n*[ \t]+\S", rest.source):
            return
        joined = f"{cell.source}\n{rest.source}"
        if _parse(joined) is not None and _parse(rest.source) is None:
            cell.node.source = joined
            self.cells.remove(rest)
            self.say(wanted.key, "its cell was cut in two, which were put together again")

    # Checks

    def find_checks(self) -> None:
        """Each check once, with the course's own text."""
        for wanted in self.of_role("check"):
            own = self.own(wanted)
            if len(own) > 1:
                self.say(wanted.key, f"the check is in the notebook {len(own)} times")
            for cell in own:
                self._replace_check(cell, wanted, keep=cell is own[-1])

    def _replace_check(self, cell: _Cell, wanted: _Released, keep: bool) -> None:
        """Take a check's place; code of the student's own that stands in it stays, before it."""
        text, place, mine = wanted.node.source, self.cells.index(cell), ""
        if not _same_code(cell.source, text):
            self.say(wanted.key, "the check had been changed; the course's own counts")
            mine = cell.source if _defined(cell.source) - _defined(text) else ""
        check = _Cell(deepcopy(wanted.node), wanted.key)
        kept = [_Cell(_code_cell(mine))] if mine.strip() else []
        self.cells[place : place + 1] = kept + ([check] if keep else [])
        if keep:
            self.chosen[wanted.key] = check

    # Written answers

    def find_questions(self) -> None:
        """Each question once, as it was asked; what was written into it goes below it."""
        for wanted in self.of_role("question"):
            own = self.own(wanted)
            if not own:
                alike = _pairs([wanted], self.free("markdown"), str.split)
                own = [cell for likeness, _, cell in alike[:1] if likeness >= _SIMILAR]
            if not own:
                continue
            extra = _added(own[-1].source, wanted.node.source)
            own[-1].node = deepcopy(wanted.node)
            self.choose(own[-1], wanted)
            if extra:
                below = NotebookNode(cell_type="markdown", id="", metadata={}, source=extra)
                self.cells.insert(self.cells.index(own[-1]) + 1, _Cell(below))
                self.say(wanted.key, "what was written into the question was put below it")

    def find_written(self) -> None:
        """The cell below each question: by its id, or else what is written there."""
        for wanted in self.of_role("written"):
            question = wanted.key.removesuffix("-answer")
            own = self.own(wanted)
            filled = [cell for cell in own if not _is_untouched(cell, wanted)]
            if len(filled) > 1:
                self.say(question, f"its answer is there {len(filled)} times; the last one counts")
            cell = filled[-1] if filled else self._below(question, wanted)
            if cell is None:
                cell = own[-1] if own else None
            elif own and not filled:
                self.say(question, "the answer was found in another cell below the question")
            if cell is None:
                continue
            if cell.is_code:
                cell.node = NotebookNode(
                    cell_type="markdown", id="", metadata={}, source=cell.source
                )
                self.say(question, "its code cell was made a text cell")
            self.choose(cell, wanted)

    def _below(self, question: str, wanted: _Released) -> _Cell | None:
        """The first text of the student's own below a question, before the next released cell."""
        place = self.cells.index(self.chosen[question]) + 1 if question in self.chosen else None
        untouched = None
        for cell in self.cells[place:] if place is not None else ():
            if cell.of not in ("", wanted.key):
                break
            if not cell.of and not cell.is_code:
                if not _is_untouched(cell, wanted):
                    return cell
                untouched = untouched or cell
        return untouched

    # What was given

    def find_given(self) -> None:
        """The other released cells; an experiment must be known, or it would be run."""
        for wanted in self.of_role("given", "experiment", "prose"):
            if own := self.own(wanted):
                self.chosen[wanted.key] = own[-1]
                for other in own[:-1]:
                    other.of = ""
        missing = [c for c in self.of_role("given", "experiment") if c.key not in self.chosen]
        for likeness, wanted, cell in _pairs(missing, self.free("code")) if missing else ():
            if likeness >= _SIMILAR and not cell.of and wanted.key not in self.chosen:
                cell.of, self.chosen[wanted.key] = wanted.key, cell

    def put_back(self) -> None:
        """What is missing, in the order of the release, each behind what stands before it there.

        A given cell that was deleted is missed only when something that it defines is.
        """
        bound: set[str] | None = None
        for wanted in self.released.values():
            if wanted.key in self.chosen or wanted.role in ("experiment", "prose"):
                continue
            if wanted.role == "given":
                if bound is None:
                    bound = set().union(*map(_bound, self._sources_run()))
                if not (lost := sorted(_bound(wanted.node.source) - bound)):
                    continue
                names = ", ".join(lost[:3]) + (", ..." if lost[3:] else "")
                self.say("", f"the given cell that defines {names} was deleted and put back")
            else:
                self.say(
                    wanted.key.removesuffix("-answer") if wanted.role == "written" else wanted.key,
                    f"the cell {wanted.key!r} was deleted from the notebook and put back",
                )
            self._insert(wanted)

    def _sources_run(self) -> list[str]:
        not_run = {id(self.chosen.get(c.key)) for c in self.of_role("check", "experiment")}
        return [c.source for c in self.cells if c.is_code and id(c) not in not_run]

    def _insert(self, wanted: _Released) -> None:
        cell = self.chosen[wanted.key] = _Cell(deepcopy(wanted.node), wanted.key)
        order = list(self.released)
        here = order.index(wanted.key)
        at = {other.of: place for place, other in enumerate(self.cells) if other.of}
        before = next((at[key] + 1 for key in reversed(order[:here]) if key in at), None)
        after = next((at[key] for key in order[here:] if key in at), len(self.cells))
        self.cells.insert(after if before is None else before, cell)

    def order_given(self) -> None:
        """Move a given cell up, when what it prepares stands above it."""
        order = [c.key for c in self.of_role("given", "answer") if c.key in self.chosen]
        for place, key in enumerate(order):
            if self.released[key].role != "given":
                continue
            at = {k: self.cells.index(self.chosen[k]) for k in order}
            target = min((at[k] for k in order[place + 1 :]), default=len(self.cells))
            # Not above something that it needs itself.
            if target < at[key] and not any(target < at[k] < at[key] for k in order[:place]):
                self.cells.insert(target, self.cells.pop(at[key]))
                self.say("", "given cells stood below the answers that need them and were moved up")

    # The whole

    def say_language(self, language: str) -> None:
        if language.lower().startswith(("python", "ipython")):
            return
        answers = [self.chosen[c.key] for c in self.of_role("answer")]
        written = [c for c in answers if not _is_untouched(c, self.released[c.of])]
        if written and not any(_parse(cell.source) for cell in written):
            raise Damaged(f"it is written in {language}, and this course is in Python")
        self.say("", f"the notebook says that it is in {language}; it was run as Python")

    def whole(self, released: NotebookNode) -> NotebookNode:
        """The notebook, valid, with ids of its own and the released metadata."""
        used, cells = set(self.released), []
        for number, cell in enumerate(self.cells):
            node, wanted = cell.node, self.released.get(cell.of)
            if wanted is not None and self.chosen.get(cell.of) is cell:
                node.id, node.metadata = wanted.node.id, deepcopy(wanted.node.metadata)
            else:
                tags = _own_tags(cell)
                node.metadata = NotebookNode(tags=tags) if tags else NotebookNode()
                if not node.id or node.id in used:
                    names = (f"own-{i}" for i in count(number))
                    node.id = next(name for name in names if name not in used)
            used.add(node.id)
            if cell.is_code:
                node.outputs, node.execution_count = [], None
            cells.append(node)
        return NotebookNode(
            cells=cells, metadata=deepcopy(released.metadata), nbformat=4, nbformat_minor=5
        )


# The released notebook


def _read_released(released: NotebookNode) -> Iterator[_Released]:
    question = ""
    for node in released.cells:
        marks = node.metadata.get("nbgrader", {})
        key = marks.get("grade_id", node.id)
        if marks.get("task"):
            role, question = "question", key
        elif marks.get("solution"):
            role = "answer"
        elif marks.get("grade"):
            role = "check"
        elif node.id == f"{question}-answer":
            role = "written"
        elif node.cell_type != "code":
            role = "prose"
        else:
            role = "experiment" if "experiment" in node.metadata.get("tags", ()) else "given"
        names = frozenset(_defined(node.source)) if role == "answer" else frozenset()
        yield _Released(key, role, node, names)


# Texts


def _defined(code: str) -> set[str]:
    """The names that code defines at its left margin; it need not be right elsewhere."""
    return {name for pair in _DEFINED.findall(code[: 10 * _READ]) for name in pair if name}


def _bound(code: str) -> set[str]:
    tree = _parse(code)
    return _defined(code) if tree is None else names_bound(code)


def _parse(code: str) -> ast.Module | None:
    if len(code) > _READ:
        return None
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _definitions(code: str) -> dict[str, str]:
    """Functions and classes by name, in a form that comments and blanks do not change."""
    tree = _parse(code)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = tree.body if tree is not None else ()
    return {node.name: ast.dump(node) for node in nodes if isinstance(node, kinds)}


def _plain(text: str) -> str:
    return " ".join(text.split())


def _lines(code: str) -> list[str]:
    """The lines that say something: no comments, no blank ones."""
    lines = (line.rstrip() for line in code[:_READ].split("\n"))
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _added(text: str, asked: str) -> str:
    """What somebody wrote into a question; a line of it with a word changed is nothing written."""
    lines = [line.strip() for line in asked.split("\n") if line.strip()]
    added = []
    for line in text.split("\n"):
        for known in lines:
            line = line.replace(known, "", 1)
        words = set(line.split())
        shares = (len(words & set(known.split())) / (len(words) or 1) for known in lines)
        added.append("" if max(shares, default=0) >= _SIMILAR else line)
    return "\n".join(added).strip()


def _same_code(one: str, other: str) -> bool:
    if _lines(one) == _lines(other):
        return True
    trees = _parse(one), _parse(other)
    return None not in trees and ast.dump(trees[0]) == ast.dump(trees[1])


def _is_untouched(cell: _Cell, wanted: _Released) -> bool:
    """As released, or empty."""
    if wanted.role == "written":
        return _plain(cell.source) in ("", _plain(wanted.node.source))
    lines = _lines(cell.source)
    return not lines or lines == _lines(wanted.node.source)


def _code_cell(source: str) -> NotebookNode:
    return NotebookNode(cell_type="code", id="", metadata=NotebookNode(), source=source)


def _code_in(cell: _Cell) -> str:
    """The code of a cell, also of one whose type is text."""
    if cell.is_code:
        return cell.source
    return "\n".join(_FENCED.findall(cell.source[:_READ])) or cell.source


def _answers(cell: _Cell, wanted: _Released) -> bool:
    """Whether a cell holds an answer, right or wrong, to an exercise."""
    code = _code_in(cell)
    if _is_untouched(cell, wanted) or _lines(code) == _lines(wanted.node.source):
        return False
    if not wanted.names:
        return cell.of == wanted.key
    defined = _defined(code) & wanted.names
    if not defined or (not cell.is_code and _parse(code) is None):
        return False
    # The stub with an import above it is no answer yet.
    mine, bare = _definitions(code), _definitions(wanted.node.source)
    return any(name not in mine or mine[name] != bare.get(name) for name in defined)


def _pairs(
    wanted: list[_Released], free: list[_Cell], units: Callable[[str], list[str]] = _lines
) -> list[tuple[float, _Released, _Cell]]:
    """Released and submitted cells by the share of lines (or words) in common, most alike first.

    Only cells with something in common are compared, which bounds the time for 2,000 of them.
    """
    holders, sizes = defaultdict(list), []
    for place, cell in enumerate(free):
        own = set(units(cell.source[:_READ]))
        sizes.append(len(own))
        for unit in own:
            holders[unit].append(place)
    found = []
    for cell in wanted:
        own = set(units(cell.node.source))
        shared = Counter(place for unit in own for place in holders.get(unit, ()))
        found += [
            (2 * number / (len(own) + sizes[place]), cell, free[place])
            for place, number in shared.items()
        ]
    return sorted(found, key=lambda pair: -pair[0])


def _own_tags(cell: _Cell) -> list[str]:
    """The tags of a student's own cell. One that only defines something is no experiment.

    A copied cell has the tags of the cell that it was copied from, and those cells are not run.
    """
    tags = list(cell.node.metadata.get("tags", ()))
    if cell.is_code and "experiment" in tags:
        tree = _parse(cell.source)
        kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
        if tree is not None and all(isinstance(node, kinds) for node in tree.body):
            tags.remove("experiment")
    return tags
