"""scripts/list_networks.py: rows that say what works, and a page that is made row by row."""

import pytest

from scripts import list_networks

NAME = "timm:test_resnet"


@pytest.fixture
def tried(monkeypatch) -> list[str]:
    """The networks that were tried, of two families in place of all of them."""
    names: list[str] = []

    def pretend(family, name):
        names.append(name)
        return family, f"`{name}`", "64", *["yes"] * 4, "plain", "a | b"

    two = {"timm": {"resnet": [NAME], "convnext": ["timm:test_convnext"]}}
    monkeypatch.setattr(list_networks, "row", pretend)
    monkeypatch.setattr(list_networks, "families", lambda library: two.get(library, {}))
    monkeypatch.setattr(list_networks, "smallest", lambda library, members: members[0])
    return names


def test_a_page_is_resumed_row_by_row_and_a_named_row_is_tried_again(tried, tmp_path):
    page = tmp_path / "page.md"
    list_networks.main(["--out", str(page), NAME])
    list_networks.main(["--out", str(page)])
    assert tried == [NAME, "timm:test_convnext"]
    whole = page.read_text(encoding="utf-8")
    assert whole.startswith("# ") and whole.index("test_convnext") < whole.index("test_resnet")
    assert "| a / b |" in whole and whole.count("| family |") == 1
    list_networks.main(["--out", str(page), NAME])
    assert tried[2:] == [NAME] and page.read_text(encoding="utf-8") == whole


def test_a_row_says_what_is_shipped_or_why_not():
    assert list_networks.row("timm resnet", NAME)[2:] == ("64", "yes", "yes", "yes", "yes", "plain", "")
    *cells, remark = list_networks.row("timm hrnet", "torchvision:squeezenet1_1")
    assert cells[2:] == ["-", "no", "no", "no", "no", "-"] and "no linear classifier" in remark
