"""Exported files and their records, damaged: used, or refused in one line."""

import math
import random

import pytest
import torch

from errors import UserError
from models import build_model
from models.checkpoints import load_exported
from models.record import ENTRIES, check_record

RECORD = {
    "model_name": "resnet8",
    "num_classes": 3,
    "classes": ["a", "b", "c"],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "image_size": 32,
    "margin": 4,
    "background": [255, 255, 255],
    "dataset": "cifar10",
    "data": None,
    "accuracy": 93.5,
}
ODD = [
    None,
    True,
    0,
    -1,
    1,
    2**40,
    2**70,
    0.5,
    math.nan,
    math.inf,
    "",
    "x\0y",
    "resnet8",
    "no such model",
    "timm:x",
    [],
    {},
]
ODD += [
    (),
    ["a"],
    ["a", 1, "c"],
    [0.5, 0.5],
    [0, 0, 0],
    [math.nan] * 3,
    ["0.2"] * 3,
    {"kind": "final_conv"},
    torch.ones(3),
]
ODD += [{"kind": "final_conv", "channels": 2**40}, {"kind": ["x"]}, {"kind": "reused_classifier", "channels": 2**40}]
ODD += [{"kind": "reused_classifier", "channels": 64, "size": 8, "factor": factor} for factor in (0, 2, 10**6)]


@pytest.fixture(scope="module")
def exported() -> dict:
    return {"model": build_model("resnet8", 3).state_dict(), "wrapper": None, "final_conv": False, **RECORD}


def test_a_sound_record_stays_as_it_is(exported):
    assert check_record(RECORD, "file") == RECORD
    assert check_record({"own": [1], "accuracy": None}, "file") == {"own": [1], "accuracy": None}
    _, record = load_exported(exported, "file")
    assert record == {key: value for key, value in exported.items() if key != "model"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"std": [0.2, 0.0, 0.2]}, "its std is not three numbers above 0"),
        ({"mean": [math.nan] * 3}, "its mean is not three finite numbers"),
        ({"image_size": True}, "its image_size is not pixels"),
        ({"split": 1.0}, "its split is not a share"),
        ({"classes": ["a", 1, "c"]}, "its classes is not a list of names"),
        ({"classes": ["a", "b"]}, "it names 2 classes of 3"),
        ({"accuracy": 930.0}, "its accuracy is not a percentage"),
        ({"teacher": "resnet20"}, "its teacher is not a name, a digest"),
        ({"teacher": {"name": "resnet20", "digest": "0", "accuracy": "high"}}, "its teacher is not a name, a digest"),
        ({"identity": 3}, "its identity is not what is known of its data"),
        ({"holdout": "none"}, "its holdout is not a whole number"),
        ({3: 4}, "no dictionary"),
        ({"num_classes": 999_999}, "its weights are of another size"),
        ({"wrapper": {"kind": "final_conv", "channels": 2**40}}, "its weights are of another size"),
        ({"wrapper": "final_conv"}, "its weights are of another size"),
    ],
)
def test_an_entry_out_of_its_range_is_named(exported, entry, message):
    with pytest.raises(UserError, match=f"file is damaged: .*{message}"):
        load_exported(exported | {"classes": None} | entry if "num_classes" in entry else exported | entry, "file")


def test_no_damaged_export_is_a_traceback(exported):
    draw, used = random.Random(0), 0
    names = [*ENTRIES, "wrapper", "final_conv", "model"]
    for _ in range(300):
        damaged = dict(exported)
        for name in draw.sample(names, draw.randrange(1, 3)):
            if draw.random() < 0.2:
                damaged.pop(name, None)
            else:
                damaged[name] = draw.choice(ODD)
        try:
            network, record = load_exported(damaged, "file")
            used += 1
        except UserError as error:
            assert str(error).startswith("file") or "model" in str(error)
            continue
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3) and record["num_classes"] == 3
    assert used > 10
