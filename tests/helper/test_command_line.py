"""The command line: what is given, what it becomes, what is refused; without a file or a socket."""

import builtins
import io
import os
import re
import socket

import pytest
import torch

from distiller_zoo import DISTILLERS
from errors import UserError
from helper.command_line import parse, resolve, share_order, student_parser, teacher_parser
from helper.optim import stretch
from helper.recipes import recipe_of
from helper.settings import all_settings
from scripts.report import make_parser


def parse_teacher(*argv):
    return resolve(*parse(teacher_parser(), argv).runs)


#: What the file of a small teacher says.
OF_TEACHER = {"path_t": "t.pth", "model_t": "resnet14", "teacher_digest": "0" * 64, "dataset": "digits"}


def parse_student(*argv):
    [run] = parse(student_parser(), ["--path_t", "t.pth", *argv]).runs
    return resolve(run, of_teacher=OF_TEACHER)


def test_a_flag_beats_the_recipe_and_the_origin_is_told():
    config = parse_teacher("--model", "resnet8", "--learning_rate", "0.02")
    assert config.learning_rate == 0.02 and config.origins["learning_rate"] == "command line"
    assert config.weight_decay == 5e-4 and config.origins["weight_decay"] == "data set digits"
    assert parse_teacher("--model", "ShuffleV1").learning_rate == 0.01
    assert parse_teacher("--model", "ShuffleV1", "--learning_rate", "0.05").learning_rate == 0.05


def test_the_official_command_line_is_understood():
    config = parse_student(
        *[
            "--distill",
            "NORM",
            "--model_s",
            "resnet8",
            "--model_t",
            "resnet14",
            "-r",
            "0.1",
            "-a",
            "0",
            "-b",
            "1.0",
            "-c",
            "2.5",
            "-s",
            "8",
            "--trial",
            "2",
        ]
    )
    assert (config.distill, config.gamma, config.alpha, config.beta) == ("norm", 0.1, 0.0, 1.0)
    assert (config.ceta, config.co_sponge, config.trial, config.seed) == (2.5, 8, "2", 2)
    assert config.dataset == "digits" and config.origins["dataset"] == "teacher's record"
    long = parse_student(
        *["--model_s", "resnet8", "--gamma", "0.1", "--co_sponge", "4", "-b1", "0.5", "--kd_T", "2", "-a", "1"]
    )
    assert (long.gamma, long.co_sponge, long.beta1, long.kd_T, long.distill) == (0.1, 4, 0.5, 2.0, "norm")


def test_a_folder_is_split_as_for_the_teacher_unless_it_is_another_one():
    teacher = {"path_t": "t.pth", "model_t": "resnet20", "dataset": "folder", "data": "/photographs", "split": 0.2}

    def split(**given):
        return resolve({"distill": "kd", "model_s": "resnet8"} | given, of_teacher=teacher)["split"]

    assert resolve({"distill": "kd", "model_s": "resnet8"}, of_teacher=teacher).origins["split"] == "teacher's record"
    assert (split(), split(data="/photographs"), split(split=0.3)) == (0.2, 0.2, 0.3)
    assert (split(data="/elsewhere"), split(dataset="digits"), split(labels="none", data="/photographs")) == (0, 0, 0)


def test_the_crd_weight_is_a_flag_of_its_own():
    config = parse_student(
        *["--distill", "norm_crd", "--model_s", "resnet8", "-c", "2.5", "--crd_weight", "0.3", "--nce_k", "64"]
    )
    assert (config.ceta, config.crd_weight, config.nce_k) == (2.5, 0.3, 64)


def test_standardised_logits_have_a_recipe_of_their_own():
    raw = parse_student("--distill", "kd", "--model_s", "resnet8")
    assert (raw.logit_standardization, raw.gamma, raw.alpha, raw.kd_T) == (False, 0.1, 0.9, 4.0)
    config = parse_student("--distill", "kd", "--model_s", "resnet8", "--logit_standardization")
    assert (config.logit_standardization, config.gamma, config.alpha, config.kd_T) == (True, 0.1, 9.0, 2.0)
    assert parse_student("--distill", "kd", "--model_s", "resnet8", "--logit_standardization", "-a", "3").alpha == 3.0
    dkd = [recipe_of("cifar100", "vgg13", "vgg8", "dkd", {"logit_standardization": on}) for on in (False, True)]
    assert [[row[name][0] for name in ("dkd_alpha", "dkd_beta")] for row in dkd] == [[1.0, 6.0], [15.0, 30.0]]
    srrl = ("--distill", "srrl", "--model_s", "resnet8")
    assert [parse_student(*srrl, *flags).alpha for flags in ((), ("--srrl_form", "map"))] == [1.0, 0.0]


def test_numbers_of_epochs_stretch_with_the_run_unless_they_are_given():
    argv = ("--distill", "factor", "--model_s", "resnet8")
    assert parse_student(*argv, "--epochs", "240").init_epochs == 30
    config = parse_student(*argv, "--epochs", "24")
    assert config.init_epochs == 3 and config.origins["init_epochs"] == "default, scaled"
    assert parse_student(*argv, "--epochs", "2").init_epochs == 1
    assert parse_student(*argv, "--epochs", "24", "--init_epochs", "30").init_epochs == 30


@pytest.mark.parametrize("distill", ["dkd", "reviewkd"])
def test_on_imagenet_nothing_warms_up(distill):
    teacher = {"path_t": "t.pth", "model_t": "resnet34", "dataset": "imagenet", "image_size": 224}
    config = resolve({"distill": distill, "model_s": "resnet18"}, of_teacher=teacher)
    assert (config.epochs, config.warmup_epochs) == (100, 0)


def test_milestones_stretch_with_the_epochs_unless_they_are_given():
    assert stretch((150, 180, 210), 240, 24) == (15, 18, 21)
    assert stretch((30, 60, 90), 100, 1) == (1, 1, 1), "the only epoch is at the full rate"
    assert parse_teacher("--model", "resnet8", "--epochs", "32").lr_decay_epochs == (20, 24, 28)
    given = parse_teacher("--model", "resnet8", "--epochs", "32", "--lr_decay_epochs", "5,6")
    assert given.lr_decay_epochs == (5, 6)


def test_the_seed_is_the_trial_unless_it_is_given():
    assert parse_teacher("--model", "resnet8", "--trial", "7").seed == 7
    assert parse_teacher("--model", "resnet8", "--trial", "night").seed == 0
    assert parse_teacher("--model", "resnet8", "--trial", "7", "--seed", "3").seed == 3


@pytest.mark.parametrize(("seed", "seeds"), [((), [3, 4]), (("--seed", "7"), [7, 8])])
def test_trials_of_a_sweep_count_from_the_named_one(seed, seeds):
    argv = ["--model", "resnet8", "--trial", "3", "--trials", "2", "--sweep", "epochs=5,6", *seed]
    runs = parse(teacher_parser(), argv).runs
    assert [run["trial"] for run in runs] == ["3_epochs5", "4_epochs5", "3_epochs6", "4_epochs6"]
    assert [run["seed"] for run in runs] == seeds * 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model_s resnet8 --nce_k 5", "--nce_k: not used by --distill norm"),
        ("--distill kd --model_s resnet8 -s 8", "-s/--co_sponge: not used by --distill kd"),
        ("--distill kd --model_s resnet8 -b 2", "-b/--beta: not used by --distill kd"),
        ("--distill ft --model_s resnet8", "--path_t: --distill ft reads no teacher"),
        ("--distill norm", "--model_s is missing"),
        (
            "--model_s resnet8 --distill crd --mixup 0.2",
            "--mixup: --distill crd cannot learn from mixed images: its",
        ),
        ("--model_s resnet8 --distill sskd --cutmix 1", "--cutmix: --distill sskd cannot learn from mixed images"),
        ("--model_s resnet8 --mixup 0.001", "--mixup: must be 0, or a number from 0.01 to 100"),
        ("--model_s resnet8 --label_smoothing 0.1 -r 0", "--label_smoothing: has no effect with -r/--gamma 0"),
        (
            "--model_s resnet8 --class_weights balanced --balanced_sampling",
            "--balanced_sampling: --class_weights",
        ),
        ("--model_s resnet8 --split 0.2", "--split: has no effect with --dataset digits; leave it out, or take"),
        ("--model_s resnet8 --background 0,0,0", "--background: has no effect with --dataset digits"),
        ("--model_s resnet8 --hint_depth 2", "unrecognized arguments: --hint_depth 2"),
        ("--model_s resnet8 -s 0", "-s/--co_sponge: must be a whole number from 1 to 2147483647, not 0"),
        ("--model_s resnet8 -r -1", "must be a number from 0 to 1e+30"),
        ("--model_s resnet8 -r nan", "must be a number from 0 to 1e+30"),
        ("--model_s resnet8 --weight_decay 1e45", "must be a number from 0 to 1e+30"),
        ("--model_s resnet8 --kd_T 0", "must be a number above 0"),
        ("--model_s resnet8 -r much", "-r/--gamma: must be a number from 0 to 1e+30, not much"),
        ("--model_s resnet8 --lr_decay_epochs 1,x", "must be epochs like"),
        ("--modle resnet8", "did you mean --model_s?"),
        ("--lr 0.1 --wandb --amp --lr=1", "--lr 0.1 --wandb --amp --lr=1; did you mean --learning_rate, --precision?"),
        ("--model_s resnet8 --trial 1-2", "--trial: 1-2 ends like the folder of a second run"),
        ("--model_s resnet8 --trial ../1", "--trial: must be a name of letters"),
        ("--model_s resnet8 --seed 99999999999999999999", "--seed: must be a whole number"),
        ("--model_s resnet8 --dataset folder --image_size 4", "--image_size: must be 8 to 10,000 pixels"),
        ("--model_s resnet8 --dataset mnist", "--dataset: invalid choice: 'mnist'"),
        ("--model_s resnet9000", "--model_s: unknown model 'resnet9000'"),
        ("--distill nrom --model_s resnet8", "--distill: unknown method 'nrom'; did you mean norm? choose from norm"),
    ],
)
def test_what_is_wrong_is_named(argv, message):
    with pytest.raises(UserError) as caught:
        parse_student(*argv.split())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("make", "suggested"),
    [
        (
            student_parser,
            "--schedule:lr_decay --lr_schedule:lr_decay --T:kd_T --wd:weight_decay --bs:batch_size --gpus:device "
            "--workers:num_workers -j:num_workers --model:model_s --student:model_s --teacher:path_t --opt:optimizer "
            "--temperature:kd_T --data-dir:data --out:save_dir --min-lr:min_learning_rate --amp:precision "
            "--img-size:image_size --pretrained:init --lr:learning_rate --drop:drop_rate --epoch:epochs",
        ),
        (teacher_parser, "--arch:model --student:model --teacher: --T: --warmup_epochs:lr_warmup_epochs --dist_url:"),
        (make_parser, "--figure:figures --out:"),  # of scripts/report.py, which has no flags of runs
    ],
)
def test_the_flag_that_is_meant_is_suggested(make, suggested):
    """By its name in RepDistiller and timm too; where none is close, nothing."""
    parser = make()
    for word, _, meant in (pair.partition(":") for pair in suggested.split()):
        with pytest.raises(UserError) as caught:
            parser.parse_args([word, "1"])
        hint = f"did you mean --{meant}?" if meant else "(--help lists the flags)"
        assert hint in str(caught.value), word


def test_what_others_call_a_flag_is_no_other_flag():
    """Of each setting, and once: a name that is a flag itself would never be suggested."""
    names = [name for setting in all_settings().values() for name in setting.called]
    flags = {name.lstrip("-").lower() for setting in all_settings().values() for name in setting.names}
    assert len(names) == len(set(names)) and not flags & set(names)
    assert all(re.fullmatch("[a-z0-9_]+", name) for name in names)


def test_a_weight_of_zero_is_accepted_by_methods_without_that_term():
    assert parse_student(*["--distill", "kd", "--model_s", "resnet8", "-r", "0.1", "-a", "0.9", "-b", "0"]).alpha == 0.9


def test_help_has_one_line_for_every_method(capsys):
    with pytest.raises(SystemExit):
        student_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    for name, method in DISTILLERS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {name} ")]
        assert method.summary in line and method.source in line


# Without a file or a socket.


@pytest.fixture
def sealed(monkeypatch):
    """Within the test no file is opened, no checkpoint loaded, no connection made."""

    def forbidden(*arguments, **named):
        raise AssertionError(f"opened: {arguments[:1]}")

    monkeypatch.setattr(builtins, "open", forbidden)
    monkeypatch.setattr(io, "open", forbidden)
    monkeypatch.setattr(os, "open", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(socket, "socket", forbidden)


@pytest.mark.parametrize(
    "argv",
    [
        ["--path_t", "torchvision:resnet34", "--model_s", "resnet18", "--dataset", "imagenet", "--data", "nowhere"],
        ["--path_t", "none.pth", "--init", "timm:resnet18", "--model_s", "resnet8"],
        ["--path_t", "none.pth", "--model_s", "resnet8", "--trials", "2", "--sweep", "distill=kd,hint", "a=0.5,1"],
        ["--distill", "ce", "--model_s", "resnet8", "--fast", "auto", "--epochs", "3"],
    ],
)
def test_a_command_line_is_resolved_without_a_file_or_a_socket(argv, sealed):
    given = parse(student_parser(), argv)
    configs = share_order([resolve(run, {}, OF_TEACHER if run.get("path_t") else {}) for run in given.runs], given)
    assert len(configs) == (8 if "--sweep" in argv else 1)
    assert len({config.name for config in configs}) == len(configs)


def test_a_resumed_run_is_resolved_without_a_file(sealed):
    [run] = parse(student_parser(), ["--epochs", "7", "--resume", "folder"]).runs
    stored = {"distill": "kd", "model_s": "resnet8", "epochs": 3, "learning_rate": 0.2, "path_t": "t.pth"}
    config = resolve(run, stored, OF_TEACHER, folder="folder")
    assert (config.epochs, config.learning_rate, config.folder) == (7, 0.2, "folder")
    assert config.origins["learning_rate"] == "resumed run"


@pytest.mark.parametrize(
    ("flags", "way_out"),
    [
        (["--nesterov", "--optimizer", "adamw"], "take --optimizer sgd"),
        (["--momentum", "0.8", "--optimizer", "adamw"], "take --optimizer sgd"),
        (["--lr_decay_epochs", "3,5", "--lr_decay", "cos"], "take --lr_decay step"),
        (["--lr_decay_rate", "0.2", "--lr_decay", "cos"], "take --lr_decay step"),
    ],
)
def test_a_flag_without_effect_is_refused(flags, way_out):
    given = parse(teacher_parser(), ["--model", "resnet8", *flags])
    with pytest.raises(UserError, match=f"^{flags[0]}: has no effect .*{way_out}"):
        resolve(given.runs[0])
    resolve(parse(teacher_parser(), ["--model", "resnet8", "--no-nesterov", "--optimizer", "adamw"]).runs[0])


def test_a_device_that_is_not_here_is_refused_in_a_short_line():
    with pytest.raises(UserError) as caught:
        parse_student("--model_s", "resnet8", "--fast", "auto", "--device", "mps")
    assert str(caught.value).startswith("--device: mps cannot be used: ") and len(str(caught.value)) < 200
