"""How a network of another library is looked at: without values where that is possible."""

import pytest
import torch
from torch import nn

from errors import UserError
from models import build_model, published, timm_split
from models.split import PROBE_SIZES, probe


class AsksForValues(nn.Module):
    """A network that cannot be run without values; only images of `size` are read, all where it is None."""

    def __init__(self, size=None):
        super().__init__()
        self.scale, self.size = nn.Parameter(torch.ones(())), size

    def forward(self, images):
        assert self.size in (None, images.shape[-1]), f"the size must be {self.size}"
        return images * self.scale.item()


@pytest.mark.parametrize(("own", "expected"), [(None, min(PROBE_SIZES)), (80, 80)])
def test_a_network_that_asks_for_values_is_run_with_its_own(own, expected):
    network = AsksForValues(own).train()
    assert probe("x", network, lambda blank, image: blank(image), (own,)) == expected and network.training


def test_the_reason_of_a_refusal_is_the_networks_own():
    with pytest.raises(UserError, match="the size must be 40") as caught:
        probe("x", AsksForValues(40), lambda blank, image: blank(image))
    assert "meta" not in str(caught.value)


@pytest.mark.parametrize(("classes", "dataset"), [(0, None), (1000, "imagenet")])
def test_published_encoders_without_a_classifier_are_read(monkeypatch, classes, dataset):
    pytest.importorskip("timm")
    monkeypatch.setattr(published, "build_pretrained", lambda name: build_model(name, classes))
    network, record = published.read_timm("test_resnet")
    assert network.num_classes == classes and record["dataset"] == dataset


def test_weights_of_a_hub_are_read_where_they_are_kept_and_a_hub_that_is_away_is_asked_once(tmp_path, monkeypatch):
    """The hub's own library would try six times for each name of a file."""
    timm, hub = pytest.importorskip("timm"), pytest.importorskip("huggingface_hub")
    asked, kept = [], {}

    def is_away(url, timeout):
        asked.append((url, timeout))
        raise OSError("no route to it")

    monkeypatch.setattr(hub, "get_hf_file_metadata", is_away)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file, revision: kept.get((name, file)))
    with pytest.raises(UserError, match=r"cannot be downloaded \(no route to it\); give a file .* timm:resnet10t"):
        timm_split.build_pretrained("resnet10t.c3_in1k")
    assert len(asked) == 1 and asked[0][0].endswith("timm/resnet10t.c3_in1k/resolve/main/model.safetensors")
    network = timm.create_model("resnet10t")
    torch.save(network.state_dict(), tmp_path / "kept.bin")
    kept["timm/resnet10t.c3_in1k", "pytorch_model.bin"] = str(tmp_path / "kept.bin")
    built = timm_split.build_pretrained("resnet10t.c3_in1k")
    assert torch.equal(built.fc.weight, network.fc.weight) and len(asked) == 1
