"""Sort the cells of one percent file into a `Week`, and refuse what is malformed.

Each complaint is a `CourseError` that names the file, the line, and the way out.
"""

import ast
import re
import textwrap

from course.names import names_bound
from course.source import (
    Cell,
    Check,
    CourseError,
    Exercise,
    Week,
    Written,
    Wrong,
    without_markers,
    without_solution,
)

PARAMETERS = ("SEED", "DEVICE", "SCALE", "DATA")
FEWEST_WRONG_ANSWERS = 3

_KEYS = {  # the key that names a cell's kind -> the other keys it must have
    "exercise": ("difficulty", "minutes"),
    "answer": (),
    "check": ("aspect", "points", "title"),
    "wrong": ("name", "says"),
    "written": ("points",),
}
_OPTIONAL_KEYS = {"exercise": ("forbids",), "code": ("tags",)}
_MARKDOWN_KINDS = ("exercise", "written")
_TAGS = ("parameters", "experiment", "hide-input", "hide-output")
_JUPYTEXT_KEYS = ("lines_to_next_cell", "cell_marker", "region_name")  # how a cell was written
_REGION_HOMES = {
    "SOLUTION": ("answer", "written"),
    "HIDDEN TESTS": ("check",),
    "MARK SCHEME": ("written",),
}


class Reader:
    """Reads one file; holds its path so that every complaint can name it."""

    def __init__(self, path):
        self.path = path

    def fail(self, line, sentence):
        raise CourseError(f"{self.path.name} line {line}: {sentence}")

    def read_week(self, name):
        cells = self.read_cells()
        number, first = int(name[1:3]), cells[0]
        title = re.match(r"# Week (\d+)\. (\S.*)", first.text)
        if first.kind != "prose" or not title or int(title[1]) != number:
            begins = first.text.split("\n")[0]
            self.fail(
                first.line,
                f"the first cell begins with {begins!r}: begin with a markdown cell "
                f"'# Week {number}. The question of the week?'.",
            )
        for cell in cells:
            self.check_regions(cell)
            if cell.cell_type == "code":
                self.check_syntax(cell)
        self.check_parameters(cells)
        exercises = self.read_exercises(cells)
        written = [self.read_written(cell) for cell in cells if cell.kind == "written"]
        week = Week(name, number, title[2].strip(), self.path, cells, exercises, written)
        self.check_grade_ids(week)
        return week

    # Cells and their keys

    def read_cells(self):
        import jupytext

        try:
            text = self.path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CourseError(
                f"{self.path} cannot be read as UTF-8 text ({error}): restore it from git."
            ) from None
        # Comments that look like magics stay comments: cells are plain Python.
        form = {"extension": ".py", "format_name": "percent", "comment_magics": False}
        lines, cells, marker = text.split("\n"), [], -1
        for raw in jupytext.reads(text, fmt=form).cells:
            raw.source = raw.source.strip("\n")
            marker = self.find_marker(lines, marker + 1, raw)
            body = next((i for i in range(marker + 1, len(lines)) if lines[i].strip()), marker)
            cells.append(self.read_cell(raw, marker + 1, body + 1))
        if not cells:
            self.fail(1, "the week has no cells: begin with '# %% [markdown]'.")
        return cells

    def find_marker(self, lines, start, raw):
        """The index of the `# %%` line above a cell, since jupytext keeps no line numbers."""
        wanted = raw.source.split("\n")[0].strip()
        for i in range(start, len(lines)):
            if lines[i].startswith("# %%"):
                below = (line.strip() for line in lines[i + 1 :])
                if raw.cell_type != "code":
                    below = (line.removeprefix("#").strip() for line in below)
                first = next(filter(None, below), "")
                if not wanted or first == wanted or first.startswith(('"""', "'''")):
                    return i
        return self.fail(
            start + 1,
            f"the text {wanted[:60]!r} stands in no cell: write a '# %%' line above it.",
        )

    def read_cell(self, raw, marker_line, line):
        keys = {k: v for k, v in raw.metadata.items() if k not in _JUPYTEXT_KEYS}
        if not raw.source.strip():
            self.fail(marker_line, "the cell is empty: fill it or delete its marker.")
        if "incorrectly_encoded_metadata" in keys:
            self.fail(
                marker_line,
                f"the keys {keys['incorrectly_encoded_metadata']!r} cannot be read: write "
                'key="text", key=2 or key=["a", "b"], with spaces between.',
            )
        if raw.cell_type == "raw":
            self.fail(marker_line, "raw cells are not used here: write '# %% [markdown]'.")
        kinds = [kind for kind in _KEYS if kind in keys]
        if len(kinds) > 1:
            self.fail(marker_line, f"a cell cannot be {' and '.join(kinds)}: keep one of the keys.")
        kind = kinds[0] if kinds else {"code": "code"}.get(raw.cell_type, "prose")
        needed = (kind, *_KEYS[kind]) if kinds else ()
        allowed = (*needed, *_OPTIONAL_KEYS.get(kind, ()))
        for key in needed:
            if key not in keys:
                self.fail(marker_line, f"the {kind} cell has no {key}: add {key}=...")
        for key in keys:
            if key not in allowed:
                wanted = ", ".join(allowed) or f"none, or one of {', '.join(_KEYS)}"
                self.fail(marker_line, f"unknown key {key!r} on a {kind} cell: use {wanted}.")
        if kinds and (raw.cell_type == "markdown") != (kind in _MARKDOWN_KINDS):
            wanted = "# %% [markdown]" if kind in _MARKDOWN_KINDS else "# %%"
            self.fail(marker_line, f"a cell with {kind}=... begins with '{wanted} {kind}=...'.")
        for key, value in keys.items():
            if complaint := _complaint(key, value):
                self.fail(marker_line, f"{key}={value!r}: {complaint}.")
        return Cell(kind, raw.cell_type, raw.source, keys, line)

    # Inside a cell

    def check_regions(self, cell):
        """Regions are whole, not nested, not empty, and stand only where they belong."""
        inside, since = None, 0
        for i, text in enumerate(cell.text.split("\n")):
            found = re.search(rf"(BEGIN|END) ({'|'.join(_REGION_HOMES)})", text)
            if not found:
                continue
            verb, region = found.groups()
            marker, homes, line = f"### {verb} {region}", _REGION_HOMES[region], cell.line + i
            if text.strip() != marker:
                self.fail(line, f"{text.strip()!r} would be read as a marker: write {marker!r}.")
            if cell.kind not in homes:
                where = " or ".join(f"{home}=..." for home in homes)
                self.fail(line, f"{marker!r} may stand only in a cell with {where}.")
            if verb == "BEGIN" and inside:
                self.fail(line, f"{marker!r} stands inside {inside}: end that region first.")
            if verb == "END" and inside != region:
                self.fail(line, f"{marker!r} ends nothing: write '### BEGIN {region}' above it.")
            if verb == "END" and i == since + 1:
                self.fail(line, f"the {region} region is empty: fill it or delete its markers.")
            inside, since = (region, i) if verb == "BEGIN" else (None, 0)
        if inside:
            self.fail(cell.line + since, f"the region never ends: write '### END {inside}'.")

    def check_syntax(self, cell):
        codes = [cell.text]
        if cell.kind == "answer":
            codes.append(without_solution(cell.text))
        for code in codes:
            try:
                names_bound(code)
            except (SyntaxError, ValueError) as error:
                line = cell.line + (getattr(error, "lineno", None) or 1) - 1
                self.fail(
                    line,
                    f"the cell is not Python ({getattr(error, 'msg', error)}): use no magics, and "
                    "see that an answer stays Python when its solution is taken out.",
                )
        for node in ast.walk(ast.parse(cell.text)):
            if isinstance(node, ast.ImportFrom) and any(item.name == "*" for item in node.names):
                line = cell.line + node.lineno - 1
                self.fail(line, f"from {node.module} import * hides what is used: name it.")

    def check_parameters(self, cells):
        found = [cell for cell in cells if "parameters" in cell.tags]
        example = 'SEED = 0, DEVICE = "cpu", SCALE = "cpu", DATA = "embedded"'
        if len(found) != 1:
            self.fail(
                found[1].line if found else cells[0].line,
                f"the week has {len(found)} parameters cells: write one '# %% "
                f'tags=["parameters"]\' cell with {example}.',
            )
        missing = [name for name in PARAMETERS if name not in names_bound(found[0].text)]
        if missing:
            self.fail(
                found[0].line,
                f"the parameters cell does not set {', '.join(missing)}: it needs {example}.",
            )

    # Exercises

    def read_exercises(self, cells):
        headers = {}
        for cell in cells:
            name = cell.metadata.get(cell.kind)
            if cell.kind == "exercise":
                if name in headers:
                    at = headers[name].line
                    self.fail(cell.line, f"exercise {name!r} is there already (line {at}): rename.")
                headers[name] = cell
            elif cell.kind in ("answer", "check", "wrong") and name not in headers:
                self.fail(
                    cell.line,
                    f"{cell.kind}={name!r} belongs to no exercise above it: mend the name, or "
                    f"write '# %% [markdown] exercise=\"{name}\" difficulty=.. minutes=..' first.",
                )
        return {name: self.read_exercise(name, header, cells) for name, header in headers.items()}

    def read_exercise(self, name, header, cells):
        answers = [cell for cell in cells if cell.metadata.get("answer") == name]
        if len(answers) != 1:
            self.fail(
                (answers[1] if answers else header).line,
                f"exercise {name!r} has {len(answers)} answers: write one "
                f"'# %% answer=\"{name}\"' cell.",
            )
        answer = answers[0]
        if "### BEGIN SOLUTION" not in answer.text:
            self.fail(
                answer.line,
                f"the answer of {name!r} has no solution region: put what the learner is to write "
                "between '### BEGIN SOLUTION' and '### END SOLUTION'.",
            )
        checks = [self.read_check(cell) for cell in cells if cell.metadata.get("check") == name]
        wrongs = [self.read_wrong(cell) for cell in cells if cell.metadata.get("wrong") == name]
        if not any(check.hidden for check in checks):
            self.fail(
                header.line,
                f"exercise {name!r} has {len(checks)} checks, none of them with a hidden region: "
                f'write \'# %% check="{name}" aspect=".." points=.. title=".."\' with '
                "'### BEGIN HIDDEN TESTS' and '### END HIDDEN TESTS'.",
            )
        if len(wrongs) < FEWEST_WRONG_ANSWERS:
            self.fail(
                header.line,
                f"exercise {name!r} has {len(wrongs)} wrong answers: write at least "
                f"{FEWEST_WRONG_ANSWERS} that real learners would give.",
            )
        for cell in [part.cell for part in (*checks, *wrongs)]:
            if cell.line < answer.line:
                self.fail(cell.line, f"the cell stands above the answer of {name!r}: move it down.")
        keys = header.metadata
        forbids = tuple(keys.get("forbids", ()))
        exercise = Exercise(
            name, keys["difficulty"], keys["minutes"], header, answer, checks, wrongs, forbids
        )
        names, codes = {}, {_gist(exercise.solution): "the solution"}
        for wrong in wrongs:
            if wrong.name in names:
                at = names[wrong.name]
                self.fail(wrong.cell.line, f"wrong answer {wrong.name!r} is at line {at}: rename.")
            names[wrong.name] = wrong.cell.line
            twin = codes.setdefault(_gist(wrong.code), wrong.name)
            if twin != wrong.name:
                self.fail(wrong.cell.line, f"{wrong.name!r} is the same code as {twin}: change it.")
        return exercise

    def read_check(self, cell):
        lines = cell.text.split("\n")
        keys, visible, hidden = cell.metadata, cell.text, ""
        begins = [i for i, line in enumerate(lines) if line.strip() == "### BEGIN HIDDEN TESTS"]
        if begins:
            # Ends with the cell and has no indentation, so that both parts are whole programs.
            last = "\n".join(lines).rstrip().split("\n")[-1]
            outer = [lines[begins[0]], last]
            if len(begins) > 1 or outer != ["### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"]:
                self.fail(
                    cell.line + begins[-1],
                    "the hidden region is one block without indentation at the end of its check: "
                    "move it there.",
                )
            visible = "\n".join(lines[: begins[0]]).rstrip()
            hidden = without_markers("\n".join(lines[begins[0] :]), "HIDDEN TESTS").rstrip()
        return Check(
            keys["check"], keys["aspect"], keys["points"], keys["title"], cell, visible, hidden
        )

    def read_wrong(self, cell):
        keys = cell.metadata
        return Wrong(keys["wrong"], keys["name"], keys["says"], cell.text, cell)

    def read_written(self, cell):
        rest, parts = cell.text, []
        for region, what in (("SOLUTION", "the model answer"), ("MARK SCHEME", "the rubric")):
            pattern = rf"^### BEGIN {region}\n(.*?)\n### END {region}$"
            found = re.findall(pattern, cell.text, flags=re.MULTILINE | re.DOTALL)
            if len(found) != 1:
                self.fail(
                    cell.line,
                    f"a written question has {len(found)} {region} regions ({what}): write one "
                    f"between '### BEGIN {region}' and '### END {region}', without indentation.",
                )
            rest = re.sub(pattern, "", rest, flags=re.MULTILINE | re.DOTALL).strip()
            parts.append(textwrap.dedent(found[0]).strip())
        if not rest:
            self.fail(cell.line, "the written question asks nothing: ask above its regions.")
        return Written(cell.metadata["written"], cell.metadata["points"], rest, *parts, cell)

    def check_grade_ids(self, week):
        places = [(w.name, w.cell.line) for w in week.written]
        for exercise in week.exercises.values():
            places.append((exercise.name, exercise.answer.line))
            places += [(check.grade_id, check.cell.line) for check in exercise.checks]
        seen = {}
        for grade_id, line in sorted(places, key=lambda place: place[1]):
            if grade_id in seen:
                self.fail(
                    line,
                    f"the grade id {grade_id!r} is taken (line {seen[grade_id]}): give each check "
                    "of an exercise its own aspect and each written question its own name.",
                )
            seen[grade_id] = line


def _complaint(key, value):
    """What is wrong with the value of a key, or None."""
    if key in ("points", "minutes") and (type(value) is not int or value < 1):
        return "write a whole number above 0"
    if key == "difficulty" and (type(value) is not int or not 1 <= value <= 5):
        return "write a whole number from 1 to 5"
    if key in ("says", "title"):
        if not isinstance(value, str) or not value.strip() or "\n" in value:
            return "write one line of text in quotes"
    elif key == "tags":
        if not isinstance(value, list) or any(tag not in _TAGS for tag in value):
            return f"write a list of {', '.join(_TAGS)}"
    elif key == "forbids":
        dotted = r"mmlearn(\.\w+){2,}"
        if not isinstance(value, list) or not all(re.fullmatch(dotted, str(v)) for v in value):
            return 'write a list of names in mmlearn, ["mmlearn.clip.contrastive_loss"]'
    elif key in (*_KEYS, "aspect", "name") and not re.fullmatch(
        r"[a-z][a-z0-9_]{0,29}", str(value)
    ):
        return "write a name of up to 30 lower-case letters, digits and underscores"
    return None


def _gist(code):
    """Code reduced to what it does, so that comments make no difference."""
    return ast.dump(ast.parse(code))
