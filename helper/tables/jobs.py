"""Trains jobs: here, one process per place (a GPU, or the CPU), or handed on, to a Slurm cluster or as a list.

Several plans may work on the same runs: each job is claimed before its process starts, and a student starts only when
its teacher is finished, whoever trained it.
"""

import hashlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from errors import Stopped, UserError
from helper.run_folder import acquire, writing
from helper.tables.plan import Job, Shelf
from helper.tables.records import LAST_EPOCHS, find_folders, read_record

#: A GPU is free where others have taken no more than this share of its memory.
TAKEN_BY_OTHERS = 0.1
LOGS, CLAIMS = "logs", ".claims"
ROOT = Path(__file__).resolve().parent.parent.parent
#: Seconds between two looks at what other processes have finished.
LOOK = 1.0


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


def command_line(job: Job, processes: int = 1) -> list[str]:
    """What the system is asked to run; several processes train one student together."""
    script, *flags = job.command
    together = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(together if processes > 1 else []), str(ROOT / script), *flags]


# Here.


def run_jobs(jobs: Sequence[Job], places: Sequence[dict[str, str]], shelf: Shelf) -> dict[str, str]:
    """Train them; returns why each that failed did, by its key. Ctrl-C and SIGTERM stop the runs, which save, and are
    raised."""
    with writing(Path(shelf.save_dir)):
        for name in (LOGS, CLAIMS):
            Path(shelf.save_dir, name).mkdir(parents=True, exist_ok=True)
    board = _Board(jobs, shelf)
    before = signal.signal(signal.SIGTERM, _raise_stopped)
    try:
        with ThreadPoolExecutor(len(places)) as pool:
            try:
                list(pool.map(board.work, places))
            except BaseException:
                board.stop()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return board.failures


def _raise_stopped(number: int, frame) -> None:
    raise Stopped(number, "stopped; the runs have saved, start the same command again to resume them")


class _Board:
    """What is left to do; every place takes the first job that is ready, trains it, and takes the next."""

    def __init__(self, jobs: Sequence[Job], shelf: Shelf):
        self.failures: dict[str, str] = {}
        self._pending, self._shelf, self._total, self._over = list(jobs), shelf, len(jobs), 0
        self._waited_for: set[str] = set()
        self._processes: list[subprocess.Popen] = []
        self._change, self._stopped = threading.Condition(), False

    def work(self, place: Mapping[str, str]) -> None:
        """Train jobs in a place until none is left."""
        while (taken := self._take()) is not None:
            job, claim = taken
            try:
                failure = self._train(job, place)
            finally:
                claim.release()
            with self._change:
                if not self._stopped:
                    self._settle(job, failure)
                self._change.notify_all()

    def _take(self) -> tuple[Job, FileLock] | None:
        """The next job that is ready, claimed; waits for one. None where there is none left."""
        with self._change:
            while not self._stopped:
                self._shelf.refresh()
                for job in list(self._pending):
                    claimed = self._look_at(job)
                    if claimed is not None:
                        return claimed
                if not self._pending:
                    return None
                self._change.wait(LOOK)
            return None

    def _look_at(self, job: Job) -> tuple[Job, FileLock] | None:
        """Settle a job that needs no training; claim one that is ready. None where it is not taken."""
        if any(teacher.key in self.failures for teacher in job.teachers):
            self._settle(job, "its teacher failed")
            return None
        now = self._shelf.renew(job)
        if now.state == "finished":
            self._settle(job)
        elif now.state == "running":
            self._wait_for(job, now)
        elif all(teacher.state == "finished" for teacher in now.teachers):
            claim = _claim(self._shelf.save_dir, job)
            if claim is None:
                self._wait_for(job, now)
                return None
            self._shelf.refresh()  # another plan may have trained it until a moment ago
            now = self._shelf.renew(job)
            if now.state in ("begun", "missing"):
                self._pending.remove(job)
                return now, claim
            claim.release()
        return None

    def _wait_for(self, job: Job, now: Job) -> None:
        if job.key not in self._waited_for:
            self._waited_for.add(job.key)
            print(f"wait    {job.title}: another process is training it (in {now.folder})", flush=True)

    def _train(self, job: Job, place: Mapping[str, str]) -> str:
        """Run a job's process to its end; returns why it failed, or nothing."""
        with writing(Path(self._shelf.save_dir, LOGS)):
            log = _new_log(Path(self._shelf.save_dir, LOGS), job)
        with open(log, "a", encoding="utf-8") as file, self._change:
            if self._stopped:
                return "stopped"
            print(f"start   {job.title} ({log})", flush=True)
            process = _start(job, place, file)
            self._processes.append(process)
        code = process.wait()
        with self._change:
            self._processes.remove(process)
            self._shelf.refresh()
            if code:
                return f"exit code {code}: {last_line(log)}"
            # A result under other settings than the plan's would be another row.
            is_there = self._shelf.renew(job).state == "finished"
            return "" if is_there else f"it ended, but no run in {self._shelf.save_dir} has its settings; see {log}"

    def _settle(self, job: Job, failure: str = "") -> None:
        self._pending = [one for one in self._pending if one.key != job.key]
        self._over += 1
        if failure:
            self.failures[job.key] = failure
        done = f"[{self._over}/{self._total}] {job.title}"
        print(f"FAILED  {done}: {failure}" if failure else f"done  {done}", flush=True)

    def stop(self) -> None:
        """Take no more jobs; ask the runs to save and stop."""
        with self._change:
            self._stopped = True
            for process in self._processes:
                process.send_signal(signal.SIGTERM)
            self._change.notify_all()


def _claim(save_dir: str, job: Job) -> FileLock | None:
    """The right to train a job, until it is released or this process ends; None where another plan has it."""
    name = hashlib.sha256(job.key.encode()).hexdigest()[:32]
    claim = FileLock(Path(save_dir, CLAIMS, f"{name}.lock"), thread_local=False)
    try:
        acquire(claim)
        return claim
    except Timeout:
        return None


def _new_log(folder: Path, job: Job) -> Path:
    """A log of its own for every process."""
    for number in range(1, 1_000_000):
        path = folder / f"{job.folder.name}{f'.{number}' if number > 1 else ''}.log"
        with suppress(FileExistsError), open(path, "x", encoding="utf-8"):
            return path
    raise UserError(f"--save_dir: {folder} is full of logs of {job.folder.name}; remove some")


def _start(job: Job, place: Mapping[str, str], log) -> subprocess.Popen:
    # A group of its own: a Ctrl-C reaches the runs once, through `stop`.
    environment = os.environ | place
    return subprocess.Popen(
        command_line(job), stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )


def last_line(path: Path) -> str:
    """The last line of a log that is not empty."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")


# How long it takes.


class Speeds:
    """Images and seconds of an epoch, measured in earlier runs of the same method, networks and images; a try-out of
    some steps tells nothing of a whole epoch."""

    def __init__(self, save_dir: str):
        measured = defaultdict(list)
        for folder in find_folders([Path(save_dir)]) if Path(save_dir).is_dir() else ():
            with suppress(UserError):
                record = read_record(folder)
                for epoch in record.epochs[-LAST_EPOCHS:] if record.config["max_steps"] is None else ():
                    with suppress(KeyError):
                        seconds = epoch["data_wait_s"] + epoch["compute_s"]
                        measured[_work(record.config)].append((epoch["images_per_s"], seconds))
        self._median = {
            work: (statistics.median(speed for speed, _ in both), statistics.median(seconds for _, seconds in both))
            for work, both in measured.items()
        }

    def estimate(self, config: Mapping[str, Any]) -> tuple[float, float] | None:
        """(images per second, seconds) of a whole run, without testing; None where nothing like it was run."""
        known = self._median.get(_work(config))
        return None if known is None else (known[0], known[1] * config["epochs"])


def _work(config: Mapping[str, Any]) -> str:
    """What decides how long an epoch takes, on one machine."""
    images = f"{config['dataset']} {config['data']} {config['image_size']} {config['precision']} {config['max_steps']}"
    return f"{images} {config['distill']} {config['model_t']} {config['model_s']}"


# Elsewhere.


def submit(jobs: Sequence[Job], folder: Path, settings: Sequence[str], cluster: str) -> list[tuple[Job, Any]]:
    """Submit every job to a cluster -> (job, submitit's handle of it); a student's waits for its teachers' to end well.

    `settings` are submitit's parameters like timeout_min=600 or slurm_partition=gpu; `cluster` is slurm, or local and
    debug for trying.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm: submitit is not installed; pip install -r requirements-extras.txt") from None
    parameters = read_parameters(settings)
    processes = parameters.get("gpus_per_node", 1)

    def make_executor(place: str | Path) -> Any:
        executor = submitit.AutoExecutor(folder=place, cluster=cluster)
        executor.update_parameters(**parameters)
        return executor

    try:
        with tempfile.TemporaryDirectory() as place:  # it makes its folder before it looks at the parameters
            make_executor(place)
        with writing(folder):
            executor = make_executor(folder)
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise UserError(f"--slurm: {error}") from None
    submitted: dict[str, tuple[Job, Any]] = {}
    additional = parameters.get("slurm_additional_parameters", {})
    for job in jobs:
        teachers = [submitted[teacher.key][1] for teacher in job.teachers if teacher.key in submitted]
        if cluster == "slurm":  # holds the job back until the teachers are there
            awaited = ":".join(["afterok", *(str(teacher.job_id) for teacher in teachers)])
            dependency = {"dependency": awaited} if teachers else {}
            executor.update_parameters(slurm_additional_parameters=additional | dependency)
        else:
            for teacher in teachers:
                teacher.wait()
        command = submitit.helpers.CommandFunction(command_line(job, processes), verbose=False)
        submitted[job.key] = job, executor.submit(command)
    return list(submitted.values())


def read_parameters(settings: Sequence[str]) -> dict[str, Any]:
    """submitit's parameters by name; raises `UserError` for what is none, and for several tasks of a run."""
    parameters = dict(map(_read_parameter, settings))
    for name in ("gpus_per_node", "tasks_per_node", "nodes"):
        if not isinstance(parameters.get(name, 1), int):
            raise UserError(f"--slurm: {name} must be a whole number, not {parameters[name]}")
    if parameters.get("tasks_per_node", 1) * parameters.get("nodes", 1) > 1:
        raise UserError("--slurm: every task would train the whole run; give one task, and gpus_per_node for its GPUs")
    return parameters


def _read_parameter(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--slurm: {text} must be NAME=VALUE, like timeout_min=600 or slurm_partition=gpu")
    return name, int(value) if value.isdecimal() else value


def ready(jobs: Iterable[Job]) -> list[Job]:
    """The jobs to hand on; names the students left out because another process is training their teacher.

    A line of a list and a cluster's job know nothing of that process, so they would start without the teacher.
    """
    chosen = []
    for job in jobs:
        if job.state not in ("begun", "missing"):
            continue
        running = next((teacher for teacher in job.teachers if teacher.state == "running"), None)
        if running is not None:
            print(
                f"left out: {job.title}: another process is training its teacher in {running.folder}; start the "
                "same command again when that is finished"
            )
        else:
            chosen.append(job)
    return chosen
