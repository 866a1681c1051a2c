"""The folder of one run: everything a run writes, written so that no file is ever partly written."""

import errno
import functools
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from errors import UserError, first_line
from models.files import DamagedFile, read_checkpoint

CONFIG, EPOCHS, RESULT, LOG = "config.json", "metrics.jsonl", "result.json", "log.txt"
LAST, BEST = "last.pth", "best.pth"
#: What `scripts/evaluate.py --teacher T --fidelity` measures of a student and its teacher; kept next to `result.json`.
FIDELITY = "fidelity.json"
LOCK, PART = ".lock", ".part"
#: The checkpoint before the last, which is taken where the last is damaged.
PREVIOUS = "last.previous.pth"
DAMAGED = "last.damaged.pth"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """A temporary name next to `path`; it replaces that if the block ends well, and is removed otherwise.

    The content is on the disk before the name is, so that a power cut leaves the old file or the new one. Raises
    `UserError` where the system refuses to write. Two processes that write one file do not meet.
    """
    target = os.path.realpath(path)  # of a link it is replaced, not the link
    temporary = f"{target}.{os.getpid()}{PART}"
    try:
        with writing(path):
            yield temporary
            _flush(temporary)
            os.replace(temporary, target)
            _flush(os.path.dirname(target))
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_text(path: str | os.PathLike, text: str, errors: str = "strict") -> None:
    """Write a text file as `replacing` does; `errors` is what happens to characters that UTF-8 cannot hold."""
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8", errors=errors)


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Name the file that the system refuses to write, in a `UserError`."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)
        way_out = "make room, then resume" if is_full else "name another place"
        raise UserError(f"{path} cannot be written: {error.strerror or error}; {way_out}") from None


def _flush(path: str | os.PathLike) -> None:
    """Have the system write a file, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not os.path.isdir(path) or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        _warn_of_folder(os.path.abspath(path))
    finally:
        os.close(descriptor)


@functools.cache
def _warn_of_folder(path: str) -> None:
    print(f"warning: the file system of {path} does not flush folders: a power cut may lose the latest checkpoint")


def acquire(lock: FileLock, timeout: float = 0.0) -> None:
    """Take a lock within `timeout` seconds, or raise `Timeout`; say so where the file system has no locks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lock.acquire(timeout=timeout)
    if caught:
        _warn_of_locks(os.path.dirname(lock.lock_file))


@functools.cache
def _warn_of_locks(folder: str) -> None:
    print(f"warning: the file system of {folder} has no locks; files are taken as locks")


def is_taken(path: Path) -> bool:
    """Whether a process is training in a run folder now."""
    if not (path / LOCK).exists():
        return False
    lock = FileLock(path / LOCK)
    try:
        acquire(lock)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


class RunFolder:
    """`config.json`, `metrics.jsonl`, `last.pth`, `best.pth`, `result.json`, `log.txt` and TensorBoard events."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.label = ""  # before every line on the terminal, where several runs print there
        self._events: SummaryWriter | None = None
        self._lock = FileLock(self.path / LOCK)

    def lock(self) -> "RunFolder":
        """Claim the folder until `close`; raises `UserError` where another process writes to it.

        Nor is a folder taken in which a link would lead what is written out of it.
        """
        for name in os.listdir(self.path):
            if (self.path / name).is_symlink():
                raise UserError(f"--resume: {self.path / name} is a link; a run's files must be its own")
        with writing(self.path / LOCK):
            try:
                acquire(self._lock, timeout=1.0)  # a plan that looks whether the run is over holds it for a moment
            except Timeout:  # an OSError too: not one of the disk's
                raise UserError(
                    f"--resume: another process is training in {self.path}; wait for it, or start a run of its own"
                ) from None
            for left in self.path.glob(f"*{PART}"):  # of a process that was killed
                left.unlink(missing_ok=True)
        return self

    @classmethod
    def create(cls, root: str, name: str) -> "RunFolder":
        """A new folder `root/name`, or `root/name-2` and so on, behind the latest that exists."""
        while True:
            candidate = next_folder(root, name)
            try:
                candidate.mkdir(parents=True)
                return cls(candidate).lock()
            except FileExistsError:  # another process was faster
                if not candidate.is_dir():
                    raise UserError(f"--save_dir: {candidate} cannot be made: a file is in its place") from None
            except OSError as error:
                raise UserError(f"--save_dir: {candidate} cannot be made: {error.strerror}") from None

    @classmethod
    def find(cls, root: str, name: str) -> "RunFolder | None":
        """The latest folder that `create` made for this name and that has a checkpoint."""
        made = reversed(folders_of(root, name))
        return next((cls(path) for path in made if (path / LAST).exists() or (path / PREVIOUS).exists()), None)

    @contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Remove the folder again if what is being prepared in it turns out impossible."""
        try:
            yield
        except BaseException:
            self.close()
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def log(self, line: str) -> None:
        """One line on the terminal, above the progress bar, and in the log file."""
        self.show(line)
        self.log_quietly(line)

    def show(self, text: str) -> None:
        """Lines on the terminal only."""
        tqdm.write("\n".join(self.label + line for line in text.split("\n")))

    def log_quietly(self, line: str) -> None:
        """One line in the log file only."""
        _append(self.path / LOG, line)

    def write_json(self, name: str, content: dict) -> None:
        with replacing(self.path / name) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")

    def read_json(self, name: str) -> dict:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--resume: {self.path / name} cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise UserError(f"--resume: {self.path / name} does not hold settings; name a run folder")
        return content

    def save(self, name: str, checkpoint: dict) -> None:
        """Write a checkpoint; the old `last.pth` is kept as `last.previous.pth`."""
        path = self.path / name
        with replacing(path) as temporary:
            save(checkpoint, temporary)
            if name == LAST and path.exists():
                _flush(temporary)
                os.replace(path, self.path / PREVIOUS)

    def read_last(self) -> dict:
        """The last whole checkpoint; says so where that is not `last.pth`. Raises `UserError` where there is none."""
        refusals = []
        for name in (LAST, PREVIOUS):
            if not (self.path / name).exists():
                continue
            try:
                checkpoint = read_checkpoint(self.path / name, "--resume")
            except DamagedFile as error:  # what the system refuses to read is not damaged, and ends the script
                refusals.append(str(error))
                continue
            if name == PREVIOUS:
                self.log(f"{refusals[0] if refusals else f'{LAST} is missing'}; resuming with {name}")
                if refusals:  # the next checkpoint must not take it for the one before
                    os.replace(self.path / LAST, self.path / DAMAGED)
            return checkpoint
        if refusals:
            raise UserError(refusals[0])
        raise UserError(f"--resume: {self.path} has no checkpoint yet; start the run again without --resume")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with writing(self.path / name):
            (self.path / name).unlink(missing_ok=True)

    def append_metrics(self, record: dict, epochs_over: int) -> None:
        """One epoch's numbers: a line of `metrics.jsonl`, and TensorBoard's scalars by epochs of the whole run."""
        path = self.path / EPOCHS
        _append(path, json.dumps({key: _or_null(value) for key, value in record.items()}))
        _flush(path)  # before the checkpoint that says the epoch is finished
        with writing(self.path / "events.out.tfevents"):
            self._events = self._events or SummaryWriter(self.path)
            for key, value in record.items():
                if key not in ("stage", "epoch"):
                    self._events.add_scalar(tag_of(key), value, epochs_over)
            self._events.flush()

    def append_outcome(self, settings: dict, result: dict) -> None:
        """TensorBoard's table of runs: settings and the accuracies of the result."""
        values = {name: value for name, value in settings.items() if isinstance(value, bool | str | float | int)}
        numbers = {tag_of(name): value for name, value in result.items() if name.startswith("accuracy")}
        with writing(self.path / "events.out.tfevents"):
            self._events = self._events or SummaryWriter(self.path)
            self._events.add_hparams(values, numbers, run_name=".")
            self._events.flush()

    def keep_metrics_until(self, epochs_over: int) -> None:
        """Drop the lines, one per epoch of the whole run, of epochs that a resumed run will go through again.

        A line that a power cut has damaged goes too. TensorBoard is told to forget the same epochs.
        """
        path = self.path / EPOCHS
        text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
        whole = [line for line in text.split("\n")[:epochs_over] if _is_record(line)]
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in whole)
        with writing(self.path / "events.out.tfevents"):
            self._events = SummaryWriter(self.path, purge_step=epochs_over + 1)

    def close(self) -> None:
        """End the event file and let go of the folder."""
        if self._events is not None:
            with suppress(OSError):  # a full disk: what could not be written is lost, and was named before
                self._events.close()
        self._lock.release()


class FolderElsewhere(RunFolder):
    """The folder as processes know it that do not write: the main one does. Nothing here needs to see its disk."""

    def _ignore(self, *arguments, **named) -> None:
        pass

    log = show = log_quietly = _ignore
    write_json = save = append_metrics = append_outcome = keep_metrics_until = remove = close = _ignore


def tag_of(name: str) -> str:
    """The name of a number in TensorBoard, grouped by what it is: accuracy/test, loss/ce, speed/images_per_s."""
    split, _, rest = name.partition("_")
    if split in ("train", "test", "holdout", "probe", "knn"):
        return f"{rest}/{split}"
    if split in ("loss", "accuracy"):
        return f"{split}/{rest or 'total'}"
    return f"speed/{name}" if name.endswith("_s") else f"schedule/{name}"


def _append(path: Path, line: str) -> None:
    """Add a whole line to a file; where that fails the file is as before."""
    with writing(path), open(path, "ab", buffering=0) as file:
        end, rest = file.tell(), line.encode("utf-8", "backslashreplace") + b"\n"
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            os.truncate(path, end)
            raise


def save(checkpoint: dict, path: str) -> None:
    """`torch.save`; raises `OSError` where the file cannot be written."""
    try:
        torch.save(checkpoint, path)
    except RuntimeError as error:  # torch's word for a file that cannot be written
        raise OSError(errno.ENOSPC, f"the disk is full ({first_line(error)})") from None


def _is_record(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _or_null(value):
    """A test loss may be infinite, for which JSON has no word."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def folders_of(root: str | os.PathLike, name: str) -> list[Path]:
    """The folders of runs of one name, root/name, root/name-2, ..., in the order in which they were made."""
    try:
        found = [path for path in Path(root).iterdir() if re.fullmatch(rf"{re.escape(name)}(-\d+)?", path.name)]
    except OSError:
        return []
    return sorted(found, key=lambda path: _number(path, name))


def next_folder(root: str | os.PathLike, name: str) -> Path:
    """The folder that a new run of this name gets."""
    made = folders_of(root, name)
    return Path(root, name if not made else f"{name}-{_number(made[-1], name) + 1}")


def _number(path: Path, name: str) -> int:
    return int(path.name[len(name) + 1 :] or 1)
