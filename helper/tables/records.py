"""What run folders hold, which anybody may have written: nothing is taken as it is.

A folder that holds what no run can have written is refused, by name.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError
from helper.configuration import read_stored, row_key
from helper.run_folder import CONFIG, EPOCHS, FIDELITY, RESULT
from helper.settings import settings_of
from setting import FILLED_IN

MEAN_OF_FIVE = "accuracy_mean_last_five"
#: The accuracies of `result.json` and their titles. "Best" is chosen as the protocol says.
ACCURACIES = {"accuracy_last": "last", "accuracy_best": "best", MEAN_OF_FIVE: "mean of last five"}
#: Of an epoch: the accuracy on the training images that were held out (`--holdout`), by which settings are chosen.
HELD_OUT = "holdout_accuracy"
#: Entries of `fidelity.json` that tables show: title, greatest value, decimals.
FIDELITIES = {
    "agreement": ("agreement (%)", 100.0, 2),
    "kl": ("KL", 2.0**53, 3),
    "cka_unfolded": ("CKA before folding", 1.0, 3),
    "cka": ("CKA", 1.0, 3),
}
#: The test images of a run that could not be read, and so were in no accuracy.
UNREADABLE = "test_unreadable"
#: How deep below a folder that is no run's its runs are searched for.
DEEPEST = 3
#: No record is longer; a longer file is another thing.
LARGEST_RECORD = 2**26
#: Epochs whose speed counts as a run's.
LAST_EPOCHS = 5


class Record(NamedTuple):
    """A finished run, as its folder tells it."""

    folder: Path
    config: dict[str, Any]  # every setting of its method; a setting that is newer than the run has its default
    result: dict[str, Any]
    epochs: list[dict[str, Any]]  # the lines of metrics.jsonl
    stored: frozenset[str]  # the settings that the run knew
    fidelity: dict[str, Any]  # how it compares with its teacher, where that was measured

    @property
    def curve(self) -> list[float]:
        """Test accuracy (%) after every epoch of the main stage."""
        return [epoch["test_accuracy"] for epoch in self.epochs if "test_accuracy" in epoch]

    @property
    def held_out(self) -> float | None:
        """Accuracy (%) on the held-out images after the last epoch, where there are some."""
        return self.epochs[-1].get(HELD_OUT) if self.epochs else None

    @property
    def images_per_s(self) -> float | None:
        """The median over the last epochs; None where none was measured."""
        speeds = [epoch["images_per_s"] for epoch in self.epochs[-LAST_EPOCHS:] if "images_per_s" in epoch]
        return statistics.median(speeds) if speeds else None


def _text(path: Path) -> str:
    """The content of a record; raises `UserError` that names it."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path} is missing")
        if path.stat().st_size > LARGEST_RECORD:
            raise UserError(f"{path} is too long for a record")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _json(text: str, source: object) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON: {str(error)[:100]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{source} holds no record")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a run; those that are newer than it have their defaults. Raises `UserError`."""
    return _completed(_read_settings(folder), folder)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    return read_stored(_json(_text(path), path), str(path))


def _completed(stored: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    try:
        defaults = {name: one.default for name, one in settings_of(stored["distill"]).items()}
        config = {name: value for name, value in defaults.items() if value is not FILLED_IN} | dict(stored)
        row_key(config)
        config["epochs"]  # is in every report
    except KeyError as error:
        raise UserError(f"{folder / CONFIG} does not say {error}") from None
    if config.get("model_s") is None or config.get("seed") is None:
        raise UserError(f"{folder / CONFIG} does not say which network was trained, or with which seed")
    return config


def read_result(folder: Path) -> dict[str, Any]:
    """What a finished run ended with. Raises `UserError`, also for a run that is not finished."""
    path = folder / RESULT
    if not path.exists():
        raise UserError("not finished")
    result = _json(_text(path), path)
    if "best_by" in result and not set(ACCURACIES) & set(result):
        raise UserError("it was trained without labels and has no test accuracy; its result.json says how it ended")
    for name in ACCURACIES:
        _check(result, name, path, most=100)
    for name in ("epochs", "best_epoch", "parameters"):
        _check(result, name, path, least=1 if name == "epochs" else 0, kinds=(int,))
    for name in (UNREADABLE, "test_images"):  # newer than some runs
        if name in result:
            _check(result, name, path, kinds=(int,))
    return result


def _check(record: Mapping, name: str, path: Path, least: float = 0, most: float = 2**53, kinds=(int, float)) -> None:
    value: Any = record.get(name)
    if type(value) not in kinds or not math.isfinite(value) or not least <= value <= most:
        raise UserError(f"{path}: its {name} is {str(value)[:40]}")


def _read_fidelity(folder: Path) -> dict[str, Any]:
    path = folder / FIDELITY
    fidelity = _json(_text(path), path) if path.exists() else {}
    for name, (_, most, _) in FIDELITIES.items():
        if name in fidelity:
            _check(fidelity, name, path, least=-1, most=most)
    return fidelity


def read_record(folder: Path) -> Record:
    """A finished run; raises `UserError` where the folder holds none."""
    result, stored, epochs = read_result(folder), _read_settings(folder), []
    path = folder / EPOCHS
    for line in _text(path).splitlines() if path.exists() else ():
        epoch = _json(line, path)
        for name in ("test_accuracy", HELD_OUT, "images_per_s", "data_wait_s", "compute_s"):
            if name in epoch:
                _check(epoch, name, path, most=100 if name.endswith("_accuracy") else 2**53)
        epochs.append(epoch)
    return Record(folder, _completed(stored, folder), result, epochs, frozenset(stored), _read_fidelity(folder))


def find_folders(paths: Iterable[Path]) -> Iterator[Path]:
    """The run folders among the paths, and those in folders that are no run's, as sweeps have; each once."""
    seen = set()
    for path in paths:
        for folder in _below(path, DEEPEST):
            if folder.resolve() not in seen:
                seen.add(folder.resolve())
                yield folder


def _below(path: Path, depth: int) -> Iterator[Path]:
    try:
        if not path.is_dir():
            if not path.exists():
                raise UserError(f"RUN: there is no folder {path}")
            return  # a file, as save/* may match
        if (path / CONFIG).exists() or (path / RESULT).exists():
            yield path
        elif depth:
            inner = sorted(one for one in path.iterdir() if one.is_dir() and not one.is_symlink())
            for one in inner:
                yield from _below(one, depth - 1)
    except PermissionError as error:
        raise UserError(f"RUN: {path} cannot be read: {error.strerror}") from None
