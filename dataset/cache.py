"""Numbers on a disk, a row for each image as an epoch shows it: memory-mapped, written by one process, read by many."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
from filelock import FileLock, Timeout

from errors import UserError

DESCRIPTION, LOCK = "cache.json", ".lock"
#: Endings of the files of one kind of numbers in one epoch: rows, and which of them are whole.
ROWS, WHOLE = ".f32", ".whole"
#: Number of new rows that are flushed to the disk at once: at most these are lost when a run is killed.
FLUSHED = 2**16
#: The epoch of rows that are the same in every epoch.
EVERY = 0


class RowCache:
    """Rows of float32 for `n` images in each epoch, in a folder of their own that `description` belongs to.

    A row counts when its flag is set, and that is after the row is on the disk: what an interrupted process leaves is
    never taken for whole. The first process that misses a row locks the folder and writes; others compute what is
    missing. Raises `UserError`, which begins with `flag`, where the folder cannot be used.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any], n: int, flag: str):
        self.folder, self.n, self.flag = folder, n, flag
        #: Why this process cannot write; empty where it can, or has not tried.
        self.refusal = ""
        self._lock = FileLock(folder / LOCK)
        self._open: dict[str, tuple[int, _Rows]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / DESCRIPTION).exists():
                _write(folder / DESCRIPTION, json.dumps(description, indent=2, sort_keys=True))
        except OSError as error:
            raise UserError(f"{flag}: {folder} cannot be made: {error.strerror}; name another place") from None
        if read_description(folder) != json.loads(json.dumps(description)):
            raise UserError(f"{flag}: {folder / DESCRIPTION} is damaged; remove the folder {folder}")

    def read(self, name: str, epoch: int, width: int, index: numpy.ndarray) -> numpy.ndarray | None:
        """Rows (B, width) of the images `index` (B,); None where one of them is not there."""
        rows = self._rows(name, epoch, width, to_write=False)
        return None if rows is None else rows.read(index)

    def write(self, name: str, epoch: int, index: numpy.ndarray, values: numpy.ndarray) -> None:
        """Keep rows (B, width), if this process may write."""
        rows = self._rows(name, epoch, values.shape[1], to_write=True)
        if rows is not None:
            rows.write(index, values)

    def count_epochs(self, name: str, width: int) -> int:
        """For how many epochs every row is there."""
        paths = [path.with_suffix("") for path in self.folder.glob(f"{name}-*{WHOLE}")]
        found = [_Rows(path, (self.n, width), "r") for path in paths if _is_whole(path, self.n, width)]
        return sum(bool(rows.whole.all()) for rows in found)

    def close(self) -> None:
        """Flush what is new, and let others write."""
        for _, rows in self._open.values():
            rows.flush()
        self._open.clear()
        self._lock.release()

    def _rows(self, name: str, epoch: int, width: int, to_write: bool) -> "_Rows | None":
        """The open rows of an epoch; None where they are not there and not to be made."""
        at, rows = self._open.get(name, (epoch, None))
        if rows is not None and (at != epoch or (to_write and not rows.writable)):
            rows.flush()
            rows = None
        if rows is None:
            rows = self._open_rows(self.folder / f"{name}-{epoch}", width, to_write)
            self._open.pop(name, None)
            if rows is not None:
                self._open[name] = (epoch, rows)
        return rows if rows is None or rows.writable or not to_write else None

    def _open_rows(self, path: Path, width: int, to_write: bool) -> "_Rows | None":
        to_write = (to_write or self._lock.is_locked) and self._may_write()
        if not _is_whole(path, self.n, width):
            if not to_write:
                return None
            try:
                _reserve(f"{path}{ROWS}", 4 * self.n * width)
                _reserve(f"{path}{WHOLE}", self.n)
            except OSError as error:
                raise UserError(f"{self.flag}: {path}{ROWS} cannot be written: {error.strerror}; make room") from None
        return _Rows(path, (self.n, width), "r+" if to_write else "r")

    def _may_write(self) -> bool:
        if self._lock.is_locked:
            return True
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self.refusal = "another process writes to it"
        except OSError as error:
            self.refusal = error.strerror or str(error)
        else:
            self.refusal = ""
        return self._lock.is_locked


class _Rows:
    """The rows of one epoch, and flags of those that are whole."""

    def __init__(self, path: Path, shape: tuple[int, int], mode: str):
        self.writable = mode == "r+"
        self.values = numpy.memmap(f"{path}{ROWS}", numpy.float32, mode, shape=shape)
        self.whole = numpy.memmap(f"{path}{WHOLE}", numpy.uint8, mode, shape=shape[:1])
        self._known = self.whole == 1  # with those that are not flushed yet
        self._new: list[numpy.ndarray] = []

    def read(self, index: numpy.ndarray) -> numpy.ndarray | None:
        if not self._known[index].all():
            self._known |= self.whole == 1  # what another process has written meanwhile
        return self.values[index] if self._known[index].all() else None

    def write(self, index: numpy.ndarray, values: numpy.ndarray) -> None:
        self.values[index] = values
        self._known[index] = True
        self._new.append(index)
        if sum(map(len, self._new)) >= min(FLUSHED, len(self.whole)):
            self.flush()

    def flush(self) -> None:
        """Rows first, then their flags."""
        if self._new:
            self.values.flush()
            self.whole[numpy.concatenate(self._new)] = 1
            self.whole.flush()
            self._new = []


def read_description(folder: Path) -> dict[str, Any] | None:
    """What the rows of a folder are of; None where that cannot be read."""
    try:
        found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def differences(folder: Path, wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (value there, value wanted) of what differs in the nearest description in sub-folders of `folder`; empty
    where there are none. A name that only one of both has follows from the others, and counts where it is alone."""
    wanted = json.loads(json.dumps(wanted))
    there: list[Mapping[str, Any]] = []
    with suppress(OSError):
        there = [found for path in sorted(folder.iterdir()) if (found := read_description(path)) is not None]

    def differing(found: Mapping[str, Any]) -> set[str]:
        return {
            name for name in {*found, *wanted} if (name in found) != (name in wanted) or found[name] != wanted[name]
        }

    nearest = min(there, key=lambda found: len(differing(found)), default=wanted)
    names = differing(nearest)
    return {name: (nearest.get(name), wanted.get(name)) for name in sorted(names & {*nearest} & {*wanted} or names)}


def _is_whole(path: Path, n: int, width: int) -> bool:
    """Whether both files of an epoch have their sizes."""
    sizes = ((ROWS, 4 * n * width), (WHOLE, n))
    return all(os.path.isfile(f"{path}{end}") and os.path.getsize(f"{path}{end}") == size for end, size in sizes)


def _reserve(path: str, size: int) -> None:
    """A file of zeros that has its place on the disk: a mapped page that finds none would kill the process."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        for first in range(0, size, 2**20):
            file.write(bytes(min(2**20, size - first)))


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
