"""One image file, as a network that was trained here is shown it."""

import os

import torch
from torch import Tensor

from dataset.decoding import WHITE, BrokenImage, Centre, Place, read_views
from dataset.images import resize
from errors import UserError


def read_normalised(path: str | os.PathLike, record: dict, flag: str = "IMAGE") -> Tensor:
    """An image file -> (3, image_size, image_size) float32, read as the data sets read theirs.

    The record holds `image_size`, `source_size` where images of that size were resized to it, `mean`, `std` (of pixels
    in 0..1), `margin`, the black pixels that the data set has around its images (below 0 so many are cut off a test
    image on each side), and may hold the `background` under transparency. Raises `UserError`, naming `flag` and the
    file, for what is no whole image.
    """
    margin = record.get("margin") or 0
    background = tuple(record.get("background") or WHITE)
    size = record.get("source_size") or record["image_size"]
    crop = Centre(size - 2 * max(margin, 0), max(-margin, 0), background)
    try:
        (pixels,) = read_views(Place(os.fsencode(path)).read, crop)
    except BrokenImage as error:
        raise UserError(f"{flag}: {path} cannot be read as an image ({error}); repair or remove it") from None
    image = torch.nn.functional.pad(torch.tensor(pixels).permute(2, 0, 1), [max(margin, 0)] * 4)
    mean, std = (torch.tensor(record[name]).view(3, 1, 1) for name in ("mean", "std"))
    return resize(((image / 255 - mean) / std)[None], record["image_size"])[0]
