"""Judge networks on test images: python scripts/evaluate.py NETWORK... [--teacher T]

NETWORK is a run folder (its last.pth), a checkpoint, an exported .pth, .pt2 or .onnx file, or published weights
(torchvision:NAME, timm:NAME). Data set, image size and normalisation are those on record unless flags say otherwise.
One class per image: data of several labels per image are not judged.
"""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import UserError, run_script, starting

with starting():
    from dataset import DATASETS
    from helper.command_line import Parser
    from helper.distributed import find_device
    from helper.judging import NETWORK, Asked, Judged, by_data, measure_all, read_all, read_judges_teacher
    from helper.networks import TEACHER_NORMALISATION
    from helper.run_folder import FIDELITY
    from helper.settings import normalisation
    from helper.tables.judgement import Judgement, as_html, as_text, pictures_of
    from helper.tables.pages import write_page
    from helper.tables.records import read_result
    from setting import STDOUT, below_one, count, file_or_stdout, file_to_write


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
        type=file_or_stdout,
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
    device, teacher, found = find_device(args.device), None, []
    judged = read_all(args.networks, args.model, args.normalisation, device, args.ema)
    for one in judged if args.fidelity else ():
        check_end_of_run(one)
    if args.teacher is not None:
        teacher = read_judges_teacher(args.teacher, args.model_t, args.teacher_normalisation, judged)
    for group in by_data(judged, Asked(args.dataset, args.data, args.image_size, args.split), teacher):
        for one, about in measure_all(group, teacher, device, args.batch_size):
            print(as_text(about), *(f"  note: {note}" for note in one.notes), sep="\n")
            found.append(Judgement(about, one, pictures_of(about, group.data) if args.html else {}))
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
