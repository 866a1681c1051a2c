"""ImageNet's recipes, the scripts that the NORM README promises, and what tries them without ImageNet."""

import json
import os
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import train_imagenet_student
from dataset import load_data
from distiller_zoo import DISTILLERS, Task
from distiller_zoo.norm import norm_weight
from helper.command_line import imagenet_parser, parse, student_parser
from helper.recipes import IMAGENET_PAIRS, recipe_of
from models import build_model
from scripts import enlarge_images
from scripts.benchmarks import input as benchmark_input
from tests.conftest import ROOT, message_of
from tests.dataset.image_folders import write_images


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "data")


@pytest.mark.parametrize(("pair", "gamma"), list(zip(IMAGENET_PAIRS, (1.0, 0.125, 1.0), strict=True)))
def test_the_recipe_of_a_published_pair(pair, gamma):
    recipe = {argument: value for argument, (value, _) in recipe_of("imagenet", *pair, "norm").items()}
    assert (recipe["gamma"], recipe["alpha"], recipe["beta"], recipe["co_sponge"]) == (gamma, 0.0, 1.0, 8)
    assert (recipe["epochs"], recipe["batch_size"], recipe["learning_rate"]) == (100, 256, 0.1)
    assert (recipe["weight_decay"], recipe["lr_decay"], recipe["image_size"]) == (1e-4, "cos", 224)
    weights = [norm_weight(recipe["beta1"], epoch, 100) for epoch in (0, 4, 5, 14, 15, 59, 60, 79, 80, 99)]
    assert weights == [0.1, 0.1, 0.5, 0.5, 0.9, 0.9, 0.5, 0.5, 0.1, 0.1]


def test_cifar_keeps_its_recipes():
    recipe = recipe_of("cifar100", "resnet32x4", "resnet8x4", "norm")
    assert "beta1" not in recipe and "image_size" not in recipe and recipe["weight_decay"][0] == 5e-4


@pytest.mark.parametrize("pair", IMAGENET_PAIRS)
def test_every_published_pair_trains_a_step(pair):
    """With images of 64 pixels and N = 1: what differs between the pairs is in the shapes."""
    teacher, student = build_model(pair[0], 10).eval(), build_model(pair[1], 10)
    method = DISTILLERS["norm"](student, teacher, Task(10, 64, 2, torch.arange(10)), co_sponge=1)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        seen = teacher.outputs(images)
    method.train()
    response = method.respond(images, seen)
    (response.norm_loss + response.logits.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in method.parameters())


def script_command(name: str, *flags: str, **variables: str) -> list[str]:
    """The command line that a script starts, with `echo` for Python."""
    environment = os.environ | {"PYTHON": "echo"} | variables
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *flags], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("train_imagenet_resnet34_resnet18.sh", ("torchvision:resnet34", "resnet18", 1.0)),
        ("train_imagenet_resnet50_mobilenet.sh", ("torchvision:resnet50", "MobileNet", 0.125)),
    ],
)
def test_the_imagenet_scripts_start_what_they_are_named_for(name, pair):
    script, *flags = script_command(name, "--max_steps", "2", DATA="somewhere")
    args = Namespace(**parse(imagenet_parser(), flags).runs[0])
    assert script == "train_imagenet_student.py" and (args.path_t, args.model_s, args.gamma) == pair
    assert (args.alpha, args.beta, args.co_sponge, args.lr_decay) == (0.0, 1.0, 8, "cos")
    assert (Path(args.data).name, args.max_steps, args.dataset) == ("somewhere", 2, "imagenet")
    other = script_command(name, DATA="somewhere", PATH_T="mine.pth")
    assert other[other.index("--path_t") + 1] == "mine.pth"
    without = subprocess.run(["bash", str(ROOT / "scripts" / name)], capture_output=True, text=True)
    assert without.returncode != 0 and "DATA=PATH" in without.stderr


def test_the_cifar_script_fetches_the_teacher_and_starts_the_published_command():
    script, *flags = script_command("train_cifar_student_norm.sh", "--trial", "2")
    args = student_parser().parse_args(flags)
    assert script == "train_cifar_student.py" and args.trial == "2"
    assert args.path_t == os.path.abspath("save/models/resnet32x4_vanilla/ckpt_epoch_240.pth")
    assert (args.gamma, args.alpha, args.beta, args.co_sponge) == (0.1, 0.0, 1.0, 8)
    other = script_command("train_cifar_student_norm.sh", TEACHER="vgg13", STUDENT="vgg8", PATH_T="mine.pth")
    assert "-r" not in other and other[other.index("--path_t") + 1] == "mine.pth"


def test_the_fetching_scripts_pass_their_names_on():
    assert script_command("fetch_pretrained_teachers.sh", "vgg13") == ["scripts/fetch.py", "cifar", "vgg13"]
    assert script_command("fetch_pretrained_imagenet_teacher.sh") == ["scripts/fetch.py", "imagenet"]


def test_offline_a_named_teacher_says_which_file_is_missing(monkeypatch, tmp_path, folder):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("NORM_MIRROR", str(tmp_path / "no mirror"))
    flags = ["--data", str(folder), "--path_t", "torchvision:resnet34", "--model_s", "resnet18"]
    message = message_of(train_imagenet_student.main, flags)
    assert str(tmp_path / "hub/checkpoints/resnet34-b627a593.pth") in message and "missing" in message


def test_small_photographs_become_a_folder_like_imagenets(folder, tmp_path):
    target = enlarge_images.main([str(folder), str(tmp_path / "large"), "--per_class", "4", "--size", "48"])
    counts = {split: len(list((target / split).glob("*/*.JPEG"))) for split in ("train", "val")}
    assert counts == {"train": 8, "val": 2}
    message = message_of(enlarge_images.main, [str(tmp_path), str(tmp_path / "large")])
    assert "SOURCE" in message
    next((folder / "train").glob("*/*.JPEG")).write_bytes(b"no image")
    assert "cannot be read" in message_of(enlarge_images.main, [str(folder), str(tmp_path / "large")])


def test_input_is_timed_beside_decoding(folder, tmp_path, capsys):
    flags = ["--workers", "0,2", "--image_size", "32", "--batch_size", "4", "--images", "9", "--rounds", "2"]
    threads = torch.get_num_threads()
    records = benchmark_input.main([str(folder), *flags, "--device", "cpu", "--json", str(tmp_path / "input.json")])
    assert torch.get_num_threads() == threads
    cases = [(record["kind"], record["workers"], record["images"]) for record in records]
    assert cases == [("folder", 0, 9), ("folder", 2, 9), ("shards", 0, 9), ("shards", 2, 9)]
    rates = ("decode_images_per_s", "side_by_side_images_per_s", "bytes_images_per_s", "images_per_s")
    assert all(record[rate] > 0 for record in records for rate in rates)
    assert json.loads((tmp_path / "input.json").read_text()) == records
    assert "| shards | 2 |" in capsys.readouterr().out


def test_imagenets_own_archives_beside_the_folders_are_no_shards(folder):
    alone = load_data("imagenet", str(folder), 64)
    for split in ("train", "val"):
        (folder / f"ILSVRC2012_img_{split}.tar").write_bytes(b"archives of archives")
    beside = load_data("imagenet", str(folder), 64)
    assert beside.classes == alone.classes and torch.equal(beside.train.targets, alone.train.targets)


@pytest.mark.parametrize("method", ["kd", "crd", "dist", "reviewkd", "ce"])
def test_only_norms_rate_falls_as_a_cosine(method):
    pair = ("resnet34", "resnet18")
    assert recipe_of("imagenet", *pair, method)["lr_decay"][0] == "step"
    assert recipe_of("imagenet", *pair, "norm_crd")["lr_decay"][0] == "cos"
