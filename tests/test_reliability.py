"""What happens to machines, and what is let in: kills, damaged files, two processes in one folder."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import train_cifar_student
import train_teacher
from dataset import Images, load_data
from errors import UserError
from helper import inputs
from helper.run_folder import PREVIOUS, RunFolder
from models.checkpoints import read_checkpoint
from scripts import export_student
from tests.conftest import message_of
from tests.forks import Fork
from tests.run_folders import assert_same_end, load, metrics, same_state, state, weights

KILLS = int(os.environ.get("KILLS", "3"))
FLIPS = int(os.environ.get("FLIPS", "150"))


@pytest.mark.slow
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(distil, few_images, capsys):
    whole = distil("--batch_size", "16", "--epochs", "2")
    cut = distil("--batch_size", "16", "--epochs", "2", "--trial", "cut", "--seed", "1")
    assert state(cut, PREVIOUS)["epoch"] == 1
    content = bytearray((cut / "last.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (cut / "last.pth").write_bytes(content)
    train_cifar_student.main(["--resume", str(cut)])
    assert f"resuming with {PREVIOUS}" in capsys.readouterr().out
    assert same_state(weights(whole), weights(cut))
    assert len(metrics(cut)) == 2
    (cut / "last.pth").unlink()  # as between the two renames
    train_cifar_student.main(["--resume", str(cut)])
    assert same_state(weights(whole), weights(cut))


@pytest.mark.slow
@pytest.mark.parametrize("distill", ["norm", "norm_crd", "ofd"])
@pytest.mark.parametrize("saves", [2, 3, 6])
def test_cut_within_an_epoch_and_resumed_it_ends_the_same(distil, few_images, monkeypatch, distill, saves, capsys):
    flags = ("--batch_size", "8", "--epochs", "2", *(("--nce_k", "16") if distill == "norm_crd" else ()))
    whole = distil(*flags, distill=distill)
    save, saved = RunFolder.save, []

    def save_then_stop(self, name, checkpoint):
        save(self, name, checkpoint)
        saved.append(name)
        if saved.count("last.pth") == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        distil(*flags, "--trial", "cut", "--seed", "1", "--save_every_steps", "1", distill=distill)
    monkeypatch.setattr(RunFolder, "save", save)
    cut = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    train_cifar_student.main(["--resume", str(cut)])
    assert "steps" in capsys.readouterr().out.split("resumed after")[1].splitlines()[0]
    assert_same_end(whole, cut)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_stops(tmp_path, server, whole_digits, name, code):
    argv = ["train_teacher.py", "--model", "resnet8", "--epochs", "50", "--save_dir", str(tmp_path / "save")]
    process = Fork(server, argv, tmp_path / "output.txt", tmp_path / "errors.txt")
    while not any((tmp_path / "save").glob("*/last.pth")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    ended, errors = process.wait(60), (tmp_path / "errors.txt").read_text()
    assert ended == code and f"stopped by {name} and saved" in errors and "Traceback" not in errors
    (run,) = (tmp_path / "save").iterdir()
    step = state(run)["step"]
    assert 1 <= state(run)["epoch"] < 50 and step >= 23, "an epoch has 23 steps of 64"
    train_teacher.main(["--resume", str(run), "--max_steps", str(step + 2)])
    assert state(run)["step"] == step + 2


@pytest.mark.slow
def test_nothing_on_record_leads_out_of_the_run_folder(distil, few_images, tmp_path, monkeypatch, save_dir):
    """What config.json and a teacher's file say is read; only the command line says where to write."""
    run, outside = distil("--batch_size", "16", "--epochs", "1"), tmp_path / "outside"
    config = json.loads((run / "config.json").read_text())
    argv = ["--resume", str(run), "--epochs", "2"]
    (run / "config.json").write_text(json.dumps(config | {"save_dir": str(outside), "device": "cpu"}))
    train_cifar_student.main([*argv, "--max_steps", "3"])
    for name, value in {"trial": "../../outside", "dataset": "../outside", "model_s": "/outside"}.items():
        (run / "config.json").write_text(json.dumps(config | {name: value}))
        assert "config.json" in message_of(train_cifar_student.main, argv)
    outside.mkdir()
    (run / "config.json").write_text(json.dumps(config | {"dataset": "cifar10", "data": str(outside)}))
    assert "CIFAR10 is not in" in message_of(train_cifar_student.main, argv)
    teacher = load(tmp_path / "save" / run.name / "last.pth")
    elsewhere = {"dataset": "cifar10", "data": str(outside)}
    teacher["record"] |= elsewhere
    teacher["training"]["config"] |= elsewhere | {"save_dir": str(outside), "trial": "../../outside"}
    torch.save(teacher, tmp_path / "teacher.pth")
    assert "trial" in message_of(export_student.main, [str(tmp_path / "teacher.pth")])
    flags = ["--model_s", "resnet8", "--path_t", str(tmp_path / "teacher.pth"), "--save_dir", str(save_dir)]
    assert "CIFAR10 is not in" in message_of(train_cifar_student.main, flags)
    (run / "config.json").write_text(json.dumps(config))
    (run / "log.txt").unlink()
    (run / "log.txt").symlink_to(outside / "log.txt")
    assert "log.txt is a link" in message_of(train_cifar_student.main, argv)
    assert not list(outside.iterdir()) and {path.name for path in save_dir.iterdir()} == {run.name}


@pytest.mark.slow
def test_a_folder_belongs_to_one_process(distil, few_images):
    run = distil("--batch_size", "16", "--epochs", "1")
    folder = RunFolder(run).lock()
    message = message_of(train_cifar_student.main, ["--resume", str(run)])
    assert "another process is training in" in message
    folder.close()
    train_cifar_student.main(["--resume", str(run)])


def flatten(value, path=""):
    if isinstance(value, dict):
        return {key: item for name in value for key, item in flatten(value[name], f"{path}/{name}").items()}
    return {path: value}


@pytest.mark.slow
def test_no_damaged_checkpoint_is_taken_for_a_whole_one(distil, few_images, tmp_path):
    """Flipped bits, cuts, and overwritten stretches; run with FLIPS=1000 for the published figure."""
    source = (distil("--batch_size", "16", "--epochs", "1") / "best.pth").read_bytes()
    whole = flatten(read_checkpoint(_write(tmp_path / "whole.pth", source)))
    draw, refused = random.Random(0), 0
    for number in range(FLIPS):
        damaged = bytearray(source)
        kind = number % 3
        if kind == 0:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            start = draw.randrange(len(damaged))
            damaged[start : start + 64] = bytes(draw.randrange(256) for _ in damaged[start : start + 64])
        try:
            read = flatten(read_checkpoint(_write(tmp_path / "damaged.pth", bytes(damaged))))
        except UserError:
            refused += 1
            continue
        assert read.keys() == whole.keys() and all(same_state(read[key], whole[key]) for key in whole), number
    assert refused > FLIPS / 2


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


class Runs:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    for content in ({"model": Runs(tmp_path / "made")}, Runs(tmp_path / "made")):
        torch.save(content, tmp_path / "teacher.pth")
        argv = ["--model_s", "resnet8", "--path_t", str(tmp_path / "teacher.pth"), "--save_dir", str(tmp_path / "save")]
        assert "cannot be read as a checkpoint" in message_of(train_cifar_student.main, argv)
        assert not (tmp_path / "made").exists() and not (tmp_path / "save").exists()


def train_few(argv: list[str]) -> None:
    """`train_cifar_student.py` on few images, in a process of its own."""
    data = load_data("digits")
    few = data._replace(**{name: Images(*(part[:96] for part in getattr(data, name))) for name in ("train", "test")})
    inputs.load_data = lambda *arguments, **named: few
    torch.set_num_threads(1)
    train_cifar_student.main(argv)


def start(argv: list[str]) -> multiprocessing.Process:
    """A process that has the modules loaded already, so that kills fall into the run and not into imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_cifar_student"])
    process = context.Process(target=train_few, args=(argv,))
    process.start()
    return process


def finish(argv: list[str]) -> float:
    """Run a command to its end; returns its seconds."""
    started, process = time.monotonic(), start(argv)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_ends_the_same(teacher_run, tmp_path):
    """SIGKILL at random moments of runs that are resumed until they are done; KILLS=50 for the published figure."""
    argv = ["--distill", "norm", "--model_s", "resnet8", "--path_t", str(teacher_run / "last.pth")]
    argv += ["--epochs", "3", "--batch_size", "32", "--allow_teacher_gap", "--save_every_steps", "1"]
    seconds = finish([*argv, "--save_dir", str(tmp_path / "whole")])
    (whole,) = (tmp_path / "whole").iterdir()
    draw, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        root, runs = tmp_path / f"cut{runs}", runs + 1
        resume = [*argv, "--save_dir", str(root), "--resume"]
        while kills < KILLS and not any(root.glob("*/result.json")):
            process = start(resume)
            process.join(draw.uniform(0, seconds))
            if process.exitcode is None:
                process.kill()
                process.join()
            kills += process.exitcode == -signal.SIGKILL
            assert process.exitcode in (0, -signal.SIGKILL)
        finish(resume)
        cut = next(path for path in root.iterdir() if (path / "result.json").exists())
        assert_same_end(whole, cut)
    print(f"{kills} kills in {runs} runs")
