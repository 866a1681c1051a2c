"""scripts/reproduce.py: from a command line to a list, a file of commands, a table."""

import functools
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helper.tables import jobs
from scripts import reproduce
from tests.conftest import ROOT, message_of
from tests.run_folders import pretend

SHORT = ("--max_steps", "2", "--batch_size", "16")
NO_CLUSTER = ("--slurm", "nonsense=1", "--cluster", "local")


@pytest.fixture
def command(tmp_path):
    """The command line of a tiny table: a teacher, a baseline, KD and NORM on raw logits."""
    save_dir = tmp_path / "save"
    flags = ["--pairs", "resnet14:resnet8", "--methods", "kd", "--variants", "norm -c 0 -s 2", "--trials", "1"]
    return save_dir, [*flags, "--save_dir", str(save_dir)], ["--", *SHORT]


def test_a_dry_run_only_lists(command, capsys):
    save_dir, flags, extra = command
    reproduce.main([*flags, "--dry_run", *extra])
    printed = capsys.readouterr().out
    assert "1 missing" in printed and "resnet14 -> resnet8: norm -c 0 -s 2" in printed
    assert "4 runs: 0 finished, 0 begun, 4 missing" in printed
    reproduce.main([*flags, "--variants", "kd -a 2", "--dry_run", *extra])  # adds to the one before
    assert "5 runs: 0 finished, 0 begun, 5 missing" in capsys.readouterr().out
    for given, fault in (("nodes=two", "nodes must be a whole number"), ("nodes", "must be NAME=VALUE")):
        assert fault in message_of(reproduce.main, [*flags, "--dry_run", "--slurm", given, *extra])
    assert message_of(reproduce.main, [*flags, *NO_CLUSTER, *extra]).startswith("--slurm: ")
    assert not save_dir.exists()


def test_a_dry_run_says_how_many_runs_there_would_be_at_a_time(command, capsys, monkeypatch):
    _, flags, extra = command
    reproduce.main([*flags, "--dry_run", "--gpus", "0,1", "--jobs", "3", *extra])
    assert "; left with 6 at a time: unknown for 4 runs (none like them" in capsys.readouterr().out
    monkeypatch.setattr(jobs.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(jobs.torch.cuda, "device_count", lambda: 0)
    reproduce.main([*flags, "--dry_run", *extra])
    assert "; left one after the other: unknown for 4 runs" in capsys.readouterr().out, "also while every GPU is in use"
    assert "other programs use every GPU" in message_of(reproduce.main, [*flags, *extra])


def test_a_job_list_holds_the_commands(command, tmp_path):
    _, flags, extra = command
    reproduce.main([*flags, "--job_list", str(tmp_path / "jobs.txt"), *extra])
    lines = [shlex.split(line) for line in (tmp_path / "jobs.txt").read_text().splitlines()]
    assert len(lines) == 4 and all(Path(line[1]).exists() for line in lines)
    assert Path(lines[0][1]).name == "train_teacher.py" and lines[-1][2:4] == ["--distill", "norm"]
    absent = str(tmp_path / "none" / "jobs.txt")
    message = message_of(reproduce.main, [*flags, "--job_list", absent, *extra])
    assert message.startswith(f"argument --job_list: there is no folder {tmp_path}/none; make it")


def test_what_is_trained_is_tabulated_and_a_failure_is_the_exit_code(command, capsys, monkeypatch):
    save_dir, flags, extra = command

    def run_all_but_kd(listed, places, shelf, failing=("kd",)):
        for job in listed:
            if job.config.distill not in failing:
                pretend(job, "result.json", teacher_digest="1" * 64 if job.teachers else None)
        shelf.refresh()
        return dict.fromkeys(failing, "exit code 2")

    monkeypatch.setattr(reproduce, "run_jobs", run_all_but_kd)
    monkeypatch.setattr(jobs.Shelf, "digest", lambda self, path, name, flag="", ema=False: "1" * 64)
    message = message_of(reproduce.main, [*flags, *extra])
    assert message == f"1 of 4 runs failed; their logs are in {save_dir}/logs"
    assert "| digits | resnet14 | resnet8 | norm --max_steps 2 -c 0 -s 2 |" in capsys.readouterr().out
    monkeypatch.setattr(reproduce, "run_jobs", functools.partial(run_all_but_kd, failing=()))
    reproduce.main([*flags, *extra])
    reproduce.main([*flags, *extra])
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("4 runs: "))
    assert "; left one after the other: " in first
    assert second == "4 runs: 4 finished, 0 begun, 0 missing; nothing is left to train"


def test_what_makes_no_table_is_one_line():
    assert "say what to reproduce" in message_of(reproduce.main, [])
    assert "is not in table 1" in message_of(reproduce.main, ["--table", "1", "--pairs", "resnet8:resnet8"])
    flags = ["--pairs", "resnet20:resnet8", "--dry_run"]
    for flag, rows in (("--methods", "kd,nrom"), ("--variants", "nrom -c 0")):
        assert message_of(reproduce.main, [*flags, flag, rows]).startswith(f"{flag}: unknown method 'nrom'; did you me")
    assert "not used by --distill kd" in message_of(reproduce.main, [*flags, "--variants", "kd -s 8"])
    assert "did you mean --epochs?" in message_of(reproduce.main, [*flags, "--", "--epoch", "3"])
    assert "argument --pairs: unknown model 'resnet21'" in message_of(reproduce.main, ["--pairs", "resnet20:resnet21"])
    assert "must be pairs like" in message_of(reproduce.main, ["--pairs", "resnet20"])


@pytest.mark.slow
def test_a_table_trains_each_run_once_with_two_plans_at_work(command):
    save_dir, flags, extra = command
    plan = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), *flags, *extra]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    plans = [subprocess.Popen(plan, **options) for _ in range(2)]
    printed = [one.communicate(timeout=300)[0] for one in plans]
    assert [one.returncode for one in plans] == [0, 0], printed
    assert sum(text.count("start   ") for text in printed) == 4
    assert all("| norm --max_steps 2 -c 0 -s 2 teacher --max_steps 2 |" in text for text in printed)
    folders = [path.name for path in save_dir.iterdir() if (path / "config.json").exists()]
    assert len(folders) == 4 and not any("-2" in name for name in folders)
    logs = {path.name for path in (save_dir / "logs").iterdir()}
    assert logs == {f"{name}.log" for name in folders}


def test_several_teachers_of_a_pair_are_named_with_plus(tmp_path, capsys):
    flags = ["--methods", "kd,norm", "--trials", "1", "--save_dir", str(tmp_path), "--dry_run"]
    reproduce.main(["--pairs", "resnet14+timm:resnet10t:resnet8,resnet14:resnet8", *flags])
    printed = capsys.readouterr().out
    assert "resnet14+timm:resnet10t -> resnet8: norm" in printed and "7 runs: 0 finished" in printed
    assert "like A+B:STUDENT" in message_of(reproduce.main, ["--pairs", "resnet14,resnet20:resnet8"])
    assert "like A+B:STUDENT" in message_of(reproduce.main, ["--pairs", "resnet14+:resnet8"])
    message = message_of(reproduce.main, ["--pairs", "resnet14:resnet8", *flags, "--", "--path_t", "a,b"])
    assert "--path_t" in message and "A+B:STUDENT" in message
