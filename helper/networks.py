"""Networks from files: teachers and initial weights, read by one function, checked, frozen."""

import difflib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from errors import UserError, count_of
from helper.checkpoint import AVERAGE, contained, take_average, upgrade
from helper.recipes import PUBLISHED_TEACHERS
from helper.settings import sources_of
from models import model_dict
from models.backbone import Backbone, select_classes
from models.checkpoints import (
    build_with,
    find_weights,
    identify,
    load_exported,
    load_initial,
    read_checkpoint,
    weights_digest,
)
from models.classes import compare_classes, matched_by_position
from models.ensemble import Ensemble
from models.external import is_external
from models.found import locate_weights, recorded_accuracy
from models.preprocessing import read_preprocessing
from models.published import published_name, read_timm, read_torchvision
from models.wrappers import added_layers, describe_wrapper

#: Between the classes of `--teacher_classes`; the last of them that a text holds is meant.
SEPARATORS = (",", ";", "\n")
INIT, INIT_NAME = "--init", "--model_s"
TEACHER_NORMALISATION = "--teacher_normalisation"


class Network(NamedTuple):
    """A network as its file describes it; fields are None where the file does not say."""

    path: str
    name: str
    network: Backbone
    num_classes: int
    dataset: str | None = None
    data: str | None = None
    image_size: int | None = None
    accuracy: float | None = None
    digest: str = ""
    record: Mapping[str, Any] = MappingProxyType({})  # everything that the file says
    notes: Sequence[str] = ()  # what was chosen or converted in reading it
    members: Sequence["Network"] = ()  # of several teachers each; `network` is their `Ensemble`

    @property
    def teachers(self) -> Sequence["Network"]:
        """Each of several teachers, or the one."""
        return self.members or (self,)

    def settings_as_teacher(self) -> dict[str, Any]:
        """The settings that this network decides where it teaches: what it is, and its data set."""
        wrappers = [describe_wrapper(each.network) for each in self.teachers]
        steps = [each.record.get("max_steps") for each in self.teachers]
        tried = min((number for number in steps if type(number) is int and 0 < number < 2**31), default=None)
        return {
            "path_t": self.path,
            "model_t": self.name,
            "wrapper_t": {"teachers": wrappers} if self.members and any(wrappers) else wrappers[0],
            "teacher_weights": self.network.shares if self.members else None,
            "teacher_digest": self.digest,
            "teacher_steps": tried,
            "dataset": self.dataset,
            "data": self.data,
            "image_size": self.image_size,
            "split": self.teachers[0].record.get("split") or None,
        }


def read_teacher(
    path: str,
    model_t: str | None,
    ema: bool = False,
    weights: Sequence[float] | None = None,
    normalisation: Sequence[float] | None = None,
) -> Network:
    """What `--path_t` and `--model_t` name, those whose file does not say its own with this `normalisation`; several
    teachers as one, with `weights`."""
    paths = sources_of(path)
    names = [None] * len(paths) if model_t is None else model_t.split(",")
    if len(names) != len(paths):
        named = count_of(len(names), "network")
        raise UserError(f"--model_t: it names {named}, --path_t {len(paths)}; name as many, or none")
    teachers = [read_network(*pair, "--path_t", "--model_t", ema) for pair in zip(paths, names, strict=True)]
    records = give_normalisation([(each.path, each.record) for each in teachers], normalisation, TEACHER_NORMALISATION)
    teachers = [each._replace(record=record) for each, record in zip(teachers, records, strict=True)]
    if len(teachers) > 1:
        return _together(path, teachers, weights)
    if weights is not None:
        raise UserError("--teacher_weights: --path_t names one teacher; leave it out, or name several with commas")
    return teachers[0]


def _together(path: str, teachers: Sequence[Network], weights: Sequence[float] | None) -> Network:
    """Several teachers as one, whose digest is that of the list; the data set is the first one's."""
    with naming("--teacher_weights"):
        network = Ensemble([each.network for each in teachers], weights)
    return Network(
        path,
        ",".join(each.name for each in teachers),
        network,
        network.num_classes,
        dataset=teachers[0].dataset,
        data=teachers[0].data,
        image_size=teachers[0].image_size,
        digest=digest_together([each.digest for each in teachers], network.shares),
        notes=[note for each in teachers for note in each.notes],
        members=tuple(teachers),
    )


def digest_together(digests: Sequence[str], shares: Sequence[float]) -> str:
    """The digest of several teachers in this order, given each one's and what it counts."""
    listed = "".join(f"{digest} {share:.6f}\n" for digest, share in zip(digests, shares, strict=True))
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def read_initial(source: str, model_s: str | None, ema: bool = False) -> Network:
    """What `--init` names."""
    return read_network(source, model_s, INIT, INIT_NAME, ema)


def read_network(path: str, name: str | None, flag: str, name_flag: str, ema: bool | None = False) -> Network:
    """Read a run's checkpoint, an exported network, weights of any other code (of which `ema` takes the moving
    average; None: no flag asks for it), or published weights by name, `torchvision:NAME` or `timm:NAME`.

    `name` is the model's, where it is known. Raises `UserError`, naming `flag`, or `name_flag` where that would help.
    """
    if is_external(path):
        with naming(flag):
            return _with_digest(_read_published(path, name, name_flag))
    return network_in(upgrade(read_checkpoint(path, flag), f"{flag}: {path}"), path, name, flag, name_flag, ema)


def network_in(
    checkpoint: Mapping[str, Any], path: str, name: str | None, flag: str, name_flag: str, ema: bool | None
) -> Network:
    """As `read_network`, of a file at `path` that was read already and brought up to date by `checkpoint.upgrade`."""
    source = f"{flag}: {path}"
    with contained(f"{source} cannot be used"):
        notes: list[str] = []
        if "record" in checkpoint or "model_name" in checkpoint:
            if AVERAGE in checkpoint and ema:
                checkpoint = take_average(checkpoint, source)
            elif AVERAGE in checkpoint:
                way = "the raw ones are taken" if ema is None else "--ema takes the average"
                notes.append(f"it holds raw weights and their moving average; {way}")
            elif ema:
                notes.append("it is a file of this toolbox, which holds one set of weights: --ema changes nothing")
            network, record = load_exported(checkpoint, source)
            found = record["model_name"]
        else:
            found, network, record, notes = _read_foreign(path, source, name, name_flag, checkpoint, ema)
    if name not in (None, found):
        raise UserError(f"{source} holds another architecture, {found}, than {name_flag} {name}")
    known: dict[str, Any] = {key: record.get(key) for key in ("dataset", "data", "image_size", "accuracy")}
    notes = [f"{path}: {note}" for note in notes]
    return _with_digest(Network(path, found, network, network.num_classes, record=record, notes=notes, **known))


def _with_digest(network: Network) -> Network:
    return network._replace(digest=weights_digest(network.network.state_dict()))


# The mean and deviation that weights were trained with.


def says_normalisation(path: str, record: Mapping[str, Any]) -> bool:
    """Whether the library of weights `path`, or their `record`, says the mean and deviation of their images."""
    return read_preprocessing(path) is not None or bool(record.get("mean") and record.get("std"))


def give_normalisation(
    known: Sequence[tuple[str, Mapping[str, Any]]], values: Sequence[float] | None, flag: str
) -> list[dict[str, Any]]:
    """The records of some weights, given (path, record) of each: where nobody says their mean and deviation those that
    `flag` names, `values` (6,), if any. Raises `UserError` where that would change nothing."""
    say = [says_normalisation(*one) for one in known]
    if values and all(say):
        raise UserError(f"{flag}: {known[0][0]} says its own mean and std; leave it out")
    given = {"mean": tuple(values[:3]), "std": tuple(values[3:])} if values else {}
    return [dict(record) | ({} if said else given) for (_, record), said in zip(known, say, strict=True)]


def note_of_normalisation(path: str, record: Mapping[str, Any], dataset: str | None, flag: str) -> str:
    """A sentence where nobody says the mean and deviation of weights, so that those of the data are taken; empty where
    they are known, as those of RepDistiller's teachers are on the data set whose usual ones the images have."""
    if says_normalisation(path, record) or (dataset is not None and record.get("dataset") == dataset):
        return ""
    return (
        f"{path} does not say its mean and std, so images have those of the data; {flag} names others ({flag} imagenet)"
    )


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Let a `UserError` of what knows no flags begin with the flag."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def _read_foreign(
    path: str, source: str, name: str | None, name_flag: str, checkpoint: Mapping[str, Any], ema: bool | None
) -> tuple[str, Backbone, dict[str, Any], list[str]]:
    """Weights of another code -> (the model's name, the network, what is known of it, what was converted)."""
    weights, notes = locate_weights(checkpoint, source, ema)
    name = name or _folder_model(path)
    if name is None:
        fitting = identify(weights)
        if len(fitting) != 1:
            raise UserError(f"{name_flag}: {path} does not say which model it holds; name it")
        name, notes = fitting[0], [*notes, f"it is recognised as {fitting[0]} by its weights"]
    network, more = build_with(name, weights, source)
    # RepDistiller's files do not name their data set; the ones with 100 classes are CIFAR-100's.
    record: dict[str, Any] = {"dataset": "cifar100" if name in model_dict and network.num_classes == 100 else None}
    published = PUBLISHED_TEACHERS.get((record["dataset"], name))
    recorded, converted = recorded_accuracy(checkpoint)
    # Only in RepDistiller's folder is it the published file; elsewhere it may be somebody's own.
    is_published = published is not None and (recorded is None or _folder_model(path) == name)
    record["accuracy"] = published if is_published else recorded
    return name, network, record, [*notes, *more, *converted]


def _read_published(source: str, model: str | None, name_flag: str) -> Network:
    library, _, weights_name = source.partition(":")
    name = published_name(source)
    if library == "timm":
        if model not in (None, name):
            raise UserError(f"{source} is another architecture, {name}, than {name_flag} {model}")
        network, record = read_timm(weights_name)
    else:
        checkpoint, record = read_torchvision(weights_name)
        name = model or name
        network, _ = build_with(name, find_weights(checkpoint, source), source)
    known: dict[str, Any] = {key: record.get(key) for key in ("dataset", "image_size", "accuracy")}
    return Network(source, name, network, network.num_classes, record=record, **known)


def _folder_model(path: str) -> str | None:
    """What RepDistiller's folders of published teachers say: they are called <model>_vanilla."""
    match = re.fullmatch(r"(.+)_vanilla", os.path.basename(os.path.dirname(os.path.abspath(path))))
    return None if match is None else match[1]


# Initial weights.


def name_of_published(source: str) -> str:
    """The model whose published weights `--init` names, found without a download."""
    with naming(INIT):
        return published_name(source)


def start_from(initial: Network, student: Backbone, model_s: str, classes: Sequence[str], normalised: str) -> str:
    """Give a new network its initial weights; returns lines on what was taken, and whose mean and deviation its images
    are normalised with."""
    known, source = initial.record.get("classes"), f"{INIT}: {initial.path}"
    others = compare_classes(known, classes)
    if load_initial(student, model_s, initial.network, source, same_classes=others is None):
        taken, unknown = "all weights", matched_by_position(known, classes)
    else:
        added = ", ".join(added_layers(initial.network))
        reasons = filter(None, (others, added and f"what its method added is left out ({added})"))
        counts = f"{count_of(initial.num_classes, 'class')} there, {len(classes)} here"
        taken, unknown = f"all weights but the classifier's, which is new: {'; '.join(reasons) or counts}", ""
    lines = [f"{taken}; images are normalised with the mean and deviation of {normalised}", *filter(None, (unknown,))]
    return "\n".join([*initial.notes, *(f"{INIT} {initial.path}: {line}" for line in lines)])


# The classes that a teacher's logits are of.


def with_class_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Given values, with names in place of the file that `--teacher_classes` may name: they are what is recorded."""
    if values.get("teacher_classes") is None:
        return dict(values)
    names = _class_names(values["teacher_classes"])
    fitting = (one for number, one in enumerate(SEPARATORS) if not set(SEPARATORS[number:]) & set("".join(names)))
    return {**values, "teacher_classes": next(fitting).join(names)}


def _class_names(wanted: str) -> list[str]:
    """The names or numbers in a text like a,b or, where names hold commas, a;b, or in the lines of a file."""
    if not os.path.isfile(wanted):
        separator = next((one for one in reversed(SEPARATORS) if one in wanted), None)
        return [name.strip() for name in wanted.split(separator or SEPARATORS[0])]
    with contained(f"--teacher_classes: {wanted}"), open(wanted, encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def read_at_classes(loaded: Network, wanted: str) -> Network:
    """The teacher with the columns of its classifier that `--teacher_classes` names, a name or number each.

    Raises `UserError` where a class is unknown.
    """
    if loaded.members:
        teachers = [read_at_classes(each, wanted) if each.num_classes else each for each in loaded.members]
        return _together(loaded.path, teachers, loaded.network.shares)
    names, known = _class_names(wanted), known_classes(loaded)
    numbers = {name: number for number, name in reversed(list(enumerate(known)))}
    columns = [numbers.get(name, int(name) if name.isdecimal() else -1) for name in names]
    for name, column in zip(names, columns, strict=True):
        if not 0 <= column < loaded.num_classes:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "numbers count from 0"
            raise UserError(f"--teacher_classes: the teacher has no class {name}; {hint}")
    with naming("--teacher_classes"), torch.no_grad():
        network = select_classes(loaded.network, columns)
    chosen = [known[column] for column in columns] if known else None
    record = {**loaded.record, "classes": chosen}
    note = f"the teacher is read at {len(columns)} of its {loaded.num_classes} classes (--teacher_classes)"
    return loaded._replace(
        network=network, num_classes=len(columns), record=record, notes=[*loaded.notes, note], accuracy=None
    )


def known_classes(loaded: Network) -> list[str]:
    """The names of a network's classes, in their order; empty where nobody says them."""
    if loaded.members:  # one order, the first one's, where their logits are averaged
        return known_classes(loaded.members[0])
    own = read_preprocessing(loaded.path)
    return list(own.categories if own is not None else loaded.record.get("classes") or ())


def classes_of_logits(loaded: Network) -> list[str]:
    """The names of the classes of a network's logits; empty where nobody says them."""
    names = loaded.record.get("classes") or known_classes(loaded)
    return list(names) if len(names) == loaded.num_classes else []


def classes_taught(loaded: Network) -> list[str]:
    """The classes that a student learns from a teacher's logits: their names, or their numbers."""
    known = known_classes(loaded)
    return known if len(known) == loaded.num_classes else [str(number) for number in range(loaded.num_classes)]
