"""One image file, read as the data sets read theirs."""

import os

import numpy
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from dataset.decoding import convert_to_rgb
from errors import UserError


def read_square(path: str | os.PathLike, size: int, flag: str = "--data") -> Tensor:
    """An image file -> bytes (size, size, 3): its shorter side is brought to `size`, then its centre is cut out.

    Raises `UserError`, naming `flag` and the file, for what is no whole image.
    """
    try:
        with Image.open(path) as image:
            square = convert_to_rgb(image)
            if square.size != (size, size):
                square = v2.CenterCrop(size)(v2.Resize(size)(square))
            return torch.from_numpy(numpy.array(square))
    except Exception as error:  # decoders raise whatever their parsers do
        raise UserError(f"{flag}: {path} cannot be read as an image ({error}); mend or remove it") from None


def read_normalised(path: str | os.PathLike, record: dict, flag: str = "IMAGE") -> Tensor:
    """An image file -> (3, image_size, image_size) float32, as a network with this record was trained on.

    The record holds `image_size`, `mean`, `std` (of pixels in 0..1) and `margin`, the black pixels that the data set
    has around its images; below 0 so many pixels are cut off all around instead.
    """
    margin = record.get("margin") or 0
    pixels = read_square(path, record["image_size"] - 2 * margin, flag).permute(2, 0, 1)
    pixels = torch.nn.functional.pad(pixels, [margin] * 4)
    mean, std = (torch.tensor(record[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (pixels / 255 - mean) / std
