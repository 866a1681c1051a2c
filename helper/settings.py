"""The one table of the settings of a run, and what follows from it: the configuration, and what tells runs apart.

A method's own settings are in its file (distiller_zoo/); recipes.py has the values that depend on data and networks.
"""

import argparse
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dataset import BALANCED, DATASETS, POLICIES
from distiller_zoo import DISTILLERS, find_distiller
from errors import UserError
from helper.fast import COMPILE, PRECISIONS, computes_bfloat16
from helper.metrics import BEST_BY
from helper.optim import OPTIMIZERS, SCHEDULES
from helper.recipes import RECIPES
from models import find_builder
from models.ensemble import shares_of
from models.external import is_external
from setting import RECIPE, Setting, count, number, whole

NETWORK, TEACHER, INITIAL, DATA = "network", "teacher and method", "initial weights", "data"
TRAINING = "training (defaults: helper/recipes.py)"
AUGMENTATION = "augmentation, and what each class counts"
SPEED, RUN, FOUND = "speed: the same training, computed faster", "run", "found out when the run starts"
SOURCES = (
    "a run's, an exported network, or RepDistiller's; or published weights by name, torchvision:resnet34, "
    "torchvision:resnet50@IMAGENET1K_V2, timm:NAME"
)


def model_name(text: str) -> str:
    """The name of a model that exists, read from a flag."""
    try:
        find_builder(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _model_names(text: str) -> str:
    return ",".join(model_name(part) for part in text.split(","))


def sources_of(text: str) -> list[str]:
    """The teachers that a value of `--path_t` names: one file, whatever its name, or several sources with commas."""
    return [text] if os.path.isfile(text) else text.split(",")


def _teachers(text: str) -> str:
    sources = [_path(part) for part in sources_of(text)]
    return ",".join(part if is_external(part) else os.path.abspath(part) for part in sources)


def _shares(text: str) -> tuple[float, ...]:
    weights = [number(part) for part in text.split(",")]
    if len(weights) < 2 or sum(weights) == 0:
        raise argparse.ArgumentTypeError(f"must be a weight for each teacher, like 0.7,0.3, not {text}")
    return shares_of(weights, len(weights))


def _method(text: str) -> str:
    try:
        return find_distiller(text).name
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--distill: ")) from None


def _image_size(text: str) -> int:
    if not 8 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"must be 8 to 10,000 pixels, not {text}")
    return int(text)


def _image_sizes(text: str) -> int | tuple[int, ...]:
    sizes = tuple(_image_size(part) for part in text.split(","))
    return sizes if len(set(sizes)) > 1 else sizes[0]


def _trial(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", text):
        raise argparse.ArgumentTypeError(f"must be a name of letters, digits, - _ and ., not '{text}'")
    return text


def _epochs(text: str) -> tuple[int, ...]:
    try:
        return tuple(count(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be epochs like 150,180,210, not {text}") from None


def _path(text: str) -> str:
    return os.path.expanduser(text)


def _digest(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 64:
        raise ValueError("it must be a digest")
    return value


def _images(value: Any) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError("it must be a number of images")
    return value


def _colour(text: str) -> tuple[int, ...]:
    parts = tuple(whole(part) for part in text.split(","))
    if len(parts) != 3 or max(parts) > 255:
        raise argparse.ArgumentTypeError(f"must be red,green,blue from 0 to 255, not {text}")
    return parts


def _below_one(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 0 or more and below 1, not {text}")
    return float(text)


def _probability(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be a probability from 0 to 1, not {text}")
    return float(text)


def _alpha(text: str) -> float:
    value = float(text)
    if value and not 0.01 <= value <= 100:  # samples of smaller ones round to one half
        raise argparse.ArgumentTypeError(f"must be 0 or from 0.01 to 100, not {text}")
    return value


def _weights(text: str) -> str:
    return text if text == BALANCED else os.path.abspath(_path(text))


def _statistics(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(type(part) is float for part in value):
        raise ValueError("it must be three numbers")
    return tuple(value)


def _wrapper(value: Any) -> dict:
    if not isinstance(value, Mapping):
        raise ValueError("it must describe a wrapper")
    return dict(value)


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


OF_SGD = ("optimizer", "sgd")
#: Every setting of a run: a row here is its flag, default, help, entry in config.json, check on --resume, and more.
SETTINGS: tuple[Setting, ...] = (
    Setting(("--distill",), _method, "norm", "one of the methods above", group=TEACHER, metavar="METHOD"),
    Setting(("--model_s",), model_name, RECIPE, "student", group=NETWORK, metavar="NAME"),
    Setting(
        ("--model_t",),
        _model_names,
        None,
        "teacher; default: what --path_t says",
        group=TEACHER,
        metavar="NAME",
        shared=True,
    ),
    Setting(
        ("--path_t",),
        _teachers,
        None,
        f"the teacher's checkpoint: {SOURCES}. Several teachers are separated by commas",
        group=TEACHER,
        metavar="FILE",
        resume="free",
        shared=True,
    ),
    Setting(
        ("--teacher_weights",),
        _shares,
        None,
        "what each of several teachers counts, in the average of the logits and in NORM's loss; default: equal",
        group=TEACHER,
        metavar="W,W",
        shared=True,
    ),
    Setting(
        ("--allow_teacher_gap",),
        bool,
        False,
        "accept a teacher whose accuracy or classes are not the recorded ones",
        group=TEACHER,
        resume="free",
        identity="none",
        shared=True,
    ),
    Setting(
        ("--teacher_image_size",),
        _image_sizes,
        None,
        "resolution at which the teacher sees the images, of several teachers one for all or one each, with commas; "
        "default: the one that its weights were trained with",
        group=TEACHER,
        metavar="PIXELS",
        shared=True,
        decides_outputs=True,
    ),
    Setting(
        ("--teacher_classes",),
        str,
        None,
        "read the teacher's logits at these of its classes, in the order of the data's: names or numbers with commas "
        "(or, where names hold commas, with ;) between them, or a file with one in each line",
        group=TEACHER,
        metavar="NAMES|FILE",
        shared=True,
        decides_outputs=True,
    ),
    Setting(
        ("--cache_teacher",),
        _path,
        None,
        "store the teacher's logits, and pooled vectors where the method reads them, in this folder, and read them "
        "there in later runs that show the same images",
        group=TEACHER,
        metavar="FOLDER",
        resume="free",
        identity="none",
        shared=True,
        is_path=True,
    ),
    Setting(
        ("--cache_top_k",),
        count,
        None,
        "store the K largest logits alone; the rest of the probability is spread evenly over the other classes",
        group=TEACHER,
        metavar="K",
        shared=True,
    ),
    Setting(
        ("--init",),
        _path,
        None,
        f"start from these weights instead of random ones: a checkpoint, {SOURCES}. Where the number of classes "
        "differs, the classifier is new. The model name may be omitted",
        group=INITIAL,
        metavar="SOURCE",
        shared=True,
    ),
    Setting(
        ("--ema",),
        bool,
        False,
        "take the moving average (EMA) of the weights where the file of a teacher or of initial weights holds both",
        group=INITIAL,
        identity="none",  # the digests say which weights
        shared=True,
    ),
    Setting(
        ("--dataset",),
        str,
        "digits",
        "the data set; default: what the teacher was trained on, else digits (embedded, no download)",
        choices=DATASETS,
        group=DATA,
        shared=True,
        decides_outputs=True,
    ),
    Setting(
        ("--data",),
        _path,
        None,
        "where the data are stored or downloaded to; for folder and imagenet: the folder with train/ and val|test/",
        group=DATA,
        metavar="PATH",
        resume="free",
        shared=True,
        is_path=True,
    ),
    Setting(
        ("--labels",),
        str,
        "folders",
        "what says the classes of a folder of images: its class folders, or none: images at any depth, from which a "
        "method learns what the teacher shows of them",
        choices=("folders", "none"),
        group=DATA,
        shared=True,
        decides_outputs=True,
    ),
    Setting(
        ("--data_probe",),
        _path,
        None,
        "with --labels none: a labelled folder of images, on which pooled features are tested after every epoch, by a "
        "linear probe and by nearest neighbours; the best epoch is chosen by the matching loss",
        group=DATA,
        metavar="FOLDER",
        resume="free",
        shared=True,
        is_path=True,
    ),
    Setting(
        ("--split",),
        _below_one,
        0.0,
        "share of the training images, the same for all seeds, that becomes the test split of a folder without one",
        group=DATA,
        metavar="SHARE",
        shared=True,
        decides_outputs=True,
        needs_labels=True,
    ),
    Setting(
        ("--background",),
        _colour,
        (255, 255, 255),
        "colour under transparent images of a folder, red,green,blue",
        group=DATA,
        metavar="R,G,B",
        shared=True,
        decides_outputs=True,
    ),
    Setting(
        ("--stream",),
        str,
        "auto",
        "read a folder of images from the disk in every epoch: on, off (hold it in memory), or auto: what does not fit",
        choices=("auto", "on", "off"),
        group=DATA,
        resume="free",
        identity="none",
        shared=True,
    ),
    Setting(
        ("--image_size",),
        _image_size,
        32,
        "images of folder (32) and imagenet (224) become squares of this size; those of other data sets are "
        "held with 32 pixels and resized to it on the device (bilinear)",
        group=DATA,
        shared=True,
        decides_outputs=True,
    ),
    Setting(
        ("--holdout",),
        whole,
        0,
        "keep K training images, the same for all seeds, to choose the best epoch on; the test images then only "
        "report. With 0 the best epoch is chosen on the test images, as in the official code",
        group=DATA,
        metavar="K",
        shared=True,
        decides_outputs=True,
    ),
    Setting(
        ("--num_workers",),
        whole,
        min(4, count_cores()),
        "processes that decode images; data sets of small images are held in memory",
        group=DATA,
        resume="free",
        identity="none",
        shared=True,
    ),
    Setting(
        ("--max_broken",),
        whole,
        10,
        "maximum number of unreadable images before the run stops",
        group=DATA,
        resume="free",
        identity="none",
        shared=True,
    ),
    Setting(
        ("--recipe",),
        str,
        "tables",
        "whose defaults are taken; " + "; ".join(f"{name}: {what}" for name, what in RECIPES.items()),
        choices=RECIPES,
        group=TRAINING,
        identity="none",  # the values that it sets tell runs apart
    ),
    Setting(("--batch_size",), count, RECIPE, "global batch size; the learning rate is not rescaled", group=TRAINING),
    Setting(
        ("--accumulate",),
        count,
        1,
        "gradient accumulation: split each batch into K micro-batches",
        group=TRAINING,
        metavar="K",
        resume="free",
    ),
    Setting(
        ("--sync_bn",),
        bool,
        False,
        "BatchNorm and the feature transform over the batch of all processes that torchrun has started",
        group=TRAINING,
    ),
    Setting(
        ("--epochs",),
        count,
        RECIPE,
        "length of the main stage; schedules scale with it unless set explicitly",
        group=TRAINING,
        resume="free",
    ),
    Setting(
        ("--optimizer",), str, "sgd", "the optimizer; lamb and adan are timm's", choices=OPTIMIZERS, group=TRAINING
    ),
    Setting(("--learning_rate",), number, RECIPE, "the initial learning rate", group=TRAINING),
    Setting(
        ("--lr_decay",),
        str,
        RECIPE,
        "the learning rate schedule: step falls after every one of --lr_decay_epochs, cos is half a cosine, one_cycle "
        "rises over the first 0.3 of the run and falls over the rest, in every step",
        choices=SCHEDULES,
        group=TRAINING,
    ),
    Setting(
        ("--lr_warmup_epochs",),
        whole,
        0,
        "the learning rate grows linearly, in every step, over these first epochs of the main stage; cos then takes "
        "the rest of the run",
        full_run=RECIPE,
        group=TRAINING,
        metavar="E",
    ),
    Setting(
        ("--min_learning_rate",), number, 0.0, "floor of the schedule, where cos and one_cycle end", group=TRAINING
    ),
    Setting(
        ("--clip_grad",), number, 0.0, "scale the gradient down to this norm (0: no)", group=TRAINING, metavar="NORM"
    ),
    Setting(
        ("--lr_decay_epochs",),
        _epochs,
        RECIPE,
        "milestones of the step schedule: the learning rate falls after these epochs",
        full_run=RECIPE,
        group=TRAINING,
        metavar="E,E,...",
        works_with=("lr_decay", "step"),
    ),
    Setting(("--lr_decay_rate",), number, RECIPE, "factor of the step schedule", group=TRAINING),
    Setting(("--weight_decay",), number, RECIPE, "weight decay", group=TRAINING),
    Setting(("--decay_norms",), bool, True, "weight decay on normalisation layers and biases too", group=TRAINING),
    Setting(("--momentum",), number, RECIPE, "momentum of SGD", group=TRAINING, works_with=OF_SGD),
    Setting(("--nesterov",), bool, False, "Nesterov's momentum", group=TRAINING, works_with=OF_SGD),
    Setting(
        ("--drop_momentum",),
        bool,
        False,
        "start with no momentum after each milestone",
        group=TRAINING,
        works_with=OF_SGD,
    ),
    Setting(
        ("--ema_decay",),
        _below_one,
        0.0,
        "also keep an exponential moving average of the student's weights and statistics, D of it in every step "
        "(0: no); it is tested and saved next to the raw weights",
        group=TRAINING,
        metavar="D",
        needs_labels=True,
    ),
    Setting(
        ("--drop_rate",),
        _below_one,
        None,
        "dropout of a student of torchvision or timm (default: its library's)",
        group=TRAINING,
        metavar="P",
    ),
    Setting(
        ("--drop_path_rate",),
        _below_one,
        None,
        "drop path (stochastic depth) of a student of torchvision or timm, of its last branch (default: its library's)",
        group=TRAINING,
        metavar="P",
    ),
    Setting(
        ("--freeze",),
        str,
        "none",
        "trunk: train only the student's classifier, and what the method adds; its BatchNorms are in eval mode",
        choices=("none", "trunk"),
        group=TRAINING,
        needs_labels=True,
    ),
    Setting(
        ("--best_by",),
        str,
        "accuracy",
        "what the best epoch is chosen by, on the held-out images where there are any",
        choices=BEST_BY,
        group=TRAINING,
        needs_labels=True,
    ),
    Setting(
        ("--patience",),
        whole,
        0,
        "early stopping: end after E epochs without a better one; needs --holdout (0: no)",
        group=TRAINING,
        metavar="E",
        resume="free",
    ),
    Setting(
        ("--augment",),
        str,
        "standard",
        "standard: the data set's own crops and flips; none: not even these; or these and torchvision's policy of this "
        "name",
        choices=POLICIES,
        group=AUGMENTATION,
        decides_outputs=True,
    ),
    Setting(
        ("--colour_jitter",),
        _below_one,
        0.0,
        "scale brightness, contrast and saturation by factors from 1 - S to 1 + S",
        group=AUGMENTATION,
        metavar="S",
        decides_outputs=True,
    ),
    Setting(
        ("--random_erasing",),
        _probability,
        0.0,
        "erase a rectangle of an image with this probability",
        group=AUGMENTATION,
        metavar="P",
        decides_outputs=True,
    ),
    Setting(
        ("--mixup",),
        _alpha,
        0.0,
        "mix the images of a batch in shares from Beta(ALPHA, ALPHA); student and teacher see the same mixed images",
        group=AUGMENTATION,
        metavar="ALPHA",
        decides_outputs=True,
    ),
    Setting(
        ("--cutmix",),
        _alpha,
        0.0,
        "paste a rectangle of one image into another, its area from Beta(ALPHA, ALPHA); with --mixup one of them for "
        "each batch",
        group=AUGMENTATION,
        metavar="ALPHA",
        decides_outputs=True,
    ),
    Setting(
        ("--label_smoothing",),
        _below_one,
        0.0,
        "share of a label that is spread over all classes, in the cross entropy",
        group=AUGMENTATION,
        metavar="S",
        needs_labels=True,
    ),
    Setting(
        ("--class_weights",),
        _weights,
        None,
        "what a class counts in the cross entropy: balanced (inverse to its number of images), or a file with a class "
        "and its weight in each line",
        group=AUGMENTATION,
        metavar="balanced|FILE",
        needs_labels=True,
    ),
    Setting(
        ("--balanced_sampling",),
        bool,
        False,
        "draw the images of an epoch so that every class is equally likely, instead of showing each once",
        group=AUGMENTATION,
        needs_labels=True,
    ),
    Setting(
        ("--max_steps",),
        count,
        None,
        "end every stage after K steps, to try a command",
        group=TRAINING,
        metavar="K",
        resume="free",
    ),
    Setting(
        ("--device",),
        str,
        "auto",
        "auto (CUDA where there is a GPU), cpu, cuda, cuda:1, ...",
        group=TRAINING,
        resume="free",
        identity="none",
        shared=True,
    ),
    Setting(
        ("--fast",),
        str,
        "off",
        "auto: enable the options below that this device supports; off: none",
        choices=("auto", "off"),
        group=SPEED,
        identity="none",
        shared=True,
    ),
    Setting(
        ("--precision",),
        str,
        "float32",
        "of the networks; losses, statistics and weights stay float32",
        choices=PRECISIONS,
        group=SPEED,
        shared=True,
        auto=lambda device: "bfloat16" if computes_bfloat16(device) else "float32",
        decides_outputs=True,
    ),
    Setting(
        ("--channels_last",),
        bool,
        False,
        "memory layout of images and feature maps",
        group=SPEED,
        identity="none",
        shared=True,
        auto=lambda device: True,
    ),
    Setting(
        ("--fold_teacher",),
        bool,
        False,
        "the teacher's BatchNorms folded into its convolutions",
        group=SPEED,
        identity="none",
        shared=True,
        auto=lambda device: True,
    ),
    Setting(
        ("--fused_optimizer",),
        bool,
        False,
        "one kernel for the update of all parameters",
        group=SPEED,
        identity="none",
        shared=True,
        auto=lambda device: device.type in ("cpu", "cuda"),
    ),
    Setting(
        ("--compile",),
        str,
        "off",
        "torch.compile of both networks' forward passes, in this mode; --fast auto leaves it off. The first step "
        "takes minutes; not tried on a GPU, where reduce-overhead replays CUDA graphs",
        choices=COMPILE,
        group=SPEED,
        resume="free",
        identity="none",
        shared=True,
    ),
    Setting(
        ("--deterministic",),
        bool,
        False,
        "the same weights from the same command on a GPU too, with slower kernels; torch warns of operations that have "
        "none. A CPU needs no flag",
        group=SPEED,
        resume="free",
        identity="none",
        shared=True,
    ),
    Setting(("--trial",), _trial, "1", "name of this repetition", group=RUN, identity="none"),
    Setting(
        ("--seed",),
        whole,
        RECIPE,
        "of weights, order and augmentation; default: --trial if that is a number, else 0",
        group=RUN,
        identity="run",
    ),
    Setting(
        ("--data_seed",),
        whole,
        RECIPE,
        "of order and augmentation (--seed); runs that are trained together share the first one's",
        group=RUN,
        identity="none",
        decides_outputs=True,
    ),
    Setting(
        ("--save_dir",),
        _path,
        "save",
        "where run folders are made",
        group=RUN,
        metavar="ROOT",
        resume="free",
        identity="none",
        shared=True,
    ),
    Setting(
        ("--save_freq",),
        whole,
        0,
        "also keep epoch_<n>.pth every E epochs (0: none)",
        group=RUN,
        metavar="E",
        resume="free",
        identity="none",
    ),
    Setting(
        ("--save_every_steps",),
        whole,
        0,
        "also save within epochs, every K steps (0: no)",
        group=RUN,
        metavar="K",
        resume="free",
        identity="none",
    ),
    Setting(
        ("--max_bad_steps",),
        whole,
        0,
        "skip up to K steps of a run whose losses or gradient are not finite, then stop (0: stop at the first)",
        group=RUN,
        metavar="K",
        resume="free",
        identity="none",
    ),
    Setting(
        ("--print_freq",),
        count,
        100,
        "steps between lines in the log",
        group=RUN,
        metavar="K",
        resume="free",
        identity="none",
    ),
    Setting(
        ("--accept_changes",),
        bool,
        False,
        "resume although the teacher's weights or the data are not those that the run began with; it is recorded",
        group=RUN,
        resume="free",
        identity="none",
        shared=True,
    ),
    # Not flags: what a run finds out and keeps.
    Setting(
        ("wrapper_t",),
        _wrapper,
        None,
        "how the teacher's network is wrapped",
        group=FOUND,
        identity="none",
        decides_outputs=True,
    ),
    Setting(
        ("teacher_digest",),
        _digest,
        None,
        "digest of the teacher's weights",
        group=FOUND,
        shared=True,
        instead_of="path_t",
        decides_outputs=True,
    ),
    Setting(("data_digest",), _digest, None, "digest of the data", group=FOUND, shared=True, decides_outputs=True),
    Setting(("weights_digest",), _digest, None, "digest of the class weights", group=FOUND),
    Setting(
        ("mean",), _statistics, None, "mean of the images' channels", group=FOUND, identity="none", decides_outputs=True
    ),
    Setting(
        ("std",),
        _statistics,
        None,
        "standard deviation of the images' channels",
        group=FOUND,
        identity="none",
        decides_outputs=True,
    ),
    Setting(("init_digest",), _digest, None, "digest of the initial weights", group=FOUND, instead_of="init"),
    Setting(
        ("images_per_pass",), _images, RECIPE, "images of a whole batch in one forward pass", group=FOUND, resume="free"
    ),
)


def method_settings() -> dict[str, Setting]:
    """The settings of all methods, by argument."""
    found: dict[str, Setting] = {}
    for flag in [flag for method in DISTILLERS.values() for flag in method.flags]:
        known = found.setdefault(flag.argument, flag)
        if known.choices and flag.choices:  # a method may take some of them alone; it checks that itself
            found[flag.argument] = known._replace(choices=tuple(dict.fromkeys((*known.choices, *flag.choices))))
    return found


def settings_of(distill: str) -> dict[str, Setting]:
    """The settings of a run with this method, by argument: the table's and the method's own."""
    return {setting.argument: setting for setting in (*SETTINGS, *find_distiller(distill).flags)}


def all_settings() -> dict[str, Setting]:
    """Every setting that some run has, by argument."""
    return {setting.argument: setting for setting in (*SETTINGS, *method_settings().values())}


class Configuration(Mapping):
    """The resolved settings of one run, each of its setting's type; read as attributes or as a mapping.

    `origins` says where each value comes from; `folder` is the run folder to resume, None for a new run.
    """

    def __init__(self, values: Mapping[str, Any], origins: Mapping[str, str], folder: str | None = None):
        self._values, self.origins, self.folder = dict(values), dict(origins), folder

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(f"a run has no setting {name}") from None

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def replace(self, origin: str, **values: Any) -> "Configuration":
        """The same run with other values, which come from `origin`."""
        return Configuration(self._values | values, self.origins | dict.fromkeys(values, origin), self.folder)

    @property
    def name(self) -> str:
        """The name of the run's folder: data set, method, networks, trial, and that it is a try of some steps."""
        networks = [name.replace(":", "-").replace(",", "+") for name in (self.model_t, self.model_s) if name]
        tried = ["try"] if self.max_steps else []
        return "_".join([self.dataset, self.distill, *networks, f"trial{self.trial}", *tried])

    def as_json(self) -> dict:
        """What config.json holds."""
        return self._values | {"origins": self.origins}


def read_stored(stored: object, source: str) -> dict:
    """The content of a config.json, or of a checkpoint's copy -> its values; raises `UserError` that begins with
    `source`. Settings that are newer than the file are absent."""
    if not isinstance(stored, Mapping):
        raise UserError(f"{source} does not hold settings; name a run folder")
    known, values = all_settings(), {}
    for name, value in stored.items():
        if name in ("origins", "resume"):  # resume: written by earlier versions
            continue
        if name not in known:
            raise UserError(f"{source} holds the unknown setting {str(name)[:100]!r}; was it written by this version?")
        try:
            values[name] = known[name].read(value)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from None
    return values


def check_resumed(given: Mapping[str, Any], stored: Mapping[str, Any], path: Path | str) -> None:
    """Raise `UserError` where the command line names another value than the run, of a setting that may not change."""
    known = all_settings()
    for name, value in given.items():
        was = stored.get(name, known[name].default)
        if known[name].resume != "free" and was != value:
            raise UserError(
                f"--resume: {path} was run with {name} {was}, not {value}; leave the flag out, or start a new run"
            )


def accept_found(found: Mapping[str, Any], stored: Mapping[str, Any], accept: bool, path: Path | str) -> dict[str, Any]:
    """What a resumed run has stored, with what its files say now; raises `UserError` where a digest has changed and
    `accept` is false."""
    known = all_settings()
    for name, value in found.items():
        if stored.get(name) not in (None, value) and not accept:
            raise UserError(
                f"--resume: {path}: the {known[name].help} was {stored[name]} and is {value} now; restore the files "
                "that the run began with, or accept the new ones with --accept_changes"
            )
    return dict(stored) | dict(found)


def check_shared(configs: Iterable[Configuration]) -> None:
    """Raise `UserError` where runs that are to share one process differ in what its runs have in common."""
    first, *others = configs
    if others and any(config.folder and config.accept_changes for config in (first, *others)):
        # The images of a process are normalised in one way, and each run keeps that with which it began.
        raise UserError("--accept_changes: resume each run alone, with --resume RUN: it keeps its own normalisation")
    for other in others:
        for setting in SETTINGS:
            ours, theirs = first.get(setting.argument), other.get(setting.argument)
            if setting.shared and None not in (ours, theirs) and ours != theirs:
                names = [config.folder or "a new run" for config in (first, other)]
                raise UserError(
                    f"--resume: {names[0]} has {setting.argument} {ours}, {names[1]} {theirs}; they cannot train in "
                    "one process; resume them separately"
                )


def identity(config: Mapping[str, Any], kinds: tuple[str, ...] = ("row",)) -> dict[str, Any]:
    """What tells a run's row from other rows; with "run" among the kinds, a run from other runs.

    Files count by the digests of their weights. Runs from before a setting existed had its default.
    """
    known = settings_of(config["distill"])
    whole_batch = {"images_per_pass": config["batch_size"]}
    defaults = {name: setting.default for name, setting in known.items()} | whole_batch
    values = defaults | {name: value for name, value in config.items() if value is not None}
    kept = {
        name: value
        for name, value in values.items()
        if name in known and known[name].identity in kinds and value not in (None, RECIPE)
    }
    for replaced in {known[name].instead_of for name in kept}:  # a run from before digests were kept has its path
        kept.pop(replaced, None)
    return kept
