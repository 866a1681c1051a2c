"""Images that lie on a disk, encoded: read by worker processes ahead of the training."""

import copy
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling
from tqdm import tqdm

from dataset.decoding import BrokenImage, RandomCrops, decode, fit
from errors import UserError

#: How many batches each worker reads ahead.
AHEAD = 2


class Reading(NamedTuple):
    """How images are read from a disk."""

    num_workers: int = 4  # processes; 0: none beside the training
    max_broken: int = 10  # different images that cannot be read before the run ends
    may_download: bool = True  # to the folder


class Source(Protocol):
    """Encoded images by their sample index."""

    def name_of(self, sample: int) -> str:
        """What the person at the terminal calls the image."""

    def content_of(self, sample: int) -> bytes:
        """The encoded image; raises `OSError`."""


class Files:
    """Images in files below one folder."""

    def __init__(self, root: str, names: Sequence[str]):
        self.root = root
        # One block of bytes: a list of a million strings would be copied into every worker as soon as it is read.
        self.names = numpy.array([os.fsencode(name) for name in names])

    def name_of(self, sample: int) -> str:
        return str(Path(self.root, os.fsdecode(bytes(self.names[sample]))))

    def content_of(self, sample: int) -> bytes:
        return Path(self.name_of(sample)).read_bytes()


class StoredImages:
    """One split on a disk: encoded images, classes (n,), their size, and how much a test crop cuts off on each side."""

    def __init__(self, source: Source, targets: Tensor, image_size: int, cut: int, reading: Reading):
        self.source, self.targets, self.image_size, self.cut = source, targets, image_size, cut
        self.reading = reading
        self._numbers = torch.arange(len(targets))  # of the samples in the source
        self._broken: dict[str, str] = {}

    def to(self, device: torch.device) -> "StoredImages":
        """The same images, whose batches will lie on the device."""
        moved = copy.copy(self)
        moved.targets = self.targets.to(device)
        return moved

    def select(self, chosen: Tensor) -> "StoredImages":
        """Those images for which `chosen` (n,) is true, as a split of their own."""
        part = copy.copy(self)
        part.targets, part._numbers = self.targets[chosen], self._numbers[chosen.cpu()]
        return part

    def name_of(self, sample: int) -> str:
        """What the person at the terminal calls the image."""
        return self.source.name_of(int(self._numbers[sample]))

    def read(
        self, parts: Sequence[Tensor], crops: RandomCrops | None = None, fill: bool = False
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Sample indices of the batches -> (indices (B,), pixels (B, 3, H, W) of each view, or one for all).

        An image that cannot be read is named and left out; with `fill` the next one of the batch takes its place.
        Raises `UserError` where there are more of them than allowed.
        """
        device, workers = self.targets.device, self.reading.num_workers
        loader = DataLoader(
            _Batches(self, crops, fill),
            batch_size=None,
            sampler=[part.cpu() for part in parts],
            num_workers=min(workers, len(parts)),
            prefetch_factor=AHEAD if workers and parts else None,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_run,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else a seed for the workers is drawn from the training's own
        )
        batches = iter(loader)
        try:
            for index, pixels, broken in batches:
                self._count(broken)
                if fill and not len(index):
                    raise UserError(f"--data: no image of a batch can be read, for example {next(iter(broken))}")
                yield index.to(device, non_blocking=True), [view.to(device, non_blocking=True) for view in pixels]
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # The last three come from the way on which a process that has gone would have handed its batch over.
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            _let_go(batches)
            raise UserError(
                "--num_workers: a process that reads images was ended from outside (out of memory, or of shared "
                "memory, docker's --shm-size?); choose fewer, or a smaller --batch_size"
            ) from None

    def _count(self, broken: dict[str, str]) -> None:
        for name, reason in broken.items():
            if name not in self._broken:
                tqdm.write(f"skipped an image that cannot be read: {name} ({reason})")
        self._broken |= broken
        if len(self._broken) > self.reading.max_broken:
            raise UserError(
                f"--data: {len(self._broken)} images cannot be read, the last is {list(self._broken)[-1]}; mend them, "
                "or allow more with --max_broken"
            )

    def read_one(self, sample: int, crops: RandomCrops | None) -> list[Tensor]:
        """Pixels (3, H, W) of each view of an image; raises `BrokenImage`."""
        try:
            image = decode(self.source.content_of(int(self._numbers[sample])))
        except OSError as error:
            raise BrokenImage(error.strerror or str(error)) from None
        if crops is None:
            return [fit(image, self.image_size, self.cut)]
        return crops.of(image, sample, self.image_size)


def _let_go(batches: Iterator) -> None:
    """End the workers at once: torch's own way waits for a lock, which the worker that was killed may hold."""
    signal_handling._remove_worker_pids(id(batches))  # from here on their end is no error
    batches._shutdown = True
    for worker, queue in zip(batches._workers, batches._index_queues, strict=True):
        worker.kill()
        queue.cancel_join_thread()


class _Batches(Dataset):
    """What the workers do: whole batches by their sample indices."""

    def __init__(self, images: StoredImages, crops: RandomCrops | None, fill: bool):
        self.images, self.crops, self.fill = images.to(torch.device("cpu")), crops, fill

    def __getitem__(self, index: Tensor) -> tuple[Tensor, list[Tensor], dict[str, str]]:
        read, broken = {}, {}
        for sample in index.tolist():
            try:
                read[sample] = self.images.read_one(sample, self.crops)
            except BrokenImage as error:
                broken[self.images.name_of(sample)] = str(error)
        samples = _fill(index.tolist(), read) if self.fill else [sample for sample in index.tolist() if sample in read]
        if not samples:
            return index[:0], [torch.empty(0, 3, *[self.images.image_size] * 2, dtype=torch.uint8)], broken
        views = zip(*(read[sample] for sample in samples), strict=True)
        return torch.tensor(samples), [torch.stack(view) for view in views], broken


def _fill(samples: list[int], read: dict) -> list[int]:
    """The same samples, with the next one that was read in place of each that was not."""
    if not read:
        return []
    whole = [sample for sample in samples if sample in read]
    filled, following = [], 0
    for sample in samples:
        if sample in read:
            following += 1
            filled.append(sample)
        else:
            filled.append(whole[following % len(whole)])
    return filled


def _as_it_is(batch):
    return batch


def _leave_signals_to_the_run(worker: int) -> None:
    # Ctrl-C and a cluster's SIGTERM reach every process; the run finishes its step and needs its data for that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
