"""Replies that no honest process sends. Each one ends the conversation and changes nothing here."""

import os
import signal
import socket
import time

import pytest
import torch
from torch import nn

from course.grade.inside.values import Packer
from course.grade.inside.wire import Connection, Lost
from course.grade.remote import Client, is_from_student

FUNCTION = {"object": [1, "function", "__main__", "f", "f"]}
ONES = ["float32", [2], [0, 8]]


@pytest.fixture
def forge():
    """Forks a process whose replies are made by `reply(message)`; returns its client.

    A reply is a dictionary, to which the right id is added if it has none, or with it a body.
    """
    children = []

    def start(reply):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            ours.close()
            try:
                connection = Connection(theirs)
                while True:
                    message, _ = connection.receive()
                    answer = reply(message)
                    answer, body = answer if isinstance(answer, tuple) else (answer, b"")
                    connection.send({"id": message["id"]} | answer, [body])
            finally:
                os._exit(0)
        theirs.close()
        children.append((pid, ours))
        client = Client(Connection(ours))
        client.connection.deadline = time.monotonic() + 10
        return client

    yield start
    for pid, ours in children:
        ours.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def forged(forge):
    """A function of an honest process, whose calls get one forged reply."""

    def make(answer, body=bytes(64)):
        def reply(message):
            if message["verb"] == "get":
                return {"value": {"tuple": [FUNCTION]}}
            return answer, body

        client = forge(reply)
        return client, client.value("e", "f")

    return make


def refused(call):
    with pytest.raises(Lost) as caught:
        call()
    assert caught.value.how == "broken", caught.value
    assert caught.value.sentence.startswith(("its process sent", "its process answered"))
    return caught.value.sentence


@pytest.mark.parametrize("number", [0, 1, 3, -2, "2", None, 2.0, True, [2]])
def test_a_reply_to_another_request_is_out_of_turn(forged, number):
    client, f = forged({"id": number, "value": 1})
    assert refused(f) == "its process answered out of turn"
    assert refused(lambda: client.run_cell("1")) == "its process answered out of turn"


VALUES = [
    {},
    {"value": {"given": 0}},
    {"value": {"given": -1}},
    {"value": {"given": "0"}},
    {"value": {"given": True}},
    {"value": {"object": [2, "module", "", "", ""]}},
    {"value": {"object": [2, "Proxy", "", "", ""]}},
    {"value": {"object": [2, ["function"], "", "", ""]}},
    {"value": {"object": [0, "function", "", "", ""]}},
    {"value": {"object": [-1, "function", "", "", ""]}},
    {"value": {"object": [10**4000, "function", "", "", ""]}},
    {"value": {"object": ["1", "function", "", "", ""]}},
    {"value": {"object": [True, "function", "", "", ""]}},
    {"value": {"object": [2, "function", 5, "", ""]}},
    {"value": {"object": [2, "function"]}},
    {"value": {"module": 9}},
    {"value": {"module": []}},
    {"value": {"tracked": 9}},
    {"value": {"tracked": "x"}},
    {"value": {"output": 0}},
    {"value": {"output": -1}},
    {"value": {"leaf": [["int64", [1], [0, 8]], True, True, None]}},
    {"value": {"leaf": [ONES, True, True, ["float32", [3], [8, 12]]]}},
    {"value": {"leaf": [ONES]}},
    {"value": {"input": [ONES, False, False, None]}},
    {"value": {"pickle": [[0, 8], []]}},
    {"error": 5},
    {"error": ["A", ["ValueError"]]},
    {"error": ["A", ["ValueError"], 5]},
    {"error": ["A", ["ValueError"], ["x"]]},
    {"error": ["A", None, "x"]},
    {"value": 1, "changed": 5},
    {"value": 1, "changed": [[0, {"tensor": ONES}]]},
    {"value": 1, "grads": [[0, True, None]]},
    {"value": 1, "graph": 5},
    {"value": 1, "graph": ["1", []]},
    {"value": 1, "graph": [10**4000, []]},
    {"value": 1, "graph": [1, [["int64", [1], [0, 8]]]]},
    {"value": 1, "graph": [1, [["bool", [1], [0, 1]]]]},
    {"value": 1, "graph": [1, [5]]},
    {"value": 1, "state": 5},
    {"value": 1, "state": {}},
    {"value": 1, "state": {"modules": 5, "tensors": []}},
    {"value": 1, "state": {"modules": [[5]], "tensors": []}},
    {"value": 1, "state": {"modules": [], "tensors": [{}]}},
]


@pytest.mark.parametrize("answer", VALUES, ids=lambda answer: str(answer)[:60])
def test_a_malformed_reply_ends_the_conversation(forged, answer):
    client, f = forged(answer)
    refused(f)
    refused(lambda: client.value("e", "f"))


CHANGES = [
    [[3, {"tensor": ONES}]],
    [[-1, {"tensor": ONES}]],
    [["0", {"tensor": ONES}]],
    [[0, {"tensor": ["float32", [1], [0, 4]]}]],
    [[0, {"tensor": ["float32", [2, 1], [0, 8]]}]],
    [[0, {"tensor": ["float64", [2], [0, 16]]}]],
    [[0, {"tensor": ["int32", [2], [0, 8]]}]],
    [[0, {"output": 0}]],
    [[0, [1, 2]]],
    [[0, 5]],
    [[0, {"array": ["float32", [2], [0, 8]]}]],
    [[1, {"tensor": ONES}]],
    [[1, 5]],
    [[1, {"list": []}]],
    [[1, {"given": 1}]],
    [[1, [{"given": 1}]]],
    [[1, [{"given": 2}]], [2, [{"given": 1}, 0]]],
    [[2, [1]]],
    [[2, [[1], 2]]],
    [[2, [1, 2, 3]]],
    [[2, {"dict": []}]],
]


@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_a_change_of_what_was_not_given_is_refused(forged, changed):
    _, f = forged({"value": None, "changed": changed})
    x, items, table = torch.tensor([1.0, 2.0]), [5], {"a": 1}
    refused(lambda: f(x, items, table))
    assert x.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "change",
    [
        [0, True, ["float32", [1], [0, 4]]],
        [0, True, ["float64", [2], [0, 16]]],
        [1, True, None],
        [2, True, None],
        [3, True, None],
        [0, True, 5],
    ],
)
def test_a_gradient_that_cannot_be_is_refused(forged, change):
    _, f = forged({"value": None, "grads": [change]})
    leaf = torch.ones(2, requires_grad=True)
    refused(lambda: f(leaf, torch.ones(2, dtype=torch.long), [1], leaf * 2))
    assert leaf.grad is None


def test_arguments_put_into_each_other_do_not_grow_without_end(forged):
    # Each of 60 lists holds the next one twice: whoever walked through the first met 2**60 items.
    changed = [[n, [{"given": n + 1}, {"given": n + 1}]] for n in range(59)]
    _, f = forged({"value": None, "changed": changed})
    lists = [[n] for n in range(60)]
    refused(lambda: f(*lists))


def test_one_argument_is_not_returned_a_million_times(forged):
    _, f = forged({"value": [{"given": 0}] * 5000})
    refused(lambda: f(list(range(10_000))))


BACKWARD = [
    5,
    [],
    [None, None],
    [5],
    ["x"],
    [{"tensor": ["float32", [1], [0, 4]]}],
    [{"tensor": ["float64", [2], [0, 16]]}],
    [{"tensor": ["float32", [2, 1], [0, 8]]}],
    [{"array": ["float32", [2], [0, 8]]}],
    [FUNCTION],
    {"tuple": [{"tensor": ONES}]},
]


@pytest.mark.parametrize("found", BACKWARD, ids=str)
def test_a_backward_that_returns_something_else_is_refused(forge, found):
    def reply(message):
        if message["verb"] == "get":
            return {"value": {"tuple": [FUNCTION]}}
        if message["verb"] == "call":
            return {"value": {"output": 0}, "graph": [1, [ONES]]}, bytes(8)
        return {"value": found}, bytes(64)

    f = forge(reply).value("e", "f")
    x = torch.ones(2, requires_grad=True)
    out = f(x)
    refused(lambda: out.sum().backward())
    assert x.grad is None


# Errors


@pytest.mark.parametrize(
    "bases",
    [
        ["SystemExit", "BaseException"],
        ["int"],
        ["eval"],
        ["ExceptionGroup"],
        [],
        ["ü", "__class__"],
    ],
)
def test_an_error_of_no_known_type_is_a_runtime_error_that_can_be_caught(forged, bases):
    _, f = forged({"error": ["Evil", bases, "text"]})
    with pytest.raises(RuntimeError, match="text") as caught:
        f()
    assert type(caught.value).__bases__[1] is RuntimeError
    assert is_from_student(caught.value)


@pytest.mark.parametrize("name", ["", "a b", "x" * 10_000, 5, None, "__init__", "class"])
def test_an_error_may_call_itself_anything(forged, name):
    _, f = forged({"error": [name, ["KeyError"], "text"]})
    with pytest.raises(KeyError) as caught:
        f()
    assert len(type(caught.value).__name__) <= 100
    assert str(caught.value) == "text"


# Modules


def module(**parts):
    return {
        "type": ["__main__", "Net"],
        "training": True,
        "parameters": [],
        "buffers": [],
        "children": [],
    } | parts


def parameter(handle=20, shape=(2,), **parts):
    numbers = ["float32", list(shape), [0, 8]]
    entry = {"id": handle, "data": numbers, "requires_grad": True, "parameter": True, "grad": None}
    return entry | parts


def state(modules, tensors=(), value=None):
    value = {"module": modules[0][0]} if value is None else value
    return {"value": value, "state": {"modules": modules, "tensors": list(tensors)}}


GOOD = state([[10, module(parameters=[["w", 20]])]], [parameter()])

MODULES = [
    state([[10, module(parameters=[["w", 21]])]], [parameter()]),
    state([[10, module(parameters=[["a.b", 20]])]], [parameter()]),
    state([[10, module(parameters=[["", 20]])]], [parameter()]),
    state([[10, module(parameters=[[5, 20]])]], [parameter()]),
    state([[10, module(parameters=[[["w"], 20]])]], [parameter()]),
    state([[10, module(parameters=[["w" * 500, 20]])]], [parameter()]),
    state([[10, module(parameters=[["w", [20]]])]], [parameter()]),
    state([[10, module(parameters=[["w", 20]])]], [parameter(parameter=False)]),
    state([[10, module(parameters=[["w", -1]])]], [parameter(-1)]),
    state([[10, module(parameters=[["w", 0]])]], [parameter(0)]),
    state([[10, module(parameters=5)]]),
    state([[10, module(training="yes")]]),
    state([[10, module(children=[["a", 11]])]]),
    state([[10, module(children=[["a", 10]])]]),
    state([[10, module(children=[["a", 11]])], [11, module(children=[["b", 10]])]]),
    state([[10, module(children=[["a.b", 11]])], [11, module()]]),
    state([[-10, module()]]),
    state([["10", module()]]),
    state([[10, module(type=["__main__", "a b"])]]),
    state([[10, module(type=["__main__", ""])]]),
    state([[10, module(type=["__main__", "A" * 5000])]]),
    state([[10, module(type=[5, "Net"])]]),
    state([[10, module(type="torch")]]),
    state([[10, {}]]),
    state([[10, module()]], [parameter(data=["int64", [1], [0, 8]])]),
    state([[10, module()]], [parameter(data=["float32", [-1], [0, 8]])]),
    state([[10, module()]], [parameter(grad=["float32", [1], [0, 4]])]),
    # Twins of twins: a walk through the first meets 2**40 modules.
    state(
        [[n, module(children=[["a", n + 1], ["b", n + 1]])] for n in range(10, 50)]
        + [[50, module()]]
    ),
    state([[n, module(children=[["a", n + 1]])] for n in range(10, 200)] + [[200, module()]]),
    state([[10, module(children=[[f"c{n}", 100 + n] for n in range(21_000)])]]),
    state([[n, module()] for n in range(10, 25_000)]),
]


@pytest.mark.parametrize("answer", MODULES, ids=lambda answer: str(answer["state"])[:70])
def test_a_module_that_cannot_be_is_refused(forged, answer):
    _, f = forged(answer)
    started = time.process_time()
    refused(f)
    assert time.process_time() - started < 5


def test_the_forged_modules_are_refused_for_what_is_wrong_with_them(forged):
    _, f = forged(GOOD)
    net = f()
    assert isinstance(net, nn.Module)
    assert net.w.shape == (2,)
    assert isinstance(net.w, nn.Parameter)


@pytest.mark.parametrize(
    "name", ["forward", "__class__", "training", "_remote", "state_dict", "__dict__"]
)
def test_a_parameter_may_have_any_name_and_hides_nothing(forged, name):
    _, f = forged(
        state(
            [[10, module(parameters=[[name, 20]], children=[["_parameters", 11]])], [11, module()]],
            [parameter()],
        )
    )
    net = f()
    assert callable(net.forward)
    assert net.training is True
    assert callable(net.state_dict)
    assert type(net).__mro__[1].__name__ == "Shell"
    assert isinstance(net._parameters, dict)
    assert list(net.state_dict()) == [name]


@pytest.mark.parametrize(
    "kind",
    [
        ["torch.jit._script", "ScriptModule"],
        ["torch.nn.modules.module", "Module"],
        ["torch.nn.modules.linear", "LazyLinear"],
        ["torch.nn.parallel.distributed", "DistributedDataParallel"],
        ["torch.fx.graph_module", "GraphModule"],
        ["torch.nn.modules.linear", "Tensor"],
        ["torch.nn.modules.linear", "math"],
        ["mmlearn.missing", "Block"],
        ["course.source", "Week"],
        ["builtins", "dict"],
    ],
    ids=str,
)
def test_only_ordinary_modules_of_torch_and_mmlearn_lend_their_class(forged, kind):
    _, f = forged(state([[10, module(type=kind)]]))
    net = f()
    assert [c.__name__ for c in type(net).__mro__][1:3] == ["Shell", "Module"]


def test_a_module_of_torchs_own_class_runs_nothing_here_but_torchs_methods(forged):
    _, f = forged(state([[10, module(type=["torch.nn.modules.linear", "Linear"])]]))
    net = f()
    assert isinstance(net, nn.Linear)
    assert net(torch.ones(2)) is net  # a call goes to the child, whatever it replies


def test_only_what_a_request_is_about_can_change(forge):
    other = GOOD["state"] | {"modules": []}

    def reply(message):
        if message["verb"] == "get":
            return {"value": {"tuple": [FUNCTION]}}
        if message["id"] == 2:
            return GOOD, bytes(8)
        if message["id"] == 3:
            return state([[12, module(parameters=[["w", 22]])]], [parameter(22)]), bytes(8)
        return {"value": None, "state": other}, bytes(8)

    client = forge(reply)
    f = client.value("e", "f")
    one, two = f(), f()
    with torch.no_grad():
        one.w.fill_(7.0)
    refused(lambda: two(torch.ones(2)))
    assert one.w.tolist() == [7.0, 7.0]


def test_a_tensor_that_a_check_put_into_a_module_keeps_its_shape(forge):
    def reply(message):
        if message["verb"] == "get":
            return {"value": {"tuple": [FUNCTION]}}
        if message["id"] == 2:
            return GOOD, bytes(8)
        entry = parameter(-1, data=["float32", [1], [0, 4]])
        return {"value": None, "state": {"modules": [], "tensors": [entry]}}, bytes(8)

    net = forge(reply).value("e", "f")()
    theirs = nn.Linear(2, 1, bias=False)
    net.w = theirs.weight
    refused(lambda: net(torch.ones(2)))
    assert theirs.weight.shape == (1, 2)


# Cells and objects


@pytest.mark.parametrize(
    "value",
    [
        5,
        [],
        [[], None],
        [[5], None, 1.0],
        [{"dict": []}, None, 1.0],
        [[], [1, 2], 1.0],
        [[], "ab", "x"],
        [[], ["a"], 1.0],
    ],
    ids=str,
)
def test_a_cell_that_shows_something_else_is_refused(forge, value):
    client = forge(lambda message: {"value": value})
    refused(lambda: client.run_cell("1"))


def test_a_cell_whose_shell_fails_is_a_cell_that_failed(forge):
    client = forge(lambda message: {"error": ["MemoryError", ["MemoryError"], "no room"]})
    assert client.run_cell("1").error == ("MemoryError", "no room")


@pytest.mark.parametrize("length", [-1, 2**40, 1.5, "3", None, True])
def test_a_length_is_a_small_whole_number(forge, length):
    def reply(message):
        if message["verb"] == "get":
            return {"value": {"tuple": [{"object": [1, "object", "m", "q", "n"]}]}}
        return {"value": length}

    thing = forge(reply).value("e", "f")
    with pytest.raises(TypeError, match="no length"):
        len(thing)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        torch.as_tensor(thing)


@pytest.mark.parametrize(
    "name", ["__class__", "__reduce__", "__dict__", "__array__", "__torch_function__", "__float__"]
)
def test_the_names_of_pythons_own_protocols_are_never_asked_for(forge, name):
    def reply(message):
        if message["verb"] == "get":
            return {"value": {"tuple": [{"object": [1, "object", "m", "q", "n"]}]}}
        return {"value": 1}

    client = forge(reply)
    thing = client.value("e", "f")
    number = client.number
    getattr(thing, name, None)
    assert client.number == number


def test_iteration_over_endless_large_values_ends(forge, monkeypatch):
    import course.grade.remote as remote

    monkeypatch.setattr(remote, "MOST_ITERATED", 2**20)
    big = {"bytes": [0, 2**19]}

    def reply(message):
        if message["verb"] == "get":
            return {"value": {"tuple": [{"object": [1, "object", "m", "q", "n"]}]}}
        if message["name"] == "iter":
            return {"value": {"object": [2, "object", "m", "q", "n"]}}
        return {"value": big}, bytes(2**19)

    thing = forge(reply).value("e", "f")
    with pytest.raises(RuntimeError, match="has no end"):
        list(thing)


def test_a_packer_of_ours_makes_what_these_tests_forge():
    packer = Packer()
    assert packer.numbers(torch.zeros(2)) == ONES
