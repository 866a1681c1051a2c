"""Worker processes that read images, alive as long as their data set: they fill memory that the run sees too.

They are programs of their own (dataset/worker.py), not forks: they inherit no lock and no thread of the run, start
alike on every system, and nothing waits for them when the run ends. A worker whose run is gone ends itself.
"""

import itertools
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

import numpy

from dataset.decoding import Crop, Place
from dataset.worker import Change, shape_of
from errors import UserError

#: How a worker begins: `dataset` without its `__init__`, which would load torch. Ctrl-C and a cluster's SIGTERM reach
#: every process; the run finishes its step and needs its images for that.
BEGIN = """
import signal, sys, types
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
package = types.ModuleType("dataset")
package.__path__ = [sys.argv[1]]
sys.modules["dataset"] = package
from dataset.worker import main
main(int(sys.argv[2]), int(sys.argv[3]))
"""
#: One thread in a worker: there is a worker for each core.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
#: glibc keeps the memory of an image for the next one, in large pages: the system would fill it with zeros each time,
#: which takes a tenth of the time of decoding. What a huge image takes is given back. Other systems ignore it.
KEPT_MEMORY = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=67108864:glibc.malloc.hugetlb=1"
#: Seconds that an ended worker gets to leave the list of processes.
REAP = 2


class Job:
    """A batch that is being read: its number, its position in memory, and what is still missing."""

    def __init__(self, number: int, offset: int, size: int):
        self.number, self.offset, self.size = number, offset, size
        self.parts_left = 0
        self.broken: dict[int, str] = {}  # why, by row
        self.abandoned = False


class Pool:
    """`number` worker processes, started when the first batch is submitted."""

    def __init__(self, number: int):
        self.number = number
        self._numbers = itertools.count()
        self.workers: list[subprocess.Popen] = []
        self._connections: list[Connection] = []
        self._end = None
        self._reset()

    def _reset(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._free: list[tuple[int, int]] = []  # (offset, size) of memory that no batch uses
        self._descriptor, self._mapped = None, None

    def submit(self, places: Sequence[Place], keys: Sequence[int], crop: Crop, changes: Change | None = None) -> Job:
        """Have a batch read, a part by each worker; raises `UserError` where no worker can be started."""
        if not self._connections:
            self._start()
        shape = shape_of(len(places), crop)
        job = Job(next(self._numbers), *self._allocate(int(numpy.prod(shape))))
        self._jobs[job.number] = job
        bounds = numpy.linspace(0, len(places), min(self.number, max(len(places), 1)) + 1).astype(int).tolist()
        # A short batch begins with another worker each time.
        workers = itertools.islice(itertools.cycle(self._connections), job.number % self.number, None)
        for connection, (first, end) in zip(workers, itertools.pairwise(bounds), strict=False):
            if first < end:
                part = (places[first:end], keys[first:end], crop, changes)
                self._send(connection, (job.number, job.offset, len(places), first, *part))
                job.parts_left += 1
        return job

    def collect(self, job: Job, shape: tuple[int, ...]) -> numpy.ndarray:
        """Wait for a batch -> its bytes, valid until `release`; raises `UserError` where a worker has ended."""
        while job.parts_left:
            for connection in wait(self._connections):
                self._take(connection)
        return numpy.ndarray(shape, numpy.uint8, self._mapped, job.offset)

    def release(self, job: Job) -> None:
        """Let a batch's memory be used again, as soon as nobody writes to it."""
        job.abandoned = True
        if not job.parts_left and self._jobs.pop(job.number, None):
            self._free.append((job.offset, job.size))

    def _take(self, connection: Connection) -> None:
        try:
            number, broken, failure = connection.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if failure is not None:
            self.close()
            raise RuntimeError(f"a worker process failed\n{failure}")
        job = self._jobs[number]
        job.parts_left -= 1
        job.broken |= broken
        if job.abandoned:
            self.release(job)

    def _send(self, connection: Connection, part: tuple) -> None:
        try:
            connection.send(part)
        except OSError:
            raise self._gone() from None

    def _gone(self) -> UserError:
        self.close()
        return UserError(
            "--num_workers: a worker process, which reads images, was ended from outside (out of memory?); choose "
            "fewer, or a smaller --batch_size"
        )

    def _allocate(self, size: int) -> tuple[int, int]:
        """(offset, size) of free memory that holds `size` bytes."""
        fitting = [piece for piece in self._free if piece[1] >= size]
        if fitting:
            piece = min(fitting, key=lambda piece: piece[1])
            self._free.remove(piece)
            return piece
        before = len(self._mapped)
        page = mmap.PAGESIZE
        size = -(-size // page) * page
        try:
            os.ftruncate(self._descriptor, before + size)
            self._mapped = mmap.mmap(self._descriptor, before + size)
        except OSError as error:
            raise UserError(
                f"--batch_size: there is no memory for batches of worker processes ({error.strerror}); choose a "
                "smaller one, or --num_workers 0"
            ) from None
        return before, size

    def _start(self) -> None:
        try:
            self._descriptor = _anonymous_memory()
            os.ftruncate(self._descriptor, mmap.PAGESIZE)
            self._mapped = mmap.mmap(self._descriptor, mmap.PAGESIZE)
            self._end = weakref.finalize(self, _end_all, self.workers, self._connections, self._descriptor, os.getpid())
            for _ in range(self.number):
                ours, theirs = Pipe()
                self._connections.append(ours)
                with theirs:
                    self.workers.append(_start_worker(theirs.fileno(), self._descriptor))
        except OSError as error:
            self.close()
            raise UserError(
                f"--num_workers: {self.number} worker processes cannot be started ({error.strerror}); choose fewer, "
                "or 0 for none"
            ) from None

    def close(self) -> None:
        """End the workers at once, whatever they are doing."""
        if self._end is not None:
            self._end()
        self._reset()


def _anonymous_memory() -> int:
    """A descriptor of memory without a name, which is gone with the last process that has it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("images")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _start_worker(connection: int, memory: int) -> subprocess.Popen:
    command = [sys.executable, "-P", "-W", "ignore", "-c", BEGIN, os.path.dirname(os.path.abspath(__file__))]
    return subprocess.Popen(
        [*command, str(connection), str(memory)],
        pass_fds=(connection, memory),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"GLIBC_TUNABLES": KEPT_MEMORY} | os.environ | ONE_THREAD,
        process_group=0,  # a terminal's Ctrl-C is for the run
    )


def _end_all(workers: list[subprocess.Popen], connections: list[Connection], memory: int, owner: int) -> None:
    """Kill the workers; called by `close`, when the pool is no longer used, and when the interpreter ends."""
    if os.getpid() != owner:  # a fork of the run
        return
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
    for connection in connections:
        connection.close()
    os.close(memory)
    for worker in workers:
        try:
            worker.wait(REAP)
        except subprocess.TimeoutExpired:  # stuck in the system; it ends when its read does
            break
    workers.clear()
    connections.clear()
