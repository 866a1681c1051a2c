"""Runs jobs as processes of their own, one per place (a GPU, or the CPU); one that fails does not stop the others."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from errors import Stopped, UserError
from helper.plan import Job, renew
from helper.run_folder import is_taken

#: A GPU is free where others have taken no more than this share of its memory.
TAKEN_BY_OTHERS = 0.1
LOGS = "logs"
ROOT = Path(__file__).resolve().parent.parent


def find_places(gpus: Sequence[int] | None, per_place: int) -> list[dict[str, str]]:
    """The environment of every process that may run at a time: of the free GPUs or those named, else of the CPU."""
    if gpus is None:
        gpus = [number for number in range(torch.cuda.device_count()) if _is_free(number)]
        if torch.cuda.is_available() and not gpus:
            raise UserError("--gpus: other programs use every GPU; name one with --gpus to share it, or wait")
    environments = [{"CUDA_VISIBLE_DEVICES": str(number)} for number in gpus] or [{}]
    return environments * per_place


def _is_free(number: int) -> bool:
    free, total = torch.cuda.mem_get_info(number)
    return total - free <= TAKEN_BY_OTHERS * total


def command_line(job: Job) -> list[str]:
    """What the system is asked to run."""
    script, *flags = job.command
    return [sys.executable, str(ROOT / script), *flags]


def run_jobs(jobs: Sequence[Job], places: Sequence[dict[str, str]], log_dir: Path) -> dict[Path, str]:
    """Run them; returns why each that failed did, by its folder. Ctrl-C and SIGTERM stop the runs, which save, and
    are raised.

    What another process trains by then is waited for, so that several may work on one plan.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    queue = _Queue(jobs, places, log_dir)
    before = signal.signal(signal.SIGTERM, _raise_stopped)
    try:
        while queue.pending or queue.running:
            queue.start_what_is_ready()
            queue.settle_what_is_over()
            time.sleep(0.1 if queue.running or queue.pending else 0)
    except BaseException:
        _stop([process for _, _, process, _ in queue.running])
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return queue.failures


class _Queue:
    def __init__(self, jobs: Sequence[Job], places: Sequence[dict[str, str]], log_dir: Path):
        self.pending, self.free, self.log_dir = list(jobs), list(places), log_dir
        self.running: list[tuple[Job, dict[str, str], subprocess.Popen, Path]] = []
        self.failures: dict[Path, str] = {}
        self._unfinished, self._total = {job.folder for job in jobs}, len(jobs)
        self._elsewhere: set[Path] = set()

    def start_what_is_ready(self) -> None:
        for job in list(self.pending):
            if job.teacher in self.failures:
                self._settle(job, "its teacher failed")
            elif self.free and job.teacher not in self._unfinished:
                self._start(job)

    def _start(self, job: Job) -> None:
        if job.folder in self._elsewhere and is_taken(job.folder):
            return
        now = renew(job)
        if now.state == "running":
            self._elsewhere.add(job.folder)
            print(f"wait    {job.title}: another process is training in {job.folder}", flush=True)
        elif now.state == "finished":
            self._settle(job)
        else:
            self.pending.remove(job)
            place, log = self.free.pop(0), self.log_dir / f"{job.folder.name}.log"
            print(f"start   {job.title} ({log})", flush=True)
            self.running.append((job, place, _start(now, place, log), log))

    def settle_what_is_over(self) -> None:
        for one in list(self.running):
            job, place, process, log = one
            if process.poll() is not None:
                self.running.remove(one)
                self.free.append(place)
                self._settle(job, f"exit code {process.returncode}: {last_line(log)}" if process.returncode else "")

    def _settle(self, job: Job, failure: str = "") -> None:
        if job in self.pending:
            self.pending.remove(job)
        self._unfinished.discard(job.folder)
        if failure:
            self.failures[job.folder] = failure
        done = f"[{self._total - len(self._unfinished)}/{self._total}] {job.title}"
        print(f"FAILED  {done}: {failure}" if failure else f"done  {done}", flush=True)


def _raise_stopped(number: int, frame) -> None:
    raise Stopped(number, "stopped; the runs have saved, start the same command again to go on")


def _start(job: Job, place: dict[str, str], log: Path) -> subprocess.Popen:
    with open(log, "a", encoding="utf-8") as file:
        # A group of its own: a Ctrl-C reaches the runs once, through `_stop`.
        return subprocess.Popen(
            command_line(job), stdout=file, stderr=subprocess.STDOUT, env=os.environ | place, start_new_session=True
        )


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ask the runs to save and stop, and wait for them."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def last_line(path: Path, choose: Callable[[str], bool] = bool) -> str:
    """The last line of a log that is not empty."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if choose(line)), "no output")
