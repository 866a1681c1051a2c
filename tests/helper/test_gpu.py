"""A step of every method on a GPU: with fake tensors where there is none, so that nothing is left on the CPU unseen."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crd.negatives import NegativeSampler
from dataset import ImageData, Images, views
from distiller_zoo import DISTILLERS, Progress
from helper.command_line import resolve
from helper.loops import Training, compute_step, step
from helper.optim import Average
from helper.teacher import FrozenTeacher
from tests.conftest import pair_networks
from tests.distiller_zoo.test_every_pair import BATCH, CLASSES, build, with_statistics
from tests.stages import Shown, StageRun, few_images, train_epoch

CONFIG = resolve(
    {"distill": "ce", "model_s": "resnet8", "batch_size": BATCH, "learning_rate": 0.01, "lr_decay_epochs": (150,)}
)
CLIPPED = CONFIG.replace("a test", clip_grad=1.0)

CUDA = torch.device("cuda:0")


class FakeGpu(FakeTensorMode):
    """Within it tensors have a place and a shape, but no numbers: an operation on two places, or one that reads a
    number, raises."""

    def place(self, tensor: torch.Tensor, device: torch.device = CUDA) -> torch.Tensor:
        """The fake of a tensor on a device."""
        fake = self.from_tensor(tensor.detach())
        with self:
            return fake.to(device)

    def move(self, module: torch.nn.Module) -> None:
        """Replace all tensors of a module by fakes on the GPU."""
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                part._parameters[name] = torch.nn.Parameter(self.place(parameter), parameter.requires_grad)
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = self.place(buffer)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return few_images(CLASSES)


@pytest.fixture
def no_backward(monkeypatch):
    """Gradients of zeros: the backward pass itself needs a real device."""

    def gradients(outputs, inputs, *_, **__):
        return [torch.zeros_like(each) for each in ([inputs] if isinstance(inputs, torch.Tensor) else inputs)]

    def backward(method):
        for parameter in method.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(torch.autograd, "grad", gradients)
    return lambda method: monkeypatch.setattr(torch.Tensor, "backward", lambda loss: backward(method))


@pytest.mark.quick(6)
@pytest.mark.parametrize("name", DISTILLERS)
def test_a_step_leaves_nothing_on_the_cpu_and_reads_nothing(name, data, no_backward, monkeypatch):
    monkeypatch.setattr(
        views, "random_operation", lambda pixels, generator: pixels
    )  # its groups depend on what is drawn
    network, student = pair_networks("resnet20", "resnet8", CLASSES)
    method, teacher = build(name, network, student), FrozenTeacher(network)
    no_backward(method)
    stages, gpu, average = method.stages(240), FakeGpu(), Average(method, 0.9)
    for module in (method, teacher, average.module):
        gpu.move(module)
    images = Images(*(gpu.place(each, torch.device("cpu")) for each in data.train))
    with gpu:
        for stage in stages:
            config = CONFIG if stage.holdout else CLIPPED  # a search looks ahead of a step, without clipping
            training = Training(stage, method, data._replace(train=images), config, CUDA, average=average)
            run = StageRun(training, Progress(stage.epochs // 2, stage.epochs), 0, 2)
            run.begin_epoch()
            for number, batch in enumerate(itertools.islice(training.loader.batches(0), 2), 1):
                step([run], batch, Shown(teacher), number)
                outcomes = training._outcomes
                assert all(losses and all(loss.device == CUDA for loss in losses.values()) for losses, _, _ in outcomes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", DISTILLERS)
def test_two_steps_give_the_cpus_losses(name, data):
    means = []
    for device in (torch.device("cpu"), CUDA):
        torch.manual_seed(0)
        network, student = pair_networks("resnet20", "resnet8", CLASSES)
        with_statistics(network)
        method = build(name, network, student).to(device)
        teacher = FrozenTeacher(network).to(device)
        for stage in method.stages(240):
            training = Training(stage, method, data, CONFIG, device)
            means.append(train_epoch(training, teacher, Progress(stage.epochs // 2, stage.epochs), most_steps=2)[0])
    for on_cpu, on_gpu in zip(means[: len(means) // 2], means[len(means) // 2 :], strict=True):
        draws_there = any(isinstance(part, NegativeSampler) for part in method.modules())
        for key in (key for key in on_cpu if key.startswith("loss")):
            assert draws_there or on_gpu[key] == pytest.approx(on_cpu[key], rel=0.03, abs=1e-3), key


def trained_on_one_batch(name: str, optimizer: str, data: ImageData, captured: bool) -> dict[str, torch.Tensor]:
    """Four steps on one batch, at a rate that changes, the last three replayed where `captured` -> the weights, their
    average, what the guard has kept, and the means."""
    torch.manual_seed(0)
    network, student = pair_networks("resnet20", "resnet8", CLASSES)
    with_statistics(network)
    method, teacher = build(name, network, student).to(CUDA), Shown(FrozenTeacher(network).to(CUDA))
    config = CLIPPED.replace("a test", compile="default", fused_optimizer=True)  # its rate is a tensor
    config = config.replace("a test", optimizer=optimizer, lr_decay="one_cycle", learning_rate=0.001)
    *_, stage = method.stages(240)
    training = Training(stage, method, data, config, CUDA, average=Average(method, 0.9))
    run = StageRun(training, Progress(120, 240), 0, None)
    run.begin_epoch()
    batch = next(training.loader.batches(0))
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    for number in range(4):
        training.go_to(number)
        if captured and number == 1:
            with torch.cuda.graph(graph):  # teacher, student, losses, guard, clipping, optimizer, average and meter
                compute_step([run], batch, teacher, 1)
        if captured and number:
            graph.replay()
            continue
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute_step([run], batch, teacher, 1)
        torch.cuda.current_stream().wait_stream(side)
    found = method.state_dict() | {
        f"average of {key}": value for key, value in training.average.module.state_dict().items()
    }
    found |= {f"seen {number}": value for number, value in enumerate(training.guard.kept)}
    means = training.end_epoch()
    return found | {key: torch.tensor(value) for key, value in means.items() if not key.endswith("_s")}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(("name", "optimizer"), [("kd", "sgd"), ("norm", "sgd"), ("norm", "adamw")])
def test_a_step_can_be_captured_and_replayed(name, optimizer, data, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # what is captured is the eager step
    expected, found = (trained_on_one_batch(name, optimizer, data, captured) for captured in (False, True))
    for key, value in expected.items():
        assert torch.allclose(value, found[key], rtol=1e-3, atol=1e-5), key
