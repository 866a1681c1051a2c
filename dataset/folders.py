"""Folders of images: which files belong to which class of which split, in the layouts that data sets come in."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dataset.decoding import endings
from errors import UserError, count_of

#: What the folders of the splits may be called, in any case; of those of the test images the first is taken.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "valid", "validation", "test", "testing")
#: Folders that systems make: no classes, like names with a dot in front.
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
TABLES = (".csv", ".tsv", ".xls", ".xlsx", ".parquet")
#: Tiny ImageNet's test images: all in one folder, with a table of their classes.
ANNOTATIONS, IMAGES = "val_annotations.txt", "images"
#: How many names a message has.
NAMED = 5


class Listing(NamedTuple):
    """The images of a split: paths below `root` and their classes' numbers, in order."""

    root: str
    names: list[str]
    targets: list[int]


class Folder(NamedTuple):
    """The splits of a folder and its classes; `test` is None where it has none."""

    train: Listing
    test: Listing | None
    classes: list[str]


def printable(name: str) -> str:
    """A file's name for messages and records: bytes that are no UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_image_folder(path: str) -> bool:
    """Whether a path is a folder that `list_folder` may read: class folders with images, in train/ or themselves."""
    path = os.path.expanduser(path)
    places = [place for place in (train_folder(path), path) if place is not None]
    return any(_holds_image(folder) for place in places for folder in _class_folders(place).values())


def train_folder(path: str) -> str | None:
    """The folder of the training images in a folder of images; None where it has none."""
    return _find_splits(path)[0]


def _find_splits(path: str) -> tuple[str | None, list[str]]:
    """The folders of the training images and of the test images, with the exact names before others."""
    by_name: dict[str, str] = {}
    for name, folder in sorted(_class_folders(path).items(), key=lambda one: one[0].islower()):
        by_name[name.lower()] = folder
    train, test = ([by_name[name] for name in names if name in by_name] for names in (TRAIN_NAMES, TEST_NAMES))
    return next(iter(train), None), test


def has_image_folders(path: str) -> bool:
    """Whether folders in a path hold images themselves, not only further below."""
    return any(is_image(entry.name) for folder in _class_folders(path).values() for entry in _entries(folder))


def _holds_image(folder: str) -> bool:
    return any(is_image(name) for _, _, names in os.walk(folder) for name in names)


def list_images(path: str) -> Listing:
    """All images below a folder, at any depth, without classes (their targets are 0); raises `UserError`."""
    refuse_other_than_folder(path)
    left_out: list[str] = []
    names = [os.path.relpath(file, path) for file in _walk(path, {os.path.realpath(path)}, left_out)]
    if left_out:
        print(describe_left_out(left_out, path))
    if not names:
        raise UserError(f"--data: there is no image in {printable(path)} or below it")
    return Listing(path, names, [0] * len(names))


def list_folder(path: str, may_split: bool = False) -> Folder:
    """What is in a folder of images; raises `UserError` for layouts that cannot be read, and says what they lack.

    `may_split`: a folder without test images will do, also one with class folders instead of train/.
    """
    root, splits = _find_splits(path)
    if root is None:
        root, splits = _root_without_train(path, splits, may_split), []
    train, train_classes = _list_split(root)
    if len(train_classes) == 1:
        raise UserError(
            f"--data: {printable(root)} has one class folder, {printable(train_classes[0])}, and nothing is to be told "
            "apart; is it a level too deep or too high? Expected train/CLASS/IMAGE with two classes or more"
            f"{_about_tables(root)}"
        )
    _say_what_counts(train, splits)
    test = None
    if splits and may_split and _lacks_classes(splits[0]):
        print(f"left out {printable(splits[0])}: its images have no class folders")
    elif splits:
        test = _list_test(splits[0], train_classes)
    elif not may_split:
        raise UserError(
            f"--data: there is no folder {printable(os.path.join(path, 'val'))} (or test/); take test images out of "
            "the training images with --split 0.2"
        )
    return Folder(train, test, [printable(name) for name in train_classes])


def list_judged(path: str, classes: Sequence[str]) -> Folder | None:
    """A folder that holds test images alone: in val/ or test/, or in class folders of its own; None for one that has
    train/, or has it in a folder within.

    Its classes are those that are given where it has no others, else its own. `train` are the same images. Raises
    `UserError`.
    """
    root, splits = _find_splits(path)
    if root or not os.path.isdir(path) or any(_find_splits(inner)[0] for inner in _class_folders(path).values()):
        return None
    place = splits[0] if splits else path
    if classes and os.path.exists(os.path.join(place, ANNOTATIONS)):
        listing, found = _list_annotated(place, list(classes)), list(classes)
    else:
        listing, own = _list_split(place, allow_empty=True)
        names = [printable(name) for name in own]
        found = list(classes) if set(names) <= set(classes) else names
        numbers = [found.index(name) for name in names]
        listing = listing._replace(targets=[numbers[target] for target in listing.targets])
        _warn_of_missing(place, found, listing.targets)
    print(f"{printable(path)} has no train/: the images in {printable(place)} are test images")
    _say_what_counts(listing, splits)
    return Folder(listing, listing, found)


def refuse_other_than_folder(path: str) -> None:
    """Raise `UserError` where there is no folder at a path, also for an archive of one."""
    if os.path.isdir(path):
        return
    if not os.path.exists(path):
        raise UserError(f"--data: there is no folder {printable(path)}")
    hint = "unpack it, and name" if path.lower().endswith(ARCHIVES) else "name"
    raise UserError(f"--data: {printable(path)} is a file; {hint} the folder that holds train/ and val/ (or test/)")


def _root_without_train(path: str, test: list[str], may_split: bool) -> str:
    """The folder of the training images where none is called so: the path itself; raises `UserError`."""
    refuse_other_than_folder(path)
    refuse_without_classes(path)
    folders = _class_folders(path)
    inner = next(((folder, train) for folder in folders.values() if (train := train_folder(folder))), None)
    if inner:
        folder, train = map(printable, inner)
        hint = "name that one" if _class_folders(inner[1]) else f"sort {train} into train/{os.path.basename(folder)}"
        raise UserError(f"--data: {printable(path)} has no train/, but {folder} has; {hint}")
    if test or not folders:
        raise UserError(
            f"--data: there is no folder {printable(os.path.join(path, 'train'))}; expected train/ and val/ (or "
            "test/), with a sub-folder per class"
        )
    if not may_split and len(folders) > 1:
        outside, name = os.path.split(path)
        is_split = name.lower() in TRAIN_NAMES and _find_splits(outside)[1]
        instead = f"name {printable(outside)}, which has both, or split" if is_split else "split"
        raise UserError(
            f"--data: {printable(path)} has class folders, but neither train/ nor val/; {instead} it with --split 0.2"
        )
    return path


def refuse_without_classes(path: str) -> None:
    """Raise `UserError` for a folder with images, but without class folders."""
    if _lacks_classes(path):
        raise UserError(
            f"--data: {printable(path)} holds images without class folders, so their classes are unknown; sort them "
            f"into {printable(path)}/CLASS/{_about_tables(path)}"
        )


def _about_tables(path: str) -> str:
    """That a table in a folder, or next to it where it is a split's, is not read; it may have the labels. Empty where
    there is none."""
    outside, name = os.path.split(path)
    folders = [path, *([outside] if name.lower() in (*TRAIN_NAMES, *TEST_NAMES) else [])]
    names = [entry.name for folder in folders for entry in _entries(folder) if entry.name.lower().endswith(TABLES)]
    return f" ({printable(names[0])} is not read; docs/data.md says how to sort images by a table)" if names else ""


def _say_what_counts(train: Listing, test: list[str]) -> None:
    """Print what of a folder's structure might have been meant otherwise."""
    inner = list(dict.fromkeys(place for name in train.names if (place := os.path.dirname(name)).count(os.sep)))
    if inner:
        print(f"images in sub-folders are of the class of the class folder: {_some(inner)}")
    if test[1:]:
        print(f"left out {', '.join(map(printable, test[1:]))}: the test images are those in {printable(test[0])}")


def _lacks_classes(path: str) -> bool:
    return not _class_folders(path) and any(is_image(entry.name) for entry in _entries(path))


def _list_test(path: str, classes: list[str]) -> Listing:
    """The test images, numbered by the classes of the training images."""
    if os.path.exists(os.path.join(path, ANNOTATIONS)):
        return _list_annotated(path, classes)
    if _lacks_classes(path):
        raise UserError(
            f"--data: {printable(path)} holds images without class folders, so their classes are unknown; sort them "
            f"into {printable(path)}/CLASS/, or take test images out of the training images with --split 0.2"
        )
    listing, found = _list_split(path, allow_empty=True)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise UserError(
            f"--data: {printable(path)} has classes that train/ has not: {_some(unknown)}; both need the same ones"
        )
    numbers = [classes.index(name) for name in found]
    listing = listing._replace(targets=[numbers[target] for target in listing.targets])
    _warn_of_missing(path, classes, listing.targets)
    return listing


def _list_annotated(path: str, classes: list[str]) -> Listing:
    """Test images in images/ and a table with lines of file name, class and more, separated by tabs."""
    table, names, targets = os.path.join(path, ANNOTATIONS), [], []
    numbers = {name: number for number, name in enumerate(classes)}
    try:
        with open(table, encoding="utf-8", errors="surrogateescape") as file:
            rows = [line.rstrip("\n").split("\t") for line in file if line.strip()]
    except OSError as error:
        raise UserError(f"--data: {printable(table)} cannot be read: {error.strerror}") from None
    for row in rows:
        if len(row) < 2 or row[1] not in numbers:
            raise UserError(
                f"--data: {printable(table)} has a line without a class of train/: {printable(row[0])[:80]}"
            )
        names.append(os.path.join(IMAGES, os.path.basename(row[0])))
        targets.append(numbers[row[1]])
    if not names:
        raise UserError(f"--data: {printable(table)} names no images")
    _warn_of_missing(path, classes, targets)
    return Listing(path, names, targets)


def _warn_of_missing(path: str, classes: list[str], targets: list[int]) -> None:
    found = set(targets)
    missing = [name for number, name in enumerate(classes) if number not in found]
    if missing:
        print(f"warning: {printable(path)} has no images of {count_of(len(missing), 'class')}: {_some(missing)}")


def _list_split(path: str, allow_empty: bool = False) -> tuple[Listing, list[str]]:
    """The images below each class folder -> (listing, class folders' names in alphabetical order)."""
    refuse_without_classes(path)
    folders = _class_folders(path)
    if not folders:
        raise UserError(f"--data: {printable(path)} has no images: it has no class folders")
    listing, left_out, seen = Listing(path, [], []), [], {os.path.realpath(folder) for folder in folders.values()}
    if len(seen) < len(folders):
        raise UserError(f"--data: two class folders of {printable(path)} are links to one folder; remove one of them")
    empty = []
    for number, (name, folder) in enumerate(folders.items()):
        before = len(listing.names)
        for file in _walk(folder, seen, left_out):
            listing.names.append(os.path.relpath(file, path))
            listing.targets.append(number)
        if len(listing.names) == before:
            empty.append(name)
    if left_out:
        print(describe_left_out(left_out, path))
    if len(empty) == len(folders) or (empty and not allow_empty):
        raise UserError(f"--data: {printable(path)} has no images, or classes without any: {_some(empty)}")
    return listing, list(folders)


def _walk(folder: str, seen: set[str], left_out: list[str]) -> Iterator[str]:
    """The images below a folder in alphabetical order; no folder is entered twice, through whatever links."""
    shown = sorted((entry for entry in _entries(folder) if not is_hidden(entry.name)), key=lambda one: one.name)
    inside = [entry.path for entry in shown if entry.is_dir()]
    for entry in shown:
        if entry.is_dir():
            continue
        if is_image(entry.name):
            yield entry.path
        else:
            left_out.append(entry.name)
    for path in inside:
        place = os.path.realpath(path)
        if place in seen:
            print(f"left out {printable(path)}: a link to a folder that is read already")
            continue
        seen.add(place)
        yield from _walk(path, seen, left_out)


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"--data: {printable(folder)} cannot be read: {error.strerror}") from None


def _class_folders(path: str) -> dict[str, str]:
    """Paths of the sub-folders by name, in alphabetical order, without hidden ones."""
    if not os.path.isdir(path):
        return {}
    found = {entry.name: entry.path for entry in _entries(path) if entry.is_dir() and not is_hidden(entry.name)}
    return dict(sorted(found.items()))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is passed over by its name."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def is_image(name: str) -> bool:
    """Whether a file is read as an image, by its name; hidden ones are not."""
    return not is_hidden(name) and os.path.splitext(name)[1].lower() in endings()


def describe_left_out(names: list[str], folder: str) -> str:
    """A line on the files below a folder that are not read."""
    return f"left out {count_of(len(names), 'file')} below {printable(folder)}, by name no images: {_some(names)}"


def _some(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:NAMED])
    return re.sub(r"\s+", " ", shown) + (", ..." if len(names) > NAMED else "")
