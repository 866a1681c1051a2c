"""Files in quantity, checkpoints and folders of images: either a step is trained, or it is one line for the person at
the terminal; nothing else.

EXAMPLES=2000 in the environment asks for as many of each; docs/reliability.md has the figures.
"""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import train_cifar_student
import train_teacher
from models.checkpoints import read_checkpoint
from tests.drawn import (
    NUMBERS,
    inventory,
    nothing_is_compiled,
    often,
    place,
    student_of,
    teacher_of,
    trains,
    write_images,
)

__all__ = ["nothing_is_compiled", "place"]  # fixtures
pytestmark = pytest.mark.usefixtures("nothing_is_compiled")

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


@pytest.mark.slow
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
        checkpoint = read_checkpoint(spoiled)
        for weights in (checkpoint["model"], checkpoint["training"]["distiller"]):
            assert all(value.isfinite().all() for value in weights.values())
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


@pytest.mark.slow
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
