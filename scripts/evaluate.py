"""Judge networks on test images: python scripts/evaluate.py NETWORK... [--teacher T]

NETWORK is a run folder (its last.pth), a checkpoint, an exported .pth, .pt2 or .onnx file, or published weights
(torchvision:NAME, timm:NAME). Data set, image size and normalisation are those on record unless flags say otherwise.
One class per image: data of several labels per image are not judged.
"""

import base64
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import UserError, count_of, run_script, starting

with starting():
    import torch
    from PIL import Image
    from torch import Tensor

    from dataset import DATASETS, ImageData, Loader, StreamedImages, dataset_at
    from helper.checkpoint import AVERAGE, rebuild, take_average, upgrade
    from helper.command_line import Parser
    from helper.distributed import find_device
    from helper.export import RecordedData, check_classifies, read_deployed, to_pixels
    from helper.fast import Fast
    from helper.log import progress_bar
    from helper.metrics import METRICS, RESAMPLES, MinibatchCKA, divergences, fidelity, judge
    from helper.networks import (
        TEACHER_NORMALISATION,
        Network,
        classes_of_logits,
        give_normalisation,
        network_in,
        note_of_normalisation,
        read_network,
    )
    from helper.run_folder import FIDELITY, LAST, RESULT
    from helper.settings import normalisation
    from helper.tables.pages import render, write_page
    from helper.tables.rows import read_result
    from helper.teacher import Teacher, own_test, shown_as
    from models.backbone import Backbone, Output, probe_shapes
    from models.checkpoints import read_checkpoint
    from models.classes import compare_classes, matched_by_position
    from models.external import is_external
    from models.preprocessing import Preprocessing, read_preprocessing
    from setting import below_one, count, file_to_write

NETWORK, PROGRAMS = "NETWORK", (".pt2", ".onnx")
STDOUT = Path("-")
#: How many of the worst errors, and of the images on which two networks disagree most, are named and shown.
SHOWN = 24
#: Images on the page are at most this many pixels wide; up to `SMALL` they are stored without loss.
THUMBNAIL, SMALL = 128, 64
#: How many pairs of classes the page lists.
CONFUSIONS = 12
#: Up to this many classes the confusion matrix is shown.
MATRIX_CLASSES = 40
#: What is shown of a network in addition to its metrics, and of a network and its teacher: title, unit, decimals.
CALIBRATION = {"ece": ("calibration error", " %", 2)}
TEACHER_TITLES = {
    "agreement": ("agreement", " %", 2),
    "kl": ("KL divergence", " nats", 4),
    "cka_unfolded": ("CKA before folding", "", 4),
    "cka": ("CKA", "", 4),
}


# Networks.


class Judged(NamedTuple):
    """A network to be judged: `source` names it, `logits` computes images (B, 3, H, W)."""

    source: str
    name: str
    record: Mapping[str, Any]  # what its file says of it
    logits: Callable[[Tensor], Tensor]
    network: Backbone | None = None  # None: a program, which shows no maps and reads one size
    trained: Callable[[Tensor], Output] | None = None  # as the run trained it, where its checkpoint is there
    notes: Sequence[str] = ()
    folder: Path | None = None  # of its run


def file_of(source: str) -> str:
    """The checkpoint of a run folder; anything else is returned as it is."""
    return str(Path(source, LAST)) if Path(source).is_dir() else source


def read_judged(source: str, model: str | None, device: torch.device, ema: bool = False) -> Judged:
    """Read NETWORK, with `ema` the moving average of its weights; raises `UserError`."""
    path, folder = file_of(source), Path(source) if Path(source).is_dir() else None
    if not is_external(source) and Path(path).suffix.lower() in PROGRAMS:
        program = read_deployed(path, NETWORK)
        on_cpu = lambda images: program.predict(images.cpu()).to(device)  # noqa: E731
        return Judged(source, program.record.get("model_name", "?"), program.record, on_cpu)
    checkpoint: Mapping[str, Any] = {}
    if is_external(path):
        found = read_network(path, model, NETWORK, "--model", ema)
    else:
        checkpoint = upgrade(read_checkpoint(path, NETWORK), f"{NETWORK}: {path}")
        found = network_in(checkpoint, path, model, NETWORK, "--model", ema)
    check_classifies(found.network, f"{NETWORK}: {source}")
    network, trained, notes, record = found.network.eval().to(device), None, list(found.notes), dict(found.record)
    if "training" in checkpoint:
        checkpoint = take_average(checkpoint, path) if ema and AVERAGE in checkpoint else checkpoint
        record = checkpoint["training"].get("config", {}) | record
        try:
            method, _ = rebuild(checkpoint, path)
            trained = _responding(method.to(device))
        except UserError as error:
            notes.append(f"its maps before folding are unknown: {error}")
        folder = folder or (Path(path).parent if (Path(path).parent / RESULT).exists() else None)
    record |= {"digest": found.digest, "num_classes": found.num_classes}
    return Judged(source, found.name, record, lambda images: network(images), network, trained, notes, folder)


def _responding(method) -> Callable[[Tensor], Output]:
    return lambda images: method.respond(images, None)


# Data.


def data_for(judged: Judged, args) -> RecordedData:
    """What NETWORK is judged on: the flags, else its record, else what its published weights were trained on."""
    record, own = dict(judged.record), read_preprocessing(judged.source)
    dataset = args.dataset or record.get("dataset")
    if args.dataset is None and args.data is not None:
        dataset = dataset_at(args.data, dataset)
    if dataset is None:
        raise UserError(
            f"--dataset: {judged.source} does not say what it was trained on; name the data set, or a folder by --data"
        )
    if own is not None:
        record = {**own._asdict(), "image_size": own.test_size} | record
    is_other = args.dataset is not None or args.data is not None
    wanted = RecordedData.of(record, dataset if is_other else None, args.data, args.image_size, args.split)
    return wanted._replace(dataset=dataset, judges=tuple(record.get("classes") or ()))


def split_note(judged: Judged, wanted: RecordedData) -> Sequence[str]:
    """Says where another share of its folder becomes the test split: a network was trained on some of these images."""
    own, places = judged.record.get("split") or 0.0, (judged.record.get("data"), wanted.folder)
    if None in places or len({Path(place).resolve() for place in places}) > 1 or wanted.split == own:
        return ()
    return [f"--split {wanted.split:g}: its run had --split {own:g}, so it was trained on some of these test images"]


def as_it_taught(judged: Judged, loaded: Network | None, setting: str) -> Any:
    """How the run of a network showed this teacher its images, by a setting; None: as the teacher says itself."""
    is_its_own = loaded is not None and judged.record.get("teacher_digest") == loaded.digest
    return judged.record.get(setting) if is_its_own else None


def read_judges_teacher(args, judged: Sequence[Judged]) -> Network | None:
    """What `--teacher` names, with the normalisation that it has where one of these networks learned from it."""
    if args.teacher is None:
        return None
    loaded = read_network(file_of(args.teacher), args.model_t, "--teacher", "--model_t")
    taught = (as_it_taught(one, loaded, "teacher_normalisation") for one in judged)
    values = args.teacher_normalisation or next(filter(None, taught), None)
    (record,) = give_normalisation([(loaded.path, loaded.record)], values, TEACHER_NORMALISATION)
    return loaded._replace(record=record)


def by_data(
    judged: Sequence[Judged], args, loaded: Network | None
) -> Iterator[tuple[ImageData, str | None, str, int | None, list[Judged]]]:
    """The networks that are shown the same images, these images, their folder, how they are shown, where that is the
    weights' own test, and the size in which their run showed the teacher its images."""
    data_sets: dict[RecordedData, ImageData] = {}
    groups: dict[tuple[RecordedData, Preprocessing | None, int | None], list[Judged]] = {}
    for one in judged:
        wanted = data_for(one, args)
        if wanted not in data_sets:
            data_sets[wanted] = wanted.load()
        one = one._replace(notes=[*one.notes, *split_note(one, wanted)])
        own = own_test(one.source, one.record, data_sets[wanted]) if args.image_size is None else None
        groups.setdefault((wanted, own, as_it_taught(one, loaded, "teacher_image_size")), []).append(one)
    for (wanted, own, size), members in groups.items():
        data, how = (data_sets[wanted], "") if own is None else shown_as(own, data_sets[wanted])
        yield data, wanted.folder, how, size, members


def check_classes(judged: Judged, data: ImageData) -> Sequence[str]:
    """Raise `UserError` where a network's classes are not those of the data; a sentence where nobody can tell, and one
    where nobody can tell its normalisation."""
    classes = judged.record.get("classes")
    number = judged.record.get("num_classes")
    number = classes and len(classes) if number is None else number
    if number is not None and number != data.num_classes:
        raise UserError(f"--data: {judged.source} has {count_of(number, 'class')}, the data {data.num_classes}")
    own = read_preprocessing(judged.source)
    others = compare_classes(classes or (own and own.categories), data.classes)
    if others is not None:
        raise UserError(f"--data: {judged.source}: {others}")
    unknown = matched_by_position(classes or (own and own.categories), data.classes)
    guessed = note_of_normalisation(judged.source, judged.record, data.name, "--normalisation")
    return list(filter(None, (unknown, guessed)))


def check_size(judged: Judged, data: ImageData) -> None:
    """Raise `UserError` where a network cannot read images of the size that it is to be shown."""
    own = judged.record.get("image_size")
    if judged.network is not None:
        probe_shapes(judged.network, data.image_size)
    elif own not in (None, data.image_size):
        raise UserError(
            f"--image_size: {judged.source} reads images of {own}x{own} alone, as it was exported; leave it out, or "
            "judge the checkpoint"
        )


def check_teachers_classes(loaded: Network, data: ImageData, members: Sequence[Judged]) -> Sequence[str]:
    """The same of the teacher of these networks, whose logits are compared where it has as many classes."""
    classes = classes_of_logits(loaded) if loaded.num_classes == data.num_classes else []
    others = compare_classes(classes, data.classes)
    if others is not None:
        raise UserError(f"--teacher: {loaded.path}: {others}")
    usual = None if any(one.record.get("normalisation") for one in members) else data.name
    notes = (
        matched_by_position(classes, data.classes),
        note_of_normalisation(loaded.path, loaded.record, usual, TEACHER_NORMALISATION),
    )
    return [f"teacher: {note}" for note in notes if note]


# Measuring.


class Seen:
    """What the test images have shown of one network: logits (n, K), and how its maps compare with the teacher's."""

    def __init__(self, judged: Judged):
        self.judged, self._logits = judged, []
        self.cka, self.cka_unfolded = MinibatchCKA(), MinibatchCKA()
        self.folds = False  # whether the trained network's last map is another than the shipped one's

    def see(self, images: Tensor, teacher: Output | None) -> None:
        """Count a batch, with the teacher's outputs for it."""
        if teacher is None or self.judged.network is None:
            self._logits.append(self.judged.logits(images).float().cpu())
            return
        output = self.judged.network.outputs(images)
        self._logits.append(output.logits.float().cpu())
        self.cka.update(output.activated, teacher.activated)
        if self.judged.trained is not None and (self.folds or len(self._logits) == 1):
            trained = self.judged.trained(images).activated
            self.folds = trained.shape != output.activated.shape or not torch.equal(trained, output.activated)
            self.cka_unfolded.update(trained, teacher.activated)

    @property
    def logits(self) -> Tensor:
        return torch.cat(self._logits)


class Tested(NamedTuple):
    """The test images as they were shown: sample indices (n,), classes (n,), the teacher's logits (n, K) if any."""

    index: Tensor
    targets: Tensor
    teacher_logits: Tensor | None


@torch.inference_mode()
def test(seen: Sequence[Seen], teacher: Teacher | None, data: ImageData, device: torch.device, batch: int) -> Tested:
    """Show every test image to all networks, in random order, as CKA needs it."""
    order = torch.randperm(len(data.test.targets), generator=torch.Generator().manual_seed(0))
    loader = Loader(data.test, data, batch, device, subset=order)
    index, targets, logits = [], [], []
    for part in progress_bar(loader.batches(), "testing", len(loader)):
        if not len(part.targets):
            continue
        output = None if teacher is None else teacher(teacher.shown(part), False, False)
        for one in seen:
            one.see(part.images, output)
        index.append(part.index.cpu())
        targets.append(part.targets.cpu())
        logits.append(Tensor() if output is None else output.logits.float().cpu())
    if not index:
        raise UserError("--data: no readable image; repair or remove the files")
    return Tested(torch.cat(index), torch.cat(targets), None if teacher is None else torch.cat(logits))


def name_of(data: ImageData, sample: int) -> str:
    """An image's file, or its number in the test split."""
    return data.test.name_of(sample) if isinstance(data.test, StreamedImages) else f"test image {sample}"


def measure(seen: Seen, tested: Tested, teacher: Teacher | None, data: ImageData) -> dict[str, Any]:
    """Everything that is said of a network, as JSON can hold it."""
    judged, logits, record = seen.judged, seen.logits, seen.judged.record
    left_out = len(data.test.targets) - len(tested.targets) + len(data.unreadable)
    about: dict[str, Any] = {
        "network": judged.source,
        "model": judged.name,
        "digest": record.get("digest"),
        "dataset": data.name,
        "image_size": data.image_size,
        "test_images": len(tested.targets),
        "test_unreadable": left_out,
        "classes": list(data.classes),
    }
    about |= judge(logits, tested.targets)
    wrong = logits.double().softmax(1).amax(1).masked_fill(logits.argmax(1) == tested.targets, -1)
    about["worst_errors"] = _shown(wrong, wrong >= 0, logits, tested, data)
    if teacher is None:
        return about
    loaded = teacher.loaded
    about["teacher"] = {"network": loaded.path, "model": loaded.name, "digest": loaded.digest}
    cka = {"cka_unfolded": seen.cka_unfolded if seen.folds else None, "cka": seen.cka if judged.network else None}
    about |= {name: value for name, one in cka.items() if one and (value := one.value()) is not None}
    if tested.teacher_logits is not None and tested.teacher_logits.shape == logits.shape:
        compared = fidelity(logits, tested.teacher_logits, tested.targets)
        about["intervals"] |= compared.pop("intervals")
        about |= compared
        about["teacher"]["accuracy"] = METRICS["accuracy"].measure(tested.teacher_logits, tested.targets)
        apart = divergences(logits, tested.teacher_logits)
        others = tested.teacher_logits.argmax(1) != logits.argmax(1)
        about["disagreements"] = _shown(apart, others, logits, tested, data)
    return about


def _shown(values: Tensor, which: Tensor, logits: Tensor, tested: Tested, data: ImageData) -> list[dict[str, Any]]:
    """The images of `which` (n,) with the largest values (n,), and what is predicted of them."""
    found, probabilities = [], logits.double().softmax(1)
    for row in values.masked_fill(~which, -1).argsort(descending=True)[: min(SHOWN, int(which.sum()))].tolist():
        predicted, sample = int(logits[row].argmax()), int(tested.index[row])
        one = {"image": name_of(data, sample), "sample": sample, "class": data.classes[int(tested.targets[row])]}
        one |= {"predicted": data.classes[predicted], "confidence": 100 * float(probabilities[row, predicted])}
        if tested.teacher_logits is not None and tested.teacher_logits.shape == logits.shape:
            one["teacher"] = data.classes[int(tested.teacher_logits[row].argmax())]
        found.append(one)
    return found


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
    known = titles() | TEACHER_TITLES
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
        for lines in [[_cells(about, name, *title) for name, title in known.items() if name in about]]
    ]
    shown = [title for title, *_ in known.values() if any(title in page["cells"] for page in networks)]
    compared = shown if len(networks) > 1 else ()
    return render("evaluation.html.j2", networks=networks, compared=compared, resamples=RESAMPLES)


def make_parser() -> Parser:
    """The flags of this script."""
    parser = Parser.of_script(__doc__)
    add = parser.add_argument
    add("networks", nargs="+", metavar=NETWORK, help="run folder, checkpoint, export, torchvision:NAME or timm:NAME")
    add("--teacher", metavar="T", help="compare with this network: agreement, KL, CKA of the last maps")
    add("--model", metavar="NAME", help="the model's name, where a file of another code does not say it")
    add("--model_t", metavar="NAME", help="the same of the teacher")
    values = "imagenet|R,G,B,R,G,B"
    normalised = "mean and std, where a file of another code does not say them; default: those of the data"
    add("--normalisation", type=normalisation, metavar=values, help=normalised)
    add(TEACHER_NORMALISATION, type=normalisation, metavar=values, help="the same of the teacher; default: its run's")
    add("--ema", action="store_true", help="the moving average of the weights, where a file of NETWORK holds both")
    add("--dataset", choices=DATASETS, help="default: the network's own, or folder with --data")
    add("--data", metavar="PATH", help="where the data are stored, or test images alone; default: as on record")
    add("--split", type=below_one, metavar="SHARE", help="of the training images, for a folder without test images")
    add("--image_size", type=count, metavar="PIXELS", help="default: the network's own")
    add("--batch_size", type=count, default=128, metavar="B", help="images that are computed at once (128)")
    add("--device", default="auto", help="auto (CUDA where there is a GPU), cpu, cuda, cuda:1, ...")
    add(
        "--json",
        type=file_to_write,
        metavar="FILE",
        help="all numbers, of several networks a list; - is standard output",
    )
    add(
        "--html",
        type=file_to_write,
        metavar="FILE",
        help="one page: numbers, reliability, confusions, worst errors as images",
    )
    add("--fidelity", action="store_true", help=f"with --teacher: write {FIDELITY} into each run folder, for report.py")
    return parser


def check_end_of_run(judged: Judged) -> None:
    """Raise `UserError` unless these are the weights that a finished run has ended with, whose accuracy tables show."""
    if judged.folder is None:
        raise UserError(f"--fidelity: {judged.source} is in no run folder; leave the flag out, or name a run folder")
    try:
        digest = read_result(judged.folder).get("digest")
    except UserError as error:
        raise UserError(f"--fidelity: {judged.folder}: {error}; tables show finished runs") from None
    if digest not in (None, judged.record["digest"]):
        raise UserError(
            f"--fidelity: {judged.source} are not the weights that its run ended with, whose accuracy tables show; "
            f"name {judged.folder}, without --ema"
        )


def judge_all(args) -> list[Judgement]:
    """Judge every network, those that want the same data together; prints each one's numbers."""
    device = find_device(args.device)
    judged = [read_judged(source, args.model, device, args.ema) for source in args.networks]
    records = give_normalisation([(one.source, one.record) for one in judged], args.normalisation, "--normalisation")
    judged = [one._replace(record=record) for one, record in zip(judged, records, strict=True)]
    for one in judged if args.fidelity else ():
        check_end_of_run(one)
    loaded = read_judges_teacher(args, judged)
    found = []
    for data, folder, how, size, members in by_data(judged, args, loaded):
        for one in members:
            check_size(one, data)
        of_teacher = check_teachers_classes(loaded, data, members) if loaded else ()
        unknown = [(*check_classes(one, data), *of_teacher) for one in members]
        members = [one._replace(notes=[*one.notes, *more]) for one, more in zip(members, unknown, strict=True)]
        teacher = Teacher(loaded, data, size, Fast(), device) if loaded else None
        seen = [Seen(one) for one in members]
        tested = test(seen, teacher, data, device, args.batch_size)
        for one in seen:
            about = measure(one, tested, teacher, data) | {"data": folder} | ({"test_transform": how} if how else {})
            print(as_text(about), *(f"  note: {note}" for note in one.judged.notes), sep="\n")
            found.append(Judgement(about, one.judged, pictures_of(about, data) if args.html else {}))
    return found


def main(argv=None) -> list[dict[str, Any]]:
    args = make_parser().parse_args(argv)
    if args.fidelity and not args.teacher:
        raise UserError("--fidelity: name the teacher with --teacher")
    with redirect_stdout(sys.stderr) if args.json == STDOUT else nullcontext():
        found = judge_all(args)
        if args.html:
            write_page(args.html, as_html(found))
        for about, one, _ in found if args.fidelity else ():
            write_page(cast(Path, one.folder) / FIDELITY, json.dumps(about, indent=1) + "\n")
    numbers_of_all = [one.about for one in found]
    text = json.dumps(numbers_of_all[0] if len(found) == 1 else numbers_of_all, indent=1) + "\n"
    if args.json == STDOUT:
        print(text, end="")
    elif args.json:
        write_page(args.json, text)
    return numbers_of_all


if __name__ == "__main__":
    run_script(main)
