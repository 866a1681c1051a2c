"""What follows the backward pass of a step: one graph, in all steps, epochs and at all rates, and the same numbers."""

import pytest
import torch

from distiller_zoo import Progress
from helper import loops
from helper.command_line import resolve
from helper.optim import Average
from helper.teacher import FrozenTeacher
from tests.conftest import pair_networks
from tests.distiller_zoo.test_every_pair import BATCH, CLASSES, build, with_statistics
from tests.stages import Shown, StageRun, few_images

CPU = torch.device("cpu")
GIVEN = {"distill": "ce", "model_s": "resnet8", "batch_size": BATCH, "epochs": 3, "learning_rate": 1e-4}


def trained(name, mode, **settings):
    """Three epochs of every stage, whose last batch is shorter -> the means of each epoch, how far everything that a
    step changes has moved, and where the sums of the epochs are."""
    torch.manual_seed(0)
    network, student = pair_networks("resnet14", "resnet8", CLASSES)
    method, teacher = build(name, with_statistics(network), student), Shown(FrozenTeacher(network))
    config = resolve(GIVEN | {"lr_decay": "one_cycle"} | settings).replace("a test", compile=mode)
    means, moved, places = [], {}, set()
    start = {key: value.clone() for key, value in method.state_dict().items()}
    for number, stage in enumerate(method.stages(3)):
        training = loops.Training(stage, method, few_images(CLASSES, 14), config, CPU, None, Average(method, 0.5))
        for epoch in range(3):
            run = StageRun(training, Progress(epoch, 3), epoch, None)
            run.begin_epoch()
            for step, batch in enumerate(training.loader.batches(epoch), 1):
                loops.step([run], batch, teacher, step)
            run.end_steps()
            means.append({key: value for key, value in run.means.items() if not key.endswith("_s")})
            places.add((number, *(value.data_ptr() for value in training.meter.kept)))
        average = training.average.module.state_dict()
        moved |= {f"average {number}.{key}": value - start[key] for key, value in average.items()}
    return means, moved | {key: value - start[key] for key, value in method.state_dict().items()}, places


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # of Python 3.13.0
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("kd", {"optimizer": "adamw", "clip_grad": 1.0}),
        ("semckd", {"nesterov": True, "decay_norms": False}),  # a shorter batch has other terms
        ("factor", {}),  # a stage without a student
    ],
)
def test_an_update_is_one_graph_for_each_stage(monkeypatch, graphs, name, settings):
    update, compiler = loops.Training._update, torch.compile
    asked = []

    def compiled(function, **options):
        asked.extend([options] if function is update else [])
        return compiler(function, **options) if function is update else function

    monkeypatch.setattr(torch, "compile", compiled)
    expected, plain, _ = trained(name, "off", **settings)
    assert not asked and not graphs
    found, captured, places = trained(name, "reduce-overhead", **settings)
    stages = len(found) // 3
    assert len(asked) == len(graphs) == len(places) == stages
    assert all(options["fullgraph"] for options in asked)
    for epoch, same in zip(found, expected, strict=True):
        assert epoch == pytest.approx(same, rel=1e-3)
    for key, moved in plain.items():  # adamw enlarges what rounding does to the smallest gradients
        assert (moved - captured[key]).double().norm() <= 0.1 * moved.double().norm() + 1e-6, key


@pytest.mark.parametrize("settings", [{"optimizer": "lamb"}, {"max_bad_steps": 1}])
def test_an_update_that_needs_the_host_is_not_captured(monkeypatch, settings):
    if "optimizer" in settings:
        pytest.importorskip("timm.optim")
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: made.append(function) or function)
    _, student = pair_networks("resnet14", "resnet8", CLASSES)
    method = build("ce", None, student)
    config = resolve(GIVEN | settings).replace("a test", compile="reduce-overhead")
    guard = loops.Guard(config.max_bad_steps)
    loops.Training(method.main_stage(3), method, few_images(CLASSES), config, CPU, guard)
    assert loops.Training._update not in made and made


def test_a_term_of_another_epoch_is_no_mean_of_this_one():
    meter = loops.EpochMeter(CPU)
    logits, classes = torch.eye(3), torch.arange(3)
    meter.update({"ce": torch.tensor(1.0), "late": torch.tensor(2.0)}, logits, classes)
    assert {"loss": 3.0, "loss_late": 2.0, "train_accuracy": 100.0}.items() <= meter.summary().items()
    meter.begin()
    assert meter.summary() == {}
    meter.update({"ce": torch.tensor(1.0)}, None, classes)
    means = meter.summary()
    assert means["loss"] == 1.0 and not {"loss_late", "train_accuracy"} & means.keys()


def test_an_average_is_the_first_step_then_moves_and_takes_counts_over():
    module = torch.nn.BatchNorm1d(2)
    average = Average(module, 0.75)
    for number in (4.0, 8.0):
        module.running_mean.fill_(number)
        module.num_batches_tracked.fill_(int(number))
        torch.nn.init.constant_(module.weight, number)
        average.update(module)
    assert average.module.running_mean.tolist() == average.module.weight.tolist() == [5.0, 5.0]
    assert average.module.num_batches_tracked == 8
    assert not average.module.training and not average.module.weight.requires_grad
    with pytest.raises(ValueError, match=r"shorter|longer"):
        average.update(torch.nn.BatchNorm1d(2, affine=False))


def test_micro_batches_of_unequal_size_give_the_gradient_of_the_batch():
    """Of a classifier on a frozen trunk, whose BatchNorms do not see which images are together."""
    gradients = []
    for number in (1, 2):
        torch.manual_seed(0)
        method = build("ce", None, pair_networks("resnet14", "resnet8", CLASSES)[1])
        config = resolve(GIVEN | {"batch_size": 6, "accumulate": number})
        stage = loops.without_trunk(method.main_stage(3), method)
        training = loops.Training(stage, method, few_images(CLASSES, 5), config, CPU)
        training.begin_epoch(Progress(0, 3), 0, None)
        (batch,) = training.loader.batches()
        *others, last = training.parts(batch)
        assert [len(part.targets) for part in (*others, last)] == ([5] if number == 1 else [3, 2])
        for part in (*others, last):
            training.add_gradients(batch, part, None, part is last)
        gradients.append(method.student.fc.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)
