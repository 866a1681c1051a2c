"""Networks of any file, judged on test images: read, shown the images that are theirs, measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataset import ImageData, Loader, StreamedImages, dataset_at
from errors import UserError, count_of
from helper.checkpoint import AVERAGE, contained, rebuild, take_average, upgrade
from helper.export import PROGRAMS, RecordedData, check_classifies, check_finite, read_deployed
from helper.fast import Fast
from helper.log import progress_bar
from helper.metrics import METRICS, MinibatchCKA, divergences, fidelity, judge
from helper.networks import (
    TEACHER_NORMALISATION,
    Network,
    classes_of_logits,
    give_normalisation,
    network_in,
    note_of_normalisation,
    read_network,
)
from helper.run_folder import LAST, RESULT
from helper.settings import sources_of
from helper.teacher import Teacher, own_test, shown_as
from models.backbone import Backbone, Output, probe_shapes
from models.checkpoints import read_checkpoint
from models.classes import compare_classes, matched_by_position
from models.external import is_external
from models.preprocessing import Preprocessing, read_preprocessing
from models.record import check_record

NETWORK = "NETWORK"
#: How many of the worst errors, and of the images on which two networks disagree most, are named.
SHOWN = 24


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


def read_all(
    sources: Sequence[str],
    model: str | None,
    normalisation: Sequence[float] | None,
    device: torch.device,
    ema: bool = False,
) -> list[Judged]:
    """Read every NETWORK, with `ema` the moving average of its weights; `model` is the name, and `normalisation` the
    mean and std, of those whose file does not say them. Raises `UserError`."""
    judged = [_read(source, model, device, ema) for source in sources]
    records = give_normalisation([(one.source, one.record) for one in judged], normalisation, "--normalisation")
    return [one._replace(record=record) for one, record in zip(judged, records, strict=True)]


def _read(source: str, model: str | None, device: torch.device, ema: bool) -> Judged:
    path, folder = file_of(source), Path(source) if Path(source).is_dir() else None
    if not is_external(source) and Path(path).suffix.lower().lstrip(".") in PROGRAMS:
        program = read_deployed(path, NETWORK)
        name = program.record.get("model_name", "?")
        if model not in (None, name):
            raise UserError(f"{NETWORK}: {path} holds another architecture, {name}, than --model {model}")
        notes = [f"{path}: it is a program, which holds one set of weights: --ema changes nothing"] * ema
        on_cpu = lambda images: program.predict(images.cpu()).to(device)  # noqa: E731
        return Judged(source, name, program.record, on_cpu, notes=notes)
    checkpoint: Mapping[str, Any] = {}
    if is_external(path):
        found = read_network(path, model, NETWORK, "--model", ema)
    else:
        checkpoint = upgrade(read_checkpoint(path, NETWORK), f"{NETWORK}: {path}")
        found = network_in(checkpoint, path, model, NETWORK, "--model", ema)
    check_classifies(found.network, f"{NETWORK}: {source}")
    network, trained, notes, record = found.network.eval().to(device), None, list(found.notes), dict(found.record)
    if isinstance(training := checkpoint.get("training"), Mapping):
        checkpoint = take_average(checkpoint, path) if ema and AVERAGE in checkpoint else checkpoint
        with contained(f"{NETWORK}: {path} is not a whole checkpoint of a run"):
            record = check_record(dict(training.get("config") or {}) | record, f"{NETWORK}: {path}")
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


class Asked(NamedTuple):
    """What the flags say of the test images; None: what is on record."""

    dataset: str | None = None
    folder: str | None = None
    image_size: int | None = None
    split: float | None = None


class Group(NamedTuple):
    """Networks that are shown the same images."""

    members: list[Judged]
    data: ImageData
    folder: str | None  # of the data
    how: str  # the images are shown, where that is the weights' own test
    teacher_size: int | None  # in which their run showed the teacher its images


def data_for(judged: Judged, asked: Asked) -> RecordedData:
    """What NETWORK is judged on: the flags, else its record, else what its published weights were trained on."""
    record, own = dict(judged.record), read_preprocessing(judged.source)
    dataset = asked.dataset or record.get("dataset")
    if asked.dataset is None and asked.folder is not None:
        dataset = dataset_at(asked.folder, dataset)
    if dataset is None:
        raise UserError(
            f"--dataset: {judged.source} does not say what it was trained on; name the data set, or a folder by --data"
        )
    if own is not None:
        record = {**own._asdict(), "image_size": own.test_size} | record
    is_other = asked.dataset is not None or asked.folder is not None
    wanted = RecordedData.of(record, dataset if is_other else None, asked.folder, asked.image_size, asked.split)
    return wanted._replace(dataset=dataset, judges=tuple(record.get("classes") or ()))


def split_note(judged: Judged, wanted: RecordedData) -> Sequence[str]:
    """Says where another share of its folder becomes the test split, or may: a network was trained on some of these
    images."""
    record, here = judged.record, wanted.folder
    own, there = record.get("split") or 0.0, record.get("data")
    if not here or wanted.split == own:
        return ()
    # An export does not say where its images were, and a checkpoint may have come here from another machine.
    is_unknown = "split" in record and not (there and Path(there).exists())
    if not is_unknown and (not there or Path(there).resolve() != Path(here).resolve()):
        return ()
    where = ", where these are the images of its run" if is_unknown else ""
    was = f"it was trained on some of these test images{where}"
    return [f"--split {wanted.split:g}: its run had --split {own:g}, so {was}"]


def as_it_taught(judged: Judged, loaded: Network | None, setting: str) -> Any:
    """How the run of a network showed this teacher its images, by a setting; None: as the teacher says itself."""
    is_its_own = loaded is not None and judged.record.get("teacher_digest") == loaded.digest
    return judged.record.get(setting) if is_its_own else None


def read_judges_teacher(
    source: str, model: str | None, normalisation: Sequence[float] | None, judged: Sequence[Judged]
) -> Network:
    """What `--teacher` names, with the normalisation that it has where one of these networks learned from it."""
    path = file_of(source)
    if len(sources_of(path)) > 1:
        raise UserError(f"--teacher: {source} names several networks; name one, and the others in further calls")
    loaded = read_network(path, model, "--teacher", "--model_t", None)
    taught = (as_it_taught(one, loaded, "teacher_normalisation") for one in judged)
    values = normalisation or next(filter(None, taught), None)
    (record,) = give_normalisation([(loaded.path, loaded.record)], values, TEACHER_NORMALISATION)
    return loaded._replace(record=record)


def by_data(judged: Sequence[Judged], asked: Asked, loaded: Network | None) -> Iterator[Group]:
    """The networks with their images, and with notes on what is unknown of both; raises `UserError` where a network or
    the teacher `loaded` does not fit its images."""
    data_sets: dict[RecordedData, ImageData] = {}
    groups: dict[tuple[RecordedData, Preprocessing | None, int | None], list[Judged]] = {}
    for one in judged:
        wanted = data_for(one, asked)
        if wanted not in data_sets:
            data_sets[wanted] = wanted.load()
        one = one._replace(notes=[*one.notes, *split_note(one, wanted)])
        own = own_test(one.source, one.record, data_sets[wanted]) if asked.image_size is None else None
        groups.setdefault((wanted, own, as_it_taught(one, loaded, "teacher_image_size")), []).append(one)
    for (wanted, own, size), members in groups.items():
        data, how = (data_sets[wanted], "") if own is None else shown_as(own, data_sets[wanted])
        for one in members:
            check_size(one, data)
        of_teacher = check_teacher(loaded, data, members) if loaded else ()
        unknown = [(*check_classes(one, data), *note_of_teacher(one, loaded), *of_teacher) for one in members]
        members = [one._replace(notes=[*one.notes, *more]) for one, more in zip(members, unknown, strict=True)]
        yield Group(members, data, wanted.folder, how, size)


def check_classes(judged: Judged, data: ImageData) -> Sequence[str]:
    """Raise `UserError` where a network's classes are not those of the data; a sentence where nobody can tell, and one
    where nobody can tell its normalisation."""
    classes = judged.record.get("classes")
    number = judged.record.get("num_classes")
    number = classes and len(classes) if number is None else number
    if number is not None and number != data.num_classes:
        raise UserError(f"--data: {judged.source} has {count_of(number, 'class')}, the data {data.num_classes}")
    own = read_preprocessing(judged.source)
    known = classes or (own and own.categories)
    others = compare_classes(known, data.classes)
    if others is not None:
        raise UserError(f"--data: {judged.source}: {others}")
    unknown = matched_by_position(known, data.classes)
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


def note_of_teacher(judged: Judged, loaded: Network | None) -> Sequence[str]:
    """Says where a network did not learn from the teacher that it is compared with, or not from that alone."""
    record = judged.record
    own = {"name": record.get("model_t"), "digest": record.get("teacher_digest")} | dict(record.get("teacher") or {})
    if loaded is None or own["digest"] in (None, loaded.digest):
        return ()
    several = len(str(own["name"]).split(","))
    its = f"{several} teachers together" if several > 1 else "another teacher"
    return [f"its run had {its}: {own['name']} (digest {own['digest']})"]


def check_teacher(loaded: Network, data: ImageData, members: Sequence[Judged]) -> Sequence[str]:
    """What there is to say of the teacher of these networks; raises `UserError` where its logits, which are compared
    where it has as many classes as the data, are of others."""
    classes = classes_of_logits(loaded) if loaded.num_classes == data.num_classes else []
    others = compare_classes(classes, data.classes)
    if others is not None:
        raise UserError(f"--teacher: {loaded.path}: {others}")
    usual = None if any(one.record.get("normalisation") for one in members) else data.name
    notes = (
        *loaded.notes,
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
    theirs = None if teacher is None else check_finite(torch.cat(logits), f"--teacher: {teacher.loaded.path}")
    return Tested(torch.cat(index), torch.cat(targets), theirs)


def name_of(data: ImageData, sample: int) -> str:
    """An image's file, or its number in the test split."""
    return data.test.name_of(sample) if isinstance(data.test, StreamedImages) else f"test image {sample}"


def measure_all(
    group: Group, loaded: Network | None, device: torch.device, batch: int
) -> Iterator[tuple[Judged, dict[str, Any]]]:
    """The networks of a group, each with its numbers, and where there is a teacher with how it compares with that."""
    teacher = Teacher(loaded, group.data, group.teacher_size, Fast(), device) if loaded else None
    seen = [Seen(one) for one in group.members]
    tested = test(seen, teacher, group.data, device, batch)
    for one in seen:
        about = measure(one, tested, teacher, group.data) | {"data": group.folder}
        yield one.judged, about | ({"test_transform": group.how} if group.how else {})


def measure(seen: Seen, tested: Tested, teacher: Teacher | None, data: ImageData) -> dict[str, Any]:
    """Everything that is said of a network, as JSON can hold it."""
    judged, record = seen.judged, seen.judged.record
    logits = check_finite(seen.logits, f"{NETWORK}: {judged.source}")
    if tested.teacher_logits is not None and tested.teacher_logits.shape != logits.shape:
        tested = tested._replace(teacher_logits=None)  # of other classes
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
    confidence = logits.double().softmax(1).amax(1)
    about["worst_errors"] = _shown(confidence, logits.argmax(1) != tested.targets, logits, tested, data)
    if teacher is None:
        return about
    loaded = teacher.loaded
    about["teacher"] = {"network": loaded.path, "model": loaded.name, "digest": loaded.digest}
    cka = {"cka_unfolded": seen.cka_unfolded if seen.folds else None, "cka": seen.cka if judged.network else None}
    about |= {name: value for name, one in cka.items() if one and (value := one.value()) is not None}
    if tested.teacher_logits is not None:
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
        if tested.teacher_logits is not None:
            one["teacher"] = data.classes[int(tested.teacher_logits[row].argmax())]
        found.append(one)
    return found
