"""What a run writes: on a full disk, in torn files, and in TensorBoard after it was resumed."""

import json
import os
import resource
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_teacher
from helper.run import Run
from helper.run_folder import PREVIOUS, RunFolder, replacing, tag_of
from tests.conftest import keep_images, message_of
from tests.run_folders import load, metrics, same_state, weights


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    keep_images(monkeypatch, 16, 16)


def train(root: Path, *flags: str) -> Path:
    train_teacher.main(["--model", "resnet8", "--batch_size", "8", "--save_dir", str(root), *flags])
    return max(root.iterdir())


@contextmanager
def no_file_above(size: int):
    """As on a full disk, a file that grows above this many bytes is cut there and the system refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk():
    """A file system of 4 MB of its own; not below pytest's folder, whose clearing a mount that was left would stop."""
    place = tempfile.mkdtemp(prefix="small_disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True).returncode:
        os.rmdir(place)
        pytest.skip("only root may mount a small file system")
    yield Path(place)
    subprocess.run(["umount", "--lazy", place], check=True)
    os.rmdir(place)


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(small_disk, tmp_path):
    whole = train(tmp_path / "whole", "--epochs", "2")
    run = train(small_disk / "save", "--epochs", "1", "--lr_decay_epochs", "1,2,2")
    before = load(run / "last.pth")
    fill = small_disk / "fill"
    with pytest.raises(OSError, match="No space"), open(fill, "wb", buffering=0) as file:
        while True:
            assert file.write(bytes(2**20))
    size = fill.stat().st_size
    for room in (0, 4096, 40_000, 300_000):
        with open(fill, "r+b") as file:
            file.truncate(size - room)
        message = message_of(train_teacher.main, ["--resume", str(run), "--epochs", "2"])
        assert "cannot be written" in message and "make room" in message
        assert same_state(before["training"]["distiller"], weights(run))
        assert not list(run.glob("*.part"))
        for text in (run / "metrics.jsonl").read_text().splitlines():
            json.loads(text)
    fill.unlink()
    train_teacher.main(["--resume", str(run), "--epochs", "2"])
    assert same_state(weights(whole), weights(run))
    assert [record["epoch"] for record in metrics(run)] == [1, 2]


@pytest.mark.parametrize("name", ["last.pth", "metrics.jsonl", "log.txt", "config.json"])
def test_a_file_that_cannot_grow_is_named_and_is_not_torn(tmp_path, name):
    run = train(tmp_path, "--epochs", "1")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    folder = RunFolder(run)
    write = {
        "last.pth": lambda: folder.save("last.pth", load(run / "last.pth")),
        "metrics.jsonl": lambda: folder.append_metrics({"loss": 1.0, "epoch": 2}, 2),
        "log.txt": lambda: folder.log_quietly("a line that is longer than ten letters"),
        "config.json": lambda: folder.write_json("config.json", {"a": 1, "b": "longer than what is allowed"}),
    }[name]
    grown = 10 if name in ("config.json", "last.pth") else len(before[name]) + 10
    with no_file_above(grown):
        message = message_of(lambda argv: write(), [])
    assert f"{name} cannot be written" in message
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    write()


def cut_in_the_second_epoch(root: Path, monkeypatch) -> Path:
    """A run that was killed between the second epoch's lines and its checkpoint."""
    save = Run._save

    def stop(self, record):
        if self.epoch == 2:
            raise KeyboardInterrupt
        save(self, record)

    monkeypatch.setattr(Run, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(root, "--epochs", "3")
    monkeypatch.setattr(Run, "_save", save)
    return max(root.iterdir())


@pytest.mark.parametrize("torn", [b'{"epoch": 2, "lo', b"\xff\x00\n\n"])
def test_metrics_are_mended_and_tensorboard_shows_no_step_twice(tmp_path, monkeypatch, torn):
    run = cut_in_the_second_epoch(tmp_path, monkeypatch)
    assert len(metrics(run)) == 2
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(torn)
    train_teacher.main(["--resume", str(run)])
    assert [record["epoch"] for record in metrics(run)] == [1, 2, 3]
    events = EventAccumulator(str(run))
    events.Reload()
    for key, value in metrics(run)[-1].items():
        if key != "epoch":
            scalars = events.Scalars(tag_of(key))
            assert [scalar.step for scalar in scalars] == [1, 2, 3], key
            assert scalars[-1].value == pytest.approx(value)


def test_a_line_of_metrics_that_a_power_cut_has_damaged_goes(tmp_path, monkeypatch):
    run = cut_in_the_second_epoch(tmp_path, monkeypatch)
    (run / "metrics.jsonl").write_bytes(b"\x00" * 300)
    train_teacher.main(["--resume", str(run)])
    assert [record["epoch"] for record in metrics(run)] == [2, 3]
    assert (run / PREVIOUS).exists()


def test_a_file_that_fails_to_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        Path(temporary).write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_the_file_that_it_names_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (target := tmp_path / "real" / "page.html").write_text("old")
    (link := tmp_path / "link.html").symlink_to(target)
    with replacing(link) as temporary:
        Path(temporary).write_text("new")
    assert link.is_symlink() and target.read_text() == "new" and sorted(target.parent.iterdir()) == [target]
