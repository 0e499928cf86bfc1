"""What holds between the cells of a week: whose names may be used and bound where.

- A check uses its own imports and the names that its exercise's answer defines, nothing else: so
  it says the same in a notebook, under nbgrader, and in a grader that runs it in another process.
- A hidden region uses nothing that the visible part computed: so it can be run alone.
- A check overwrites nothing that the notebook's own cells use.
- A probe is named "week/exercise/word", once: so a fingerprint belongs to one place.
- An answer uses its own imports and what the given cells above import or define, never another
  exercise's answer: so one mistake costs one exercise.
- No other cell binds a name that an answer defines: so the learner's work stays the learner's.
- What an exercise forbids is there in mmlearn: so a slip of the pen forbids nothing by accident.

A week that breaks a rule raises a `CourseError` that names file, line and way out.
"""

import ast
import importlib.util
import re
from pathlib import Path

from course.names import (
    definitions_only,
    imported_answer,
    names_bound,
    names_imported,
    names_used,
)
from course.source import CourseError, without_markers

# What works only inside the learner's own process, where a check is not always run.
_FORBIDDEN_NAMES = {"globals", "locals", "vars", "eval", "exec", "compile", "get_ipython", "input"}
_FORBIDDEN_MODULES = {"inspect", "IPython", "__main__", "gc", "sys"}


def check_rules(week):
    """Raise a CourseError if the cells of a week use or bind names that they may not."""
    _answers_keep_their_names(week)
    _probes_are_named(week)
    flowing = set().union(*(names_used(cell.text) for cell in week.given))
    for exercise in week.exercises.values():
        _forbidden_names_exist(week, exercise)
        _answers_stand_alone(week, exercise)
        for check in exercise.checks:
            _check_stands_alone(week, exercise, check)
            _check_leaves_nothing_behind(week, check, flowing)
            for code in (check.visible, check.hidden):
                _check_tests_something(week, exercise, check, code)


def _fail(week, line, sentence):
    raise CourseError(f"{week.path.name} line {line}: {sentence}")


def _answers_keep_their_names(week):
    owner = {}
    for exercise in week.exercises.values():
        for name in sorted(exercise.names):
            if name in owner:
                _fail(
                    week,
                    exercise.answer.line,
                    f"the answers of {owner[name]!r} and {exercise.name!r} both define {name!r}, "
                    "so a grader would test the later one twice: rename one.",
                )
            owner[name] = exercise.name
    for cell in week.cells:
        if cell.kind in ("code", "answer", "check"):
            for name in sorted(names_bound(without_markers(cell.text)) & set(owner)):
                if owner[name] != cell.metadata.get("answer"):
                    _fail(
                        week,
                        cell.line,
                        f"the cell binds {name!r}, which is the learner's answer to "
                        f"{owner[name]!r}: choose another name (import ... as reference).",
                    )


def _probes_are_named(week):
    seen = {}
    for check in (check for e in week.exercises.values() for check in e.checks):
        for node in ast.walk(ast.parse(check.cell.text)):
            called = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
            if called not in ("expect", "expect_raises"):
                continue
            line, start = check.cell.line + node.lineno - 1, f"{week.name}/{check.exercise}/"
            probe = node.args[0].value if node.args and hasattr(node.args[0], "value") else None
            if not isinstance(probe, str) or not re.fullmatch(re.escape(start) + r"\w+", probe):
                _fail(
                    week,
                    line,
                    f'{called} has the probe {probe!r}: begin it with a written-out "{start}word".',
                )
            if probe in seen:
                _fail(week, line, f"the probe {probe!r} is used at line {seen[probe]}: rename it.")
            seen[probe] = line


def _forbidden_names_exist(week, exercise):
    (package,) = importlib.util.find_spec("mmlearn").submodule_search_locations
    for forbidden in exercise.forbids:
        parts = forbidden.split(".")[1:]
        modules = [Path(package, *parts[:n]).with_suffix(".py") for n in range(1, len(parts))]
        names = [parts[n] for n in range(1, len(parts))]
        if not any(
            module.is_file() and name in names_bound(module.read_text("utf-8"))
            for module, name in zip(modules, names)
        ):
            _fail(
                week,
                exercise.header.line,
                f"exercise {exercise.name!r} forbids {forbidden}, which mmlearn does not have: "
                "mend the name.",
            )


def _answers_stand_alone(week, exercise):
    lent = set()
    for cell in week.given_before(exercise.name):
        lent |= names_imported(cell.text) | names_bound(definitions_only(cell.text))
    tested = exercise.names & set().union(*(names_used(c.cell.text) for c in exercise.checks))
    answers = [("the answer", exercise.solution, exercise.answer)]
    answers += [(f"the wrong answer {w.name!r}", w.code, w.cell) for w in exercise.wrongs]
    for what, code, cell in answers:
        for name in sorted(names_used(code) - lent):
            _fail(
                week,
                cell.line,
                f"{what} of {exercise.name!r} uses {name!r}, which no given cell above imports or "
                "defines: import it (mmlearn has what earlier exercises built).",
            )
        for name in sorted(tested - names_bound(code)):
            _fail(
                week,
                cell.line,
                f"{what} of {exercise.name!r} does not define {name!r}, which its checks use.",
            )
    if taken := imported_answer(exercise.solution, exercise):
        _fail(week, exercise.answer.line, f"the solution breaks its own rule. {taken}")


def _check_stands_alone(week, exercise, check):
    line = check.cell.line
    for name in sorted(names_used(check.cell.text) - exercise.names):
        _fail(
            week,
            line,
            f"the check {check.grade_id!r} uses {name!r}, which neither it nor the answer of "
            f"{exercise.name!r} defines: import it in the check, or make it there.",
        )
    lent = definitions_only(check.visible)
    computed = names_bound(check.visible) - names_bound(lent)
    for name in sorted(names_used(f"{lent}\n{check.hidden}") & computed if check.hidden else ()):
        _fail(
            week,
            line,
            f"the hidden region of {check.grade_id!r} uses {name!r}, which the visible part "
            "computes: make it inside the region, which is also run alone.",
        )
    for node in ast.walk(ast.parse(check.cell.text)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        bad = [module for module in modules if module.split(".")[0] in _FORBIDDEN_MODULES]
        if isinstance(node, ast.Name) and node.id in _FORBIDDEN_NAMES:
            bad = [node.id]
        if bad:
            _fail(
                week,
                line + node.lineno - 1,
                f"the check {check.grade_id!r} uses {bad[0]}, which sees only the process it runs "
                "in: call what the answer defines and compare what comes back.",
            )


def _check_leaves_nothing_behind(week, check, flowing):
    made = names_bound(check.cell.text) - names_imported(check.cell.text)
    for name in sorted(made & flowing):
        _fail(
            week,
            check.cell.line,
            f"the check {check.grade_id!r} overwrites {name!r}, which a given cell uses: choose "
            "another name in the check.",
        )


def _check_tests_something(week, exercise, check, code):
    only_imports = all(
        isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(code).body
    )
    if not only_imports and not names_used(code) & exercise.names:
        part = "hidden region" if code == check.hidden else "visible part"
        _fail(
            week,
            check.cell.line,
            f"the {part} of {check.grade_id!r} uses nothing that the answer defines "
            f"({', '.join(sorted(exercise.names))}), so it tests nothing: call it.",
        )
