"""VID: keys, starting points, gradients of what is trained."""

import pytest
import torch
from torch.nn import functional as F

from distiller_zoo.correlation import LinearEmbed
from distiller_zoo.hint import ConvReg, HintLoss
from distiller_zoo.vid import VIDLoss


def test_the_gradients_of_the_modules_are_those_of_the_loss():
    vid_loss, regressor = VIDLoss(2, 3, 3).double(), ConvReg((2, 2, 4, 4), (2, 3, 4, 4)).double()
    student, teacher = torch.randn(2, 2, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    for function, module in (
        (lambda: vid_loss(student, teacher), vid_loss),
        (lambda: HintLoss()(regressor(student), teacher), regressor),
    ):
        assert torch.autograd.gradcheck(lambda *_, function=function: function(), tuple(module.parameters()))


def test_the_modules_have_repdistillers_keys_and_starting_points():
    vid_loss = VIDLoss(4, 5, 6)
    names = ["log_scale", *(f"regressor.{k}.weight" for k in (0, 2, 4))]
    assert sorted(vid_loss.state_dict()) == sorted(names)
    assert [tuple(p.shape) for p in vid_loss.regressor.parameters()] == [(5, 4, 1, 1), (5, 5, 1, 1), (6, 5, 1, 1)]
    assert torch.allclose(vid_loss.log_scale, torch.full((6,), 4.99323))
    assert F.softplus(vid_loss.log_scale[0]).item() + 1e-5 == pytest.approx(5)
    embed = LinearEmbed(12, 7)
    assert list(embed.state_dict()) == ["linear.weight", "linear.bias"]
    assert embed(torch.randn(3, 3, 2, 2)).shape == (3, 7) and LinearEmbed().linear.weight.shape == (128, 1024)
