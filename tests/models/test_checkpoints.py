"""Weights in files: their digest, their number of classes."""

import torch
from torch import nn

from models import build_model, model_dict
from models.checkpoints import build_with, weights_digest


def test_the_classes_of_a_classifier_without_a_bias_are_counted(monkeypatch):
    def build(num_classes):
        network = build_model("resnet8", num_classes)
        network.fc = nn.Linear(64, num_classes, bias=False)
        return network

    monkeypatch.setitem(model_dict, "own", build)
    network, notes = build_with("own", build(7).state_dict(), "a file")
    assert network.num_classes == 7 and not notes


def test_a_digest_tells_weights_apart_by_key_kind_shape_and_value():
    weights = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(3),
        "empty": torch.zeros(0),
        "c": torch.ones(2, 2).T,
    }
    digest = weights_digest(weights)
    assert len(digest) == 16 and int(digest, 16)
    assert weights_digest(dict(reversed(weights.items()))) == digest, "the order of the keys is no part of it"
    others = (
        {"a2": weights["a"]},
        {"a": weights["a"].double()},
        {"a": weights["a"].reshape(3, 2)},
        {"a": weights["a"] + 1e-6},
        {"a": torch.arange(6.0).reshape(3, 2).T},
        {"b": torch.tensor(3, dtype=torch.int32)},
    )
    digests = {weights_digest(weights | other) for other in others}
    assert len(digests) == len(others) and digest not in digests


def test_the_digest_of_a_network_reads_values_and_not_their_layout():
    weights = build_model("resnet8x4", 10).state_dict()
    channels_last = {
        key: value.to(memory_format=torch.channels_last) if value.dim() == 4 else value
        for key, value in weights.items()
    }
    assert weights_digest(weights) == weights_digest(channels_last)
    halves = {
        "x": torch.ones(3, dtype=torch.bfloat16),
        "z": torch.ones(2, dtype=torch.complex64),
        "n": torch.ones(1) > 0,
    }
    assert weights_digest(halves)
