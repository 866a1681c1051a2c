"""How fast images come from a disk, with several numbers of workers, compared with what decoding alone would allow.

python scripts/benchmarks/input.py FOLDER --workers 0,1,2 --images 3000 --json FILE

FOLDER is one like ImageNet's; the same images are also read from shards that are written for it. The limit is one
process that only decodes and resizes, times the cores there are for the workers; what random crops, flips,
normalisation and the way between processes cost is the rest. The run's own operations take one thread, so that cores
are left to the workers. Workers are programs of their own: there is no start method (fork, spawn) to compare.
"""

import io
import statistics
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from dataset import ImageData, Loader, load_data
from dataset.decoding import Centre, read_views
from errors import run_script
from helper.command_line import Parser
from helper.distributed import find_device
from helper.fast import keep_freed_memory
from helper.settings import count_cores
from scripts.benchmarks.parts import machine_name, report, wait_for
from setting import count, file_to_write, must_be

#: Batches before the clock starts: workers have started then, and memory has its size.
WARM_UP = 4


@must_be("numbers of workers like 0,1,2")
def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def pack(data: ImageData, folder: str) -> None:
    """Write the images of both splits to `folder` as WebDataset shards, one for each split."""
    for name in ("train", "val"):
        images = data.train if name == "train" else data.test
        with tarfile.open(Path(folder) / f"{name}-000000.tar", "w") as shard:
            for sample, target in enumerate(images.targets.tolist()):
                content = images.source.place_of(sample).read()
                for ending, value in (("jpg", content), ("cls", str(target).encode())):
                    member = tarfile.TarInfo(f"{sample:08d}.{ending}")
                    member.size = len(value)
                    shard.addfile(member, io.BytesIO(value))


def chosen(data: ImageData, most: int) -> torch.Tensor:
    """Sample indices of at most `most` training images, of all classes."""
    return torch.randperm(len(data.train.targets), generator=torch.Generator().manual_seed(0))[:most]


def decode_rate(data: ImageData, most: int) -> float:
    """Images per second that one process decodes and resizes, whole."""
    contents = [data.train.source.place_of(sample).read() for sample in chosen(data, most).tolist()]
    crop = Centre(data.image_size)
    start = time.perf_counter()
    for content in contents:
        read_views(lambda content=content: content, crop)
    return len(contents) / (time.perf_counter() - start)


def loader_rate(data: ImageData, epoch: int, args: Namespace) -> float:
    """Images per second of the training batches of an epoch on the device, by workers that have started."""
    some = chosen(data, args.images)
    for subset in (some[: WARM_UP * args.batch_size], some):
        loader = Loader(data.train, data, args.batch_size, args.device, data.augmentation, subset=subset)
        images, start = 0, time.perf_counter()
        for batch in loader.batches(epoch):
            images += len(batch.targets)
        wait_for(args.device)
    return images / (time.perf_counter() - start)


def measure(path: str, kind: str, args: Namespace) -> Iterator[dict]:
    """One record per number of workers, of images in a folder or in shards; the limit is measured next to each."""
    cores = count_cores()
    sets = {workers: load_data("imagenet", path, args.image_size, workers) for workers in args.workers}
    limits, rates = [], {workers: [] for workers in sets}
    for round_number in range(args.rounds):
        for workers, data in sets.items():
            limits.append(decode_rate(data, args.batch_size * 4))
            rates[workers].append(loader_rate(data, round_number, args))
    for workers in sets:
        rate = statistics.median(rates[workers])
        allowed = statistics.median(limits) * min(max(workers, 1), cores)
        yield {
            "kind": kind,
            "workers": workers,
            "cores": cores,
            "images": len(chosen(sets[workers], args.images)),
            "images_per_s": rate,
            "decode_images_per_s": allowed,
            "share": rate / allowed,
            "image_size": args.image_size,
            "machine": machine_name(args.device),
            "device": str(args.device),
        }


def measure_both(args: Namespace) -> Iterator[dict]:
    """The records of the folder, then those of shards of the same images."""
    yield from measure(args.path, "folder", args)
    with tempfile.TemporaryDirectory() as folder:
        pack(load_data("imagenet", args.path, args.image_size, 0), folder)
        yield from measure(folder, "shards", args)


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    lines = ["| images in | workers | images/s | decoding alone | share |", "| -- | -- | -- | -- | -- |"]
    for record in records:
        rates = f"{record['images_per_s']:.0f} | {record['decode_images_per_s']:.0f} | {100 * record['share']:.0f} %"
        lines.append(f"| {record['kind']} | {record['workers']} | {rates} |")
    return "\n".join(lines)


def main(argv=None) -> list[dict]:
    parser = Parser.of_script(__doc__)
    parser.add_argument("path", metavar="FOLDER")
    parser.add_argument("--workers", type=_numbers, default=[0, 1, 2], metavar="N,...", help="0,1,2 by default")
    parser.add_argument("--images", type=count, default=3000, help="training images of an epoch, at most (3000)")
    parser.add_argument("--rounds", type=count, default=3, help="epochs of each number of workers; the median (3)")
    parser.add_argument("--batch_size", type=count, default=64)
    parser.add_argument("--image_size", type=count, default=224)
    parser.add_argument("--device", type=find_device, default="auto")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the records there")
    args = parser.parse_args(argv)
    keep_freed_memory(args.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return report(measure_both(args), table, args.json)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    run_script(main)
