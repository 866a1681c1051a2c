"""Bad input in quantity: either a step is trained, or it is one line for the person at the terminal; nothing else.

EXAMPLES=2000 in the environment asks for as many of each; docs/reliability.md has the figures.
"""

import itertools
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from helper.options import student_parser
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import train_cifar_student
import train_teacher
from distiller_zoo import DISTILLERS
from errors import UserError
from models.checkpoints import read_checkpoint

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


@pytest.fixture(autouse=True)
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
    """Everything in a folder but what stands in the places where runs may write."""
    return {path for path in folder.rglob("*") if "save" not in path.relative_to(folder).parts}


# The command line.

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
ACTIONS = {
    action.option_strings[-1]: action
    for action in student_parser()._actions
    if action.dest not in ("help", "save_dir", "resume", "max_steps", "trials", "num_workers")
}
#: Numbers that stand for memory or time are kept small; everything else is drawn at will.
SIZES = {"co_sponge", "nce_k", "branches", "feat_dim", "image_size", "batch_size"}


def values_of(action):
    if action.dest in ("data", "path_t"):
        return st.sampled_from(("{images}", "{teacher}", "{file}", "{none}", "/", ""))
    chosen = [st.sampled_from(WORDS)]
    if action.dest == "distill":
        chosen = [st.sampled_from(sorted(DISTILLERS))] * 4 + chosen
    elif action.dest in ("model_s", "model_t"):
        chosen = [st.sampled_from(("resnet8", "resnet14", "vgg8", "wrn_16_1", "ShuffleV1", "MobileNetV2"))] * 4 + chosen
    elif action.dest == "dataset":
        return st.sampled_from(("folder", "digits", "imagenet", ""))
    elif action.choices:
        chosen = [st.sampled_from(list(map(str, action.choices)))] * 3 + chosen
    elif action.dest not in SIZES:
        chosen += [st.integers().map(str), st.floats().map(str), st.text(max_size=5)]
    return st.one_of(st.integers(1, 8).map(str), st.floats(0, 1).map(str), *chosen)


@st.composite
def flags(draw):
    """Up to five flags with values, most of them of the right kind."""
    chosen = draw(st.lists(st.sampled_from(sorted(ACTIONS)), max_size=5))
    argv = []
    for name in chosen:
        argv.append(name)
        if ACTIONS[name].nargs != 0:
            argv += [draw(values_of(ACTIONS[name]))]
    return argv


@often
@given(argv=flags())
def test_any_command_line_trains_or_is_refused_in_one_line(place, argv):
    save_dir = place / "save" / str(next(NUMBERS))
    names = {"images": place / "images", "teacher": teacher_of(place), "file": place / "file", "none": place / "none"}
    known = {"{" + name + "}": str(value) for name, value in names.items()}
    base = ["--model_s", "resnet8", "--distill", "kd", "--path_t", str(teacher_of(place)), "--allow_teacher_gap"]
    before = inventory(place)
    argv = [*base, *(known.get(part, part) for part in argv), "--max_steps", "1", "--save_dir", str(save_dir)]
    trained = trains(train_cifar_student.main, argv)
    assert inventory(place) == before
    written = [path for path in save_dir.glob("*") if path.is_dir()]
    assert len(written) >= 1 if trained else all((path / "log.txt").exists() for path in written)
    shutil.rmtree(save_dir, ignore_errors=True)


# config.json of a run folder that is resumed.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
#: Settings whose large values only cost memory or time.
COSTLY = ("num_workers", "batch_size", "image_size", "max_steps")


@often
@given(data=st.data())
def test_any_stored_configuration_goes_on_or_is_refused_in_one_line(place, data):
    run = place / "save" / str(next(NUMBERS)) / "run"
    shutil.copytree(student_of(place), run)
    stored = json.loads((run / "config.json").read_text())
    for name in data.draw(st.lists(st.sampled_from(sorted({*stored} - {*COSTLY})), min_size=1, max_size=3)):
        how = data.draw(st.sampled_from(("other", "gone", "unknown")))
        if how == "gone":
            stored.pop(name, None)
        else:
            outside = [str(place / "outside"), "../../outside", "/proc/outside"]
            stored[name if how == "other" else name + "_"] = data.draw(JSON | st.sampled_from(outside))
    (run / "config.json").write_text(json.dumps(stored))
    before = inventory(place)
    trains(train_cifar_student.main, ["--resume", str(run), "--max_steps", "2", "--epochs", "3"])
    assert inventory(place) == before and [path.name for path in run.parent.iterdir()] == ["run"]
    shutil.rmtree(run.parent)


# Checkpoints.


def entries(checkpoint, path=()):
    """Paths of keys to every value of nested dictionaries and lists."""
    items = checkpoint.items() if isinstance(checkpoint, dict) else enumerate(checkpoint)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from entries(value, (*path, key))


def at(checkpoint, path):
    for key in path:
        checkpoint = checkpoint[key]
    return checkpoint


TENSORS = {
    "half": lambda tensor: tensor.half(),
    "double": lambda tensor: tensor.double(),
    "int8": lambda tensor: tensor.to(torch.int8),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "nan": lambda tensor: tensor.float() * torch.nan,
    "flat": lambda tensor: tensor.flatten(),
    "wider": lambda tensor: tensor[None],
    "empty": lambda tensor: tensor.flatten()[:0],
    "sparse": lambda tensor: tensor.float().to_sparse(),
    "on meta": lambda tensor: tensor.to("meta"),
}
ODD = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=5)
ODD |= st.sampled_from([[], {}, (), "../../outside", torch.zeros(3), torch.zeros(()), {"a": 1}, [1.0, "x"]])


def spoil(data, checkpoint: dict) -> dict:
    """A checkpoint with one or two entries taken out, exchanged, renamed, or of another kind."""
    for _ in range(data.draw(st.integers(1, 2))):
        paths = list(entries(checkpoint))
        path = data.draw(st.sampled_from(paths))
        holder, key = at(checkpoint, path[:-1]), path[-1]
        value = holder[key]
        how = data.draw(st.sampled_from(("gone", "odd", "other tensor", "swapped", "renamed")))
        if how == "gone":
            del holder[key]
        elif how == "other tensor" and isinstance(value, torch.Tensor):
            holder[key] = TENSORS[data.draw(st.sampled_from(sorted(TENSORS)))](value)
        elif how == "swapped":
            other = data.draw(st.sampled_from([other for other in paths if other[:-1] == path[:-1]]))[-1]
            holder[key], holder[other] = holder[other], holder[key]
        elif how == "renamed" and isinstance(holder, dict):
            holder[str(key) + "_"] = holder.pop(key)
        else:
            holder[key] = data.draw(ODD)
    return checkpoint


def damage(data, content: bytes) -> bytes:
    """Flipped bits, a cut, or an overwritten stretch."""
    where = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(("flip", "cut", "overwrite")))
    if how == "cut":
        return content[:where]
    if how == "flip":
        return content[:where] + bytes([content[where] ^ 1 << data.draw(st.integers(0, 7))]) + content[where + 1 :]
    return content[:where] + data.draw(st.binary(min_size=1, max_size=64)) + content[where + 64 :]


@often
@given(data=st.data())
@pytest.mark.parametrize("use", ["teacher", "resume"])
def test_any_checkpoint_is_used_or_refused_in_one_line(place, data, use):
    folder = place / "save" / str(next(NUMBERS))
    source = teacher_of(place) if use == "teacher" else student_of(place) / "last.pth"
    spoiled = folder / "run" / "last.pth"
    if use == "resume":
        shutil.copytree(student_of(place), folder / "run")
        argv = ["--resume", str(folder / "run"), "--max_steps", "2", "--epochs", "3"]
    else:
        (folder / "run").mkdir(parents=True)
        argv = ["--path_t", str(spoiled), "--distill", "kd", "--model_s", "resnet8", "--allow_teacher_gap"]
        argv += ["--max_steps", "1", "--save_dir", str(folder / "new")]
    if data.draw(st.booleans()):
        spoiled.write_bytes(damage(data, source.read_bytes()))
    else:
        with warnings.catch_warnings(action="ignore"):  # torch's, of what is done to tensors here
            torch.save(spoil(data, read_checkpoint(source)), spoiled)
    before = inventory(place)
    if trains(train_cifar_student.main, argv) and use == "resume":
        weights = read_checkpoint(spoiled)["distiller"].values()
        assert all(value.isfinite().all() for value in weights)
    assert inventory(place) == before
    shutil.rmtree(folder)


# Folders of images.

MODES = ("RGB", "L", "LA", "RGBA", "P", "1", "I", "I;16", "F", "CMYK", "YCbCr", "HSV")
KINDS = {"jpg": "JPEG", "png": "PNG", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP"}
#: Whatever a file system takes as a name.
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=6)
NAMES = NAMES.filter(lambda name: name not in (".", "..")) | st.sampled_from(
    ["a\nb", "\udcff", " ", "-r", "*", "%s{}", "a.png"]
)


def add_something(data, folder: Path) -> None:
    """An image of any kind, a broken one, or something that is none."""
    what = data.draw(
        st.sampled_from(("image", "image", "broken", "text", "empty", "loop", "dangling", "folder", "gone"))
    )
    suffix = data.draw(st.sampled_from(sorted(KINDS)))
    path = folder / f"new.{suffix}"
    try:
        if what in ("image", "broken"):
            size = data.draw(st.tuples(st.sampled_from([1, 2, 8, 33]), st.sampled_from([1, 2, 8, 33])))
            image = Image.new(data.draw(st.sampled_from(MODES)), size)
            try:
                image.save(path, KINDS[suffix])
            except (OSError, ValueError):  # the format has no such mode
                image.convert("RGB").save(path, KINDS[suffix])
            if what == "broken":
                path.write_bytes(damage(data, path.read_bytes()))
        elif what in ("text", "empty"):
            path.write_text("text" if what == "text" else "")
        elif what == "loop":
            (folder / "loop").symlink_to(folder)
        elif what == "dangling":
            path.symlink_to(folder / "nowhere")
        elif what == "folder":
            path.mkdir()
        else:
            shutil.rmtree(folder)
    except (FileExistsError, IsADirectoryError):
        pass


@often
@given(data=st.data())
def test_any_folder_of_images_trains_or_is_refused_in_one_line(place, data):
    folder = place / "save" / str(next(NUMBERS))
    classes = data.draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    write_images(folder / "images", classes, data.draw(st.integers(1, 2)))
    for _ in range(data.draw(st.integers(0, 3))):
        split, name = data.draw(st.sampled_from(("train", "val"))), data.draw(st.sampled_from(classes))
        if (folder / "images" / split / name).is_dir():
            add_something(data, folder / "images" / split / name)
    argv = ["--model", "resnet8", "--dataset", "folder", "--data", str(folder / "images"), "--image_size", "8"]
    with warnings.catch_warnings(action="ignore"):  # PIL warns of what is odd in files
        trains(train_teacher.main, [*argv, "--max_steps", "1", "--batch_size", "2", "--save_dir", str(folder / "runs")])
    shutil.rmtree(folder)
