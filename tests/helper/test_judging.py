"""What is measured of logits and maps, against definitions written out; with which images and teacher."""

import itertools

import numpy
import pytest
import torch
from sklearn import metrics

from dataset import load_data
from errors import UserError
from helper.export import RecordedData
from helper.judging import Judged, check_size, note_of_teacher, read_judges_teacher, split_note
from helper.metrics import BINS, MinibatchCKA, calibration, divergences, fidelity, judge
from helper.networks import Network
from models import build_model


def hsic(x: torch.Tensor, y: torch.Tensor) -> float:
    """The unbiased estimator as the mean over four different images: Song et al., JMLR 2012, the U-statistic."""
    k, m, n = (x @ x.T).tolist(), (y @ y.T).tolist(), len(x)
    terms = [
        k[i][j] * m[i][j] + k[i][j] * m[q][r] - 2 * k[i][j] * m[i][q]
        for i, j, q, r in itertools.permutations(range(n), 4)
    ]
    return sum(terms) / len(terms)


def test_cka_is_the_ratio_of_unbiased_estimates_over_batches():
    torch.manual_seed(0)
    batches = [(torch.randn(6, 3, 2, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)) for _ in range(2)]
    batches = [(x, y + x.flatten(1)[:, :5]) for x, y in batches]
    sums = numpy.zeros(3)
    cka = MinibatchCKA()
    for x, y in batches:
        cka.update(x, y)
        x, y = x.flatten(1), y.flatten(1)
        sums += (hsic(x, y), hsic(x, x), hsic(y, y))
    assert cka.value() == pytest.approx(sums[0] / (sums[1] * sums[2]) ** 0.5, abs=1e-5)


def test_cka_is_one_for_rotations_and_nothing_for_unrelated_maps():
    torch.manual_seed(0)
    same, other, short = MinibatchCKA(), MinibatchCKA(), MinibatchCKA()
    rotation = torch.linalg.qr(torch.randn(12, 12))[0]
    for _ in range(20):
        maps = torch.randn(32, 3, 2, 2)
        same.update(maps, 7 * maps.flatten(1) @ rotation + 3)
        other.update(maps, torch.randn(32, 40))
        short.update(maps[:3], maps[:3])
    assert same.value() == pytest.approx(1, abs=1e-5) and abs(other.value()) < 0.05 and short.value() is None


def test_calibration_is_the_mean_gap_of_its_bins():
    probabilities = torch.tensor([[0.9, 0.1], [0.92, 0.08], [0.6, 0.4], [0.55, 0.45], [1.0, 0.0]]).double()
    found = calibration((probabilities + 1e-30).log(), torch.tensor([0, 1, 1, 0, 0]))
    assert [one["images"] for one in found["reliability"]] == [1, 1, 2, 1]
    gaps = [(0.55, 1), (0.6, 0), (0.91, 0.5), (1.0, 1)]
    weights = (1, 1, 2, 1)
    expected = sum(n * abs(confidence - accuracy) for n, (confidence, accuracy) in zip(weights, gaps, strict=True)) / 5
    assert found["ece"] == pytest.approx(100 * expected)
    assert all(one["limits"][0] < one["confidence"] / 100 <= one["limits"][1] for one in found["reliability"])
    assert BINS == 15


def test_intervals_and_classes_are_those_of_scikit_learn():
    torch.manual_seed(0)
    targets = torch.randint(0, 4, (300,))  # the fifth class has no images
    logits = torch.randn(300, 5)
    logits[torch.arange(300), targets] += 1
    about, predicted = judge(logits, targets), logits.argmax(1)
    resampled = [torch.randint(0, 300, (300,)) for _ in range(200)]
    for name, score in (
        ("balanced_accuracy", lambda t, p: metrics.recall_score(t, p, labels=t.unique(), average="macro")),
        ("macro_f1", lambda t, p: metrics.f1_score(t, p, average="macro")),
        ("accuracy", metrics.accuracy_score),
    ):
        assert about[name] == pytest.approx(100 * score(targets, predicted))
        ends = numpy.percentile([100 * score(targets[some], predicted[some]) for some in resampled], [2.5, 97.5])
        assert about["intervals"][name] == pytest.approx(ends.tolist(), abs=1.5)
    assert about["per_class"][4]["images"] == 0 and sum(map(sum, about["confusion"])) == 300


def test_up_to_five_classes_have_no_top5_accuracy():
    for classes, has_one in ((6, True), (5, False), (2, False)):
        about = judge(torch.randn(20, classes), torch.randint(0, classes, (20,)))
        assert (about["accuracy_top5"] is not None) == has_one == ("accuracy_top5" in about["intervals"])


def test_fidelity_counts_agreement_and_who_is_right():
    ours = torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0], [0, 9.0, 0]])
    theirs = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [9.0, 0, 0], [0, 0, 9.0], [0, 0, 9.0]])
    about = fidelity(ours, theirs, torch.tensor([0, 0, 0, 1, 0]))
    assert about["agreement"] == 40 and list(about["outcomes"].values()) == [20, 20, 20, 20, 20]
    p, q = theirs.double().softmax(1), ours.double().softmax(1)
    assert about["kl"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()))
    assert divergences(ours, ours).tolist() == [0] * 5


def test_a_size_that_a_network_cannot_read_is_refused():
    def refusal(network, size: int) -> str:
        judged = Judged("it", "a network", {"image_size": 32}, lambda images: images, network)
        with pytest.raises(UserError) as caught:
            check_size(judged, load_data("digits", image_size=size))
        return str(caught.value)

    assert refusal(None, 64) == (
        "--image_size: it reads images of 32x32 alone, as it was exported; leave it out, or judge the checkpoint"
    )
    assert "cannot read images of 40x40" in refusal(build_model("timm:vit_tiny_patch16_224", 10, 32), 40)
    check_size(Judged("it", "a program", {"image_size": 32}, lambda x: x), load_data("digits"))


def test_another_split_of_the_runs_own_folder_is_said(tmp_path):
    def notes(split: float, folder: str, place: str | None = "photographs"):
        record = {"split": 0.2, "data": place and str(tmp_path / place)}
        wanted = RecordedData.of(record, "folder", folder)._replace(split=split)
        return split_note(Judged("run", "resnet8", record, lambda images: images), wanted)

    (tmp_path / "photographs").mkdir()
    own = str(tmp_path / "photographs" / "..") + "/photographs"
    assert notes(0.2, own) == notes(0.5, str(tmp_path / "others")) == ()
    said = "--split 0.5: its run had --split 0.2, so it was trained on some of these test images"
    assert notes(0.5, own) == [said]
    for place in (None, "moved"):  # an export says no place; that of a checkpoint may be on another machine
        assert notes(0.2, own, place) == ()
        assert notes(0.5, own, place) == [f"{said}, where these are the images of its run"]


def test_another_teacher_than_the_runs_own_is_said():
    """A run's checkpoint knows its teacher by the settings too, an export by its record alone."""
    loaded = Network("t.pth", "resnet14", build_model("resnet14", 10), 10, digest="abc")

    def notes(**record) -> list[str]:
        return list(note_of_teacher(Judged("it", "resnet8", record, lambda images: images), loaded))

    assert notes() == notes(teacher=None, teacher_digest=None, model_t=None) == []
    assert notes(teacher_digest="abc", model_t="resnet14") == notes(teacher={"name": "resnet14", "digest": "abc"}) == []
    assert notes(teacher_digest="0", model_t="vgg8") == ["its run had another teacher: vgg8 (digest 0)"]
    several = {"name": "resnet14,vgg8", "digest": "1"}
    assert notes(teacher=several) == ["its run had 2 teachers together: resnet14,vgg8 (digest 1)"]


def test_a_split_of_data_that_have_their_own_is_refused():
    with pytest.raises(UserError, match=r"^--split: has no effect with --dataset digits; leave it out"):
        RecordedData.of({"dataset": "digits"}, split=0.5)
    assert RecordedData.of({"dataset": "folder"}, split=0.5).split == 0.5


def test_several_teachers_are_refused_by_name():
    with pytest.raises(UserError, match=r"^--teacher: a\.pth,b\.pth names several networks; name one"):
        read_judges_teacher("a.pth,b.pth", None, None, [])
