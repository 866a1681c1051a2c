"""Write the plain network of a trained student: transform folded in, adapters and teacher left behind.

python scripts/export_student.py save/<run>/best.pth [--out FILE] [--format pth,safetensors,onnx,pt2] [--int8]

CKPT is a checkpoint of a run, or a student by the official NORM code. Each file that was written is read back and
compared with the trained network on real images before it takes its name. A model card is written next to the files.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import UserError, count_of, run_script, starting

with starting():
    import torch
    from torch import Tensor, nn

    from dataset import ImageData, Loader, dataset_at, describe_preparation
    from dataset.decoding import WHITE
    from distiller_zoo import Distiller, Predictor
    from helper.checkpoint import network_of, rebuild, rebuild_official, take_average, upgrade
    from helper.command_line import Parser
    from helper.export import (
        CPU,
        FORMATS,
        PROGRAMS,
        Deployed,
        Program,
        RecordedData,
        check_classifies,
        onnx_versions,
        read_onnx,
        write_int8,
    )
    from helper.log import describe_protocol
    from helper.loops import evaluate
    from helper.run_folder import replacing, write_text
    from helper.tables.pages import markdown_table
    from models import imagenet_model_dict
    from models.backbone import Backbone
    from models.checkpoints import read_checkpoint
    from models.cost import count_parameters, measure_latency
    from models.external import is_external
    from models.record import check_record
    from models.wrappers import describe_wrapper, merge_branches
    from setting import below_one, count, file_to_write, what_hinders

#: How many images both networks are compared on, and how far their logits may differ, relative to the largest.
COMPARED_IMAGES = 1000
TOLERANCE = 1e-3
#: How many training images an int8 file is calibrated on, and more points lost than this are warned of.
CALIBRATION_IMAGES, QUANTISED_BATCH, LOST_POINTS = 512, 100, 1.0
#: What a model card's heading begins with.
CARD = "Model card"


class Trained(NamedTuple):
    """A checkpoint's student as it was trained, and what its file says of it."""

    method: Distiller
    record: dict  # model_name, image_size, and where they are known data set, classes, normalisation, accuracy, ...


def read_trained(path: str, model_s: str | None, ft: str | None, ema: bool = False) -> Trained:
    """Read CKPT: a run's checkpoint, with `ema` the moving average of its weights; or a student of the official NORM
    code with or without its transform."""
    source = f"CKPT: {path}"
    checkpoint = upgrade(read_checkpoint(path, "CKPT"), source)
    if ema:
        checkpoint = take_average(checkpoint, source)
    if "training" not in checkpoint:
        method, name, notes = rebuild_official(checkpoint, source, model_s, ft or "default")
        size = 224 if name in imagenet_model_dict or is_external(name) else 32
        for note in (*notes, f"it does not say how large its images are: taken for {size}x{size}, as usual of {name}"):
            print(f"{path}: {note}")
        return Trained(method, {"model_name": name, "image_size": size})
    if ft is not None:
        raise UserError(
            f"--ft: is for files of the official code; {path} says itself which transform it has; leave it out"
        )
    method, config = rebuild(checkpoint, source)
    if model_s not in (None, config["model_s"]):
        raise UserError(f"--model_s: {path} holds {config['model_s']}, not {model_s}")
    of_data = {name: config.get(name) for name in ("split", "holdout")}
    of_data["best_by"] = config.get("best_by")
    of_data["background"] = list(config.get("background") or WHITE)  # as JSON holds it
    return Trained(method, of_data | check_record(checkpoint["record"], source))


def data_to_compare(record: dict, dataset: str | None, folder: str | None, split: float | None = None) -> ImageData:
    """The data set that the flags name, or the run's own, as far as it is there, else digits; of the run's size."""
    if dataset is None and folder is not None:
        dataset = dataset_at(folder, record.get("dataset"))
    wanted = RecordedData.of(record, dataset, folder, split=split)
    try:
        return wanted.load()
    except UserError as error:
        if dataset is not None:
            raise
        print(f"{error}\ncomparing on digits instead")
    return RecordedData.of(record, "digits")._replace(folder=None).load()


def real_images(data: ImageData) -> Tensor:
    """Normalised test images (n, 3, H, W), of whole numbers as pixels."""
    images = next(iter(Loader(data.test, data, COMPARED_IMAGES, CPU).batches())).images
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    return (((images * std + mean) * 255).round().clamp(0, 255) / 255 - mean) / std


@torch.inference_mode()
def compare(trained: nn.Module, exported: Deployed, images: Tensor, name: str) -> None:
    """Print how far the outputs of both networks are apart; raises `UserError` where that is more than rounding."""
    before, after = (torch.cat([one(part) for part in images.split(100)]) for one in (trained, exported.predict))
    if not before.isfinite().all():
        raise UserError(
            f"CKPT: the trained network's logits on {name} are not finite; it diverged, take another epoch's"
        )
    what = "logit"
    if Program.of(exported.record).probabilities:
        what, before, after = "probability", before.softmax(1), after.softmax(1)
    difference, scale = float((before - after).abs().max()), float(before.abs().max())
    same = int((before.argmax(1) == after.argmax(1)).sum())
    print(
        f"largest difference of a {what}: {difference:.2e} (up to {scale:.1f}) on {len(images)} test images of "
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


def _files(out: Path, formats: list[str] | None, source: Path, int8: bool) -> dict[str, Path]:
    """The files to write, by format; raises `UserError` where they cannot be made."""
    suffix = out.suffix.lstrip(".")
    if formats is None and suffix and suffix not in FORMATS:
        raise UserError(f"--out: .{suffix} is an unknown format; there are .{', .'.join(FORMATS)}")
    formats = formats or [suffix if suffix in FORMATS else "pth"]
    if int8 and "onnx" not in formats:
        print("--int8 quantises the ONNX file, which is written too")
        formats = [*formats, "onnx"]
    files = {kind: out.with_suffix(f".{kind}") if len(formats) > 1 or suffix in FORMATS else out for kind in formats}
    if reason := what_hinders(out.parent):  # where CKPT is
        raise UserError(f"--out: {reason}")
    for file in files.values():
        if file.is_dir() or file.resolve() == source.resolve():
            raise UserError(f"--out: {file} is a folder or CKPT itself; name another file")
    for beside, written in ((out.with_suffix(".json"), "model_name"), (out.with_suffix(".md"), CARD)):
        if beside.exists() and written not in beside.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"--out: {beside} is another file, and would be overwritten; choose another name")
    return files


def _program(args, formats: Iterable[str], record: dict) -> Program:
    """What the programs have inside; raises `UserError` where a flag has no effect or what it needs is unknown."""
    program = Program(args.pixels, args.probabilities, args.opset)
    if program._replace(opset=None) != Program() and not set(formats) & set(PROGRAMS):
        flag = "--pixels" if args.pixels else "--probabilities"
        raise UserError(f"{flag}: of the formats only {' and '.join(PROGRAMS)} hold a program; add --format onnx")
    if args.opset is not None and "onnx" not in formats:
        raise UserError("--opset: only ONNX files have one; add --format onnx")
    if args.pixels and not (record.get("mean") and record.get("std")):
        raise UserError("--pixels: CKPT does not say its mean and std; leave it out")
    return program


# Quantisation.


def calibration_images(data: ImageData) -> Tensor:
    """Some normalised training images (n, 3, H, W), as the network is shown test images."""
    some = torch.randperm(len(data.train.targets), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
    return next(iter(Loader(data.train, data, len(some), CPU, subset=some).batches())).images


def quantise(source: Path, data: ImageData) -> tuple[Path, str]:
    """Write an int8 file next to an ONNX file -> (its path, a line on accuracy, size and latency of both)."""
    target = source.with_name(f"{source.stem}_int8.onnx")
    with replacing(target) as temporary:
        write_int8(str(source), temporary, calibration_images(data))
    models = [read_onnx(str(path), "--int8").predict for path in (source, target)]
    loader = Loader(data.test, data, QUANTISED_BATCH, CPU)
    before, after = (evaluate(one, loader, "testing")["test_accuracy"] for one in models)
    sizes = [path.stat().st_size / 2**20 for path in (source, target)]
    latencies = measure_latency(models, data.image_size)
    line = (
        f"int8: accuracy {after:.2f} % (float {before:.2f} %) on {len(data.test.targets)} test images of {data.name}, "
        f"{sizes[1]:.2f} MiB (float {sizes[0]:.2f} MiB), {latencies[1]:.2f} ms for one image (float "
        f"{latencies[0]:.2f} ms; best of 30, onnxruntime on this CPU)"
    )
    if before - after > LOST_POINTS:
        line += f"; warning: it loses {before - after:.2f} points"
    return target, line


# The model card.


def _accuracy(record: dict, source: Path) -> str:
    if record.get("accuracy") is None:
        return "unknown: the file does not say"
    protocols = {
        "best": describe_protocol(record.get("holdout"), record.get("best_by") or "accuracy"),
        "last": "the last",
    }
    chosen = f" ({protocols[source.stem]})" if source.stem in protocols else ""
    epoch = f"; epoch {record['epoch']}{chosen}" if record.get("epoch") else ""
    tried = f"; trained for {count_of(record['max_steps'], 'step')} only" if record.get("max_steps") else ""
    return f"{record['accuracy']:.2f} % top-1 on the test images, float32, one centre crop{epoch}{tried}"


def _call(file: Path, record: dict, program: Program) -> str:
    """A file of the card: its size, and how it is used."""
    use = "weights and record, for `models` of the toolbox that wrote it"
    if file.suffix.lstrip(".") in PROGRAMS:
        kind = "uint8, 0 to 255, which it normalises itself" if program.pixels else "float32, normalised"
        size, classes = record["image_size"], record["num_classes"]
        use = f"takes `{program.input}`: {kind}, (B, 3, {size}, {size}); gives `{program.output}`, (B, {classes})"
    return f"- `{file.name}`, {file.stat().st_size / 2**20:.2f} MiB: {use}"


def _counted(record: dict) -> str:
    known = record.get("identity") or {}
    counts = {"classes": record["num_classes"], "training images": record.get("train_images")}
    counts["test images"] = known.get("test_images")
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number)


def _taught(record: dict) -> str:
    teacher = record.get("teacher")
    if not teacher:
        return "no teacher" if record.get("distill") else "unknown"
    accuracy = "" if teacher.get("accuracy") is None else f", {teacher['accuracy']:.2f} % on the same test images"
    return f"{teacher['name']}, digest {teacher['digest']}{accuracy}"


def model_card(
    record: dict, source: Path, files: Iterable[Path], program: Program, notes: Sequence[str], lines: Iterable[str]
) -> str:
    """What somebody who receives the files must know, as Markdown; `notes` say what is kept or changed in them."""
    classes = record.get("classes") or ()
    rows = {
        "network": "; ".join([f"{record['model_name']}, digest {record.get('digest', 'unknown')}", *notes]),
        "data": f"{record.get('dataset') or 'unknown'}: {_counted(record)}",
        "classes": f"{', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}" or "unknown",
        "method": f"--distill {record['distill']}" if record.get("distill") else "unknown",
        "teacher": _taught(record),
        "accuracy": _accuracy(record, source),
        "input": f"RGB, {record['image_size']}x{record['image_size']}",
        "preparation": record["images"],
        "mean, std": f"{record.get('mean', 'unknown')}, {record.get('std', 'unknown')}",
        "licence": "TO FILL IN",
        "limits": "TO FILL IN: what it must not be used for, and which images it was not tested on",
    }
    shown = markdown_table([["", ""], *((name, str(value)) for name, value in rows.items())])
    uses = "\n".join(_call(file, record, program) for file in files)
    return f"# {CARD}: {record['model_name']}\n\n{shown}\n\n## Files\n\n{uses}\n\n" + "".join(
        f"{line}\n\n" for line in lines
    )


def make_parser() -> Parser:
    """The flags of this script."""
    parser = Parser.of_script(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="best.pth or last.pth of a run, or an official NORM student")
    add("--out", type=file_to_write, metavar="FILE", help="default: <CKPT>_exported.pth next to it")
    add("--model_s", metavar="NAME", help="for official files whose weights fit several models")
    add("--ema", action="store_true", help="the moving average of the weights, of a run with --ema_decay")
    add("--ft", choices=("default", "plain"), help="transform of an official file (default)")
    add("--dataset", help="images to compare on; default: the run's data set")
    add("--data", metavar="PATH", help="where that data set is stored")
    add("--split", type=below_one, metavar="SHARE", help="of the training images, for a folder without test images")
    formats = "pth, safetensors, pt2 (torch.export), onnx; default: the suffix of --out, pth"
    add("--format", type=_formats, metavar="F,F", help=formats)
    add("--opset", type=count, metavar="N", help="of the ONNX file; default: the exporter's own")
    add("--pixels", action="store_true", help="pt2 and onnx take uint8 pixels and normalise them themselves")
    add("--probabilities", action="store_true", help="pt2 and onnx end with the softmax")
    add("--int8", action="store_true", help="also write an ONNX file of 8 bits, calibrated on training images")
    return parser


def main(argv=None) -> Path:
    args = make_parser().parse_args(argv)
    trained, source = read_trained(args.checkpoint, args.model_s, args.ft, args.ema), Path(args.checkpoint)
    check_classifies(trained.method.export(), f"CKPT: {source}")
    out = args.out or source.with_name(f"{source.stem}_exported.pth")
    files = _files(out, args.format, source, args.int8)
    program = _program(args, files, trained.record)
    data = data_to_compare(trained.record, args.dataset, args.data, args.split)
    if args.int8 and data.name != trained.record.get("dataset"):
        raise UserError("--int8: it is calibrated on the run's training images, which are not there; name --data")
    images = real_images(data)
    predictor = Predictor(trained.method).eval()
    network, merged = merge_branches(trained.method.export(), images.shape[-1])
    _, of_network = network_of(trained.method)
    described = {"wrapper": describe_wrapper(network), "images": describe_preparation(trained.record)}
    record = trained.record | of_network | described
    record.pop("data", None)  # a folder of this machine
    for kind, file in files.items():
        write, read = FORMATS[kind]
        with replacing(file) as temporary:
            write(network, record, temporary, program)
            compare(predictor, read(temporary, "--out"), images, data.name)
            versions = "; opset {}, IR {}".format(*onnx_versions(temporary)) if kind == "onnx" else ""
        print(f"exported {record['model_name']}: {file}{versions}")
    notes = [note for note in (trained.method.export_note(), merged) if note]
    written, lines = list(files.values()), []
    if args.int8:
        target, line = quantise(files["onnx"], data)
        print(f"exported {record['model_name']}: {target}\n{line}")
        written, lines = [*written, target], [line]
    said = program.recorded(record) if set(files) <= set(PROGRAMS) else record
    write_text(out.with_suffix(".json"), json.dumps(said, indent=2) + "\n")
    write_text(out.with_suffix(".md"), model_card(said, source, written, program, notes, lines))
    print(f"model card: {out.with_suffix('.md')}; its licence is to be filled in")
    describe(predictor, network, images.shape[-1])
    for note in notes:
        print(f"note: {note}")
    return next(iter(files.values()))


if __name__ == "__main__":
    run_script(main)
