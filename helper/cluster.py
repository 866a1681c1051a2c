"""Hands jobs to a Slurm cluster through the submitit library."""

from collections.abc import Callable, Sequence
from pathlib import Path

from errors import UserError
from helper.plan import Job
from helper.running import command_line


def submit(jobs: Sequence[Job], folder: Path, settings: Sequence[str], cluster: str) -> list[tuple[Job, object]]:
    """Submit every job -> (job, submitit's handle of it); a student's waits for its teacher's to end well.

    `settings` are submitit's parameters like timeout_min=600 or slurm_partition=gpu; `cluster` is slurm, or local and
    debug for trying.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm: submitit is not installed; pip install -r requirements-extras.txt") from None
    parameters = dict(map(_read_setting, settings))
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**parameters)
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise UserError(f"--slurm: {error}") from None
    submitted: list[tuple[Job, object]] = []
    by_folder = {}
    for job in jobs:
        teacher = by_folder.get(job.teacher)
        if teacher is not None:
            _wait_for(executor, teacher, cluster, parameters)
        handle = executor.submit(_command(submitit, job))
        by_folder[job.folder] = handle
        submitted.append((job, handle))
        if teacher is not None and cluster == "slurm":
            executor.update_parameters(slurm_additional_parameters=parameters.get("slurm_additional_parameters", {}))
    return submitted


def _command(submitit, job: Job) -> Callable:
    return submitit.helpers.CommandFunction(command_line(job), verbose=False)


def _wait_for(executor, teacher, cluster: str, parameters: dict) -> None:
    """Slurm holds the next job back until the teacher is there; elsewhere it is waited for."""
    if cluster == "slurm":
        additional = parameters.get("slurm_additional_parameters", {}) | {"dependency": f"afterok:{teacher.job_id}"}
        executor.update_parameters(slurm_additional_parameters=additional)
    else:
        teacher.wait()


def _read_setting(text: str) -> tuple[str, str | int]:
    name, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--slurm: {text} must be NAME=VALUE, like timeout_min=600 or slurm_partition=gpu")
    return name, int(value) if value.isdecimal() else value
