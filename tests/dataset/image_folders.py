"""Folders of images for tests, and how they are read or refused."""

import numpy
import pytest
from PIL import Image

from dataset import load_data
from errors import UserError


def write_images(root, train: int = 7, test: int = 5, classes=("cat", "dog"), side: int = 40):
    """train/ and val/ with JPEGs of several shapes."""
    generator = numpy.random.default_rng(0)
    for split, number in (("train", train), ("val", test)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(number):
                rough = generator.integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
                shape = (side + 3 * k, side)
                Image.fromarray(rough).resize(shape, Image.BICUBIC).save(folder / f"{k}.JPEG", quality=95)
    return root


def load(path, **options):
    return load_data("folder", str(path), 32, 0, **options)


def refusal(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **options)
    return str(caught.value)
