"""The teacher of runs: frozen, shown the images as its weights were trained, its outputs kept or computed."""

import copy
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn

from dataset import VIEWS, Batch, Centre, ImageData, RowCache, differences
from dataset.cache import EVERY
from errors import UserError, count_of
from helper.distributed import count_processes
from helper.fast import Fast
from helper.networks import Network
from helper.settings import all_settings
from models.backbone import Backbone, Output, probe_shapes
from models.ensemble import Ensemble
from models.preprocessing import Preprocessing, TeacherView, read_preprocessing
from setting import as_text, what_hinders

#: How far, in points of accuracy, a teacher may be from its recorded or published accuracy.
TEACHER_TOLERANCE = 0.5


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


def as_it_was_trained(loaded: Network, data: ImageData, image_size: int | None) -> TeacherView | None:
    """The network behind a view that shows it the student's images in its own normalisation, and in its own size or
    `image_size`; None where that is how the images are, or where nobody says what is its own."""
    own = read_preprocessing(loaded.path)
    if own is not None:
        (mean, std), size, interpolation = (own.mean, own.std), own.image_size, own.interpolation
    else:
        record = loaded.record
        mean, std = tuple(record.get("mean") or data.mean), tuple(record.get("std") or data.std)
        size, interpolation = record.get("image_size") or data.image_size, "bilinear"
    size = image_size or size
    if (mean, std, size) == (tuple(data.mean), tuple(data.std), data.image_size):
        return None
    return TeacherView(loaded.network, data.mean, data.std, mean, std, size, interpolation)


def _views_of(
    teachers: Sequence[Network], data: ImageData, image_size: int | Sequence[int] | None
) -> list[TeacherView | None]:
    """The view of each teacher; `image_size` of `--teacher_image_size` is for all of them, or one for each."""
    sizes = list(image_size) if isinstance(image_size, Sequence) else [image_size] * len(teachers)
    if len(sizes) != len(teachers):
        given = f"{count_of(len(sizes), 'size')} for {count_of(len(teachers), 'teacher')}"
        raise UserError(f"--teacher_image_size: {given}; give one, or one each")
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
    """A teacher as runs compute it: frozen, in the chosen precision and layout, its pass on whole batches compiled.

    `loaded` is what its files hold.
    """

    def __init__(
        self,
        loaded: Network,
        data: ImageData,
        image_size: int | Sequence[int] | None,
        fast: Fast,
        device: torch.device,
    ):
        self.loaded, self.fast, self.device = loaded, fast, device
        views = _views_of(loaded.teachers, data, image_size)
        #: Whether it resizes the images as they are held, in place of those that are resized for the student.
        self.sees_original = data.resized is not None and any(views)
        if self.sees_original:  # all of them do then
            same = (data.mean, data.std, data.mean, data.std, data.image_size)
            pairs = zip(views, loaded.teachers, strict=True)
            views = [TeacherView(each.network, *same) if view is None else view for view, each in pairs]
        sizes = [data.image_size if view is None else view.image_size for view in views]
        self.image_size = sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
        networks = [each.network if view is None else view for view, each in zip(views, loaded.teachers, strict=True)]
        networks = [network.eval().to(device) for network in networks]
        # As their files hold them, for methods to read shapes and copy parts from.
        self.network = self._together(networks)
        probe_shapes(self.network, data.image_size)
        shown_size = data.train.image_size if self.sees_original else data.image_size
        prepared = [fast.prepare_teacher(network, shown_size) for network in networks]
        self.frozen = FrozenTeacher(self._together(prepared))
        self._compiled = fast.compiled(self.frozen.forward, outlives=True)
        self.accuracy: float | None = None  # (%), as measured on the test images
        self.note = ""  # lines on what it is and how accurate
        whose = [f"teacher {each.name}" for each in loaded.members] or ["the teacher"]
        lines = zip(whose, views, sizes, strict=True)
        self.seen = "\n".join(
            f"{who} sees {size}x{size}, with its own mean and std" for who, view, size in lines if view
        )

    def _together(self, networks: Sequence[Backbone]) -> Backbone:
        return Ensemble(networks, self.loaded.network.shares) if len(networks) > 1 else networks[0]

    def record(self) -> dict[str, Any]:
        """What the checkpoint of a student says of its teacher."""
        counts = [each.num_classes for each in self.loaded.teachers]
        return {
            "name": self.loaded.name,
            "digest": self.loaded.digest,
            "accuracy": self.accuracy,
            "num_classes": counts if self.loaded.members else counts[0],
        }

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
        return batch.images if batch.original is None or not self.sees_original else batch.original

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, K) for images (B, 3, H, W)."""
        return self(images, False, False).logits

    @torch.no_grad()
    def predict_alone(self, number: int, images: Tensor, as_tested: bool) -> Tensor:
        """Logits (B, K) of one of several teachers; images as the student's, or those that its own test shows."""
        with self.fast.autocast(self.device):
            if as_tested:
                return self.loaded.teachers[number].network(self.fast.lay_out(images))
            network = self.frozen.network
            if self.loaded.members:  # they are an `Ensemble` then
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
        loaded: Network,
        data: ImageData,
        image_size: int | None,
        fast: Fast,
        device: torch.device,
        folder: str,
        top_k: int | None = None,
    ):
        super().__init__(loaded, data, image_size, fast, device)
        if loaded.members:
            raise UserError(f"{self.FLAG}: it is for one teacher, not for the {len(loaded.members)} of --path_t")
        if count_processes() > 1:
            raise UserError(f"{self.FLAG}: it is for runs of one process; leave it out under torchrun")
        # It is made with its first sub-folder: what is refused until then leaves none. One that is there may be read.
        if not os.path.isdir(folder) and (reason := what_hinders(Path(folder))):
            raise UserError(f"{self.FLAG}: {reason}")
        shapes = probe_shapes(self.network, data.image_size)
        if top_k is not None and top_k >= shapes.num_classes:
            has = count_of(shapes.num_classes, "class")
            raise UserError(f"--cache_top_k: the teacher has {has}; leave it out to keep all")
        self.folder, self.top_k = Path(folder), top_k
        self.num_images, self.num_classes = len(data.train.targets), shapes.num_classes
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
        config, augmentation, plain = training.config, training.augmentation, training.method.views == "plain"
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
