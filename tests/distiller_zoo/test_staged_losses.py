"""The losses of AB, FT, FSP, KDSVD and OFD: published values, derivatives, flat maps, pairs that do not fit."""

import pytest
import torch
from torch.nn import functional as F

from distiller_zoo import DISTILLERS
from distiller_zoo.abound import ABLoss, Connector
from distiller_zoo.factor import FactorTransfer
from distiller_zoo.fsp import FSP
from distiller_zoo.kdsvd import KDSVD
from distiller_zoo.ofd import margins, partial_distance
from errors import UserError
from helper.loops import set_modes
from tests.check_values import NARROW_STUDENT_MAP, STUDENT_MAP, TEACHER_MAP
from tests.conftest import make_batch
from tests.distiller_zoo.helpers import PROGRESS, build, close, random_maps, train_step

NAMES = ("abound", "factor", "fsp", "kdsvd", "ofd")


def test_the_losses_have_the_published_values():
    close(ABLoss(3)([STUDENT_MAP] * 3, [TEACHER_MAP] * 3), [0.4300703869, 0.8601407738, 1.7202815475])
    close([FactorTransfer()(NARROW_STUDENT_MAP, TEACHER_MAP)], [0.0415692827])
    student, teacher = ([each, F.avg_pool2d(each, 2)] for each in (STUDENT_MAP, TEACHER_MAP))
    close(FSP(*([each.shape for each in maps] for maps in (student, teacher)))(student, teacher), [0.0040353435])
    channels = torch.arange(6, dtype=torch.float64)
    margin = margins(0.5 + 0.1 * channels, 0.1 * channels - 0.2)[:, None, None]
    close([partial_distance(STUDENT_MAP, torch.maximum(TEACHER_MAP, margin)) / 1000], [0.3231126039])


LOSSES = {
    "ABLoss": lambda s, t: sum(ABLoss(2)([s, 2 * s], [t, -t])),
    "FactorTransfer": FactorTransfer(),
    "FactorTransfer squared": FactorTransfer(p2=2),
    "FSP": lambda s, t: sum(FSP([s.shape] * 2, [t.shape] * 2)([s, s.square()], [t, t.square()])),
    "KDSVD": lambda s, t: sum(KDSVD()([s, s.flip(0)], [t, t.flip(0)])),
    "OFD": partial_distance,
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_have_their_derivative(name):
    student, teacher = random_maps((2, 3, 3, 2), (2, 3, 3, 2))
    assert torch.autograd.gradcheck(lambda value: LOSSES[name](value, teacher), student.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [0.0, 1.0, 500.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_zero_and_constant_maps_stay_finite(name, value, batch):
    student = torch.full((batch, 4, 3, 3), value).requires_grad_()
    for teacher in (torch.zeros(batch, 4, 3, 3), torch.ones(batch, 4, 3, 3), torch.randn(batch, 4, 3, 3)):
        loss = LOSSES[name](student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.shape == () and torch.isfinite(loss) and torch.isfinite(gradient).all()


@pytest.mark.slow
def test_the_first_stages_lower_their_own_loss():
    for name in ("abound", "fsp", "factor"):
        teacher, method = build(name)
        stage, batch = method.stages(240)[0], make_batch()
        set_modes(stage, method)
        output = teacher(batch.images, method.teacher_preact)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.002, momentum=0.9)
        values = [sum(train_step(method, stage, optimizer, batch, output, PROGRESS)[0].values()) for _ in range(60)]
        assert values[-1] < 0.97 * values[0], name


@pytest.mark.parametrize(
    ("name", "pair", "message"),
    [
        (
            "fsp",
            ("resnet8x4", "resnet8"),
            r"--model_s: --distill fsp needs equal channels .*16, 16, 32, 64.*32, 64, 128",
        ),
        ("fsp", ("vgg8", "resnet8"), "equal channels"),
        (
            "kdsvd",
            ("wrn_16_2", "resnet8"),
            r"--distill kdsvd needs equal channels .*16, 32, 64, the teacher 32, 64, 128",
        ),
        ("ofd", ("ShuffleV1", "resnet8"), "--model_t: --distill ofd reads its margins .* ShuffleNetV1 names none"),
    ],
)
def test_pairs_that_are_not_supported_are_explained(name, pair, message):
    with pytest.raises(UserError, match=message):
        build(name, pair)
    with pytest.raises(UserError, match=r"--model_s: .* 4 pixels high, the teacher's 12"):
        Connector([(2, 3, 4, 4)], [(2, 5, 12, 12)])


def test_published_defaults():
    defaults = {name: {flag.argument: flag.default for flag in DISTILLERS[name].flags} for name in NAMES}
    assert all(defaults[name]["init_epochs"] == 30 for name in ("abound", "factor", "fsp"))
    assert defaults["factor"]["init_learning_rate"] == 0.01 and defaults["ofd"]["beta"] == 0.001
    for name in ("abound", "factor", "fsp"):
        (init_epochs,) = (flag for flag in DISTILLERS[name].flags if flag.argument == "init_epochs")
        assert init_epochs.full_run == 240
