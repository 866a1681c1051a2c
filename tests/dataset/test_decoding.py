"""An encoded image becomes a square: what is shown of it, of which kinds of files, and what is refused."""

import io
import os
import struct
import subprocess
import warnings
import zlib

import numpy
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from dataset import Loader, describe_preparation, epoch_seed, load_data, read_normalised
from dataset.decoding import (
    MAX_SIDE,
    RATIO,
    BrokenImage,
    Centre,
    Place,
    RandomCrops,
    crop_of,
    draw_tries,
    endings,
    read_views,
)
from dataset.worker import fill
from errors import UserError
from tests.dataset.image_folders import write_images
from tests.dataset.test_streaming import CPU
from tests.dataset.test_streaming import fit as square


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


WHOLE = Centre(32)


def shown(content: bytes, crop=WHOLE, sample: int = 0) -> numpy.ndarray:
    """What is shown of an image: bytes (size, size, 3), as Pillow has them."""
    (part,) = crop.of([sample])
    with warnings.catch_warnings(action="ignore"):  # Pillow's on odd metadata and huge sizes
        (pixels,) = read_views(lambda: content, part)
    return pixels.transpose(1, 2, 0)


def photograph(width: int, height: int, texture: float = 10) -> Image.Image:
    """Smooth colours with noise, as photographs have."""
    random = numpy.random.default_rng(0)
    rough = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=numpy.uint8)).resize(
        (width, height), Image.BICUBIC
    )
    noisy = numpy.asarray(rough) + random.normal(0, texture, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(numpy.uint8))


@pytest.mark.filterwarnings("error")
def test_a_warning_of_odd_metadata_leaves_an_image_whole(tmp_path):
    odd = b"Exif\0\0II*\0\x08\0\0\0\x05\0"
    (path := tmp_path / "odd.jpg").write_bytes(encoded(photograph(40, 40), "JPEG", exif=odd))
    with pytest.warns(UserWarning, match="EXIF"), Image.open(path) as image:
        image.getexif()
    rows = numpy.zeros((1, 1, 3, 32, 32), numpy.uint8)
    assert fill(rows, [Place(os.fsencode(path))], [0], WHOLE) == {} and rows.any()
    record = {"image_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert read_normalised(path, record).shape == (3, 32, 32)


@pytest.mark.slow
def test_random_crops_are_torchvisions():
    sizes = numpy.random.default_rng(0).integers(1, 600, (1500, 2)).tolist() + [[500, 1], [1, 500], [700, 100]]
    for seed, (width, height) in enumerate(sizes):
        torch.manual_seed(seed)
        top, left, down, across = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.08, 1.0], list(RATIO))
        (tries,) = draw_tries((0.08, 1.0), [seed])
        assert crop_of(width, height, tries) == (left, top, left + across, top + down), (width, height)


def test_a_random_crop_is_cut_out_before_it_is_resized():
    image, crop = photograph(90, 70), RandomCrops(32, 3, 5, 2, (0.08, 1.0))
    _, part, _ = crop.of([4, 7, 4])
    for view, pixels in enumerate(read_views(lambda: encoded(image), part)):
        (tries,) = draw_tries((0.08, 1.0), [epoch_seed(3, 5, 7, view, stream="crops")])
        expected = image.crop(crop_of(90, 70, tries)).resize((32, 32), Image.BILINEAR)
        assert numpy.array_equal(pixels.transpose(1, 2, 0), numpy.asarray(expected))


@pytest.mark.parametrize(("width", "height"), [(50, 40), (41, 77), (64, 64), (33, 100), (45, 40), (256, 256)])
@pytest.mark.parametrize(("size", "cut"), [(32, 0), (32, 2), (64, 5), (33, 1)])
def test_the_centre_is_torchvisions(width, height, size, cut):
    image = photograph(width, height)
    expected = v2.CenterCrop(size)(v2.Resize(size + 2 * cut)(image))
    difference = numpy.asarray(expected).astype(int) - shown(encoded(image), Centre(size, cut))
    assert abs(difference).max() <= 2 and abs(difference).mean() < 0.5


@pytest.mark.parametrize("size", [32, 64, 96, 128, 160, 224])
def test_prediction_shows_what_testing_shows(tmp_path, size):
    folder = write_images(tmp_path / "data", 1, 3, side=261)
    data = load_data("imagenet", str(folder), size, 0)
    (batch,) = Loader(data.test, data, 6, CPU).batches()
    record = {"image_size": size, "mean": data.mean, "std": data.std, "margin": data.margin}
    for sample in range(6):
        alone = read_normalised(data.test.name_of(sample), record)
        assert torch.allclose(alone, batch.images[sample], atol=1e-5)


@pytest.mark.parametrize("number", range(1, 9))
def test_exif_rotations_are_applied(number):
    image, exif = photograph(48, 64, 0), Image.Exif()
    exif[0x0112] = number
    upright = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's operation that undoes it
    expected = image if number == 1 else image.transpose(Image.Transpose(upright[number]))
    for kind, most in (("PNG", 0), ("JPEG", 25), ("TIFF", 0), ("WEBP", 40)):
        seen = shown(encoded(image, kind, exif=exif, quality=95), Centre(48))
        difference = abs(seen.astype(int) - shown(encoded(expected), Centre(48)))
        assert difference.max() <= most and difference.mean() < 4, kind


def test_transparency_is_laid_on_a_colour():
    drawing = numpy.zeros((32, 32, 4), numpy.uint8)
    drawing[8:24, 8:24, 3] = 255  # black, on nothing
    content = encoded(Image.fromarray(drawing))
    assert shown(content)[0, 0].tolist() == [255] * 3 and shown(content)[16, 16].tolist() == [0] * 3
    assert shown(content, Centre(32, 0, (9, 8, 7)))[0, 0].tolist() == [9, 8, 7]
    crops = RandomCrops(32, 0, 0, 1, (0.99, 1.0), (9, 8, 7))
    assert shown(content, crops)[0, 0].tolist() == [9, 8, 7]
    grey = Image.fromarray(drawing).convert("LA")
    assert shown(encoded(grey))[0, 0].tolist() == [255] * 3


def test_greys_of_more_than_8_bits_are_scaled_by_a_rule_or_refused():
    greys = numpy.linspace(0, 65535, 1024).reshape(32, 32)
    deep = Image.fromarray(greys.astype(numpy.uint16))
    expected = (greys.astype(numpy.uint16) >> 8).astype(numpy.uint8)
    for kind in ("PNG", "TIFF"):
        assert numpy.array_equal(shown(encoded(deep, kind))[..., 0], expected)
    for largest, scaled in ((65535, greys), (4095, greys // 16 * 16)):
        pixels = (scaled // (65536 // (largest + 1))).astype(">u2")
        seen = shown(b"P5\n32 32\n%d\n" % largest + pixels.tobytes())[..., 0]  # a PGM says its scale
        assert abs(seen.astype(int) - expected).max() <= 1, largest
    for mode, dtype in (("I", numpy.int32), ("F", numpy.float32)):
        with pytest.raises(BrokenImage, match=f"mode {mode}"):
            shown(encoded(Image.fromarray(greys.astype(dtype)), "TIFF"))


def test_a_jpeg_is_decoded_at_a_part_of_its_size_where_that_shows_little():
    content = encoded(photograph(500, 375, 20), "JPEG", quality=90)
    whole = encoded(Image.open(io.BytesIO(content)), "PNG")  # decoded in full
    for size in (32, 64, 100):
        for crop in (Centre(size, size // 14), RandomCrops(size, 0, 0, 1, (0.5, 1.0))):
            difference = abs(shown(content, crop).astype(int) - shown(whole, crop))
            assert 0 < difference.mean() < 3 and difference.max() < 32, (size, difference.mean(), difference.max())
    assert numpy.array_equal(shown(content, Centre(224)), shown(whole, Centre(224)))


def test_of_several_pictures_the_first_is_shown():
    first, second = (Image.new("RGB", (20, 20), (grey,) * 3) for grey in (10, 200))
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        assert abs(shown(encoded(first, kind, save_all=True, append_images=[second])).mean() - 10) < 2, kind


@pytest.mark.parametrize("size", [(1, 1), (8000, 10), (10, 8000), (1, 300)])
def test_extreme_sizes_are_shown(size):
    for crop in (WHOLE, RandomCrops(32, 0, 0, 1, (0.08, 1.0))):
        assert (shown(encoded(Image.new("RGB", size, (9, 9, 9))), crop) == 9).all()


def test_the_preparation_of_an_image_is_described():
    about = {"image_size": 64, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert "shorter side resized to 64 (bilinear, antialiased), centre of 64x64" in describe_preparation(about)
    assert "colour 255,255,255;" in describe_preparation(about)
    imagenet = describe_preparation(about | {"margin": -4, "background": [1, 2, 3]})
    assert "resized to 72 (" in imagenet and "centre of 64x64" in imagenet and "colour 1,2,3;" in imagenet
    padded = describe_preparation(about | {"margin": 2, "source_size": 32})
    assert "resized to 28 (" in padded and "centre of 28x28 cut out; 2 black pixels added on each side" in padded
    assert padded.endswith("/ std; resized from 32x32 to 64x64 (bilinear)")


def test_no_other_program_is_started_for_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program is started"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(BrokenImage, match="no known image format"):
        shown(script)
    assert not {".eps", ".ps", ".pdf", ".wmf"} & endings()
    assert {".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm", ".pgm"} <= endings()


def png_of(width: int, height: int) -> bytes:
    """A small PNG that claims this size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(65000, 1), (1, MAX_SIDE + 1), (12000, 12000)])
def test_a_size_beyond_the_limits_is_refused_before_it_is_decoded(width, height):
    with pytest.raises(BrokenImage, match=f"{width}x{height} pixels"):
        shown(png_of(width, height))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "TGA", "JPEG2000"])
def test_whatever_a_decoder_raises_is_an_unreadable_image(kind):
    content, random = encoded(photograph(40, 30), kind), numpy.random.default_rng(0)
    for number in range(60):
        damaged = bytearray(content[: random.integers(1, len(content))] if number % 2 else content)
        for place in random.integers(0, len(damaged), 5):
            damaged[place] = random.integers(256)
        try:
            assert shown(bytes(damaged)).shape == (32, 32, 3)
        except BrokenImage as error:
            assert str(error) and "\n" not in str(error)


def test_a_decoder_may_raise_anything(monkeypatch):
    def fail(*_):
        raise AttributeError("of a parser")

    monkeypatch.setattr("dataset.decoding.convert_to_rgb", fail)
    with pytest.raises(BrokenImage, match="AttributeError of a parser"):
        shown(encoded(photograph(40, 40)))


def test_one_unreadable_image_is_a_line_for_prediction(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    record = {"image_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    messages = {"a.jpg": "IMAGE: .*a.jpg cannot be read as an image .it is empty", "b.jpg": "there is no file .*b.jpg"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            read_normalised(tmp_path / name, record)


def test_streams_of_random_numbers_have_seeds_of_their_own():
    seeds = [epoch_seed(1, 2, *numbers) for numbers in ((), (0,), (0, 0), (0, 0, 0), (1,), (0, 1))]
    seeds += [epoch_seed(1, 2, *numbers, stream="crops") for numbers in ((), (0,), (0, 0))]
    assert len(set(seeds)) == len(seeds)
    assert epoch_seed(1, 2) == int(numpy.random.SeedSequence((1, 2)).generate_state(1)[0]), "the order of all versions"


def test_usual_formats_and_modes_are_read(tmp_path):
    image = Image.fromarray(numpy.full((9, 9, 3), 200, numpy.uint8))
    for name in ("a.bmp", "a.tif", "a.png", "a.webp"):
        image.save(tmp_path / name)
        assert (square(tmp_path / name, 9).float() - 200).abs().max() <= 2
    for mode, kind in (("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpeg"), ("1", "png")):
        seen = image.convert(mode)
        seen.save(tmp_path / f"b.{kind}", **({"transparency": bytes([255] * 256)} if mode == "P" else {}))
        expected = 255 if mode == "1" else 200
        shown = square(tmp_path / f"b.{kind}", 9).float()
        assert shown.shape == (3, 9, 9) and (shown.mean() - expected).abs() <= (55 if mode == "1" else 8), mode


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_greys_of_16_bits_are_scaled_to_8(tmp_path, name):
    greys = numpy.arange(0, 2**16, 2**6, dtype=numpy.uint16).reshape(32, 32)
    Image.fromarray(greys).save(tmp_path / name)
    expected = torch.from_numpy((greys >> 8).astype(numpy.uint8)).expand(3, -1, -1)
    assert torch.equal(square(tmp_path / name, 32), expected)
