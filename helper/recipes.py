"""Recipes: the default settings of a run by its data set, student, method and pair, from rows with a source each.

A row has values of the authors' own run. `recipe_of` lays the rows that apply over each other in their order; a flag on
the command line comes on top. The common schedule of CRD's tables is that of the data set's own rows. `--recipe` says
whose run it is, and adds rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from setting import Setting

#: The networks that the tables train at a lower rate.
MOBILE = ("MobileNetV2", "MobileNetV2_norm", "ShuffleV1", "ShuffleV2")
MOBILE_V2 = ("MobileNetV2", "MobileNetV2_norm")
VGG = ("vgg8", "vgg11", "vgg13", "vgg16", "vgg19")
#: Data sets that are trained as CIFAR-100 is: for the others than CIFAR-100 nothing is published.
SMALL_IMAGES = ("cifar100", "cifar10", "fashion_mnist", "folder")
NOT_PUBLISHED = "not published for this pair"
STANDARDISED = ("logit_standardization", True)


class Row(NamedTuple):
    """Values by argument, where they come from, and to which runs they apply; None: to all."""

    values: Mapping[str, object]
    source: str
    method: Sequence[str] | None = None
    dataset: Sequence[str] | None = None
    teacher: Sequence[str] | None = None
    student: Sequence[str] | None = None
    chosen: tuple[str, object] | None = None  # a flag and the value that must be given for it

    def applies(self, place: Mapping[str, str | None], chosen: Mapping) -> bool:
        """Whether the row is for a run at this place, with these flags given."""
        conditions = self._asdict()
        meets = all(conditions[name] is None or value in conditions[name] for name, value in place.items())
        return meets and (self.chosen is None or chosen.get(self.chosen[0]) == self.chosen[1])

    def describe(self, place: Mapping[str, str | None]) -> str:
        """What the row is for, as a run says where a value comes from: "data set cifar100", "pair A -> B"."""
        if self.chosen:
            flag, value = self.chosen
            return f"{place['method']} with {flag} {value}"
        if self.teacher:
            return f"pair {place['teacher']} -> {place['student']}"
        if self.student:
            return f"{place['method']} -> {place['student']}" if self.method else f"student {place['student']}"
        if self.dataset and self.method:
            return f"{place['method']} on {place['dataset']}"
        return f"method {place['method']}" if self.method else f"data set {place['dataset']}"


def _weights(gamma: float, alpha: float, beta: float, **others) -> dict:
    return {"gamma": gamma, "alpha": alpha, "beta": beta, **others}


_STEPS = {"lr_decay": "step", "lr_decay_rate": 0.1, "momentum": 0.9}
_TABLES = {
    "batch_size": 64,
    "epochs": 240,
    "learning_rate": 0.05,
    "lr_decay_epochs": (150, 180, 210),
    "weight_decay": 5e-4,
    **_STEPS,
}
_IMAGENET = {
    "batch_size": 256,
    "epochs": 100,
    "learning_rate": 0.1,
    "lr_decay_epochs": (30, 60, 90),
    "weight_decay": 1e-4,
    "image_size": 224,
    **_STEPS,
}
#: What trains a data set, and which students need something else.
COMMON = (
    Row(_TABLES, "RepDistiller train_student.py: CRD's tables; for other small images than CIFAR-100 not published"),
    Row(
        {"epochs": 16, "lr_decay_epochs": (10, 12, 14)},
        "our choice: 1,433 small images need few epochs; the drops are at the same fractions of the run",
        dataset=("digits",),
    ),
    Row(
        _IMAGENET, "torchdistill and mdistiller: .1 at a batch of 256, a tenth after 30, 60, 90", dataset=("imagenet",)
    ),
    Row({"learning_rate": 0.01}, "RepDistiller and NORM: these diverge at .05", student=MOBILE),
)

# The official NORM script sweeps -r over 1/16, 1/8, 1/4, 1/2 and the per-pair choice is not published: 1/8 here.
_NORM = {"gamma": 0.125, "alpha": 0.0, "beta": 1.0, "co_sponge": 8, "ceta": 2.5}
_BOTH_NORMS = ("norm", "norm_crd")
_REPDISTILLER = "RepDistiller scripts/run_cifar_distill.sh: one command per method, for all pairs"
#: The weights of a method's terms, for every pair and data set.
WEIGHTS = (
    Row(_NORM, "official NORM scripts", _BOTH_NORMS),
    Row(
        {"crd_weight": 0.8},
        "CRD's: the official NORM code takes -c, 2.5, for it, which is not published",
        ("norm_crd",),
    ),
    Row({"gamma": 1.0, "co_sponge": 8}, "NORM's N: that of the paper's '1 FT' baselines is not published", ("ft",)),
    Row({"gamma": 1.0}, "labels alone", ("ce",)),
    Row({"gamma": 0.1, "alpha": 0.9}, _REPDISTILLER, ("kd",)),
    Row(_weights(1, 0, 100), _REPDISTILLER, ("hint",)),
    Row(_weights(1, 0, 1000), _REPDISTILLER, ("attention",)),
    Row(_weights(1, 0, 3000), _REPDISTILLER, ("similarity",)),
    Row(_weights(1, 0, 0.02), _REPDISTILLER, ("correlation",)),
    Row(_weights(1, 0, 1), _REPDISTILLER, ("vid", "rkd")),
    Row(_weights(1, 0, 30000), _REPDISTILLER, ("pkt",)),
    Row(_weights(1, 0, 50), _REPDISTILLER, ("nst",)),
    Row(_weights(1, 0, 0.8), _REPDISTILLER, ("crd",)),
    Row({"gamma": 1, "alpha": 0}, f"{_REPDISTILLER}; their -b is in no loss", ("abound", "fsp")),
    Row(_weights(1, 0, 200, init_learning_rate=0.01), _REPDISTILLER, ("factor",)),
    Row(
        {"init_learning_rate": 0.05},
        "RepDistiller: the student's rate, but for ResNets and WRNs",
        ("factor",),
        student=VGG,
    ),
    Row(_weights(1, 0, 1), "mdistiller; RepDistiller has no command", ("kdsvd",)),
    Row(_weights(1, 1, 1), "SimKD scripts/run_distill.sh, which made the CIFAR rows", ("srrl",)),
    Row(_weights(1, 1, 400), "SimKD scripts/run_distill.sh", ("semckd",)),
    Row(_weights(0, 0, 1), "SimKD scripts/run_distill.sh", ("simkd",)),
    Row(_weights(1, 0, 1), "not published but for the pairs below: 1", ("reviewkd",)),
    Row(_weights(1, 0, 0.001), "OFD's code divides by 1000 on CIFAR", ("ofd",)),
    Row(_weights(1, 0, 1, kd_weight=1.0), "DistPro's kd_weight per pair is not published: 1", ("distpro",)),
    Row({"gamma": 0.1, "alpha": 0.9}, "SSKD student.py", ("sskd",)),
    Row({"gamma": 1.0, "beta": 1.0}, "ONE's code has no weights", ("one",)),
    Row({"gamma": 1.0, "dkd_alpha": 1.0, "dkd_beta": 8.0}, "mdistiller configs/cifar100/dkd", ("dkd",)),
    Row({"gamma": 1.0, "beta": 2.0, "kd_T": 4.0}, "DIST, CIFAR-100 runs", ("dist",)),
    Row(
        _weights(0.1, 0.9, 0.9, learning_rate=0.025), "Multi-Level-Logit-Distillation configs/cifar100/ours", ("mlkd",)
    ),
    Row({"learning_rate": 0.01}, "the same", ("mlkd",), student=MOBILE),
)

_LARGE_BATCH = {"batch_size": 128, "learning_rate": 0.1, "nesterov": True}
_MLKD_480 = {"epochs": 480, "lr_decay_epochs": (300, 360, 420)}
#: The run of a method's authors on CIFAR-100, where it is not that of CRD's tables.
CIFAR = (
    Row(_LARGE_BATCH, "ReviewKD CIFAR-100/train.py", ("reviewkd",), SMALL_IMAGES),
    Row({**_LARGE_BATCH, "drop_momentum": True}, "DistPro train_with_distillation.py", ("distpro",), SMALL_IMAGES),
    Row(
        {**_LARGE_BATCH, "drop_momentum": True, "epochs": 200, "lr_decay_epochs": (100, 150)},
        "OFD CIFAR-100/train_with_distillation.py",
        ("ofd",),
        SMALL_IMAGES,
    ),
    Row(
        {"batch_size": 128, "learning_rate": 0.1, "epochs": 300, "lr_decay_epochs": (150, 225), "weight_decay": 1e-4},
        "ONE's scripts",
        ("one",),
        SMALL_IMAGES,
    ),
    Row(
        {"learning_rate": 0.02},
        "ReviewKD and DistPro: their rate",
        ("reviewkd", "distpro"),
        SMALL_IMAGES,
        student=MOBILE,
    ),
    Row({"learning_rate": 0.02}, "our choice: ReviewKD's at this batch", ("ofd", "one"), SMALL_IMAGES, student=MOBILE),
    # The published lengths; where the rate falls in the longer runs is not in our source: at the same fractions.
    Row(_MLKD_480, "Multi-Level-Logit-Distillation configs/cifar100/ours", ("mlkd",), SMALL_IMAGES, ("resnet110",)),
    Row(
        _MLKD_480,
        "Multi-Level-Logit-Distillation configs/cifar100/ours",
        ("mlkd",),
        SMALL_IMAGES,
        ("vgg13", "ResNet50"),
        MOBILE_V2,
    ),
    Row(
        {"epochs": 960, "lr_decay_epochs": (600, 720, 840)},
        "Multi-Level-Logit-Distillation configs/cifar100/ours",
        ("mlkd",),
        SMALL_IMAGES,
        ("resnet32x4",),
        ("ShuffleV1",),
    ),
)

_REVIEWKD = "ReviewKD CIFAR-100/script/reviewKD.sh"
_DKD = "mdistiller configs/cifar100/dkd"
#: What a method publishes per student or pair of CIFAR-100.
CIFAR_PAIR_WEIGHTS = (
    Row({"beta": 5.0}, _REVIEWKD, ("reviewkd",), student=("wrn_16_2", "wrn_40_1", "ShuffleV1", "resnet8x4")),
    Row({"beta": 8.0}, _REVIEWKD, ("reviewkd",), student=("ShuffleV2",)),
    Row({"beta": 0.6}, _REVIEWKD, ("reviewkd",), teacher=("resnet56",), student=("resnet20",)),
    Row({"beta": 1.0}, _REVIEWKD, ("reviewkd",), teacher=("resnet110",), student=("resnet32",)),
    Row(
        {"beta": 30.0, "batch_size": 64, "learning_rate": 0.01, "nesterov": False},
        "mdistiller issue 39: at the tables' rate and batch it reaches the published accuracy",
        ("reviewkd",),
        teacher=("ResNet50",),
        student=("MobileNetV2",),
    ),
    Row({"dkd_beta": 2.0}, _DKD, ("dkd",), student=("resnet20", "resnet32")),
    Row({"dkd_beta": 6.0}, _DKD, ("dkd",), student=("wrn_16_2", "wrn_40_1", "vgg8")),
    Row({"dkd_beta": 6.0}, _DKD, ("dkd",), teacher=("vgg13",), student=MOBILE_V2),
    Row(
        {"gamma": 0.1, "alpha": 0.0, "beta": 1.0, "co_sponge": 8},
        "README of the official NORM code",
        _BOTH_NORMS,
        teacher=("resnet32x4",),
        student=("resnet8x4",),
    ),
)

_R18, _MOBILENET, _QUARTER = (("resnet34", "resnet18"), ("resnet50", "MobileNet"), ("resnet50", "resnet50_4"))
_NORM_IMAGENET = {"gamma": 1.0, "alpha": 0.0, "beta": 1.0, "co_sponge": 8}


def _imagenet(
    method: str | Sequence[str], values: Mapping[str, object], source: str, pair: tuple[str, str] | None = None
) -> Row:
    methods = (method,) if isinstance(method, str) else method
    teacher, student = (None, None) if pair is None else ((pair[0],), (pair[1],))
    return Row(values, source, methods, ("imagenet",), teacher, student)


#: The run of a method's authors on ImageNet. For CC, SP, RKD, ONE, DistPro and OFD (but ResNet50 -> MobileNet) no
#: source gives a weight: CIFAR's.
IMAGENET = (
    _imagenet(_BOTH_NORMS, {"beta1": "imagenet", "lr_decay": "cos"}, "official NORM code, the ImageNet loop"),
    _imagenet("ft", {"lr_decay": "cos"}, "NORM's schedule"),
    _imagenet(_BOTH_NORMS, _NORM_IMAGENET, "official NORM ImageNet script", _R18),
    _imagenet(_BOTH_NORMS, _NORM_IMAGENET | {"gamma": 0.125}, "official NORM ImageNet script", _MOBILENET),
    _imagenet(_BOTH_NORMS, _NORM_IMAGENET, "ResNet34 -> ResNet18's: there is no command", _QUARTER),
    _imagenet("kd", {"gamma": 0.5, "alpha": 0.5, "kd_T": 1.0}, "mdistiller and torchdistill"),
    _imagenet(
        "dist",
        {"kd_T": 1.0, "nesterov": True, "decay_norms": False},
        "image_classification_sota configs/strategies/distill/resnet_dist.yaml",
    ),
    _imagenet(
        "dkd",
        {"kd_T": 1.0, "dkd_beta": 0.5, "warmup_epochs": 0},
        "mdistiller configs/imagenet/r34_r18/dkd.yaml: its one epoch of warm-up, counted from 1, has the whole weight",
    ),
    _imagenet("dkd", {"dkd_beta": 2.0}, "mdistiller configs/imagenet/r50_mv1/dkd.yaml", _MOBILENET),
    _imagenet("ofd", {"beta": 1e-4, "nesterov": True}, f"{NOT_PUBLISHED}: OFD's ResNet50 -> MobileNet"),
    _imagenet("ofd", {"beta": 1e-4, "nesterov": True}, "OFD ImageNet/train_with_distillation.py", _MOBILENET),
    _imagenet("semckd", {"beta": 50.0, "epochs": 90, "lr_decay_epochs": (30, 60)}, "SemCKD README"),
    _imagenet("attention", {"beta": 1000.0}, "torchdistill and mdistiller"),
    _imagenet("crd", {"beta": 0.8}, "CRD's ImageNet run: batch 256, rate .1"),
    _imagenet("simkd", {"beta": 1, "epochs": 120}, "SimKD scripts/run_distill.sh"),
    _imagenet(
        "sskd",
        {
            "gamma": 1.0,
            "alpha": 0.9,
            "tf_weight": 2.7,
            "ss_weight": 10.0,
            "init_epochs": 30,
            "init_learning_rate": 0.1,
            "init_milestones": (1 / 3, 2 / 3),
            "weight_decay": 5e-4,
        },
        "torchdistill sskd-resnet18_from_resnet34.yaml; SSKD's own code has no ImageNet",
    ),
    _imagenet(
        "factor",
        {
            "beta": 1000.0,
            "init_epochs": 1,
            "init_learning_rate": 0.01,
            "factor_norm": "whole",
            "translator_bn": "none",
            "epochs": 90,
            "lr_decay_epochs": (30, 60),
        },
        "torchdistill ft-resnet18_from_resnet34.yaml",
    ),
    _imagenet(
        "mlkd",
        {**_weights(0.5, 0.5, 0.5), "mlkd_temperatures": (1.0, 3.0, 5.0, 2.0, 6.0), "learning_rate": 0.05},
        "Multi-Level-Logit-Distillation configs/imagenet: .1 at a batch of 512",
    ),
    _imagenet(
        "reviewkd",
        {"beta": 1.0, "warmup_epochs": 0, "review_student": "behind", "review_teacher": "behind", "review_width": 512},
        "ReviewKD ImageNet/README.md, ResNet34 -> ResNet18",
    ),
    _imagenet(
        "reviewkd",
        {"beta": 8.0, "review_student": "before", "review_width": 256},
        "ReviewKD ImageNet/README.md",
        _MOBILENET,
    ),
    _imagenet("srrl", {"alpha": 0.0, "beta": 1, "srrl_form": "map"}, "KD_SRRL, which has no KL term"),
)

_LSKD = "logit-standardization-KD README and logs/KD"
_LSKD_DKD = "logit-standardization-KD logs/DKD; its author in issues 12, 19 and 31"
_LSKD_MLKD = "logit-standardization-KD configs/cifar100/mlkd, logs/MLKD"


def _standardised(
    method: str,
    values: Mapping[str, object],
    source: str,
    teacher: str | None = None,
    student: Sequence[str] | None = None,
    dataset: str | None = None,
) -> Row:
    teachers, datasets = ((name,) if name else None for name in (teacher, dataset))
    return Row(values, source, (method,), datasets, teachers, student, STANDARDISED)


def _standardised_dkd() -> Iterator[Row]:
    """Standardised DKD: T, its weight, and the ratio of the non-target classes' weight to it, by pair.

    Where a log names no ratio it is that of the configuration without standardisation.
    """
    rows = (
        (None, None, 2.0, 9.0, 8.0),
        (None, ("resnet20", "resnet32"), 2.0, 9.0, 2.0),
        (None, ("wrn_16_2", "wrn_40_1", "vgg8"), 2.0, 9.0, 6.0),
        ("vgg13", ("vgg8",), 2.0, 15.0, 2.0),
        ("resnet110", ("resnet20", "resnet32"), 2.0, 15.0, 2.0),
        ("resnet56", ("resnet20",), 2.0, 18.0, 2.0),
        ("wrn_40_2", ("wrn_16_2", "wrn_40_1"), 2.0, 12.0, 6.0),
        ("vgg13", MOBILE_V2, 3.0, 9.0, 2.0),
    )
    for teacher, student, temperature, weight, ratio in rows:
        values = {"kd_T": temperature, "dkd_alpha": weight, "dkd_beta": weight * ratio}
        yield _standardised("dkd", values, _LSKD_DKD, teacher, student)


#: What changes with the value of a flag that is given.
CHOSEN = (
    Row({"alpha": 0.0}, "KD_SRRL has no KL term", ("srrl",), chosen=("srrl_form", "map")),
    Row({"alpha": 1.0}, "SimKD scripts/run_distill.sh", ("srrl",), chosen=("srrl_form", "pooled")),
    # Logit standardisation (Sun et al., CVPR 2024).
    _standardised("kd", {"gamma": 0.1, "alpha": 9.0, "kd_T": 2.0}, _LSKD),
    _standardised("kd", {"kd_T": 3.0}, _LSKD, "vgg13", ("vgg8", *MOBILE_V2)),
    _standardised("kd", {"alpha": 12.0, "kd_T": 4.0}, _LSKD, "resnet110", ("resnet20",)),
    _standardised("kd", {"alpha": 1.0, "kd_T": 3.0}, _LSKD, "ResNet50", MOBILE_V2),
    _standardised(
        "kd", {"gamma": 0.5}, "logit-standardization-KD configs/imagenet/r50_mv1/kd.yaml", dataset="imagenet"
    ),
    _standardised(
        "kd",
        {"gamma": 1.0},
        "logit-standardization-KD configs/imagenet/r34_r18/kd.yaml",
        "resnet34",
        ("resnet18",),
        "imagenet",
    ),
    *_standardised_dkd(),
    _standardised("mlkd", {"alpha": 9.0, "beta": 9.0, "mlkd_temperatures": (2.0, 3.0, 5.0, 2.0, 6.0)}, _LSKD_MLKD),
    _standardised("mlkd", {"alpha": 6.0, "beta": 6.0}, _LSKD_MLKD, "vgg13", MOBILE_V2),
)

#: The values of `--recipe`, and what each is.
RECIPES = {
    "tables": "the papers' runs",
    "patient": "Beyer et al., CVPR 2022: mixed images, long cosine, with --distill kd the KL divergence alone",
    "a3": "Wightman et al., 2021: LAMB, mixed and cut images, few epochs",
    "finetune": "AdamW at a small rate with a warm-up, for --init",
}


def _row_of(name: str, values: Mapping[str, object], source: str, dataset: Sequence[str] | None = None) -> Row:
    return Row(values, source, dataset=dataset, chosen=("recipe", name))


#: Entered from memory of the papers, without their authors' code. What they do not say is a row of its own, and its
#: source begins with "our choice".
_BEYER = "Beyer et al. (CVPR 2022)"
_WIGHTMAN = (
    "Wightman et al. (2021), procedure A3; the cross entropy is not its binary one, RandAugment has "
    "torchvision's magnitude, images are of the data's size"
)
_ADAMW = {"optimizer": "adamw", "lr_decay": "cos", "clip_grad": 1.0}
#: What a value of `--recipe` changes for any method, on top of all other rows.
NAMED_RECIPES = (
    _row_of(
        "patient",
        {**_ADAMW, "batch_size": 512},
        f"{_BEYER}: Adam with decoupled decay, cosine, clipping at norm 1, batches of 512",
    ),
    _row_of("patient", {"mixup": 1.0}, f"{_BEYER}: function matching, shares of the mixed images uniform"),
    _row_of(
        "patient",
        {"learning_rate": 1e-3, "weight_decay": 1e-4, "epochs": 1200},
        "our choice: Beyer et al. search rate and decay, and train for 100 to 10,000 epochs",
    ),
    _row_of("patient", {"batch_size": 4096}, f"{_BEYER}: the batch of ImageNet", ("imagenet",)),
    _row_of("patient", {"epochs": 300}, "our choice: patient, and yet three times the tables' run", ("imagenet",)),
    _row_of(
        "patient", {"batch_size": 64, "epochs": 160}, "our choice: 1,433 images; ten times the tables' run", ("digits",)
    ),
    Row({"gamma": 0.0, "alpha": 1.0}, f"{_BEYER}: the KL divergence alone", ("kd",), chosen=("recipe", "patient")),
    _row_of(
        "a3",
        {
            "optimizer": "lamb",
            "learning_rate": 8e-3,
            "weight_decay": 0.02,
            "batch_size": 2048,
            "epochs": 100,
            "lr_decay": "cos",
            "lr_warmup_epochs": 5,
            "augment": "randaugment",
            "mixup": 0.1,
            "cutmix": 1.0,
        },
        _WIGHTMAN,
    ),
    _row_of("a3", {"decay_norms": False}, "our choice: norms and biases are spared, as is usual with LAMB"),
    _row_of(
        "a3",
        {"batch_size": 256, "learning_rate": 1e-3},
        "our choice: small data sets need steps; the rate is scaled with the batch",
        SMALL_IMAGES,
    ),
    _row_of(
        "a3",
        {"batch_size": 64, "learning_rate": 1e-3, "epochs": 32, "lr_warmup_epochs": 2},
        "our choice: 1,433 images",
        ("digits",),
    ),
    _row_of(
        "finetune",
        {
            **_ADAMW,
            "learning_rate": 1e-4,
            "weight_decay": 0.01,
            "decay_norms": False,
            "batch_size": 64,
            "epochs": 20,
            "lr_warmup_epochs": 2,
        },
        "our choice: a tenth of AdamW's usual rate and its usual decay, as trained weights need little change",
    ),
)

#: All rows, in the order in which later ones win.
ROWS = (*COMMON, *WEIGHTS, *CIFAR, *CIFAR_PAIR_WEIGHTS, *IMAGENET, *CHOSEN, *NAMED_RECIPES)

#: The three (teacher, student) pairs of the NORM paper's ImageNet tables.
IMAGENET_PAIRS = (_R18, _MOBILENET, _QUARTER)

#: The thirteen (teacher, student) pairs of the NORM paper's CIFAR-100 tables: same family, then across families.
CIFAR_PAIRS = (
    ("wrn_40_2", "wrn_16_2"),
    ("wrn_40_2", "wrn_40_1"),
    ("resnet56", "resnet20"),
    ("resnet110", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
    ("vgg13", "MobileNetV2"),
    ("ResNet50", "MobileNetV2"),
    ("ResNet50", "vgg8"),
    ("resnet32x4", "ShuffleV1"),
    ("resnet32x4", "ShuffleV2"),
    ("wrn_40_2", "ShuffleV1"),
)

#: Test accuracy (%) of RepDistiller's downloadable CIFAR-100 teachers, which the tables use.
PUBLISHED_TEACHERS = {
    ("cifar100", "wrn_40_2"): 75.61,
    ("cifar100", "resnet56"): 72.34,
    ("cifar100", "resnet110"): 74.31,
    ("cifar100", "resnet32x4"): 79.42,
    ("cifar100", "vgg13"): 74.64,
    ("cifar100", "ResNet50"): 79.34,
}


def recipe_of(
    dataset: str, teacher: str | None, student: str, method: str, chosen: Mapping = MappingProxyType({})
) -> dict[str, tuple[object, str]]:
    """Argument -> (value, which row it comes from); `chosen` holds flags that are given, on which some rows depend."""
    place = dataset, teacher, student, method
    return values_of(find_rows(*place, chosen), *place)


def values_of(
    rows: Mapping[str, Row], dataset: str, teacher: str | None, student: str, method: str
) -> dict[str, tuple[object, str]]:
    """What `recipe_of` gives, of the rows that `find_rows` found."""
    place = {"dataset": dataset, "teacher": teacher, "student": student, "method": method}
    return {argument: (row.values[argument], row.describe(place)) for argument, row in rows.items()}


def find_rows(
    dataset: str, teacher: str | None, student: str, method: str, chosen: Mapping = MappingProxyType({})
) -> dict[str, Row]:
    """Argument -> the row that gives its value, the last one that applies."""
    place = {"dataset": dataset, "teacher": teacher, "student": student, "method": method}
    return {argument: row for row in ROWS if row.applies(place, chosen) for argument in row.values}


def run_length(flag: Setting, rows: Mapping[str, Row]) -> Any:
    """The epochs of the run that a flag's number of epochs belongs to, given the rows of `find_rows`.

    What a method publishes for a data set belongs to its run there, everything else to the flag's own `full_run`.
    """
    row = rows.get(flag.argument)
    is_of_recipe = flag.full_run == "recipe" or (row is not None and row.method and row.dataset)
    return rows["epochs"].values["epochs"] if is_of_recipe else flag.full_run
