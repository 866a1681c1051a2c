"""The story of a run, top to bottom: files, data, student, method, stages, epochs, result.

Nothing here knows the name of a method; what a method needs it says itself (distiller_zoo/base.py).
"""

import functools
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from dataset import (
    WITHOUT_LABELS,
    Centre,
    ImageData,
    Images,
    Loader,
    StreamedImages,
    class_weights,
    data_changes,
    data_identity,
    dataset_at,
    hold_out,
    load_data,
)
from dataset.folders import list_folder
from distiller_zoo import Distiller, Progress, find_distiller
from errors import Stopped, UserError
from helper import command_line
from helper.checkpoint import (
    build_distiller,
    check_optimizer,
    check_progress,
    contained,
    data_record,
    make_checkpoint,
    network_of,
    upgrade,
)
from helper.command_line import Given
from helper.distributed import (
    average_statistics,
    by_main,
    choose_kernels,
    count_processes,
    describe_batch,
    device_of,
    is_main,
    main_first,
    one_by_one_here,
    rank,
)
from helper.fast import Fast, check_precision
from helper.guard import Guard
from helper.log import (
    describe_data,
    describe_method,
    describe_protocol,
    format_epoch,
    format_losses,
    format_result,
)
from helper.loops import (
    Training,
    evaluate,
    format_title,
    matching_loss,
    pooled_features,
    random_state,
    set_random_state,
    train_epoch,
    without_trunk,
)
from helper.metrics import best_epoch, best_without_labels, probe, summarise_without_labels
from helper.networks import (
    CachedTeacher,
    Network,
    Teacher,
    check_accuracy,
    check_apart,
    classes_taught,
    known_classes,
    name_of_published,
    own_test,
    read_at_classes,
    read_initial,
    read_teacher,
    start_from,
    with_class_names,
)
from helper.optim import average_of, check_rates, parameters_of, take_up
from helper.run_folder import BEST, CONFIG, LAST, RESULT, FolderElsewhere, RunFolder
from helper.settings import Configuration, all_settings, check_shared, identity, read_stored
from helper.signals import StopRequest
from models import build_model
from models.backbone import Backbone, probe_shapes
from models.checkpoints import load_weights, weights_digest
from models.classes import compare_classes
from models.cost import count_parameters
from models.external import DROPS, is_external
from models.synchronised import synchronise

#: Images per batch when testing; where they are wider than SMALL pixels, as many as in training.
EVALUATION_BATCH, SMALL = 512, 64
#: Of images that only a probe is fitted to, the share that tests it where they have no test images.
#: And how many training images tell the matching loss where none are held out.
PROBE_SPLIT, JUDGED_IMAGES = 0.2, 1000
#: What a resumed run takes up besides weights, optimizer and skipped steps.
STATE = ("stage_number", "epoch", "stage_step", "step", "epochs_over", "seconds", "records", "epoch_state")


# Files.


class Opened(NamedTuple):
    """The configurations of the runs of a command line, and the networks that their files hold."""

    configs: list[Configuration]
    teacher: Network | None
    initial: Network | None


def open_runs(given: Given) -> Opened:
    """Read what a command line names, each file once whatever the number of runs, and resolve every run."""
    folder = given.resume if given.resume not in (None, command_line.LATEST) else None
    stored = by_main(lambda: _read_settings(folder) if folder else {})
    first = stored | given.runs[0]
    ema = first.get("ema", False)
    path, *_ = [command_line.teacher_of(stored | run) for run in given.runs]
    how = first.get("model_t"), ema, first.get("teacher_weights")
    teacher = None if path is None else main_first(lambda: read_teacher(path, *how))
    of_teacher = {} if teacher is None else teacher.settings_as_teacher()
    for run in given.runs:
        run |= by_main(lambda run=run: with_class_names(run) | _dataset_of(stored | run, of_teacher))
    source, initial, of_initial = None if folder else first.get("init"), None, {}
    if source is not None and "model_s" not in first:
        initial = None if is_external(source) else main_first(lambda: read_initial(source, None, ema))
        of_initial = {"model_s": name_of_published(source) if initial is None else initial.name}

    def resolve(run: Mapping[str, Any]) -> Configuration:
        if given.resume == command_line.LATEST:
            return _resolve_latest(run, of_teacher, of_initial)
        return command_line.resolve(run, stored, of_teacher, of_initial, folder)

    configs = by_main(lambda: command_line.share_order([resolve(run) for run in given.runs], given))
    for config in configs:
        check_rates(config)
        check_precision(config.precision, device_of(config.device))
        if config.patience and not config.holdout:
            raise UserError(
                "--patience: the test images must not decide when a run ends; keep training images for that, with "
                "--holdout K"
            )
    check_shared(configs)
    if source is not None and any(config.folder is None for config in configs):
        initial = initial or main_first(lambda: read_initial(source, configs[0].model_s, ema))
        found = {"init_digest": initial.digest}
        configs = [config if config.folder else config.replace("initial weights", **found) for config in configs]
    return Opened(configs, teacher, initial)


def _dataset_of(values: Mapping[str, Any], of_teacher: Mapping[str, Any]) -> dict[str, str]:
    """What `--data` says of the data set where nothing else does: {"dataset": "folder"} for a folder of images."""
    known = values.get("dataset") or of_teacher.get("dataset") or all_settings()["dataset"].default
    if values.get("labels") == "none" and values.get("data") is not None and known not in WITHOUT_LABELS:
        if "dataset" in values:
            return {}  # what is wrong is said where the images are read
        print(f"--labels none: the images below {values['data']}: --dataset folder")
        return {"dataset": "folder"}
    if values.get("data") is None or "dataset" in values:
        return {}
    found = dataset_at(values["data"], known)
    if found == known:
        return {}
    print(f"--data {values['data']} is a folder of images: --dataset {found}")
    return {"dataset": found}


def _resolve_latest(run: Mapping[str, Any], of_teacher: Mapping, of_initial: Mapping) -> Configuration:
    """`--resume` without a value: the latest run of this name where there is one, else a new run."""
    config = command_line.resolve(run, {}, of_teacher, of_initial)
    folder = RunFolder.find(config.save_dir, config.name)
    if folder is None:
        return config
    path = str(folder.path)
    return command_line.resolve(run, _read_settings(path), of_teacher, of_initial, path)


def _read_settings(path: str) -> dict[str, Any]:
    """The settings of the run folder to resume."""
    folder = RunFolder(path)
    if not folder.path.is_dir():
        raise UserError(f"--resume: {path} is not a run folder")
    return read_stored(folder.read_json(CONFIG), f"--resume: {folder.path / CONFIG}")


# Data and teacher.


class Inputs(NamedTuple):
    """The data set on the device, and how it is tested on."""

    device: torch.device
    data: ImageData
    test_loader: Loader
    choosing_loader: Loader | None  # held-out training images for choosing; `data` lacks them
    identity: dict  # what tells whether the data are still the same
    probe: tuple[Loader, Loader] | None = None  # labelled images to fit a probe of the features to, and to test it on


def load_inputs(config: Configuration) -> Inputs:
    """Load the data set of the runs; raises `UserError` where that is impossible."""
    choose_kernels(config.deterministic)
    device = device_of(config.device)
    # Only a folder that was named on the command line is written to.
    may_download = config.data is None or config.origins["data"] == "command line"
    reading = (config.data, config.image_size, config.num_workers, config.max_broken, may_download)
    with one_by_one_here():
        data = load_data(
            config.dataset,
            *reading,
            background=config.background,
            stream={"auto": None, "on": True, "off": False}[config.stream],
            split=config.split,
            holdout=config.holdout,
            labelled=config.labels != "none",
            normalisation=_recorded_normalisation(config),
            device_memory=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
        )
    what = data_identity(data)
    data = data._replace(train=data.train.to(device), test=data.test.to(device))
    batch_size = EVALUATION_BATCH if data.image_size <= SMALL else config.batch_size
    choosing_loader = None
    if config.holdout:
        try:
            train, held_out = hold_out(data.train, config.holdout)
        except ValueError as error:
            raise UserError(f"--holdout: {error}; choose another number") from None
        data = data._replace(train=train)
        choosing_loader = _part_loader(held_out, data, batch_size, device)
    probe = None if config.data_probe is None else _load_probe(config, data, reading[2:], batch_size, device)
    return Inputs(device, data, _part_loader(data.test, data, batch_size, device), choosing_loader, what, probe)


def _load_probe(
    config: Configuration, data: ImageData, reading: tuple, batch_size: int, device: torch.device
) -> tuple[Loader, Loader]:
    """The images of `--data_probe`, prepared as the unlabelled ones are: to fit to, and to test on."""
    normalisation, folder = (data.mean, data.std), config.data_probe
    try:
        split = 0.0 if list_folder(folder, may_split=True).test else PROBE_SPLIT
        named: dict[str, Any] = {"background": config.background, "split": split, "normalisation": normalisation}
        labelled = load_data(config.dataset, folder, config.image_size, *reading, **named)
    except UserError as error:
        raise UserError(str(error).replace("--data:", "--data_probe:", 1)) from None
    train, test = (_part_loader(part.to(device), labelled, batch_size, device) for part in labelled[1:3])
    return train, test


def _recorded_normalisation(config: Configuration) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The mean and deviation that a resumed run has on record."""
    if config.folder is None:
        return None
    if config.get("mean") and config.get("std"):
        return config.mean, config.std
    checkpoint = by_main(RunFolder(config.folder).read_last)  # a run from before they were settings
    with contained(f"--resume: {config.folder}"):
        record = checkpoint.get("record", checkpoint.get("data"))
        return tuple(record["mean"]), tuple(record["std"])


def _part_loader(images: Images | StreamedImages, data: ImageData, batch_size: int, device: torch.device) -> Loader:
    """Batches of this process's part of a split: every image once in all of them."""
    mine = torch.arange(len(images.targets)).tensor_split(count_processes())[rank()]
    return Loader(images, data, batch_size, device, subset=mine)


def _as_held(inputs: Inputs) -> Loader:
    """The test images in the size in which they are held; whatever else sees them resizes that."""
    data = inputs.data._replace(resized=None)
    return _part_loader(data.test, data, inputs.test_loader.batch_size, inputs.device)


def class_weights_of(config: Configuration, data: ImageData) -> torch.Tensor | None:
    """What `--class_weights` gives each class (K,), None without it; the file is the main process's."""
    if config.class_weights is None:
        return None
    return by_main(lambda: class_weights(config.class_weights, data.train.targets, data.classes))


def prepare_teacher(source: Network | None, inputs: Inputs, config: Configuration) -> Teacher | None:
    """The frozen teacher, its accuracy measured; raises `UserError` where it does not fit the data or its record."""
    if source is None:
        return None
    data = inputs.data
    if config.teacher_classes is not None:
        source = read_at_classes(source, config.teacher_classes)
    parts = (source, data, config.teacher_image_size, Fast.of(config), inputs.device)
    if config.cache_teacher is None:
        teacher = Teacher(*parts)
    else:
        teacher = CachedTeacher(*parts, folder=config.cache_teacher, top_k=config.cache_top_k)
    notes = [_check_teacher(teacher, number, inputs, config) for number in range(len(source.teachers))]
    if data.labelled and source.members and source.num_classes == data.num_classes:
        shown = _as_held(inputs) if teacher.sees_source else inputs.test_loader
        teacher.accuracy = evaluate(teacher.predict, shown, "checking the teachers")["test_accuracy"]
        notes.append(f"{len(notes)} teachers: {teacher.accuracy:.2f} % by the average of their logits")
    steps = [each.record.get("max_steps") for each in source.teachers]
    notes += [f"warning: this teacher was trained for {each} steps only (--max_steps)" for each in steps if each]
    described = (teacher.network.describe(data.image_size), teacher.seen)
    teacher.note = "\n".join(filter(None, (*source.notes, *described, *notes)))
    return teacher


def _check_teacher(teacher: Teacher, number: int, inputs: Inputs, config: Configuration) -> str:
    """A line on the accuracy of one of the teachers, tested as its weights' own test does where that is known and the
    data are image files; raises `UserError` where it does not fit the data or its record."""
    source, data = teacher.source.teachers[number], inputs.data
    if not data.labelled:
        first = known_classes(teacher.source)
        others = compare_classes(known_classes(source), first) if first and teacher.source.num_classes else None
        if others is not None and not config.allow_teacher_gap:
            raise UserError(
                f"--path_t: {teacher.source.teachers[0].path} and {source.path} have classes in another order, so "
                "their logits have no average; choose other teachers, or --allow_teacher_gap"
            )
        return f"teacher {source.name}: its accuracy is not measured: the images have no labels"
    if source.num_classes != data.num_classes:
        has = f"its {source.num_classes} classes are not those of the data" if source.num_classes else "no classifier"
        return f"teacher {source.name}: {has}; its maps alone teach"
    others = compare_classes(source.record.get("classes"), data.classes)
    if others is not None and not config.allow_teacher_gap:
        raise UserError(f"--path_t: {others}; use the data that the teacher knows, or --allow_teacher_gap")
    own, how = own_test(source, data), ""
    shown = _as_held(inputs) if teacher.sees_source else inputs.test_loader
    if own is not None:
        centre = (
            own.test_size,
            (own.test_resize - own.test_size) / 2,
            data.background,
            own.interpolation,
            own.squashes,
        )
        assert data.test_files is not None, "own_test is None without image files"
        files = data.test_files.seen_as(Centre(*centre)).to(inputs.device)
        as_theirs = data._replace(mean=own.mean, std=own.std, resized=None)
        shown = _part_loader(files, as_theirs, inputs.test_loader.batch_size, inputs.device)
        sides = "both sides" if own.squashes else "the shorter side"
        how = f"; tested as its weights are: {sides} {own.test_resize}, centre {own.test_size}, {own.interpolation}"
    predict = functools.partial(teacher.predict_alone, number, as_tested=own is not None)
    accuracy = evaluate(predict, shown, "checking the teacher")["test_accuracy"]
    teacher.accuracy = None if teacher.source.members else accuracy
    return check_accuracy(source, data.name, accuracy, config.allow_teacher_gap) + how


# Runs.


@contextmanager
def prepared(opened: Opened, inputs: Inputs, teacher: Teacher | None) -> Iterator[list["Run"]]:
    """The runs, each in its claimed folder; new folders are removed again where a run turns out impossible."""
    with ExitStack() as folders:
        with ExitStack() as preparations:
            runs: list[Run] = []
            for config, label in zip(opened.configs, _labels(opened.configs), strict=True):
                found = {"data_digest": inputs.identity["digest"], "mean": inputs.data.mean, "std": inputs.data.std}
                config = _with_weights(config.replace("the data", **found), inputs.data)
                if teacher is not None and teacher.image_size != inputs.data.image_size:
                    config = config.replace("teacher's weights", teacher_image_size=teacher.image_size)
                folder = _open_folder(config, preparations)
                folders.callback(folder.close)
                folder.label = f"[{label}] " if len(opened.configs) > 1 else ""
                if is_main():
                    print(f"{folder.label}run folder: {folder.path}", flush=True)
                if config.folder is None:
                    _record_settings(config, folder, known=opened.configs[0] if runs else None)
                if teacher is not None:
                    folder.log(teacher.note)
                run = Run(config, inputs, teacher, opened.initial, folder, alone=len(opened.configs) == 1)
                if config.folder is not None:
                    run.restore()
                    _record_changes(run)
                folders.callback(run.close)
                runs.append(run)
        if teacher is not None:
            folders.callback(teacher.close)
        yield runs


def _with_weights(config: Configuration, data: ImageData) -> Configuration:
    """The run with the digest of its class weights; raises `UserError` where a resumed run began with others."""
    weights = class_weights_of(config, data)
    if weights is None:
        return config
    digest = weights_digest({"weights": weights})
    if config.get("weights_digest") not in (None, digest) and not _accepts(config):
        raise UserError(
            f"--class_weights: {config.class_weights} is not what {config.folder} began with; restore the file, or "
            "accept the new weights with --accept_changes"
        )
    return config.replace("the class weights", weights_digest=digest)


def _accepts(config: Configuration) -> bool:
    """Whether changes are accepted now: what an earlier resume has accepted says nothing of changes since."""
    return config.accept_changes and config.origins["accept_changes"] == "command line"


def _labels(configs: Sequence[Configuration]) -> list[str]:
    """What runs of one process are called: by their trials, or by their folders where trials do not tell them apart."""
    trials = [f"trial {config.trial}" for config in configs]
    return trials if len(set(trials)) == len(trials) else [config.name for config in configs]


def _open_folder(config: Configuration, preparations: ExitStack) -> RunFolder:
    """The folder to resume, or a new one, which is removed where the preparations fail; the main process's."""

    claimed: list[RunFolder] = []

    def claim() -> str:
        resumed = config.folder and RunFolder(config.folder).lock()
        claimed.append(resumed or RunFolder.create(config.save_dir, config.name))
        return str(claimed[0].path)

    path = by_main(claim)
    if not is_main():
        return FolderElsewhere(path)
    if config.folder is None:
        preparations.enter_context(claimed[0].discarded_on_error())
    return claimed[0]


def _record_settings(config: Configuration, folder: RunFolder, known: Configuration | None) -> None:
    """Write every setting and its origin; on the terminal only what differs from the run `known`, if there is one."""
    for argument, value in sorted(config.items()):
        if value is not None:
            log = folder.log_quietly if known is not None and known.get(argument) == value else folder.log
            log(f"  {argument:<18} {value!s:<24} ({config.origins[argument]})")
    folder.write_json(CONFIG, config.as_json())


def _record_changes(run: "Run") -> None:
    """Write down which settings a resumed run has changed, so that it is continued and tabulated as what it is now."""
    if not is_main():
        return
    folder = run.folder
    stored, now = folder.read_json(CONFIG), json.loads(json.dumps(run.config.as_json()))
    origins = now.pop("origins")
    changed = {name: value for name, value in now.items() if name not in stored or stored[name] != value}
    if not run.is_over:
        folder.remove(RESULT)  # of a shorter run: it is not finished any more
    for name, value in sorted(changed.items()):
        folder.log(f"  {name:<18} {value!s:<24} (was {stored.get(name, 'unknown')})")
    if changed:
        kept = stored.get("origins", {}) | {name: origins[name] for name in changed if name in origins}
        folder.write_json(CONFIG, stored | changed | {"origins": kept})


def train(runs: Sequence["Run"], teacher: Teacher | None) -> list[dict]:
    """Train the runs to their ends; returns the content of every `result.json`.

    Those whose next epochs show the same batches go through them together, the furthest behind first. One that fails
    ends alone; its error is raised when the others are over.
    """
    with StopRequest() as stop:
        for run in runs:
            run.finishing = stop.finishing
            with run.own_turn():
                run.begin()
        while waiting := [run for run in runs if not run.is_over]:
            first = min(waiting, key=lambda run: run.epochs_over)
            group = [run for run in waiting if run.epoch_key == first.epoch_key]

            def after_step(number: int, group=group) -> None:
                """Save within an epoch where that is due, or before the runs stop."""
                heard = stop.heard_by_any()  # once: a signal that comes during the saves waits for the next step
                for run in group:
                    with run.own_turn():
                        run.save_within_epoch(number, stopping=heard is not None)
                _stop_if(heard, runs)

            try:
                train_epoch(group, teacher, stop.finishing, after_step)
            except UserError as error:  # the images are unreadable: none of the group can go on
                for run in group:
                    run.fail(error)
                if count_processes() > 1:
                    raise
            _stop_if(stop.heard_by_any(), runs)
    _raise_failures(runs)
    return [run.result for run in runs if run.result is not None]


def _stop_if(number: int | None, runs: Sequence["Run"]) -> None:
    """End the runs, which are saved, where a signal was heard."""
    left = [run for run in runs if run.result is None and run.error is None]
    if number is not None and left:
        how = f"--resume {left[0].folder.path}" if len(runs) == 1 else "the same command and --resume"
        raise Stopped(number, f"stopped by {signal.Signals(number).name} and saved; resume with {how}")


def _raise_failures(runs: Sequence["Run"]) -> None:
    failed = [(run, run.error) for run in runs if run.error is not None]
    for _, error in failed if len(runs) == 1 else []:
        raise error
    if failed:
        raise UserError("; ".join(f"{run.folder.label.strip(' []')}: {error}" for run, error in failed))


def _spread(n: int, is_training: bool) -> torch.Tensor:
    """Sample indices that tell the matching loss: of held-out images all, of training images some, evenly spread."""
    return torch.arange(0, n, max(-(-n // JUDGED_IMAGES), 1) if is_training else 1)


def _with_classes(config: Configuration, data: ImageData, teacher: Teacher | None) -> ImageData:
    """The data; those without labels have the classes that a teacher's logits teach, none where they teach none."""
    if data.labelled:
        return data
    if count_processes() > 1:
        raise UserError("--labels none: it is for runs of one process; leave torchrun out")
    if teacher is None or not find_distiller(config.distill).trains_classifier(config):
        return data._replace(classes=[])
    return data._replace(classes=classes_taught(teacher.source))


def _new_student(config: Configuration, data: ImageData) -> Backbone:
    """A freshly initialised student, with the dropout that was chosen for it."""
    drops = {name: rate for name in DROPS if (rate := config[name]) is not None}
    student = build_model(config.model_s, data.num_classes, data.image_size, drops)
    probe_shapes(student, data.image_size)
    return student


class Run:
    """Everything that one training run holds; `train` goes through its stages and their epochs."""

    def __init__(
        self,
        config: Configuration,
        inputs: Inputs,
        teacher: Teacher | None,
        initial: Network | None,
        folder: RunFolder,
        alone: bool,
    ):
        self.config, self.inputs, self.folder = config, inputs, folder
        self.data = _with_classes(config, inputs.data, teacher)
        self.teacher, self._alone = teacher, alone
        torch.manual_seed(config.seed)
        student = _new_student(config, self.data)
        if initial is not None and config.folder is None:
            folder.log(start_from(initial, student, config.model_s, self.data.classes, config.dataset))
        self.method = build_distiller(
            config,
            student,
            None if teacher is None else teacher.network,
            num_classes=self.data.num_classes,
            image_size=self.data.image_size,
            train_targets=self.data.train.targets,
            class_weights=class_weights_of(config, self.data),
        ).to(inputs.device)
        if teacher is not None:
            check_apart(self.method, teacher.network, config.distill)
        if config.sync_bn and count_processes() > 1:
            synchronise(self.method)
        Fast.of(config).prepare_student(self.method, inputs.device)
        stages, frozen = self.method.stages(config.epochs), config.freeze == "trunk"
        self.stages = [without_trunk(stage, self.method) if frozen else stage for stage in stages]
        self.average = average_of(self.method, config.ema_decay)
        self.guard = Guard(config.max_bad_steps)
        self.step, self.epochs_over, self.seconds = 0, 0, 0.0  # what is over, in all stages
        self.records: list[dict] = []  # of every epoch of the main stage
        self.epoch_state: dict | None = None  # where a resumed run is within an epoch
        self.error: UserError | None = None
        self.result: dict | None = None
        self.latest = ""  # the losses, as the progress bar shows them
        self._means: dict[str, float] | None = None  # of an epoch whose steps are done, and that is not recorded
        self._started: float | None = None  # when the epoch began, of the clock; None before the first
        self.finishing: Callable[[], AbstractContextManager] = nullcontext  # what a stop does not interrupt
        self._enter(0)
        self._random = random_state()  # used where several runs share the process

    def _enter(self, number: int, epoch: int = 0, stage_step: int = 0) -> None:
        """Begin the stage of this number, or take it up after some of its epochs and steps."""
        self.stage_number, self.epoch, self.stage_step = number, epoch, stage_step
        self.training = Training(
            self.stages[number], self.method, self.data, self.config, self.inputs.device, self.guard
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
                raise  # this process may be the only one: it cannot leave the run and go on with the others
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
        over = self.epoch >= self.stages[self.stage_number].epochs or self._steps_left() == 0
        return over or self._is_out_of_patience()

    def _is_out_of_patience(self) -> bool:
        patience = self.config.patience
        return bool(patience and self.records) and self.epoch - self._best_epoch() >= patience

    def _steps_left(self) -> int | None:
        """How many steps `--max_steps` leaves of the stage; None where there is no limit."""
        return None if self.config.max_steps is None else max(self.config.max_steps - self.stage_step, 0)

    @property
    def first_step(self) -> int:
        """Steps of the next epoch that are over."""
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
        augmentation = self.training.loader.augmentation
        assert augmentation is not None, "the loader of training images has an augmentation"
        if changes := augmentation.describe():
            self.folder.log(changes)
        self.folder.log(describe_method(self.method, self.stages, self.config.model_s, self.data.image_size))
        if division := describe_batch(self.config):
            self.folder.log(division)
        if self.teacher is not None and (line := self.teacher.open_for(self.training)):
            self.folder.log(line)
        self._go_to_next_stage()

    def _go_to_next_stage(self) -> None:
        """Where a stage is over, begin the next; after the last write the result."""
        while self._stage_is_over() and not self.in_main_stage:
            self._enter(self.stage_number + 1)
        if self._stage_is_over():
            self._finish()

    def begin_epoch(self) -> None:
        """Prepare the next epoch."""
        before = self.epoch_state["meter"]["counts"][3] if self.epoch_state else 0.0  # seconds before a stop
        self._started = time.perf_counter() - before
        progress = Progress(self.epoch, self.stages[self.stage_number].epochs)
        self.training.begin_epoch(progress, self.epochs_over, self.epoch_state)

    def finish_step(self, number: int) -> None:
        """The optimizer's step, and a line in the log where one is due."""
        training, last = self.training, self.last_step
        if not training.finish_step(number):
            self.folder.log_quietly(f"{training.title} step {number}/{last} skipped: a number in it was not finite")
        elif self.average is not None and self.in_main_stage:
            self.average.update_parameters(self.method)
        if number % self.config.print_freq == 0 and training.meter.has_images:
            self.guard.look()
            self.latest = format_losses(training.meter.summary())
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
        """Of all processes, each of which has seen its own part of the batches."""
        average_statistics(self.method)
        if self.average is not None:
            average_statistics(self.average.train())
            self.average.eval()

    def end_epoch(self) -> None:
        """Test, record and save; begin the next stage or finish where this one is over."""
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
        self.epoch_state = None
        self.epoch, self.stage_step, self.step = self.epoch + 1, self.stage_step + steps, self.step + steps
        self.epochs_over, self.seconds = self.epochs_over + 1, self.seconds + time.perf_counter() - (self._started or 0)
        rate = self.training.learning_rate(self.epoch, steps - 1)
        skipped = {"skipped_steps": self.guard.skipped} if self.config.max_bad_steps else {}
        skipped |= {"overflowed_steps": self.guard.overflows} if self.training.scaler.is_enabled() else {}
        record = {"epoch": self.epoch, "step": self.step, "learning_rate": rate, **measured, **skipped}
        if self.in_main_stage:
            self.records.append(record)
        else:
            record = {"stage": stage.name, **record}
        self.folder.append_metrics(record, self.epochs_over)
        self.folder.log(format_epoch(record, format_title(stage.name, progress)))
        self._save(record)

    def _test(self) -> dict[str, float]:
        """What is measured on the test images, and on the held-out ones where there are any; also of the average."""
        if not self.data.labelled:
            return self._judge()
        test = self._test_method(self.method)
        if self.average is not None:
            averaged = self._test_method(cast(Distiller, self.average.module))
            test |= {f"{name}_ema": value for name, value in averaged.items() if "unreadable" not in name}
        return test

    def _test_method(self, method: Distiller) -> dict[str, float]:
        test = evaluate(method.predict, self.inputs.test_loader, "testing")
        if self.inputs.choosing_loader is not None:
            held_out = evaluate(method.predict, self.inputs.choosing_loader, "held-out images")
            test |= {name.replace("test", "holdout"): value for name, value in held_out.items()}
        return test

    def _judge(self) -> dict[str, float]:
        """How well a run without labels matches its teacher, and what its features are good for."""
        name, images = self._judged_images()
        loader = self.training.judging_loader(images, self.data, _spread(len(images.targets), name == "train"))
        judged = {f"{name}_matching_loss": matching_loss(self.training, self.teacher, loader)}
        if self.inputs.probe is not None:
            network = self.method.export()
            judged |= probe(*(pooled_features(network, part) for part in self.inputs.probe))
        return judged

    def _judged_images(self) -> tuple[str, Images | StreamedImages]:
        held_out = self.inputs.choosing_loader
        return ("train", self.data.train) if held_out is None else ("holdout", held_out.images)

    # Checkpoints.

    def _checkpoint(self, record: Mapping[str, float]) -> dict:
        """The networks and what is known of them; never of diverged ones."""
        self.guard.check_weights(self.method)
        teacher = None
        if self.teacher is not None:
            source = self.teacher.source
            teacher = {"name": source.name, "digest": source.digest, "accuracy": self.teacher.accuracy}
            counts = [each.num_classes for each in source.teachers]
            teacher["num_classes"] = counts if source.members else source.num_classes
        known = {"accuracy": record.get("test_accuracy"), "epoch": self.epoch, "teacher": teacher}
        known |= {"accuracy_ema": record["test_accuracy_ema"]} if "test_accuracy_ema" in record else {}
        known["max_steps"] = self.config.max_steps
        known["identity"] = self.inputs.identity
        averaged = self.average if self.average is not None and self.average.n_averaged else None
        return make_checkpoint(self.method, self.config, data_record(self.data), averaged, **known)

    def _save_last(self, checkpoint: dict, epoch_state: dict | None) -> None:
        state = {name: getattr(self, name) for name in STATE} | {"epoch_state": epoch_state}
        state |= {"skipped_steps": self.guard.skipped, "optimizer": self.training.optimizer.state_dict()}
        state |= {"overflows": self.guard.overflows, "scaler": self.training.scaler.state_dict()}
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
        """Take up the state of the folder's last checkpoint."""
        source = f"--resume: {self.folder.path} does not fit this run"
        with contained(source):
            checkpoint = by_main(lambda: upgrade(self.folder.read_last(), source))
            training = checkpoint["training"]
            self._check_data(checkpoint["record"])
            self._enter(training["stage_number"], training["epoch"], training["stage_step"])
            check_progress(training, self.in_main_stage)
            load_weights(self.method, self.config.model_s, training["distiller"], source)
            optimizer = self.training.optimizer
            state = check_optimizer(training["optimizer"], parameters_of(optimizer))
            take_up(optimizer, state, training["optimizer"]["param_groups"])
            for name in STATE:
                setattr(self, name, training[name])
            self.guard.skipped, self.guard.overflows = training["skipped_steps"], training.get("overflows", 0)
            if self.training.scaler.is_enabled():
                self.training.scaler.load_state_dict(training["scaler"])
            if self.average is not None and "ema" in training:
                load_weights(self.average.module, self.config.model_s, training["ema"], source)
                self.average.n_averaged.fill_(1)
            self._check_epochs()
        self.folder.keep_metrics_until(self.epochs_over)
        stage = self.stages[self.stage_number]
        title = format_title(stage.name, Progress(self.epoch - 1, stage.epochs))
        within = f" and {self.epoch_state['steps']} steps" if self.epoch_state else ""
        self.folder.log(f"resumed after {title}{within}")
        before, now = training["config"].get("epochs"), self.config.epochs
        if self.records and before != now and not self.is_over:
            rates = self.training.learning_rate(self.epoch), self.training.learning_rate(self.epoch + 1)
            old, new = (f"{rate:.4g}" for rate in (self.records[-1].get("learning_rate", rates[0]), rates[1]))
            self.folder.log(f"--epochs was {before} and is {now}: the learning rate was {old} and is {new} next")

    def _check_epochs(self) -> None:
        """Raise `UserError` where the main stage is to be shorter than what is trained of it."""
        begun = self.epoch + (self.epoch_state is not None)
        if self.in_main_stage and begun > self.stages[self.stage_number].epochs:
            raise UserError(f"--epochs: {begun} are trained already; give at least as many, or start a new run")

    def _check_data(self, record: Mapping[str, Any]) -> None:
        """Raise `UserError` where the data are not those that the run began with."""
        changes = data_changes(record.get("identity") or {"classes": record["classes"]}, self.inputs.identity)
        if changes and not _accepts(self.config):
            raise UserError(
                f"--resume: {self.folder.path}: the data have changed: {', '.join(changes)}; restore them, or accept "
                "that with --accept_changes"
            )

    # The result.

    def _accuracies(self) -> dict[str, Any]:
        accuracies, number = [record["test_accuracy"] for record in self.records], self._best_epoch()
        last_five = accuracies[-5:]
        return {
            "accuracy_last": accuracies[-1],
            "accuracy_best": accuracies[number - 1],
            "accuracy_mean_last_five": sum(last_five) / len(last_five),
            **self._averages_accuracies(number),
            "best_epoch": number,
            "protocol": describe_protocol(self.config.holdout, self.config.best_by),
        }

    def _without_labels(self) -> dict[str, Any]:
        summary = summarise_without_labels(self.records)
        name, images = self._judged_images()
        of = f"{len(_spread(len(images.targets), name == 'train'))} {'training' if name == 'train' else 'held-out'}"
        chosen = "best linear probe" if summary["best_by"] == "probe_accuracy" else "lowest matching loss"
        return summary | {"protocol": f"{chosen}, matching loss on {of} images"}

    def _best_epoch(self) -> int:
        """Counted from 1; the first of equals."""
        if not self.data.labelled:
            return best_without_labels(self.records)[1]
        return best_epoch(self.records, self.config.best_by)

    def _averages_accuracies(self, best: int) -> dict[str, float]:
        """Of the moving average, where there is one, after the last epoch and after the best."""
        if self.average is None or "test_accuracy_ema" not in self.records[-1]:
            return {}
        last, chosen = self.records[-1], self.records[best - 1]
        return {"accuracy_last_ema": last["test_accuracy_ema"], "accuracy_best_ema": chosen["test_accuracy_ema"]}

    def _finish(self) -> None:
        if self._started is None and (self.folder.path / RESULT).exists():  # resumed, with nothing left to do
            self.result = self.folder.read_json(RESULT)
            self.folder.log(format_result(self.result))
            return
        self.result = {
            **(self._accuracies() if self.data.labelled else self._without_labels()),
            "epochs": self.epoch,
            "steps": self.step,
            "teacher_accuracy": None if self.teacher is None else self.teacher.accuracy,
            "test_images": len(self.data.test.targets),
            "test_unreadable": self.records[-1].get("test_unreadable", 0),
            "parameters": count_parameters(self.method.export()),
            "parameters_trained": count_parameters(nn.ModuleList(self.stages[-1].trained)),
            "seed": self.config.seed,
            "digest": network_of(self.method)[1]["digest"],
            "seconds": self.seconds,
            "processes": count_processes(),
            "torch": torch.__version__,
            "device": str(self.inputs.device),
            "threads": torch.get_num_threads(),
        }
        if self._is_out_of_patience():
            measured = self.result.get("best_by", self.config.best_by).replace("_", " ")  # its own without labels
            self.folder.log(f"stopped early: no better {measured} in {self.config.patience} epochs")
        self.folder.append_outcome(identity(self.config, ("row", "run")), self.result)
        self.folder.write_json(RESULT, self.result)
        self.folder.log(format_result(self.result))
