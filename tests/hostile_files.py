"""Writes checkpoints that mean harm; `python -m tests.hostile_files FOLDER SEED COUNT` reads COUNT random ones there.

The programs are random values, built from every operation and every name that models/pickled.py knows, and from some
of torch's, numpy's and Python's that it does not; some are damaged once more.
"""

import io
import pickletools
import random
import struct
import sys
import zipfile
from pathlib import Path

from errors import UserError
from models.checkpoints import find_weights, read_checkpoint
from models.pickled import DTYPES, MAKERS, OPERATIONS, STORAGES

STORED = bytes(range(64))
OTHER_NAMES = (
    "torch.Tensor",
    "torch._utils._rebuild_wrapper_subclass",
    "torch._utils._rebuild_device_tensor_from_numpy",
    "torch.storage._load_from_bytes",
    "numpy.ndarray",
    "builtins.bytearray",
    "builtins.eval",
    "posix.system",
)
NAMES = (*MAKERS, *OTHER_NAMES, *DTYPES, *(f"torch.{name}" for name in STORAGES), "torch.storage.UntypedStorage")
NUMBERS = (0, 1, 2, 3, 4, 8, 16, 63, 64, 65, 2**31 - 1, -1, -(2**31))
TEXTS = (
    "0",
    "1",
    "storage",
    "cpu",
    "latin1",
    "hex",
    "model",
    "weight",
    "f8",
    "O8",
    "<",
    "",
    "__class__",
    "__setstate__",
)


def text(value: str) -> bytes:
    """A string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """A whole number of 32 bits."""
    return b"J" + struct.pack("<i", value)


def name(value: str) -> bytes:
    """The name of a class or function."""
    module, _, last = value.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def several(*parts: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


def call(what: str, *arguments: bytes) -> bytes:
    """What `what(*arguments)` would construct."""
    return name(what) + several(*arguments) + b"R"


def storage(kind: str = "torch.FloatStorage", key: str = "0", count: int = 16, legacy: bool = False) -> bytes:
    """The persistent id of a storage."""
    last = [b"N"] if legacy else []
    return several(text("storage"), name(kind), text(key), text("cpu"), number(count), *last) + b"Q"


def tensor(stored: bytes, size=(4, 4), stride=(4, 1), offset: int = 0, kind: str = "_rebuild_tensor_v2") -> bytes:
    """A dense tensor on a storage."""
    shape = [several(*map(number, numbers)) for numbers in (size, stride)]
    return call(f"torch._utils.{kind}", stored, number(offset), *shape, b"\x89", b"N")


def archive(program: bytes, stored: bytes = STORED, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file as torch >= 1.6 writes it, with the storage "0"."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        file.writestr("archive/data/0", stored)
    return content.getvalue()


def stream(program: bytes, stored: bytes = STORED, count: int = 16) -> bytes:
    """A file as torch < 1.6 wrote it, with the storage "0"."""
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    protocol, system = b"\x80\x02M\xe9\x03.", b"\x80\x02}" + text("little_endian") + b"\x88s."
    keys = b"\x80\x02]" + text("0") + b"a."
    return magic + protocol + system + b"\x80\x02" + program + b"." + keys + struct.pack("<q", count) + stored


#: Calls that make something.
SOUND = (
    call("collections.OrderedDict"),
    call("builtins.set", b"](" + number(1) + number(2) + b"e"),
    call("torch.Size", several(number(1))),
    call("torch.device", text("cpu")),
    call("_codecs.encode", text("abc"), text("latin1")),
    call(
        "numpy.core.multiarray.scalar",
        call("numpy.dtype", text("i4")),
        call("_codecs.encode", text("abcd"), text("latin1")),
    ),
    name("argparse.Namespace") + b")\x81}" + text("lr") + number(1) + b"sb",
    name("some.Class") + b")\x81}" + text("lr") + number(1) + b"sb",
)
CODES = bytes(ord(opcode.code) for opcode in pickletools.opcodes if opcode.name in OPERATIONS)


class Writer:
    """Random programs: values in values, of which a part (`wild`, 0 to 1) is not as torch writes it."""

    def __init__(self, draw: random.Random, legacy: bool):
        self.draw, self.legacy, self.wild = draw, legacy, draw.choice((0.0, 0.02, 0.1, 0.5))

    def is_wild(self) -> bool:
        return self.draw.random() < self.wild

    def value(self, depth: int = 0) -> bytes:
        """Any value."""
        if self.is_wild():
            return self.draw.choice((self.call, self.build, self.memo, self.noise))(depth + 1)
        kinds = (self.literal, self.sound, self.tensor) if depth > 4 else (self.sound, self.tensor, self.container)
        return self.draw.choice(kinds)(depth + 1)

    def values(self, depth: int) -> list[bytes]:
        return [self.value(depth) for _ in range(self.draw.randrange(5))] if depth < 8 else []

    def literal(self, depth: int) -> bytes:
        draw = self.draw
        choices = (number(draw.choice(NUMBERS)), text(draw.choice(TEXTS)), name(draw.choice(NAMES)))
        return draw.choice((*choices, b"N", b"\x88", b")", b"]", b"}", b"\x8f", b"G" + draw.randbytes(8)))

    def sound(self, depth: int) -> bytes:
        return self.draw.choice(SOUND)

    def tensor(self, depth: int) -> bytes:
        draw = self.draw
        size, stride = (draw.choices(NUMBERS, k=2) if self.is_wild() else usual for usual in ((4, 4), (4, 1)))
        offset = draw.choice(NUMBERS) if self.is_wild() else 0
        kind = draw.choice(("_rebuild_tensor", "_rebuild_tensor_v2"))
        stored = (draw.choice(NAMES), draw.choice(TEXTS), draw.choice(NUMBERS)) if self.is_wild() else ()
        return tensor(storage(*stored, legacy=self.legacy), size, stride, offset, kind)

    def container(self, depth: int) -> bytes:
        values = self.values(depth)
        pairs = b"".join(text(self.draw.choice(TEXTS)) + value for value in values)
        choices = (several(*values), b"](" + b"".join(values) + b"e", b"}(" + pairs + b"u")
        if self.is_wild():
            choices = (b"}(" + b"".join(values) + b"u", b"\x8f(" + b"".join(values) + b"\x90")
        return self.draw.choice(choices)

    def call(self, depth: int) -> bytes:
        made = call(self.draw.choice(NAMES), *self.values(depth))
        return made[:-1] + self.draw.choice((b"R", b"\x81"))

    def build(self, depth: int) -> bytes:
        return self.draw.choice(SOUND) + b"".join(self.values(depth)) + b"b"

    def memo(self, depth: int) -> bytes:
        slot = bytes([self.draw.randrange(4)])
        return self.draw.choice((b"h" + slot, self.draw.choice(SOUND) + b"q" + slot))

    def noise(self, depth: int) -> bytes:
        return bytes(self.draw.choices(CODES, k=self.draw.randrange(1, 4)))

    def file(self) -> bytes:
        """A whole file: a dictionary with random values, now and then damaged."""
        program = b"}(" + b"".join(text(f"entry {number}") + self.value() for number in range(3)) + b"u"
        if self.is_wild():
            where = self.draw.randrange(len(program))
            program = program[:where] + self.draw.randbytes(1) + program[where + self.draw.randrange(3) :]
        return stream(program) if self.legacy else archive(program)


def main(folder: str, seed: int, count: int) -> None:
    """Read `count` random files; prints how many were read and how many refused."""
    draw, read, refused = random.Random(seed), 0, 0
    path = Path(folder) / "hostile.pth"
    for number in range(count):
        path.write_bytes(Writer(draw, legacy=number % 2 == 1).file())
        try:
            assert isinstance(read_checkpoint(path), dict)
            read += 1
            find_weights(read_checkpoint(path), "file")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
    print(read, refused)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
