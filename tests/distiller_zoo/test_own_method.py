"""What an author of a method gets wrong: refused in one line, or named below the traceback."""

import importlib.util
import re
import sys

import pytest
import torch
from torch import nn

from distiller_zoo import DISTILLERS, Flag, Progress, Stage, build_distiller, check_stages, explained
from distiller_zoo.kd import FeatureDistiller
from errors import UserError
from helper import loops
from helper.command_line import resolve
from helper.settings import all_settings
from helper.teacher import FrozenTeacher
from models.backbone import Output
from setting import count, number
from tests.conftest import pair_networks
from tests.distiller_zoo.helpers import batch_of
from tests.stages import Shown, StageRun, few_images

OWN_WEIGHT = Flag(("--own_weight",), number, 1.0, "weight of a second term", is_weight=True)
CONFIG = {"distill": "mine", "batch_size": 4}
SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F
from distiller_zoo.kd import FeatureDistiller


class Mine(FeatureDistiller):
    name = "mine"
    reads = ("maps", "final", "pooled")

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        {made}

    def feature_loss(self, student, teacher, targets, index):
        return {loss}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A method that is written to a file, as authors do; returns what builds it around a pair."""

    def write(made: str = "pass", loss: str = "F.mse_loss(student.final, teacher.final)"):
        path = tmp_path / "mine.py"
        path.write_text(SOURCE.format(made=made, loss=loss))
        spec = importlib.util.spec_from_file_location("mine", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "mine", module)
        spec.loader.exec_module(module)
        monkeypatch.setitem(DISTILLERS, "mine", module.Mine)
        teacher, student = pair_networks("resnet14", "resnet8")
        return teacher, build_distiller(CONFIG, student, teacher, 10, 32, torch.arange(64) % 10)

    return write


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (
            {"reads": ("map",)},
            r"tests.*: reads of Mine names 'map'; did you mean maps\? \(known: maps, final, activated, ",
        ),
        ({"reads": "maps"}, r"reads of Mine is 'maps'; it must be a tuple"),
        ({"read": ("maps",)}, r"read of Mine is not known; did you mean reads\? Rename it"),
        ({"stage": lambda self, epochs: []}, "stage of Mine is not known; did you mean stages"),
        ({"min_batch": "2"}, "min_batch of Mine is '2'; it must be a int"),
        ({"refuses_mixing": True}, "refuses_mixing of Mine is True; it must be a str"),
        ({"flags": ("--power",)}, "flags of Mine holds '--power'; each must be a Flag"),
        ({"flags": (Flag(("--views",), count, 2, "views"),)}, "flags of Mine holds --views, a name of the contract"),
        (
            {"flags": (Flag(("--map-power",), number, 2.0, "power"),)},
            "flags of Mine holds --map-power; name it with let",
        ),
        ({"flags_work_if": {"kd_t": ()}}, "flags_work_if of Mine names 'kd_t'; did you mean kd_T"),
        ({"name": "MeanMap"}, "name of Mine is 'MeanMap'; it must be of lower-case letters"),
    ],
)
def test_what_a_class_declares_and_the_contract_does_not_know_is_refused(declared, message):
    with pytest.raises(UserError, match=message):
        type("Mine", (FeatureDistiller,), declared | {"__module__": __name__})


@pytest.mark.parametrize(
    ("flag", "whose"),
    [
        (Flag(("--mean",), number, 0.5, "what a run finds out of its images"), "every run"),
        (Flag(("--seed",), count, 1, "a flag of every run"), "every run"),
        (Flag(("--branches",), number, 0.5, "ONE's are counted"), "another method"),
        (Flag(("-w", "--branches"), count, 1, "ONE's have no short name"), "another method"),
    ],
)
def test_a_flag_that_would_be_taken_for_another_is_refused(flag, whose, monkeypatch):
    method = type("Mine", (FeatureDistiller,), {"name": "mine", "flags": (flag,), "__module__": __name__})
    monkeypatch.setitem(DISTILLERS, "mine", method)
    with pytest.raises(UserError, match=f"{flag.names[0]}.* of Mine is a setting of {whose}; rename it"):
        all_settings()


class Longer(FeatureDistiller):
    """A layer in front of the student's head, which the exported student lacks."""

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        self.layer = nn.Conv2d(64, 64, 1)

    def respond(self, images, teacher):
        maps, final = self.student.forward_maps(images)
        final = self.layer(final)
        return Output(maps, final, final, *self.student.classify(final))


class LongerInTraining(Longer):
    """The same, but the plain student predicts, as it is exported."""

    def predict(self, images):
        return self.student(images)


class Residual(Longer):
    """The layer is added, and changes nothing before it is trained."""

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def respond(self, images, teacher):
        maps, final = self.student.forward_maps(images)
        final = final + self.layer(final)
        return Output(maps, final, final, *self.student.classify(final))


@pytest.mark.usefixtures("few_images")
def test_what_is_shipped_is_what_is_tested(distil, monkeypatch):
    for bad in (Longer, Residual):
        monkeypatch.setitem(DISTILLERS, "mine", type("Mine", (bad,), {"name": "mine", "__module__": __name__}))
        with pytest.raises(UserError, match="export of Mine gives another network than predict tests; write export so"):
            distil("--epochs", "1", "-b", "0", distill="mine")
    method = type("Mine", (LongerInTraining,), {"name": "mine", "__module__": __name__})
    monkeypatch.setitem(DISTILLERS, "mine", method)
    distil("--epochs", "1", "-b", "0", distill="mine")


def test_parts_that_would_not_be_trained_are_refused(mine):
    with pytest.raises(UserError, match="mine: adapters of Mine is a list of modules, which are neither trained nor"):
        mine(made="self.adapters = [nn.Conv2d(1, 1, 1)]")
    with pytest.raises(UserError, match="frozen of Mine names 'conector'; did you mean connector\\?"):
        mine(made="self.connector, self.frozen = nn.Linear(1, 1), ('conector',)")
    _, method = mine(made="self.scale = nn.Parameter(torch.ones(10))")
    with pytest.raises(UserError, match="mine: scale of Mine is trained by no stage: stages train modules"):
        check_stages(method, method.stages(1))
    _, method = mine(
        made="self.adapter, self.scale = nn.Linear(1, 1), nn.ParameterList([nn.Parameter(torch.ones(10))])"
    )
    check_stages(method, method.stages(1))
    main = method.main_stage(1)
    with pytest.raises(
        UserError, match=r"mine: adapter.weight of Mine is trained by no stage: .* a stage's trained or"
    ):
        check_stages(method, [main._replace(trained=[method.student, method.scale])])
    method.frozen = ("adapter",)
    check_stages(method, method.stages(1))
    for trained in ([nn.Linear(1, 1)], method.student, []):
        with pytest.raises(UserError, match="mine: trained of stage first of Mine must be a list of modules that are"):
            check_stages(method, [Stage("first", 1, trained, method.losses, method.respond), method.main_stage(1)])


@pytest.mark.parametrize("made", ["mean = torch.zeros(3)", "_rows = [torch.zeros(3)]", "rows = {0: torch.zeros(3)}"])
def test_tensors_that_no_checkpoint_would_hold_are_refused(mine, made):
    with pytest.raises(
        UserError, match=r"mine: _?(mean|rows) of Mine holds a tensor, which is neither saved nor resumed"
    ):
        mine(made=f"self.{made}")
    mine(made="self.register_buffer('mean', torch.zeros(3))")


@pytest.mark.usefixtures("few_images")
def test_tensors_that_a_loss_makes_are_refused_when_they_would_be_saved(mine, distil):
    mine(loss="setattr(self, 'mean', teacher.pooled.mean(0)) or F.mse_loss(student.pooled.mean(0), self.mean)")
    with pytest.raises(UserError, match="mine: mean of Mine holds a tensor"):
        distil("--max_steps", "1", distill="mine")


@pytest.mark.parametrize(
    ("made", "error"),
    [("self.layer = missing", NameError), ("self.layer = nn.Linear(2, 'a')", TypeError), ("1 / 0", ZeroDivisionError)],
)
def test_an_error_in_a_constructor_says_where(mine, made, error):
    with pytest.raises(error) as caught:
        mine(made=made)
    assert re.fullmatch(r"in --distill mine: __init__, line 14 of .*mine\.py", caught.value.__notes__[0])


@pytest.mark.parametrize(
    ("loss", "error", "notes"),
    [
        (
            "F.mse_loss(student.maps[9], teacher.maps[0])",
            IndexError,
            [
                r"in --distill mine: feature_loss, line 17 of .*mine\.py",
                r".*student: 16x32x32, .*, final 64x8x8; teacher: .*",
            ],
        ),
        (
            "(student.maps[0] - teacher.final).mean()",
            RuntimeError,
            [r".*line 17 of .*", r".*student: .*; teacher: 16x.*"],
        ),
        (
            "(student.final - teacher.final).pow(2)",
            RuntimeError,
            [
                r"in --distill mine: its losses in epoch 1/1 \(.*mine\.py\)",
                "a loss must be one number: take its mean .*",
            ],
        ),
        ("'none'", TypeError, [r"in --distill mine: its losses in epoch 1/1 \(.*mine\.py\)"]),
    ],
)
def test_an_error_in_a_loss_says_where_and_what_the_networks_show(mine, loss, error, notes):
    teacher, method = mine(loss=loss)
    config = resolve({"distill": "ce", "model_s": "resnet8", "batch_size": 4, "epochs": 1})
    training = loops.Training(method.main_stage(1), method, few_images(10, 8), config, torch.device("cpu"))
    run = StageRun(training, Progress(0, 1), 0, None)
    run.begin_epoch()
    batch = next(training.loader.batches(1))
    with pytest.raises(error) as caught:
        loops.step([run], batch, Shown(FrozenTeacher(teacher)), 1)
    assert len(caught.value.__notes__) == len(notes)
    assert all(map(re.fullmatch, notes, caught.value.__notes__)), caught.value.__notes__


def test_unread_parameters_are_looked_for_where_a_weight_of_the_methods_own_is_0(mine, monkeypatch):
    monkeypatch.setattr(FeatureDistiller, "flags", (*FeatureDistiller.flags, OWN_WEIGHT))
    _, method = mine()
    assert loops._uses_all_weights(method)
    method.own_weight = 0.0
    assert not loops._uses_all_weights(method)
    with pytest.raises(RuntimeError) as caught, explained(type(method), "its losses", method.student, 32):
        raise RuntimeError("Expected to have finished reduction in the prior iteration before starting a new one.")
    assert "give the method uses_everything = False" in caught.value.__notes__[1]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "NoneType; return a dictionary"),
        (torch.zeros(()), "Tensor; return a dictionary"),
        ({"mine": 0.0}, "float for mine; return a tensor"),
    ],
)
def test_losses_without_names_or_tensors_are_refused(mine, monkeypatch, returned, message):
    teacher, method = mine()
    monkeypatch.setattr(type(method), "losses", lambda *arguments: returned)
    batch = batch_of(method)
    with pytest.raises(UserError, match=f"mine: losses of Mine returned a {message}"):
        method(batch, FrozenTeacher(teacher)(batch.images, False), Progress(0, 1))


def test_a_loss_of_maps_that_reads_does_not_name_is_not_computed_in_bfloat16(mine):
    teacher, method = mine()
    batch = batch_of(method)
    with torch.autocast("cpu", torch.bfloat16):
        shown = FrozenTeacher(teacher)(batch.images, False)
        _, losses = method(batch, shown, Progress(0, 1))
        assert all(value.dtype == torch.float32 for value in losses.values())
        method.reads = ("maps",)
        with pytest.raises(UserError, match="losses of Mine computed mine in bfloat16; name what it reads of"):
            method(batch, shown, Progress(0, 1))


def test_views_that_nobody_makes_are_refused(mine):
    _, method = mine()
    method.views = "rotation"
    config = resolve({"distill": "ce", "model_s": "resnet8", "batch_size": 4, "epochs": 1})
    with pytest.raises(UserError, match="mine: its views are 'rotation'; they must be one of plain, "):
        loops.Training(method.main_stage(1), method, few_images(10, 8), config, torch.device("cpu"))
