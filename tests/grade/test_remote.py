import builtins
import collections
import copy
import gc
import inspect
import itertools
import math
import os
import pickle
import random
import signal
import socket
import time

import numpy as np
import pytest
import torch
from torch import nn

from course.grade import remote
from course.grade.inside import serve
from course.grade.inside.wire import Connection, Lost
from course.grade.remote import Client, is_from_student
from mmlearn.feedback import expect, expect_raises, own_work

PREAMBLE = """
import collections, copy, dataclasses, gc, math, os, random, time, weakref
import numpy as np
import torch
from torch import nn
"""


class PlainShell:
    """Stands in for the IPython shell."""

    def __init__(self):
        self.namespace = {"__name__": "__main__"}

    def run(self, source):
        try:
            exec(source, self.namespace)
        except Exception as error:
            return [], (type(error).__name__, str(error))
        return [{"output_type": "stream", "name": "stdout", "text": "ran"}], None


@pytest.fixture
def start():
    """A function that forks a student's process, runs code there, and returns its client."""
    children = []

    def run(code=""):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            ours.close()
            torch.set_num_threads(1)
            try:
                serve.main(theirs, PlainShell())
            finally:
                os._exit(0)
        theirs.close()
        children.append((pid, ours))
        client = Client(Connection(ours))
        client.pid = pid
        client.connection.deadline = time.monotonic() + 20
        outcome = client.run_cell(PREAMBLE + code)
        assert outcome.error is None, outcome.error
        return client

    yield run
    for pid, ours in children:
        ours.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def defined(start):
    """Runs code in a student's process; returns what some of its names are bound to."""

    def run(code, *names):
        client = start(code)
        client.keep("exercise", names)
        values = [client.value("exercise", name) for name in names]
        return values[0] if len(values) == 1 else values

    return run


def same(one, other):
    if isinstance(one, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, float):
        return type(one) is type(other) and repr(one) == repr(other)
    if isinstance(one, (list, tuple)):
        return (
            type(one) is type(other)
            and len(one) == len(other)
            and all(same(a, b) for a, b in zip(one, other))
        )
    return type(one) is type(other) and one == other


# Cells and names


def test_a_cell_says_what_it_showed_and_what_stopped_it(start):
    client = start()
    fine = client.run_cell("x = 1")
    assert fine.error is None
    assert fine.outputs[0]["text"] == "ran"
    assert fine.seconds < 5
    assert client.run_cell("x = 1 / 0").error == ("ZeroDivisionError", "division by zero")
    assert (
        client.run_cell("raise ValueError('\\x1b[31m' + 'x' * 5000)")
        .error[1]
        .startswith("\N{REPLACEMENT CHARACTER}[31mxx")
    )


def test_a_name_is_what_it_was_when_it_was_kept(start):
    client = start("def answer(): return 1")
    client.keep("one", ["answer", "missing"])
    client.run_cell("def answer(): return 2")
    client.keep("two", ["answer"])
    assert client.value("one", "answer")() == 1
    assert client.value("two", "answer")() == 2
    with pytest.raises(NameError, match="name 'missing' is not defined") as caught:
        client.value("one", "missing")
    assert caught.value.name == "missing"
    assert not is_from_student(caught.value)
    with pytest.raises(NameError):
        client.value("three", "answer")


def test_a_name_bound_to_false_or_none_is_defined(defined):
    assert defined("a, b = False, None", "a", "b") == [False, None]


# Values

Pair = collections.namedtuple("Pair", ["left", "right"])
PLAIN = [
    None,
    True,
    0,
    -(2**53),
    2**1000,
    -(2**1023),
    1.5,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    5e-324,
    "",
    "text",
    "\ud800 lone, \x00 and \N{SNOWMAN}" * 100,
    b"\x00\xff",
    [1, [2, (3, {4})], {}],
    {"a": {1: 2, None: 3, (1, "x"): [4]}},
    {1, "two"},
    frozenset({1}),
    collections.OrderedDict(b=1, a=2),
    collections.Counter("hello"),
    collections.deque([1, 2], 5),
    range(3, 30, 4),
    1 + 2j,
    torch.Size([2, 3]),
    torch.bfloat16,
    torch.device("cpu"),
    np.arange(6, dtype=np.int16).reshape(2, 3),
    np.array([True, False]),
    np.float32(0.1),
    np.bool_(True),
]


def test_a_plain_value_comes_back_as_it_went(defined):
    give, anew, pair = defined(
        "Pair = collections.namedtuple('Pair', ['left', 'right'])\n"
        "def give(v): return v\n"
        "def anew(v): return copy.deepcopy([v])[0]\n"
        "def pair(v): return Pair(*v)",
        "give",
        "anew",
        "pair",
    )
    for value in PLAIN:
        assert same(give(value), value), value
        assert same(anew(value), value), value
    assert pair([1, [2]]) == Pair(1, [2])
    assert pair([1, 2]).right == 2


DTYPES = (
    "float16 bfloat16 float32 float64 complex64 complex128 bool "
    "uint8 int8 int16 int32 int64 uint16 uint32 uint64"
).split()


def test_a_tensor_of_any_usual_kind_comes_back_as_it_went(defined):
    clone = defined("def clone(x): return x.clone()", "clone")
    for name, shape in itertools.product(DTYPES, [(), (0, 3), (2, 3), (3, 1, 2)]):
        dtype = getattr(torch, name)
        tensor = (10 * torch.rand(shape)).to(dtype)
        back = clone(tensor)
        assert (back.dtype, back.shape) == (dtype, shape)
        assert torch.equal(back, tensor), name
        assert back.grad_fn is None
        assert not back.requires_grad
        assert clone(nn.Parameter(tensor, False)).dtype == dtype


def test_what_a_tensor_looks_like_in_memory_travels_along(defined):
    transpose, strides, view = defined(
        "def transpose(x): return x.permute(2, 0, 1)\n"
        "def strides(x): return x.stride(), x.is_contiguous()\n"
        "def view(x): return x.view(-1)",
        "transpose",
        "strides",
        "view",
    )
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(transpose(x), x.permute(2, 0, 1))
    assert transpose(x).stride() == x.permute(2, 0, 1).stride()
    for odd in (x.mT, x[:, ::2], x[0].expand(5, 3, 4), x[:, :2, 1:2]):
        assert strides(odd) == (odd.stride(), odd.is_contiguous())
        assert torch.equal(transpose(odd), odd.permute(2, 0, 1))
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            view(odd)


def test_bits_of_numbers_are_kept(defined):
    clone = defined("def clone(x): return x.clone()", "clone")
    odd = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 1], dtype=torch.int32)
    assert torch.equal(clone(odd.view(torch.float32)).view(torch.int32), odd)


def test_what_tensor_methods_return_in_pairs_arrives_as_a_pair(defined):
    largest = defined("def largest(x): return x.max(dim=1)", "largest")
    values, places = largest(torch.tensor([[1.0, 5.0, 2.0]]))
    assert values.item() == 5.0
    assert places.item() == 1
    assert largest(torch.eye(2)).values.tolist() == [1.0, 1.0]


def test_a_value_that_contains_itself_or_is_too_deep_or_too_large_is_an_error(defined):
    itself, deep, wide, huge, number, lines = defined(
        "def itself():\n    a = []\n    a.append(a)\n    return a\n"
        "def deep():\n    a = []\n    for _ in range(50): a = [a]\n    return a\n"
        "def wide(): return [0] * 300_000\n"
        "def huge(): return torch.zeros(17 * 2**20)\n"
        "def number(): return 2**5000\n"
        "def lines(): return ['\\N{SNOWMAN}' * 250] * 10_000",
        *"itself deep wide huge number lines".split(),
    )
    for call, message in (
        (itself, "nested more than 32 deep"),
        (deep, "nested more than 32 deep"),
        (wide, "more than 200,000 parts"),
        (huge, "too large for one message"),
        (number, "more than 1,024 bits"),
        (lines, "too large for one message"),
    ):
        with pytest.raises((TypeError, ArithmeticError), match=message) as caught:
            call()
        assert is_from_student(caught.value)
    assert wide.__name__ == "wide"  # and the process is still there to be asked
    with pytest.raises(TypeError):
        number()


# Arguments that a call changes


def test_a_call_changes_its_arguments_in_place(defined):
    change = defined(
        "def change(x, items, table, some, array):\n"
        "    x.mul_(2); items.append(x); items[0].add_(1); table['k'] = items; table.pop('old')\n"
        "    some.add(7); array[0] = 9\n",
        "change",
    )
    x, inner, table = torch.ones(2), torch.zeros(1), {"old": 1}
    items, some, array = [inner], {1}, np.zeros(2)
    version = x._version
    assert change(x, items, table, some, array) is None
    assert x.tolist() == [2.0, 2.0]
    assert x._version > version
    assert items[0] is inner
    assert inner.item() == 1.0
    assert items[1] is x
    assert table == {"k": items}
    assert table["k"] is items
    assert some == {1, 7}
    assert array.tolist() == [9.0, 0.0]


def test_an_error_does_not_hide_what_was_changed_before_it(defined):
    change = defined("def change(x):\n    x.zero_()\n    raise ValueError('late')", "change")
    x = torch.ones(2)
    with pytest.raises(ValueError, match="late"):
        change(x)
    assert x.tolist() == [0.0, 0.0]


def test_what_a_call_leaves_alone_is_not_touched(defined):
    look = defined("def look(*args): return len(args)", "look")
    x, items = torch.tensor([math.nan, 1.0]), [1, [2]]
    inner, version = items[1], x._version
    assert look(x, items, {"a": x}) == 3
    assert x._version == version
    assert items == [1, [2]]
    assert items[1] is inner


def test_one_object_given_twice_is_one_object_there(defined):
    same_object, give = defined(
        "def same_object(a, b): return a is b\ndef give(a): return a", "same_object", "give"
    )
    x, items, array = torch.ones(1), [1], np.ones(1)
    assert same_object(x, x)
    assert same_object(items, items)
    assert same_object(array, array)
    assert not same_object(x, x.clone())
    assert not same_object(items, [1])
    assert give(x) is x
    assert give(items) is items
    assert give([x])[0] is x
    assert give(array) is array


def test_a_leaf_can_be_changed_without_gradients(defined):
    step = defined(
        "def step(parameters, lr):\n"
        "    with torch.no_grad():\n"
        "        for p in parameters:\n"
        "            p -= lr * p.grad\n"
        "            p.grad = None\n",
        "step",
    )
    w = torch.ones(3, requires_grad=True)
    (w * w).sum().backward()
    step([w], 0.25)
    assert w.tolist() == [0.5, 0.5, 0.5]
    assert w.grad is None
    assert w.is_leaf
    assert w.requires_grad


def test_gradients_that_a_call_leaves_on_its_arguments_are_seen(defined):
    saliency = defined(
        "def saliency(x):\n    x.requires_grad_()\n    (x**3).sum().backward()\n    return x.grad",
        "saliency",
    )
    x = torch.tensor([1.0, 2.0])
    assert saliency(x).tolist() == [3.0, 12.0]
    assert x.requires_grad
    assert x.grad.tolist() == [3.0, 12.0]


def test_changing_the_shape_of_an_argument_is_an_error(defined):
    change = defined("def change(x): x.unsqueeze_(0)", "change")
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="changed the shape or the dtype"):
        change(x)
    assert x.shape == (2,)


# Gradients


def reference(x, y):
    return torch.tanh(x) @ y, (x * x).sum(), x.detach().argmax()


REFERENCE = "def reference(x, y): return torch.tanh(x) @ y, (x * x).sum(), x.detach().argmax()\n"


def test_gradients_are_those_of_torch(defined):
    ours = defined(REFERENCE, "reference")
    results = []
    for function in (ours, reference):
        torch.manual_seed(0)
        x, y = torch.randn(3, 4, requires_grad=True), torch.randn(4, 2)
        inner = (x * 2).mT.contiguous().mT
        product, total, place = function(inner, y)
        assert not place.requires_grad
        assert product.requires_grad
        assert not product.is_leaf
        (product.sin().sum() + 3 * total).backward()
        results.append(x.grad)
    torch.testing.assert_close(results[0], results[1])


def test_gradients_flow_through_several_calls_and_skip_what_was_not_used(defined):
    double, first = defined(
        "def double(x): return 2 * x\ndef first(x, y): return x + 1, y + 1", "double", "first"
    )
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    first(double(double(x)), y)[0].sum().backward()
    assert x.grad.tolist() == [4.0, 4.0]
    assert y.grad is None
    (grad,) = torch.autograd.grad(double(x).sum(), x)
    assert grad.tolist() == [2.0, 2.0]
    assert x.grad.tolist() == [4.0, 4.0]


def test_backward_twice_needs_a_retained_graph_as_in_torch(defined):
    square = defined("def square(x): return x * x", "square")
    x = torch.ones(2, requires_grad=True)
    loss = square(x).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert x.grad.tolist() == [4.0, 4.0]
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_of_gradients_are_those_of_torch(defined):
    ours = defined("def cube(x, y): return (x**3 * y).sum(), y + 1", "cube")
    results = []
    for function in (ours, lambda x, y: ((x**3 * y).sum(), y + 1)):
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        y = torch.tensor([3.0, 4.0], requires_grad=True)
        out = function(2 * x, y)[0]
        grad_x, grad_y = torch.autograd.grad(out.square(), (x, y), create_graph=True)
        (grad_x.square().sum() + grad_y.sum()).backward()
        results.append((grad_x, grad_y, x.grad, y.grad))
    torch.testing.assert_close(*results)
    x = torch.rand(2, dtype=torch.float64, requires_grad=True)
    y = torch.rand(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (x, y))
    assert torch.autograd.gradgradcheck(ours, (x, y))


def test_without_gradients_there_are_none(defined):
    square, mode = defined(
        "def square(x): return x * x\ndef mode(): return torch.is_grad_enabled()",
        "square",
        "mode",
    )
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert not square(x).requires_grad
        assert mode() is False
    with torch.inference_mode():
        assert not square(x).requires_grad
    assert mode() is True
    assert square(x).requires_grad


def test_an_argument_changed_in_place_carries_its_gradient(defined):
    double = defined("def double(x):\n    x.mul_(2)\n    return x", "double")
    for take in (lambda x: x * 1.0, lambda x: (x * 1.0)[1:], lambda x: (x * 1.0).view(3, 1)):
        x = torch.ones(3, requires_grad=True)
        inner = take(x)
        out = double(inner)
        assert out is inner
        assert (inner == 2).all()
        (3 * inner).sum().backward()
        assert x.grad.max() == 6.0
    leaf = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        double(leaf)


def test_leaves_that_only_the_student_knows_get_their_gradients_there(defined):
    predict, weight = defined(
        "w = torch.ones(2, requires_grad=True)\n"
        "def predict(x): return (w * x).sum()\n"
        "def weight(): return w.grad\n",
        "predict",
        "weight",
    )
    loss = predict(torch.tensor([3.0, 4.0]))
    assert loss.requires_grad
    loss.backward()
    assert weight().tolist() == [3.0, 4.0]


def test_a_graph_lives_in_the_child_as_long_as_somebody_can_ask_it(defined):
    square, alive = defined(
        "made = weakref.WeakSet()\n"
        "class Held: pass\n"
        "class Square(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x):\n"
        "        ctx.held = Held(); made.add(ctx.held)\n"
        "        return x * x\n"
        "    @staticmethod\n"
        "    def backward(ctx, g): return g\n"
        "def square(x): return Square.apply(x)\n"
        "def alive():\n    gc.collect()\n    return len(made)\n",
        "square",
        "alive",
    )
    x = torch.ones(1, requires_grad=True)
    results = [square(x) for _ in range(3)]
    assert alive() == 3
    del results[1:]
    alive()
    assert alive() == 1


# Errors


RAISED = (
    "ValueError TypeError KeyError OSError StopIteration NotImplementedError RecursionError "
    "AssertionError ZeroDivisionError SyntaxError FileNotFoundError ImportError UserWarning "
    "MemoryError IndentationError"
).split()


def test_an_error_is_raised_here_as_what_it_is(defined):
    fail, text_of = defined(
        "def fail(made): raise eval(made)\ndef text_of(made): return str(eval(made))",
        "fail",
        "text_of",
    )
    for made in [
        *(f"{name}('why')" for name in RAISED),
        "UnicodeDecodeError('utf-8', b'', 0, 1, 'why')",
    ]:
        name = made.split("(")[0]
        with pytest.raises(getattr(builtins, name)) as caught:
            fail(made)
        error = caught.value
        assert type(error).__name__ == name
        assert is_from_student(error)
        assert str(error) == text_of(made)
        assert error.args == (str(error),)
        assert repr(error)


def test_an_error_of_the_students_own_is_caught_by_its_built_in_base(defined):
    fail = defined(
        "class Bad(KeyError): pass\nclass Worse(Bad, ArithmeticError): pass\n"
        "def fail(which): raise {'bad': Bad, 'worse': Worse}[which]('why')",
        "fail",
    )
    for name in ("bad", "worse"):
        with pytest.raises(KeyError) as caught:
            fail(name)
        assert type(caught.value).__name__ == name.title()
    assert expect_raises("w/x/y", KeyError, lambda: fail("bad"), "no") == "'why'"


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "raise KeyboardInterrupt", "exit(1)"])
def test_ending_the_program_is_an_ordinary_error_here(defined, code):
    fail = defined(f"def fail(): {code}", "fail")
    with pytest.raises(RuntimeError) as caught:
        fail()
    assert is_from_student(caught.value)


def test_messages_hold_no_control_characters_and_are_not_endless(defined):
    fail = defined("def fail(text): raise ValueError(text)", "fail")
    with pytest.raises(ValueError) as caught:
        fail("a\x1b[31m\r\n\tb\u202e\ud800" + "c" * 9000)
    bad = "\N{REPLACEMENT CHARACTER}"
    assert str(caught.value).startswith(f"a{bad}[31m{bad}\n b{bad}{bad}ccc")
    assert len(str(caught.value)) == 2000
    with pytest.raises(ValueError, match=r"^say ü plainly$"):
        fail("say ü plainly")


def test_an_error_that_cannot_describe_itself_is_still_one(defined):
    fail = defined(
        "class Bad(ValueError):\n    def __str__(self): raise SystemExit\n"
        "def fail(): raise Bad('x')",
        "fail",
    )
    with pytest.raises(ValueError):
        fail()


def test_errors_in_the_backward_of_an_answer_are_raised_here(defined):
    odd = defined(
        "class Odd(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x): return x * x\n"
        "    @staticmethod\n"
        "    def backward(ctx, g): raise KeyError('backward')\n"
        "def odd(x): return Odd.apply(x)",
        "odd",
    )
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(KeyError, match="backward") as caught:
        odd(x).backward()
    assert is_from_student(caught.value)


def test_a_process_that_ends_or_is_late_is_lost_and_no_except_clause_hides_it(start):
    for code, how in (("os._exit(3)", "ended"), ("time.sleep(60)", "late")):
        client = start(
            f"def fail(): {code}\n"
            "class Odd(torch.autograd.Function):\n"
            "    @staticmethod\n"
            "    def forward(ctx, x): return x * x\n"
            "    @staticmethod\n"
            f"    def backward(ctx, g): {code}\n"
            "def odd(x): return Odd.apply(x)"
        )
        client.keep("e", ["fail", "odd"])
        fail, odd = client.value("e", "fail"), client.value("e", "odd")
        out = odd(torch.ones(1, requires_grad=True))
        client.connection.deadline = time.monotonic() + 0.3
        call = out.backward if how == "late" else fail
        with pytest.raises(Lost) as caught:
            expect("w/x/y", call, 1, "no")
        assert caught.value.how == how
        with pytest.raises(Lost):
            client.run_cell("1")  # it stays lost
    client = start()
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(Lost, match="its process ended"):
        client.run_cell("1")


def test_losing_the_process_in_a_backward_is_lost_too(start):
    client = start(
        "class Odd(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x): return x * x\n"
        "    @staticmethod\n"
        "    def backward(ctx, g): os._exit(1)\n"
        "def odd(x): return Odd.apply(x)"
    )
    client.keep("e", ["odd"])
    with pytest.raises(Lost) as caught:
        client.value("e", "odd")(torch.ones(1, requires_grad=True)).backward()
    assert caught.value.how == "ended"


# Random numbers


def test_both_sides_draw_the_same_numbers_after_the_same_seed(defined):
    draw = defined("def draw(): return torch.randn(3)", "draw")
    torch.manual_seed(5)
    theirs = torch.randn(3)
    torch.manual_seed(5)
    first, second, here = draw(), draw(), torch.randn(3)
    assert torch.equal(first, theirs)
    assert not torch.equal(first, second)
    assert not torch.equal(second, here)
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert torch.equal(torch.randn(3), here)


def test_two_calls_have_no_random_number_in_common(defined):
    draw = defined("def draw(): return torch.rand(50)", "draw")
    numbers = [*draw().tolist(), *draw().tolist(), *torch.rand(50).tolist()]
    assert len(set(numbers)) > 145  # of 2**24 numbers two may be equal by chance


def test_a_student_has_no_say_in_the_random_numbers_here(defined):
    nothing, much = defined(
        "def nothing(): pass\ndef much(): torch.randn(100); torch.manual_seed(0)", "nothing", "much"
    )
    results = []
    for call in (nothing, much):
        torch.manual_seed(1)
        call()
        results.append(torch.randn(4))
    assert torch.equal(*results)


def test_python_and_numpy_draw_reproducibly_too(defined):
    draw = defined("def draw(): return random.random(), np.random.rand()", "draw")
    torch.manual_seed(1)
    once, again = draw(), draw()
    torch.manual_seed(1)
    assert draw() == once != again
    assert random.random() not in once


def test_a_generator_can_be_passed(defined):
    draw = defined("def draw(g): return torch.rand(2, generator=g)", "draw")
    theirs, ours = (torch.Generator().manual_seed(3) for _ in range(2))
    assert torch.equal(draw(ours), torch.rand(2, generator=theirs))
    assert not torch.equal(draw(ours), torch.rand(2, generator=torch.Generator().manual_seed(3)))


# Modules

NET = """
class Part(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.ones(width))
        self.width = width
    def forward(self, x):
        return torch.tanh(self.inner(x)) * self.scale

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.parts = nn.ModuleList([Part(width), Part(width)])
        self.parts[1].inner.weight = self.parts[0].inner.weight
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("passing", torch.zeros(1), persistent=False)
        self.kind = "net"
    def forward(self, x, *, add=0.0):
        self.calls += 1
        for part in self.parts:
            x = x + part(x)
        return self.norm(x) + add
    def double_width(self): return 2 * self.parts[0].width
"""


@pytest.fixture
def nets(defined):
    """The same network twice: a mirror, and a real one of this process."""
    namespace = {"torch": torch, "nn": nn, "__name__": "here"}
    exec(NET, namespace)
    torch.manual_seed(3)
    theirs = namespace["Net"]()
    ours = defined(NET, "Net")()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_a_mirror_has_the_same_names_shapes_ties_and_parts(nets):
    ours, theirs = nets
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for one, other in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
        assert one[1].is_leaf
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert ours.parts[0].inner.weight is ours.parts[1].inner.weight
    assert isinstance(ours, nn.Module)
    assert isinstance(ours.norm, nn.BatchNorm1d)
    assert not isinstance(ours.parts[0], nn.Linear)
    assert isinstance(ours.parts, nn.ModuleList)
    assert type(ours).__name__ == "Net"
    assert ours.__module__ == "__main__"
    assert ours.parts[0].inner.in_features == 4
    assert len(ours.parts) == 2
    assert repr(ours) == repr(theirs)


def test_a_mirror_computes_and_learns_what_the_module_would(nets):
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.05) for net in nets]
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        x = torch.randn(6, 4, generator=generator)
        for net, optimizer in zip(nets, optimizers):
            net.train(step != 2)
            optimizer.zero_grad()
            net(x, add=1.0).square().mean().backward()
            optimizer.step()
    ours, theirs = nets
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters()):
        torch.testing.assert_close(one, other, msg=name)
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    for (name, one), (_, other) in zip(ours.named_buffers(), theirs.named_buffers()):
        torch.testing.assert_close(one, other, msg=name)
    assert ours.calls == 4


def test_every_way_to_change_a_mirror_reaches_the_module(nets):
    ours, theirs = nets
    x = torch.randn(3, 4)
    changes = [
        lambda net: net.eval(),
        lambda net: torch.no_grad()(net.parts[0].scale.copy_)(torch.arange(4.0)),
        lambda net: net.parts[1].inner.weight.data.mul_(0.5),
        lambda net: net.parts[1].scale.data.__setitem__(0, 7.0),
        lambda net: setattr(net.parts[0], "scale", nn.Parameter(torch.full((4,), 0.3))),
        lambda net: setattr(net.parts[1], "scale", net.parts[0].scale),
        lambda net: net.norm.reset_running_stats(),
        lambda net: nn.init.constant_(net.norm.weight, 2.0),
        lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
        lambda net: setattr(net.norm, "eps", 0.5),
        lambda net: nn.utils.vector_to_parameters(torch.arange(28.0) / 28, net.parameters()),
    ]
    for number, change in enumerate(changes):
        for net in nets:
            change(net)
        torch.testing.assert_close(ours(x), theirs(x), msg=f"change {number}")
    for net in nets:
        net.double()
    torch.testing.assert_close(ours(x.double()), theirs(x.double()))
    assert ours(x.double()).dtype == torch.float64
    for net in nets:
        net.requires_grad_(False)
    assert not ours(x.double()).requires_grad


def test_parts_of_a_mirror_can_be_called_and_combined(nets):
    ours, theirs = nets
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours.parts[0](x), theirs.parts[0](x))
    torch.testing.assert_close(ours.parts[0].inner(x), theirs.parts[0].inner(x))
    both = [nn.Sequential(net.parts[0], nn.ReLU(), net.norm) for net in nets]
    for model in both:
        model(x).sum().backward()
    torch.testing.assert_close(ours.norm.weight.grad, theirs.norm.weight.grad)
    torch.testing.assert_close(ours.parts[0].scale.grad, theirs.parts[0].scale.grad)


def test_attributes_and_methods_of_a_mirror_are_those_of_the_module(nets):
    ours, _ = nets
    assert ours.kind == "net"
    assert ours.double_width() == 8
    ours.kind = "other"
    assert ours.kind == "other"
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        getattr(ours, "missing")  # noqa: B009
    assert not hasattr(ours, "missing")
    assert hasattr(ours, "kind")


def test_a_copy_of_a_mirror_is_a_module_of_its_own(nets):
    ours, _ = nets
    twin = copy.deepcopy(ours)
    x = torch.randn(3, 4)
    torch.testing.assert_close(twin.eval()(x), ours.eval()(x))
    with torch.no_grad():
        twin.parts[0].scale.zero_()
    assert ours.parts[0].scale.sum() == 4
    assert not torch.equal(twin(x), ours(x))
    many = copy.deepcopy(nn.Sequential(ours, nn.ReLU()))
    assert many[0] is not ours
    assert torch.equal(many(x), ours(x).relu())


def test_a_call_can_change_and_replace_parameters(defined):
    make = defined(
        "class Lazy(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.old = nn.Parameter(torch.zeros(1)); self.mean = nn.Linear(1, 1)\n"
        "        self.register_buffer('total', torch.zeros(()))\n"
        "    def forward(self, x):\n"
        "        if not hasattr(self, 'weight'):\n"
        "            self.weight = nn.Parameter(torch.full((x.shape[-1],), 2.0)); del self.old\n"
        "            self.more = nn.Linear(2, 2)\n"
        "        self.total = self.total + x.sum().detach()\n"
        "        with torch.no_grad(): self.mean.weight.fill_(5.0)\n"
        "        return (x * self.weight).sum()\n",
        "Lazy",
    )
    lazy = make()
    kept = lazy.mean.weight
    assert [n for n, _ in lazy.named_parameters()] == ["old", "mean.weight", "mean.bias"]
    lazy(torch.ones(2))
    names = [n for n, _ in lazy.named_parameters()]
    assert sorted(names) == ["mean.bias", "mean.weight", "more.bias", "more.weight", "weight"]
    assert lazy.total == 2.0
    assert lazy.mean.weight is kept
    assert kept.item() == 5.0
    with torch.no_grad():
        lazy.weight.fill_(3.0)
    out = lazy(torch.ones(2))
    out.backward()
    assert out == 6.0
    assert lazy.weight.grad.tolist() == [1.0, 1.0]
    assert lazy.total == 4.0


def test_functions_take_mirrors_parameters_and_gradients(defined):
    make, norm, step, same_weight, other, params = defined(
        NET + "def norm(model): return sum(p.grad.square().sum() for p in model.parameters())\n"
        "def step(parameters, lr):\n"
        "    with torch.no_grad():\n"
        "        for p in parameters: p -= lr * p.grad; p.grad.zero_()\n"
        "def same_weight(model, p): return model.norm.weight is p\n"
        "net = Net()\n"
        "def other(): return net, net.norm\n"
        "def params(): return list(net.parameters())\n",
        *"Net norm step same_weight other params".split(),
    )
    net = make()
    net(torch.randn(3, 4)).square().sum().backward()
    wanted = sum(p.grad.square().sum() for p in net.parameters())
    torch.testing.assert_close(norm(net), wanted)
    assert same_weight(net, net.norm.weight)
    assert not same_weight(net, net.norm.bias)
    before = [p.detach().clone() for p in net.parameters()]
    grads = [p.grad.clone() for p in net.parameters()]
    step(list(net.parameters()), 0.5)
    for p, old, grad in zip(net.parameters(), before, grads):
        torch.testing.assert_close(p.detach(), old - 0.5 * grad)
        assert (p.grad == 0).all()
    whole, part = other()
    assert whole.norm is part
    assert params()[-1] is part.bias


def test_gradients_that_were_cleared_here_are_cleared_there(defined):
    make, cleared = defined(
        NET + "def cleared(model): return [p.grad is None for p in model.parameters()]",
        "Net",
        "cleared",
    )
    net = make()
    for _ in range(2):
        net(torch.randn(3, 4)).sum().backward()
        net.zero_grad()
        assert all(cleared(net))
    net(torch.randn(3, 4)).sum().backward()
    with torch.no_grad():  # what is sent for the next call does not make the gradients known there
        for p in net.parameters():
            p.add_(1.0)
        net(torch.randn(3, 4))
    assert not any(cleared(net))


def test_gradients_reach_the_parameters_of_a_module_in_a_closure(defined):
    net, predict = defined(NET + "net = Net()\ndef predict(x): return net(x)", "net", "predict")
    with torch.no_grad():
        net.norm.weight.fill_(2.0)
    predict(torch.randn(3, 4)).square().sum().backward()
    assert net.norm.weight.grad.abs().sum() > 0
    assert net.calls == 1
    assert (net.norm.weight == 2).all()


def test_functional_call_works_on_a_mirror(nets):
    x, results = torch.randn(3, 4), []
    for net in nets:
        weights = {n: (2 * p).detach().requires_grad_() for n, p in net.named_parameters()}
        out = torch.func.functional_call(net, weights, (x,))
        out.square().sum().backward()
        results.append((out, weights["norm.weight"].grad))
        results.append((net(x), net.norm.weight.detach()))
    for one, other in zip(results[:2], results[2:]):
        torch.testing.assert_close(one, other)


def test_recurrent_layers_change_their_precision_like_others(defined):
    make = defined(
        "class Reader(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.lstm = nn.LSTM(2, 3)\n"
        "    def forward(self, x): return self.lstm(x)[0]\n",
        "Reader",
    )
    ours, theirs = make(), nn.LSTM(2, 3)
    ours.lstm.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 1, 2)
    torch.testing.assert_close(ours(x), theirs(x)[0])
    torch.testing.assert_close(ours.double()(x.double()), theirs.double()(x.double())[0])


def test_a_hook_on_a_mirror_is_called_and_one_on_a_part_is_refused(nets):
    ours, _ = nets
    seen = []
    handle = ours.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    ours(torch.randn(3, 4))
    assert seen == [(3, 4)]
    handle.remove()
    ours.norm.register_forward_hook(lambda *_: seen.append(0))
    with pytest.raises(TypeError, match="hook on a part"):
        ours(torch.randn(3, 4))
    ours.norm(torch.randn(3, 4))
    assert seen == [(3, 4), 0]


def test_a_part_of_a_mirror_cannot_be_replaced(nets):
    nets[0].norm = nn.Identity()
    with pytest.raises(TypeError, match="cannot be replaced"):
        nets[0](torch.randn(3, 4))


# What a check can pass


def test_modules_and_functions_of_the_libraries_can_be_passed(defined):
    run, train = defined(
        "def run(module, loss, x): return loss(module(x), torch.zeros(2, 3))\n"
        "def train(module, kind):\n"
        "    optimizer = kind(module.parameters(), lr=0.5)\n"
        "    module.train()\n"
        "    for _ in range(2):\n"
        "        optimizer.zero_grad(); module(torch.ones(2, 3)).sum().backward()\n"
        "        optimizer.step()\n"
        "    module[1].eval()\n",
        "run",
        "train",
    )
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0)).eval()
    twin, x = copy.deepcopy(module), torch.randn(2, 3)
    run(module, nn.functional.mse_loss, x).backward()
    nn.functional.mse_loss(twin(x), torch.zeros(2, 3)).backward()
    torch.testing.assert_close(module[0].weight.grad, twin[0].weight.grad)
    module.zero_grad(), twin.zero_grad()
    train(module, torch.optim.SGD)
    for p in twin.parameters():
        p.data -= 2.0  # two steps of 0.5 along a gradient of 2
    torch.testing.assert_close(module[0].weight, twin[0].weight)
    assert module.training
    assert module[0].training
    assert not module[1].training
    assert (module[0].weight.grad == 2).all()


def test_what_a_check_defines_cannot_be_passed_and_is_named(defined):
    run = defined("def run(f): return f(1)", "run")

    def helper(x):
        return x

    class Local(nn.Module):
        pass

    for value, name in (
        (helper, "helper"),
        (lambda x: x, "lambda"),
        (Local(), "Local"),
        (Local, "Local"),
    ):
        with pytest.raises(TypeError, match=f"{name}>? is defined in the check") as caught:
            run(value)
        assert not is_from_student(caught.value)
    with pytest.raises(TypeError, match="a generator cannot be passed"):
        run(x for x in "ab")
    assert run(math.sqrt) == 1.0


def test_arguments_that_are_too_large_are_an_error_of_the_check(defined):
    length = defined("def length(x): return len(x)", "length")
    for value in (torch.zeros(17 * 2**20), [0.1] * 300_000, ["\N{SNOWMAN}" * 250] * 10_000):
        with pytest.raises(TypeError) as caught:
            length(value)
        assert not is_from_student(caught.value)
    assert length([1, 2]) == 2


def test_an_answer_can_be_passed_to_an_answer(defined):
    apply, double, net = defined(
        NET + "def apply(f, x): return f(x)\ndef double(x): return 2 * x\nnet = Net()",
        "apply",
        "double",
        "net",
    )
    assert apply(double, 4) == 8
    x = torch.randn(3, 4)
    torch.testing.assert_close(apply(net.eval(), x), net(x))
    torch.testing.assert_close(apply(nn.Sequential(net, nn.ReLU()), x), net(x).relu())


# What stays in the child


def test_an_object_of_the_students_is_used_through_its_proxy(defined):
    make = defined(
        "class Vocabulary:\n"
        "    def __init__(self, words): self.words = list(words)\n"
        "    def __len__(self): return len(self.words)\n"
        "    def __getitem__(self, n): return self.words[n]\n"
        "    def __setitem__(self, n, word): self.words[n] = word\n"
        "    def encode(self, text): return [self.words.index(w) for w in text.split()]\n"
        "    def __enter__(self): self.words.append('in'); return self\n"
        "    def __exit__(self, *_): self.words.append('out')\n"
        "    def pairs(self):\n        for n, w in enumerate(self.words): yield n, w\n",
        "Vocabulary",
    )
    vocabulary = make(["a", "b", "c"])
    assert len(vocabulary) == 3
    assert vocabulary[1] == "b"
    assert list(vocabulary) == ["a", "b", "c"]
    assert vocabulary.encode("c a") == [2, 0]
    assert "b" in vocabulary
    assert "z" not in vocabulary
    vocabulary[0] = "z"
    vocabulary.extra = [1]
    assert vocabulary.words == ["z", "b", "c"]
    assert vocabulary.extra == [1]
    with vocabulary as inside:
        assert inside is vocabulary
    assert vocabulary.words[-2:] == ["in", "out"]
    assert list(vocabulary.pairs())[:2] == [(0, "z"), (1, "b")]
    assert isinstance(vocabulary, make)
    assert not isinstance(3, make)
    assert not callable(vocabulary)
    assert callable(make)
    assert bool(vocabulary)
    assert copy.copy(vocabulary) is not vocabulary
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        getattr(vocabulary, "missing")  # noqa: B009
    with pytest.raises(IndexError):
        vocabulary[99]
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(vocabulary)


def test_gradients_flow_through_objects_that_stay_in_the_child(defined):
    make, model = defined(
        "@dataclasses.dataclass\n"
        "class Output:\n    loss: torch.Tensor\n    logits: torch.Tensor\n    n: int\n"
        "w = torch.full((1,), 3.0, requires_grad=True)\n"
        "def make(x): return Output((x * x).sum(), w * x, len(x))\n"
        "class Model(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.p = nn.Parameter(torch.full((1,), 5.0))\n"
        "    def forward(self, x): return Output((self.p * x).sum(), x, 1)\n",
        "make",
        "Model",
    )
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    output = make(2 * x)
    assert output.n == 2
    assert isinstance(output.loss, torch.Tensor)
    (output.loss + output.logits.sum()).backward()
    assert x.grad.tolist() == [2 * 2 * 2 + 6.0, 2 * 2 * 4 + 6.0]
    network, x = model(), torch.tensor([1.0, 2.0], requires_grad=True)
    network(x).loss.backward()
    assert network.p.grad.tolist() == [3.0]
    assert x.grad.tolist() == [5.0, 5.0]


def test_a_proxy_equals_only_itself_and_says_nothing(defined):
    evil, make = defined(
        "class Evil:\n"
        "    def __eq__(self, other): return True\n"
        "    def __bool__(self): return False\n"
        "    def __float__(self): return 1.0\n"
        "    def __repr__(self): return 'forged'\n"
        "    def __array__(self, *_): return np.ones(1)\n"
        "    def __torch_function__(self, *_): return True\n"
        "    def allclose(self, other): return True\n"
        "    def sub(self, other): return torch.zeros(2)\n"
        "    def __sub__(self, other): return torch.zeros(2)\n"
        "    __hash__ = None\n"
        "evil = Evil()\n"
        "def make(): return Evil()",
        "evil",
        "make",
    )
    assert evil == evil
    assert evil != 1
    assert evil != make()
    assert repr(evil) == str(evil) == f"{evil}" == "<an object of the answer>"
    assert bool(evil)
    assert hash(evil) is not None
    for attempt in (
        lambda: float(evil),
        lambda: evil - torch.zeros(2),
        lambda: torch.zeros(2) - evil,
        lambda: torch.allclose(evil, torch.zeros(2)),
        lambda: torch.equal(torch.zeros(2), evil),
        lambda: torch.as_tensor(evil),
        lambda: abs(evil),
        lambda: evil < 3,
        lambda: math.isclose(evil, 1.0),
    ):
        with pytest.raises((TypeError, RuntimeError)):
            attempt()
    for name in ("allclose", "sub", "eq", "__array__", "__torch_function__"):
        assert not hasattr(evil, name)
    with pytest.raises(AssertionError):
        expect("w/x/y", evil, torch.zeros(2), "no")
    with pytest.raises(AssertionError):
        expect("w/x/y", evil, 1.0, "no")
    assert "forged" not in repr(np.array([evil], dtype=object))


def test_subclasses_of_plain_types_stay_in_the_child(defined):
    make = defined(
        "class T(torch.Tensor): pass\nclass F(float): pass\nclass S(str): pass\n"
        "class L(list): pass\nclass I(int): pass\nclass D(dict): pass\n"
        "def make(): return [torch.ones(2).as_subclass(T), F(1), S('a'), L([1]), I(1), D(a=1)]",
        "make",
    )
    for value in make():
        assert repr(value) == "<an object of the answer>"
        assert not isinstance(value, (torch.Tensor, float, str, list, int, dict))
    tensor, _, text, items, _, table = make()
    assert tensor.shape == (2,)
    assert text.upper() == "A"
    assert list(items) == [1]
    assert table["a"] == 1


def test_tensors_of_unusual_kinds_stay_in_the_child(defined):
    make = defined(
        "def make(): return [torch.eye(2).to_sparse(), torch.ones(2, device='meta'),\n"
        "    torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)]",
        "make",
    )
    for value in make():
        assert not isinstance(value, torch.Tensor)


def test_where_an_answer_comes_from_is_what_the_child_says(defined):
    mine, theirs, kind = defined(
        "def mine(): pass\nfrom mmlearn.transformer import MLP as kind\n"
        "from mmlearn.clip import zero_shot_classifier as theirs",
        "mine",
        "theirs",
        "kind",
    )
    own_work(mine)
    assert mine.__qualname__ == mine.__name__ == "mine"
    assert mine.__module__ == "__main__"
    for answer in (theirs, kind):
        with pytest.raises(AssertionError, match="comes from mmlearn"):
            own_work(answer)


def test_a_function_shows_its_signature_and_a_class_its_kind(defined):
    function, net, plain = defined(
        NET + "def function(x, *, scale=2): pass\nclass Plain: pass", "function", "Net", "Plain"
    )
    assert list(inspect.signature(function).parameters) == ["x", "scale"]
    assert issubclass(net, nn.Module)
    assert not issubclass(plain, nn.Module)
    assert repr(function) == "<a function of the answer>"
    with pytest.raises(TypeError, match="cannot derive"):

        class Derived(net):
            pass


def test_handles_are_released_when_nobody_holds_them(defined):
    make, alive, net, nets = defined(
        NET + "made, modules = weakref.WeakSet(), weakref.WeakSet()\n"
        "class Thing: pass\n"
        "def make():\n    t = Thing(); made.add(t)\n    return t\n"
        "def net():\n    n = Net(); modules.add(n)\n    return n\n"
        "def alive():\n    gc.collect()\n    return len(made)\n"
        "def nets():\n    gc.collect()\n    return len(modules)\n",
        *"make alive net nets".split(),
    )
    things = [make() for _ in range(5)]
    assert alive() == 5
    things.pop()
    alive()
    assert alive() == 4
    one = net()
    assert nets() == 1
    weight = one.norm.weight
    del one
    gc.collect()
    nets()
    assert nets() == 0
    assert weight.shape == (4,)


def test_an_endless_iteration_ends(defined, monkeypatch):
    counting = defined("def counting():\n    while True: yield 1", "counting")
    monkeypatch.setattr(remote, "MOST_ITEMS", 50)
    with pytest.raises(RuntimeError, match="has no end"):
        list(counting())
    assert [x for x, _ in zip(counting(), range(3))] == [1, 1, 1]


def test_a_process_forked_in_an_answer_does_not_answer_too(defined):
    fork = defined("def fork():\n    pid = os.fork()\n    return pid == 0", "fork")
    for _ in range(3):
        assert fork() is False
