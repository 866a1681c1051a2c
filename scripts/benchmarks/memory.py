"""What N costs in memory: the peak of a training step with NORM, of transformers by default, for several N.

python scripts/benchmarks/memory.py [--pairs timm:vit_small_patch16_224:timm:vit_tiny_patch16_224] [--n 1,16]
    [--image_size 224] [--batch_size 32] [--json FILE]

The peak is of everything that training holds: both networks, the transform, gradients, the optimizer's momentum and
what a step allocates. In the fast path.
"""

import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from dataset import ImageData, Loader, load_data
from errors import run_script
from helper.tables.pages import markdown_table
from scripts.benchmark import Contender, choose, counts
from scripts.benchmarks.parts import describe_step, pair_parser, peak_memory, report


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(pair: tuple[str, str], n: int, data: ImageData, args: Namespace) -> dict[str, Any]:
    """One record: what is held between two steps and what a step adds at most, in bytes."""
    contender = Contender(pair, n, data, args, "auto", args.fast)
    batch = next(Loader(data.train, data, args.batch_size, args.device, data.augmentation).batches())
    contender.step(batch)  # what is made once: momentum, and what libraries keep
    contender.optimizer.zero_grad(set_to_none=True)
    momentum = (value for state in contender.optimizer.state.values() for value in state.values())
    held = [*contender.method.state_dict().values(), *contender.teacher.state_dict().values(), *momentum]
    return describe_step(pair, n, data, args) | {
        "held": size_of(value for value in held if isinstance(value, torch.Tensor)),
        "step": peak_memory(lambda: contender.step(batch), args.device),
    }


def peak(record: dict) -> int:
    """Bytes that a record's training holds at most."""
    return record["held"] + record["step"]


def table(records: list[dict]) -> str:
    """The records as Markdown, each compared with the first N of its pair."""
    lines = [["pair", "image", "batch", "N", "peak", "relative"]]
    firsts: dict[str, int] = {}
    for one in records:
        share = peak(one) / firsts.setdefault(one["pair"], peak(one))
        size = [f"{one['image_size']}x{one['image_size']}", str(one["batch_size"]), str(one["n"])]
        lines.append([one["pair"], *size, f"{peak(one) / 2**20:.1f} MiB", f"{share:.3f}"])
    return markdown_table(lines)


def main(argv=None) -> list[dict]:
    usual = "timm:vit_small_patch16_224:timm:vit_tiny_patch16_224"
    parser = pair_parser(__doc__, usual)
    parser.add_argument("--n", type=counts, default="1,16", metavar="N,N")
    args = parser.parse_args(argv)
    args.fast, data = choose(args.device), load_data("digits", None, args.image_size)
    records = (measure(pair, n, data, args) for pair in args.pairs for n in args.n)
    return report(records, table, args.json)


if __name__ == "__main__":
    run_script(main)
