"""What was measured of networks that `helper.judging` has judged, as text and as one HTML page."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from dataset import ImageData, Loader
from errors import count_of
from helper.export import to_pixels
from helper.judging import Judged
from helper.metrics import METRICS, RESAMPLES
from helper.tables.figures import shortened
from helper.tables.pages import render

#: What is shown of a network in addition to its metrics, and of a network and its teacher: title, unit, decimals.
CALIBRATION = {"ece": ("calibration error", " %", 2)}
TEACHER_TITLES = {
    "agreement": ("agreement", " %", 2),
    "kl": ("KL divergence", " nats", 4),
    "cka_unfolded": ("CKA before folding", "", 4),
    "cka": ("CKA", "", 4),
}
#: Images on the page are at most this many pixels wide; up to `SMALL` they are stored without loss.
THUMBNAIL, SMALL = 128, 64
#: How many pairs of classes the page lists.
CONFUSIONS = 12
#: Up to this many classes the confusion matrix is shown.
MATRIX_CLASSES = 40


# Text.


def titles() -> dict[str, tuple[str, str, int]]:
    """What is shown of a network: title, unit, decimals."""
    return {name: (metric.title, metric.unit, metric.decimals) for name, metric in METRICS.items()} | CALIBRATION


def numbers(about: Mapping[str, Any], name: str, unit: str, digits: int) -> tuple[str, str]:
    """A metric with its unit and its interval, empty where it has none; of one that says nothing of so few classes why
    it does not."""
    if about[name] is None:
        return "-", f"always 100 % with {count_of(len(about['classes']), 'class')}"
    interval = about["intervals"].get(name, ())
    return f"{about[name]:.{digits}f}{unit}", " to ".join(f"{end:.{digits}f}" for end in interval)


def _line(about: Mapping[str, Any], name: str, title: str, unit: str, digits: int) -> str:
    value, interval = numbers(about, name, unit, digits)
    return f"  {title:<19} {value}" + (f" ({interval})" if interval else "")


def by_accuracy(about: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The classes that have test images, each with its numbers, the least accurate first."""
    classes = zip(about["classes"], about["per_class"], strict=True)
    return sorted((one for one in classes if one[1]["images"]), key=lambda one: one[1]["accuracy"])


def as_text(about: Mapping[str, Any]) -> str:
    """The numbers of a network, with 95 % intervals in brackets."""
    lost = f"; {about['test_unreadable']} unreadable, left out" if about["test_unreadable"] else ""
    lines = [f"{about['network']}: {about['model']} on {about['test_images']} test images of {about['dataset']}{lost}"]
    lines += [f"  images              {about['test_transform']}"] if "test_transform" in about else []
    lines += [_line(about, name, *title) for name, title in titles().items()]
    lowest = [f"{name}: {one['accuracy']:.1f} %" for name, one in by_accuracy(about)]
    lines.append(f"  per class           {', '.join(lowest[:10])}{', ... (lowest 10)' if len(lowest) > 10 else ''}")
    confused = confusions(about)[:5]
    lines.append(
        f"  most confused       {', '.join(f'{true} as {found} ({n})' for n, true, found in confused) or 'none'}"
    )
    if "teacher" in about:
        accuracy = f", {about['teacher']['accuracy']:.2f} %" if "accuracy" in about["teacher"] else ""
        lines.append(f"  teacher             {about['teacher']['network']}: {about['teacher']['model']}{accuracy}")
        lines += [_line(about, name, *title) for name, title in TEACHER_TITLES.items() if name in about]
        lines += [f"  {name:<30} {share:.2f} %" for name, share in about.get("outcomes", {}).items()]
    return "\n".join(lines)


def confusions(about: Mapping[str, Any]) -> list[tuple[int, str, str]]:
    """(images, their class, the class they are taken for), the most frequent first."""
    classes = about["classes"]
    return sorted(
        (
            (n, classes[true], classes[found])
            for true, row in enumerate(about["confusion"])
            for found, n in enumerate(row)
            if n and true != found
        ),
        key=lambda one: (-one[0], one[1], one[2]),
    )


# HTML.


class Judgement(NamedTuple):
    """A network that was judged: its numbers, and the images that they name."""

    about: dict[str, Any]
    judged: Judged
    pictures: dict[int, str]  # sample index -> data URI


def pictures_of(about: Mapping[str, Any], data: ImageData) -> dict[int, str]:
    """The images that a network's numbers name, as they were shown to it."""
    samples = sorted({one["sample"] for name in ("worst_errors", "disagreements") for one in about.get(name, ())})
    if not samples:
        return {}
    loader = Loader(data.test, data, len(samples), torch.device("cpu"), subset=torch.tensor(samples))
    (batch,) = loader.batches()
    pixels = to_pixels(batch.images, data._asdict()).permute(0, 2, 3, 1).numpy()
    return {sample: _data_uri(image) for sample, image in zip(batch.index.tolist(), pixels, strict=True)}


def _data_uri(pixels) -> str:
    image, content = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(content, "PNG" if image.width <= SMALL else "JPEG")
    kind = "png" if image.width <= SMALL else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _cells(about: Mapping[str, Any], name: str, title: str, unit: str, digits: int) -> dict[str, Any]:
    """A line of the page's table of numbers."""
    value, interval = numbers(about, name, unit, digits)
    ends = about["intervals"].get(name) if unit == " %" else None
    return {"title": title, "value": value, "interval": interval, "ends": ends, "number": about[name]}


def as_html(found: Sequence[Judgement]) -> str:
    """One self-contained page: numbers, reliability, confusions, the worst errors as pictures."""
    measured = titles() | TEACHER_TITLES
    networks = [
        {
            "about": about,
            "notes": one.judged.notes,
            "pictures": one.pictures,
            "lines": lines,
            "cells": {line["title"]: line["value"] for line in lines},
            "images": {name: counts["images"] for name, counts in by_accuracy(about)},
            "fullest": max(bin["images"] for bin in about["reliability"]),
            "confusions": confusions(about)[:CONFUSIONS],
            "classes": by_accuracy(about)[:MATRIX_CLASSES],
            "has_matrix": len(about["classes"]) <= MATRIX_CLASSES,
            "is_large": about["image_size"] > SMALL,
        }
        for one in found
        for about in [one.about]
        for lines in [[_cells(about, name, *title) for name, title in measured.items() if name in about]]
    ]
    shown = [title for title, *_ in measured.values() if any(title in page["cells"] for page in networks)]
    compared = shown if len(networks) > 1 else ()
    known = {"compared": compared, "resamples": RESAMPLES, "shortened": shortened}
    return render("evaluation.html.j2", networks=networks, **known)
