"""Images without labels: what learns from them, how that is judged, and what becomes of the student."""

import json

import numpy
import pytest
import torch
from PIL import Image

import train_cifar_student
import train_teacher
from distiller_zoo import DISTILLERS, Progress
from distiller_zoo.kd import FeatureDistiller
from errors import UserError
from helper import loops
from helper import run as run_module
from helper.command_line import parse, resolve, student_parser
from helper.fast import Fast
from helper.networks import Network, read_teacher
from helper.recipes import RECIPES
from helper.tables.rows import read_rows
from helper.teacher import Teacher
from models import build_model
from scripts import export_student
from tests.conftest import message_of, pair_networks
from tests.distiller_zoo.helpers import PROGRESS, TASK, FrozenTeacher, batch_of
from tests.run_folders import load, metrics, same_state
from tests.stages import few_images


def draw(path, seed: int, dark: bool = False) -> None:
    pixels = numpy.random.default_rng(seed).integers(0, 90 if dark else 256, (12, 12, 3), dtype=numpy.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images at several depths, and another folder with 2 classes."""
    root = tmp_path_factory.mktemp("images")
    for number in range(24):
        draw(root / "all" / "/".join("ab"[: number % 3]) / f"{number}.png", number)
    for number in range(20):
        draw(root / "probe" / ("dark" if number % 2 else "light") / f"{number}.png", 100 + number, dark=number % 2)
    return root


@pytest.fixture
def learn(images, teacher_run, save_dir):
    """Call `train_cifar_student.py` without labels; returns the run folder, the newest."""

    def call(*flags: str, distill: str):
        known = set(save_dir.iterdir()) if save_dir.exists() else set()
        argv = ["--distill", distill, "--path_t", str(teacher_run / "last.pth"), "--model_s", "resnet8"]
        argv += ["--labels", "none", "--data", str(images / "all"), "--num_workers", "0", "--save_dir", str(save_dir)]
        train_cifar_student.main([*argv, "--batch_size", "8", "--epochs", "2", *flags])
        return next(iter(set(save_dir.iterdir()) - known))

    return call


def result_of(run) -> dict:
    return json.loads((run / "result.json").read_text())


def test_the_protocol_counts_the_images_that_the_matching_loss_is_of(learn):
    """SemCKD compares whole batches: 24 images make two of 10."""
    run = learn("--batch_size", "10", "--epochs", "1", "-b", "1", distill="semckd")
    assert result_of(run)["protocol"] == "lowest matching loss on 20 training images"


def test_the_judged_images_are_spread_over_all_and_shown_as_they_are(learn, monkeypatch):
    """They are in the order of their folders, and neither cropped nor mirrored."""
    monkeypatch.setattr(run_module, "JUDGED_IMAGES", 10)
    measure, seen = run_module.matching_loss, []

    def see(training, teacher, loader):
        seen.append((loader.subset.tolist(), loader.augmentation))
        return measure(training, teacher, loader)

    monkeypatch.setattr(run_module, "matching_loss", see)
    learn("--epochs", "1", distill="kd")
    assert seen == [([*range(0, 24, 3)], None)]


@pytest.mark.slow
def test_a_feature_method_learns_is_judged_by_its_loss_and_starts_a_classifier(learn, images, save_dir, capsys):
    run = learn("--holdout", "8", distill="norm")
    first, last = metrics(run)
    accuracies = {name for name in (*first, *result_of(run)) if "accuracy" in name}
    assert accuracies == {"teacher_accuracy"} and result_of(run)["teacher_accuracy"] is None, "a loss is no accuracy"
    assert {"loss_norm", "holdout_matching_loss"} <= set(last) and "loss_ce" not in last
    result, losses = result_of(run), [one["holdout_matching_loss"] for one in (first, last)]
    assert result["best_epoch"] == 1 + losses.index(min(losses)) and result["best_by"] == "holdout_matching_loss"
    assert result["protocol"] == "lowest matching loss on 8 held-out images"
    assert (result["holdout_matching_loss_best"], result["holdout_matching_loss_last"]) == (min(losses), losses[1])
    record = load(run / "best.pth")["record"]
    assert (record["classes"], record["num_classes"], record["epoch"]) == ([], 0, result["best_epoch"])
    assert "trained without labels: last holdout matching loss" in capsys.readouterr().out
    with pytest.raises(UserError, match="trained without labels and has no test accuracy"):
        read_rows([run])
    # It starts a classifier, whose trunk it is.
    argv = ["--init", str(run / "last.pth"), "--save_dir", str(save_dir / "classifier"), "--learning_rate", "0"]
    train_teacher.main([*argv, "--max_steps", "1", "--batch_size", "8"])
    assert "all weights but the classifier's, which is new: 0 classes there, 10 here" in capsys.readouterr().out
    (classifier,) = (save_dir / "classifier").iterdir()
    weights, start = (load(path / "last.pth")["model"] for path in (classifier, run))
    trunk = [name for name in start if "fc" not in name and "running" not in name and "tracked" not in name]
    assert same_state({name: weights[name] for name in trunk}, {name: start[name] for name in trunk})
    # It can teach maps, and nothing else.
    assert read_teacher(str(run / "last.pth"), None).num_classes == 0
    teaches = ["--path_t", str(run / "last.pth"), "--model_s", "resnet8", "--dataset", "digits", "--max_steps", "1"]
    teaches += ["--save_dir", str(save_dir / "taught")]
    train_cifar_student.main([*teaches, "--distill", "hint"])
    assert "no classifier" in message_of(train_cifar_student.main, [*teaches, "--distill", "kd"])
    assert "has no classifier" in message_of(export_student.main, [str(run / "last.pth")])


@pytest.mark.slow
def test_a_probe_reports_and_chooses_nothing(learn, images, monkeypatch):
    probes = iter((90.0, 10.0, 10.0))
    monkeypatch.setattr(run_module, "probe", lambda *_: {"probe_accuracy": next(probes), "knn_accuracy": 50.0})
    run = learn("--data_probe", str(images / "probe"), distill="hint")
    result, losses = result_of(run), [one["train_matching_loss"] for one in metrics(run)]
    assert losses[1] < losses[0] and (result["best_by"], result["best_epoch"]) == ("train_matching_loss", 2)
    assert (result["probe_accuracy_last"], result["probe_accuracy_best"]) == (10, 10)
    assert result["protocol"] == "lowest matching loss on 24 training images" and "accuracy_last" not in result
    train_cifar_student.main(["--resume", str(run), "--epochs", "3"])
    assert len(metrics(run)) == 3


def test_logits_teach_the_classes_of_the_teacher(learn, tmp_path):
    run = learn(distill="kd")
    record = load(run / "last.pth")["record"]
    assert record["classes"] == [str(digit) for digit in range(10)] and record["num_classes"] == 10
    assert export_student.main(
        [str(run / "last.pth"), "--dataset", "digits", "--out", str(tmp_path / "x.pth")]
    ).exists()


@pytest.mark.parametrize("name", [name for name, method in DISTILLERS.items() if not method.refuses_unlabelled])
def test_methods_say_truly_whether_they_need_labels(name):
    """With the cross entropy off, the losses of a method that needs none are the same for any; its student has no
    classifier where it would not be trained."""
    method, flags = DISTILLERS[name], {flag.argument: flag.default for flag in DISTILLERS[name].flags}
    chosen = {"gamma": 0.0, "alpha": float(method.group == "logits")}
    flags |= {argument: value for argument, value in chosen.items() if argument in flags}
    classes = 10 if method.trains_classifier(flags) else 0
    teacher, student = build_model("resnet14", 10), build_model("resnet8", classes)
    distiller = method(student, teacher, TASK._replace(num_classes=classes), **flags)
    batch = batch_of(distiller)
    output = FrozenTeacher(teacher)(batch.images, distiller.teacher_preact)
    distiller.eval()
    with torch.no_grad():
        found = [
            distiller(batch._replace(targets=targets), output, PROGRESS)[1]
            for targets in (batch.targets, torch.zeros_like(batch.targets))
        ]
    assert found[0] and "ce" not in found[0] and same_state(*found)
    assert distiller.export().num_classes == classes


@pytest.mark.slow
def test_what_needs_labels_is_refused(images, teacher_run, tmp_path):
    argv = ["--path_t", str(teacher_run / "last.pth"), "--model_s", "resnet8", "--labels", "none"]
    argv += ["--save_dir", str(tmp_path / "save")]

    def refusal(*flags: str) -> str:
        return message_of(train_cifar_student.main, [*argv, *flags])

    data = ("--data", str(images / "all"))
    for name in ("dkd", "crd", "sskd", "fsp", "distpro"):
        assert f"--distill {name} cannot train without labels" in refusal("--distill", name, *data)
    alone = ["--model", "resnet8", "--labels", "none", *data]
    assert "cannot train without labels: it learns from labels alone" in message_of(train_teacher.main, alone)
    assert "there is no cross entropy" in refusal("--distill", "kd", "-r", "1", *data)
    for flag in (("--label_smoothing", "0.1"), ("--balanced_sampling",), ("--split", "0.2")):
        assert f"{flag[0]}: it needs labels" in refusal(*flag, *data)
    assert "name the folder of images with --data" in refusal()
    assert "not cifar10" in refusal("--dataset", "cifar10", *data)
    (tmp_path / "empty").mkdir()
    assert "there is no image" in refusal("--data", str(tmp_path / "empty"))
    assert "--data_probe: there is no folder" in refusal(*data, "--data_probe", str(tmp_path / "none"))
    labelled = [*argv[:4], "--data_probe", str(images / "probe")]
    assert "has no effect with labelled images" in message_of(train_cifar_student.main, labelled)
    assert not any((tmp_path / "save").glob("*"))


def test_teachers_whose_classes_are_in_another_order_have_no_average(learn, teacher_run, tmp_path):
    first, second = str(teacher_run / "last.pth"), str(tmp_path / "other.pth")
    file = load(teacher_run / "last.pth")
    torch.save(file | {"record": file["record"] | {"classes": file["record"]["classes"][::-1]}}, second)
    with pytest.raises(UserError, match="have classes in another order"):
        learn("--max_steps", "1", "--path_t", f"{first},{second}", distill="kd")
    run = learn("--max_steps", "1", "--path_t", f"{first},{first}", distill="kd")
    assert load(run / "last.pth")["record"]["classes"] == file["record"]["classes"]


def test_patience_waits_for_a_lower_matching_loss(learn, images, monkeypatch):
    losses = iter((1.0, 2.0, 0.5, 0.4))
    monkeypatch.setattr(run_module, "matching_loss", lambda *_: next(losses))
    flags = ("--epochs", "4", "--patience", "1", "--data_probe", str(images / "probe"))
    run = learn("--holdout", "8", *flags, distill="kd")
    assert "stopped early: no better holdout matching loss in 1 epoch" in (run / "log.txt").read_text()
    probe = [value for one in metrics(run) for name, value in one.items() if name in ("probe_accuracy", "knn_accuracy")]
    assert len(metrics(run)) == 2 and len(probe) == 4 and all(0 <= value <= 100 for value in probe)


@pytest.mark.quick(1)
@pytest.mark.parametrize("distill", ["hint", "mlkd"])
def test_a_teacher_teaches_mixed_images_without_labels(distill, learn, images, monkeypatch):
    """Both networks see one mixed batch; what the run is judged on is not mixed."""
    trained, judged = [], []
    step, judging = loops.step, loops.matching_loss

    def see(runs, batch, *rest):
        trained.append(batch)
        return step(runs, batch, *rest)

    def see_judged(training, teacher, loader):
        judged.append(loader.augmentation)
        return judging(training, teacher, loader)

    monkeypatch.setattr(loops, "step", see)
    monkeypatch.setattr(run_module, "matching_loss", see_judged)
    run = learn("--mixup", "1", "--cutmix", "1", "--epochs", "1", "--holdout", "8", distill=distill)
    log = (run / "log.txt").read_text()
    assert "mixup 1.0" in log and "training accuracy" not in log
    assert trained and all(batch.targets.ndim == 2 and (batch.classes == 0).all() for batch in trained)
    assert judged and all(one is None or not one.mixes for one in judged)


def matching_loss_of(distill: str, epoch: int = 0, batch_size: int = 8, images: int = 24) -> float:
    """The matching loss of fresh networks in an epoch of 240."""
    torch.manual_seed(0)
    data, (network, student) = few_images(10), pair_networks("resnet14", "resnet8")
    teacher = Teacher(Network("x.pth", "resnet14", network, 10), data, None, Fast(), torch.device("cpu"))
    method = DISTILLERS[distill](student, network, TASK, alpha=0.5)
    given = {"distill": distill, "model_s": "resnet8", "batch_size": batch_size}
    config = resolve(given, of_teacher={"model_t": "resnet14"})
    training = loops.Training(method.main_stage(240), method, data, config, torch.device("cpu"))
    training.begin_epoch(Progress(epoch, 240), epoch, None)
    method.eval()
    return loops.matching_loss(training, teacher, training.judging_loader(data.test, torch.arange(images)))


def test_epochs_are_judged_by_one_weighting():
    """NORM's weight of its term rises and falls over the run."""
    assert matching_loss_of("norm", 0) == matching_loss_of("norm", 120) == matching_loss_of("norm", 239) > 0


def test_the_matching_loss_is_a_mean_over_images():
    """Also where the last batch is shorter."""
    found, whole = (matching_loss_of("kd", batch_size=size, images=17) for size in (8, 17))
    assert found == pytest.approx(whole)


def test_recipes_take_nothing_from_labels_but_the_cross_entropy(images):
    argv = ["--path_t", "t.pth", "--model_s", "resnet8", "--distill", "kd", "--labels", "none", "--dataset", "folder"]
    for recipe in RECIPES:
        argv += ["--data", str(images / "all"), "--recipe", recipe]
        assert resolve(parse(student_parser(), argv).runs[0]).gamma == 0


class Bank(FeatureDistiller):
    """Counts the steps that have seen each training image."""

    name = "mine"
    reads = ("pooled", "sample index and negatives")

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        self.register_buffer("steps", torch.zeros(len(task.train_targets)))

    def feature_loss(self, student, teacher, targets, index):
        if self.training:
            self.steps[index] += 1
        return (student.pooled - teacher.pooled).square().mean()


def test_a_bank_is_updated_by_steps_alone_and_not_by_what_it_is_judged_with(learn, monkeypatch):
    monkeypatch.setitem(DISTILLERS, "mine", Bank)
    run = learn(distill="mine")
    assert load(run / "last.pth")["training"]["distiller"]["steps"].eq(2).all()
    assert "--holdout: --distill mine keeps something of every training image" in message_of(
        lambda flags: learn(*flags, distill="mine"), ["--holdout", "6"]
    )
