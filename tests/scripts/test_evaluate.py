"""scripts/evaluate.py: its numbers against plain torch and scikit-learn, and where it gets its data from."""

import json
import re
import shutil

import numpy
import pytest
import torch
from sklearn import metrics

import train_teacher
from helper import judging, networks
from helper.tables.records import read_record
from helper.teacher import Teacher
from models import build_model
from models.preprocessing import read_preprocessing
from scripts import evaluate, export_student
from tests.conftest import message_of
from tests.dataset.image_folders import write_images
from tests.helper.test_teachers_own_test import picture, theirs
from tests.run_folders import new_run

SHORT = ("--batch_size", "128", "--max_steps", "6", "--num_workers", "0")


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The test images of the embedded digits (n, 3, 32, 32) and their classes, without this code."""
    from sklearn.datasets import load_digits

    source = load_digits()
    small = torch.as_tensor(source.images / 16 * 255, dtype=torch.float32)[:, None]
    large = torch.nn.functional.interpolate(small, size=32, mode="bilinear").round().expand(-1, 3, -1, -1)
    is_test = numpy.zeros(len(source.target), dtype=bool)
    for digit in range(10):
        is_test[numpy.flatnonzero(source.target == digit)[::5]] = True
    return large[is_test], torch.as_tensor(source.target[is_test])


def predicted(path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, 10) of an exported file by plain torch, and the classes."""
    file = torch.load(path, weights_only=True)
    network = build_model("resnet8", 10).eval()
    network.load_state_dict(file["model"])
    pixels, targets = digits()
    mean, std = (torch.tensor(file["record"][name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        return network((pixels / 255 - mean) / std), targets


@pytest.mark.slow
def test_the_numbers_are_those_of_torch_and_scikit_learn(distil, whole_digits):
    run = distil(*SHORT)
    exported = export_student.main([str(run / "last.pth"), "--format", "pth,onnx,pt2"])
    logits, targets = predicted(exported)
    true, found, probabilities = targets.numpy(), logits.argmax(1).numpy(), logits.double().softmax(1).numpy()
    expected = {
        "accuracy": 100 * metrics.accuracy_score(true, found),
        "accuracy_top5": 100 * metrics.top_k_accuracy_score(true, probabilities, k=5),
        "loss": metrics.log_loss(true, probabilities),
        "balanced_accuracy": 100 * metrics.balanced_accuracy_score(true, found),
        "macro_f1": 100 * metrics.f1_score(true, found, average="macro"),
    }
    for kind in (".pth", ".onnx", ".pt2"):
        (about,) = evaluate.main([str(exported.with_suffix(kind))])
        assert {name: about[name] for name in expected} == pytest.approx(expected, abs=1e-3)
        assert about["confusion"] == metrics.confusion_matrix(true, found).tolist()
        assert about["test_images"] == 364 and about["test_unreadable"] == 0
    for name, value in expected.items():
        low, high = about["intervals"][name]
        assert low < value < high


@pytest.mark.parametrize("script", [evaluate, export_student])
def test_a_folder_that_is_named_is_not_ignored(teacher_run, tmp_path, script):
    """The run's own data set is embedded: the folder says which is meant, or is refused."""
    argv = [str(teacher_run / "last.pth"), "--data"]
    (tmp_path / "empty").mkdir()
    assert "--data: there is no folder" in message_of(script.main, [*argv, str(tmp_path / "none")])
    assert "is no folder of images" in message_of(script.main, [*argv, str(tmp_path / "empty")])
    assert "reads no folder" in message_of(script.main, [*argv, str(tmp_path), "--dataset", "digits"])


@pytest.mark.slow
def test_fidelity_is_recorded_where_reports_look_for_it(distil, teacher_run, tmp_path, capsys):
    plain, folded = distil(*SHORT, distill="kd"), distil(*SHORT)
    teacher, out = str(teacher_run / "last.pth"), tmp_path / "out.json"
    argv = [str(plain), str(folded), "--teacher", teacher, "--fidelity", "--json", str(out)]
    both = evaluate.main(argv)
    assert json.loads(out.read_text()) == both and "CKA before folding" in capsys.readouterr().out
    first, second = (read_record(run).fidelity for run in (plain, folded))
    assert "cka_unfolded" not in first, "KD changes no map of its student"
    assert second["cka_unfolded"] != second["cka"] and 0 <= second["agreement"] <= 100 and second["kl"] > 0
    assert sum(second["outcomes"].values()) == pytest.approx(100)
    shutil.rmtree(folded)
    (itself,) = evaluate.main([teacher, "--teacher", teacher])
    assert (itself["agreement"], itself["kl"]) == (100, pytest.approx(0)) and itself["cka"] == pytest.approx(1)


@pytest.mark.slow
def test_a_teacher_is_shown_the_size_in_which_it_taught(distil, teacher_run, monkeypatch):
    flags = ("--max_steps", "1", "--teacher_image_size", "16", "--allow_teacher_gap")
    run, sizes = distil(*flags, distill="kd"), []

    def note(source, data, size, *others):
        sizes.append(size)
        return Teacher(source, data, size, *others)

    monkeypatch.setattr(judging, "Teacher", note)
    evaluate.main([str(run), "--teacher", str(teacher_run)])
    evaluate.main([str(run), "--teacher", str(run)])
    assert sizes == [16, None], "another teacher is shown its own"


@pytest.mark.slow
def test_the_page_holds_everything_it_shows(distil, teacher_run, tmp_path):
    page = tmp_path / "page.html"
    run = distil(*SHORT, distill="kd")
    (about,) = evaluate.main([str(run), "--teacher", str(teacher_run / "last.pth"), "--html", str(page)])
    text = page.read_text()
    assert (
        text.startswith("<!doctype html>") and "<script" not in text and not re.search(r'(src|href)="(?!data:|#)', text)
    )
    named = {one["sample"] for name in ("worst_errors", "disagreements") for one in about[name]}
    assert len(set(re.findall(r'src="(data:image/png;base64,[^"]+)"', text))) == len(named)
    assert f"{about['accuracy']:.2f} %" in text and f"{about['kl']:.4f} nats" in text
    shown = [int(n) for n in re.findall(r'title="\d as \d: (\d+)"', text)]
    assert shown == [n for row in about["confusion"] for n in row]


@pytest.mark.slow
def test_a_teacher_is_given_the_images_as_they_are_held(distil, teacher_run, monkeypatch):
    run, teacher = distil(*SHORT, "--image_size", "48", distill="kd"), str(teacher_run / "last.pth")
    call, sizes = Teacher.__call__, set()

    def note(self, images, *rest):
        sizes.add(images.shape[-1])
        return call(self, images, *rest)

    monkeypatch.setattr(Teacher, "__call__", note)
    (about,) = evaluate.main([str(run), "--teacher", teacher])
    assert sizes == {32} and about["image_size"] == 48


@pytest.mark.slow
def test_the_average_of_the_weights_is_judged_where_it_is_asked_for(distil, capsys):
    run = distil(*SHORT, "--ema_decay", "0.5")
    result = json.loads((run / "result.json").read_text())
    found = [evaluate.main([str(run), *flags])[0] for flags in ((), ("--ema",))]
    assert [one["accuracy"] for one in found] == [result["accuracy_last"], result["accuracy_last_ema"]]
    assert found[0]["digest"] != found[1]["digest"]
    capsys.readouterr()
    evaluate.main([str(run), "--teacher", str(run), "--ema"])
    assert "teacher: " in (note := capsys.readouterr().out.rpartition("note: ")[2]) and "the raw ones are taken" in note


@pytest.mark.slow
def test_a_file_is_read_once(distil, monkeypatch):
    run, read = distil(*SHORT, distill="kd"), []
    for module in (judging, networks):
        one = module.read_checkpoint
        monkeypatch.setattr(module, "read_checkpoint", lambda path, flag, one=one: read.append(path) or one(path, flag))
    evaluate.main([str(run)])
    assert read == [str(run / "last.pth")]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["timm:resnet10t.c3_in1k", "timm:convnext_atto.d2_in1k"])
def test_published_weights_are_tested_as_their_library_tests_them(source, tmp_path, monkeypatch):
    """Numbers against the library's own transform; images that are not square, of which another crop shows."""
    pytest.importorskip("timm")
    classes, shown = ["cat", "dog"], []
    for number in range(6):
        (folder := tmp_path / "data" / ("val", "train")[number % 3 == 2] / classes[number % 2]).mkdir(
            parents=True, exist_ok=True
        )
        picture(300 + 40 * number, 240).save(folder / f"{number}.png")
        shown += [] if number % 3 == 2 else [(picture(300 + 40 * number, 240), number % 2)]
    network = build_model(source.partition(".")[0], 2).eval()
    monkeypatch.setattr(networks, "read_timm", lambda _: (network, {"dataset": "folder", "classes": classes}))
    (about,) = evaluate.main([source, "--data", str(tmp_path / "data")])
    own, transform = read_preprocessing(source), theirs(source)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (own.mean, own.std))
    with torch.inference_mode():
        logits = network(torch.stack([(transform(image) - mean) / std for image, _ in shown]))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([target for _, target in shown]))
    assert about["loss"] == pytest.approx(float(expected), abs=2e-3)
    assert f"the shorter side {own.test_resize}, centre {own.test_size}" in about["test_transform"]
    (resized,) = evaluate.main([source, "--data", str(tmp_path / "data"), "--image_size", "64"])
    assert "test_transform" not in resized and resized["image_size"] == 64


@pytest.mark.slow
def test_faults_are_named(distil, tmp_path, monkeypatch):
    run = distil(*SHORT, distill="kd")
    exported = str(export_student.main([str(run / "last.pth")]))
    assert "--fidelity: name the teacher" in message_of(evaluate.main, [exported, "--fidelity"])
    with monkeypatch.context() as patch:  # before anything is measured
        patch.setattr(judging, "test", None)
        shutil.copy(exported, tmp_path / "alone.pth")
        argv = [str(tmp_path / "alone.pth"), "--fidelity", "--teacher", str(run)]
        assert "alone.pth is in no run folder" in message_of(evaluate.main, argv)
        (run / "result.json").write_text(json.dumps(json.loads((run / "result.json").read_text()) | {"digest": "0"}))
        for other in (run, run / "best.pth"):  # as of another epoch, or of the moving average
            argv = [str(other), "--fidelity", "--teacher", str(run)]
            assert "are not the weights that its run ended with" in message_of(evaluate.main, argv)
        (run / "result.json").unlink()
        assert "not finished" in message_of(evaluate.main, [str(run), "--fidelity", "--teacher", str(run)])
        for flag in ("--json", "--html"):
            place = str(tmp_path / "none" / "x")
            assert f"argument {flag}: there is no folder" in message_of(evaluate.main, [exported, flag, place])
            assert f"argument {flag}: {tmp_path} is a folder" in message_of(
                evaluate.main, [exported, flag, str(tmp_path)]
            )
    assert "does not exist" in message_of(evaluate.main, [str(tmp_path / "none.pth")])
    bare = tmp_path / "bare.pth"
    torch.save(build_model("resnet8", 7).state_dict(), bare)
    assert "does not say what it was trained on" in message_of(evaluate.main, [str(bare), "--model", "resnet8"])
    argv = [str(bare), "--model", "resnet8", "--dataset", "digits"]
    torch.save(build_model("resnet8", 0).state_dict(), encoder := tmp_path / "encoder.pth")
    said = message_of(evaluate.main, [str(encoder), *argv[1:]])
    assert said.startswith(f"NETWORK: {encoder} has no classifier: it is an encoder") and "--init" in said
    assert "7 classes, the data 10" in message_of(evaluate.main, argv)
    assert "argument --split: must be a number, 0 or more and" in message_of(
        evaluate.main, [exported, "--split", "1.5"]
    )


@pytest.mark.slow
def test_json_on_standard_output_is_alone_there(distil, capsys):
    run = distil(*SHORT, distill="kd")
    capsys.readouterr()
    (about,) = evaluate.main([str(run), "--json", "-"])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == about and "balanced accuracy" in printed.err
    assert re.search(r"per class +\d: \d", printed.err) and re.search(r"most confused +\d as \d \(\d", printed.err)


@pytest.mark.parametrize("stream", ["off", "on"])
def test_test_images_that_cannot_be_read_are_counted_in_the_result(tmp_path, save_dir, stream, capsys):
    folder = write_images(tmp_path / "data", side=32)
    for name in ("val/cat/1.JPEG", "val/dog/3.JPEG"):
        (folder / name).write_bytes(b"no image")
    flags = ("--model", "resnet8", "--data", str(folder), "--stream", stream, "--num_workers", "0")
    run = new_run(train_teacher.main, save_dir, *flags, "--max_steps", "1", "--batch_size", "8", "--max_broken", "4")
    result = json.loads((run / "result.json").read_text())
    assert (result["test_images"], result["test_unreadable"]) == (10, 2)
    assert "2 of 10 test images unreadable" in capsys.readouterr().out
    (about,) = evaluate.main([str(run), "--html", str(tmp_path / "page.html")])
    out = capsys.readouterr().out
    assert "on 8 test images of folder; 2 unreadable, left out" in out
    # Two classes have no top-5 accuracy.
    assert about["accuracy_top5"] is None and "test_accuracy_top5" not in (run / "metrics.jsonl").read_text()
    assert all("always 100 % with 2 classes" in text for text in (out, (tmp_path / "page.html").read_text()))
