"""`--holdout K`: training images held out to choose the best epoch on."""

import json

import pytest
import torch

import train_teacher
from dataset import Images, hold_out
from helper import run as run_module
from tests.conftest import keep_images, message_of
from tests.run_folders import load, metrics, same_state, state, weights

SMALL = ("--batch_size", "32", "--holdout", "40")


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    keep_images(monkeypatch, 160, 100)


def numbered(targets: torch.Tensor) -> Images:
    """Images whose pixels are their sample index."""
    return Images(torch.arange(len(targets)).view(-1, 1, 1, 1), targets)


def test_every_class_gives_its_share_and_nothing_is_lost():
    targets = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    left, apart = hold_out(numbered(targets), 20, list("abc"))
    assert torch.bincount(apart.targets).tolist() == [12, 6, 2] and len(left.targets) == 80
    index = torch.cat([left.pixels.flatten(), apart.pixels.flatten()])
    assert index.sort().values.tolist() == list(range(100))
    assert all(torch.equal(targets[side.pixels.flatten()], side.targets) for side in (left, apart))


def test_the_choice_depends_on_the_images_alone():
    targets = torch.arange(100) % 4
    torch.manual_seed(1)
    _, first = hold_out(numbered(targets), 8, list("abcd"))
    torch.manual_seed(2)
    _, second = hold_out(numbered(targets), 8, list("abcd"))
    assert torch.equal(first.pixels, second.pixels)


@pytest.mark.parametrize(("k", "way_out"), [(2, "more"), (99, "fewer")])
def test_a_class_without_images_is_refused(k, way_out):
    said = f"class [a-d], which has 25 images, without images on one side; hold out {way_out}"
    with pytest.raises(ValueError, match=said):
        hold_out(numbered(torch.arange(100) % 4), k, list("abcd"))


def test_a_class_that_is_too_small_is_named_with_what_helps():
    """No share of one image has images on both sides."""
    targets = torch.tensor([0] * 60 + [1] * 2 + [2])
    for k in (20, 60):
        with pytest.raises(
            ValueError, match=r"class c, which has 1 image, without .* give it more images, or take its"
        ):
            hold_out(numbered(targets), k, list("abc"))
    with pytest.raises(ValueError, match=r"class b, which has 2 images, without .*; hold out more"):
        hold_out(numbered(targets[:-1]), 6, list("abc"))


def test_the_message_names_the_flag(save_dir):
    argv = ["--model", "resnet8", "--save_dir", str(save_dir), "--max_steps", "1", "--holdout"]
    assert "--holdout: 160 of 160 images" in message_of(train_teacher.main, [*argv, "160"])
    assert not save_dir.exists()


def test_the_best_epoch_is_chosen_on_the_held_out_images(tmp_path, monkeypatch):
    accuracies = {73: iter([10.0, 50.0, 20.0, 30.0]), 40: iter([5.0, 6.0, 9.0, 9.0])}

    def fake(predict, loader, title):
        value = next(accuracies[len(loader.images.targets)])
        return {"test_accuracy": value, "test_accuracy_top5": 0.0, "test_loss": 0.0}

    monkeypatch.setattr(run_module, "evaluate", fake)
    argv = ["--model", "resnet8", "--epochs", "4", *SMALL, "--save_dir", str(tmp_path)]
    [result] = train_teacher.main(argv)
    assert (result["best_epoch"], result["accuracy_best"], result["accuracy_last"]) == (3, 20.0, 30.0)
    assert result["protocol"] == "best on 40 held-out"
    run = next(tmp_path.iterdir())
    assert load(run / "best.pth")["record"]["epoch"] == 3
    assert [record["holdout_accuracy"] for record in metrics(run)] == [5.0, 6.0, 9.0, 9.0]
    assert metrics(run)[0]["step"] == 4, "120 of the 160 images are trained on"


@pytest.mark.slow
@pytest.mark.quick(1)
@pytest.mark.parametrize("distill", ["distpro", "crd"])
def test_methods_that_keep_their_own_share_or_count_images_work_with_it(distil, distill, capsys):
    flags = ("--nce_k", "8") if distill == "crd" else ("--init_epochs", "1")
    flags += ("--allow_teacher_gap",)
    run = distil(*SMALL, "--epochs", "1", *flags, distill=distill)
    result = json.loads((run / "result.json").read_text())
    assert result["protocol"] == "best on 40 held-out"
    assert load(run / "last.pth")["record"]["train_images"] == 120
    if distill == "distpro":  # a fifth of the 120 is kept for the search: 96 images
        assert metrics(run)[0]["step"] == 3


def test_resuming_keeps_what_was_chosen(tmp_path):
    argv = ["--model", "resnet8", *SMALL, "--save_dir"]
    train_teacher.main([*argv, str(tmp_path / "whole"), "--epochs", "2", "--lr_decay_epochs", "9"])
    train_teacher.main([*argv, str(tmp_path / "cut"), "--epochs", "1", "--lr_decay_epochs", "9"])
    cut, whole = (next((tmp_path / name).iterdir()) for name in ("cut", "whole"))
    train_teacher.main(["--resume", str(cut), "--epochs", "2"])
    assert same_state(weights(cut), weights(whole))
    choices = [[record["holdout_accuracy"] for record in state(run)["records"]] for run in (cut, whole)]
    assert choices[0] == choices[1] and len(choices[0]) == 2


def test_without_it_the_protocol_says_so(tmp_path):
    [result] = train_teacher.main(["--model", "resnet8", "--max_steps", "1", "--save_dir", str(tmp_path)])
    assert result["protocol"] == "best on test"
