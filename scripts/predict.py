"""Classes and probabilities of image files, by an exported network.

python scripts/predict.py MODEL IMAGE... [--top K] [--csv FILE] [--json FILE]

MODEL is a .pth, .pt2 or .onnx file by scripts/export_student.py, which knows the image size, the normalisation and the
names of the classes. IMAGE is a file, a folder, a pattern like "*.jpg", or - for a list on standard input, a name in
each line. Images of any size are read as the data set's were; one that cannot be read is named and left out, and the
exit code is then 1.
"""

import csv
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import UserError, run_script, starting

with starting():
    import torch
    from torch import Tensor
    from tqdm import tqdm

    from dataset import LOOKED_AT, Place, describe_dark, find_images, read_normalised
    from helper.command_line import Parser
    from helper.distributed import find_device
    from helper.export import NEEDED, Deployed, check_finite, read_deployed
    from helper.run_folder import replacing
    from helper.settings import count_cores
    from helper.tables.pages import in_csv
    from setting import STDOUT, count, file_or_stdout

#: Stands for a list on standard input.
DASH = "-"


class Prediction(NamedTuple):
    """What a network says of an image: (class, probability), likeliest first; or why it cannot be read."""

    image: str
    classes: list[tuple[str, float]]
    error: str = ""


def read_model(path: str, device: torch.device) -> Deployed:
    """Read MODEL; raises `UserError` where its file does not say how images are to be prepared."""
    model = read_deployed(path, device=device)
    missing = [name for name in NEEDED if not model.record.get(name)]
    if missing:
        raise UserError(
            f"MODEL: {path} does not say {', '.join(missing)}; export it again from the checkpoint of a run of this "
            "toolbox"
        )
    return model


def predict(model: Deployed, paths: Iterable[str], top: int, batch: int) -> Iterator[Prediction]:
    """The `top` likeliest classes of every image file, in order, computed in batches."""
    classes, paths = model.record["classes"], iter(paths)
    with ThreadPoolExecutor(count_cores()) as threads:
        while some := list(itertools.islice(paths, batch)):
            read = list(threads.map(lambda path: _read(path, model.record), some))
            images = [image for image in read if isinstance(image, Tensor)]
            rows = iter(_likeliest(model, torch.stack(images), min(top, len(classes))) if images else ())
            for path, image in zip(some, read, strict=True):
                found = [(classes[index], share) for index, share in next(rows)] if isinstance(image, Tensor) else []
                yield Prediction(path, found, "" if isinstance(image, Tensor) else image)


def warn_of_dark(paths: Iterable[str], batch: int) -> Iterator[str]:
    """The same names; says it on standard error where the first images, at most a batch, are almost black."""
    paths = iter(paths)
    first = list(itertools.islice(paths, min(LOOKED_AT, batch)))
    line = describe_dark([Place(os.fsencode(path)) for path in first])
    if line:
        print(line, file=sys.stderr)
    return itertools.chain(first, paths)


def _read(path: str, record: dict) -> Tensor | str:
    try:
        return read_normalised(path, record)
    except UserError as error:
        return str(error)


@torch.inference_mode()
def _likeliest(model: Deployed, images: Tensor, top: int) -> list[list[tuple[int, float]]]:
    logits = check_finite(model.predict(images).float(), "MODEL")
    probabilities, indices = logits.softmax(1).topk(top, 1)
    return [list(zip(*row, strict=True)) for row in zip(indices.tolist(), probabilities.tolist(), strict=True)]


# Output.

Writer = Callable[[Prediction], None]


def text_writer(file: TextIO, top: int, closing: ExitStack) -> Writer:
    """A line for each image."""

    def write(one: Prediction) -> None:
        if not one.error:
            shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in one.classes)
            tqdm.write(f"{one.image}: {shares}", file)

    return write


def csv_writer(file: TextIO, top: int, closing: ExitStack) -> Writer:
    """A header, and a row for each image that can be read."""
    writer = csv.writer(file, lineterminator="\n")
    numbers = [""] if top == 1 else [f"_{number}" for number in range(1, top + 1)]
    writer.writerow(["image", *(f"{name}{number}" for number in numbers for name in ("class", "probability"))])

    def write(one: Prediction) -> None:
        if not one.error:
            cells = [cell for name, share in one.classes for cell in (name, f"{share:.6f}")]
            writer.writerow(map(in_csv, [one.image, *cells]))

    return write


def json_writer(file: TextIO, top: int, closing: ExitStack) -> Writer:
    """A list with an entry for each image; of one that cannot be read with its error."""
    before = iter(itertools.chain(["[\n"], itertools.repeat(",\n")))
    closing.callback(lambda: file.write("\n]\n" if next(before) != "[\n" else "[]\n"))

    def write(one: Prediction) -> None:
        entry: dict[str, Any] = {"image": one.image}
        classes = [{"class": name, "probability": round(share, 6)} for name, share in one.classes]
        entry |= {"error": one.error} if one.error else {"classes": classes}
        file.write(next(before) + json.dumps(entry))

    return write


#: Writers by the flag that names their file.
WRITERS = {"csv": csv_writer, "json": json_writer}


def open_writers(args, top: int, files: ExitStack) -> list[Writer]:
    """One for every file that was asked for, and lines on standard output where nothing else goes there."""
    asked = {name: path for name in WRITERS if (path := getattr(args, name)) is not None}
    writers = [] if asked else [text_writer(sys.stdout, top, files)]
    for name, path in asked.items():
        place = path if path == STDOUT else files.enter_context(replacing(path))
        options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        file = sys.stdout if path == STDOUT else files.enter_context(open(place, "w", **options))  # noqa: SIM115
        writers.append(WRITERS[name](file, top, files))
    return writers


def names_of(images: Iterable[str]) -> Iterator[str]:
    """The command line's names, with a list on standard input in the place of a dash."""
    for name in images:
        if name == DASH:
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        else:
            yield name


def make_parser() -> Parser:
    """The flags of this script."""
    parser = Parser.of_script(__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a .pth, .onnx or (your own) .pt2 by export_student.py")
    add("images", metavar="IMAGE", nargs="+", help='file, folder, pattern like "*.jpg", or - for a list of names')
    add("--top", type=count, default=1, metavar="K", help="classes to name of every image (1)")
    add("--csv", type=file_or_stdout, metavar="FILE", help="a table instead of lines; - is standard output")
    add("--json", type=file_or_stdout, metavar="FILE", help="a list of entries instead of lines; - is standard output")
    add("--batch_size", type=count, default=64, metavar="B", help="images that are computed at once (64)")
    add("--device", default="auto", help="auto (CUDA where there is a GPU), cpu, cuda, cuda:1, ...")
    return parser


def main(argv=None) -> None:
    args = make_parser().parse_args(argv)
    model = read_model(args.model, find_device(args.device))
    paths: Iterable[str] = find_images(names_of(args.images))
    if DASH not in args.images:
        paths = list(paths)
    top, skipped = min(args.top, len(model.record["classes"])), 0
    total = len(paths) if isinstance(paths, list) else None
    with ExitStack() as files:
        writers = open_writers(args, top, files)
        found = predict(model, warn_of_dark(paths, args.batch_size), top, args.batch_size)
        for one in tqdm(found, "predicting", total, leave=False, disable=not sys.stderr.isatty(), unit="image"):
            skipped += bool(one.error)
            if one.error:
                tqdm.write(f"skipped: {one.error}", sys.stderr)
            for write in writers:
                write(one)
    if skipped:
        print(f"{skipped} of the images could not be read", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
