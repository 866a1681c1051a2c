"""A run from its folder to its result: `prepared` makes the runs, `train` takes them through their epochs.

An epoch is `loops.train_epoch`, which calls the methods of `Run` from `begin_epoch` to `end_epoch` in their order here;
the last `end_epoch` writes result.json. Nothing here knows the name of a method; what a method needs it says itself
(distiller_zoo/base.py).
"""

import json
import signal
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from dataset import ImageData, Loader
from distiller_zoo import Distiller, Progress, build_distiller, check_shipped, check_stages, check_state, find_distiller
from errors import Stopped, UserError, count_of
from helper.checkpoint import (
    check_computed_by,
    check_optimizer,
    check_progress,
    contained,
    data_record,
    make_checkpoint,
    network_of,
    upgrade,
)
from helper.configuration import Configuration, check_class_weights, check_found, run_key
from helper.distributed import StopRequest, average_statistics, by_main, check_alike, count_processes, is_main
from helper.fast import Fast
from helper.inputs import Inputs, Opened, class_weights_of
from helper.log import (
    describe_batch,
    describe_data,
    describe_method,
    describe_protocol,
    format_duration,
    format_epoch,
    format_losses,
    format_result,
    format_title,
)
from helper.loops import (
    Training,
    evaluate,
    matching_loss,
    pooled_features,
    random_state,
    set_random_state,
    train_epoch,
    without_trunk,
)
from helper.metrics import best_epoch, best_without_labels, probe, summarise, summarise_without_labels
from helper.networks import Network, classes_taught, start_from
from helper.optim import Average, Guard, parameters_of, restore_optimizer
from helper.run_folder import BEST, CONFIG, FIDELITY, LAST, RESULT, FolderElsewhere, RunFolder
from helper.teacher import Teacher, check_apart
from models import build_model
from models.backbone import Backbone, probe_shapes
from models.checkpoints import load_weights, weights_digest
from models.cost import count_parameters
from models.external import DROPS
from models.synchronised import synchronise

#: How many training images tell the matching loss where none are held out.
JUDGED_IMAGES = 1000
#: The epochs by which the rest of a run is estimated.
RECENT_EPOCHS = 10
#: What a resumed run restores in addition to weights, optimizer and skipped steps.
STATE = ("stage_number", "epoch", "stage_step", "step", "epochs_over", "seconds", "records", "epoch_state")


@contextmanager
def prepared(opened: Opened, inputs: Inputs, teacher: Teacher | None) -> Iterator[list["Run"]]:
    """The runs, each in its claimed folder; new folders are removed again where a run turns out impossible."""
    if teacher is None and opened.teacher is not None:
        raise UserError("--resume: a student of a teacher is resumed by train_cifar_student.py")
    with ExitStack() as closing:
        with ExitStack() as preparing:
            runs: list[Run] = []
            of_settings = class_weights_of(opened.configs, inputs.data)
            for config in opened.configs:  # what is impossible is refused before there is a folder of any of them
                class_weights = of_settings[config.class_weights]
                config = _with_found(config, inputs, teacher, class_weights)
                runs.append(Run(config, inputs, teacher, opened.initial, len(opened.configs) == 1, class_weights))
                closing.callback(runs[-1].close)
            for run, label in zip(runs, _labels(opened.configs), strict=True):
                run.folder = _open_folder(run.config, preparing)
                closing.callback(run.folder.close)
                run.folder.label = f"[{label}] " if len(runs) > 1 else ""
                if is_main():
                    print(f"{run.folder.label}run folder: {run.folder.path}", flush=True)
                run.record_or_restore(shown=None if run is runs[0] else opened.configs[0])
        if teacher is not None:
            closing.callback(teacher.close)
        yield runs


def _with_found(
    config: Configuration, inputs: Inputs, teacher: Teacher | None, class_weights: torch.Tensor | None
) -> Configuration:
    """The run with what was found out of its data, its teacher and its class weights."""
    found = {"data_digest": inputs.identity["digest"], "mean": inputs.data.mean, "std": inputs.data.std}
    if config.get("data_digest") and not config.accepts_changes:  # `check_found` refuses other data
        found["data_digest"] = config.data_digest
    config = config.replace("the data", **found)
    if class_weights is not None:
        digest = weights_digest({"weights": class_weights})
        check_class_weights(config, digest)
        config = config.replace("the class weights", weights_digest=digest)
    if teacher is not None and teacher.image_size != inputs.data.image_size:
        config = config.replace("teacher's weights", teacher_image_size=teacher.image_size)
    return config


def _labels(configs: Sequence[Configuration]) -> list[str]:
    """What runs of one process are called: by their trials, or by their folders where trials do not tell them apart."""
    trials = [f"trial {config.trial}" for config in configs]
    return trials if len(set(trials)) == len(trials) else [config.name for config in configs]


def _open_folder(config: Configuration, preparing: ExitStack) -> RunFolder:
    """The folder to resume, or a new one, which is removed where an error ends `preparing`. The main process claims
    it; the others know its path."""
    claimed: list[RunFolder] = []

    def claim() -> str:
        resumed = config.folder and RunFolder(config.folder).lock()
        claimed.append(resumed or RunFolder.create(config.save_dir, config.name))
        return str(claimed[0].path)

    path = by_main(claim)
    if not is_main():
        return FolderElsewhere(path)
    if config.folder is None:
        preparing.enter_context(claimed[0].discarded_on_error())
    return claimed[0]


def _record_settings(config: Configuration, folder: RunFolder, shown: Configuration | None) -> None:
    """Write every setting and its origin; on the terminal only what differs from the run that was `shown`, if one was,
    and defaults last, in a paragraph."""
    defaults = []
    for argument, value in sorted(config.items()):
        if value is None:
            continue
        origin = config.origins[argument]
        line = f"  {argument:<18} {value!s:<24} ({origin})"
        folder.log_quietly(line)
        if shown is not None and shown.get(argument) == value:
            continue
        if origin == "default":
            defaults.append(f"{argument} {value}")
        else:
            folder.show(line)
    if defaults:
        folder.show(
            textwrap.fill(f"defaults: {', '.join(defaults)}", 120, initial_indent="  ", subsequent_indent="    ")
        )
    folder.write_json(CONFIG, config.as_json())


def _forget_result(folder: RunFolder) -> None:
    """Remove what was measured of a run that is not finished any more."""
    folder.remove(RESULT)
    if (folder.path / FIDELITY).exists():
        folder.remove(FIDELITY)
        folder.log(f"{FIDELITY} is removed: it was measured before this training")


def _record_changes(run: "Run") -> None:
    """Write down which settings a resumed run has changed, so that it is continued and tabulated as what it is now."""
    if not is_main():
        return
    folder = run.folder
    stored, now = folder.read_json(CONFIG), json.loads(json.dumps(run.config.as_json()))
    origins = now.pop("origins")
    changed = {name: value for name, value in now.items() if name not in stored or stored[name] != value}
    if run.is_over and (folder.path / RESULT).exists():  # its numbers are those of the settings that it had
        for name in sorted(changed.keys() & run_key(run.config).keys()):
            if origins[name] == "command line":
                folder.log(f"  {name:<18} {now[name]!s:<24} (not recorded: nothing is left to train with it)")
            del changed[name]
    for name, value in sorted(changed.items()):
        folder.log(f"  {name:<18} {value!s:<24} (was {stored.get(name, 'unknown')})")
    if changed:
        kept = stored.get("origins", {}) | {name: origins[name] for name in changed if name in origins}
        folder.write_json(CONFIG, stored | changed | {"origins": kept})


def train(runs: Sequence["Run"], teacher: Teacher | None) -> list[dict]:
    """Train the runs to their ends; returns the content of every `result.json`.

    Those whose next epochs show the same batches go through them together, the furthest behind first. One that fails
    ends alone; its error is raised when the others are done.
    """
    with StopRequest() as stop:
        for run in runs:
            run.finishing = stop.finishing
            with run.own_turn():
                run.begin()
        while waiting := [run for run in runs if not run.is_over]:
            first = min(waiting, key=lambda run: run.epochs_over)
            group = [run for run in waiting if run.epoch_key == first.epoch_key]
            try:
                train_epoch(group, teacher, stop.finishing, partial(_save_or_stop, group, runs, stop))
            except UserError as error:  # the images are unreadable: none of the group can continue
                for run in group:
                    run.fail(error)
                if count_processes() > 1:
                    raise
            _stop_if(stop.heard_by_any(), runs)
    _raise_failures(runs)
    return [run.result for run in runs if run.result is not None]


def _save_or_stop(group: Sequence["Run"], runs: Sequence["Run"], stop: StopRequest, number: int) -> None:
    """After a step of a group, of this number: save its runs where that is due, or before all of them stop."""
    heard = stop.heard_by_any()  # once: a signal that comes during the saves waits for the next step
    for run in group:
        with run.own_turn():
            run.save_within_epoch(number, stopping=heard is not None)
    _stop_if(heard, runs)


def _stop_if(number: int | None, runs: Sequence["Run"]) -> None:
    """End the runs, which are saved, where a signal was heard."""
    left = [run for run in runs if run.result is None and run.error is None]
    if number is not None and left:
        how = f"--resume {left[0].folder.path}" if len(runs) == 1 else "the same command and --resume"
        raise Stopped(number, f"stopped by {signal.Signals(number).name} and saved; resume with {how}")


def _raise_failures(runs: Sequence["Run"]) -> None:
    failed = [(run, run.error) for run in runs if run.error is not None]
    if failed and len(runs) == 1:
        raise failed[0][1]
    if failed:
        raise UserError("; ".join(f"{run.folder.label.strip(' []')}: {error}" for run, error in failed))


def _with_classes(config: Configuration, data: ImageData, teacher: Teacher | None) -> ImageData:
    """The data; those without labels have the classes that a teacher's logits teach, none where they teach none."""
    if data.labelled:
        return data
    if count_processes() > 1:
        raise UserError("--labels none: it is for runs of one process; leave torchrun out")
    if teacher is None or not find_distiller(config.distill).trains_classifier(config):
        return data._replace(classes=[])
    return data._replace(classes=classes_taught(teacher.loaded))


def _new_student(config: Configuration, data: ImageData) -> Backbone:
    """A freshly initialised student, with the dropout that was chosen for it."""
    drops = {name: rate for name in DROPS if (rate := config[name]) is not None}
    student = build_model(config.model_s, data.num_classes, data.image_size, drops)
    probe_shapes(student, data.image_size)
    return student


class Run:
    """Everything that one training run holds; `train` goes through its stages and their epochs."""

    folder: RunFolder  # given by `prepared` once the run is known to be possible

    def __init__(
        self,
        config: Configuration,
        inputs: Inputs,
        teacher: Teacher | None,
        initial: Network | None,
        alone: bool,
        class_weights: torch.Tensor | None,
    ):
        self.config, self.inputs, self.teacher, self._alone = config, inputs, teacher, alone
        self.data = _with_classes(config, inputs.data, teacher)
        self._initial_note = ""  # what was taken of the initial weights
        self.method = self._make_method(initial, class_weights)
        stages, frozen = self.method.stages(config.epochs), config.freeze == "trunk"
        check_stages(self.method, stages)
        self.stages = [without_trunk(stage, self.method) if frozen else stage for stage in stages]
        self.average = Average(self.method, config.ema_decay) if config.ema_decay else None
        self.guard = Guard(config.max_bad_steps)
        self.step, self.epochs_over, self.seconds = 0, 0, 0.0  # finished, in all stages
        self.records: list[dict] = []  # of every epoch of the main stage
        self.computed_by: list[dict[str, int | str | None]] = []  # what has trained it, others after it was resumed
        self.epoch_state: dict | None = None  # where a resumed run is within an epoch
        self.error: UserError | None = None
        self.result: dict | None = None
        self.latest = ""  # the losses, as the progress bar shows them
        self._means: dict[str, float] | None = None  # of an epoch whose steps are done, and that is not recorded
        self._started: float | None = None  # when the epoch began, of the clock; None before the first
        self.finishing: Callable[[], AbstractContextManager] = nullcontext  # what a stop does not interrupt
        self._enter_stage(0)
        self._random = random_state()  # used where several runs share the process

    def _make_method(self, initial: Network | None, class_weights: torch.Tensor | None) -> Distiller:
        """The method around a freshly initialised student, or one that starts from `initial`, as the run trains it."""
        config, data = self.config, self.data
        torch.manual_seed(config.seed)
        student = _new_student(config, data)
        if initial is not None and config.folder is None:
            of_data = f"{config.dataset}, whatever these weights were trained with (--normalisation names others)"
            normalised = of_data if config.normalisation is None else "--normalisation"
            self._initial_note = start_from(initial, student, config.model_s, data.classes, normalised)
        teacher, targets = self.teacher and self.teacher.network, data.train.targets
        method = build_distiller(
            config, student, teacher, data.num_classes, data.image_size, targets, class_weights
        ).to(self.inputs.device)
        check_shipped(method, data.image_size)
        if teacher is not None:
            check_apart(method, teacher, config.distill)
        if config.sync_bn and count_processes() > 1:
            synchronise(method)
        Fast.of(config).prepare_student(method, self.inputs.device)
        return method

    def record_or_restore(self, shown: Configuration | None) -> None:
        """Write down in its folder what a new run is, or resume from there; `shown` is as of `_record_settings`."""
        if self.config.folder is None:
            _record_settings(self.config, self.folder, shown)
        for note in filter(None, (self.teacher and self.teacher.note, self._initial_note)):
            self.folder.log(note)
        if self.config.folder is not None:
            self.restore()
            if not self.is_over:
                _forget_result(self.folder)
            _record_changes(self)

    def _enter_stage(self, number: int, epoch: int = 0, stage_step: int = 0) -> None:
        """Begin the stage of this number, or resume it after some of its epochs and steps."""
        self.stage_number, self.epoch, self.stage_step = number, epoch, stage_step
        self._ends: list[float] = []  # of the epochs of this stage that this process has seen, by the clock
        average = self.average if self.in_main_stage else None
        self.training = Training(
            self.stages[number], self.method, self.data, self.config, self.inputs.device, self.guard, average
        )

    @contextmanager
    def own_turn(self) -> Iterator[None]:
        """Within this block the run has the random generators to itself, and a failure ends it alone."""
        if not self._alone:
            set_random_state(self._random)
        try:
            yield
        except UserError as error:
            self.fail(error)
            if count_processes() > 1:
                raise  # this process may be the only one: it cannot leave the run and continue with the others
        finally:
            if not self._alone:
                self._random = random_state()

    def fail(self, error: UserError) -> None:
        """End this run; why is in its log. Alone it ends the script, which prints it; else it is printed now."""
        if self.error is None:
            self.error = error
            with suppress(UserError):  # a full disk
                (self.folder.log_quietly if self._alone else self.folder.log)(f"failed: {error}")

    def close(self) -> None:
        """Let go of the other processes."""
        self.training.replica.close()

    # Where the run is.

    @property
    def in_main_stage(self) -> bool:
        return self.stage_number == len(self.stages) - 1

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to train."""
        return self.error is not None or self.result is not None or (self.in_main_stage and self._stage_is_over())

    def _stage_is_over(self) -> bool:
        return self._stage_is_complete() or self._is_out_of_patience()

    def _stage_is_complete(self) -> bool:
        return self.epoch >= self.stages[self.stage_number].epochs or self._steps_left() == 0

    def _is_out_of_patience(self) -> bool:
        patience = self.config.patience
        return bool(patience and self.records) and self.epoch - self._best_epoch() >= patience

    def _steps_left(self) -> int | None:
        """How many steps `--max_steps` leaves of the stage; None where there is no limit."""
        return None if self.config.max_steps is None else max(self.config.max_steps - self.stage_step, 0)

    def _is_cut_short(self) -> bool:
        """Whether `--max_steps` ends a stage before its epochs do."""
        most, steps = self.config.max_steps, len(self.training.loader)
        return most is not None and any(most < stage.epochs * steps for stage in self.stages)

    @property
    def first_step(self) -> int:
        """Finished steps of the next epoch."""
        return self.epoch_state["steps"] if self.epoch_state else 0

    @property
    def last_step(self) -> int:
        """The number of the next epoch's last step."""
        steps, left = len(self.training.loader), self._steps_left()
        return max(self.first_step, steps if left is None else min(steps, left))

    @property
    def epoch_key(self) -> tuple:
        """Equal for runs whose next epochs show the same batches."""
        return (self.epochs_over, self.first_step, self.last_step, *self.training.batch_key)

    # Epochs and steps, called by the loop.

    def begin(self) -> None:
        """Say what is trained; go to the stage of the next epoch."""
        self.folder.log(describe_data(self.data, self.inputs.device))
        if changes := self.training.augmentation.describe(self.data.labelled):
            self.folder.log(changes)
        self.folder.log(describe_method(self.method, self.stages, self.config.model_s, self.data.image_size))
        if line := describe_batch(self.config):
            self.folder.log(line)
        self._describe_batches()
        self._go_to_next_stage()

    def _describe_batches(self) -> None:
        """Say what the epochs of the stage leave out, and where the teacher's outputs for them are stored."""
        lines = [self.training.describe_left_out()]
        if self.teacher is not None and self.training.stage.reads_teacher:
            lines.append(self.teacher.open_for(self.training))
        for line in filter(None, lines):
            self.folder.log(line)

    def _go_to_next_stage(self) -> None:
        """Where a stage is finished, begin the next; after the last write the result."""
        while self._stage_is_over() and not self.in_main_stage:
            self._enter_stage(self.stage_number + 1)
            self._describe_batches()
        if self._stage_is_over():
            self._finish()

    def begin_epoch(self) -> None:
        """Prepare the next epoch."""
        if (now := self._computing()) not in self.computed_by:
            self.computed_by.append(now)
        before = self.epoch_state["meter"]["counts"][3] if self.epoch_state else 0.0  # seconds before a stop
        self._started = time.perf_counter() - before
        progress = Progress(self.epoch, self.stages[self.stage_number].epochs)
        self.training.begin_epoch(progress, self.epochs_over, self.epoch_state)

    def _computing(self) -> dict[str, int | str | None]:
        """What trains the run now, on which the last digits of its numbers depend."""
        version, device = str(torch.__version__), str(self.inputs.device)
        return {"processes": count_processes(), "torch": version, "device": device, "threads": torch.get_num_threads()}

    def finish_step(self, number: int) -> None:
        """The optimizer's step, and a line in the log where one is due."""
        training, last = self.training, self.last_step
        if not training.finish_step():
            self.folder.log_quietly(f"{training.title} step {number}/{last} skipped: a number in it was not finite")
        if number % self.config.print_freq == 0 and (means := training.meter.summary()):
            self.guard.look()
            self.latest = format_losses(means)
            self.folder.log_quietly(f"{training.title} step {number}/{last}: {self.latest}")

    def save_within_epoch(self, number: int, stopping: bool) -> None:
        """Save after a step of an epoch where that is due or the run stops."""
        every = self.config.save_every_steps
        if self.error is None and (stopping or (every and number % every == 0)):
            with self.finishing():
                self._average_statistics()
                epoch_state = self.training.state(number)  # names a bad step, before its weights are looked at
                self._save_last(self._checkpoint({}), epoch_state)

    def end_steps(self) -> None:
        """Take the means of the epoch, whose steps are done."""
        if self.error is None:
            self._means = self.training.end_epoch()
            self._average_statistics()
            self.method.eval()

    def _average_statistics(self) -> None:
        """Of all processes, each of which has seen its own part of the batches; all else that they keep is alike."""
        average_statistics(self.method)
        check_alike(self.method, self.config.distill)
        if self.average is not None:
            average_statistics(self.average.module.train())
            self.average.module.eval()

    def end_epoch(self) -> None:
        """Test, record and save; begin the next stage or finish where this one is the last."""
        if self.error is not None or self._means is None:
            return
        # Of several processes one must not leave a test alone.
        with self.finishing() if count_processes() > 1 else nullcontext():
            # The student of an earlier stage is not yet what is tested.
            test = self._test() if self.in_main_stage else {}
        with self.finishing():
            self._record_epoch(self._means | test)
            self._means = None
        self._go_to_next_stage()

    def save_untested(self) -> None:
        """Save the steps of an epoch whose test was interrupted."""
        if self._means is not None:
            self.save_within_epoch(self.last_step, stopping=True)

    def _record_epoch(self, measured: dict[str, float]) -> None:
        """Count the epoch, log it and save."""
        stage, progress, steps = self.stages[self.stage_number], self.training.progress, self.last_step
        if stage.after_epoch is not None:  # once: an epoch whose test was interrupted is tested again
            stage.after_epoch(progress)
        self.epoch_state = None
        self.epoch, self.stage_step, self.step = self.epoch + 1, self.stage_step + steps, self.step + steps
        self._ends.append(time.perf_counter())
        self.epochs_over, self.seconds = self.epochs_over + 1, self.seconds + self._ends[-1] - (self._started or 0)
        rate = self.training.learning_rate(self.epoch, steps - 1)
        skipped = {"skipped_steps": self.guard.skipped} if self.config.max_bad_steps else {}
        skipped |= {"overflowed_steps": self.guard.overflows} if self.training.scaler.is_enabled() else {}
        record = {"epoch": self.epoch, "step": self.step, "learning_rate": rate, **measured, **skipped}
        if self.in_main_stage:
            self.records.append(record)
            if len(self.records) == 1:  # what was the same when it was made, as layers of zeros are, may now differ
                check_shipped(self.method, self.data.image_size)
        else:
            record = {"stage": stage.name, **record}
        self.folder.append_metrics(record, self.epochs_over)
        self.folder.log(format_epoch(record, format_title(stage.name, progress), self._time_left()))
        self._save(record)

    def _time_left(self) -> str:
        """How long the rest of the run takes, by the epochs of this stage that this process has seen; empty at its end.

        The first epoch, in which much is compiled and allocated, counts until there is another. From one end to the
        next, so that turns of other runs and what is saved count.
        """
        ends = self._ends[-RECENT_EPOCHS - 1 :]
        took = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else ends[0] - (self._started or 0)
        if not (epochs := self._epochs_left()):
            return ""
        return f"{'at most ' if self.config.patience else ''}{format_duration(epochs * took)} left"

    def _epochs_left(self) -> float:
        """Of all stages, in epochs as long as those of this stage; `--max_steps` may leave a part of one."""
        if self.in_main_stage and self._stage_is_over():
            return 0
        steps, left, most = len(self.training.loader), self._steps_left(), self.config.max_steps
        epochs = self.stages[self.stage_number].epochs - self.epoch
        here = epochs if left is None else min(epochs, left / steps)
        later = [stage.epochs for stage in self.stages[self.stage_number + 1 :]]
        return here + sum(later if most is None else (min(each, most / steps) for each in later))

    def _test(self) -> dict[str, float]:
        """What is measured on the test images, and on the held-out ones where there are any; also of the average."""
        if not self.data.labelled:
            return self._test_without_labels()
        test = self._test_method(self.method)
        if self.average is not None:
            averaged = self._test_method(self.average.module)
            test |= {f"{name}_ema": value for name, value in averaged.items() if "unreadable" not in name}
        return test

    def _test_method(self, method: Distiller) -> dict[str, float]:
        test = evaluate(method.predict, self.inputs.test_loader, "testing")
        if self.inputs.holdout_loader is not None:
            held_out = evaluate(method.predict, self.inputs.holdout_loader, "held-out images")
            test |= {name.replace("test", "holdout"): value for name, value in held_out.items()}
        return test

    def _test_without_labels(self) -> dict[str, float]:
        """How well the student matches its teacher, and what its features are good for."""
        name, loader = self._judged_images()
        judged = {f"{name}_matching_loss": matching_loss(self.training, self.teacher, loader)}
        if self.inputs.probe is not None:
            network = self.method.export()
            judged |= probe(*(pooled_features(network, part) for part in self.inputs.probe))
        return judged

    def _judged_images(self) -> tuple[str, Loader]:
        """The split that the matching loss is measured on, and its batches: of training images some, evenly spread."""
        if self.inputs.holdout_loader is not None:
            images = self.inputs.holdout_loader.images
            return "holdout", self.training.judging_loader(images, torch.arange(len(images.targets)))
        n = len(self.data.train.targets)
        some = torch.arange(0, n, max(-(-n // JUDGED_IMAGES), 1))
        return "train", self.training.judging_loader(self.data.train, some)

    # Checkpoints.

    def _checkpoint(self, record: Mapping[str, float]) -> dict:
        """The networks and what is known of them; never of diverged ones."""
        check_state(self.method)
        self.guard.check_weights(self.method)
        known = {
            "accuracy": record.get("test_accuracy"),
            "epoch": self.epoch,
            "teacher": self.teacher and self.teacher.record(),
            "max_steps": self.config.max_steps if self._is_cut_short() else None,
            "identity": self.inputs.identity,
        }
        if "test_accuracy_ema" in record:
            known["accuracy_ema"] = record["test_accuracy_ema"]
        averaged = self.average.module if self.average is not None and self.average.has_steps else None
        return make_checkpoint(self.method, self.config, data_record(self.data), averaged, **known)

    def _save_last(self, checkpoint: dict, epoch_state: dict | None) -> None:
        state = {name: getattr(self, name) for name in STATE} | {
            "epoch_state": epoch_state,
            "skipped_steps": self.guard.skipped,
            "overflows": self.guard.overflows,
            "optimizer": self.training.optimizer.state_dict(),
            "scaler": self.training.scaler.state_dict(),
            "computed_by": self.computed_by,
        }
        self.folder.save(LAST, checkpoint | {"training": checkpoint["training"] | state})

    def _save(self, record: dict) -> None:
        checkpoint = self._checkpoint(record)
        if self.in_main_stage:
            # The first of equals is kept, so the last epoch does not overwrite the best for a tie.
            if self._best_epoch() == self.epoch:
                self.folder.save(BEST, checkpoint)
            if self.config.save_freq and self.epoch % self.config.save_freq == 0:
                self.folder.save(f"epoch_{self.epoch}.pth", checkpoint)
        self._save_last(checkpoint, None)  # the last of them: a run that is killed before it makes the others again

    def restore(self) -> None:
        """Continue from the state of the folder's last checkpoint, where `check_found` has nothing against it."""
        source = f"--resume: {self.folder.path} does not fit this run"
        with contained(source):
            checkpoint = by_main(lambda: upgrade(self.folder.read_last(), source))
            training = checkpoint["training"]
            self._enter_stage(training["stage_number"], training["epoch"], training["stage_step"])
            check_progress(training, self.in_main_stage)
            trained = self.epoch + (training["epoch_state"] is not None) if self.in_main_stage else 0
            check_found(self.config, checkpoint["record"], self.inputs.identity, trained, self.stages[-1].epochs)
            self._restore_training(training, source)
        self.folder.keep_metrics_until(self.epochs_over)
        self._say_resumed(training["config"].get("epochs"))

    def _restore_training(self, training: Mapping[str, Any], source: str) -> None:
        """The method, its optimizer, counters and average, as `_save_last` saved them."""
        load_weights(self.method, self.config.model_s, training["distiller"], source)
        optimizer = self.training.optimizer
        state = check_optimizer(training["optimizer"], parameters_of(optimizer))
        restore_optimizer(optimizer, state, training["optimizer"]["param_groups"])
        for name in STATE:
            setattr(self, name, training[name])
        self.guard.skipped, self.guard.overflows = training["skipped_steps"], training.get("overflows", 0)
        unknown = [dict.fromkeys(self._computing())]  # of an older version
        self.computed_by = check_computed_by(training.get("computed_by", unknown), self._computing())
        if self.training.scaler.is_enabled():
            self.training.scaler.load_state_dict(training["scaler"])
        if self.average is not None and "ema" in training:
            load_weights(self.average.module, self.config.model_s, training["ema"], source)
            self.average.has_steps = True

    def _say_resumed(self, before: int | None) -> None:
        """Where the run is, and how its learning rate changes where it had `before` epochs and has another number."""
        stage = self.stages[self.stage_number]
        title = format_title(stage.name, Progress(self.epoch - 1, stage.epochs))
        within = f" and {count_of(self.epoch_state['steps'], 'step')}" if self.epoch_state else ""
        self.folder.log(f"resumed after {title}{within}")
        now = self.config.epochs
        if self.records and before != now and not self.is_over:
            rates = self.training.learning_rate(self.epoch), self.training.learning_rate(self.epoch + 1)
            old, new = (f"{rate:.4g}" for rate in (self.records[-1].get("learning_rate", rates[0]), rates[1]))
            self.folder.log(f"--epochs was {before} and is {now}: the learning rate was {old} and is {new} next")

    # The result.

    def _summary(self) -> dict[str, Any]:
        """What the records say, and by which protocol."""
        if self.data.labelled:
            protocol = describe_protocol(self.config.holdout, self.config.best_by)
            return summarise(self.records, self._best_epoch()) | {"protocol": protocol}
        name, loader = self._judged_images()
        images = f"{loader.images_shown} {'training' if name == 'train' else 'held-out'} images"
        return summarise_without_labels(self.records) | {"protocol": f"lowest matching loss on {images}"}

    def _best_epoch(self) -> int:
        """Counted from 1; the first of equals."""
        if not self.data.labelled:
            return best_without_labels(self.records)[1]
        return best_epoch(self.records, self.config.best_by)

    def _finish(self) -> None:
        """Write the result, unless it is there, and say what and where it is."""
        if self._started is None and (self.folder.path / RESULT).exists():  # resumed, with nothing left to do
            self.result = self.folder.read_json(RESULT)
            self.folder.log(f"finished already ({self.folder.path / RESULT}); {self._flag_for_more()} trains longer")
        else:
            self.result = self._make_result()
            if self._is_out_of_patience() and not self._stage_is_complete():
                measured = self.result.get("best_by", self.config.best_by).replace("_", " ")  # its own without labels
                self.folder.log(f"stopped early: no better {measured} in {count_of(self.config.patience, 'epoch')}")
            elif self._is_cut_short():
                self.folder.log(f"ended by --max_steps {self.config.max_steps} before the last of its epochs")
            self.folder.append_outcome(run_key(self.config), self.result)
            self.folder.write_json(RESULT, self.result)
        self.folder.log(format_result(self.result))
        self.folder.log(f"checkpoints: {self.folder.path / LAST} and {BEST}")

    def _make_result(self) -> dict[str, Any]:
        """The content of result.json."""
        return {
            **self._summary(),
            "epochs": self.epoch,
            "steps": self.step,
            "teacher_accuracy": None if self.teacher is None else self.teacher.accuracy,
            "test_images": len(self.data.test.targets) + len(self.data.unreadable),
            "test_unreadable": self.records[-1].get("test_unreadable", 0) + len(self.data.unreadable),
            "parameters": count_parameters(self.method.export()),
            "parameters_trained": count_parameters(nn.ModuleList(self.stages[-1].trained)),
            "seed": self.config.seed,
            "digest": network_of(self.method)[1]["digest"],
            "seconds": self.seconds,
            **self._computed(),
        }

    def _computed(self) -> dict[str, Any]:
        """What has trained the run; lists where that changed when it was resumed."""
        found = {name: [*dict.fromkeys(each[name] for each in self.computed_by)] for name in self._computing()}
        return {name: values[0] if len(values) == 1 else values for name, values in found.items()}

    def _flag_for_more(self) -> str:
        """The flag that gives a finished run more to train."""
        if self.epoch >= self.stages[-1].epochs:
            return "--epochs K"
        return "--patience E" if self._is_out_of_patience() else "--max_steps K"
