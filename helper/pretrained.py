"""Published teachers by name, and where their files are."""

import re
from pathlib import Path

import torch
import torchvision

from errors import UserError
from helper.download import RemoteFile, provide
from models import build_model, find_builder, imagenet_model_dict
from models.checkpoints import find_weights, load_weights, read_checkpoint
from models.external import External, build_pretrained, find_external

#: RepDistiller's CIFAR-100 teachers. No checksum was ever published.
CIFAR_TEACHERS = ("wrn_40_2", "resnet56", "resnet110", "resnet32x4", "vgg13", "ResNet50")
CIFAR_URL = "http://shape2prog.csail.mit.edu/repo"
#: Bytes; the largest of them, ResNet50, has 24 million parameters.
CIFAR_LARGEST = 256 << 20
#: The ImageNet teachers of NORM's tables.
IMAGENET_TEACHERS = ("resnet34", "resnet50")
#: The weights that are meant where none are named: those of the published tables.
WEIGHTS = "IMAGENET1K_V1"


def cifar_teacher(name: str) -> RemoteFile:
    """RepDistiller's teacher of this name, below save/models/."""
    if name not in CIFAR_TEACHERS:
        raise UserError(f"{name}: RepDistiller's teachers are {', '.join(CIFAR_TEACHERS)}")
    path = f"{name}_vanilla/ckpt_epoch_240.pth"

    def check(file: Path) -> None:
        weights = find_weights(read_checkpoint(file, name), str(file))
        load_weights(build_model(name, 100), name, weights, f"{name}: the file")

    return RemoteFile(Path("save/models") / path, CIFAR_URL, path, check=check, largest=CIFAR_LARGEST)


def torchvision_weights(name: str):
    """`resnet50` or `resnet50@IMAGENET1K_V2` -> torchvision's entry for these weights; `UserError` if there is none."""
    architecture, _, wanted = name.partition("@")
    find_external(f"torchvision:{architecture}")
    members = torchvision.models.get_model_weights(architecture).__members__
    if (wanted or WEIGHTS) not in members:
        raise UserError(f"torchvision:{name}: its weights are {', '.join(members) or 'not published'}")
    return members[wanted or WEIGHTS]


def published_name(source: str) -> str:
    """The model of `torchvision:NAME[@WEIGHTS]` or `timm:NAME[.TAG]`, found without a download; `UserError` for none.

    Our own networks of the same name and weights show more to the methods than a foreign one does.
    """
    library, _, architecture = source.partition(":")
    architecture = architecture.partition("." if library == "timm" else "@")[0]
    is_ours = library == "torchvision" and architecture in imagenet_model_dict
    name = architecture if is_ours else f"{library}:{architecture}"
    find_builder(name)
    return name


def imagenet_teacher(name: str) -> RemoteFile:
    """torchvision's weights of `name`, where torchvision itself keeps them; their file name carries the checksum."""
    entry = torchvision_weights(name)
    folder_url, _, file_name = entry.url.rpartition("/")
    sha256 = re.search(r"-([0-9a-f]{8,})\.", file_name)
    target = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    largest = int(2 * entry.meta["_file_size"] + 1) << 20  # it is given in MB
    return RemoteFile(target, folder_url, file_name, sha256[1] if sha256 else "", largest=largest)


def read_torchvision(name: str) -> tuple[dict, dict]:
    """torchvision's weights of `name`, downloaded if they are not here, and what is known of them."""
    entry = torchvision_weights(name)
    path = provide(imagenet_teacher(name))
    record = {"dataset": "imagenet", "image_size": entry.transforms().crop_size[0]}
    record["accuracy"] = entry.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    return read_checkpoint(path, f"torchvision:{name}"), record


def read_timm(name: str) -> tuple[External, dict]:
    """timm's trained network of `name`, which may carry a tag (`resnet34.a1_in1k`); timm downloads and keeps it."""
    network = build_pretrained(f"timm:{name}")
    return network, {"dataset": "imagenet" if network.get_classifier().out_features == 1000 else None}
