"""Every method on every pair: it trains, it says truly what it needs, it ships what it says."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distiller_zoo import DISTILLERS, Progress, Task
from errors import UserError
from helper.loops import set_modes
from helper.recipes import CIFAR_PAIRS, recipe_of
from models.backbone import Output
from models.cost import count_parameters
from scripts import list_methods
from tests.conftest import pair_networks
from tests.distiller_zoo.helpers import FrozenTeacher, batch_of, train_step
from tests.pages import blocks

ROOT = Path(__file__).resolve().parent.parent.parent
BATCH, CLASSES = 4, 6
#: SemCKD's projections to a ResNet50's maps have 850 million parameters, which a small machine cannot step.
MOST_PARAMETERS = 200_000_000
#: Reasons, by method, why a pair is refused; a refusal without one of these is a failure.
REFUSED = {
    "fsp": "equal",
    "kdsvd": "equal",
}


@torch.no_grad()
def with_statistics(network):
    """Running statistics as behind some training: without them the maps of deep networks are hundreds wide."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(torch.randn(8, 3, 32, 32))
    return network.eval()


def build(name: str, teacher, student):
    """The method with its recipe, its contrast kept small."""
    method = DISTILLERS[name]
    recipe = recipe_of("cifar100", "resnet32x4", "resnet8x4", name)
    arguments = {flag.argument for flag in method.flags}
    hyper = {argument: value for argument, (value, _) in recipe.items() if argument in arguments}
    hyper |= {"nce_k": 8} if "nce_k" in arguments else {}
    task = Task(CLASSES, 32, BATCH, torch.arange(24) % CLASSES)
    return method(student, teacher if method.reads_teacher else None, task, **hyper)


def steps_of(stage, method, teacher, steps: int):
    """Steps of a stage one by one, with what comes before each; yields the losses."""
    set_modes(stage, method)
    # A rate at which the wide maps of untrained deep teachers do not blow up an autoencoder.
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1e-6, momentum=0.9)
    progress, batch = Progress(stage.epochs // 2, stage.epochs), batch_of(method, BATCH)
    batch = batch._replace(targets=batch.targets % CLASSES)
    shown = teacher(batch.images, method.teacher_preact) if stage.reads_teacher else None
    for _ in range(steps):
        if stage.before_step is not None:
            stage.before_step(optimizer, batch, shown, batch if stage.holdout else None, progress)
        yield train_step(method, stage, optimizer, batch, shown, progress)[0]


def train_a_step(method, teacher):
    """A step of every stage, which changes what the stage trains and nothing else; the losses of the last one."""
    for stage in method.stages(240):
        before = {name: value.detach().clone() for name, value in method.state_dict().items()}
        (losses,) = steps_of(stage, method, teacher, 1)
        assert all(torch.isfinite(value) for value in losses.values())
        frozen = {name for name, parameter in method.named_parameters() if not parameter.requires_grad}
        changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
        assert not changed & frozen, f"stage {stage.name} changes frozen {sorted(changed & frozen)[:3]}"
        assert changed, f"stage {stage.name} trains nothing"
    return losses


@pytest.mark.slow
def test_every_method_trains_on_every_pair_it_supports(cifar_pair):
    teacher_network, student = pair_networks(*cifar_pair, num_classes=CLASSES)
    teacher, trained = FrozenTeacher(with_statistics(teacher_network)), []
    for name in DISTILLERS:
        try:
            method = build(name, teacher_network, copy.deepcopy(student))
        except UserError as refusal:
            assert REFUSED.get(name, "no reason") in str(refusal), f"{name}: {refusal}"
            continue
        if count_parameters(method) > MOST_PARAMETERS:
            continue
        assert train_a_step(method, teacher), name
        trained.append(name)
    assert len(trained) >= len(DISTILLERS) - len(REFUSED) - 1


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a GPU: those that read a value, or make a shape of values."""

    READ = ("_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2", "unique_dim", "unique_consecutive")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indexed = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        is_masked = any(index is not None and index.dtype == torch.bool for index in indexed)
        self.count += name in self.READ or is_masked
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", DISTILLERS)
def test_no_step_waits_for_the_device(name):
    teacher_network, student = pair_networks("resnet20", "resnet8", num_classes=CLASSES)
    teacher, method = FrozenTeacher(with_statistics(teacher_network)), build(name, teacher_network, student)
    for stage in method.stages(240):
        steps = steps_of(stage, method, teacher, 2)
        next(steps)  # the first step may set up what is kept
        with Waits() as counter:
            next(steps)
        assert counter.count == 0, f"stage {stage.name}"


class Spied:
    """An `Output` that records which of its parts are read."""

    def __init__(self, output: Output, read: set):
        self._output, self._read = output, read

    def __getattr__(self, name):
        self._read.add(name)
        return getattr(self._output, name)


@pytest.mark.parametrize("name", DISTILLERS)
def test_a_method_reads_what_it_says(name):
    teacher_network, student = pair_networks("wrn_16_2", "wrn_16_2", num_classes=CLASSES)
    method, read = build(name, teacher_network, student), set()

    def spying_on(losses):
        def spied(student_output, teacher_output, *rest):
            outputs = (output and Spied(output, read) for output in (student_output, teacher_output))
            return losses(*outputs, *rest)

        return spied

    for stage in method.stages(240):
        stage = stage._replace(losses=spying_on(stage.losses))
        list(steps_of(stage, method, FrozenTeacher(teacher_network), 1))
    if "norm_loss" in read:  # NORM matches the final map inside the student's forward pass
        read.add("final")
    parts = {"maps", "final", "activated", "pooled"}
    assert read & parts == set(method.reads) & parts


def test_every_method_describes_itself():
    groups = {"logits", "feature maps", "relations between images", "N-to-one", "without a teacher"}
    for name, method in DISTILLERS.items():
        assert name == name.lower() and method.summary and method.group in groups, name
        assert method.source or name == "ce", name
        assert name in list_methods.table("cifar100", "resnet32x4", "resnet8x4")


def test_the_methods_of_the_tables_are_there():
    repdistiller = "kd hint attention similarity correlation vid rkd pkt abound factor fsp nst crd kdsvd"
    others = "srrl semckd reviewkd simkd distpro one sskd ofd norm norm_crd ft dkd dist mlkd"
    assert set(f"{repdistiller} {others} ce".split()) == set(DISTILLERS)


@pytest.mark.slow
def test_a_new_method_is_one_new_file(tmp_path, teacher_run):
    """The first example of docs/own_work.md, in a copy of the repository."""
    (code,) = (block for block in blocks((ROOT / "docs" / "own_work.md").read_text(), "python") if "MeanMap" in block)
    for room in ("models", "distiller_zoo", "crd", "dataset", "helper"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ("errors.py", "setting.py", "train_cifar_student.py"):
        shutil.copy(ROOT / script, tmp_path)
    (tmp_path / "distiller_zoo" / "mean_map.py").write_text(code)

    def call(*flags):
        argv = [sys.executable, "train_cifar_student.py", *flags]
        return subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "mean_map" in call("--help")
    flags = ("--distill", "mean_map", "-b", "10", "--path_t", str(teacher_run / "last.pth"), "--model_s", "resnet8")
    assert "+ mean_map " in call(*flags, "--epochs", "1", "--max_steps", "2")


def test_the_pairs_are_those_of_the_paper():
    assert len(CIFAR_PAIRS) == 13
