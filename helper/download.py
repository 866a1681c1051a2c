"""Files from the network: resumed, checked, and under their name only when they are whole."""

import fcntl
import hashlib
import os
import re
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from errors import UserError

#: Another place to get files from: a URL (http://, https://, file://) or a folder, with the same names in it.
MIRROR = "NORM_MIRROR"
#: How often a connection may break, and how long it may be silent (seconds).
ATTEMPTS, TIMEOUT = 5, 30
BLOCK = 1 << 20


class RemoteFile(NamedTuple):
    """A file, where it comes from and where it goes."""

    target: Path
    folder_url: str  # without the last slash
    name: str  # below that folder, or below the mirror
    sha256: str = ""  # its first digits, if they are published
    check: Callable[[Path], None] | None = None  # raises `UserError` for another file, where no sum is published

    @property
    def url(self) -> str:
        mirror = os.environ.get(MIRROR)
        if mirror and "://" not in mirror:
            mirror = Path(mirror).resolve().as_uri()
        return f"{(mirror or self.folder_url).rstrip('/')}/{self.name}"

    @property
    def pin(self) -> Path:
        """Where the sum of a file without a published one is kept from its first use on."""
        return self.target.with_name(f"{self.target.name}.sha256")


def provide(file: RemoteFile, report: Callable[[str], None] = print) -> Path:
    """The checked file at `file.target`, downloaded if it is not there; raises `UserError`.

    Several processes may ask at once: one downloads, the others wait.
    """
    try:
        file.target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{file.target} has no place: {error.filename} cannot be made ({error.strerror}); make it writable, or put "
            "the file elsewhere and name it (torchvision's place is set by TORCH_HOME)"
        ) from None
    with open(file.target.with_name(f".{file.target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.target.exists():
            _verify(file, file.target, "remove it to download it again")
        else:
            part = file.target.with_name(f"{file.target.name}.part")
            _download(file, part, report)
            try:
                _verify(file, part, "get the file elsewhere, or try again")
            except UserError:
                part.unlink()
                raise
            os.replace(part, file.target)
    return file.target


def _verify(file: RemoteFile, path: Path, way_out: str) -> None:
    """Compare with the published or pinned sum, else look into the file and pin its sum."""
    sum_of_file = _sha256(path)
    expected, whose = file.sha256, "published"
    if not expected and file.pin.exists():
        expected, whose = file.pin.read_text().split(" ")[0], f"kept in {file.pin} since its first use"
    if not sum_of_file.startswith(expected):
        raise UserError(
            f"{file.target} from {file.url} is not the right file: its SHA-256 begins with {sum_of_file[:8]}, the one "
            f"{whose} with {expected[:8]}; {way_out}"
        )
    if not expected:
        if file.check is not None:
            file.check(path)
        file.pin.write_text(f"{sum_of_file}  {file.target.name}\n")


def _sha256(path: Path) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _download(file: RemoteFile, part: Path, report: Callable[[str], None]) -> None:
    """Fill `part` from where it ends, through broken connections."""
    report(f"downloading {file.url} to {file.target}")
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            if _receive(file, part):
                return
            reason = "the connection ends too early"
        except HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code == 416:  # there is nothing behind the part: it is whole, or of another file
                if error.headers.get("Content-Range") == f"bytes */{part.stat().st_size}":
                    return
                part.unlink()
            elif error.code < 500:
                break
        except (URLError, HTTPException, OSError) as error:
            reason = str(getattr(error, "reason", error))
            if isinstance(error, URLError):
                break
    kept = f"; what came is kept in {part}, the next try goes on from there" if part.exists() else ""
    raise UserError(
        f"{file.target} is missing and cannot be downloaded from {file.url} ({reason}){kept}; put the file there, or "
        f"set {MIRROR} to another place that has {file.name} (a URL or a folder)"
    )


def _receive(file: RemoteFile, part: Path) -> bool:
    """One connection; returns whether the file is whole."""
    over = part.stat().st_size if part.exists() else 0
    request = Request(file.url, headers={"Range": f"bytes={over}-"} if over else {})
    with urlopen(request, timeout=TIMEOUT) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise UserError(f"{file.url} is a web page and not the file (is this network behind a login?)")
        content_range = re.match(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range") or "")
        goes_on = content_range is not None and int(content_range[1]) == over
        length = answer.headers.get("Content-Length")
        total = int(content_range[2]) if goes_on else int(length) if length else None
        with open(part, "ab" if goes_on else "wb") as content:
            while block := answer.read1(BLOCK) if hasattr(answer, "read1") else answer.read(BLOCK):
                content.write(block)
    return total is None or part.stat().st_size == total
