"""What `--init` starts a run from: which weights are taken, what is refused, that a resumed run asks nobody."""

import json
import os
import shutil

import pytest
import torch

import train_cifar_student
import train_teacher
from errors import UserError
from helper import distributed, inputs, networks
from models import build_model
from models import published as published_module
from models.backbone import FinalConv
from models.checkpoints import load_initial
from scripts import export_student
from tests.conftest import TEACHER, killed, message_of
from tests.helper.distributed_cases import few_images
from tests.run_folders import load, new_run, same_state, state, weights

SHORT = ("--max_steps", "1", "--batch_size", "16", "--epochs", "1")
#: A rate at which a step changes nothing, so that the last checkpoint holds what the run started from.
FROZEN = (*SHORT, "--learning_rate", "1e-30")


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    monkeypatch.setattr(inputs, "load_data", few_images)


@pytest.fixture
def train(save_dir):
    """Call `train_teacher.py`; returns the run folder, the newest."""
    return lambda *flags: new_run(train_teacher.main, save_dir, *flags)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """torchvision's ResNet-18 with random weights, in place of a download; the downloads that were asked for."""
    import torchvision

    network, asked = torchvision.models.resnet18(), []
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    monkeypatch.setattr(published_module, "provide", lambda file: asked.append(file.name) or tmp_path / "resnet18.pth")
    return network.state_dict(), asked


def parameters(run_or_state) -> dict:
    """Without the statistics, which a step of any rate moves."""
    found = run_or_state if isinstance(run_or_state, dict) else weights(run_or_state)
    return {
        key.removeprefix("student.").removeprefix("network."): value
        for key, value in found.items()
        if "running" not in key and "num_batches" not in key
    }


def differing(ours: dict, theirs: dict) -> list[str]:
    """Names of the parameters that are not alike; a zero has moved by a step at the smallest rate."""
    assert ours.keys() == theirs.keys()
    return [
        key
        for key, value in theirs.items()
        if ours[key].shape != value.shape or not torch.allclose(ours[key], value, rtol=0, atol=1e-20)
    ]


def test_all_weights_are_taken_where_the_classes_agree(train, teacher_run):
    run = train("--init", str(teacher_run / "last.pth"), *FROZEN)
    assert differing(parameters(run), parameters(teacher_run)) == []
    assert run.name == f"digits_ce_{TEACHER}_trial1_try"
    log = (run / "log.txt").read_text()
    assert f"--init {teacher_run / 'last.pth'}: all weights; images are normalised with the mean" in log
    config = json.loads((run / "config.json").read_text())
    assert (config["init"], config["model_s"]) == (str(teacher_run / "last.pth"), TEACHER)
    assert "(from --init)" in next(line for line in log.splitlines() if line.strip().startswith("model_s"))


def test_the_statistics_are_taken_too(teacher_run):
    student = build_model(TEACHER, 10)
    given = networks.read_initial(str(teacher_run / "last.pth"), None)
    assert load_initial(student, TEACHER, given.network, "x") is True
    assert same_state(student.state_dict(), given.network.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet18"])
def test_published_weights_with_a_new_classifier(train, published, name):
    weights, asked = published
    run = train("--init", "torchvision:resnet18", *(["--model", name] if ":" in name else []), *FROZEN)
    started = parameters(run)
    assert differing(started, parameters(weights)) == ["fc.weight", "fc.bias"] and len(started["fc.bias"]) == 10
    assert "the classifier's, which is new: 1000 classes there, 10 here" in (run / "log.txt").read_text()
    assert json.loads((run / "config.json").read_text())["model_s"] == name
    assert len(asked) == 1


@pytest.mark.slow
def test_a_new_classifier_is_the_seeds(train, published):
    one = train("--init", "torchvision:resnet18", "--trials", "2", *FROZEN)
    first, second = (parameters(run) for run in sorted(one.parent.iterdir()))
    assert differing(first, second) == ["fc.weight", "fc.bias"]
    assert len(published[1]) == 1, "once for two runs"
    assert differing(first, parameters(train("--init", "torchvision:resnet18", *FROZEN))) == []


def test_timms_weights(train, monkeypatch):
    timm = pytest.importorskip("timm")
    from models import timm_split

    network = timm.create_model("resnet10t", num_classes=7)
    monkeypatch.setattr(timm_split, "build_pretrained", lambda *arguments: network)
    run = train("--init", "timm:resnet10t.c3_in1k", *FROZEN)
    assert run.name == "digits_ce_timm-resnet10t_trial1_try"
    assert differing(parameters(run), parameters(network.state_dict())) == ["fc.weight", "fc.bias"]


def test_other_files_that_a_teacher_is_read_from(train, teacher_run, tmp_path):
    exported = export_student.main([str(teacher_run / "last.pth"), "--out", str(tmp_path / "exported.pth")])
    folder = tmp_path / f"{TEACHER}_vanilla"
    folder.mkdir()
    torch.save({"model": load(exported)["model"], "best_acc": 50.0}, folder / "ckpt_epoch_240.pth")
    for source in (exported, folder / "ckpt_epoch_240.pth"):
        assert differing(parameters(train("--init", str(source), *FROZEN)), parameters(teacher_run)) == []


def test_a_student_of_a_method_starts_from_them_too(distil, teacher_run):
    run = distil("--init", str(teacher_run / "last.pth"), "-s", "2", "--allow_teacher_gap", *FROZEN, student=TEACHER)
    started = {key: value for key, value in parameters(run).items() if not key.startswith("transform")}
    assert differing(started, parameters(teacher_run)) == []


WRONG = {
    "another architecture": (("--init", "{run}", "--model", "resnet8"), "--init: {run} holds another architecture"),
    "no file": (("--init", "none.pth", "--model", "resnet8"), f"--init: {os.path.abspath('none.pth')} does not exist"),
    "no file and no model": (("--init", "none.pth"), f"--init: {os.path.abspath('none.pth')} does not exist"),
    "not a checkpoint": (("--init", "{place}/page.pth", "--model", "resnet8"), "--init: {place}/page.pth cannot be"),
    "no name": (("--init", "{place}/odd.pth"), "--model: {place}/odd.pth does"),
    "no network": (("--dataset", "digits"), "--model is missing: name the network to train, like --model resnet8"),
    "other shapes": (("--init", "{place}/plain.pth", "--model", "resnet8"), "--init: {place}/plain.pth holds another"),
    "unknown name": (("--init", "torchvision:resnet19"), "--init: unknown model 'torchvision:resnet19'"),
    "unknown weights": (("--init", "torchvision:resnet18@V9"), "--init: torchvision:resnet18@V9: its weights are"),
    "another of timm": (("--init", "timm:resnet18", "--model", "resnet8"), "--init: timm:resnet18 is another"),
    "published, another": (("--init", "torchvision:resnet18", "--model", "resnet8"), "--init: torchvision:resnet18"),
    "swept": (("--model", "resnet8", "--sweep", "init=a,b"), "--sweep: init is the same for all runs"),
    "one of a sweep": (("--init", "{run}", "--sweep", f"model={TEACHER},resnet8"), "--init: {run} holds another"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(case, teacher_run, tmp_path, save_dir, published):
    flags, expected = WRONG[case]
    if "timm" in case:
        pytest.importorskip("timm")
    names = {"place": tmp_path, "run": teacher_run / "last.pth"}
    (tmp_path / "page.pth").write_text("<html>404</html>")
    torch.save({"model": build_model("resnet20", 10).state_dict()}, tmp_path / "plain.pth")
    torch.save({"first.weight": torch.zeros(3)}, tmp_path / "odd.pth")
    argv = [flag.format(**names) for flag in flags]
    message = message_of(train_teacher.main, ["--save_dir", str(save_dir), *SHORT, *argv])
    assert message.startswith(expected.format(**names)), message
    assert not save_dir.exists() or not list(save_dir.iterdir())


def test_a_resumed_run_needs_no_source(train, teacher_run, tmp_path, published):
    source = shutil.copy(teacher_run / "last.pth", tmp_path / "source.pth")
    flags = ("--init", str(source), "--batch_size", "64", "--epochs", "2", "--learning_rate", "0.01")
    whole = train(*flags)
    with killed():
        train(*flags, "--trial", "2", "--seed", "1")
    source.unlink()
    stopped = whole.with_name(whole.name.replace("trial1", "trial2"))
    message = message_of(train_teacher.main, ["--resume", str(stopped), "--init", "other.pth"])
    assert f"was run with init {source}, not {os.path.abspath('other.pth')}" in message
    # With --model it is not even asked for the network's name.
    train(*flags, "--trial", "2", "--seed", "1", "--model", TEACHER, "--resume")
    assert same_state(weights(whole), weights(stopped))
    assert (stopped / "log.txt").read_text().count("all weights; images") == 1


@pytest.mark.parametrize("stored", ["torchvision:resnet18", "/dev/zero", "timm:resnet18"])
def test_what_a_configuration_says_of_the_source_is_not_read(train, teacher_run, published, monkeypatch, stored):
    run = train("--init", str(teacher_run / "last.pth"), *SHORT)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"init": stored}))
    checkpoint = load(run / "last.pth")
    checkpoint["training"]["config"] |= {"init": stored}
    torch.save(checkpoint, run / "last.pth")

    def refuse(*arguments):
        raise AssertionError("the source is read")

    monkeypatch.setattr(networks, "read_network", refuse)
    monkeypatch.setattr(networks, "published_name", refuse)
    train("--resume", str(run), "--epochs", "2", "--max_steps", "2")
    assert state(run)["step"] == 2 and not published[1]
    export_student.main([str(run / "last.pth")])
    config.pop("model_s")
    (run / "config.json").write_text(json.dumps(config))
    assert "name the network" in message_of(train_teacher.main, ["--resume", str(run)])


def test_the_main_process_reads_first(monkeypatch):
    order = []

    def by_main(make):
        order.append("main")  # another process is not the main one: `make` is not called here

    monkeypatch.setattr(distributed, "by_main", by_main)
    assert distributed.main_first(lambda: order.append("here") or 7) == 7 and order == ["main", "here"]

    def fail(make):
        raise UserError("--init: no")

    monkeypatch.setattr(distributed, "by_main", fail)
    with pytest.raises(UserError, match="--init: no"):
        distributed.main_first(lambda: order.append("here"))
    assert order == ["main", "here"]


def test_the_same_in_the_student_script(teacher_run, save_dir):
    argv = ["--save_dir", str(save_dir), "--path_t", str(teacher_run / "last.pth"), "--distill", "kd"]
    message = message_of(train_cifar_student.main, [*argv, "--init", "timm:nothing_like_it"])
    assert message.startswith("--init: unknown model 'timm:nothing_like_it'")


def test_what_a_wrapper_holds_starts_a_network_with_a_new_classifier():
    student = build_model("wrn_16_1", 10)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    source = FinalConv(build_model("wrn_16_1", 10), 64)
    assert load_initial(student, "wrn_16_1", source, "x") is False
    now, given = student.state_dict(), source.network.state_dict()
    assert all(torch.equal(now[key], given[key]) for key in now if not key.startswith("fc."))
    assert torch.equal(now["fc.weight"], before["fc.weight"])


def test_what_a_method_added_is_named_where_it_is_left_out():
    classes, student = list("abcdefghij"), build_model("wrn_16_1", 10)
    given = networks.Network("a.pth", "wrn_16_1", FinalConv(build_model("wrn_16_1", 10), 64), 10)
    line = networks.start_from(given, student, "wrn_16_1", classes, "digits")
    assert "the classifier's, which is new: what its method added is left out (final_conv); images" in line


def test_images_have_the_normalisation_that_is_given(train, teacher_run, capsys):
    """Frozen weights need their own; a resumed run keeps it, and is refused another."""
    initial, imagenet = str(teacher_run / "last.pth"), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    run = train("--init", initial, "--freeze", "trunk", *FROZEN, "--normalisation", "imagenet")
    assert "images are normalised with the mean and deviation of --normalisation\n" in capsys.readouterr().out
    train_teacher.main(["--resume", str(run), "--max_steps", "2"])
    record = load(run / "last.pth")["record"]
    assert (tuple(record["mean"]), tuple(record["std"])) == imagenet
    own = ["--resume", str(run), "--normalisation", "0.3,0.3,0.3,0.3,0.3,0.3"]
    assert "was run with normalisation (0.485" in message_of(train_teacher.main, own)
