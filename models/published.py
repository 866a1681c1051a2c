"""Published weights by name. Files from the network are resumed, checked, limited in size and time, and under their
name only when they are whole."""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from filelock import FileLock

from errors import UserError
from models import build_model, find_builder, imagenet_model_dict
from models.checkpoints import find_weights, load_weights, read_checkpoint
from models.external import External, build_pretrained, find_external

#: Another place to get files from: a URL (http://, https://, file://) or a folder, with the same names in it.
MIRROR = "NORM_MIRROR"
#: How often a connection may break, how long it may be silent, and how long a download may take (seconds).
ATTEMPTS, TIMEOUT, LONGEST = 5, 30, 7200
BLOCK = 1 << 20


class RemoteFile(NamedTuple):
    """A file, where it comes from and where it goes."""

    target: Path
    folder_url: str  # without the last slash
    name: str  # below that folder, or below the mirror
    sha256: str = ""  # its first digits, if they are published
    check: Callable[[Path], None] | None = None  # raises `UserError` for another file, where no checksum is published
    largest: int = 4 << 30  # bytes; a longer answer is another file

    @property
    def url(self) -> str:
        mirror = os.environ.get(MIRROR)
        if mirror and "://" not in mirror:
            mirror = Path(mirror).expanduser().resolve().as_uri()
        return f"{(mirror or self.folder_url).rstrip('/')}/{self.name}"

    @property
    def pin(self) -> Path:
        """Where the checksum of a file without a published one is kept from its first use on."""
        return self.target.with_name(f"{self.target.name}.sha256")


def provide(file: RemoteFile) -> Path:
    """The checked file at `file.target`, downloaded if it is not there; raises `UserError`.

    Several processes may ask at once: one downloads, the others wait. A file that is there is only read, so that its
    folder need not be writable.
    """
    if not os.path.exists(file.target):
        with _alone(file):
            if not os.path.exists(file.target):
                return _fetch(file)
    _verify(file, file.target, "remove it to download it again")
    return file.target


@contextmanager
def _alone(file: RemoteFile) -> Iterator[None]:
    """Keep other processes from writing to the same place meanwhile."""
    lock = FileLock(file.target.with_name(f".{file.target.name}.lock"))
    with _writing(file, file.target.parent, "made"):
        file.target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(file: RemoteFile) -> Path:
    part = file.target.with_name(f"{file.target.name}.part")
    _download(file, part)
    try:
        _verify(file, part, "get the file elsewhere, or try again")
    except UserError:
        part.unlink()
        raise
    with _writing(file, file.target):
        os.replace(part, file.target)
    return file.target


@contextmanager
def _writing(file: RemoteFile, path: Path, verb: str = "written") -> Iterator[None]:
    """Say what the system refuses to write or make."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file.target} has no place: {error.filename or path} cannot be {verb} ({error.strerror}); make it "
            "writable, make room, or put the file elsewhere and name it (torchvision's place is set by TORCH_HOME)"
        ) from None


def _verify(file: RemoteFile, path: Path, way_out: str) -> None:
    """Compare with the published or pinned checksum, else look into the file and pin its checksum."""
    try:
        with open(path, "rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    expected, whose = file.sha256, "published"
    if not expected:
        expected, whose = _pinned(file), f"kept in {file.pin} since its first use"
    if not found.startswith(expected):
        raise UserError(
            f"{file.target} from {file.url} is not the right file: its SHA-256 begins with {found[:8]}, the one "
            f"{whose} with {expected[:8]}; {way_out}"
        )
    if not expected:
        if file.check is not None:
            file.check(path)
        with suppress(OSError):  # in a folder that cannot be written the file is looked into each time
            file.pin.write_text(f"{found}  {file.target.name}\n")


def _pinned(file: RemoteFile) -> str:
    """The checksum from the first use; "" where there is none yet."""
    try:
        words = file.pin.read_text(errors="replace").split()
    except OSError:
        return ""
    return words[0] if words and re.fullmatch("[0-9a-f]{64}", words[0]) else ""


def _download(file: RemoteFile, part: Path) -> None:
    """Fill `part` from where it ends, through broken connections."""
    print(f"downloading {file.url} to {file.target}")
    reason, end = "", time.monotonic() + LONGEST
    for _ in range(ATTEMPTS):
        try:
            if _receive(file, part, end):
                return
            reason = "the connection ends too early"
        except HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code == 416 and part.exists():  # nothing follows the part: it is whole, or of another file
                if error.headers.get("Content-Range") == f"bytes */{part.stat().st_size}":
                    return
                part.unlink()
            elif error.code < 500:
                break
        except (HTTPException, OSError, ValueError) as error:
            reason = str(getattr(error, "reason", error))
            if isinstance(error, URLError | ValueError):  # the latter of the URL, or where a server redirects to
                break
        if time.monotonic() > end:
            reason = f"not done after {LONGEST} s"
            break
    kept = f"; what came is kept in {part}, the next try resumes from there" if part.exists() else ""
    raise UserError(
        f"{file.target} is missing and cannot be downloaded from {file.url} ({reason}){kept}; put the file there, or "
        f"set {MIRROR} to another place that has {file.name} (a URL or a folder)"
    )


def _receive(file: RemoteFile, part: Path, end: float) -> bool:
    """One connection, until the time `end`; returns whether the file is whole."""
    over = part.stat().st_size if part.exists() else 0
    request = Request(file.url, headers={"Range": f"bytes={over}-"} if over else {})
    with urlopen(request, timeout=TIMEOUT) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise UserError(f"{file.url} is a web page and not the file (is this network behind a login?)")
        content_range = re.match(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range") or "")
        resumes = content_range is not None and int(content_range[1]) == over
        length = re.fullmatch(r"\d+", answer.headers.get("Content-Length") or "")
        total = int(content_range[2]) if content_range and resumes else int(length[0]) if length else None
        if not resumes:
            part.unlink(missing_ok=True)
        _append(file, part, answer, end, total)
    return total is None or part.stat().st_size == total


def _append(file: RemoteFile, part: Path, answer: HTTPResponse, end: float, total: int | None) -> None:
    """Write what comes behind `part`; `UserError` where it is, or becomes, more than the file can have."""
    with _writing(file, part):
        content = open(part, "ab")  # noqa: SIM115  closed by the next line
    with content:
        written = content.tell()
        while written <= file.largest and (total or 0) <= file.largest and time.monotonic() <= end:
            block = answer.read1(BLOCK) if hasattr(answer, "read1") else answer.read(BLOCK)
            if not block:
                return
            with _writing(file, part):
                content.write(block)
                content.flush()
            written += len(block)
    if time.monotonic() > end:
        raise TimeoutError(f"not done after {LONGEST} s")
    part.unlink()
    raise UserError(f"{file.url} is not the file: it is larger than {file.largest >> 20} MiB")


# Published weights by name.

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
    from torchvision.models import get_model_weights  # imported where it is needed: it takes a second

    members = get_model_weights(architecture).__members__
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
    return network, {"dataset": "imagenet" if network.num_classes == 1000 else None}
