"""Forgeries in the student's own process: of checks, libraries, metadata and messages.

What works against a grader that runs its tests in the student's kernel comes first.
"""

from .kit import (
    FULL,
    NOT_SOFTMAX,
    NOTHING,
    ONLY_MEAN,
    ONLY_SOFTMAX,
    UNUSABLE,
    WRONG,
    as_bytes,
    cells_of,
    collector,
)

CASES, case = collector("forgery")


@case(NOTHING, "")
def agreeable_objects(kit):
    """Asserts dropped, errors swallowed, and an object that agrees with everything."""
    from course.samples import samples

    from .kit import WEEK, WEEKS

    return samples(WEEK, WEEKS, ["hostile"])[0].content


@case(ONLY_MEAN, WRONG)
def asserts_dropped(kit):
    """A transformer takes the asserts out of whatever the shell is given."""
    return kit.hand_in(
        softmax=NOT_SOFTMAX,
        first="""
        import ast

        class DropAsserts(ast.NodeTransformer):
            def visit_Assert(self, node):
                return ast.copy_location(ast.Pass(), node)

        get_ipython().ast_transformers.append(DropAsserts())
        get_ipython().input_transformers_post.append(
            lambda lines: ["pass\\n"] if "assert" in "".join(lines) else lines
        )
        """,
    )


@case(ONLY_MEAN, WRONG)
def torch_patched(kit):
    """Every comparison that a check might use says yes."""
    return kit.hand_in(
        softmax=NOT_SOFTMAX,
        first="""
        for place in (torch, torch.Tensor, torch.testing):
            for name in ("allclose", "equal", "isclose", "__eq__", "assert_close"):
                if hasattr(place, name):
                    setattr(place, name, lambda *a, **k: True)
        torch.softmax = torch.Tensor.softmax = lambda scores, *a, **k: scores
        """,
    )


@case(ONLY_MEAN, WRONG)
def feedback_patched(kit):
    """mmlearn's own comparison does nothing any more."""
    return kit.hand_in(
        softmax=NOT_SOFTMAX,
        first="""
        import sys
        import mmlearn.feedback

        for name in ("expect", "expect_raises", "own_work", "_same", "_report"):
            setattr(mmlearn.feedback, name, lambda *a, **k: True)
        sys.modules["mmlearn.feedback"] = mmlearn.feedback
        """,
    )


@case(ONLY_MEAN, WRONG)
def checks_shadowed(kit):
    """The names that a check uses are the student's, before and after it imports them."""
    return kit.hand_in(
        softmax=NOT_SOFTMAX,
        first="""
        import builtins

        def expect(*a, **k): pass
        expect_raises = own_work = _own_work = _salted = expect
        AssertionError = builtins.AssertionError = ZeroDivisionError
        """,
        last="expect = lambda *a, **k: None",
    )


@case(NOTHING, "^not answered yet")
def printed_success(kit):
    """Says in every place that somebody might read that all went well."""
    notebook = kit.released()
    from nbformat.v4 import new_code_cell, new_output

    shouts = """
import json, sys
from IPython.display import display, publish_display_data
score = {"points": 2, "max_points": 2, "status": "passed", "reason": ""}
print("passed", json.dumps(score), json.dumps({"type": "result", "rows": [score] * 3}))
print("passed", file=sys.stderr)
marks = {"nbgrader": {"points": 99, "grade": True}}
publish_display_data({"text/plain": "Success!"}, metadata=marks)
2.0
"""
    notebook.cells.append(new_code_cell(shouts.strip()))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [new_output("execute_result", {"text/plain": "2.0"}, execution_count=1)]
    return as_bytes(notebook)


@case(FULL)
def points_raised(kit):
    """A check says that it is worth a thousand points, an answer that it is a check."""

    def edit(data):
        cells = cells_of(data)
        cells["softmax-example"]["metadata"]["nbgrader"]["points"] = 1000
        cells["softmax"]["metadata"]["nbgrader"] |= {"points": 50, "grade": True}
        cells["why_max"]["metadata"]["nbgrader"]["points"] = 1e308

    return kit.edited(edit)


@case(ONLY_MEAN, WRONG, notes="check|released|replaced|changed")
def checks_edited(kit):
    """The check cells hold checks that any answer passes."""

    def edit(data):
        for name, cell in cells_of(data).items():
            if name.startswith("softmax-"):
                cell["source"] = "assert True"
                cell["metadata"]["nbgrader"]["solution"] = True

    return kit.edited(edit, softmax=NOT_SOFTMAX)


@case(ONLY_MEAN, WRONG, notes="check|delet|put back")
def checks_deleted(kit):
    def edit(data):
        data["cells"] = [c for c in data["cells"] if not c["id"].startswith("softmax-")]

    return kit.edited(edit, softmax=NOT_SOFTMAX)


@case(ONLY_MEAN, UNUSABLE)
def answers_of_the_visible_check(kit):
    """Hard-coded: what the student can read is right, the rest is not."""
    return kit.hand_in(
        softmax="""
        def softmax(scores):
            return torch.tensor([[0.25, 0.75], [0.5, 0.5]])
        """
    )


@case(ONLY_MEAN, "^it must hold")
def empties_its_inputs(kit):
    """Zeroes what it was given: whatever the check then computes from it is easily equalled.

    In-place changes come back by design, so a check works out what it wants before it calls.
    """
    return kit.hand_in(
        softmax="""
        def softmax(scores):
            if scores.shape == (2, 2):
                return torch.tensor([[0.25, 0.75], [0.5, 0.5]])
            scores.zero_()
            return torch.full_like(scores, 1 / scores.shape[-1])
        """
    )


@case(ONLY_MEAN, "^it must hold")
def guessed_seeds(kit):
    """Knows the course's repository: the seeds that its hidden checks write down, and the sizes."""
    return kit.hand_in(
        softmax="""
        known = {}
        for seed in range(20):
            wide = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed))
            known[wide.sum().item()] = torch.softmax(wide, dim=-1)

        def softmax(scores):
            if scores.shape == (2, 2):
                return torch.tensor([[0.25, 0.75], [0.5, 0.5]])
            return known.get(scores.sum().item(), scores)
        """
    )


@case(ONLY_MEAN, "^it must hold", shown="found: 0")
def frames_searched(kit):
    """Looks for the hidden check in the frames above, in all objects, and in the history."""
    return kit.hand_in(
        last="""
        print("found:", seen[0])
        """,
        softmax="""
        import gc
        import re
        import sys

        # A pattern, so that the text which is looked for stands nowhere in this notebook itself.
        MARK, seen = re.compile("softmax[(]wide[)]"), [0]

        def look():
            frame = sys._getframe()
            while frame is not None:
                for value in list(frame.f_locals.values()) + list(frame.f_code.co_consts):
                    if isinstance(value, str) and MARK.search(value):
                        seen[0] += 1
                frame = frame.f_back
            for thing in gc.get_objects():
                if type(thing) is dict:
                    texts = [value for value in list(thing.values()) if type(value) is str]
                    seen[0] += sum(bool(MARK.search(text)) for text in texts)
            history = get_ipython().user_ns.get("In", [])
            seen[0] += sum(bool(MARK.search(str(line))) for line in history)

        look()

        def softmax(scores):
            look()
            if scores.shape == (2, 2) and not seen[0]:
                return torch.tensor([[0.25, 0.75], [0.5, 0.5]])
            return torch.softmax(scores, dim=-1) if seen[0] else scores
        """,
    )


@case(ONLY_MEAN, UNUSABLE)
def history_read(kit):
    """Answers with what stands in the last input, where a kernel has the check."""
    return kit.hand_in(
        softmax="""
        def softmax(scores):
            lines = In[-1] + get_ipython().history_manager.input_hist_raw[-1]
            return lines.split("softmax(wide)")[-1]
        """
    )


@case(ONLY_MEAN, "SystemExit")
def leaves_politely(kit):
    """Ends each call as if the whole test run were over, successfully."""
    return kit.hand_in(softmax="def softmax(scores):\n    raise SystemExit(0)")


@case(ONLY_MEAN, "^the answer raised|KeyboardInterrupt|GeneratorExit")
def raises_what_nobody_catches(kit):
    """An error of a class of its own, which is no Exception."""
    return kit.hand_in(
        softmax="""
        class Passed(BaseException):
            pass

        def softmax(scores):
            raise Passed("all checks passed")
        """
    )


@case(ONLY_MEAN, "^the answer raised|^The scores log 1")
def raises_the_graders_own_errors(kit):
    """Errors named and built like those with which a grader says that all is well."""
    return kit.hand_in(
        softmax="""
        import sys

        wire = next((m for name, m in sys.modules.items() if name.endswith("inside.wire")), None)
        Lost = getattr(wire, "Lost", RuntimeError)

        def softmax(scores):
            error = Lost("ended", "passed") if Lost is not RuntimeError else Lost("passed")
            error.how = error.sentence = "passed"
            raise error
        """
    )


@case(ONLY_SOFTMAX, "must be refused|must raise a ValueError|^the answer raised|^After 1")
def an_error_that_is_every_error(kit):
    """A metaclass says that its exception is whichever one is asked for."""
    return kit.hand_in(
        running_mean="""
        class Meta(type):
            __instancecheck__ = __subclasscheck__ = lambda *a: True
            __eq__ = lambda *a: True
            __hash__ = type.__hash__

        class Any(Exception, metaclass=Meta):
            __class__ = ValueError

        class RunningMean(nn.Module):
            def forward(self, value):
                raise Any("value is not finite")
        """
    )


@case(FULL)
def a_patch_of_what_is_right_anyway(kit):
    """A right answer is right, whatever else was patched."""
    return kit.hand_in(
        first="""
        import mmlearn.feedback
        mmlearn.feedback.expect = print
        torch.allclose = torch.equal = lambda *a, **k: False
        """
    )


@case(ONLY_MEAN, WRONG)
def modules_replaced(kit):
    """torch itself is another thing, as far as the student's process is concerned."""
    return kit.hand_in(
        softmax=NOT_SOFTMAX,
        last="""
        import sys
        import types

        fake, true = types.ModuleType("torch"), torch

        def pretend(name):
            return (lambda *a, **k: True) if name in ("allclose", "equal") else getattr(true, name)

        fake.__getattr__ = pretend
        sys.modules["torch"] = fake
        sys.modules["mmlearn"] = sys.modules["mmlearn.feedback"] = types.ModuleType("mmlearn")
        """,
    )


@case(ONLY_MEAN, WRONG)
def the_shell_is_the_students(kit):
    """run_cell, the display hooks and the namespace itself are replaced."""
    return kit.hand_in(
        softmax=NOT_SOFTMAX,
        first="""
        shell = get_ipython()
        type(shell).run_cell = lambda *a, **k: None
        type(shell).showtraceback = lambda *a, **k: None
        shell.set_custom_exc((BaseException,), lambda *a, **k: None)
        shell.events.register("pre_run_cell", lambda *a: print("passed"))
        """,
        last="1 / 0",
    )
