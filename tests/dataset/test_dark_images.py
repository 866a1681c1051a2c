"""Numbers of 12 bits in files of 16 are read as almost black, which is said where data are loaded or predicted."""

import io
import tarfile

import numpy
import pytest
from PIL import Image

from dataset import load_data
from tests.scripts.test_predict import images, run

__all__ = ["images"]  # a fixture
WARNING = "are almost black: no value is above 15 of 255"


def deep(largest: int) -> Image.Image:
    """Greys of 16 bits up to a number, as a PNG or TIFF holds them."""
    return Image.fromarray(numpy.linspace(0, largest, 32 * 32).reshape(32, 32).astype(numpy.uint16))


def folder(path, largest: int, kind: str = "png"):
    """Two classes, four training images and one test image of each."""
    for split, count in (("train", 4), ("val", 1)):
        for name in "ab":
            (path / split / name).mkdir(parents=True)
            for number in range(count):
                deep(largest).save(path / split / name / f"{number}.{kind}")
    return path


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_a_folder_of_12_bits_is_said_to_be_dark(tmp_path, capsys, stream, kind):
    load_data("folder", str(folder(tmp_path / "twelve", 4095, kind)), 32, 0, stream=stream)
    printed = capsys.readouterr().out
    assert printed.count(WARNING) == 1 and f"{tmp_path / 'twelve'} {WARNING}" in printed and "(8 looked at)" in printed
    load_data("folder", str(folder(tmp_path / "more", 4096, kind)), 32, 0, stream=stream)
    assert WARNING not in capsys.readouterr().out


def test_it_is_said_without_labels_and_of_a_data_set_like_imagenet(tmp_path, capsys):
    path = str(folder(tmp_path / "twelve", 4095))
    for name, options in (("folder", {"labelled": False}), ("imagenet", {})):
        load_data(name, path, 32, 0, **options)
        assert capsys.readouterr().out.count(WARNING) == 1, name


def test_it_is_said_of_shards(tmp_path, capsys):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for number in range(4):
                deep(4095).save(content := io.BytesIO(), "PNG")
                for ending, data in (("png", content.getvalue()), ("cls", str(number % 2).encode())):
                    (member := tarfile.TarInfo(f"{number}.{ending}")).size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    load_data("imagenet", str(tmp_path), 32, 0)
    assert WARNING in capsys.readouterr().out


def test_one_image_that_is_brighter_is_enough(tmp_path, capsys):
    path = folder(tmp_path / "mixed", 4095)
    deep(65535).save(path / "train" / "a" / "0.png")
    (path / "train" / "b" / "0.png").write_text("no image")  # named where it is read
    load_data("folder", str(path), 32, 0)
    assert WARNING not in capsys.readouterr().out


def test_it_is_said_in_prediction(images, capsys):
    for number in range(2):
        deep(4095).save(images / f"deep{number}.png")
    run("all/deep0.png", "all/deep1.png")
    assert WARNING in capsys.readouterr().err
    run("all/deep0.png", "all/a.png")
    assert WARNING not in capsys.readouterr().err
