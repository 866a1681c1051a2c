"""The strong view of multi-level logit distillation: FixMatch's operations, their strengths, and the square cut out."""

import numpy
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from dataset.views import OPERATIONS, cut_out, random_operation


def pictures(n: int, size: int = 32) -> torch.Tensor:
    return torch.randint(1, 256, (n, 3, size, size), dtype=torch.uint8)


def pillow_outcomes(image: Image.Image, strength: float) -> list[Image.Image]:
    """What Pillow makes of an image by each operation of FixMatch's list, in the order of `OPERATIONS`."""
    width, height = image.size
    share, signed = 0.05 + 0.9 * strength, 0.3 * (2 * strength - 1)

    def affine(*numbers):
        return image.transform(image.size, Image.Transform.AFFINE, numbers)

    return [
        image,
        ImageOps.autocontrast(image),
        ImageOps.equalize(image),
        ImageEnhance.Brightness(image).enhance(share),
        ImageEnhance.Color(image).enhance(share),
        ImageEnhance.Contrast(image).enhance(share),
        ImageEnhance.Sharpness(image).enhance(share),
        ImageOps.posterize(image, int(4 + 4 * strength)),
        ImageOps.solarize(image, 256 * strength),
        image.rotate(-30 * (2 * strength - 1)),
        affine(1, signed, 0, 0, 1, 0),
        affine(1, 0, 0, signed, 1, 0),
        affine(1, 0, signed * width, 0, 1, 0),
        affine(1, 0, 0, 0, 1, signed * height),
    ]


@pytest.mark.parametrize("number", range(14))
def test_operations_are_pillows_each_image_at_its_own_strength(number):
    pixels, strengths = pictures(6, 24), torch.tensor([0.03, 0.2, 0.41, 0.55, 0.77, 0.98])
    ours = OPERATIONS[number](pixels, strengths)
    for image, strength, changed in zip(pixels, strengths.tolist(), ours, strict=True):
        pillow = pillow_outcomes(Image.fromarray(image.permute(1, 2, 0).numpy()), strength)[number]
        expected = torch.from_numpy(numpy.array(pillow)).permute(2, 0, 1)
        differences = (changed.int() - expected.int()).abs()
        # Grey levels are rounded in another order; at the edge of a moved pixel float32 may pick its neighbour.
        assert (differences > 1).double().mean() < 0.02, (strength, differences.max())


def test_operations_are_drawn_equally_often_and_strengths_over_the_whole_range(monkeypatch):
    n, seen = 14 * 500, {}

    def noting(number):
        return lambda pixels, strength: seen.setdefault(number, strength) is None or pixels

    monkeypatch.setattr("dataset.views.OPERATIONS", [noting(number) for number in range(14)])
    pixels = torch.arange(n).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    assert torch.equal(random_operation(pixels), pixels)
    assert [len(strengths) for strengths in seen.values()] == pytest.approx([500] * 14, abs=110)
    strengths = torch.cat(list(seen.values()))
    assert torch.histc(strengths, 10, 0, 1).tolist() == pytest.approx([n / 10] * 10, abs=125)


def test_one_square_of_the_published_colour_is_cut_out():
    n = 4000
    cut = cut_out(torch.zeros(n, 3, 32, 32, dtype=torch.uint8))
    assert torch.equal(cut.amax((0, 2, 3)), torch.tensor([125, 123, 114], dtype=torch.uint8))
    holes = (cut > 0).all(1)
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), heights * widths)  # a rectangle: a square, or what the border leaves of it
    # The centre is uniform over the image and the side over 0 to half of it, so every side is cut at some border.
    assert widths.max() == 16 and (widths != heights).double().mean() > 0.2
    # Half the side reaches beyond the image on one of two borders where the centre is nearer than that.
    covered = holes.double().mean(0)
    assert torch.allclose(covered, covered.T, atol=0.05) and covered[16, 16] > 1.5 * covered[0, 0]


def test_what_is_not_cut_out_stays():
    pixels = pictures(200)
    cut = cut_out(pixels)
    kept = (cut == pixels).all(1)
    colour = torch.tensor([125, 123, 114], dtype=torch.uint8).view(1, 3, 1, 1)
    assert (kept | (cut == colour).all(1)).all() and not kept.all() and cut.dtype == torch.uint8
