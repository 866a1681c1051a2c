"""Every flag of every method does what it says: weights scale their terms, everything else changes the training."""

import collections
import functools
import itertools

import pytest
import torch

from dataset import Batch
from distiller_zoo import DISTILLERS, Progress, Task
from distiller_zoo.base import NOTHING_TO_TRAIN
from errors import UserError
from helper.loops import _uses_all_weights, set_modes
from helper.teacher import FrozenTeacher
from setting import Setting, positive
from tests.conftest import pair_networks
from tests.distiller_zoo.helpers import train_step

CLASSES, BATCH, SIZE = 10, 4, 16
#: A student with a BatchNorm and a ReLU in its head, and a teacher of equal widths: every flag has something to act on.
PAIR = ("wrn_16_1", "wrn_16_1")
#: Settings that choose how the same numbers are computed, or that only act on other pairs.
SAME_NUMBERS = {"ft_form", "larger_student", "map_size"}
#: A weight scales its terms exactly; these are weights that are not called so because 0 is refused or means nothing.
WEIGHTS = {
    "crd_weight",
    "kd_weight",
    "dkd_alpha",
    "dkd_beta",
    "tf_weight",
    "ss_weight",
    "distance_weight",
    "angle_weight",
}
EVERY_FLAG = [(name, flag) for name, method in DISTILLERS.items() for flag in method.flags]


def other_value(flag: Setting):
    """A legal value that is not the default."""
    special = {"beta1": 0.25, "mlkd_temperatures": (2.0, 5.0), "hint_layer": 1, "branches": 2, "ratio_tf": 0.25}
    special |= {"ratio_ss": 0.25, "nce_m": 0.9, "kd_T": 2.0, "translator_bn": "none", "review_width": 8}
    special |= {"init_milestones": (0.25, 0.5)}
    if flag.argument in special:
        return special[flag.argument]
    if flag.choices:
        return next(choice for choice in flag.choices if choice not in (flag.default, "none"))
    if flag.type is bool:
        return not flag.default
    return 2 * flag.default or 0.5


def build(name: str, **flags):
    """The method with seeded weights on a pair of networks, and its teacher."""
    torch.manual_seed(0)
    teacher, student = pair_networks(*PAIR, CLASSES)
    for network in (teacher, student):  # as sure of themselves as trained networks are
        network.get_classifier().weight.data.mul_(20)
        for module in network.modules():  # a map before its BatchNorm and behind it differ
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.fill_(0.05)
    small = {"nce_k": 16} if any(flag.argument == "nce_k" for flag in DISTILLERS[name].flags) else {}
    task = Task(CLASSES, SIZE, BATCH, torch.arange(64) % CLASSES)
    method = DISTILLERS[name](student, teacher if DISTILLERS[name].reads_teacher else None, task, **(small | flags))
    return method, FrozenTeacher(teacher)


def batch_for(method) -> Batch:
    torch.manual_seed(1)
    views = {"plain": 1, "rotations": 4, "weak_strong": 2}[method.views]
    images = torch.randn(views * BATCH, 3, SIZE, SIZE)
    return Batch(images, torch.arange(BATCH), torch.arange(BATCH))


def train(name: str, flags: dict) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The named losses of two steps of every stage, the main one's last, and the method's state behind them."""
    method, teacher = build(name, **flags)
    batch, losses = batch_for(method), []
    output = teacher(batch.images, method.teacher_preact)
    for stage in method.stages(240):
        set_modes(stage, method)
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, 1e-3, 0.9)
        torch.manual_seed(2)
        for epoch in (2, 30):
            given = output if stage.reads_teacher else None
            step, _ = train_step(method, stage, optimizer, batch, given, Progress(epoch, 240))
            losses.append({key: float(value.detach()) for key, value in step.items()})
    return losses, method.state_dict()


@functools.cache
def train_with_all_terms(name: str):
    """`train` with a weight of 1 on every term."""
    return train(name, ones(name))


def ones(name: str) -> dict[str, float]:
    return {flag.argument: 1.0 for flag in DISTILLERS[name].flags if is_weight(flag)}


def stages_of(name: str, flags: dict) -> list[tuple]:
    method, _ = build(name, **flags)
    return [(stage.name, stage.epochs, stage.learning_rate, stage.milestones) for stage in method.stages(240)]


def is_weight(flag: Setting) -> bool:
    return flag.argument in WEIGHTS or (flag.is_weight and flag.argument != "beta1")


def close(one: dict[str, float], other: dict[str, float]) -> bool:
    return one.keys() == other.keys() and all(one[key] == pytest.approx(other[key], rel=1e-4) for key in one)


@pytest.mark.parametrize(
    ("name", "flag"), [(name, flag) for name, flag in EVERY_FLAG if is_weight(flag)], ids=lambda value: str(value)[:24]
)
def test_a_weight_scales_its_terms_and_no_other(name, flag):
    once, twice = train_with_all_terms(name)[0][-2], train(name, ones(name) | {flag.argument: 2.0})[0][-2]
    assert once.keys() == twice.keys()
    moved = [key for key in once if twice[key] != pytest.approx(once[key], rel=1e-5, abs=1e-9)]
    assert moved, "a larger weight makes a larger loss"
    for key in moved:
        # A term that two weights share, like RKD's distances and angles, moves by its own part.
        assert once[key] < twice[key] <= 2 * once[key] * (1 + 1e-4), key


@pytest.mark.parametrize("name", DISTILLERS)
def test_a_term_without_weight_is_left_out_and_a_run_without_terms_refused(name):
    """Of every choice of weights that are 0, with that of the logits."""
    argument = {flag.argument: flag for flag in DISTILLERS[name].flags}
    weights = [one for one in (*ones(name), *({"beta1"} & set(argument))) if argument[one].type is not positive]
    others = [one for one in weights if one != "alpha"]
    for kept in itertools.chain.from_iterable(itertools.combinations(others, n) for n in range(len(others) + 1)):
        values = dict.fromkeys(weights, 0.0) | dict.fromkeys(kept, 1.0)
        try:
            method, teacher = build(name, **values)
        except UserError as error:
            assert str(error) == NOTHING_TO_TRAIN
            continue
        *first, main = method.stages(240)
        assert kept or not first, "refused at once"
        set_modes(main, method)
        batch = batch_for(method)
        _, losses = method(batch, teacher(batch.images, method.teacher_preact), Progress(30, 240))
        assert all(value.item() for value in losses.values()), f"{losses} of {values}"
        assert kept or not losses, losses
        if losses:  # several processes wait for every gradient unless they look for those that are not there
            torch.stack([*losses.values()]).sum().backward()
            unused = [key for key, one in method.named_parameters() if one.requires_grad and one.grad is None]
            assert not unused or not (method.uses_everything and _uses_all_weights(method)), f"{unused} of {values}"


@pytest.mark.parametrize("name", [name for name, flag in EVERY_FLAG if flag.argument == "gamma"])
def test_with_the_weight_of_the_labels_alone_nothing_is_computed_of_the_teacher(name):
    weights = {flag: 0.0 for flag in ones(name) if flag != "kd_weight"}
    method, _ = build(name, **weights | {"gamma": 1.0})
    set_modes(method.main_stage(240), method)
    _, losses = method(batch_for(method), None, Progress(30, 240))
    assert losses and all(key.startswith("ce") for key in losses)


@pytest.mark.parametrize(
    ("name", "flag"),
    [(name, flag) for name, flag in EVERY_FLAG if not is_weight(flag)],
    ids=lambda value: str(value)[:24],
)
def test_a_flag_changes_the_training(name, flag):
    changed = ones(name) | {flag.argument: other_value(flag)}
    if flag.argument.startswith("init_"):
        assert stages_of(name, ones(name)) != stages_of(name, changed)
        return
    (losses, state), (other_losses, other_state) = train_with_all_terms(name), train(name, changed)
    same = state.keys() == other_state.keys() and all(map(close, losses, other_losses))
    expected = flag.argument in SAME_NUMBERS and (name, flag.argument) != (
        "semckd",
        "map_size",
    )  # it compares all pairs
    assert same == expected, f"{flag.names[-1]}: {losses} {other_losses}"


def outcome(name: str, flags: dict) -> tuple[list, list[dict[str, float]], dict[str, list]]:
    """The stages, the losses of `train` and the student behind it."""
    losses, state = train(name, flags)
    return stages_of(name, flags), losses, {k: v.tolist() for k, v in state.items() if k.startswith("student.")}


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", [name for name, method in DISTILLERS.items() if method.flags_work_if])
def test_flags_whose_condition_does_not_hold_change_nothing(name):
    """So that runs which differ in them are one row of a table."""
    known, unused = {flag.argument: flag for flag in DISTILLERS[name].flags}, collections.defaultdict(dict)
    for argument, conditions in DISTILLERS[name].flags_work_if.items():
        for condition in conditions:
            deciding = [each.argument for each in condition.flags]
            for values in itertools.product(*(known[each].choices or (0.0,) for each in deciding)):
                if not condition.holds(*values):
                    unused[(*zip(deciding, values, strict=True),)][argument] = other_value(known[argument])
    for deciding, changed in unused.items():
        given = ones(name) | dict(deciding)
        assert outcome(name, given) == outcome(name, given | changed), (given, changed)
