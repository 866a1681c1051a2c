"""scripts/predict.py: which images it reads, what it writes, and what it does with those that cannot be read."""

import csv
import io
import json

import pytest
import torch
from PIL import Image

from helper.export import Deployed
from scripts import predict
from tests.conftest import message_of

RECORD = {"classes": ["dark", "bright"], "mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 8}


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of dark and bright images, and a broken one, in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all" / "inner").mkdir(parents=True)
    for place, colour in (("a.png", 255), ("b.png", 0), ("inner/c.jpg", 255)):
        Image.new("RGB", (12, 9), (colour,) * 3).save(tmp_path / "all" / place)
    (tmp_path / "all" / "broken.png").write_text("no image")
    (tmp_path / "all" / "notes.txt").write_text("no image")
    model = Deployed(lambda pixels: torch.stack([-pixels.mean((1, 2, 3)), pixels.mean((1, 2, 3))], 1), RECORD)
    monkeypatch.setattr(predict, "read_deployed", lambda path, device: model)
    return tmp_path / "all"


def run(*argv: str, code: int = 0) -> None:
    if not code:
        predict.main(["model.onnx", *argv])
        return
    with pytest.raises(SystemExit) as caught:
        predict.main(["model.onnx", *argv])
    assert caught.value.code == code


def test_a_folder_is_read_and_what_is_broken_is_named(images, capsys):
    run("all", "--batch_size", "2", code=1)
    printed = capsys.readouterr()
    assert [line.split(" ")[:2] for line in printed.out.splitlines()] == [
        ["all/a.png:", "bright"],
        ["all/b.png:", "dark"],
        ["all/inner/c.jpg:", "bright"],
    ]
    assert "skipped: IMAGE: all/broken.png cannot be read" in printed.err and "1 of the images" in printed.err
    assert "left out 1 file below all, by name no images: notes.txt" in printed.err


def test_patterns_and_a_list_on_standard_input(images, capsys, monkeypatch):
    run("all/[ab].png", "all/**/c.jpg", "--top", "5")
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        *("all/a.png", "all/b.png", "all/inner/c.jpg")
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("all/b.png\n\nall/none.png\n"))
    run("-", code=1)
    printed = capsys.readouterr()
    assert printed.out.startswith("all/b.png: dark")
    assert "skipped: IMAGE: there is no file all/none.png\n" in printed.err


def test_tables_and_lists_are_written(images, capsys):
    run("all", "--csv", "out.csv", "--json", "out.json", "--top", "2", code=1)
    assert not capsys.readouterr().out
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class_1"] for row in rows] == ["bright", "dark", "bright"]
    assert sum(float(rows[0][f"probability_{number}"]) for number in (1, 2)) == pytest.approx(1, abs=1e-5)
    with open("out.json") as file:
        entries = json.load(file)
    assert [entry["image"] for entry in entries] == [*("all/a.png", "all/b.png", "all/broken.png", "all/inner/c.jpg")]
    assert "cannot be read" in entries[2]["error"] and entries[1]["classes"][0]["class"] == "dark"
    run("all/a.png", "--json", "-")
    assert json.loads(capsys.readouterr().out)[0]["classes"] == [
        {"class": "bright", "probability": pytest.approx(0.880797, abs=1e-5)}
    ]


def test_results_are_written_as_they_come(images):
    model = predict.read_model("model.onnx", torch.device("cpu"))
    asked = []

    def names():
        for name in ("all/a.png", "all/b.png", "all/inner/c.jpg"):
            asked.append(name)
            yield name

    found = predict.predict(model, names(), 1, 2)
    assert next(found).classes[0][0] == "bright" and len(asked) == 2


def test_faults_are_named(images, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty is a folder without images" in message_of(predict.main, ["model.onnx", "empty"])
    assert "*.tiff matches no file" in message_of(predict.main, ["model.onnx", "all/*.tiff"])
    both = ["model.onnx", "all/a.png", "--csv", "-", "--json", "-"]
    assert "--json: - is --csv's already; name another" in message_of(predict.main, both)
    place = ["model.onnx", "all/a.png", "--csv", "none/out.csv"]
    assert "argument --csv: there is no folder none; make it" in message_of(predict.main, place)
