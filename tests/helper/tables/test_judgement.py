"""The page of judged networks."""

import pytest
import torch

from helper.judging import Judged
from helper.metrics import judge
from helper.tables.judgement import Judgement, as_html
from tests.browser import check_page, needs_chromium


def judgement(name: str, classes: list[str]) -> Judgement:
    """A network that was judged on random logits."""
    targets = torch.randint(0, len(classes), (200,), generator=torch.Generator().manual_seed(0))
    about = judge(torch.randn(200, len(classes)), targets) | {"network": name, "model": "resnet8", "digest": "0" * 16}
    about |= {"dataset": "folder", "image_size": 32, "test_images": 200, "test_unreadable": 0, "classes": classes}
    return Judgement(about, Judged(name, "resnet8", {}, lambda images: images), {})


def test_the_page_of_several_networks_begins_with_their_comparison():
    found = [judgement(name, list("abcdefg")) for name in ("first", "second")]
    text = as_html(found)
    table, _, rest = text.partition("</table>")
    for number, one in enumerate(found, 1):
        assert f'<a href="#network{number}">{one.about["network"]}</a></td><td>{one.about["accuracy"]:.2f} %' in table
        assert f'<section id="network{number}">' in rest
    assert "compared" not in as_html(found[:1]).partition("</style>")[2]


def test_a_long_class_name_leaves_room_for_the_confusion_matrix():
    long = "a very long name of a class & <more>"
    text = as_html([judgement("one", [long, "b"])])
    matrix = text.partition('<table class="matrix">')[2].partition("</table>")[0]
    whole = "a very long name of a class &amp; &lt;more&gt;"
    assert f'<th title="{whole}">a very long name of a...</th>' in matrix
    assert f'<th class="text" title="{whole}">a very long name of a...</th>' in matrix and f">{whole}<" not in matrix
    assert f'<td class="text">{whole}</td>' in text, "the tables have it whole"


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_whole_width(tmp_path, width):
    names = ("save/a_run_of_a_long_name_", "save/another_", "/data/of/a/project/")
    classes = [f"class of several words {number}" for number in range(20)]
    check_page(as_html([judgement(4 * name, classes) for name in names]), tmp_path, width)
