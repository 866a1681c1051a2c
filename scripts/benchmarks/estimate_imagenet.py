"""How long NORM's ImageNet runs would take: an estimate from operations and traffic, nothing here is measured.

python scripts/benchmarks/estimate_imagenet.py [--flops_per_s 9.89e14] [--shares 0.1,0.4] [--json FILE]

A step needs the teacher's forward pass, the student's forward and backward pass (three forward passes) and the feature
transform in its cheaper form (three times docs/norm.md's count). Its floor is the longer of operations / rate and
bytes / bandwidth, where every layer reads its input and writes its output in bfloat16. A GPU reaches some share of the
floor: the estimate is a range between two. The rates are an H100's data sheet's. Input, tests and the exchange of
gradients are left out; `scripts/benchmarks/input.py` measures what the input can deliver.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor, nn

from distiller_zoo.feature_transform import multiply_adds
from errors import run_script
from helper.command_line import Parser
from helper.recipes import IMAGENET_PAIRS
from helper.tables.pages import markdown_table
from models import build_model
from models.backbone import Backbone, evaluating, probe_shapes
from models.cost import count_multiply_adds
from scripts.benchmarks.parts import report
from setting import file_to_write, number

IMAGES, EPOCHS, SIZE, BATCH, N = 1_281_167, 100, 224, 256, 8


def bytes_per_image(network: Backbone) -> int:
    """What the layers read and write for one image in bfloat16, without weights, which a batch shares."""
    values = 0

    def add(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal values
        reads = 2 if isinstance(layer, nn.BatchNorm2d) else 1  # once for the statistics
        values += reads * inputs[0].numel() + output.numel()

    layers = [layer for layer in network.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    with evaluating(network):
        network(torch.zeros(1, 3, SIZE, SIZE))
    for hook in hooks:
        hook.remove()
    return 2 * values


def estimate(pair: tuple[str, str], args: Namespace) -> dict:
    """One pair: its work for an image, and images/s and hours of a whole run on one GPU, by the share of the floor."""
    teacher, student = (build_model(name, 1000) for name in pair)
    channels, height, width = probe_shapes(student, SIZE).final
    teacher_channels = probe_shapes(teacher, SIZE).final[0]
    transform = min(multiply_adds(BATCH * height * width, channels, teacher_channels, N).values()) / BATCH
    products = count_multiply_adds(teacher, SIZE) + 3 * (count_multiply_adds(student, SIZE) + transform)
    moved = bytes_per_image(teacher) + 3 * bytes_per_image(student)
    floor = max(2 * products / args.flops_per_s, moved / args.bytes_per_s)
    return {
        "pair": ":".join(pair),
        "flops_per_image": 2 * products,
        "bytes_per_image": moved,
        "floor_s_per_image": floor,
        "shares": args.shares,
        "images_per_s": [share / floor for share in args.shares],
        "gpu_hours": [IMAGES * EPOCHS * floor / share / 3600 for share in args.shares],
        "flops_per_s": args.flops_per_s,
        "bytes_per_s": args.bytes_per_s,
    }


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    rows = [("pair", "GFLOP per image", "MB per image", "images/s of a GPU", "GPU hours of 100 epochs")]
    for record in records:
        work = f"{record['flops_per_image'] / 1e9:.1f}", f"{record['bytes_per_image'] / 1e6:.0f}"
        ranges = (" to ".join(f"{value:.0f}" for value in sorted(record[key])) for key in ("images_per_s", "gpu_hours"))
        rows.append((record["pair"].replace(":", " -> "), *work, *ranges))
    return markdown_table(rows)


def main(argv=None) -> list[dict]:
    parser = Parser.of_script(__doc__)
    parser.add_argument("--flops_per_s", type=number, default=9.89e14, help="bfloat16 operations per second (9.89e14)")
    parser.add_argument("--bytes_per_s", type=number, default=3.35e12, help="of the memory (3.35e12)")
    parser.add_argument("--shares", type=_shares, default=[0.1, 0.4], metavar="X,X", help="of the floor (0.1,0.4)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the records there")
    args = parser.parse_args(argv)

    return report((estimate(pair, args) for pair in IMAGENET_PAIRS), table, args.json)


def _shares(text: str) -> list[float]:
    return [number(part) for part in text.split(",")]


if __name__ == "__main__":
    run_script(main)
