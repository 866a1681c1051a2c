"""An encoded image to a square of pixels: the one place that does so, for memory, streaming and prediction.

An image becomes a square in this order: its EXIF rotation is applied, transparency is laid on a colour, it becomes RGB
of 8 bits, its shorter side is resized (antialiased; bilinear, unless asked otherwise) and the centre is cut out;
training crops take a random part instead. Nothing here needs torch, so that worker processes start without it.
"""

import io
import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from dataset.seeds import SHARES, epoch_seed, torch_numbers

#: What is opened, whatever a file is called: Pillow's own decoders, none that starts another program.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "TGA", "PCX", "DCX"),
    *("SGI", "ICO", "ICNS", "QOI", "DDS", "SUN", "XBM", "XPM", "PSD", "MSP", "PIXAR", "SPIDER", "IM"),
)
#: Larger files and images are refused before they are decoded.
MAX_BYTES, MAX_SIDE, MAX_PIXELS = 2**30, 2**15, 2**27
#: Height to width of random crops, and how often one is drawn before the centre is taken.
RATIO, TRIES = (3 / 4, 4 / 3), 10
#: A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where what is shown of it stays this many times the target's size.
REDUCED = 1.5
#: What 12 bits become where files of 16 hold them: images that do not exceed this, of 255, are almost black.
ALMOST_BLACK = (2**12 - 1) // 256
WHITE = (255, 255, 255)
#: How images are resized unless something else is asked for, as Pillow calls it.
BILINEAR = "bilinear"
#: Rotations and mirrorings by their EXIF number, and those that exchange width and height.
ORIENTATION, TURNED = ExifTags.Base.Orientation, (5, 6, 7, 8)

Box = tuple[float, float, float, float]  # left, top, right, bottom


@cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow can decode."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def endings() -> frozenset[str]:
    """Endings of image files, in lower case, with their dot."""
    Image.init()
    read = {*formats(), "MPO"}  # a JPEG of several pictures
    return frozenset(ending for ending, name in Image.EXTENSION.items() if name in read)


class BrokenImage(Exception):
    """An image that cannot be read; the message says why."""


class Place(NamedTuple):
    """Where the bytes of an image are: the whole file, or `size` of its bytes from `offset` on."""

    path: bytes
    offset: int = 0
    size: int | None = None

    def count_bytes(self) -> int:
        """How many bytes the image has; 0 where there is none."""
        try:
            return os.stat(self.path).st_size if self.size is None else self.size
        except OSError:
            return 0

    def read(self) -> bytes:
        """The encoded image; raises `BrokenImage`."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                if self.size is None and os.fstat(file.fileno()).st_size > MAX_BYTES:
                    raise BrokenImage(f"the file is larger than {MAX_BYTES // 2**20} MiB")
                if self.offset:
                    file.seek(self.offset)
                return file.read(-1 if self.size is None else self.size)
        except OSError as error:
            raise BrokenImage(error.strerror or str(error)) from None


class Centre(NamedTuple):
    """The centre of an image, whose shorter side, or both with `squashes`, is resized to `size` + 2 * `cut`."""

    size: int
    cut: float = 0
    background: tuple[int, int, int] = WHITE  # under transparency
    interpolation: str = BILINEAR
    squashes: bool = False

    views = 1
    alone = False

    def of(self, keys: Sequence[int]) -> Sequence["Centre"]:
        """What is shown of each of these images."""
        return [self] * len(keys)

    def boxes(self, width: int, height: int) -> list[Box]:
        """What is shown of an image of this size, in its pixels, for each view."""
        side, short = int(self.size + 2 * self.cut), min(width, height)
        long = side if self.squashes else int(side * max(width, height) / short)
        resized = (side, long) if width == short else (long, side)
        # Half a pixel is rounded to an even number, as torchvision's CenterCrop does.
        left, top = (round((length - self.size) / 2) for length in resized)
        across, down = width / resized[0], height / resized[1]
        return [(left * across, top * down, (left + self.size) * across, (top + self.size) * down)]


class RandomCrops(NamedTuple):
    """The random-resized crops of an epoch; each depends on (seed, epoch, key of the image, view) alone."""

    size: int
    seed: int
    epoch: int
    views: int
    scale: tuple[float, float]  # share of the image's area
    background: tuple[int, int, int] = WHITE

    def of(self, keys: Sequence[int]) -> Sequence["DrawnCrops"]:
        """What is shown of each of these images."""
        pairs = itertools.product(keys, range(self.views))
        seeds = [epoch_seed(self.seed, self.epoch, key, view, stream="crops") for key, view in pairs]
        tries = draw_tries(self.scale, seeds)
        firsts = range(0, len(tries), self.views)
        return [DrawnCrops(self.size, tries[first : first + self.views], self.background) for first in firsts]


#: One try to draw a crop: its share of the image's area, the ratio of its sides, and two numbers for its top and left.
Try = tuple[float, float, int, int]


class DrawnCrops(NamedTuple):
    """The random crops of one image, one for each view."""

    size: int
    tries: Sequence[Sequence[Try]]
    background: tuple[int, int, int] = WHITE

    alone, interpolation = True, BILINEAR  # cut out before they are resized

    def boxes(self, width: int, height: int) -> list[Box]:
        """A box of whole pixels for each view."""
        return [crop_of(width, height, tries) for tries in self.tries]


#: What is shown of a split, and of one of its images.
Crop = Centre | RandomCrops
ShownPart = Centre | DrawnCrops


def draw_tries(scale: tuple[float, float], seeds: Sequence[int]) -> list[list[Try]]:
    """For each seed the tries of torchvision's `RandomResizedCrop.get_params`, number for number of torch's generator.

    For many images at once: after an image has been decoded this code is no longer in the processor's cache, which
    makes it several times as slow.
    """
    single = numpy.float32  # torch draws in single precision
    numbers = numpy.array([list(torch_numbers(seed, 2 * TRIES + 2)) for seed in seeds], numpy.int64)
    numbers = numbers.reshape(-1, 2 * TRIES + 2)
    drawn = (numbers % SHARES).astype(single) * single(1 / SHARES)

    def uniform(values: numpy.ndarray, low: single, high: single) -> numpy.ndarray:
        return values * (high - low) + low

    areas = uniform(drawn[:, 0:-2:2], *(single(part) for part in scale))
    logarithms = uniform(drawn[:, 1:-2:2], *(single(math.log(single(ratio))) for ratio in RATIO))
    ratios = [[float(single(math.exp(value))) for value in row] for row in logarithms.tolist()]
    rows = zip(areas.tolist(), ratios, numbers[:, 2::2].tolist(), numbers[:, 3::2].tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


def crop_of(width: int, height: int, tries: Sequence[Try]) -> Box:
    """The first crop that the image has room for; else the largest in its middle, within the ratios."""
    for share, ratio, top, left in tries:
        area = width * height * share
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            top, left = top % (height - down + 1), left % (width - across + 1)
            return left, top, left + across, top + down
    across, down = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def read_views(read: Callable[[], bytes], part: ShownPart) -> list[numpy.ndarray]:
    """What is shown of an image whose bytes `read()` gives: bytes (3, size, size), read-only, for each view.

    Pillow may warn of odd metadata. Raises `BrokenImage`.
    """
    content = read()
    try:
        with Image.open(io.BytesIO(content), formats=formats()) as image:
            _check_size(image)
            return _views(image, part)
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        raise BrokenImage("it is in no known image format" if content else "it is empty") from None
    except Exception as error:  # decoders raise whatever their parsers do
        known = isinstance(error, (OSError, ValueError, SyntaxError))
        reason = str(error) if known else f"{type(error).__name__} {error}"
        raise BrokenImage(" ".join(reason.split())[:200]) from None


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise BrokenImage(
            f"it has {width}x{height} pixels; at most {MAX_SIDE} on a side and {MAX_PIXELS // 10**6} million are read"
        )


def _views(image: Image.Image, part: ShownPart) -> list[numpy.ndarray]:
    if isinstance(image, JpegImageFile):
        orientation = _orientation(image)
        width, height = image.size[::-1] if orientation in TURNED else image.size
        boxes = part.boxes(width, height)
        factor = _decode_reduced(image, boxes, part.size)
    else:  # some of these formats are turned by their decoder
        image.load()
        orientation, factor = _orientation(image), 1
        width, height = image.size[::-1] if orientation in TURNED else image.size
        boxes = part.boxes(width, height)
    if orientation != 1:
        image.load()
        image = ImageOps.exif_transpose(image)
    image = convert_to_rgb(image, part.background)
    how = (part.size, part.alone, Image.Resampling[part.interpolation.upper()])
    return [_cut_out(image, [edge / factor for edge in box], *how) for box in boxes]


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata of a whole image
        return 1


def _decode_reduced(image: Image.Image, boxes: list[Box], size: int) -> int:
    """Have a JPEG decoded at a part of its size, where the boxes still have pixels enough; returns the divisor."""
    smallest = min(min(right - left, bottom - top) for left, top, right, bottom in boxes)
    factor = next((factor for factor in (8, 4, 2) if smallest >= REDUCED * size * factor), 1)
    if factor == 1:
        return 1
    width, height = image.size
    image.draft(None, (width // factor, height // factor))
    return round(width / image.size[0])


def _cut_out(image: Image.Image, box: list[float], size: int, alone: bool, how: Image.Resampling) -> numpy.ndarray:
    """A part of an image, resized: bytes (3, size, size). Nothing around it shows in its edges if `alone`."""
    width, height = image.size
    box = (max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height))
    if alone and all(edge == int(edge) for edge in box):
        image = image.crop(tuple(int(edge) for edge in box))
        box = (0, 0, *image.size)
    if box != (0, 0, size, size):
        image = image.resize((size, size), how, box)
    elif image.size != (size, size):
        image = image.crop(box)
    # Each colour by itself: half the time of all three at once, whose order would have to be changed.
    colours = b"".join(image.tobytes("raw", colour) for colour in "RGB")
    return numpy.frombuffer(colours, numpy.uint8).reshape(3, size, size)


def convert_to_rgb(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """A Pillow image of any mode with three colours of 8 bits; raises `BrokenImage` where its scale is unknown.

    Transparency is laid on `background`. Greys of 16 bits are divided by 256, of 12 bits by 16 where the file says so.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(258, 16)  # BitsPerSample
        bits = bits[0] if isinstance(bits, tuple) else bits
        greys = numpy.asarray(image).astype(numpy.uint16) >> (4 if bits == 12 else 8)
        return Image.fromarray(greys.astype(numpy.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BrokenImage(
            f"its pixels are 32-bit numbers (mode {image.mode}) of unknown scale; save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, background)
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image if image.mode == "RGB" else image.convert("RGB")


def describe_dark(places: Sequence[Place], where: str = "") -> str:
    """A warning where all of these images are almost black, as 12 bits in files of 16 are; else empty.

    A JPEG has 8 bits, and an image that cannot be read is named where it is used: neither counts.
    """
    brightest = [value for value in map(_brightest, places) if value is not None]
    if not brightest or max(brightest) > ALMOST_BLACK:
        return ""
    return (
        f"warning: images{where} are almost black: no value is above {ALMOST_BLACK} of 255 "
        f"({len(brightest)} looked at); files of 16 bits that hold numbers of 12 must be multiplied by 16 first"
    )


def _brightest(place: Place) -> int | None:
    ending = os.path.splitext(os.fsdecode(place.path))[1].lower()
    if Image.registered_extensions().get(ending) == "JPEG":
        return None  # without reading it: a disk that does not answer is found out where it can be interrupted
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(place.read()), formats=formats()) as image,
        ):
            _check_size(image)
            return None if image.format == "JPEG" else int(numpy.asarray(convert_to_rgb(image)).max())
    except Exception:  # decoders raise whatever their parsers do
        return None
