"""What a file says of its network, checked: anybody may have written it, so nothing is taken as it is."""

import math
from collections.abc import Callable, Mapping

from errors import UserError, count_of

#: More classes, and more pixels on a side, are a damaged number.
MOST_CLASSES, LARGEST_IMAGE = 1_000_000, 10_000


def _is_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_number(value: object, low: float, high: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _is_count(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _are_classes(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) <= MOST_CLASSES and all(map(_is_text, value))


def _are_three(value: object, low: float) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(_is_number(part, low, 1e3) for part in value)


def _is_teacher(value: object) -> bool:
    if not isinstance(value, Mapping) or not all(_is_text(value.get(name)) for name in ("name", "digest")):
        return False
    return value.get("accuracy") is None or _is_number(value["accuracy"], 0, 100)


def _is_colour(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(_is_count(part, 0, 255) for part in value)


#: An entry's name -> (whether a value can be one, what it is). Entries that are none or missing say nothing.
ENTRIES: dict[str, tuple[Callable[[object], bool], str]] = {
    "classes": (_are_classes, "a list of names"),
    "mean": (lambda value: _are_three(value, -1e3), "three finite numbers"),
    "std": (lambda value: _are_three(value, 1e-6), "three numbers above 0"),
    **dict.fromkeys(
        ("image_size", "source_size"),
        (lambda value: _is_count(value, 8, LARGEST_IMAGE), f"pixels, 8 to {LARGEST_IMAGE}"),
    ),
    "margin": (lambda value: _is_count(value, -LARGEST_IMAGE, LARGEST_IMAGE), f"pixels, up to {LARGEST_IMAGE}"),
    "background": (_is_colour, "three whole numbers from 0 to 255"),
    # 0: a network without a classifier, trained without labels.
    "num_classes": (lambda value: _is_count(value, 0, MOST_CLASSES), f"a number of classes, 0 to {MOST_CLASSES}"),
    "split": (lambda value: _is_number(value, 0, 1) and value != 1, "a share, 0 to below 1"),
    "accuracy": (lambda value: _is_number(value, 0, 100), "a percentage"),
    "teacher": (_is_teacher, "a name, a digest and a percentage"),
    "identity": (lambda value: isinstance(value, Mapping), "what is known of its data"),
    **dict.fromkeys(
        ("holdout", "epoch", "max_steps"), (lambda value: _is_count(value, 0, 2**40), "a whole number, 0 or more")
    ),
    **dict.fromkeys(("dataset", "data", "model_name", "distill", "digest"), (_is_text, "text")),
}


def check_record(record: object, source: str) -> dict:
    """The record as a dictionary whose known entries are of their kinds and in their ranges; other entries stay.

    Raises `UserError`, naming `source` and the entry.
    """
    if not isinstance(record, Mapping) or not all(isinstance(name, str) for name in record):
        raise UserError(f"{source} is damaged: what it says of its network is no dictionary")
    for name, (is_one, what) in ENTRIES.items():
        value = record.get(name)
        if value is not None and not is_one(value):
            raise UserError(f"{source} is damaged: its {name} is not {what}")
    classes, number = record.get("classes"), record.get("num_classes")
    if classes is not None and number is not None and len(classes) != number:
        raise UserError(f"{source} is damaged: it names {count_of(len(classes), 'class')} of {number}")
    return dict(record)
