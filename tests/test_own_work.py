"""The page for newcomers works as it is printed: its files are saved, its commands are run in their order."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import distiller_zoo
import models
import train_cifar_student
import train_teacher
from helper.tables import jobs
from models import published
from scripts import export_student
from tests import pages
from tests.conftest import ROOT, message_of
from tests.pages import blocks, commands, module_of
from tests.run_folders import metrics

PAGE = (ROOT / "docs" / "own_work.md").read_text()
#: What the commands run, each at least once.
SCRIPTS = (*pages.SCRIPTS, "scripts/predict.py")


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """The folder of the page's first section, in the current directory: two classes, images of unequal sizes."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", 8), ("val", 3)):
        for name, colour in (("cat", 0), ("dog", 2)):
            (tmp_path / "photographs" / split / name).mkdir(parents=True)
            for number in range(n):
                pixels = torch.randint(0, 120, (30 + number, 40, 3), generator=generator, dtype=torch.uint8)
                pixels[..., colour] += 120
                Image.fromarray(pixels.numpy()).save(tmp_path / "photographs" / split / name / f"{number}.jpg")
    return tmp_path


@pytest.fixture
def _downloads(tmp_path, monkeypatch):
    """Random weights in place of torchvision's."""

    def make(file: published.RemoteFile) -> Path:
        path = tmp_path / file.name
        torch.save(torchvision.models.get_model(file.name.partition("-")[0]).state_dict(), path)
        return path

    monkeypatch.setattr(published, "provide", make)


def shortened(script: str, flags: list[str]) -> list[str]:
    """Fewer epochs, and batches that the images fill; names with a * are spelled out, as a shell would."""
    flags = [str(path) for flag in flags for path in (sorted(Path().glob(flag)) if "*" in flag else [flag])]
    flags = [{"60": "1", "30": "1", "3": "2"}.get(flag, flag) for flag in flags]
    if script.startswith("train_") or "--" in flags:
        flags += ["--batch_size", "8"]
    return flags


def in_process(monkeypatch) -> None:
    """Have the jobs of plans run in this process."""

    def start(job, place, log):
        script, *flags = job.command
        module_of(script).main(flags)
        return type("Process", (), {"wait": lambda self: 0})()

    monkeypatch.setattr(jobs, "_start", start)


@pytest.fixture
def _methods_of_the_page(monkeypatch):
    """Save nothing: the page's files are executed, and their methods found as the folder's files are."""
    for code in [block for block in blocks(PAGE, "python") if "FeatureDistiller" in block]:
        namespace = {"__name__": "own"}
        exec(compile(code, "own.py", "exec"), namespace)
        [method] = [one for one in namespace.values() if getattr(one, "source", "") == "an example"]
        monkeypatch.setitem(distiller_zoo.DISTILLERS, method.name, method)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")  # scipy's, where all seeds have one accuracy
def test_the_commands_run_in_their_order(photographs, _downloads, _methods_of_the_page, monkeypatch, capsys):
    in_process(monkeypatch)
    ran = []
    for command in commands(PAGE, "bash"):
        program, script, *flags = shlex.split(command)
        assert program == "python"
        module_of(script).main(shortened(script, flags))
        ran.append(script)
    assert set(ran) == set(SCRIPTS)
    printed = capsys.readouterr().out
    assert "| folder photographs | resnet20 | resnet8 | mean_map -b 10 |" in printed
    assert "| folder photographs | resnet20 | resnet8 | regressed_map -b 10 --map_power 1 |" in printed
    assert "| folder photographs | - | resnet18 | ce --init torchvision:resnet18 |" in printed
    assert "which is new: 1000 classes there, 2 here" in printed
    assert all(Path(name).exists() for name in ("report.html", "student.onnx"))
    assert list(Path("figures").glob("learning_curves*.svg"))
    predictions = [line for line in printed.splitlines() if line.startswith("photographs/val/")]
    assert len(predictions) == 6 and all("cat" in line and "dog" in line for line in predictions)


def test_a_method_with_a_flag_and_a_stage_of_its_own(few_images, distil, _methods_of_the_page, capsys):
    with pytest.raises(SystemExit):
        train_cifar_student.main(["--help"])
    assert "power p of the difference between the maps (2)" in " ".join(capsys.readouterr().out.split())
    run = distil("--map_power", "1", "--epochs", "2", distill="regressed_map")
    first, *rest = metrics(run)
    assert first["stage"] == "regressor" and first["loss_regressor"] > 0
    assert len(rest) == 2 and all(epoch["loss_regressed_map"] > 0 for epoch in rest)
    assert json.loads((run / "config.json").read_text())["map_power"] == 1.0
    assert "map_power" in message_of(train_cifar_student.main, ["--resume", str(run), "--map_power", "2"])


def test_the_network_of_the_page_teaches_and_learns(few_images, teacher_run, tmp_path, monkeypatch, capsys):
    [code] = [block for block in blocks(PAGE, "python") if "Backbone" in block]
    namespace = {"__name__": "tiny"}
    exec(compile(code, "tiny.py", "exec"), namespace)
    monkeypatch.setitem(models.model_dict, "tiny", namespace["Tiny"])
    short = ["--epochs", "1", "--save_dir", str(tmp_path)]
    train_teacher.main(["--model", "tiny", *short])
    teacher = tmp_path / "digits_ce_tiny_trial1" / "last.pth"
    for distill in ("norm", "attention", "fsp"):  # the last trains its layers below the head alone, first
        train_cifar_student.main(["--distill", distill, "--path_t", str(teacher), "--model_s", "tiny", *short])
    before_relu = ["--distill", "abound", "--path_t", str(teacher), "--model_s", "tiny", *short]
    assert "maps before their last ReLU, which Tiny does not show" in message_of(train_cifar_student.main, before_relu)
    of_ours = ["--path_t", str(teacher_run / "last.pth"), "--model_s", "tiny", "--max_steps", "1"]
    train_cifar_student.main(["--distill", "norm", *of_ours, *short])
    export_student.main([str(tmp_path / "digits_norm_tiny_tiny_trial1" / "last.pth")])
    assert "same class on 73 of 73" in capsys.readouterr().out
