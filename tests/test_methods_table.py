"""docs/methods.md says of every method what its file says, and of ImageNet what the recipes say."""

from pathlib import Path

import pytest

from distiller_zoo import DISTILLERS
from helper.recipes import IMAGENET_PAIRS
from tests.golden_table import TABLE_3, imagenet_row

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "methods.md").read_text()


@pytest.mark.parametrize("name", DISTILLERS)
def test_a_methods_row_is_what_its_file_says(name):
    (row,) = [line for line in PAGE.split("## Table 3")[0].splitlines() if line.startswith(f"| `{name}` |")]
    _, _, reference, *_, departures, _ = (cell.strip() for cell in row.split("|"))
    assert reference == (DISTILLERS[name].reference or "-")
    assert departures == (DISTILLERS[name].departures or "nothing")


@pytest.mark.parametrize("pair", IMAGENET_PAIRS[:2], ids="->".join)
def test_table_3_is_what_the_recipes_say(pair):
    _, part = PAGE.split(f"### {' -> '.join(pair)}\n")
    for name in TABLE_3:
        assert f"| {' | '.join(imagenet_row(name, *pair))} |" in part.split("###")[0], name
