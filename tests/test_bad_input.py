"""Mistakes at the terminal: one line that names the flag or file, exit code 2, no traceback, nothing left behind."""

import runpy
import sys

import pytest
import torch

from models import build_model
from tests.conftest import ROOT


@pytest.fixture
def place(tmp_path, teacher_run):
    """A folder with every kind of wrong file in it; {place} and {teacher} in a command line name them."""
    (tmp_path / "empty").mkdir()
    torch.save({"model": build_model("resnet20", 10).state_dict()}, tmp_path / "resnet20.pth")
    torch.save({"first.weight": torch.zeros(3)}, tmp_path / "odd.pth")
    whole = (teacher_run / "last.pth").read_bytes()
    (tmp_path / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.pth").write_text("<html>404</html>")
    for name in ("cat", "dog"):
        (train := tmp_path / "broken" / "train" / name).mkdir(parents=True)
        (train / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "no_split" / "train" / "cat").mkdir(parents=True)
    val = tmp_path / "broken" / "val" / "cat"
    val.mkdir(parents=True)
    (val / "1.png").write_bytes(b"")
    return tmp_path


STUDENT = "train_cifar_student.py --model_s resnet8 --save_dir {place}/save "
TEACHER = "train_teacher.py --save_dir {place}/save "
CASES = {
    "unknown model": (TEACHER + "--model resnet", "--model: unknown model 'resnet'"),
    "no model": (TEACHER, "--model is missing"),
    "missing checkpoint": (STUDENT + "--path_t {place}/none.pth", "none.pth does not exist"),
    "a teacher to download": (
        STUDENT + "--path_t {place}/resnet32x4_vanilla/ckpt_epoch_240.pth",
        "scripts/fetch.py cifar resnet32x4 downloads",
    ),
    "path_t is a folder": (STUDENT + "--path_t {place}/empty", "--path_t: {place}/empty is a folder"),
    "truncated checkpoint": (STUDENT + "--path_t {place}/truncated.pth", "truncated.pth cannot be read"),
    "a web page": (STUDENT + "--path_t {place}/page.pth", "page.pth cannot be read"),
    "another architecture": (STUDENT + "--path_t {place}/resnet20.pth --model_t vgg8", "the weights fit resnet20"),
    "nameless teacher": (STUDENT + "--path_t {place}/odd.pth", "--model_t"),
    "no teacher": (STUDENT, "--path_t"),
    "N below 1": (STUDENT + "--path_t {teacher} -s 0", "-s/--co_sponge"),
    "larger student map": (
        "train_cifar_student.py --model_s resnet8 --save_dir {place}/save --path_t {place}/mobile.pth "
        "--model_t MobileNetV2 --larger_student refuse",
        "larger than the teacher's",
    ),
    "other initial weights": (TEACHER + "--model resnet20 --init {teacher}", "--init: {teacher} holds another"),
    "initial weights of a web page": (TEACHER + "--model resnet8 --init {place}/page.pth", "--init: {place}/page.pth"),
    "unused flag": (STUDENT + "--path_t {teacher} --distill kd -c 2.5", "-c/--ceta: not used"),
    "unknown flag": (STUDENT + "--path_t {teacher} --hint 2", "unrecognized arguments: --hint 2"),
    "empty data folder": (TEACHER + "--model resnet8 --dataset folder --data {place}/empty", "{place}/empty/train"),
    "lacking split": (TEACHER + "--model resnet8 --dataset folder --data {place}/no_split", "no_split/train"),
    "unreadable image": (TEACHER + "--model resnet8 --dataset folder --data {place}/broken", "1.png cannot be read"),
    "no data folder": (TEACHER + "--model resnet8 --dataset folder", "--data"),
    "resume nothing": (TEACHER + "--resume {place}/none", "--resume: {place}/none is not a run folder"),
    "resume a file": (TEACHER + "--resume {teacher}", "last.pth is not a run folder; name the folder, "),
    "resume without config": (TEACHER + "--resume {place}/empty", "config.json cannot be read"),
    "save_dir is a file, said before the data are read": (
        "train_teacher.py --model resnet8 --dataset folder --data {place}/broken --save_dir {place}/odd.pth",
        "--save_dir: {place}/odd.pth is a file; name a folder",
    ),
    "export of a folder": ("scripts/export_student.py {place}/empty", "is a folder"),
    "export of a web page": ("scripts/export_student.py {place}/page.pth", "page.pth cannot be read"),
    "export without CKPT": ("scripts/export_student.py", "CKPT"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_exit_code_2(case, place, teacher_run, monkeypatch, capsys):
    command, expected = CASES[case]
    if "mobile.pth" in command:
        torch.save({"model": build_model("MobileNetV2", 10).state_dict()}, place / "mobile.pth")
    names = {"place": place, "teacher": teacher_run / "last.pth"}
    before = sorted(place.rglob("*"))
    argv = [part.format(**names) for part in command.split()]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(argv[0], run_name="__main__")
    errors = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2, errors
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    assert expected.format(**names) in errors[0]
    left = [path for path in sorted(place.rglob("*")) if path not in before and path != place / "save"]
    assert not left, f"left behind: {left}"
