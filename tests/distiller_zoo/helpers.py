"""What the tests of the methods share: networks of a pair, a frozen teacher, steps of a stage."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from dataset import VIEWS, Batch
from distiller_zoo import DISTILLERS, Distiller, Progress, Stage, Task
from distiller_zoo.distpro import DistPro
from helper.loops import set_modes
from models.backbone import Backbone, Output
from tests.check_values import g
from tests.conftest import make_batch, pair_networks

TASK = Task(10, 32, 4, torch.arange(64) % 10)
PROGRESS = Progress(120, 240)
PAIR = ("resnet14", "resnet8")
FAULTS = ("zeros", "duplicates", "gaps", "two")


class FrozenTeacher:
    """A teacher in eval mode, called with images and whether maps are wanted before their ReLU."""

    def __init__(self, network: Backbone):
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor, preact: bool = False) -> Output:
        return self.network.outputs(images, preact)

    def double(self) -> "FrozenTeacher":
        self.network.double()
        return self

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.network.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.network.state_dict()


def build(name: str, pair=PAIR, batch_size: int = 4, **hyper_parameters) -> tuple[FrozenTeacher, Distiller]:
    """A teacher and the method around a fresh student of ten classes; few negatives for contrast."""
    teacher, student = pair_networks(*pair)
    if "nce_k" in {flag.argument for flag in DISTILLERS[name].flags}:
        hyper_parameters = {"nce_k": 8} | hyper_parameters
    method = DISTILLERS[name](student, teacher, TASK._replace(batch_size=batch_size), **hyper_parameters)
    return FrozenTeacher(teacher), method


def batch_of(method: Distiller, n: int = 4) -> Batch:
    """Random images in the views of the method, view by view."""
    views, _ = VIEWS[method.views]
    batch = make_batch(n)
    return batch._replace(images=torch.randn(views * n, 3, 32, 32))


def train_step(method, stage, optimizer, batch, teacher_output, progress) -> tuple[dict[str, Tensor], Tensor | None]:
    """One step -> (named weighted losses, student's logits)."""
    optimizer.zero_grad(set_to_none=True)
    logits, losses = method(batch, teacher_output, progress, stage)
    sum(losses.values()).backward()
    optimizer.step()
    return losses, logits


def take_steps(
    method: Distiller, teacher: FrozenTeacher, batches: Iterable[Batch], stage: Stage | None = None, lr=0.01
):
    """Steps of a stage, or of the main one; returns the losses of the last, and the stage."""
    stage = stage or method.main_stage(240)
    set_modes(stage, method)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for batch in batches:
        teacher_output = teacher(batch.images, method.teacher_preact) if stage.reads_teacher else None
        losses, _ = train_step(method, stage, optimizer, batch, teacher_output, PROGRESS)
    return losses, stage


def outputs(maps, pooled, logits=None, activated=None) -> Output:
    """What a network would show that has these outputs."""
    return Output(maps, maps[-1], maps[-1] if activated is None else activated, pooled, logits)


def random_maps(*shapes, scale: float = 1.0) -> list[Tensor]:
    return [scale * torch.randn(shape, dtype=torch.float64) for shape in shapes]


def doubles(*shapes) -> list[Tensor]:
    """Random tensors whose gradients are to be checked."""
    return [each.requires_grad_() for each in random_maps(*shapes)]


def each_with(logits: Tensor) -> Output:
    """An output of which the logits alone may be read."""
    return Output(None, None, None, None, logits)


def build_alone(name: str, **hyper_parameters) -> Distiller:
    """The method without its teacher, for batches of four."""
    teacher, student = pair_networks(*PAIR)
    return DISTILLERS[name](student, teacher, Task(10, 32, 4, torch.arange(4)), **hyper_parameters)


def logit_outputs(logits: Tensor, width: int = 64) -> Output:
    """An output of logits (B, K) and some pooled vectors."""
    return Output([], logits, logits, g((len(logits), width), 0.3, 0.1).float(), logits.float())


def value_and_gradient(loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """A loss of one tensor of either side, a scalar, and its gradient for the student's."""
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher)
    assert value.shape == (), "a scalar"
    value.backward()
    return value.detach(), student.grad


def close(ours, golden, rel: float = 1e-9, absolute: float = 5.1e-11) -> None:
    """Values, or one, to the ten printed decimals of published ones."""
    ours, golden = (
        torch.stack([torch.as_tensor(value, dtype=torch.float64).detach() for value in values])
        if isinstance(values, (list, tuple))
        else torch.as_tensor(values).double().detach()
        for values in (ours, golden)
    )
    assert ours.tolist() == pytest.approx(golden.tolist(), rel=rel, abs=absolute)


def parts_that_differ(network: nn.Module, before: dict) -> set[str]:
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


def build_distpro(teacher_name="resnet14", student_name="resnet8", **hyper_parameters):
    teacher, student = pair_networks(teacher_name, student_name)
    return FrozenTeacher(teacher), DistPro(student, teacher, TASK, **hyper_parameters)


def start_search(method):
    """The search's stage, begun, and its optimizer."""
    search, _ = method.stages(240)
    set_modes(search, method)
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    return search, torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
