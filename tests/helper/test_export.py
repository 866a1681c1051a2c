"""Exported networks of every format: the same predictions, the record inside, and images read as in training."""

import json
import sys

import onnx
import pytest
import torch
from PIL import Image

import train_teacher
from dataset import read_normalised
from dataset.sources import digits, load_data
from errors import UserError
from helper import export
from helper.export import FORMATS, read_deployed
from models.files import RECORD
from scripts import evaluate, export_student, predict
from tests.conftest import ROOT, message_of

SHORT = ("--batch_size", "256", "--max_steps", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small folder of images of 40x48 pixels, two classes."""
    root = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", 16), ("val", 6)):
        for name, colour in (("cold", 2), ("warm", 0)):
            (root / split / name).mkdir(parents=True)
            for number in range(n):
                pixels = torch.randint(0, 120, (40, 48, 3), generator=generator, dtype=torch.uint8)
                pixels[..., colour] += 120
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """A trained network of that folder in all formats; the path of the .pth."""
    root = tmp_path_factory.mktemp("save")
    argv = ["--model", "resnet8", "--dataset", "folder", "--data", str(folder), "--image_size", "16", "--epochs", "4"]
    train_teacher.main([*argv, "--batch_size", "8", "--save_dir", str(root)])
    (run,) = root.iterdir()
    return export_student.main([str(run / "last.pth"), "--format", ",".join(FORMATS)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_predicts_the_same_for_any_batch_and_carries_its_record(exported, kind):
    reference, other = read_deployed(str(exported)), read_deployed(str(exported.with_suffix(f".{kind}")))
    with torch.inference_mode():
        for batch in (1, 3, 8):
            images = torch.randn(batch, 3, 16, 16)
            torch.testing.assert_close(reference.predict(images), other.predict(images), atol=1e-5, rtol=1e-4)
    assert other.record["classes"] == ["cold", "warm"] and other.record["image_size"] == 16
    beside = json.loads(exported.with_suffix(".json").read_text())
    assert all(other.record[name] == beside[name] for name in beside)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FORMATS, "json", "md"])
def test_what_is_shipped_names_no_folder_of_this_machine(exported, folder, kind):
    """Neither where the images are nor, as torch's exporters would, the source of every operation."""
    content = exported.with_suffix(f".{kind}").read_bytes()
    assert b"cold" in content, "it is not compressed"
    assert not [place for place in (folder, ROOT, torch.__path__[0]) if str(place).encode() in content]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"mean": [0, 0]}, "its mean is not three finite numbers"),
        ({"classes": ["cold"]}, "it names 1 class of 2"),
        ({"input": "pixels"}, "it says that it takes pixels and gives logits, but takes images and gives logits"),
        ({"output": "probabilities"}, "gives probabilities, but takes images and gives logits"),
    ],
)
def test_a_program_whose_record_is_wrong_is_refused(exported, tmp_path, entry, said):
    model = onnx.load(exported.with_suffix(".onnx"))
    (record,) = (one for one in model.metadata_props if one.key == RECORD)
    record.value = json.dumps(json.loads(record.value) | entry)
    onnx.save(model, path := tmp_path / "wrong.onnx")
    with pytest.raises(UserError, match=f"^MODEL: {path} is damaged: .*{said}"):
        read_deployed(str(path))


@pytest.mark.slow
def test_what_a_program_cannot_be_asked_for_is_said(exported, folder, capsys):
    argv = [str(exported.with_suffix(".onnx")), "--data", str(folder)]
    assert "another architecture, resnet8, than --model resnet20" in message_of(
        evaluate.main, [*argv, "--model", "resnet20"]
    )
    evaluate.main([*argv, "--ema"])
    assert "one set of weights: --ema changes nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_a_network_is_compared_at_its_size_where_its_images_are_gone(exported, tmp_path, capsys):
    checkpoint = exported.with_name("last.pth")
    argv = [str(checkpoint), "--dataset", "digits", "--format", "pth,pt2", "--out", str(tmp_path / "x.pth")]
    export_student.main(argv)  # digits have 32 pixels, the network's images 16
    assert "73 test images of digits" in capsys.readouterr().out and (tmp_path / "x.pt2").exists()


def test_a_folder_without_test_images_is_split_by_the_flag_that_its_error_names(folder):
    record, place = {"dataset": "folder", "image_size": 16}, str(folder / "train")
    with pytest.raises(UserError, match=r"split it with --split 0\.2"):
        export_student.data_to_compare(record, None, place)
    assert len(export_student.data_to_compare(record, None, place, 0.25).test.targets) == 8
    assert export_student.make_parser().parse_args(["x.pth", "--split", "0.25"]).split == 0.25


@pytest.mark.parametrize("kind", FORMATS)
def test_photographs_are_predicted(exported, folder, kind, capsys):
    images = [str(path) for path in sorted((folder / "val").glob("*/*.png"))]
    predict.main([str(exported.with_suffix(f".{kind}")), *images, "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    for path, line in zip(images, lines, strict=True):
        assert line.startswith(f"{path}: {'cold' if 'cold' in path else 'warm'} ")
        assert sum(float(part.split()[-2]) for part in line.split(": ")[1].split(", ")) == pytest.approx(100, abs=0.2)


def test_an_image_file_is_read_as_the_folder_was(folder):
    data = load_data("folder", str(folder), 16)
    record = {"mean": data.mean, "std": data.std, "image_size": 16, "margin": data.margin}
    first = sorted((folder / "val" / "cold").iterdir())[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    expected = (data.test.pixels[0] / 255 - mean) / std
    torch.testing.assert_close(read_normalised(first, record), expected)


def test_an_image_with_a_margin_is_framed(tmp_path):
    Image.new("L", (28, 28), 255).save(tmp_path / "white.png")
    record = {"mean": [0.0] * 3, "std": [1.0] * 3, "image_size": 32, "margin": 2}
    image = read_normalised(tmp_path / "white.png", record)
    assert image.shape == (3, 32, 32) and image[:, 2:-2, 2:-2].min() == 1 and image.sum() == 3 * 28 * 28


def test_a_digit_of_8x8_pixels_is_enlarged_as_the_data_set_does(tmp_path):
    from sklearn.datasets import load_digits

    data, source = digits(None, 32, 0), load_digits()
    Image.fromarray((source.images[0] / 16 * 255).round().astype("uint8")).save(tmp_path / "digit.png")
    record = {"mean": [0.0] * 3, "std": [1.0] * 3, "image_size": 32}
    expected = data.test.pixels[0] / 255
    assert (read_normalised(tmp_path / "digit.png", record) - expected).abs().max() < 0.01


@pytest.mark.slow
def test_the_difference_to_the_trained_network_is_printed_per_file(distil, capsys):
    run = distil(*SHORT)
    capsys.readouterr()
    out = export_student.main([str(run / "last.pth"), "--out", str(run / "student.onnx")])
    printed = capsys.readouterr().out
    assert out == run / "student.onnx" and printed.count("largest difference of a logit") == 1
    assert "same class on 73 of 73" in printed and not (run / "student.pth").exists()


@pytest.mark.slow
def test_an_onnx_file_that_differs_is_not_written(distil, monkeypatch):
    run = distil(*SHORT)
    write, read = FORMATS["onnx"]

    def shifted(path, flag):
        model = read(path, flag)
        return model._replace(predict=lambda images: model.predict(images) + 1)

    monkeypatch.setitem(FORMATS, "onnx", (write, shifted))
    assert "differs" in message_of(export_student.main, [str(run / "last.pth"), "--out", str(run / "student.onnx")])
    assert not list(run.glob("student*"))


def test_a_missing_library_is_named(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    argv = [str(exported.with_name("last.pth")), "--format", "onnx", "--out", str(tmp_path / "x.onnx")]
    assert "onnxscript is not installed; pip install" in message_of(export_student.main, argv)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_predicted_is_one_line(exported, folder, tmp_path, monkeypatch):
    image = str(next((folder / "val" / "warm").iterdir()))
    assert "there is no file" in message_of(predict.main, [str(tmp_path / "none.pth"), image])
    assert f"{tmp_path} is a folder; name a file in it" in message_of(predict.main, [str(tmp_path), image])
    (tmp_path / "model.txt").write_text("x")
    argv = [str(tmp_path / "model.txt"), image]
    assert "is no .pth, .safetensors, .pt2, .onnx file" in message_of(predict.main, argv)
    for kind in FORMATS:
        whole = exported.with_suffix(f".{kind}").read_bytes()
        cut = tmp_path / f"cut.{kind}"
        cut.write_bytes(whole[: len(whole) // 2])
        assert "cannot be read" in message_of(predict.main, [str(cut), image])
    run = exported.parent
    config = (run / "config.json").read_text()
    argv = [str(run / "last.pth"), "--out", str(run / "config.pth")]
    assert "config.json is another file" in message_of(export_student.main, argv)
    assert (run / "config.json").read_text() == config
    argv = [image, "--format", "tar"]
    assert "must be of pth, safetensors, pt2, onnx, not tar" in message_of(export_student.main, argv)
    monkeypatch.setattr(export, "RECORD", "another")
    for kind in ("pt2", "onnx"):
        with pytest.raises(UserError, match="does not say what it was trained on"):
            read_deployed(str(exported.with_suffix(f".{kind}")))


def test_a_network_without_classes_is_refused(exported, folder, tmp_path):
    content = torch.load(exported, weights_only=True)
    record = {key: value for key, value in content["record"].items() if key not in ("classes", "mean")}
    torch.save(content | {"record": record}, tmp_path / "bare.pth")
    image = str(next((folder / "val" / "warm").iterdir()))
    assert "does not say classes, mean" in message_of(predict.main, [str(tmp_path / "bare.pth"), image])


class Attention(torch.nn.Module):
    """Attention without a dimension for heads, which torch's ONNX exporter does not know."""

    def forward(self, images):
        rows = images.mean(1)
        return torch.nn.functional.scaled_dot_product_attention(rows, rows, rows).flatten(1)


def test_a_network_that_torch_cannot_export_is_refused(tmp_path):
    pytest.importorskip("onnxscript")
    record = {"image_size": 8, "model_name": "timm:some_vit"}
    with pytest.raises(UserError, match=r"--format onnx: torch .* cannot export timm:some_vit .*4D.*; choose another"):
        export.write_onnx(Attention(), record, str(tmp_path / "network.onnx"))
    assert not list(tmp_path.iterdir())


class OfOneSize(torch.nn.Module):
    """Its code reads the size of a batch as a number."""

    def forward(self, images):
        return torch.zeros(1, 1).expand(len(images), -1) + images.mean((2, 3))


def test_a_network_that_torch_would_write_for_one_size_of_batch_is_refused(tmp_path):
    pytest.importorskip("onnxscript")
    record = {"image_size": 8, "model_name": "mine"}
    with pytest.raises(UserError, match=r"--format onnx: .* cannot export mine \(.*x.shape\[0\] .* keeps it open, len"):
        export.write_onnx(OfOneSize(), record, str(tmp_path / "mine.onnx"))
    assert not list(tmp_path.iterdir())
