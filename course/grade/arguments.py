"""What a check passes to an answer, packed for the journey.

Everything that a call could change in place gets a number, in the order in which the child meets
it again; a second mention points at the first. Objects of torch, mmlearn and the standard library
go as a pickle, which only ever travels from here to there; tensors and proxies inside it travel
beside it.
"""

import io
import pickle
import sys
import types

import numpy as np
import torch
from torch import nn

from course.grade.inside.values import (
    ARRAYS,
    CannotTravel,
    Packer,
    is_plain,
)

_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
_KNOWN = frozenset({"torch", "mmlearn", "numpy", *sys.stdlib_module_names}) - {"__main__"}


class ArgumentPacker(Packer):
    """Packs the arguments of one call; `given` are those that it may change, by number."""

    def __init__(self, client):
        super().__init__()
        self.client = client
        self.given, self.numbers_by_id, self.alive = [], {}, []
        self.inputs = []  # tensors that gradients may be asked for
        self.shells, self.tracked = {}, {}  # the state that both sides must agree on

    def involve(self, things):
        for thing in things:
            (self.shells if isinstance(thing, nn.Module) else self.tracked)[id(thing)] = thing

    def compound(self, value, kind, depth):
        number = self.numbers_by_id.get(id(value))
        if number is not None:
            return {"given": number}
        if kind in _VIEWS:
            value, kind = list(value), list
        if kind in (list, dict, set) or kind.__name__ == "defaultdict":
            self.number(value)
        return super().compound(value, kind, depth)

    def number(self, value):
        self.numbers_by_id[id(value)] = len(self.given)
        self.given.append(value)

    def tensor(self, value, depth):
        if (tracked := self.client.mirrors.tracked_of(value)) is not None:
            self.involve([tracked])
            return {"object": tracked.handle}
        if not is_plain(value):
            return self.other(value, depth)
        self.number(value)
        needs, grad = False, None
        if value.requires_grad:
            needs = "leaf" if value.is_leaf else "computed"
            self.inputs.append(value)
        if value.is_leaf and value.grad is not None and is_plain(value.grad):
            grad = self.numbers(value.grad)
        is_parameter = type(value) is nn.Parameter
        return {"input": [self._as_it_lies(value), needs, is_parameter, grad]}

    def _as_it_lies(self, tensor):
        """A tensor with gaps or repeated entries arrives as one, so `view` fails there as here."""
        sizes, strides = tensor.shape, tensor.stride()
        if tensor.is_contiguous() or not tensor.numel() or tensor.is_conj() or tensor.is_neg():
            return self.numbers(tensor)
        span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides))
        if span > 4 * tensor.numel() + 1024:
            return self.numbers(tensor)
        flat = tensor.detach().as_strided((span,), (1,))
        return {"strided": [self.numbers(flat), list(sizes), list(strides)]}

    def numpy(self, value, kind, depth):
        if kind is np.ndarray and value.dtype.name in ARRAYS and value.dtype.isnative:
            self.number(value)
        return super().numpy(value, kind, depth)

    def other(self, value, depth):
        remote = getattr(value, "__dict__", {}).get("_remote")
        if remote is not None and remote.client is self.client:
            if isinstance(value, nn.Module):
                self.involve([value])
            return {"object": remote.handle}
        if type(value) is torch.Generator:
            self.number(value)
            state = self.numbers(value.get_state())
            value.manual_seed(torch.randint(2**62, (), generator=value).item())
            return {"generator": state}
        file, parts = io.BytesIO(), []
        pickler = _Pickler(file, self, parts, depth)
        try:
            pickler.dump(value)
        except CannotTravel:
            raise
        except Exception as error:
            raise CannotTravel(f"a {type(value).__name__} cannot be passed to an answer") from error
        if isinstance(value, nn.Module):
            self.number(value)
        self.alive.append(value)
        return {"pickle": [self.bytes(file.getvalue()), parts]}


class _Pickler(pickle.Pickler):
    def __init__(self, file, packer, parts, depth):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.packer, self.parts, self.depth = packer, parts, depth

    def persistent_id(self, value):
        is_remote = getattr(value, "__dict__", {}).get("_remote") is not None
        if is_remote or (isinstance(value, torch.Tensor) and is_plain(value)):
            self.parts.append(self.packer.pack(value, self.depth))
            return len(self.parts) - 1
        return None

    def reducer_override(self, value):
        if isinstance(value, (types.FunctionType, type)):
            home = str(value.__module__)
            found = sys.modules.get(home)
            for name in value.__qualname__.split("."):
                found = getattr(found, name, None)
            if home.split(".")[0] not in _KNOWN or found is not value:
                raise CannotTravel(
                    f"{value.__qualname__} is defined in the check, so it cannot be passed to an "
                    "answer: it exists only in the grader's process"
                )
        return NotImplemented
