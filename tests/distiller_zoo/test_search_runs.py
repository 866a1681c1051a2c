"""Runs of DistPro: held-out images, a search that is cut and resumed."""

import pytest
import torch

import train_cifar_student
from dataset import Loader
from dataset.images import Augmentation, ImageData, Images
from distiller_zoo.distpro import DistPro
from errors import UserError
from helper import run
from helper.loops import _endless
from tests.conftest import keep_images
from tests.run_folders import metrics, same_state, state


def test_held_out_images_come_in_passes_that_differ_and_can_be_taken_up_anywhere():
    images = Images(torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8), torch.arange(10))
    data = ImageData("fake", images, images, list("abcdefghij"), (0.5,) * 3, (0.25,) * 3, Augmentation())
    loader = Loader(images, data, 4, torch.device("cpu"), data.augmentation, 3)
    whole = _endless(loader, 2, 0)
    batches = [next(whole) for _ in range(9)]
    for first in (1, 3, 7):
        taken_up = next(_endless(loader, 2, first))
        assert all(torch.equal(a, b) for a, b in zip(taken_up[:3], batches[first][:3], strict=True))
    passes = [torch.cat([batch.index for batch in batches[start : start + 3]]) for start in (0, 3, 6)]
    assert all(torch.equal(each.sort().values, torch.arange(10)) for each in passes)
    assert not torch.equal(passes[0], passes[1]) and not torch.equal(passes[1], passes[2])


@pytest.mark.slow
def test_the_search_never_trains_on_the_held_out_images(distil, monkeypatch):
    keep_images(monkeypatch, 40, 16)
    seen, original = {"steps": set(), "held out": set()}, DistPro.move_scores

    def spy(self, optimizer, batch, teacher, held_out, progress):
        seen["steps"] |= set(batch.index.tolist())
        seen["held out"] |= set(held_out.index.tolist())
        original(self, optimizer, batch, teacher, held_out, progress)

    monkeypatch.setattr(DistPro, "move_scores", spy)
    distil("--batch_size", "8", "--epochs", "1", "--init_epochs", "1", "--allow_teacher_gap", distill="distpro")
    assert not seen["steps"] & seen["held out"] and (len(seen["steps"]), len(seen["held out"])) == (32, 8)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["within the search", "behind the search's first epoch"])
def test_a_search_that_is_cut_goes_on_as_if_it_had_not_been(distil, monkeypatch, place):
    keep_images(monkeypatch, 20, 8)  # two steps of 8 in an epoch, four images are held out
    flags = ("--batch_size", "8", "--epochs", "1", "--init_epochs", "2", "--save_every_steps", "1")
    flags += ("--allow_teacher_gap",)
    whole = distil(*flags, distill="distpro")
    save, save_last = run.Run._save, run.Run._save_last

    def stop_after_epoch(self, record):
        save(self, record)
        raise KeyboardInterrupt

    def stop_within_epoch(self, model, epoch_state):
        save_last(self, model, epoch_state)
        if epoch_state is not None and self.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == "within the search":
            patch.setattr(run.Run, "_save_last", stop_within_epoch)
        else:
            patch.setattr(run.Run, "_save", stop_after_epoch)
        with pytest.raises(KeyboardInterrupt):
            distil(*flags, "--trial", "cut", "--seed", "1", distill="distpro")
    cut = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    stopped = state(cut)
    assert stopped["stage_number"] == 0 and (stopped["epoch_state"] is not None) == (place == "within the search")
    assert (stopped["distiller"]["weights.scores"] != 1).any()
    train_cifar_student.main(["--resume", str(cut)])
    a, b = state(whole), state(cut)
    for key in ("distiller", "optimizer", "epoch", "step"):
        assert same_state(a[key], b[key]), key
    assert [record.get("stage") for record in metrics(cut)] == ["search", "search", None]


@pytest.mark.parametrize("flags", [("--optimizer", "adamw"), ("--clip_grad", "1"), ("--recipe", "finetune")], ids=str)
def test_a_search_that_looks_ahead_of_sgd_refuses_other_steps(distil, flags):
    with pytest.raises(UserError, match=r"(--optimizer adamw|--clip_grad): stage search of --distill distpro"):
        distil("--allow_teacher_gap", "--max_steps", "1", *flags, distill="distpro")
