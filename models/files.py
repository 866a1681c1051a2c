"""Files of weights: what is in them, as a dictionary of tensors, numbers and text. No code in a file is ever run."""

import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from importlib import import_module
from typing import BinaryIO

import torch

from errors import UserError, first_line
from models.pickled import Program, Storage, Unknown, check_size, make_storage

#: The first words of torch's files from before version 1.6.
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


#: Under this name an exported file that is no pickle holds its record: a `.pt2`, an ONNX file, a `.safetensors`.
RECORD = "record.json"
#: What other files begin with: (offset, bytes, what it is).
SIGNATURES = (
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"GIF8", "a GIF image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"\x89HDF", "an HDF5 file, of Keras or PyTables"),
    (0, b"\x93NUMPY", "a numpy array"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\x1f\x8b", "a gzip file; unpack it"),
    (257, b"ustar", "a tar archive; unpack it"),
    (0, b"version https://git-lfs", "a pointer of git-lfs and not the file; run git lfs pull"),
    (0, b"<!DOCTYPE", "a web page"),
    (0, b"<!doctype", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"{", "JSON text"),
    (0, b"\x08\x07\x12", "an ONNX file; name the checkpoint that it was exported from"),
    (0, b"\x08\x08\x12", "an ONNX file; name the checkpoint that it was exported from"),
    (0, b"\x08\x09\x12", "an ONNX file; name the checkpoint that it was exported from"),
    (0, b"\x08\x0a\x12", "an ONNX file; name the checkpoint that it was exported from"),
)


class DamagedFile(UserError):
    """A file that can be opened and is no whole checkpoint."""


def _where_from(path: str) -> str:
    """What makes a file that is not there: RepDistiller's teachers, known by their folder, are downloaded."""
    published = re.search(r"([^/]+)_vanilla/[^/]+$", path)
    if published is None:
        return "train_teacher.py makes such files"
    return f"python scripts/fetch.py cifar {published[1]} downloads RepDistiller's teacher to save/models/"


def read_checkpoint(path: str | os.PathLike, flag: str = "checkpoint") -> dict:
    """The dictionary in a checkpoint file, on the CPU; no code in the file is run.

    Reads the files of `torch.save`, old and new, and `.safetensors`. Raises `UserError`, naming `flag` and the file,
    for anything that is not a whole checkpoint: a `DamagedFile` where that is the file's fault and not the system's.
    """
    if os.path.isdir(path):
        raise UserError(f"{flag}: {path} is a folder; name a checkpoint file in it, for example {path}/last.pth")
    if not os.path.exists(path):
        raise UserError(f"{flag}: {path} does not exist; check the path ({_where_from(os.fspath(path))})")
    if not os.path.isfile(path):
        raise UserError(f"{flag}: {path} is not a file; name a checkpoint file")
    try:
        with open(path, "rb") as file:
            checkpoint = _read(file, os.fspath(path))
        check_size(checkpoint)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged program raises whatever its operations do: index, key, type, struct errors
        reason = first_line(error)
        raise DamagedFile(
            f"{flag}: {path} cannot be read as a checkpoint (damaged, cut off or not one): {reason}"
        ) from None
    if isinstance(checkpoint, Unknown):
        raise DamagedFile(f"{flag}: {path} holds a pickled {checkpoint.name}; save its state_dict() and name that file")
    if not isinstance(checkpoint, Mapping):
        raise DamagedFile(f"{flag}: {path} holds a {type(checkpoint).__name__}, not a dictionary of weights")
    return checkpoint


def _read(file: BinaryIO, path: str) -> object:
    start = file.read(512)
    file.seek(0)
    if path.lower().endswith(".safetensors") or start[8:10] == b'{"':  # the length of its header, and the header
        return _read_safetensors(path)
    for offset, signature, kind in SIGNATURES:
        if start[offset : offset + len(signature)] == signature:
            raise ValueError(f"it is {kind}")
    if not start:
        raise ValueError("it is empty")
    if path.lower().endswith(".onnx"):
        raise ValueError("it is an ONNX file; name the checkpoint that it was exported from")
    return _read_archive(file) if start[:2] == b"PK" else _read_stream(file)


def _read_safetensors(path: str) -> dict:
    try:
        safetensors = import_module("safetensors.torch")
    except ImportError:
        raise UserError(f"{path}: safetensors is not installed; pip install -r requirements-extras.txt") from None
    weights = safetensors.load_file(path)
    with import_module("safetensors").safe_open(path, "pt") as file:
        record = (file.metadata() or {}).get(RECORD)
    return weights if record is None else {"model": weights, "record": json.loads(record)}


def _read_archive(file: BinaryIO) -> object:
    """The zip archives of torch >= 1.6: a pickle, and a part for each storage, each with its CRC-32."""
    with zipfile.ZipFile(file) as archive:
        parts = {part.filename: part for part in archive.infolist()}
        size = file.seek(0, io.SEEK_END)
        if any(name.endswith("/constants.pkl") for name in parts):
            raise ValueError("it is a TorchScript file; save the state_dict() of the network that it was made from")
        if any(name.endswith(("/archive_format", "serialized_exported_program.json")) for name in parts):
            raise ValueError("it is a program of torch.export; name the checkpoint that it was exported from")
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts.values()):
            raise ValueError("it is a compressed archive, which torch.save never writes")
        if sum(part.file_size for part in archive.infolist()) > size:
            raise ValueError("its parts are larger than the file")
        root = next((name.removesuffix("data.pkl") for name in parts if name.endswith("/data.pkl")), None)
        if root is None:
            raise ValueError("it is an archive without a pickle in it")
        if f"{root}byteorder" in parts and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it was written on a machine with another order of bytes")
        storages: dict[str, Storage] = {}

        def find_storage(claim: tuple) -> Storage:
            _, kind, key, _, count = _checked_claim(claim)
            if key not in storages:
                part = parts[f"{root}data/{key}"]
                dtype, length = make_storage(kind, count)
                if part.file_size != length:
                    raise ValueError(f"storage {key} has {part.file_size} bytes instead of {length}")
                storages[key] = Storage(torch.empty(length, dtype=torch.uint8), dtype)
                with archive.open(part) as content:
                    _fill(storages[key], content)
            return storages[key]

        return Program(find_storage).run(archive.read(f"{root}data.pkl"))


def _read_stream(file: BinaryIO) -> object:
    """The files of torch < 1.6: three pickles of constants, one of content, the storages' names, and their bytes."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if _constant(file) != MAGIC or _constant(file) != PROTOCOL or not _constant(file).get("little_endian"):
        raise ValueError("it does not begin as torch's files do")
    storages: dict[str, Storage] = {}
    counts: dict[str, int] = {}
    claimed = 0

    def find_storage(claim: tuple) -> object:
        nonlocal claimed
        if isinstance(claim, tuple) and claim[0] == "module":  # a class, and its source
            return claim[1]
        _, kind, key, _, count, *view = _checked_claim(claim)
        if any(part is not None for part in view):
            raise ValueError("storages that are parts of others, as only the first versions of torch wrote")
        if key not in storages:
            dtype, length = make_storage(kind, count)
            claimed += length
            if claimed > size:
                raise ValueError("its storages are larger than the file")
            storages[key], counts[key] = Storage(torch.empty(length, dtype=torch.uint8), dtype), count
        return storages[key]

    checkpoint = Program(find_storage).run(file)
    keys = _constant(file)
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        raise ValueError("the storages are others than the ones that are named")
    for key in keys:
        if int.from_bytes(file.read(8), "little") != counts[key]:
            raise ValueError(f"storage {key} has another size")
        _fill(storages[key], file)
    return checkpoint


def _constant(file: BinaryIO) -> object:
    def refuse(claim: tuple):
        raise ValueError("a storage where none is")

    return Program(refuse).run(file)


def _checked_claim(claim: object) -> tuple:
    if not isinstance(claim, tuple) or len(claim) < 5 or claim[0] != "storage" or not isinstance(claim[2], str):
        raise ValueError("a storage without a name")
    return claim


def _fill(storage: Storage, content: BinaryIO) -> None:
    """Read a storage's bytes; a zip archive's part raises at its end where they differ from their CRC-32."""
    wanted = storage.content.numel()
    if content.readinto(storage.content.numpy()) != wanted:
        raise ValueError("the file ends too early")
    if storage.dtype is torch.bool:
        storage.content.ne_(0)  # torch reckons with 0 and 1 alone
