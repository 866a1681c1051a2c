"""Pickle programs of torch's files, read as data: an interpreter that knows tensors, numbers, text and containers.

No name in a program is ever looked up, so nothing of Python's, torch's or numpy's can be called by a file: what a
program wants to construct is made here from checked arguments, or becomes an `Unknown`. Opcodes are those of Python's
`pickletools`.
"""

import argparse
import math
import pickletools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

#: More operations, values or levels than any file of weights has; Python's own recursion ends at 1,000 levels.
MOST_OPERATIONS, MOST_VALUES, DEEPEST = 5_000_000, 5_000_000, 50
#: Sizes and strides above this are damaged.
LARGEST = 2**40

#: torch's storage classes and dtypes.
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
#: numpy's numbers -> `struct`'s letters.
NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q"}
NUMBERS |= {f"u{size}": NUMBERS[f"i{size}"].upper() for size in (1, 2, 4, 8)}


#: Modules whose names in a file can only mean harm.
HARMFUL = {
    "builtins",
    "__builtin__",
    "importlib",
    "nt",
    "os",
    "posix",
    "runpy",
    "shutil",
    "socket",
    "subprocess",
    "sys",
}


class Unknown:
    """In the place of a class, a function or an object that is none of data: its name, and nothing to be called."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self):
        return f"<{self.name}>"


class NumpyType:
    """In the place of a `numpy.dtype`: the kind and size of a number, and the order of its bytes."""

    def __init__(self, code: object):
        self.code, self.order = code, "<"

    def read(self, content: object) -> bool | int | float | Unknown:
        """A numpy scalar's bytes -> a number of Python's."""
        if self.code not in NUMBERS:
            return Unknown("numpy.generic")
        content = content.encode("latin1") if isinstance(content, str) else content  # as Python 2 wrote it
        return struct.unpack(self.order + NUMBERS[self.code], content)[0]


@dataclass(frozen=True, eq=False)
class Storage:
    """The bytes of one or more tensors (N,), and their kind of number; None where the tensors say it themselves."""

    content: Tensor
    dtype: torch.dtype | None


def make_storage(kind: object, count: object) -> tuple[torch.dtype | None, int]:
    """What a program says of a storage -> (kind of number, bytes); raises `ValueError`."""
    name = kind.name.rpartition(".")[2] if isinstance(kind, Unknown) else None
    if name not in STORAGES and name != "UntypedStorage":
        raise ValueError(f"a storage of the kind {name or type(kind).__name__}")
    if type(count) is not int or not 0 <= count < LARGEST:
        raise ValueError("a storage without a size")
    dtype = STORAGES.get(name)
    return dtype, count * (dtype.itemsize if dtype else 1)


def _tensor(storage, offset, size, stride, *_) -> Tensor:
    return _tensor_of(storage, storage.dtype, offset, size, stride)


def _tensor_of_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, *_) -> Tensor:
    return _tensor_of(storage, dtype, offset, size, stride)


def _tensor_of(storage: object, dtype: object, offset: object, size: object, stride: object) -> Tensor:
    """A tensor that has no more numbers than its storage and reads none outside it."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without a storage")
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride) or len(size) > DEEPEST:
        raise ValueError("a tensor without a shape")
    if not all(type(number) is int and 0 <= number < LARGEST for number in (offset, *size, *stride)):
        raise ValueError("a tensor with a damaged shape")
    available = storage.content.numel() // dtype.itemsize
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if math.prod(size) > available or (0 not in size and last >= available):
        raise ValueError(f"a tensor of shape {size} where its storage has {available} numbers")
    return torch.empty(0, dtype=dtype).set_(
        storage.content.untyped_storage(), offset if math.prod(size) else 0, size, stride
    )


def _is_key(value: object) -> bool:
    """Whether a value can be a key: its hash takes no time, and comparing it with another is no risk."""
    plain = (str, int, float, bytes, type(None))
    return isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(part, plain) for part in value))


def _as_dict(pairs: Sequence = ()) -> dict:
    pairs = pairs.items() if isinstance(pairs, dict) else pairs
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 and _is_key(pair[0]) for pair in pairs):
        raise ValueError("a dictionary with keys of another kind")
    return dict(pairs)


def _as_set(values: Sequence = ()) -> set:
    if not all(map(_is_key, values)):
        raise ValueError("a set of another kind")
    return set(values)


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the protocols of Python 2."""
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError("bytes in another encoding")
    return text.encode("latin1")


def _call(what: object, arguments: object) -> object:
    """The value that a program constructs by a name and arguments: one of `MAKERS`', or an `Unknown` of this name.

    Raises `ValueError` where the name is no class's: a file that wants to call a function is not trusted in the rest.
    """
    if not isinstance(what, Unknown) or not isinstance(arguments, tuple):
        raise ValueError("a call of what is no function")
    if what.name in MAKERS:
        return MAKERS[what.name](*arguments)
    if what.name.split(".")[0] in HARMFUL or not what.name.rpartition(".")[2][:1].isupper():
        raise ValueError(f"it would call {what.name[:100]}, which no file of weights needs")
    return Unknown(what.name)


#: What the files of other codes hold in addition to weights, and this one does not need.
LEFT_OUT = (
    *(f"{module}.multiarray._reconstruct" for module in ("numpy.core", "numpy._core")),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"torch._utils._rebuild_{kind}" for kind in ("qtensor", "sparse_tensor", "meta_tensor_no_storage")),
    "builtins.getattr",
    "__builtin__.getattr",
    "collections.deque",
)

#: What programs may construct. The names are data: nothing is looked up by them.
MAKERS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.nn.parameter.Parameter": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, arguments, state: _call(function, arguments),
    "torch.Size": lambda size=(): size if isinstance(size, tuple) else (),
    "torch.device": lambda *parts: ":".join(map(str, parts[:2])) if all(map(_is_key, parts)) else "cpu",
    "collections.OrderedDict": _as_dict,
    "collections.Counter": _as_dict,
    "collections.defaultdict": lambda factory=None, *_: {},
    "_codecs.encode": _encode,
    **dict.fromkeys(("builtins.bytes", "__builtin__.bytes"), lambda: b""),
    **dict.fromkeys(("builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset"), _as_set),
    "argparse.Namespace": argparse.Namespace,
    **dict.fromkeys(("copyreg._reconstructor", "copy_reg._reconstructor"), lambda kind, *_: _call(kind, ())),
    "numpy.dtype": lambda code, *_: NumpyType(code if isinstance(code, str) else None),
    **dict.fromkeys(
        ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
        lambda kind, content=b"": kind.read(content),
    ),
    # Left out, without harm to the rest.
    **{name: lambda *_, name=name: Unknown(name) for name in LEFT_OUT},
}


class Program:
    """One pickle program: `run` returns the value that it describes.

    `find_storage` is called with what the program says of a storage, as a tuple, and returns the `Storage`.
    """

    def __init__(self, find_storage: Callable[[tuple], object]):
        self.find_storage = find_storage
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self, file: BinaryIO | bytes) -> object:
        """Read to the end of the program. Raises `ValueError`, or what its parser raises, for a damaged one."""
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number > MOST_OPERATIONS:
                raise ValueError("more entries than any file of weights has")
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name not in OPERATIONS:
                raise ValueError(f"the pickle operation {opcode.name}, which torch does not write")
            OPERATIONS[opcode.name](self, argument)
        raise ValueError("a pickle without an end")

    def push(self, value: object) -> None:
        """Literals, and what the operations below make."""
        self.stack.append(value)

    def pop_to_mark(self) -> list:
        """The values since the last mark."""
        mark = self.marks.pop()
        values, self.stack[mark:] = self.stack[mark:], []
        return values

    def push_tuple(self, count: int) -> None:
        """The last values as a tuple."""
        values, self.stack[-count:] = tuple(self.stack[-count:]), []
        self.push(values)

    def push_global(self, module: object, name: object) -> None:
        """The name of a class or a function."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        name = f"{module}.{name}"
        self.push(DTYPES.get(name) or Unknown(name))

    def extend(self, values: list) -> None:
        """Append to the list on the stack; what cannot be known takes anything."""
        target = self.stack[-1]
        if type(target) is list:
            target.extend(values)
        elif type(target) is set:
            target |= _as_set(values)
        elif type(target) is not Unknown:
            raise ValueError(f"entries appended to a {type(target).__name__}")

    def set_items(self, values: list) -> None:
        """Keys and values in turn, into the dictionary on the stack."""
        target = self.stack[-1]
        if type(target) is dict:
            target |= _as_dict(list(zip(values[::2], values[1::2], strict=True)))
        elif type(target) is not Unknown:
            raise ValueError(f"items set in a {type(target).__name__}")

    def call(self) -> None:
        """Construct by name and arguments."""
        arguments = self.stack.pop()
        self.push(_call(self.stack.pop(), arguments))

    def build(self) -> None:
        """Give an object its state. A dictionary's own attributes are torch's `_metadata`, which loading needs not."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is argparse.Namespace:
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise ValueError("a Namespace without names")
            vars(target).update(state)
        elif type(target) is NumpyType:
            target.order = ">" if state[1] == ">" else "<"
        elif type(target) not in (dict, Unknown) and not isinstance(target, Tensor):
            raise ValueError(f"a state of a {type(target).__name__}")


#: The operations that torch's files consist of, protocols 2 to 5, by their names in `pickletools`.
OPERATIONS: dict[str, Callable[[Program, object], object]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda program, _: None),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING")
        + ("SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
        Program.push,
    ),
    "NONE": lambda program, _: program.push(None),
    "NEWTRUE": lambda program, _: program.push(True),
    "NEWFALSE": lambda program, _: program.push(False),
    "EMPTY_TUPLE": lambda program, _: program.push(()),
    "EMPTY_LIST": lambda program, _: program.push([]),
    "EMPTY_DICT": lambda program, _: program.push({}),
    "EMPTY_SET": lambda program, _: program.push(set()),
    "MARK": lambda program, _: program.marks.append(len(program.stack)),
    "TUPLE": lambda program, _: program.push(tuple(program.pop_to_mark())),
    "TUPLE1": lambda program, _: program.push_tuple(1),
    "TUPLE2": lambda program, _: program.push_tuple(2),
    "TUPLE3": lambda program, _: program.push_tuple(3),
    "FROZENSET": lambda program, _: program.push(_as_set(program.pop_to_mark())),
    "APPEND": lambda program, _: program.extend([program.stack.pop()]),
    "APPENDS": lambda program, _: program.extend(program.pop_to_mark()),
    "ADDITEMS": lambda program, _: program.extend(program.pop_to_mark()),
    "SETITEM": lambda program, _: program.set_items([program.stack.pop(-2), program.stack.pop()]),
    "SETITEMS": lambda program, _: program.set_items(program.pop_to_mark()),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda program, slot: program.push(program.memo[slot])),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda program, slot: program.memo.update({slot: program.stack[-1]})),
    "MEMOIZE": lambda program, _: program.memo.update({len(program.memo): program.stack[-1]}),
    "GLOBAL": lambda program, names: program.push_global(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda program, _: program.push_global(program.stack.pop(-2), program.stack.pop()),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda program, _: program.call()),
    "BUILD": lambda program, _: program.build(),
    "BINPERSID": lambda program, _: program.push(program.find_storage(program.stack.pop())),
}


def check_size(value: object) -> None:
    """Raise `ValueError` where what a program made is a cycle, or larger in sight than any file of weights is: lists
    that hold each other many times over are small in memory, and never end for who looks through them."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, list | tuple | set):
            inner = value
        elif isinstance(value, argparse.Namespace):
            inner = vars(value).values()
        else:
            continue
        seen += len(inner)
        if seen > MOST_VALUES or depth > DEEPEST:
            raise ValueError("entries in each other, deeper or more often than in any file of weights")
        waiting.extend((part, depth + 1) for part in inner)
