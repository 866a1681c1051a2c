"""Jobs as processes: claimed, started when their teacher is there, resumed, stopped, handed on."""

import signal
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest

from errors import Stopped, UserError
from helper.run_folder import RunFolder
from helper.tables import jobs
from helper.tables.plan import Plan, Shelf, read_variants
from tests.run_folders import make_run, pretend

PAIR = (("resnet14", "resnet8"),)
SHORT = ("--max_steps", "2", "--batch_size", "16")


class Trainings:
    """Stands for the processes of jobs: each notes its title and leaves the run folder that a training would."""

    def __init__(self, monkeypatch, fail: str = "", seconds: float = 0.0):
        self.started: list[str] = []
        self.places: set[str] = set()
        self.commands: list[tuple[str, ...]] = []
        self._fail, self._seconds = fail, seconds
        monkeypatch.setattr(jobs, "_start", self.start)
        monkeypatch.setattr(
            Shelf, "digest", lambda shelf, path, name, flag="", ema=False: f"{zlib.crc32(str(path).encode()):064x}"
        )

    def start(self, job, place, log):
        self.started.append(job.title)
        self.commands.append(job.command)
        self.places.add(place.get("PLACE", ""))
        for teacher in job.teachers:
            assert (teacher.folder / "result.json").exists(), "a student needs a finished teacher"
        if self._fail and self._fail in job.title:
            log.write("error: --x: it went wrong\n\n")
        return type("Process", (), {"wait": lambda _: self.wait(job)})()

    def wait(self, job) -> int:
        time.sleep(self._seconds * (3 if job.config.distill == "ce" and job.config.model_s == "resnet14" else 1))
        if self._fail and self._fail in job.title:
            return 2
        if not job.folder.exists():
            pretend(job, "result.json")
        else:
            (job.folder / "result.json").write_text((job.teachers[0].folder / "result.json").read_text())
        return 0


def table(save_dir: Path, rows: str = "kd; norm -c 0", trials: int = 1):
    plan = Plan(str(save_dir), None, SHORT)
    return plan, plan.jobs(PAIR, read_variants(rows), trials)


def train(plan, listed, places=({},)):
    return jobs.run_jobs([job for job in listed if job.state != "finished"], list(places), plan.shelf)


def test_missing_runs_are_trained_once_teachers_first(tmp_path, monkeypatch, capsys):
    trainings = Trainings(monkeypatch)
    assert train(*table(tmp_path)) == {}
    assert trainings.started[0] == "resnet14 with labels alone, seed 1" and len(trainings.started) == 4
    assert "done  [4/4]" in capsys.readouterr().out
    assert {job.state for job in table(tmp_path)[1]} == {"finished"}
    assert train(*table(tmp_path)) == {} and len(trainings.started) == 4


def test_places_work_side_by_side(tmp_path, monkeypatch):
    trainings = Trainings(monkeypatch, seconds=0.2)
    train(*table(tmp_path), [{"PLACE": "a"}, {"PLACE": "b"}])
    assert trainings.places == {"a", "b"} and len(trainings.started) == 4


def test_students_of_a_teacher_that_is_to_be_trained_are_missing(tmp_path, monkeypatch):
    trainings = Trainings(monkeypatch)
    plan, listed = table(tmp_path, "kd")
    train(plan, listed)
    (listed[0].folder / "last.pth").touch()
    assert [job.state for job in table(tmp_path, "kd")[1]] == ["finished"] * 3
    (listed[0].folder / "result.json").unlink()
    assert [job.state for job in table(tmp_path, "kd")[1]] == ["begun", "finished", "missing"]
    (listed[0].folder / "last.pth").unlink()
    assert [job.state for job in table(tmp_path, "kd")[1]] == ["missing", "finished", "missing"]
    train(*table(tmp_path, "kd"))
    assert trainings.started.count("resnet14 -> resnet8: kd, seed 1") == 2
    assert "digits_ce_resnet14_trial1_try-2" in " ".join(trainings.commands[-1]), "taught by the new teacher"


def test_a_student_of_another_teacher_is_missing(tmp_path, monkeypatch):
    Trainings(monkeypatch)
    train(*table(tmp_path, "kd"))
    monkeypatch.setattr(Shelf, "digest", lambda shelf, path, name, flag="", ema=False: "other weights")
    assert [job.state for job in table(tmp_path, "kd")[1]] == ["finished", "finished", "missing"]


def test_a_failed_run_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    trainings = Trainings(monkeypatch, fail=": kd")
    plan, listed = table(tmp_path)
    assert train(plan, listed) == {listed[2].key: "exit code 2: error: --x: it went wrong"}
    assert len(trainings.started) == 4 and "FAILED" in capsys.readouterr().out


def test_students_fail_with_their_teacher(tmp_path, monkeypatch):
    trainings = Trainings(monkeypatch, fail="resnet14 with")
    failures = train(*table(tmp_path))
    assert sorted(failures.values()) == ["exit code 2: error: --x: it went wrong", *["its teacher failed"] * 2]
    assert len(trainings.started) == 2


def test_what_ends_under_other_settings_has_failed(tmp_path, monkeypatch):
    trainings = Trainings(monkeypatch)
    train(*table(tmp_path, "kd"))
    monkeypatch.setattr(jobs, "_start", lambda job, *_: trainings.start(job._replace(config=other(job)), *_))
    [failure] = train(*table(tmp_path, "kd -a 3")).values()
    assert "no run in" in failure


def other(job):
    return job.config.replace("", weight_decay=0.5)


def test_a_run_that_was_begun_is_resumed(tmp_path, monkeypatch):
    Trainings(monkeypatch)
    plan, listed = table(tmp_path, "kd")
    train(plan, listed)
    student = plan.shelf.renew(listed[-1])
    (student.folder / "result.json").unlink()
    (student.folder / "last.pth").touch()
    again = table(tmp_path, "kd")[1][-1]
    assert again.state == "begun" and again.command == ("train_cifar_student.py", "--resume", str(student.folder))


def test_two_plans_at_once_train_each_run_once(tmp_path, monkeypatch, capsys):
    trainings = Trainings(monkeypatch, seconds=0.1)
    monkeypatch.setattr(jobs, "LOOK", 0.05)
    monkeypatch.setattr(jobs.signal, "signal", lambda *_: None)  # only the main thread may
    plans = [table(tmp_path, trials=2) for _ in range(4)]
    threads = [threading.Thread(target=train, args=plan) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trainings.started) == len(set(trainings.started)) == 7
    assert capsys.readouterr().out.count("done  [7/7]") == 4, "every plan says what it has in the end"
    assert len(list((tmp_path / "logs").iterdir())) == 7


def test_a_run_that_another_process_trains_is_waited_for(tmp_path, monkeypatch, capsys):
    trainings = Trainings(monkeypatch)
    monkeypatch.setattr(jobs, "LOOK", 0.05)
    plan, listed = table(tmp_path)
    folder = RunFolder(pretend(listed[0])).lock()
    assert [job.state for job in table(tmp_path)[1]] == ["running", *["missing"] * 3]

    def finish():
        (listed[0].folder / "result.json").write_text(
            make_run(tmp_path / "x", "ce", 1, [1.0]).joinpath("result.json").read_text()
        )
        folder.close()

    wait_for = jobs._Board._wait_for

    def wait_and_finish(board, job, now):
        wait_for(board, job, now)
        finish()

    monkeypatch.setattr(jobs._Board, "_wait_for", wait_and_finish)
    train(plan, table(tmp_path)[1])
    assert "wait    resnet14 with labels alone" in capsys.readouterr().out
    assert len(trainings.started) == 3 and not (tmp_path / f"{listed[0].folder.name}-2").exists()


def test_every_process_has_its_own_log(tmp_path, monkeypatch):
    Trainings(monkeypatch, fail=": kd")
    for _ in range(2):
        train(*table(tmp_path, "kd"))
    logs = sorted(path.name for path in (tmp_path / "logs").glob("*kd*"))
    assert logs == ["digits_kd_resnet14_resnet8_trial1_try.2.log", "digits_kd_resnet14_resnet8_trial1_try.log"]


def test_sigterm_stops_the_runs_too(tmp_path, monkeypatch):
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    monkeypatch.setattr(jobs, "command_line", lambda job: [sys.executable, "-c", code])
    with pytest.raises(Stopped, match="start the same command again"):
        train(*table(tmp_path))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_places_are_gpus_or_the_cpu():
    assert jobs.find_places([0, 2], 2) == [{"CUDA_VISIBLE_DEVICES": number} for number in "0202"]
    assert len(jobs.find_places(None, 3)) >= 3


def test_how_long_it_takes_comes_from_own_runs(tmp_path):
    config = Plan(str(tmp_path)).jobs(PAIR, read_variants("kd"), 1)[-1].config
    assert jobs.Speeds(str(tmp_path)).estimate(config) is None
    for flags in ({}, {"max_steps": 20}, {"image_size": 64}):  # a try-out and larger images tell nothing of it
        run = make_run(tmp_path, "kd", 7, [50.0, 60.0], teacher="resnet14", **flags)
        seconds = 99 if flags else 9
        (run / "metrics.jsonl").write_text(
            f'{{"epoch": 1, "images_per_s": 100, "data_wait_s": 1.0, "compute_s": {seconds}.0}}\n'
            f'{{"epoch": 2, "images_per_s": 120, "data_wait_s": 1.0, "compute_s": {seconds - 2}.0}}\n'
        )
    assert jobs.Speeds(str(tmp_path)).estimate(config) == (110, 9.0 * config.epochs)
    assert jobs.Speeds(str(tmp_path)).estimate(config.replace("", max_steps=20)) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # submitit leaves its log files to the garbage collector
def test_jobs_are_submitted_with_submitit_and_students_wait(tmp_path, monkeypatch):
    pytest.importorskip("submitit")

    def touch(job, processes):
        needed = "".join(f"test -e '{teacher.folder}.done' && " for teacher in job.teachers)
        return ["sh", "-c", f"{needed}touch '{job.folder}.done'"]

    monkeypatch.setattr(jobs, "command_line", touch)
    for job, handle in jobs.submit(table(tmp_path, "kd")[1], tmp_path, ["timeout_min=5"], "local"):
        handle.result()
        assert Path(f"{job.folder}.done").exists(), job.title
    with pytest.raises(UserError, match="--slurm: nothing must be NAME=VALUE"):
        jobs.submit([], tmp_path, ["nothing"], "local")


def test_slurm_jobs_of_students_depend_on_their_teachers(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    settings, commands = [], []

    class Executor:
        def __init__(self, folder, cluster):
            self.parameters, self.number = {}, 100

        def update_parameters(self, **parameters):
            self.parameters |= parameters

        def submit(self, command):
            settings.append(self.parameters["slurm_additional_parameters"].get("dependency"))
            commands.append(command.command)
            self.number += 1
            return type("Handle", (), {"job_id": str(self.number)})()

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    listed = table(tmp_path, "kd; ft")[1]
    jobs.submit(listed, tmp_path, ["slurm_partition=gpu", "gpus_per_node=8"], "slurm")
    assert settings == [None, None, "afterok:101", None]
    several = Plan(str(tmp_path)).jobs([("resnet14+resnet20", "resnet8")], read_variants("kd"), 1)
    jobs.submit(several, tmp_path, ["slurm_partition=gpu"], "slurm")
    assert settings[4:] == [None, None, None, "afterok:101:102"], "an executor's numbers begin at 101"
    assert commands[0][1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    with pytest.raises(UserError, match="every task would train the whole run"):
        jobs.submit(listed, tmp_path, ["tasks_per_node=2"], "slurm")


def test_students_of_a_teacher_that_is_being_trained_are_not_handed_on(tmp_path, capsys):
    folder = RunFolder(pretend(table(tmp_path)[1][0])).lock()
    try:
        handed_on = jobs.ready(table(tmp_path)[1])
    finally:
        folder.close()
    assert [job.title for job in handed_on] == ["resnet8 with labels alone, seed 1"]
    printed = capsys.readouterr().out
    assert printed.count("left out: resnet14 -> resnet8: ") == 2
    assert f"training its teacher in {folder.path}; start the same command again" in printed
