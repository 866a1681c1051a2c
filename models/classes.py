"""Whether the classes of weights and of data are in one order: by their names, where both tell them."""

from collections.abc import Sequence

from errors import count_of


def compare_classes(categories: Sequence[str] | None, classes: Sequence[str]) -> str | None:
    """One sentence where class k of the weights (`categories`, None where they tell none) is another than class k of
    the data (`classes`); None where they agree, or where the names are of two kinds and say nothing.

    Folders named by numbers are in the order of text, 0, 1, 10, 2; that is said where it can shift the classes.
    """
    as_text = _is_numeric(classes) and list(classes) == sorted(classes) != sorted(classes, key=int)
    hint = (
        f"; the data's folders are numbers in the order of text ({', '.join(classes[:4])}, ...): name them with "
        "leading zeros"
        if as_text
        else ""
    )
    if not categories:
        return None
    theirs, ours = _plain(categories), _plain(classes)
    if _is_numeric(classes) and not _is_numeric(categories):
        number = next((number for number, name in enumerate(classes) if int(name) != number), None)
        if not as_text or number is None or number >= len(categories):
            return None
        return f"class {number} of the weights is {categories[number]}, of the data {classes[number]}{hint}"
    known = set(theirs)
    shared = [number for number, name in enumerate(ours) if name in known]
    if 2 * len(shared) < len(ours):
        return None  # names of another kind, wordnet numbers and words say
    # Two classes may have one name without its spelling, as the cardigan and the Cardigan of ImageNet have.
    moved = [number for number in shared if theirs[number : number + 1] != [ours[number]]]
    if moved:
        first = moved[0]
        other = categories[first] if first < len(categories) else "none"
        return (
            f"the weights have another place for {len(moved)} of {count_of(len(ours), 'class')}: class {first} is "
            f"{classes[first]} in the data and {other} in the weights{hint}"
        )
    if len(shared) < len(ours):
        first = next(number for number, name in enumerate(ours) if name not in known)
        missing = len(ours) - len(shared)
        return f"the weights do not know {missing} of the data's {count_of(len(ours), 'class')}, first {classes[first]}"
    return None


def matched_by_position(categories: Sequence[str] | None, classes: Sequence[str]) -> str:
    """One sentence where the names of the weights' classes and of the data's say nothing of each other, so that only
    their positions match; empty where they do, or where one of them tells no names."""
    if not categories or _is_numeric(categories) or _is_numeric(classes):
        return ""
    shared = len(set(_plain(categories)) & set(_plain(classes)))
    if 2 * shared >= len(classes):
        return ""
    pairs = ", ".join(f"{one} for {other}" for one, other in list(zip(categories, classes, strict=False))[:3])
    more = ", ..." if len(classes) > 3 else ""
    return (
        f"{shared} of the data's {count_of(len(classes), 'class name')} are the weights': classes match by position "
        f"({pairs}{more})"
    )


def _plain(names: Sequence[str]) -> list[str]:
    """Names without the differences of spelling that say nothing."""
    numbers = _is_numeric(names)
    return [
        str(int(name)) if numbers else " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
        for name in names
    ]


def _is_numeric(names: Sequence[str]) -> bool:
    return all(name.isascii() and name.isdigit() and len(name) < 19 for name in names)
