"""How a command line becomes a configuration: flags, a resumed run, the teacher's record, recipes, defaults.

A value comes from the flag if it is given, else from the run that is resumed, else from the teacher's record (its data
set), else from the recipe table, else from the defaults here.
"""

import argparse
import itertools
import os
from argparse import Namespace
from collections.abc import Sequence

from distiller_zoo import DISTILLERS, Distiller, find_distiller, refuse_without_effect
from errors import UserError
from helper.device import count_cores, find_device
from helper.distributed import by_main, images_per_pass, is_main
from helper.fast import OFF, choose
from helper.initial import find_model
from helper.recipes import resolve, run_length
from helper.run_folder import CONFIG, RunFolder
from helper.schedule import stretch
from helper.stored import read_configuration
from helper.teacher import TeacherFile, read_teacher
from helper.variants import SHARED, expand, share_order
from models.wrappers import describe_wrapper

#: Defaults of the flags that no recipe fills.
DEFAULTS = {
    "distill": "norm",
    "dataset": "digits",
    "image_size": 32,
    "holdout": 0,
    "num_workers": min(4, count_cores()),
    "max_broken": 10,
    "trial": "1",
    "device": "auto",
    "fast": "off",
    "save_dir": "save",
    "print_freq": 100,
    "save_freq": 0,
    "save_every_steps": 0,
    "max_bad_steps": 0,
    "allow_teacher_gap": False,
    "accumulate": 1,
    "sync_bn": False,
}
#: What may differ between a run and its continuation.
MAY_CHANGE = (
    "data",
    "path_t",
    "num_workers",
    "max_broken",
    "device",
    "print_freq",
    "save_freq",
    "save_every_steps",
    "max_bad_steps",
    "save_dir",
    "max_steps",
    "epochs",
    "accumulate",
    "compile",
)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[list[Namespace], TeacherFile | None]:
    """Command line -> (the resolved configuration of every run, the teacher's file); raises `UserError` for anything
    illegal. Without `--trials` and `--sweep` there is one run.

    A configuration's `origins` says where each value comes from; `resume` is the run folder to go on with, or None.
    """
    teacher = None

    def parse_here() -> list[Namespace]:
        nonlocal teacher
        configs, teacher = _parse_all(parser, argv)
        return configs

    configs = by_main(parse_here)
    if not is_main() and configs[0].path_t is not None:
        teacher = read_teacher(configs[0].path_t, configs[0].model_t)
    return configs, teacher


def _parse_all(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[list[Namespace], TeacherFile | None]:
    given = {argument: value for argument, value in vars(parser.parse_args(argv)).items() if value is not None}
    runs = expand(given, parser)
    if len(runs) > 1 and given.get("resume", "auto") != "auto":
        raise UserError("--resume: with --trials or --sweep leave its value out, each run finds its own folder")
    resolved = [_parse_run(values) for values in runs]
    configs = [config for config, _ in resolved]
    share_order(configs, given)
    _check_shared(configs)
    return configs, resolved[0][1]


def _check_shared(configs: Sequence[Namespace]) -> None:
    """Raise `UserError` where runs that go on together were begun with other data, teacher or fast path."""
    first, *others = configs
    for other, name in itertools.product(others, SHARED):
        ours, theirs = getattr(first, name), getattr(other, name)
        if ours != theirs:
            raise UserError(
                f"--resume: {first.resume or 'a new run'} has {name} {ours}, {other.resume or 'a new run'} {theirs}; "
                "they cannot share one process, go on with each alone"
            )


def _parse_run(given: dict) -> tuple[Namespace, TeacherFile | None]:
    if "distill" in given:
        find_distiller(given["distill"])
        given["distill"] = given["distill"].lower()
    wanted = given.pop("resume", None)
    if wanted is None:
        return _resolve(given, {})
    if wanted == "auto":
        config, teacher = _resolve(given, {})
        folder = RunFolder.find(config.save_dir, run_name(config))
        if folder is None:
            return config, teacher
        wanted = str(folder.path)
    return _resolve(given, _stored_configuration(wanted, given))


def run_name(config: Namespace) -> str:
    """The name of a run's folder: data set, method, networks, trial."""
    networks = [config.model_t, config.model_s] if config.model_t else [config.model_s]
    networks = [name.replace(":", "-") for name in networks]  # torchvision:NAME
    return "_".join([config.dataset, config.distill, *networks, f"trial{config.trial}"])


def foresee(given: dict, teacher: TeacherFile | None) -> Namespace:
    """The configuration that a run with these flags will have, whose teacher need not exist yet (`network` None)."""
    return _resolve(dict(given), {}, lambda *_: teacher)[0]


def _resolve(given: dict, stored: dict, find_teacher=None) -> tuple[Namespace, TeacherFile | None]:
    """Lay the sources of values over each other; `given` is the command line, `stored` the run that is resumed."""
    distill = given.get("distill", stored.get("distill", DEFAULTS["distill"]))
    method = find_distiller(distill)
    model_s = given.get("model_s", stored.get("model_s"))
    if model_s is None and "init" in given and not stored:
        model_s = find_model(given["init"])
    if model_s is None:
        raise UserError("name the network to train: --model_s NAME (in train_teacher.py: --model NAME)")
    _refuse_unused(given, distill, method)
    teacher = (find_teacher or _find_teacher)(stored | given, distill, method)
    of_teacher = _teacher_record(given, teacher)
    dataset = {"dataset": DEFAULTS["dataset"]} | of_teacher | stored | given
    chosen = {flag.argument: (stored | given).get(flag.argument) for flag in method.flags}
    recipe = resolve(dataset["dataset"], of_teacher["model_t"], model_s, distill, chosen)
    layers = (
        dict.fromkeys(("data", "max_steps", "resume", "init"), (None, "default")),
        {"model_s": (model_s, "from --init")},
        {argument: (value, "default") for argument, value in DEFAULTS.items()},
        {flag.argument: (flag.default, "default") for flag in method.flags},
        recipe,
        {argument: (value, "teacher's record") for argument, value in of_teacher.items()},
        {argument: (value, "resumed run") for argument, value in stored.items()},
        {argument: (value, "command line") for argument, value in given.items()},
    )
    merged = {argument: pair for layer in layers for argument, pair in layer.items()}
    if "epochs" in given and "lr_decay_epochs" not in given | stored:
        (milestones, source), full_run = merged["lr_decay_epochs"], recipe["epochs"][0]
        merged["lr_decay_epochs"] = (stretch(milestones, full_run, given["epochs"]), f"{source}, stretched")
    for flag in method.flags:
        value, source = merged[flag.argument]
        if flag.full_run and value and flag.argument not in given | stored:
            from_epochs = run_length(flag, dataset["dataset"], distill, recipe)
            (stretched,) = stretch((value,), from_epochs, merged["epochs"][0])
            if stretched != value:
                merged[flag.argument] = (stretched, f"{source}, stretched")
    _choose_fast_parts(merged, stored)
    if "seed" not in merged:
        trial = merged["trial"][0]
        merged["seed"] = (int(trial) % 2**63 if trial.isdecimal() else 0, "from --trial")
    divided = Namespace(batch_size=merged["batch_size"][0], accumulate=merged["accumulate"][0])
    merged["images_per_pass"] = (images_per_pass(divided), "batch_size over processes and --accumulate")
    merged.setdefault("data_seed", (merged["seed"][0], "from --seed"))
    config = Namespace(**{argument: value for argument, (value, _) in merged.items()})
    refuse_without_effect(method, vars(config), given)
    config.origins = {argument: origin for argument, (_, origin) in merged.items()}
    if "image_size" in given and config.dataset not in ("folder", "imagenet"):
        raise UserError(
            f"--image_size: only --dataset folder and imagenet have a choice; {config.dataset} is 32 pixels wide"
        )
    return config, teacher


def _choose_fast_parts(merged: dict, stored: dict) -> None:
    """Fill in what `--fast` decides and no flag has named; a resumed run keeps its own choices."""
    setting = merged["fast"][0]
    parts = OFF if setting == "off" else choose(find_device(merged["device"][0]))
    for part, value in parts.items():
        if part not in merged:
            merged[part] = (stored.get(part, value), f"--fast {setting}")


def _refuse_unused(given: dict, distill: str, method: type[Distiller]) -> None:
    known = {flag.argument: flag for other in DISTILLERS.values() for flag in other.flags}
    used = {flag.argument for flag in method.flags}
    for argument, flag in known.items():
        if argument in given and argument not in used and not (flag.is_weight and given[argument] == 0):
            raise UserError(f"{'/'.join(flag.names)}: not used by --distill {distill}; leave it out")
    for argument in () if method.needs_teacher else ("path_t", "model_t", "allow_teacher_gap"):
        if argument in given:
            raise UserError(f"--{argument}: --distill {distill} reads no teacher; leave it out")


def _find_teacher(values: dict, distill: str, method: type[Distiller]) -> TeacherFile | None:
    if not method.needs_teacher:
        return None
    if values.get("path_t") is None:
        raise UserError(f"--path_t: --distill {distill} needs a teacher's checkpoint; train one with train_teacher.py")
    return read_teacher(values["path_t"], values.get("model_t"))


def _teacher_record(given: dict, teacher: TeacherFile | None) -> dict:
    """What the teacher's file decides: its name, and the data set with its folder and size unless another is given."""
    if teacher is None:
        return {"path_t": None, "model_t": None, "wrapper_t": None}
    record = {
        "path_t": teacher.path,
        "model_t": teacher.name,
        "wrapper_t": describe_wrapper(teacher.network),
    }
    if given.get("dataset", teacher.dataset) == teacher.dataset:
        data = {"dataset": teacher.dataset, "data": teacher.data, "image_size": teacher.image_size}
        record |= {argument: value for argument, value in data.items() if value is not None}
    return record


def _stored_configuration(path: str, given: dict) -> dict:
    """The configuration of the run folder at `path`; what is given besides must agree with it, or be free to change."""
    if not os.path.isdir(path):
        raise UserError(f"--resume: {path} is not a run folder")
    stored = read_configuration(RunFolder(path).read_json(CONFIG), f"--resume: {os.path.join(path, CONFIG)}")
    for argument, value in given.items():
        if argument not in MAY_CHANGE and stored.get(argument) != value:
            raise UserError(
                f"--resume: {path} was run with {argument} {stored.get(argument)}, not {value}; leave the flag out, or "
                "start a new run"
            )
    return stored | {"resume": path}
