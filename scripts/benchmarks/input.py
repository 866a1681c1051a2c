"""How fast images come from a disk, with several numbers of workers, compared with what decoding alone would allow.

python scripts/benchmarks/input.py PATH --workers 0,1,2,4 --json FILE

PATH is a folder like ImageNet's, or shards. The limit is one process that only decodes, times the cores there are; what
random crops, stacking and the way between processes cost is the rest.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from dataset import ImageData, Loader, load_data
from dataset.decoding import Centre, read_views
from errors import run_script
from helper.command_line import Parser
from helper.distributed import find_device
from helper.settings import count_cores
from scripts.benchmarks.parts import report
from setting import count


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def decode_rate(data: ImageData, most: int) -> float:
    """Images per second that one process decodes and resizes, whole."""
    contents = [data.train.source.place_of(sample).read() for sample in range(min(most, len(data.train.targets)))]
    crop = Centre(data.image_size)
    start = time.perf_counter()
    for content in contents:
        read_views(lambda content=content: content, crop)
    return len(contents) / (time.perf_counter() - start)


def loader_rate(data: ImageData, batch_size: int, device: torch.device, epochs: int) -> float:
    """Images per second of training batches on the device, by workers that have started."""
    loader = Loader(data.train, data, batch_size, device, data.augmentation)
    for _ in loader.batches():  # behind a whole epoch no worker is ahead
        pass
    images, start = 0, time.perf_counter()
    for epoch in range(1, epochs + 1):
        for batch in loader.batches(epoch):
            images += len(batch.targets)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images / (time.perf_counter() - start)


def measure(args) -> Iterator[dict]:
    """One record per number of workers."""
    device, cores = find_device(args.device), count_cores()
    data = load_data("imagenet", args.path, args.image_size, 0)
    limit = decode_rate(data, args.batch_size * 4)
    for workers in args.workers:
        data = load_data("imagenet", args.path, args.image_size, workers)
        rate = loader_rate(data, args.batch_size, device, args.epochs)
        allowed = limit * min(max(workers, 1), cores)
        yield {
            "workers": workers,
            "cores": cores,
            "images_per_s": rate,
            "decode_images_per_s": allowed,
            "share": rate / allowed,
            "image_size": args.image_size,
            "device": str(device),
        }


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    lines = ["| workers | images/s | decoding alone | share |", "| -- | -- | -- | -- |"]
    for record in records:
        rates = f"{record['images_per_s']:.0f} | {record['decode_images_per_s']:.0f} | {100 * record['share']:.0f} %"
        lines.append(f"| {record['workers']} | {rates} |")
    return "\n".join(lines)


def main(argv=None) -> list[dict]:
    parser = Parser((__doc__ or "").split("\n")[0])
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--workers", type=_numbers, default=[0, 1, 2, 4], metavar="N,...", help="0,1,2,4 by default")
    parser.add_argument("--batch_size", type=count, default=64)
    parser.add_argument("--epochs", type=count, default=1, help="passes over the training images (1)")
    parser.add_argument("--image_size", type=count, default=224)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    args = parser.parse_args(argv)
    return report(measure(args), table, args.json)


if __name__ == "__main__":
    run_script(main)
