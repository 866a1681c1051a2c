"""What runs read and may share: the data set and the frozen teacher, checked."""

from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

import torch

from dataset import ImageData, Images, Loader, hold_out, load_data
from errors import UserError
from helper.distributed import count_processes, device_of, one_by_one_here, rank
from helper.fast import Fast
from helper.metrics import evaluate
from helper.teacher import FrozenTeacher, TeacherFile, check_teacher
from models.backbone import Backbone, Output, probe_shapes

#: Images per batch when testing; where they are wider than SMALL pixels, as many as in training.
EVALUATION_BATCH, SMALL = 512, 64


class Inputs(NamedTuple):
    """Data and teacher on the device; the teacher's fields are None where there is none."""

    device: torch.device
    fast: Fast
    data: ImageData
    test_loader: Loader
    choosing_loader: Loader | None  # training images kept apart for choosing; `data` lacks them
    network: Backbone | None  # the teacher as its file holds it, for methods to read shapes and copy parts from
    teacher: FrozenTeacher | None  # the same as this run computes it
    compiled_teacher: Callable[..., Output] | None  # its pass on whole batches
    teacher_accuracy: float | None
    teacher_note: str = ""
    initial: TeacherFile | None = None  # what new runs start from

    def teach(self, images: torch.Tensor, preact: bool, is_whole: bool) -> Output:
        """The teacher's outputs for images (B, 3, H, W) of a batch that may be whole."""
        teacher = self.compiled_teacher if is_whole else self.teacher
        with self.fast.autocast(self.device), self.fast.naming_compiler():
            return teacher(images, preact)


def load_inputs(config: Namespace, teacher_file: TeacherFile | None) -> Inputs:
    """Load the data and measure the teacher; raises `UserError` where they do not fit or the teacher is off record."""
    device, fast = device_of(config.device), Fast.of(config)
    # Only a folder that was named on the command line is written to.
    may_download = config.data is None or config.origins["data"] == "command line"
    reading = (config.data, config.image_size, config.num_workers, config.max_broken, may_download)
    with one_by_one_here():
        data = load_data(config.dataset, *reading)
    data = data._replace(train=data.train.to(device), test=data.test.to(device))
    batch_size = EVALUATION_BATCH if data.image_size <= SMALL else config.batch_size
    data, choosing_loader = _keep_apart(data, config.holdout, batch_size, device)
    test_loader = _part_loader(data.test, data, batch_size, device)
    if teacher_file is None:
        return Inputs(device, fast, data, test_loader, choosing_loader, None, None, None, None)
    if teacher_file.num_classes != data.num_classes:
        raise UserError(
            f"--path_t: the teacher has {teacher_file.num_classes} classes, but --dataset {data.name} has "
            f"{data.num_classes}; use a teacher of this data set"
        )
    network = teacher_file.network.eval().to(device)
    probe_shapes(network, data.image_size)
    teacher = FrozenTeacher(fast.prepare_teacher(network, data.image_size))
    with fast.autocast(device):
        measured = evaluate(lambda images: teacher(images).logits, test_loader, "checking the teacher")
    accuracy = measured["test_accuracy"]
    note = check_teacher(teacher_file, data.name, accuracy, config.allow_teacher_gap)
    note = "\n".join(filter(None, (network.note, note)))
    compiled = fast.compiled(teacher.forward, outlives=True)
    return Inputs(device, fast, data, test_loader, choosing_loader, network, teacher, compiled, accuracy, note)


def _keep_apart(data: ImageData, k: int, batch_size: int, device: torch.device) -> tuple[ImageData, Loader | None]:
    """Take `--holdout` k training images out of the data, for choosing."""
    if not k:
        return data, None
    try:
        train, apart = hold_out(data.train, k)
    except ValueError as error:
        raise UserError(f"--holdout: {error}; choose another number") from None
    data = data._replace(train=train)
    return data, _part_loader(apart, data, batch_size, device)


def _part_loader(images: Images, data: ImageData, batch_size: int, device: torch.device) -> Loader:
    """Batches of this process's part of a split: every image once in all of them."""
    mine = torch.arange(len(images.targets)).tensor_split(count_processes())[rank()]
    return Loader(images, data, batch_size, device, subset=mine)
