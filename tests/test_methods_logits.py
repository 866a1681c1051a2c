"""Methods that compare logits, and SSKD: check values, gradients, extreme inputs, flags."""

from argparse import ArgumentTypeError, Namespace

import pytest
import torch
from torch.nn import functional as F

from dataset import Augmentation, ImageData, Images
from distiller_zoo import DISTILLERS, Progress, Task
from distiller_zoo.dist import relation_losses
from distiller_zoo.dkd import decoupled_losses
from distiller_zoo.kd import kl_divergence, standardise
from distiller_zoo.mlkd import correlation_losses, unsure_shares
from distiller_zoo.sskd import select, selected_divergence, share, similarities, sources
from helper.fast import OFF
from helper.loops import Training
from helper.networks import FrozenTeacher
from models.backbone import Output
from tests.check_values import STUDENT_LOGITS, TARGETS, TEACHER_LOGITS, g
from tests.conftest import answer, pair_networks

LOGIT_LOSSES = {
    "kd": lambda s, t: kl_divergence(s, t, 4.0),
    "standardised kd": lambda s, t: kl_divergence(standardise(s), standardise(t), 2.0),
    "dkd": lambda s, t: sum(decoupled_losses(s, t, TARGETS, 4.0)),
    "dist": lambda s, t: sum(relation_losses(s, t, 1.0)),
    "mlkd": lambda s, t: sum(correlation_losses(s, t, 4.0)),
    "sskd": lambda s, t: selected_divergence(s, t, torch.tensor([True, False, True, True]), 4.0),
}


def close(ours, golden):
    assert [float(value) for value in ours] == pytest.approx(golden, rel=1e-9, abs=1e-10)


def test_check_values():
    logits = STUDENT_LOGITS, TEACHER_LOGITS
    close(decoupled_losses(*logits, TARGETS, 4.0), [0.1623148556, 2.5869784487])
    close(relation_losses(*logits, 1.0), [0.7942510521, 0.8946205901])
    close(relation_losses(*logits, 4.0), [14.2573050871, 15.5601571448])
    close(correlation_losses(*logits, 4.0), [0.0014464735, 0.0014229437])
    close([kl_divergence(*logits, 4.0)], [2.5535618153])
    close([kl_divergence(*map(standardise, logits), 2.0)], [0.7323762331])
    # The check vector lists the four views of an image together; here the views come one after the other.
    representations = g((12, 6), 0.7, 0.2).view(3, 4, 6).transpose(0, 1).reshape(12, 6)
    rows = similarities(representations)
    close([F.cross_entropy(rows, sources(rows))], [1.3682024717])


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_gradients_are_the_derivatives(name):
    student = STUDENT_LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: LOGIT_LOSSES[name](logits, TEACHER_LOGITS), student)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@pytest.mark.parametrize("gap", [500.0, 5000.0])
def test_large_gaps_constant_rows_and_doubled_rows_stay_finite(name, gap):
    far = torch.zeros(4, 10)
    far[:, 3] = gap
    for student, teacher in ((far, -far), (torch.zeros(4, 10), far), (far, torch.zeros(4, 10)), (far, far)):
        student = student.clone().requires_grad_()
        loss = LOGIT_LOSSES[name](student, teacher)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_the_two_parts_of_dkd_make_up_kd():
    """KD = TCKD + (1 - p_target of the teacher) * NCKD, equation 7 of the paper, for one image."""
    for row in range(4):
        logits = [each[row : row + 1] / 4 for each in (STUDENT_LOGITS, TEACHER_LOGITS)]
        target, others = decoupled_losses(*logits, TARGETS[row : row + 1], 1.0)
        others_share = 1 - logits[1].softmax(1)[0, TARGETS[row]]
        assert float(target + others_share * others) == pytest.approx(float(kl_divergence(*logits, 1.0)), rel=1e-12)


def test_logits_are_standardised_per_sample_by_the_unbiased_deviation():
    standard = standardise(STUDENT_LOGITS)
    assert standard.mean(1).tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    assert standard.square().sum(1).tolist() == pytest.approx([9.0] * 4, rel=1e-6)
    assert torch.equal(standardise(torch.full((2, 10), 3.0)), torch.zeros(2, 10))


def test_standardised_kd_is_the_papers_total():
    """Raw logits with the labels, standardised ones with the teacher."""
    method = build("kd", gamma=0.1, alpha=9.0, kd_T=2.0, logit_standardization=True)
    logits = STUDENT_LOGITS, TEACHER_LOGITS
    losses = method.losses(*(each_with(each) for each in logits), TARGETS, TARGETS, Progress(0, 240))
    close([losses["ce"], losses["kd"]], [0.1 * 2.5942054000, 9 * 0.7323762331])


def test_dkd_is_the_published_formula_where_that_is_defined():
    """Two-class distributions of probabilities, and the target removed by subtracting 1000."""
    student, teacher = (each.clone() / 4 for each in (STUDENT_LOGITS, TEACHER_LOGITS))
    truth = F.one_hot(TARGETS, 10).double()
    pairs = []
    for logits in (student, teacher):
        target = (logits.softmax(1) * truth).sum(1)
        pairs.append((torch.stack([target, 1 - target], 1), (logits - 1000 * truth).softmax(1).clamp_min(1e-300)))
    expected = [16 * F.kl_div(ours.log(), theirs, reduction="sum") / 4 for ours, theirs in zip(*pairs, strict=True)]
    close(decoupled_losses(STUDENT_LOGITS, TEACHER_LOGITS, TARGETS, 4.0), [float(value) for value in expected])


def test_the_terms_of_mlkd_are_its_formula():
    """Each view with its own logits at all temperatures; the shares on the weak view's terms."""
    temperatures = (4.0, 3.0, 5.0, 2.0, 6.0)
    method = build("mlkd", gamma=0.1, alpha=0.9, beta=0.7)
    assert method.mlkd_temperatures == temperatures
    student, teacher = (STUDENT_LOGITS, STUDENT_LOGITS.flip(1)), (TEACHER_LOGITS, TEACHER_LOGITS.roll(3, 1))
    losses = method.losses(*(each_with(torch.cat(each)) for each in (student, teacher)), TARGETS, TARGETS, None)
    weak, strong = (sum(kl_divergence(s, t, T) for T in temperatures) for s, t in zip(student, teacher, strict=True))
    class_level, batch_level = (
        sum(correlation_losses(student[0], teacher[0], T)[level] for T in temperatures) for level in (0, 1)
    )
    expected = {
        "ce": 0.1 * F.cross_entropy(student[0], TARGETS),
        "ce_strong": 0.1 * F.cross_entropy(student[1], TARGETS),
        "kd": 0.9 * 0.5 * weak,
        "kd_strong": 0.9 * strong,
        "class": 0.7 * 0.5 * class_level,
        "batch": 0.7 * 0.5 * batch_level,
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=1e-12), name


def test_the_shares_of_mlkd_are_of_what_the_teacher_is_at_most_median_sure_of():
    images, classes = unsure_shares(TEACHER_LOGITS)
    assert (float(images), float(classes)) == (0.5, 0.5)
    assert [float(share) for share in unsure_shares(torch.zeros(4, 10))] == [1.0, 1.0]
    one_sure = torch.zeros(4, 10)
    one_sure[2, 5] = 3.0
    assert [float(share) for share in unsure_shares(one_sure)] == pytest.approx([0.75, 0.9])


def test_rows_are_selected_by_the_rank_of_the_truth():
    rows = torch.tensor([[3.0, 1, 2], [3.0, 1, 2], [1.0, 2, 3], [1.0, 2, 3], [3.0, 2, 1]])
    truth = torch.tensor([0, 1, 2, 1, 2])  # ranks 0, 2, 0, 1, 2
    for ratio, kept in ((0.0, [0, 2]), (0.4, [0, 2, 3]), (0.99, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3, 4])):
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


def build(name: str, **hyper_parameters):
    teacher, student = pair_networks("resnet14", "resnet8")
    return DISTILLERS[name](student, teacher, Task(10, 32, 4, torch.arange(4)), **hyper_parameters)


def each_with(logits: torch.Tensor) -> Output:
    """An output of which the logits alone may be read."""
    return Output(None, None, None, None, logits)


def outputs(logits: torch.Tensor, width: int = 64) -> Output:
    return Output([], logits, logits, g((len(logits), width), 0.3, 0.1).float(), logits.float())


@pytest.mark.parametrize(
    ("name", "flag", "term", "value"),
    [
        ("kd", "alpha", "kd", 0.5),
        ("dkd", "dkd_alpha", "tckd", 1.0),
        ("dkd", "dkd_beta", "nckd", 1.0),
        ("dkd", "gamma", "ce", 1.0),
        ("dist", "beta", "inter", 1.0),
        ("dist", "beta", "intra", 1.0),
        ("mlkd", "alpha", "kd", 1.0),
        ("mlkd", "alpha", "kd_strong", 1.0),
        ("mlkd", "beta", "class", 1.0),
        ("mlkd", "beta", "batch", 1.0),
        ("mlkd", "gamma", "ce_strong", 1.0),
        ("sskd", "alpha", "kd", 1.0),
        ("sskd", "tf_weight", "tf", 1.0),
        ("sskd", "ss_weight", "ss", 1.0),
    ],
)
def test_a_weight_doubles_its_term_alone(name, flag, term, value):
    views = {"mlkd": 2, "sskd": 4}.get(name, 1)
    torch.manual_seed(0)
    method = build(name, **{flag: value})
    student, teacher = (
        outputs(torch.cat([logits * (1 + view / 8) for view in range(views)]))
        for logits in (STUDENT_LOGITS, TEACHER_LOGITS)
    )
    before = method.losses(student, teacher, TARGETS, TARGETS, Progress(239, 240))
    setattr(method, flag, 2 * value)
    after = method.losses(student, teacher, TARGETS, TARGETS, Progress(239, 240))
    for key in before:
        shared = name in ("mlkd", "dist") and getattr(method, flag) and key != term  # one flag, several terms
        if key == term:
            assert after[key].item() == pytest.approx(2 * before[key].item(), rel=1e-5) and before[key] > 0
        elif not shared:
            assert after[key] == before[key]


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "mlkd", "sskd"])
def test_standardised_logits_do_not_feel_scale_and_shift(name):
    views = {"mlkd": 2, "sskd": 4}.get(name, 1)
    kd = {"alpha": 1.0} if name in ("kd", "mlkd", "sskd") else {}
    student, teacher = (torch.cat([logits] * views) for logits in (STUDENT_LOGITS, TEACHER_LOGITS))
    for standardised, same in ((True, True), (False, False)):
        torch.manual_seed(0)
        method = build(name, gamma=0.0, logit_standardization=standardised, **kd)
        arguments = (TARGETS, TARGETS, Progress(239, 240))
        plain = method.losses(outputs(student), outputs(teacher), *arguments)
        scaled = method.losses(outputs(3 * student + 7), outputs(teacher), *arguments)
        changed = [key for key in plain if scaled[key].item() != pytest.approx(plain[key].item(), rel=1e-4)]
        assert (not changed) is same, changed


def test_the_weight_of_dkd_rises_over_its_first_epochs():
    method = build("dkd", warmup_epochs=4)
    arguments = (outputs(STUDENT_LOGITS), outputs(TEACHER_LOGITS), TARGETS, TARGETS)
    values = [float(method.losses(*arguments, Progress(epoch, 240))["nckd"]) for epoch in range(6)]
    full = values[-1]
    assert [value / full for value in values] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    method.warmup_epochs = 0
    assert float(method.losses(*arguments, Progress(0, 240))["nckd"]) == full


def test_sskd_trains_its_heads_one_after_the_other():
    method = build("sskd", init_epochs=60)
    first, main = method.stages(240)
    assert (first.epochs, first.milestones, first.learning_rate) == (60, (30, 45), 0.05)
    assert build("sskd", init_epochs=1).stages(240)[0].milestones == (1, 1)  # the first epoch has the full rate
    assert list(first.trained) == [method.teacher_head] and first.respond(None, None) is None
    assert method.teacher_head not in main.trained and method.student_head in main.trained


@pytest.mark.parametrize("name", ["kd", "dkd", "mlkd"])
def test_one_image_is_enough(name):
    method = build(name, **({"alpha": 1.0} if name != "dkd" else {}))
    rows = 2 if name == "mlkd" else 1
    student, teacher = (logits[:rows].clone() for logits in (STUDENT_LOGITS, TEACHER_LOGITS))
    losses = method.losses(
        each_with(student.requires_grad_()), each_with(teacher), TARGETS[:1], TARGETS[:1], Progress(0, 1)
    )
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values()) and torch.isfinite(student.grad).all()


def digits_like() -> ImageData:
    images = Images(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8))
    return ImageData("fake", images, images, list("abcdefghij"), (0.5,) * 3, (0.25,) * 3, Augmentation())


@pytest.mark.parametrize("pair", [("resnet14", "resnet8"), ("vgg13", "vgg8"), ("wrn_16_2", "ShuffleV2")])
@pytest.mark.parametrize("name", ["dkd", "dist", "mlkd", "sskd"])
def test_what_a_stage_trains_gets_gradients_and_nothing_else_does(name, pair):
    teacher, student = pair_networks(*pair)
    data = digits_like()
    method = DISTILLERS[name](student, teacher, Task(10, 32, 4, data.train.targets))
    config = Namespace(
        **OFF, batch_size=4, learning_rate=0.01, lr_decay="step", lr_decay_epochs=(1,), seed=0, data_seed=0
    )
    vars(config).update(lr_decay_rate=0.1, momentum=0.9, weight_decay=5e-4, print_freq=9, distill=name, accumulate=1)
    for stage in method.stages(240):
        method.zero_grad(set_to_none=True)
        training = Training(stage, method, data, config, torch.device("cpu"))
        for epoch in range(2):
            means, _ = answer(training.train_epoch(Progress(epoch, 240), epoch, None, print), FrozenTeacher(teacher))
        trained = {id(parameter) for module in stage.trained for parameter in module.parameters()}
        for key, parameter in method.named_parameters():
            if id(parameter) in trained:
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
            else:
                assert parameter.grad is None, key
        assert all(value == value for value in means.values())
    assert all(parameter.grad is None for parameter in teacher.parameters())
