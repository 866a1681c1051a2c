"""What the runs of a command line are given: their configurations, the files they name, the data, the teacher.

Each file is opened once, whatever the number of runs.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dataset import (
    OF_IMAGE_FILES,
    ImageData,
    Images,
    Loader,
    StreamedImages,
    class_weights,
    data_identity,
    dataset_at,
    hold_out,
    load_data,
)
from dataset.folders import list_folder
from errors import UserError, blamed_on_record, count_of
from helper import command_line
from helper.checkpoint import contained
from helper.command_line import Given
from helper.configuration import Configuration, check_shared, read_stored
from helper.distributed import (
    by_main,
    choose_kernels,
    count_processes,
    device_of,
    is_main,
    main_first,
    one_by_one_here,
    rank,
    untested_on,
)
from helper.fast import LONG_RUN, Fast, check_precision, keep_freed_memory
from helper.loops import evaluate
from helper.networks import (
    TEACHER_NORMALISATION,
    Network,
    classes_of_logits,
    known_classes,
    name_of_published,
    note_of_normalisation,
    read_at_classes,
    read_initial,
    read_teacher,
    with_class_names,
)
from helper.optim import check_rates
from helper.run_folder import CONFIG, RunFolder
from helper.settings import default_of
from helper.teacher import CachedTeacher, Teacher, check_accuracy, own_test, shown_as
from models.classes import compare_classes, matched_by_position
from models.external import is_external
from setting import what_hinders

#: Images per batch when testing; where they are wider than SMALL pixels, as many as in training.
EVALUATION_BATCH, SMALL = 512, 64
#: Of images that only a probe is fitted to, the share that tests it where they have no test images.
PROBE_SPLIT = 0.2


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
    first = stored | given.runs[0]  # the settings of files are shared by all runs
    teacher = _open_teacher(stored, given.runs)
    of_teacher = {} if teacher is None else teacher.settings_as_teacher()
    runs = by_main(lambda: [with_class_names(run) | _dataset_of(stored | run, of_teacher) for run in given.runs])
    source, ema = None if folder else first.get("init"), first.get("ema", False)
    initial, of_initial = None, {}
    if source is not None and "model_s" not in first:  # the model is that of the weights
        initial = None if is_external(source) else main_first(lambda: read_initial(source, None, ema))
        of_initial = {"model_s": name_of_published(source) if initial is None else initial.name}

    def resolve(run: Mapping[str, Any]) -> Configuration:
        if given.resume == command_line.LATEST:
            return _resolve_latest(run, of_teacher, of_initial)
        return command_line.resolve(run, stored, of_teacher, of_initial, folder)

    configs = by_main(lambda: command_line.share_order([resolve(run) for run in runs], given))
    for config in configs:
        _check(config)
    check_shared(configs)
    by_main(lambda: _check_place(configs))
    if source is not None and any(config.folder is None for config in configs):
        initial = initial or main_first(lambda: read_initial(source, configs[0].model_s, ema))
        found = {"init_digest": initial.digest}
        configs = [config if config.folder else config.replace("initial weights", **found) for config in configs]
    return Opened(configs, teacher, initial)


def _open_teacher(stored: dict[str, Any], given: Sequence[dict[str, Any]]) -> Network | None:
    """The teacher of runs with these stored and given values, which have it in common; None where they read none."""
    runs = [stored | run for run in given]
    path, *_ = [command_line.teacher_of(run) for run in runs]  # of all: a run that lacks its teacher is refused
    how = runs[0].get("model_t"), runs[0].get("ema", False), runs[0].get("teacher_weights")
    normalisation = runs[0].get("teacher_normalisation")
    with blamed_on_record(all("path_t" not in run for run in given), "--path_t", "teacher"):
        return None if path is None else main_first(lambda: read_teacher(path, *how, normalisation))


def _check(config: Configuration) -> None:
    """Raise `UserError` where settings contradict each other, or the device."""
    check_rates(config)
    check_precision(config.precision, device_of(config.device))
    if config.patience and not config.holdout:
        raise UserError(
            "--patience: the test images must not decide when a run ends; keep training images for that, with "
            "--holdout K"
        )


def _check_place(configs: Sequence[Configuration]) -> None:
    """Raise `UserError` where no folder for a new run could be made, before the data are read."""
    for config in configs:
        if config.folder is None and (reason := what_hinders(Path(config.save_dir))):
            raise UserError(f"--save_dir: {reason}")


def _dataset_of(values: Mapping[str, Any], of_teacher: Mapping[str, Any]) -> dict[str, str]:
    """What `--data` says of the data set where nothing else does: {"dataset": "folder"} for a folder of images."""
    known = values.get("dataset") or of_teacher.get("dataset") or default_of("dataset")
    if values.get("labels") == "none" and values.get("data") is not None and known not in OF_IMAGE_FILES:
        if "dataset" in values:
            return {}  # what is wrong is said where the images are read
        print(f"--labels none: the images below {values['data']}: --dataset folder")
        return {"dataset": "folder"}
    if values.get("data") is None or "dataset" in values:
        return {}
    found = dataset_at(values["data"], known)
    if found is None or found == known:
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
        parent = folder.path.parent
        hint = f"; name the folder, {parent}" if folder.path.is_file() and (parent / CONFIG).exists() else ""
        raise UserError(f"--resume: {path} is not a run folder{hint}")
    return read_stored(folder.read_json(CONFIG), f"--resume: {folder.path / CONFIG}")


# Data and teacher.


class Inputs(NamedTuple):
    """The data set on the device, and how it is tested on."""

    device: torch.device
    data: ImageData
    test_loader: Loader
    holdout_loader: Loader | None  # held-out training images, to choose the best epoch on; `data` lacks them
    identity: dict  # what tells whether the data are still the same
    probe: tuple[Loader, Loader] | None = None  # labelled images to fit a probe of the features to, and to test it on


def load_inputs(config: Configuration) -> Inputs:
    """Load the data set of the runs; raises `UserError` where that is impossible."""
    choose_kernels(config.deterministic)
    device = device_of(config.device)
    untested = untested_on(device)
    if untested and is_main():
        print(untested)
    keep_freed_memory(device)
    # Only a folder that was named on the command line is written to.
    may_download = config.data is None or config.origins["data"] == "command line"
    load = functools.partial(
        load_data,
        config.dataset,
        image_size=config.image_size,
        num_workers=config.num_workers,
        max_broken=config.max_broken,
        may_download=may_download,
        background=config.background,
    )
    with one_by_one_here():
        data = load(
            config.data,
            stream={"auto": None, "on": True, "off": False}[config.stream],
            split=config.split,
            holdout=config.holdout,
            labelled=config.labels != "none",
            normalisation=_known_normalisation(config),
            device_memory=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
        )
    identity = data_identity(data)
    data = data._replace(train=data.train.to(device), test=data.test.to(device))
    batch_size = EVALUATION_BATCH if data.image_size <= SMALL else config.batch_size
    holdout_loader = None
    if config.holdout:
        try:
            train, held_out = hold_out(data.train, config.holdout, data.classes)
        except ValueError as error:
            raise UserError(f"--holdout: {error}") from None
        data = data._replace(train=train)
        holdout_loader = _part_loader(held_out, data, batch_size, device)
    probe = None if config.data_probe is None else _load_probe(config, load, data, batch_size, device)
    test_loader = _part_loader(data.test, data, batch_size, device)
    return Inputs(device, data, test_loader, holdout_loader, identity, probe)


def decide_compiler(opened: Opened, inputs: Inputs) -> Opened:
    """The same runs; those of `--compile auto` in which it would not pay compile nothing."""

    def decided(config: Configuration) -> Configuration:
        steps = config.epochs * len(inputs.data.train.targets) // config.batch_size
        is_long = min(steps, config.max_steps or steps) >= LONG_RUN
        return config if config.compile != "auto" or is_long else config.replace("a short run", compile="off")

    return opened._replace(configs=[decided(config) for config in opened.configs])


def _load_probe(
    config: Configuration, load: Callable[..., ImageData], data: ImageData, batch_size: int, device: torch.device
) -> tuple[Loader, Loader]:
    """The images of `--data_probe`, read by `load` as the unlabelled ones were: to fit to, and to test on."""
    folder = config.data_probe
    with blamed_on_record(_is_recorded(config, "data_probe"), "--data_probe", "folder of the probe"):
        try:
            split = 0.0 if list_folder(folder, may_split=True).test else PROBE_SPLIT
            labelled = load(folder, split=split, normalisation=(data.mean, data.std))
        except UserError as error:
            raise UserError(str(error).replace("--data:", "--data_probe:", 1)) from None
    train, test = (images.to(device) for images in (labelled.train, labelled.test))
    return _part_loader(train, labelled, batch_size, device), _part_loader(test, labelled, batch_size, device)


def _is_recorded(config: Configuration, name: str) -> bool:
    return config.origins[name] == "resumed run"


def _known_normalisation(config: Configuration) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The mean and deviation that a resumed run has on record, or that a new one is given; None: the data set's."""
    if config.folder is None:
        given = config.normalisation
        return None if given is None else (given[:3], given[3:])
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


def class_weights_of(configs: Sequence[Configuration], data: ImageData) -> dict[str | None, torch.Tensor | None]:
    """What each value of `--class_weights` among some runs gives the classes (K,); a file is read once, by the main
    process."""
    found: dict[str | None, torch.Tensor | None] = {None: None}
    for config in configs:
        how = config.class_weights
        if how not in found:
            with blamed_on_record(_is_recorded(config, "class_weights"), "--class_weights", "class weights"):
                found[how] = by_main(lambda how=how: class_weights(how, data.train.targets, data.classes))
    return found


def prepare_teacher(loaded: Network | None, inputs: Inputs, config: Configuration) -> Teacher | None:
    """The frozen teacher, its accuracy measured; raises `UserError` where it does not fit the data or its record."""
    if loaded is None:
        return None
    data = inputs.data
    if config.teacher_classes is not None:
        loaded = read_at_classes(loaded, config.teacher_classes)
    teacher = _make_teacher(loaded, inputs, config)
    notes = [_check_teacher(teacher, number, inputs, config) for number in range(len(loaded.teachers))]
    if data.labelled and loaded.members and loaded.num_classes == data.num_classes:
        shown = _shown_to(teacher, inputs)
        teacher.accuracy = evaluate(teacher.predict, shown, "checking the teachers")["test_accuracy"]
        notes.append(f"{len(notes)} teachers: {teacher.accuracy:.2f} % by the average of their logits")
    usual = data.name if config.normalisation is None else None  # whose images are as that data set's usually are
    guessed = [note_of_normalisation(each.path, each.record, usual, TEACHER_NORMALISATION) for each in loaded.teachers]
    steps = [each.record.get("max_steps") for each in loaded.teachers]
    notes += [
        f"warning: this teacher was trained for {count_of(each, 'step')} only (--max_steps)" for each in steps if each
    ]
    described = (teacher.network.describe(data.image_size), teacher.seen)
    teacher.note = "\n".join(filter(None, (*loaded.notes, *guessed, *described, *notes)))
    return teacher


def _make_teacher(loaded: Network, inputs: Inputs, config: Configuration) -> Teacher:
    """The teacher, with its cache where there is one: a folder that is named here is made, one on record is not."""
    size, fast, folder = config.teacher_image_size, Fast.of(config), config.cache_teacher
    if folder is None:
        return Teacher(loaded, inputs.data, size, fast, inputs.device)
    if _is_recorded(config, "cache_teacher") and not os.path.isdir(folder):
        raise UserError(f"the cache on record: there is no folder {folder}; name one with --cache_teacher")
    return CachedTeacher(loaded, inputs.data, size, fast, inputs.device, folder, config.cache_top_k)


def _check_teacher(teacher: Teacher, number: int, inputs: Inputs, config: Configuration) -> str:
    """A line on the accuracy of one of the teachers, which is kept in the `teacher` where it is the only one; raises
    `UserError` where it does not fit the data or its record."""
    loaded, data = teacher.loaded.teachers[number], inputs.data
    if not data.labelled:
        if not config.allow_teacher_gap:
            _check_same_classes(teacher.loaded, loaded)
        return f"teacher {loaded.name}: its accuracy is not measured: the images have no labels"
    if loaded.num_classes != data.num_classes:
        has = f"its {loaded.num_classes} classes are not those of the data" if loaded.num_classes else "no classifier"
        return f"teacher {loaded.name}: {has}; its maps alone teach"
    others = compare_classes(classes_of_logits(loaded), data.classes)
    if others is not None and not config.allow_teacher_gap:
        raise UserError(f"--path_t: {others}; use the data that the teacher knows, or --allow_teacher_gap")
    accuracy, how = _test_teacher(teacher, number, inputs)
    teacher.accuracy = None if teacher.loaded.members else accuracy
    line = check_accuracy(loaded, data.name, accuracy, config.allow_teacher_gap)
    unknown = matched_by_position(classes_of_logits(loaded), data.classes)
    return "\n".join(filter(None, (f"{line}; {how}" if how else line, unknown and f"teacher {loaded.name}: {unknown}")))


def _check_same_classes(together: Network, one: Network) -> None:
    """Raise `UserError` where one of several teachers has its classes in another order than the first: no data say
    which is right."""
    first = known_classes(together)
    if first and together.num_classes and compare_classes(known_classes(one), first) is not None:
        raise UserError(
            f"--path_t: {together.teachers[0].path} and {one.path} have classes in another order, so their logits have "
            "no average; choose other teachers, or --allow_teacher_gap"
        )


def _test_teacher(teacher: Teacher, number: int, inputs: Inputs) -> tuple[float, str]:
    """The accuracy (%) of one of the teachers, tested as its weights' own test does where that is known and the data
    are image files, and how that is, in words; else as in training, and an empty text."""
    loaded, data = teacher.loaded.teachers[number], inputs.data
    own, how = own_test(loaded.path, loaded.record, data), ""
    shown = _shown_to(teacher, inputs)
    if own is not None:
        as_theirs, how = shown_as(own, data)
        test = as_theirs.test.to(inputs.device)
        shown = _part_loader(test, as_theirs, inputs.test_loader.batch_size, inputs.device)
    predict = functools.partial(teacher.predict_alone, number, as_tested=own is not None)
    return evaluate(predict, shown, "checking the teacher")["test_accuracy"], how


def _shown_to(teacher: Teacher, inputs: Inputs) -> Loader:
    """The test images as the teacher sees them in training: in the size in which they are held, where it resizes them
    itself."""
    if not teacher.sees_original:
        return inputs.test_loader
    data = inputs.data._replace(resized=None)
    return _part_loader(data.test, data, inputs.test_loader.batch_size, inputs.device)
