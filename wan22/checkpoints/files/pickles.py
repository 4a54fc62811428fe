"""The pickles in PyTorch's files, read as data: which tensors they describe; no object of any class is made.

Unpickling calls what the file names: even PyTorch's own table of allowed calls has constructors that allocate
whatever a file asks for. Here a few of the opcodes are followed, those that a table of tensors is written
with, and everything else is refused.
"""

import math
import mmap
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from ...checks import cut, shown

# Bytes of a number in a storage, by the class that the pickle names.
_STORAGES = {
    **{"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2},
    **{"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1},
    **{"BoolStorage": 1, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16, "UntypedStorage": 1},
}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_LITERALS = {"BINUNICODE", "BINSTRING", "SHORT_BINSTRING"} | _NUMBERS
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NEWEST = 5  # of pickle's protocols
_LONGEST = 2**26  # bytes from a file's start to a pickle's end; released checkpoints have 0.2 MB


class NotPlainError(ValueError):
    """A pickle that holds more than tables, numbers, texts and ordinary tensors."""


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return cut(f"{self.module}.{self.name}")


@dataclass(frozen=True)
class Storage:
    """Numbers in a row, in a record of the file."""

    key: str
    nbytes: int
    itemsize: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage: where its numbers are, counted in numbers of `itemsize` bytes."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    itemsize: int

    @property
    def repeated_bytes(self) -> int:
        """Bytes of the tensor if it names numbers several times, as an expanded one does; else 0."""
        return math.prod(self.size) * self.itemsize if math.prod(self.size) > self._span else 0

    @property
    def _span(self) -> int:
        steps = (step * (count - 1) for count, step in zip(self.size, self.stride, strict=True))
        return 0 if 0 in self.size else 1 + sum(steps)

    def check(self) -> None:
        """Refuse a view of numbers that are not in the storage."""
        numbers = (self.offset, *self.size, *self.stride)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"a tensor lies at {shown(numbers)}, which are no sizes")
        if len(self.size) != len(self.stride):
            raise ValueError(f"a tensor has {len(self.size)} axes and {len(self.stride)} strides")
        if self._span and (self.offset + self._span) * self.itemsize > self.storage.nbytes:
            where = f"shape {shown(self.size)} and strides {shown(self.stride)}"
            raise ValueError(f"a tensor of {where} reaches beyond its {self.storage.nbytes} bytes")


@dataclass(frozen=True)
class Pickle:
    """What a pickle holds, and all storages that it names, in the largest size that it gives each."""

    content: Any
    storages: Mapping[str, Storage]


def read_pickle(file: IO[bytes] | mmap.mmap) -> Pickle:
    """Return what the next pickle of a file holds; tensors and their storages are described, not read.

    Raises: NotPlainError: it holds anything else; what it names is not called. ValueError: it is damaged.
    """
    machine = _Machine()
    try:
        for opcode, argument, position in pickletools.genops(file):  # type: ignore[arg-type]
            if opcode.name == "STOP":
                return Pickle(machine.stack.pop(), machine.storages)
            if (position or 0) > _LONGEST:
                raise ValueError(f"its pickle has more than {_LONGEST} bytes")
            machine.follow(opcode.name, argument)
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__}: {cut(error)})") from error
    raise ValueError("its pickle has no end")


class _Machine:
    """Pickle's stack machine, as far as tables of tensors need it."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.storages: dict[str, Storage] = {}
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def follow(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(self._popped(len(self.stack) - _TUPLES[name])))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif name == "GLOBAL":
            self.stack.append(Global(*argument.split(" ", 1)))
        elif name == "MARK":
            self._marks.append(len(self.stack))
        elif name == "PROTO":
            if argument > _NEWEST:
                raise ValueError(f"its pickle is of protocol {argument}")
        elif name in _BUILDERS:
            _BUILDERS[name](self)
        else:
            raise NotPlainError(f"the opcode {name}")

    def _popped(self, start: int) -> list[Any]:
        """Return the values from here on, taken off the stack."""
        if start < (self._marks[-1] if self._marks else 0):
            raise IndexError("the stack has too few values")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _marked(self) -> list[Any]:
        start = self._marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _tuple(self) -> None:
        self.stack.append(tuple(self._marked()))

    def _append(self, values: list[Any]) -> None:
        _of(list, self.stack[-1]).extend(values)

    def _set(self, values: list[Any]) -> None:
        table = _of(dict, self.stack[-1])
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Tuples within tuples can take for ever to be hashed.
            table[key if isinstance(key, str | int) else shown(key)] = value

    def _build(self) -> None:
        # The attributes of an OrderedDict: a module's state_dict keeps its version there.
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise NotPlainError(f"attributes of a {type(self.stack[-1]).__name__}")

    def _reduce(self) -> None:
        called, arguments = self._popped(len(self.stack) - 2)
        if not isinstance(called, Global) or called not in _CALLS:
            raise NotPlainError(str(called) if isinstance(called, Global) else type(called).__name__)
        self.stack.append(_CALLS[called](*_of(tuple, arguments)))

    def _storage(self) -> None:
        kind, cls, key, _, count, *view = _of(tuple, self.stack.pop())
        if kind != "storage" or not isinstance(cls, Global) or view not in ([], [None]):
            raise ValueError("its pickle names a record that is no storage of numbers")
        if cls.name not in _STORAGES or cls.module not in ("torch", "torch.storage", "torch.cuda"):
            raise NotPlainError(str(cls))
        if type(count) is not int or count < 0 or not isinstance(key, str):
            raise ValueError(f"a storage has {shown(count)} numbers and the name {shown(key)}")
        storage = Storage(key, count * _STORAGES[cls.name], _STORAGES[cls.name])
        known = self.storages.setdefault(key, storage)
        self.storages[key] = max(known, storage, key=lambda storage: storage.nbytes)
        self.stack.append(storage)


_BUILDERS: dict[str, Callable[[_Machine], None]] = {
    "TUPLE": _Machine._tuple,
    "APPEND": lambda machine: machine._append([machine.stack.pop()]),
    "APPENDS": lambda machine: machine._append(machine._marked()),
    "SETITEM": lambda machine: machine._set(machine._popped(len(machine.stack) - 2)),
    "SETITEMS": lambda machine: machine._set(machine._marked()),
    "BUILD": _Machine._build,
    "REDUCE": _Machine._reduce,
    "BINPERSID": _Machine._storage,
}


def _of(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} stands where a {kind.__name__} is meant")
    return value


def _table(pairs: Any = ()) -> dict[str, Any]:
    return {_of(str, key): value for key, value in pairs}


def _view(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    itemsize = _of(Storage, storage).itemsize
    tensor = Tensor(storage, offset, _of(tuple, size), _of(tuple, stride), itemsize)
    tensor.check()
    return tensor


def _typed_view(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    kind = getattr(torch, _of(Global, dtype).name, None)
    if dtype.module != "torch" or not isinstance(kind, torch.dtype):
        raise NotPlainError(str(dtype))
    tensor = Tensor(_of(Storage, storage), offset, _of(tuple, size), _of(tuple, stride), kind.itemsize)
    tensor.check()
    return tensor


# Source: PyTorch torch/_utils.py.
_CALLS: dict[Any, Callable[..., Any]] = {
    Global("collections", "OrderedDict"): _table,
    Global("torch._utils", "_rebuild_tensor_v2"): _view,
    Global("torch._utils", "_rebuild_tensor_v3"): _typed_view,
    Global("torch._utils", "_rebuild_parameter"): lambda data, *_: _of(Tensor, data),
}
