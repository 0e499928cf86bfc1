"""The loop of a student's process: it runs cells, then answers calls on what they defined.

One request, one reply. The values that a request brings are numbered as they are unpacked, so that
a reply can point at them ("given", 3) and say which of them the call changed in place. What cannot
travel stays here under a number, its handle, until the grader lets go of it. Modules, parameters
and buffers have handles, too: a request brings what changed on the grader's copies, a reply what
changed on these. The graph of a call that gradients may be asked of is kept the same way.

Nothing in this file is a defence: the student's code shares the process and can change all of it.
Whatever arrives from here is doubted on the other side (`values.py`, and `remote.py` out there).
"""

import copy
import inspect
import io
import os
import pickle
import random
import signal
import time
import types
import zlib
from functools import partial

import numpy as np
import torch
from torch import nn

from .values import Packer, Unpacker, is_plain, leaf_grad, raw, same_bytes, same_grad
from .wire import Connection, Lost

_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodWrapperType,
    partial,
)
LONGEST_MESSAGE = 4000


def main(sock, shell) -> None:
    """Answer requests until the other side closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only a cell can be interrupted: see shell.py
    Server(Connection(sock), shell).run()


class Server:
    def __init__(self, connection, shell):
        self.connection, self.shell = connection, shell
        self.kept = {}  # exercise: {name: what it is bound to}
        self.handles, self.ids, self.last_handle = {}, {}, 0
        self.described = {}  # module handle: its description, as the other side knows it
        self.snapshots = {}  # tensor handle: its numbers, flag and gradient as known there
        self.graphs, self.last_graph = {}, 0
        self.pid = os.getpid()

    def run(self):
        while True:
            try:
                message, body = self.connection.receive()
                reply, buffers = self.answer(message, body)
                if os.getpid() != self.pid:
                    os._exit(0)  # forked by the student's code, which came back in both processes
                try:
                    self.connection.send({"id": message["id"], **reply}, buffers)
                except (OverflowError, ValueError) as error:
                    self.connection.send({"id": message["id"], "error": _describe(error)})
            except Lost:
                return

    def answer(self, message, body):
        for handle in message.get("release", ()):
            self.release(handle)
        for graph in message.get("free", ()):
            self.graphs.pop(graph, None)
        exchange = Exchange(self, message, body)
        try:
            reply = getattr(self, f"_{message['verb']}")(message, exchange)
        except BaseException as error:
            return {"error": _describe(error)}, []
        return reply, exchange.packer.buffers

    # Handles

    def register(self, value, handle=None):
        """The number under which a value stays here."""
        known = self.ids.get(id(value))
        if known is not None:
            return known
        if handle is None:
            self.last_handle = handle = self.last_handle + 1
        self.handles[handle], self.ids[id(value)] = value, handle
        return handle

    def release(self, handle):
        value = self.handles.pop(handle, None)
        self.ids.pop(id(value), None)
        self.described.pop(handle, None)
        self.snapshots.pop(handle, None)

    # Verbs. The first three run or look at cells, the rest at what they defined.

    def _cell(self, message, exchange):
        started = time.perf_counter()
        outputs, error = self.shell.run(exchange.arguments.unpack(message["source"]))
        outcome = [outputs, list(error) if error else None, time.perf_counter() - started]
        return {"value": exchange.packer.pack(outcome)}

    def _keep(self, message, exchange):
        namespace = self.shell.namespace
        kept = {name: namespace[name] for name in message["names"] if name in namespace}
        self.kept[message["exercise"]] = kept
        return {"value": list(kept)}

    def _get(self, message, exchange):
        kept = self.kept.get(message["exercise"], {})
        if message["name"] not in kept:
            return {"value": False}
        exchange.packer.leaves_stay = False
        return exchange.run(lambda: (kept[message["name"]],))

    def _call(self, message, exchange):
        return exchange.run(lambda args, kwargs: self._target(message)(*args, **kwargs), call=True)

    def _attribute(self, message, exchange):
        exchange.packer.leaves_stay = False
        return exchange.run(lambda: getattr(self._target(message), message["name"]))

    def _assign(self, message, exchange):
        def assign(args, kwargs):
            setattr(self._target(message), message["name"], args[0])

        return exchange.run(assign, call=True)

    def _method(self, message, exchange):
        """What Python's syntax asks of an object: len(), [], iter(), with, copies."""
        verb = _METHODS[message["name"]]
        exchange.packer.leaves_stay = False
        exchange.packer.stays = message["name"] == "iter"
        return exchange.run(lambda args, kwargs: verb(self._target(message), *args), call=True)

    def _backward(self, message, exchange):
        graph = self.graphs[message["graph"]]
        if message["grad"]:  # gradients of gradients will be asked for
            return exchange.run(lambda args, kwargs: graph.differentiable(args), call=True)
        grads = [exchange.arguments.unpack(grad) for grad in message["args"]]
        return {"value": exchange.packer.pack(graph.backward(grads))}

    def _target(self, message):
        return self.handles[message["target"]]


_METHODS = {
    "len": len,
    "getitem": lambda target, key: target[key],
    "setitem": lambda target, key, value: target.__setitem__(key, value),
    "iter": iter,
    "next": next,
    "enter": lambda target: type(target).__enter__(target),
    "exit": lambda target, *_: type(target).__exit__(target, None, None, None),
    "extra_repr": lambda target: target.extra_repr(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "isinstance": lambda target, value: isinstance(value, target),
    "signature": lambda target: [
        (p.name, int(p.kind), p.default is not p.empty)
        for p in inspect.signature(target).parameters.values()
    ],
}


class Exchange:
    """One request and its reply: arguments in, work, result and changes out."""

    def __init__(self, server, message, body):
        self.server, self.message = server, message
        self.arguments = ArgumentReader(server, body)
        self.packer = ReplyPacker(self)

    def run(self, work, call=False):
        """Do the work on the request's arguments; reply with its value, or with its error."""
        server, message, arguments = self.server, self.message, self.arguments
        self._take_state(message.get("state", {}))
        values = ()
        if call:
            args = [arguments.unpack(value) for value in message["args"]]
            values = args, {key: arguments.unpack(value) for key, value in message["kwargs"]}
        origin = server.graphs[message["graph"]].leaves if "graph" in message else []
        shared = [server.handles[handle] for handle in message.get("leaves", ())]
        shared = [leaf for leaf in shared if not any(leaf is known for known in origin)]
        leaves = [*origin, *arguments.leaves, *shared]
        self.graph = Graph(leaves)
        if "random" in message:
            _set_random(arguments.numbers(message["random"]))
        had_grad = torch.is_grad_enabled()
        torch.set_grad_enabled(message.get("grad", True))
        reply, value = {}, None
        try:
            value = work(*values)
        except BaseException as error:
            reply["error"] = _describe(error)
        finally:
            torch.set_grad_enabled(had_grad)
        if "error" not in reply:
            reply["value"] = self.packer.pack(value)
        reply |= self._changes()
        reply |= self._state()
        if self.graph.outputs or (self.packer.left_objects and leaves):
            server.last_graph = number = server.last_graph + 1
            server.graphs[number] = self.graph
            outputs = [self.packer.numbers(tensor) for tensor in self.graph.outputs]
            reply["graph"] = [number, outputs]
        return reply

    def _changes(self):
        """What the work changed in place, by the number of the argument."""
        changed, grads = [], []
        for number, given in enumerate(self.arguments.given):
            if given.is_changed():
                changed.append([number, given.pack(self.packer)])
            if given.grad_is_changed():
                tensor = given.value
                grad = None if tensor.grad is None else self.packer.numbers(tensor.grad)
                grads.append([number, tensor.requires_grad, grad])
        return {k: v for k, v in {"changed": changed, "grads": grads}.items() if v}

    # Modules, parameters and buffers that both sides hold

    def _take_state(self, state):
        """Make here what changed on the other side."""
        server, reader = self.server, self.arguments
        for entry in state.get("tensors", ()):
            data = reader.numbers(entry["data"]) if "data" in entry else None
            tensor = server.handles.get(entry["id"])
            if tensor is None:
                needs = entry["requires_grad"]
                tensor = nn.Parameter(data, needs) if entry["parameter"] else data
                server.register(tensor, entry["id"])
            elif data is not None and data.shape == tensor.shape and data.dtype == tensor.dtype:
                with torch.no_grad():
                    tensor.copy_(data)
            elif data is not None:
                tensor.data = data
            if tensor.is_leaf:
                tensor.requires_grad_(entry["requires_grad"])
            if "grad" in entry:
                grad = entry["grad"]
                tensor.grad = None if grad is None else reader.numbers(grad)
            server.snapshots[entry["id"]] = Snapshot(tensor)
        for handle, kind, name, tensor, persistent in state.get("bind", ()):
            module = server.handles[handle]
            entries = module.__dict__[kind]
            if tensor == "gone":
                entries.pop(name, None)
            else:
                entries[name] = None if tensor is None else server.handles[tensor]
            if kind == "_buffers":
                held = module.__dict__["_non_persistent_buffers_set"]
                (held.discard if persistent else held.add)(name)
        for handle, training in state.get("training", ()):
            server.handles[handle].training = training

    def _state(self):
        """What changed here on the modules that this exchange is about, and all of new ones."""
        server, message = self.server, self.message
        modules, tensors, seen = [], [], set()
        handles = [*message.get("watch", ()), *self.packer.new_modules]
        watched = set(message.get("watch_tensors", ()))
        while handles:
            handle = handles.pop()
            module = server.handles.get(handle)
            if handle in seen or module is None:
                continue
            seen.add(handle)
            description = self._describe_module(module)
            if server.described.get(handle) != description:
                server.described[handle] = description
                modules.append([handle, description])
            handles.extend(child for _, child in description["children"] if child is not None)
            for kind in ("parameters", "buffers"):
                watched.update(entry[1] for entry in description[kind] if entry[1] is not None)
        with_grads = message.get("grads", False)
        for handle in sorted(watched):
            tensor, known = server.handles[handle], server.snapshots.get(handle)
            if known is not None and known.is_current(tensor, with_grads):
                continue
            entry = {
                "id": handle,
                "requires_grad": tensor.is_leaf and tensor.requires_grad,
                "parameter": type(tensor) is nn.Parameter,
            }
            if known is None or not same_bytes(known.numbers, tensor):
                entry["data"] = self.packer.numbers(tensor)
            if known is None or with_grads:
                held = leaf_grad(tensor)
                entry["grad"] = None if held is None else self.packer.numbers(held)
            tensors.append(entry)
            server.snapshots[handle] = Snapshot(tensor)
        if not modules and not tensors:
            return {}
        return {"state": {"modules": modules, "tensors": tensors}}

    def _describe_module(self, module):
        server, own = self.server, module.__dict__
        kind, unsaved = type(module), own["_non_persistent_buffers_set"]

        def tensors(kind):
            for name, tensor in own[kind].items():
                if tensor is None or is_plain(tensor):
                    yield name, None if tensor is None else server.register(tensor)

        return {
            "type": [str(kind.__module__)[:200], str(kind.__qualname__)[:200]],
            "training": bool(own["training"]),
            "parameters": [[name, handle] for name, handle in tensors("_parameters")],
            "buffers": [[name, h, name not in unsaved] for name, h in tensors("_buffers")],
            "children": [
                [name, None if child is None else server.register(child)]
                for name, child in own["_modules"].items()
                if child is None or isinstance(child, nn.Module)
            ],
        }


class Snapshot:
    """A parameter or buffer as the other side knows it."""

    def __init__(self, tensor):
        self.numbers = tensor.detach().clone()
        self.requires_grad = tensor.requires_grad
        held = leaf_grad(tensor)
        self.grad = None if held is None else held.clone()

    def is_current(self, tensor, with_grad):
        if tensor.requires_grad != self.requires_grad or not same_bytes(tensor, self.numbers):
            return False
        return not with_grad or same_grad(self.grad, leaf_grad(tensor))


class Graph:
    """What a call computed with gradients: outputs, and leaves whose gradients are asked for."""

    def __init__(self, leaves):
        self.leaves, self.outputs = leaves, []

    def differentiable(self, grads):
        """The gradients of the leaves, as outputs of a graph themselves."""
        outputs = [out for out, grad in zip(self.outputs, grads) if grad is not None]
        grads = [grad for grad in grads if grad is not None]
        found = torch.autograd.grad(
            outputs, self.leaves, grads, create_graph=True, allow_unused=True
        )
        return list(found)

    def backward(self, grads):
        """The gradients of the leaves. Leaves that nobody else knows accumulate theirs here."""
        wanted = [(out, grad) for out, grad in zip(self.outputs, grads) if grad is not None]
        if not wanted:
            return [None] * len(self.leaves)
        held = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        try:
            outputs, grads = zip(*wanted)
            # The graph goes when the other side lets go of it; whether it may be used again is
            # decided there.
            torch.autograd.backward(outputs, grads, retain_graph=True)
            return [leaf.grad for leaf in self.leaves]
        finally:
            for leaf, grad in zip(self.leaves, held):
                leaf.grad = grad


class Given:
    """An argument that came with a request, and what it was before the call."""

    def __init__(self, value, before):
        self.value, self.before = value, before

    def is_changed(self):
        value, before = self.value, self.before
        if isinstance(value, torch.Tensor):
            return not same_bytes(value, before)
        if type(value) is np.ndarray:
            return value.tobytes() != before
        if isinstance(value, nn.Module):
            return self._modes() != before
        now = self._parts()
        return len(now) != len(before) or any(a is not b for a, b in zip(now, before))

    def grad_is_changed(self):
        return False

    def remember(self):
        """Note what a list, dictionary, set or module holds before the call."""
        self.before = self._modes() if isinstance(self.value, nn.Module) else self._parts()

    def pack(self, packer):
        value = self.value
        if type(value) is np.ndarray:
            return packer.numpy(value, np.ndarray, 0)
        if isinstance(value, nn.Module):
            return self._modes()
        return [packer.pack(part, 1) for part in self._parts()]

    def _parts(self):
        if type(self.value) is dict:
            return tuple(part for item in self.value.items() for part in item)
        return tuple(self.value)

    def _modes(self):
        return [module.training for module in self.value.modules()]


class GivenTensor(Given):
    def __init__(self, value, before, grad, shape):
        super().__init__(value, before)
        self.grad, self.shape = grad, shape
        self.needs = value.requires_grad

    def is_changed(self):
        if self.value.shape != self.before.shape or self.value.dtype != self.before.dtype:
            raise RuntimeError(
                "the call changed the shape or the dtype of a tensor that it was given, from "
                f"{tuple(self.before.shape)} to {tuple(self.value.shape)}"
            )
        return not same_bytes(self.value, self.before)

    def grad_is_changed(self):
        if not self.value.is_leaf:
            return False
        return self.value.requires_grad != self.needs or not same_grad(self.grad, self.value.grad)

    def pack(self, packer):
        if self.value.requires_grad and not self.value.is_leaf:
            return {"output": packer.output(self.value)}
        return {"tensor": packer.numbers(self.value)}


class ArgumentReader(Unpacker):
    """Unpacks what a request brings, and numbers whatever a call could change in place."""

    TAGS = Unpacker.TAGS | {"given", "object", "input", "strided", "generator", "pickle"}

    def __init__(self, server, body):
        super().__init__(body)
        self.server, self.given, self.leaves = server, [], []

    def list(self, items, depth):
        given = Given([], ())
        self.given.append(given)
        given.value.extend(self.unpack(item, depth) for item in items)
        given.remember()
        return given.value

    def _dict(self, content, depth):
        given = Given({}, ())
        self.given.append(given)
        given.value.update(self._pairs(content, depth))
        given.remember()
        return given.value

    def _set(self, content, depth):
        given = Given(set(), ())
        self.given.append(given)
        given.value.update(super()._set(content, depth))
        given.remember()
        return given.value

    def _array(self, content, depth):
        array = super()._array(content, depth)
        self.given.append(Given(array, array.tobytes()))
        return array

    def _scalar(self, content, depth):
        name, place = content
        return super()._array([name, [], place], depth)[()]

    def _input(self, content, depth):
        """A tensor, with what autograd knows of it: [numbers, needs, is_parameter, gradient]."""
        numbers, needs, parameter, grad = content
        tensor = self._strided(*numbers["strided"]) if type(numbers) is dict else None
        if tensor is None:
            tensor = self.numbers(numbers)
        before = tensor.clone()
        if parameter:
            tensor = nn.Parameter(tensor, bool(needs))
        elif needs:
            tensor.requires_grad_()
        if needs:
            self.leaves.append(tensor)
        if grad is not None:
            tensor.grad = self.numbers(grad)
            grad = tensor.grad.clone()
        if needs == "computed":  # not a leaf where it comes from
            with torch.enable_grad():
                tensor = tensor.clone()
        self.given.append(GivenTensor(tensor, before, grad, tensor.shape))
        return tensor

    def _strided(self, numbers, shape, strides):
        return self.numbers(numbers).as_strided(shape, strides)

    def _generator(self, content, depth):
        generator = torch.Generator()
        generator.set_state(self.numbers(content))
        self.given.append(Given([], ()))  # the other side moves its own
        return generator

    def _given(self, content, depth):
        return self.given[content].value

    def _object(self, content, depth):
        return self.server.handles[content]

    def _pickle(self, content, depth):
        place, parts = content
        value = _Unpickler(self, bytes(self.piece(place)), parts).load()
        if isinstance(value, nn.Module):
            self.given.append(Given(value, ()))
            self.given[-1].remember()
        return value


class _Unpickler(pickle.Unpickler):
    """The course's own objects, whose tensors and handles travel beside the pickle."""

    def __init__(self, reader, content, parts):
        super().__init__(io.BytesIO(content))
        self.values = [reader.unpack(part) for part in parts]

    def persistent_load(self, number):
        return self.values[number]


class ReplyPacker(Packer):
    """Packs results: arguments and handles are pointed at, what cannot travel gets a handle."""

    def __init__(self, exchange):
        super().__init__()
        self.exchange, self.server = exchange, exchange.server
        self.known = None  # number of each argument, by its id
        self.new_modules, self.left_objects = [], False
        self.leaves_stay = True  # an unknown leaf is an output of the graph, not a value
        self.stays = False

    def pack(self, value, depth=0):
        if self.stays:
            return self.other(value, depth)
        return super().pack(value, depth)

    def compound(self, value, kind, depth):
        if self.known is None:
            self.known = {id(g.value): n for n, g in enumerate(self.exchange.arguments.given)}
        number = self.known.get(id(value))
        if number is not None:
            return {"given": number}
        return super().compound(value, kind, depth)

    def tensor(self, value, depth):
        handle = self.server.ids.get(id(value))
        if handle is not None:
            return {"tracked": handle}
        if not is_plain(value):
            return self.other(value, depth)
        if value.requires_grad and (self.leaves_stay or not value.is_leaf):
            return {"output": self.output(value)}
        if value.requires_grad or type(value) is nn.Parameter:
            grad = None if value.grad is None else self.numbers(value.grad)
            is_parameter = type(value) is nn.Parameter
            return {"leaf": [self.numbers(value), is_parameter, value.requires_grad, grad]}
        return {"tensor": self.numbers(value)}

    def output(self, value):
        outputs = self.exchange.graph.outputs
        for number, known in enumerate(outputs):
            if known is value:
                return number
        outputs.append(value)
        return len(outputs) - 1

    def other(self, value, depth):
        kind = type(value)
        known = id(value) in self.server.ids
        handle = self.server.register(value)
        if issubclass(kind, nn.Module) and "_modules" in value.__dict__:
            if not known:
                self.new_modules.append(handle)
            return {"module": handle}
        self.left_objects = True
        named, sort = kind, "callable" if callable(value) else "object"
        if issubclass(kind, type):
            named, sort = value, "module class" if issubclass(value, nn.Module) else "class"
        elif issubclass(kind, _FUNCTIONS):
            named, sort = value, "function"
        about = [str(getattr(named, name, ""))[:200] for name in _ABOUT]
        return {"object": [handle, sort, *about]}


_ABOUT = ("__module__", "__qualname__", "__name__")


def _describe(error):
    """An error as [its type's name, the built-in types it is one of, its message]."""
    kind = type(error)
    try:
        text = str(error)[:LONGEST_MESSAGE]
    except BaseException:
        text = ""
    names = [base.__name__ for base in kind.__mro__ if base.__module__ == "builtins"]
    return [str(kind.__name__)[:200], names[:20], text]


def _set_random(state):
    """Every call draws what it would have drawn in the process that asks."""
    torch.default_generator.set_state(state)
    seed = zlib.crc32(raw(state))
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what a student's code may draw from)
