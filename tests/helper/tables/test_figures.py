"""Figures: what is in one of them, and what none of them shows."""

import html
import re
import warnings

import pytest
import torch

from errors import UserError
from helper.tables import figures, pages
from tests.run_folders import make_run, rows_of


def texts(svg: str) -> list[str]:
    """What is written in a figure."""
    return [html.unescape(text.strip()) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def axes_of(monkeypatch):
    """The axes that figures are painted on, as they are drawn."""
    painted, draw = [], figures.draw

    def note(paint, *arguments, **named):
        def paint_and_note(axes):
            paint(axes)
            painted.append(axes)

        return draw(paint_and_note, *arguments, **named)

    monkeypatch.setattr(figures, "draw", note)
    return painted


def test_a_curve_is_the_mean_and_its_band_has_its_colour(tmp_path, monkeypatch):
    painted = axes_of(monkeypatch)
    runs = [make_run(tmp_path, "ce", 1, [40.0, 50.0], None)]  # one seed: no band
    runs += [make_run(tmp_path, "kd", seed, [50.0, 60.0 + seed]) for seed in (1, 2, 3)]
    figures.learning_curves(rows_of(runs))
    alone, kd = painted[0].lines
    assert list(alone.get_ydata()) == [40.0, 50.0] and list(kd.get_ydata()) == [50.0, 62.0]
    [band] = painted[0].collections
    assert tuple(band.get_facecolor()[0][:3]) == pytest.approx(torch.tensor(_rgb(kd.get_color())).tolist())
    assert painted[0].get_legend() is None, "the legend is not on the curves"
    assert all(float(tick).is_integer() for tick in painted[0].get_xticks()), "there is no half epoch"


def test_a_row_without_a_curve_is_named(tmp_path, capsys):
    runs = [make_run(tmp_path, "kd", 1, [50.0, 60.0])]
    runs += [make_run(tmp_path, "norm", seed, [50.0, 60.0]) for seed in (1, 2)]
    (runs[2] / "metrics.jsonl").unlink()
    assert "norm" not in texts(figures.learning_curves(rows_of(runs)) or "")
    assert capsys.readouterr().err == f"{runs[2]}: no learning curve of its row: metrics.jsonl holds no epochs\n"


def _rgb(colour: str) -> list[float]:
    return [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def test_many_settings_have_styles_of_their_own_and_warn_of_nothing(tmp_path, capsys):
    runs = [make_run(tmp_path, "kd", 1, [50.0, 60.0], kd_T=float(number)) for number in range(1, 39)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = figures.learning_curves(rows_of(runs))
    assert sum("kd" in text for text in texts(svg)) == 38 and capsys.readouterr().err == ""
    for style, count in ((figures.line_style, 240), (figures.point_style, 50)):
        assert len({tuple(style(number).values()) for number in range(count)}) == count


def test_long_titles_and_names_and_many_numbers_leave_room(tmp_path, monkeypatch):
    painted = axes_of(monkeypatch)
    some = outputs(5) | {"classes": ["x" * 80, "\u65e5\u672c", "a", "b", "c"]}  # the font has no such signs
    for draw in (figures.feature_map, figures.correlation_difference):
        written = texts(draw(some, "resnet20 -> resnet8: norm " + "--co_sponge 8 " * 12))
        assert f"{'x' * 21}..." in written and max(map(len, written)) <= 52 and "\u65e5\u672c" in written
    runs = [make_run(tmp_path, "norm", 1, [50.0, 60.0], co_sponge=n) for n in range(1, 16)]
    figures.accuracy_against_n(rows_of(runs))
    assert len(painted[-1].get_xticks()) < 9 and {1, 2, 4, 8} <= set(painted[-1].get_xticks())


def test_accuracy_against_n_joins_only_what_differs_in_n(tmp_path, monkeypatch):
    painted = axes_of(monkeypatch)
    runs = [make_run(tmp_path, "norm", 1, [50.0, 60.0 + n], co_sponge=n) for n in (1, 2, 4)]
    runs += [make_run(tmp_path / "x", "norm", 1, [50.0, 90.0], co_sponge=8, learning_rate=0.2)]
    runs += [make_run(tmp_path / "y", "norm", 1, [50.0, 70.0, 90.0], co_sponge=8)]
    runs += [make_run(tmp_path / "z", "norm", 1, [50.0, 90.0], co_sponge=8, teacher="resnet14")]
    figures.accuracy_against_n(rows_of(runs))
    line, *caps = painted[0].lines
    assert all(8 not in one.get_xdata() for one in (line, *caps))
    assert list(line.get_xdata()) == [1, 2, 4] and list(line.get_ydata()) == [61.0, 62.0, 64.0]
    assert figures.accuracy_against_n(rows_of(runs[2:])) is None


def test_no_tick_is_above_a_hundred_percent(tmp_path, monkeypatch):
    painted = axes_of(monkeypatch)
    runs = [make_run(tmp_path, "norm", 1, [10.0, 98.6], co_sponge=2, model_s="resnet14")]
    rows = rows_of([*runs, *(make_run(tmp_path, "norm", 1, [99.0, 98.6], co_sponge=n) for n in (4, 8))])
    for kind in (figures.learning_curves, figures.accuracy_against_n, figures.accuracy_against_cost):
        assert kind(rows), kind
    assert [max(axes.get_yticks()) for axes in painted] == [100, 100, 100]


def test_data_sets_are_never_in_one_figure(tmp_path):
    runs = [make_run(tmp_path, "norm", 1, [50.0, 60.0], co_sponge=n) for n in (1, 2)]
    assert set(figures.of_rows(rows_of(runs))) == {"learning_curves", "accuracy_against_n"}, "all cost the same"
    runs += [make_run(tmp_path, "ce", 1, [50.0, 60.0], None, model_s="vgg8")]
    assert set(figures.of_rows(rows_of(runs))) == {"learning_curves", "accuracy_against_n", "accuracy_against_cost"}
    data = {"dataset": "folder", "data": "/x/photographs"}
    runs += [make_run(tmp_path / "f", "norm", 1, [50.0, 60.0], co_sponge=n, **data) for n in (4, 8)]
    drawn = figures.of_rows(rows_of(runs))
    assert len(drawn) == 5 and "accuracy_against_n_folder-photographs-32-pixels-best-on-test" in drawn
    assert "-s 4" not in "".join(texts(drawn["learning_curves_digits-32-pixels-best-on-test"]))


def test_figures_are_the_same_every_time_and_take_the_pages_colour(tmp_path):
    rows = rows_of([make_run(tmp_path, "kd", 1, [50.0, 60.0])])
    svg = figures.learning_curves(rows)
    assert svg == figures.learning_curves(rows) and "currentColor" in svg
    assert "prefers-color-scheme:dark" in figures.standalone(svg)


def test_nothing_is_set_as_a_formula(tmp_path):
    run = make_run(tmp_path, "ce", 1, [50.0, 60.0], None, init=r"a$\frac{$b.pth")
    assert any(r"a$\frac{$b.pth" in text for text in texts(figures.learning_curves(rows_of([run]))))


def outputs(classes: int) -> dict:
    targets = torch.arange(classes).repeat(4)
    pooled, logits = torch.randn(len(targets), 6), torch.randn(len(targets), classes)
    names = [f"name{number}" for number in range(classes)]
    return {"targets": targets, "pooled": pooled, "logits": logits, "teacher_logits": logits.clone(), "classes": names}


def test_classes_have_their_names_in_legend_and_axes():
    some = outputs(5)
    assert set(some["classes"]) <= set(texts(figures.feature_map(some, "x")))
    svg = figures.correlation_difference(some, "x")
    assert all(texts(svg).count(name) == 2 for name in some["classes"])
    assert any("mean 0.000, max 0.000" in text for text in texts(svg))
    with pytest.raises(UserError, match="the teacher has 7 classes, the student 5"):
        figures.correlation_difference(some | {"teacher_logits": torch.randn(20, 7)}, "x")
    many = outputs(60)
    assert not {"name1"} & set(texts(figures.feature_map(many, "x")) + texts(figures.correlation_difference(many, "x")))
    with pytest.raises(UserError, match="too few for a t-SNE"):
        figures.feature_map(outputs(2), "x")


@pytest.mark.slow
def test_networks_are_drawn_from_a_run_and_a_bad_one_is_named(distil, tmp_path, capsys):
    order = ("--teacher_classes", "1,0,2,3,4,5,6,7,8,9", "--allow_teacher_gap")
    run = distil("--batch_size", "64", "--max_steps", "2", *order, distill="kd")
    alone = distil("--batch_size", "64", "--max_steps", "1", distill="one", teacher=False)
    gone = make_run(tmp_path / "gone", "kd", 1, [50.0])
    capsys.readouterr()
    drawn = figures.of_networks(rows_of([run, alone, gone]))
    assert set(drawn) == {f"tsne_{run.name}", f"correlation_{run.name}", f"tsne_{alone.name}"}
    assert f"{gone}: no pictures of its network: " in capsys.readouterr().err
    [row] = rows_of([run])
    taught = figures.read_outputs(row)["teacher_logits"]
    row.config["data"] = str(tmp_path / "photographs")
    with pytest.raises(UserError, match=r"RUN: its data are gone: there is no folder \S+photographs$"):
        figures.read_outputs(row)
    row.config["data"] = None
    row.config["teacher_classes"] = None
    assert torch.equal(taught[:, :2], figures.read_outputs(row)["teacher_logits"][:, [1, 0]])


def test_a_network_that_cannot_be_built_is_left_out_of_the_costs(tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path, "ce", 1, [50.0], None, model_s=name) for name in ("vgg8", "resnet14")]
    rows = rows_of([make_run(tmp_path, "kd", 1, [50.0]), *runs])
    build = figures.build_model

    def build_some(name, *rest):
        if name == "vgg8":
            raise UserError("timm is not installed")
        return build(name, *rest)

    monkeypatch.setattr(figures, "build_model", build_some)
    svg = figures.accuracy_against_cost(rows)
    assert not any("vgg8" in text for text in texts(svg)) and any(text.startswith("kd (") for text in texts(svg))
    assert "vgg8: no multiply-adds: timm is not installed" in capsys.readouterr().err


def test_a_student_costs_what_its_images_of_each_size_do(tmp_path):
    """Also one whose weights belong to one size."""
    students = [(name, size) for name in ("resnet8", "timm:mixer_s32_224") for size in (64, 128)]
    runs = [make_run(tmp_path / str(n), "ce", 1, [50.0], None, model_s=s, image_size=n) for s, n in students]
    costs = figures.multiply_adds(rows_of(runs))
    assert sorted(costs) == sorted(students)
    assert all(costs[name, 128] > 3.9 * costs[name, 64] for name, _ in students)
    lines = pages._lines(rows_of(runs))
    assert all(line["multiply_adds"] == costs[figures.student_of(line["row"])] and line["latency"] for line in lines)
