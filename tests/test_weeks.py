"""Every week of the course: proved, built, committed as built, and written to the house style."""

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys

import nbformat
import pytest

from course.attempts import job_for, run_jobs
from course.build import build
from course.source import read_week, repo_root, week_names
from course.verify import verify

ROOT = repo_root()
WEEKS = week_names()
# Where the papers are. Badges and the install line of the first cell are made by the build.
PAPERS = r"https://(arxiv\.org|doi\.org|openreview\.net|aclanthology\.org|proceedings\.[\w.]+)/"


@pytest.fixture(scope="module", params=WEEKS)
def week(request):
    return read_week(request.param)


@pytest.fixture
def student(week):
    return nbformat.read(ROOT / "notebooks" / f"{week.name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def verification():
    if not WEEKS:
        pytest.skip("there are no weeks yet")
    return verify()


def code_cells(week):
    return [cell for cell in week.cells if cell.cell_type == "code" and cell.kind != "wrong"]


def written_by_hand(notebook):
    """The cells that stand in the week's source: all but the badges and the set-up."""
    return [c for c in notebook.cells if not c.id.startswith(("badges-", "setup-"))]


@pytest.mark.slow
def test_every_exercise_is_proved(verification):
    assert [(r.week, r.exercise, r.problems) for r in verification.exercises if r.problems] == []


# Counted or trained: no tensor is handed to the answer. Refused: nothing is compared.
NO_TENSOR_TO_EMPTY = {
    *("block_cost", "train", "read_end-refusal"),  # weeks 1 and 3
    *("learn_merges", "apply_merges", "mel_filterbank"),  # week 2
    "interpolate",  # week 4 hands over dictionaries
    *("normalise", "entities", "place-tables"),  # week 5
    *("geometry", "cooling"),  # weeks 6 and 7
}
EMPTIES_ITS_INPUTS = """
def _emptied(call):
    import torch

    def changed(*args, **kwargs):
        with torch.no_grad():
            for value in (v for v in [*args, *kwargs.values()] if isinstance(v, torch.Tensor)):
                value.zero_()
        return call(*args, **kwargs)

    return changed


for _name in {names}:
    _answer = globals()[_name]
    if isinstance(_answer, type):
        _answer.forward = _emptied(_answer.forward)
    else:
        globals()[_name] = _emptied(_answer)
"""


@pytest.mark.slow
def test_an_answer_that_empties_its_inputs_passes_no_check_that_gives_it_any(week):
    # Its own result is right for what it left, so a reference that is computed later agrees.
    jobs = []
    for exercise in week.exercises.values():
        code = exercise.solution + EMPTIES_ITS_INPUTS.format(names=sorted(exercise.names))
        jobs.append(job_for(week, exercise, [("empties", exercise.answer.line, code)]))
    passed = {
        grade_id
        for result in run_jobs(jobs)
        for grade_id, parts in result["answers"]["empties"][0]["checks"].items()
        if not parts["whole"]["error"]
    }
    allowed = NO_TENSOR_TO_EMPTY
    assert {p for p in passed if p not in allowed and p.split("-")[0] not in allowed} == set()


@pytest.mark.slow
def test_the_committed_fingerprints_are_those_of_the_committed_weeks(verification):
    assert [f"{r.week}/{r.exercise}" for r in verification.exercises if r.outdated] == []


@pytest.mark.slow
def test_each_exercise_recognises_some_wrong_answer_on_the_learners_machine(verification):
    silent = [
        f"{result.week}/{result.exercise}"
        for result in verification.exercises
        if not any(wrong.recognised for wrong in result.wrongs)
    ]
    assert silent == []


@pytest.mark.skipif(not WEEKS, reason="there are no weeks yet")
def test_the_committed_notebooks_are_what_the_build_makes():
    result = build(check=True)
    assert (result.changed, result.removed) == ([], [])


@pytest.mark.skipif(not WEEKS, reason="there are no weeks yet")
def test_another_process_in_another_folder_makes_the_same_bytes(tmp_path):
    (tmp_path / "mmlearn").mkdir()
    shutil.copy(ROOT / "mmlearn" / "fingerprints.json", tmp_path / "mmlearn")
    code = f"from course.build import build; build(to={str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    for name in ("mmlearn/fingerprints.json", *_notebooks()):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), name


def _notebooks():
    return [f"{place}/{name}.ipynb" for place in ("notebooks", "solutions") for name in WEEKS]


def test_no_line_of_a_solution_or_a_hidden_test_is_in_the_student_notebook(week, student):
    # What the learner may read anyway; a line that stands there, too, is no secret.
    allowed = [cell.text for cell in week.cells if cell.kind in ("prose", "code", "exercise")]
    secrets = []
    for exercise in week.exercises.values():
        allowed += [exercise.stub, *(check.visible for check in exercise.checks)]
        secrets += [exercise.solution, *(check.hidden for check in exercise.checks)]
        secrets += [text for wrong in exercise.wrongs for text in (wrong.code, wrong.says)]
    for written in week.written:
        allowed.append(written.question)
        secrets += [written.model_answer, written.mark_scheme]
    open_text = "\n".join(allowed)
    seen = "\n".join(cell.source for cell in student.cells)
    lines = {line.strip() for secret in secrets for line in secret.split("\n")}
    leaked = [n for n in lines if len(n) > 12 and n not in open_text and n in seen]
    assert leaked == []
    assert not re.search("(BEGIN|END) (SOLUTION|HIDDEN TESTS|MARK SCHEME)", seen)


def test_no_solution_is_given_away_in_the_text_around_it(week):
    around = [cell.text for cell in week.cells if cell.kind in ("prose", "code", "exercise")]
    around = _squeeze("\n".join(around))
    for exercise in week.exercises.values():
        pattern = r"### BEGIN SOLUTION\n(.*?)### END SOLUTION"
        for region in re.findall(pattern, exercise.answer.text, flags=re.DOTALL):
            body = _squeeze(region)
            assert len(body) < 40 or body not in around, f"{exercise.name} is given away"


def _squeeze(text):
    return re.sub(r"\s+", "", re.sub(r"#.*", "", text))


def test_a_week_has_the_exercises_and_points_that_the_curriculum_asks_for(week):
    exercises = week.exercises.values()
    assert 4 <= len(exercises) <= 6
    assert 15 <= sum(exercise.points for exercise in exercises) <= 25
    assert 1 <= len(week.written) <= 2
    for exercise in exercises:
        assert "<details>" in exercise.header.text, f"{exercise.name} has no folded hint"


def test_notebooks_are_small_and_without_outputs(week):
    for place in ("notebooks", "solutions"):
        path = ROOT / place / f"{week.name}.ipynb"
        assert path.stat().st_size < 1_000_000
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert not any(cell.get("outputs") for cell in notebook.cells)


def test_cells_are_short_enough_to_be_read(week):
    lengths = [cell.text.count("\n") + 1 for cell in code_cells(week)]
    shown = [c for c in week.cells if c.kind == "code" and "parameters" not in c.tags]
    given = [cell.text.count("\n") + 1 for cell in shown]
    assert 3 <= statistics.median(given) <= 15  # a plot takes more lines than an idea
    assert max(given) <= 30
    assert max(lengths) <= 60  # a check with its hidden region


def test_every_figure_ends_its_cell_and_has_a_name_and_a_description(week):
    # `show` returns the picture: anywhere else than at the end of a cell nobody would see it.
    named = []
    for cell in (cell for cell in week.cells if cell.kind == "code"):
        body = ast.parse(cell.text).body
        calls = [n for n in ast.walk(ast.parse(cell.text)) if _calls(n, "show")]
        if not calls:
            continue
        assert len(calls) == 1, f"line {cell.line} shows several figures"
        last = body[-1].value if isinstance(body[-1], ast.Expr) else None
        assert _calls(last, "show"), f"the figure of line {cell.line} does not end its cell"
        named.append(ast.literal_eval(last.args[1]))
        assert len(last.args) == 3, f"the figure {named[-1]} is not described"
    assert len(named) == len(set(named)) >= 4


def _calls(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def test_cells_are_plain_markdown_with_no_address_but_those_of_papers(student):
    for cell in written_by_hand(student):
        addresses = re.findall(r"\w+://\S+", cell.source)
        if cell.cell_type == "code":
            assert addresses == []
        assert [a for a in addresses if not re.match(PAPERS, a)] == []
        assert not re.search(r"^(:::|```\{|\{\w+\}`)", cell.source, flags=re.MULTILINE)


def test_a_week_never_touches_the_path_or_redefines_mmlearn(week):
    for cell in code_cells(week):
        assert "sys.path" not in cell.text
        assert not re.search(r"^\s*mmlearn\.\S+ = ", cell.text, flags=re.MULTILINE)
