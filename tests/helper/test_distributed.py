"""Several processes on a CPU (gloo): the same training as one, the same end after a kill, one end for all."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import spawn

import train_teacher
from dataset import Augmentation, Batch, ImageData, Images, Loader
from distiller_zoo import DISTILLERS
from errors import UserError
from helper import distributed, inputs
from helper.command_line import parse, resolve, teacher_parser
from tests.conftest import ROOT
from tests.helper.distributed_cases import CASES, few_images, run_cases, train
from tests.run_folders import metrics, same_state, state, weights

CPU = torch.device("cpu")
EQUAL = [name for name, case in CASES.items() if case[3]]
RUN = ("--batch_size", "8", "--epochs", "2", "--model", "resnet8", "--save_every_steps", "1")
SLOW = ("--trial", "2", "--sync_bn", "--learning_rate", "0.001")
FINE_TUNING = ("--batch_size", "8", "--trial", "3", "--sync_bn", "--learning_rate", "0.01", "--max_steps", "2")
#: As processes of their own read them.
pytestmark = pytest.mark.usefixtures("whole_digits")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """The folder where two processes have left their outcomes, and the run folders of whole runs."""
    folder = tmp_path_factory.mktemp("together")
    teacher = str(folder / "digits_ce_resnet8_trial1" / "last.pth")
    common = ["--save_dir", str(folder), "--batch_size", "8"]
    student = ["student", *common, "--path_t", teacher, "--model_s", "resnet8"]
    runs = [
        ["teacher", *common, *RUN],
        [*student, "--distill", "factor", "--allow_teacher_gap", "--max_steps", "2", "--epochs", "1"],
        ["teacher", *common, *RUN, *SLOW, "--max_steps", "5", "--save_every_steps", "4"],
        ["teacher", *common, *FINE_TUNING, "--init", teacher],
    ]
    spawn(run_cases, (free_port(), str(folder), runs), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def outcomes(together) -> list[dict]:
    return [torch.load(together / f"{number}.pth", weights_only=True) for number in range(2)]


def close(a: dict, b: dict, tolerance: float) -> bool:
    return a.keys() == b.keys() and all(
        torch.allclose(torch.as_tensor(a[key]), torch.as_tensor(b[key]), rtol=tolerance, atol=tolerance) for key in a
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_end_with_the_weights_of_one(outcomes, name):
    """The last batch of an epoch has an odd number of images; weights, statistics, banks and metrics are compared."""
    alone, (first, second) = train(name), (outcome[name] for outcome in outcomes)
    for key, value in alone["after"].items():
        assert torch.allclose(value, first["after"][key], rtol=1e-9, atol=1e-11), key
    for ours, theirs in zip(alone["means"], first["means"], strict=True):
        assert close(ours, theirs, 1e-6)
    assert close(alone["test"], first["test"], 1e-6)
    assert same_state(first["before"], second["before"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all_processes_hold_the_same(outcomes, name):
    first, second = (outcome[name] for outcome in outcomes)
    assert same_state(first["after"], second["after"])
    assert same_state(first["means"], second["means"]) and same_state(first["test"], second["test"])
    statistics = [key for key in first["before"] if "running" in key]
    moved_alone = [key for key in statistics if not torch.equal(first["before"][key], second["before"][key])]
    synchronised = CASES[name][3]
    assert moved_alone == ([] if synchronised else statistics)
    for key in first["before"]:
        mean = (first["before"][key] + second["before"][key]) / 2 if key in moved_alone else first["before"][key]
        assert torch.allclose(first["after"][key].double(), mean.double(), rtol=1e-12), key


@pytest.mark.slow
def test_unused_parameters_are_looked_for_only_where_there_may_be_some(outcomes):
    assert [name for name in CASES if outcomes[0][name]["looks"]] == ["unused", "changing"]


@pytest.mark.slow
def test_whole_runs_write_once(together):
    run = together / "digits_ce_resnet8_trial1"
    assert [record["epoch"] for record in metrics(run)] == [1, 2]
    assert "batch: 8 = 2 processes x 4 images; the learning rate" in (run / "log.txt").read_text()
    assert len({path.name.split(".")[-2] for path in run.glob("events*")}) == 1, "of one process"
    assert not (together / "digits_ce_resnet8_trial1-2").exists()
    assert [record.get("stage") for record in metrics(together / "digits_factor_resnet8_resnet8_trial1_try")] == [
        "paraphraser",
        None,
    ]


@pytest.mark.slow
def test_all_processes_start_from_the_given_weights(together, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "load_data", few_images)
    source, run = together / "digits_ce_resnet8_trial1" / "last.pth", "digits_ce_resnet8_trial3_try"
    train_teacher.main(["--save_dir", str(tmp_path), *FINE_TUNING, "--init", str(source)])
    alone, shared = (weights(folder / run) for folder in (tmp_path, together))
    for key, value in alone.items():
        assert torch.allclose(value.double(), shared[key].double(), rtol=1e-4, atol=1e-4), key
    assert (together / run / "log.txt").read_text().count("all weights; images") == 1


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(together, tmp_path, monkeypatch):
    """Four steps in two processes and five in one: the same weights as nine in one, but for rounding."""
    monkeypatch.setattr(inputs, "load_data", few_images)
    (together / "digits_ce_resnet8_trial2_try" / "last.pth").write_bytes(b"")  # so it resumes from the one before
    train_teacher.main(["--save_dir", str(tmp_path), *RUN, *SLOW, "--max_steps", "9"])
    run = "digits_ce_resnet8_trial2_try"
    train_teacher.main(["--resume", str(together / run), "--max_steps", "9"])
    alone, resumed = (state(folder / run) for folder in (tmp_path, together))
    assert alone["step"] == resumed["step"] == 9
    assert json.loads((together / run / "result.json").read_text())["processes"] == [2, 1]
    for key, value in alone["distiller"].items():
        assert torch.allclose(value.double(), resumed["distiller"][key].double(), rtol=1e-4, atol=1e-4), key


def environment(number: int, port: int, trouble: str) -> dict:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TROUBLE": trouble, "OMP_NUM_THREADS": "1"}
    return os.environ | address | {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}


def run_with_trouble(trouble: str, folder: Path) -> list[tuple[int, str]]:
    """Exit codes and stderr of two processes."""
    argv = [sys.executable, "-m", "tests.helper.distributed_cases", "--save_dir", str(folder), *RUN[:-2]]
    port = free_port()
    processes = [
        subprocess.Popen(argv, cwd=ROOT, env=environment(number, port, trouble), stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    texts = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_one_line(tmp_path):
    ends = run_with_trouble("error", tmp_path)
    assert [code for code, _ in ends] == [2, 2]
    lines = [line for _, text in ends for line in text.splitlines() if line.startswith("error")]
    assert lines == ["error: --data: broken.png cannot be read"]
    assert not any("Traceback" in text for _, text in ends)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    ends = run_with_trouble("SIGTERM", tmp_path)
    assert [code for code, _ in ends] == [143, 143]
    assert [text.count("stopped by SIGTERM and saved") for _, text in ends] == [1, 0]
    saved = state(tmp_path / "digits_ce_resnet8_trial1")
    assert saved["epoch"] == 1 and saved["epoch_state"]["steps"] in (4, 5)


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_the_run_ends_the_same(together, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    argv = [*launch, "-m", "tests.helper.distributed_cases", "--save_dir", str(tmp_path), *RUN, "--resume"]
    outer = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        argv, cwd=ROOT, env=outer | {"TROUBLE": "SIGKILL", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "digits_ce_resnet8_trial1"
    assert "resumed after epoch 1" in done.stdout and "and 3 steps" in done.stdout
    undisturbed, ended = state(together / run.name), state(run)
    for key in ("distiller", "optimizer", "step"):
        assert same_state(undisturbed[key], ended[key]), key
    accuracies = [[record["test_accuracy"] for record in one["records"]] for one in (undisturbed, ended)]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("views", ["plain", "rotations", "weak_strong"])
@pytest.mark.parametrize("processes", [2, 3])
def test_the_parts_of_all_processes_are_the_batches_of_one(views, processes):
    pixels = torch.randint(0, 256, (23, 3, 16, 16), dtype=torch.uint8)
    images = Images(pixels, torch.arange(23))
    names = [str(number) for number in range(23)]
    data = ImageData("fake", images, images, names, (0.5,) * 3, (0.25,) * 3, Augmentation())
    common = (images, data, 9, CPU, data.augmentation, 3, views)
    parts = [Loader(*common, rank=number, world_size=processes) for number in range(processes)]
    for whole, *shares in zip(Loader(*common).batches(2), *(part.batches(2) for part in parts), strict=True):
        assert torch.equal(whole.index, torch.cat([share.index for share in shares]))
        assert torch.equal(whole.targets, torch.cat([share.targets for share in shares]))
        by_view = [share.images.unflatten(0, (-1, len(share.index))) for share in shares]
        assert torch.equal(whole.images, torch.cat(by_view, 1).flatten(0, 1))
        assert {share.global_size for share in shares} == {len(whole.index)}
    least = Loader(*common, min_batch=3, rank=0, world_size=processes)  # five images are left over
    assert len(least) == 2


def test_a_batch_is_cut_with_all_its_views():
    batch = Batch(torch.arange(10.0), torch.arange(5), torch.arange(5), 5)
    first, second = batch.parts(2)
    assert first.images.tolist() == [0, 1, 2, 5, 6, 7] and second.images.tolist() == [3, 4, 8, 9]
    assert second.targets.tolist() == [3, 4] and second.global_size == 5 and batch.parts(1) == [batch]


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch, distil):
    [given] = parse(teacher_parser(), ["--model", "resnet8", "--batch_size", "64", "--accumulate", "3"]).runs
    with pytest.raises(UserError, match=r"--batch_size: 64 .* try 63"):
        resolve(given)
    with pytest.raises(UserError, match="needs at least 2"):
        distil("--batch_size", "64", "--accumulate", "64", distill="rkd")
    with pytest.raises(UserError, match="--accumulate: stage search"):
        distil("--batch_size", "64", "--accumulate", "2", distill="distpro")
    monkeypatch.setattr(distributed, "count_processes", lambda: 2)
    with pytest.raises(UserError, match="--device: cuda:1"):
        distributed.device_of("cuda:1")


def test_every_part_is_large_enough_for_the_method(distil, monkeypatch):
    """A short last batch is cut into fewer parts."""
    monkeypatch.setattr(inputs, "load_data", few_images)
    sizes, losses = [], DISTILLERS["rkd"].losses

    def spied(self, student, teacher, targets, index, progress):
        sizes.append(len(targets))
        return losses(self, student, teacher, targets, index, progress)

    monkeypatch.setattr(DISTILLERS["rkd"], "losses", spied)
    distil("--batch_size", "8", "--accumulate", "4", "--epochs", "1", "--allow_teacher_gap", distill="rkd")
    assert sizes == [2] * 20 + [3]
