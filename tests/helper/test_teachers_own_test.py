"""A teacher of image files is checked with its weights' own test: their resize, interpolation and crop."""

import io

import numpy
import pytest
import torch
from PIL import Image

import train_cifar_student
from dataset import Centre
from dataset.decoding import read_views
from helper import networks, teacher
from models import build_model
from models.preprocessing import read_preprocessing
from tests.conftest import message_of

timm = pytest.importorskip("timm")


def picture(width: int, height: int) -> Image.Image:
    """Waves and edges, so that another crop shows, and another interpolation."""
    x, y = numpy.meshgrid(numpy.linspace(0, 48, width), numpy.linspace(0, 72, height))
    waves, edges = numpy.stack([numpy.sin(x), numpy.cos(y), numpy.sin(x + y)], 2), numpy.sin(3 * x) * numpy.cos(2 * y)
    return Image.fromarray((127 + 60 * waves + 60 * numpy.sign(edges)[..., None]).astype("uint8"))


def centre_of(source: str) -> Centre:
    own = read_preprocessing(source)
    cut = (own.test_resize - own.test_size) / 2
    return Centre(own.test_size, cut, interpolation=own.interpolation, squashes=own.squashes)


def theirs(source: str):
    """The library's own transform of an image, without its normalisation: (3, H, W) in 0..1."""
    library, _, weights = source.partition(":")
    if library == "timm":
        config = timm.data.resolve_data_config(
            pretrained_cfg=timm.get_pretrained_cfg(weights).to_dict(), use_test_size=True
        )
        transform = timm.data.create_transform(**config, is_training=False)
    else:
        from torchvision.models import get_model_weights

        name, _, version = weights.partition("@")
        transform = get_model_weights(name)[version or "DEFAULT"].transforms()
    own = read_preprocessing(source)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (own.mean, own.std))
    return lambda image: transform(image) * std + mean


SOURCES = (
    "torchvision:resnet34@IMAGENET1K_V1",
    "torchvision:resnet50@IMAGENET1K_V2",  # cuts half pixels
    "timm:resnet10t.c3_in1k",
    "timm:vit_base_patch16_clip_224.openai",  # bicubic
    "timm:convnext_base.fb_in22k_ft_in1k_384",  # squashed
)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [(500, 375), (300, 411)])
def test_what_is_shown_is_what_the_library_shows(source, size):
    image, file = picture(*size), io.BytesIO()
    image.save(file, "PNG")
    (shown,) = read_views(file.getvalue, centre_of(source))
    difference = torch.tensor(shown) - 255 * theirs(source)(image)
    assert difference.abs().max() < 2.5 and difference.abs().mean() < 0.2


@pytest.fixture
def folder(tmp_path):
    """Images of two classes in train/ and val/, none of them square."""
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for image in range(count):
                path = tmp_path / "data" / split / name / f"{image}.png"
                picture(90 + 10 * image, 70 + 20 * number).save(path)
    return tmp_path / "data"


@pytest.fixture
def check(folder, tmp_path, monkeypatch):
    """Distil for one step from timm's network of a name, with random weights."""

    def call(name: str, *flags: str) -> None:
        torch.manual_seed(0)
        network = build_model(f"timm:{name}", 2)
        monkeypatch.setattr(networks, "read_timm", lambda _: (network, {"dataset": "folder"}))
        argv = ["--model_s", "resnet8", "--path_t", f"timm:{name}", "--data", str(folder), "--save_dir", str(tmp_path)]
        small = ["--batch_size", "4", "--max_steps", "1", "--epochs", "1", "--num_workers", "0", "-s", "1"]
        train_cifar_student.main([*argv, *small, "--dataset", "folder", *flags])

    return call


@pytest.mark.parametrize("flags", [("--stream", "off"), ("--stream", "on")])
def test_the_check_reads_the_files_as_the_weights_own_test_does(check, flags, capsys):
    seen = []
    features = teacher.Teacher.predict_alone

    def spy(self, number, images, as_tested):
        seen.append((tuple(images.shape), as_tested))
        return features(self, number, images, as_tested)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher.Teacher, "predict_alone", spy)
        check("resnet10t", *flags)
    own = read_preprocessing("timm:resnet10t")
    assert seen == [((4, 3, own.test_size, own.test_size), True)] and own.test_size != own.image_size
    line = f"tested as its weights are: the shorter side {own.test_resize}, centre {own.test_size}, {own.interpolation}"
    assert line in capsys.readouterr().out


def test_files_that_cannot_be_read_end_the_check(check, folder):
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    assert "no readable image" in message_of(lambda argv: check("resnet10t", *argv), ["--stream", "on"])
