"""An interpreter of pickles that can describe data and do nothing else.

A pickle is a program for a stack machine. Python's own machine imports what the program names,
calls it, and hashes whatever the program uses as a key. So a short file can run code, never end (a
key of nested tuples takes exponential time) or take all memory (one large index makes the table of
memoized objects that large). Here every instruction takes a bounded time and makes at most one
small object, and the number of instructions is limited.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any, NamedTuple

import torch

_MAX_STEPS = 1_000_000  # a checkpoint with the optimizer's state of every weight has some 100,000
_MAX_LINE = 4096  # characters of a line of text; long ones take more than linear time to read
_MAX_DIMENSIONS = 16
_MAX_BITS = 64


class Opaque:
    """An inert object in place of anything that is not plain data, such as objects and functions.

    Attributes:
        state: the attributes that the pickle gives an object, kept as plain data.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}


class Storage(NamedTuple):
    """The key of a record of values, and their type, which is None if we do not read it."""

    key: str
    dtype: torch.dtype | None


class StoredTensor(NamedTuple):
    """A tensor whose values are still in the file: its shape, and its place in a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Named(NamedTuple):
    """The name of a function or a class."""

    module: str
    name: str


_DICT = _Named("collections", "OrderedDict")
_TENSORS = {_Named("torch._utils", f"_rebuild_tensor{version}") for version in ("", "_v2")}
_PARAMETERS = {_Named("torch._utils", f"_rebuild_parameter{kind}") for kind in ("", "_with_state")}
_DTYPES = {
    _Named("torch", "DoubleStorage"): torch.float64,
    _Named("torch", "FloatStorage"): torch.float32,
    _Named("torch", "HalfStorage"): torch.float16,
    _Named("torch", "BFloat16Storage"): torch.bfloat16,
}
# Instructions that only push their argument.
_VALUES = {
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
    *("LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type[Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": Opaque,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(data: bytes) -> object:
    """Returns the data that a pickle describes.

    Returns:
        Dictionaries (entries whose key is not text are left out), lists, tuples, numbers, text,
        `StoredTensor`s, and an `Opaque` for everything else.

    Raises:
        ValueError, LookupError, TypeError, EOFError, OverflowError: the pickle is damaged, or has
            an instruction that `torch.save` never writes.
    """
    machine = _Machine()
    for step, (code, argument, _) in enumerate(pickletools.genops(_ShortLines(data))):
        if step >= _MAX_STEPS:
            raise ValueError(f"a pickle of more than {_MAX_STEPS:,} instructions")
        if code.name == "STOP":
            return machine.stack.pop()
        machine.run(code.name, argument)
    raise EOFError("a pickle without an end")


class _ShortLines(io.BytesIO):
    """Bytes that are read as short lines only; lines hold decimal numbers and names."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(_MAX_LINE + 1)
        if len(line) > _MAX_LINE:
            raise ValueError(f"a line of more than {_MAX_LINE} characters")
        return line


class _Machine:
    """The stack, the memoized objects, and what the instructions do to them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}  # in a dictionary a large index takes no memory

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def run(self, name: str, argument: Any) -> None:
        """Runs one instruction."""
        if name in _VALUES:
            value = _CONSTANTS.get(name, argument)
            # Python refuses to print very long numbers, and options and shapes have none.
            long = isinstance(value, int) and value.bit_length() > _MAX_BITS
            self.stack.append(Opaque() if long else value)
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            if len(self.stack) < count:
                raise IndexError("an empty stack")
            self.stack[-count:] = [tuple(self.stack[-count:])]
        elif name not in ("PROTO", "FRAME"):
            instruction = _INSTRUCTIONS.get(name)
            if instruction is None:
                raise ValueError(f"an instruction {name}, which torch.save does not write")
            instruction(self, argument)

    def mark(self, _: object) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def discard(self, _: object) -> None:
        # On an empty stack this instruction removes the mark below, as in Python's machine.
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def discard_to_mark(self, _: object) -> None:
        self.pop_mark()

    def duplicate(self, _: object) -> None:
        self.stack.append(self.stack[-1])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def make_tuple(self, _: object) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def make_list(self, _: object) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def make_dict(self, _: object) -> None:
        items = self.pop_mark()
        self.stack.append({})
        _add_entries(self.stack[-1], items)

    def make_opaque(self, _: object) -> None:
        self.pop_mark()
        self.stack.append(Opaque())

    def append(self, _: object) -> None:
        item = self.stack.pop()
        if isinstance(self.stack[-1], list):
            self.stack[-1].append(item)

    def extend(self, _: object) -> None:
        items = self.pop_mark()
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def set_entry(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _add_entries(self.stack[-1], [key, value])

    def set_entries(self, _: object) -> None:
        items = self.pop_mark()
        _add_entries(self.stack[-1], items)

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_Named(module, name))

    def name_on_stack(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a name that is no text")
        self.stack.append(_Named(module, name))

    def call(self, _: object) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_called(function, arguments))

    def call_with_options(self, _: object) -> None:
        del self.stack[-3:]
        self.stack.append(Opaque())

    def build(self, _: object) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, Opaque) and isinstance(state, dict):
            instance.state = state

    def reference(self, _: object) -> None:
        match self.stack.pop():
            case ("storage", kind, str(key), _, _):
                dtype = _DTYPES.get(kind) if isinstance(kind, _Named) else None
                self.stack.append(Storage(key, dtype))
            case _:
                raise ValueError("a reference that is no storage")


_INSTRUCTIONS: dict[str, Any] = {
    "MARK": _Machine.mark,
    "POP": _Machine.discard,
    "POP_MARK": _Machine.discard_to_mark,
    "DUP": _Machine.duplicate,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": _Machine.memoize,
    "TUPLE": _Machine.make_tuple,
    "LIST": _Machine.make_list,
    "DICT": _Machine.make_dict,
    "FROZENSET": _Machine.make_opaque,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "ADDITEMS": _Machine.discard_to_mark,
    "SETITEM": _Machine.set_entry,
    "SETITEMS": _Machine.set_entries,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_on_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.call_with_options,
    "INST": _Machine.make_opaque,
    "OBJ": _Machine.make_opaque,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.reference,
}


def _add_entries(target: object, items: list[Any]) -> None:
    """Adds keys and values to a dictionary. Keys must be text: other keys may take long to hash."""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str):
                target[key] = value


def _called(function: object, arguments: object) -> object:
    """Returns the tensor or the dictionary that a call would make, or an `Opaque`."""
    if not isinstance(function, _Named) or not isinstance(arguments, tuple):
        return Opaque()
    if function == _DICT:
        return {}  # later instructions add its entries
    if function in _PARAMETERS and arguments:
        return arguments[0]
    if function in _TENSORS:
        if len(arguments) < 4 or not isinstance(arguments[0], Storage):
            raise TypeError("a tensor without storage")
        (offset,) = _counts((arguments[1],))
        return StoredTensor(arguments[0], offset, _counts(arguments[2]), _counts(arguments[3]))
    return Opaque()


def _counts(value: object) -> tuple[int, ...]:
    """Returns a shape, strides or an offset, whose numbers must be ints, not bools."""
    if (
        not isinstance(value, tuple)
        or len(value) > _MAX_DIMENSIONS
        or any(type(n) is not int or not 0 <= n < 2**63 for n in value)
    ):
        raise TypeError("a tensor without a proper shape, stride or offset")
    return value
