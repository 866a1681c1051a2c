"""What share of a fast step the batches of images in memory take, with the augmentation of each recipe.

python scripts/benchmarks/augmentation.py [--pairs resnet32x4:resnet8x4] [--batch_size 64] [--json FILE]

A step is NORM's, on as many images as a batch has with all its views. Steps and batches of all kinds alternate; the
medians are compared. Batches are made before a step, not during it.
"""

import itertools
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from dataset import POLICIES, Augmentation, Batch, ImageData, Loader, load_data
from distiller_zoo import DISTILLERS
from errors import run_script
from helper.command_line import Parser, resolve
from helper.distributed import find_device
from helper.fast import keep_freed_memory
from helper.loops import augmentation_of
from helper.recipes import RECIPES
from helper.tables.pages import markdown_table
from helper.tables.plan import read_pairs
from scripts.benchmark import Contender, choose
from scripts.benchmarks.parts import machine_name, report, seconds_of
from setting import count, file_to_write


def cases(pair: tuple[str, str], data: ImageData) -> Iterator[tuple[str, Augmentation, str]]:
    """(what is measured, the augmentation, the views) of every recipe, of methods with views, and of every change."""
    flags = [{"recipe": recipe} for recipe in RECIPES] + [{"distill": "sskd"}, {"distill": "mlkd"}]
    flags += [{"augment": policy} for policy in POLICIES if policy not in ("standard", "none")]
    flags += [{"colour_jitter": 0.4}, {"random_erasing": 0.5}]
    for given in flags:
        ((flag, value),) = given.items()
        usual = {"distill": "norm", "model_s": pair[1], "dataset": "cifar100"}
        config = resolve(usual | given, of_teacher={"model_t": pair[0], "path_t": ""})
        yield f"--{flag} {value}", augmentation_of(config, data), DISTILLERS[config.distill].views


def whole(batch: Batch) -> Batch:
    """The batch with its classes, once for every view."""
    views = len(batch.images) // len(batch.targets)
    return batch._replace(targets=batch.classes.repeat(views), index=batch.index.repeat(views))


def measure(pair: tuple[str, str], data: ImageData, args: Namespace) -> Iterator[dict]:
    """One record for each augmentation."""
    fast = choose(args.device)
    contender = Contender(pair, 8, data, args, "auto", fast)
    known = list(cases(pair, data))
    loaders = {
        name: Loader(data.train, data, args.batch_size, args.device, augmentation, views=views)
        for name, augmentation, views in known
    }
    held = {name: whole(next(loader.batches())) for name, loader in loaders.items()}
    of_size = {len(batch.images): batch for batch in held.values()}
    batches: dict[str, list[float]] = {name: [] for name in loaders}
    steps: dict[int, list[float]] = {size: [] for size in of_size}
    for number in range(args.rounds + 1):  # the first is for threads, caches and tables
        for name, loader in loaders.items():
            made = itertools.islice(loader.batches(number), args.batches)
            batches[name].append(seconds_of(lambda made=made: [None for _ in made], args.device) / args.batches)
        for size, batch in of_size.items():
            steps[size].append(seconds_of(lambda batch=batch: contender.step(batch), args.device))
    for name, batch in held.items():
        taken, step = (statistics.median(times[1:]) for times in (batches[name], steps[len(batch.images)]))
        yield {
            "augmentation": name,
            "pair": " -> ".join(pair),
            "batch_size": args.batch_size,
            "batch_s": taken,
            "step_s": step,
            "share": taken / step,
            "machine": machine_name(args.device),
            "device": str(args.device),
        }


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    lines = [["images in memory, with", "a batch", "a fast step", "share"]]
    for record in records:
        times = [f"{1000 * record['batch_s']:.2f} ms", f"{1000 * record['step_s']:.1f} ms"]
        lines.append([f"`{record['augmentation']}`", *times, f"{100 * record['share']:.1f} %"])
    return markdown_table(lines)


def main(argv=None) -> list[dict]:
    parser = Parser.of_script(__doc__)
    parser.add_argument(
        "--pairs", type=read_pairs, default="resnet32x4:resnet8x4", metavar="T:S,...", help="resnet32x4:resnet8x4"
    )
    parser.add_argument("--batch_size", type=count, default=64)
    parser.add_argument("--batches", type=count, default=10, help="of each augmentation in a round (10)")
    parser.add_argument("--rounds", type=count, default=7, help="alternating rounds (7)")
    parser.add_argument("--dataset", default="digits", help="images to train on (digits)")
    parser.add_argument("--data", metavar="PATH")
    parser.add_argument("--device", type=find_device, default="auto")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the records there")
    args = parser.parse_args(argv)
    keep_freed_memory(args.device)
    data = load_data(args.dataset, args.data)
    records = itertools.chain.from_iterable(measure(pair, data, args) for pair in args.pairs)
    return report(records, table, args.json)


if __name__ == "__main__":
    run_script(main)
