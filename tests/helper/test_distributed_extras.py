"""Moving averages and float16 in two processes (gloo) as in one."""

import itertools
import os
import socket
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import spawn

import train_teacher
from crd.processes import gather_rows, rows_of_all
from dataset import DATASETS
from distiller_zoo.ce import CrossEntropy
from errors import UserError
from helper import inputs
from helper.distributed import check_alike, count_processes, joined, rank
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """name -> the folders of its run in one process, and in two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    train(str(one))
    spawn(train_in_process, (free_port(), str(two)), nprocs=2)
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


class Remembering(torch.nn.Module):
    """A bank with a row for each of six images, of which a process sees three, as methods of one's own may have."""

    def __init__(self, of_all: bool):
        super().__init__()
        self.register_buffer("bank", torch.zeros(6))
        self.register_buffer("nothing", torch.zeros(0))
        index = torch.arange(3) + 3 * rank()
        index = gather_rows(index, rows_of_all(len(index))) if of_all else index
        self.bank[index] = index + 1.0


def remember_in_process(number: int, port: int, folder: str) -> None:
    """What is said of a bank that is updated by the images of all processes, and of one that is not."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="localhost")
    os.environ["MASTER_PORT"] = str(port)
    with joined():
        check_alike(Remembering(of_all=True), "mine")
        with pytest.raises(UserError) as caught:
            check_alike(Remembering(of_all=False), "mine")
        Path(folder, str(number)).write_text(str(caught.value))


def test_a_buffer_that_each_process_has_of_its_own_is_refused(tmp_path):
    spawn(remember_in_process, (free_port(), str(tmp_path)), nprocs=2)
    for number in (0, 1):
        assert "--distill mine: its buffer bank is another in each process" in (tmp_path / str(number)).read_text()
    check_alike(Remembering(of_all=False), "mine")  # alone
