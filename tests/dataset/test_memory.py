"""Folders in memory take the memory of their pixels once."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from dataset import Images, images
from tests.conftest import ROOT

#: Pixels on a side and number of the images that are measured: next to them, what libraries allocate is little.
SIDE, COUNT = 128, 2000
#: Loads two folders of such images, the first to load libraries; prints the peak growth of the second in bytes.
MEASURE = """
import re, sys
from pathlib import Path
from dataset import hold_out, load_data

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

def load(path):
    data = load_data("folder", path, int(sys.argv[3]), 0)
    return hold_out(data.train, len(data.train.targets) // 5, data.classes)

load(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
load(sys.argv[2])
print(peak() - before)
"""


def write_folder(root: Path, images: int) -> str:
    pixels = numpy.random.default_rng(0).integers(0, 256, (images, SIDE, SIDE, 3), dtype=numpy.uint8)
    for number, image in enumerate(pixels):
        path = root / ("val" if number < 10 else "train") / f"class{number % 5}"
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / f"{number}.bmp")
    return str(root)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says how much memory was used")
def test_a_folder_in_memory_peaks_at_its_pixels(tmp_path):
    """And at a third of them for the statistics of a channel, or a fifth that is held out; not at a second copy."""
    folders = [write_folder(tmp_path / str(count), count) for count in (50, COUNT)]
    command = [sys.executable, "-c", MEASURE, *folders, str(SIDE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < int(done.stdout) / (COUNT * 3 * SIDE**2) < 1.7


def test_images_are_kept_within_their_memory(monkeypatch):
    monkeypatch.setattr(images, "AT_ONCE", 7)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (100, 3, 4, 4), dtype=torch.uint8, generator=generator)
    for share in (0.1, 0.3, 0.97, 1.0):
        chosen = torch.rand(100, generator=generator) < share
        split = Images(pixels.clone(), torch.arange(100))
        expected = split.select(chosen)
        kept = split.keep(chosen)
        assert torch.equal(kept.pixels, expected.pixels) and torch.equal(kept.targets, expected.targets)
        assert kept.pixels.data_ptr() == split.pixels.data_ptr()
