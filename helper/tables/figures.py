"""Figures of rows, as SVG: learning curves, accuracy against N and against cost, features, correlations of logits.

Rows of different data sets, protocols or image sizes are never in one figure. Lines and text take the page's colour.
"""

import io
import math
import re
import statistics
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset import Loader
from errors import UserError, count_of, first_line
from helper.configuration import row_key
from helper.export import RecordedData
from helper.fast import Fast
from helper.networks import read_at_classes, read_network, read_teacher
from helper.run_folder import EPOCHS, LAST
from helper.tables.rows import Row, key_text
from helper.teacher import Teacher
from models import build_model
from models.cost import count_multiply_adds

#: How many test images the t-SNE embeds; it is quadratic in them.
EMBEDDED_IMAGES = 1000
#: With more classes than these a legend and names at an axis are longer than the figure.
NAMED_CLASSES = 40
#: Drawn where the page's own colour for text belongs.
INK = "#010203"
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "svg.fonttype": "none",
    "svg.hashsalt": "figure",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
#: Lines that repeat a colour are dashed otherwise.
COLOURS = ("#3b76af", "#d9722a", "#4a9a4f", "#c2403d", "#8566ab", "#8a6a5c", "#cf73b6", "#8a8a8a", "#a8a52c", "#35a5b5")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^v"
WIDTH, HEIGHT, LEGEND_LINE = 7.0, 4.0, 0.21  # inches
LEGEND_LENGTH, TITLE_LENGTH, CLASS_LENGTH = 100, 52, 24  # characters
#: With more values of N than this only the powers of two are at the axis.
NAMED_NUMBERS = 8


def plain(text: str) -> str:
    """A text of which nothing is set as a formula."""
    return text.replace("$", r"\$")


def titled(text: str) -> str:
    """A title in lines that are no longer than the figure."""
    return plain(textwrap.fill(text, TITLE_LENGTH))


def shortened(name: str) -> str:
    """What a class is called in a legend, at an axis or a matrix, so that a long name leaves room for the rest."""
    return name if len(name) <= CLASS_LENGTH else f"{name[: CLASS_LENGTH - 3]}..."


def class_names(classes: Sequence[Any]) -> list[str]:
    """The names of classes in a figure."""
    return [plain(shortened(str(name))) for name in classes]


def name_shares_alone(axes: Any) -> None:
    """Keep the ticks of an axis of accuracies that can be reached: matplotlib puts some above 100 %."""
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= min(high, 100)])


def draw(paint: Callable[[Any], None], names: Sequence[str] = (), height: float = HEIGHT, **labels: Any) -> str:
    """An SVG element with what `paint(axes)` draws; labelled artists, whose `names` these are, are listed below it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():  # pyright: ignore[reportArgumentType]
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # text is set by what shows the figure
        columns = max(1, min(4, LEGEND_LENGTH // (max(map(len, names), default=0) + 8)))
        size = WIDTH, height + LEGEND_LINE * math.ceil(len(names) / columns)
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        axes.set(**labels)
        paint(axes)
        if names:
            figure.legend(loc="outside lower left", fontsize="small", ncols=columns)
        output = io.StringIO()
        no_clock = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(output, format="svg", transparent=True, metadata=no_clock)
        pyplot.close(figure)
    svg = re.sub(r"^.*?(?=<svg)", "", output.getvalue(), count=1, flags=re.S)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)  # as wide as where it is shown
    return svg.replace(INK, "currentColor")


def standalone(svg: str) -> str:
    """An SVG element as a file of its own, readable on light and on dark pages."""
    colours = "svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}"
    return svg.replace(">", f"><style>{colours}</style>", 1)


def line_style(number: int) -> dict[str, Any]:
    """Colour, dashes and, from the forty-first on, marks of the line of this number; 240 differ."""
    dashes, marks = number // len(COLOURS), number // (len(COLOURS) * len(DASHES))
    style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[dashes % len(DASHES)]}
    return style if not marks else style | {"marker": MARKERS[(marks - 1) % len(MARKERS)], "markersize": 3}


def point_style(number: int) -> dict[str, Any]:
    """Colour and shape of the points of this number; fifty differ."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number // len(COLOURS) % len(MARKERS)]}


# Figures of rows.


def of_rows(rows: Sequence[Row]) -> dict[str, str]:
    """The figures that need no network, by name: of every data set its own."""
    drawn = {}
    for title, of_title in groups(rows).items():
        suffix = "" if len(groups(rows)) == 1 else "_" + re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-")
        for kind in (learning_curves, accuracy_against_n, accuracy_against_cost):
            svg = kind(of_title, title)
            if svg:
                drawn[kind.__name__ + suffix] = svg
    return drawn


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Title -> the rows that one figure may hold."""
    found = defaultdict(list)
    for row in rows:
        found[f"{row.dataset}, {row.config['image_size']} pixels, {row.protocol}"].append(row)
    return dict(found)


def names_of(rows: Sequence[Row]) -> list[str]:
    """What rows of a figure are called; with their networks where these differ, and with their epochs."""
    taught = {row.pair for row in rows if row.config["model_t"]}
    names = []
    for row in rows:
        networks = row.pair if row.config["model_t"] else row.config["model_s"]
        names.append(row.label if taught == {networks} else f"{networks}: {row.label}")
    if len({row.epochs for row in rows}) > 1:
        names = [f"{name}, {count_of(row.epochs, 'epoch')}" for name, row in zip(names, rows, strict=True)]
    return names


def with_curves(rows: Sequence[Row]) -> list[Row]:
    """The rows whose runs have all kept their epochs."""
    return [row for row in rows if all(record.curve for record in row.records)]


def learning_curves(rows: Sequence[Row], title: str = "", legend: bool = True) -> str | None:
    """Test accuracy by epoch: the mean over seeds, with the range of the seeds. The curve of row K of `with_curves`
    is the element curve-K, its range band-K. A run that has not kept its epochs is named on stderr."""
    for record in (record for row in rows for record in row.records if not record.curve):
        print(f"{record.folder}: no learning curve of its row: {EPOCHS} holds no epochs", file=sys.stderr)
    rows = with_curves(rows)
    names = names_of(rows)
    if not rows:
        return None

    def paint(axes) -> None:
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no half epoch
        for number, (row, name) in enumerate(zip(rows, names, strict=True)):
            by_epoch = list(zip(*(record.curve for record in row.records), strict=False))
            epochs, style = range(1, len(by_epoch) + 1), line_style(number)
            means = [statistics.mean(values) for values in by_epoch]
            style |= {"marker": "o"} if len(means) == 1 else {}
            axes.plot(epochs, means, **style, label=plain(name), gid=f"curve-{number}")
            if len(row.records) > 1:
                lows, highs = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
                band = axes.fill_between(
                    epochs, lows, highs, color=style["color"], alpha=0.15 if len(rows) < 9 else 0.05, linewidth=0
                )
                band.set_gid(f"band-{number}")
        name_shares_alone(axes)

    return draw(paint, names if legend else (), title=titled(title), xlabel="epoch", ylabel="test accuracy (%)")


def accuracy_against_n(rows: Sequence[Row], title: str = "") -> str | None:
    """Last accuracy against N for every group of rows that differ in N alone; None where no group has two values."""
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        others = row_key(row.config)
        n = others.pop("co_sponge", None)
        if n is not None:
            found[key_text(others)][n] = row
    lines = [points for points in found.values() if len(points) > 1]
    if not lines:
        return None
    firsts = [points[max(points)] for points in lines]
    names = [re.sub(r" -s \S+", "", name) for name in names_of(firsts)]

    def paint(axes) -> None:
        for number, (points, name) in enumerate(zip(lines, names, strict=True)):
            numbers = sorted(points)
            values = [points[n].values("accuracy_last") for n in numbers]
            bars = [statistics.stdev(of_n) if len(of_n) > 1 else 0 for of_n in values]
            means = list(map(statistics.mean, values))
            style = {"marker": "o"} | line_style(number)
            axes.errorbar(numbers, means, bars, **style, capsize=3, label=plain(name))
        axes.set_xscale("log", base=2)
        shown = sorted({n for points in lines for n in points})
        if len(shown) <= NAMED_NUMBERS:
            axes.set_xticks(shown, minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        name_shares_alone(axes)

    return draw(paint, names, title=titled(title), xlabel="N", ylabel="test accuracy (%), last epoch")


def accuracy_against_cost(rows: Sequence[Row], title: str = "") -> str | None:
    """Last accuracy against the multiply-adds of the student; the area of a point shows its parameters. None where all
    students cost the same."""
    costs = multiply_adds(rows)
    shown = [row for row in rows if student_of(row) in costs]
    sizes = [row.records[0].result["parameters"] / 1e6 for row in shown]
    names = [f"{name} ({size:.2f} M)" for name, size in zip(names_of(shown), sizes, strict=True)]
    if len(set(costs.values())) < 2:
        return None

    def paint(axes) -> None:
        for number, (row, size, name) in enumerate(zip(shown, sizes, names, strict=True)):
            mean = statistics.mean(row.values("accuracy_last"))
            point = costs[student_of(row)] / 1e6, mean, 20 + 60 * size**0.5
            axes.scatter(*point, **point_style(number), alpha=0.7, label=plain(name))
        name_shares_alone(axes)

    labels: dict[str, Any] = {
        "xlabel": "multiply-adds of one image (M); in brackets: parameters",
        "ylabel": "test accuracy (%), last epoch",
    }
    return draw(paint, names, title=titled(title), **labels)  # pyright: ignore[reportArgumentType]


def student_of(row: Row) -> tuple[str, int]:
    """What decides the cost of a row's student: its name, and the size of its images."""
    return row.config["model_s"], row.config["image_size"]


def multiply_adds(rows: Sequence[Row]) -> dict[tuple[str, int], int]:
    """`student_of` -> multiply-adds for one image; without students that cannot be built here, which are named."""
    found = {}
    for name, size in dict.fromkeys(map(student_of, rows)):
        try:
            found[name, size] = count_multiply_adds(build_model(name, 10, size), size)
        except (UserError, RuntimeError, ValueError) as error:
            print(f"{name}: no multiply-adds: {first_line(error)}", file=sys.stderr)
    return found


# Figures of networks.


def of_networks(rows: Sequence[Row]) -> dict[str, str]:
    """t-SNE of every row's first student, and how its logits' correlations differ from the teacher's, by name.

    A row whose checkpoint, teacher or data are gone is named on stderr.
    """
    drawn = {}
    for row, name in zip(rows, names_of(rows), strict=True):
        folder = row.records[0].folder
        try:
            outputs = read_outputs(row)
            # Folders of two places may have one name.
            of_run = folder.name if f"tsne_{folder.name}" not in drawn else f"{folder.parent.name}_{folder.name}"
            drawn[f"tsne_{of_run}"] = feature_map(outputs, name)
            if "teacher_logits" in outputs:
                drawn[f"correlation_{of_run}"] = correlation_difference(outputs, name)
        except UserError as error:
            print(f"{folder}: no pictures of its network: {error}", file=sys.stderr)
    return drawn


@torch.inference_mode()
def read_outputs(row: Row) -> dict[str, Any]:
    """Test images through the first student of a row and its teacher: pooled, logits, teacher_logits where there is
    one, targets, classes. Raises `UserError` where the checkpoint, the teacher's file or the data are gone."""
    config, folder = row.config, row.records[0].folder
    student = read_network(str(folder / LAST), config["model_s"], "RUN", "RUN").network.eval()
    if config.get("data") and not Path(config["data"]).is_dir():  # a report has no --data to advise
        raise UserError(f"RUN: its data are gone: there is no folder {config['data']}")
    data, device, teacher = RecordedData.of(config)._replace(may_download=False).load(), torch.device("cpu"), None
    if config["path_t"]:
        how = config.get("ema", False), config.get("teacher_weights"), config.get("teacher_normalisation")
        source = read_teacher(config["path_t"], config["model_t"], *how)
        if config.get("teacher_classes") is not None:
            source = read_at_classes(source, config["teacher_classes"])
        teacher = Teacher(source, data, config.get("teacher_image_size"), Fast(), device)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for batch in Loader(data.test, data, 256, device).batches():
        outputs = {"": student.outputs(batch.images)}
        if teacher is not None:
            outputs["teacher_"] = teacher(teacher.shown(batch), False, False)
        parts["targets"].append(batch.targets)
        for prefix, output in outputs.items():
            parts[f"{prefix}pooled"].append(output.pooled)
            parts[f"{prefix}logits"].append(output.logits)
    return {name: torch.cat(values) for name, values in parts.items()} | {"classes": data.classes}


def feature_map(outputs: Mapping[str, Any], title: str) -> str:
    """t-SNE (scikit-learn) of the pooled features of the first test images of every class, coloured by class."""
    from sklearn.manifold import TSNE

    targets, classes = outputs["targets"], outputs["classes"]
    each = max(EMBEDDED_IMAGES // len(classes), 1)
    index = torch.cat([(targets == number).nonzero().flatten()[:each] for number in range(len(classes))])
    if len(index) < 10:
        raise UserError(f"RUN: {count_of(len(index), 'test image')}, too few for a t-SNE")
    if not outputs["pooled"].isfinite().all():
        raise UserError("RUN: its features are not finite; it diverged")
    perplexity = min(30, (len(index) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(outputs["pooled"][index].numpy())
    names = class_names(classes) if len(classes) <= NAMED_CLASSES else []

    def paint(axes) -> None:
        for number in range(len(classes)):
            of_class = points[(targets[index] == number).numpy()]
            axes.scatter(*of_class.T, s=8, **point_style(number), label=names[number] if names else None)

    return draw(paint, names, title=titled(title), xticks=[], yticks=[])


def correlation_difference(outputs: Mapping[str, Any], title: str) -> str:
    """|difference| of the correlation matrices (K, K) of student's and teacher's logits over the test images.

    Raises `UserError` where the teacher has another number of classes.
    """
    known, taught = (outputs[name].shape[1] for name in ("logits", "teacher_logits"))
    if known != taught:
        raise UserError(f"RUN: the teacher has {count_of(taught, 'class')}, the student {known}: no correlations")
    student, teacher = (torch.corrcoef(outputs[name].double().T) for name in ("logits", "teacher_logits"))
    difference, classes = (student - teacher).abs(), class_names(outputs["classes"])

    def paint(axes) -> None:
        image = axes.imshow(difference.numpy(), cmap="Blues", vmin=0)
        axes.figure.colorbar(image, ax=axes)
        if len(classes) <= NAMED_CLASSES:
            axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize="small")
            axes.set_yticks(range(len(classes)), classes, fontsize="small")
        else:
            axes.set(xlabel="class", ylabel="class")

    headline = f"{titled(title)}\nmean {difference.mean():.3f}, max {difference.max():.3f}"
    return draw(paint, title=headline, height=WIDTH * 0.8)
