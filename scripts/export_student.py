"""Write the plain network of a trained student: transform folded in, adapters and teacher left behind.

python scripts/export_student.py save/<run>/best.pth [--out FILE] [--format pth,onnx,pt2]

CKPT is a checkpoint of a run, or a student by the official NORM code. Each file that was written is read back and
compared with the trained network on real images before it takes its name.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import UserError, run_script, starting

with starting():
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    from dataset import Loader, load_data
    from distiller_zoo import Distiller, Predictor
    from helper.checkpoint import network_of, rebuild, rebuild_official, upgrade
    from helper.command_line import Parser
    from helper.export import FORMATS, check_classifies
    from helper.run_folder import replacing
    from models import imagenet_model_dict
    from models.backbone import Backbone
    from models.checkpoints import read_checkpoint
    from models.cost import count_parameters, measure_latency
    from models.wrappers import describe_wrapper, merge_branches

#: How many images both networks are compared on, and how far their logits may differ, relative to the largest.
COMPARED_IMAGES = 1000
TOLERANCE = 1e-3
#: How a file becomes the network's input, as every export says it.
IMAGES = (
    "turned as EXIF says; transparency on the background colour; shorter side resized with antialiasing to image_size "
    "- 2 * margin, centre crop, margin added in black (cut off where it is below 0); (pixel / 255 - mean) / std"
)


class Trained(NamedTuple):
    """A checkpoint's student as it was trained, and what its file says of it."""

    method: Distiller
    record: dict  # model_name, image_size, and where they are known data set, classes, normalisation, accuracy, ...


def read_trained(path: str, model_s: str | None, ft: str) -> Trained:
    """Read CKPT: a run's checkpoint, or a student of the official NORM code with or without its transform."""
    source = f"CKPT: {path}"
    checkpoint = upgrade(read_checkpoint(path, "CKPT"), source)
    if "training" not in checkpoint:
        method, name = rebuild_official(checkpoint, source, model_s, ft)
        return Trained(method, {"model_name": name, "image_size": 224 if name in imagenet_model_dict else 32})
    method, config = rebuild(checkpoint, source)
    if model_s not in (None, config["model_s"]):
        raise UserError(f"--model_s: {path} holds {config['model_s']}, not {model_s}")
    return Trained(method, dict(checkpoint["record"]))


def real_images(record: dict, dataset: str | None, folder: str | None) -> tuple[Tensor, str]:
    """Normalised test images (n, 3, H, W) and their data set: the run's own, else digits; of the run's size."""
    name = dataset or record.get("dataset") or "digits"
    try:
        # Only a folder that was named on the command line is written to.
        place = folder or record.get("data")
        data = load_data(name, place, record["image_size"], may_download=place is None or folder is not None)
    except UserError as error:
        if dataset is not None:
            raise
        print(f"{error}\ncomparing on digits instead")
        data = load_data("digits")
    images = next(iter(Loader(data.test, data, COMPARED_IMAGES, torch.device("cpu")).batches())).images
    size = record["image_size"]
    return images if images.shape[-1] == size else F.interpolate(images, size, mode="bilinear"), data.name


@torch.inference_mode()
def compare(trained: nn.Module, exported: Callable[[Tensor], Tensor], images: Tensor, name: str) -> None:
    """Print how far the logits of both networks lie apart; raises `UserError` where that is more than rounding."""
    before, after = (torch.cat([network(part) for part in images.split(100)]) for network in (trained, exported))
    if not before.isfinite().all():
        raise UserError(
            f"CKPT: the trained network's logits on {name} are not finite; it diverged, take another epoch's"
        )
    difference, scale = float((before - after).abs().max()), float(before.abs().max())
    same = int((before.argmax(1) == after.argmax(1)).sum())
    print(
        f"largest difference of a logit: {difference:.2e} (logits up to {scale:.1f}) on {len(images)} test images of "
        f"{name}; same class on {same} of {len(images)}"
    )
    if not difference <= TOLERANCE * scale:
        raise UserError("the exported network differs from the trained one: nothing was written")


def describe(trained: nn.Module, exported: Backbone, image_size: int) -> None:
    """Print parameters and latency of both."""
    for title, network, latency in zip(
        ("trained", "exported"), (trained, exported), measure_latency([trained, exported], image_size), strict=True
    ):
        print(f"{title:>9}: {count_parameters(network):>10,} parameters, {latency:6.2f} ms for one image (best of 30)")


def _formats(text: str) -> list[str]:
    formats = text.lower().split(",")
    for kind in formats:
        if kind not in FORMATS:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(FORMATS)}, not {kind or 'nothing'}")
    return formats


def _files(out: Path, formats: list[str] | None, source: Path) -> dict[str, Path]:
    """The files to write, by format; raises `UserError` where they cannot be made."""
    suffix = out.suffix.lstrip(".")
    if formats is None and suffix and suffix not in FORMATS:
        raise UserError(f"--out: .{suffix} is an unknown format; there are .{', .'.join(FORMATS)}")
    formats = formats or [suffix if suffix in FORMATS else "pth"]
    files = {kind: out.with_suffix(f".{kind}") if len(formats) > 1 or suffix in FORMATS else out for kind in formats}
    if not out.parent.is_dir():
        raise UserError(f"--out: there is no folder {out.parent}")
    for file in files.values():
        if file.is_dir() or file.resolve() == source.resolve():
            raise UserError(f"--out: {file} is a folder or CKPT itself; name another file")
    beside = out.with_suffix(".json")
    if beside.exists() and "model_name" not in beside.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"--out: {beside} is another file, and would be overwritten; choose another name")
    return files


def main(argv=None) -> Path:
    parser = Parser((__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", metavar="CKPT", help="best.pth or last.pth of a run, or an official NORM student")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: <CKPT>_exported.pth next to it")
    parser.add_argument("--model_s", metavar="NAME", help="for official files whose weights fit several models")
    parser.add_argument("--ft", choices=("default", "plain"), default="default", help="transform of an official file")
    parser.add_argument("--dataset", help="test images to compare on; default: the run's data set")
    parser.add_argument("--data", metavar="PATH", help="where that data set is stored")
    parser.add_argument(
        "--format",
        type=_formats,
        metavar="F,F",
        help="pth, pt2 (torch.export), onnx; default: the suffix of --out, pth",
    )
    args = parser.parse_args(argv)
    trained = read_trained(args.checkpoint, args.model_s, args.ft)
    check_classifies(trained.method.export(), f"CKPT: {args.checkpoint}")
    source = Path(args.checkpoint)
    out = args.out or source.with_name(f"{source.stem}_exported.pth")
    files = _files(out, args.format, source)
    images, name = real_images(trained.record, args.dataset, args.data)
    predictor = Predictor(trained.method).eval()
    network, merged = merge_branches(trained.method.export(), images.shape[-1])
    _, of_network = network_of(trained.method)
    record = trained.record | of_network | {"wrapper": describe_wrapper(network), "images": IMAGES}
    for kind, file in files.items():
        write, read = FORMATS[kind]
        with replacing(file) as temporary:
            write(network, record, temporary)
            compare(predictor, read(temporary, "--out").predict, images, name)
        print(f"exported {record['model_name']}: {file}")
    with replacing(out.with_suffix(".json")) as temporary:
        Path(temporary).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    describe(predictor, network, images.shape[-1])
    for note in filter(None, (trained.method.export_note(), merged)):
        print(f"note: {note}")
    return next(iter(files.values()))


if __name__ == "__main__":
    run_script(main)
