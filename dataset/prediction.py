"""Image files to predict: which they are, and each one as a network that was trained here is shown it."""

import glob
import os
import sys
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dataset.decoding import WHITE, BrokenImage, Centre, Place, read_views
from dataset.folders import describe_left_out, is_hidden, is_image
from dataset.images import resize
from errors import UserError


def read_normalised(path: str | os.PathLike, record: dict) -> Tensor:
    """An image file -> (3, image_size, image_size) float32, read as the data sets read theirs.

    The record holds `image_size`, `source_size` where images of that size were resized to it, `mean`, `std` (of pixels
    in 0..1), `margin`, the black pixels that the data set has around its images (below 0: the number cut off a test
    image on each side), and may hold the `background` under transparency. Raises `UserError`, naming the file, for what
    is no whole image.
    """
    margin = record.get("margin") or 0
    background = tuple(record.get("background") or WHITE)
    size = record.get("source_size") or record["image_size"]
    crop = Centre(size - 2 * max(margin, 0), max(-margin, 0), background)
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow's on odd metadata
            (pixels,) = read_views(Place(os.fsencode(path)).read, crop)
    except BrokenImage as error:
        if not os.path.lexists(path):
            raise UserError(f"IMAGE: there is no file {path}") from None
        raise UserError(f"IMAGE: {path} cannot be read as an image ({error}); repair or remove it") from None
    image = torch.nn.functional.pad(torch.tensor(pixels), [max(margin, 0)] * 4)
    mean, std = (torch.tensor(record[name]).view(3, 1, 1) for name in ("mean", "std"))
    return resize(((image / 255 - mean) / std)[None], record["image_size"])[0]


def describe_preparation(record: dict, normalised: bool = True) -> str:
    """How `read_normalised` brings an image file to a network, in one sentence, for people without this code; without
    what a network that takes pixels does itself, unless `normalised`."""
    margin, size = record.get("margin") or 0, record["image_size"]
    held = record.get("source_size") or size
    inner, side = held - 2 * max(margin, 0), held - 2 * margin
    steps = [
        "first picture of a file, turned as EXIF says",
        "greys of 16 bits divided by 256, of 12 bits in a TIFF by 16",
        f"transparency on the background colour {','.join(str(part) for part in record.get('background') or WHITE)}",
        f"RGB of 8 bits; shorter side resized to {side} (bilinear, antialiased), centre of {inner}x{inner} cut out",
        *([f"{margin} black pixels added on each side"] if margin > 0 else []),
        *(["(pixel / 255 - mean) / std"] if normalised else []),
        *([f"resized from {held}x{held} to {size}x{size} (bilinear)"] if held != size else []),
    ]
    return "; ".join(steps)


def find_images(names: Iterable[str]) -> Iterator[str]:
    """The files that names stand for, in order: a file itself, the images below a folder, what a pattern matches.

    A name that is none of these is returned as it is. Raises `UserError` for a folder or a pattern without images.
    """
    for name in names:
        is_pattern = glob.has_magic(name) and not os.path.lexists(name)
        found = sorted(glob.glob(name, recursive=True)) if is_pattern else [name]
        empty = True
        for path in found:
            for image in _below(path) if os.path.isdir(path) else [path]:
                empty = False
                yield image
        if empty:
            raise UserError(f"IMAGE: {name} {'matches no file' if is_pattern else 'is a folder without images'}")


def _below(folder: str) -> Iterator[str]:
    """The images below a folder, by the endings of their names; other files are counted on standard error, and hidden
    ones left out."""
    left_out: list[str] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(names):
            if is_image(name):
                yield os.path.join(place, name)
            elif not is_hidden(name):
                left_out.append(name)
    if left_out:
        print(describe_left_out(left_out, folder), file=sys.stderr)
