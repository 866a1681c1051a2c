"""What holds for every method: what its stages train, its weights, odd batches, precision, two classes, flags."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller_zoo import DISTILLERS, Distiller, Progress, check_stages, check_state, refuse_without_effect
from distiller_zoo.contract import RENAMED
from errors import UserError
from helper.loops import set_modes
from models.backbone import Output
from setting import LARGEST
from tests.conftest import pair_networks, slow_but
from tests.distiller_zoo.helpers import FAULTS, PROGRESS, TASK, batch_of, build, take_steps

PAIRS = (("resnet14", "resnet8"), ("wrn_40_1", "wrn_16_1"), ("vgg13", "vgg8"))
#: Weights, and the terms that each of them multiplies, where these are not the method's name.
WEIGHTS = ("gamma", "alpha", "beta", "dkd_alpha", "dkd_beta", "tf_weight", "ss_weight", "crd_weight")
TERMS = {
    "gamma": {"ce", "ce_strong", "ce_ensemble"},
    "alpha": {"kd", "kd_strong"},
    "dkd_alpha": {"tckd"},
    "dkd_beta": {"nckd"},
    "tf_weight": {"tf"},
    "ss_weight": {"ss"},
    "crd_weight": {"crd"},
}
OF_BETA = {"dist": {"inter", "intra"}, "mlkd": {"class", "batch"}, "norm_crd": {"norm"}}


def whole(name: str, **others):
    """Every weight of a method that may be 0 set to 1, so that all of its terms are there."""
    arguments = {flag.argument for flag in DISTILLERS[name].flags}
    weights = {argument: 1.0 for argument in WEIGHTS if argument in arguments}
    return build(name, **weights, **others)


def terms_of(name: str, method, teacher, batch, progress=PROGRESS) -> dict[str, torch.Tensor]:
    shown = teacher(batch.images, method.teacher_preact) if method.reads_teacher else None
    return method(batch, shown, progress)[1]


@pytest.mark.parametrize("name", DISTILLERS)
@pytest.mark.parametrize("pair", slow_but(PAIRS, PAIRS[0]), ids="->".join)
def test_every_stage_trains_what_it_says_and_nothing_else(name, pair):
    teacher, method = whole(name, pair=pair)
    known = copy.deepcopy(teacher.state_dict())
    check_stages(method, method.stages(240))
    for stage in method.stages(240):
        before = copy.deepcopy(method.state_dict())
        losses, _ = take_steps(method, teacher, [batch_of(method) for _ in range(2)], stage, lr=1e-4)
        assert losses and all(torch.isfinite(value) for value in losses.values())
        trained = {id(parameter) for module in stage.trained for parameter in module.parameters()}
        in_training = {id(each) for module in stage.trained for each in module.modules()}
        for key, parameter in method.named_parameters():
            if id(parameter) not in trained or not parameter.requires_grad:
                assert torch.equal(parameter, before[key]) and parameter.grad is None, (stage.name, key)
            elif method.uses_everything:
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), (stage.name, key)
        for prefix, module in method.named_modules():
            if isinstance(module, nn.BatchNorm2d) and id(module) not in in_training:
                assert torch.equal(module.running_mean, before[f"{prefix}.running_mean"]), (stage.name, prefix)
        method.zero_grad(set_to_none=True)
    check_state(method)
    assert all(torch.equal(value, known[key]) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(key.startswith("teacher.") for key in method.state_dict())


@pytest.mark.parametrize("name", DISTILLERS)
def test_each_weight_scales_its_own_terms(name):
    teacher, method = whole(name)
    set_modes(method.main_stage(240), method)
    batch = batch_of(method)

    def terms():
        torch.manual_seed(0)
        twin = copy.deepcopy(method)  # a pass moves statistics and memories
        return {key: value.item() for key, value in terms_of(name, twin, teacher, batch).items()}

    once = terms()
    for weight in WEIGHTS:
        own = OF_BETA.get(name, {name}) if weight == "beta" else TERMS[weight]
        if not hasattr(method, weight) or not own & set(once):
            continue
        setattr(method, weight, 2.0)
        twice = terms()
        setattr(method, weight, 1.0)
        for key, value in once.items():
            assert twice[key] == pytest.approx((2 if key in own else 1) * value, rel=1e-4), (weight, key)


@pytest.mark.parametrize("name", DISTILLERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_degenerate_batches_have_finite_losses_and_gradients(name, fault):
    size = 2 if fault == "two" else 4
    teacher, method = whole(name, batch_size=size)
    batch = batch_of(method, size)
    if fault == "duplicates":
        batch = batch._replace(images=batch.images[:1].expand_as(batch.images).clone())
    for stage in method.stages(240):
        set_modes(stage, method)
        shown = teacher(batch.images, method.teacher_preact) if method.reads_teacher else None
        sides = [stage.respond(batch.images, shown), shown]
        if fault == "zeros":
            sides = [blank(each) for each in sides]
        if fault == "gaps":
            sides = [far(each, sign) for each, sign in zip(sides, (1, -1), strict=True)]
        losses = stage.losses(*sides, batch.targets, batch.index, PROGRESS)
        method.zero_grad()
        sum(losses.values()).backward()
        assert all(torch.isfinite(value) for value in losses.values()), stage.name
        gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients), stage.name


def blank(output):
    """The same output with nothing but zeros in it; None stays."""
    if output is None:
        return None
    zero = {
        name: [each * 0 for each in value] if isinstance(value, list) else value * 0
        for name, value in output._asdict().items()
        if value is not None
    }
    return output._replace(**zero)


def far(output, sign: int):
    """The same output with logits that are 500 away from each other; None stays."""
    if output is None:
        return None
    rows, classes = output.logits.shape
    return output._replace(logits=output.logits + sign * 500.0 * F.one_hot(torch.arange(rows) % classes, classes))


@pytest.mark.parametrize("name", DISTILLERS)
def test_losses_are_float32_where_the_networks_are_not(name):
    teacher, method = whole(name)
    batch = batch_of(method)
    for stage in method.stages(240):
        set_modes(stage, method)
        with torch.autocast("cpu", torch.bfloat16):
            shown = teacher(batch.images, method.teacher_preact) if method.reads_teacher else None
            _, losses = method(batch, shown, PROGRESS, stage)
        sum(losses.values()).backward()
        assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())


@pytest.mark.parametrize("name", [name for name, method in DISTILLERS.items() if method.ships == "student"])
def test_what_is_shipped_is_the_student_alone(name):
    _, method = build(name)
    assert method.export().state_dict().keys() == pair_networks("resnet14", "resnet8")[1].state_dict().keys()
    assert method.export_note() == ""


@pytest.mark.parametrize("name", [name for name, method in DISTILLERS.items() if method.min_batch == 2])
def test_one_image_is_refused_where_a_method_compares_images(name):
    with pytest.raises(UserError, match=r"--batch_size: .* at least 2"):
        build(name, batch_size=1)


@pytest.mark.parametrize("name", [name for name, method in DISTILLERS.items() if method.min_batch == 1])
def test_one_image_is_enough_elsewhere(name):
    teacher, method = whole(name, batch_size=1)
    losses, _ = take_steps(method, teacher, [batch_of(method, 1)])
    assert all(torch.isfinite(value) for value in losses.values())


# --- two classes ------------------------------------------------------------------------------------------------------


def with_two_classes(name: str, **flags):
    teacher, student = pair_networks("resnet14", "resnet8", num_classes=2)
    if "nce_k" in {flag.argument for flag in DISTILLERS[name].flags}:
        flags["nce_k"] = 4
    task = TASK._replace(num_classes=2, train_targets=torch.arange(64) % 2)
    return teacher, DISTILLERS[name](student, teacher, task, **flags)


@pytest.mark.parametrize(
    "name", [name for name in DISTILLERS if "ceta" in {f.argument for f in DISTILLERS[name].flags}]
)
def test_norms_logits_are_raw_with_two_classes_and_a_note_says_so(name):
    _, method = with_two_classes(name, ceta=2.5)
    (note,) = method.notes()
    assert "-c/--ceta 2.5 is off" in note and "two classes" in note
    logits = torch.randn(4, 2, requires_grad=True)
    targets = torch.tensor([0, 1, 1, 0])
    shown = method.respond(torch.randn(4, 3, 32, 32), None)._replace(logits=logits, norm_loss=logits.sum() * 0)
    teacher = Output([], None, None, torch.randn(4, 64), torch.randn(4, 2))
    losses = method.losses(shown, teacher, targets, torch.arange(4), Progress(0, 240))
    assert losses["ce"].item() == pytest.approx(method.gamma * F.cross_entropy(logits, targets).item())
    losses["ce"].backward()
    assert logits.grad.abs().min() > 1e-3
    assert build(name, ceta=2.5)[1].notes() == [] and with_two_classes(name, ceta=0.0)[1].notes() == []


STANDARDISING = [n for n in DISTILLERS if "logit_standardization" in {flag.argument for flag in DISTILLERS[n].flags}]


@pytest.mark.parametrize("name", STANDARDISING)
def test_logits_are_not_standardised_with_two_classes_and_a_note_says_so(name):
    _, method = with_two_classes(name, logit_standardization=True)
    assert any("--logit_standardization is off" in note for note in method.notes())
    student, teacher = (Output([], None, None, None, torch.randn(4, 2)) for _ in "st")
    assert all(
        torch.equal(compared, given.logits)
        for compared, given in zip(method.compared_logits(student, teacher), (student, teacher), strict=True)
    )
    assert not any("standardization" in note for note in build(name, logit_standardization=True)[1].notes())


def test_dist_has_no_inter_term_with_two_classes():
    _, method = with_two_classes("dist")
    shown = [Output([], None, None, None, torch.randn(4, 2)) for _ in "st"]
    assert set(method.losses(*shown, torch.tensor([0, 1, 1, 0]), None, PROGRESS)) == {"ce", "intra"}
    assert any("inter term is off" in note for note in method.notes())


# --- flags without effect ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "values", "message"),
    [
        ("kd", {"kd_T": 2.0}, {"alpha": 0.0}, r"--kd_T: has no effect on --distill kd with -a/--alpha 0.0; .* above 0"),
        ("kd", {"logit_standardization": True}, {"alpha": 0.0}, "--logit_standardization: has no effect"),
        ("norm", {"kd_T": 2.0}, {"alpha": 0.0}, "--kd_T: has no effect"),
        ("reviewkd", {"warmup_epochs": 5}, {"beta": 0.0}, "--warmup_epochs: has no effect"),
        ("distpro", {"kd_weight": 2.0}, {"distpro_style": "softmax"}, "--distpro_style scaled or constant"),
        ("distpro", {"init_epochs": 5}, {"distpro_style": "constant"}, "--init_epochs: has no effect"),
        ("dist", {"kd_T": 2.0}, {"beta": 0.0}, "--kd_T: has no effect"),
        ("sskd", {"ss_T": 2.0}, {"ss_weight": 0.0}, "--ss_T: has no effect"),
        ("norm_crd", {"nce_k": 5}, {"crd_weight": 0.0}, "--nce_k: has no effect"),
    ],
)
def test_a_flag_without_effect_is_refused(name, given, values, message):
    method = DISTILLERS[name]
    defaults = {flag.argument: flag.default for flag in method.flags} | {"alpha": 0.5}
    refuse_without_effect(method, defaults | given, given)
    with pytest.raises(UserError, match=message):
        refuse_without_effect(method, defaults | given | values, given)
    refuse_without_effect(method, defaults | given | values, {})  # a default is no flag that was given


@pytest.mark.parametrize("name", DISTILLERS)
def test_conditions_name_flags_of_the_method_and_hold_at_its_weights(name):
    method = DISTILLERS[name]
    arguments = {flag.argument for flag in method.flags}
    assert set(method.flags_work_if) <= arguments
    largest = {flag.argument: LARGEST if flag.argument in WEIGHTS else flag.default for flag in method.flags}
    for conditions in method.flags_work_if.values():
        for condition in conditions:
            assert {flag.argument for flag in condition.flags} <= arguments
            assert condition.holds(*(largest[flag.argument] for flag in condition.flags)), condition.remedy


@pytest.mark.parametrize("old", RENAMED)
def test_a_name_of_an_earlier_contract_is_refused_with_todays(old):
    """Under it nothing would read what is set."""
    with pytest.raises(UserError, match=rf"{old} of Mine is called {RENAMED[old]} now"):
        type("Mine", (Distiller,), {old: True})
    assert hasattr(Distiller, RENAMED[old]) and not hasattr(Distiller, old)
