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
from helper.plan import Job

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
    are raised."""
    log_dir.mkdir(parents=True, exist_ok=True)
    pending, free, running, failures = list(jobs), list(places), {}, {}
    unfinished = {job.folder for job in jobs}
    total = len(jobs)
    before = signal.signal(signal.SIGTERM, _raise_stopped)
    try:
        while pending or running:
            for job in [job for job in pending if job.teacher in failures]:
                pending.remove(job)
                _settle(job, "its teacher failed", unfinished, failures, total)
            ready = [job for job in pending if job.teacher not in unfinished]
            while free and ready:
                job = ready.pop(0)
                pending.remove(job)
                place, log = free.pop(0), log_dir / f"{job.folder.name}.log"
                print(f"start   {job.title} ({log})", flush=True)
                running[job.folder] = job, place, _start(job, place, log), log
            for job, place, process, log in list(running.values()):
                if process.poll() is not None:
                    del running[job.folder]
                    free.append(place)
                    reason = f"exit code {process.returncode}: {last_line(log)}" if process.returncode else ""
                    _settle(job, reason, unfinished, failures, total)
            if running:
                time.sleep(0.1)
    except BaseException:
        _stop([process for _, _, process, _ in running.values()])
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return failures


def _raise_stopped(number: int, frame) -> None:
    raise Stopped(number, "stopped; the runs have saved, start the same command again to go on")


def _start(job: Job, place: dict[str, str], log: Path) -> subprocess.Popen:
    with open(log, "a", encoding="utf-8") as file:
        # A group of its own: a Ctrl-C reaches the runs once, through `_stop`.
        return subprocess.Popen(
            command_line(job), stdout=file, stderr=subprocess.STDOUT, env=os.environ | place, start_new_session=True
        )


def _settle(job: Job, reason: str, unfinished: set[Path], failures: dict[Path, str], total: int) -> None:
    unfinished.discard(job.folder)
    if reason:
        failures[job.folder] = reason
    done = total - len(unfinished)
    print(f"{'FAILED' if reason else 'done'}  [{done}/{total}] {job.title}{': ' if reason else ''}{reason}", flush=True)


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
