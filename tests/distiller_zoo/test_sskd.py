"""SSKD: the selection of rows, its heads."""

from argparse import ArgumentTypeError

import pytest
import torch

from distiller_zoo import DISTILLERS
from distiller_zoo.kd import kl_divergence
from distiller_zoo.sskd import select, selected_divergence, share, similarities, sources
from helper.command_line import resolve
from helper.loops import Training
from helper.recipes import recipe_of
from tests.check_values import STUDENT_LOGITS, TEACHER_LOGITS
from tests.distiller_zoo.helpers import (
    build_alone,
    close,
)
from tests.stages import few_images


def rows_of(ranks):
    """Rows of four classes in which the last class has these ranks."""
    return torch.tensor([[1.0 * (number < rank) for number in range(3)] + [0.5] for rank in ranks])


def test_rows_are_selected_by_the_rank_of_the_truth():
    rows, truth = rows_of([0, 2, 0, 1, 2, 3]), torch.full((6,), 3)
    for ratio, kept in ((0.0, [0, 2]), (0.25, [0, 2, 3]), (0.99, [0, 1, 2, 3, 4]), (1.0, [0, 1, 2, 3, 4, 5])):
        assert select(rows, truth, ratio).nonzero().flatten().tolist() == kept


def test_equal_ranks_are_kept_image_by_image():
    # Three views of four images, view by view; all of one rank: image 0 in its three views comes first, then image 1.
    rows, truth = rows_of([1] * 12), torch.full((12,), 3)
    for ratio, kept in ((0.25, [0, 4, 8]), (0.34, [0, 1, 4, 8]), (0.5, [0, 1, 4, 5, 8, 9])):
        assert select(rows, truth, ratio).nonzero().flatten().tolist() == kept


def test_the_divergence_of_selected_rows_is_theirs_alone_and_nothing_where_none_is_selected():
    selected = torch.tensor([False, True, False, True])
    student = STUDENT_LOGITS.clone().requires_grad_()
    loss = selected_divergence(student, TEACHER_LOGITS, selected, 4.0)
    close([loss.detach()], [float(kl_divergence(STUDENT_LOGITS[selected], TEACHER_LOGITS[selected], 4.0))])
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[selected].abs().sum(1).min() > 0 and gradient[~selected].abs().max() == 0
    nothing = selected_divergence(student, TEACHER_LOGITS, ~(selected | True), 4.0)
    nothing.backward()
    assert nothing.item() == 0 and student.grad.abs().max() == 0


def test_a_share_lies_between_0_and_1():
    assert [share(text) for text in ("0", "0.75", "1")] == [0, 0.75, 1]
    for text in ("1.01", "-0.1", "nan"):
        with pytest.raises(ArgumentTypeError, match="must be a number"):
            share(text)


def test_each_turned_image_finds_its_own():
    upright = torch.eye(5)
    rows = similarities(torch.cat([upright, 2 * upright, 3 * upright, upright]))
    assert torch.equal(rows.argmax(1), sources(rows)) and sources(rows).tolist() == [0, 1, 2, 3, 4] * 3


def test_sskd_trains_its_heads_one_after_the_other():
    method = build_alone("sskd", init_epochs=60)
    first, main = method.stages(240)
    assert (first.epochs, first.milestones, first.learning_rate) == (60, (30, 45), 0.05)
    assert build_alone("sskd", init_epochs=1).stages(240)[0].milestones == (1, 1)  # the first epoch has the full rate
    assert list(first.trained) == [method.teacher_head] and first.respond(None, None) is None
    assert method.teacher_head not in main.trained and method.student_head in main.trained


def test_the_first_stages_rate_falls_after_these_shares_of_it():
    first, *_ = build_alone("sskd", init_epochs=30, init_milestones=(1 / 3, 2 / 3)).stages(100)
    assert first.milestones == (10, 20)
    recipe = {argument: value for argument, (value, _) in recipe_of("imagenet", "resnet34", "resnet18", "sskd").items()}
    assert (recipe["init_epochs"], recipe["init_milestones"]) == (30, (1 / 3, 2 / 3))
    (flag,) = [flag for flag in DISTILLERS["sskd"].flags if flag.argument == "init_milestones"]
    assert flag.type("0.5,0.75") == (0.5, 0.75)
    with pytest.raises(ArgumentTypeError, match=r"shares of the stage|from 0 to 1"):
        flag.type("30,45")


def test_a_first_stage_has_its_own_rate_which_falls_to_a_tenth_whatever_the_runs_schedule():
    method, data = build_alone("sskd"), few_images(10)
    given = {"distill": "sskd", "model_s": "resnet8", "batch_size": 8, "lr_decay": "cos", "lr_warmup_epochs": 9}
    config = resolve(given | {"learning_rate": 0.3}, of_teacher={"model_t": "resnet14"})
    training = Training(method.stages(240)[0], method, data, config, torch.device("cpu"))
    rates = [training.learning_rate(epoch, 0) for epoch in (1, 30, 31, 45, 46, 60)]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])
