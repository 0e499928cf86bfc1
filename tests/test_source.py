"""A week is read whole, or refused with its file, its line and the way out."""

import re
from pathlib import Path

import pytest

from course.names import definitions_only, imported_answer, names_bound, names_imported, names_used
from course.source import (
    CourseError,
    read_week,
    repo_root,
    repository,
    resolve_week,
    week_names,
    without_solution,
)

WEEKS = Path(__file__).parent / "weeks"
SAMPLE = (WEEKS / "w99_sample.py").read_text("utf-8")


@pytest.fixture(scope="module")
def week():
    return read_week("w99_sample", WEEKS)


@pytest.fixture
def read(tmp_path):
    """Read a week from its text."""

    def read_text(text):
        (tmp_path / "w99_sample.py").write_text(text, "utf-8")
        return read_week("99", tmp_path)

    return read_text


def replaced(old, new, text=SAMPLE):
    assert old in text, f"the sample week no longer holds {old!r}"
    return text.replace(old, new, 1)


def test_a_week_is_read_into_its_parts(week):
    assert (week.name, week.number) == ("w99_sample", 99)
    assert week.title == "What does a week look like to its tools?"
    assert list(week.exercises) == ["softmax", "running_mean"]
    softmax = week.exercises["softmax"]
    assert (softmax.difficulty, softmax.minutes, softmax.points) == (2, 10, 3)
    assert [check.grade_id for check in softmax.checks] == ["softmax-example", "softmax-overflow"]
    assert [wrong.name for wrong in softmax.wrongs] == ["wrong_axis", "no_sum", "overflows"]
    assert softmax.wrongs[1].says.startswith("These are powers")
    assert softmax.names == {"softmax"}
    assert week.points == 3 + 2 + 2
    assert [cell.tags for cell in week.given] == [("parameters",), (), ("experiment",)]


def test_a_check_is_split_into_what_is_seen_and_what_is_hidden(week):
    example, overflow = week.exercises["softmax"].checks
    assert "expect(" in example.visible
    assert "wide" not in example.visible
    assert "wide" in example.hidden
    assert "expect(" not in example.hidden
    assert overflow.visible == ""
    assert "1000.0" in overflow.hidden
    assert not re.search("HIDDEN TESTS", example.visible + example.hidden + overflow.hidden)


def test_solution_and_stub_come_from_one_text(week):
    softmax = week.exercises["softmax"]
    assert "keepdim" in softmax.solution
    assert "SOLUTION" not in softmax.solution
    assert "keepdim" not in softmax.stub
    assert "raise NotImplementedError()" in softmax.stub
    assert '"""Turn each row' in softmax.stub
    compile(softmax.stub, "stub", "exec")


def test_a_written_question_has_a_model_answer_and_a_mark_scheme(week):
    (written,) = week.written
    assert (written.name, written.points) == ("why_max", 2)
    assert written.question.endswith("and why should it?")
    assert written.model_answer.startswith("Numerator")
    assert written.mark_scheme.startswith("- 1 point")


def test_every_cell_knows_its_line(week):
    lines = SAMPLE.split("\n")
    for cell in week.cells:
        first = lines[cell.line - 1].removeprefix("# " if cell.cell_type == "markdown" else "")
        assert first == cell.text.split("\n")[0]


def test_markers_inside_strings_and_jupytext_headers_are_no_cells(read):
    header = '# ---\n# jupyter:\n#   jupytext:\n#     formats: "py:percent"\n# ---\n\n'
    text = replaced("import torch\nfrom", 'text = """\n# %% no cell\n"""\nimport torch\nfrom')
    week = read(header + text)
    assert "# %% no cell" in week.given[1].text
    assert week.cells[-1].text.startswith("## What was new")


@pytest.mark.parametrize("text", ["99", "w99", "sample", "w99_sample", "tests/weeks/w99_sample.py"])
def test_a_week_is_found_by_any_of_its_names(text):
    assert resolve_week(text, WEEKS) == "w99_sample"


@pytest.mark.parametrize("text", ["3", "w98", "clip", "", "w99_sampl", "../../etc/passwd", "999"])
def test_an_unknown_week_is_named_with_those_that_exist(text):
    with pytest.raises(CourseError, match="w99_sample") as failure:
        resolve_week(text, WEEKS)
    assert repr(text) in str(failure.value)
    assert failure.value.exit_code == 2


def test_no_weeks_at_all_is_said(tmp_path):
    assert week_names(tmp_path) == []
    with pytest.raises(CourseError, match="none yet"):
        resolve_week("1", tmp_path)


def test_the_checkout_is_found_and_names_its_repository():
    assert (repo_root() / "course" / "source.py").is_file()
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", repository())


EXERCISE = '# %% [markdown] exercise="softmax" difficulty=2 minutes=10'
CHECK = '# %% check="softmax" aspect="example" points=2 title="numbers you can work by hand"'
WRONG = '# %% wrong="softmax" name="no_sum"'
BREAKS = {
    "unknown key": (EXERCISE, EXERCISE + " minuts=3", "unknown key 'minuts'.*use exercise"),
    "missing key": (EXERCISE, EXERCISE.replace(" minutes=10", ""), "has no minutes"),
    "two kinds": (EXERCISE, EXERCISE + ' answer="softmax"', "cannot be exercise and answer"),
    "unreadable keys": (WRONG, '# %% wrong="softmax" name=no sum', "cannot be read"),
    "wrong cell type": (EXERCISE, EXERCISE.replace("[markdown] ", ""), r"begins with '# %% \[mark"),
    "unknown tag": ('tags=["experiment"]', 'tags=["experimant"]', "write a list of parameters"),
    "difficulty": (EXERCISE, EXERCISE.replace("=2", "=6"), "from 1 to 5"),
    "minutes": (EXERCISE, EXERCISE.replace("=10", "=0"), "above 0"),
    "points zero": (CHECK, CHECK.replace("points=2", "points=0"), "points=0: write a whole"),
    "points half": (CHECK, CHECK.replace("points=2", "points=1.5"), "points=1.5: write a whole"),
    "points true": (CHECK, CHECK.replace("points=2", "points=true"), "points=True: write a whole"),
    "name": (WRONG, WRONG.replace("no_sum", "No sum"), "name='No sum': write a name"),
    "says empty": ('says="These are', 'says="" was="', "unknown key 'was'|write one line"),
    "wrong without says": (
        'says="These are powers, not shares yet: divide each row by its sum."',
        "",
        "the wrong cell has no says",
    ),
    "forbids": (EXERCISE, EXERCISE + ' forbids=["clip"]', "list of names in mmlearn"),
    "no title": ("# # Week 99. What", "# Week 99. What", "begin with a markdown cell"),
    "wrong number": ("# # Week 99.", "# # Week 9.", "begin with a markdown cell '# Week 99"),
    "text in no cell": ("# %% [markdown]\n# # Week", "x = 1\n\n# %%\n# # Week", "no cell"),
    "empty cell": (EXERCISE, "# %%\n\n" + EXERCISE, "the cell is empty"),
    "raw cell": ('# %% [markdown] written="why_max" points=2', "# %% [raw]", "raw cells"),
    "not Python": ("scores = torch.randn(4, 3)", "scores = = 3", "not Python"),
    "magic": ("scores = torch.randn(4, 3)", "%matplotlib inline", "no magics"),
    "star import": ("from torch import nn", "from torch import *", r"import \* hides"),
    "stub not Python": (
        "def softmax(scores):\n",
        "### BEGIN SOLUTION\ndef softmax(scores):\n    pass\n### END SOLUTION\n    x = 1\n",
        "not Python",
    ),
    "no parameters": ('# %% tags=["parameters"]', "# %%", "0 parameters cells"),
    "two parameters": ('# %% tags=["experiment"]', '# %% tags=["parameters"]', "2 parameters"),
    "parameter missing": ('SCALE = "cpu"\n', "", "does not set SCALE"),
    "two headers": (
        '# %% [markdown] exercise="running_mean" difficulty=1 minutes=5',
        EXERCISE,
        "is there already",
    ),
    "answer without exercise": ('answer="softmax"', 'answer="softmix"', "no exercise above it"),
    "check without exercise": ('check="softmax"', 'check="softmix"', "no exercise above it"),
    "no solution region": (
        "    ### BEGIN SOLUTION\n    powers = torch.exp(scores - scores.max(dim=-1, keepdim=True)."
        "values)\n    return powers / powers.sum(dim=-1, keepdim=True)\n    ### END SOLUTION\n",
        "    return torch.softmax(scores, -1)\n",
        "no solution region",
    ),
    "solution never ends": ("    ### END SOLUTION\n", "", "never ends"),
    "end without begin": ("    ### BEGIN SOLUTION\n", "", "'### END SOLUTION' ends nothing"),
    "nested": ("    ### END SOLUTION", "    ### BEGIN SOLUTION", "end that region first"),
    "sloppy marker": ("### BEGIN HIDDEN TESTS", "# BEGIN HIDDEN TESTS", "read as a marker"),
    "marker in prose": ("# ## What was new", "# BEGIN SOLUTION", "read as a marker"),
    "region in the wrong cell": (
        "scores = torch.randn(4, 3)",
        "### BEGIN SOLUTION\nscores = 1\n### END SOLUTION",
        "may stand only in",
    ),
    "empty region": (
        "rows = torch.log",
        "### BEGIN HIDDEN TESTS\n### END HIDDEN TESTS\nrows = torch.log",
        "region is empty",
    ),
    "hidden region not at the end": (
        "assert softmax(wide).shape == (2, 3, 5)\n### END HIDDEN TESTS",
        "### END HIDDEN TESTS\nassert softmax(rows).shape == (2, 2)",
        "at the end of its check",
    ),
    "same aspect twice": ('aspect="overflow"', 'aspect="example"', "'softmax-example' is taken"),
    "written takes a name": ('written="why_max"', 'written="softmax"', "'softmax' is taken"),
    "wrong twice": ('name="no_sum"', 'name="overflows"', "'overflows' is at line"),
    "no question": (
        "# **In your own words.** Why may softmax subtract the largest score, and why should it?\n",
        "",
        "asks nothing",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_malformed_week_is_refused_with_line_and_way_out(case, read):
    old, new, law = BREAKS[case]
    with pytest.raises(CourseError, match=rf"^w99_sample\.py line \d+: .*({law})") as failure:
        read(replaced(old, new))
    assert "\n" not in str(failure.value)


def test_the_line_in_a_complaint_is_the_line_in_the_file(read):
    text = replaced("scores = torch.randn(4, 3)", "scores = = 3")
    number = text.split("\n").index("scores = = 3") + 1
    with pytest.raises(CourseError, match=rf"line {number}: the cell is not Python"):
        read(text)


def without_cell(marker):
    return re.sub(rf"^# %% {re.escape(marker)}.*?(?=^# %%)", "", SAMPLE, flags=re.M | re.S)


def test_an_exercise_without_an_answer_is_refused(read):
    with pytest.raises(CourseError, match=r"line \d+: exercise 'softmax' has 0 answers"):
        read(without_cell('answer="softmax"'))


def test_an_exercise_without_a_hidden_check_is_refused(read):
    with pytest.raises(CourseError, match="'running_mean' has 0 checks, none of them with a hid"):
        read(without_cell('check="running_mean"'))


def test_an_exercise_with_two_wrong_answers_is_refused(read):
    with pytest.raises(CourseError, match="'softmax' has 2 wrong answers: write at least 3"):
        read(without_cell('wrong="softmax" name="no_sum"'))


@pytest.mark.parametrize("region", ["SOLUTION", "MARK SCHEME"])
def test_a_written_question_without_a_region_is_refused(region, read):
    text = replaced(f"# ### BEGIN {region}\n", "").replace(f"# ### END {region}\n", "")
    with pytest.raises(CourseError, match=f"written question has 0 {region} regions"):
        read(text)


def test_a_second_answer_cell_is_refused(read):
    with pytest.raises(CourseError, match="'softmax' has 2 answers"):
        read(replaced(WRONG, '# %% answer="softmax"\ndef f():\n    pass\n\n\n' + WRONG))


def test_a_wrong_answer_that_is_the_solution_is_refused(read):
    solution = read_week("99", WEEKS).exercises["softmax"].solution
    cell = f'{WRONG[:-8]}"again" says="Not wrong."\n{solution}\n# a comment changes nothing\n\n\n'
    with pytest.raises(CourseError, match="'again' is the same code as the solution"):
        read(replaced(WRONG, cell + WRONG))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "w99_sample.py").write_bytes(b"\xff\xfe# %%")
    with pytest.raises(CourseError, match="cannot be read as UTF-8"):
        read_week("99", tmp_path)


# Rules between cells

HAND = '    "w99_sample/softmax/hand",\n'
RULES = {
    "a forbidden name that mmlearn has not": (
        EXERCISE,
        EXERCISE + ' forbids=["mmlearn.transformer.atention"]',
        r"forbids mmlearn\.transformer\.atention, which mmlearn does not have",
    ),
    "a check uses a given cell's name": (
        "assert softmax(wide).shape == (2, 3, 5)",
        "assert softmax(scores).shape == (4, 3)",
        "uses 'scores', which neither it nor the answer",
    ),
    "a check uses a given cell's import": (
        'title="numbers you can work by hand"\nimport torch\n',
        'title="numbers you can work by hand"\n',
        "uses 'torch'",
    ),
    "a check uses another exercise's answer": (
        "other = RunningMean()",
        "other = RunningMean()\nsoftmax(other)",
        "'running_mean-example' uses 'softmax'",
    ),
    "a hidden region uses what the visible part computed": (
        "assert softmax(wide).shape == (2, 3, 5)",
        "assert softmax(rows).shape == (2, 2)",
        "hidden region of 'softmax-example' uses 'rows'",
    ),
    "globals": ("other = RunningMean()", "other = globals()['RunningMean']()", "globals"),
    "inspect": ("import torch\n\nhuge", "import inspect, torch\n\nhuge", "inspect"),
    "a check overwrites a name of the notebook": (
        "wide = torch",
        "scores = wide = torch",
        "overwrites 'scores'",
    ),
    "a check tests nothing": (
        "assert torch.equal(softmax(huge), torch.tensor([[1.0, 0.0]]))",
        "assert huge.shape == (1, 2)",
        "tests nothing",
    ),
    "a probe of another exercise": (HAND, '    "w99_sample/mean/hand",\n', "has the probe"),
    "a probe put together": (HAND, '    "w99_sample/softmax/" + "hand",\n', "has the probe"),
    "a probe used twice": (
        '"w99_sample/running_mean/infinite"',
        '"w99_sample/running_mean/hand"',
        "is used at line",
    ),
    "an answer uses a given variable": (
        "    return powers / powers.sum(dim=-1, keepdim=True)\n    ### END",
        "    return scores / SEED\n    ### END",
        "uses 'SEED'",
    ),
    "an answer uses another answer": (
        "        self.count += 1\n        return self.total / self.count\n        ### END",
        "        return softmax(value)\n        ### END",
        "answer of 'running_mean' uses 'softmax'",
    ),
    "a wrong answer uses what is nowhere": (
        "    return torch.exp(scores - scores.max(dim=-1, keepdim=True).values)\n\n\n# %% wrong",
        "    return np.exp(scores)\n\n\n# %% wrong",
        "wrong answer 'no_sum' of 'softmax' uses 'np'",
    ),
    "a wrong answer lacks what is tested": (
        "class RunningMean(nn.Module):\n    def forward(self, value):",
        "class Mean(nn.Module):\n    def forward(self, value):",
        "'last_value' of 'running_mean' does not define 'RunningMean'",
    ),
    "a given cell rebinds an answer": (
        "print(softmax(scores))",
        "from torch import softmax",
        "binds 'softmax', which is the learner's answer",
    ),
    "a check rebinds an answer": (
        "import torch\n\nhuge",
        "import torch\n\nsoftmax = softmax\nhuge",
        "binds 'softmax', which is the learner's",
    ),
}


@pytest.mark.parametrize("case", RULES)
def test_a_broken_rule_is_refused_with_its_line(case, read):
    old, new, law = RULES[case]
    with pytest.raises(CourseError, match=rf"^w99_sample\.py line \d+: .*({law})"):
        read(replaced(old, new))


def test_two_answers_may_not_define_one_name(read):
    marker = '# %% answer="running_mean"\n'
    text = replaced(marker, f"{marker}def softmax(x):\n    return x\n\n\n")
    with pytest.raises(CourseError, match="'softmax' and 'running_mean' both define 'softmax'"):
        read(text)


def test_a_solution_that_breaks_its_own_rule_is_refused(read):
    text = replaced(EXERCISE, EXERCISE + ' forbids=["mmlearn.metrics.accuracy"]')
    start = 'shares that sum to one."""\n'
    text = replaced(start, f"{start}    import mmlearn.metrics as m\n    m.accuracy\n", text)
    with pytest.raises(CourseError, match=r"The answer to softmax is taken from mmlearn\.metrics"):
        read(text)


# Names


@pytest.mark.parametrize(
    ("code", "used"),
    [
        ("x = y", {"y"}),
        ("print(len(x))", {"x"}),
        ("import a.b as c\nc.d(e)", {"e"}),
        ("def f(x, *a, k=d, **b) -> r:\n    y = x\n    return y + g", {"d", "r", "g"}),
        ("[i * j for i in xs if (k := i)]", {"j", "xs"}),
        ("{k: v for k, v in pairs}", {"pairs"}),
        (
            "class A(B):\n    x = y\n    z = x\n    def f(self): return x, __class__",
            {"B", "y", "x"},
        ),
        ("def f():\n    def g():\n        return h\n    return g", {"h"}),
        (
            "def f():\n    x = 1\n    def g():\n        nonlocal x\n        x = y\n    return g",
            {"y"},
        ),
        ("def f():\n    global x\n    x = 1\nx", set()),
        ("lambda a: a + b", {"b"}),
        ("with o() as f, p: pass", {"o", "p"}),
        ("try:\n    pass\nexcept E as e:\n    e", {"E"}),
        ("for i in range(n): total += i", {"n"}),
        ("match x:\n    case {'a': y}: z = y", {"x"}),
        ('def f(x: Float[Tensor, "B L"]): pass', {"Float", "Tensor"}),
        ("@d\nasync def f(): await g()", {"d", "g"}),
        ("__name__", set()),
    ],
)
def test_names_used_follow_pythons_own_scopes(code, used):
    assert names_used(code) == used


def test_names_bound_and_imported_are_told_apart():
    code = (
        "import a.b\nfrom c import d as e\nf = 1\ndef g(): h = 1\nclass I: j = 1\nfor k in f: pass"
    )
    assert names_imported(code) == {"a", "e"}
    assert names_bound(code) == {"a", "e", "f", "g", "I", "k"}


def test_definitions_only_drops_what_is_computed():
    code = "import a\nb = a.b()\ndef f(): return b\nclass C: pass\nassert b\nif b:\n    c = 1"
    assert names_bound(definitions_only(code)) == {"a", "f", "C"}


def test_the_stub_keeps_indentation_and_all_text_around_each_region():
    indented = "    ### BEGIN SOLUTION\n    b\n    ### END SOLUTION"
    text = f"a\n{indented}\nc\n### BEGIN SOLUTION\nd\n### END SOLUTION"
    stub = "# YOUR CODE HERE\nraise NotImplementedError()"
    indented = "    # YOUR CODE HERE\n    raise NotImplementedError()"
    assert without_solution(text) == f"a\n{indented}\nc\n{stub}"


# An answer taken from mmlearn


@pytest.fixture(scope="module")
def attended(tmp_path_factory):
    """An exercise whose answer mmlearn has under another name."""
    text = replaced(EXERCISE, EXERCISE + ' forbids=["mmlearn.transformer.attention"]')
    folder = tmp_path_factory.mktemp("weeks")
    (folder / "w99_sample.py").write_text(text, "utf-8")
    return read_week("99", folder).exercises["softmax"]


@pytest.mark.parametrize(
    ("code", "elsewhere"),
    [
        ("from mmlearn.transformer import attention as softmax", ""),
        ("from mmlearn.transformer import attention\nsoftmax = attention", ""),
        ("def softmax(x):\n    from mmlearn.transformer import attention as f\n    f(x)", ""),
        ("import mmlearn.transformer\ndef softmax(x): return mmlearn.transformer.attention(x)", ""),
        ("import mmlearn.transformer as m\nsoftmax = m.attention", ""),
        ("from mmlearn import transformer\ndef softmax(x): return transformer.attention(x)", ""),
        ("from mmlearn.transformer import *\nsoftmax = attention", ""),
        ("softmax = attention", "from mmlearn.transformer import attention"),
        ("softmax = attention", "from mmlearn.transformer import *"),
        ("def softmax(x): return c.attention(x)", "import mmlearn.transformer as c"),
        ("import importlib as i\nsoftmax = i.import_module('mmlearn.transformer').attention", ""),
        (
            "from importlib import import_module as i\nm = __import__('mmlearn.transformer')\n"
            "softmax = getattr(m, 'attention')",
            "",
        ),
        ("import mmlearn.transformer as m\nn = m\nf = n.attention\nsoftmax = f", ""),
        ("from mmlearn.transformer import softmax", ""),
        ("from mmlearn.transformer import Soft_Max\nsoftmax = Soft_Max()", ""),
        ("pass", "from mmlearn.transformer import softmax"),
    ],
)
def test_an_answer_taken_from_mmlearn_is_found_by_any_road(code, elsewhere, attended):
    said = imported_answer(code, attended, [elsewhere])
    assert said is not None
    assert "earns nothing" in said
    assert "mmlearn." in said


@pytest.mark.parametrize(
    ("code", "elsewhere"),
    [
        ("def softmax(x): return x / x.sum()", ""),
        ("from mmlearn.train import set_seed\ndef softmax(x):\n    set_seed(0)\n    return x", ""),
        ("def softmax(x): return x", "from mmlearn.transformer import attention"),
        ("import mmlearn.transformer\ndef softmax(x): return x", ""),
        ("from torch import softmax", ""),
        ("def softmax(attention): return attention", ""),
        ("this is no Python (", "nor is this ("),
        ("", ""),
        ("def softmax(x): return 'mmlearn.transformer.attention'", ""),
    ],
)
def test_an_answer_of_ones_own_is_left_in_peace(code, elsewhere, attended):
    assert imported_answer(code, attended, [elsewhere]) is None


def test_the_solution_is_never_accused(week):
    for exercise in week.exercises.values():
        assert imported_answer(exercise.solution, exercise) is None
        assert imported_answer(exercise.stub, exercise) is None
