"""From a table's name to its runs: what is listed, estimated, run, resumed, reported, submitted."""

import itertools
import json
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helper.configuration import foresee

from errors import Stopped, UserError
from helper import running
from helper.costs import Rates, count_train_images, estimate, format_seconds
from helper.networks import TeacherFile
from helper.plan import TABLES, Job, Plan, Variant, all_variants, find_run, read_variants, trial_names
from helper.recipes import CIFAR_PAIRS
from helper.run_folder import RunFolder
from scripts import reproduce
from tests.conftest import message_of
from tests.run_folders import make_run

PAIR = (("resnet20", "resnet8"),)
TEACHER = TeacherFile("t.pth", "resnet20", None, 10, "digits", None, 32, None)
#: Runs that are over after two steps.
SHORT = ("--max_steps", "2", "--batch_size", "16")


def titles(jobs) -> list[str]:
    return [job.title for job in jobs]


def test_the_tables_are_the_papers_pairs():
    assert TABLES["1"] + TABLES["2"] == CIFAR_PAIRS
    assert ("resnet110", "resnet32") in TABLES["1"] and ("wrn_40_2", "ShuffleV1") in TABLES["2"]


def test_teachers_and_baselines_come_first_then_every_row_and_seed(tmp_path):
    jobs = Plan(str(tmp_path)).jobs(PAIR, read_variants("kd; norm -a 1; ft --ft plain"), 2)
    assert titles(jobs) == [
        "resnet20 with labels alone, seed 1",
        *(f"resnet8 with labels alone, seed {seed}" for seed in (1, 2)),
        *(f"resnet20 -> resnet8: kd, seed {seed}" for seed in (1, 2)),
        *(f"resnet20 -> resnet8: norm -a 1, seed {seed}" for seed in (1, 2)),
        *(f"resnet8: ft --ft plain, seed {seed}" for seed in (1, 2)),
    ]
    norm = jobs[5]
    assert norm.folder.name == "digits_norm_resnet20_resnet8_trial1_a1" and norm.teacher == jobs[0].folder
    script, *flags = norm.command
    assert script == "train_cifar_student.py" and flags[flags.index("--path_t") + 1] == str(jobs[0].folder / "last.pth")
    assert jobs[-1].teacher is None, "the transform alone reads no teacher"


def test_flags_of_teachers_and_of_students_reach_them_alone(tmp_path):
    jobs = Plan(str(tmp_path), None, SHORT, ("--epochs", "7"), ("--allow_teacher_gap",)).jobs(PAIR, [Variant("kd")], 1)
    teacher, baseline, student = (job.config for job in jobs)
    assert (teacher.epochs, baseline.epochs, student.epochs) == (7, 16, 16)
    assert (teacher.allow_teacher_gap, baseline.allow_teacher_gap, student.allow_teacher_gap) == (False, False, True)
    assert all(config.max_steps == 2 for config in (teacher, baseline, student))


def pretend(job: Job, *files: str) -> Path:
    """A run folder of a job that holds its configuration and these files."""
    job.folder.mkdir(parents=True)
    (job.folder / "config.json").write_text(json.dumps(vars(job.config)))
    for name in files:
        (job.folder / name).touch()
    return job.folder


CHAIN = (("resnet20", "resnet14"), ("resnet14", "resnet8"))


def test_a_teacher_with_flags_of_its_own_is_not_the_baseline_of_the_same_network(tmp_path):
    flags = ["--pairs", "resnet20:resnet14,resnet14:resnet8", "--methods", "kd", "--trials", "1"]
    own = ["--teacher_flags", "--epochs 9", "--save_dir", str(tmp_path)]
    reproduce.main([*flags, *own, "--job_list", str(tmp_path / "jobs.txt")])
    lines = [line.split() for line in (tmp_path / "jobs.txt").read_text().splitlines()]
    [teacher] = [line for line in lines if "--epochs" in line and "resnet14" in line]
    [baseline] = [line for line in lines if "--epochs" not in line and line[2:4] == ["--model", "resnet14"]]
    given = [dict(itertools.pairwise(line)) for line in (teacher, baseline, lines[-1])]
    assert given[0]["--trial"] == "1_epochs_9" and given[1]["--trial"] == "1"
    assert given[0]["--seed"] == given[1]["--seed"] == "1"
    assert given[2]["--path_t"] == str(tmp_path / "digits_ce_resnet14_trial1_epochs_9" / "last.pth")
    assert len(lines) == 6


def test_teachers_are_found_again_under_either_name(tmp_path):
    plan = Plan(str(tmp_path), None, SHORT, ("--epochs", "9"))
    teacher, *_ = plan.jobs(CHAIN[1:], [Variant("kd")], 1)
    assert teacher.folder.name == "digits_ce_resnet14_trial1", "nothing else has the usual name"
    pretend(teacher, "result.json")
    jobs = plan.jobs(CHAIN, [Variant("kd")], 1)
    assert [(job.state, job.folder.name) for job in jobs if job.config.model_s == "resnet14"] == [
        ("finished", "digits_ce_resnet14_trial1"),
        ("missing", "digits_ce_resnet14_trial1-2"),
        ("missing", "digits_kd_resnet20_resnet14_trial1"),
    ]
    other = Plan(str(tmp_path / "other"), None, SHORT, ("--epochs", "9"))
    for job in other.jobs(CHAIN, [Variant("kd")], 1):
        pretend(job, "result.json")
    assert {job.state for job in other.jobs(CHAIN, [Variant("kd")], 1)} == {"finished"}
    assert {job.state for job in other.jobs(CHAIN[1:], [Variant("kd")], 1)} == {"finished"}


def test_flags_of_teachers_that_change_no_result_make_no_second_run(tmp_path):
    jobs = Plan(str(tmp_path), None, SHORT, ("--save_freq", "5")).jobs(CHAIN, [Variant("kd")], 1)
    [both] = [job for job in jobs if job.config.distill == "ce" and job.config.model_s == "resnet14"]
    assert both.config.save_freq == 5 and len({job.folder for job in jobs}) == len(jobs) == 5


def test_rows_whose_flags_read_alike_are_two_rows(tmp_path):
    def listed(text: str) -> list[Job]:
        return [job for job in Plan(str(tmp_path)).jobs(PAIR, read_variants(text), 1) if job.config.distill != "ce"]

    both = listed("norm -b 11; norm -b1 1")
    names = ["digits_norm_resnet20_resnet8_trial1_b11", "digits_norm_resnet20_resnet8_trial1_b1_1"]
    assert [job.folder.name for job in both] == names
    assert [job.config.trial for job in both] == [job.command[-1] for job in both] == ["1_b11", "1_b1_1"]
    for job in both:
        pretend(job, "result.json")
    assert [job.state for job in listed("norm -b1 1; norm -b 11")] == ["finished", "finished"]
    assert listed("norm -b1 1")[0].folder == both[1].folder, "listed alone it is found too"
    with pytest.raises(UserError, match=r"kd --init a\+b\.pth and .*kd --init a/b\.pth would have one run folder"):
        listed("kd --init a/b.pth; kd --init a-b.pth; kd --init a+b.pth")


def test_names_of_trials_stay_short():
    path = "/".join(["somewhere"] * 30)
    assert trial_names(1, ("--init", path))[-1] != trial_names(1, ("--init", f"{path}2"))[-1]
    assert len(trial_names(1, ("--init", path))[-1]) < 100


def test_every_method_and_the_combinations_are_rows():
    labels = [variant.label for variant in all_variants()]
    assert {"norm", "norm_crd", "norm -a 1", "ft --ft plain", "ft --ft default", "kd", "crd -a 1"} <= set(labels)
    assert "ce" not in labels and len(labels) == len(set(labels)) > 25


def test_a_method_that_cannot_train_the_pair_is_named_with_its_reason(tmp_path):
    made = Plan(str(tmp_path))
    jobs = made.jobs((("resnet32x4", "resnet8"),), read_variants("fsp; kd"), 1)
    assert not any("fsp" in job.title for job in jobs) and any("kd" in job.title for job in jobs)
    [(title, reason)] = made.inapplicable
    assert title == "resnet32x4 -> resnet8: fsp" and "equal channels" in reason


def test_runs_are_found_by_their_configuration_not_by_their_name(tmp_path):
    run = make_run(tmp_path, "kd", 1, [50.0, 60.0])
    config = foresee({"distill": "kd", "model_s": "resnet8", "epochs": 2}, TEACHER)
    assert find_run(str(tmp_path), config) == (run, "finished")
    config.kd_T = 7.0
    assert find_run(str(tmp_path), config) == (tmp_path / f"{run.name}-2", "missing")
    config.kd_T = 4.0
    (run / "result.json").unlink()
    assert find_run(str(tmp_path), config)[1] == "missing", "without a checkpoint there is nothing to go on with"
    (run / "last.pth").touch()
    assert find_run(str(tmp_path), config) == (run, "begun")


def test_a_published_teacher_is_taken_where_it_lies(tmp_path):
    def listed():
        return Plan(str(tmp_path), "cifar100").jobs((("resnet56", "resnet20"),), [Variant("kd")], 1)

    assert "resnet56 with labels alone, seed 1" in titles(listed())
    file = tmp_path / "models" / "resnet56_vanilla" / "ckpt_epoch_240.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    jobs = listed()
    assert "resnet56 with labels alone, seed 1" not in titles(jobs)
    assert jobs[-1].teacher is None and str(file) in jobs[-1].command


def test_imagenet_is_taught_by_torchvisions_networks(tmp_path):
    jobs = Plan(str(tmp_path), "imagenet", ("--data", "images")).jobs(TABLES["6"], [Variant("norm")], 1)
    assert titles(jobs) == ["resnet50_4 with labels alone, seed 1", "resnet50 -> resnet50_4: norm, seed 1"]
    script, *flags = jobs[1].command
    assert script == "train_imagenet_student.py" and "torchvision:resnet50" in flags
    assert jobs[1].config.batch_size == 256 and jobs[1].teacher is None


def test_another_librarys_network_may_teach_imagenet(tmp_path):
    teacher = "torchvision:resnet50"
    *_, job = Plan(str(tmp_path), "imagenet", ("--data", "images")).jobs([(teacher, "resnet18")], [Variant("kd")], 1)
    given = dict(itertools.pairwise(job.command))
    assert given["--path_t"] == given["--model_t"] == job.config.model_t == teacher


def test_costs_come_from_what_was_measured(tmp_path):
    make_run(tmp_path, "kd", 7, [50.0])  # 100 images/s
    rates = Rates(tmp_path.glob("*"))
    kd, norm, other = (
        Plan(str(tmp_path)).jobs(((teacher, "resnet8"),), [Variant(method)], 1)[-1]
        for teacher, method in (("resnet20", "kd"), ("resnet20", "norm"), ("resnet56", "kd"))
    )
    cost = estimate(kd, rates)
    assert cost.source == "measured" and cost.seconds == pytest.approx(16 * 23 * 64 / 100)
    assert estimate(norm, rates) == (cost.seconds, "as other methods of the pair")
    scaled = estimate(other, rates)
    assert scaled.source == "scaled by multiply-adds" and 1.2 < scaled.seconds / cost.seconds < 4
    assert estimate(kd, Rates([])).seconds is None
    assert count_train_images(kd.config) == 1433
    kd.config.holdout = 33
    assert count_train_images(kd.config) == 1400
    assert [format_seconds(seconds) for seconds in (42, 90, 5400, 200_000)] == ["42 s", "1.5 min", "1.5 h", "2.3 days"]


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
    assert (
        "1 missing" in printed and "resnet14 -> resnet8: norm -c 0 -s 2" in printed and "4 runs: 0 finished" in printed
    )
    assert not save_dir.exists()


def in_process(monkeypatch, fail: str = "") -> list[list[str]]:
    """Have jobs run in this process, and those whose command holds `fail` fail; returns the commands."""
    ran = []

    class Finished:
        def __init__(self, job, log):
            import train_cifar_student
            import train_teacher

            script, *flags = job.command
            ran.append(flags)
            self.returncode = 0
            if fail and fail in flags:
                self.returncode = 2
                log.write_text("error: --x: it went wrong\n\n")
                return
            {"train_teacher.py": train_teacher, "train_cifar_student.py": train_cifar_student}[script].main(flags)

        def poll(self):
            return self.returncode

    monkeypatch.setattr(running, "_start", lambda job, place, log: Finished(job, log))
    return ran


def test_missing_runs_are_trained_once_and_tabulated(command, capsys, monkeypatch):
    _, flags, extra = command
    ran = in_process(monkeypatch)
    reproduce.main([*flags, *extra])
    printed = capsys.readouterr().out
    assert len(ran) == 4 and "done  [4/4]" in printed
    assert "| digits | resnet14 | resnet8 | norm -c 0 -s 2 |" in printed
    reproduce.main([*flags, *extra])
    assert len(ran) == 4 and "4 runs: 4 finished, 0 begun, 0 missing" in capsys.readouterr().out
    reproduce.main([*flags, "--", "--max_steps", "1", "--batch_size", "16"])
    assert len(ran) == 8, "other settings are other runs"


def test_a_failed_run_is_reported_and_does_not_stop_the_others(command, capsys, monkeypatch):
    save_dir, flags, extra = command
    ran = in_process(monkeypatch, fail="kd")
    message = message_of(reproduce.main, [*flags, *extra])
    assert message == f"1 of 4 runs failed; their logs are in {save_dir}/logs"
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "kd, seed 1: exit code 2: error: --x: it went wrong" in printed
    assert len(ran) == 4 and "| norm -c 0 -s 2 |" in printed


def test_students_wait_for_their_teacher_and_fail_with_it(command, capsys, monkeypatch):
    _, flags, extra = command
    ran = in_process(monkeypatch, fail="resnet14")
    assert "3 of 4 runs failed" in message_of(reproduce.main, [*flags, *extra])
    assert len(ran) == 2 and capsys.readouterr().out.count("its teacher failed") == 2


def test_a_run_that_was_cut_is_resumed(tmp_path):
    made = Plan(str(tmp_path), None, SHORT)
    job = made.jobs(PAIR, [Variant("kd")], 1)[-1]
    job.folder.mkdir()
    (job.folder / "config.json").write_text(json.dumps(vars(job.config)))
    (job.folder / "last.pth").touch()
    again = made.jobs(PAIR, [Variant("kd")], 1)[-1]
    assert again.state == "begun" and again.command == ("train_cifar_student.py", "--resume", str(job.folder))


def test_processes_run_side_by_side_and_their_exit_codes_count(tmp_path, capsys, monkeypatch):
    code = "import sys, os; print(os.environ.get('PLACE')); sys.exit({})"

    def job(name: str, status: int) -> Job:
        config = foresee({"distill": "ce", "model_s": "resnet8", "save_dir": str(tmp_path)}, None)
        return Job(name, config, tmp_path / name, "missing", (code.format(status),))

    monkeypatch.setattr(running, "command_line", lambda job: [sys.executable, "-c", *job.command])
    places = [{"PLACE": "a"}, {"PLACE": "b"}]
    failures = running.run_jobs([job("x", 0), job("y", 3), job("z", 0)], places, tmp_path / "logs")
    assert failures == {tmp_path / "y": f"exit code 3: {running.last_line(tmp_path / 'logs' / 'y.log')}"}
    assert {(tmp_path / "logs" / f"{name}.log").read_text().strip() for name in "xy"} == {"a", "b"}


def test_a_run_that_another_process_trains_is_waited_for(command, capsys, monkeypatch):
    save_dir, flags, extra = command
    ran = in_process(monkeypatch)
    argv = ["--model", "resnet14", "--trial", "1", "--save_dir", str(save_dir), *extra[1:]]
    code = f"import sys, time, train_teacher; train_teacher.main({argv}); time.sleep(1)"
    # It is in the middle of its run until the test goes on: stopped, it still holds its folder.
    other = subprocess.Popen([sys.executable, "-c", code], cwd=running.ROOT, stdout=subprocess.DEVNULL)
    try:
        while not (save_dir / "digits_ce_resnet14_trial1" / "config.json").exists():
            assert other.poll() is None
        other.send_signal(signal.SIGSTOP)
        reproduce.main([*flags, "--dry_run", *extra])
        assert "1 running" in capsys.readouterr().out
        threading.Timer(1.0, lambda: other.send_signal(signal.SIGCONT)).start()
        reproduce.main([*flags, *extra])
    finally:
        other.kill()
        other.wait()
    printed = capsys.readouterr().out
    assert "wait    resnet14 with labels alone" in printed and "done  [4/4]" in printed
    assert len(ran) == 3 and not (save_dir / "digits_ce_resnet14_trial1-2").exists()


def test_sigterm_stops_the_runs_too(tmp_path, monkeypatch):
    config = foresee({"distill": "ce", "model_s": "resnet8", "save_dir": str(tmp_path)}, None)
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    monkeypatch.setattr(running, "command_line", lambda job: [sys.executable, "-c", code])
    with pytest.raises(Stopped, match="start the same command again"):
        running.run_jobs([Job("x", config, tmp_path / "x", "missing", ())], [{}], tmp_path / "logs")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_job_list_holds_the_commands(command, tmp_path):
    _, flags, extra = command
    reproduce.main([*flags, "--job_list", str(tmp_path / "jobs.txt"), *extra])
    lines = [shlex.split(line) for line in (tmp_path / "jobs.txt").read_text().splitlines()]
    assert len(lines) == 4 and all(Path(line[1]).exists() for line in lines)
    assert Path(lines[0][1]).name == "train_teacher.py" and lines[-1][2:4] == ["--distill", "norm"]
    absent = str(tmp_path / "none" / "jobs.txt")
    assert f"{absent} cannot be written" in message_of(reproduce.main, [*flags, "--job_list", absent, *extra])


def test_students_of_a_teacher_that_is_being_trained_are_not_handed_on(command, tmp_path, capsys, monkeypatch):
    save_dir, flags, extra = command
    teacher, *_ = Plan(str(save_dir), None, SHORT).jobs((("resnet14", "resnet8"),), [Variant("kd")], 1)
    folder = RunFolder(pretend(teacher)).lock()
    submitted = []
    monkeypatch.setattr(reproduce, "submit", lambda jobs, *_: submitted.extend(jobs) or [])
    try:
        for handed_on in (["--job_list", str(tmp_path / "jobs.txt")], ["--slurm"]):
            reproduce.main([*flags, *handed_on, *extra])
            printed = capsys.readouterr().out
            assert printed.count("left out: resnet14 -> resnet8: ") == 2
            assert f"training its teacher in {teacher.folder}; start the same command again" in printed
    finally:
        folder.close()
    [line] = (tmp_path / "jobs.txt").read_text().splitlines()
    assert "train_teacher.py" in line and "--model resnet8" in line
    assert titles(submitted) == ["resnet8 with labels alone, seed 1"]


@pytest.mark.filterwarnings("ignore")  # submitit leaves its log files to the garbage collector
def test_jobs_are_submitted_with_submitit_and_students_wait(command, capsys, monkeypatch):
    pytest.importorskip("submitit")
    from helper import cluster

    _, flags, extra = command

    def touch(job):
        needed = f"test -e '{job.teacher}.done' &&" if job.teacher else ""
        return ["sh", "-c", f"{needed} touch '{job.folder}.done'"]

    monkeypatch.setattr(cluster, "command_line", touch)
    submitted = []
    monkeypatch.setattr(reproduce, "submit", lambda *args: submitted.extend(cluster.submit(*args)) or submitted)
    reproduce.main([*flags, "--slurm", "timeout_min=5", "--cluster", "local", *extra])
    assert capsys.readouterr().out.count("submitted") == 4
    for job, handle in submitted:
        handle.result()
        assert Path(f"{job.folder}.done").exists(), job.title
    assert "--slurm: nothing must be NAME=VALUE" in message_of(reproduce.main, [*flags, "--slurm", "nothing"])


def test_slurm_jobs_of_students_depend_on_their_teachers(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    from helper import cluster

    settings = []

    class Executor:
        def __init__(self, folder, cluster):
            self.parameters, self.number = {}, 100

        def update_parameters(self, **parameters):
            self.parameters |= parameters

        def submit(self, command):
            settings.append(self.parameters.get("slurm_additional_parameters", {}).get("dependency"))
            self.number += 1
            return type("Handle", (), {"job_id": str(self.number)})()

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    jobs = Plan(str(tmp_path), None, SHORT).jobs(PAIR, read_variants("kd; ft"), 1)
    cluster.submit(jobs, tmp_path, ["slurm_partition=gpu"], "slurm")
    assert settings == [None, None, "afterok:101", None]


def test_what_makes_no_table_is_one_line(tmp_path):
    assert "say what to reproduce" in message_of(reproduce.main, [])
    assert "is not in table 1" in message_of(reproduce.main, ["--table", "1", "--pairs", "resnet8:resnet8"])
    flags = ["--pairs", "resnet20:resnet8", "--dry_run"]
    assert "kdd" in message_of(reproduce.main, [*flags, "--methods", "kdd"])
    assert "not used by --distill kd" in message_of(reproduce.main, [*flags, "--variants", "kd -s 8"])
    assert "unrecognized" in message_of(reproduce.main, [*flags, "--", "--epoch", "3"])


@pytest.mark.parametrize("flags", [["--dataset", "digits"], ["--dataset=digits"]])
def test_a_data_set_behind_the_dashes_takes_the_place_of_the_tables(tmp_path, flags):
    jobs = Plan(str(tmp_path), "cifar100", flags).jobs(PAIR, [Variant("kd")], 1)
    assert {job.config.dataset for job in jobs} == {"digits"}
    assert not any("cifar100" in job.command for job in jobs)


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--trial 5", "--trials K"),
        ("--trials=2", "--trials K"),
        ("--seed 7", "--trials K"),
        ("--sweep b=1,2", "--variants"),
        ("--resume", "leave it out"),
        ("--save_dir=elsewhere", "--save_dir"),
        ("--model resnet8", "--pairs"),
        ("--model_s resnet8", "--pairs"),
        ("--model_t=resnet8", "--pairs"),
        ("--path_t t.pth", "--pairs"),
        ("--distill kd", "--methods"),
    ],
)
def test_flags_that_the_plan_sets_are_refused(tmp_path, flag, instead):
    flags = ["--pairs", "resnet20:resnet8", "--dry_run", "--save_dir", str(tmp_path)]
    places = {
        "behind --": ["--methods", "kd", "--", *flag.split()],
        "in --teacher_flags": ["--methods", "kd", f"--teacher_flags={flag}"],
        "in --student_flags": ["--methods", "kd", f"--student_flags={flag}"],
        "in --variants": ["--variants", f"kd {flag}"],
    }
    for place, given in places.items():
        message = message_of(reproduce.main, [*flags, *given])
        assert message.startswith(f"{flag.replace('=', ' ').split()[0]}: does not belong {place}, the plan sets it; ")
        assert instead in message.partition("sets it")[2]


@pytest.mark.parametrize("flags", ["-c 0", "-b1 1", "-s 1", "-s 2", "-s 4", "-s 16", "--ft plain"])
def test_the_ablations_that_nobody_published_are_rows(tmp_path, flags):
    jobs = Plan(str(tmp_path), None, SHORT).jobs(PAIR, read_variants(f"norm {flags}"), 1)
    job = jobs[-1]
    assert job.title.endswith(f"norm {flags}, seed 1")
    plain = foresee({"distill": "norm", "model_s": "resnet8"}, TEACHER)
    changed = {name for name, value in vars(job.config).items() if getattr(plain, name, None) != value}
    known = {"-c": "ceta", "-b1": "beta1", "-s": "co_sponge", "--ft": "ft"}[flags.split()[0]]
    assert known in changed
