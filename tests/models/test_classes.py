"""The order of classes, by name."""

import pytest

from models.classes import compare_classes, matched_by_position

CIFAR = ["airplane", "automobile", "bird", "cat"]
NUMBERS = [str(number) for number in range(12)]

AGREE = {
    "the same": (CIFAR, CIFAR),
    "other spelling": (["great white shark", "Tiger-Shark"], ["great_white_shark", "tiger_shark"]),
    "nothing told": (None, CIFAR),
    "names of another kind": (["tench", "goldfish"], ["n01440764", "n01443537"]),
    "numbers that name nothing": (CIFAR, ["0", "1", "2", "3"]),
    "numbers with zeros": (NUMBERS, [f"{number:02d}" for number in range(12)]),
    "a part, in place": ([*CIFAR, "deer"], CIFAR),
    "a name in two spellings": (["Cardigan", "dog", "cardigan"], ["Cardigan", "dog", "cardigan"]),
}
DIFFER = {
    "another order": (
        ["bird", "cat", "airplane", "automobile"],
        CIFAR,
        "the weights have another place for 4 of 4 classes: class 0 is airplane in the data and bird in the weights",
    ),
    "two exchanged": (CIFAR, ["airplane", "bird", "automobile", "cat"], "2 of 4 classes"),
    "a part": (CIFAR, CIFAR[1:], "3 of 3 classes"),
    "one more": (CIFAR, ["airplane", "apple", "automobile", "bird", "cat"], "3 of 5 classes"),
    "behind the last": (["b", "a"], ["c", "d", "a", "b"], "class 2 is a in the data and none in the weights"),
    "one unknown": (
        CIFAR,
        ["airplane", "automobile", "bird", "dog"],
        "do not know 1 of the data's 4 classes, first dog",
    ),
    "one name for two": (["Cardigan", "dog", "cardigan"], ["dog", "Cardigan", "cardigan"], "2 of 3 classes"),
    "numbers as text": (
        NUMBERS,
        sorted(NUMBERS),
        "numbers in the order of text (0, 1, 10, 11, ...): name them with leading",
    ),
    "numbers as text for names": (
        [f"c{k}" for k in range(12)],
        sorted(NUMBERS),
        "class 2 of the weights is c2, of the data 10",
    ),
}


@pytest.mark.parametrize("kind", AGREE)
def test_classes_that_agree_are_no_matter(kind):
    assert compare_classes(*AGREE[kind]) is None


@pytest.mark.parametrize("kind", DIFFER)
def test_classes_in_another_order_are_named(kind):
    categories, classes, message = DIFFER[kind]
    found = compare_classes(categories, classes)
    assert message in found and "\n" not in found


def test_names_that_say_nothing_of_each_other_are_said():
    said = matched_by_position(["cat", "dog"], ["bus", "car"])
    assert (
        said == "0 of the data's 2 class names are the weights': classes match by position (cat for bus, dog for car)"
    )
    for categories in (None, [], ["0", "1"], ["Bus", "dog"], ["car", "bus"]):
        assert not matched_by_position(categories, ["bus", "car"])
    assert not matched_by_position(["cat", "dog"], ["0", "1"])
