"""A trained network as a file for other programs: `.pth`, torch.export's `.pt2`, ONNX; and reading any of them again.

Every file says of itself what the network was trained on: class names, normalisation, image size (the record). The
networks take normalised images (B, 3, H, W), of any B, and give logits (B, K).
"""

import importlib
import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError
from helper.run_folder import save
from models.backbone import Backbone
from models.checkpoints import load_exported, read_checkpoint

#: Under this name the record lies in a `.pt2` archive and in an ONNX file's metadata.
RECORD = "record.json"
#: The entries of the record without which an image file cannot be brought to the network.
NEEDED = ("classes", "mean", "std", "image_size")


class Deployed(NamedTuple):
    """A network that was read from a file: `predict` maps normalised images (B, 3, H, W) to logits (B, K)."""

    predict: Callable[[Tensor], Tensor]
    record: dict


def write_pth(network: nn.Module, record: Mapping, path: str) -> None:
    """Weights under `model` and the `record`, as a run's checkpoint has them; `load_exported` reads them."""
    save({"model": network.state_dict(), "record": dict(record)}, path)


def write_pt2(network: nn.Module, record: Mapping, path: str) -> None:
    """A program by `torch.export`, for `torch.export.load` or AOTInductor; needs none of this project's code."""
    program = _trace(network, record)
    content = io.BytesIO()
    with _without_warnings():
        torch.export.save(program, content, extra_files={RECORD: json.dumps(record)})
    Path(path).write_bytes(content.getvalue())


def write_onnx(network: nn.Module, record: Mapping, path: str) -> None:
    """An ONNX file with input `images` and output `logits`; the record's entries are its metadata_props."""
    _need("onnxscript", "onnx")
    program = _trace(network, record)
    with _without_warnings():
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        model: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    model.model.metadata_props[RECORD] = json.dumps(record)
    model.save(path, external_data=False)


def read_pth(path: str, flag: str = "MODEL") -> Deployed:
    """Read what `write_pth` wrote."""
    network, record = load_exported(read_checkpoint(path, flag), f"{flag}: {path}")
    check_classifies(network, f"{flag}: {path}")
    return Deployed(network, record)


def check_classifies(network: Backbone, source: str) -> None:
    """Raise `UserError` for a network without a classifier: it gives no logits."""
    if not network.num_classes:
        raise UserError(
            f"{source} was trained without labels and has no classifier, so there are no logits to export or to "
            "predict from; train one from it with --init, or let it teach (--path_t)"
        )


def read_pt2(path: str, flag: str = "MODEL") -> Deployed:
    """Read what `write_pt2` wrote. Only for files of one's own: torch.export.load may run code that a file holds."""
    extra = {RECORD: ""}
    try:
        with open(path, "rb") as file, _without_warnings():
            module = torch.export.load(file, extra_files=extra).module()
    except Exception as error:  # torch raises whatever its parsers do
        raise _unreadable(path, flag, error) from None
    return Deployed(module, _read_record(extra[RECORD], path, flag))


def read_onnx(path: str, flag: str = "MODEL") -> Deployed:
    """Read what `write_onnx` wrote, with onnxruntime on the CPU."""
    runtime = _need("onnxruntime")
    try:
        session = runtime.InferenceSession(Path(path).read_bytes(), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has exceptions of its own for every kind of damage
        raise _unreadable(path, flag, error) from None
    record = _read_record(session.get_modelmeta().custom_metadata_map.get(RECORD), path, flag)

    def predict(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return Deployed(predict, record)


#: Writer and reader by the name of the format, which is the file's suffix too.
FORMATS = {"pth": (write_pth, read_pth), "pt2": (write_pt2, read_pt2), "onnx": (write_onnx, read_onnx)}


def read_deployed(path: str, flag: str = "MODEL") -> Deployed:
    """Read an exported network of any format, by its suffix; raises `UserError`."""
    suffix = Path(path).suffix.lstrip(".").lower()
    if not Path(path).is_file():
        raise UserError(f"{flag}: there is no file {path}; scripts/export_student.py writes such files")
    if suffix not in FORMATS:
        raise UserError(f"{flag}: {path} is no .{', .'.join(FORMATS)} file; scripts/export_student.py writes them")
    _, read = FORMATS[suffix]
    return read(path, flag)


def _trace(network: nn.Module, record: Mapping) -> torch.export.ExportedProgram:
    size = record["image_size"]
    images = torch.zeros(2, 3, size, size)
    batch = torch.export.Dim("batch")
    with _without_warnings(), torch.no_grad():
        return torch.export.export(network.eval(), (images,), dynamic_shapes=({0: batch},))


def _without_warnings() -> warnings.catch_warnings:
    """What torch warns of in its own exporters is nothing that the person at the terminal can change."""
    return warnings.catch_warnings(action="ignore")


def _need(*modules: str):
    """Import optional libraries and return the first; raises `UserError` where one is missing."""
    try:
        return [importlib.import_module(module) for module in modules][0]  # noqa: RUF015  all of them are needed
    except ImportError as error:
        raise UserError(
            f"--format onnx: {error.name} is not installed; pip install -r requirements-extras.txt"
        ) from None


def _unreadable(path: str, flag: str, error: Exception) -> UserError:
    reason = (str(error).strip().split("\n") or [""])[0][:200] or type(error).__name__
    return UserError(f"{flag}: {path} cannot be read (damaged, cut off or not by scripts/export_student.py): {reason}")


def _read_record(text: str | bytes | None, path: str, flag: str) -> dict:
    try:
        record = json.loads(text or "")
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{flag}: {path} does not say what it was trained on; was it written by export_student.py?")
    return record
