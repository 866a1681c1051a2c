"""Moving averages and float16 in two processes (gloo) as in one."""

import itertools
import os
import socket
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import spawn

import train_teacher
from dataset import DATASETS
from distiller_zoo.ce import CrossEntropy
from helper import inputs
from helper.distributed import count_processes, rank
from tests.conftest import WHOLE_DIGITS
from tests.helper.distributed_cases import few_images
from tests.run_folders import metrics, state

COMMON = ("--model", "resnet8", "--batch_size", "8", "--ema_decay", "0.5", "--epochs", "1")
#: name -> flags; the last batch of the first has an odd number of images.
RUNS = {
    "average": ("--sync_bn", "--learning_rate", "0.001"),
    "statistics": ("--learning_rate", "0", "--max_steps", "4"),
    "float16": ("--sync_bn", "--learning_rate", "0.001", "--max_steps", "3", "--precision", "float16"),
}
#: The step of float16's run whose gradient overflows in the last of its processes, and in no other.
OVERFLOWING = 2


def train(folder: str) -> None:
    """Every run in this process, or in each of several; a CPU emulates float16."""
    losses = CrossEntropy.losses

    def overflowing(self, *arguments):
        terms = losses(self, *arguments)
        if next(calls) == OVERFLOWING and rank() == count_processes() - 1:
            terms["ce"].register_hook(lambda gradient: gradient * torch.inf)
        return terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "digits", WHOLE_DIGITS)  # as processes of their own read them
        patch.setattr(inputs, "load_data", few_images)
        patch.setattr(inputs, "check_precision", lambda precision, device: None)
        for port, (name, flags) in enumerate(RUNS.items(), int(os.environ.get("MASTER_PORT", "0"))):
            patch.setenv("MASTER_PORT", str(port))
            calls = itertools.count(1)
            if name == "float16":
                patch.setattr(CrossEntropy, "losses", overflowing)
            train_teacher.main(["--save_dir", folder, "--trial", name, *COMMON, *flags])


def train_in_process(number: int, port: int, folder: str) -> None:
    """`train` in one of two processes."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="localhost")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    train(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """name -> the folders of its run in one process, and in two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    train(str(one))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    spawn(train_in_process, (port, str(two)), nprocs=2)
    found = {}
    for name in RUNS:
        found[name] = tuple(next(root.glob(f"*trial{name}*")) for root in (one, two))
    return found


def assert_close(runs: tuple[Path, Path], part: str, tolerance: float) -> None:
    alone, together = (state(run)[part] for run in runs)
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        assert torch.allclose(value.double(), together[name].double(), rtol=tolerance, atol=tolerance), name


@pytest.mark.slow
def test_the_moving_average_is_that_of_one_process(runs):
    alone, together = runs["average"]
    assert_close((alone, together), "distiller", 1e-4)
    assert_close((alone, together), "ema", 1e-4)
    raw, average = state(together)["distiller"], state(together)["ema"]
    assert (raw["student.conv1.weight"] - average["student.conv1.weight"]).abs().max() > 1e-5
    ours, theirs = (metrics(run)[0]["test_loss_ema"] for run in runs["average"])
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
def test_its_statistics_are_the_mean_of_the_processes(runs):
    """The first BatchNorm's mean is linear in the images: its mean over the halves of a batch is the batch's."""
    for part in ("distiller", "ema"):
        alone, together = (state(run)[part]["student.bn1.running_mean"] for run in runs["statistics"])
        assert torch.allclose(alone, together, rtol=0, atol=1e-6) and alone.abs().max() > 0.01, part


@pytest.mark.slow
def test_an_overflow_of_float16_in_one_process_is_skipped_in_all(runs):
    for run in runs["float16"]:
        assert (state(run)["scaler"]["scale"], state(run)["overflows"]) == (2.0**15, 1)
        assert metrics(run)[0]["overflowed_steps"] == 1 and "step 2/3 skipped" in (run / "log.txt").read_text()
    for part in ("distiller", "ema"):
        assert_close(runs["float16"], part, 2e-3)
