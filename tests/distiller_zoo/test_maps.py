"""What the methods share on maps: unit vectors, pairs that do not fit."""

import pytest
import torch
from torch.nn import functional as F

from distiller_zoo import DISTILLERS, Task
from distiller_zoo.fsp import FSP
from distiller_zoo.hint import ConvReg
from distiller_zoo.kdsvd import KDSVD
from distiller_zoo.maps import describe_left_out, unit_vectors
from errors import UserError
from models import build_model
from models.backbone import Wrapper


def test_unit_vectors_are_those_of_normalize_and_zero_stays_zero():
    vectors = torch.randn(3, 4, 5).double()
    assert torch.allclose(unit_vectors(vectors, 1), F.normalize(vectors, dim=1), rtol=1e-15)
    zero = torch.zeros(2, 3, requires_grad=True)
    unit = unit_vectors(zero, 1)
    unit.sum().backward()
    assert not unit.any() and not zero.grad.any()


def test_kdsvd_of_tiny_maps_is_that_of_maps():
    student, teacher = ([torch.randn(2, 3, 4, 4) for _ in range(2)] for _ in range(2))
    expected = torch.stack(KDSVD()(student, teacher))
    tiny = [(1e-20 * feature_map).requires_grad_() for feature_map in student]
    found = torch.stack(KDSVD()(tiny, teacher))
    found.sum().backward()
    assert torch.allclose(found, expected, rtol=1e-4)
    assert all(feature_map.grad.isfinite().all() for feature_map in tiny)


@pytest.mark.parametrize(
    "make", [lambda: FSP([(4, 8, 8)] * 2, [(5, 8, 8)] * 2), lambda: ConvReg((2, 4, 4, 4), (2, 4, 9, 9))]
)
def test_networks_that_do_not_fit_are_a_value_error_too(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("distill", ["attention", "nst", "vid", "semckd", "abound"])
def test_maps_that_no_pair_compares_are_said(distill):
    """Also of a network that shows no stem, whose first stage is taken for it."""
    task = Task(7, 64, 4, torch.arange(8) % 7)
    student, teacher = build_model("timm:test_resnet", 7), build_model("timm:test_convnext", 7)
    said = (
        "without the first of each, the student shows 4 feature maps and the teacher 3: maps are paired from the "
        "shallowest on, and the student's deepest is left out"
    )
    if distill == "abound":
        student, teacher, said = build_model("resnet8", 7), build_model("vgg8", 7), "the teacher's deepest is left out"
    notes = [note for note in DISTILLERS[distill](student, teacher, task).notes() if said in note]
    assert len(notes) == (distill != "semckd")
    assert not describe_left_out([1, 2], [3, 4]) and "2 deepest are left out" in describe_left_out([1], [1, 2, 3])


@pytest.mark.parametrize("distill", ["ofd", "reviewkd", "distpro"])
def test_methods_that_pair_from_the_deepest_say_which_maps_they_leave_out(distill):
    task, pair = Task(7, 32, 4, torch.arange(8) % 7), (build_model("resnet8", 7), build_model("vgg8", 7))
    counts = (4, 5) if distill == "distpro" else (3, 4)
    for student, teacher in (pair, pair[::-1]):
        notes = DISTILLERS[distill](student, teacher, task).notes()
        said = "maps are paired from the deepest on, and the {}'s shallowest is left out"
        whose, other = ("student", "teacher") if student is pair[1] else ("teacher", "student")
        shown = f"the {whose} shows {counts[1]} feature maps and the {other} {counts[0]}: {said.format(whose)}"
        assert [shown in note for note in notes] == [True, *(False for _ in notes[1:])]
        assert distill == "distpro" or notes[0].startswith("without the first of each")
    assert DISTILLERS[distill](pair[0], build_model("resnet14", 7), task).notes() == []


@pytest.mark.parametrize("distill", ["ofd", "simkd"])
def test_methods_without_map_size_say_their_pooling_and_name_no_flag(distill):
    task = Task(7, 32, 4, torch.arange(8) % 7)
    *_, note = DISTILLERS[distill](build_model("resnet8", 7), build_model("vgg8", 7), task).notes()
    assert note.startswith("maps of student and teacher are 8x8 and 4x4") and note.endswith("'s is average-pooled")


class Few(Wrapper):
    """A network that shows only its deepest maps."""

    def __init__(self, network, count):
        super().__init__(network)
        self.count = count

    def forward_maps(self, x, preact=False):
        maps, final = self.network.forward_maps(x, preact)
        return maps[-self.count :], final


@pytest.mark.parametrize(
    ("distill", "least"), [("kdsvd", 3), *((name, 2) for name in ("fsp", "abound", "ofd", "attention", "semckd"))]
)
def test_too_few_maps_to_compare_are_refused(distill, least):
    """Their loss would be a sum over nothing."""
    task, whole = Task(7, 32, 4, torch.arange(8) % 7), build_model("resnet8", 7)
    few = Few(build_model("resnet8", 7), least - 1)
    for pair, whose in (((few, whole), "student"), ((whole, few), "teacher")):
        shown = "too few" if distill in ("kdsvd", "fsp") else "only its last"
        with pytest.raises(UserError, match=f"{distill} compares several feature maps, and the {whose} shows {shown};"):
            DISTILLERS[distill](*pair, task)
    few.count = least
    DISTILLERS[distill](few, few, task)
