"""Stops and errors of real processes that read images from a disk: they end, soon, with the promised exit code."""

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import slow_but
from tests.dataset.image_folders import write_images
from tests.forks import Fork, Server

#: Seconds within which a run must have ended; the docs promise this.
SECONDS = 5
FLAGS = ["--dataset", "imagenet", "--image_size", "32", "--model", "resnet8", "--batch_size", "4", "--epochs", "500"]


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "data", train=20)


@pytest.fixture
def start(folder, server):
    """Start `Run`s, which are gone after the test."""
    runs = []

    def start_one(workers: int, *flags: str, limits: dict | None = None) -> Run:
        runs.append(Run(server, folder, workers, *flags, limits=limits or {}))
        return runs[-1]

    yield start_one
    for run in runs:
        run.process.kill()


class Run:
    """`train_teacher.py` in a process of its own, which writes what it says into files."""

    def __init__(self, server: Server, folder: Path, workers: int, *flags: str, limits: dict[int, int]):
        argv = ["train_teacher.py", *FLAGS, "--data", str(folder), "--num_workers", str(workers)]
        self._save_dir = folder.parent / "save"
        argv += ["--save_dir", str(self._save_dir), *flags]
        self._output, self._errors = folder.parent / "output.txt", folder.parent / "errors.txt"
        self.process = Fork(server, argv, self._output, self._errors, limits)

    def wait_until_it_trains(self, stuck: bool = False) -> None:
        """Until an epoch is done; or, of a run that reads an image for ever, until it must have begun to."""
        end = time.monotonic() + 60
        while not ("parameters" in self._printed() if stuck else any(self._save_dir.glob("*/metrics.jsonl"))):
            assert self.process.poll() is None and time.monotonic() < end, self._errors.read_text()
            time.sleep(0.05)
        if stuck:
            time.sleep(1)

    def _printed(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def end(self, within: float) -> tuple[int, str]:
        """(exit code, what was said on stderr) of a process that ends within this time."""
        started = time.monotonic()
        code = self.process.wait(within)
        print(f"ended after {time.monotonic() - started:.1f} s with {code}")
        # A progress bar is there too.
        lines = self._errors.read_text().replace("\r", "\n").splitlines()
        return code, "\n".join(line for line in lines if line.strip() and "it/s]" not in line and "?it" not in line)

    def workers(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(number) for number in path.read_text().split()]


def hang(folder: Path, split: str = "train") -> Path:
    """Put an image into the folder whose read never ends, as on a network disk that does not answer."""
    path = folder / split / "cat" / "zz.jpg"
    os.mkfifo(path)
    return path


@pytest.mark.slow
@pytest.mark.quick(3)
@pytest.mark.parametrize("stuck", [False, True], ids=["reading", "stuck"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_run(start, folder, workers, name, code, stuck):
    if stuck:
        hang(folder)
    run = start(workers)
    run.wait_until_it_trains(stuck)
    started = run.workers()
    assert len(started) == workers
    run.process.send_signal(getattr(signal, name))
    ended, errors = run.end(SECONDS)
    assert ended == code and f"stopped by {name}" in errors and "Traceback" not in errors
    assert ("and saved" in errors) is not stuck and len(errors.splitlines()) == 1
    assert not [worker for worker in started if is_alive(worker)]


def is_alive(process: int) -> bool:
    """Whether a process runs, after a moment in which it may end."""
    for _ in range(20):
        try:
            if "State:\tZ" in Path(f"/proc/{process}/status").read_text():
                return False
        except OSError:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("workers", slow_but([0, 2], 2))
def test_a_second_signal_ends_a_run_at_once(start, folder, workers):
    hang(folder)
    run = start(workers)
    run.wait_until_it_trains(stuck=True)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    run.process.send_signal(signal.SIGINT)
    code, errors = run.end(1.5)
    assert code == 130 and "interrupted again" in errors


@pytest.mark.slow
@pytest.mark.quick(3)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("trouble", ["unreadable", "diverged", "full disk"])
def test_an_error_within_an_epoch_ends_a_run(start, folder, workers, trouble):
    flags, limits = (), {}
    if trouble == "unreadable":
        for path in sorted((folder / "train" / "cat").iterdir())[:12]:
            path.write_bytes(b"no image")
        expected = "--max_broken"
    elif trouble == "diverged":
        flags, expected = ("--learning_rate", "1e25", "--save_every_steps", "1"), "diverged"
    else:  # a file may not grow beyond this, which is less than a checkpoint
        limits = {resource.RLIMIT_FSIZE: 100_000}
        flags, expected = ("--save_every_steps", "2"), "cannot be written"
    run = start(workers, *flags, limits=limits)
    code, errors = run.end(60)
    assert code == 2 and expected in errors and errors.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_worker_that_is_killed_is_one_line(start, folder):
    run = start(2)
    run.wait_until_it_trains()
    os.kill(run.workers()[0], signal.SIGKILL)
    code, errors = run.end(SECONDS)
    assert code == 2 and "--num_workers" in errors and len(errors.splitlines()) == 1


@pytest.mark.slow
def test_workers_that_cannot_be_started_are_one_line(start, folder):
    run = start(60, limits={resource.RLIMIT_NOFILE: 64})
    code, errors = run.end(60)
    assert code == 2 and "--num_workers: 60 worker processes cannot be started" in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.slow
def test_workers_of_a_killed_run_end_and_do_not_keep_its_folder(start, folder):
    image = hang(folder, "val")
    run = start(2, "--save_every_steps", "1")
    run.wait_until_it_trains(stuck=True)
    (path,) = (folder.parent / "save").iterdir()
    end = time.monotonic() + 30
    while not (path / "last.pth").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    started = run.workers()
    run.process.kill()
    image.unlink()
    shutil.copy(folder / "val/cat/0.JPEG", image)
    resumed = start(0, "--resume", str(path), "--max_steps", "12", "--accept_changes")
    assert resumed.end(60)[0] == 0
    assert not [worker for worker in started if is_alive(worker)]
