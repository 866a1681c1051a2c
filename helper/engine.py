"""The story of a run, top to bottom: student, method, stages, epochs, result.

What runs may share, data and teacher, is in inputs.py. Nothing here knows the name of a method; what a method needs it
says itself (distiller_zoo/base.py).
"""

import json
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import nn

from distiller_zoo import Progress
from errors import Stopped, UserError
from helper.configuration import run_name
from helper.distributed import average_statistics, by_main, count_processes, describe_batch, is_main
from helper.guard import Guard
from helper.initial import read_initial, start_from
from helper.inputs import Inputs, load_inputs
from helper.lockstep import execute_together
from helper.metrics import evaluate
from helper.reporting import describe_data, describe_method, describe_protocol, format_epoch, format_result
from helper.run_folder import BEST, CONFIG, LAST, RESULT, FolderElsewhere, RunFolder
from helper.run_state import build_distiller, data_record
from helper.signals import StopRequest
from helper.stage_training import StageTraining, TeacherRequest, format_title
from helper.stored import check_optimizer, check_state, contained
from helper.teacher import TeacherFile, check_apart
from models import build_model
from models.backbone import Output, probe_shapes
from models.checkpoints import load_weights
from models.cost import count_parameters
from models.synchronised import synchronise

#: What a resumed run takes up besides weights and optimizer.
STATE = ("stage_number", "epoch", "stage_step", "step", "epochs_over", "seconds", "accuracies", "choices")
#: How a run is executed: it asks for the teacher's outputs, is sent them, and returns the content of `result.json`.
Execution = Generator[TeacherRequest, Output, dict]


def run(configs: Sequence[Namespace], teacher_file: TeacherFile | None) -> list[dict]:
    """From resolved configurations to trained students; returns the content of every run folder's `result.json`.

    The configurations agree in data, teacher and device; one run is the usual case.
    """
    stop_request = StopRequest()
    with ExitStack() as folders:
        with ExitStack() as preparations:
            initial = read_initial(configs)
            inputs = load_inputs(configs[0], teacher_file)._replace(initial=initial)
            runs = []
            for config, label in zip(configs, _labels(configs), strict=True):
                folder = _open_folder(config, preparations)
                folders.callback(folder.close)
                folder.label = f"[{label}] " if len(configs) > 1 else ""
                if is_main():
                    print(f"{folder.label}run folder: {folder.path}", flush=True)
                if config.resume is None:
                    _record_settings(config, folder, beside=configs[0] if runs else None)
                runs.append(_prepare(config, inputs, folder, stop_request))
        with stop_request:
            return execute_together(runs, inputs.teach)


def _labels(configs: Sequence[Namespace]) -> list[str]:
    """What runs are called side by side: by their trials, or by their folders where trials do not tell them apart."""
    trials = [f"trial {config.trial}" for config in configs]
    return trials if len(set(trials)) == len(trials) else [run_name(config) for config in configs]


def _open_folder(config: Namespace, preparations: ExitStack) -> RunFolder:
    """The folder to go on with, or a new one, which goes again where the preparations fail; the main process's."""
    folder = by_main(lambda: _claim_folder(config))
    if not is_main():
        return FolderElsewhere(folder.path)
    if config.resume is None:
        preparations.enter_context(folder.discarded_on_error())
    return folder


def _claim_folder(config: Namespace) -> RunFolder:
    if config.resume is not None:
        return RunFolder(config.resume).lock()
    return RunFolder.create(config.save_dir, run_name(config))


def _record_settings(config: Namespace, folder: RunFolder, beside: Namespace | None) -> None:
    """Write every setting and its origin; on the terminal only what differs from the run `beside`, if there is one."""
    for argument, value in sorted(vars(config).items()):
        if argument != "origins" and value is not None:
            known = beside is not None and getattr(beside, argument, None) == value
            log = folder.log_quietly if known else folder.log
            log(f"  {argument:<18} {value!s:<24} ({config.origins[argument]})")
    folder.write_json(CONFIG, vars(config))


def _record_changes(config: Namespace, folder: RunFolder) -> None:
    """Write down which settings a resumed run has changed, so that it is continued and tabulated as what it is now."""
    stored = folder.read_json(CONFIG)
    now = json.loads(json.dumps(vars(config)))
    changed = {name: value for name, value in now.items() if name not in ("origins", "resume")}
    changed = {name: value for name, value in changed.items() if name not in stored or stored[name] != value}
    for name, value in sorted(changed.items()):
        folder.log(f"  {name:<18} {value!s:<24} (was {stored.get(name, 'unknown')})")
    if changed:
        origins = {name: now["origins"][name] for name in changed if name in now["origins"]}
        folder.write_json(CONFIG, stored | changed | {"origins": stored.get("origins", {}) | origins})


def _prepare(config: Namespace, inputs: Inputs, folder: RunFolder, stop_request: StopRequest) -> "Run":
    if inputs.teacher_note:
        folder.log(inputs.teacher_note)
    run = Run(config, inputs, folder, stop_request)
    if config.resume is not None:
        run.restore()
        if is_main():
            _record_changes(config, folder)
    return run


class Run:
    """Everything that one training run holds; `execute` is the story."""

    def __init__(self, config: Namespace, inputs: Inputs, folder: RunFolder, stop_request: StopRequest):
        self.config, self.folder, self.stop_request = config, folder, stop_request
        self.device, self.data, self.test_loader = inputs.device, inputs.data, inputs.test_loader
        self.choosing_loader = inputs.choosing_loader
        self.teacher_accuracy = inputs.teacher_accuracy
        torch.manual_seed(config.seed)
        student = build_model(config.model_s, self.data.num_classes)
        probe_shapes(student, self.data.image_size)
        if config.init is not None and config.resume is None:
            folder.log(start_from(inputs.initial, student, config, self.data.num_classes))
        self.distiller = build_distiller(
            vars(config),
            student,
            inputs.network,
            num_classes=self.data.num_classes,
            image_size=self.data.image_size,
            train_targets=self.data.train.targets,
        ).to(self.device)
        if inputs.network is not None:
            check_apart(self.distiller, inputs.network, config.distill)
        if config.sync_bn and count_processes() > 1:
            synchronise(self.distiller)
        inputs.fast.prepare_student(self.distiller, self.device)
        self.stages = self.distiller.stages(config.epochs)
        self.guard = Guard(config.max_bad_steps)
        self.step, self.epochs_over, self.seconds = 0, 0, 0.0  # what is over, in all stages
        self.accuracies: list[float] = []  # test accuracy (%) of every epoch of the main stage
        self.choices: list[float] = []  # what the best epoch is chosen by: the same, or accuracy on held-out images
        self.epoch_state: dict | None = None  # where a resumed run stands within an epoch
        self._enter(0)

    def _enter(self, number: int, epoch: int = 0, stage_step: int = 0) -> None:
        """Begin the stage of this number, or take it up after some of its epochs and steps."""
        self.stage_number, self.epoch, self.stage_step = number, epoch, stage_step
        self.training = StageTraining(
            self.stages[number], self.distiller, self.data, self.config, self.device, self.guard
        )

    @property
    def in_main_stage(self) -> bool:
        return self.stage_number == len(self.stages) - 1

    def execute(self) -> Execution:
        """Train what is left of the run; why it failed stands in its log."""
        try:
            return (yield from self._train())
        except UserError as error:
            # Alone it ends the script, which prints it; among others it is told now, and not when all are over.
            with suppress(UserError):  # a full disk
                (self.folder.log if self.folder.label else self.folder.log_quietly)(f"failed: {error}")
            raise

    def _train(self) -> Execution:
        self.folder.log(describe_data(self.data, self.device))
        self.folder.log(describe_method(self.distiller, self.stages, self.config.model_s, self.data.image_size))
        if division := describe_batch(self.config):
            self.folder.log(division)
        while True:
            while self.epoch < self.stages[self.stage_number].epochs and self._steps_left() != 0:
                yield from self._run_epoch()
            if self.in_main_stage:
                return self._finish()
            self._enter(self.stage_number + 1)

    def _steps_left(self) -> int | None:
        """How many steps `--max_steps` leaves of the stage; None where there is no limit."""
        return None if self.config.max_steps is None else max(self.config.max_steps - self.stage_step, 0)

    def _run_epoch(self) -> Generator[TeacherRequest, Output, None]:
        stage, started = self.stages[self.stage_number], time.perf_counter()
        progress = Progress(self.epoch, stage.epochs)
        means, steps = yield from self.training.train_epoch(
            progress,
            self.epochs_over,
            most_steps=self._steps_left(),
            log=self.folder.log_quietly,
            after_step=self._after_step,
            state=self.epoch_state,
        )
        self.epoch_state = None
        average_statistics(self.distiller)
        self.distiller.eval()
        # The student of an earlier stage is not yet what is tested.
        test = self._test() if self.in_main_stage else {}
        self.epoch, self.stage_step, self.step = self.epoch + 1, self.stage_step + steps, self.step + steps
        self.epochs_over, self.seconds = self.epochs_over + 1, self.seconds + time.perf_counter() - started
        learning_rate = self.training.learning_rate(self.epoch)
        skipped = {"skipped_steps": self.guard.skipped} if self.config.max_bad_steps else {}
        record = {"epoch": self.epoch, "step": self.step, "learning_rate": learning_rate, **means, **test, **skipped}
        if self.in_main_stage:
            self.accuracies.append(test["test_accuracy"])
            self.choices.append(test.get("holdout_accuracy", test["test_accuracy"]))
        else:
            record = {"stage": stage.name, **record}
        self.folder.append_metrics(record, self.epochs_over)
        self.folder.log(format_epoch(record, format_title(stage.name, progress)))
        self._save(record)
        self._stop_if_asked()

    def _test(self) -> dict[str, float]:
        """Accuracies on the test images, and on the held-out ones where there are any."""
        test = evaluate(self.distiller.predict, self.test_loader, "testing")
        if self.choosing_loader is not None:
            held_out = evaluate(self.distiller.predict, self.choosing_loader, "held-out images")
            test |= {name.replace("test", "holdout"): value for name, value in held_out.items()}
        return test

    def _after_step(self, make_state: Callable[[], dict], number: int) -> None:
        """Save within an epoch where that is due, or before the run stops."""
        every = self.config.save_every_steps
        if self.stop_request.heard_by_any() is not None or (every and number % every == 0):
            average_statistics(self.distiller)
            epoch_state = make_state()
            self._save_last(self._model(None), epoch_state)
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        number = self.stop_request.heard_by_any()
        if number is not None:
            name = signal.Signals(number).name
            raise Stopped(number, f"stopped by {name} and saved; go on with --resume {self.folder.path}")

    def _model(self, accuracy: float | None) -> dict:
        """What a checkpoint holds of the networks, and what is known of them; never of diverged ones."""
        self.guard.check_weights(self.distiller)
        return {
            "config": {key: value for key, value in vars(self.config).items() if key != "origins"},
            "data": data_record(self.data),
            "epoch": self.epoch,
            "accuracy": accuracy,
            "distiller": self.distiller.state_dict(),
        }

    def _save_last(self, model: dict, epoch_state: dict | None) -> None:
        state = {name: getattr(self, name) for name in STATE}
        state |= {"epoch_state": epoch_state, "skipped_steps": self.guard.skipped}
        self.folder.save(LAST, model | state | {"optimizer": self.training.optimizer.state_dict()})

    def _save(self, record: dict) -> None:
        model = self._model(record.get("test_accuracy"))
        if self.in_main_stage:
            # The first of equals is kept, so the last epoch does not overwrite the best for a tie.
            if self._best_epoch() == self.epoch:
                self.folder.save(BEST, model)
            if self.config.save_freq and self.epoch % self.config.save_freq == 0:
                self.folder.save(f"epoch_{self.epoch}.pth", model)
        self._save_last(model, None)  # the last of them: a run that is killed before it makes the others again

    def _best_epoch(self) -> int:
        """Counted from 1; the first of equals."""
        return self.choices.index(max(self.choices)) + 1

    def restore(self) -> None:
        """Take up the state of the folder's last checkpoint."""
        checkpoint = by_main(self.folder.read_last)
        source = f"--resume: {self.folder.path} does not fit this run"
        with contained(source):
            checkpoint.setdefault("choices", checkpoint["accuracies"])  # files from before there was --holdout
            self._enter(checkpoint["stage_number"], checkpoint["epoch"], checkpoint["stage_step"])
            check_state(checkpoint, self.in_main_stage)
            load_weights(self.distiller, self.config.model_s, checkpoint["distiller"], source)
            optimizer = self.training.optimizer
            momentum = check_optimizer(checkpoint["optimizer"], optimizer.param_groups[0]["params"])
            optimizer.load_state_dict(optimizer.state_dict() | {"state": momentum})
            for name in (*STATE, "epoch_state"):
                setattr(self, name, checkpoint[name])
            self.guard.skipped = checkpoint["skipped_steps"]
        self.folder.keep_metrics_until(self.epochs_over)
        stage = self.stages[self.stage_number]
        title = format_title(stage.name, Progress(self.epoch - 1, stage.epochs))
        within = f" and {self.epoch_state['steps']} steps" if self.epoch_state else ""
        self.folder.log(f"resumed after {title}{within}")

    def _finish(self) -> dict:
        last_five, best_epoch = self.accuracies[-5:], self._best_epoch()
        result = {
            "accuracy_last": self.accuracies[-1],
            "accuracy_best": self.accuracies[best_epoch - 1],
            "accuracy_mean_last_five": sum(last_five) / len(last_five),
            "best_epoch": best_epoch,
            "protocol": describe_protocol(self.config.holdout),
            "epochs": self.epoch,
            "steps": self.step,
            "teacher_accuracy": self.teacher_accuracy,
            "test_images": len(self.data.test.targets),
            "parameters": count_parameters(self.distiller.export()),
            "parameters_trained": count_parameters(nn.ModuleList(self.stages[-1].trained)),
            "seed": self.config.seed,
            "seconds": self.seconds,
            "processes": count_processes(),
            "torch": torch.__version__,
            "device": str(self.device),
        }
        self.folder.write_json(RESULT, result)
        self.folder.log(format_result(result))
        return result
