"""What the tests of several processes run in each of them, and alone for comparison: small trainings in float64."""

import gc
import os
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

import train_cifar_student
import train_teacher
from dataset import Images, load_data
from distiller_zoo import Progress, Task, find_distiller
from helper import inputs, run
from helper.distributed import average_statistics, count_processes, joined, rank
from helper.fast import Fast
from helper.loops import Training, evaluate
from helper.settings import settings_of
from helper.teacher import FrozenTeacher
from models import build_model
from models.synchronised import synchronise
from tests.stages import train_epoch

CPU = torch.device("cpu")
#: Five batches of 8 in an epoch, and one of 3.
IMAGES, BATCH = 43, 8
#: name -> (method, student, its hyper-parameters, synchronised, --accumulate, steps)
CASES = {
    "norm": ("norm", "resnet8", {"co_sponge": 2}, True, 1, 13),
    "norm_direct": ("norm", "resnet8", {"co_sponge": 2, "ft_form": "direct"}, True, 1, 4),
    "norm_crd": ("norm_crd", "resnet8", {"co_sponge": 2, "nce_k": 8, "mode": "relax"}, True, 1, 7),
    "preactivations": ("ofd", "wrn_16_1", {}, True, 1, 4),
    "without_norms": ("kd", "resnet8", {}, True, 2, 6),
    "unused": ("norm", "resnet8", {"gamma": 0.0}, True, 1, 6),
    "own_statistics": ("norm_crd", "resnet8", {"co_sponge": 2, "nce_k": 8}, False, 1, 7),
    "search": ("distpro", "resnet8", {}, True, 1, 1),  # its second held-out batch is one image
    "changing": ("semckd", "resnet8", {}, False, 1, 7),
}


SETTINGS = {
    "batch_size": BATCH,
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "lr_decay": "step",
    "lr_decay_epochs": (),
    "lr_decay_rate": 0.1,
    "drop_momentum": False,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 5e-4,
    "decay_norms": True,
    "seed": 0,
    "data_seed": 0,
    "augment": "standard",
    "colour_jitter": 0.0,
    "random_erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "balanced_sampling": False,
}


class DoubleTraining(Training):
    """Training in float64, where a wrong formula cannot hide behind rounding."""

    def _laid_out(self, batch):
        return super()._laid_out(batch._replace(images=batch.images.double()))


def few_images(*arguments, **named):
    data = load_data(*arguments, **named)
    train, test = (Images(split.pixels[:IMAGES], split.targets[:IMAGES]) for split in (data.train, data.test))
    return data._replace(train=train, test=test)


def train(name: str) -> dict:
    """Run a case; what it leaves in this process."""
    distill, student_name, hyper_parameters, synchronised, parts, steps = CASES[name]
    data = few_images("digits")
    torch.manual_seed(0)
    teacher, student = build_model("resnet14", 10).double(), build_model(student_name, 10)
    if name == "without_norms":
        remove_norms(student)
    method = find_distiller(distill)
    task = Task(10, 32, BATCH // count_processes(), data.train.targets)
    distiller = method(student, teacher, task, **hyper_parameters).double()
    if synchronised and count_processes() > 1:
        synchronise(distiller)
    defaults = {name: one.default for name, one in settings_of(distill).items()}
    config = Namespace(**defaults | Fast()._asdict() | SETTINGS | {"distill": distill, "accumulate": parts})
    training = DoubleTraining(distiller.stages(240)[0], distiller, data, config, CPU)
    means, over = [], 0
    while over < steps:
        epoch = len(means)
        progress = Progress(epoch, 240)
        record, number = train_epoch(training, FrozenTeacher(teacher), progress, epoch, steps - over)
        means.append({key: value for key, value in record.items() if key.startswith(("loss", "train"))})
        over += number
    before = {key: value.clone() for key, value in distiller.state_dict().items()}
    average_statistics(distiller)
    looks_for_unused = getattr(training.replica._parallel, "find_unused_parameters", None)
    state = {"means": means, "before": before, "after": distiller.state_dict(), "looks": looks_for_unused}
    return state | {"test": test(distiller, data)}


def remove_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        else:
            remove_norms(child)


def test(distiller, data) -> dict:
    distiller.eval()
    loader = inputs._part_loader(data.test, data, 32, CPU)
    return evaluate(lambda images: distiller.predict(images.double()), loader)


def leave_without_ddp(leave=torch.distributed.destroy_process_group) -> None:
    """Leave the group: a DDP that is freed later may hang (helper/distributed.py, Replica.close)."""
    held = [one for one in gc.get_objects() if isinstance(one, nn.parallel.DistributedDataParallel)]
    assert not held, "a DDP outlives the run"
    leave()


def run_cases(number: int, port: int, folder: str, whole_runs: list[list[str]]) -> None:
    """A process of two: every case, then whole runs of the scripts."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="localhost")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    with joined():
        assert (rank(), count_processes()) == (number, 2)
        torch.save({name: train(name) for name in CASES}, Path(folder, f"{number}.pth"))
    inputs.load_data = few_images
    torch.distributed.destroy_process_group = leave_without_ddp
    for offset, (script, *argv) in enumerate(whole_runs, 1):
        os.environ["MASTER_PORT"] = str(port + offset)
        {"teacher": train_teacher, "student": train_cifar_student}[script].main(argv)


def run_script_with_trouble() -> None:
    """A process that `TROUBLE` happens to, in the process of number 1 and at the first attempt."""
    import signal
    import sys

    from errors import UserError, run_script

    trouble = os.environ["TROUBLE"]
    inputs.load_data = few_images
    unlucky = os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    original = run.Run.save_within_epoch

    def strike(self, number, stopping):
        original(self, number, stopping)
        if unlucky and number == 3 and self.epoch == 1:
            if trouble == "error":
                raise UserError("--data: broken.png cannot be read")
            os.kill(os.getpid(), getattr(signal, trouble))

    run.Run.save_within_epoch = strike
    run_script(lambda: train_teacher.main(sys.argv[1:]))


if __name__ == "__main__":
    run_script_with_trouble()
