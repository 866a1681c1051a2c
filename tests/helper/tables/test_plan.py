"""The jobs of a table: which there are, what they are called, in which state they are."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import init

from errors import UserError
from helper.command_line import resolve
from helper.recipes import CIFAR_PAIRS
from helper.tables.plan import TABLES, Job, Plan, ShapesAlone, Shelf, Variant, all_variants, read_variants, trial_name
from helper.tables.rows import read_rows
from models import build_model
from tests.conftest import ROOT
from tests.run_folders import make_run, pretend

PAIR = (("resnet20", "resnet8"),)
CHAIN = (("resnet20", "resnet14"), ("resnet14", "resnet8"))
OF_TEACHER = {"path_t": "t.pth", "model_t": "resnet20", "teacher_digest": "0" * 64}
#: Runs that are over after two steps.
SHORT = ("--max_steps", "2", "--batch_size", "16")


def titles(jobs) -> list[str]:
    return [job.title for job in jobs]


def given(job: Job) -> dict[str, str]:
    """Flag -> value of a job's command."""
    return dict(itertools.pairwise(job.command))


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
    assert norm.folder.name == "digits_norm_resnet20_resnet8_trial1_a_1" and [each.key for each in norm.teachers] == [
        jobs[0].key
    ]
    assert norm.command[0] == "train_cifar_student.py" and given(norm)["--path_t"] == str(jobs[0].folder / "last.pth")
    assert jobs[-1].teachers == [], "the transform alone reads no teacher"


def test_flags_of_teachers_and_of_students_reach_them_alone(tmp_path):
    jobs = Plan(str(tmp_path), None, SHORT, ("--epochs", "7"), ("--allow_teacher_gap",)).jobs(PAIR, [Variant("kd")], 1)
    teacher, baseline, student = (job.config for job in jobs)
    assert (teacher.epochs, baseline.epochs, student.epochs) == (7, 16, 16)
    assert (teacher.allow_teacher_gap, baseline.allow_teacher_gap, student.allow_teacher_gap) == (False, False, True)
    assert all(config.max_steps == 2 for config in (teacher, baseline, student))


def test_a_rows_own_flags_win_over_those_of_every_run(tmp_path):
    plan = Plan(str(tmp_path), None, ("--learning_rate", "0.1"), (), ("--weight_decay", "0.1"))
    jobs = plan.jobs(PAIR, read_variants("kd --learning_rate 0.2 --weight_decay 0.2; ft --learning_rate 0.3; kd"), 1)
    trained = [(job.config.learning_rate, job.config.weight_decay) for job in jobs[2:]]
    assert trained == [(0.2, 0.2), (0.3, 5e-4), (0.1, 0.1)]


def test_labels_alone_with_flags_of_their_own_are_a_row(tmp_path):
    jobs = Plan(str(tmp_path)).jobs(PAIR, read_variants("ce; ce --label_smoothing 0.1"), 2)
    assert titles(jobs)[1:3] == [f"resnet8 with labels alone, seed {seed}" for seed in (1, 2)]
    assert titles(jobs)[3:] == [f"resnet8 with labels alone --label_smoothing 0.1, seed {seed}" for seed in (1, 2)]
    assert jobs[-1].config.label_smoothing == 0.1 and jobs[-1].command[0] == "train_teacher.py"


def test_a_teacher_with_flags_of_its_own_is_not_the_baseline_of_the_same_network(tmp_path):
    jobs = Plan(str(tmp_path), None, (), ("--epochs", "9")).jobs(CHAIN, [Variant("kd")], 1)
    [teacher, baseline] = [job for job in jobs if job.config.distill == "ce" and job.config.model_s == "resnet14"]
    assert (given(teacher)["--trial"], given(baseline)["--trial"]) == ("1_epochs_9", "1")
    assert given(teacher)["--seed"] == given(baseline)["--seed"] == "1"
    assert given(jobs[-1])["--path_t"] == str(tmp_path / "digits_ce_resnet14_trial1_epochs_9" / "last.pth")
    assert len(jobs) == 6


def test_flags_of_teachers_that_change_no_result_make_no_second_run(tmp_path):
    jobs = Plan(str(tmp_path), None, SHORT, ("--save_freq", "5")).jobs(CHAIN, [Variant("kd")], 1)
    [both] = [job for job in jobs if job.config.distill == "ce" and job.config.model_s == "resnet14"]
    assert (both.config.save_freq, both.config.trial) == (5, "1")
    assert len({job.folder for job in jobs}) == len(jobs) == 5


def test_rows_whose_flags_read_alike_are_two_rows(tmp_path):
    def listed(text: str) -> list[Job]:
        return [job for job in Plan(str(tmp_path)).jobs(PAIR, read_variants(text), 1) if job.config.distill == "ft"]

    both = listed("ft -s 11; ft --init timm:11; ft --init timm-11")
    assert [job.folder.name.partition("trial")[2] for job in both] == ["1_s_11", "1_init_timm_11", "1_init_timm_11"]
    assert len({job.key for job in both}) == 3
    pretend(both[1], "result.json")
    assert [job.state for job in listed("ft --init timm-11; ft --init timm:11")] == ["missing", "finished"]


def test_names_of_trials_stay_short():
    path = "/".join(["somewhere"] * 30)
    assert trial_name(1, ("--init", path)) != trial_name(1, ("--init", f"{path}2"))
    assert len(trial_name(1, ("--init", path))) < 100


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


def test_networks_of_shapes_have_the_shapes_of_networks():
    images = 1, 3, 32, 32
    with torch.device("meta"), ShapesAlone(), torch.no_grad():
        shown = [build_model(name, 10).outputs(torch.zeros(images), preact=True) for name in ("wrn_16_1", "ShuffleV1")]
    with torch.no_grad():
        real = [build_model(name, 10).outputs(torch.zeros(images), preact=True) for name in ("wrn_16_1", "ShuffleV1")]
    shapes, expected = (
        [[one.shape for one in (*each.maps, each.final, each.logits)] for each in both] for both in (shown, real)
    )
    assert shapes == expected


def test_what_keeps_a_shape_is_not_computed_for_shapes():
    weights = torch.ones(2, 2)
    with ShapesAlone():
        assert init.kaiming_uniform_(weights) is init.kaiming_normal_(tensor=weights) is weights
    assert weights.sum() == 4


@pytest.mark.slow
def test_a_plan_does_not_import_torchs_compiler(tmp_path):
    """Shapes that torch computes without values import it, which takes longer than the plan."""
    code = (
        "import sys; from helper.tables.plan import *; "
        f"Plan({str(tmp_path)!r}).jobs(TABLES['1'][-1:], all_variants(), 1); "
        "print({'sympy', 'torch._dynamo'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.slow
def test_a_method_is_refused_as_with_networks_of_its_own(tmp_path):
    pairs = (("wrn_40_2", "ShuffleV1"), ("resnet20", "resnet8"))
    together, alone = Plan(str(tmp_path)), []
    together.jobs(pairs, all_variants(), 1)
    for pair, variant in itertools.product(pairs, all_variants()):
        one = Plan(str(tmp_path))
        one.jobs((pair,), [variant], 1)
        alone += one.inapplicable
    assert together.inapplicable == alone and alone


def test_runs_are_found_by_their_settings_not_by_their_name(tmp_path):
    run = make_run(tmp_path, "kd", 1, [50.0, 60.0]).rename(tmp_path / "whatever")
    config = resolve({"distill": "kd", "model_s": "resnet8", "epochs": 2}, of_teacher=OF_TEACHER)
    assert Shelf(str(tmp_path)).find(config) == (run, "finished")
    other = config.replace("", kd_T=7.0)
    assert Shelf(str(tmp_path)).find(other) == (tmp_path / config.name, "missing")
    assert Shelf(str(tmp_path)).find(config.replace("", max_broken=20, num_workers=1))[1] == "finished"
    result = (run / "result.json").read_text()
    (run / "result.json").unlink()
    assert Shelf(str(tmp_path)).find(config)[1] == "missing", "without a checkpoint there is nothing to resume"
    (run / "last.pth").touch()
    assert Shelf(str(tmp_path)).find(config) == (run, "begun")
    (run / "result.json").write_text(result.replace("60.0", '"sixty"'))
    assert Shelf(str(tmp_path)).find(config)[1] == "begun", "a result that no report would show"


def test_a_finished_run_that_is_continued_is_not_finished(tmp_path):
    run = make_run(tmp_path, "kd", 1, [50.0, 60.0])
    two = resolve({"distill": "kd", "model_s": "resnet8", "epochs": 2}, of_teacher=OF_TEACHER)
    longer = resolve({"distill": "kd", "model_s": "resnet8", "epochs": 400}, of_teacher=OF_TEACHER)
    # As helper/run.py does when it resumes a finished run with --epochs 400.
    (run / "result.json").unlink()
    (run / "last.pth").touch()
    stored = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(stored | json.loads(json.dumps(longer.as_json()))))
    assert [Shelf(str(tmp_path)).find(config)[1] for config in (two, longer)] == ["missing", "begun"]
    with pytest.raises(UserError, match="not finished"):
        read_rows([run])


def test_runs_from_before_a_setting_had_its_default(tmp_path):
    run = make_run(tmp_path, "kd", 1, [50.0, 60.0])
    stored = json.loads((run / "config.json").read_text())
    for name in ("nesterov", "logit_standardization", "optimizer"):
        stored.pop(name)
    (run / "config.json").write_text(json.dumps(stored))
    config = resolve({"distill": "kd", "model_s": "resnet8", "epochs": 2}, of_teacher=OF_TEACHER)
    assert Shelf(str(tmp_path)).find(config)[1] == "finished"
    assert Shelf(str(tmp_path)).find(config.replace("", nesterov=True))[1] == "missing"


def test_a_published_teacher_is_taken_where_it_is(tmp_path, monkeypatch):
    def listed():
        return Plan(str(tmp_path), "cifar100").jobs((("resnet56", "resnet20"),), [Variant("kd")], 1)

    assert "resnet56 with labels alone, seed 1" in titles(listed())
    file = tmp_path / "models" / "resnet56_vanilla" / "ckpt_epoch_240.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(Shelf, "digest", lambda self, path, name, ema: f"digest of {name}")
    jobs = listed()
    assert "resnet56 with labels alone, seed 1" not in titles(jobs)
    assert jobs[-1].teachers == [] and str(file) in jobs[-1].command
    assert jobs[-1].config.teacher_digest == "digest of resnet56"


def test_imagenet_is_taught_by_torchvisions_networks(tmp_path):
    jobs = Plan(str(tmp_path), "imagenet", ("--data", "images")).jobs(TABLES["6"], [Variant("norm")], 1)
    assert titles(jobs) == ["resnet50_4 with labels alone, seed 1", "resnet50 -> resnet50_4: norm, seed 1"]
    script, *flags = jobs[1].command
    assert script == "train_imagenet_student.py" and "torchvision:resnet50" in flags
    assert jobs[1].config.batch_size == 256 and jobs[1].teachers == []
    pretend(jobs[1], "result.json", teacher_digest="1" * 64)
    again = Plan(str(tmp_path), "imagenet", ("--data", "images")).jobs(TABLES["6"], [Variant("norm")], 1)
    assert again[1].state == "finished", "a published network is its name"
    pretend(jobs[0], "result.json", data_digest="1" * 32)
    for data, state in (("images", "finished"), ("others", "missing")):
        job, _ = Plan(str(tmp_path), "imagenet", ("--data", data)).jobs(TABLES["6"], [Variant("norm")], 1)
        assert job.state == state, "a plan knows where its data are, not what"


def test_another_librarys_network_may_teach_imagenet(tmp_path):
    teacher = "torchvision:resnet50"
    *_, job = Plan(str(tmp_path), "imagenet", ("--data", "images")).jobs([(teacher, "resnet18")], [Variant("kd")], 1)
    assert given(job)["--path_t"] == given(job)["--model_t"] == job.config.model_t == teacher


@pytest.mark.parametrize("flags", [["--dataset", "digits"], ["--dataset=digits"]])
def test_a_data_set_behind_the_dashes_takes_the_place_of_the_tables(tmp_path, flags):
    jobs = Plan(str(tmp_path), "cifar100", flags).jobs(PAIR, [Variant("kd")], 1)
    assert {job.config.dataset for job in jobs} == {"digits"}
    assert not any("cifar100" in job.command for job in jobs)


@pytest.mark.parametrize("flags", ["-c 0", "-b1 1", "-s 1", "-s 2", "-s 4", "-s 16", "--ft plain"])
def test_the_ablations_that_nobody_published_are_rows(tmp_path, flags):
    job = Plan(str(tmp_path), None, SHORT).jobs(PAIR, read_variants(f"norm {flags}"), 1)[-1]
    assert job.title.endswith(f"norm {flags}, seed 1")
    plain = resolve({"distill": "norm", "model_s": "resnet8"}, of_teacher=OF_TEACHER)
    changed = {name for name, value in job.config.items() if plain[name] != value}
    known = {"-c": "ceta", "-b1": "beta1", "-s": "co_sponge", "--ft": "ft"}[flags.split()[0]]
    assert known in changed


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--trial 5", "--trials K"),
        ("--seed 7", "--trials K"),
        ("--sweep b=1,2", "--variants"),
        ("--resume", "leave it out"),
        ("--save_dir=elsewhere", "--save_dir"),
        ("--model_t=resnet8", "--pairs"),
        ("--path_t t.pth", "--pairs"),
        ("--distill kd", "--methods"),
    ],
)
def test_flags_that_the_plan_sets_are_refused(flag, instead):
    places = {
        "behind --": lambda words: Plan("x", None, words),
        "in --teacher_flags": lambda words: Plan("x", None, (), words),
        "in --student_flags": lambda words: Plan("x", None, (), (), words),
        "in --variants": lambda words: read_variants(f"kd {' '.join(words)}"),
    }
    for place, make in places.items():
        with pytest.raises(UserError) as caught:
            make(flag.split())
        message = str(caught.value)
        assert message.startswith(f"{flag.replace('=', ' ').split()[0]}: does not belong {place}, the plan sets it; ")
        assert instead in message.partition("sets it")[2]


def test_nothing_is_read_where_nothing_was_trained(tmp_path):
    assert Shelf(str(tmp_path / "none")).find(resolve({"distill": "ce", "model_s": "resnet8"})) == (
        Path(tmp_path / "none" / "digits_ce_resnet8_trial1"),
        "missing",
    )
