"""A setting of a run or of a method: everything that the toolbox knows of it is said once, in its row."""

import functools
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

#: The largest number that a flag may have: float32, in which it is used, ends at 3.4e38.
LARGEST = 1e30
#: As a default: a recipe fills it in when the run is resolved, or what the run reads.
FILLED_IN = object()
#: As a file for a result: standard output.
STDOUT = Path("-")


# What a value may be: the types of flags, and of what a run stores.


def must_be(what: str) -> Callable[[Callable[[str], Any]], Callable[[str], Any]]:
    """Decorates a function that reads a flag: where that raises `ValueError`, the refusal says what the flag must be.

    argparse itself would name the function instead.
    """

    def decorate(read: Callable[[str], Any]) -> Callable[[str], Any]:
        @functools.wraps(read)
        def reader(text: str) -> Any:
            try:
                return read(text)
            except (ValueError, OverflowError):
                raise ArgumentTypeError(f"must be {what}, not {text[:100] or 'empty'}") from None

        return reader

    return decorate


def _only(value: Any, fits: bool) -> Any:
    """A value that fits; raises `ValueError` for another."""
    if not fits:
        raise ValueError(value)
    return value


@must_be(f"a number from 0 to {LARGEST:g}")
def number(text: str) -> float:
    """A number from 0 to `LARGEST`, read from a flag."""
    return _only(float(text), 0 <= float(text) <= LARGEST)


@must_be(f"a number above 0, up to {LARGEST:g}")
def positive(text: str) -> float:
    """A number above 0 and up to `LARGEST`, read from a flag."""
    return _only(float(text), 0 < float(text) <= LARGEST)


@must_be(f"a whole number from 1 to {2**31 - 1}")
def count(text: str) -> int:
    """A whole number from 1 on, read from a flag."""
    return _only(int(text), 1 <= int(text) < 2**31)


@must_be("a whole number from 0 on")
def whole(text: str) -> int:
    """A whole number from 0 on, of 63 bits as seeds have, read from a flag."""
    return _only(int(text), 0 <= int(text) < 2**63)


@must_be("a number, 0 or more and below 1")
def below_one(text: str) -> float:
    """A number from 0 to below 1, read from a flag."""
    return _only(float(text), 0 <= float(text) < 1)


@must_be("a probability from 0 to 1")
def probability(text: str) -> float:
    """A number from 0 to 1, read from a flag."""
    return _only(float(text), 0 <= float(text) <= 1)


@must_be("0, or a number from 0.01 to 100")
def beta_parameter(text: str) -> float:
    """Both parameters of a Beta distribution, or 0 for none, read from a flag; samples of smaller ones round to one
    half."""
    return _only(float(text), float(text) == 0 or 0.01 <= float(text) <= 100)


@must_be("epochs like 150,180,210")
def epochs(text: str) -> tuple[int, ...]:
    """Numbers of epochs with commas between them, read from a flag."""
    return tuple(_only(int(part), 1 <= int(part) < 2**31) for part in text.split(","))


@must_be("8 to 10,000 pixels")
def image_size(text: str) -> int:
    """A side of images in pixels, read from a flag."""
    return _only(int(text), 8 <= int(text) <= 10_000)


def image_sizes(text: str) -> int | tuple[int, ...]:
    """One side of images in pixels, or several with commas that differ."""
    sizes = tuple(image_size(part) for part in text.split(","))
    return sizes if len(set(sizes)) > 1 else sizes[0]


@must_be("red,green,blue from 0 to 255")
def colour(text: str) -> tuple[int, ...]:
    """red,green,blue from 0 to 255, read from a flag."""
    red, green, blue = map(int, text.split(","))
    return _only((red, green, blue), {red, green, blue} <= set(range(256)))


def trial_name(text: str) -> str:
    """A name that can be a part of a folder's, read from a flag."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", text):
        raise ArgumentTypeError(f"must be a name of letters, digits, - _ and ., not '{text}'")
    return text


def path(text: str) -> str:
    """A path, in which ~ is the home folder, read from a flag."""
    return os.path.expanduser(text)


def file_to_write(text: str) -> Path:
    """The file for a result, read from a flag: what hinders writing is said before the work, not after it."""
    file = Path(path(text))
    if file == STDOUT:
        raise ArgumentTypeError("- is standard output, which this is not written to; name a file")
    if os.path.isdir(file):
        raise ArgumentTypeError(f"{text} is a folder; name a file in it")
    if os.path.exists(file) and not os.path.isfile(file):  # /dev/null would be replaced by a file
        raise ArgumentTypeError(f"{text} is a device or a pipe; name a file")
    if not os.path.isdir(file.parent):
        raise ArgumentTypeError(f"there is no folder {file.parent}; make it, or name another place")
    if reason := what_hinders(file.parent):
        raise ArgumentTypeError(reason)
    return file


def file_or_stdout(text: str) -> Path:
    """The file for a result, or a dash for standard output, read from a flag."""
    return STDOUT if text == str(STDOUT) else file_to_write(text)


def what_hinders(folder: Path) -> str:
    """Why nothing can be written to a folder that may have to be made; empty where it can."""
    place = next(each for each in (folder, *folder.absolute().parents) if os.path.exists(each))
    if not os.path.isdir(place):
        return f"{place} is a file; name a folder"
    return "" if os.access(place, os.W_OK) else f"the folder {place.resolve()} is not writable; name another place"


def folder_to_write(text: str) -> Path:
    """The folder for results, read from a flag; it is made later, and what hinders that is said at once."""
    folder = Path(path(text))
    if reason := what_hinders(folder):
        raise ArgumentTypeError(reason)
    return folder


def digest(value: Any) -> str:
    """A stored digest; raises `ValueError`."""
    if not isinstance(value, str) or len(value) > 64:
        raise ValueError("it must be a digest")
    return value


def number_of_images(value: Any) -> int:
    """A stored number of images; raises `ValueError`."""
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError("it must be a number of images")
    return value


def statistics(value: Any) -> tuple[float, ...]:
    """A stored number for each of three channels; raises `ValueError`."""
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(type(part) is float for part in value):
        raise ValueError("it must be three numbers")
    return tuple(value)


def wrapper(value: Any) -> dict:
    """A stored description of a network's wrapper (models/wrappers.py); raises `ValueError`."""
    if not isinstance(value, Mapping):
        raise ValueError("it must describe a wrapper")
    return dict(value)


# A row.


class Setting(NamedTuple):
    """A value of a run's configuration and, where its names have dashes, its flag.

    The last of `names` is its argument: the key in `config.json` and, for a method's, in the constructor.
    """

    names: tuple[str, ...]
    type: Callable[[Any], Any]  # reads the text of a flag, or what a file holds; bool for a switch
    default: Any  # None: it may be absent; or `FILLED_IN`
    help: str
    choices: Collection[str] | None = None
    is_weight: bool = False  # a weight of 0 may be given to methods that have no such term
    #: A number of epochs that belongs to a run of this many ("recipe": of the recipe's), and scales with --epochs.
    full_run: Any = None
    group: str = ""  # the heading in --help
    metavar: str | None = None
    resume: str = "fixed"  # "free": a resumed run may change it
    #: What a difference makes: another "row" of a table, another "run" of the same row, or "none", the same run.
    tells_apart: str = "row"
    shared: bool = False  # runs of one process have it in common
    auto: Callable[[Any], Any] | None = None  # device -> the value under --fast auto
    is_path: bool = False  # stored absolute: a run may be resumed from another folder
    decides_outputs: bool = False  # of the teacher for the images of an epoch: a cache of them is checked by it
    needs_labels: bool = False  # another value than the default has no effect, or no meaning, without labels
    #: (setting, its values): given with another one it would have no effect.
    works_with: tuple[str, tuple[str, ...]] | None = None
    called: tuple[str, ...] = ()  # what other toolboxes call it; suggested to who gives that
    instead_of: str = ""  # a digest: where it is known the setting of this name, a path, tells nothing apart

    @property
    def argument(self) -> str:
        return self.names[-1].lstrip("-")

    @property
    def is_flag(self) -> bool:
        return self.names[0].startswith("-")

    def written(self, value: Any) -> str:
        """The flag with a value, as a command line has it; nothing for None and for a switch that is off by default."""
        if value is None or (self.type is bool and not value and not self.default):
            return ""
        if self.type is bool:
            return self.names[0] if value else f"--no-{self.argument}"
        return f"{self.names[0]} {as_text(value)}"

    def works(self, values: Mapping[str, Any]) -> bool:
        """Whether it may have an effect with these values of other settings, by `works_with`."""
        if self.works_with is None:
            return True
        other, with_these = self.works_with
        return values.get(other, FILLED_IN) in (*with_these, FILLED_IN)

    def read(self, value: Any) -> Any:
        """A stored value, of JSON or a checkpoint, as its flag would have been read; raises `ValueError`."""
        if value is None and self.default is None:
            return None
        try:
            read = _read(self.type, value) if self.is_flag else self.type(value)
        except (ArgumentTypeError, TypeError, OverflowError, ValueError) as error:
            raise ValueError(f"{self.names[-1]} cannot be {str(value)[:100]!r} ({error})") from None
        if self.choices is not None and read not in self.choices:
            legal = ", ".join(str(choice) for choice in self.choices)
            raise ValueError(f"{self.names[-1]} must be one of {legal}, not {str(value)[:100]!r}")
        return read


def _read(kind: Callable[[str], Any], value: Any) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError("it must be true or false")
        return value
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in values):
        raise ValueError("it is of another kind")
    text = ",".join(map(str, values))
    if "\0" in text:
        raise ValueError("it holds a zero byte")
    return kind(text)


def as_text(value: Any) -> str:
    """A value as a command line has it: 2 and 30000 where Python writes 2.0 and 30000.0, lists with commas."""
    parts = value if isinstance(value, list | tuple) else (value,)
    return ",".join(f"{part:.15g}" if isinstance(part, float) else str(part) for part in parts)
