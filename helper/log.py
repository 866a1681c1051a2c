"""What a run says of itself: lines for terminal and log, and progress bars."""

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from tqdm import tqdm

from dataset import ImageData
from distiller_zoo import Distiller, Progress, Stage
from errors import count_of
from helper.configuration import Configuration
from helper.distributed import count_processes, images_per_pass, is_main
from helper.metrics import MATCHING_LOSSES, PROBE_ACCURACIES
from models.cost import count_multiply_adds, count_parameters


def progress_bar(items: Iterable, title: str, total: int, over: int = 0) -> tqdm:
    """The items, with a bar that is only drawn on a terminal and goes when it is full; `over` of `total` are done."""
    return tqdm(
        items, title, total, leave=False, disable=not (is_main() and sys.stderr.isatty()), unit="step", initial=over
    )


def describe_data(data: ImageData, device: torch.device) -> str:
    """One line on the data set."""
    if not data.labelled:
        size = f"{data.image_size}x{data.image_size}"
        return f"{data.name}: {len(data.train.targets)} training images without labels, {size}; device {device}"
    return (
        f"{data.name}: {len(data.train.targets)} training and {len(data.test.targets)} test images, "
        f"{count_of(data.num_classes, 'class')}, {data.image_size}x{data.image_size}; device {device}"
    )


def describe_batch(config: Configuration) -> str:
    """One line on how the batch is divided and what that means for the learning rate; empty where it is not divided."""
    processes, parts = count_processes(), config.accumulate
    without_effect = "--sync_bn changes nothing: there is one process" if config.sync_bn and processes == 1 else ""
    if processes * parts == 1:
        return without_effect
    factors = f"{processes} processes x " * (processes > 1) + f"{parts} micro-batches x " * (parts > 1)
    statistics = "all processes'" if config.sync_bn and processes > 1 else "each process's own"
    return (
        f"batch: {config.batch_size} = {factors}{images_per_pass(config.batch_size, parts)} images; the learning rate, "
        f"{config.learning_rate:g}, belongs to the global batch and is not rescaled; BatchNorm over {statistics} "
        + ("micro-batch" if parts > 1 else "images")
        + (without_effect and f"; {without_effect}")
    )


def describe_method(distiller: Distiller, stages: Sequence[Stage], model_name: str, image_size: int) -> str:
    """What the student costs, what is trained in each stage, and what is shipped in addition to the student."""
    student = distiller.student
    trained = [f"{count_parameters(nn.ModuleList(stage.trained)):,} parameters in {stage.name}" for stage in stages]
    note, about = distiller.export_note(), student.describe(image_size)
    return (
        (f"{about}\n" if about else "") + f"{model_name}: {count_parameters(student):,} parameters, "
        f"{count_multiply_adds(student, image_size) / 1e6:.1f} M multiply-adds; trained: {', then '.join(trained)}"
        + (f"; to be shipped: {note}" if note else "")
        + "".join(f"\n{line}" for line in distiller.notes())
    )


def describe_protocol(holdout: int | None, metric: str) -> str:
    """Which images the best epoch of a run is chosen on, and by what, as `result.json` and tables say it."""
    images = f"best on {holdout} held-out" if holdout else "best on test"
    return images if metric == "accuracy" else f"{images} by {metric}"


def format_title(stage: str, progress: Progress) -> str:
    """The name of an epoch on a progress bar and in the log."""
    return f"{of_stage(stage)}epoch {progress.epoch + 1}/{progress.epochs}"


def of_stage(stage: str) -> str:
    """The name of a stage before a word; empty for the main one."""
    return "" if stage == "main" else f"{stage} "


def format_losses(means: dict[str, float]) -> str:
    """The loss, its weighted terms by name, and the training accuracy, on one line."""
    terms = " + ".join(f"{name.removeprefix('loss_')} {means[name]:.3f}" for name in means if name.startswith("loss_"))
    accuracy = f", train {means['train_accuracy']:.2f} %" if "train_accuracy" in means else ""
    return f"loss {means['loss']:.3f} = {terms}{accuracy}"


def format_duration(seconds: float) -> str:
    """How long something takes, to what a reader plans by: 45 s, 12 min, 3 h 5 min, 2 days 4 h."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def format_epoch(record: dict, title: str, left: str) -> str:
    """An epoch's line in the log; `left` says how long the rest of the run takes, empty at its end."""
    seconds = record["data_wait_s"] + record["compute_s"]
    kinds = {f"{name}_accuracy{of}": f"{name}{of and ' of EMA'}" for of in ("", "_ema") for name in ("holdout", "test")}
    test = "".join(f", {kind} {record[name]:.2f} %" for name, kind in kinds.items() if name in record)
    test += "".join(f", {describe_measured(name, record[name])}" for name in record if is_without_labels(name))
    return (
        f"{title}: {format_losses(record)}{test}, "
        f"lr {record['learning_rate']:.3g}, {seconds:.1f} s ({record['data_wait_s']:.1f} s waiting for data), "
        f"{record['images_per_s']:.0f} images/s{left and f', {left}'}"
    )


def is_without_labels(name: str) -> bool:
    """Whether this is the name of what a run without labels is judged by."""
    return name in (*MATCHING_LOSSES, *PROBE_ACCURACIES)


def describe_measured(name: str, value: float) -> str:
    """One of these and its value, in words."""
    title = name.removesuffix("_accuracy").replace("_", " ").replace("knn", "nearest neighbours")
    return f"{title} {value:.2f} %" if name.endswith("_accuracy") else f"{title} {value:.4g}"


def format_without_labels(result: dict) -> str:
    """How a run without labels ended."""
    last = [name.removesuffix("_last") for name in result if is_without_labels(name.removesuffix("_last"))]
    ends = [", ".join(describe_measured(name, result[f"{name}_{when}"]) for name in last) for when in ("last", "best")]
    return (
        f"trained without labels: last {ends[0]}; best {ends[1]} (epoch {result['best_epoch']}, {result['protocol']})"
    )


def format_result(result: dict) -> str:
    """The three accuracies, each by its name, and what was left out of them."""
    if "accuracy_last" not in result:
        return format_without_labels(result)
    lost, average = result.get("test_unreadable"), result.get("accuracy_last_ema")
    count = "five" if result["epochs"] >= 5 else result["epochs"]
    mean = f", mean of the last {count} epochs {result['accuracy_mean_last_five']:.2f} %"
    return (
        f"test accuracy: last {result['accuracy_last']:.2f} %, best {result['accuracy_best']:.2f} % (epoch "
        f"{result['best_epoch']}, {result['protocol']}){mean if result['epochs'] > 1 else ''}"
        + ("" if average is None else f"; of the EMA: last {average:.2f} %, best {result['accuracy_best_ema']:.2f} %")
        + (f"; {lost} of {result['test_images']} test images unreadable, left out" if lost else "")
    )
