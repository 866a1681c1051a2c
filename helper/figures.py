"""Figures of runs: learning curves, accuracy against N and against cost, features, correlations of logits."""

import io
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dataset import Loader, load_data
from errors import UserError
from helper.run_folder import LAST, METRICS
from helper.run_state import rebuild
from helper.tables import Row
from helper.teacher import read_teacher
from models import build_model
from models.checkpoints import read_checkpoint
from models.cost import count_multiply_adds

#: How many test images the t-SNE embeds; it is quadratic in them.
EMBEDDED_IMAGES = 1000


def _axes(**labels):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.set(**labels)
    return figure, axes


def save(figure, path: Path) -> None:
    """Write a figure in the format of its suffix, and close it."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def as_svg(figure) -> str:
    """The figure as an SVG element to embed in a page."""
    from matplotlib import pyplot

    output = io.StringIO()
    figure.savefig(output, format="svg")
    pyplot.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", output.getvalue(), count=1, flags=re.S)


def learning_curves(rows: Sequence[Row]):
    """Test accuracy by epoch: the mean over seeds, with the range of the seeds."""
    figure, axes = _axes(xlabel="epoch", ylabel="test accuracy (%)")
    for row in rows:
        curves = [_curve(folder) for folder in row.folders]
        length = min(map(len, curves))
        by_epoch = list(zip(*(curve[:length] for curve in curves), strict=True))
        epochs = range(1, length + 1)
        (line,) = axes.plot(epochs, list(map(statistics.mean, by_epoch)), label=f"{row.pair}: {row.label}")
        if len(curves) > 1:
            axes.fill_between(epochs, *zip(*((min(v), max(v)) for v in by_epoch), strict=True), alpha=0.2)
            line.set_linewidth(1.5)
    axes.legend(fontsize="small")
    return figure


def _curve(folder: Path) -> list[float]:
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    return [record["test_accuracy"] for record in map(json.loads, lines) if "test_accuracy" in record]


def accuracy_against_n(rows: Sequence[Row]):
    """Last accuracy against N for every group of rows that differ in N alone; None where no group has two values."""
    groups = defaultdict(dict)
    for row in rows:
        if "co_sponge" in row.config:
            name = re.sub(r" ?(-s|--co_sponge) \S+", "", row.label)
            groups[f"{row.pair}: {name}"][row.config["co_sponge"]] = row.values("accuracy_last")
    groups = {title: points for title, points in groups.items() if len(points) > 1}
    if not groups:
        return None
    figure, axes = _axes(xlabel="N", ylabel="test accuracy (%), last epoch")
    for title, points in groups.items():
        numbers = sorted(points)
        means = [statistics.mean(points[n]) for n in numbers]
        bars = [statistics.stdev(points[n]) if len(points[n]) > 1 else 0 for n in numbers]
        axes.errorbar(numbers, means, bars, marker="o", capsize=3, label=title)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({n for points in groups.values() for n in points}), minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize="small")
    return figure


def accuracy_against_cost(rows: Sequence[Row]):
    """Last accuracy against the multiply-adds of what is shipped; the area of a point shows its parameters."""
    figure, axes = _axes(xlabel="multiply-adds of one image (M)", ylabel="test accuracy (%), last epoch")
    for row in rows:
        network = build_model(row.config["model_s"], 10)
        cost = count_multiply_adds(network, row.config["image_size"]) / 1e6
        accuracy, parameters = statistics.mean(row.values("accuracy_last")), row.results[0]["parameters"]
        label = f"{row.config['model_s']}: {row.label} ({parameters / 1e6:.2f} M parameters)"
        axes.scatter(cost, accuracy, 20 + 60 * (parameters / 1e6) ** 0.5, alpha=0.7, label=label)
    axes.legend(fontsize="small")
    return figure


@torch.inference_mode()
def read_outputs(folder: Path) -> dict[str, Tensor]:
    """Test images through a run's student and its teacher: pooled, logits, teacher_logits where there is one, targets.

    Raises `UserError` where the checkpoint, the teacher's file or the data are gone.
    """
    method, config = rebuild(read_checkpoint(folder / LAST, "RUN"), f"RUN: {folder}")
    teacher = read_teacher(config["path_t"], config["model_t"]).network.eval() if config["path_t"] else None
    data = load_data(config["dataset"], config["data"], config["image_size"], may_download=False)
    parts = defaultdict(list)
    for batch in Loader(data.test, data, 256, torch.device("cpu")).batches():
        response = method.respond(batch.images, None)
        parts["pooled"].append(response.pooled)
        parts["logits"].append(response.logits)
        parts["targets"].append(batch.targets)
        if teacher is not None:
            parts["teacher_logits"].append(teacher(batch.images))
    return {name: torch.cat(values) for name, values in parts.items()} | {"classes": data.classes}


def feature_map(outputs: dict[str, Tensor], title: str):
    """t-SNE (scikit-learn) of the pooled features of the first test images of every class, coloured by class."""
    from sklearn.manifold import TSNE

    targets, classes = outputs["targets"], outputs["classes"]
    each = max(EMBEDDED_IMAGES // len(classes), 1)
    index = torch.cat([(targets == number).nonzero().flatten()[:each] for number in range(len(classes))])
    if len(index) < 10:
        raise UserError(f"RUN: {len(index)} test images are too few for a t-SNE")
    perplexity = min(30, (len(index) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(outputs["pooled"][index].numpy())
    figure, axes = _axes(title=title, xticks=[], yticks=[])
    axes.scatter(*points.T, c=targets[index].numpy(), cmap="tab20", s=6)
    return figure


def correlation_difference(outputs: dict[str, Tensor], title: str):
    """|difference| of the correlation matrices (K, K) of student's and teacher's logits over the test images."""
    student, teacher = (torch.corrcoef(outputs[name].double().T) for name in ("logits", "teacher_logits"))
    difference = (student - teacher).abs()
    figure, axes = _axes(xlabel="class", ylabel="class")
    axes.set_title(f"{title}: mean {difference.mean():.3f}, max {difference.max():.3f}")
    figure.colorbar(axes.imshow(difference.numpy(), cmap="Blues", vmin=0), ax=axes)
    return figure
