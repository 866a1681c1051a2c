"""WebDataset shards: tar files whose members `KEY.jpg` and `KEY.cls` are an image and the number of its class.

The shards' tables of contents are read once; from then on an image is one read at its place, so that order, crops,
parts of processes and resuming within an epoch are those of a folder. Shards are on a disk, or mounted.
"""

import os
import re
import tarfile
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from dataset.decoding import Place, endings
from dataset.folders import printable
from errors import UserError, count_of

#: The split that a word in the name of a shard, or of its folder, stands for.
WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
#: Classes are counted from 0; a larger number is a damaged one.
MOST_CLASSES = 2**17
BLOCK = 512  # of a tar file


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
        self.keys = numpy.array([os.fsencode(sample.key) for sample in samples])

    def name_of(self, sample: int) -> str:
        return printable(f"{os.fsdecode(bytes(self.keys[sample]))} in {self.paths[self.shard[sample]]}")

    def place_of(self, sample: int) -> Place:
        offset, size = self.places[sample].tolist()
        return Place(os.fsencode(self.paths[self.shard[sample]]), offset, size)

    def label_of(self, sample: int) -> bytes:
        return bytes(self.keys[sample])


def find_shards(folder: str) -> list[list[Path]]:
    """The shards of training and of test images in a folder or its sub-folders; empty where a split has none.

    A split is a word in the name of the shard or of its sub-folder: train; val, validation or test. Raises `UserError`
    for a shard that might belong to both, and for compressed ones.
    """
    found: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for path in sorted([*Path(folder).glob("*.tar"), *Path(folder).glob("*/*.tar")]):
        splits = _splits_of(path.stem) or (_splits_of(path.parent.name) if path.parent != Path(folder) else set())
        if len({WORDS[word] for word in splits}) > 1:
            raise UserError(
                f"--data: {printable(str(path))} may hold training or test images by its name; rename it, with one of "
                "train, val and test"
            )
        for word in splits:
            found["test" if word == "test" else WORDS[word]].append(path)
    splits = [found["train"], found["val"] or found["test"]]
    if not all(splits):
        packed = [path for ending in ("*.tar.gz", "*.tgz", "*.tar.*") for path in Path(folder).rglob(ending)]
        packed = [path for path in packed if _splits_of(path.name.split(".")[0])]
        if packed:
            raise UserError(
                f"--data: {printable(str(packed[0]))} is compressed; unpack it to a .tar, which can be read"
            )
        return []
    return splits


def _splits_of(name: str) -> set[str]:
    return {word for word in re.split(r"[^a-z]+", name.lower()) if word in WORDS}


def read_shards(paths: Sequence[Path], threads: int) -> tuple[Shards, Tensor]:
    """Tables of contents of the shards -> (images by sample index, classes (n,)); raises `UserError`."""
    with ThreadPool(max(threads, 1)) as pool:
        tables = pool.map(_table_of_contents, paths)
    contents, unused = [content for content, _ in tables], [name for _, names in tables for name in names]
    targets = [sample.target for content in contents for sample in content]
    if not targets:
        raise UserError(f"--data: {printable(str(paths[0]))} and the other shards hold no image")
    if unused:
        print(f"left out {count_of(len(unused), 'member')} of the shards, neither image nor class: {unused[0]}, ...")
    return Shards(paths, contents), torch.tensor(targets)


def _table_of_contents(path: Path) -> tuple[list[_Sample], list[str]]:
    """The samples of a shard, and members that belong to none."""
    images, targets, unused, end = {}, {}, [], 0
    name = printable(str(path))
    try:
        with tarfile.open(path, "r:") as shard:  # uncompressed: an image must be found by its place
            for member in shard:
                end = member.offset_data + (-(-member.size // BLOCK) * BLOCK if member.isreg() else 0)
                key, ending = os.path.splitext(member.name)
                if not member.isfile():
                    continue
                if ending.lower() == ".cls":
                    targets[key] = int(shard.extractfile(member).read(64))
                elif ending.lower() in endings() and key not in images:
                    images[key] = (member.offset_data, member.size)
                else:
                    unused.append(f"{printable(member.name)} in {name}")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise UserError(f"--data: {name} cannot be read as a shard ({error}); get it again") from None
    _check_end(path, end)
    samples = []
    for key, place in images.items():
        if key not in targets:
            # KEY.seg.png next to KEY.jpg is something else about the sample KEY.
            first = os.path.join(os.path.dirname(key), os.path.basename(key).split(".")[0])
            if first == key or first not in images:
                raise UserError(f"--data: {printable(key)} in {name} has no class; a shard holds KEY.jpg and KEY.cls")
            unused.append(f"{printable(key)} in {name}")
            continue
        if not 0 <= targets[key] < MOST_CLASSES:
            count = f"classes count from 0 to {MOST_CLASSES - 1}"
            raise UserError(f"--data: {printable(key)} in {name} has class {targets[key]}; {count}")
        samples.append(_Sample(key, *place, targets[key]))
    unused += [f"{printable(key)}.cls in {name}" for key in targets if key not in images]
    return samples, unused


def _check_end(path: Path, end: int) -> None:
    """Raise `UserError` unless the blocks that end an archive follow its last member: a damaged header looks like them
    to the reader, and all that is behind it would be lost."""
    with open(path, "rb") as shard:
        size = os.fstat(shard.fileno()).st_size
        shard.seek(end)
        block = shard.read(BLOCK)
    if end > size or len(block) < BLOCK:
        raise UserError(f"--data: {printable(str(path))} is cut off; get it again")
    if any(block):
        raise UserError(f"--data: {printable(str(path))} is damaged {end} bytes from its beginning; get it again")
