"""scripts/evaluate.py: which images a network is judged on, and how it is shown them."""

import shutil
from pathlib import Path

import pytest
import torch

from helper.export import write_pth
from models import build_model
from scripts import evaluate, predict
from tests.conftest import message_of
from tests.dataset.image_folders import write_images


def shipped(path: Path, classes=("cat", "dog"), **record) -> str:
    """An exported file of a network that was trained in a folder that is not here."""
    record = {"model_name": "resnet8", "num_classes": len(classes), "classes": list(classes), "image_size": 32} | record
    record |= {"dataset": "folder", "data": "/elsewhere", "mean": [0.4] * 3, "std": [0.3] * 3}
    write_pth(build_model("resnet8", len(classes)), record, str(path))
    return str(path)


def test_settings_of_a_checkpoint_that_are_of_another_kind_are_no_traceback(tmp_path):
    file, folder = shipped(tmp_path / "it.pth"), str(write_images(tmp_path / "data", side=32))
    sound = torch.load(file, weights_only=True)
    for config, said in ((5, "is not a whole checkpoint of a run"), ({"holdout": "few"}, "its holdout is not a")):
        torch.save(sound | {"training": {"config": config}}, file)
        assert said in message_of(evaluate.main, [file, "--data", folder])


def test_logits_that_are_not_finite_are_no_accuracy(tmp_path):
    file, folder, bad = (
        shipped(tmp_path / "it.pth"),
        write_images(tmp_path / "data", side=32),
        str(tmp_path / "bad.pth"),
    )
    content = torch.load(file, weights_only=True)
    content["model"]["fc.weight"].fill_(3e38)  # finite, as what is read must be
    torch.save(content, bad)
    argv, out = ["--data", str(folder), "--json", str(tmp_path / "out.json")], tmp_path / "out.json"
    assert f"NETWORK: {bad}: its logits of 10 of 10 images are not" in message_of(evaluate.main, [bad, *argv])
    assert f"--teacher: {bad}: its logits of 10" in message_of(evaluate.main, [file, "--teacher", bad, *argv])
    assert "MODEL: its logits of 10 of 10" in message_of(predict.main, [bad, str(folder / "val"), *argv[2:]])
    assert not out.exists()


def test_the_result_names_the_folder_that_was_judged_on(tmp_path):
    folder = write_images(tmp_path / "data", side=32)
    (about,) = evaluate.main([shipped(tmp_path / "it.pth"), "--data", str(folder)])
    assert about["data"] == str(folder) and about["test_images"] == 10


def test_weights_of_another_code_are_shown_the_normalisation_that_is_named(tmp_path, capsys):
    file, folder = shipped(tmp_path / "it.pth"), str(write_images(tmp_path / "data", side=32))
    torch.save(torch.load(file, weights_only=True)["model"], other := tmp_path / "other.pth")
    flags = ["--data", folder, "--model", "resnet8"]
    (known,) = evaluate.main([file, *flags])
    assert "does not say its mean" not in capsys.readouterr().out
    (given,) = evaluate.main([str(other), *flags, "--normalisation", "0.4,0.4,0.4,0.3,0.3,0.3"])
    assert given["loss"] == pytest.approx(known["loss"]) and "does not say" not in capsys.readouterr().out
    (guessed,) = evaluate.main([str(other), *flags])
    assert guessed["loss"] != pytest.approx(known["loss"])
    assert f"note: {other} does not say its mean and std, so images have those" in capsys.readouterr().out
    said = message_of(evaluate.main, [file, *flags, "--normalisation", "imagenet"])
    assert "--normalisation: " in said and "says its own mean and std" in said


def test_a_folder_of_test_images_alone_is_judged(tmp_path):
    """Its numbers are those of the same images next to training images, whatever else the network knows."""
    folder = write_images(tmp_path / "data", side=32)
    file = shipped(tmp_path / "it.pth", ("ant", "cat", "dog"))
    (alone,) = evaluate.main([file, "--data", str(folder / "val")])
    (folder / "train" / "ant").mkdir()
    shutil.copy(folder / "val" / "cat" / "0.JPEG", folder / "train" / "ant")
    (whole,) = evaluate.main([file, "--data", str(folder)])
    assert alone == whole | {"network": file, "data": str(folder / "val")}
