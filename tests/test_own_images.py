"""The page from a folder of images to a file of 8 bits works: its commands are run in their order."""

import csv
import shlex

import numpy
import pytest
import torch
from PIL import Image

from helper import networks
from models import build_model
from tests.conftest import ROOT
from tests.pages import commands, module_of

PAGE = (ROOT / "docs" / "own_images.md").read_text(encoding="utf-8")
#: What the commands run, each at least once.
SCRIPTS = (
    "train_teacher.py",
    "train_cifar_student.py",
    "scripts/evaluate.py",
    "scripts/export_student.py",
    "scripts/predict.py",
)
#: What makes the page's runs small, and leaves their names.
SMALL = {
    "train_teacher.py": ("--epochs", "1", "--num_workers", "0", "--batch_size", "8", "--image_size", "64"),
    "train_cifar_student.py": ("--epochs", "1", "--num_workers", "0", "--batch_size", "8"),
}
CLASSES = ("cat", "dog", "frog")


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """The page's folder in the current directory, without validation images; random weights in place of timm's."""
    monkeypatch.chdir(tmp_path)
    pixels = numpy.random.default_rng(0)
    for channel, name in enumerate(CLASSES):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for number in range(10):
            image = pixels.integers(0, 120, (60 + number, 80, 3), dtype=numpy.uint8)
            image[..., channel] += 120
            Image.fromarray(image).save(tmp_path / "photographs" / name / f"{number:04}.jpg")

    def make(name: str):
        torch.manual_seed(0)
        return build_model(f"timm:{name.partition('.')[0]}", 1000), {"dataset": "imagenet"}

    monkeypatch.setattr(networks, "read_timm", make)
    return tmp_path


@pytest.mark.slow
def test_the_commands_run_in_their_order(photographs, capsys):
    for package in ("timm", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    ran = [shlex.split(line) for line in commands(PAGE, "bash")]
    assert [script for _, script, *_ in ran] == list(SCRIPTS), "one command of each"
    found = {script: module_of(script).main([*flags, *SMALL.get(script, ())]) for _, script, *flags in ran}
    printed = capsys.readouterr().out
    assert "6 training images, each class in proportion, become it" in printed, "--split 0.2"
    assert "adamw                    (ce with recipe finetune)" in printed
    ((about,), exported) = found["scripts/evaluate.py"], found["scripts/export_student.py"]
    assert about["test_images"] == 6 and about["classes"] == list(CLASSES) and "agreement" in about
    assert exported.name == "student.onnx" and "int8: accuracy" in printed
    assert about["network"] in (photographs / "evaluation.html").read_text()
    assert "TO FILL IN" in (photographs / "student.md").read_text()
    rows = list(csv.DictReader((photographs / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 30 and {row["class_1"] for row in rows} <= set(CLASSES)
