"""Rows on one HTML page."""

import html.parser
import re

import pytest

from helper.tables import pages
from helper.tables.figures import MARKERS
from helper.tables.pages import MARKS
from tests.browser import check_page, needs_chromium
from tests.run_folders import make_run, rows_of

PAIR = {"teacher": "resnet32x4", "model_s": "resnet8x4", "dataset": "cifar100"}


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_whole_width(runs, tmp_path, width):
    other = make_run(tmp_path / "p", "norm", 1, [70.0, 76.4], **PAIR)
    long = make_run(tmp_path / "l", "kd", 9, [50.0], init="/a/long/" * 20)
    text = pages.as_html(rows_of([*runs, other, long]), {})
    check_page(text.replace("<details>", "<details open>"), tmp_path, width)


class Outline(html.parser.HTMLParser):
    """Checks that what is opened is closed, and counts."""

    VOID = ("meta", "input", "br", "line", "circle", "use", "path", "rect", "image", "stop")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(runs):
    text = pages.as_html(rows_of(runs), {"tsne_x": "<svg id='t'></svg>"})
    counts = Outline(text).counts
    assert counts["tr"] == 1 + 5 and counts["details"] == 5 and counts["table"] == 1
    assert text.count("<figure>") == text.count("<figcaption>") == 4 and "tsne x" in text
    assert not re.search(r"""(?:src|href)=["'](?!#)|url\((?!#)|@import""", text.replace("xlink:href", "href"))
    assert "--distill kd --model_t resnet20 --model_s resnet8" in text and "62.00 ± 1.00" in text
    assert "<b>80.00</b>" in text and "<b>67.00 ± 1.00</b>" in text, "the best of every student"


def test_a_flag_in_the_notes_is_set_as_code_and_nothing_else_is(runs, monkeypatch):
    monkeypatch.setattr(pages, "notes_of", lambda rows: "See `--data_seed` & <b>.")
    assert "See <code>--data_seed</code> &amp; &lt;b&gt;. Best values" in pages.as_html(rows_of(runs), {})


def test_every_curve_has_a_switch(runs, tmp_path):
    other = make_run(tmp_path / "f", "ce", 1, [50.0, 60.0], None, dataset="folder", data="/photographs")
    text = pages.as_html(rows_of([*runs, other]), {})
    for prefix, number in (("s1", 5), ("s2", 1)):
        switches = re.findall(rf'type="checkbox" id="{prefix}-on-(\d+)" checked', text)
        assert list(map(int, switches)) == list(range(number))
        for switch in switches:
            assert text.count(f'id="{prefix}-curve-{switch}"') == 1
            assert f"#{prefix}-on-{switch}:not(:checked)" in text


def test_the_legend_tells_lines_apart_that_have_marks(tmp_path):
    runs = [make_run(tmp_path, "kd", 1, [50.0, 60.0], kd_T=float(number)) for number in range(1, 52)]
    text = pages.as_html(rows_of(runs), {})
    drawn = re.findall(r'checked><svg viewBox="0 0 26 10">(.*?)</svg>', text)
    assert len(drawn) == len(set(drawn)) == 51 and MARKS.keys() == set(MARKERS)
    assert "<p>2 epochs;" in text


def test_names_are_never_markup(tmp_path):
    run = make_run(tmp_path, "ce", 1, [50.0], None, init="<script>alert(1)</script>")
    assert "<script>alert" not in pages.as_html(rows_of([run]), {})


def test_accuracies_on_held_out_images_have_a_column(tmp_path):
    run = make_run(tmp_path, "kd", 1, [50.0, 52.0], holdout=100)
    assert "held out, last" not in pages.as_html(rows_of([run]), {})
    (run / "metrics.jsonl").write_text('{"holdout_accuracy": 61.25}\n')
    text = pages.as_html(rows_of([run]), {})
    assert "<th>held out, last</th>" in text and '<td class="accuracy" data-title="held out, last">61.25</td>' in text
