"""`course verify` holds for a sound week and names what is unsound in any other."""

import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from course import attempts
from course.build import build
from course.source import CourseError
from course.verify import show, verify

WEEKS = Path(__file__).parent / "weeks"
SAMPLE = (WEEKS / "w99_sample.py").read_text("utf-8")

# Each case breaks a copy of the sample week in one place: (old text, new text, the problem).
CASES = {
    "solution": (
        "return powers / powers.sum(dim=-1, keepdim=True)\n    ### END",
        "return powers\n    ### END",
        "the solution fails check example: AssertionError: ",
    ),
    "solution_hidden": (
        "assert softmax(wide).shape == (2, 3, 5)",
        "assert softmax(wide).shape == (5, 3, 2)",
        "the solution fails check example: AssertionError, line",
    ),
    "solution_raises": (
        '    """Turn each row of scores into shares that sum to one."""\n    ### BEGIN SOLUTION\n',
        '    """Turn each row of scores into shares that sum to one."""\n    ### BEGIN SOLUTION\n'
        '    raise KeyError("row")\n',
        "the solution fails check example: KeyError: 'row'",
    ),
    "stub_passes": (
        "assert torch.equal(softmax(huge), torch.tensor([[1.0, 0.0]]))",
        "assert callable(softmax)",
        "the bare stub passes check overflow",
    ),
    "stub_passes_hidden": (
        "wide = torch.randn(2, 3, 5, generator=generator)\n"
        "assert torch.allclose(torch.softmax(wide, dim=-1), softmax(wide), atol=1e-6)\n"
        "assert softmax(wide).shape == (2, 3, 5)\n",
        "assert callable(softmax)\n",
        "the bare stub passes the hidden region of check example",
    ),
    "wrong_passes": (
        "assert torch.equal(softmax(huge), torch.tensor([[1.0, 0.0]]))",
        "assert softmax(huge).shape == (1, 2)",
        "wrong answer overflows passes every hidden region",
    ),
    "wrong_does_not_run": (
        "class RunningMean(nn.Module):\n    def forward(self, value):\n        if not",
        'raise OSError("no file")\n\n\nclass RunningMean(nn.Module):\n'
        "    def forward(self, value):\n        if not",
        "wrong answer last_value does not run: OSError: no file",
    ),
    "noisy": (
        "other = RunningMean()\n",
        'import warnings\n\nwarnings.warn("old", stacklevel=1)\nother = RunningMean()\n',
        "check example writes to standard error, for which nbgrader gives no points: ",
    ),
    "shows": (
        "assert torch.equal(softmax(huge), torch.tensor([[1.0, 0.0]]))",
        "assert torch.equal(softmax(huge), torch.tensor([[1.0, 0.0]]))\nsoftmax(huge)[0, 0]",
        "check overflow ends with a value, which nbgrader takes for a partial mark",
    ),
    "given_cell_fails": (
        "scores = torch.randn(4, 3)\n",
        "scores = torch.randn(4, 3)\nassert scores.shape == (3, 4)\n",
        "a given cell fails while exercises are unanswered (AssertionError, line",
    ),
    "leans_on_another": (
        "        return self.total / self.count\n        ### END SOLUTION\n",
        "        return helper(self.total / self.count)\n        ### END SOLUTION\n",
        "the solution fails check example: NotImplementedError",
    ),
    "lucky_draw": (
        "assert softmax(wide).shape == (2, 3, 5)",
        "assert softmax(wide).shape == (2, 3, 5)\nassert torch.rand(()) < 0.6",
        "the solution fails check example: AssertionError, line",
    ),
    "hangs": (
        "    powers = torch.exp(scores)\n",
        "    powers = scores\n    while True:\n        pass\n",
        "wrong answer overflows does not run: did not end within 5 seconds",
    ),
    "crashes": (
        "    powers = torch.exp(scores)\n",
        "    import os\n\n    powers = os.kill(os.getpid(), 9)\n",
        "wrong answer overflows does not run: ended the process (signal 9)",
    ),
    "exits": (
        "    powers = torch.exp(scores)\n",
        "    import os\n\n    powers = os._exit(3)\n",
        "wrong answer overflows does not run: ended the process (exit status 3)",
    ),
    "given_cell_exits": (
        "scores = torch.randn(4, 3)\n",
        "scores = torch.randn(4, 3)\nimport os\n\nos._exit(4)\n",
        "the cells above the exercise: ended the process (exit status 4)",
    ),
}


def changed(case):
    old, new, _ = CASES[case]
    assert old in SAMPLE, f"the sample week no longer holds what the case {case} breaks"
    text = SAMPLE.replace(old, new, 1)
    if case == "leans_on_another":
        # A given function between the exercises that calls the first exercise's answer.
        place = '# %% [markdown] exercise="running_mean"'
        helper = "# %%\ndef helper(value):\n    return softmax(value)\n\n\n"
        text = text.replace(place, helper + place)
    return text


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    out = tmp_path_factory.mktemp("sound")
    build(to=out, folder=WEEKS)
    seen = []
    path = out / "mmlearn" / "fingerprints.json"
    return verify(folder=WEEKS, fingerprints=path, done=seen.append), seen


@pytest.fixture(scope="module")
def unsound(tmp_path_factory):
    """All broken weeks, verified at once: {case: the problems of its exercises}."""
    folder = tmp_path_factory.mktemp("unsound")
    names = {}
    for number, case in enumerate(CASES, start=1):
        name = names[case] = f"w{number:02d}_{case}"
        text = changed(case).replace("w99_sample", name).replace("Week 99", f"Week {number}")
        (folder / f"{name}.py").write_text(text, "utf-8")
    start = time.monotonic()
    verification = verify(folder=folder, fingerprints=folder / "none.json", seconds=5)
    assert time.monotonic() - start < 120
    problems = {case: [] for case in CASES}
    for result in verification.exercises:
        problems[result.week[4:]] += result.problems
    return problems, verification


def test_a_sound_week_holds(sound):
    verification, _ = sound
    assert [result.problems for result in verification.exercises] == [[], []]
    assert verification.ok
    assert [(r.week, r.exercise, r.points, r.checks) for r in verification.exercises] == [
        ("w99_sample", "softmax", 3, 2),
        ("w99_sample", "running_mean", 2, 1),
    ]


def test_it_says_which_hidden_region_rejects_each_wrong_answer(sound):
    softmax, running_mean = sound[0].exercises
    assert {wrong.name: sorted(wrong.rejected_by) for wrong in softmax.wrongs} == {
        "wrong_axis": ["example", "overflow"],
        "no_sum": ["example"],
        "overflows": ["overflow"],
    }
    assert "not a number must be refused" in running_mean.wrongs[2].rejected_by["example"]


def test_it_says_which_wrong_answers_the_visible_checks_notice_and_recognise(sound):
    wrongs = [wrong for result in sound[0].exercises for wrong in result.wrongs]
    assert [wrong.name for wrong in wrongs if not wrong.noticed] == ["overflows"]
    assert [wrong.name for wrong in wrongs if not wrong.recognised] == ["overflows"]


def test_progress_is_told_once_per_exercise(sound):
    verification, seen = sound
    assert sorted(r.exercise for r in seen) == sorted(r.exercise for r in verification.exercises)


def test_the_table_and_the_json_tell_the_same(sound):
    verification, _ = sound
    out = io.StringIO()
    show(verification, Console(file=out, width=80))
    text = out.getvalue()
    assert max(len(line) for line in text.split("\n")) <= 80
    assert "2 exercises, 6 wrong answers: 6 rejected by hidden regions, 5 recognised" in " ".join(
        text.split()
    )
    assert "softmax/overflows" in text
    plain = json.loads(json.dumps(verification.as_dict()))
    assert plain["ok"] is True
    assert plain["exercises"][0]["wrongs"][0]["recognised"] is True


@pytest.mark.parametrize("case", CASES)
def test_an_unsound_week_is_named_with_its_problem(case, unsound):
    problems, verification = unsound
    assert not verification.ok
    assert any(CASES[case][2] in problem for problem in problems[case]), problems[case]


def test_a_problem_names_the_line_in_the_weeks_file(unsound):
    lines = changed("given_cell_fails").split("\n")
    number = lines.index("assert scores.shape == (3, 4)") + 1
    assert f"line {number})" in unsound[0]["given_cell_fails"][0]


def test_a_hanging_or_crashing_answer_costs_the_others_nothing(unsound):
    problems, verification = unsound
    for case in ("hangs", "crashes", "exits"):
        assert len(problems[case]) == 1
        result = next(
            r for r in verification.exercises if (r.week[4:], r.exercise) == (case, "softmax")
        )
        assert [bool(w.rejected_by) for w in result.wrongs] == [True, True, False]


def test_problems_stand_below_the_table(unsound):
    out = io.StringIO()
    show(unsound[1], Console(file=out, width=200))
    assert "/softmax: the bare stub passes check overflow." in out.getvalue()
    assert "Fingerprints are out of date for" in out.getvalue()


def test_outdated_fingerprints_are_said_but_prove_nothing_wrong(tmp_path):
    verification = verify(folder=WEEKS, fingerprints=tmp_path / "none.json")
    assert verification.ok
    assert all(result.outdated for result in verification.exercises)
    wrongs = [wrong for result in verification.exercises for wrong in result.wrongs]
    assert not any(wrong.recognised for wrong in wrongs)
    assert sum(wrong.noticed for wrong in wrongs) == 5


def test_a_worker_that_dies_is_one_sentence(monkeypatch):
    original = attempts._Worker.send

    def send_and_kill(self, message):
        original(self, message)
        if "key" in message:
            os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(attempts._Worker, "send", send_and_kill)
    with pytest.raises(CourseError, match="The worker that runs the answers ended"):
        verify(folder=WEEKS, jobs=1)


def test_where_processes_cannot_fork_it_says_so(monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(CourseError, match="use Linux, macOS or WSL"):
        verify(folder=WEEKS)
