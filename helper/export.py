"""A trained network as a file for other programs: `.pth`, `.safetensors`, torch.export's `.pt2`, ONNX; and reading any
of them again.

Every file says of itself what the network was trained on: class names, normalisation, image size (the record). The
networks take normalised images (B, 3, H, W), of any B, and give logits (B, K); programs may have the normalisation and
the softmax inside (`Program`).
"""

import importlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from dataset import OF_IMAGE_FILES, ImageData, describe_preparation, load_data
from dataset.decoding import WHITE
from errors import UserError, count_of, first_line
from helper.run_folder import save
from helper.settings import default_of
from models.backbone import Backbone
from models.checkpoints import load_exported, read_checkpoint
from models.files import RECORD
from models.record import check_record

#: The entries of the record without which an image file cannot be brought to the network.
NEEDED = ("classes", "mean", "std", "image_size")
#: Images that a file is calibrated with at once, and what is quantised of its operations.
CALIBRATION_BATCH = 32
QUANTISED = ("Conv", "Gemm", "MatMul", "Add", "Relu", "GlobalAveragePool", "AveragePool", "MaxPool")
#: The first opset that torch's exporter writes.
OLDEST_OPSET = 18
CPU = torch.device("cpu")


class Deployed(NamedTuple):
    """A network that was read from a file: `predict` maps normalised images (B, 3, H, W) to logits (B, K)."""

    predict: Callable[[Tensor], Tensor]
    record: dict


class RecordedData(NamedTuple):
    """The data set of a network, as its record has it; what is given explicitly replaces that."""

    dataset: str
    folder: str | None
    image_size: int
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None
    background: tuple[int, int, int]
    split: float
    holdout: int
    may_download: bool  # only to a folder that a person has named
    judges: tuple[str, ...] | None = None  # as `Reading` has it

    @classmethod
    def of(
        cls,
        record: Mapping,
        dataset: str | None = None,
        folder: str | None = None,
        image_size: int | None = None,
        split: float | None = None,
    ) -> "RecordedData":
        """The data that a record names, or `dataset` and `folder`, which have splits of their own; `split` is given."""
        is_recorded = dataset is None and folder is None
        name, place = dataset or record.get("dataset") or default_of("dataset"), folder or record.get("data")
        size = image_size or record.get("image_size") or (224 if name == "imagenet" else 32)
        mean, std = record.get("mean"), record.get("std")
        normalisation = (tuple(mean), tuple(std)) if mean and std else None
        splits = (record.get("split") or 0.0, record.get("holdout") or 0) if is_recorded else (0.0, 0)
        if split and name not in OF_IMAGE_FILES:
            known = " or ".join(OF_IMAGE_FILES)
            raise UserError(f"--split: has no effect with --dataset {name}; leave it out, or take --dataset {known}")
        splits = splits if split is None else (split, splits[1])
        background = cast(tuple[int, int, int], tuple(record.get("background") or WHITE))
        return cls(name, place, size, normalisation, background, *splits, place is None or folder is not None)

    def load(self) -> ImageData:
        """The data set, its files read from the disk as they are needed; raises `UserError`."""
        return load_data(
            self.dataset,
            self.folder,
            self.image_size,
            num_workers=default_of("num_workers"),
            max_broken=sys.maxsize,
            may_download=self.may_download,
            background=self.background,
            stream=True,
            split=self.split,
            holdout=self.holdout,
            normalisation=self.normalisation,
            judges=self.judges,
        )


class Program(NamedTuple):
    """How a program, a `.pt2` or ONNX file, is called besides being shown normalised images and giving logits."""

    pixels: bool = False  # it takes uint8 (B, 3, H, W) and normalises them itself
    probabilities: bool = False  # it ends with the softmax
    opset: int | None = None  # of ONNX; None: the exporter's own

    @classmethod
    def of(cls, record: Mapping) -> "Program":
        """What a program's record says."""
        return cls(record.get("input") == "pixels", record.get("output") == "probabilities")

    def recorded(self, record: Mapping) -> dict:
        """The record of a program: how images are prepared for it belongs to what it takes."""
        prepared = {"images": describe_preparation(dict(record), not self.pixels)} if "images" in record else {}
        return {**record, **prepared, "input": self.input, "output": self.output}

    @property
    def input(self) -> str:
        return "pixels" if self.pixels else "images"

    @property
    def output(self) -> str:
        return "probabilities" if self.probabilities else "logits"


#: A program as the formats were before there was a choice.
PLAIN = Program()


class Whole(nn.Module):
    """A network with what its `Program` has inside: uint8 or normalised images (B, 3, H, W) -> (B, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, record: Mapping, program: Program):
        super().__init__()
        self.network, self.program = network, program
        self.eval()
        if program.pixels:
            mean, std = _statistics(record)
            self.register_buffer("mean", mean)
            self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        if self.program.pixels:
            images = (images.float() / 255 - self.mean) / self.std
        logits = self.network(images)
        return logits.softmax(1) if self.program.probabilities else logits


def _statistics(record: Mapping) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(record[name], dtype=torch.float32).view(3, 1, 1) for name in ("mean", "std"))
    return mean, std


def to_pixels(images: Tensor, record: Mapping) -> Tensor:
    """Normalised images -> the uint8 pixels that they were, or the nearest."""
    mean, std = _statistics(record)
    return ((images.cpu() * std + mean) * 255).round().clamp(0, 255).byte()


def as_logits(predict: Callable[[Tensor], Tensor], record: Mapping) -> Callable[[Tensor], Tensor]:
    """A program that is called as every `Deployed`: normalised images -> logits, up to a constant per image."""
    program = Program.of(record)
    if program == PLAIN:
        return predict

    def call(images: Tensor) -> Tensor:
        output = predict(to_pixels(images, record) if program.pixels else images)
        return output.clamp_min(torch.finfo(output.dtype).tiny).log() if program.probabilities else output

    return call


def write_pth(network: nn.Module, record: Mapping, path: str, program: Program = PLAIN) -> None:
    """Weights under `model` and the `record`, as a run's checkpoint has them; `load_exported` reads them."""
    save({"model": network.state_dict(), "record": dict(record)}, path)


def write_safetensors(network: nn.Module, record: Mapping, path: str, program: Program = PLAIN) -> None:
    """The weights by their names, and the record as metadata."""
    safetensors = _need("safetensors.torch", format="safetensors")
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    Path(path).write_bytes(safetensors.save(weights, {RECORD: json.dumps(record)}))


def write_pt2(network: nn.Module, record: Mapping, path: str, program: Program = PLAIN) -> None:
    """A program by `torch.export`, for `torch.export.load` or AOTInductor; needs none of this project's code.

    Raises `UserError` where torch cannot write the network.
    """
    with _exporting("pt2", record):
        exported = torch.export.export(*_traced(network, record, program), dynamic_shapes=_any_batch())
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
    content = io.BytesIO()
    with _without_warnings():
        torch.export.save(exported, content, extra_files={RECORD: json.dumps(program.recorded(record))})
    Path(path).write_bytes(content.getvalue())


def write_onnx(network: nn.Module, record: Mapping, path: str, program: Program = PLAIN) -> None:
    """An ONNX file whose input and output are called as `Program` says; the record is in its metadata_props.

    Raises `UserError` where torch cannot write the network or the opset.
    """
    _need("onnxscript")
    newest = _need("onnx").defs.onnx_opset_version()
    if program.opset is not None and not OLDEST_OPSET <= program.opset <= newest:
        raise UserError(f"--opset: {program.opset} cannot be written here; choose {OLDEST_OPSET} to {newest}")
    names: dict[str, Any] = {"input_names": [program.input], "output_names": [program.output]}
    if program.opset is not None:
        names["opset_version"] = program.opset
    with _exporting("onnx", record):
        whole, images = _traced(network, record, program)
        model: Any = torch.onnx.export(whole, images, dynamo=True, verbose=False, dynamic_shapes=_any_batch(), **names)
        if isinstance(model.model.graph.inputs[0].shape[0], int):
            raise ValueError(
                "it reads the size of a batch as a number, and would be written for that alone: x.shape[0] in its code "
                "keeps it open, len(x) does not"
            )
    for node in model.model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names files of this machine
    model.model.metadata_props[RECORD] = json.dumps(program.recorded(record))
    model.save(path, external_data=False)
    opset, _ = onnx_versions(path)
    if program.opset not in (None, opset):
        raise UserError(f"--opset: this torch cannot write this network in opset {program.opset} but in {opset}")


def onnx_versions(path: str) -> tuple[int, int]:
    """The opset of an ONNX file, and its IR version."""
    model = _need("onnx").load(path, load_external_data=False)
    return next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), model.ir_version


def write_int8(source: str, path: str, images: Tensor) -> None:
    """An ONNX file quantised to 8 bits (onnxruntime, static, QDQ, weights per channel), calibrated on normalised images
    (n, 3, H, W); of its program only convolutions, linear layers and what is between them are quantised."""
    quantization = _need("onnxruntime.quantization", "onnx")
    shapes = importlib.import_module("onnxruntime.quantization.shape_inference")
    model = read_onnx(source)
    program = Program.of(model.record)
    shown = to_pixels(images, model.record) if program.pixels else images
    batches = iter([{program.input: part.numpy()} for part in shown.split(CALIBRATION_BATCH)])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self):
            return next(batches, None)

    prepared = f"{path}.prepared"
    try:
        with _without_warnings():
            shapes.quant_pre_process(source, prepared)
            quantization.quantize_static(
                prepared, path, Reader(), per_channel=True, op_types_to_quantize=list(QUANTISED)
            )
    finally:
        Path(prepared).unlink(missing_ok=True)


def read_pth(path: str, flag: str = "MODEL", device: torch.device = CPU) -> Deployed:
    """Read what `write_pth` or `write_safetensors` wrote."""
    network, record = load_exported(read_checkpoint(path, flag), f"{flag}: {path}")
    check_classifies(network, f"{flag}: {path}")
    network = network.to(device)
    return Deployed(lambda images: network(images.to(device)).cpu(), record)


def check_classifies(network: Backbone, source: str) -> None:
    """Raise `UserError` for a network without a classifier: it gives no logits."""
    if not network.num_classes:
        raise UserError(
            f"{source} has no classifier: it is an encoder, whose features are no classes to export, predict or judge; "
            "train a classifier on it with --init, or let it teach (--path_t)"
        )


def check_finite(logits: Tensor, source: str) -> Tensor:
    """The logits (n, K) of a network; raises `UserError` where some are not finite, of which the largest would still
    be taken for a class."""
    if bad := int((~logits.isfinite()).any(1).sum()):
        raise UserError(
            f"{source}: its logits of {bad} of {count_of(len(logits), 'image')} are not finite; its training diverged, "
            "or the file is damaged: take another"
        )
    return logits


def read_pt2(path: str, flag: str = "MODEL", device: torch.device = CPU) -> Deployed:
    """Read what `write_pt2` wrote. Only for files of one's own: torch.export.load may run code that a file holds."""
    extra = {RECORD: ""}
    try:
        with open(path, "rb") as file, _without_warnings():
            program = torch.export.load(file, extra_files=extra)
            module = (program if device == CPU else move_to_device_pass(program, device)).module()
    except Exception as error:  # torch raises whatever its parsers do
        raise _unreadable(path, flag, error) from None
    record = _read_record(extra[RECORD], path, flag)
    return Deployed(as_logits(lambda images: module(images.to(device)).cpu(), record), record)


def read_onnx(path: str, flag: str = "MODEL", device: torch.device = CPU) -> Deployed:
    """Read what `write_onnx` wrote, with onnxruntime; on CUDA where its package for GPUs is installed."""
    runtime = _need("onnxruntime")
    provider = f"{device.type.upper()}ExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise UserError(f"--device: onnxruntime has no {provider} here; take --device cpu, or install onnxruntime-gpu")
    try:
        session = runtime.InferenceSession(Path(path).read_bytes(), providers=[provider])
    except Exception as error:  # onnxruntime has exceptions of its own for every kind of damage
        raise _unreadable(path, flag, error) from None
    record = _read_record(session.get_modelmeta().custom_metadata_map.get(RECORD), path, flag)
    program = Program.of(record)
    names = [[one.name for one in ends] for ends in (session.get_inputs(), session.get_outputs())]
    if names != [[program.input], [program.output]]:
        raise UserError(
            f"{flag}: {path} is damaged: it says that it takes {program.input} and gives {program.output}, but takes "
            f"{', '.join(names[0])} and gives {', '.join(names[1])}"
        )

    def predict(images: Tensor) -> Tensor:
        (output,) = session.run([program.output], {program.input: images.numpy()})
        return torch.from_numpy(output)

    return Deployed(as_logits(predict, record), record)


#: Writer and reader by the name of the format, which is the file's suffix too.
FORMATS = {
    "pth": (write_pth, read_pth),
    "safetensors": (write_safetensors, read_pth),
    "pt2": (write_pt2, read_pt2),
    "onnx": (write_onnx, read_onnx),
}
#: Those that hold a program, which may have more than the network inside.
PROGRAMS = ("pt2", "onnx")


def read_deployed(path: str, flag: str = "MODEL", device: torch.device = CPU) -> Deployed:
    """Read an exported network of any format, by its suffix; raises `UserError`."""
    suffix = Path(path).suffix.lstrip(".").lower()
    if Path(path).is_dir():
        raise UserError(f"{flag}: {path} is a folder; name a file in it, for example {path}/last.pth")
    if not Path(path).is_file():
        raise UserError(f"{flag}: there is no file {path}; scripts/export_student.py writes such files")
    if suffix not in FORMATS:
        raise UserError(f"{flag}: {path} is no .{', .'.join(FORMATS)} file; scripts/export_student.py writes them")
    _, read = FORMATS[suffix]
    return read(path, flag, device)


def _traced(network: nn.Module, record: Mapping, program: Program) -> tuple[nn.Module, tuple[Tensor]]:
    """What an exporter runs: (the module, its arguments)."""
    size = record["image_size"]
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8 if program.pixels else torch.float32)
    return network.eval() if program == PLAIN else Whole(network, record, program), (images,)


def _any_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


def _without_warnings() -> warnings.catch_warnings:
    """What torch warns of in its own exporters is nothing that the person at the terminal can change."""
    return warnings.catch_warnings(action="ignore")


@contextmanager
def _exporting(kind: str, record: Mapping) -> Iterator[None]:
    """Name the network that one of torch's exporters cannot write, in a `UserError`."""
    try:
        with _without_warnings(), torch.no_grad():
            yield
    except MemoryError:
        raise
    except Exception as error:  # they raise whatever their passes do, and wrap it several times
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(
            f"--format {kind}: torch {torch.__version__} cannot export {record.get('model_name', 'this network')} "
            f"({first_line(cause)}); choose another format, like pth or safetensors"
        ) from None


def _need(*modules: str, format: str = "onnx"):
    """Import optional libraries and return the first; raises `UserError` where one is missing."""
    try:
        return [importlib.import_module(module) for module in modules][0]  # noqa: RUF015  all of them are needed
    except ImportError as error:
        raise UserError(
            f"--format {format}: {error.name} is not installed; pip install -r requirements-extras.txt"
        ) from None


def _unreadable(path: str, flag: str, error: Exception) -> UserError:
    reason = first_line(error)
    return UserError(f"{flag}: {path} cannot be read (damaged, cut off or not by scripts/export_student.py): {reason}")


def _read_record(text: str | bytes | None, path: str, flag: str) -> dict:
    try:
        record = json.loads(text or "")
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{flag}: {path} does not say what it was trained on; was it written by export_student.py?")
    return check_record(record, f"{flag}: {path}")
