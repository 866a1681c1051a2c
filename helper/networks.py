"""Networks from files: teachers and initial weights, read by one function, checked, frozen."""

import copy
import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy
import torch
from torch import Tensor, nn

from dataset import VIEWS, Batch, Centre, ImageData, RowCache, differences
from dataset.cache import EVERY
from errors import UserError
from helper.checkpoint import AVERAGE, contained, take_average, upgrade
from helper.distributed import count_processes
from helper.fast import Fast
from helper.recipes import PUBLISHED_TEACHERS
from helper.settings import all_settings, sources_of
from models import model_dict
from models.backbone import Backbone, Output, probe_shapes, select_classes
from models.checkpoints import (
    build_with,
    find_weights,
    identify,
    load_exported,
    load_initial,
    read_checkpoint,
    weights_digest,
)
from models.classes import compare_classes
from models.ensemble import Ensemble
from models.external import is_external
from models.found import locate_weights, recorded_accuracy
from models.preprocessing import Preprocessing, TeacherView, read_preprocessing
from models.published import published_name, read_timm, read_torchvision
from models.wrappers import added_layers, describe_wrapper
from setting import as_text

#: How far, in points of accuracy, a teacher may be from its recorded or published accuracy.
TEACHER_TOLERANCE = 0.5
#: Between the classes of `--teacher_classes`; the last of them that a text holds is meant.
SEPARATORS = (",", ";", "\n")
INIT, INIT_NAME = "--init", "--model_s (in train_teacher.py: --model)"


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
        return {
            "path_t": self.path,
            "model_t": self.name,
            "wrapper_t": {"teachers": wrappers} if self.members and any(wrappers) else wrappers[0],
            "teacher_weights": self.network.shares if self.members else None,
            "teacher_digest": self.digest,
            "dataset": self.dataset,
            "data": self.data,
            "image_size": self.image_size,
        }


def read_teacher(path: str, model_t: str | None, ema: bool = False, weights: Sequence[float] | None = None) -> Network:
    """What `--path_t` and `--model_t` name; several teachers as one, with `weights`."""
    paths = sources_of(path)
    names = [None] * len(paths) if model_t is None else model_t.split(",")
    if len(names) != len(paths):
        raise UserError(f"--model_t: it names {len(names)} networks, --path_t {len(paths)}; name as many, or none")
    teachers = [read_network(*pair, "--path_t", "--model_t", ema) for pair in zip(paths, names, strict=True)]
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
        *(teachers[0].dataset, teachers[0].data, teachers[0].image_size),
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


def read_network(path: str, name: str | None, flag: str, name_flag: str, ema: bool = False) -> Network:
    """Read a run's checkpoint, an exported network, weights of any other code (of which `ema` takes the moving
    average), or published weights by name, `torchvision:NAME` or `timm:NAME`.

    `name` is the model's, where it is known. Raises `UserError`, naming `flag`, or `name_flag` where that would help.
    """
    if is_external(path):
        with naming(flag):
            return _with_digest(_read_published(path, name, name_flag))
    return network_in(upgrade(read_checkpoint(path, flag), f"{flag}: {path}"), path, name, flag, name_flag, ema)


def network_in(
    checkpoint: Mapping[str, Any], path: str, name: str | None, flag: str, name_flag: str, ema: bool = False
) -> Network:
    """The same of a file at `path` that was read already, and brought up to date by `checkpoint.upgrade`."""
    source = f"{flag}: {path}"
    with contained(f"{source} cannot be used"):
        notes: list[str] = []
        if "record" in checkpoint or "model_name" in checkpoint:
            if AVERAGE in checkpoint:
                checkpoint = take_average(checkpoint, source) if ema else checkpoint
                notes += ["it holds raw weights and their moving average; --ema takes the average"] * (not ema)
            else:
                notes += ["it is a file of this toolbox, which holds one set of weights: --ema changes nothing"] * ema
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


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Let a `UserError` of what knows no flags begin with the flag."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def _read_foreign(
    path: str, source: str, name: str | None, name_flag: str, checkpoint: Mapping[str, Any], ema: bool
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


def start_from(initial: Network, student: Backbone, model_s: str, classes: Sequence[str], dataset: str) -> str:
    """Give a new network its initial weights; returns lines on what was taken."""
    others = compare_classes(initial.record.get("classes"), classes)
    source = f"{INIT}: {initial.path}"
    takes_classifier = load_initial(student, model_s, initial.network, source, same_classes=others is None)
    counts = f"{initial.num_classes} classes there, {len(classes)} here"
    added = added_layers(initial.network)
    added = f"what its method added is left out ({', '.join(added)})" if added else ""
    reasons = "; ".join(filter(None, (others, added))) or counts
    new = f" but the classifier's, which is new: {reasons}"
    line = (
        f"{INIT} {initial.path}: all weights{'' if takes_classifier else new}; images are normalised with the mean and "
        f"deviation of {dataset}, whatever these weights were trained with"
    )
    return "\n".join([*initial.notes, line])


# The teacher of a run.


class FrozenTeacher(nn.Module):
    """A copy of a network that cannot be trained: in memory of its own, without parameters, always in eval mode."""

    def __init__(self, network: Backbone):
        super().__init__()
        self.network = copy.deepcopy(network)
        for module in self.network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
        self.eval()

    def train(self, mode: bool = True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, preact: bool = False) -> Output:
        return self.network.outputs(images, preact)


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


def read_at_classes(source: Network, wanted: str) -> Network:
    """The teacher with the columns of its classifier that `--teacher_classes` names, a name or number each.

    Raises `UserError` where a class is unknown.
    """
    if source.members:
        teachers = [read_at_classes(each, wanted) if each.num_classes else each for each in source.members]
        return _together(source.path, teachers, source.network.shares)
    names, known = _class_names(wanted), known_classes(source)
    numbers = {name: number for number, name in reversed(list(enumerate(known)))}
    columns = [numbers.get(name, int(name) if name.isdecimal() else -1) for name in names]
    for name, column in zip(names, columns, strict=True):
        if not 0 <= column < source.num_classes:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "numbers count from 0"
            raise UserError(f"--teacher_classes: the teacher has no class {name}; {hint}")
    with naming("--teacher_classes"), torch.no_grad():
        network = select_classes(source.network, columns)
    chosen = [known[column] for column in columns] if known else None
    record = {**source.record, "classes": chosen}
    note = f"the teacher is read at {len(columns)} of its {source.num_classes} classes (--teacher_classes)"
    return source._replace(
        network=network, num_classes=len(columns), record=record, notes=[*source.notes, note], accuracy=None
    )


def known_classes(source: Network) -> list[str]:
    """The names of a network's classes, in their order; empty where nobody says them."""
    if source.members:  # one order, the first one's, where their logits are averaged
        return known_classes(source.members[0])
    own = read_preprocessing(source.path)
    return list(own.categories if own is not None else source.record.get("classes") or ())


def classes_taught(source: Network) -> list[str]:
    """The classes that a student learns from a teacher's logits: their names, or their numbers."""
    known = known_classes(source)
    return known if len(known) == source.num_classes else [str(number) for number in range(source.num_classes)]


def as_it_was_trained(source: Network, data: ImageData, image_size: int | None) -> TeacherView | None:
    """The network behind a view that shows it the student's images in its own normalisation, and in its own size or
    `image_size`; None where that is how the images are, or where nobody says what is its own."""
    own = read_preprocessing(source.path)
    if own is not None:
        (mean, std), size, interpolation = (own.mean, own.std), own.image_size, own.interpolation
    else:
        record = source.record
        mean, std = tuple(record.get("mean") or data.mean), tuple(record.get("std") or data.std)
        size, interpolation = record.get("image_size") or data.image_size, "bilinear"
    size = image_size or size
    if (mean, std, size) == (tuple(data.mean), tuple(data.std), data.image_size):
        return None
    return TeacherView(source.network, data.mean, data.std, mean, std, size, interpolation)


def _views_of(
    teachers: Sequence[Network], data: ImageData, image_size: int | Sequence[int] | None
) -> list[TeacherView | None]:
    """The view of each teacher; `image_size` of `--teacher_image_size` is for all of them, or one for each."""
    sizes = list(image_size) if isinstance(image_size, Sequence) else [image_size] * len(teachers)
    if len(sizes) != len(teachers):
        raise UserError(f"--teacher_image_size: {len(sizes)} sizes for {len(teachers)} teachers; give one, or one each")
    return [as_it_was_trained(each, data, size) for each, size in zip(teachers, sizes, strict=True)]


def own_test(path: str, record: Mapping[str, Any], data: ImageData) -> Preprocessing | None:
    """How the library of the weights `path`, or the record of their run, tests them; None where nobody says, where the
    data are no image files, and where that is how they are tested here anyway."""
    own = read_preprocessing(path)
    mean, std, size = (record.get(name) for name in Preprocessing._fields[:3])
    if own is None and mean and std and size and not record.get("source_size"):
        resize = size + 2 * max(-(record.get("margin") or 0), 0)
        own = Preprocessing(tuple(mean), tuple(std), size, size, resize, "bilinear")
    if own is None or data.test_files is None:
        return None
    size = data.image_size
    here = (tuple(data.mean), tuple(data.std), size, size + 2 * max(-data.margin, 0), "bilinear", False)
    theirs = (own.mean, own.std, own.test_size, own.test_resize, own.interpolation, own.squashes)
    return None if theirs == here else own


def shown_as(own: Preprocessing, data: ImageData) -> tuple[ImageData, str]:
    """The data with their test images as `own_test` shows them, read from their files, and how that is, in words."""
    assert data.test_files is not None, "own_test is None without image files"
    cut = (own.test_resize - own.test_size) / 2
    files = data.test_files.seen_as(Centre(own.test_size, cut, data.background, own.interpolation, own.squashes))
    sides = "both sides" if own.squashes else "the shorter side"
    how = f"tested as its weights are: {sides} {own.test_resize}, centre {own.test_size}, {own.interpolation}"
    return data._replace(test=files, mean=own.mean, std=own.std, resized=None), how


class Teacher:
    """A teacher as runs compute it: frozen, in the chosen precision and layout, its pass on whole batches compiled."""

    def __init__(
        self,
        source: Network,
        data: ImageData,
        image_size: int | Sequence[int] | None,
        fast: Fast,
        device: torch.device,
    ):
        self.source, self.fast, self.device = source, fast, device
        views = _views_of(source.teachers, data, image_size)
        #: Whether it resizes the images as they are held, in place of those that are resized for the student.
        self.sees_source = data.resized is not None and any(views)
        if self.sees_source:  # all of them do then
            same = (data.mean, data.std, data.mean, data.std, data.image_size)
            pairs = zip(views, source.teachers, strict=True)
            views = [TeacherView(each.network, *same) if view is None else view for view, each in pairs]
        sizes = [data.image_size if view is None else view.image_size for view in views]
        self.image_size = sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
        networks = [each.network if view is None else view for view, each in zip(views, source.teachers, strict=True)]
        networks = [network.eval().to(device) for network in networks]
        # As their files hold them, for methods to read shapes and copy parts from.
        self.network = self._together(networks)
        probe_shapes(self.network, data.image_size)
        shown_size = data.train.image_size if self.sees_source else data.image_size
        prepared = [fast.prepare_teacher(network, shown_size) for network in networks]
        self.frozen = FrozenTeacher(self._together(prepared))
        self._compiled = fast.compiled(self.frozen.forward, outlives=True)
        self.accuracy: float | None = None  # (%), as measured on the test images
        self.note = ""  # lines on what it is and how accurate
        whose = [f"teacher {each.name}" for each in source.members] or ["the teacher"]
        lines = zip(whose, views, sizes, strict=True)
        self.seen = "\n".join(
            f"{who} sees {size}x{size}, with its own mean and std" for who, view, size in lines if view
        )

    def _together(self, networks: Sequence[Backbone]) -> Backbone:
        return Ensemble(networks, self.source.network.shares) if len(networks) > 1 else networks[0]

    def __call__(self, images: Tensor, preact: bool, is_whole: bool) -> Output:
        """The outputs for images (B, 3, H, W) of a batch that may be whole."""
        compute = self._compiled if is_whole else self.frozen
        with self.fast.autocast(self.device), self.fast.naming_compiler():
            return compute(images, preact)

    def teach(self, part: Batch, training: Any, epoch: int, preact: bool) -> Output:
        """The outputs for a micro-batch of an epoch, counted from 1 over the whole run, of the stage `training`."""
        return self(self.shown(part), preact, training.is_whole(part))

    def open_for(self, training: Any) -> str:
        """Prepare for the batches of a stage of a run; returns a line to say of that."""
        return ""

    def close(self) -> None:
        """Called after the last run."""

    def shown(self, batch: Batch) -> Tensor:
        """The images of a batch that the teacher is given."""
        return batch.images if batch.source is None or not self.sees_source else batch.source

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, K) for images (B, 3, H, W)."""
        return self(images, False, False).logits

    @torch.no_grad()
    def predict_alone(self, number: int, images: Tensor, as_tested: bool) -> Tensor:
        """Logits (B, K) of one of several teachers; images as the student's, or those that its own test shows."""
        with self.fast.autocast(self.device):
            if as_tested:
                return self.source.teachers[number].network(self.fast.lay_out(images))
            network = self.frozen.network
            if self.source.members:  # they are an `Ensemble` then
                network = cast(Ensemble, network).networks[number]
            return cast(Backbone, network).outputs(images).logits


def _difference(name: str, there: Any, here: Any) -> str:
    """What a cache differs in, as the flag that decides it where there is one; numbers of other things say nothing."""
    setting = all_settings().get(name)
    if setting is None or not setting.is_flag:
        return name.replace("_", " ")
    values = ("not given" if value is None else as_text(value) for value in (there, here))
    return "{} ({} there, {} here)".format(setting.names[0], *values)


class CachedTeacher(Teacher):
    """A teacher whose logits and pooled vectors are read from `folder` where they are there, and written where not.

    Of logits the `top_k` largest are kept, None: all of them. A sub-folder belongs to one teacher and to one way of
    showing the images; what decides either is in its description.
    """

    FLAG = "--cache_teacher"

    def __init__(
        self,
        source: Network,
        data: ImageData,
        image_size: int | None,
        fast: Fast,
        device: torch.device,
        folder: str,
        top_k: int | None = None,
    ):
        super().__init__(source, data, image_size, fast, device)
        if source.members:
            raise UserError(f"{self.FLAG}: it is for one teacher, not for the {len(source.members)} of --path_t")
        if count_processes() > 1:
            raise UserError(f"{self.FLAG}: it is for runs of one process; leave it out under torchrun")
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.FLAG}: {folder} cannot be made: {error.strerror}; name another place") from None
        shapes = probe_shapes(self.network, data.image_size)
        if top_k is not None and top_k >= shapes.num_classes:
            raise UserError(f"--cache_top_k: the teacher has {shapes.num_classes} classes; leave it out to keep all")
        self.folder, self.num_images, self.num_classes, self.top_k = (
            Path(folder),
            len(data.train.targets),
            shapes.num_classes,
            top_k,
        )
        self._widths = {f"top{top_k}" if top_k else "logits": 2 * top_k + 1 if top_k else shapes.num_classes}
        self._pooled_width = shapes.pooled
        self._caches: dict[Path, RowCache] = {}
        self._places: dict[tuple, tuple[Path, bool]] = {}  # by what is shown: the cache, and whether epochs differ

    def open_for(self, training):
        if "pooled" in training.method.reads:  # runs that share a pass share what is kept of it
            self._widths["pooled"] = self._pooled_width
        if training.batch_key in self._places:
            return ""
        description, varies = self._describe(training)
        digest = hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=8).hexdigest()
        path = self.folder / digest
        is_new, others = not path.exists(), differences(self.folder, description)
        self._places[training.batch_key] = path, varies
        cache = self._caches.setdefault(path, RowCache(path, description, self.num_images, self.FLAG))
        if is_new:
            parts = ", ".join(_difference(name, *values) for name, values in others.items())
            nearest = f"; the nearest there differs in {parts}" if parts else ""
            return f"{self.FLAG} {path}: new{nearest}"
        views, _ = VIEWS[training.method.views]
        epochs = min(cache.count_epochs(name, views * width) for name, width in self._widths.items())
        return f"{self.FLAG} {path}: {'every epoch' if epochs and not varies else f'epochs stored whole: {epochs}'}"

    def _describe(self, training: Any) -> tuple[dict[str, Any], bool]:
        """What decides the outputs for the images of an epoch, and whether that differs between epochs."""
        config, augmentation, plain = training.config, training.loader.augmentation, training.method.views == "plain"
        varies = augmentation.varies or not plain
        known = {name: config.get(name) for name, one in all_settings().items() if one.decides_outputs}
        if not varies:
            known.pop("data_seed")
        if augmentation.mixes or not plain:
            known["batch_size"] = config.batch_size
        view = None
        if isinstance(self.network, TeacherView):
            constants = [value.flatten().tolist() for value in (self.network.scale, self.network.shift)]
            view = [*constants, self.network.image_size, self.network.interpolation]
        known |= {"views": training.method.views, "holdout_of_stage": training.stage.holdout, "teacher_view": view}
        return known, varies

    def teach(self, part, training, epoch, preact):
        self.open_for(training)
        path, varies = self._places[training.batch_key]
        cache, index, at = self._caches[path], part.index.cpu().numpy(), epoch if varies else EVERY
        views = len(part.images) // len(index)
        is_once = len(numpy.unique(index)) == len(index)  # an unreadable image is replaced by another of the batch
        found = {
            name: cache.read(name, at, views * width, index) if is_once else None
            for name, width in self._widths.items()
        }
        stored = {name: _by_view(rows, views).to(self.device) for name, rows in found.items() if rows is not None}
        if stored.keys() == found.keys():
            kept = stored
        else:
            kept = self._kept(super().teach(part, training, epoch, preact))
            for name, values in kept.items() if is_once else ():
                cache.write(name, at, index, _by_image(values, views))
        return self._output(kept)

    def _kept(self, output: Output) -> dict[str, Tensor]:
        """What is stored of an output, each (V * B, width) float32."""
        logits = output.logits.float()
        if self.top_k is None:
            kept = {"logits": logits}
        else:
            values, classes = logits.topk(self.top_k, 1)
            rest = logits.scatter(1, classes, -torch.inf).logsumexp(1, keepdim=True)
            rest = rest - math.log(self.num_classes - self.top_k)
            kept = {f"top{self.top_k}": torch.cat([values, classes.float(), rest], 1)}
        return kept | ({"pooled": output.pooled.float()} if "pooled" in self._widths else {})

    def _output(self, kept: dict[str, Tensor]) -> Output:
        """What was stored, as an output without maps. Classes that were not stored share one logit: their probability
        at temperature 1 is the same for each, and that of the others is the teacher's."""
        if self.top_k is None:
            logits = kept["logits"]
        else:
            values, classes, rest = kept[f"top{self.top_k}"].split([self.top_k, self.top_k, 1], 1)
            logits = rest.repeat(1, self.num_classes).scatter(1, classes.long(), values)
        absent: Any = None
        pooled: Any = kept.get("pooled")
        return Output([], absent, absent, pooled, logits)

    def close(self):
        for cache in self._caches.values():
            if cache.refusal:
                print(f"{self.FLAG} {cache.folder}: what was missing was not stored: {cache.refusal}")
            cache.close()


def _by_view(rows: numpy.ndarray, views: int) -> Tensor:
    """Rows (B, V * width) -> (V * B, width), view by view."""
    return torch.from_numpy(rows).unflatten(1, (views, -1)).transpose(0, 1).flatten(0, 1)


def _by_image(values: Tensor, views: int) -> numpy.ndarray:
    """Values (V * B, width), view by view -> rows (B, V * width)."""
    return values.unflatten(0, (views, -1)).transpose(0, 1).flatten(1).cpu().numpy()


def check_accuracy(teacher: Network, dataset: str, accuracy: float, allow_gap: bool) -> str:
    """One line on the measured accuracy (%) and the recorded one; raises `UserError` where they are far apart."""
    if teacher.accuracy is None or teacher.dataset != dataset:
        return f"teacher {teacher.name}: {accuracy:.2f} % (no accuracy recorded for {dataset})"
    gap = abs(accuracy - teacher.accuracy)
    if gap > TEACHER_TOLERANCE and not allow_gap:
        raise UserError(
            f"--path_t: {teacher.path} tests at {accuracy:.2f} % on {dataset}, {gap:.2f} points off the "
            f"{teacher.accuracy:.2f} % on record; get the right file, or accept it with --allow_teacher_gap"
        )
    return f"teacher {teacher.name}: {accuracy:.2f} % (on record: {teacher.accuracy:.2f} %)"


def check_apart(student: nn.Module, teacher: nn.Module, distill: str) -> None:
    """Raise `UserError` where a method or its student would train or change what is the teacher's."""
    theirs = {tensor.untyped_storage().data_ptr() for tensor in teacher.state_dict().values() if tensor.numel()}
    for name, tensor in student.state_dict().items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in theirs:
            raise UserError(f"--distill {distill}: its {name} is the teacher's own; the method must copy it")
