"""What the tests of drawn inputs share: how often they draw, a place with small inputs, the judgement."""

import itertools
import os
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from PIL import Image

import train_cifar_student
import train_teacher
from errors import UserError

EXAMPLES = int(os.environ.get("EXAMPLES", "12"))
often = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 100,
    database=None,
    phases=(Phase.explicit, Phase.generate) if EXAMPLES > 1000 else tuple(Phase),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
NUMBERS = itertools.count()


def trains(main, argv: list[str]) -> bool:
    """Whether a command line trains; it must be refused in one line otherwise."""
    try:
        main(argv)
    except UserError as error:
        assert str(error) and len(str(error).splitlines()) == 1
        return False
    return True


def write_images(folder: Path, classes=("cat", "dog"), images: int = 2) -> Path:
    draw = numpy.random.default_rng(0)
    for split, name, number in itertools.product(("train", "val"), classes, range(images)):
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 255, (8, 8, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture
def nothing_is_compiled(monkeypatch):
    """The compiler would take a minute for an example."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A data set of eight images, a teacher of it, and the run of a student."""
    place = tmp_path_factory.mktemp("place")
    write_images(place / "images")
    data = ["--dataset", "folder", "--data", str(place / "images"), "--image_size", "8", "--max_steps", "1"]
    train_teacher.main(["--model", "resnet8", *data, "--save_dir", str(place / "teacher")])
    path = next((place / "teacher").iterdir()) / "last.pth"
    student = ["--path_t", str(path), "--distill", "kd", "--model_s", "resnet8", "--allow_teacher_gap"]
    train_cifar_student.main([*student, "--max_steps", "1", "--save_dir", str(place / "student")])
    (place / "file").write_text("text")
    return place


def teacher_of(place: Path) -> Path:
    return next((place / "teacher").iterdir()) / "last.pth"


def student_of(place: Path) -> Path:
    return next((place / "student").iterdir())


def inventory(folder: Path) -> set[Path]:
    """Everything in a folder outside of what runs may write to."""
    return {path for path in folder.rglob("*") if "save" not in path.relative_to(folder).parts}


#: Texts that somebody may take for a value.
WORDS = (
    "0",
    "1",
    "-1",
    "2",
    "0.5",
    "1e-3",
    "1e30",
    "nan",
    "inf",
    "-inf",
    "",
    " ",
    "None",
    "true",
    "1,2",
    "3,2,1",
    ",",
    "é\n",
)
