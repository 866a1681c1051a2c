"""WebDataset shards: tar files whose members `KEY.jpg` and `KEY.cls` are an image and the number of its class.

The shards' tables of contents are read once; from then on an image is one read at its place, so that order, crops,
parts of processes and the way to go on within an epoch are those of a folder. Shards lie on a disk, or are mounted.
"""

import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from dataset.decoding import Place
from errors import UserError

#: Endings of images in shards.
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm")
#: What a split's shards, or their folder, may be called.
NAMES = {"train": ("train",), "val": ("val", "test")}


class _Sample(NamedTuple):
    key: str
    offset: int
    size: int
    target: int


class Shards:
    """The images of a split, by their place in its shards."""

    def __init__(self, paths: Sequence[Path], contents: Sequence[Sequence[_Sample]]):
        self.paths = [str(path) for path in paths]
        samples = [sample for content in contents for sample in content]
        self.shard = numpy.repeat(numpy.arange(len(contents)), [len(content) for content in contents])
        self.places = numpy.array([(sample.offset, sample.size) for sample in samples], dtype=numpy.int64)
        self.keys = numpy.array([sample.key.encode() for sample in samples])

    def name_of(self, sample: int) -> str:
        return f"{self.keys[sample].decode()} in {self.paths[self.shard[sample]]}"

    def place_of(self, sample: int) -> Place:
        offset, size = self.places[sample].tolist()
        return Place(os.fsencode(self.paths[self.shard[sample]]), offset, size)


def find_shards(folder: str, split: str) -> list[Path]:
    """The shards of `train` or `val` in a folder, or in a sub-folder of that name; none where there are none."""
    for name in NAMES[split]:
        inside = [place for place in sorted(Path(folder).glob(f"{name}*")) if place.is_dir()]
        found = [path for place in inside for path in place.glob("*.tar")] or list(Path(folder).glob(f"*{name}*.tar"))
        if found:
            return sorted(found)
    return []


def read_shards(paths: Sequence[Path], threads: int) -> tuple[Shards, Tensor]:
    """Tables of contents of the shards -> (images by sample index, classes (n,)); raises `UserError`."""
    try:
        from webdataset.tariterators import base_plus_ext
    except ImportError:
        raise UserError("--data: shards need the library webdataset: pip install webdataset") from None

    def read(path: Path) -> list[_Sample]:
        return _table_of_contents(path, base_plus_ext)

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        contents = list(pool.map(read, paths))
    targets = [sample.target for content in contents for sample in content]
    if not targets:
        raise UserError(f"--data: {paths[0]} and the other shards hold no image")
    return Shards(paths, contents), torch.tensor(targets)


def _table_of_contents(path: Path, split_name) -> list[_Sample]:
    images, targets = {}, {}
    try:
        with tarfile.open(path, "r:") as shard:  # uncompressed: an image must be found by its place
            for member in shard:
                key, ending = split_name(member.name)
                if key is None or not member.isfile():
                    continue
                if ending.lower() in IMAGES:
                    images[key] = (member.offset_data, member.size)
                elif ending.lower() == "cls":
                    targets[key] = int(shard.extractfile(member).read())
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"--data: {path} cannot be read as a shard ({error}); get it again") from None
    if any(offset + size > os.path.getsize(path) for offset, size in list(images.values())[-1:]):
        raise UserError(f"--data: {path} is cut off; get it again")
    without = next((key for key in images if key not in targets), None)
    if without is not None:
        raise UserError(f"--data: {without} in {path} has no class; a shard holds KEY.jpg and KEY.cls")
    negative = next((key for key in images if targets[key] < 0), None)
    if negative is not None:
        raise UserError(f"--data: {negative} in {path} has class {targets[negative]}; classes count from 0")
    return [_Sample(key, *place, targets[key]) for key, place in images.items()]
