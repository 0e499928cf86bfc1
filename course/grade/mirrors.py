"""Modules of the student as modules here: real parameters and buffers, whose `forward` is a call.

A mirror has the same tree of parts, names, shapes, dtypes and ties as the module in the child, so
that `state_dict`, `parameters`, optimizers, `copy_`, `train` and `double` are torch's own code on
tensors of this process. Both sides remember what the other one knows: a request first brings there
what has changed here, a reply brings back what the call has changed there.
"""

import functools
import sys
import weakref
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from course.grade.inside.values import CannotTravel, is_plain, leaf_grad, same_bytes, same_grad
from course.grade.inside.wire import malformed

MOST_PARTS = 20_000  # of one module, counted as torch's own walks meet them
DEEPEST = 64
LONGEST_NAME = 200
_KINDS = {"parameters": "_parameters", "buffers": "_buffers"}


class Mirrors:
    """All mirrors of one child, by handle."""

    def __init__(self, client):
        self.client = client
        self.shells = weakref.WeakValueDictionary()
        self.tensors = weakref.WeakValueDictionary()  # handle: Tracked
        self.by_id = weakref.WeakValueDictionary()  # id of the tensor here: Tracked
        self.last_own = 0

    def alive(self):
        return [shell for _, shell in sorted(self.shells.items())]

    def everything(self):
        return list(self.shells.values()), list(self.tensors.values())

    def shell(self, handle):
        self.client.released.discard(handle)
        shell = self.shells.get(handle)
        if shell is None:
            raise malformed("a module that does not exist")
        return shell

    def tensor(self, handle):
        tracked = self.tensors.get(handle)
        if tracked is None:
            raise malformed("a parameter that does not exist")
        return tracked.tensor

    def tracked_of(self, tensor):
        return self.by_id.get(id(tensor))

    # To the child

    def outgoing(self, packer, grads):
        """What the child does not know yet about the involved, and what it is to report on."""
        shells = list(_reach(packer.shells.values()))
        tracked = {t.handle: t for t in packer.tracked.values()}
        state = {"tensors": [], "bind": [], "training": []}
        fresh = {}
        for shell in shells:
            self._compare(shell, state, tracked, fresh)
        for handle, held in tracked.items():
            entry = held.difference(packer, grads, handle in fresh)
            if entry is not None:
                state["tensors"].append(entry)
        fields = {}
        if any(state.values()):
            fields["state"] = {key: value for key, value in state.items() if value}
        if shells or tracked:
            fields["watch"] = [shell._remote.handle for shell in shells]
            fields["watch_tensors"] = [t.handle for t in packer.tracked.values()]
            fields["grads"] = grads
        needing = [t for t in tracked.values() if t.tensor.requires_grad]
        fields["leaves"] = [t.handle for t in needing]
        return Outgoing(fields, [t.tensor for t in needing], tracked)

    def _compare(self, shell, state, tracked, fresh):
        remote = shell._remote
        for kind in _KINDS.values():
            known, now = remote.tracked[kind], shell.__dict__[kind]
            unsaved = shell.__dict__["_non_persistent_buffers_set"]
            for name in [name for name in known if name not in now]:
                del known[name]
                state["bind"].append([remote.handle, kind, name, "gone", True])
            for name, tensor in now.items():
                held = known.get(name)
                if name not in known or (held.tensor if held else None) is not tensor:
                    held = known[name] = self._track(tensor, fresh)
                    handle = held.handle if held else None
                    bind = [remote.handle, kind, name, handle, name not in unsaved]
                    state["bind"].append(bind)
                if held is not None:
                    tracked[held.handle] = held
        parts = {n: p for n, p in shell._modules.items() if p is not None}
        if parts.keys() != remote.parts.keys() or any(
            parts[name] is not remote.parts[name] for name in parts
        ):
            raise CannotTravel("a part of an answer's module cannot be replaced in a check")
        if shell.training != remote.training:
            remote.training = shell.training
            state["training"].append([remote.handle, shell.training])

    def _track(self, tensor, fresh):
        """The record of a tensor that a check put into a mirror, under a number of ours."""
        if tensor is None:
            return None
        held = self.tracked_of(tensor)
        if held is None:
            if not is_plain(tensor):
                raise CannotTravel("a parameter of this kind cannot be put into an answer's module")
            self.last_own -= 1
            held = fresh[self.last_own] = Tracked(self, self.last_own, tensor)
        return held

    # From the child

    def incoming(self, state, reader, asked):
        """Believe what a reply says has changed, if it can be; return what it is about."""
        tensors, modules, shells = state["tensors"], state["modules"], []
        if max(len(tensors) + len(self.tensors), len(modules) + len(self.shells)) > MOST_PARTS:
            raise malformed("a module of too many parts")
        keep = [self._take_tensor(entry, reader, asked) for entry in tensors]
        for handle, description in modules:
            _check_handle(handle)
            self.client.released.discard(handle)
            shell = self.shells.get(handle)
            if shell is None:
                shell = _new_shell(self.client, handle, description["type"])
                self.shells[handle] = shell
            shells.append(shell)
        for shell, (_, description) in zip(shells, modules):
            self._link(shell, description)
        if modules:
            _check_size(self.shells.values())
        return keep + shells

    def _take_tensor(self, entry, reader, asked):
        handle = entry["id"]
        held = self.tensors.get(handle)
        if held is not None and handle not in asked:
            raise malformed("a change of what was never given")
        data = reader.numbers(entry["data"]) if "data" in entry else None
        if held is None:
            _check_handle(handle)
            tensor = nn.Parameter(data, False) if entry["parameter"] else data
            held = Tracked(self, handle, tensor)
        elif (
            data is not None and data.shape == held.tensor.shape and data.dtype == held.tensor.dtype
        ):
            with torch.no_grad():
                held.tensor.copy_(data)
        elif data is not None:
            if handle < 0:  # a tensor that a check made
                raise malformed("a parameter of another shape")
            held.tensor.data = data
        self.client.released.discard(handle)
        tensor = held.tensor
        if tensor.is_leaf:
            tensor.requires_grad_(bool(entry["requires_grad"]))
        if "grad" in entry:
            grad = entry["grad"]
            tensor.grad = None if grad is None else reader.numbers(grad)
        held.remember()
        return held

    def _link(self, shell, description):
        remote = shell._remote
        training = description["training"]
        if type(training) is not bool:
            raise malformed()
        shell.__dict__["training"] = remote.training = training
        unsaved = set()
        for word, kind in _KINDS.items():
            known, entries = {}, {}
            for name, handle, *persistent in description[word]:
                _check_name(name)
                held = None
                if handle is not None:
                    held = self.tensors.get(handle)
                    if held is None:
                        raise malformed("a parameter that does not exist")
                    # A check may put any tensor in a parameter's place, the child may not.
                    is_parameter = isinstance(held.tensor, nn.Parameter) or handle < 0
                    if word == "parameters" and not is_parameter:
                        raise malformed("a parameter that is none")
                known[name], entries[name] = held, held and held.tensor
                if persistent == [False]:
                    unsaved.add(name)
            remote.tracked[kind] = known
            shell.__dict__[kind].clear()
            shell.__dict__[kind].update(entries)
        shell.__dict__["_non_persistent_buffers_set"] = unsaved
        parts = {}
        for name, handle in description["children"]:
            _check_name(name)
            parts[name] = None if handle is None else self.shell(handle)
        shell._modules.clear()
        shell._modules.update(parts)
        remote.parts = {name: part for name, part in parts.items() if part is not None}


class Outgoing(NamedTuple):
    """What a request says of mirrors, the parameters among its inputs, and whose state it is."""

    fields: dict
    parameters: list[torch.Tensor]
    tracked: dict


class Tracked:
    """A tensor that both sides hold, and its state as the child knows it."""

    def __init__(self, mirrors, handle, tensor):
        self.mirrors, self.handle, self.tensor = mirrors, handle, tensor
        mirrors.tensors[handle] = mirrors.by_id[id(tensor)] = self
        self.remember()

    def __del__(self):
        self.mirrors.client.released.add(self.handle)

    def remember(self):
        tensor = self.tensor
        self.numbers, self.requires_grad = tensor.detach().clone(), tensor.requires_grad
        grad = leaf_grad(tensor)
        self.grad = None if grad is None else grad.clone()

    def difference(self, packer, grads, is_new):
        """What to tell the child, and note it as told; None if it knows everything."""
        tensor = self.tensor
        if not is_plain(tensor):
            raise CannotTravel("a parameter of an answer has become what cannot be sent")
        entry = {"id": self.handle, "requires_grad": tensor.requires_grad}
        changed = is_new or self.requires_grad != tensor.requires_grad
        if is_new or not same_bytes(tensor, self.numbers):
            entry["data"], changed = packer.numbers(tensor), True
            entry["parameter"] = isinstance(tensor, nn.Parameter)
        grad = leaf_grad(tensor)
        if grads and not same_grad(grad, self.grad):
            entry["grad"] = None if grad is None else packer.numbers(grad)
            changed = True
        if not changed:
            return None
        known = self.grad
        self.remember()
        if "grad" not in entry:
            self.grad = known
        return entry


class RemoteModule:
    """Where the module of a mirror is, and what the child knows of it."""

    def __init__(self, client, handle):
        self.client, self.handle = client, handle
        self.tracked, self.parts, self.training = {}, {}, True
        self.origin = None

    def __del__(self):
        self.client.released.add(self.handle)

    def ask(self, shell, verb, *args, kwargs=None, grads=True, **fields):
        return self.client.ask(
            verb, args, kwargs, [shell], None, grads, target=self.handle, **fields
        )


class Shell(nn.Module):
    """A module whose parameters are here and whose code is in the child."""

    _apply = nn.Module._apply  # recurrent layers have one that is about a GPU's memory
    _is_replica = False  # what zero_grad looks for

    def forward(self, *args, **kwargs):
        for part in self.modules():
            hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
            if part is not self and any(hooks):
                raise CannotTravel("a hook on a part of an answer's module would never be called")
        return self._remote.ask(self, "call", *args, kwargs=kwargs, grads=False)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name == "_remote":
                raise
        return self._remote.ask(self, "attribute", name=name)

    def __setattr__(self, name, value):
        kinds = (nn.Parameter, nn.Module)
        registered = any(
            name in self.__dict__[kind] for kind in ("_parameters", "_buffers", "_modules")
        )
        if isinstance(value, kinds) or registered or name in self.__dict__:
            super().__setattr__(name, value)
        else:
            self._remote.ask(self, "assign", value, name=name)

    def extra_repr(self):
        text = self._remote.ask(self, "method", name="extra_repr")
        return text if type(text) is str else ""

    def __copy__(self):
        return self._remote.ask(self, "method", name="copy")

    def __deepcopy__(self, memo):
        return self._remote.ask(self, "method", name="deepcopy")

    def __reduce_ex__(self, protocol):
        raise TypeError("an answer cannot be pickled")


def _new_shell(client, handle, kind):
    module, qualname = kind
    if type(module) is not str or type(qualname) is not str:
        raise malformed()
    shell = object.__new__(_shell_class(module, qualname))
    nn.Module.__init__(shell)
    shell.__dict__["_remote"] = RemoteModule(client, handle)
    return shell


@functools.lru_cache(1000)
def _shell_class(module, qualname):
    """A class that is also torch's or mmlearn's own, where the module in the child is of that."""
    known = None
    if module.startswith(("torch.nn.modules.", "mmlearn.")):
        known = vars(sys.modules.get(module, nn.modules)).get(qualname)
    is_module = isinstance(known, type) and issubclass(known, nn.Module)
    if known is nn.Module or (is_module and issubclass(known, LazyModuleMixin)):
        is_module = False  # a lazy one would ask for shapes that it never gets to see
    bases = (Shell, known) if is_module else (Shell,)
    name = qualname.split(".")[-1]
    if not name.isidentifier() or len(name) > LONGEST_NAME:
        raise malformed()
    return type(name, bases, {"__module__": module[:LONGEST_NAME]})


def _reach(shells):
    """The mirrors and all parts of theirs that are mirrors, each once."""
    seen, waiting = set(), list(shells)
    while waiting:
        module = waiting.pop(0)
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, Shell):
            yield module
        waiting.extend(part for part in module._modules.values() if part is not None)


def _check_handle(handle):
    if type(handle) is not int or not 0 < handle < 2**53:
        raise malformed()


def _check_name(name):
    if type(name) is not str or not 0 < len(name) <= LONGEST_NAME or "." in name:
        raise malformed("a parameter without a proper name")


def _check_size(shells):
    """Torch's own walks through a module must end: no cycles, no parts shared a million times."""
    sizes = {}

    def size(shell, depth):
        if id(shell) in sizes:
            known = sizes[id(shell)]
            if known is None:
                raise malformed("a module that contains itself")
            return known
        if depth > DEEPEST:
            raise malformed("a module of too many parts")
        sizes[id(shell)] = None
        parts = [part for part in shell._modules.values() if part is not None]
        total = 1 + len(shell._parameters) + len(shell._buffers)
        total += sum(size(part, depth + 1) for part in parts)
        if total > MOST_PARTS:
            raise malformed("a module of too many parts")
        sizes[id(shell)] = total
        return total

    for shell in list(shells):
        size(shell, 0)
