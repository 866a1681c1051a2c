"""Exported programs with the normalisation and the softmax inside, in an opset that is asked for, and in 8 bits."""

import json

import numpy
import onnx
import onnxruntime
import pytest
import torch

from dataset import Loader, describe_preparation
from dataset.sources import load_data
from helper import export
from helper.export import PROGRAMS, Program, read_deployed, to_pixels
from models import build_model
from scripts import evaluate, export_student
from tests.conftest import message_of

RECORD = {"model_name": "resnet8", "num_classes": 10, "image_size": 32, "dataset": "digits"}
RECORD |= {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.25, 0.3], "classes": list("abcdefghij"), "train_images": 1433}
WHOLE = Program(pixels=True, probabilities=True, opset=21)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    network = build_model("resnet8", 10)
    network.train()(torch.randn(64, 3, 32, 32))  # statistics that are not the initial ones
    return network.eval()


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "plain.pth"
    torch.save({"model": network.state_dict()}, path)
    return path


@torch.inference_mode()
def expected(network, pixels: torch.Tensor) -> torch.Tensor:
    """Probabilities of bytes (n, 3, 32, 32) by plain torch."""
    mean, std = (torch.tensor(RECORD[name]).view(3, 1, 1) for name in ("mean", "std"))
    return network((pixels / 255 - mean) / std).softmax(1)


@pytest.mark.slow
def test_an_onnx_file_with_everything_inside_equals_torch_on_raw_bytes(network, tmp_path):
    path = str(tmp_path / "whole.onnx")
    export.write_onnx(network, RECORD, path, WHOLE)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        pixels = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
        (found,) = session.run(["probabilities"], {"pixels": pixels.numpy()})
        numpy.testing.assert_allclose(found, expected(network, pixels), atol=1e-5)
    model = onnx.load(path)
    assert [axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim] == [
        *("batch", 3, 32, 32)
    ]
    assert export.onnx_versions(path) == (21, model.ir_version)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_whole_program_is_read_as_every_other(network, tmp_path, kind):
    path = str(tmp_path / f"whole.{kind}")
    write, _ = export.FORMATS[kind]
    write(network, RECORD, path, WHOLE)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(RECORD[name]).view(3, 1, 1) for name in ("mean", "std"))
    images = (pixels / 255 - mean) / std
    assert torch.equal(to_pixels(images, RECORD), pixels)
    with torch.inference_mode():
        logits = read_deployed(path).predict(images)
    torch.testing.assert_close(logits.softmax(1), expected(network, pixels), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("opset", [12, 999])
def test_an_opset_that_torch_does_not_write_is_refused(network, tmp_path, opset, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", None)  # which would log its attempts
    with pytest.raises(export.UserError, match=rf"--opset: {opset} cannot be written here; choose 18 to \d\d$"):
        export.write_onnx(network, RECORD, str(tmp_path / "old.onnx"), Program(opset=opset))


@pytest.mark.slow
def test_flags_without_effect_are_refused(distil, tmp_path):
    run = distil("--batch_size", "256", "--max_steps", "2", distill="kd")
    checkpoint = str(run / "last.pth")
    assert "--pixels: of the formats only" in message_of(export_student.main, [checkpoint, "--pixels"])
    assert "--opset: only ONNX files" in message_of(export_student.main, [checkpoint, "--opset", "20"])
    assert "--ft: is for files of the official code" in message_of(export_student.main, [checkpoint, "--ft", "plain"])


@pytest.mark.slow
def test_eight_bits_and_a_model_card(distil, capsys):
    run = distil("--batch_size", "64", "--epochs", "2", distill="kd")
    export_student.main([str(run / "best.pth"), "--int8", "--pixels"])
    printed = capsys.readouterr().out
    float_file, int8_file = run / "best_exported.onnx", run / "best_exported_int8.onnx"
    assert int8_file.stat().st_size < 0.6 * float_file.stat().st_size
    before, after = (evaluate.main([str(file)])[0]["accuracy"] for file in (float_file, int8_file))
    assert f"int8: accuracy {after:.2f} % (float {before:.2f} %) on 73 test images" in printed
    assert abs(before - after) < 3, "a network that has hardly learned is near its class boundaries"
    card = (run / "best_exported.md").read_text()
    teacher = json.loads((run / "best_exported.json").read_text())["teacher"]
    for text in (
        "# Model card: resnet8",
        "| licence | TO FILL IN |",
        "--distill kd",
        teacher["digest"],
        "best on test",
    ):
        assert text in card
    assert all(f"`{name}`" in card for name in ("best_exported.pth", float_file.name, int8_file.name))


def test_a_card_says_how_each_file_is_called_and_nothing_that_is_not_known(tmp_path):
    files = [tmp_path / name for name in ("x.pth", "x.onnx")]
    for file in files:
        file.write_bytes(b"")
    prepared = {"images": describe_preparation(RECORD), "distill": "ce", "identity": {"test_images": 364}}

    def card(record: dict, files, program: Program) -> str:
        return export_student.model_card(record, tmp_path / "last.pth", files, program, ["a layer is kept"], [])

    inside = card(WHOLE.recorded(RECORD | prepared), files[1:], WHOLE)
    assert "takes `pixels`: uint8, 0 to 255, which it normalises itself, (B, 3, 32, 32)" in inside
    assert "gives `probabilities`, (B, 10)" in inside and "/ 255" not in inside, "it would be normalised twice"
    outside = card(RECORD | prepared, files, Program())
    assert "takes `images`: float32, normalised" in outside and "(pixel / 255 - mean) / std" in outside
    assert "`x.pth`, 0.00 MiB: weights" in outside and "10 classes, 1,433 training images, 364 test images" in outside
    assert "| teacher | no teacher |" in outside and "; a layer is kept |" in outside
    official = {"model_name": "resnet8", "num_classes": 100, "image_size": 32, "images": ""}
    bare = card(official, files, Program())
    assert "| data | unknown: 100 classes |" in bare and "| teacher | unknown |" in bare


def test_a_card_replaces_no_other_document(distil):
    run = distil("--batch_size", "256", "--max_steps", "2", distill="kd")
    (run / "notes.md").write_text("my notes")
    argv = [str(run / "last.pth"), "--out", str(run / "notes.pth")]
    assert "notes.md is another file" in message_of(export_student.main, argv)
    assert (run / "notes.md").read_text() == "my notes"


def test_recorded_data_are_split_as_the_run_split_them():
    record = RECORD | {"data": "/photographs", "split": 0.25, "holdout": 3, "background": [1, 2, 3]}
    own, other = export.RecordedData.of(record), export.RecordedData.of(record, "folder", "/elsewhere")
    assert (own.split, own.holdout, own.background) == (0.25, 3, (1, 2, 3))
    assert (other.split, other.holdout, other.folder) == (0.0, 0, "/elsewhere")
    data = export.RecordedData.of(RECORD).load()
    assert data.mean == tuple(RECORD["mean"]) and len(load_data("digits").test.targets) == len(data.test.targets)
    calibrated = export_student.calibration_images(data)
    shown = next(iter(Loader(data.train, data, 1433, torch.device("cpu")).batches())).images
    assert len(calibrated) == 512 and any(torch.equal(calibrated[0], image) for image in shown)
