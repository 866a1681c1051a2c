"""The story of a run, top to bottom: data, teacher, student, method, epochs, result.

Nothing here knows the name of a method; what a method needs it says itself (distiller_zoo/base.py).
"""

import itertools
import time
from argparse import Namespace

import torch

from dataset import Loader, epoch_seed, load_data
from distiller_zoo import Distiller, Progress
from errors import UserError
from helper.configuration import run_name
from helper.metrics import EpochMeter, evaluate
from helper.reporting import describe_data, describe_method, format_epoch, format_losses, format_result, progress_bar
from helper.run_folder import BEST, CONFIG, LAST, RESULT, RunFolder
from helper.run_state import build_distiller, data_record
from helper.schedule import cosine_learning_rate, step_learning_rate
from helper.teacher import FrozenTeacher, TeacherFile, check_teacher
from models import build_model
from models.checkpoints import read_checkpoint
from models.cost import count_parameters

EVALUATION_BATCH = 512


def run(config: Namespace, teacher_file: TeacherFile | None) -> dict:
    """From a resolved configuration to a trained student; returns the content of the run folder's `result.json`."""
    if config.resume is None:
        return _start(config, teacher_file)
    folder = RunFolder(config.resume)
    print(f"run folder: {folder.path}", flush=True)
    run = Run(config, teacher_file, folder)
    run.restore()
    return run.execute()


def _start(config: Namespace, teacher_file: TeacherFile | None) -> dict:
    folder = RunFolder.create(config.save_dir, run_name(config))
    print(f"run folder: {folder.path}", flush=True)
    with folder.discarded_on_error():
        for argument, value in sorted(vars(config).items()):
            if argument != "origins" and value is not None:
                folder.log(f"  {argument:<18} {value!s:<24} ({config.origins[argument]})")
        folder.write_json(CONFIG, vars(config))
        run = Run(config, teacher_file, folder)
    return run.execute()


class Run:
    """Everything that one training run holds; `execute` is the story."""

    def __init__(self, config: Namespace, teacher_file: TeacherFile | None, folder: RunFolder):
        self.config, self.folder = config, folder
        self.device = find_device(config.device)
        torch.manual_seed(config.seed)
        self.data = load_data(config.dataset, config.data, config.image_size, config.num_workers)
        self.train_loader = Loader(
            self.data.train, self.data, config.batch_size, self.device, self.data.augmentation, config.seed
        )
        self.test_loader = Loader(self.data.test, self.data, EVALUATION_BATCH, self.device)
        student = build_model(config.model_s, self.data.num_classes)
        network = None if teacher_file is None else teacher_file.network
        self.teacher_accuracy = None
        self.teacher = None if network is None else self._prepare_teacher(teacher_file)
        self.distiller = build_distiller(
            vars(config), student, network, self.data.num_classes, self.data.image_size, self.data.train.targets
        ).to(self.device)
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in self.distiller.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.epoch, self.step, self.seconds = 0, 0, 0.0  # what is over, in epochs, steps and time
        self.accuracies: list[float] = []  # test accuracy (%) of every epoch

    def _prepare_teacher(self, teacher_file: TeacherFile) -> FrozenTeacher:
        if teacher_file.num_classes != self.data.num_classes:
            raise UserError(
                f"--path_t: the teacher has {teacher_file.num_classes} classes, but --dataset {self.data.name} has "
                f"{self.data.num_classes}; use a teacher of this data set"
            )
        teacher = FrozenTeacher(teacher_file.network.to(self.device))
        measured = evaluate(lambda images: teacher(images).logits, self.test_loader, "checking the teacher")
        self.teacher_accuracy = measured["test_accuracy"]
        self.folder.log(
            check_teacher(teacher_file, self.data.name, self.teacher_accuracy, self.config.allow_teacher_gap)
        )
        return teacher

    def execute(self) -> dict:
        """Train what is left of the run; returns the content of `result.json`."""
        self.folder.log(describe_data(self.data, self.device))
        self.folder.log(describe_method(self.distiller, self.config.model_s, self.data.image_size))
        while self.epoch < self.config.epochs and not self._out_of_steps():
            self._run_epoch()
        return self._finish()

    def _out_of_steps(self) -> bool:
        return self.config.max_steps is not None and self.step >= self.config.max_steps

    def learning_rate(self, epoch: int) -> float:
        """Of an epoch, counted from 1."""
        config = self.config
        if config.lr_decay == "cos":
            return cosine_learning_rate(config.learning_rate, epoch - 1, config.epochs, len(self.train_loader))
        return step_learning_rate(config.learning_rate, epoch, config.lr_decay_epochs, config.lr_decay_rate)

    def _run_epoch(self) -> None:
        epoch, started = self.epoch + 1, time.perf_counter()
        torch.manual_seed(epoch_seed(self.config.seed, epoch))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(epoch)
        training = self._train_one_epoch(Progress(self.epoch, self.config.epochs))
        self.distiller.eval()
        test = evaluate(self.distiller.predict, self.test_loader, "testing")
        self.epoch, self.seconds = epoch, self.seconds + time.perf_counter() - started
        self.accuracies.append(test["test_accuracy"])
        record = {"epoch": epoch, "step": self.step, "learning_rate": self.learning_rate(epoch), **training, **test}
        self.folder.append_metrics(record)
        self.folder.log(format_epoch(record, self.config.epochs))
        self._save(record)

    def _train_one_epoch(self, progress: Progress) -> dict[str, float]:
        """One pass over the training images, or what `--max_steps` leaves of it."""
        config, meter = self.config, EpochMeter(self.device)
        steps = len(self.train_loader)
        if config.max_steps is not None:
            steps = min(steps, config.max_steps - self.step)
        batches = itertools.islice(self.train_loader.batches(progress.epoch + 1), steps)
        title = f"epoch {progress.epoch + 1}/{progress.epochs}"
        self.distiller.train()
        bar = progress_bar(meter.timed(batches), title, steps)
        for number, batch in enumerate(bar, 1):
            teacher_output = None if self.teacher is None else self.teacher(batch.images)
            losses, logits = train_step(self.distiller, self.optimizer, batch, teacher_output, progress)
            meter.update(losses, logits, batch.targets)
            self.step += 1
            if number % config.print_freq == 0:
                means = meter.summary()
                bar.set_postfix_str(format_losses(means))
                self.folder.log_quietly(f"{title} step {number}/{steps}: {format_losses(means)}")
        return meter.summary()

    def _save(self, record: dict) -> None:
        config = {key: value for key, value in vars(self.config).items() if key != "origins"}
        model = {
            "config": config,
            "data": data_record(self.data),
            "epoch": self.epoch,
            "accuracy": record["test_accuracy"],
            "distiller": self.distiller.state_dict(),
        }
        state = {"step": self.step, "seconds": self.seconds, "accuracies": self.accuracies}
        self.folder.save(LAST, model | state | {"optimizer": self.optimizer.state_dict()})
        # The first of equals is kept, so the last epoch does not overwrite the best for a tie.
        if self.accuracies.index(max(self.accuracies)) == self.epoch - 1:
            self.folder.save(BEST, model)
        if self.config.save_freq and self.epoch % self.config.save_freq == 0:
            self.folder.save(f"epoch_{self.epoch}.pth", model)

    def restore(self) -> None:
        """Take up the state of the folder's last checkpoint."""
        path = self.folder.path / LAST
        if not path.exists():
            raise UserError(f"--resume: {self.folder.path} has no checkpoint yet; start the run again without --resume")
        checkpoint = read_checkpoint(path, "--resume")
        try:
            self.distiller.load_state_dict(checkpoint["distiller"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.epoch, self.step, self.seconds = (checkpoint[name] for name in ("epoch", "step", "seconds"))
            self.accuracies = list(checkpoint["accuracies"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"--resume: {path} does not fit this run: {str(error).splitlines()[0]}") from None
        self.folder.keep_metrics_until(self.epoch)
        self.folder.log(f"resumed after epoch {self.epoch}")

    def _finish(self) -> dict:
        last_five = self.accuracies[-5:]
        result = {
            "accuracy_last": self.accuracies[-1],
            "accuracy_best": max(self.accuracies),
            "accuracy_mean_last_five": sum(last_five) / len(last_five),
            "best_epoch": self.accuracies.index(max(self.accuracies)) + 1,
            "epochs": self.epoch,
            "steps": self.step,
            "teacher_accuracy": self.teacher_accuracy,
            "test_images": len(self.data.test.targets),
            "parameters": count_parameters(self.distiller.student),
            "parameters_trained": count_parameters(self.distiller),
            "seed": self.config.seed,
            "seconds": self.seconds,
            "torch": torch.__version__,
            "device": str(self.device),
        }
        self.folder.write_json(RESULT, result)
        self.folder.log(format_result(result))
        self.folder.close()
        return result


def train_step(
    distiller: Distiller, optimizer: torch.optim.Optimizer, batch, teacher_output, progress: Progress
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Forward, backward, step -> (named weighted losses, student's logits)."""
    logits, losses = distiller(batch, teacher_output, progress)
    if not losses:
        raise UserError("every loss weight is 0: there is nothing to train; set -r, -a or -b")
    optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    optimizer.step()
    return losses, logits


def find_device(name: str) -> torch.device:
    """The device of `--device`; auto is CUDA where it is available, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device: {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device
