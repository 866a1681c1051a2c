"""Images that stay encoded on a disk: read ahead of the training, by worker processes if there are any."""

import copy
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.decoding import WHITE, Centre, Crop, Place, RandomCrops, describe_dark
from dataset.folders import printable
from dataset.pool import Pool
from dataset.worker import Change, shape_of
from dataset.worker import fill as fill_rows
from errors import UserError, count_of

#: How many batches are read ahead of the one that is used.
AHEAD = 3
#: What is read at once where all images of a split are wanted.
AT_ONCE = 64
#: How many unreadable images a message names.
NAMED = 5
#: How many images of a split are looked at before it is used.
LOOKED_AT = 16
#: Mean and standard deviation of each channel, of pixels in 0..1.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


class Reading(NamedTuple):
    """How images are read from a disk."""

    num_workers: int = 4  # processes; 0: none besides the training
    max_broken: int = 10  # different images that cannot be read before the run ends
    may_download: bool = True  # to the folder
    pool: Pool | None = None  # of the worker processes, shared by all splits
    background: tuple[int, int, int] = WHITE  # under transparency
    stream: bool | None = None  # from the disk, not held in memory; None: what does not fit there
    split: float = 0.0  # share of the training images that becomes the test split of a folder without one
    holdout: int = 0  # number of images instead, where no share is given
    normalisation: Statistics | None = None  # a recorded one, instead of the data's own
    labelled: bool = True  # by class folders; else images at any depth, all of them for training
    judges: tuple[str, ...] | None = None  # classes of a network, if known: a folder may hold test images alone for it
    device_memory: int | None = None  # bytes that may be used there, where it is not the CPU


class Source(Protocol):
    """Encoded images by their sample index."""

    def name_of(self, sample: int) -> str:
        """What messages call the image."""

    def place_of(self, sample: int) -> Place:
        """Where its bytes are."""

    def label_of(self, sample: int) -> bytes:
        """Its name wherever the data set is."""


class Files:
    """Images in files below one folder."""

    def __init__(self, root: str, names: Sequence[str]):
        self.root = root
        # One block of bytes: a list of a million strings takes several times as much.
        self.names = numpy.array([os.fsencode(name) for name in names])

    def name_of(self, sample: int) -> str:
        return printable(os.fsdecode(self.place_of(sample).path))

    def place_of(self, sample: int) -> Place:
        return Place(os.path.join(os.fsencode(self.root), bytes(self.names[sample])))

    def label_of(self, sample: int) -> bytes:
        return bytes(self.names[sample])


class StreamedImages:
    """One split on a disk: encoded images, classes (n,), their size, and how much a test crop cuts off on each side."""

    def __init__(self, source: Source, targets: Tensor, image_size: int, cut: int, reading: Reading):
        self.source, self.targets, self.image_size, self.cut = source, targets, image_size, cut
        self.reading, self._centre = reading, Centre(image_size, cut, reading.background)
        self._numbers = torch.arange(len(targets))  # of the samples in the source
        self._broken: dict[str, str] = {}

    def to(self, device: torch.device) -> "StreamedImages":
        """The same images, with batches on the device."""
        moved = copy.copy(self)
        moved.targets = self.targets.to(device)
        return moved

    def select(self, chosen: Tensor) -> "StreamedImages":
        """Those images for which `chosen` (n,) is true, as a split of their own."""
        part = copy.copy(self)
        part.targets, part._numbers = self.targets[chosen], self._numbers[chosen.cpu()]
        return part

    keep = select

    def seen_as(self, centre: Centre) -> "StreamedImages":
        """The same files, each shown as this centre of it."""
        seen = copy.copy(self)
        seen.image_size, seen.cut, seen._centre, seen._broken = centre.size, centre.cut, centre, {}
        return seen

    def name_of(self, sample: int) -> str:
        """What messages call the image."""
        return self.source.name_of(int(self._numbers[sample]))

    def stamp(self, sample: int, with_size: bool = True) -> bytes:
        """Name and, if asked for, size in bytes of an image's file: what changes when it is exchanged."""
        size = self._place(sample).count_bytes() if with_size else -1
        return self.source.label_of(int(self._numbers[sample])) + b"\0%d\0" % size

    @property
    def unreadable(self) -> dict[str, str]:
        """Why, by name, for each image of the split that turned out unreadable so far."""
        return dict(self._broken)

    def read(
        self,
        parts: Sequence[Tensor],
        crops: RandomCrops | None = None,
        fill: bool = False,
        changes: Change | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Sample indices of the batches -> (indices (B,), pixels (B, 3, H, W) of each view, or one for all).

        Crops and changes of an image depend on its key, by default its sample index. An image that cannot be read is
        named and left out; with `fill` the next one of the batch takes its place. On a CPU the memory of the pixels is
        the workers' again when the next batch is asked for. Raises `UserError` where there are more unreadable images
        than allowed.
        """
        device = self.targets.device
        for index, rows, broken in self._batches(*_on_cpu(parts, keys), crops, changes):
            reasons = {self.name_of(int(index[row])): reason for row, reason in broken.items()}
            self._count(reasons)
            if broken:
                left = [row for row in range(len(index)) if row not in broken]
                if fill and not left:
                    raise UserError(
                        f"--data: a batch of {count_of(len(index), 'image')} has none that takes the place of "
                        f"{_name_last(reasons)}; repair or remove what cannot be read"
                    )
                chosen = torch.tensor(fill_gaps(len(index), left) if fill else left, dtype=torch.int64)
                index, rows = index[chosen], rows[:, chosen]
            if device.type == "cuda":
                index, rows = index.pin_memory(), rows.pin_memory()
            views = rows.to(device, non_blocking=True).unbind(0)
            yield index.to(device, non_blocking=True), list(views)

    def describe_dark(self, where: str) -> str:
        """A warning where its images are read as almost black; else empty."""
        every = max(len(self.targets) // LOOKED_AT, 1)
        some = range(0, len(self.targets), every)[:LOOKED_AT]
        return describe_dark([self._place(sample) for sample in some], f" in {printable(where)}")

    def pixels(self) -> tuple[Tensor, dict[int, str]]:
        """All images in memory, (n, 3, H, W) bytes, and why, by sample, for each that cannot be read (it is black)."""
        n = len(self.targets)
        pixels, unreadable = torch.zeros(n, 3, self.image_size, self.image_size, dtype=torch.uint8), {}
        for index, rows, broken in self._batches(*_on_cpu(torch.arange(n).split(AT_ONCE))):
            whole = [row for row in range(len(index)) if row not in broken]
            pixels[index[whole]] = rows[0, whole]
            unreadable |= {int(index[row]): reason for row, reason in broken.items()}
        return pixels, unreadable

    def _batches(
        self,
        parts: Sequence[Tensor],
        keys: Sequence[Tensor],
        crops: RandomCrops | None = None,
        changes: Change | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, dict[int, str]]]:
        """(indices (B,), bytes (views, B, 3, H, W), why each broken row could not be read) of every batch."""
        # Crops know no images: what is under transparency is said by those that are read.
        crop = self._centre if crops is None else crops._replace(background=self.reading.background)
        pairs = zip(parts, keys, strict=True)
        place_of, numbers = self.source.place_of, self._numbers
        requests = (
            (part, [place_of(number) for number in numbers[part].tolist()], key.tolist()) for part, key in pairs
        )
        if self.reading.pool is None or not self.reading.num_workers:
            for part, places, key in requests:
                rows = numpy.empty(shape_of(len(part), crop), numpy.uint8)
                broken = fill_rows(rows, places, key, crop, changes)
                yield part, torch.from_numpy(rows), broken
            return
        yield from self._by_workers(self.reading.pool, requests, crop, changes)

    def _by_workers(
        self, pool: Pool, requests: Iterator[tuple[Tensor, list[Place], list[int]]], crop: Crop, changes: Change | None
    ) -> Iterator[tuple[Tensor, Tensor, dict[int, str]]]:
        waiting: deque = deque()
        try:
            while True:
                while len(waiting) < AHEAD and (request := next(requests, None)) is not None:
                    part, places, key = request
                    waiting.append((part, pool.submit(places, key, crop, changes)))
                if not waiting:
                    return
                part, job = waiting[0]
                rows = torch.from_numpy(pool.collect(job, shape_of(len(part), crop)))
                yield part, rows, job.broken
                waiting.popleft()
                pool.release(job)
        finally:
            for _, job in waiting:
                pool.release(job)

    def _place(self, sample: int) -> Place:
        return self.source.place_of(int(self._numbers[sample]))

    def _count(self, broken: dict[str, str]) -> None:
        for name, reason in broken.items():
            if name not in self._broken:
                tqdm.write(f"skipped an image that cannot be read: {name} ({reason})")
        self._broken |= broken
        if len(self._broken) > self.reading.max_broken:
            raise UserError(too_many_unreadable(self._broken, self.reading.max_broken))


def _on_cpu(parts: Sequence[Tensor], keys: Sequence[Tensor] | None = None) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Sample indices of the batches and their keys, the same where there are none."""
    parts = [part.cpu() for part in parts]
    return parts, parts if keys is None else keys


def too_many_unreadable(broken: dict[str, str], allowed: int) -> str:
    """The message where more images are unreadable than `--max_broken` allows; `broken` has the reasons by name."""
    return (
        f"--data: {count_of(len(broken), 'image')} cannot be read, more than --max_broken {allowed}: "
        f"{_name_last(broken)}; repair or remove them, or allow more"
    )


def _name_last(broken: dict[str, str]) -> str:
    """The last unreadable images with their reasons."""
    last = list(broken.items())[-NAMED:]
    return ("..., " if len(broken) > len(last) else "") + ", ".join(f"{name} ({reason})" for name, reason in last)


def fill_gaps(count: int, whole: Sequence[int]) -> list[int]:
    """Rows 0..count - 1, with the next whole one in place of each that is not; after the last comes the first."""
    filled, following = [], 0
    for row in range(count):
        if following < len(whole) and whole[following] == row:
            following += 1
            filled.append(row)
        else:
            filled.append(whole[following % len(whole)])
    return filled
