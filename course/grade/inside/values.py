"""Values on the wire: plain JSON for what JSON has, one tag for everything else.

None, booleans, short text, small whole numbers and finite floats are themselves, a list is a list.
All else is an object with one key, its tag: `{"tuple": [1, 2]}`, `{"float": "nan"}`,
`{"tensor": ["float32", [2, 3], [offset, length]]}`. Raw bytes lie in the frame's body, each byte
claimed by one value only.

Only exact types travel. A subclass could say anything about itself, so it stays where it is, and a
`Packer` decides what stands for it. An `Unpacker` believes nothing: sizes, shapes, types, nesting
and the number of values are checked before anything is allocated.
"""

import collections
import ctypes
import functools
import keyword
import math
import re

import torch
from torch import nn

from .wire import malformed

DEEPEST = 32
MOST_NODES = 200_000
MOST_ODD_KEYS = 1000  # that are neither text nor small whole numbers
LARGEST_INT = 2**1024
LONGEST_INLINE = 256  # characters of text in a header
DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float32 float64 float16 bfloat16 complex64 complex128 "
        "int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool"
    ).split()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ARRAYS = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
    "float16 float32 float64 complex64 complex128"
).split()
_SEQUENCES = {tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "size"}
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
_MAPPINGS = {
    dict: "dict",
    collections.OrderedDict: "ordered",
    collections.defaultdict: "dict",
    collections.Counter: "counter",
}
_NAMED = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,49}")
_same_memory = ctypes.CDLL(None).memcmp
_same_memory.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class CannotTravel(TypeError):
    """A value is too deep, too large, or of a kind that only exists in its own process."""


class Packer:
    """Turns values into JSON and buffers. `other` decides about all that is not plain data."""

    def __init__(self):
        self.buffers, self.offset, self.nodes = [], 0, 0

    def pack(self, value, depth=0):
        kind = type(value)
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise CannotTravel(f"a value has more than {MOST_NODES:,} parts")
        if value is None or kind is bool:
            return value
        if kind is int:
            if -(2**53) < value < 2**53:
                return value
            if abs(value) < LARGEST_INT:
                return {"int": hex(value)}
            raise CannotTravel("a whole number has more than 1,024 bits")
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind is str:
            if len(value) <= LONGEST_INLINE:
                return value
            return {"str": self.bytes(value.encode("utf-8", "surrogatepass"))}
        if depth > DEEPEST:
            raise CannotTravel(f"a value is nested more than {DEEPEST} deep")
        return self.compound(value, kind, depth + 1)

    def compound(self, value, kind, depth):
        if kind is list:
            return [self.pack(item, depth) for item in value]
        if kind in _SEQUENCES:
            return {_SEQUENCES[kind]: [self.pack(item, depth) for item in tuple(value)]}
        if kind in _MAPPINGS:
            return {_MAPPINGS[kind]: self.pairs(value, depth)}
        if kind is torch.Tensor or kind is nn.Parameter:
            return self.tensor(value, depth)
        if kind is bytes:
            return {"bytes": self.bytes(value)}
        if kind is complex:
            return {"complex": [self.pack(value.real), self.pack(value.imag)]}
        if kind is range:
            return {"range": [self.pack(n) for n in (value.start, value.stop, value.step)]}
        if kind is collections.deque:
            return {"deque": [[self.pack(item, depth) for item in value], value.maxlen]}
        if kind is torch.dtype and value in NAMES:
            return {"dtype": NAMES[value]}
        if kind is torch.device:
            return {"device": str(value)}
        if kind in _VIEWS:
            return [self.pack(item, depth) for item in tuple(value)]
        if kind.__module__ == "numpy":
            return self.numpy(value, kind, depth)
        if issubclass(kind, tuple) and (fields := fields_of(kind)):
            items = [self.pack(tuple.__getitem__(value, n), depth) for n in range(len(fields))]
            return {"named": [kind.__name__, list(fields), items]}
        return self.other(value, depth)

    def pairs(self, mapping, depth):
        items = list(mapping.items())
        return [[self.pack(key, depth), self.pack(value, depth)] for key, value in items]

    def bytes(self, data):
        place = [self.offset, len(data)]
        self.buffers.append(data)
        self.offset += len(data)
        return place

    def tensor(self, value, depth):
        if not is_plain(value):
            return self.other(value, depth)
        return {"tensor": self.numbers(value)}

    def numbers(self, tensor):
        """Describe a plain tensor; one whose axes were only permuted arrives permuted again."""
        tensor = tensor.detach().resolve_conj().resolve_neg()
        described = [NAMES[tensor.dtype], list(tensor.shape)]
        if tensor.is_contiguous():
            return [*described, self.bytes(raw(tensor))]
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])
        permuted = tensor.permute(order)
        if permuted.is_contiguous():
            return [*described, self.bytes(raw(permuted)), order]
        return [*described, self.bytes(raw(tensor.contiguous()))]

    def numpy(self, value, kind, depth):
        import numpy as np

        if kind is np.ndarray and value.dtype.name in ARRAYS and value.dtype.isnative:
            return {"array": [value.dtype.name, list(value.shape), self.bytes(value.tobytes())]}
        if issubclass(kind, np.generic) and value.dtype.name in ARRAYS:
            return {"scalar": [value.dtype.name, self.bytes(value.tobytes())]}
        return self.other(value, depth)

    def other(self, value, depth):
        raise CannotTravel(f"a {type(value).__name__} cannot be sent")


class Unpacker:
    """Turns JSON and a body back into values.

    Raises: Lost, or any other exception, for what a `Packer` never makes.
    """

    def __init__(self, body):
        self.body, self.claimed, self.nodes = body, 0, 0

    def unpack(self, value, depth=0):
        kind = type(value)
        self.nodes += 1
        if self.nodes > MOST_NODES or depth > DEEPEST + 1:
            raise malformed("a value of too many parts")
        if kind is list:
            return self.list(value, depth + 1)
        if kind is dict:
            if len(value) != 1:
                raise malformed()
            ((tag, content),) = value.items()
            reader = getattr(self, f"_{tag}", None) if tag in self.TAGS else None
            if reader is None:
                raise malformed()
            return reader(content, depth + 1)
        if kind is int and not -(2**53) < value < 2**53:
            raise malformed()
        return value

    TAGS = frozenset(
        "int float str bytes tuple set frozenset size dict ordered counter tensor complex range "
        "deque dtype device array scalar named".split()
    )

    def list(self, items, depth):
        return [self.unpack(item, depth) for item in items]

    def piece(self, place):
        """The bytes at [offset, length]; together the pieces are not longer than the body."""
        offset, length = place
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            raise malformed()
        self.claimed += length
        if offset + length > len(self.body) or self.claimed > len(self.body):
            raise malformed()
        return self.body[offset : offset + length]

    def numbers(self, described):
        """A new tensor from its description."""
        name, shape, place, *order = described
        dtype = DTYPES.get(_text(name))
        if dtype is None or len(order) > 1:
            raise malformed("a tensor of an unknown kind")
        count = _count(shape)
        piece = self.piece(place)
        if len(piece) != count * dtype.itemsize:
            raise malformed("a tensor that is not as large as it says")
        # A byte that is neither 0 nor 1 would be a truth value that compares unlike itself.
        is_bool = dtype is torch.bool
        flat = torch.empty(count, dtype=torch.uint8 if is_bool else dtype)
        if count:
            # The bytes may lie anywhere: numbers must not be read from there where they are.
            start = ctypes.addressof(ctypes.c_char.from_buffer(piece))
            ctypes.memmove(flat.data_ptr(), start, len(piece))
        if is_bool:
            flat = flat != 0
        if not order:
            return flat.view(shape)
        (order,) = order
        inverse = [order.index(axis) for axis in range(len(shape))]
        return flat.view([shape[axis] for axis in order]).permute(inverse)

    def _tensor(self, content, depth):
        return self.numbers(content)

    def _int(self, content, depth):
        number = int(content[:400], 16)
        if abs(number) >= LARGEST_INT:
            raise malformed()
        return number

    def _float(self, content, depth):
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[_text(content)]

    def _str(self, content, depth):
        return str(self.piece(content), "utf-8", "surrogatepass")

    def _bytes(self, content, depth):
        return bytes(self.piece(content))

    def _tuple(self, content, depth):
        return tuple(self._items(content, depth))

    def _set(self, content, depth):
        return set(_keys(self._items(content, depth)))

    def _frozenset(self, content, depth):
        return frozenset(_keys(self._items(content, depth)))

    def _size(self, content, depth):
        return torch.Size(self._items(content, depth))

    def _dict(self, content, depth):
        return dict(self._pairs(content, depth))

    def _ordered(self, content, depth):
        return collections.OrderedDict(self._pairs(content, depth))

    def _counter(self, content, depth):
        return collections.Counter(dict(self._pairs(content, depth)))

    def _complex(self, content, depth):
        real, imaginary = self._items(content, depth)
        return complex(real, imaginary)

    def _range(self, content, depth):
        return range(*self._items(content, depth))

    def _deque(self, content, depth):
        items, longest = content
        return collections.deque(self._items(items, depth), longest)

    def _dtype(self, content, depth):
        return DTYPES[_text(content)] if _text(content) in DTYPES else _refuse()

    def _device(self, content, depth):
        return torch.device(
            content if re.fullmatch(r"[a-z]{1,9}(:\d{1,3})?", content) else _refuse()
        )

    def _array(self, content, depth):
        import numpy as np

        name, shape, place = content
        piece, dtype = self.piece(place), np.dtype(name if name in ARRAYS else _refuse())
        if len(piece) != _count(shape) * dtype.itemsize:
            raise malformed("an array that is not as large as it says")
        if name == "bool":
            piece = (np.frombuffer(piece, np.uint8) != 0).tobytes()
        return np.frombuffer(piece, dtype).reshape(shape).copy()

    def _scalar(self, content, depth):
        name, place = content
        return self._array([name, [], place], depth)[()]

    def _named(self, content, depth):
        name, fields, items = content
        values = self._items(items, depth)
        if (
            type(fields) is not list
            or len(fields) > 32
            or not all(_NAMED.fullmatch(word) for word in (name, *fields))
        ):
            raise malformed()
        if len(set(fields)) != len(fields) or len(fields) != len(values):
            raise malformed()
        if any(keyword.iskeyword(word) for word in (name, *fields)):
            raise malformed()
        return _named_tuple(name, tuple(fields))(*values)

    def _items(self, content, depth):
        if type(content) is not list:
            raise malformed()
        return [self.unpack(item, depth) for item in content]

    def _pairs(self, content, depth):
        if type(content) is not list:
            raise malformed()
        pairs = [(self.unpack(key, depth), self.unpack(value, depth)) for key, value in content]
        _keys([key for key, _ in pairs])
        return pairs


@functools.lru_cache(1000)
def _named_tuple(name, fields):
    return collections.namedtuple(name, fields)


def _keys(keys):
    """Refuse keys of which thousands can be made with one hash: they would take hours to store."""
    odd = [key for key in keys if type(key) is not str]
    if sum(type(key) is not int or abs(key) >= 2**60 for key in odd) > MOST_ODD_KEYS:
        raise malformed("a value of too many parts")
    return keys


def _text(content):
    return content if type(content) is str else _refuse()


def _refuse():
    raise malformed()


def _count(shape):
    """The number of entries of a shape that is one."""
    if type(shape) is not list or len(shape) > 64:
        raise malformed("a tensor without a shape")
    if any(type(size) is not int or size < 0 for size in shape):
        raise malformed("a tensor of an impossible shape")
    # Along the other axes of an empty tensor a check could make a full one.
    if math.prod(max(size, 1) for size in shape) >= 2**31:
        raise malformed("a tensor of an impossible shape")
    return math.prod(shape)


def fields_of(kind):
    """The names of a named tuple's places, also of what `tensor.max(dim=0)` returns."""
    fields = kind.__dict__.get("_fields")
    if kind.__module__ == "torch.return_types":
        fields = tuple(name for name in ("values", "indices") if hasattr(kind, name))
        fields = fields if len(fields) == kind.n_sequence_fields else ()
    if type(fields) is not tuple or not 0 < len(fields) <= 32:
        return ()
    names = (kind.__name__, *fields)
    return fields if all(type(n) is str and _NAMED.fullmatch(n) for n in names) else ()


def is_plain(tensor):
    """True for a dense tensor of known numbers on the CPU, and of no subclass."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in NAMES
    )


def raw(tensor):
    """The bytes of a contiguous tensor."""
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def same_bytes(one, other):
    """True if two plain tensors hold the same numbers bit for bit, not-a-numbers included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_contiguous() and other.is_contiguous():
        length = one.numel() * one.element_size()
        return not length or _same_memory(one.data_ptr(), other.data_ptr(), length) == 0
    return raw(one.detach().contiguous()) == raw(other.detach().contiguous())


def leaf_grad(tensor):
    """The gradient that a tensor holds; to ask one that is no leaf is a warning."""
    return tensor.grad if tensor.is_leaf else None


def same_grad(one, other):
    """True if two gradients, of which there may be none, are the same bit for bit."""
    if one is None or other is None:
        return one is other
    return same_bytes(one, other)
