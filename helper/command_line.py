"""From the command line to the resolved configuration of every run, without opening a file or a socket.

`parse` reads what was given; `resolve` lays it over a resumed run, what the teacher's file says, recipes and defaults,
in this order.
"""

import argparse
import difflib
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from distiller_zoo import DISTILLERS, find_distiller, refuse_without_effect
from distiller_zoo.base import ALPHA, BETA, GAMMA, KD_T
from errors import UserError
from helper import settings
from helper.configuration import Configuration, check_given
from helper.distributed import by_main, find_device, images_per_pass
from helper.optim import stretch
from helper.recipes import find_rows, run_length, values_of
from models.external import is_external
from setting import FILLED_IN, Setting, as_text, count, file_or_stdout, file_to_write, whole

#: A value of `--resume`: the latest run of the same name, if there is one.
LATEST = "auto"
#: The headings of the flags that every training script has.
GROUPS = (settings.INITIAL, settings.DATA, settings.TRAINING, settings.AUGMENTATION, settings.SPEED, settings.RUN)
#: How much of a misspelt flag must be that of the one that is suggested (difflib's ratio).
CLOSE = 0.75


class Given(NamedTuple):
    """What a command line says: argument -> value for every run, and the run folder to resume (or `LATEST`), if any."""

    runs: list[dict[str, Any]]
    resume: str | None


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s, one line without the usage, with a suggestion for a typo."""

    def __init__(self, description: str | None):
        self.names: list[str] = []
        self.files: dict[str, str] = {}  # where the file for a result is -> its flag
        self.unless_given: dict[str, Any] = {}  # what the script's name says; a resumed run knows better
        self.aliases: dict[str, str] = {}  # what this script calls a setting -> its argument
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            usage="%(prog)s [flags]", description=description, allow_abbrev=False, formatter_class=formatter
        )

    @classmethod
    def of_script(cls, docstring: str | None, paragraphs: int = 1) -> "Parser":
        """The parser of a script, which is described by the first paragraphs of its docstring."""
        return cls("\n\n".join((docstring or "").split("\n\n")[:paragraphs]).strip())

    def add_argument(self, *names, **options):
        self.names += names
        action = super().add_argument(*names, **options)
        if options.get("type") in (file_to_write, file_or_stdout):
            self.files[action.dest] = names[-1]
        return action

    def parse_args(self, *arguments, **named):
        found, places = super().parse_args(*arguments, **named), {}
        for name, flag in self.files.items():
            file = getattr(found, name)
            if file is not None and (other := places.setdefault(os.path.realpath(file), flag)) != flag:
                self.error(f"argument {flag}: {file} is {other}'s already; name another")
        return found

    def add_argument_group(self, *arguments, **named):
        group = super().add_argument_group(*arguments, **named)
        add = group.add_argument

        def add_and_note(*names, **options):
            self.names += names
            return add(*names, **options)

        group.add_argument = add_and_note
        return group

    def error(self, message):
        unknown = re.findall(r" (--?[a-zA-Z][\w-]*)", message) if message.startswith("unrecognized arguments: ") else []
        meant = dict.fromkeys(filter(None, (suggest(word, self.names, self._called()) for word in unknown)))
        hint = f"; did you mean {', '.join(meant)}?" if meant else " (--help lists the flags)"
        raise UserError(message + hint)

    @contextmanager
    def own_flags(self) -> Iterator[None]:
        """Within this block a `UserError` names a setting by this script's flag for it: --model in train_teacher.py."""
        try:
            yield
        except UserError as error:
            text = str(error)
            for name, argument in self.aliases.items():
                text = re.sub(rf"--{argument}\b", f"--{name}", text)
            if text == str(error):
                raise
            raise UserError(text) from None

    def _called(self) -> dict[str, str]:
        """What other toolboxes call the settings that this script has flags for -> its flag."""
        own = {argument: f"--{name}" for name, argument in self.aliases.items()}
        flags = {own.get(one.argument, one.names[-1]): one for one in settings.all_settings().values()}
        return {other: flag for flag, one in flags.items() if flag in self.names for other in one.called}


def suggest(word: str, names: Iterable[str], called: Mapping[str, str]) -> str | None:
    """The flag that a misspelt one stands for: --lr, --epoch, --batch-size, --modle; None where none is close.

    `called`: what other toolboxes call a flag, in lower case and with underscores -> the flag.
    """
    wanted = word.lstrip("-").replace("-", "_").lower()
    known = {name.lstrip("-").lower(): name for name in names if name.startswith("--")}
    initials = {"".join(part[:1] for part in name.split("_")): flag for name, flag in known.items() if "_" in name}
    begins = [flag for name, flag in known.items() if name.startswith(wanted) and len(wanted) > 2]
    stems = known | {name.rpartition("_")[0]: flag for name, flag in known.items() if name[-2:-1] == "_"}
    swapped = next((flag for name, flag in stems.items() if sorted(name) == sorted(wanted)), None)  # --modle: --model_s
    close = difflib.get_close_matches(wanted, known, n=1, cutoff=CLOSE)
    exact = known.get(wanted) or called.get(wanted)
    return exact or swapped or (begins or [initials.get(wanted)])[0] or (known[close[0]] if close else None)


def _add(group, setting: Setting) -> None:
    """One flag with its help and default."""
    if setting.type is bool:
        help_text = f"{setting.help} ({'on' if setting.default else 'off'})"
        group.add_argument(*setting.names, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        return
    is_said = setting.default in (None, FILLED_IN) or as_text(setting.default) in setting.help
    help_text = setting.help if is_said else f"{setting.help} ({as_text(setting.default)})"
    metavar = setting.metavar or (None if setting.choices else setting.argument.upper())
    group.add_argument(*setting.names, type=setting.type, choices=setting.choices, metavar=metavar, help=help_text)


def _add_settings(parser: Parser, groups: Iterable[str]) -> None:
    for title in groups:
        group = parser.add_argument_group(title)
        for setting in settings.SETTINGS:
            if setting.group == title:
                _add(group, setting)


def _add_run_flags(parser: Parser) -> None:
    """What decides which runs there are; no setting of a run."""
    add = parser.add_argument_group("several runs, and resuming").add_argument
    add(
        "--trials",
        type=count,
        metavar="K",
        help="train K students in one process, with consecutive trial numbers and seeds",
    )
    add(
        "--sweep",
        nargs="+",
        action="extend",
        metavar="FLAG=V,V",
        help="train students of every combination together: --sweep b=0.5,1 s=4,8, or distill=kd,norm; "
        "values that hold commas are separated by ;",
    )
    add(
        "--resume",
        nargs="?",
        const=LATEST,
        metavar="RUN",
        help="resume a run folder; without a value: the latest run of this name, if there is one",
    )


def _list_methods() -> str:
    """One line per method under its group's heading: name, what it is, source."""
    lines = []
    for group in dict.fromkeys(method.group for method in DISTILLERS.values()):
        lines.append(f"{group}:")
        for name, method in DISTILLERS.items():
            if method.group == group:
                source = f" ({method.source})" if method.source else ""
                lines.append(f"  {name:<12} {method.summary}{source}")
    return "\n".join(lines)


def _add_method_flags(parser: Parser) -> None:
    """Flags that most methods share, then every method's own under the names of those that read them."""
    weights = (GAMMA, ALPHA, BETA, KD_T)
    group = parser.add_argument_group("loss weights (defaults: helper/recipes.py)")
    for flag in weights:
        _add(group, flag)
    groups = {}
    for argument, flag in settings.method_settings().items():
        if argument not in {weight.argument for weight in weights}:
            users = [name for name, method in DISTILLERS.items() if argument in {one.argument for one in method.flags}]
            title = f"flags of --distill {' '.join(users)}"
            groups[title] = groups.get(title) or parser.add_argument_group(title)
            _add(groups[title], flag)


def student_parser(images: str = "small images") -> Parser:
    """The flags of the scripts that train students: the official NORM code's, and ours."""
    parser = Parser(f"Distil a student on {images}.\n\nmethods (--distill NAME, in any case):\n{_list_methods()}")
    _add_settings(parser, (settings.TEACHER, settings.NETWORK, *GROUPS))
    _add_run_flags(parser)
    _add_method_flags(parser)
    return parser


def imagenet_parser() -> Parser:
    """The flags of `train_imagenet_student.py`: the same, with ImageNet as the data set."""
    parser = student_parser("ImageNet, or on a folder like it")
    parser.unless_given = {"dataset": "imagenet"}
    return parser


def teacher_parser() -> Parser:
    """The flags of `train_teacher.py`."""
    parser = Parser("Train a network with labels alone: a teacher, or a baseline.")
    model = next(setting for setting in settings.SETTINGS if setting.group == settings.NETWORK)
    group = parser.add_argument_group(settings.NETWORK)
    group.add_argument("--model", type=model.type, dest=model.argument, metavar="NAME", help="the network to train")
    parser.aliases["model"] = model.argument
    _add_settings(parser, GROUPS)
    _add_run_flags(parser)
    parser.unless_given = {"distill": "ce"}
    return parser


def parse(parser: Parser, argv: Sequence[str] | None = None) -> Given:
    """The command line -> what it says of every run; raises `UserError` for anything illegal."""
    return by_main(lambda: _parse(parser, argv))  # of several processes one prints --help


def _parse(parser: Parser, argv: Sequence[str] | None) -> Given:
    given = {argument: value for argument, value in vars(parser.parse_args(argv)).items() if value is not None}
    resume = given.pop("resume", None)
    if resume == "":
        raise UserError("--resume: the name of the run folder is empty; leave the value out for the latest run")
    if re.search(r"-\d+$", given.get("trial", "")):
        raise UserError(f"--trial: {given['trial']} ends like the folder of a second run of one name; leave out the -")
    given = (parser.unless_given if resume in (None, LATEST) else {}) | given
    paths = {setting.argument for setting in settings.SETTINGS if setting.is_path}
    given |= {name: _absolute(value) for name, value in given.items() if name in paths}
    runs = _expand(given, parser.aliases)
    for run in runs:
        _refuse_unused(run)
    if len(runs) > 1 and resume not in (None, LATEST):
        raise UserError("--resume: with --trials or --sweep leave its value out, each run finds its own folder")
    return Given(runs, resume)


def _absolute(path: str) -> str:
    return path if is_external(path) else os.path.abspath(path)


def _refuse_unused(given: Mapping[str, Any]) -> None:
    """Raise `UserError` for a given flag that the given method, if one is, does not read."""
    if "distill" not in given:
        return
    method = find_distiller(given["distill"])
    used = {flag.argument for flag in method.flags}
    for argument, flag in settings.method_settings().items():
        if argument in given and argument not in used and not (flag.is_weight and given[argument] == 0):
            raise UserError(f"{'/'.join(flag.names)}: not used by --distill {method.name}; leave it out")
    of_teacher = [setting for setting in settings.SETTINGS if setting.group == settings.TEACHER]
    for setting in of_teacher:
        if not method.reads_teacher and setting.argument in given and setting.argument != "distill":
            raise UserError(f"--{setting.argument}: --distill {method.name} reads no teacher; leave it out")


# --trials and --sweep.


class Swept(NamedTuple):
    """One of the values of a swept setting, and how the name of a trial has it."""

    argument: str
    value: Any
    label: str


def _expand(given: dict[str, Any], aliases: Mapping[str, str]) -> list[dict[str, Any]]:
    """The values of every run: trials of each combination of the swept values."""
    trials, swept = given.pop("trials", 1), [_read_sweep(text, aliases) for text in given.pop("sweep", ())]
    names = [values[0].argument for values in swept]
    for name in names:
        if name in given or names.count(name) > 1:
            raise UserError(f"--sweep: {name} is given twice; leave one out")
    runs: list[dict[str, Any]] = []
    unread = set(names)
    for combination in itertools.product(*swept):
        varied = {one.argument: one.value for one in combination}
        used = settings.settings_of((given | varied).get("distill", settings.default_of("distill")))
        varied = {argument: value for argument, value in varied.items() if argument in used}
        unread -= set(varied)
        labelled = varied.keys() - {"distill", "model_s"}  # these are in the name of the run folder anyway
        label = "_".join(one.label for one in combination if one.argument in labelled)
        for number in range(trials):
            run = given | varied | _trial(given, number, trials, label)
            if run not in runs:  # a value that this method does not read
                runs.append(run)
    if unread:
        raise UserError(f"--sweep: {', '.join(sorted(unread))}: not used by any of the methods; leave it out")
    return runs


def _read_sweep(text: str, aliases: Mapping[str, str]) -> list[Swept]:
    """b=0.5,1 -> its values, as the flag reads them; those that hold commas are separated by ;."""
    name, _, values = text.partition("=")
    known, wanted = settings.all_settings().values(), aliases.get(name, name)
    setting = next((one for one in known if {f"-{wanted}", f"--{wanted}"} & set(one.names)), None)
    if setting is None or not values:
        raise UserError(f"--sweep: {text} must be a flag's name and values, like b=0.5,1 or co_sponge=4,8")
    if setting.shared or setting.tells_apart != "row":
        raise UserError(f"--sweep: {name} is the same for all runs of one process; start several commands for it")
    parser, read = Parser(None), []
    _add(parser.add_argument_group(setting.group), setting)
    for value in values.split(";" if ";" in values else ","):
        flag = setting.names[0]
        words = [flag, value] if setting.type is not bool else _switch(setting, value)
        label = re.sub(r"[^A-Za-z0-9._-]", "", f"{name}{value}".replace("_", "").replace(",", "_"))
        read.append(Swept(setting.argument, getattr(parser.parse_args(words), setting.argument), label))
    return read


def _switch(setting: Setting, value: str) -> list[str]:
    if value not in ("true", "false"):
        raise UserError(f"--sweep: {setting.argument} is true or false, not {value}")
    return [setting.names[-1] if value == "true" else f"--no-{setting.argument}"]


def _trial(given: Mapping[str, Any], number: int, trials: int, label: str) -> dict[str, Any]:
    """Consecutive names and seeds of trials; the label of a swept combination is added to the name."""
    name = given.get("trial", settings.default_of("trial"))
    if trials > 1:
        if not name.isdecimal():
            raise UserError(f"--trials gives consecutive trial numbers, so --trial must be a number, not {name}")
        name = str(int(name) + number)
    seed = given["seed"] + number if "seed" in given else _seed_of(name)
    if trials == 1 and not label:
        return {}
    return {"trial": f"{name}_{label}" if label else name, "seed": seed}


def _seed_of(trial: str) -> int:
    return int(trial) % 2**63 if trial.isdecimal() else 0


def share_order(configs: Sequence[Configuration], given: Given) -> list[Configuration]:
    """Give new runs that read the same teacher one order of images and one augmentation: they share its passes."""
    if len(configs) == 1 or "data_seed" in given.runs[0]:
        return list(configs)
    shared = configs[0].data_seed
    return [
        config
        if config.path_t is None or config.folder
        else config.replace("shared with the other runs", data_seed=shared)
        for config in configs
    ]


# One run.


def teacher_of(values: Mapping[str, Any]) -> str | None:
    """The teacher's file of a run with these given and stored values; None where the method reads none."""
    method = find_distiller(values.get("distill", settings.default_of("distill")))
    if not method.reads_teacher:
        return None
    if values.get("path_t") is None:
        raise UserError(
            f"--path_t: --distill {method.name} needs a teacher's checkpoint; train one with train_teacher.py"
        )
    return values["path_t"]


def resolve(
    given: Mapping[str, Any],
    stored: Mapping[str, Any] | None = None,
    of_teacher: Mapping[str, Any] | None = None,
    of_initial: Mapping[str, Any] | None = None,
    folder: str | None = None,
) -> Configuration:
    """The configuration of a run: what is given, over the resumed run in `folder` that has `stored`, over what the
    files of the teacher and of the initial weights say, over recipes, over defaults."""
    stored, of_teacher, of_initial = dict(stored or {}), dict(of_teacher or {}), dict(of_initial or {})
    given, digest = dict(given), of_teacher.get("teacher_digest")
    if folder is not None:
        check_given(folder, stored, given, digest)
        stored = stored | ({"teacher_digest": digest} if digest else {})
    told = of_initial | stored | given
    distill = told.get("distill", settings.default_of("distill"))
    _refuse_unused(given | {"distill": distill})
    if told.get("model_s") is None:
        raise UserError("--model_s is missing: name the network to train, like --model_s resnet8")
    dataset = told.get("dataset") or of_teacher.get("dataset") or settings.default_of("dataset")
    of_teacher = _without_other_data(of_teacher, dataset, told)
    known = settings.settings_of(distill)
    stored, given = ({name: value for name, value in each.items() if name in known} for each in (stored, given))
    chosen = stored | given
    place = dataset, of_teacher.get("model_t"), told["model_s"], distill
    rows = find_rows(*place, chosen)
    layers = (
        {name: (one.default, "default") for name, one in known.items() if one.default is not FILLED_IN},
        values_of(rows, *place),
        {name: (value, "from --init") for name, value in of_initial.items()},
        {name: (value, "teacher's record") for name, value in of_teacher.items() if value is not None},
        {name: (value, "resumed run") for name, value in stored.items()},
        {name: (value, "command line") for name, value in given.items()},
    )
    merged = {name: pair for layer in layers for name, pair in layer.items()}
    _scale_epochs(merged, known, chosen, rows)
    _leave_without_effect(merged, known, chosen)
    _derive(merged, known)
    _leave_labels_out(merged)
    values: dict[str, Any] = {name: value for name, (value, _) in merged.items()}
    origins = {name: origin for name, (_, origin) in merged.items()}
    _check(given, values)
    return Configuration(values, origins, folder)


def _check(given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise `UserError` where the resolved values of a run, some of them given, contradict each other."""
    _refuse_without_effect(given, values)
    _check_labels(values)
    _check_targets(values)
    _check_cache(values)


def _refuse_without_effect(given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise `UserError` for a given setting that has no effect with what others are."""
    refuse_without_effect(find_distiller(values["distill"]), values, given)
    for setting in settings.SETTINGS:
        value = given.get(setting.argument)
        if setting.works_with is not None and value and value != setting.default and not setting.works(values):
            other, known = setting.works_with
            raise UserError(
                f"--{setting.argument}: has no effect with --{other} {values[other]}; leave it out, or take "
                f"--{other} {' or '.join(known)}"
            )


def _check_targets(values: Mapping[str, Any]) -> None:
    """Raise `UserError` where targets are asked for that the method cannot use, or whose cross entropy is off."""
    method = find_distiller(values["distill"])
    mixing = [name for name in ("mixup", "cutmix") if values[name]]
    if mixing and method.refuses_mixing:
        raise UserError(
            f"--{mixing[0]}: --distill {method.name} cannot learn from mixed images: {method.refuses_mixing}; give "
            f"{' '.join(f'--{name} 0' for name in mixing)}, or choose another method"
        )
    of_labels = [name for name in ("label_smoothing", "class_weights") if values[name]]
    if of_labels and GAMMA in method.flags and not values[GAMMA.argument]:
        raise UserError(f"--{of_labels[0]}: has no effect with -r/--gamma 0: there is no cross entropy; leave it out")
    if values["class_weights"] and values["balanced_sampling"]:
        raise UserError("--balanced_sampling: --class_weights makes up for rare classes already; leave one of them out")


def _check_labels(values: Mapping[str, Any]) -> None:
    """Raise `UserError` where something needs labels, and there are none."""
    method = find_distiller(values["distill"])
    if values["labels"] != "none":
        if values["data_probe"] is not None:
            raise UserError("--data_probe: has no effect with labelled images, which have test images; leave it out")
        return
    if method.refuses_unlabelled:
        raise UserError(
            f"--labels none: --distill {method.name} cannot train without labels: {method.refuses_unlabelled}; choose "
            "another method"
        )
    # Without labels the losses judge the held-out images.
    if values["holdout"] and "sample index and negatives" in method.reads:
        raise UserError(
            f"--holdout: --distill {method.name} keeps something of every training image, and held-out ones have "
            "nothing; without labels (--labels none) leave it out"
        )
    known = settings.settings_of(method.name)
    given = [name for name, one in known.items() if one.needs_labels and values.get(name) not in (None, one.default)]
    if given:
        raise UserError(f"--{given[0]}: it needs labels, and there are none (--labels none); leave it out")
    if values["data"] is None:
        raise UserError("--labels none: name the folder of images with --data")


def _check_cache(values: Mapping[str, Any]) -> None:
    """Raise `UserError` where what a method reads of the teacher cannot be stored."""
    method = find_distiller(values["distill"])
    if values["cache_teacher"] is None:
        if values["cache_top_k"] is not None:
            raise UserError("--cache_top_k: has no effect without --cache_teacher; leave it out")
        return
    maps = [name for name in method.reads if name in ("maps", "final", "activated")]
    if maps:
        raise UserError(
            f"--cache_teacher: --distill {method.name} reads the teacher's feature maps, which are too large to store; "
            "leave it out, or choose a method that reads logits or pooled vectors"
        )
    if values["balanced_sampling"]:
        raise UserError(
            "--cache_teacher: --balanced_sampling may show an image twice in an epoch, with two crops; leave one out"
        )


def _without_other_data(of_teacher: dict[str, Any], dataset: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher's file says, without what it says of data that the run does not have."""
    if dataset != of_teacher.get("dataset"):
        of_data = {setting.argument for setting in settings.SETTINGS if setting.group == settings.DATA}
        return {name: value for name, value in of_teacher.items() if name not in of_data}
    place = of_teacher.get("data")
    if told.get("data", place) != place or told.get("labels") == "none":
        return of_teacher | {"split": None}  # another folder may have test images of its own
    return of_teacher


def _scale_epochs(merged: dict, known: Mapping[str, Setting], chosen: Collection[str], rows: Mapping) -> None:
    """Scale numbers of epochs that belong to a run of another length, unless they were chosen."""
    for name, setting in known.items():
        if setting.full_run is None or name in chosen or name not in merged or not merged[name][0]:
            continue
        length = run_length(setting, rows)
        value, source = merged[name]
        scaled = stretch(value if isinstance(value, tuple) else (value,), length, merged["epochs"][0])
        scaled = scaled if isinstance(value, tuple) else scaled[0]
        if setting.type is whole:  # a warm-up, which leaves an epoch of the main stage: ReviewKD's first has no weight
            scaled = min(scaled, merged["epochs"][0] - 1)
        if scaled != value:
            merged[name] = (scaled, f"{source}, scaled")


def _leave_without_effect(merged: dict, known: Mapping[str, Setting], chosen: Collection[str]) -> None:
    """Give settings that a recipe has for another choice their defaults: SGD's with --optimizer adamw, say."""
    values = {name: value for name, (value, _) in merged.items()}
    for name, setting in known.items():
        if setting.works_with is None or setting.default is FILLED_IN or name in chosen:
            continue
        if not setting.works(values) and values[name] != setting.default:
            other, with_these = setting.works_with
            merged[name] = (setting.default, f"its value is for --{other} {' or '.join(with_these)}")


def _leave_labels_out(merged: dict) -> None:
    """Leave the cross entropy out where there are no labels; raise `UserError` where it was asked for."""
    gamma = GAMMA.argument
    if merged["labels"][0] != "none" or gamma not in merged:
        return
    if merged[gamma][0] and merged[gamma][1] in ("command line", "resumed run"):
        raise UserError("-r/--gamma: without labels (--labels none) there is no cross entropy; leave it out")
    merged[gamma] = (0.0, "--labels none")


def _derive(merged: dict, known: Mapping[str, Setting]) -> None:
    """Fill in what follows from other settings: the parts of --fast, seeds, the size of a forward pass."""
    if merged["fast"][0] == "auto":
        device = find_device(merged["device"][0])
        for name, setting in known.items():
            if setting.auto is not None and merged[name][1] == "default":
                merged[name] = (setting.auto(device), "--fast auto")
    trial = merged["trial"][0]
    merged.setdefault("seed", (_seed_of(trial), "from --trial"))
    merged.setdefault("data_seed", (merged["seed"][0], "from --seed"))
    images = images_per_pass(merged["batch_size"][0], merged["accumulate"][0])
    merged["images_per_pass"] = (images, "batch_size over processes and --accumulate")
