"""The worker processes that read images: one set for a data set, independent of the run's files and signals."""

import os
import signal
import time
from pathlib import Path

import pytest

from dataset import Loader, load_data
from dataset.pool import KEPT_MEMORY
from errors import StoppedAtOnce, UserError
from helper import distributed
from helper.distributed import StopRequest
from tests.dataset.test_streaming import CPU, loader_of, same, write_images


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "data")


def workers_of(loader) -> list[int]:
    """The process numbers of a loader's workers."""
    return [worker.pid for worker in loader.images.reading.pool.workers]


def test_signals_to_all_processes_leave_the_workers_alone(folder):
    loader = loader_of(folder, workers=2)
    batches = loader.batches(0)
    first = next(batches)
    for worker in workers_of(loader):
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    assert len([first, *batches]) == 4


def test_a_worker_that_is_ended_from_outside_is_one_line(folder):
    loader = loader_of(folder, workers=2, batch_size=1)
    batches = loader.batches(0)
    next(batches)
    os.kill(workers_of(loader)[1], signal.SIGKILL)
    with pytest.raises(UserError, match="--num_workers"):
        list(batches)  # what was read before may still come
    assert same(loader.batches(0), loader_of(folder, batch_size=1).batches(0)), "others are started when needed"


def test_workers_live_over_epochs_and_tests_and_as_long_as_their_data(folder):
    data = load_data("imagenet", str(folder), 32, 2)
    pool = data.train.reading.pool
    list(Loader(data.train, data, 4, CPU, data.augmentation).batches(0))
    first = [worker.pid for worker in pool.workers]
    list(Loader(data.test, data, 3, CPU).batches())
    list(Loader(data.train, data, 4, CPU, data.augmentation).batches(1))
    assert [worker.pid for worker in pool.workers] == first and len(first) == 2
    workers = list(pool.workers)
    del data, pool
    assert [worker.poll() for worker in workers] == [-signal.SIGKILL] * 2


def test_workers_start_without_torch_and_without_the_runs_files(folder):
    loader = loader_of(folder, workers=1)
    with open(folder / "lock", "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        list(loader.batches(0))
        (worker,) = workers_of(loader)
        assert "torch" not in Path(f"/proc/{worker}/maps").read_text()
        opened = {os.readlink(path) for path in Path(f"/proc/{worker}/fd").iterdir()}
    assert str(folder / "lock") not in opened


@pytest.mark.parametrize("own", [None, "glibc.malloc.tcache_count=0"])
def test_workers_keep_the_memory_of_images_unless_the_user_says_how(folder, own, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    loader = loader_of(folder, workers=1)
    list(loader.batches(0))
    (worker,) = workers_of(loader)
    environment = Path(f"/proc/{worker}/environ").read_bytes().replace(b"\0", b":")  # glibc takes the text apart
    assert f"GLIBC_TUNABLES={own or KEPT_MEMORY}:".encode() in environment


def test_several_passes_share_the_workers(folder):
    loader = loader_of(folder, workers=2)
    alone = list(loader.batches(1))
    left = loader.batches(0)
    next(left)
    left.close()
    pairs = list(zip(loader.batches(1), loader.batches(1), strict=True))
    for side in zip(*pairs, strict=True):
        assert same(alone, side)


def test_a_stop_request_ends_what_hangs_but_not_what_is_being_finished(monkeypatch):
    monkeypatch.setattr(distributed, "GRACE", 0.2)
    monkeypatch.setattr(distributed, "LOOK", 0.05)
    finished = []
    with pytest.raises(StoppedAtOnce, match="SIGTERM"), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with stop.finishing():
            time.sleep(0.5)
            finished.append(stop.signal_number)
        time.sleep(5)
        pytest.fail("it hangs")
    assert finished == [signal.SIGTERM]
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.heard_by_any() == signal.SIGINT
        time.sleep(0.5)  # it saves, as long as that takes
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_second_signal_interrupts_at_once():
    with pytest.raises(StoppedAtOnce) as stopped, StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.signal_number == signal.SIGINT
