"""The command line: parsers and their flags. What becomes of the flags is in configuration.py."""

import argparse
import re

from dataset import DATASETS
from distiller_zoo import DISTILLERS
from distiller_zoo.base import ALPHA, BETA, GAMMA, KD_T, Flag, count, number, whole
from errors import UserError
from helper.fast import COMPILE, PRECISIONS
from models import find_builder


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s, one line without the usage."""

    def __init__(self, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            usage="%(prog)s [flags]", description=description, allow_abbrev=False, formatter_class=formatter
        )

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def _model_name(text: str) -> str:
    try:
        find_builder(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _image_size(text: str) -> int:
    if int(text) < 8:
        raise argparse.ArgumentTypeError(f"must be at least 8 pixels for these networks, not {text}")
    return int(text)


def _trial(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", text):
        raise argparse.ArgumentTypeError(f"must be a name of letters, digits, - _ and ., not '{text}'")
    return text


def pairs(text: str) -> list[tuple[str, str]]:
    """(teacher, student) names, read from a flag like resnet32x4:resnet8x4,wrn_40_2:ShuffleV1."""
    name = "((?:timm:|torchvision:)?[^:]+)"
    matches = [re.fullmatch(f"{name}:{name}", part) for part in text.split(",")]
    if not all(matches):
        raise argparse.ArgumentTypeError(f"must be pairs like resnet32x4:resnet8x4,wrn_40_2:ShuffleV1, not {text}")
    return [(_model_name(match[1]), _model_name(match[2])) for match in matches]


def _epochs(text: str) -> tuple[int, ...]:
    try:
        return tuple(count(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be epochs like 150,180,210, not {text}") from None


_SOURCES = (
    "a run's, an exported network, or RepDistiller's; or published weights by name, torchvision:resnet34, "
    "torchvision:resnet50@IMAGENET1K_V2, timm:NAME"
)


def imagenet_parser() -> argparse.ArgumentParser:
    """The flags of `train_imagenet_student.py`: the same, with ImageNet as the data set."""
    parser = student_parser("ImageNet, or on a folder like it")
    parser.set_defaults(dataset="imagenet")
    return parser


def _add_common(parser: Parser) -> None:
    parser.add_argument_group("initial weights").add_argument(
        "--init",
        metavar="SOURCE",
        help=f"start from these weights instead of random ones: a checkpoint, {_SOURCES}. Where the number of classes "
        "differs, the classifier is new. The network need not be named besides",
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        choices=DATASETS,
        help="default: what the teacher was trained on, else digits (embedded, no network)",
    )
    add(
        "--data",
        metavar="PATH",
        help="where the data lie or are downloaded to; for folder and imagenet: what holds train/ and val|test/",
    )
    add("--image_size", type=_image_size, help="of folder (32) and imagenet (224): images become squares of this size")
    add(
        "--holdout",
        type=whole,
        metavar="K",
        help="keep K training images, the same for all seeds, to choose the best epoch on; the test images then only "
        "report (0: the best epoch is chosen on the test images, as in the official code)",
    )
    add(
        "--num_workers",
        type=whole,
        help="threads or processes that decode images (one per core, at most 4); the rest lies in memory",
    )
    add("--max_broken", type=whole, help="images that may be unreadable where they are read as it goes (10)")
    add = parser.add_argument_group("training (defaults: helper/recipes.py)").add_argument
    add("--batch_size", type=count, help="of all processes together; the learning rate belongs to it")
    add(
        "--accumulate", type=count, metavar="K", help="compute each batch in K parts, where it does not fit at once (1)"
    )
    add(
        "--sync_bn",
        action=argparse.BooleanOptionalAction,
        help="BatchNorm and the feature transform over the batch of all processes that torchrun has started (off)",
    )
    add("--epochs", type=count, help="schedules are stretched to it unless they are given too")
    add("--learning_rate", type=number)
    add("--lr_decay", choices=("step", "cos"))
    add("--lr_decay_epochs", type=_epochs, metavar="E,E,...", help="the rate falls after these epochs")
    add("--lr_decay_rate", type=number)
    add("--weight_decay", type=number)
    add("--momentum", type=number)
    add(
        "--max_steps",
        type=count,
        metavar="K",
        help="end every stage after K steps as if it were done, for trying things",
    )
    add("--device", help="auto (default), cpu, cuda, cuda:1, ...")
    add = parser.add_argument_group("speed: the same training, computed faster").add_argument
    on_off = argparse.BooleanOptionalAction
    add("--fast", choices=("auto", "off"), help="auto: what follows, as this device supports it; off: none (off)")
    add("--precision", choices=PRECISIONS, help="of the networks; losses, statistics and weights stay float32")
    add("--channels_last", action=on_off, help="memory layout of images and feature maps")
    add("--fold_teacher", action=on_off, help="the teacher's BatchNorms folded into its convolutions")
    add("--fused_optimizer", action=on_off, help="one kernel for the update of all parameters")
    add(
        "--compile",
        choices=COMPILE,
        help="torch.compile of both networks' forward passes, in this mode; --fast auto leaves it off. The first step "
        "takes minutes; not tried on a GPU, where reduce-overhead replays CUDA graphs (off)",
    )
    add = parser.add_argument_group("run").add_argument
    add("--trial", type=_trial, help="name of this repetition (1)")
    add(
        "--seed",
        type=whole,
        help="of weights, order and augmentation; default: --trial if that is a number, else 0",
    )
    add(
        "--data_seed",
        type=whole,
        help="of order and augmentation (--seed); runs that are trained together share the first one's",
    )
    add("--trials", type=count, metavar="K", help="train so many students together, with trials and seeds counted up")
    add(
        "--sweep",
        nargs="+",
        metavar="FLAG=V,V",
        help="train students of every combination together: --sweep b=0.5,1 s=4,8, or distill=kd,norm; "
        "values that hold commas are parted by ;",
    )
    add("--save_dir", metavar="ROOT", help="where run folders are made (save)")
    add("--save_freq", type=whole, metavar="E", help="also keep epoch_<n>.pth every E epochs (0: none)")
    add("--save_every_steps", type=whole, metavar="K", help="also save within epochs, every K steps (0: no)")
    add(
        "--max_bad_steps",
        type=whole,
        metavar="K",
        help="skip up to K steps of a run whose losses or gradient are not finite, then stop (0: stop at the first)",
    )
    add("--print_freq", type=count, metavar="K", help="steps between lines in the log (100)")
    add(
        "--resume",
        nargs="?",
        const="auto",
        metavar="RUN",
        help="go on with a run folder; without a value: with the latest run of this name, if there is one",
    )


def _add_flag(group, flag: Flag) -> None:
    if flag.type is bool:
        group.add_argument(*flag.names, action="store_true", default=None, help=flag.help)
        return
    metavar = None if flag.choices else flag.argument.upper()
    group.add_argument(*flag.names, type=flag.type, choices=flag.choices, help=flag.help, metavar=metavar)


def _list_methods() -> str:
    """One line per method under its group's heading: name, what it is, source, its flags."""
    lines = []
    for group in dict.fromkeys(method.group for method in DISTILLERS.values()):
        lines.append(f"{group}:")
        for name, method in DISTILLERS.items():
            if method.group == group:
                source = f" ({method.source})" if method.source else ""
                lines.append(f"  {name:<12} {method.summary}{source}")
    return "\n".join(lines)


def _users_of(flag: Flag) -> list[str]:
    return [name for name, method in DISTILLERS.items() if flag.argument in {used.argument for used in method.flags}]


def _add_method_flags(parser: Parser) -> None:
    """Flags that most methods share, then every method's own under the names of those that read them."""
    weights = (GAMMA, ALPHA, BETA, KD_T)
    group = parser.add_argument_group("loss weights (defaults: helper/recipes.py)")
    for flag in weights:
        _add_flag(group, flag)
    flags, groups = {}, {}
    for method in DISTILLERS.values():
        for flag in method.flags:
            flags.setdefault(flag.argument, flag)
    for flag in flags.values():
        if flag.argument not in {weight.argument for weight in weights}:
            title = f"flags of --distill {' '.join(_users_of(flag))}"
            groups[title] = groups.get(title) or parser.add_argument_group(title)
            _add_flag(groups[title], flag)


def student_parser(images: str = "small images") -> argparse.ArgumentParser:
    """The flags of the scripts that train students: the official NORM code's, and ours."""
    parser = Parser(f"Distil a student on {images}.\n\nmethods (--distill NAME, in any case):\n{_list_methods()}")
    add = parser.add_argument_group("networks and method").add_argument
    add("--distill", metavar="METHOD", help="one of the methods above (norm)")
    add("--model_s", type=_model_name, metavar="NAME", help="student")
    add("--model_t", type=_model_name, metavar="NAME", help="teacher; default: what --path_t says")
    add("--path_t", metavar="FILE", help=f"the teacher's checkpoint: {_SOURCES}")
    add("--allow_teacher_gap", action="store_true", default=None, help="go on with a teacher whose accuracy is off")
    _add_common(parser)
    _add_method_flags(parser)
    return parser


def teacher_parser() -> argparse.ArgumentParser:
    """The flags of `train_teacher.py`."""
    parser = Parser("Train a network with labels alone: a teacher, or a baseline.")
    parser.add_argument("--model", type=_model_name, dest="model_s", metavar="NAME", help="the network to train")
    _add_common(parser)
    parser.set_defaults(distill="ce")
    return parser
