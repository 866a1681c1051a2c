"""The optimizer's state in a checkpoint: what an optimizer has written is taken, anything else refused."""

import pytest
import torch

from helper.checkpoint import check_optimizer


def stepped(optimizer):
    """The parameters of an optimizer and its state after a step."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return parameters, optimizer.state_dict()


def make_parameters():
    return [torch.ones(3, 2, requires_grad=True), torch.ones(2, requires_grad=True)]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_what_an_optimizer_has_written_is_taken(make):
    momentum = {} if make is torch.optim.AdamW else {"momentum": 0.9}
    parameters, state = stepped(make(make_parameters(), 0.1, **momentum))
    assert check_optimizer(state, parameters).keys() == {0, 1}


@pytest.mark.parametrize(
    "wrong", [True, 5, 0.5, "x", [1.0], torch.tensor(1.0), torch.ones(2, 3), torch.full((3, 2), torch.inf)]
)
def test_a_buffer_that_is_none_of_the_parameters_is_refused(wrong):
    parameters, state = stepped(torch.optim.SGD(make_parameters(), 0.1, momentum=0.9))
    state["state"][0]["momentum_buffer"] = wrong
    with pytest.raises(ValueError, match="momentum_buffer of parameter 0"):
        check_optimizer(state, parameters)
