"""The one table of the settings of a run: each is one row, from which its flag, its checks and its records follow.

A method's own settings are in its file (distiller_zoo/); recipes.py has the values that depend on data and networks.
"""

import os
from argparse import ArgumentTypeError
from typing import Any

from dataset import BALANCED, DATASETS, OF_IMAGE_FILES, POLICIES
from dataset.decoding import WHITE
from dataset.sources import IMAGENET_MEAN, IMAGENET_STD
from distiller_zoo import DISTILLERS, find_distiller
from errors import UserError
from helper.fast import COMPILE, LONG_RUN, PRECISIONS, computes_bfloat16, has_matrix_units
from helper.metrics import BEST_BY
from helper.optim import OPTIMIZERS, SCHEDULES
from helper.recipes import RECIPES
from models import find_builder
from models.ensemble import shares_of
from models.external import is_external
from setting import (
    FILLED_IN,
    Setting,
    below_one,
    beta_parameter,
    colour,
    count,
    digest,
    epochs,
    image_size,
    image_sizes,
    must_be,
    number,
    number_of_images,
    path,
    probability,
    statistics,
    trial_name,
    whole,
    wrapper,
)

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
        raise ArgumentTypeError(str(error)) from None
    return text


def _model_names(text: str) -> str:
    return ",".join(model_name(part) for part in text.split(","))


def sources_of(text: str) -> list[str]:
    """The teachers that a value of `--path_t` names: one file, whatever its name, or several sources with commas."""
    return [text] if os.path.isfile(text) else text.split(",")


def _teachers(text: str) -> str:
    sources = [path(part) for part in sources_of(text)]
    return ",".join(part if is_external(part) else os.path.abspath(part) for part in sources)


def _shares(text: str) -> tuple[float, ...]:
    weights = [number(part) for part in text.split(",")]
    if len(weights) < 2 or sum(weights) == 0:
        raise ArgumentTypeError(f"must be a weight for each teacher, like 0.7,0.3, not {text}")
    return shares_of(weights, len(weights))


def _method(text: str) -> str:
    try:
        return find_distiller(text).name
    except UserError as error:
        raise ArgumentTypeError(str(error).removeprefix("--distill: ")) from None


@must_be("imagenet, or three means and three standard deviations of pixels in 0..1, with commas")
def normalisation(text: str) -> tuple[float, ...]:
    """Mean and standard deviation of red, green and blue, of pixels in 0..1 (6,), read from a flag."""
    if text == "imagenet":
        return *IMAGENET_MEAN, *IMAGENET_STD
    values = tuple(float(part) for part in text.split(","))
    if len(values) != 6 or not all(0 <= value <= 1 for value in values) or not all(values[3:]):
        raise ValueError(text)
    return values


def _weights(text: str) -> str:
    return text if text == BALANCED else os.path.abspath(path(text))


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


OF_SGD, OF_FILES = ("optimizer", ("sgd",)), ("dataset", OF_IMAGE_FILES)
#: Of a setting that says how the process computes and not what: a resumed run may change it, and no table shows it.
OF_PROCESS: dict[str, Any] = {"resume": "free", "tells_apart": "none", "shared": True}


def _rows(group: str, *rows: Setting) -> list[Setting]:
    """Rows under their heading in --help."""
    return [row._replace(group=group) for row in rows]


#: Every setting of a run: a row here is its flag, default, help, entry in config.json, check on --resume, and more.
SETTINGS: tuple[Setting, ...] = (
    *_rows(
        TEACHER,
        Setting(
            ("--distill",),
            _method,
            "norm",
            "one of the methods above",
            metavar="METHOD",
            called=("method", "kd", "loss", "algo"),
        ),
        Setting(
            ("--model_t",),
            _model_names,
            None,
            "teacher; default: what --path_t says",
            metavar="NAME",
            shared=True,
            decides_outputs=True,  # two networks may hold the same weights: the digest does not tell them apart
            called=("teacher_model", "teacher_arch"),
        ),
        Setting(
            ("--path_t",),
            _teachers,
            None,
            f"the teacher's checkpoint: {SOURCES}. Several teachers are separated by commas",
            metavar="FILE",
            resume="free",
            shared=True,
            called=("teacher", "teacher_path", "teacher_ckpt", "teacher_checkpoint", "model_path_t"),
        ),
        Setting(
            ("--teacher_weights",),
            _shares,
            None,
            "what each of several teachers counts, in the average of the logits and in NORM's loss; default: equal",
            metavar="W,W",
            shared=True,
        ),
        Setting(
            ("--allow_teacher_gap",),
            bool,
            False,
            "accept a teacher whose accuracy or classes are not the recorded ones",
            **OF_PROCESS,
        ),
        Setting(
            ("--teacher_image_size",),
            image_sizes,
            None,
            "resolution at which the teacher sees the images, of several teachers one for all or one each, with "
            "commas; default: the one that its weights were trained with",
            metavar="PIXELS",
            shared=True,
            decides_outputs=True,
        ),
        Setting(
            ("--teacher_normalisation",),
            normalisation,
            None,
            "mean and std that the teacher's weights were trained with, where its file does not say: imagenet, or six "
            "numbers, of pixels in 0..1; default: those of the data",
            metavar="imagenet|R,G,B,R,G,B",
            shared=True,
            decides_outputs=True,
        ),
        Setting(
            ("--teacher_classes",),
            str,
            None,
            "read the teacher's logits at these of its classes, in the order of the data's: names or numbers with "
            "commas (or, where names hold commas, with ;) between them, or a file with one in each line",
            metavar="NAMES|FILE",
            shared=True,
            decides_outputs=True,
        ),
        Setting(
            ("--cache_teacher",),
            path,
            None,
            "store the teacher's logits, and pooled vectors where the method reads them, in this folder, and read "
            "them there in later runs that show the same images",
            metavar="FOLDER",
            is_path=True,
            **OF_PROCESS,
        ),
        Setting(
            ("--cache_top_k",),
            count,
            None,
            "store the K largest logits alone; the rest of the probability is spread evenly over the other classes",
            metavar="K",
            shared=True,
        ),
    ),
    *_rows(
        NETWORK,
        Setting(
            ("--model_s",),
            model_name,
            FILLED_IN,
            "student",
            metavar="NAME",
            called=("model", "student", "student_model", "arch", "backbone"),
        ),
    ),
    *_rows(
        INITIAL,
        Setting(
            ("--init",),
            path,
            None,
            f"start from these weights instead of random ones: a checkpoint, {SOURCES}. Where the number of classes "
            "differs, the classifier is new. The model name may be omitted",
            metavar="SOURCE",
            shared=True,
            is_path=True,
            called=("pretrained", "initial_checkpoint", "finetune", "weights"),
        ),
        # The digests say which weights.
        Setting(
            ("--ema",),
            bool,
            False,
            "take the moving average (EMA) of the weights where the file of a teacher or of initial weights holds both",
            tells_apart="none",
            shared=True,
        ),
    ),
    *_rows(
        DATA,
        Setting(
            ("--dataset",),
            str,
            "digits",
            "the data set; default: what the teacher was trained on, else digits (embedded, no download)",
            choices=DATASETS,
            shared=True,
            decides_outputs=True,
        ),
        Setting(
            ("--data",),
            path,
            None,
            "where the data are stored or downloaded to; for folder and imagenet: the folder with train/ and val|test/",
            metavar="PATH",
            resume="free",
            shared=True,
            is_path=True,
            called=("data_dir", "data_path", "data_root", "root", "dir"),
        ),
        Setting(
            ("--labels",),
            str,
            "folders",
            "what says the classes of a folder of images: its class folders, or none: images at any depth, from which "
            "a method learns what the teacher shows of them",
            choices=("folders", "none"),
            shared=True,
            decides_outputs=True,
        ),
        Setting(
            ("--data_probe",),
            path,
            None,
            "with --labels none: a labelled folder of images, on which pooled features are tested after every epoch, "
            "by a linear probe and by nearest neighbours; the best epoch is chosen by the matching loss",
            metavar="FOLDER",
            resume="free",
            shared=True,
            is_path=True,
        ),
        Setting(
            ("--split",),
            below_one,
            0.0,
            "share of the training images, the same for all seeds, that becomes the test split of a folder without one",
            metavar="SHARE",
            shared=True,
            works_with=OF_FILES,
            decides_outputs=True,
            needs_labels=True,
            called=("val_split",),
        ),
        Setting(
            ("--background",),
            colour,
            WHITE,
            "colour under transparent images of a folder, red,green,blue",
            metavar="R,G,B",
            shared=True,
            works_with=OF_FILES,
            decides_outputs=True,
        ),
        Setting(
            ("--stream",),
            str,
            "auto",
            "read a folder of images from the disk in every epoch: on, off (hold it in memory), or auto: what does "
            "not fit",
            choices=("auto", "on", "off"),
            **OF_PROCESS,
        ),
        Setting(
            ("--image_size",),
            image_size,
            32,
            "images of folder (32) and imagenet (224) become squares of this size; those of other data sets are held "
            "with 32 pixels and resized to it on the device (bilinear)",
            shared=True,
            decides_outputs=True,
            called=("img_size", "input_size", "resolution", "size", "imgsz", "crop_size"),
        ),
        Setting(
            ("--normalisation",),
            normalisation,
            None,
            "mean and std by which images are normalised: imagenet, or six numbers, of pixels in 0..1; default: those "
            "of the data set",
            metavar="imagenet|R,G,B,R,G,B",
            shared=True,
            decides_outputs=True,
        ),
        Setting(
            ("--holdout",),
            whole,
            0,
            "keep K training images, the same for all seeds, to choose the best epoch on; the test images then only "
            "report. With 0 the best epoch is chosen on the test images, as in the official code",
            metavar="K",
            shared=True,
            decides_outputs=True,
        ),
        Setting(
            ("--num_workers",),
            whole,
            min(4, count_cores()),
            "processes that decode images; data sets of small images are held in memory",
            called=("workers", "j"),
            **OF_PROCESS,
        ),
        Setting(("--max_broken",), whole, 10, "maximum number of unreadable images before the run stops", **OF_PROCESS),
    ),
    *_rows(
        TRAINING,
        # The values that it sets tell runs apart.
        Setting(
            ("--recipe",),
            str,
            "tables",
            "whose defaults are taken; " + "; ".join(f"{name}: {what}" for name, what in RECIPES.items()),
            choices=RECIPES,
            tells_apart="none",
        ),
        Setting(
            ("--batch_size",),
            count,
            FILLED_IN,
            "global batch size; the learning rate is not rescaled",
            called=("bs", "bz"),
        ),
        Setting(
            ("--accumulate",),
            count,
            1,
            "gradient accumulation: split each batch into K micro-batches",
            metavar="K",
            resume="free",
            called=("grad_accum_steps", "gradient_accumulation_steps", "accum_iter"),
        ),
        Setting(
            ("--sync_bn",),
            bool,
            False,
            "BatchNorm and the feature transform over the batch of all processes that torchrun has started",
        ),
        Setting(
            ("--epochs",),
            count,
            FILLED_IN,
            "length of the main stage; schedules scale with it unless set explicitly",
            resume="free",
            called=("num_epochs", "max_epochs"),
        ),
        Setting(
            ("--optimizer",),
            str,
            "sgd",
            "the optimizer; lamb and adan are timm's",
            choices=OPTIMIZERS,
            called=("opt", "optim"),
        ),
        Setting(("--learning_rate",), number, FILLED_IN, "the initial learning rate", called=("lr", "base_lr")),
        Setting(
            ("--lr_decay",),
            str,
            FILLED_IN,
            "the learning rate schedule: step falls after every one of --lr_decay_epochs, cos is half a cosine, "
            "one_cycle rises over the first 0.3 of the run and falls over the rest, in every step",
            choices=SCHEDULES,
            called=("schedule", "scheduler", "sched", "lr_schedule", "lr_scheduler", "lr_policy", "cos", "cosine"),
        ),
        Setting(
            ("--lr_warmup_epochs",),
            whole,
            0,
            "the learning rate grows linearly, in every step, over these first epochs of the main stage; cos then "
            "takes the rest of the run",
            full_run="recipe",
            metavar="E",
            called=("warmup",),
        ),
        Setting(
            ("--min_learning_rate",),
            number,
            0.0,
            "floor of the schedule, where cos and one_cycle end",
            called=("min_lr",),
        ),
        Setting(
            ("--clip_grad",),
            number,
            0.0,
            "scale the gradient down to this norm (0: no)",
            metavar="NORM",
            called=("grad_clip", "clip", "max_norm"),
        ),
        Setting(
            ("--lr_decay_epochs",),
            epochs,
            FILLED_IN,
            "milestones of the step schedule: the learning rate falls after these epochs",
            full_run="recipe",
            metavar="E,E,...",
            works_with=("lr_decay", ("step",)),
            called=("milestones",),
        ),
        Setting(
            ("--lr_decay_rate",),
            number,
            FILLED_IN,
            "factor of the step schedule",
            works_with=("lr_decay", ("step",)),
        ),
        Setting(("--weight_decay",), number, FILLED_IN, "weight decay", called=("wd",)),
        Setting(("--decay_norms",), bool, True, "weight decay on normalisation layers and biases too"),
        Setting(("--momentum",), number, FILLED_IN, "momentum of SGD", works_with=OF_SGD),
        Setting(("--nesterov",), bool, False, "Nesterov's momentum", works_with=OF_SGD),
        Setting(("--drop_momentum",), bool, False, "start with no momentum after each milestone", works_with=OF_SGD),
        Setting(
            ("--ema_decay",),
            below_one,
            0.0,
            "also keep an exponential moving average of the student's weights and statistics, D of it in every step "
            "(0: no); it is tested and saved next to the raw weights",
            metavar="D",
            needs_labels=True,
            called=("model_ema",),
        ),
        Setting(
            ("--drop_rate",),
            below_one,
            None,
            "dropout of a student of torchvision or timm (default: its library's)",
            metavar="P",
            called=("drop", "dropout"),
        ),
        Setting(
            ("--drop_path_rate",),
            below_one,
            None,
            "drop path (stochastic depth) of a student of torchvision or timm, of its last branch (default: its "
            "library's)",
            metavar="P",
            called=("drop_path",),
        ),
        Setting(
            ("--freeze",),
            str,
            "none",
            "trunk: train only the student's classifier, and what the method adds; its BatchNorms are in eval mode",
            choices=("none", "trunk"),
            needs_labels=True,
            called=("freeze_backbone", "linear_probe"),
        ),
        Setting(
            ("--best_by",),
            str,
            "accuracy",
            "what the best epoch is chosen by, on the held-out images where there are any",
            choices=BEST_BY,
            needs_labels=True,
            called=("eval_metric",),
        ),
        Setting(
            ("--patience",),
            whole,
            0,
            "early stopping: end after E epochs without a better one; needs --holdout (0: no)",
            metavar="E",
            resume="free",
            called=("early_stopping",),
        ),
        Setting(
            ("--max_steps",),
            count,
            None,
            "end every stage after K steps, to try a command",
            metavar="K",
            resume="free",
            called=("iters", "iterations", "max_iter", "steps"),
        ),
        Setting(
            ("--device",),
            str,
            "auto",
            "auto (CUDA where there is a GPU), cpu, cuda, cuda:1, ...",
            called=("gpu", "gpus", "gpu_id", "cuda", "no_cuda"),
            **OF_PROCESS,
        ),
    ),
    *_rows(
        AUGMENTATION,
        Setting(
            ("--augment",),
            str,
            "standard",
            "standard: the data set's own crops and flips; none: not even these; or these and torchvision's policy of "
            "this name",
            choices=POLICIES,
            decides_outputs=True,
            called=("aa", "auto_augment", "augmentation"),
        ),
        Setting(
            ("--colour_jitter",),
            below_one,
            0.0,
            "scale brightness, contrast and saturation by factors from 1 - S to 1 + S",
            metavar="S",
            decides_outputs=True,
            called=("color_jitter", "jitter"),
        ),
        Setting(
            ("--random_erasing",),
            probability,
            0.0,
            "erase a rectangle of an image with this probability",
            metavar="P",
            decides_outputs=True,
            called=("reprob",),
        ),
        Setting(
            ("--mixup",),
            beta_parameter,
            0.0,
            "mix the images of a batch in shares from Beta(ALPHA, ALPHA); student and teacher see the same mixed "
            "images",
            metavar="ALPHA",
            decides_outputs=True,
        ),
        Setting(
            ("--cutmix",),
            beta_parameter,
            0.0,
            "paste a rectangle of one image into another, its area from Beta(ALPHA, ALPHA); with --mixup one of them "
            "for each batch",
            metavar="ALPHA",
            decides_outputs=True,
        ),
        Setting(
            ("--label_smoothing",),
            below_one,
            0.0,
            "share of a label that is spread over all classes, in the cross entropy",
            metavar="S",
            needs_labels=True,
            called=("smoothing",),
        ),
        Setting(
            ("--class_weights",),
            _weights,
            None,
            "what a class counts in the cross entropy: balanced (inverse to its number of images), or a file with a "
            "class and its weight in each line",
            metavar="balanced|FILE",
            needs_labels=True,
        ),
        Setting(
            ("--balanced_sampling",),
            bool,
            False,
            "draw the images of an epoch so that every class is equally likely, instead of showing each once",
            needs_labels=True,
        ),
    ),
    *_rows(
        SPEED,
        Setting(
            ("--fast",),
            str,
            "off",
            "auto: enable the options below that this device supports; off: none",
            choices=("auto", "off"),
            tells_apart="none",
            shared=True,
        ),
        Setting(
            ("--precision",),
            str,
            "float32",
            "of the networks; losses, statistics and weights stay float32",
            choices=PRECISIONS,
            shared=True,
            auto=lambda device: "bfloat16" if computes_bfloat16(device) else "float32",
            decides_outputs=True,
            called=("amp", "fp16", "bf16", "half", "mixed_precision", "use_amp"),
        ),
        Setting(
            ("--channels_last",),
            bool,
            False,
            "memory layout of images and feature maps",
            tells_apart="none",
            shared=True,
            auto=lambda device: True,
        ),
        Setting(
            ("--fold_teacher",),
            bool,
            False,
            "the teacher's BatchNorms folded into its convolutions",
            tells_apart="none",
            shared=True,
            auto=lambda device: True,
        ),
        Setting(
            ("--fused_optimizer",),
            bool,
            False,
            "one kernel for the update of all parameters",
            tells_apart="none",
            shared=True,
            auto=lambda device: device.type in ("cpu", "cuda"),
        ),
        Setting(
            ("--compile",),
            str,
            "off",
            "torch.compile of both networks' passes and the losses, in this mode; auto, chosen by --fast auto on a CPU "
            f"with matrix units: in a run of {LONG_RUN} steps or more. The first step takes minutes; not tried on a "
            "GPU, where reduce-overhead replays CUDA graphs",
            choices=COMPILE,
            auto=lambda device: "auto" if device.type == "cpu" and has_matrix_units(device) else "off",
            called=("torchcompile",),
            **OF_PROCESS,
        ),
        Setting(
            ("--deterministic",),
            bool,
            False,
            "the same weights from the same command on a GPU too, with slower kernels; torch warns of operations that "
            "have none. A CPU needs no flag",
            **OF_PROCESS,
        ),
    ),
    *_rows(
        RUN,
        Setting(
            ("--trial",),
            trial_name,
            "1",
            "name of this repetition",
            tells_apart="none",
            called=("name", "exp", "experiment"),
        ),
        Setting(
            ("--seed",),
            whole,
            FILLED_IN,
            "of weights, order and augmentation; default: --trial if that is a number, else 0",
            tells_apart="run",
            called=("manual_seed", "random_state"),
        ),
        Setting(
            ("--data_seed",),
            whole,
            FILLED_IN,
            "of order and augmentation (--seed); runs that are trained together share the first one's",
            tells_apart="none",
            decides_outputs=True,
        ),
        Setting(
            ("--save_dir",),
            path,
            "save",
            "where run folders are made",
            metavar="ROOT",
            called=("out", "output", "output_dir", "out_dir", "save", "log_dir", "logdir", "model_path"),
            **OF_PROCESS,
        ),
        Setting(
            ("--save_freq",),
            whole,
            0,
            "also keep epoch_<n>.pth every E epochs (0: none)",
            metavar="E",
            resume="free",
            tells_apart="none",
            called=("save_interval", "checkpoint_interval"),
        ),
        Setting(
            ("--save_every_steps",),
            whole,
            0,
            "also save within epochs, every K steps (0: no)",
            metavar="K",
            resume="free",
            tells_apart="none",
        ),
        Setting(
            ("--max_bad_steps",),
            whole,
            0,
            "skip up to K steps of a run whose losses or gradient are not finite, then stop (0: stop at the first)",
            metavar="K",
            resume="free",
            tells_apart="none",
        ),
        Setting(
            ("--print_freq",),
            count,
            100,
            "steps between lines in the log",
            metavar="K",
            resume="free",
            tells_apart="none",
            called=("log_interval", "log_freq", "tb_freq"),
        ),
        Setting(
            ("--accept_changes",),
            bool,
            False,
            "resume although the teacher's weights or the data are not those that the run began with; it is recorded",
            **OF_PROCESS,
        ),
    ),
    # Not flags: what a run finds out and keeps.
    *_rows(
        FOUND,
        Setting(
            ("wrapper_t",),
            wrapper,
            None,
            "how the teacher's network is wrapped",
            tells_apart="none",
            decides_outputs=True,
        ),
        Setting(
            ("teacher_digest",),
            digest,
            None,
            "digest of the teacher's weights",
            shared=True,
            instead_of="path_t",
            decides_outputs=True,
        ),
        Setting(
            ("teacher_steps",),
            count,
            None,
            "steps of a teacher that was trained for a try-out (--max_steps)",
            tells_apart="none",
        ),
        Setting(
            ("data_digest",),
            digest,
            None,
            "digest of the data",
            shared=True,
            instead_of="data",
            decides_outputs=True,
        ),
        Setting(("weights_digest",), digest, None, "digest of the class weights"),
        Setting(("mean",), statistics, None, "mean of the images' channels", tells_apart="none", decides_outputs=True),
        Setting(
            ("std",),
            statistics,
            None,
            "standard deviation of the images' channels",
            tells_apart="none",
            decides_outputs=True,
        ),
        Setting(("init_digest",), digest, None, "digest of the initial weights", instead_of="init"),
        Setting(
            ("images_per_pass",),
            number_of_images,
            FILLED_IN,
            "images of a whole batch in one forward pass",
            resume="free",
        ),
    ),
)


def method_settings() -> dict[str, Setting]:
    """The settings of all methods, by argument; raises `UserError` for one that would be taken for another."""
    found: dict[str, Setting] = {}
    of_run = {name for setting in SETTINGS for name in (*setting.names, setting.argument)}
    for method in DISTILLERS.values():
        for flag in method.flags:
            known, is_of_run = found.setdefault(flag.argument, flag), bool(of_run & {*flag.names, flag.argument})
            if is_of_run or (known.names, known.type) != (flag.names, flag.type):
                raise UserError(
                    f"{method.__module__}: {'/'.join(flag.names)} of {method.__name__} is a setting of "
                    f"{'every run' if is_of_run else 'another method'}; rename it"
                )
            if known.choices and flag.choices:  # a method may take some of them alone; it checks that itself
                found[flag.argument] = known._replace(choices=tuple(dict.fromkeys((*known.choices, *flag.choices))))
    return found


def settings_of(distill: str) -> dict[str, Setting]:
    """The settings of a run with this method, by argument: the table's and the method's own."""
    return {setting.argument: setting for setting in (*SETTINGS, *find_distiller(distill).flags)}


def default_of(argument: str) -> Any:
    """The default of a setting of every run."""
    return next(setting.default for setting in SETTINGS if setting.argument == argument)


def all_settings() -> dict[str, Setting]:
    """Every setting that some run has, by argument."""
    return {setting.argument: setting for setting in (*SETTINGS, *method_settings().values())}
