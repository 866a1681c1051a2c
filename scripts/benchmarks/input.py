"""How fast images come from a disk, with several numbers of workers, compared with what decoding alone would allow.

python scripts/benchmarks/input.py FOLDER --workers 0,1,2 --images 3000 --json FILE

FOLDER is one like ImageNet's; the same images are also read from shards that are written for it. The limit is one
process that only decodes and resizes, times the cores there are for the workers; how much of it as many such processes
reach side by side is measured too. Batches are timed twice: as bytes, which the run's process copies once, as it does
on the way to a GPU; and normalised on the device, which on a CPU takes time from the workers. The run's own operations
take one thread. Workers are programs of their own: there is no start method (fork, spawn) to compare.
"""

import io
import multiprocessing
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
from dataset.decoding import Centre, RandomCrops, read_views
from errors import run_script
from helper.command_line import Parser
from helper.distributed import find_device
from helper.fast import keep_freed_memory
from helper.settings import count_cores
from helper.tables.pages import markdown_table
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


def encoded(data: ImageData, most: int) -> list[bytes]:
    """The contents of at most `most` files."""
    return [data.train.source.place_of(sample).read() for sample in chosen(data, most).tolist()]


def decode_rate(contents: list[bytes], size: int) -> float:
    """Images per second that this process decodes and resizes, whole."""
    crop = Centre(size)
    start = time.perf_counter()
    for content in contents:
        read_views(lambda content=content: content, crop)
    return len(contents) / (time.perf_counter() - start)


def _decode_when_all_are_ready(ready, rates, contents: list[bytes], size: int) -> None:
    ready.wait()
    rates.put(decode_rate(contents, size))


def side_by_side_rate(contents: list[bytes], size: int, processes: int) -> float:
    """Images per second of that many processes that decode and resize at the same time."""
    context = multiprocessing.get_context("spawn")
    ready, rates = context.Barrier(processes), context.Queue()
    arguments = (ready, rates, contents, size)
    decoding = [context.Process(target=_decode_when_all_are_ready, args=arguments) for _ in range(processes)]
    for process in decoding:
        process.start()
    total = sum(rates.get() for _ in decoding)
    for process in decoding:
        process.join()
    return total


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


def byte_rate(data: ImageData, epoch: int, args: Namespace) -> float:
    """Images per second of the same crops as bytes, copied once by this process."""
    crops = RandomCrops(data.image_size, 0, epoch, 1, data.augmentation.scale)
    parts = chosen(data, args.images).split(args.batch_size)
    images, start = 0, time.perf_counter()
    for index, (pixels,) in data.train.read(parts, crops, fill=True):
        pixels.clone()
        images += len(index)
    return images / (time.perf_counter() - start)


def measure(path: str, kind: str, args: Namespace) -> Iterator[dict]:
    """One record per number of workers, of images in a folder or in shards; the limits are measured next to each."""
    cores = count_cores()
    sets = {workers: load_data("imagenet", path, args.image_size, workers) for workers in args.workers}
    contents = encoded(next(iter(sets.values())), args.batch_size * 4)
    busy = {workers: min(max(workers, 1), cores) for workers in sets}
    limits = []
    rates, of_bytes, together = ({workers: [] for workers in sets} for _ in range(3))
    for round_number in range(args.rounds):
        for workers, data in sets.items():
            limits.append(alone := decode_rate(contents, args.image_size))
            several = busy[workers] > 1
            together[workers].append(side_by_side_rate(contents, args.image_size, busy[workers]) if several else alone)
            rates[workers].append(loader_rate(data, round_number, args))
            of_bytes[workers].append(byte_rate(data, round_number, args))
    for workers, data in sets.items():
        allowed = statistics.median(limits) * busy[workers]
        rate, rate_of_bytes = statistics.median(rates[workers]), statistics.median(of_bytes[workers])
        yield {
            "kind": kind,
            "workers": workers,
            "cores": cores,
            "images": len(chosen(data, args.images)),
            "decode_images_per_s": allowed,
            "side_by_side_images_per_s": statistics.median(together[workers]),
            "bytes_images_per_s": rate_of_bytes,
            "bytes_share": rate_of_bytes / allowed,
            "images_per_s": rate,
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
    lines = [["images in", "workers", "decoding alone", "side by side", "as bytes", "share", "normalised", "share"]]
    for record in records:
        limit, together = (f"{record[f'{name}_images_per_s']:.0f}/s" for name in ("decode", "side_by_side"))
        of_bytes, whole = f"{record['bytes_images_per_s']:.0f}/s", f"{record['images_per_s']:.0f}/s"
        shares = [f"{100 * record[name]:.0f} %" for name in ("bytes_share", "share")]
        lines.append([record["kind"], str(record["workers"]), limit, together, of_bytes, shares[0], whole, shares[1]])
    return markdown_table(lines)


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
