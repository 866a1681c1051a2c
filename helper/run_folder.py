"""The folder of one run: everything a run writes, written so that no file is ever half there."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from errors import UserError

CONFIG, METRICS, RESULT, LOG = "config.json", "metrics.jsonl", "result.json", "log.txt"
LAST, BEST = "last.pth", "best.pth"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """A temporary name beside `path`; it takes the place of `path` if the block ends well, and goes otherwise."""
    temporary = f"{path}.part"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


class RunFolder:
    """`config.json`, `metrics.jsonl`, `last.pth`, `best.pth`, `result.json`, `log.txt` and TensorBoard events."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._events: SummaryWriter | None = None

    @classmethod
    def create(cls, root: str, name: str) -> "RunFolder":
        """A new folder `root/name`, or `root/name-2` and so on where that exists."""
        for candidate in _candidates(root, name):
            try:
                candidate.mkdir(parents=True)
                return cls(candidate)
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(f"--save_dir: {candidate} cannot be made: {error.strerror}") from None
        raise AssertionError("there is always a next number")

    @classmethod
    def find(cls, root: str, name: str) -> "RunFolder | None":
        """The latest folder that `create` made for this name and that has a checkpoint."""
        made = list(itertools.takewhile(Path.exists, _candidates(root, name)))
        return next((cls(path) for path in reversed(made) if (path / LAST).exists()), None)

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
        tqdm.write(line)
        self.log_quietly(line)

    def log_quietly(self, line: str) -> None:
        """One line in the log file only."""
        with open(self.path / LOG, "a", encoding="utf-8") as file:
            file.write(line + "\n")

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
        with replacing(self.path / name) as temporary:
            torch.save(checkpoint, temporary)

    def append_metrics(self, record: dict, epochs_over: int) -> None:
        """One epoch's numbers: a line of `metrics.jsonl`, and TensorBoard's scalars by epochs of the whole run."""
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._events = self._events or SummaryWriter(self.path)
        for key, value in record.items():
            if key not in ("stage", "epoch"):
                self._events.add_scalar(key, value, epochs_over)
        self._events.flush()

    def keep_metrics_until(self, epochs_over: int) -> None:
        """Drop the lines, one per epoch of the whole run, of epochs that a resumed run will go through again."""
        path = self.path / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines[:epochs_over])
        self._events = SummaryWriter(self.path, purge_step=epochs_over + 1)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def _candidates(root: str, name: str) -> Iterator[Path]:
    yield Path(root, name)
    number = 2
    while True:
        yield Path(root, f"{name}-{number}")
        number += 1
