"""What a worker process does: fill rows of a shared piece of memory with images. It starts without torch."""

import mmap
import os
import queue
import threading
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Protocol

import numpy

from dataset.decoding import BrokenImage, Crop, Place, read_views


class Change(Protocol):
    """What is done to an image when it has been read: `dataset.changes.Changes`, which loads torch where it is used."""

    def of_array(self, pixels: numpy.ndarray, key: int) -> numpy.ndarray:
        """Bytes (3, size, size) -> the changed bytes."""


def fill(
    rows: numpy.ndarray, places: Sequence[Place], keys: Sequence[int], crop: Crop, changes: Change | None = None
) -> dict[int, str]:
    """Read images into rows (views, n, 3, size, size); returns why, by row, for each that cannot be read.

    What is random of an image depends on its key, one for each place.
    """
    broken = {}
    with warnings.catch_warnings(action="ignore"):  # Pillow's on odd metadata
        for row, (place, key, part) in enumerate(zip(places, keys, crop.of(keys), strict=True)):
            try:
                for view, pixels in enumerate(read_views(place.read, part)):
                    rows[view, row] = pixels if changes is None else changes.of_array(pixels, key)
            except BrokenImage as error:
                broken[row] = str(error)
    return broken


def shape_of(count: int, crop: Crop) -> tuple[int, int, int, int, int]:
    """The shape of a batch of images in memory: (views, n, 3, size, size)."""
    return crop.views, count, 3, crop.size, crop.size


def main(connection: int, memory: int) -> None:
    """Answer requests until the connection closes; both arguments are file descriptors."""
    run, requests = Connection(connection), queue.SimpleQueue()
    threading.Thread(target=_receive, args=(run, requests), daemon=True).start()
    mapped = mmap.mmap(memory, os.fstat(memory).st_size)
    while True:
        number, offset, count, first, places, keys, crop, changes = requests.get()
        try:
            shape = shape_of(count, crop)
            if offset + numpy.prod(shape, dtype=int) > len(mapped):
                mapped = mmap.mmap(memory, os.fstat(memory).st_size)
            batch = numpy.ndarray(shape, numpy.uint8, mapped, offset)
            broken = fill(batch[:, first : first + len(places)], places, keys, crop, changes)
            run.send((number, {first + row: reason for row, reason in broken.items()}, None))
        except Exception:  # a mistake in the code: the run shows it
            run.send((number, {}, traceback.format_exc()))


def _receive(run: Connection, requests: queue.SimpleQueue) -> None:
    """Take requests at once, so that the run never waits; end where it has ended, also in the middle of a read."""
    while True:
        try:
            requests.put(run.recv())
        except (EOFError, OSError):
            os._exit(0)
