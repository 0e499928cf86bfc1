"""The answers of a student as a check sees them: values that are here, proxies of what is not.

    client = Client(Connection(child.sock))
    client.run_cell("def double(x): return 2 * x")
    client.keep("doubling", ["double"])
    double = client.value("doubling", "double")
    double(torch.ones(2))                           # a call to the other process; a tensor here

A proxy behaves as the object would in a notebook, as far as checks go: calls change their
arguments in place, gradients flow through them, errors are raised as what they are, and modules
(`mirrors.py`) are real modules of real parameters. It never gives the student a say in this
process: nothing is unpickled, nothing of the student's is ever called here, a proxy equals only
itself, and a reply that is not what was asked for ends the conversation (`Lost`).
"""

import builtins
import collections
import functools
import inspect
import unicodedata
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from course.grade.arguments import ArgumentPacker
from course.grade.inside.values import DEEPEST, MOST_NODES, CannotTravel, Unpacker
from course.grade.inside.wire import Connection, Lost, malformed, out_of_turn
from course.grade.mirrors import Mirrors

LONGEST_MESSAGE = 2000
MOST_REFERENCES = 1000  # of arguments in one reply
MOST_ITEMS = 100_000  # of one iteration
MOST_ITERATED = 256 * 2**20  # bytes of one iteration
# What a tensor would be asked for with the right answer as the argument: an object of the student's
# own that came instead of a tensor must neither see that nor judge it.
COMPARISONS = frozenset(
    "allclose equal isclose eq ne lt le gt ge not_equal less less_equal greater greater_equal "
    "sub subtract rsub dist cdist div divide true_divide float_power remainder fmod "
    "logical_xor bitwise_xor sub_ eq_ ne_ subtract_ div_".split()
)


class CellOutcome(NamedTuple):
    """What one cell showed; `error` is the name and the message of what stopped it."""

    outputs: list[dict]
    error: tuple[str, str] | None
    seconds: float


class Client:
    """Speaks to one student's process. After a `Lost` it is of no more use."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.mirrors = Mirrors(self)
        self.proxies = weakref.WeakValueDictionary()
        self.released, self.freed = set(), set()  # told to the child with the next request
        self.number, self.lost = 0, None

    def run_cell(self, source: str) -> CellOutcome:
        """Run one cell's code in the child, and return what it showed."""
        packer = ArgumentPacker(self)
        reply, reader = self.request("cell", packer, source=packer.pack(source))
        if "error" in reply:
            error = reader.error(reply["error"])
            return CellOutcome([], (type(error).__name__, str(error)), 0.0)
        with reader.believing():
            outputs, error, seconds = reader.unpack(reply["value"])
            if type(outputs) is not list or not all(type(o) is dict for o in outputs):
                raise malformed()
            if error is not None:
                name, value = error
                error = (printable(name, 200), printable(value))
            return CellOutcome(outputs, error, float(seconds))

    def keep(self, exercise: str, names: Iterable[str]) -> None:
        """Remember what these names are bound to at this moment; a later cell may rebind them."""
        self.request("keep", ArgumentPacker(self), exercise=exercise, names=list(names))

    def value(self, exercise: str, name: str) -> object:
        """What a name was bound to when it was kept. Raises: NameError, if to nothing."""
        value = self.ask("get", exercise=exercise, name=name)
        if value is False:
            raise NameError(f"name '{name}' is not defined", name=name)
        if type(value) is not tuple or len(value) != 1:
            raise self.lose(malformed())
        return value[0]

    # Requests

    def ask(self, verb, args=None, kwargs=None, involved=(), origin=None, grads=False, **fields):
        """One request about the student's objects, with all that it may change and be asked about.

        `involved` are mirrors and parameters whose state both sides must agree on; `origin` is the
        graph that an object came out of; `grads` also exchanges the gradients of parameters.
        """
        packer = ArgumentPacker(self)
        packer.involve(involved)
        if args is not None:
            fields["args"] = [packer.pack(value) for value in args]
            fields["kwargs"] = [[key, packer.pack(v)] for key, v in (kwargs or {}).items()]
        with_grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        exchange = self.mirrors.outgoing(packer, grads)
        fields |= exchange.fields
        inputs, parameters = packer.inputs, exchange.parameters
        if origin is not None:
            fields["graph"] = origin.number
            parameters = [p for p in parameters if not any(p is known for known in origin.inputs)]
            inputs = [*origin.inputs, *inputs]
        inputs = [*inputs, *parameters]
        fields["random"] = packer.numbers(_random_state())
        reply, reader = self.request(verb, packer, grad=with_grad, **fields)
        return reader.settle(reply, inputs if with_grad else None, exchange.tracked)

    def backward(self, graph, grads):
        """The gradients of the inputs of a call, one for each; None where there is none."""
        if torch.is_grad_enabled():  # these gradients need a graph themselves: create_graph=True
            found = self.ask("backward", grads, origin=graph)
        else:
            packer = ArgumentPacker(self)
            args = [None if g is None else {"tensor": packer.numbers(g)} for g in grads]
            reply, reader = self.request(
                "backward", packer, graph=graph.number, grad=False, args=args
            )
            if "error" in reply:
                raise reader.error(reply["error"])
            with reader.believing():
                found = reader.unpack(reply["value"])
        fitting = type(found) is list and len(found) == len(graph.inputs)
        if not fitting or not all(map(_is_gradient, found, graph.inputs)):
            raise self.lose(malformed("a gradient of another shape"))
        return found

    def request(self, verb, packer, **fields):
        """Send a request and receive its reply, with a reader for what the reply holds."""
        if self.lost is not None:
            raise self.lost
        self.number += 1
        message = {"id": self.number, "verb": verb, **fields}
        released, self.released = self.released, set()
        freed, self.freed = self.freed, set()
        message |= {"release": sorted(released)} if released else {}
        message |= {"free": sorted(freed)} if freed else {}
        held = self.mirrors.everything()  # the child may mention it as known
        try:
            self.connection.send(message, packer.buffers)
            reply, body = self.connection.receive()
        except OverflowError as error:
            raise CannotTravel("the arguments are too large for an answer") from error
        except Lost as lost:
            raise self.lose(lost) from None
        except MemoryError:
            raise self.lose(malformed("more than there is room for")) from None
        if reply.get("id") != self.number or type(reply["id"]) is not int:
            raise self.lose(out_of_turn())
        return reply, ReplyReader(self, body, packer, held)

    def lose(self, lost):
        self.lost = lost
        return lost

    def proxy(self, handle, sort, module, qualname, name):
        """The proxy with this handle: always the same one, as long as anybody holds it."""
        self.released.discard(handle)
        known = self.proxies.get(handle)
        if known is not None:
            return known
        proxy = Proxy.__new__(_KINDS[sort])
        about = {"__module__": module}
        if sort not in ("object", "callable"):
            about |= {"__qualname__": qualname, "__name__": name}
        vars(proxy).update(about, _remote=Remote(self, handle))
        self.proxies[handle] = proxy
        return proxy


class ReplyReader(Unpacker):
    """Makes values of a reply. Whatever is not as it should be is `Lost`."""

    TAGS = Unpacker.TAGS | {"given", "object", "module", "tracked", "output", "leaf"}

    def __init__(self, client, body, packer, held):
        super().__init__(body)
        self.client, self.given, self.held = client, packer.given, held
        self.references, self.outputs, self.origin = 0, [], None
        self.kept = []  # what is new, until the value holds it

    def believing(self):
        return _Believing(self.client)

    def settle(self, reply, inputs, tracked):
        """Apply what the call changed; return its value, or raise its error."""
        with self.believing():
            if "state" in reply:
                self.kept = self.client.mirrors.incoming(reply["state"], self, tracked)
            if "graph" in reply:
                self._take_graph(reply["graph"], inputs)
            for number, content in reply.get("changed", []):
                self._change(self.argument(number), content)
            if self.references:
                _check_size(self.given)
            for number, requires_grad, grad in reply.get("grads", []):
                self._change_grad(self.argument(number), requires_grad, grad)
            if "error" in reply:
                error = self.error(reply["error"])
            else:
                error, value = None, self.unpack(reply["value"])
        if error is not None:
            raise error
        return value

    def argument(self, number):
        """The argument that the child knows under this number."""
        if type(number) is not int or not 0 <= number < len(self.given):
            raise malformed("an argument that was never given")
        return self.given[number]

    def _take_graph(self, described, inputs):
        number, outputs = described
        tensors = [self.numbers(output) for output in outputs]
        graph = GraphHandle(self.client, _handle(number), inputs or [])
        if inputs is None:
            self.outputs = tensors
            return
        for tensor in tensors:
            if not tensor.is_floating_point() and not tensor.is_complex():
                raise malformed("a gradient of whole numbers")
        if tensors:
            tied = inputs or [torch.zeros((), requires_grad=True)]
            self.outputs = list(RemoteGraph.apply(graph, tensors, *tied))
        self.origin = graph

    def _change(self, target, content):
        """Make an argument here what the call made of its copy there."""
        if isinstance(target, torch.Tensor):
            ((tag, described),) = content.items()
            new = self.numbers(described) if tag == "tensor" else self._output(described, 0)
            if not _alike(new, target):
                raise malformed("an argument of another shape")
            # What was computed with gradients from the argument goes on from there.
            with torch.set_grad_enabled(new.requires_grad and not target.is_leaf):
                target.copy_(new)
        elif isinstance(target, nn.Module):
            modules = list(target.modules())
            if len(modules) != len(content):
                raise malformed()
            for module, training in zip(modules, content):
                module.training = bool(training)
        elif type(target).__module__ == "numpy":
            new = self.unpack(content)
            if type(new) is not type(target) or new.shape != target.shape:
                raise malformed("an argument of another shape")
            if new.dtype != target.dtype:
                raise malformed("an argument of another shape")
            target[...] = new
        else:
            self._change_container(target, content)

    def _change_container(self, target, content):
        if type(content) is not list:
            raise malformed()
        parts = [self.unpack(part, 1) for part in content]
        if isinstance(target, dict):
            new = dict(zip(parts[::2], parts[1::2], strict=True))
            target.clear()
            target.update(new)
        elif type(target) is set:
            new = set(parts)
            target.clear()
            target.update(new)
        elif type(target) is list:
            target[:] = parts
        else:
            raise malformed()

    def _change_grad(self, target, requires_grad, grad):
        if not isinstance(target, torch.Tensor) or not target.is_leaf:
            raise malformed()
        if not target.is_floating_point() and not target.is_complex():
            raise malformed()
        target.requires_grad_(bool(requires_grad))
        new = None if grad is None else self.numbers(grad)
        if new is not None and not _alike(new, target):
            raise malformed("a gradient of another shape")
        target.grad = new

    def error(self, described):
        with self.believing():
            name, bases, text = described
            base = next((_BASES[base] for base in bases if base in _BASES), RuntimeError)
            name = name if type(name) is str and name.isidentifier() else base.__name__
            return _error_class(name[:100], base)(printable(text))

    def _given(self, content, depth):
        self.references += 1
        if self.references > MOST_REFERENCES:
            raise malformed("a value of too many parts")
        return self.argument(content)

    def _object(self, content, depth):
        handle, sort, *about = content
        if sort not in _KINDS or len(about) != 3 or not all(type(text) is str for text in about):
            raise malformed()
        proxy = self.client.proxy(_handle(handle), sort, *(printable(a, 200) for a in about))
        if self.origin is not None:
            proxy._remote.origin = self.origin
        return proxy

    def _module(self, content, depth):
        return self.client.mirrors.shell(_handle(content))

    def _tracked(self, content, depth):
        return self.client.mirrors.tensor(_handle(content))

    def _output(self, content, depth):
        if type(content) is not int or not 0 <= content < len(self.outputs):
            raise malformed()
        return self.outputs[content]

    def _leaf(self, content, depth):
        described, parameter, requires_grad, grad = content
        tensor = self.numbers(described)
        if parameter:
            tensor = nn.Parameter(tensor, bool(requires_grad))
        else:
            tensor.requires_grad_(bool(requires_grad))
        if grad is not None:
            tensor.grad = self.numbers(grad)
        return tensor


class _Believing:
    """Inside, whatever goes wrong with a reply is the reply's fault."""

    def __init__(self, client):
        self.client = client

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Lost):
            self.client.lose(error)
        elif isinstance(error, RuntimeError) and "allocate memory" in str(error):
            raise MemoryError("what the answer returned is too large") from error
        elif isinstance(error, Exception) and not isinstance(error, MemoryError):
            raise self.client.lose(malformed()) from error


def _handle(content):
    if type(content) is not int or not 0 < content < 2**53:
        raise malformed()
    return content


def _is_gradient(value, tensor):
    return value is None or (isinstance(value, torch.Tensor) and _alike(value, tensor))


def _alike(one, other):
    return one.shape == other.shape and one.dtype == other.dtype


def _random_state():
    """The state of this process's random numbers, which then go on elsewhere.

    The child draws from the state. What is drawn here next is decided here, never by the child.
    """
    generator = torch.default_generator
    state = generator.get_state()
    seed = torch.randint(2**62, (), generator=generator).item()
    generator.manual_seed(seed)
    return state


def _check_size(values):
    """Whoever walks through arguments that were put into each other must come to an end."""
    sizes = {}

    def size(value, depth):
        if not isinstance(value, (list, tuple, dict, set, frozenset, collections.deque)):
            return 1
        known = sizes.get(id(value))
        if known is None:
            if depth > DEEPEST:
                raise malformed("arguments inside each other")
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            known = sizes[id(value)] = 1 + sum(size(part, depth + 1) for part in parts)
        if known > MOST_NODES:
            raise malformed("a value of too many parts")
        return known

    for value in values:
        size(value, 0)


# Gradients


class GraphHandle:
    """A graph in the child, kept there as long as anything here may ask it for gradients."""

    def __init__(self, client, number, inputs):
        self.client, self.number, self.inputs = client, number, inputs

    def __del__(self):
        self.client.freed.add(self.number)


class RemoteGraph(torch.autograd.Function):
    """A call in the child as one node of the graph here."""

    @staticmethod
    def forward(ctx, graph, tensors, *inputs):
        ctx.graph = graph
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(torch.empty(0))  # so that a second backward fails as it should
        return tuple(tensors)

    @staticmethod
    def backward(ctx, *grads):
        _ = ctx.saved_tensors
        found = ctx.graph.client.backward(ctx.graph, grads)
        return None, None, *(found if ctx.graph.inputs else [None])


# Proxies


class Remote:
    """Where a proxy's object is, and what else a call to it is about."""

    def __init__(self, client, handle):
        self.client, self.handle = client, handle
        self.origin = None

    def __del__(self):
        self.client.released.add(self.handle)

    def ask(self, verb, *args, kwargs=None, **fields):
        involved = self.client.mirrors.alive()
        return self.client.ask(
            verb, args, kwargs, involved, self.origin, True, target=self.handle, **fields
        )

    def method(self, name, *args):
        return self.ask("method", *args, name=name)


class Proxy:
    """Something of the student's that is not a plain value."""

    def __getattr__(self, name):
        if name.startswith("__") or name == "_remote":
            raise AttributeError(f"an answer's {name} cannot be reached", name=name)
        if name in COMPARISONS:
            raise AttributeError(f"the answer has no {name}: it is not a tensor", name=name)
        return self._remote.ask("attribute", name=name)

    def __setattr__(self, name, value):
        if name.startswith("__") or name == "_remote":
            raise AttributeError(f"an answer's {name} cannot be set", name=name)
        self._remote.ask("assign", value, name=name)

    def __len__(self):
        length = self._remote.method("len")
        if type(length) is not int or not 0 <= length <= MOST_ITEMS:
            raise TypeError("the answer has no length")
        return length

    def __bool__(self):
        return True

    def __getitem__(self, key):
        return self._remote.method("getitem", key)

    def __setitem__(self, key, value):
        self._remote.method("setitem", key, value)

    def __iter__(self):
        iterator = self._remote.method("iter")
        if not isinstance(iterator, Proxy):
            raise TypeError("the answer cannot be iterated over")
        connection = self._remote.client.connection
        most = connection.received + MOST_ITERATED
        for _ in range(MOST_ITEMS):
            try:
                value = next(iterator)
            except StopIteration:
                return
            if connection.received > most:
                break
            yield value
        raise RuntimeError("what the answer yields has no end")

    def __next__(self):
        return self._remote.method("next")

    def __contains__(self, value):
        return any(value is item or value == item for item in self)

    def __enter__(self):
        return self._remote.method("enter")

    def __exit__(self, *_):
        self._remote.method("exit")

    def __copy__(self):
        return self._remote.method("copy")

    def __deepcopy__(self, memo):
        return self._remote.method("deepcopy")

    def __reduce_ex__(self, protocol):
        raise TypeError("an answer cannot be pickled")

    def __repr__(self):
        return "<an object of the answer>"

    @property
    def __signature__(self):
        parameters = []
        for name, kind, optional in self._remote.method("signature"):
            default = ... if optional else inspect.Parameter.empty
            parameters.append(
                inspect.Parameter(name, inspect._ParameterKind(kind), default=default)
            )
        return inspect.Signature(parameters)


class CallableProxy(Proxy):
    def __call__(self, *args, **kwargs):
        return self._remote.ask("call", *args, kwargs=kwargs)


class FunctionProxy(CallableProxy):
    def __repr__(self):
        return "<a function of the answer>"


class ClassProxy(CallableProxy):
    def __repr__(self):
        return "<a class of the answer>"

    @property
    def __bases__(self):
        return (object,)

    def __instancecheck__(self, value):
        if not isinstance(value, Proxy) and not hasattr(value, "_remote"):
            return False
        return self._remote.method("isinstance", value) is True

    def __mro_entries__(self, bases):
        raise TypeError("a check cannot derive a class from an answer")


class ModuleClassProxy(ClassProxy):
    @property
    def __bases__(self):
        return (nn.Module,)


_KINDS = {
    "object": Proxy,
    "callable": CallableProxy,
    "function": FunctionProxy,
    "class": ClassProxy,
    "module class": ModuleClassProxy,
}


# Errors


class _FromStudent:
    """Marks the errors that a student's code raised."""

    def __init__(self, text):
        BaseException.__init__(self, text)
        self.text = text

    def __str__(self):
        return self.text


def is_from_student(error: BaseException) -> bool:
    """True if an error was raised by the student's code, not by a check."""
    return isinstance(error, _FromStudent)


@functools.lru_cache(1000)
def _error_class(name, base):
    return type(name, (_FromStudent, base), {"__module__": "answer"})


_BASES = {
    name: value
    for name, value in vars(builtins).items()
    if isinstance(value, type)
    and issubclass(value, Exception)
    and not issubclass(value, BaseExceptionGroup)
    and value.__name__ == name
}


def printable(text, longest: int = LONGEST_MESSAGE) -> str:
    """Text that shows what it is: no control characters but new lines, no reversed direction."""
    if type(text) is not str:
        raise malformed()
    if text.isprintable() and len(text) <= longest:
        return text
    clean = [
        c
        if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else " "
        if c == "\t"
        else "\N{REPLACEMENT CHARACTER}"
        for c in text[:longest]
    ]
    return "".join(clean)
